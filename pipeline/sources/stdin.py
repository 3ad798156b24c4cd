"""Standard input, to its end. It has no position: what is read but not committed dies with the process."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import IO, cast

import zstandard

from pipeline.events import Line, Origin
from pipeline.sources.inbox import Chunk, Inbox, ReaderThread, Settled
from pipeline.sources.lines import MAGIC_BYTES, MAX_WINDOW_BYTES, READ_BYTES, LineSplitter, is_packed

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
        self._thread = ReaderThread()
        self._stop = self._thread.stopping

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None:
        """Begin to read in a thread of its own."""
        self._thread.start(self, inbox, partial(self._run, inbox))

    def acknowledge(self, settled: list[Settled]) -> None:
        """A pipe cannot be told."""

    def stop(self) -> None:
        """Stop reading."""
        self._thread.stop()

    def _run(self, inbox: Inbox) -> None:
        try:
            self._read_all(inbox)
        except zstandard.ZstdError as error:
            raise OSError(f"standard input: cannot unpack it further: {error}") from error

    def _read_all(self, inbox: Inbox) -> None:
        splitter = LineSplitter()

        def take(data: bytes) -> None:
            self._send(inbox, splitter.feed(data))

        head = b""
        while len(head) < MAGIC_BYTES and (data := self._read()):
            head += data
        unpacker = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        push = unpacker.stream_writer(cast("IO[bytes]", _Sink(take))).write if is_packed(head) else take
        push(head)
        while data := self._read():
            push(data)
        if not self._stop.is_set():
            self._send(inbox, splitter.finish())

    def _read(self) -> bytes:
        """What the pipe has, as soon as it has any; b"" at its end, or when reading must stop."""
        # Straight from the descriptor: what a buffer holds, select() does not see, and it would wait there.
        while not self._stop.is_set():
            if select.select([self._fd], [], [], 0.2)[0]:
                return os.read(self._fd, READ_BYTES)
        return b""

    def _send(self, inbox: Inbox, lines: list[tuple[int, bytes]]) -> None:
        origin = Origin(self._source, self.name, time.time())
        if lines and not inbox.put(Chunk(self, [Line(data, -1, origin) for _, data in lines])):
            self._stop.set()


class _Sink:
    """Gives on unpacked bytes piece by piece: 2 KB can unpack to 64 MB."""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self._take = take

    def write(self, data: bytes) -> int:
        self._take(bytes(data))
        return len(data)
