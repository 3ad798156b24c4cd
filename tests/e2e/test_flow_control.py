"""Sources that are faster than the rest: a disk of seconds, a flood beside a quiet source, full queues.

FAULTS.md rows 28 and 30. Each runs the real ingest process and measures from outside: an event carries the
moment at which it was written, the ring tells when it was committed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.errors import StorageError
from storage.ring import Ring
from storage.windows import RingState
from tests.crash.lives import cannot_trace
from tests.e2e.stream import arguments, environment

pytestmark = pytest.mark.slow
WAIT_S = 60.0


class Gateway:
    """`edgewater ingest` with some sources, its ring watched from outside."""

    def __init__(self, folder: Path, model: Path, sources: str, *more: str) -> None:
        self.data = folder / "data"
        (folder / "edgewater.toml").write_text(
            f'data_dir = "{self.data}"\n[ring]\nflush_ms = 200\n[health]\nlisten = ""\n' + sources
        )
        words = [
            "ingest",
            "--config",
            str(folder / "edgewater.toml"),
            *arguments(model, "ring.max_bytes=64MiB", *more),
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *words], env=environment(), stdin=subprocess.PIPE
        )
        self.until(lambda: self.state().next_seq >= 0, "its ring")

    def state(self) -> RingState:
        with Ring.open_reader(self.data / "ring" / "main") as ring:
            return ring.read_state()

    def until(self, happens: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "ingest ended"
            try:
                if happens():
                    return
            except StorageError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not within {WAIT_S:.0f} s: {what}")

    def ages(self, source: str, seen: int) -> tuple[list[float], int]:
        """Seconds from writing to now of a source's samples from seq `seen` on. Returns: them, next seq."""
        with Ring.open_reader(self.data / "ring" / "main") as ring:
            state = ring.read_state()
            if state.next_seq == seen:
                return [], seen
            samples = ring.read(max(seen, state.tail_seq), state.next_seq - 1)
        now = time.time()
        own = zip(samples.sources, samples.ts, strict=True)
        return [now - ts for name, ts in own if name == source], state.next_seq

    def memory_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        kib = [int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "RssShm"))]
        return 1024 * sum(kib)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(WAIT_S) == 0


def event(number: int, source: str) -> bytes:
    made = {"kind": "text", "source": source, "id": f"{source} {number}", "ts": time.time()}
    return json.dumps(made | {"text": f"event {number} of {source}"}).encode() + b"\n"


@pytest.fixture
def started(tmp_path: Path, tiny_model: Path) -> Iterator[Callable[..., Gateway]]:
    gateways: list[Gateway] = []

    def start(sources: str, *more: str) -> Gateway:
        gateways.append(Gateway(tmp_path, tiny_model, sources, *more))
        return gateways[-1]

    yield start
    for gateway in gateways:
        gateway.process.kill()
        gateway.process.communicate()


@pytest.fixture
def slow_disk() -> Iterator[Callable[[int, float], None]]:
    """Makes every flush of a process take longer, from now on."""
    if reason := cannot_trace():
        pytest.skip(reason)
    tracers: list[subprocess.Popen[bytes]] = []

    def slow(pid: int, seconds: float) -> None:
        delay = ["-e", "trace=fdatasync", "-e", f"inject=fdatasync:delay_exit={int(seconds * 1e6)}"]
        command = ["strace", "-f", "-qq", "-o", "/dev/null", *delay, "-p", str(pid)]
        tracers.append(subprocess.Popen(command))
        time.sleep(1.0)  # until it is attached

    yield slow
    for tracer in tracers:
        tracer.terminate()
        tracer.wait()


STDIN = '[[sources]]\nname = "site"\nkind = "stdin"\n'


