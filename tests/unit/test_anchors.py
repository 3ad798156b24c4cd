"""Anchors: drawn from the base's own distribution, in two halves that never meet."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import fastokens
import numpy as np
import pytest
import torch

from adapters import anchors as anchoring
from adapters.anchors import (
    Anchors,
    generate_anchors,
    pack_anchors,
    read_anchors,
    sample_sequences,
    shipped_anchors,
    starts_for,
    unpack_anchors,
    write_anchors,
)
from adapters.base_model import load_model
from adapters.make_anchors import make_shipped
from adapters.model_folder import ANCHORS_FILE, TOKENIZER, WEIGHTS, file_sha256, load_manifest

BOS = 1


@pytest.fixture(scope="module")
def model(tiny_model: Path):
    return load_model(tiny_model, "float32")


@pytest.fixture(scope="module")
def starts(tiny_model: Path):
    fast = fastokens.Tokenizer.from_file(str(tiny_model / TOKENIZER))
    return starts_for(load_manifest(tiny_model), fast)


@pytest.fixture(scope="module")
def made(model, starts) -> Anchors:
    return generate_anchors(model, starts, train=8, measured=6, tokens=40, top_k=5, seed=3)


def same(a: Anchors, b: Anchors) -> bool:
    return all(np.array_equal(x, b.tensors()[name]) for name, x in a.tensors().items())


def test_shapes_and_types_are_those_of_the_format(made: Anchors) -> None:
    """What the trainer reads: int32 ids, 16-bit top-k, BOS first."""
    assert (
        made.train_ids.shape,
        made.measured_ids.shape,
        made.train_topk_ids.shape,
    ) == ((8, 40), (6, 40), (8, 40, 5))
    assert (np.int32, np.uint16, np.float16) == (
        made.train_ids.dtype,
        made.train_topk_ids.dtype,
        made.train_topk_logprobs.dtype,
    )
    assert {BOS} == {*made.train_ids[:, 0].tolist(), *made.measured_ids[:, 0].tolist()}


def test_the_same_seed_gives_the_same_anchors_and_another_seed_others(made: Anchors, model, starts) -> None:
    """Anchors are part of a model's identity, so they repeat."""
    again, other = (
        generate_anchors(model, starts, train=8, measured=6, tokens=40, top_k=5, seed=seed) for seed in (3, 4)
    )
    assert same(made, again)
    assert not same(made, other)


def test_the_halves_share_no_start_and_no_sequence(starts, made: Anchors) -> None:
    """What is trained on must not be what is measured."""
    given = [{tuple(row) for row in starts.given(half, 256, 256) if len(row) > 1} for half in (0, 1)]
    assert [len(half) for half in given] == [64, 64]
    assert not given[0] & given[1]
    rows = [{tuple(row) for row in half.tolist()} for half in (made.train_ids, made.measured_ids)]
    assert (len(rows[0]), len(rows[1])) == (8, 6)
    assert not rows[0] & rows[1]


def test_starts_are_half_bare_a_quarter_chat_and_a_quarter_text(starts, tiny_model: Path) -> None:
    """An instruction-tuned base left alone would write dialogues only."""
    chat = load_manifest(tiny_model).chat
    assert chat is not None
    given = starts.given(0, 16, 256)
    opened = [
        row for row in given if row[-len(chat.roles["assistant"].prefix) :] == chat.roles["assistant"].prefix
    ]
    assert (
        sum(row == [BOS] for row in given),
        len(opened),
        sum(len(row) > 1 and row not in opened for row in given),
    ) == (8, 4, 4)


def test_without_a_chat_format_plain_text_takes_the_place_of_chats(starts) -> None:
    """A base that was never tuned for chat gets anchors all the same."""
    plain = anchoring.AnchorStarts(BOS, starts.encode, None)
    assert sum(len(row) > 1 for row in plain.given(0, 16, 256)) == 8


def test_given_starts_are_kept_and_at_least_half_is_the_base_s_own(starts, made: Anchors) -> None:
    """The rows begin as told, cut where they would fill the row."""
    for row, start in zip(made.train_ids.tolist(), starts.given(0, 8, 40), strict=True):
        assert start == row[: len(start)]
        assert len(start) <= 20


def test_cached_log_probabilities_are_the_base_s_own(made: Anchors, model) -> None:
    """They come from stepwise decoding; one plain forward pass over the rows gives the same numbers."""
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(made.train_ids).long()).logits
    best = torch.log_softmax(logits.float(), -1).topk(5)
    assert np.allclose(best.values.numpy(), made.train_topk_logprobs, atol=4e-3)
    agreeing = (best.indices.numpy() == made.train_topk_ids).mean()
    assert agreeing > 0.99  # near ties may swap


