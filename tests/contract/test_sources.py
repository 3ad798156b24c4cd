"""What every source promises against its real outside, whatever the protocol."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.decode import RefusedError, decode_event
from pipeline.events import Line
from pipeline.sources.inbox import Settled
from tests.contract.worlds import WORLDS, World, WorldKind
from tests.sources import Reader, reading

BAD = [b"not json", b"\xff\xfe\x00", b"{" * 1_000, b'{"kind":"text","text":"\\ud800"}', b"null", b"NaN"]


every = pytest.mark.parametrize("world", WORLDS, ids=str, indirect=True)
resuming = pytest.mark.parametrize("world", [k for k in WORLDS if k.resumes], ids=str, indirect=True)
networked = pytest.mark.parametrize("world", [k for k in WORLDS if k.networked], ids=str, indirect=True)
raw = pytest.mark.parametrize("world", [k for k in WORLDS if k.takes_raw], ids=str, indirect=True)


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    kind: WorldKind = request.param
    if kind.missing:
        pytest.skip(f"needs {kind.missing}")
    made = kind.make(tmp_path)
    yield made
    made.close()


def settle(reader: Reader, receipts: list[object]) -> None:
    """Acknowledge as the commit does."""
    reader.connector.acknowledge([Settled(receipt) for receipt in receipts])


def arrived(reader: Reader, mark: bytes) -> list[Line]:
    """The lines that hold an event."""
    return [line for line in reader.lines if mark in line.data]


def until_all(reader: Reader, marks: list[bytes]) -> None:
    """Take until every event came, acknowledging as ingest would."""

    def complete() -> bool:
        settle(reader, reader.receipts())
        return all(arrived(reader, mark) for mark in marks)

    reader.until(complete)


@every
def test_events_come_as_events_in_order(world: World) -> None:
    with reading(world.connector()) as reader:
        world.ready()
        marks = [world.send(number) for number in range(20)]
        until_all(reader, marks)
        firsts = [reader.lines.index(arrived(reader, mark)[0]) for mark in marks]
        assert firsts == sorted(firsts)
        for mark in marks:
            line = arrived(reader, mark)[0]
            assert not line.refused
            assert decode_event(line.data)
            assert line.origin.input.startswith(reader.connector.name)
            assert line.origin.arrival > 1e9


@resuming
def test_what_was_committed_does_not_come_again_after_a_kill(world: World) -> None:
    with reading(world.connector()) as reader:
        world.ready()
        before = [world.send(number) for number in range(5)]
        until_all(reader, before)
        reader.settle(0.3)
        settle(reader, reader.receipts())
        time.sleep(0.3)  # for an acknowledgement to leave
    with reading(world.connector(), reader.positions) as again:
        world.ready()
        after = world.send(5)
        until_all(again, [after])
        assert [mark for mark in before if arrived(again, mark)] == []


@resuming
def test_what_was_not_committed_comes_again_after_a_kill(world: World) -> None:
    with reading(world.connector()) as reader:
        world.ready()
        marks = [world.send(number) for number in range(5)]
        reader.until(lambda: all(arrived(reader, mark) for mark in marks))
    with reading(world.connector()) as again:  # nothing was committed: no position, no acknowledgement
        until_all(again, marks)


@networked
def test_it_connects_again_after_the_connection_was_cut(world: World) -> None:
    with reading(world.connector()) as reader:
        world.ready()
        until_all(reader, [world.send(0)])
        state = reader.inbox.state(reader.connector)
        assert state.connected is True
        world.cut()
        reader.until(lambda: state.connected is False)
        assert state.detail, "why, in words"
        world.mend()
        reader.until(lambda: state.connected is True)
        world.ready()
        until_all(reader, [world.send(1)])
        assert state.counts["reconnects"] >= 1


@networked
def test_it_waits_for_an_outside_that_is_not_there_yet(world: World) -> None:
    world.cut()
    with reading(world.connector()) as reader:
        state = reader.inbox.state(reader.connector)
        reader.until(lambda: state.connected is False)
        world.mend()
        reader.until(lambda: state.connected is True)
        world.ready()
        until_all(reader, [world.send(0)])


@raw
def test_malformed_input_is_handed_over_and_stops_nothing(world: World) -> None:
    with reading(world.connector()) as reader:
        world.ready()
        for data in BAD:
            world.send_raw(data)
        until_all(reader, [world.send(0)])
        bad = [line for line in reader.lines if line.refused or _refused(line.data)]
        assert len(bad) == len(BAD)


@every
def test_a_flood_is_bounded_while_nobody_takes(world: World) -> None:
    connector = world.connector()
    reader = Reader(connector)
    world.ready()
    flood = threading.Thread(target=lambda: [world.send(number) for number in range(3_000)], daemon=True)
    flood.start()
    time.sleep(1.0)
    ((_, lines),) = reader.inbox.states().values()
    assert lines <= 8_192 + 4_096
    reader.stop()
    flood.join(30)


@every
def test_it_stops_within_a_second(world: World) -> None:
    reader = Reader(world.connector())
    world.ready()
    world.send(0)
    before = time.monotonic()
    reader.stop()
    assert time.monotonic() - before < 1.0
    reader.settle(0.1)
    assert reader.inbox.drained
    assert reader.inbox.fault is None


@networked
def test_it_stops_while_it_cannot_connect(world: World) -> None:
    world.cut()
    reader = Reader(world.connector())
    time.sleep(0.5)
    before = time.monotonic()
    reader.stop()
    assert time.monotonic() - before < 1.0


def _refused(data: bytes) -> bool:
    try:
        decode_event(data)
    except RefusedError:
        return True
    return False
