"""The body of a request: unpacked in bounded pieces, cut into events with their numbers."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Protocol

import zstandard

from pipeline.events import MAX_EVENT_BYTES
from pipeline.sources.http_wire import Refusal
from pipeline.sources.lines import MAX_WINDOW_BYTES

__all__ = ["PIECE_BYTES", "Cutter", "LineCutter", "Unpacker", "WholeCutter", "unpacker"]

PIECE_BYTES = 32 << 10  # what a chunk holds beside one line: batching.py counts on it
_ZSTD_BYTES = 64  # of packed input at once: unpacks to 2 MiB at most, 128 KiB in each 4 bytes
_GZIP = 16 + zlib.MAX_WBITS  # zlib's way to say: with gzip's header and checksum


class Unpacker(Protocol):
    """Unpacks a body piece by piece."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take bytes. Yields: unpacked pieces of at most PIECE_BYTES. Raises: Refusal."""

    def finish(self) -> None:
        """The body ended. Raises: Refusal if it was cut short."""


class _Plain:
    def feed(self, data: bytes) -> Iterator[bytes]:
        return _pieces(data)

    def finish(self) -> None: ...


class _Gzip:
    def __init__(self) -> None:
        self._member: zlib._Decompress | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        more = bool(data)
        while more:
            if self._member is None:
                self._member = zlib.decompressobj(_GZIP)
            try:
                piece = self._member.decompress(data, PIECE_BYTES)
            except zlib.error as error:
                raise Refusal(400, f"the body is not gzip: {error}") from None
            if self._member.eof:
                data, self._member = self._member.unused_data, None  # another file may be joined to it
                more = bool(data)
            else:
                data = self._member.unconsumed_tail
                more = bool(data or piece)  # it may have more in store, also without input
            if piece:
                yield piece

    def finish(self) -> None:
        if self._member is not None:
            raise Refusal(400, "the gzip body is cut short")


class _Zstd:
    def __init__(self) -> None:
        self._frame: zstandard.ZstdDecompressionObj | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        for at in range(0, len(data), _ZSTD_BYTES):
            rest = data[at : at + _ZSTD_BYTES]
            while rest:
                if self._frame is None:
                    packer = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
                    self._frame = packer.decompressobj()
                try:
                    out = self._frame.decompress(rest)
                except zstandard.ZstdError as error:
                    raise Refusal(400, f"the body is not zstd: {error}") from None
                rest = self._frame.unused_data if self._frame.eof else b""
                if self._frame.eof:
                    self._frame = None
                yield from _pieces(out)

    def finish(self) -> None:
        if self._frame is not None:
            raise Refusal(400, "the zstd body is cut short")


def unpacker(encoding: str) -> Unpacker:
    """What unpacks a Content-Encoding. Raises: Refusal if nothing does."""
    match encoding:
        case "" | "identity":
            return _Plain()
        case "gzip" | "x-gzip":
            return _Gzip()
        case "zstd":
            return _Zstd()
    raise Refusal(415, f"Content-Encoding {encoding[:40]!r} is not taken: send zstd, gzip or none")


class Cutter(Protocol):
    """Cuts a body into events. Both calls give (number, bytes) of each that is complete, from 1."""

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Take bytes."""

    def finish(self) -> list[tuple[int, bytes]]:
        """The body ended."""


class LineCutter:
    """One event a line; empty lines count but are none.

    A line longer than an event may be is cut one byte after that (decode then refuses it).
    """

    def __init__(self) -> None:
        self._rest = b""
        self._number = 1

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Take bytes."""
        lines = data.split(b"\n")
        if self._rest:
            lines[0] = self._rest + lines[0]
        if len(lines[0]) > MAX_EVENT_BYTES:  # only the first can be: the others lie within a piece
            lines[0] = lines[0][: MAX_EVENT_BYTES + 1]
        self._rest = lines.pop()
        first = self._number
        self._number += len(lines)
        return [(number, line) for number, line in enumerate(lines, first) if line and not line.isspace()]

    def finish(self) -> list[tuple[int, bytes]]:
        """The body ended; its last line needs no end."""
        line, self._rest = self._rest, b""
        return [(self._number, line)] if line.strip() else []


class WholeCutter:
    """The body is one event, however many lines it is written in."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._held = 0

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Take bytes; what an event may not have is dropped, but for one byte that decode will see."""
        data = data[: MAX_EVENT_BYTES + 1 - self._held]
        self._parts.append(data)
        self._held += len(data)
        return []

    def finish(self) -> list[tuple[int, bytes]]:
        """The body ended."""
        event = b"".join(self._parts)
        self._parts.clear()
        # What was cut keeps its end: stripped, it might pass for a whole event.
        event = event if self._held > MAX_EVENT_BYTES else event.strip()
        return [(1, event)] if event else []


def _pieces(data: bytes) -> Iterator[bytes]:
    if len(data) <= PIECE_BYTES:
        return iter((data,) if data else ())
    return (data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES))
