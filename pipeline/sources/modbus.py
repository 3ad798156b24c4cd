"""Modbus: registers are polled over TCP or a serial line, at a fixed rate.

A register has no history: what it held between two polls is not seen, and a poll that was not committed is
not repeated, so each value is read at most once. A poll of one source becomes one reading whose `ts` is the
time of the poll; registers that could not be read are missing in it.

| what fails | what follows |
|---|---|
| the connection, or every device is silent | closed, connected again after a wait that doubles up to 15 s |
| one device of several is silent | named in `status`, asked again at the next poll |
| a device refuses a block | named in `status`; if the block reads over a gap, its parts from then on |
| the queue is full, or a poll overruns | that poll is left out, counted as "dropped" or "skipped" |
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import termios
import time
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final

from pymodbus import FramerType, ModbusException
from pymodbus.client import AsyncModbusSerialClient, AsyncModbusTcpClient
from pymodbus.client.base import ModbusBaseClient

from pipeline.events import Line, Origin
from pipeline.source_settings import WORDS, ModbusSource
from pipeline.sources.inbox import Backoff, Chunk, Inbox, Settled, SourceState, in_few_words
from pipeline.sources.loop_thread import LoopThread
from pipeline.sources.made import encode_reading
from pipeline.sources.modbus_registers import Block, decode, plan, split

__all__ = ["ModbusConnector"]

logging.getLogger("pymodbus").setLevel(logging.CRITICAL + 1)  # what matters stands in `status`; no payloads

NEVER = 1 << 31
REFUSALS: Final = {
    1: "function not supported", 2: "illegal data address", 3: "illegal data value", 4: "device failure",
    6: "device busy", 8: "memory parity error", 10: "gateway path unavailable",
}  # fmt: skip
ILLEGAL_ADDRESS: Final = 2
TARGET_SILENT: Final = 11  # a gateway's word for it


class _SilentError(Exception):
    """A device does not answer."""


class _RefusedError(Exception):
    """A device answers, but not with what was asked for."""

    def __init__(self, why: str, code: int = 0) -> None:
        super().__init__(why)
        self.code = code


class ModbusConnector:
    """Polls the registers of a source's table.

    Args:
        source: Name of the configured source.
        settings: Its table.
        backoff: How long to wait before connecting again.
    """

    def __init__(self, source: str, settings: ModbusSource, backoff: Backoff | None = None) -> None:
        self.name = f"modbus:{source}"
        self._source = source
        self._settings = settings
        self._backoff = backoff or Backoff()
        self._thread = LoopThread()
        self._state = SourceState()
        self._blocks = plan(
            settings.registers,
            device=settings.device,
            max_gap=settings.max_gap,
            max_registers=settings.max_registers,
        )

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None:
        """Begin to poll; a register has no position."""
        self._state = inbox.state(self)
        self._thread.start(self, inbox, partial(self._main, inbox))

    def acknowledge(self, settled: list[Settled]) -> None:
        """A register cannot be told."""

    def stop(self) -> None:
        """Stop polling."""
        self._thread.stop()

    async def _main(self, inbox: Inbox) -> None:
        state, was_connected = self._state, False
        while True:
            client = _client(self._settings)
            try:
                await _connect(client, self._settings)
                # Connected is who answers: a serial port opens with nobody at the other end.
                await self._poll(client, inbox)
                if was_connected:
                    state.count("reconnects")
                was_connected = True
                self._backoff.reset()
                await self._poll_on(client, inbox)
            except (OSError, ModbusException) as error:
                state.connected, state.detail = False, f"{_place(self._settings)}: {error}"
            finally:
                client.close()
            await asyncio.sleep(self._backoff.next_s())

    async def _poll_on(self, client: ModbusBaseClient, inbox: Inbox) -> None:
        """Poll at a fixed rate, on a grid that no poll's length shifts."""
        interval = float(self._settings.interval)
        clock = asyncio.get_running_loop().time
        due = clock() + interval
        while True:
            await asyncio.sleep(due - clock())
            await self._poll(client, inbox)
            overrun = math.floor((clock() - due) / interval)
            if overrun > 0:
                self._state.count("skipped", overrun)
            due += (max(overrun, 0) + 1) * interval

    async def _poll(self, client: ModbusBaseClient, inbox: Inbox) -> None:
        """Read all blocks once and hand over what they hold. Raises: ConnectionError if nobody answers."""
        arrival = time.time()
        values: dict[str, dict[str, float]] = {}
        failures: dict[str, str] = {}
        silent: set[int] = set()
        waiting = deque(self._blocks)
        while waiting:
            block = waiting.popleft()
            if block.device in silent:
                continue
            try:
                self._sort(block, await self._read(client, block), values)
            except _SilentError as error:
                silent.add(block.device)
                failures[f"device {block.device}"] = str(error)
            except _RefusedError as error:
                parts = split(block) if error.code == ILLEGAL_ADDRESS else []
                if len(parts) > 1:
                    at = self._blocks.index(block)
                    self._blocks[at : at + 1] = parts
                    waiting.extendleft(reversed(parts))
                else:
                    failures[str(block)] = str(error)
        if failures:
            self._state.count("failed", len(failures))
        if silent == {block.device for block in self._blocks}:
            raise ConnectionError(in_few_words(failures))
        self._state.connected = True
        self._state.detail = "; ".join(filter(None, [_place(self._settings), in_few_words(failures)]))
        self._hand_over(inbox, values, arrival)

    async def _read(self, client: ModbusBaseClient, block: Block) -> list[int]:
        """Ask for a block, again if nothing comes. Returns: its registers, or its bits as 0 and 1."""
        for tries_left in range(self._settings.retries, -1, -1):
            try:
                return await _ask(client, block)
            except _SilentError:
                # RTU frames carry no number: an answer that is only late must not pass for the next one.
                if self._settings.serial or self._settings.rtu_over_tcp:
                    await asyncio.sleep(float(self._settings.timeout))
                if not tries_left:
                    raise
        raise AssertionError("the last try returned or raised")

    def _sort(self, block: Block, words: list[int], values: dict[str, dict[str, float]]) -> None:
        """Put the values of a block where they belong: source -> tag -> value."""
        for register in block.registers:
            at = register.address - block.address
            width = 1 if register.is_bit else WORDS[register.holds]
            value = decode(register, words[at : at + width])
            if value is None:
                self._state.count("bad")
            else:
                values.setdefault(register.source, {})[register.tag] = value

    def _hand_over(self, inbox: Inbox, values: dict[str, dict[str, float]], arrival: float) -> None:
        origin = Origin(self._source, self.name, arrival)
        lines = []
        for source, tags in values.items():
            units = {r.tag: r.unit for r in self._settings.registers if r.unit and r.source == source}
            units = {tag: unit for tag, unit in units.items() if tag in tags}
            data = encode_reading(tags, ts=arrival, source=source, units=units)
            lines.append(Line(data, -1, origin))
        if lines and not inbox.offer(Chunk(self, lines)):
            self._state.count("dropped", len(lines))  # the next poll is worth more than a late one


