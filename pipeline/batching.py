"""All grouping happens here: chunks from the connectors become Batches, closed on count, bytes or time."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from pipeline.events import Batch, Line, Outcome, Receipt
from pipeline.sources.inbox import Chunk, Inbox

__all__ = ["Assembler", "BatchLimits", "limits_for"]

POLL_S = 0.1  # a Bytewax source must not wait longer: stop and the clock are looked at between
TICK_S = 1.0
RING_PARTS = 64
TICK_BEHIND_S = 1.0  # a connector stamps a line, then hands it over: no tick may overtake it


class BatchLimits(msgspec.Struct, frozen=True):
    """When a Batch closes.

    Attributes:
        lines, data_bytes: At least so much (a chunk is never cut). So many lines only where they waited for a
            commit: a disk that takes 2 s for each then still stores 2,000 a second.
            Twice the bytes cost 5 MB of memory and were no faster (300,000 pump readings, 2026-11-24).
        flush_s: So long after its first line arrived.
    """

    lines: int = 4_000
    data_bytes: int = 512 << 10
    flush_s: float = 2.0


def limits_for(map_bytes: int, flush_s: float) -> BatchLimits:
    """Limits such that no Batch is too large for a ring.

    A Batch is at most `data_bytes` and one chunk more, 32 KiB and a line of 256 KiB: of the smallest ring,
    16 MiB, a thirtieth. The ring takes commits of a quarter, so a block may be 7 times its lines; one of
    nothing but noise was 1.06 times them (with SmolLM2's vocabulary; tests/contract/test_ring_bounds.py
    holds it below 1.3). Templates that would write much more from short readings are refused by the
    configuration.

    Args:
        map_bytes: Size of the ring's file.
        flush_s: So long after its first line a Batch closes.
    """
    return BatchLimits(data_bytes=min(512 << 10, map_bytes // RING_PARTS), flush_s=flush_s)


class Assembler:
    """Turns the inbox into Batches and ticks.

    Args:
        inbox: Where connectors put chunks.
        limits: When a Batch closes.
        finite: Whether the stream ends: its ticks then carry no time, so that they decide nothing.
        monotonic, wall: Clocks; tests bring their own.
    """

    def __init__(
        self,
        inbox: Inbox,
        limits: BatchLimits,
        *,
        finite: bool,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._inbox = inbox
        self._limits = limits
        self._finite = finite
        self._monotonic, self._wall = monotonic, wall
        self._chunks: list[Chunk] = []
        self._lines = self._bytes = 0
        self._opened = 0.0
        self._ticked = monotonic()
        self._urgent = False

    def poll(self, *, stopping: bool = False) -> Batch | None:
        """Wait up to 100 ms. Returns: a Batch that is ready, a tick once a second, or None."""
        # An urgent chunk that a tick went before waits no longer for others.
        wait = 0.0 if stopping or self._urgent else POLL_S
        while not self._full() and (chunk := self._inbox.get(wait)) is not None:
            self._take(chunk)
            wait = 0.0  # whatever is there already joins at once, also an urgent one: they share the commit
        now = self._monotonic()
        if now - self._ticked >= TICK_S:
            # Before a Batch, also a full one: when they follow each other without a pause, a request
            # would wait for ever.
            self._ticked = now
            return Batch([], now=0.0 if self._finite else self._tick_time())
        ended = stopping or self._inbox.drained
        due = self._urgent or ended or now - self._opened >= self._limits.flush_s
        if self._chunks and (due or self._full()):
            return self._close()
        return None

    @property
    def empty(self) -> bool:
        """Whether no line is held back."""
        return not self._chunks

    def _tick_time(self) -> float:
        """Stream time of a tick: before every line that is not committed yet.

        So a tick closes a window only where the next sample would, and a replay, which has no ticks,
        finds the same edges.
        """
        waiting = [chunk.lines[0].origin.arrival for chunk in self._chunks if chunk.lines]
        queued = self._inbox.oldest_arrival
        return min([self._wall(), *waiting, *([] if queued is None else [queued])]) - TICK_BEHIND_S

    def _take(self, chunk: Chunk) -> None:
        if not self._chunks:
            self._opened = self._monotonic()
        self._chunks.append(chunk)
        self._urgent |= chunk.urgent
        self._lines += len(chunk.lines)
        self._bytes += sum([len(line.data) for line in chunk.lines])

    def _full(self) -> bool:
        return self._lines >= self._limits.lines or self._bytes >= self._limits.data_bytes

    def _close(self) -> Batch:
        chunks, self._chunks = self._chunks, []
        self._lines = self._bytes = 0
        self._urgent = False
        lines: list[Line] = []
        positions: dict[str, bytes] = {}
        receipts: list[Receipt] = []
        dropped = 0
        for chunk in chunks:
            first = len(lines)
            lines += chunk.lines
            positions |= chunk.positions
            dropped += chunk.dropped
            if chunk.receipt is not None:
                receipts.append(Receipt(chunk.connector, chunk.receipt, first, len(lines)))
        return Batch(lines, positions=positions, receipts=receipts, outcome=Outcome(dropped=dropped))
