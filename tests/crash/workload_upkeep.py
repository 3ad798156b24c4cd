"""What a ring does beside commits: trains its dictionary, merges blocks, sets damage aside, forgets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import lmdb

from storage.ring import Ring
from storage.samples import Samples
from tests.crash.audit import (
    Opened,
    Violation,
    acknowledged_numbers,
    check_acknowledged,
    check_contents,
    check_letters,
    check_moment,
    check_undamaged,
    opened,
)
from tests.crash.plan import Plan, say

__all__ = ["audit", "prepare", "run"]

BEFORE = 28  # commits before the recording: just too few samples for a dictionary
QUARANTINE_AFTER, FORGET_AFTER, LAST = 45, 60, 72
SUBJECT = "crew-b"
DAMAGED_BLOCK = 3  # from the oldest


@lru_cache(maxsize=2)
def _plan(seed: int) -> Plan:
    return Plan(seed, LAST + 1)


def prepare(root: Path, seed: int) -> None:
    """The first commits, then one bit of a block goes bad on the medium."""
    plan = _plan(seed)
    with opened(root / "data", mending=False) as data:
        for number in range(1, BEFORE + 1):
            data.ring.commit(plan.commit(number))
        folder = data.ring.folder
    with lmdb.open(str(folder), readonly=True, lock=False, lib_version=0) as env, env.begin() as txn:
        blocks = [bytes(value) for key, value in txn.cursor() if key[:1] == b"t"]
    _flip_a_bit(folder / "data.mdb", blocks[-DAMAGED_BLOCK])


def _flip_a_bit(file: Path, block: bytes) -> None:
    data = file.read_bytes()
    damaged = block[:-9] + bytes([block[-9] ^ 1]) + block[-8:]
    assert block in data
    file.write_bytes(data.replace(block, damaged))


def run(root: Path, seed: int) -> None:
    """The part that is recorded."""
    plan = _plan(seed)
    with opened(root / "data", mending=False) as data:
        for number in range(BEFORE + 1, LAST + 1):
            say(f"try commit {number}")
            data.ring.commit(plan.commit(number))
            say(f"ack commit {number}")
            if number == QUARANTINE_AFTER:
                say("try quarantine 1")
                (row,) = data.ring.quarantine(root / "data" / "quarantine")
                say(f"ack quarantine 1 {row.first_seq} {row.samples} {row.file}")
            if number == FORGET_AFTER:
                say("try forget 1")
                forgotten = data.ring.forget(SUBJECT)
                say(f"ack forget 1 {forgotten} {data.ring.state.next_seq}")
        # Else the recording would not show what it is for.
        assert len(list(data.ring.folder.glob("dictionary-*"))) == 1


class _Expected:
    """The plan's samples, with blanks where they were damaged and, once forgotten, about the subject."""

    def __init__(self, plan: Plan, book: Sequence[str]) -> None:
        (quarantine,) = [line.split() for line in book if line.startswith("ack quarantine")]
        (forget,) = [line.split() for line in book if line.startswith("ack forget")]
        self.damaged = range(int(quarantine[3]), int(quarantine[3]) + int(quarantine[4]))
        self.file = quarantine[5]
        self.forgotten, self.forgotten_to = int(forget[3]), int(forget[4])
        self._plan = plan

    def forgotten_before(self, tail_seq: int, forgotten: int) -> int:
        """The seq up to which the subject is forgotten: oldest first, whole blocks at a time."""
        if forgotten == self.forgotten:
            return self.forgotten_to
        sent = self._plan.samples(tail_seq, self.forgotten_to - 1)
        about = [seq for seq, name in zip(sent.seqs, sent.subjects, strict=True)
                 if name == SUBJECT and seq not in self.damaged]  # fmt: skip
        return about[forgotten]

    def samples(self, first_seq: int, last_seq: int, forgotten_before: int) -> Samples:
        sent = self._plan.samples(first_seq, last_seq)
        gone = [
            i for i, seq in enumerate(sent.seqs) if seq < forgotten_before and sent.subjects[i] == SUBJECT
        ]
        out = sent.without([*gone, *(seq - first_seq for seq in self.damaged if seq >= first_seq)])
        lost = [i for i, seq in enumerate(sent.seqs) if seq in self.damaged]
        hashes = bytearray(out.hashes)
        for i in lost:  # what a damaged block knew of its samples is gone with it
            hashes[16 * i : 16 * (i + 1)] = bytes(16)
        out.hashes = bytes(hashes)
        return out


