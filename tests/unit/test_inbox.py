"""The queues between connectors and the dataflow: bounds, fairness, rates, and what a full one does."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.events import Line, Origin
from pipeline.sources.inbox import Backoff, Chunk, Inbox, QueueLimits, Settled


class Named:
    """A connector that reads nothing of its own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None: ...

    def acknowledge(self, settled: list[Settled]) -> None: ...

    def stop(self) -> None: ...


class Bench:
    """An inbox under a clock that stands still until it is moved."""

    def __init__(self, **limits: QueueLimits) -> None:
        self.now = 100.0
        self.inbox = Inbox(limits, lambda: self.now)
        self.connectors = {name: Named(name) for name in limits}

    def offer(self, name: str, *numbers: int, receipt: object = None) -> bool:
        """Offer a chunk with these lines, whose position is the last of them."""
        origin = Origin(name, name, self.now)
        lines = [Line(b"%d" % number, number, origin) for number in numbers]
        positions = {name: b"%d" % numbers[-1]} if numbers else {}
        return self.inbox.offer(Chunk(self.connectors[name], lines, positions, receipt))

    def taken(self) -> list[tuple[str, list[int], int]]:
        """Everything that may be taken now: (connector, lines, dropped) a chunk."""
        out = []
        while (chunk := self.inbox.get(0)) is not None:
            out.append((chunk.connector.name, [line.offset for line in chunk.lines], chunk.dropped))
        return out


def test_a_full_queue_takes_nothing_more_until_something_is_taken() -> None:
    bench = Bench(a=QueueLimits(lines=3))
    assert [bench.offer("a", number) for number in range(5)] == [True, True, True, False, False]
    assert bench.inbox.get(0) is not None
    assert bench.offer("a", 9)
    assert bench.taken() == [("a", [1], 0), ("a", [2], 0), ("a", [9], 0)]


def test_bytes_fill_a_queue_too_but_one_chunk_always_fits() -> None:
    bench = Bench(a=QueueLimits(data_bytes=2))
    assert bench.offer("a", 1_000_000)
    assert not bench.offer("a", 1)


def test_a_connector_that_waits_for_room_goes_on_when_there_is_some() -> None:
    bench = Bench(a=QueueLimits(lines=1))
    bench.offer("a", 1)
    waiting = threading.Thread(target=bench.inbox.put, args=[Chunk(bench.connectors["a"], [])])
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    bench.inbox.get(0)
    waiting.join(5)
    assert not waiting.is_alive()


def test_one_that_floods_fills_its_own_queue_only() -> None:
    bench = Bench(flood=QueueLimits(lines=10), quiet=QueueLimits(lines=10))
    while bench.offer("flood", 0):
        pass
    assert bench.offer("quiet", 1)


def test_all_sources_get_the_same_share_however_large_their_chunks_are() -> None:
    """By lines: one that hands over 100 at a time waits for a hundred others."""
    bench = Bench(large=QueueLimits(lines=1 << 20), small=QueueLimits(lines=1 << 20))
    for _ in range(10):
        bench.offer("large", *range(100))
    for number in range(1_000):
        bench.offer("small", number)
    served = {"large": 0, "small": 0}
    for _ in range(505):
        chunk = bench.inbox.get(0)
        assert chunk is not None
        served[chunk.connector.name] += len(chunk.lines)
    assert abs(served["large"] - served["small"]) <= 100


def test_a_source_that_was_silent_has_saved_nothing_up() -> None:
    bench = Bench(a=QueueLimits(lines=1 << 20), late=QueueLimits(lines=1 << 20))
    for number in range(1_000):
        bench.offer("a", number)
    for _ in range(900):
        bench.inbox.get(0)
    for number in range(1_000):
        bench.offer("late", number)
    names = [chunk.connector.name for _ in range(100) if (chunk := bench.inbox.get(0))]
    assert 45 <= names.count("late") <= 55


def test_a_rate_lets_a_burst_through_and_then_so_many_a_second() -> None:
    bench = Bench(a=QueueLimits(rate=10.0, burst=5.0))
    for number in range(100):
        bench.offer("a", number)
    assert len(bench.taken()) == 5
    bench.now += 1.0
    assert len(bench.taken()) == 5, "a pause earns the burst at most"
    seconds = 0
    for _ in range(50):
        bench.now += 0.1
        seconds += len(bench.taken())
    assert 49 <= seconds <= 51


def test_a_chunk_above_the_burst_goes_and_is_paid_back() -> None:
    bench = Bench(a=QueueLimits(rate=10.0))
    bench.offer("a", *range(30))
    bench.offer("a", 99)
    assert [len(lines) for _, lines, _ in bench.taken()] == [30]
    bench.now += 1.9
    assert bench.taken() == []
    bench.now += 0.3
    assert bench.taken() == [("a", [99], 0)]


