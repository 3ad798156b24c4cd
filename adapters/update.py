"""One update in a process of its own: `python -m adapters.update TASK.json`.

Light to import: torch comes only with `main`. The child writes into `out_dir`, in this order:

| written | a crash right after it leaves |
|---|---|
| `checkpoint-NNNNNN/` every 20 steps, at SIGTERM | a state that the next run goes on from |
| `adapter_model.safetensors`, `adapter_config.json` | an adapter that no result names; it is written again |
| `result.json` | the finished update; the next run exits at once |
| checkpoints removed | the finished update |

A rejected update leaves no adapter. Exit codes: 0 result.json is complete, also for a rejection; 1 an error,
on stderr; 2 the task is unreadable; 74 the disk is full or fails; 75 stopped by SIGTERM: after both the same
command goes on.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from adapters.gate import Criterion
from adapters.recipe import GateLimits, Recipe

__all__ = [
    "NO_DISK",
    "RESULT_FILE",
    "STOPPED",
    "TRAINER",
    "PastWindow",
    "SourceScore",
    "UpdateResult",
    "UpdateTask",
    "main",
    "read_result",
]

RESULT_FILE = "result.json"
STOPPED = 75
"""Exit code after SIGTERM (EX_TEMPFAIL): nothing is wrong, the same command goes on."""
NO_DISK = 74
"""Exit code when something could not be written (EX_IOERR): the samples are not to blame."""
TRAINER = "EDGEWATER_TRAINER"
"""Environment variable with the process id of the trainer that started this process."""
_NICENESS = 10
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Read when torch's OpenMP loads. By default its threads spin at barriers; a nice process beside any other
    # load then spins through whole time slices for a thread that does not run: 10 s a step instead of 1.
    "OMP_WAIT_POLICY": "PASSIVE",
}


class PastWindow(msgspec.Struct, frozen=True):
    """An earlier window whose held-out part must not get worse."""

    window: int
    file: str


class UpdateTask(msgspec.Struct, frozen=True, kw_only=True):
    """All that an update is made of; the same task gives the same bytes on the same host class."""

    shard: str
    window: int
    model_dir: str
    window_file: str
    """The window's samples, as `storage.block.encode_blocks` writes them."""
    rehearsal_files: list[str] = []
    """Accepted earlier windows, oldest first."""
    past_files: list[PastWindow] = []
    parent_dir: str = ""
    """The parent version's folder; "" is the base."""
    out_dir: str
    """Work folder of this update; survives restarts."""
    cache_dir: str
    """May be deleted any time."""
    seed: int
    recipe: Recipe = Recipe()
    gate: GateLimits = GateLimits()
    threads: int = 0
    """0: one a core."""


class SourceScore(msgspec.Struct, frozen=True):
    """Prequential bits per byte of one source's samples in the window; null where no byte is scored."""

    samples: int
    base: float | None
    active: float | None


class UpdateResult(msgspec.Struct, frozen=True, kw_only=True):
    """What an update did and measured. Numbers that could not be measured are null."""

    window: int
    decision: str
    """ "promoted" or "rejected"."""
    reason: str
    scale: float
    criteria: list[Criterion]
    by_source: dict[str, SourceScore]
    base_bits_per_byte: float | None
    active_bits_per_byte: float | None
    held_out_before_bits_per_byte: float | None
    held_out_after_bits_per_byte: float | None
    anchor_delta_bits_per_token: float | None
    kl_new_bits: float | None
    """KL(base, version) on held-out new data, bits per token: a warning sign, no criterion."""
    samples: int
    skipped: int
    """Samples beyond the token budget: scored, not trained on."""
    trained_tokens: int
    steps: int
    seconds: float
    phases: dict[str, float]
    """Seconds of each phase of this run (a resumed one counts its own part)."""
    peak_rss_bytes: int
    """Largest RssAnon + RssShmem."""
    max_rss_bytes: int
    """ru_maxrss: mapped weights included."""
    adapter_sha256: str
    """Of adapter_model.safetensors; "" when rejected."""
    host_class: str


class Stopped(BaseException):
    """SIGTERM came while training, and a checkpoint is written. No Exception: nothing catches it."""


class StopSignal:
    """SIGTERM as a flag inside `deferred()`; elsewhere the process ends at once: nothing is half written."""

    def __init__(self) -> None:
        self.asked = False
        self._deferred = False

    def install(self) -> None:
        """Take SIGTERM and SIGINT over."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self._deferred:
            # No exception: one that is raised in a destructor or a callback is printed and forgotten.
            os._exit(STOPPED)

    @contextlib.contextmanager
    def deferred(self) -> Any:
        """Only set `asked` inside: the caller stops at a place where it can be resumed."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False


def tell(**event: Any) -> None:
    """Print one event as a JSON line: progress for people, a heartbeat for the trainer loop."""
    sys.stdout.write(msgspec.json.encode(event).decode() + "\n")
    sys.stdout.flush()


def read_result(out_dir: Path) -> UpdateResult | None:
    """Read a finished update, or None if it is unfinished or its adapter is not the one that it names."""
    try:
        result = msgspec.json.decode((out_dir / RESULT_FILE).read_bytes(), type=UpdateResult)
        if result.adapter_sha256:
            data = (out_dir / "adapter_model.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != result.adapter_sha256:
                return None
    except (OSError, msgspec.MsgspecError):
        return None
    return result


def _leave_with_parent() -> None:
    """End this process when the one that started it is gone: a second child must not train beside it."""
    # Named by the parent: it may be gone before this line, and then getppid() is already another's.
    parent = int(os.environ.get(TRAINER, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def main(arguments: list[str] | None = None) -> int:
    """Run the update that a task file describes. Returns: An exit code."""
    started = time.monotonic()
    paths = sys.argv[1:] if arguments is None else arguments
    if len(paths) != 1:
        print("usage: python -m adapters.update TASK.json", file=sys.stderr)
        return 2
    try:
        task = msgspec.json.decode(Path(paths[0]).read_bytes(), type=UpdateTask, strict=True)
    except (OSError, msgspec.MsgspecError) as error:
        print(f"{paths[0]}: {error}; the trainer loop writes this file, run it again", file=sys.stderr)
        return 2
    done = read_result(Path(task.out_dir))
    if done is not None and done.window == task.window:
        tell(phase="done", decision=done.decision)
        return 0
    os.environ.update(_ENVIRONMENT)
    stop = StopSignal()
    stop.install()
    _leave_with_parent()
    os.nice(_NICENESS)
    try:
        tell(phase="load")
        from adapters.attempt import run_update

        run_update(task, stop, started)
    except Stopped:
        tell(phase="stopped")
        return STOPPED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        print(f"{error}: free some space, or check the disk", file=sys.stderr)
        return NO_DISK
    return 0


if __name__ == "__main__":
    # Under -m this file is `__main__`; the classes that others import live in the module of its name.
    from adapters.update import main as run

    sys.exit(run())
