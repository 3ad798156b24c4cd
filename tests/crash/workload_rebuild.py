"""The start on a ring whose file is damaged, which rebuilds it, and the first commits after that."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import lmdb
import msgspec

from storage.ring import Ring
from storage.windows import Commit, OpenWindow, RingState
from tests.crash.audit import Violation, acknowledged_numbers, check_acknowledged, opened
from tests.crash.plan import Plan, say

__all__ = ["audit", "prepare", "run"]

BEFORE, COMMITS, SAMPLES = 60, 4, 30
PAGE = 4_096


@lru_cache(maxsize=2)
def _plan(seed: int) -> Plan:
    return Plan(seed, BEFORE)


def prepare(root: Path, seed: int) -> None:
    """A ring with blocks of all sizes; then by the seed both meta pages go bad, or a page of an old block."""
    with opened(root / "data") as data:
        for number in range(1, BEFORE + 1):
            data.ring.commit(_plan(seed).commit(number))
        file = data.ring.folder / "data.mdb"
    with lmdb.open(str(file.parent), readonly=True, lock=False, lib_version=0) as env, env.begin() as txn:
        blocks = [bytes(value) for key, value in txn.cursor() if key[:1] == b"t"]  # the newest first
    largest = max(blocks[len(blocks) // 2 :], key=len)
    content = bytearray(file.read_bytes())
    start, end = 0, 2 * PAGE
    if seed % 2 == 0:
        start = content.index(largest) // PAGE * PAGE
        end = start + PAGE
    content[start:end] = bytes(end - start)
    file.write_bytes(content)


def _outcome(ring: Ring, next_seq: int) -> str:
    """What a rebuilt ring holds below a seq, in one word."""
    samples = ring.read(ring.state.tail_seq, next_seq - 1)
    positions = {name: value for name, value in ring.named("p").items() if name != "after"}
    rows = (ring.state.tail_seq, ring.state.lost, ring.windows(), positions, ring.named("r"))
    digest = hashlib.blake2b(msgspec.msgpack.encode((rows, samples.hashes)), digest_size=16)
    digest.update(samples.extend_digest(bytes(32)))
    return f"{digest.hexdigest()} {ring.state.lost}"


def _commit(plan: Plan, state: RingState, number: int) -> Commit:
    """Commit `number` after the rebuild: some of the plan's samples under new hashes, one input."""
    samples = plan.samples((number - 1) * SAMPLES, number * SAMPLES - 1)
    samples.first_seq = state.next_seq
    samples.hashes = bytes(len(samples.hashes))
    return Commit(
        samples=samples,
        stream_time=state.stream_time + 1,
        window=OpenWindow(state.window.window, state.window.first_seq, number * SAMPLES),
        counters={"events": number},
        positions={"after": b"%d" % number},
    )


def run(root: Path, seed: int) -> None:
    """The part that is recorded."""
    with opened(root / "data", intact=False) as data:
        ring = data.ring
        say(f"ack rebuilt 1 {ring.state.commits} {ring.state.next_seq} {_outcome(ring, ring.state.next_seq)}")
        for number in range(1, COMMITS + 1):
            say(f"try commit {number}")
            ring.commit(_commit(_plan(seed), ring.state, number))
            say(f"ack commit {number}")


def audit(root: Path, seed: int, book: Sequence[str], heard: int) -> None:
    """Cut anywhere, the rebuild ends in the same ring as an undisturbed one, and it goes on."""
    _, _, _, base, next_seq, *outcome = next(line for line in book if line.startswith("ack rebuilt")).split()
    if (seed % 2 == 0) != (int(outcome[1]) > 0):
        raise Violation("rebuild", f"{outcome[1]} samples are lost in the undisturbed run")
    acknowledged, tried = acknowledged_numbers(book[:heard], "commit")
    for last in (False, True):
        with opened(root / "data", intact=False) as data:
            ring, first = data.ring, int(next_seq)
            if problems := [words for _, words in ring.check_blocks() if words]:
                raise Violation("I3", f"bad blocks after the rebuild: {problems}")
            if _outcome(ring, first) != " ".join(outcome):
                lost, wanted = _outcome(ring, first).split()[1], outcome[1]
                raise Violation("rebuild", f"the rebuilt ring is another one: {lost} lost, expected {wanted}")
            commits = ring.state.commits - int(base)
            check_acknowledged(commits, acknowledged, tried)
            if commits:
                wanted_samples = _plan(seed).samples(0, commits * SAMPLES - 1)
                wanted_samples.first_seq = first
                wanted_samples.hashes = bytes(len(wanted_samples.hashes))
                if ring.read(first, ring.state.next_seq - 1) != wanted_samples:
                    raise Violation("I1", "samples committed after the rebuild differ from those sent")
            if last:
                return
            ring.commit(_commit(_plan(seed), ring.state, commits + 1))
            tried = max(tried, commits + 1)
