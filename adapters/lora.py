"""LoRA on the upper blocks of a base model: attach it through peft, compute it fast, move its weights.

peft makes the modules and their names, so that stock PEFT loads what we write. Their forward is ours: one
autograd step per linear layer in the base's dtype, where peft's casts every activation to float32 and back.
The adapter's weights stay float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from adapters.adapter_files import MAX_RANK, AdapterConfig, AdapterError, LoraState, read_adapter, read_config
from adapters.recipe import Recipe, adapted_blocks

__all__ = [
    "LoraLinear",
    "adapter_config",
    "adapter_parameters",
    "attach",
    "enable",
    "generate",
    "init_state",
    "interpolate",
    "load_adapter",
    "lora_state",
    "module_norms",
    "set_state",
    "target_names",
]

_NAME = "default"
_PREFIX = "base_model.model."


class _LoraProduct(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T with W frozen, in W's dtype; A and B, and their gradients, float32.

    Source: LoRA, arXiv 2106.09685, h = W x + (alpha / R) B A x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> Any:
        flat = x.reshape(-1, x.shape[-1])  # (T, in)
        low = a.to(w.dtype)  # (R, in)
        high = (b * s).to(w.dtype)  # (out, R)
        down = flat @ low.t()  # (T, R)
        y = nn.functional.linear(flat, w, bias).addmm_(down, high.t())
        ctx.save_for_backward(flat, w, low, high, down)
        ctx.scale = s
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, w, low, high, down = ctx.saved_tensors
        dy = grads[0].reshape(-1, w.shape[0])  # (T, out)
        back = dy @ high  # (T, R)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ w).addmm_(back, low).view(*grads[0].shape[:-1], -1)
        da = (back.t() @ flat).float()
        db = (dy.t() @ down).float().mul_(ctx.scale)
        return dx, None, None, da, db, None


class LoraLinear(PeftLinear):  # type: ignore[misc]  # peft is untyped
    """peft's LoRA layer with our forward; with `active` off it is the base's layer, bit by bit."""

    active: bool = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base layer and, while active, the adapter."""
        base = self.base_layer
        if not self.active:
            return nn.functional.linear(x, base.weight, base.bias)
        a, b = self.lora_A[_NAME].weight, self.lora_B[_NAME].weight
        s = self.scaling[_NAME]
        out: Tensor = _LoraProduct.apply(x, base.weight, base.bias, a, b, s)  # type: ignore[no-untyped-call]
        return out


def _layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def _blocks(model: nn.Module) -> nn.ModuleList:
    blocks = model.get_submodule("model.layers")
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def target_names(model: nn.Module) -> list[str]:
    """Last names of all linear layers inside the blocks, sorted; the same before and after `attach`."""
    modules = _blocks(model).named_modules()
    linear = [name for name, module in modules if isinstance(module, (nn.Linear, LoraLinear))]
    return sorted({name.rsplit(".", 1)[-1] for name in linear} - {"base_layer", _NAME})


def adapter_config(model: nn.Module, recipe: Recipe) -> AdapterConfig:
    """The configuration that fixes an adapter's shape on this base."""
    return AdapterConfig(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=target_names(model),
        layers_to_transform=list(adapted_blocks(len(_blocks(model)), recipe.profile)),
        layers_pattern="layers",
    )


def attach(model: nn.Module, config: AdapterConfig) -> None:
    """Put LoRA layers into a frozen model, in place; the adapter starts as the identity (B = 0)."""
    fields = msgspec.structs.asdict(config)
    for name in ("peft_type", "base_model_name_or_path", "inference_mode"):
        del fields[name]
    peft_config = LoraConfig(**fields)
    peft_config._register_custom_module({nn.Linear: LoraLinear})
    inject_adapter_in_model(peft_config, model, adapter_name=_NAME)
    for layer in _layers(model).values():
        layer.lora_A.float()
        layer.lora_B.float()


