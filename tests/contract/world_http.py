"""The HTTP source with its clients: those of the contract, which do not wait for an answer, and others."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.decode import decode
from pipeline.events import Batch, Line
from pipeline.source_settings import HttpSource
from pipeline.sources.http import HttpConnector
from pipeline.sources.inbox import Connector, Inbox, QueueLimits, Settled

__all__ = ["Answer", "Client", "Site", "connected", "free_port", "make", "site"]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def connected(port: int) -> socket.socket:
    """A connection, as soon as somebody listens."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "nobody listens"
            time.sleep(0.02)


class Answer:
    """An answer, read whole.

    Attributes:
        status, headers, text: What it says; names of headers in small letters.
    """

    def __init__(self, status: int, headers: dict[str, str], text: str) -> None:
        self.status, self.headers, self.text = status, headers, text

    @property
    def json(self) -> Any:
        """The text, decoded."""
        return json.loads(self.text)


class Client:
    """One connection; sends whatever bytes a test wants."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        self.connection = connection
        self._rest = b""

    def send(self, data: bytes) -> None:
        """Send bytes; that the other side closed meanwhile shows in what it answered."""
        with suppress(ConnectionError):
            self.connection.sendall(data)

    def answer(self) -> Answer:
        """The next answer."""
        while b"\r\n\r\n" not in self._rest:
            self._rest += self._receive()
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = int(headers.get("content-length", "0"))
        while len(self._rest) < length:
            self._rest += self._receive()
        body, self._rest = self._rest[:length], self._rest[length:]
        return Answer(int(first.split()[1]), headers, body.decode())

    def closed(self) -> bool:
        """Wait until the other side closes."""
        try:
            while self.connection.recv(65_536):
                pass
        except ConnectionResetError:
            pass
        return True

    def post(self, body: bytes, *headers: str, path: str = "/v1/events") -> Answer:
        """Post a body with its length, and wait for the answer."""
        lines = [f"POST {path} HTTP/1.1", "Host: a", f"Content-Length: {len(body)}", *headers, "", ""]
        self.send("\r\n".join(lines).encode() + body)
        return self.answer()

    def _receive(self) -> bytes:
        data = self.connection.recv(65_536)
        assert data, f"closed after {self._rest!r}"
        return data


class Site:
    """A connector that runs, and what stands for the commit: chunks are decoded, kept and acknowledged.

    Attributes:
        lines, chunks: What was "committed", and how many lines each chunk had.
    """

    def __init__(self, settings: HttpSource, limits: QueueLimits | None = None) -> None:
        self.connector = HttpConnector("site", settings)
        self.inbox = Inbox({self.connector.name: limits} if limits else {})
        self.lines: list[Line] = []
        self.chunks: list[int] = []
        self._committing = threading.Event()
        self._committing.set()
        self._at_rest = threading.Event()
        self._clients: list[Client] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._commit, daemon=True)
        self.connector.start(self.inbox, {})
        self._thread.start()
        self.until(lambda: self.connector.address is not None or self.inbox.fault is not None)

    @property
    def counts(self) -> dict[str, int]:
        """What the connector counted."""
        return self.inbox.state(self.connector).counts

    def client(self) -> Client:
        """A new connection."""
        address = self.connector.address
        assert address is not None
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.connect(address)
        self._clients.append(Client(connection))
        return self._clients[-1]

    def post(self, body: bytes, *headers: str, path: str = "/v1/events") -> Answer:
        """Post on a new connection."""
        return self.client().post(body, *headers, path=path)

    def hold(self) -> None:
        """Commit nothing from now on."""
        self._at_rest.clear()
        self._committing.clear()
        assert self._at_rest.wait(10)

    def release(self) -> None:
        """Commit again, and wait until what waited is acknowledged."""
        self._committing.set()
        self.until(lambda: self.inbox.states()[self.connector.name][1] == 0)
        self.hold()
        self._committing.set()

    def until(self, happens: Callable[[], bool]) -> None:
        """Wait for something."""
        deadline = time.monotonic() + 10
        while not happens():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def inbox_has(self, lines: int) -> None:
        """Wait until so many lines wait."""
        self.until(lambda: self.inbox.states()[self.connector.name][1] == lines)

    def stop(self) -> None:
        """Stop the connector as ingest does."""
        self.inbox.closed.set()
        self.connector.stop()

    def close(self) -> None:
        """End everything."""
        self.stop()
        self._over.set()
        self._thread.join(5)
        for client in self._clients:
            client.connection.close()

    def _commit(self) -> None:
        while not self._over.is_set():
            if not self._committing.is_set():
                self._at_rest.set()
                self._committing.wait(0.05)
            elif (chunk := self.inbox.get(0.05)) is not None:
                self.lines += chunk.lines
                self.chunks.append(len(chunk.lines))
                batch = decode(Batch(chunk.lines))
                reasons = [letter.reason for letter in batch.dead]
                refused = list(zip(batch.dead_lines, reasons, strict=True))
                if chunk.receipt is not None:
                    self.connector.acknowledge([Settled(chunk.receipt, refused)])


@contextmanager
def site(limits: QueueLimits | None = None, **settings: Any) -> Iterator[Site]:
    """A site that listens on a free port."""
    made = Site(HttpSource(**{"listen": "127.0.0.1:0", **settings}), limits)
    try:
        yield made
    finally:
        made.close()


_HEAD = b"POST /v1/events HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"


class _Clients:
    def __init__(self) -> None:
        self._port = free_port()
        self._open: list[socket.socket] = []

    def connector(self) -> Connector:
        return HttpConnector("site", HttpSource(listen=f"127.0.0.1:{self._port}"))

    def ready(self) -> None:
        connected(self._port).close()

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
