"""A Modbus device behind a network that can be cut; a float32 in two registers."""

from __future__ import annotations

import struct
import time
from pathlib import Path

from pipeline.source_settings import ModbusRegister, ModbusSource
from pipeline.sources.inbox import Backoff, Connector
from pipeline.sources.modbus import ModbusConnector
from pipeline.units import Duration
from tests.modbus_server import ModbusServer
from tests.relay import Relay

__all__ = ["make"]

WAIT_S = 5.0


class _Device:
    def __init__(self) -> None:
        self._server = ModbusServer()
        self._relay = Relay(self._server.port)
        self._write(-1)

    def connector(self) -> Connector:
        settings = ModbusSource(
            registers=(ModbusRegister(tag="v", address=10, type="float32"),),
            host="127.0.0.1",
            port=self._relay.port,
            interval=Duration(0.02),
            timeout=Duration(0.5),
        )
        return ModbusConnector("site", settings, Backoff(0.05, 0.2))

    def ready(self) -> None:
        self._until_polled(connected=False)

    def send(self, number: int) -> bytes:
        """A register shows the present only: wait until it was read, if anybody reads it."""
        self._write(number)
        self._until_polled(connected=True)
        return b'"v":%d.0}' % number

    def send_raw(self, data: bytes) -> None:
        raise NotImplementedError

    def cut(self) -> None:
        self._relay.cut()

    def mend(self) -> None:
        self._relay.mend()

    def close(self) -> None:
        self._relay.close()
        self._server.close()

    def _write(self, number: int) -> None:
        self._server.write(10, list(struct.unpack(">HH", struct.pack(">f", number))))

    def _until_polled(self, *, connected: bool) -> None:
        asked, deadline = len(self._server.requests), time.monotonic() + WAIT_S
        while len(self._server.requests) == asked and time.monotonic() < deadline:
            if connected and not self._relay.connections:
                return
            time.sleep(0.002)


def make(folder: Path) -> _Device:
    """A device with a relay before it."""
    return _Device()