def test_a_disk_that_takes_two_seconds_makes_larger_commits_and_loses_nothing(
    started: Callable[..., Gateway], slow_disk: Callable[[int, float], None]
) -> None:
    gateway = started(STDIN)
    assert gateway.process.stdin is not None
    sent = seen = 3_000  # past the one commit in a ring's life that writes its dictionary, and costs a flush
    gateway.process.stdin.write(b"".join(event(n, "site") for n in range(sent)))
    gateway.process.stdin.flush()
    gateway.until(lambda: gateway.state().next_seq == sent, "the first events")
    slow_disk(gateway.process.pid, 2.0)
    commits, ages = gateway.state().commits, list[float]()
    end = time.monotonic() + 12
    while time.monotonic() < end:
        gateway.process.stdin.write(b"".join(event(sent + n, "site") for n in range(100)))
        gateway.process.stdin.flush()
        sent += 100
        time.sleep(0.1)
        new, seen = gateway.ages("site", seen)
        ages += new
    gateway.until(lambda: gateway.state().next_seq == sent, "every event")
    ages.sort()
    made = gateway.state().commits - commits
    p99 = ages[int(0.99 * len(ages))]
    print(f"\n{sent - 3_000} events in {made} commits, p99 from writing to commit {p99:.1f} s")
    assert p99 < 5.0  # FAULTS.md row 30: the flush under way and one's own
    assert (sent - 3_000) / made > 1_000, "a commit holds what came in while the one before ran"
    gateway.process.stdin.close()


def test_a_flood_from_one_source_costs_another_nothing(
    started: Callable[..., Gateway], tmp_path: Path
) -> None:
    """A file of 150,000 events is read as fast as it goes, while another grows by 20 a second."""
    flood, quiet = tmp_path / "flood.jsonl", tmp_path / "quiet.jsonl"
    quiet.touch()
    filler = "x" * 200
    with flood.open("w") as file:
        for number in range(150_000):
            row = {"kind": "text", "id": str(number), "ts": 1.0, "text": f"{number} {filler}"}
            file.write(json.dumps(row) + "\n")
    sources = "".join(
        f'[[sources]]\nname = "{path.stem}"\nkind = "files"\npath = "{path}"\n' for path in (flood, quiet)
    )
    gateway = started(sources)
    sent, seen, ages, peak = 0, 0, list[float](), 0
    end = time.monotonic() + 8
    while time.monotonic() < end:
        with quiet.open("ab") as file:
            file.write(event(sent, "quiet"))
        sent += 1
        time.sleep(0.05)
        try:
            new, seen = gateway.ages("quiet", seen)
        except LookupError:
            continue  # evicted between two looks: the flood is larger than the ring
        ages += new
        peak = max(peak, gateway.memory_bytes())
    gateway.until(lambda: gateway.state().counters["events"] == sent + 150_000, "every event")
    ages.sort()
    print(f"\n{len(ages)} quiet events, at most {ages[-1]:.2f} s to their commit, {peak >> 20} MiB")
    assert len(ages) > 50
    assert ages[int(0.99 * len(ages))] < 3.0, "the queue of the flood is not before it"
    assert peak < 110 << 20
    gateway.stop()


def test_a_full_queue_that_may_drop_keeps_the_newest_and_counts_the_rest(
    started: Callable[..., Gateway], slow_disk: Callable[[int, float], None]
) -> None:
    gateway = started(STDIN + 'queue = 200\nwhen_full = "drop_oldest"\n')
    slow_disk(gateway.process.pid, 1.0)
    assert gateway.process.stdin is not None
    for start in range(0, 20_000, 200):
        gateway.process.stdin.write(b"".join(event(start + n, "site") for n in range(200)))
        gateway.process.stdin.flush()
        time.sleep(0.005)
    gateway.process.stdin.close()
    gateway.process.wait(WAIT_S)
    state = gateway.state()
    assert state.counters["events"] == 20_000
    assert state.counters["dropped"] > 0
    assert state.counters["samples"] + state.counters["dropped"] == 20_000
    with Ring.open_reader(gateway.data / "ring" / "main") as ring:
        newest = ring.read(state.next_seq - 1, state.next_seq - 1)
    assert newest.ts[0] == max(newest.ts)


def test_a_rate_holds_a_source_back(started: Callable[..., Gateway]) -> None:
    gateway = started(STDIN + "rate = 50\nburst = 100\n")
    assert gateway.process.stdin is not None
    feeder = threading.Thread(
        target=lambda: [os.write(gateway.process.stdin.fileno(), event(n, "site")) for n in range(1_500)],  # type: ignore[union-attr]
        daemon=True,
    )
    began = time.monotonic()
    feeder.start()
    gateway.until(lambda: gateway.state().next_seq >= 600, "a chunk, and what the rate allows")
    assert time.monotonic() - began > 2.0, "a chunk of 32 KiB goes at once, what follows it waits"
    feeder.join(WAIT_S)
    gateway.stop()
    assert gateway.state().next_seq == 1_500, "at the end nothing is held back"
