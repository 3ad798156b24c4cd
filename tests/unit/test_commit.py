"""The commit step: one transaction, then acknowledgements, then windows; nothing before its time."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest

from pipeline.commit import LETTER_SHARE, CommitStep
from pipeline.events import Batch, Line, Origin, Outcome, Receipt
from pipeline.sources.inbox import Inbox, Settled
from pipeline.triggers import ThresholdTrigger
from storage import ring
from storage.errors import RingFullError
from storage.ring import Commit, Ring
from storage.samples import Samples
from storage.windows import ClockState, ClosedWindow, DeadLetter, RingState

TOKENIZER = "00112233aabbccdd"


class Bench:
    """A commit step over a ring in a folder, and what it told to whom, in order."""

    name = "bench"

    def __init__(self, folder: Path, trigger: ThresholdTrigger, max_age_s: float = 0.0) -> None:
        self.ring = Ring.open_or_create(
            folder / "ring", shard="main", tokenizer_id=TOKENIZER, max_bytes=1 << 20
        )
        self.request = 0
        self.told: list[object] = []
        self.step = CommitStep(self.ring, trigger, lambda: self.request, self.decided, max_age_s)

    def start(self, inbox: Inbox, positions: object) -> None: ...

    def stop(self) -> None: ...

    def acknowledge(self, settled: list[Settled]) -> None:
        receipts = [one.receipt for one in settled]
        self.told.append(("acknowledged", receipts, self.ring.read_state().commits))

    def decided(self, closed: list[ClosedWindow]) -> None:
        self.told.append(("closed", [window.window for window in closed], self.ring.read_state().commits))


@pytest.fixture
def bench(tmp_path: Path):
    made = Bench(tmp_path, ThresholdTrigger(4, 10**9, 100.0))
    yield made
    made.ring.close()


def batch(arrivals: list[float], **more: object) -> Batch:
    n = len(arrivals)
    samples = Samples(
        0, ["s"] * n, ["text"] * n, [""] * n, array("d", arrivals), array("I", [2] * n),
        array("I", range(2 * n)), bytearray(b"\x01" * 2 * n), bytes(16 * n),
    )  # fmt: skip
    lines = [Line(b"x", i, Origin("s", "in", at)) for i, at in enumerate(arrivals)]
    made = Batch(lines, arrivals=arrivals, samples=samples, outcome=Outcome(samples=n))
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_inputs_are_acknowledged_after_the_commit_and_windows_told_after_that(bench: Bench) -> None:
    committed = bench.step(
        batch([1.0] * 5, receipts=[Receipt(bench, 1, 0, 2), Receipt(bench, 2, 2, 5)], positions={"in": b"5"})
    )
    assert bench.told == [("acknowledged", [1, 2], 1), ("closed", [1], 1)]
    assert bench.ring.named("p") == {"in": b"5"}
    assert [window.last_seq for window in committed.closed] == [3]
    assert committed.state == bench.ring.read_state()
    assert committed.seconds > 0


def test_nothing_is_acknowledged_when_the_commit_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "LARGEST_COMMIT", 0)
    with pytest.raises(RingFullError):
        bench.step(batch([1.0] * 5, receipts=[Receipt(bench, 1, 0, 3)], positions={"in": b"5"}))
    assert bench.told == []
    assert bench.ring.named("p") == {}


def test_duplicates_alone_are_acknowledged_and_counted_too(bench: Bench) -> None:
    lines = [Line(b"x", 0, Origin("s", "in", 1.0))] * 3
    only = Batch(
        lines, receipts=[Receipt(bench, 1, 0, 3)], outcome=Outcome(duplicates=2, dead_letters=1),
        dead=[DeadLetter("s", "in", 1.0, "why", b"x")], dead_lines=[2],
    )  # fmt: skip
    state = bench.step(only).state
    assert state.counters == {
        "events": 3,
        "samples": 0,
        "duplicates": 2,
        "near_duplicates": 0,
        "suppressed": 0,
        "dead_letters": 1,
        "dropped": 0,
    }
    assert bench.told == [("acknowledged", [1], 1)]
    assert [letter.reason for _, letter in bench.ring.dead_letters()] == ["why"]
    state = bench.step(batch([2.0])).state
    assert state.counters == {
        "events": 4,
        "samples": 1,
        "duplicates": 2,
        "near_duplicates": 0,
        "suppressed": 0,
        "dead_letters": 1,
        "dropped": 0,
    }


def test_a_tick_that_decides_nothing_writes_nothing(bench: Bench) -> None:
    """A gateway that hears nothing wears no flash."""
    before = bench.ring.last_transaction()
    committed = bench.step(Batch([], now=5_000.0))
    assert (committed.closed, committed.seconds) == ([], 0.0)
    assert bench.ring.last_transaction() == before


def test_a_moved_position_is_written_without_a_line(bench: Bench) -> None:
    bench.step(Batch([], positions={"in": b"7"}))
    assert bench.ring.named("p") == {"in": b"7"}


def test_a_tick_closes_an_aged_window_and_moves_stream_time(tmp_path: Path) -> None:
    aged = Bench(tmp_path, ThresholdTrigger(1_000, 10**9, 100.0))
    aged.step(batch([10.0] * 40))
    assert aged.step(Batch([], now=109.0)).closed == []
    (window,) = aged.step(Batch([], now=110.0)).closed
    assert (window.samples, window.closed_at, window.reason) == (40, 110.0, "age")
    assert aged.ring.state.stream_time == 110.0
    aged.ring.close()


def test_stream_time_never_goes_back(bench: Bench) -> None:
    """A clock that was set back neither moves it nor lets a window look younger."""
    bench.step(batch([50.0, 40.0]))
    assert bench.ring.state.stream_time == 50.0
    state = bench.step(batch([30.0])).state
    assert (state.stream_time, state.window.first_arrival) == (50.0, 50.0)
    assert bench.step(Batch([], now=20.0)).state.stream_time == 50.0


def test_a_step_of_the_clock_closes_and_evicts_nothing(tmp_path: Path) -> None:
    """An hour or to 1970 and back, ten years on and back: as samples or as ticks see it."""
    aged = Bench(tmp_path, ThresholdTrigger(1_000, 10**9, 3_600.0), max_age_s=7_200.0)
    now = 1_900_000_000.0
    aged.step(batch([now] * 40))
    for moved in (-3_600.0, 3.2e8, -now + 5.0, 0.0):
        for n in range(100):
            now += 1.0
            aged.step(Batch([], now=now + moved) if n % 2 else batch([now + moved]))
    state = aged.ring.read_state()
    assert (state.tail_seq, state.next_seq, state.window.window) == (0, 240, 1)
    assert state.stream_time == pytest.approx(now, abs=5)
    assert state.clock == ClockState()
    aged.ring.close()


def test_a_restart_goes_on_with_the_same_clock(tmp_path: Path) -> None:
    """Ten years ahead for 23 hours, a restart, and an hour more: they count then, and not before."""
    for n in range(24 * 60 + 2):
        if n % 60 == 0:
            bench = Bench(tmp_path, ThresholdTrigger(10_000, 10**9))
        state = bench.step(batch([1_000.0 + 60 * n + (3.2e8 if n else 0.0)])).state
        assert (state.stream_time > 3e8) == (n > 24 * 60)
        if n % 60 == 59:
            bench.ring.close()
    bench.ring.close()


def test_time_that_only_ticks_saw_is_not_lost(tmp_path: Path) -> None:
    """A stream that is silent for days: its next sample closes what is old, no day later."""
    aged = Bench(tmp_path, ThresholdTrigger(1_000, 10**9, 3 * 86_400.0))
    aged.step(batch([1_000.0] * 40))
    for hours in range(1, 71):
        assert aged.step(Batch([], now=1_000.0 + 3_600 * hours)).seconds == 0.0
    assert [window.reason for window in aged.step(batch([1_000.0 + 72 * 3_600])).closed] == ["age"]
    aged.ring.close()


def test_a_tick_does_not_begin_a_stream(bench: Bench) -> None:
    """A board that ticks in 1970 and hears its first event after the network set its clock."""
    bench.step(Batch([], now=9.0))
    state = bench.step(batch([1_900_000_000.0])).state
    assert (state.stream_time, state.clock) == (1_900_000_000.0, ClockState())


def test_a_full_ring_is_tried_again_while_room_is_made(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is acknowledged meanwhile; then all of it, once."""
    commit = bench.ring.commit
    tries: list[tuple[int, list[object]]] = []

    def full_twice(what: Commit) -> RingState:
        if len(tries) < 2:
            raise RingFullError("the ring is full")
        return commit(what)

    def relieve(n: int) -> bool:
        tries.append((n, list(bench.told)))
        return True

    monkeypatch.setattr(bench.ring, "commit", full_twice)
    step = CommitStep(bench.ring, ThresholdTrigger(4, 10**9), lambda: 0, bench.decided, relieve=relieve)
    step(batch([1.0] * 3, receipts=[Receipt(bench, 1, 0, 3)]))
    assert tries == [(1, []), (2, [])]
    assert bench.told == [("acknowledged", [1], 1)]
    assert bench.ring.read_state().next_seq == 3


