"""One file being read: where in it, whether it is still the same content, packed or not."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import time
from pathlib import Path
from typing import BinaryIO

import msgspec
import zstandard

from pipeline.sources.formats import Shaper
from pipeline.sources.lines import MAGIC_BYTES, READ_BYTES, LineSplitter, open_stream
from pipeline.sources.reach import Identity, Reach

__all__ = ["FilePosition", "Tail", "has_content_of", "names", "str_of"]

HEAD_BYTES = 4_096
log = logging.getLogger("edgewater.files")


class FilePosition(msgspec.Struct, frozen=True):
    """Where in which file reading goes on.

    Attributes:
        device, inode: The file.
        offset: Bytes of content (unpacked, for zst) that are committed.
        head: Hash of its first bytes, up to 4 KiB and up to `offset`; an inode can be used again.
        head_bytes: How many bytes `head` covers.
        path: Where it was; for people.
        began: When its content was begun, seconds; tells apart what was at the same offset before.
    """

    device: int
    inode: int
    offset: int
    head: bytes
    head_bytes: int
    path: str
    began: float = 0.0

    @property
    def identity(self) -> Identity:
        """The file."""
        return self.device, self.inode


class Tail:
    """Reads one file from a position on.

    Args:
        target: The file; anything but a regular file is an OSError.
        known: Where to go on, None at its start.
        reach: What opens it.
        shaper: Makes events of its lines.
        finite: Nobody will come and complete the file: damage is an error instead of a wait.

    Attributes:
        path: The name that it is followed under, which may be another file's by now.
        shaper: As given; what it knows (the header) is of this file.
        first_line: First line of content before the position it was opened at, b"" if opened at the start.
        identity, size: The file, and its size when it was opened.
        packed: Whether it is zstd; known after the first read.
        leaving: Its successor was seen; it is read to its end once more.
        waiting: Its end was reached, and may move.
    """

    def __init__(
        self, target: str, known: FilePosition | None, reach: Reach, shaper: Shaper, *, finite: bool
    ) -> None:
        self.path = target
        self.shaper = shaper
        self.first_line = b""
        self._finite = finite
        self._raw = reach.open(target)
        info = os.fstat(self._raw.fileno())
        self.identity: Identity = (info.st_dev, info.st_ino)
        self.size = info.st_size
        offset = known.offset if known else 0
        self.began = known.began if known and offset else time.time()
        self.splitter = LineSplitter(offset)
        self._stream: BinaryIO | None = None
        self._head = b""
        self.packed = self.broken = self.leaving = self.waiting = False

    def read(self) -> bytes:
        """The next bytes of content, b"" at the present end."""
        try:
            data = self._content().read(READ_BYTES)
        except zstandard.ZstdError as error:
            if self._finite:
                at = self.splitter.offset
                raise OSError(f"{self.path}: damaged after {at} bytes of content: {error}") from error
            # A frame still being written looks like this too: it is unpacked again when the file grows.
            log.warning("%s: cannot unpack further: %s", self.path, error)
            self.broken = True
            return b""
        if len(self._head) < HEAD_BYTES:
            self._head += data[: HEAD_BYTES - len(self._head)]
        return data

    def rewritten(self) -> bool:
        """Whether a plain file holds other content than what was read: it was truncated in its place."""
        if self._stream is None or self.packed:
            return False
        fd = self._raw.fileno()
        shorter = os.fstat(fd).st_size < self._stream.tell()
        return shorter or os.pread(fd, len(self._head), 0) != self._head

    @property
    def reached(self) -> int:
        """How many bytes of the file are read."""
        return 0 if self._stream is None else self.size if self.packed else self._stream.tell()

    def deleted(self) -> bool:
        """Whether no name leads to the file any more."""
        return os.fstat(self._raw.fileno()).st_nlink == 0

    def position(self, offset: int | None = None) -> FilePosition:
        """Where reading goes on after the lines given so far, or at the line that begins at an offset."""
        offset = self.splitter.offset if offset is None else offset
        head = self._head[: min(offset, HEAD_BYTES)]
        return FilePosition(*self.identity, offset, _hash(head), len(head), str_of(self.path), self.began)

    def close(self) -> None:
        """Close the file."""
        (self._stream or self._raw).close()

    def _content(self) -> BinaryIO:
        if self._stream is not None:
            return self._stream
        if not self._finite and os.fstat(self._raw.fileno()).st_size < MAGIC_BYTES:
            return io.BytesIO()  # too short to tell whether it will be packed
        stream = open_stream(self._raw)
        self.packed = isinstance(stream, zstandard.ZstdDecompressionReader)
        self._stream = stream
        self._skip(stream, self.splitter.offset)
        return stream

    def _skip(self, stream: BinaryIO, offset: int) -> None:
        beginning = stream.read(min(offset, READ_BYTES)) if offset else b""
        self._head = beginning[:HEAD_BYTES]
        self.first_line = beginning.lstrip(b"\r\n").partition(b"\n")[0].rstrip(b"\r")
        left = offset - len(beginning)
        if left > 0 and not self.packed:
            stream.seek(offset)
        while left > 0 and self.packed and (data := stream.read(min(left, 1 << 20))):
            left -= len(data)


def names(known: FilePosition, path: str, reach: Reach) -> bool:
    """Whether a position is one in the file that a path leads to."""
    return _identity_with(path, known, reach) == known.identity


def has_content_of(path: str, known: FilePosition, reach: Reach) -> bool:
    """Whether a file begins as the one that a position names, and reaches to the position."""
    return _identity_with(path, known, reach) is not None


def _identity_with(path: str, known: FilePosition, reach: Reach) -> Identity | None:
    """Which file a path leads to, if it has the content of a position: of one open file, not of two looks."""
    try:
        with reach.open(path) as raw, open_stream(raw) as stream:
            info = os.fstat(raw.fileno())
            if _hash(stream.read(known.head_bytes)) != known.head:
                return None
            packed = isinstance(stream, zstandard.ZstdDecompressionReader)
            return (info.st_dev, info.st_ino) if packed or info.st_size >= known.offset else None
    except (OSError, zstandard.ZstdError):
        return None


def str_of(path: str | Path) -> str:
    """A path as text that can be encoded, whatever bytes it holds."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _hash(head: bytes) -> bytes:
    return hashlib.blake2b(head, digest_size=16).digest()
