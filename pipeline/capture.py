"""Capture: a recorded stream, every line exactly as received, with when and where it arrived.

A capture is zstd-packed JSON lines that `zstdcat` and `jq` read. The first line is the header, then one
line an input: {"at": arrival, "source": .., "input": .., "offset": .., "raw": the line} ("raw64" where it
is not UTF-8). "began" tells apart contents of one file, "key" is what its transport identified it by,
"refused" why its connector could make no event of it.
"""

from __future__ import annotations

import base64
import os
import time
from pathlib import Path
from typing import IO

import msgspec
import zstandard

from pipeline.events import Line, Origin
from storage.durable import fsync_folder

__all__ = ["CAPTURE_FORMAT", "CaptureError", "CaptureHeader", "CaptureLine", "CaptureWriter", "read_header"]

CAPTURE_FORMAT = 1


class CaptureError(ValueError):
    """A file that is no capture, or a newer one; the message says what to do."""


class CaptureHeader(msgspec.Struct, frozen=True):
    """First line of a capture.

    Attributes:
        edgewater_capture: Format.
        started: Wall-clock seconds.
        gateway: Name of the gateway.
        config: Digest of the configuration that it ran under.
        part: Number of this file within its capture, from 1.
    """

    edgewater_capture: int
    started: float
    gateway: str
    config: str
    part: int


class CaptureLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """One recorded input."""

    at: float
    source: str
    input: str
    offset: int = -1
    raw: str | None = None
    raw64: str | None = None
    began: float = 0.0
    key: str = ""
    refused: str = ""
    allowed: list[str] | None = None

    @classmethod
    def of(cls, line: Line) -> CaptureLine:
        """Record a line."""
        origin = line.origin
        raw = raw64 = None
        try:
            raw = line.data.decode()
        except UnicodeDecodeError:
            raw64 = base64.b64encode(line.data).decode()
        return cls(
            origin.arrival, origin.source, origin.input, line.offset, raw, raw64, origin.began,
            line.key, line.refused, None if origin.allowed is None else sorted(origin.allowed),
        )  # fmt: skip

    def line(self) -> Line:
        """The line as it was received. Raises: ValueError if `raw64` is damaged."""
        data = (self.raw or "").encode()
        if self.raw64 is not None:
            data = base64.b64decode(self.raw64, validate=True)
        allowed = None if self.allowed is None else frozenset(self.allowed)
        origin = Origin(self.source, self.input, self.at, began=self.began, allowed=allowed)
        return Line(data, self.offset, origin, self.key, self.refused)


class CaptureWriter:
    """Writes captures into a folder, a new file at a size.

    Args:
        folder: Where to write; made if missing.
        gateway, config: For the header.
        max_file_bytes: Packed size at which the next file begins.
        max_files: Oldest files beyond this many are deleted; 0 keeps all.
    """

    def __init__(
        self, folder: Path, *, gateway: str, config: str, max_file_bytes: int = 64 << 20, max_files: int = 0
    ) -> None:
        self._folder = folder
        self._gateway, self._config = gateway, config
        self._max_file_bytes, self._max_files = max_file_bytes, max_files
        self._stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        self._part = 0
        self._file: IO[bytes] | None = None
        self.lines = 0
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def write(self, lines: list[Line]) -> None:
        """Record lines; when this returns the system has them (not yet the disk)."""
        if not lines:
            return
        if self._file is None:
            self._next_file()
        encode = msgspec.json.encode
        self._stream.write(b"".join(encode(CaptureLine.of(line)) + b"\n" for line in lines))
        # A block per Batch: after a crash everything before the last one unpacks.
        self._stream.flush(zstandard.FLUSH_BLOCK)
        assert self._file is not None
        self._file.flush()
        self.lines += len(lines)
        if self._file.tell() >= self._max_file_bytes:
            self._end_file()

    def close(self) -> None:
        """Finish the file; it is durable when this returns."""
        self._end_file()

    def __enter__(self) -> CaptureWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The file being written, or written last."""
        return self._folder / f"capture-{self._stamp}-{self._part:04d}.jsonl.zst"

    def _next_file(self) -> None:
        self._part += 1
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        self._file = os.fdopen(fd, "wb")
        self._stream = zstandard.ZstdCompressor(level=3).stream_writer(self._file, closefd=False)
        header = CaptureHeader(CAPTURE_FORMAT, time.time(), self._gateway, self._config, self._part)
        self._stream.write(msgspec.json.encode(header) + b"\n")

    def _end_file(self) -> None:
        if self._file is None:
            return
        self._stream.flush(zstandard.FLUSH_FRAME)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        fsync_folder(self._folder)
        if self._max_files:
            for old in sorted(self._folder.glob("capture-*.jsonl.zst"))[: -self._max_files]:
                old.unlink()


def read_header(first_line: bytes) -> CaptureHeader | None:
    """Read a capture's header; None if the line is no header (plain lines of events).

    Raises: CaptureError if the capture is newer than this program.
    """
    if b'"edgewater_capture"' not in first_line:
        return None
    try:
        header = msgspec.json.decode(first_line, type=CaptureHeader)
    except msgspec.MsgspecError as error:
        raise CaptureError(f"the capture's header is damaged: {error}") from None
    if header.edgewater_capture > CAPTURE_FORMAT:
        raise CaptureError(f"capture format {header.edgewater_capture} is newer: upgrade Edgewater")
    return header
