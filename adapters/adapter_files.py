"""Adapters on disk: folders that plain PEFT loads, read back through our own checks.

Never pickle (peft falls back to it when a file is missing), never a hub, no field that could run code.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from storage.durable import write_file_durably

__all__ = [
    "ADAPTER_FILE",
    "CONFIG_FILE",
    "AdapterConfig",
    "AdapterError",
    "LoraState",
    "read_adapter",
    "read_config",
    "save_adapter",
]

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
MAX_RANK = 256
_MAX_BYTES = 1 << 30
_MAX_CONFIG_BYTES = 1 << 16

LoraState = dict[str, Tensor]
"""Weights by PEFT name (`base_model.model.<module>.lora_A.weight`), float32: A is (R, in), B is (out, R)."""


class AdapterError(Exception):
    """An adapter that may not be loaded: damaged, foreign, or not made for this base."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path}: {what}; roll back to another version, or delete this one and train again")
        self.path = path


class AdapterConfig(msgspec.Struct, forbid_unknown_fields=True):
    """The only adapter_config.json that we write or accept: plain LoRA, and nothing else."""

    peft_type: str
    task_type: str
    r: int
    lora_alpha: int
    target_modules: list[str]
    layers_to_transform: list[int]
    layers_pattern: str
    base_model_name_or_path: str = ""
    bias: str = "none"
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    inference_mode: bool = True
    init_lora_weights: bool = True
    use_rslora: bool = False
    use_dora: bool = False


def save_adapter(folder: Path, state: LoraState, config: AdapterConfig) -> str:
    """Write a folder that plain PEFT loads; the same weights give the same bytes.

    Returns: SHA-256 of adapter_model.safetensors, hexadecimal.
    """
    data = save({name: state[name].contiguous() for name in sorted(state)}, metadata={"format": "pt"})
    # 1. Weights in place.        Crash: no configuration beside them, so nothing loads the folder.
    write_file_durably(folder / ADAPTER_FILE, data)
    # 2. Configuration in place.  Crash: a complete adapter that no result names; the next run replaces it.
    write_file_durably(folder / CONFIG_FILE, msgspec.json.format(msgspec.json.encode(config)))
    return hashlib.sha256(data).hexdigest()


def read_config(folder: Path) -> AdapterConfig:
    """Read adapter_config.json against our own schema. Raises: AdapterError."""
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise AdapterError(folder, f"{CONFIG_FILE} is larger than {_MAX_CONFIG_BYTES} bytes")
        return msgspec.json.decode(path.read_bytes(), type=AdapterConfig)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise AdapterError(folder, f"{CONFIG_FILE} is refused ({error})") from error


def read_adapter(folder: Path, expected: AdapterConfig) -> LoraState:
    """Read an adapter's weights, trusting nothing.

    Args:
        folder: A version's folder.
        expected: What an adapter for this base looks like.
    Returns: Finite float32 matrices of the expected rank; names and outer shapes are the model's to check.
    Raises: AdapterError.
    """
    config = read_config(folder)
    config.base_model_name_or_path = expected.base_model_name_or_path
    if config != expected:
        raise AdapterError(folder, "its configuration does not fit this base and profile")
    weights = folder / ADAPTER_FILE
    try:
        if weights.stat().st_size > _MAX_BYTES:
            raise AdapterError(folder, f"{ADAPTER_FILE} is larger than {_MAX_BYTES} bytes")
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise AdapterError(folder, f"{ADAPTER_FILE} cannot be read ({error})") from error
    for name, weight in state.items():
        rank_axis = 0 if name.endswith("lora_A.weight") else 1
        if weight.dtype != torch.float32 or weight.ndim != 2 or weight.shape[rank_axis] != config.r:
            raise AdapterError(folder, f"{name} is not a float32 matrix of rank {config.r}")
        if not bool(torch.isfinite(weight).all()):
            raise AdapterError(folder, f"{name} has numbers that are not finite")
    return state
