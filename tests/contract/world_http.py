"""Clients that post events to the HTTP source and do not wait for the answer."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from pipeline.source_settings import HttpSource
from pipeline.sources.http import HttpConnector
from pipeline.sources.inbox import Connector

__all__ = ["free_port", "make"]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_HEAD = b"POST /v1/events HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"


class _Clients:
    def __init__(self) -> None:
        self._port = free_port()
        self._open: list[socket.socket] = []

    def connector(self) -> Connector:
        return HttpConnector("site", HttpSource(listen=f"127.0.0.1:{self._port}"))

    def ready(self) -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            time.sleep(0.01)
        raise AssertionError("nobody listens")

    def send(self, number: int) -> bytes:
        text = b'"event %d"' % number
        self.send_raw(b'{"kind":"text","text":%s}' % text)
        return text

    def send_raw(self, data: bytes) -> None:
        """Post on a connection of its own; when the server lets it go on, it saw the earlier ones whole."""
        try:
            client = socket.create_connection(("127.0.0.1", self._port), timeout=5)
            self._open.append(client)
            head = (
                b"POST /v1/events HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
            )
            client.sendall(head % len(data))
            if client.recv(4_096).startswith(b"HTTP/1.1 100"):
                client.sendall(data)
        except OSError:
            pass  # it stopped: whoever posts then gets no answer

    def cut(self) -> None: ...

    def mend(self) -> None: ...

    def close(self) -> None:
        for client in self._open:
            client.close()


def make(folder: Path) -> _Clients:
    """Clients on this machine."""
    return _Clients()