def enable(model: nn.Module, active: bool) -> None:
    """Switch all LoRA layers on, or off to have the base."""
    for layer in _layers(model).values():
        layer.active = active


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's weights by PEFT name, in module order."""
    named = {}
    for name, layer in _layers(model).items():
        named[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A[_NAME].weight
        named[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B[_NAME].weight
    return named


def lora_state(model: nn.Module) -> LoraState:
    """Copy of the adapter's weights."""
    return {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}


def set_state(model: nn.Module, state: LoraState) -> None:
    """Overwrite the adapter's weights.

    Raises: ValueError unless names and shapes are exactly the model's.
    """
    own = adapter_parameters(model)
    if own.keys() != state.keys():
        raise ValueError(f"adapter names differ from the model's: {sorted(own.keys() ^ state.keys())[:4]}")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != state[name].shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, not {tuple(parameter.shape)}")
            parameter.copy_(state[name])


def init_state(model: nn.Module, seed: int) -> LoraState:
    """Fresh weights that follow from the seed: A uniform as in LoRA's reference (Kaiming), B zero."""
    random = torch.Generator().manual_seed(seed % 2**63)
    state = {}
    for name, old in lora_state(model).items():
        bound = 1 / math.sqrt(old.shape[1])
        a = torch.empty_like(old).uniform_(-bound, bound, generator=random)
        state[name] = a if name.endswith("lora_A.weight") else torch.zeros_like(old)
    return state


def interpolate(parent: LoraState | None, candidate: LoraState, scale: float) -> LoraState:
    """The adapter at `scale` of the way from its parent to the candidate; alpha and rank stay.

    Args:
        parent: The parent's weights; None is the base, and then this multiplies B by the scale.
        candidate: Trained weights.
        scale: 0 is the parent, 1 the candidate.
    """
    if scale == 1.0:
        return candidate
    if parent is None:
        return {name: w * scale if name.endswith("lora_B.weight") else w for name, w in candidate.items()}
    return {name: torch.lerp(parent[name], w, scale) for name, w in candidate.items()}


def module_norms(state: LoraState, alpha: int, rank: int) -> dict[str, float]:
    """Frobenius norm of (alpha / rank) B A per module, without forming the product.

    Source: ||BA||_F^2 = trace((B^T B)(A A^T)).
    """
    norms = {}
    for name, a in state.items():
        if name.endswith("lora_A.weight"):
            b = state[name.replace("lora_A", "lora_B")].double()
            squared = ((b.t() @ b) * (a.double() @ a.double().t())).sum().item()
            # Rounding may bring a square below 0; a NaN must stay one.
            norms[name] = alpha / rank * math.sqrt(0.0 if squared < 0 else squared)
    return norms


def _stated_config(model: nn.Module, folder: Path) -> AdapterConfig:
    """What the folder says of its own shape, if this base can carry it."""
    config, n_blocks = read_config(folder), len(_blocks(model))
    blocks = config.layers_to_transform
    fits = bool(blocks) and blocks[0] >= 0 and blocks == list(range(blocks[0], n_blocks))
    if not 1 <= config.r <= MAX_RANK or not fits:
        raise AdapterError(folder, "its rank or blocks do not fit this base")
    expected = adapter_config(model, Recipe(rank=config.r, alpha=config.lora_alpha))
    expected.layers_to_transform = blocks
    return expected


def load_adapter(model: nn.Module, folder: Path, config: AdapterConfig | None = None) -> None:
    """Attach the adapter in `folder` to a base, checked against the names and shapes that the base gives.

    Args:
        model: A base as `load_model` gives it, or one with an adapter of the same shape attached.
        folder: A version's folder.
        config: The shape that the data folder fixes; None takes rank and blocks from the folder itself.
    Raises: AdapterError.
    """
    expected = config or _stated_config(model, folder)
    state = read_adapter(folder, expected)
    if not _layers(model):
        attach(model, expected)
    try:
        set_state(model, state)
    except ValueError as error:
        raise AdapterError(folder, str(error)) from error
    enable(model, True)


def generate(
    model_dir: Path,
    version_dir: Path | None,
    prompts: list[str],
    max_new_tokens: int,
    *,
    seed: int | None = None,
    temperature: float = 1.0,
) -> list[str]:
    """Continue each prompt up to a line end, under the base or a version.

    Args:
        model_dir: Prepared model.
        version_dir: A version's folder; None is the base.
        prompts: Plain text, at least one character each.
        max_new_tokens: Longest continuation.
        seed: None is greedy; a number samples, and gives the same text again.
        temperature: Of sampling.
    Returns: The continuations, without their prompts and line ends.
    Raises: AdapterError, BaseModelError.
    """
    from adapters.scoring import open_model  # here: scoring imports this module

    opened = open_model(model_dir, version_dir)
    random = None if seed is None else torch.Generator().manual_seed(seed)
    texts = []
    for prompt in prompts:
        ids = [opened.manifest.bos_id, *opened.encode(prompt)]
        stop = {opened.manifest.separator_id, opened.manifest.eos_id}
        texts.append(
            opened.decode(list(_continue(opened.model, ids, max_new_tokens, stop, random, temperature)))
        )
    return texts


@torch.no_grad()
def _continue(
    model: Any, ids: list[int], limit: int, stop: set[int], random: torch.Generator | None, temperature: float
) -> Iterator[int]:
    cache, step = None, torch.tensor([ids])
    for _ in range(limit):
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1].float()
        if random is None:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=random))
        if token in stop:
            return
        yield token
        step = torch.tensor([[token]])