async def _ask(client: ModbusBaseClient, block: Block) -> list[int]:
    reads = {
        "holding": client.read_holding_registers,
        "input": client.read_input_registers,
        "coil": client.read_coils,
        "discrete": client.read_discrete_inputs,
    }
    try:
        answer = await reads[block.table](block.address, count=block.count, device_id=block.device)
    except ModbusException as error:
        if not client.connected:
            raise ConnectionError("the connection was lost") from error
        raise _SilentError("no answer") from error
    if answer.isError():
        code = answer.exception_code
        if code == TARGET_SILENT:
            raise _SilentError("no answer, says the gateway")
        raise _RefusedError(REFUSALS.get(code, f"refused with code {code}"), code)
    words = [int(bit) for bit in answer.bits] if block.table in ("coil", "discrete") else answer.registers
    if len(words) < block.count:
        raise _RefusedError(f"{len(words)} values in the answer")
    return list(words[: block.count])


def _client(settings: ModbusSource) -> ModbusBaseClient:
    client: ModbusBaseClient
    timeout = float(settings.timeout)
    if settings.serial:
        client = AsyncModbusSerialClient(
            settings.serial,
            baudrate=settings.baud,
            parity=settings.parity[0].upper(),
            stopbits=settings.stop_bits,
            timeout=timeout,
            retries=0,
            reconnect_delay=0,
        )
    else:
        client = AsyncModbusTcpClient(
            settings.host,
            port=settings.port,
            framer=FramerType.RTU if settings.rtu_over_tcp else FramerType.SOCKET,
            timeout=timeout,
            retries=0,
            reconnect_delay=0,
        )
    client.set_max_no_responses(NEVER)  # when to give up a connection is decided here
    return client


async def _connect(client: ModbusBaseClient, settings: ModbusSource) -> None:
    """Connect, or raise ConnectionError that says why not."""
    try:
        if not await client.connect():
            raise ConnectionError(_why_not(settings))
    except (ValueError, termios.error) as error:  # a serial port that lacks the speed or the parity
        raise ConnectionError(f"cannot be set up so: {error}") from error


def _place(settings: ModbusSource) -> str:
    return settings.serial or f"{settings.host} port {settings.port}"


def _why_not(settings: ModbusSource) -> str:
    """Why a connection could not be made; the library only says that it was not."""
    if not settings.serial:
        return "cannot connect: is the address right, and does it take another connection?"
    if "://" in settings.serial or os.access(settings.serial, os.R_OK | os.W_OK):
        return "cannot open it: is another program using it?"
    if Path(settings.serial).exists():
        return "permission denied: add the user to the group of the port (often dialout)"
    return "no such serial port"
