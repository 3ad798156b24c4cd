"""A capture, or plain lines of events, fed again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import msgspec

from pipeline.capture import CaptureLine, read_header
from pipeline.decode import RefusedError, decode_event, event_time
from pipeline.events import MAX_EVENT_BYTES, Line, Origin
from pipeline.sources.inbox import Chunk, Inbox, ReaderThread, Settled
from pipeline.sources.lines import READ_BYTES, LineSplitter, open_stream

__all__ = ["ReplayConnector"]

# JSON writes a byte as up to six, and an event as large as allowed must come back as it was.
MAX_CAPTURED_BYTES = 6 * MAX_EVENT_BYTES + (8 << 10)
_decode_line = msgspec.json.Decoder(CaptureLine).decode


class ReplayConnector:
    """Reads one file to its end; its position is an offset into the unpacked content.

    Args:
        path: A capture or plain lines, packed or not. Of a capture of several files, the first or any.
        speed: 0 as fast as possible, 1 as it was recorded, 10 ten times as fast.
    """

    def __init__(self, path: Path, speed: float = 0.0) -> None:
        self.name = "replay"
        self._path = path
        self._speed = speed
        self._thread = ReaderThread()
        self._stop = self._thread.stopping
        self._started: tuple[float, float] | None = None  # (monotonic, recorded) of the first line

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None:
        """Begin to read in a thread of its own."""
        offset = int(positions.get(self.name, b"0"))
        self._thread.start(self, inbox, partial(self._read, inbox, offset))

    def acknowledge(self, settled: list[Settled]) -> None:
        """A file needs none: the position is in the commit."""

    def stop(self) -> None:
        """Stop reading."""
        self._thread.stop()

    def _read(self, inbox: Inbox, offset: int) -> None:
        captured: bool | None = None
        for lines, position in self._pieces():
            if captured is None and lines:
                captured = read_header(lines[0][1]) is not None
                lines = lines[1:] if captured else lines
            fresh = [(at, data) for at, data in lines if at >= offset]
            if not fresh or self._stop.is_set():
                continue
            out = [self._line(data, at, bool(captured)) for at, data in fresh]
            ends = [*(at for at, _ in fresh[1:]), position]
            for group in self._paced(out, ends):
                if not inbox.put(group):
                    return

    def _pieces(self) -> Iterator[tuple[list[tuple[int, bytes]], int]]:
        splitter = LineSplitter(max_bytes=MAX_CAPTURED_BYTES)
        with open_stream(self._path) as stream:
            while not self._stop.is_set() and (data := stream.read(READ_BYTES)):
                yield splitter.feed(data), splitter.offset
            yield splitter.finish(), splitter.offset

    def _line(self, data: bytes, at: int, captured: bool) -> Line:
        if captured:
            try:
                return _decode_line(data).line()
            except (msgspec.MsgspecError, ValueError, RecursionError):
                pass  # a damaged line of the capture is refused by decode, with its place
        # Plain lines carry no arrival: stream time is their own `ts`, and 0 where there is none.
        data = data[: MAX_EVENT_BYTES + 1]  # decode says that it is too long; what waits stays small
        return Line(data, at, Origin("replay", f"replay:{self._path.name}", 0.0, timed=True))

    def _paced(self, lines: list[Line], ends: list[int]) -> Iterator[Chunk]:
        """Give lines together, or one by one as they were recorded, with the position after the last."""
        if not self._speed:
            yield Chunk(self, lines, self._position(ends[-1]))
            return
        for line, end in zip(lines, ends, strict=True):
            self._wait(line)
            yield Chunk(self, [line], self._position(end))

    def _position(self, offset: int) -> dict[str, bytes]:
        return {self.name: str(offset).encode()}

    def _wait(self, line: Line) -> None:
        recorded = line.origin.arrival
        if line.origin.timed:
            try:
                recorded = event_time(decode_event(line.data), 0.0)
            except RefusedError:
                return
        if self._started is None:
            self._started = (time.monotonic(), recorded)
        due = self._started[0] + (recorded - self._started[1]) / self._speed
        self._stop.wait(max(0.0, due - time.monotonic()))
