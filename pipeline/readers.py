"""Readers that hold the ring back: they are noticed, told of, and at last ended.

A read transaction pins every page that its snapshot needs, and the ring, whose file never grows, writes into
what is left; a reader that hangs would in the end fill it. Ours leave within a second. So:

| a reader | what is done |
|---|---|
| that died inside a transaction | its slot is cleared, every 30 s and when the ring is full |
| in one transaction for 5 s while commits go on | a warning, once a transaction |
| ... for 30 s | its process is ended with SIGKILL, its slot cleared |

Only a process that holds a slot of our reader table is ended, that runs under our user, and that is not this
one. Time counts as it passes here: where this process was stopped too, nobody is to blame for it.

When the ring is full all the same, input is refused by not being taken: nothing of the Batch is acknowledged,
connectors wait at the full queue. It is tried again while readers hold pages, else for 5 s; then ingest ends
with the error, and its supervisor starts it again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from storage.windows import Reader

__all__ = ["END_S", "WARN_S", "ReaderReport", "ReaderWatch", "WatchedRing", "end_process"]

LOOK_S = 5.0
CLEAR_S = 30.0
WARN_S = 5.0
END_S = 30.0
FULL_S = 5.0  # a full ring that no reader holds back stays full
BACKOFF_S = (0.1, 0.2, 0.4, 0.8, 1.0)  # then the last again
log = logging.getLogger("edgewater.readers")


class WatchedRing(Protocol):
    """What the watch asks of a ring."""

    def readers(self) -> Sequence[Reader]:
        """Processes inside a read transaction."""

    def clear_stale_readers(self) -> int:
        """Free the slots of readers that died inside a transaction."""


class ReaderReport(msgspec.Struct, frozen=True):
    """What the watch found, for the metrics.

    Attributes:
        lag: Commits that the reader furthest behind does not see; 0 where none lies behind.
        warned, ended, cleared: Transactions warned of, processes ended, slots cleared so far.
    """

    lag: int = 0
    warned: int = 0
    ended: int = 0
    cleared: int = 0


class ReaderWatch:
    """Looks at a ring's readers now and then, and helps when the ring is full.

    Args:
        ring: Whose readers.
        tell: Takes what was found.
        stopping: Whether ingest is to end: then nobody waits for a full ring.
        end: Ends a process; returns whether it did.
        monotonic, sleep: Time; tests bring their own.
    """

    def __init__(
        self,
        ring: WatchedRing,
        tell: Callable[[ReaderReport], None] = lambda report: None,
        stopping: Callable[[], bool] = lambda: False,
        end: Callable[[int, Callable[[], bool]], bool] | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._ring = ring
        self._tell = tell
        self._stopping = stopping
        self._end = end or end_process
        self._monotonic, self._sleep = monotonic, sleep
        self._looked = self._cleared = monotonic()
        self._ages: dict[tuple[int, int], float] = {}  # (process, transaction): how long it was seen behind
        self._warned: set[tuple[int, int]] = set()
        self._waited = 0.0
        self.report = ReaderReport()

    def look(self) -> None:
        """Look, if it is time to: every 5 s."""
        now = self._monotonic()
        passed = now - self._looked
        if passed < LOOK_S:
            return
        self._looked = now
        if now - self._cleared >= CLEAR_S:
            self._clear()
        self._judge(min(passed, 2 * LOOK_S))

    def relieve(self, tries: int) -> bool:
        """The ring is full: clear and look at once, wait a little. Returns: whether to try again."""
        self._waited = 0.0 if tries == 1 else self._waited
        if tries == 1:
            log.warning("the ring is full: input waits")
            self._clear()
        held_back = any(reader.behind > 0 for reader in self._ring.readers())
        if self._stopping() or self._waited >= (END_S + 2 * LOOK_S if held_back else FULL_S):
            return False
        pause = BACKOFF_S[min(tries, len(BACKOFF_S)) - 1]
        self._sleep(pause)
        self._waited += pause
        self.look()
        self._tell(self.report)
        return True

    def _judge(self, passed: float) -> None:
        behind = [reader for reader in self._ring.readers() if reader.behind > 0]
        # The same transaction as at the last look: one begun since would see the newest commit.
        self._ages = {
            (reader.pid, reader.txn): self._ages.get((reader.pid, reader.txn), -passed) + passed
            for reader in behind
        }
        self._warned &= self._ages.keys()
        for reader in behind:
            key = (reader.pid, reader.txn)
            age = self._ages[key]
            if age >= END_S and reader.pid != os.getpid():
                self._end_reader(reader, age)
            elif age >= WARN_S and key not in self._warned:
                self._warned.add(key)
                self._count(warned=1)
                log.warning(
                    "process %d has been in one read transaction for %.0f s, %d commits behind: it holds "
                    "pages that the ring needs",
                    reader.pid, age, reader.behind,
                )  # fmt: skip
        lag = max((reader.behind for reader in behind), default=0)
        self.report = msgspec.structs.replace(self.report, lag=lag)
        self._tell(self.report)

    def _end_reader(self, reader: Reader, age: float) -> None:
        def still() -> bool:
            # A slot whose process is gone, and whose number another one has now, is cleared by this.
            self._clear()
            return any((other.pid, other.txn) == (reader.pid, reader.txn) for other in self._ring.readers())

        if self._end(reader.pid, still):
            self._count(ended=1)
            log.error(
                "ended process %d: it was in one read transaction for %.0f s, %d commits behind",
                reader.pid, age, reader.behind,
            )  # fmt: skip
            self._clear()

    def _clear(self) -> None:
        self._cleared = self._monotonic()
        cleared = self._ring.clear_stale_readers()
        if cleared:
            self._count(cleared=cleared)
            log.warning("cleared %d slots of readers that died inside a transaction", cleared)

    def _count(self, **more: int) -> None:
        counted = {name: getattr(self.report, name) + count for name, count in more.items()}
        self.report = msgspec.structs.replace(self.report, **counted)


def end_process(pid: int, still: Callable[[], bool]) -> bool:
    """End a process of our own user with SIGKILL, and wait up to a second for it to be gone.

    Args:
        pid: The process; never this one.
        still: Asked when the process is held, so that its number cannot pass to another: whether it is the
            one that is meant.
    Returns: Whether it was ended.
    """
    if pid <= 1 or pid == os.getpid():
        return False
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if _user_of(pid) != os.geteuid() or not still():
            return False
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
            gone = select.poll()
            gone.register(process, select.POLLIN)
            return bool(gone.poll(1_000))
        return False
    finally:
        os.close(process)


def _user_of(pid: int) -> int:
    """Effective user of a process, -1 if it is gone. Not the owner of /proc/PID: that may be root."""
    try:
        status = (Path("/proc") / str(pid) / "status").read_text("utf-8", "replace")
    except OSError:
        return -1
    line = next((line for line in status.splitlines() if line.startswith("Uid:")), "")
    return int(line.split()[2]) if line else -1
