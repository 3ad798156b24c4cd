"""Modbus against pymodbus' own server: tables, devices and what they refuse, serial lines, silence."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import select
import struct
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from pymodbus import FramerType

from pipeline import config
from pipeline.decode import decode_event
from pipeline.events import Reading
from pipeline.source_settings import ModbusRegister, ModbusSource
from pipeline.sources.inbox import Backoff, Inbox, QueueLimits, SourceState
from pipeline.sources.modbus import ModbusConnector
from pipeline.units import Duration
from tests.loops import LoopInThread
from tests.modbus_server import ModbusServer
from tests.relay import Relay
from tests.sources import Reader, reading

SERIAL = {"host": "", "parity": "none"}  # a pseudo-terminal has no parity


@pytest.fixture
def start() -> Iterator[Callable[..., ModbusServer]]:
    servers: list[ModbusServer] = []

    def make(*args: object, **more: object) -> ModbusServer:
        servers.append(ModbusServer(*args, **more))  # type: ignore[arg-type]
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def connector(port: int, *registers: ModbusRegister, **more: object) -> ModbusConnector:
    settings = ModbusSource(registers=registers, host="127.0.0.1", port=port, interval=Duration(0.02))
    settings = msgspec.structs.replace(settings, timeout=Duration(0.2), retries=0)
    return ModbusConnector("site", msgspec.structs.replace(settings, **more), Backoff(0.05, 0.2))


def holding(tag: str, address: int, **more: object) -> ModbusRegister:
    return ModbusRegister(tag=tag, address=address, **more)  # type: ignore[arg-type]


def first(reader: Reader) -> Reading:
    event = decode_event(reader.until_lines(1)[0])
    assert isinstance(event, Reading)
    return event


def state_of(reader: Reader) -> SourceState:
    return reader.inbox.state(reader.connector)


def test_a_poll_becomes_one_reading_of_all_tables(start: Callable[..., ModbusServer]) -> None:
    server = start()
    server.write(0, list(struct.unpack(">HH", struct.pack(">f", 3.5))))
    server.write(2, [0xFFFF, 250])
    before = time.time()
    with reading(
        connector(
            server.port,
            holding("pressure", 0, type="float32", unit="bar"),
            holding("trim", 2, type="int16"),
            holding("flow", 3, scale=0.5, offset=1.0, unit="l/min"),
            holding("alarm", 3, type="bool", bit=3),
            holding("level", 17, table="input"),
            holding("open", 3, table="coil"),
            holding("shut", 4, table="discrete"),
        )
    ) as reader:
        event = first(reader)
    assert event.values == {
        "pressure": 3.5, "trim": -1.0, "flow": 126.0, "alarm": 1.0, "level": 17.0, "open": 1.0, "shut": 0.0
    }  # fmt: skip
    assert event.units == {"pressure": "bar", "flow": "l/min"}
    assert event.source is None
    assert isinstance(event.ts, float)
    assert before <= event.ts <= time.time()
    assert event.ts == reader.lines[0].origin.arrival


def test_each_source_gets_a_reading_of_its_own(start: Callable[..., ModbusServer]) -> None:
    server = start()
    registers = [holding("v", 0, source="pump-1"), holding("v", 1, source="pump-2"), holding("w", 2)]
    with reading(connector(server.port, *registers)) as reader:
        reader.until_lines(3)
    events = [decode_event(data) for data in reader.data[:3]]
    assert [event.source for event in events] == ["pump-1", "pump-2", None]
    assert len({event.ts for event in events}) == 1


def test_neighbours_are_read_in_one_request(start: Callable[..., ModbusServer]) -> None:
    server = start()
    registers = [holding(f"r{n}", n) for n in range(0, 40, 4)]
    with reading(connector(server.port, *registers)) as reader:
        first(reader)
    assert set(server.requests) == {(1, 3, 0, 37)}


def test_a_block_that_the_device_refuses_is_named_and_the_others_come(
    start: Callable[..., ModbusServer],
) -> None:
    server = start()
    with reading(connector(server.port, holding("good", 0), holding("gone", 55), max_gap=0)) as reader:
        assert first(reader).values == {"good": 0.0}
        state = state_of(reader)
        assert state.connected is True
        assert "device 1 holding 55: illegal data address" in state.detail
        assert state.counts["failed"] >= 1


def test_a_device_that_refuses_to_read_over_a_gap_is_read_around_it(
    start: Callable[..., ModbusServer],
) -> None:
    """Registers 50 to 59 are not there: one request over them is refused, two beside them are not."""
    server = start()
    server.write(60, [9])
    registers = [holding("before", 49), holding("after", 60)]
    with reading(connector(server.port, *registers, max_gap=20)) as reader:
        assert first(reader).values == {"before": 0.0, "after": 9.0}
        reader.until_lines(3)
        assert "failed" not in state_of(reader).counts
    assert set(server.requests) == {(1, 3, 49, 1), (1, 3, 60, 1)}


def test_a_silent_device_costs_the_others_nothing_but_time(start: Callable[..., ModbusServer]) -> None:
    server = start([1, 2, 9])
    server.delays_s[9] = 0.5
    registers = [holding("here", 0), holding("there", 0, device=2), holding("nowhere", 0, device=9)]
    with reading(connector(server.port, *registers)) as reader:
        assert first(reader).values == {"here": 0.0, "there": 0.0}
        assert state_of(reader).connected is True
        assert "device 9: no answer" in state_of(reader).detail


def test_a_slow_device_skips_polls_and_never_builds_up(start: Callable[..., ModbusServer]) -> None:
    """A poll takes five intervals: one in six polls is made, each on the grid of the rate."""
    server = start()
    server.delays_s[1] = 0.09
    with reading(connector(server.port, holding("v", 0))) as reader:
        reader.until_lines(6)
        skipped = state_of(reader).counts["skipped"]
    times = [decode_event(data).ts for data in reader.data]
    assert len(server.requests) <= len(times) + 1
    assert skipped >= 4 * (len(times) - 2)
    assert all(isinstance(ts, float) for ts in times)
    assert min(b - a for a, b in pairwise(times)) > 0.08, "one after the other"  # type: ignore[operator]


def test_a_full_queue_drops_polls_and_says_so(start: Callable[..., ModbusServer]) -> None:
    server = start()
    made = connector(server.port, holding("v", 0))
    inbox = Inbox({made.name: QueueLimits(lines=2)})
    made.start(inbox, {})
    try:
        deadline = time.monotonic() + 10
        while inbox.state(made).counts.get("dropped", 0) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert inbox.state(made).counts["dropped"] >= 3
        assert inbox.states()[made.name][1] == 2
        assert inbox.state(made).connected is True
    finally:
        inbox.closed.set()
        made.stop()


def test_a_float_that_is_no_number_is_counted_and_left_out(start: Callable[..., ModbusServer]) -> None:
    server = start()
    server.write(0, list(struct.unpack(">HH", struct.pack(">f", math.nan))))
    with reading(connector(server.port, holding("v", 0, type="float32"), holding("w", 2))) as reader:
        assert first(reader).values == {"w": 0.0}
        assert state_of(reader).counts["bad"] >= 1


def test_rtu_frames_over_tcp(start: Callable[..., ModbusServer]) -> None:
    server = start(framer=FramerType.RTU)
    server.write(5, [77])
    with reading(connector(server.port, holding("v", 5), rtu_over_tcp=True)) as reader:
        assert first(reader).values == {"v": 77.0}


def test_a_serial_line_is_polled_and_found_again(start: Callable[..., ModbusServer]) -> None:
    with serial_line() as (here, there):
        server = start([3, 4], serial=there)
        server.write(5, [77], device=4)
        registers = [holding("v", 5, device=4), holding("w", 5)]
        made = connector(0, *registers, serial=here, device=3, timeout=Duration(0.5), **SERIAL)
        with reading(made) as reader:
            assert first(reader).values == {"v": 77.0, "w": 0.0}
            assert state_of(reader).detail == here
            server.delays_s |= {3: 0.6, 4: 0.6}
            reader.until(lambda: state_of(reader).connected is False)
            assert "no answer" in state_of(reader).detail
            server.delays_s.clear()
            seen = len(reader.lines)
            reader.until_lines(seen + 1)
            assert state_of(reader).counts["reconnects"] == 1


def test_a_late_answer_on_a_serial_line_is_not_taken_for_the_next(
    start: Callable[..., ModbusServer],
) -> None:
    """RTU frames carry no number; two registers of the same shape, and answers that come too late."""
    with serial_line() as (here, there):
        server = start(serial=there)
        server.write(0, [111])
        server.write(20, [222])
        server.delays_s[1] = 0.25
        made = connector(
            0, holding("a", 0), holding("b", 20), serial=here, timeout=Duration(0.2), retries=2, **SERIAL
        )  # fmt: skip
        with reading(made) as reader:
            reader.settle(1.5)
            server.delays_s.clear()
            reader.until(lambda: any(b'"b"' in data for data in reader.data))
            for data in reader.data:
                event = decode_event(data)
                assert isinstance(event, Reading)
                assert event.values.items() <= {"a": 111.0, "b": 222.0}.items()


def test_a_serial_port_that_is_not_there_is_said_in_words() -> None:
    made = connector(0, holding("v", 0), serial="/dev/edgewater-none", **SERIAL)
    with reading(made) as reader:
        reader.until(lambda: state_of(reader).connected is False)
        assert state_of(reader).detail == "/dev/edgewater-none: no such serial port"


def test_a_serial_port_that_cannot_be_set_up_is_said_in_words() -> None:
    """A pseudo-terminal has no parity; a port may also lack a speed."""
    with serial_line() as (here, _):
        for wrong in ({"parity": "even"}, {"baud": 12_345_678 % 4_000_000}):
            made = connector(0, holding("v", 0), serial=here, **SERIAL | wrong)
            with reading(made) as reader:
                reader.until(lambda: state_of(reader).connected is False)
                assert state_of(reader).detail.startswith(f"{here}: ")
                assert reader.inbox.fault is None


def test_it_stops_within_a_second_before_a_black_hole(start: Callable[..., ModbusServer]) -> None:
    """Connections open, and nothing comes back, for longer than anybody would wait."""
    relay = Relay(start().port)
    relay.silence()
    try:
        reader = Reader(connector(relay.port, holding("v", 0), timeout=Duration(60)))
        time.sleep(0.3)
        started = time.monotonic()
        reader.stop()
        assert time.monotonic() - started < 1.0
        assert reader.connector.name not in {thread.name for thread in threading.enumerate()}
    finally:
        relay.close()


def test_a_line_that_falls_silent_is_noticed_and_used_again(start: Callable[..., ModbusServer]) -> None:
    server = start()
    relay = Relay(server.port)
    try:
        with reading(connector(relay.port, holding("v", 0))) as reader:
            first(reader)
            relay.silence()
            reader.until(lambda: state_of(reader).connected is False)
            assert "device 1: no answer" in state_of(reader).detail
            relay.mend()
            reader.until(lambda: state_of(reader).connected is True)
    finally:
        relay.close()


@contextmanager
def serial_line() -> Iterator[tuple[str, str]]:
    """Two serial ports, each the other end of the other."""
    (a, here), (b, there) = os.openpty(), os.openpty()
    for end in (a, here, b, there):
        tty.setraw(end)
    ended = threading.Event()

    def copy() -> None:
        while not ended.is_set():
            for end in select.select([a, b], [], [], 0.1)[0]:
                with suppress(OSError):
                    os.write(b if end == a else a, os.read(end, 1_024))

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield os.ttyname(here), os.ttyname(there)
    finally:
        ended.set()
        thread.join(5)
        for end in (a, here, b, there):
            os.close(end)


@pytest.mark.parametrize("seed", range(4))
def test_a_device_that_sends_nonsense_breaks_nothing(seed: int) -> None:
    """Random bytes, right frames around random contents, and answers longer than anybody asked for."""
    rng = random.Random(seed)

    def answer(request: bytes) -> bytes:
        noise = rng.randbytes(rng.randint(0, 300))
        body = [
            noise,
            request[7:8] + noise,
            b"\x03\x02" + noise[:2],
            b"\x83" + noise[:1],
            b"\x03\xff" + noise,
        ]
        frame = rng.choice(body)
        head = request[:4] + struct.pack(">HB", len(frame) + 1, 1)
        return rng.choice([noise, head + frame, request])

    with talker(answer) as port, reading(connector(port, holding("v", 0), timeout=Duration(0.05))) as reader:
        reader.settle(1.0)
        assert reader.inbox.fault is None
        assert reader.connector.name in {thread.name for thread in threading.enumerate()}
        for data in reader.data:
            assert isinstance(decode_event(data), Reading)


HOST = {"host": "10.0.0.7"}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({}, "expected either host or serial"),
        ({**HOST, "serial": "/dev/ttyS0"}, "expected either host or serial"),
        ({"serial": "/dev/ttyS0", "rtu_over_tcp": True}, "has no effect with serial"),
        ({**HOST, "registers": []}, "no register"),
        ({**HOST, "interval": "0s"}, "expected more than 0"),
        ({**HOST, "port": 0}, "expected a whole number from 1 to 65535"),
        ({**HOST, "registers": [{"tag": "v", "address": 65_535, "type": "int32"}]}, "beyond address 65535"),
        ({**HOST, "registers": [{"tag": "v", "address": 0, "scale": 0}]}, "makes every value the same"),
        ({**HOST, "registers": [{"tag": "v", "address": 0, "table": "coil", "type": "int16"}]}, "holds bits"),
        ({**HOST, "registers": [{"tag": "v", "address": n} for n in (0, 1)]}, 'tag "v" is there twice'),
        (
            {**HOST, "registers": [{"tag": "v", "address": 0, "source": "Not/A name"}]},
            "expected a name of a-z",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path: Path, table: dict[str, object], words: str) -> None:
    table = {"registers": [{"tag": "v", "address": 0}]} | table
    path = tmp_path / "edgewater.toml"
    path.write_text(f'[[sources]]\nname = "a"\nkind = "modbus"\nmodbus = {toml(table)}\n')
    with pytest.raises(config.ConfigError) as refused:
        config.load(path)
    assert words in str(refused.value)


def test_settings_are_shown_as_they_can_be_loaded(tmp_path: Path) -> None:
    scaled = {"tag": "v", "address": 3, "type": "float32", "scale": 0.1}
    registers = [scaled, {"tag": "open", "address": 0, "table": "coil"}]
    path = tmp_path / "edgewater.toml"
    path.write_text(
        f'[[sources]]\nname = "a"\nkind = "modbus"\nmodbus = {toml({**HOST, "registers": registers})}\n'
    )
    loaded = config.load(path)
    again = tmp_path / "again.toml"
    again.write_text(config.show(loaded))
    assert config.load(again).sources == loaded.sources
    table = loaded.sources[0].modbus
    assert table is not None
    assert [register.holds for register in table.registers] == ["float32", "bool"]


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(entry)}" for key, entry in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(toml(entry) for entry in value) + "]"
    return json.dumps(value)


@contextmanager
def talker(answer: Callable[[bytes], bytes]) -> Iterator[int]:
    """A TCP server that answers whatever comes with whatever it likes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while request := await reader.read(1_024):
                writer.write(answer(request))
                await writer.drain()
        writer.transport.abort()

    async def listen() -> asyncio.Server:
        return await asyncio.start_server(serve, "127.0.0.1", 0)

    async def end(server: asyncio.Server) -> None:
        server.close()

    loop = LoopInThread()
    server = loop.run(listen())
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.run(end(server))
        loop.close()
