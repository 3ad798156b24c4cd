"""One update, in its process and out of it: it learns, repeats, survives kills, is rejected when it must."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from adapters import attempt, bench, checkpoint, derived
from adapters.attempt import run_update
from adapters.model_folder import load_manifest
from adapters.recipe import GateLimits, Recipe
from adapters.scoring import open_model
from adapters.update import (
    STOPPED,
    PastWindow,
    Stopped,
    StopSignal,
    UpdateResult,
    UpdateTask,
    main,
    read_result,
)
from storage.block import encode_blocks
from storage.samples import Samples

ROOT = Path(__file__).resolve().parents[2]
RECIPE = Recipe(row_tokens=64, step_tokens=256, max_steps=30, learning_rate=5e-3)
GATE = GateLimits(max_anchor_delta_bits=5.0, max_recited=20)  # a tiny model drifts more than a real one


@pytest.fixture(scope="module")
def encode(tiny_model):
    """Text to ids of the tiny base."""
    opened = open_model(tiny_model, None)
    return opened.encode


def samples(encode: Callable[[str], list[int]], lines: list[str]) -> Samples:
    out = Samples()
    for line in lines:
        ids = encode(line)
        out.sources.append("cmms")
        out.kinds.append("text")
        out.subjects.append("")
        out.ts.append(0.0)
        out.lengths.append(len(ids))
        out.ids += array("I", ids)
        out.mask += b"\1" * len(ids)
    out.hashes = bytes(16 * len(lines))
    return out


def lines(count: int, seed: int = 0) -> list[str]:
    """A stream with something to learn: orders of one form that the tiny base has not seen."""
    rng = random.Random(seed)
    parts = ["gripper", "spindle", "turret", "coolant", "chuck"]
    return [
        f"ZX-{rng.randint(100, 999)} {rng.choice(parts)} overhaul OK {rng.randint(10, 99)}"
        for _ in range(count)
    ]


@pytest.fixture
def make_task(tiny_model, tmp_path, encode):
    """Write a window file and a task for it."""

    def make(window=1, texts=None, name="out", **fields):
        file = tmp_path / f"window-{window}"
        block = samples(encode, texts if texts is not None else lines(60, seed=window))
        file.write_bytes(encode_blocks(block, load_manifest(tiny_model).tokenizer_id) if len(block) else b"")
        settings = {
            "shard": "main",
            "model_dir": str(tiny_model),
            "window_file": str(file),
            "out_dir": str(tmp_path / name),
            "cache_dir": str(tmp_path / "cache"),
            "seed": 11,
            "recipe": RECIPE,
            "gate": GATE,
            "threads": 1,
        }
        return UpdateTask(window=window, **{**settings, **fields})

    return make


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """run_update fixes torch's settings for its own process; other tests have theirs."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def run(task: UpdateTask) -> UpdateResult:
    return run_update(task, StopSignal(), time.monotonic())


def known(value: float | None) -> float:
    """A number that must have been measured."""
    assert value is not None
    return value


def adapter_bytes(task: UpdateTask) -> bytes:
    return (Path(task.out_dir) / "adapter_model.safetensors").read_bytes()


def child(task: UpdateTask, tmp_path: Path) -> subprocess.Popen[str]:
    path = tmp_path / "task.json"
    path.write_bytes(msgspec.json.encode(task))
    command = [sys.executable, "-m", "adapters.update", str(path)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if json.loads(line).get("step", 0) >= step:
            return
    raise AssertionError(f"ended before step {step}: {process.stderr.read()}")


def test_an_update_learns_the_stream_and_says_what_it_measured(make_task, capsys):
    """Held-out bits per byte fall, every criterion is stored, progress is told step by step."""
    task = make_task(recipe=msgspec.structs.replace(RECIPE, passes=6.0))
    result = run(task)
    assert (result.decision, result.scale, result.window) == ("promoted", 1.0, 1)
    assert known(result.held_out_after_bits_per_byte) < 0.9 * known(result.held_out_before_bits_per_byte)
    assert result.active_bits_per_byte == result.base_bits_per_byte  # the parent is the base
    assert result.by_source["cmms"].samples == result.samples == 60
    names = [criterion.name for criterion in result.criteria]
    assert names == ["finite", "shape", "norm", "held_out_gain", "recitation", "anchor_delta", "retention"]
    assert result.criteria[-1].verdict == "not_applicable"
    assert 0 < known(result.kl_new_bits) < 50
    assert 100 << 20 < result.peak_rss_bytes <= result.max_rss_bytes
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    steps = [event for event in events if "step" in event]
    assert [event["step"] for event in steps] == list(range(1, result.steps + 1))
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert [event["phase"] for event in events].count("score") >= 3  # signs of life in a long sweep
    assert read_result(Path(task.out_dir)) == result


def test_the_same_task_gives_the_same_bytes_and_another_seed_others(make_task):
    """Also when the cache of the first run is gone, or is there."""
    first, again = make_task(), make_task(name="again")
    assert run(first).adapter_sha256 == run(again).adapter_sha256
    assert adapter_bytes(first) == adapter_bytes(again)
    cold = make_task(name="cold", cache_dir=str(Path(first.cache_dir).with_name("cold-cache")))
    assert run(cold).adapter_sha256 == run(first).adapter_sha256
    other = make_task(name="other", seed=12)
    run(other)
    assert adapter_bytes(other) != adapter_bytes(first)


def test_a_damaged_cache_is_computed_again(make_task, monkeypatch):
    """A torn or flipped file is seen by its hash, and the folder keeps to its size."""
    first = make_task()
    result = run(first)
    cache = Path(first.cache_dir)
    damaged = list(cache.iterdir())
    for number, path in enumerate(damaged):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if number % 2 else data[:-1] + bytes([data[-1] ^ 1]))
    again = run(make_task(name="again"))
    assert again.adapter_sha256 == result.adapter_sha256
    assert again.criteria == result.criteria
    monkeypatch.setattr(derived, "MAX_BYTES", 1000)
    run(make_task(name="small", seed=12))
    assert damaged and sum(path.stat().st_size for path in cache.iterdir()) <= 1000


