"""Cut bytes into lines without ever holding more than one event may have."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import zstandard

from pipeline.events import MAX_EVENT_BYTES

__all__ = ["READ_BYTES", "LineSplitter", "open_stream"]

READ_BYTES = 32 << 10
MAX_WINDOW_BYTES = 8 << 20  # a frame that wants more memory than this to unpack is refused


class LineSplitter:
    """Cuts a stream of bytes into lines with their offsets.

    A line longer than an event may be is cut there (decode then refuses it) and the rest skipped.
    """

    def __init__(self, offset: int = 0) -> None:
        self._rest = b""
        self._start = offset  # of `_rest`
        self._skipping = 0  # bytes of an overlong line that were dropped after `_rest`

    @property
    def offset(self) -> int:
        """Where the next unread line begins: the position to commit."""
        return self._start

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Take bytes. Returns: (offset, line without its end) of each line that is now complete."""
        out: list[tuple[int, bytes]] = []
        *whole, rest = data.split(b"\n")
        for part in whole:
            line = self._grown(part)
            length = len(line) + self._skipping
            if line.rstrip(b"\r"):
                out.append((self._start, line.rstrip(b"\r")))
            self._start += length + 1
            self._rest, self._skipping = b"", 0
        self._rest = self._grown(rest)
        return out

    def finish(self) -> list[tuple[int, bytes]]:
        """The last line of a stream that ends without a line end."""
        line, length = self._rest.rstrip(b"\r"), len(self._rest) + self._skipping
        out = [(self._start, line)] if line else []
        self._start += length
        self._rest, self._skipping = b"", 0
        return out

    def _grown(self, part: bytes) -> bytes:
        line = self._rest + part if self._rest else part
        if len(line) <= MAX_EVENT_BYTES + 1:
            return line
        self._skipping += len(line) - MAX_EVENT_BYTES - 1
        return line[: MAX_EVENT_BYTES + 1]


def open_stream(path: Path | int) -> BinaryIO:
    """Open a file, or a file descriptor, for reading; zstd frames are unpacked as they are read.

    Unpacking is a stream with a bounded window, so a small file that claims to be huge costs nothing.
    """
    raw = open(path, "rb", buffering=0, closefd=not isinstance(path, int))  # noqa: SIM115 - the caller closes it
    head = io.BufferedReader(raw, READ_BYTES)
    if head.peek(4)[:4] != zstandard.MAGIC_NUMBER.to_bytes(4, "little"):
        return head
    reader = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    return reader.stream_reader(head, read_across_frames=True, closefd=True)
