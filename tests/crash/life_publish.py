"""A program that is killed: `edgewater train` in full, but for torch.

The process that trains is replaced by one function that leaves what that process leaves, in its order
(adapters/update.py): an adapter's two files, then its result, a pure function of the task. Claiming, staging,
judging, signing, publishing, promoting and acknowledging are the trainer's own. It ends when nothing is due,
or when it would wait for the disk, which it then says on standard output.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import threading
from pathlib import Path
from typing import NoReturn

import msgspec

import adapters.trainer
import pipeline.cli
import pipeline.config_check
import pipeline.roles
import storage.wake
from adapters.child import Ending, Progress
from adapters.gate import at_least
from adapters.trainer import TrainerSettings
from adapters.update import RESULT_FILE, UpdateResult, UpdateTask, read_result
from pipeline.config import Config
from storage.durable import write_file_durably
from tests.crash.lives import serve

__all__ = ["PublishLife", "adapter_of"]

ADAPTER_BYTES = 40_000


class PublishLife(msgspec.Struct, frozen=True):
    """What a lifetime is told.

    Attributes:
        config: Its configuration file.
        reject: Windows whose candidate the gate rejects.
    """

    config: str
    reject: list[int] = []


def adapter_of(seed: int, parent: str) -> bytes:
    """The adapter that an update makes, a whole safetensors file.

    Args:
        seed: The update's.
        parent: Name of the parent version's folder, "" for the base.
    """
    size = ADAPTER_BYTES // 4
    tensor = {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}
    head = json.dumps({"base_model.model.lora_A.weight": tensor}).encode()
    weights = random.Random(f"{seed} {parent}").randbytes(4 * size)
    return len(head).to_bytes(8, "little") + head + weights


def _train(task_file: Path, log_file: Path, reject: list[int]) -> Ending:
    task = msgspec.json.decode(task_file.read_bytes(), type=UpdateTask)
    out = Path(task.out_dir)
    log_file.write_bytes(b"")
    done = read_result(out)
    if done is not None and done.window == task.window:
        return Ending.DONE
    good = task.window not in reject
    sha256 = ""
    if good:
        data = adapter_of(task.seed, Path(task.parent_dir).name if task.parent_dir else "")
        sha256 = hashlib.sha256(data).hexdigest()
        write_file_durably(out / "adapter_model.safetensors", data)
        write_file_durably(out / "adapter_config.json", b'{"peft_type": "LORA"}')
    result = UpdateResult(
        window=task.window, decision="promoted" if good else "rejected", reason="" if good else "no gain",
        scale=1.0, criteria=[at_least("held_out_gain", 0.1 if good else 0.0, 0.01, "at least 1 %")],
        by_source={}, base_bits_per_byte=1.0, active_bits_per_byte=1.0, held_out_before_bits_per_byte=1.0,
        held_out_after_bits_per_byte=0.9, anchor_delta_bits_per_token=0.0, kl_new_bits=0.0, samples=1,
        skipped=0, trained_tokens=1, steps=1, seconds=0.0, phases={}, peak_rss_bytes=0, max_rss_bytes=0,
        adapter_sha256=sha256, host_class="test",
    )  # fmt: skip
    write_file_durably(out / RESULT_FILE, msgspec.json.encode(result))
    return Ending.DONE


def live(argument: bytes) -> None:
    """Be the trainer, under a supervisor, until nothing is due."""
    life = msgspec.json.decode(argument, type=PublishLife)
    os.environ[pipeline.roles.SUPERVISED] = str(os.getppid())

    def train(task: Path, stop: threading.Event, progress: Progress, log_file: Path) -> Ending:
        try:
            return _train(task, log_file, life.reject)
        except OSError:  # of the disk: nothing else goes wrong here
            # The trainer would wait and try again for as long as it takes; this life is told to stop then.
            os.write(1, b"waiting for the disk\n")
            stop.set()
            return Ending.NO_DISK

    def without_waiting(config: Config, *, lockstep: bool) -> TrainerSettings:
        made: TrainerSettings = settings(config, lockstep=lockstep)
        return msgspec.structs.replace(made, retry_s=0.0)

    def nothing_is_due(waker: storage.wake.Waker, timeout_s: float) -> NoReturn:
        sys.exit(0)

    settings = pipeline.roles.trainer_settings
    vars(pipeline.roles)["trainer_settings"] = without_waiting
    vars(adapters.trainer)["run_child"] = train
    storage.wake.Waker.wait = nothing_is_due  # type: ignore[assignment, method-assign]
    vars(pipeline.config_check)["_MIN_RING_BYTES"] = 1 << 20
    sys.argv = ["edgewater", "train", "--lockstep", "--config", life.config]
    pipeline.cli.main()


if __name__ == "__main__":
    serve(live)