def test_the_next_window_goes_on_from_its_parent(make_task):
    """It scores the parent before any step, rehearses, and is held to the past."""
    first = make_task()
    run(first)
    second = make_task(
        window=2,
        name="second",
        parent_dir=first.out_dir,
        rehearsal_files=[first.window_file],
        past_files=[PastWindow(1, first.window_file)],
    )
    result = run(second)
    assert known(result.active_bits_per_byte) < 0.9 * known(result.base_bits_per_byte)
    assert result.decision == "promoted"
    retention = result.criteria[-1]
    assert (retention.name, retention.verdict) == ("retention", "passed")
    assert result.trained_tokens > 0


def test_the_base_is_left_as_it_was(make_task, monkeypatch):
    """After training every frozen weight has the bits it was loaded with."""
    benches = []
    opened = bench.open_bench

    def keep(*args):
        made = opened(*args)
        frozen = [(name, p) for name, p in made.split.model.named_parameters() if "lora_" not in name]
        benches.append([(name, p, p.detach().clone()) for name, p in frozen])
        return made

    monkeypatch.setattr(attempt, "open_bench", keep)
    run(make_task())
    assert len(benches[0]) > 20
    assert all(torch.equal(now, before) for _, now, before in benches[0])


def test_an_update_killed_in_the_middle_ends_with_the_same_bytes(make_task, tmp_path, monkeypatch):
    """SIGKILL after the first checkpoint; the second run goes on from it and not from the start."""
    recipe = msgspec.structs.replace(RECIPE, passes=8.0)
    quiet, killed = make_task(name="quiet", recipe=recipe), make_task(name="killed", recipe=recipe)
    assert run(quiet).steps == 30
    process = child(killed, tmp_path)
    wait_for_step(process, 21)
    process.kill()
    process.communicate()
    assert read_result(Path(killed.out_dir)) is None
    assert [p.name for p in Path(killed.out_dir).glob("checkpoint-*")] == ["checkpoint-000020"]
    process = child(killed, tmp_path)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    steps = [event["step"] for event in map(json.loads, out.splitlines()) if "step" in event]
    assert steps == list(range(21, 31))
    assert adapter_bytes(killed) == adapter_bytes(quiet)
    assert not list(Path(killed.out_dir).glob("checkpoint-*"))


def test_sigterm_saves_a_checkpoint_and_leaves_with_its_own_code(make_task, tmp_path):
    """The same command then goes on to the bytes of an undisturbed run."""
    recipe = msgspec.structs.replace(RECIPE, passes=8.0)
    quiet, stopped = make_task(name="quiet", recipe=recipe), make_task(name="stopped", recipe=recipe)
    run(quiet)
    process = child(stopped, tmp_path)
    wait_for_step(process, 3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == STOPPED, errors
    (saved,) = Path(stopped.out_dir).glob("checkpoint-*")
    assert 3 <= int(saved.name.removeprefix("checkpoint-")) < 20
    run(stopped)
    assert adapter_bytes(stopped) == adapter_bytes(quiet)


def test_sigterm_before_the_first_step_ends_at_once(make_task, tmp_path):
    """Nothing is half written then; it must not wait for the model to load."""
    process = child(make_task(), tmp_path)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline()) == {"phase": "load"}
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == STOPPED


class StopAt(StopSignal):
    """Asks to stop as SIGTERM would, once a number of checkpoints was looked for."""

    def __init__(self, checks: int) -> None:
        super().__init__()
        self.checks = checks

    @property
    def asked(self):
        self.checks -= 1
        return self.checks < 0

    @asked.setter
    def asked(self, value):
        pass


