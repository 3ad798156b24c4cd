"""Saved training state: an update that was killed goes on from it and ends with the same bytes.

A checkpoint is a folder `checkpoint-000020` with the adapter's weights, AdamW's moments and a state.json that
names the update it belongs to and the hash of the tensors. It is complete or not there under that name.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load, save
from torch import Tensor

from storage.durable import fsync_tree, remove_folder, rename_durably

__all__ = ["Checkpoint", "load_newest", "remove_all", "restore", "save_checkpoint"]

_PREFIX = "checkpoint-"
_TENSORS = "tensors.safetensors"
_STATE = "state.json"


class _State(msgspec.Struct):
    identity: str
    step: int
    sha256: str


class Checkpoint(msgspec.Struct, frozen=True):
    """Training state after a whole number of steps."""

    step: int
    tensors: dict[str, Tensor]
    """`weight/`, `exp_avg/` and `exp_avg_sq/` before each parameter's name."""


def save_checkpoint(
    folder: Path, identity: str, step: int, optimizer: torch.optim.Optimizer, names: list[str]
) -> None:
    """Write the state after `step` steps, then remove older ones.

    Args:
        folder: Work folder of the attempt.
        identity: Hash of all that decides the update's bytes.
        step: Steps done, >= 1.
        optimizer: AdamW over the adapter's parameters, in the order of `names`.
        names: Names of the parameters.
    """
    tensors = {}
    for name, parameter in zip(names, optimizer.param_groups[0]["params"], strict=True):
        moments = optimizer.state[parameter]
        tensors[f"weight/{name}"] = parameter.detach()
        tensors[f"exp_avg/{name}"] = moments["exp_avg"]
        tensors[f"exp_avg_sq/{name}"] = moments["exp_avg_sq"]
    data = save(tensors)
    state = _State(identity, step, hashlib.sha256(data).hexdigest())
    final = folder / f"{_PREFIX}{step:06d}"
    tmp = final.with_name(final.name + ".tmp")
    remove_folder(tmp)
    tmp.mkdir(mode=0o700)
    # 1. The .tmp folder written and synced.  Crash: load_newest() deletes it; the checkpoint before counts.
    (tmp / _TENSORS).write_bytes(data)
    (tmp / _STATE).write_bytes(msgspec.json.encode(state))
    fsync_tree(tmp)
    # 2. Renamed; parent synced.              Crash: this checkpoint counts, older ones are litter.
    remove_folder(final)
    rename_durably(tmp, final)
    # 3. Older ones deleted.                  Crash: as before; the newest counts.
    for old in _folders(folder):
        if old != final:
            remove_folder(old)


def load_newest(folder: Path, identity: str) -> Checkpoint | None:
    """Read the newest complete checkpoint of this update; damaged and foreign ones are deleted.

    Args:
        folder: Work folder of the attempt.
        identity: As given to `save_checkpoint`.
    Returns: The state, or None to start from the parent.
    """
    for path in sorted(_folders(folder), reverse=True):
        found = None if path.suffix == ".tmp" else _read(path, identity)
        if found is not None:
            return found
        remove_folder(path)
    return None


def remove_all(folder: Path) -> None:
    """Delete every checkpoint of a finished update."""
    for path in _folders(folder):
        remove_folder(path)


def restore(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    """Put a checkpoint's weights and moments into the parameters and their AdamW."""
    with torch.no_grad():
        for name, parameter in zip(names, optimizer.param_groups[0]["params"], strict=True):
            parameter.copy_(checkpoint.tensors[f"weight/{name}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(checkpoint.step)),
                "exp_avg": checkpoint.tensors[f"exp_avg/{name}"].clone(),
                "exp_avg_sq": checkpoint.tensors[f"exp_avg_sq/{name}"].clone(),
            }


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir()]


def _read(path: Path, identity: str) -> Checkpoint | None:
    try:
        state = msgspec.json.decode((path / _STATE).read_bytes(), type=_State)
        data = (path / _TENSORS).read_bytes()
    except (OSError, msgspec.MsgspecError):
        return None
    if state.identity != identity or hashlib.sha256(data).hexdigest() != state.sha256:
        return None
    return Checkpoint(state.step, load(data))
