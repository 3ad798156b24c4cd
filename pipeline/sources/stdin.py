"""Standard input, to its end. It has no position: what is read but not committed dies with the process."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Mapping

from pipeline.events import Line, Origin
from pipeline.sources.inbox import Chunk, Inbox
from pipeline.sources.lines import READ_BYTES, LineSplitter, open_stream

__all__ = ["StdinConnector"]


class StdinConnector:
    """Reads JSON lines from a file descriptor, zstd too.

    Args:
        source: Name of the configured source.
        fd: The descriptor, 0 for standard input.
    """

    def __init__(self, source: str, fd: int = 0) -> None:
        self.name = f"stdin:{source}"
        self._source = source
        self._fd = fd
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None:
        """Begin to read in a thread of its own."""
        inbox.opened(self)
        self._thread = threading.Thread(target=self._run, args=(inbox,), name=self.name, daemon=True)
        self._thread.start()

    def acknowledge(self, receipts: list[object]) -> None:
        """A pipe cannot be told."""

    def stop(self) -> None:
        """Stop reading."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2)

    def _run(self, inbox: Inbox) -> None:
        fault: BaseException | None = None
        try:
            # peek() in open_stream waits for the first bytes: wait here instead, where stop is heard.
            if self._readable():
                self._read(inbox)
        except Exception as error:
            fault = error
        finally:
            inbox.ended(self, fault)

    def _read(self, inbox: Inbox) -> None:
        stream, splitter = open_stream(self._fd), LineSplitter()
        read = getattr(stream, "read1", stream.read)  # a pipe gives what it has; read() would wait for more
        while self._readable() and (data := read(READ_BYTES)):
            self._send(inbox, splitter.feed(data))
        if not self._stop.is_set():
            self._send(inbox, splitter.finish())

    def _readable(self) -> bool:
        while not self._stop.is_set():
            if select.select([self._fd], [], [], 0.2)[0]:
                return True
        return False

    def _send(self, inbox: Inbox, lines: list[tuple[int, bytes]]) -> None:
        origin = Origin(self._source, self.name, time.time())
        if lines:
            inbox.put(Chunk(self, [Line(data, -1, origin) for _, data in lines]))
