"""The daemon from outside: it follows files, answers on loopback, honours requests, and ends when told."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.stream import WINDOW, arguments, distinct, edgewater, environment

pytestmark = pytest.mark.slow
WAIT_S = 90


class Gateway:
    """A running `edgewater run` that follows one file."""

    def __init__(self, tmp_path: Path, model: Path) -> None:
        self.file = tmp_path / "events.jsonl"
        self.file.touch()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.config = tmp_path / "edgewater.toml"
        self.config.write_text(
            f'data_dir = "{tmp_path / "data"}"\n[ring]\nflush_ms = 100\n[health]\nlisten = "{self.address}"\n'
            f'[[sources]]\nname = "site"\nkind = "files"\npath = "{tmp_path}/events.jsonl"\n'
        )
        self.words = ["--config", str(self.config), *arguments(model)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "run", *self.words], env=environment()
        )

    def send(self, events: list[bytes]) -> None:
        with self.file.open("ab") as file:
            file.writelines(events)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=5) as answer:
            return str(answer.read().decode())

    def status(self) -> dict[str, object]:
        return dict(json.loads(edgewater("status", "--json", *self.words).stdout))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture
def gateway(tmp_path: Path, tiny_model: Path) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path, tiny_model)
    yield gateway
    if gateway.process.poll() is None:
        gateway.process.kill()
        gateway.process.wait()


def until(happens: Callable[[], bool], what: str) -> None:
    """Wait for something; an OSError means not yet."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            if happens():
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"not within {WAIT_S} s: {what}")


def test_the_daemon_learns_from_a_followed_file_and_ends_cleanly(gateway: Gateway) -> None:
    """Health, metrics, rotation, a malformed line, an update by request, SIGTERM: one life of a gateway."""
    until(lambda: gateway.get("/readyz") == "ok\n", "ready")
    events = distinct(WINDOW - 20)
    gateway.send([*events[:40], b"not an event\n"])
    until(lambda: 'edgewater_events_total{outcome="samples"} 40.0' in gateway.get("/metrics"), "40 samples")
    gateway.file.rename(gateway.file.with_name("events.jsonl.1"))
    gateway.send(events[40:])
    until(lambda: "edgewater_open_window_samples 80.0" in gateway.get("/metrics"), "80 samples")
    assert 'edgewater_events_total{outcome="dead_letters"} 1.0' in gateway.get("/metrics")
    assert gateway.get("/livez") == "ok\n"
    edgewater("update", *gateway.words)
    until(lambda: "edgewater_active_version 1.0" in gateway.get("/metrics"), "a version")
    metrics = gateway.get("/metrics")
    assert 'edgewater_windows{state="acknowledged"} 1.0' in metrics
    assert 'edgewater_bits_per_byte{under="base"}' in metrics
    assert "edgewater_commit_seconds_count" in metrics
    status = gateway.status()
    assert (status["samples"], status["dead_letters"], status["active_version"]) == (80, 1, 1)
    assert "not JSON" in str(status["newest_dead_letters"])
    assert gateway.stop() == 0
    verified = edgewater("versions", "verify", "--json", *gateway.words)
    assert json.loads(verified.stdout)[0]["problem"] == ""
    edgewater("doctor", *gateway.words)


def test_a_second_gateway_on_the_same_folder_is_refused(gateway: Gateway) -> None:
    until(lambda: gateway.get("/readyz") == "ok\n", "ready")
    second = edgewater("run", *gateway.words, check=False)
    assert second.returncode == 3
    assert b"stop it first, or use another data_dir" in second.stderr
    assert gateway.stop() == 0


def test_what_was_acknowledged_before_a_kill_is_not_read_again(gateway: Gateway) -> None:
    """Killed with everything it started, then started again: the file's positions are where they were."""
    until(lambda: gateway.get("/readyz") == "ok\n", "ready")
    gateway.send(distinct(50)[:30])
    until(lambda: "edgewater_open_window_samples 30.0" in gateway.get("/metrics"), "30 samples")
    gateway.process.kill()
    gateway.process.wait()
    gateway.send(distinct(50)[30:])
    again = edgewater("run", "--once", "--no-updates", *gateway.words)
    assert again.returncode == 0
    status = gateway.status()
    assert (status["events"], status["samples"], status["duplicates"]) == (50, 50, 0)
