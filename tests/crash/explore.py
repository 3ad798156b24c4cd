"""Run a workload once under the recorder, then let the auditor open the states that power cuts may leave.

A workload is a module of this package with `prepare(root, seed)` (before the recording), `run(root, seed)`
(recorded) and `audit(root, seed, book, heard)` (opens what is left). States are audited in worker processes:
one that LMDB kills with a SIGSEGV or SIGBUS is a failure of that state, and the next one gets a new worker.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.crash.audit import Violation
from tests.crash.recorder import load, record
from tests.crash.recording import Recording
from tests.crash.states import CrashState, CrashStates

__all__ = ["REPOSITORY", "Exploration", "Failure", "explore", "record_workload", "scratch_folder", "serve"]

REPOSITORY = Path(__file__).resolve().parents[2]
AUDIT_LIMIT_S = 60.0
MAX_WORKERS = 2
LEAST_TMPFS_BYTES = 256 << 20  # a container's /dev/shm may hold 64 MiB, and a registry is 32


@dataclass(frozen=True)
class Failure:
    """A state that broke a promise.

    Attributes:
        workload, seed, index: What names the state; with the same recording it is the same to the byte.
        text: What was chosen in it.
        violation: What the auditor said.
    """

    workload: str
    seed: int
    index: int
    text: str
    violation: str

    def __str__(self) -> str:
        return f"{self.workload} seed {self.seed} state {self.index}: {self.violation}\n    {self.text}"


@dataclass
class Exploration:
    """What one exploration found.

    Attributes:
        operations, points: Of the recording: operations, and points in time at which power may go.
        states: Audited.
        seconds: Wall time, the recording not included.
        failures: One a state that failed.
    """

    workload: str
    seed: int
    operations: int = 0
    points: int = 0
    states: int = 0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder in memory where there is room (nothing in it need survive), else a temporary one."""
    shm = Path("/dev/shm")
    usable = shm.is_dir() and os.access(shm, os.W_OK) and shutil.disk_usage(shm).free >= LEAST_TMPFS_BYTES
    with tempfile.TemporaryDirectory(prefix="edgewater-crash-", dir=shm if usable else None) as name:
        yield Path(name).resolve()


def record_workload(workload: str, seed: int, work: Path, *, first: str = "") -> Recording:
    """Prepare a workload in `work` (which exists) and record its run.

    Args:
        first: Statements that the recorded program runs first; a self-test breaks our code with them.
    Raises: RecordingError.
    """
    root = work / "root"
    root.mkdir(mode=0o700)
    module = importlib.import_module(f"tests.crash.{workload}")
    module.prepare(root, seed)
    code = f"{first}\nfrom pathlib import Path\nfrom tests.crash import {workload} as workload\n"
    code += f"workload.run(Path({str(root)!r}), {seed})\n"
    return record([sys.executable, "-B", "-c", code], work, cwd=REPOSITORY)


def explore(
    workload: str,
    recording: Recording | Path,
    indices: Iterable[int],
    seed: int,
    scratch: Path,
    *,
    workers: int = MAX_WORKERS,
    progress: Callable[[Exploration], None] = lambda found: None,
) -> Exploration:
    """Audit the states with these numbers.

    Args:
        recording: One, or the work folder of one.
        scratch: Where states are built; a file system in memory makes it several times as fast.
        progress: Called after each state.
    """
    begun = time.monotonic()
    if isinstance(recording, Path):
        recording = load(recording)
    states = CrashStates(recording, seed)
    found = Exploration(workload, seed, len(recording.operations), states.points)
    book = recording.said()
    pool = [_Worker(workload, seed, book, scratch / f"state-{i}") for i in range(max(1, workers))]
    try:
        for i, state in enumerate(states.build(list(indices))):
            worker = pool[i % len(pool)]
            _finish(worker, found, progress)
            worker.begin(states, state)
        for worker in pool:
            _finish(worker, found, progress)
    finally:
        for worker in pool:
            worker.stop()
    found.failures.sort(key=lambda failure: failure.index)
    found.seconds = time.monotonic() - begun
    return found


def _finish(worker: _Worker, found: Exploration, progress: Callable[[Exploration], None]) -> None:
    state = worker.state
    if state is None:
        return
    violation = worker.verdict()
    found.states += 1
    if violation:
        found.failures.append(Failure(found.workload, found.seed, state.index, state.text, violation))
    progress(found)


class _Worker:
    """A process that audits one state after the other, started again when a state kills it."""

    def __init__(self, workload: str, seed: int, book: list[str], folder: Path) -> None:
        self._workload, self._seed, self._book, self._folder = workload, seed, book, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self.state: CrashState | None = None

    def begin(self, states: CrashStates, state: CrashState) -> None:
        """Build a state and let the process open it."""
        shutil.rmtree(self._folder, ignore_errors=True)
        states.write(state, self._folder)
        process = self._process or self._start()
        self.state = state
        self._send(process, {"folder": str(self._folder), "heard": state.heard})

    def _send(self, process: subprocess.Popen[bytes], message: Any) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()

    def _start(self) -> subprocess.Popen[bytes]:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop()
        code = f"from tests.crash.explore import serve; serve({self._workload!r}, {self._seed})"
        self._process = subprocess.Popen(
            [sys.executable, "-B", "-X", "faulthandler", "-c", code],
            cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        self._send(self._process, self._book)
        return self._process

    def verdict(self) -> str:
        """Wait for the audit. Returns: "" or what is wrong."""
        process, self.state = self._process, None
        assert process is not None and process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], AUDIT_LIMIT_S)
        if not ready:
            self.stop()
            return f"hangs: no answer in {AUDIT_LIMIT_S:.0f} s"
        line = process.stdout.readline()
        if line:
            return str(json.loads(line))
        code = process.wait(timeout=AUDIT_LIMIT_S)
        how = signal.Signals(-code).name if code < 0 else f"exit {code}"
        said = self._said()
        self.stop()
        return f"kills the process that opens it: {how}\n{said}"

    def _said(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-1_500:]

    def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, self._errors):
            if pipe is not None:
                pipe.close()


def serve(workload: str, seed: int) -> None:
    """The worker's side: one line in names a folder, one line out says what is wrong with it."""
    audit = importlib.import_module(f"tests.crash.{workload}").audit
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the code under test prints is no answer
    book = json.loads(sys.stdin.readline())
    for line in sys.stdin:
        task = json.loads(line)
        try:
            audit(Path(task["folder"]), seed, book, task["heard"])
            violation = ""
        except Violation as error:
            violation = str(error)
        except Exception as error:  # an audit that fails in any way is a finding
            violation = f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}"
        print(json.dumps(violation), file=answers, flush=True)
