"""The adapter: its arithmetic, its files, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.adapter_files import (
    ADAPTER_FILE,
    CONFIG_FILE,
    AdapterError,
    LoraState,
    read_adapter,
    save_adapter,
)
from adapters.base_model import load_model
from adapters.lora import (
    LoraLinear,
    adapter_config,
    attach,
    enable,
    generate,
    init_state,
    interpolate,
    load_adapter,
    lora_state,
    module_norms,
    set_state,
)
from adapters.recipe import Recipe

RECIPE = Recipe(rank=4, alpha=8, profile="full")
IDS = torch.tensor([[1, 20, 30, 40, 50, 60]])


@pytest.fixture
def model(tiny_model):
    """The tiny base in float32, with an adapter slot."""
    base = load_model(tiny_model, torch.float32)
    attach(base, adapter_config(base, RECIPE))
    return base


def random_state(model: Any, seed: int = 0, size: float = 0.1) -> LoraState:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(w.shape, generator=random) * size for name, w in lora_state(model).items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def test_the_layer_computes_w_plus_alpha_over_r_b_a(model):
    """Parity with the formula written by hand, forward and backward."""
    set_state(model, random_state(model))
    layer = next(module for module in model.modules() if isinstance(module, LoraLinear))
    w, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 5, w.shape[1], generator=torch.Generator().manual_seed(1), requires_grad=True)
    grad = torch.randn(3, 5, w.shape[0], generator=torch.Generator().manual_seed(2))
    expected = x @ (w + 8 / 4 * b @ a).t()
    wanted = torch.autograd.grad(expected, (x, a, b), grad)
    ours = layer(x)
    got = torch.autograd.grad(ours, (x, a, b), grad)
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_is_off_or_fresh_is_the_base_bit_by_bit(tiny_model, model):
    """B starts at zero, and switching off takes the adapter out of the arithmetic."""
    base = logits(load_model(tiny_model, torch.float32))
    set_state(model, init_state(model, 7))
    assert torch.equal(logits(model), base)
    set_state(model, random_state(model))
    assert not torch.equal(logits(model), base)
    enable(model, False)
    assert torch.equal(logits(model), base)


def test_fresh_weights_follow_from_the_seed(model):
    """Same seed, same bytes."""
    one, same, other = init_state(model, 1), init_state(model, 1), init_state(model, 2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_plain_peft_loads_what_we_write_and_gives_the_same_logits(tiny_model, model, tmp_path):
    """A version is no private format."""
    from peft import PeftModel

    set_state(model, random_state(model))
    save_adapter(tmp_path, lora_state(model), adapter_config(model, RECIPE))
    stock = PeftModel.from_pretrained(load_model(tiny_model, torch.float32), str(tmp_path))
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(stock), logits(load_model(tiny_model, torch.float32)), atol=1e-2)


def test_a_saved_adapter_loads_into_a_bare_base_and_into_one_with_a_slot(tiny_model, model, tmp_path):
    """Both ways give the saved weights, and saving them again the same bytes."""
    state = random_state(model)
    digest = save_adapter(tmp_path, state, adapter_config(model, RECIPE))
    bare = load_model(tiny_model, torch.float32)
    for target in (bare, model):
        load_adapter(target, tmp_path)
        assert all(torch.equal(weight, state[name]) for name, weight in lora_state(target).items())
    again = tmp_path / "again"
    again.mkdir()
    assert save_adapter(again, lora_state(bare), adapter_config(model, RECIPE)) == digest
    torch.testing.assert_close(logits(bare), logits(model))


def test_scaling_goes_from_the_parent_to_the_candidate(model):
    """From the base it multiplies B, so the product shrinks in proportion."""
    candidate, parent = random_state(model, 1), random_state(model, 2)
    assert interpolate(parent, candidate, 1.0) is candidate
    half = interpolate(None, candidate, 0.5)
    name = next(name for name in candidate if "lora_B" in name)
    a_name = name.replace("lora_B", "lora_A")
    torch.testing.assert_close(half[name] @ half[a_name], 0.5 * candidate[name] @ candidate[a_name])
    quarter = interpolate(parent, candidate, 0.25)
    torch.testing.assert_close(quarter[name], 0.75 * parent[name] + 0.25 * candidate[name])


def test_norms_are_those_of_the_products(model):
    """And a NaN in a weight is a NaN in its norm."""
    state = random_state(model)
    for name, norm in module_norms(state, 8, 4).items():
        product = 8 / 4 * state[name.replace("lora_A", "lora_B")] @ state[name]
        assert norm == pytest.approx(product.norm().item(), rel=1e-4)
    name = next(iter(state))
    state[name][0, 0] = math.nan
    assert math.isnan(module_norms(state, 8, 4)[name])


@pytest.fixture
def saved(model, tmp_path):
    """A good adapter on disk, and the configuration that it must have."""
    config = adapter_config(model, RECIPE)
    save_adapter(tmp_path, random_state(model), config)
    return tmp_path, config


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_mapping": {"base_model_class": "os"}},
        {"r": 8},
        {"r": 10**6},
        {"target_modules": [".*"]},
        {"layers_to_transform": [0]},
        {"use_dora": True},
        {"lora_alpha": 64},
        {"peft_type": "IA3"},
    ],
)
def test_a_foreign_configuration_is_refused(saved, fields):
    """Only plain LoRA of the shape that was fixed at install; unknown fields could run code."""
    folder, config = saved
    change_config(folder, **fields)
    with pytest.raises(AdapterError, match="roll back"):
        read_adapter(folder, config)


def test_an_adapter_may_not_choose_its_own_shape_beyond_the_base(model, saved):
    """Loading without a fixed shape still checks rank and blocks against the base."""
    folder, _ = saved
    change_config(folder, r=10**6)
    with pytest.raises(AdapterError, match="rank"):
        load_adapter(model, folder)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(saved, value):
    """A NaN in one weight would be a NaN in every answer."""
    folder, config = saved
    state = load_file(folder / ADAPTER_FILE)
    next(iter(state.values()))[0, 0] = value
    save_file(state, folder / ADAPTER_FILE)
    with pytest.raises(AdapterError, match="not finite"):
        read_adapter(folder, config)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "half", "cut"])
def test_weights_that_do_not_fit_are_refused(model, saved, change):
    """Names, shapes and dtype are the model's, exactly."""
    folder, config = saved
    path = folder / ADAPTER_FILE
    state = load_file(path)
    name = next(iter(state))
    if change == "missing":
        del state[name]
    elif change == "extra":
        state["base_model.model.lm_head.lora_A.weight"] = state[name].clone()
    elif change == "shape":
        state[name] = torch.zeros(4, state[name].shape[1] + 1)
    elif change == "half":
        state[name] = state[name].half()
    save_file(state, path)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(AdapterError):
        load_adapter(model, folder, config)


def test_a_pickle_in_place_of_the_weights_is_never_opened(model, saved):
    """peft would fall back to it."""
    folder, config = saved
    (folder / ADAPTER_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
        load_adapter(model, folder, config)


def test_a_configuration_of_many_megabytes_is_not_parsed(saved):
    """Its size is looked at first."""
    folder, config = saved
    (folder / CONFIG_FILE).write_bytes(b"[" * 10_000_000)
    with pytest.raises(AdapterError, match="larger"):
        read_adapter(folder, config)


def test_generating_is_greedy_or_repeats_with_its_seed(tiny_model):
    """Greedy twice and one seed twice give the same; it stops at a line end."""
    greedy = generate(tiny_model, None, ["replace left"], 12)
    assert greedy == generate(tiny_model, None, ["replace left"], 12)
    assert "\n" not in greedy[0]
    sampled = [generate(tiny_model, None, ["a"] * 4, 8, seed=s) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_the_configuration_we_write_is_the_one_we_accept(saved):
    """Every field is ours."""
    folder, config = saved
    assert msgspec.json.decode((folder / CONFIG_FILE).read_bytes(), type=type(config)) == config
