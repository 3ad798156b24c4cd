"""The bounded queues between connectors and the dataflow, and the contract of a connector.

Each connector has a queue of its own, so that a flood from one fills its own queue only. The dataflow takes
from the queue that was served least (start-time fair queueing, counted in lines), as far as that source's
token bucket allows; what a full queue does is the source's setting:

| `when_full` | a connector that hands over | what is lost |
|---|---|---|
| block | waits: a file is read later, a broker keeps its messages, HTTP answers 429 | nothing here |
| drop_oldest | goes on; the oldest waiting lines go | counted as dropped, acknowledged |
| drop_newest | goes on; the lines that it brings go | counted as dropped, acknowledged |

Source: start-time fair queueing after Goyal, Vin, Cheng 1996; token bucket as in RFC 2697's single rate.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Literal, Protocol

import msgspec

from pipeline.events import Line

__all__ = [
    "Backoff", "Chunk", "Connector", "Inbox", "QueueLimits", "ReaderThread", "Settled", "SourceState",
    "in_few_words",
]  # fmt: skip

QUEUE_LINES = 8_192
QUEUE_BYTES = 2 << 20
NAMED = 3  # failures that are named; the rest is a number
WAIT_S = 0.1  # a connector that waits for room looks so often whether it must stop


class Settled(msgspec.Struct, frozen=True):
    """What became of a chunk whose commit is on stable storage.

    Attributes:
        receipt: What the connector put into the chunk.
        refused: (number of the line in the chunk, why) of each line that became a dead letter.
    """

    receipt: object
    refused: list[tuple[int, str]] = []


class Connector(Protocol):
    """A source of lines: it reads, remembers nothing that the ring does not, and obeys stop.

    Promises: lines of one input arrive in order; a position handed to `start` is where reading goes on;
    a chunk's position is that after its last line; after `stop` its threads end within a second.

    Every line is one event as JSON, as it was received or as the connector made it from another shape. What
    no event can be made of is handed over as well, with `Line.refused` saying why.
    """

    name: str

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None:
        """Begin to read, each input from its committed position (none: from its start)."""

    def acknowledge(self, settled: list[Settled]) -> None:
        """The commit that holds these chunks is on stable storage. Called in the dataflow's thread."""

    def stop(self) -> None:
        """Stop reading; lines already in the inbox are still committed, and acknowledged where possible."""


class Chunk(msgspec.Struct, frozen=True):
    """Lines that a connector read in one go.

    Attributes:
        connector: Who read them.
        lines: The lines, in order; may be empty where only a position moved.
        positions: Input -> position after these lines; b"" forgets an input.
        receipt: What `acknowledge` wants back, None for nothing.
        urgent: Close the Batch now: somebody waits for the commit, or can send no more until it.
        dropped: Lines that were dropped in a full queue, and are no longer in `lines`.
    """

    connector: Connector
    lines: list[Line]
    positions: dict[str, bytes] = {}
    receipt: object = None
    urgent: bool = False
    dropped: int = 0


class QueueLimits(msgspec.Struct, frozen=True):
    """How much of a source may wait, and how fast it may go.

    Attributes:
        lines, data_bytes: A queue that holds so much is full; a chunk always fits into an empty one.
        when_full: What happens then.
        rate: Lines a second, 0 without limit.
        burst: Lines that may come at once after a pause; 0 is a second's worth.
    """

    lines: int = QUEUE_LINES
    data_bytes: int = QUEUE_BYTES
    when_full: Literal["block", "drop_oldest", "drop_newest"] = "block"
    rate: float = 0.0
    burst: float = 0.0


class SourceState:
    """How a source stands, for `status` and `/metrics`; written by its connector, read by anybody.

    Attributes:
        connected: Whether it is connected; None where there is nothing to connect to.
        detail: In words: what it is connected to, or why it is not.
        counts: What happened, by name: "reconnects", "gaps", "redelivered", "dropped".
    """

    def __init__(self) -> None:
        self.connected: bool | None = None
        self.detail = ""
        self.counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def count(self, name: str, number: int = 1) -> None:
        """Count something."""
        with self._lock:
            self.counts[name] = self.counts.get(name, 0) + number


def in_few_words(failures: Mapping[str, str]) -> str:
    """What failed and why, for `SourceState.detail`; of many the first few and how many more.

    Args:
        failures: What -> why.
    """
    named = [f"{what}: {why}" for what, why in islice(failures.items(), NAMED)]
    more = len(failures) - len(named)
    return ", ".join(named) + (f", and {more} more" if more > 0 else "")


