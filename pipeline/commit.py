"""Commit: the one step that writes. After it returns, inputs are acknowledged and windows may be due."""

from __future__ import annotations

import bisect
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

from pipeline.clock import HOLD_S, follow
from pipeline.events import Batch, Outcome
from pipeline.sources.inbox import Connector, Settled
from pipeline.triggers import Trigger, walk
from storage.errors import RingFullError
from storage.ring import Commit, Ring
from storage.windows import ClockState, ClosedWindow, DeadLetter, RingState

__all__ = ["CommitStep", "Committed"]

LETTER_SHARE = 16  # the ring keeps dead letters of at most this part of its map
SWEEPS = 20  # by age, in one age; merged blocks span as much: the old goes at most a tenth of the age late
log = logging.getLogger("edgewater.commit")


class Committed(msgspec.Struct, frozen=True):
    """What one Batch became.

    Attributes:
        state: The ring's state after it.
        outcome: Its inputs by outcome.
        closed: Windows that it closed.
        seconds: How long the transaction took; 0 where nothing was written.
    """

    state: RingState
    outcome: Outcome
    closed: list[ClosedWindow]
    seconds: float


class CommitStep:
    """Commits each Batch with its positions and window edges, then acknowledges its receipts.

    Args:
        ring: The shard's ring, open for writing.
        trigger: When windows close.
        requests: Number of the newest `edgewater update` request; a tick honours it.
        decided: Called with the windows that a commit closed, after it: wakes the trainer, and in
            lockstep returns only when they are decided.
        max_age_s: Evict samples older than this in stream time, seconds; 0 never.
        tick_s: Commit the time of a tick when stream time stood still for so long, seconds: a cooldown and
            a maximum age go on when a stream falls silent; 0 never (each such commit costs flash).
        relieve: Called with the number of failed tries when the ring is full: makes room, waits, and tells
            whether to try again.
    """

    def __init__(
        self,
        ring: Ring,
        trigger: Trigger,
        requests: Callable[[], int],
        decided: Callable[[list[ClosedWindow]], None],
        max_age_s: float = 0.0,
        tick_s: float = 0.0,
        relieve: Callable[[int], bool] = lambda tries: False,
    ) -> None:
        self._ring = ring
        self._trigger = trigger
        self._requests = requests
        self._decided = decided
        self._max_age_s = max_age_s
        self._tick_s = tick_s
        self._relieve = relieve
        self._swept = ring.state.stream_time
        if max_age_s:
            ring.merge_span_s = max_age_s / SWEEPS
        self._live = False  # only there a moved clock is news: a replay only repeats it
        # Of every arrival and tick so far; those of a tick that wrote nothing are in no commit.
        self._now, self._clock = ring.state.stream_time, ring.state.clock

    def __call__(self, batch: Batch) -> Committed:
        """Make a Batch durable.

        Raises: WriteFailedError, RingFullError: nothing of it is stored or acknowledged then.
        """
        state = self._ring.state
        self._live |= batch.now > 0
        own = bool(batch.lines) and batch.lines[0].origin.timed
        arrivals, clock = follow(self._now, self._clock, batch.arrivals, events_own=own)
        stream_time = arrivals[-1] if arrivals else self._now
        if batch.now and stream_time:  # a tick does not begin a stream: its clock may not be set yet
            (stream_time,), clock = follow(stream_time, clock, [batch.now])
        request = state.request if batch.lines else self._requests()
        window, closed = walk(
            self._trigger, state.window, state.next_seq, batch.samples.lengths, arrivals,
            tick=stream_time if batch.now else 0.0, requested=request > state.request,
        )  # fmt: skip
        late = bool(self._tick_s) and stream_time - state.stream_time >= self._tick_s
        moved = batch.lines or batch.positions or batch.receipts or batch.outcome.dropped
        if not (moved or closed or request != state.request or late):
            self._keep_time(stream_time, clock)
            return Committed(state, batch.outcome, [], 0.0)
        batch.samples.first_seq = state.next_seq
        started = time.monotonic()
        # The commit point. Crash before: the inputs come again, none was acknowledged.
        # After: all of it is there, and what comes again is dropped by position or hash.
        state = self._write(
            Commit(
                samples=batch.samples,
                stream_time=stream_time,
                window=window,
                closed=closed,
                counters=_counted(state.counters, batch),
                positions=batch.positions,
                references=batch.references,
                dead_letters=_newest(batch.dead, self._ring.map_bytes // LETTER_SHARE),
                deleted_letters=batch.deleted_letters,
                request=request,
                clock=clock,
            )
        )
        seconds = time.monotonic() - started
        _acknowledge(batch)
        self._keep_time(stream_time, clock)
        self._evict_old(stream_time)
        if closed:
            self._decided(closed)
        return Committed(state, batch.outcome, closed, seconds)

    def _write(self, commit: Commit) -> RingState:
        for tries in itertools.count(1):
            try:
                return self._ring.commit(commit)
            except RingFullError:
                if not self._relieve(tries):
                    raise
        raise AssertionError("itertools.count ends")

    def _keep_time(self, stream_time: float, clock: ClockState) -> None:
        moved = clock.offset - self._clock.offset
        if self._live and abs(moved) >= HOLD_S:
            log.warning("the clock was moved: stream time goes on, %+.0f s from it", clock.offset)
        self._now, self._clock = stream_time, clock

    def _evict_old(self, stream_time: float) -> None:
        # Each costs a commit of its own, and none is needed more often.
        if self._max_age_s and stream_time - self._swept > self._max_age_s / SWEEPS:
            self._swept = stream_time
            self._ring.evict_older_than(stream_time - self._max_age_s)


def _newest(letters: Sequence[DeadLetter], data_bytes: int) -> Sequence[DeadLetter]:
    """The newest dead letters of one Batch, as many as the ring keeps of its own at most.

    A chunk may hold 16,000 lines of one byte, each refused: written first and deleted at once, they alone
    would fill a small ring.
    """
    held = 0
    for i in range(len(letters) - 1, -1, -1):
        held += len(msgspec.msgpack.encode(letters[i]))
        if held > data_bytes:
            return letters[i + 1 :] or letters[-1:]
    return letters


def _counted(counters: dict[str, int], batch: Batch) -> dict[str, int]:
    out = dict(counters)
    out["events"] = out.get("events", 0) + len(batch.lines) + batch.outcome.dropped
    for name, count in msgspec.structs.asdict(batch.outcome).items():
        out[name] = out.get(name, 0) + count
    return out


def _acknowledge(batch: Batch) -> None:
    if not batch.receipts:
        return
    by_connector: dict[int, tuple[Connector, list[Settled]]] = {}
    for receipt in batch.receipts:
        first = bisect.bisect_left(batch.dead_lines, receipt.first)
        end = bisect.bisect_left(batch.dead_lines, receipt.end)
        refused = [
            (batch.dead_lines[i] - receipt.first, batch.dead[i].reason) for i in range(first, end)
        ]  # fmt: skip
        owner = cast("Connector", receipt.connector)
        by_connector.setdefault(id(owner), (owner, []))[1].append(Settled(receipt.token, refused))
    for owner, settled in by_connector.values():
        owner.acknowledge(settled)