def test_a_rate_holds_nothing_back_once_the_inbox_closes() -> None:
    """What waits is committed before the end."""
    bench = Bench(a=QueueLimits(rate=1.0))
    for number in range(10):
        bench.offer("a", number)
    bench.inbox.closed.set()
    assert len(bench.taken()) == 10


def test_the_oldest_go_where_the_newest_matter() -> None:
    bench = Bench(a=QueueLimits(lines=2, when_full="drop_oldest"))
    for number in range(5):
        assert bench.offer("a", number)
    assert bench.taken() == [("a", [], 3), ("a", [3], 0), ("a", [4], 0)]
    (state, _) = bench.inbox.states()["a"]
    assert state.counts == {"dropped": 3}


def test_the_newest_go_where_the_oldest_matter() -> None:
    bench = Bench(a=QueueLimits(lines=2, when_full="drop_newest"))
    for number in range(5):
        assert bench.offer("a", number)
    assert bench.taken() == [("a", [0], 0), ("a", [1], 0), ("a", [], 3)]


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
def test_what_is_dropped_is_still_acknowledged(policy: str) -> None:
    """Else a broker would send it for ever."""
    bench = Bench(a=QueueLimits(lines=2, when_full=policy))  # type: ignore[arg-type]
    for number in range(6):
        bench.offer("a", number, receipt=number)
    receipts = []
    while (chunk := bench.inbox.get(0)) is not None:
        receipts.append(chunk.receipt)
    assert receipts == list(range(6))


@settings(max_examples=200, deadline=None)
@given(
    policy=st.sampled_from(["drop_oldest", "drop_newest"]),
    moves=st.lists(st.one_of(st.integers(1, 4), st.none()), max_size=60),
)
def test_positions_never_go_back_and_every_line_is_taken_or_counted(
    policy: str, moves: list[int | None]
) -> None:
    """A position before lines that still wait would lose them in a crash; one after it would double them."""
    bench = Bench(a=QueueLimits(lines=5, when_full=policy))  # type: ignore[arg-type]
    number = taken = dropped = 0
    last = -1
    for move in [*moves, *[None] * 70]:
        if move:
            bench.offer("a", *range(number, number + move))
            number += move
        elif (chunk := bench.inbox.get(0)) is not None:
            taken += len(chunk.lines)
            dropped += chunk.dropped
            assert all(line.offset > last for line in chunk.lines)
            assert int(chunk.positions["a"]) > last
            last = int(chunk.positions["a"])
            assert taken + dropped == last + 1, "the position is that of what came out so far"
    assert taken + dropped == number


def test_the_oldest_arrival_that_waits_is_known() -> None:
    bench = Bench(a=QueueLimits(), b=QueueLimits())
    assert bench.inbox.oldest_arrival is None
    bench.offer("a", 1)
    bench.now += 5
    bench.offer("b", 1)
    assert bench.inbox.oldest_arrival == 100.0


def test_backoff_doubles_up_to_its_longest_wait_and_begins_anew() -> None:
    backoff = Backoff(1.0, 8.0, chance=lambda: 0.0)
    assert [backoff.next_s() for _ in range(5)] == [0.5, 1.0, 2.0, 4.0, 4.0]
    backoff.reset()
    assert backoff.next_s() == 0.5
    assert Backoff(1.0, 8.0, chance=lambda: 0.999).next_s() > 0.99


def test_one_that_begins_late_does_not_displace_the_others_because_a_slow_one_was_served_last() -> None:
    bench = Bench(flood=QueueLimits(), slow=QueueLimits(rate=1.0, burst=1.0), late=QueueLimits())
    for number in range(20):
        bench.offer("slow", number)
    for number in range(300):
        bench.offer("flood", number)
    taken = [bench.inbox.get(0) for _ in range(200)]
    bench.now += 1.0  # the slow one may go again: it was served least of all
    taken.append(bench.inbox.get(0))
    assert [chunk.connector.name for chunk in taken if chunk][-1] == "slow"
    for number in range(300):
        bench.offer("late", number)
    names = [chunk.connector.name for _ in range(40) if (chunk := bench.inbox.get(0))]
    assert names.count("flood") >= 19


def test_what_a_dropped_chunk_leaves_does_not_hide_how_old_the_lines_behind_it_are() -> None:
    bench = Bench(a=QueueLimits(lines=2, when_full="drop_newest", rate=1.0, burst=2.0))
    for number in range(3):
        bench.offer("a", number)
    assert bench.taken() == [("a", [0], 0), ("a", [1], 0)]
    for number in range(3, 5):
        bench.offer("a", number)
    assert bench.inbox.oldest_arrival == 100.0