def test_samples_follow_the_full_distribution(model) -> None:
    """The mean surprise of sampled tokens is the mean entropy; top-p or top-k sampling would fall below it.

    Only then is the rise in loss on anchors an unbiased estimate of KL(base, version).
    """
    ids, _, _ = sample_sequences(model, [[BOS]] * 192, 33, 1, seed=11)
    rows = torch.from_numpy(ids).long()
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(input_ids=rows).logits[:, :-1].float(), -1)
    surprise = -logprobs.gather(-1, rows[:, 1:, None])[..., 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    gap = (surprise - entropy).flatten()
    error = float(gap.std() / len(gap) ** 0.5)
    assert abs(float(gap.mean())) < 4 * error
    assert float(entropy.mean()) > 40 * error  # the test could see a truncated sampler


def test_the_file_gives_back_what_was_written_with_the_same_bytes(made: Anchors, tmp_path: Path) -> None:
    """Two writes of the same anchors hash alike."""
    for name in ("a", "b"):
        write_anchors(tmp_path / name, made)
    assert file_sha256(tmp_path / "a") == file_sha256(tmp_path / "b")
    assert same(made, read_anchors(tmp_path / "a"))


def test_packing_loses_nothing(made: Anchors) -> None:
    """What ships is what was generated."""
    assert same(made, unpack_anchors(pack_anchors(made, {"seed": "3"})))


def test_the_prepared_folder_holds_anchors_as_its_manifest_says(tiny_model: Path) -> None:
    """Counts, lengths and hash in the manifest are the file's."""
    info = load_manifest(tiny_model).anchors
    stored = read_anchors(tiny_model / ANCHORS_FILE)
    assert file_sha256(tiny_model / ANCHORS_FILE) == info.sha256
    assert stored.train_topk_ids.shape == (info.train, info.tokens, info.top_k)
    assert stored.measured_ids.shape == (info.measured, info.tokens)
    assert (info.train, info.measured, info.tokens, info.top_k) == (8, 8, 64, 20)


def test_shipped_anchors_are_found_by_the_weights_that_wrote_them(tiny_model: Path, tmp_path: Path) -> None:
    """The script packs under the hash of the weights; other weights find nothing."""
    path = make_shipped(tiny_model, tmp_path, train=2, measured=2, tokens=8, seed=5)
    weights = file_sha256(tiny_model / WEIGHTS)
    found = shipped_anchors(weights, tmp_path)
    assert found is not None
    assert found.train_ids.shape == (2, 8)
    assert weights[:16] in path.name
    assert shipped_anchors("0" * 64, tmp_path) is None


def test_what_ships_is_whole_small_and_normalized() -> None:
    """128 + 128 sequences of the embedded model, under 4 MB, with log-probabilities that are ones."""
    files = list((Path(anchoring.__file__).parent / "data").glob("anchors-*.zst"))
    assert len(files) == 1
    assert files[0].stat().st_size < 4_000_000
    shipped = unpack_anchors(files[0].read_bytes())
    assert (shipped.train_ids.shape, shipped.measured_ids.shape) == ((128, 256), (128, 256))
    assert {BOS} == set(chain(shipped.train_ids[:, 0].tolist(), shipped.measured_ids[:, 0].tolist()))
    logprobs = shipped.train_topk_logprobs.astype(np.float64)
    assert (np.diff(logprobs, axis=-1) <= 0).all()
    mass = np.exp(logprobs).sum(-1)
    assert 0.70 < mass.mean() < 0.80
    assert mass.max() < 1.01


def test_what_ships_was_written_by_the_embedded_model(smollm2: Path) -> None:
    """Its log-probabilities on the shipped rows are those in the file, and `prepare` took that file."""
    shipped = shipped_anchors(file_sha256(smollm2 / WEIGHTS))
    assert shipped is not None
    assert same(shipped, read_anchors(smollm2 / ANCHORS_FILE))
    rows = slice(40, 44)  # two from BOS alone, one chat, one text
    with torch.inference_mode():
        ids = torch.from_numpy(shipped.train_ids[rows]).long()
        logprobs = torch.log_softmax(load_model(smollm2, "float32")(input_ids=ids).logits, -1)
    stored = torch.from_numpy(shipped.train_topk_ids[rows].astype(np.int64))
    expected = logprobs.gather(-1, stored).numpy()
    assert np.allclose(shipped.train_topk_logprobs[rows].astype(np.float32), expected, atol=0.02)


def test_anchors_whose_parts_do_not_fit_are_refused(made: Anchors) -> None:
    """A mixed-up file must not be trained on."""
    mixed = Anchors(made.train_ids[:4], made.measured_ids, made.train_topk_ids, made.train_topk_logprobs)
    with pytest.raises(ValueError, match="prepare the model again"):
        unpack_anchors(pack_anchors(mixed, {}))
