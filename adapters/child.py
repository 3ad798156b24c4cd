"""Run one update in a process of its own, watch it, and say how it ended."""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapters.update import NO_DISK, STOPPED, TRAINER

__all__ = ["Ending", "Progress", "run_child"]

HANG_S = 900.0  # it gives a sign of life each batch, which takes seconds; more is a hang
GRACE_S = 20.0  # between SIGTERM and SIGKILL: long enough to write a checkpoint
_VMSTAT = Path("/proc/vmstat")
Progress = Callable[[dict[str, Any]], None]
log = logging.getLogger("edgewater.trainer")


class Ending(enum.Enum):
    """How a child ended."""

    DONE = "done"  # result.json is complete
    STOPPED = "stopped"  # we asked it to
    NO_DISK = "no disk"  # it could not write what it made
    FAILED = "failed"  # it ended by itself: an error, out of memory, a hang
    KILLED = "killed"  # somebody outside killed it


def run_child(task: Path, stop: threading.Event, progress: Progress, log_file: Path) -> Ending:
    """Train one task in a child process.

    Args:
        task: TASK.json.
        stop: Ends the child at its next checkpoint.
        progress: Called with each line it reports.
        log_file: Where its stderr goes.
    """
    kills_before = _oom_kills()
    with log_file.open("wb") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "adapters.update", str(task)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
                 TRAINER: str(os.getpid())},
        )  # fmt: skip
    lines: queue.Queue[bytes | None] = queue.Queue()
    reader = threading.Thread(target=_read_lines, args=(child, lines), daemon=True)
    reader.start()
    hung = _watch(child, lines, stop, progress)
    code = child.wait()
    reader.join()  # it ends with the pipe, which it closes
    if code == 0:
        return Ending.DONE
    if stop.is_set() or code == STOPPED:
        return Ending.STOPPED
    if code == NO_DISK:
        log.error("the update waits for the disk: %s", _tail_of(log_file))
        return Ending.NO_DISK
    if hung or code > 0 or _oom_kills() > kills_before:
        how = "hung" if hung else f"ended with {code}"
        log.error("the update's process %s: %s", how, _tail_of(log_file))
        return Ending.FAILED
    log.warning("the update's process was killed by signal %d", -code)
    # A fault of its own (SIGSEGV, SIGBUS, SIGABRT) is no outside kill.
    outside = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    return Ending.KILLED if -code in outside else Ending.FAILED


def _tail_of(log_file: Path) -> str:
    return log_file.read_bytes()[-400:].decode(errors="replace").strip()


def _watch(
    child: subprocess.Popen[bytes],
    lines: queue.Queue[bytes | None],
    stop: threading.Event,
    progress: Progress,
) -> bool:
    """Pass its reports on until it ends or must end. Returns: whether it hung."""
    heard = time.monotonic()
    while True:
        try:
            line = lines.get(timeout=0.2)
        except queue.Empty:
            line = b""
        if line is None:
            return False
        if line:
            heard = time.monotonic()
            with contextlib.suppress(ValueError):
                progress(json.loads(line))
        hung = time.monotonic() - heard > HANG_S
        if stop.is_set() or hung:
            _end(child)
            return hung


def _read_lines(child: subprocess.Popen[bytes], lines: queue.Queue[bytes | None]) -> None:
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            lines.put(line)
    lines.put(None)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()


def _oom_kills() -> int:
    """How often the kernel killed for memory since it started; it does not say whom."""
    with contextlib.suppress(OSError, IndexError):
        return int(_VMSTAT.read_text().partition("oom_kill ")[2].split()[0])
    return 0
