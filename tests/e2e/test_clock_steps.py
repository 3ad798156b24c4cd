"""The clock is moved while ingest runs: an hour back, to 1970, ten years on. Nothing is lost or evicted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.errors import StorageError
from storage.ring import Ring
from storage.windows import RingState
from tests.e2e.stream import arguments, environment

pytestmark = pytest.mark.slow
WAIT_S = 30.0
# Of the package faketime; where it lies elsewhere, $FAKETIME_LIBRARY names it.
LIBRARY = os.environ.get("FAKETIME_LIBRARY") or next(
    map(str, sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), ""
)
STEPS = {"an hour back": -3_600, "to 1970": 1_000 - int(time.time()), "ten years on": 315_576_000, "right": 0}


class Gateway:
    """`edgewater ingest` that follows a file under a clock that the test moves."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.file, self.clock, self.data = folder / "events.jsonl", folder / "clock", folder / "data"
        self.file.touch()
        self.sent = 0
        self.step(0)
        (folder / "edgewater.toml").write_text(
            f'data_dir = "{self.data}"\n[ring]\nflush_ms = 50\nmax_age = "30d"\n[trigger]\nmax_age = "2d"\n'
            f'[health]\nlisten = ""\n[[sources]]\nname = "site"\nkind = "files"\npath = "{self.file}"\n'
        )
        faked = {
            "LD_PRELOAD": LIBRARY,
            "FAKETIME_TIMESTAMP_FILE": str(self.clock),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",  # as settimeofday: the monotonic clock goes on
            "NO_FAKE_STAT": "1",
        }
        words = ["ingest", "--config", str(folder / "edgewater.toml"), *arguments(model)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *words], env=environment() | faked, stderr=subprocess.PIPE
        )

    def step(self, seconds: int) -> None:
        """Move the clock, from the true one."""
        self.clock.with_suffix(".new").write_text(f"{seconds:+d}\n")
        self.clock.with_suffix(".new").rename(self.clock)

    def send(self) -> None:
        event = {"kind": "text", "id": str(self.sent), "text": f"event {self.sent}"}
        with self.file.open("ab") as file:
            file.write(json.dumps(event).encode() + b"\n")
        self.sent += 1

    def state(self) -> RingState:
        with Ring.open_reader(self.data / "ring" / "main") as ring:
            return ring.read_state()

    def send_for(self, seconds: float) -> float:
        """Send 20 events a second. Returns: the longest time in which none was stored, seconds."""
        longest, stored, since = 0.0, self.state().next_seq, time.monotonic()
        end = since + seconds
        while (now := time.monotonic()) < end:
            self.send()
            time.sleep(0.05)
            if stored != (stored := self.state().next_seq):
                since = now
            longest = max(longest, now - since)
        return longest


def until(happens: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            if happens():
                return
        except StorageError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"not within {WAIT_S:.0f} s: {what}")


@pytest.fixture
def gateway(tmp_path: Path, tiny_model: Path) -> Iterator[Gateway]:
    if not LIBRARY:
        pytest.skip("needs libfaketime (the package faketime)")
    gateway = Gateway(tmp_path, tiny_model)
    yield gateway
    gateway.process.kill()
    gateway.process.communicate()


def test_steps_of_the_clock_cost_ingest_neither_events_nor_windows(gateway: Gateway) -> None:
    """FAULTS.md rows 15 and 16; how long nothing was stored at each step is printed."""
    gateway.send()
    until(lambda: gateway.state().next_seq == 1, "the first event")
    began = gateway.state().stream_time
    assert began == pytest.approx(time.time(), abs=WAIT_S)
    silences = {"no step": gateway.send_for(3.0)}
    for name, seconds in STEPS.items():
        gateway.step(seconds)
        silences[name] = gateway.send_for(4.0)
    print("\nnothing stored for at most, s:", {name: round(s, 2) for name, s in silences.items()})
    until(lambda: gateway.state().next_seq == gateway.sent, "every event")
    state = gateway.state()
    assert (state.tail_seq, state.counters["duplicates"]) == (0, 0)
    assert state.stream_time == pytest.approx(time.time(), abs=WAIT_S)
    assert state.clock.offset == 0.0
    gateway.process.send_signal(signal.SIGTERM)
    _, told = gateway.process.communicate(timeout=30)
    assert gateway.process.returncode == 0
    assert b"the clock was moved: stream time goes on" in told
    with Ring.open_reader(gateway.data / "ring" / "main") as ring:
        assert ring.read(0, gateway.sent - 1).seqs == range(gateway.sent)
        assert {window.reason for window in ring.windows()} == {"samples"}
        assert [problem for _, problem in ring.check_blocks() if problem] == []
