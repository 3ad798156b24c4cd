"""Readers that hold the ring back: who is warned of, who is ended, and who never."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.readers import END_S, FULL_S, LOOK_S, WARN_S, ReaderReport, ReaderWatch, end_process
from storage.ring import Ring
from storage.windows import Reader

STRANGER = 4_000_000  # above the largest process id of a small system; nothing is sent to it here


class FakeRing:
    """A ring whose readers a test sets."""

    def __init__(self) -> None:
        self.inside: list[Reader] = []
        self.stale: list[Reader] = []
        self.cleared = 0

    def readers(self) -> list[Reader]:
        return [*self.inside, *self.stale]

    def clear_stale_readers(self) -> int:
        self.cleared += 1
        count, self.stale = len(self.stale), []
        return count


class Watched:
    """A watch with a time of its own that counts what it ends."""

    def __init__(self) -> None:
        self.ring = FakeRing()
        self.now = 1_000.0
        self.ended: list[int] = []
        self.told: list[ReaderReport] = []
        self.stopping = False
        self.watch = ReaderWatch(
            self.ring, self.told.append, lambda: self.stopping, self.end,
            monotonic=lambda: self.now, sleep=self.sleep,
        )  # fmt: skip

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def end(self, pid: int, still: object) -> bool:
        assert callable(still)
        if not still():
            return False
        self.ended.append(pid)
        self.ring.inside = [reader for reader in self.ring.inside if reader.pid != pid]
        return True

    def pass_time(self, seconds: float, step: float = 1.0) -> None:
        """Look once a step, as the flow does, with a commit between."""
        for _ in range(int(seconds / step)):
            self.now += step
            self.ring.inside = [Reader(r.pid, r.txn, r.behind + 1) for r in self.ring.inside]
            self.watch.look()


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_a_reader_that_leaves_is_left_alone(watched: Watched) -> None:
    """Each look finds another transaction."""
    for n in range(60):
        watched.ring.inside = [Reader(STRANGER, n, 1)]
        watched.pass_time(1)
    assert watched.watch.report.warned == watched.watch.report.ended == 0
    assert watched.watch.report.lag > 0


def test_a_reader_of_the_newest_snapshot_holds_nothing_back(watched: Watched) -> None:
    """However long: nothing was committed since."""
    watched.ring.inside = [Reader(STRANGER, 5, 0)]
    for _ in range(100):
        watched.now += 1.0
        watched.watch.look()
    assert watched.watch.report == ReaderReport(cleared=0)


def test_a_slow_reader_is_warned_of_once_and_ended_at_last(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    watched.ring.inside = [Reader(STRANGER, 5, 0)]
    watched.pass_time(WARN_S + 2 * LOOK_S)
    assert (watched.watch.report.warned, watched.ended) == (1, [])
    assert f"process {STRANGER} has been in one read transaction" in caplog.text
    watched.pass_time(END_S)
    assert watched.ended == [STRANGER]
    assert watched.told[-1] == watched.watch.report
    assert (watched.watch.report.warned, watched.watch.report.ended) == (1, 1)
    assert f"ended process {STRANGER}" in caplog.text
    watched.pass_time(10)
    assert watched.watch.report.lag == 0


def test_we_ourselves_are_warned_of_and_never_ended(watched: Watched) -> None:
    watched.ring.inside = [Reader(os.getpid(), 5, 0)]
    watched.pass_time(10 * END_S)
    assert watched.ended == []
    assert watched.watch.report.warned == 1


def test_where_this_process_was_stopped_too_nobody_is_blamed(watched: Watched) -> None:
    """Ctrl-Z and fg on all of them: an hour passed, and nobody could have left."""
    watched.ring.inside = [Reader(STRANGER, 5, 1)]
    watched.pass_time(2 * LOOK_S)
    watched.now += 3_600.0
    watched.watch.look()
    assert watched.ended == []


def test_a_slot_of_a_dead_process_is_cleared_and_its_number_is_not_ended(watched: Watched) -> None:
    """The number may be another process's by now; the slot shows when it is cleared."""
    watched.ring.stale = [Reader(STRANGER, 5, 3)]
    watched.watch._cleared = watched.now + END_S  # not due before it would be ended
    watched.pass_time(2 * END_S)
    assert watched.ended == []
    assert watched.watch.report.cleared == 1


def test_stale_slots_are_cleared_every_half_minute(watched: Watched) -> None:
    watched.pass_time(299)
    assert 9 <= watched.ring.cleared <= 10


def test_a_full_ring_is_tried_again_for_some_seconds(watched: Watched) -> None:
    tries = 1
    while watched.watch.relieve(tries):
        tries += 1
    assert FULL_S <= watched.now - 1_000.0 <= FULL_S + 1
    assert 5 <= tries <= 12
    assert watched.ring.cleared == 1


def test_a_full_ring_that_a_reader_holds_back_waits_until_that_is_ended(watched: Watched) -> None:
    """And is tried once more then."""
    watched.ring.inside = [Reader(STRANGER, 5, 9)]
    tries = 1
    while watched.watch.relieve(tries):
        tries += 1
        if watched.ended:
            break
    assert watched.ended == [STRANGER]
    assert watched.now - 1_000.0 <= END_S + 3 * LOOK_S


def test_nobody_waits_for_a_full_ring_when_told_to_stop(watched: Watched) -> None:
    watched.stopping = True
    assert watched.watch.relieve(1) is False
    assert watched.now == 1_000.0


# -- real processes ---------------------------------------------------------------------------------

HUNG = """
import sys, time
from pathlib import Path
from storage.ring import Ring
ring = Ring.open_reader(Path(sys.argv[1]))
with ring.reading() as txn:
    txn.get(b"H")
    print("inside", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[Ring]:
    with Ring.create(tmp_path / "ring", shard="main", tokenizer_id="00" * 8, max_bytes=1 << 20) as ring:
        yield ring


def test_a_stopped_process_inside_a_transaction_is_ended_and_its_slot_freed(ring: Ring) -> None:
    """SIGSTOP, as a frozen container or a debugger does: SIGKILL reaches it all the same."""
    process = subprocess.Popen([sys.executable, "-c", HUNG, str(ring.folder)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"inside\n"
        process.send_signal(signal.SIGSTOP)
        (reader,) = [reader for reader in ring.readers() if reader.pid == process.pid]
        assert ring.clear_stale_readers() == 0
        assert end_process(reader.pid, lambda: reader.pid in {other.pid for other in ring.readers()})
        process.wait(10)
        ring.clear_stale_readers()
        assert process.pid not in {other.pid for other in ring.readers()}
    finally:
        process.kill()
        process.communicate()


def test_neither_we_nor_init_nor_a_process_that_is_not_meant_are_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        assert not end_process(os.getpid(), lambda: True)
        assert not end_process(1, lambda: True)
        assert not end_process(-1, lambda: True)
        assert not end_process(process.pid, lambda: False)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert not end_process(process.pid, lambda: True), "it is gone"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to run a process as another user")
def test_a_process_of_another_user_is_never_ended() -> None:
    process = subprocess.Popen(
        ["/bin/sleep", "600"], user=65_534, group=65_534, extra_groups=[]
    )  # fmt: skip
    try:
        assert not end_process(process.pid, lambda: True)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
