"""Drive a connector the way ingest does, and keep what it handed over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from pipeline.events import Line
from pipeline.sources.inbox import Chunk, Connector, Inbox

__all__ = ["Reader", "reading"]

WAIT_S = 10.0


class Reader:
    """Takes chunks off an inbox; `positions` are those after them, as a commit would hold them."""

    def __init__(self, connector: Connector, positions: Mapping[str, bytes] = {}) -> None:
        self.connector = connector
        self.inbox = Inbox()
        self.positions = dict(positions)
        self.lines: list[Line] = []
        self._receipts: list[object] = []
        connector.start(self.inbox, positions)

    @property
    def data(self) -> list[bytes]:
        """The lines so far."""
        return [line.data for line in self.lines]

    def take(self) -> Chunk | None:
        """One chunk, if one comes."""
        chunk = self.inbox.get(0.02)
        if chunk is not None:
            self.lines += chunk.lines
            if chunk.receipt is not None:
                self._receipts.append(chunk.receipt)
            for name, position in chunk.positions.items():
                self.positions.pop(name, None)
                self.positions |= {name: position} if position else {}
        return chunk

    def receipts(self) -> list[object]:
        """Receipts of the chunks taken since the last call."""
        taken, self._receipts = self._receipts, []
        return taken

    def until(self, happens: Callable[[], bool]) -> None:
        """Take chunks until something holds."""
        deadline = time.monotonic() + WAIT_S
        while not happens():
            assert time.monotonic() < deadline, f"{len(self.lines)} lines, the last {self.data[-3:]}"
            assert self.inbox.fault is None, self.inbox.fault
            self.take()

    def until_lines(self, count: int) -> list[bytes]:
        """Take chunks until so many lines came."""
        self.until(lambda: len(self.lines) >= count)
        return self.data

    def to_end(self) -> list[bytes]:
        """Take chunks until the connector ended."""
        self.until(lambda: self.inbox.drained)
        return self.data

    def settle(self, seconds: float = 0.6) -> list[bytes]:
        """Take what comes in a while: for what must not come."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.take()
        return self.data

    def stop(self) -> None:
        """End it as ingest does."""
        self.inbox.closed.set()
        self.connector.stop()


@contextmanager
def reading(connector: Connector, positions: Mapping[str, bytes] = {}) -> Iterator[Reader]:
    """A connector at work, stopped at the end."""
    reader = Reader(connector, positions)
    try:
        yield reader
    finally:
        reader.stop()
