"""A gateway that only ingests, from files, for tests that look at it from outside."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.control import ControlError, NoIngestError, ask
from storage.folder import DataFolder
from storage.ring import Ring
from storage.windows import DeadLetter, RingState
from tests.e2e.stream import arguments, edgewater, environment

__all__ = ["Site", "until"]

WAIT_S = 60


class Site:
    """One configuration, its files and its data folder.

    Args:
        path: Where all of it lies.
        model: The base model.
        sources: Names of its sources, each of a file of that name.
        more: Further lines of the configuration.
    """

    def __init__(self, path: Path, model: Path, sources: tuple[str, ...] = ("site",), more: str = "") -> None:
        self.path, self.data, self.model = path, path / "data", model
        self.config = path / "edgewater.toml"
        self._sources = sources
        self.configure(more)
        self.process: subprocess.Popen[bytes] | None = None

    def configure(self, more: str) -> None:
        """Write the configuration."""
        lines = [
            f'data_dir = "{self.data}"', "[ring]", "flush_ms = 50", "[health]", 'listen = ""',
            '[[redact]]\npreset = "email"', more,
        ]  # fmt: skip
        for name in self._sources:
            lines.append(f'[[sources]]\nname = "{name}"\nkind = "files"\npath = "{self.file(name)}"')
        self.config.write_text("\n".join(lines) + "\n")

    def file(self, name: str = "site") -> Path:
        return self.path / f"{name}.jsonl"

    @property
    def words(self) -> list[str]:
        return ["--config", str(self.config), *arguments(self.model)]

    def send(self, *events: dict[str, Any] | bytes, source: str = "site") -> None:
        with self.file(source).open("ab") as file:
            for event in events:
                file.write((event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n")

    def start(self, *more: str) -> None:
        """Start `edgewater run`, and wait until its ingest answers."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "run", "--no-updates", *self.words, *more], env=environment()
        )
        until(self.answers, "ingest answers")

    def answers(self) -> bool:
        """Whether an ingest process answers; the socket of one that was killed does not."""
        with contextlib.suppress(NoIngestError, ControlError):
            return bool(ask(DataFolder(self.data), "sources"))
        return False

    def stop(self) -> None:
        """End it, however it stands."""
        process, self.process = self.process, None
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def once(self, *more: str) -> subprocess.CompletedProcess[bytes]:
        """Ingest what is there."""
        return edgewater("run", "--once", "--no-updates", *self.words, *more)

    def do(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        """Run a verb."""
        return edgewater(*words, *self.words, check=check)

    def json(self, *words: str, check: bool = True) -> Any:
        """What a verb prints as JSON."""
        return json.loads(self.do(*words, "--json", check=check).stdout)

    def state(self, shard: str = "main") -> RingState:
        with Ring.open_reader(self.data / "ring" / shard) as ring:
            return ring.state

    def letters(self, shard: str = "main") -> list[tuple[int, DeadLetter]]:
        with Ring.open_reader(self.data / "ring" / shard) as ring:
            return ring.dead_letters(100_000)

    def until_events(self, count: int, shard: str = "main") -> None:
        """Wait until so many inputs are committed."""
        until(lambda: self.state(shard).counters.get("events", 0) >= count, f"{count} events")

    def ingest_pid(self, shard: str = "main") -> int:
        pid = DataFolder(self.data).holder(f"ingest-{shard}")
        assert pid is not None
        return pid


def until(happens: Callable[[], bool], what: str) -> None:
    """Wait for something."""
    deadline = time.monotonic() + WAIT_S
    while not happens():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        time.sleep(0.05)