def test_a_ring_that_stays_full_ends_it_with_nothing_acknowledged(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Batch can be given again: stream time and clock are those before it."""
    commit = bench.ring.commit

    def full(what: Commit) -> RingState:
        raise RingFullError("the ring is full")

    monkeypatch.setattr(bench.ring, "commit", full)
    step = CommitStep(
        bench.ring, ThresholdTrigger(4, 10**9), lambda: 0, bench.decided, relieve=lambda n: n < 3
    )
    with pytest.raises(RingFullError):
        step(batch([1.0] * 3, receipts=[Receipt(bench, 1, 0, 3)]))
    assert bench.told == []
    monkeypatch.setattr(bench.ring, "commit", commit)
    assert step(batch([1.0] * 3)).state.next_seq == 3


def test_of_a_flood_of_refused_lines_only_those_are_written_that_would_stay(bench: Bench) -> None:
    """The newest, as many as the ring keeps; all are counted."""
    dead = [DeadLetter("s", "in", 1.0, "why", b"%06d" % n) for n in range(20_000)]
    lines = [Line(b"x", 0, Origin("s", "in", 1.0))] * len(dead)
    bench.step(Batch(lines, dead=dead, outcome=Outcome(dead_letters=len(dead))))
    state = bench.ring.read_state()
    assert state.counters["dead_letters"] == 20_000
    assert len(dead) > 10 * state.dead_next > 1_000
    kept = [letter for _, letter in bench.ring.dead_letters(20_000)]
    assert kept == dead[-len(kept) :]
    assert state.dead_bytes > 0.8 * bench.ring.map_bytes / LETTER_SHARE


def test_a_letter_larger_than_that_is_written_all_the_same(bench: Bench) -> None:
    big = DeadLetter("s", "in", 1.0, "why", bytes(200 << 10))
    bench.step(Batch([Line(b"x", 0, Origin("s", "in", 1.0))], dead=[big], outcome=Outcome(dead_letters=1)))
    assert [letter for _, letter in bench.ring.dead_letters()] == [big]


def test_a_request_closes_the_window_at_the_next_tick_once(bench: Bench) -> None:
    bench.step(batch([1.0]))
    bench.request = 1
    assert bench.step(batch([2.0])).closed == [], "a Batch is no tick: edges must not depend on its size"
    (window,) = bench.step(Batch([], now=3.0)).closed
    assert (window.samples, window.reason) == (2, "request")
    bench.step(batch([4.0]))
    assert bench.step(Batch([], now=5.0)).closed == []


def test_a_request_that_finds_nothing_is_honoured_all_the_same(bench: Bench) -> None:
    """Else it would close the first sample that comes, hours later."""
    bench.request = 1
    assert bench.step(Batch([], now=1.0)).closed == []
    assert bench.ring.state.request == 1
    bench.step(batch([2.0]))
    assert bench.step(Batch([], now=3.0)).closed == []


def test_old_samples_are_evicted_by_stream_time(tmp_path: Path) -> None:
    aged = Bench(tmp_path, ThresholdTrigger(1_000, 10**9), max_age_s=100.0)
    for now in range(0, 300, 10):
        aged.step(batch([float(now)]))
    held = aged.ring.read(aged.ring.state.tail_seq, aged.ring.state.next_seq - 1)
    assert held.ts[-1] == 290.0
    assert 290.0 - 110.0 <= held.ts[0] <= 290.0 - 90.0
    aged.ring.close()