def audit(root: Path, seed: int, book: Sequence[str], heard: int) -> None:
    """Commits are whole as ever; damage is set aside at once or not yet; the oldest is forgotten first."""
    plan, expected = _plan(seed), _Expected(_plan(seed), book)
    numbers = {word: acknowledged_numbers(book[:heard], word) for word in ("commit", "quarantine", "forget")}
    acknowledged, tried = (max(number, BEFORE) for number in numbers["commit"])
    check_undamaged(root / "data")  # which does not read what is in the blocks
    with opened(root / "data", mending=False) as data:
        found = data.ring.state
        check_acknowledged(found.commits, acknowledged, tried)
        check_moment(data.ring, plan.moment(found.commits))
        _check_quarantine(data, expected, *numbers["quarantine"])
        before = _check_forgotten(data.ring, expected, *numbers["forget"])
        check_contents(
            data.ring,
            lambda first, last: expected.samples(first, last, before),
            lost=len(expected.damaged),
        )
        check_letters(data.ring, plan.letter)
        data.ring.forget(SUBJECT)
        data.ring.commit(plan.commit(found.commits + 1))
    with opened(root / "data", mending=False) as data:
        check_moment(data.ring, plan.moment(found.commits + 1))
        if problems := [words for _, words in data.ring.check_blocks() if words]:
            raise Violation("goes on", f"after forgetting and a commit: {problems}")


def _check_quarantine(data: Opened, expected: _Expected, acknowledged: int, tried: int) -> None:
    ring, folder = data.ring, data.folder.path / "quarantine"
    done = ring.state.lost > 0
    if not acknowledged <= done <= tried:
        raise Violation("I3", f"quarantine was {numbers_of(acknowledged, tried)}, noted as lost: {done}")
    problems = [first for first, words in ring.check_blocks() if words]
    if not done:
        # A damaged block also makes the sum of all blocks wrong, which is told at the tail.
        if not problems or problems[0] != expected.damaged.start:
            raise Violation("I3", f"damage at {expected.damaged.start} is found at {problems}")
        ring.quarantine(folder)
        problems = [first for first, words in ring.check_blocks() if words]
    if problems:
        raise Violation("I3", f"blocks at {problems} are bad after they were set aside")
    (row,) = ring.quarantined()
    if range(row.first_seq, row.first_seq + row.samples) != expected.damaged:
        raise Violation("I3", f"{row} was set aside, {expected.damaged} was damaged")
    if not (folder / expected.file).is_file() or not (folder / expected.file).stat().st_size:
        raise Violation("I3", "the damaged bytes were not kept")


def _check_forgotten(ring: Ring, expected: _Expected, acknowledged: int, tried: int) -> int:
    """Several transactions in a small ring: a cut leaves any number of them. Returns: up to which seq."""
    least, most = expected.forgotten * acknowledged, expected.forgotten * tried
    if not least <= ring.state.forgotten <= most:
        words = numbers_of(acknowledged, tried)
        raise Violation("atomic", f"forgetting was {words}, {ring.state.forgotten} are forgotten")
    return expected.forgotten_before(ring.state.tail_seq, ring.state.forgotten)


def numbers_of(acknowledged: int, tried: int) -> str:
    """What is known of a step, in words."""
    return "acknowledged" if acknowledged else "begun" if tried else "not begun"
