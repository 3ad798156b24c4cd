"""Cut bytes into lines without ever holding more than one event may have."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import zstandard

from pipeline.events import MAX_EVENT_BYTES

__all__ = [
    "MAGIC_BYTES",
    "MAX_WINDOW_BYTES",
    "READ_BYTES",
    "LineSplitter",
    "is_cut_short",
    "is_packed",
    "open_stream",
]

READ_BYTES = 32 << 10
PIECE_BYTES = 256  # of packed input: unpacks to a few MiB at most
MAGIC_BYTES = 4
MAX_WINDOW_BYTES = 8 << 20  # a frame that wants more memory than this to unpack is refused


class LineSplitter:
    """Cuts a stream of bytes into lines with their offsets.

    A line longer than an event may be is cut one byte after that (decode then refuses it), the rest skipped.

    Args:
        offset: Of the first byte that will be fed.
        max_bytes: So long may a line be.
    """

    def __init__(self, offset: int = 0, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_bytes = max_bytes
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
            self._rest = self._grown(part)
            out += self.finish()
            self._start += 1
        self._rest = self._grown(rest)
        return out

    def finish(self) -> list[tuple[int, bytes]]:
        """The last line of a stream that ends without a line end."""
        # A line that was cut keeps what it ends with: stripped, it might pass for a whole one.
        line = self._rest if self._skipping else self._rest.rstrip(b"\r")
        out = [(self._start, line)] if line else []
        self._start += len(self._rest) + self._skipping
        self._rest, self._skipping = b"", 0
        return out

    def _grown(self, part: bytes) -> bytes:
        line = self._rest + part if self._rest else part
        if len(line) <= self._max_bytes + 1:
            return line
        self._skipping += len(line) - self._max_bytes - 1
        return line[: self._max_bytes + 1]


def is_packed(head: bytes) -> bool:
    """Whether a stream that begins so (4 bytes at least) is zstd."""
    return head[:MAGIC_BYTES] == zstandard.MAGIC_NUMBER.to_bytes(MAGIC_BYTES, "little")


def is_cut_short(path: Path) -> bool:
    """Whether a packed file ends inside a frame: half copied, or written when the power went.

    A reader takes that for the end. Fed in pieces so small that what each unpacks to stays bounded.
    """
    with path.open("rb") as file:
        if not is_packed(file.read(MAGIC_BYTES)):
            return False
        file.seek(0)
        frame = None
        while piece := file.read(PIECE_BYTES):
            while piece:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
                frame.decompress(piece)
                piece = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    return frame is not None


def open_stream(source: Path | io.RawIOBase) -> BinaryIO:
    """Open a file for reading; zstd frames are unpacked as they are read.

    Unpacking is a stream with a bounded window, so a small file that claims to be huge costs nothing.
    """
    raw = source if isinstance(source, io.RawIOBase) else source.open("rb", buffering=0)
    head = io.BufferedReader(raw, READ_BYTES)
    if not is_packed(head.peek(MAGIC_BYTES)):
        return head
    reader = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    return reader.stream_reader(head, read_across_frames=True, closefd=True)
