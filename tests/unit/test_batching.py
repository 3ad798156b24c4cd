"""Batches: closed on count, bytes, time, urgency or the end; ticks that overtake no line."""

from __future__ import annotations

import pytest

from pipeline import batching
from pipeline.batching import Assembler, BatchLimits, limits_for
from pipeline.events import Batch, Line, Origin, Receipt
from pipeline.flow import _Partition
from pipeline.sources.inbox import Chunk, Connector, Inbox, QueueLimits, Settled


class Idle:
    """A connector that reads nothing of its own."""

    name = "idle"

    def start(self, inbox: Inbox, positions: object) -> None:
        inbox.opened(self)

    def acknowledge(self, settled: list[Settled]) -> None: ...

    def stop(self) -> None: ...


class Bench:
    """An assembler with clocks that stand still until they are moved."""

    def __init__(self, limits: BatchLimits | None = None, *, finite: bool = False) -> None:
        self.now, self.wall = 100.0, 5_000.0
        self.inbox = Inbox()
        self.connector: Connector = Idle()
        self.inbox.opened(self.connector)
        limits = limits or BatchLimits(lines=10, data_bytes=1_000, flush_s=2.0)
        self.assembler = Assembler(
            self.inbox, limits, finite=finite, monotonic=lambda: self.now, wall=lambda: self.wall
        )

    def put(self, count: int, *, size: int = 10, arrival: float | None = None, **more: object) -> None:
        origin = Origin("s", "in", self.wall if arrival is None else arrival)
        lines = [Line(b"x" * size, n, origin) for n in range(count)]
        self.inbox.put(Chunk(self.connector, lines, **more))  # type: ignore[arg-type]

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds

    def poll(self, *, stopping: bool = False) -> Batch | None:
        return self.assembler.poll(stopping=stopping)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "POLL_S", 0.001)


def test_a_batch_closes_on_count() -> None:
    bench = Bench()
    bench.put(9)
    assert bench.poll() is None
    bench.put(9)
    bench.put(9)
    batch = bench.poll()
    assert batch is not None
    assert len(batch.lines) == 18, "a chunk is never cut, and what fills a Batch ends it"


def test_a_batch_closes_on_bytes() -> None:
    bench = Bench()
    bench.put(1, size=999)
    assert bench.poll() is None
    bench.put(1, size=1)
    assert bench.poll() is not None


def test_a_batch_closes_some_time_after_its_first_line() -> None:
    bench = Bench()
    bench.put(1)
    assert bench.poll() is None
    bench.later(0.9)
    bench.put(1)
    assert bench.poll() is None
    bench.later(1.0)
    assert bench.poll() == Batch([], now=bench.wall - 2.9), "the tick comes first"
    bench.later(0.1)
    batch = bench.poll()
    assert batch is not None
    assert len(batch.lines) == 2
    assert bench.assembler.empty


def test_a_batch_closes_where_a_connector_can_take_no_more() -> None:
    bench = Bench()
    bench.put(1)
    bench.put(1, urgent=True)
    bench.put(1)
    batch = bench.poll()
    assert batch is not None
    assert len(batch.lines) == 3, "what is already there shares its commit"
    bench.put(1)
    assert bench.poll() is None, "urgency ends with its Batch"


def test_an_urgent_chunk_that_a_tick_goes_before_is_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    waits: list[float] = []
    get = bench.inbox.get

    def noting(timeout_s: float) -> Chunk | None:
        waits.append(timeout_s)
        return get(timeout_s)

    monkeypatch.setattr(bench.inbox, "get", noting)
    bench.later(1.0)
    bench.put(1, urgent=True)
    tick = bench.poll()
    assert tick is not None and not tick.lines
    waits.clear()
    batch = bench.poll()
    assert batch is not None
    assert waits == [0.0]


@pytest.mark.parametrize("how", ["stopping", "ended"])
def test_a_batch_closes_at_the_end(how: str) -> None:
    bench = Bench()
    bench.put(1)
    if how == "ended":
        bench.inbox.ended(bench.connector)
    batch = bench.poll(stopping=how == "stopping")
    assert batch is not None
    assert len(batch.lines) == 1
    assert bench.poll(stopping=True) is None