class _Queue:
    """One connector's queue; the inbox's lock guards it."""

    def __init__(self, limits: QueueLimits, now: float) -> None:
        self.limits = limits
        self.chunks: deque[Chunk] = deque()
        self.front: deque[Chunk] = deque()  # before them: what is left of those dropped, without lines
        self.lines = self.data_bytes = 0
        self.served = 0.0
        self._allowed = self._burst = limits.burst or limits.rate
        self._filled = now

    def full(self) -> bool:
        return bool(self.chunks) and (
            self.lines >= self.limits.lines or self.data_bytes >= self.limits.data_bytes
        )

    def push(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.lines += len(chunk.lines)
        self.data_bytes += _bytes_of(chunk)

    def pop(self) -> Chunk:
        if self.front:
            return self.front.popleft()
        chunk = self._pop_oldest()
        if self.limits.rate:
            self._allowed -= len(chunk.lines)  # below 0 by a chunk at most: it is paid back before the next
        return chunk

    def ready(self, now: float) -> bool:
        """Whether something may be taken now."""
        return bool(self.front) or (bool(self.chunks) and self.wait_s(now) <= 0)

    @property
    def empty(self) -> bool:
        return not (self.chunks or self.front)

    def wait_s(self, now: float) -> float:
        """How long until the token bucket lets the next chunk through."""
        rate = self.limits.rate
        if not rate:
            return 0.0
        self._allowed = min(self._burst, self._allowed + (now - self._filled) * rate)
        self._filled = now
        # Only a whole line's token, however many the chunk has: else a chunk above the burst never goes.
        return max(0.0, (min(1.0, self._burst) - self._allowed) / rate)

    def drop_oldest(self) -> int:
        """Drop lines until there is room. Returns: how many."""
        count = 0
        while self.full():
            chunk = self._pop_oldest()
            count += len(chunk.lines)
            _append_hollow(self.front, chunk)
        return count

    def drop_newest(self, chunk: Chunk) -> int:
        """Drop the lines of a chunk that finds no room. Returns: how many."""
        _append_hollow(self.chunks, chunk)
        return len(chunk.lines)

    def _pop_oldest(self) -> Chunk:
        chunk = self.chunks.popleft()
        self.lines -= len(chunk.lines)
        self.data_bytes -= _bytes_of(chunk)
        return chunk


class Inbox:
    """Bounded queues, one a connector: one that outruns the dataflow waits here, or drops.

    Args:
        limits: Connector's name -> its limits; one that is not named gets the defaults.
        monotonic: Clock; tests bring their own.
    """

    def __init__(
        self,
        limits: Mapping[str, QueueLimits] = {},
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = dict(limits)
        self._monotonic = monotonic
        self._queues: dict[str, _Queue] = {}
        self._states: dict[str, SourceState] = {}
        self._open: set[str] = set()
        self._faults: list[BaseException] = []
        self._lock = threading.Lock()
        self._taken = threading.Condition(self._lock)
        self._given = threading.Condition(self._lock)
        self._virtual = 0.0  # the most that a queue had been served when it was served
        self.closed = threading.Event()

    def opened(self, connector: Connector) -> None:
        """A connector began to read."""
        with self._lock:
            self._open.add(connector.name)
            self._queue(connector)

    def ended(self, connector: Connector, fault: BaseException | None = None) -> None:
        """A connector came to the end of its input, or broke."""
        with self._lock:
            self._open.discard(connector.name)
            if fault is not None:
                self._faults.append(fault)
            self._given.notify_all()

    @property
    def drained(self) -> bool:
        """Whether every connector ended and nothing waits."""
        with self._lock:
            return not self._open and all(queue.empty for queue in self._queues.values())

    @property
    def fault(self) -> BaseException | None:
        """What broke a connector, if anything did."""
        return self._faults[0] if self._faults else None

    def state(self, connector: Connector) -> SourceState:
        """Where a connector notes how it stands."""
        with self._lock:
            return self._states.setdefault(connector.name, SourceState())

    def states(self) -> dict[str, tuple[SourceState, int]]:
        """Connector's name -> how it stands, and how many of its lines wait."""
        with self._lock:
            return {
                name: (self._states.setdefault(name, SourceState()), queue.lines)
                for name, queue in self._queues.items()
            }

    @property
    def oldest_arrival(self) -> float | None:
        """Arrival of the oldest line that waits, seconds; None where none does."""
        with self._lock:
            chunks = [next((c for c in q.chunks if c.lines), None) for q in self._queues.values()]
        return min((chunk.lines[0].origin.arrival for chunk in chunks if chunk), default=None)

    def put(self, chunk: Chunk) -> bool:
        """Hand over a chunk, waiting for room where the source blocks. Returns: False if closed meanwhile."""
        while not self.closed.is_set():
            with self._lock:
                if self._take(chunk):
                    return True
                self._taken.wait(WAIT_S)
        return False

    def offer(self, chunk: Chunk) -> bool:
        """Hand over a chunk without waiting. Returns: False if there is no room, or the inbox closed."""
        if self.closed.is_set():
            return False
        with self._lock:
            return self._take(chunk)

    def get(self, timeout_s: float) -> Chunk | None:
        """The next chunk, None if none came in time."""
        deadline = self._monotonic() + timeout_s
        with self._lock:
            while True:
                now = self._monotonic()
                queue = self._next(now)
                if queue is not None:
                    chunk = queue.pop()
                    # Never back: one that a rate held back was served least of all, and who begins now would
                    # start from there, before all others.
                    self._virtual = max(self._virtual, queue.served)
                    queue.served += max(1, len(chunk.lines))
                    self._taken.notify_all()
                    return chunk
                if now >= deadline:
                    return None
                waits = (q.wait_s(now) for q in self._queues.values() if q.chunks)
                # A notify ends the wait early; never longer than what was asked for.
                self._given.wait(min([deadline - now, *(wait for wait in waits if wait > 0)]))

    def _queue(self, connector: Connector) -> _Queue:
        queue = self._queues.get(connector.name)
        if queue is None:
            limits = self._limits.get(connector.name, QueueLimits())
            queue = self._queues[connector.name] = _Queue(limits, self._monotonic())
        return queue

    def _take(self, chunk: Chunk) -> bool:
        queue = self._queue(chunk.connector)
        idle, dropped = queue.empty, 0
        if queue.full():
            match queue.limits.when_full:
                case "block":
                    return False
                case "drop_newest":
                    dropped = queue.drop_newest(chunk)
                case "drop_oldest":
                    dropped = queue.drop_oldest()
                    queue.push(chunk)
        else:
            queue.push(chunk)
        if dropped:
            self._states.setdefault(chunk.connector.name, SourceState()).count("dropped", dropped)
        if idle:  # what it did not use while it was silent is no credit
            queue.served = max(queue.served, self._virtual)
        self._given.notify()
        return True

    def _next(self, now: float) -> _Queue | None:
        best: _Queue | None = None
        for queue in self._queues.values():
            # When the inbox is closed nothing is held back: what waits is committed before the end.
            ready = not queue.empty and (self.closed.is_set() or queue.ready(now))
            if ready and (best is None or queue.served < best.served):
                best = queue
        return best


def _append_hollow(chunks: deque[Chunk], dropped: Chunk) -> None:
    """Put what a dropped chunk leaves, its positions and receipt, in its place; runs of them become one."""
    count = dropped.dropped + len(dropped.lines)
    last = chunks[-1] if chunks else None
    if last is not None and not last.lines and last.receipt is None:
        positions, count = last.positions | dropped.positions, count + last.dropped
        chunks[-1] = msgspec.structs.replace(dropped, lines=[], positions=positions, dropped=count)
    else:
        chunks.append(msgspec.structs.replace(dropped, lines=[], dropped=count))


def _bytes_of(chunk: Chunk) -> int:
    return sum([len(line.data) for line in chunk.lines])  # a list: twice as fast


class Backoff:
    """How long to wait before the next try to connect: doubling, with full jitter between half and whole.

    Args:
        first_s, longest_s: Of the waits. So long that a network that returns is used again within 30 s.
        chance: Number in [0, 1); tests bring their own.
    """

    def __init__(
        self, first_s: float = 0.5, longest_s: float = 15.0, chance: Callable[[], float] = random.random
    ) -> None:
        self._first_s, self._longest_s, self._chance = first_s, longest_s, chance
        self._next_s = first_s

    def next_s(self) -> float:
        """Seconds to wait before the next try; longer each time."""
        wait, self._next_s = self._next_s, min(2 * self._next_s, self._longest_s)
        return wait * (0.5 + 0.5 * self._chance())

    def reset(self) -> None:
        """The connection held: begin anew."""
        self._next_s = self._first_s


class ReaderThread:
    """The thread of a connector: it reads until it ends, breaks or is told to stop, and tells the inbox.

    Attributes:
        stopping: Set when reading must end; the reading looks at it.
    """

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, connector: Connector, inbox: Inbox, read: Callable[[], None]) -> None:
        """Begin to read; what `read` raises is what broke the connector."""
        inbox.opened(connector)
        self._thread = threading.Thread(
            target=self._run, args=(connector, inbox, read), name=connector.name, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop reading."""
        self.stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=2)

    @staticmethod
    def _run(connector: Connector, inbox: Inbox, read: Callable[[], None]) -> None:
        fault: BaseException | None = None
        try:
            read()
        except Exception as error:
            fault = error
        finally:
            inbox.ended(connector, fault)
