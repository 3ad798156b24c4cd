"""The one bounded queue between connectors and the dataflow, and the contract of a connector."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from pipeline.events import Line

__all__ = ["MAX_CHUNKS", "Chunk", "Connector", "Inbox", "ReaderThread"]

MAX_CHUNKS = 64  # of at most 32 KiB and one long line each: a few MiB wait at most


class Connector(Protocol):
    """A source of lines: one thread that reads, remembers nothing that the ring does not, and obeys stop.

    Promises: lines of one input arrive in order; a position handed to `start` is where reading goes on;
    a chunk's position is that after its last line; after `stop` its thread ends within a second.
    """

    name: str

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None:
        """Begin to read, each input from its committed position (none: from its start)."""

    def acknowledge(self, receipts: list[object]) -> None:
        """The commit that holds these inputs is on stable storage."""

    def stop(self) -> None:
        """Stop reading; lines already in the inbox are still committed."""


class Chunk(msgspec.Struct, frozen=True):
    """Lines that a connector read in one go.

    Attributes:
        connector: Who read them.
        lines: The lines, in order; may be empty where only a position moved.
        positions: Input -> position after these lines.
        receipt: What `acknowledge` wants back, None for nothing.
        urgent: Close the Batch now: the connector can take no more until a commit.
    """

    connector: Connector
    lines: list[Line]
    positions: dict[str, bytes] = {}
    receipt: object = None
    urgent: bool = False


class Inbox:
    """A bounded queue: a connector that outruns the dataflow waits here."""

    def __init__(self, max_chunks: int = MAX_CHUNKS) -> None:
        self._queue: queue.Queue[Chunk] = queue.Queue(max_chunks)
        self._open: set[str] = set()
        self._faults: list[BaseException] = []
        self._lock = threading.Lock()
        self.closed = threading.Event()

    def opened(self, connector: Connector) -> None:
        """A connector began to read."""
        with self._lock:
            self._open.add(connector.name)

    def ended(self, connector: Connector, fault: BaseException | None = None) -> None:
        """A connector came to the end of its input, or broke."""
        with self._lock:
            self._open.discard(connector.name)
            if fault is not None:
                self._faults.append(fault)

    @property
    def drained(self) -> bool:
        """Whether every connector ended and nothing waits."""
        with self._lock:
            return not self._open and self._queue.empty()

    @property
    def fault(self) -> BaseException | None:
        """What broke a connector, if anything did."""
        return self._faults[0] if self._faults else None

    def put(self, chunk: Chunk) -> bool:
        """Hand over a chunk, waiting for room. Returns: False if the inbox closed meanwhile."""
        while not self.closed.is_set():
            try:
                self._queue.put(chunk, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def get(self, timeout_s: float) -> Chunk | None:
        """The next chunk, None if none came in time."""
        try:
            return self._queue.get(timeout=timeout_s) if timeout_s > 0 else self._queue.get_nowait()
        except queue.Empty:
            return None


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