def test_positions_and_receipts_of_all_chunks_are_in_the_batch() -> None:
    """Of an input that moved twice, the later position."""
    bench = Bench()
    bench.put(1, positions={"a": b"1", "b": b"1"}, receipt="first")
    bench.put(0, positions={"a": b"2"}, receipt="second")
    batch = bench.poll(stopping=True)
    assert batch is not None
    assert batch.positions == {"a": b"2", "b": b"1"}
    assert batch.receipts == [
        Receipt(bench.connector, "first", 0, 1),
        Receipt(bench.connector, "second", 1, 1),
    ]


def test_a_tick_comes_once_a_second() -> None:
    bench = Bench()
    ticks = 0
    for _ in range(100):
        bench.later(0.1)
        ticks += bench.poll() is not None
    assert 9 <= ticks <= 10


def test_ticks_come_between_batches_that_follow_each_other_without_a_pause() -> None:
    """A request to train waits for a tick; under load it must not wait for ever, nor a line be lost."""
    bench = Bench()
    ticks = lines = 0
    for _ in range(100):
        bench.later(0.1)
        bench.put(10)
        batch = bench.poll()
        assert batch is not None
        ticks += not batch.lines
        lines += len(batch.lines)
    while (batch := bench.poll(stopping=True)) is not None:
        lines += len(batch.lines)
    assert 9 <= ticks <= 10
    assert lines == 1_000


def test_no_tick_overtakes_a_line_that_is_not_committed() -> None:
    """A line that waits, or is being handed over, must not find its window closed by a later time."""
    bench = Bench()
    bench.put(1, arrival=4_999.0)
    bench.later(1.0)
    tick = bench.poll()
    assert tick is not None
    assert not tick.lines
    assert tick.now < 4_999.0
    bench.poll(stopping=True)
    bench.later(1.0)
    tick = bench.poll()
    assert tick is not None
    assert bench.wall - 1.5 < tick.now < bench.wall


def test_the_ticks_of_a_finite_stream_tell_no_time() -> None:
    bench = Bench(finite=True)
    bench.later(1.0)
    assert bench.poll() == Batch([], now=0.0)


def test_a_connector_that_outruns_the_flow_waits_until_the_inbox_closes() -> None:
    connector = Idle()
    inbox = Inbox({"idle": QueueLimits(lines=1)})
    chunk = Chunk(connector, [Line(b"x", 0, Origin("s", "in", 1.0))])
    assert inbox.put(chunk)
    inbox.closed.set()
    assert not inbox.put(chunk)
    assert not inbox.drained or inbox.get(0) is chunk


def test_an_inbox_is_drained_when_all_ended_and_nothing_waits() -> None:
    inbox, one, two = Inbox(), Idle(), Idle()
    two.name = "two"
    inbox.opened(one)
    inbox.opened(two)
    inbox.put(Chunk(one, []))
    inbox.ended(one)
    assert not inbox.drained
    inbox.ended(two, OSError("broke"))
    assert not inbox.drained
    inbox.get(0)
    assert inbox.drained
    assert str(inbox.fault) == "broke"


def test_a_small_ring_takes_small_batches() -> None:
    """A commit must never be a large part of it; 32 MiB and more take what is best for the flash."""
    assert limits_for(256 << 20, 2.0) == BatchLimits(4_000, 512 << 10, 2.0)
    assert limits_for(32 << 20, 2.0).data_bytes == 512 << 10
    assert limits_for(16 << 20, 10.0) == BatchLimits(4_000, 256 << 10, 10.0)


def test_the_source_is_due_also_under_a_clock_in_1970() -> None:
    """Bytewax sleeps until a source is due by the wall clock, and hears no signal meanwhile."""
    inbox = Inbox()
    partition = _Partition(Assembler(inbox, BatchLimits(), finite=True), inbox, lambda: False, 1)
    due = partition.next_awake()
    assert due is not None
    assert due.timestamp() < 0
