"""The outside auditor: opens a data folder as ingest does after a fault, and compares it with what was sent.

It knows what was sent and what was acknowledged, never what the code under test believes. Each check raises
`Violation` with the invariant's name (FAULTS: I1 nothing acknowledged is lost, I2 nothing twice, I3 seqs
contiguous and every block good) and what differs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.check import check_registry, quick_check
from storage.errors import StorageError
from storage.folder import DataFolder
from storage.opening import open_registry, opened_ring
from storage.registry import Registry
from storage.ring import Ring
from storage.samples import HASH_BYTES, Samples
from storage.windows import DeadLetter, RingState
from tests.crash.plan import MAP_BYTES, SHARD, TOKENIZER, Moment, Plan

__all__ = [
    "Opened",
    "Violation",
    "acknowledged_numbers",
    "audit_plan",
    "check_acknowledged",
    "check_contents",
    "check_eviction",
    "check_letters",
    "check_moment",
    "check_undamaged",
    "opened",
]

NO_HASH = bytes(HASH_BYTES)  # of a sample that nothing identifies: may repeat
HASHES_REBUILT = 2_000
LEAST_SHARE_KEPT = 0.4  # of the map: eviction goes down to 70 % of it, and a large commit may take 25 %


class Violation(Exception):
    """A promise that did not hold: which, and how."""

    def __init__(self, invariant: str, what: str) -> None:
        self.invariant = invariant
        super().__init__(f"{invariant}: {what}")


@dataclass(frozen=True)
class Opened:
    """A data folder with its ring and registry, open for writing."""

    folder: DataFolder
    ring: Ring
    registry: Registry


@contextmanager
def opened(
    path: Path,
    *,
    shard: str = SHARD,
    tokenizer_id: str = TOKENIZER,
    max_bytes: int = MAP_BYTES,
    mending: bool = True,
    intact: bool = True,
) -> Iterator[Opened]:
    """Open as ingest does at its start, which must find nothing to mend: a power cut damages nothing.

    Args:
        mending: Whether to look for damage and mend it, as ingest does; else as plainly as can be.
        intact: Whether nothing was damaged on purpose.
    Raises: Violation if opening fails, or if something intact was mended.
    """
    with ExitStack() as stack:
        try:
            folder = DataFolder.open(path, create=True)
            stack.callback(folder.close)
            stack.enter_context(folder.lock(f"ingest-{shard}"))
            if mending:
                opening = opened_ring(folder, shard=shard, tokenizer_id=tokenizer_id, max_bytes=max_bytes)
                data = Opened(
                    folder, stack.enter_context(opening), stack.enter_context(open_registry(folder))
                )
            else:
                ring = Ring.open_or_create(
                    folder.ring / shard, shard=shard, tokenizer_id=tokenizer_id, max_bytes=max_bytes
                )
                stack.enter_context(ring)
                data = Opened(folder, ring, stack.enter_context(Registry.open_or_create(folder.registry)))
        except Exception as error:
            raise Violation("opens", f"{type(error).__name__}: {error}") from error
        if mending and intact:
            _check_nothing_mended(data)
        yield data


def _check_nothing_mended(data: Opened) -> None:
    if mended := [row.detail for row in data.registry.audit() if row.action == "damage"]:
        raise Violation("undamaged", f"mended what was not damaged: {mended}")
    if data.ring.state.lost or (data.folder.path / "quarantine").exists():
        raise Violation("undamaged", f"{data.ring.state.lost} samples set aside that were not damaged")


def check_undamaged(path: Path, shard: str = SHARD) -> None:
    """The outside look at a data folder, before anything opens it, finds nothing wrong."""
    ring, registry = path / "ring" / shard, path / "registry"
    problems = quick_check(ring) if ring.exists() else []
    problems += check_registry(registry, live=False) if registry.exists() else []
    if problems:
        raise Violation("undamaged", "; ".join(map(str, problems[:3])))


def check_contents(ring: Ring, sent: Callable[[int, int], Samples], *, lost: int = 0) -> Samples:
    """I2 and I3: seqs contiguous, every block good, every sample as it was sent, none twice.

    Args:
        sent: The samples of a range of seqs (first, last), as they must be in the ring.
        lost: How many samples may be noted as lost, because they were damaged on purpose.
    Returns: All samples that are held.
    """
    state = ring.read_state()
    if not state.tail_seq <= state.next_seq:
        raise Violation("I3", f"tail {state.tail_seq} is after next {state.next_seq}")
    for first, problem in ring.check_blocks():
        if problem:
            raise Violation("I3", f"block at seq {first}: {problem}")
    if not state.lost == sum(row.samples for row in ring.quarantined()) == lost:
        raise Violation("I1", f"{state.lost} samples are noted as lost to damage, {lost} were damaged")
    if state.tail_seq == state.next_seq:
        return Samples()
    try:
        held = ring.read(state.tail_seq, state.next_seq - 1)
    except (LookupError, ValueError, StorageError) as error:
        raise Violation("I3", f"{state.tail_seq} to {state.next_seq - 1} cannot be read: {error}") from error
    wanted = sent(state.tail_seq, state.next_seq - 1)
    if held != wanted:
        raise Violation("I1", _first_difference(held, wanted))
    _check_hashes(ring, held)
    return held


def _check_hashes(ring: Ring, held: Samples) -> None:
    """The dedup set that a start rebuilds is that of the samples held, and names none twice."""
    hashes = [value for (value,) in struct.iter_unpack(f"{HASH_BYTES}s", held.hashes)]
    known = [value for value in hashes if value != NO_HASH]
    if len(set(known)) != len(known):
        raise Violation("I2", f"{len(known) - len(set(known))} samples are stored twice")
    if ring.newest_hashes(HASHES_REBUILT) != held.hashes[-HASHES_REBUILT * HASH_BYTES :]:
        raise Violation("I2", "the dedup hashes rebuilt are not those of the samples held")


def _first_difference(held: Samples, wanted: Samples) -> str:
    for name in Samples.__slots__:
        a, b = getattr(held, name), getattr(wanted, name)
        if a != b:
            same = isinstance(a, Sequence) and isinstance(b, Sequence) and len(a) == len(b)
            at = next((i for i in range(len(a)) if a[i] != b[i]), 0) if same else -1
            detail = f"at {at}: {a[at]!r}, sent {b[at]!r}" if same else f"{a!r:.60}, sent {b!r:.60}"
            return f"samples from {held.first_seq} on differ from those sent in {name}, {detail}"
    return "samples differ from those sent"


def check_acknowledged(commits: int, acknowledged: int, tried: int) -> None:
    """I1: the newest commit that survived is the last acknowledged one, or one begun after it."""
    if commits < acknowledged:
        raise Violation("I1", f"commit {acknowledged} was acknowledged, the ring is at {commits}")
    if commits > tried:
        raise Violation("I1", f"the ring is at commit {commits}, only {tried} were begun")


def check_moment(ring: Ring, moment: Moment) -> None:
    """Atomicity: state, positions, references and windows are all those of one commit."""
    state = ring.read_state()
    for name in ("commits", "next_seq", "digest", "stream_time", "window", "counters", "request"):
        _same(name, getattr(state, name), getattr(moment, name))
    _same("dead_next", state.dead_next, moment.letters)
    _same("positions", ring.named("p"), moment.positions)
    _same("references", ring.named("r"), moment.references)
    _same("windows", ring.windows(), moment.closed)


def check_letters(ring: Ring, sent: Callable[[int], DeadLetter]) -> None:
    """Dead letters are as sent, without a gap, within the bytes that the state says."""
    state = ring.read_state()
    found = ring.dead_letters(1_000_000)
    _same("numbers of dead letters", [n for n, _ in found], list(range(state.dead_first, state.dead_next)))
    for number, letter in found:
        _same(f"dead letter {number}", letter, sent(number))
    if state.dead_bytes > ring.map_bytes // 16 and len(found) > 1:
        raise Violation("bounds", f"{state.dead_bytes} bytes of dead letters are kept")


def check_eviction(ring: Ring, tails: tuple[int, int] | None = None) -> None:
    """Only eviction by policy removes: it starts on a full ring and leaves most of it.

    Args:
        tails: Least and greatest oldest seq that an undisturbed run had around this commit, if known.
    """
    usage, tail = ring.usage(), ring.read_state().tail_seq
    if tail and usage.live_bytes < LEAST_SHARE_KEPT * usage.map_bytes:
        raise Violation(
            "I1", f"evicted to seq {tail} with {usage.live_bytes} of {usage.map_bytes} bytes held"
        )
    if tails is not None and not tails[0] <= tail <= tails[1]:
        raise Violation("I1", f"the oldest seq is {tail}, an undisturbed run has {tails[0]} to {tails[1]}")


def acknowledged_numbers(lines: Sequence[str], word: str) -> tuple[int, int]:
    """The newest numbers that a workload acknowledged and tried ("ack commit 7 …", "try commit 8").

    Returns: (acknowledged, tried), 0 where there is none.
    """
    found = {"ack": 0, "try": 0}
    for line in lines:
        verb, what, number, *_ = [*line.split(), "", "", ""]
        if what == word and verb in found:
            found[verb] = max(found[verb], int(number))
    return found["ack"], max(found["try"], found["ack"])


def audit_plan(
    path: Path,
    plan: Plan,
    acknowledged: int,
    tried: int,
    tails: Callable[[int], tuple[int, int] | None] = lambda commits: None,
) -> RingState:
    """The whole audit of a data folder whose ring took the commits of a plan.

    After it the ring holds one commit more: that it goes on is part of the audit.
    Args:
        acknowledged, tried: Number of the last commit acknowledged, and of the last begun.
        tails: Number of a commit -> range that the oldest seq may lie in.
    Returns: The state as found, before the commit.
    """
    check_undamaged(path)
    with opened(path) as data:
        found = data.ring.state
        check_acknowledged(found.commits, acknowledged, tried)
        check_moment(data.ring, plan.moment(found.commits))
        check_contents(data.ring, plan.samples)
        check_letters(data.ring, plan.letter)
        check_eviction(data.ring, tails(found.commits))
        data.registry.active()
        if found.commits == plan.commits:
            return found
        try:
            data.ring.commit(plan.commit(found.commits + 1))
        except StorageError as error:
            raise Violation("goes on", f"commit {found.commits + 1} failed: {error}") from error
    with opened(path) as data:
        check_moment(data.ring, plan.moment(found.commits + 1))
        newest = plan.commit(found.commits + 1).samples
        if len(newest) and data.ring.read(newest.first_seq, newest.seqs[-1]) != newest:
            raise Violation("goes on", f"commit {found.commits + 1} reads back otherwise")
    return found


def _same(name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise Violation("atomic", f"{name} is {found!r:.300}, expected {expected!r:.300}")
