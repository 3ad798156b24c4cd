"""An OPC UA server behind a network that can be cut; one variable."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.source_settings import OpcuaNode, OpcuaSource
from pipeline.sources.inbox import Backoff, Connector
from pipeline.sources.opcua import OpcuaConnector
from pipeline.units import Duration
from tests.opcua_server import OpcuaServer
from tests.relay import Relay

__all__ = ["make"]

WAIT_S = 5.0


class _Server:
    def __init__(self) -> None:
        self._server = OpcuaServer({"v": -1.0})
        self._relay = Relay(self._server.port)
        self._connector: OpcuaConnector | None = None

    def connector(self) -> Connector:
        settings = OpcuaSource(
            url=f"opc.tcp://127.0.0.1:{self._relay.port}",
            nodes={"ns=2;s=v": OpcuaNode(tag="v")},
            security="none",
            publishing_interval=Duration(0.02),
            timeout=Duration(1),
        )
        self._connector = OpcuaConnector("site", settings, Backoff(0.05, 0.2))
        return self._connector

    def ready(self) -> None:
        """A subscription reports the present value first: from then on it sees all."""
        deadline = time.monotonic() + WAIT_S
        while not self._server.watched() and time.monotonic() < deadline:
            time.sleep(0.005)

    def send(self, number: int) -> bytes:
        self._server.write("v", float(number))
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


def make(folder: Path) -> _Server:
    """A server with a relay before it."""
    return _Server()