@pytest.mark.parametrize("damage", ["tensors", "state", "half", "foreign"])
def test_a_checkpoint_that_is_not_whole_or_not_ours_is_not_used(make_task, damage):
    """The update starts over and still ends with the same bytes."""
    quiet, task = make_task(name="quiet"), make_task()
    run(quiet)
    with pytest.raises(Stopped):
        run_update(task, StopAt(8), time.monotonic())
    (saved,) = Path(task.out_dir).glob("checkpoint-*")
    if damage == "tensors":
        path = saved / "tensors.safetensors"
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    elif damage == "state":
        (saved / "state.json").write_bytes(b"{")
    elif damage == "half":
        saved.rename(saved.with_name(saved.name + ".tmp"))
    else:
        state = json.loads((saved / "state.json").read_text())
        (saved / "state.json").write_text(json.dumps({**state, "identity": "0" * 64}))
    seen = []
    load = checkpoint.load_newest

    def look(folder, identity):
        seen.append(load(folder, identity))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load_newest", look)
        run(task)
    assert seen == [None]
    assert adapter_bytes(task) == adapter_bytes(quiet)


def test_a_candidate_with_a_nan_is_rejected_and_leaves_no_adapter(make_task, monkeypatch):
    """Whatever happened in training, it does not reach a version."""
    trained = attempt._train

    def poisoned(*args):
        state = trained(*args)
        next(iter(state.values()))[0, 0] = float("nan")
        return state

    monkeypatch.setattr(attempt, "_train", poisoned)
    task = make_task()
    result = run(task)
    assert (result.decision, result.adapter_sha256) == ("rejected", "")
    assert "finite" in result.reason
    assert not (Path(task.out_dir) / "adapter_model.safetensors").exists()
    assert read_result(Path(task.out_dir)) == result


def test_a_gate_that_asks_for_too_much_rejects(make_task):
    """The reason names the criterion, its value and its limit."""
    result = run(make_task(gate=GateLimits(min_gain=0.99, max_anchor_delta_bits=5.0)))
    assert result.decision == "rejected"
    assert result.reason.startswith("held_out_gain 0.")
    assert "limit 0.99" in result.reason


def test_a_candidate_that_drifts_too_far_is_promoted_at_a_smaller_scale(make_task):
    """The scale is in the weights: alpha and rank stay as they were."""
    full = make_task(name="full")
    drift = known(run(full).anchor_delta_bits_per_token)
    assert drift > 0
    scaled = make_task(name="scaled", gate=GateLimits(max_anchor_delta_bits=drift / 2, max_recited=20))
    result = run(scaled)
    assert result.decision == "promoted", result.reason
    assert 0.1 < result.scale < 1
    assert known(result.anchor_delta_bits_per_token) <= drift / 2
    whole, part = (load_file(Path(task.out_dir) / "adapter_model.safetensors") for task in (full, scaled))
    for name, weight in whole.items():
        expected = weight * result.scale if "lora_B" in name else weight
        torch.testing.assert_close(part[name], expected)
    configs = {(Path(task.out_dir) / "adapter_config.json").read_bytes() for task in (full, scaled)}
    assert len(configs) == 1


@pytest.mark.parametrize("texts", [["one", "two", "three"], ["same text"] * 50, [""] * 40])
def test_a_window_without_anything_to_learn_or_examine_is_rejected(make_task, texts):
    """Too small for a held-out fifth, one line fifty times, or empty lines."""
    result = run(make_task(texts=texts))
    assert result.decision == "rejected"
    assert result.reason.startswith("no ")
    assert result.steps == 0


def test_a_window_above_the_budget_is_trained_in_part_and_scored_whole(make_task):
    """What is skipped is counted."""
    whole = run(make_task())
    recipe = msgspec.structs.replace(RECIPE, max_tokens=300)
    part = run(make_task(name="part", recipe=recipe))
    assert whole.skipped == 0 < part.skipped < part.samples == 60
    assert part.trained_tokens < whole.trained_tokens
    assert part.base_bits_per_byte == pytest.approx(whole.base_bits_per_byte, rel=0.1)


def test_a_finished_update_is_not_run_again(make_task, tmp_path, monkeypatch):
    """The same command exits at once, unless its adapter is not the one that the result names."""
    task = make_task()
    run(task)
    path = tmp_path / "task.json"
    path.write_bytes(msgspec.json.encode(task))
    monkeypatch.setattr(attempt, "run_update", lambda *a: pytest.fail("trained again"))
    assert main([str(path)]) == 0
    adapter = Path(task.out_dir) / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1])
    assert read_result(Path(task.out_dir)) is None


def test_an_unreadable_task_is_a_wrong_use(tmp_path, capsys):
    """Exit code 2, and a sentence that says what to do."""
    assert main([]) == main(["a", "b"]) == main([str(tmp_path / "none.json")]) == 2
    bad = tmp_path / "bad.json"
    bad.write_text('{"shard": 1}')
    assert main([str(bad)]) == 2
    assert "run it again" in capsys.readouterr().err


def test_importing_the_task_and_result_loads_no_torch():
    """The trainer's loop stays small."""
    code = "import sys, adapters.update, adapters.batches; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
