"""Scores against a plain forward pass, and the probes for recitation."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from adapters.base_model import load_model
from adapters.batches import SCORED, TRAINED, Row
from adapters.frozen import Activations, SplitModel, UnsupportedModelError, row_batches
from adapters.lora import adapter_config, attach, init_state, set_state
from adapters.model_folder import load_manifest
from adapters.recipe import Recipe
from adapters.scoring import (
    EmptyScoreError,
    RowLosses,
    Score,
    count_recited,
    kl_bits,
    mean_bits,
    open_model,
    padded_token_bytes,
    rare_spans,
    row_losses,
    score_rows,
    score_texts,
    total,
)

BOTH = SCORED | TRAINED


@pytest.fixture(scope="module")
def base(tiny_model):
    """The tiny base in float32."""
    return load_model(tiny_model, torch.float32)


def row(ids: Iterable[int], weights: Iterable[int] | None = None, source: str = "a") -> Row:
    ids = list(ids)
    return Row(
        array("I", ids), bytes(weights if weights is not None else [0] + [BOTH] * (len(ids) - 1)), source
    )


def plain_nll(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")


@pytest.mark.parametrize("split", [0, 3])
def test_losses_are_those_of_a_plain_forward_pass(base, split):
    """Rows of several lengths, padded into shared batches, give what each gives alone."""
    rows = [row([1, *range(20, 20 + n)]) for n in (3, 40, 17, 9)]
    parts = SplitModel(base, split)
    losses = row_losses(parts, Activations.compute(parts, rows, batch_tokens=64))
    for one, loss in zip(rows, losses, strict=True):
        torch.testing.assert_close(loss.nll[1:], plain_nll(base, one.ids.tolist()), rtol=1e-4, atol=1e-4)
        assert loss.nll[0] == 0


def test_a_row_does_not_see_its_neighbours(base):
    """The same row scores alike whatever shares its batch."""
    parts = SplitModel(base, 3)
    mine, other = row([1, 30, 31, 32]), row([1, *range(40, 60)])
    alone = row_losses(parts, Activations.compute(parts, [mine]))[0]
    beside = row_losses(parts, Activations.compute(parts, [other, mine]))[1]
    torch.testing.assert_close(alone.nll, beside.nll)


def test_only_scored_tokens_and_their_bytes_count(base, tiny_model):
    """A separator, a user's turn and BOS add neither bits nor bytes."""
    lengths = [len(piece) for piece in padded_token_bytes(tiny_model, load_manifest(tiny_model))]
    parts = SplitModel(base, 3)
    one = row([1, 20, 21, 22, 23], [0, BOTH, 0, TRAINED, BOTH])
    (score,) = score_rows([one], row_losses(parts, Activations.compute(parts, [one])), lengths)
    nll = plain_nll(base, one.ids.tolist())
    assert score.tokens == 2
    assert score.bytes == lengths[20] + lengths[23] > 0
    assert score.bits == pytest.approx((nll[0] + nll[3]).item() / math.log(2), rel=1e-4)


def test_texts_score_alike_however_many_are_scored_at_once(tiny_model):
    """Bits per byte of a text is its own; the bytes are those of its UTF-8."""
    texts = ["replace left pump 3", "", "boom cylinder leaks", "x" * 300]
    scores = score_texts(tiny_model, None, texts, row_tokens=32)
    assert [score.bytes for score in scores] == [len(text.encode()) for text in texts]
    for text, score in zip(texts, scores, strict=True):
        (alone,) = score_texts(tiny_model, None, [text], row_tokens=32)
        assert alone.bits == pytest.approx(score.bits, rel=1e-2, abs=1e-6)
    assert scores[0].bits_per_byte == scores[0].bits / scores[0].bytes


def test_bits_per_byte_of_nothing_is_an_error():
    """No number stands for 'not measured'."""
    with pytest.raises(EmptyScoreError):
        _ = Score(0.0, 0, 0).bits_per_byte
    with pytest.raises(EmptyScoreError):
        mean_bits([])
    assert total([Score(1.0, 2, 3), Score(4.0, 5, 6)]) == Score(5.0, 7, 9)


def test_control_tokens_in_a_text_stay_text(tiny_model):
    """No data can produce one."""
    opened = open_model(tiny_model, None)
    ids = opened.encode("a<|im_end|>")
    assert opened.decode(ids) == "a<|im_end|>"
    assert opened.manifest.eos_id not in ids


def test_kl_of_the_base_from_itself_is_zero_and_grows_with_the_adapter(tiny_model):
    """Measured over whole distributions."""
    model = load_model(tiny_model, torch.float32)
    config = adapter_config(model, Recipe(rank=4, alpha=8))
    attach(model, config)
    parts = SplitModel(model, config.layers_to_transform[0])
    stored = Activations.compute(parts, [row([1, *range(20, 50)])])
    state = init_state(model, 1)
    set_state(model, state)
    assert kl_bits(parts, stored) == pytest.approx(0, abs=1e-6)
    moved = {name: torch.full_like(w, 0.05) if "lora_B" in name else w for name, w in state.items()}
    set_state(model, moved)
    assert kl_bits(parts, stored) > 1e-3


def losses_of(rows: list[Row], nll: list[list[float]] | None = None) -> list[RowLosses]:
    return [
        RowLosses(
            torch.tensor(nll[i] if nll else [0.0] + [1.0] * (len(r) - 1)),
            torch.ones(len(r), dtype=torch.bool),
        )
        for i, r in enumerate(rows)
    ]


def test_probes_are_the_spans_that_occur_once_and_surprise_the_base_most():
    """16 tokens before, 12 to recite; a span that the window repeats proves nothing."""
    rows = [row([1, *range(100, 130)]), row([1, *range(100, 130)]), row([1, *range(200, 240)])]
    nll = [[0.0] * len(r) for r in rows]
    nll[2][25] = 9.0
    probes = rare_spans(rows, losses_of(rows, nll), bos_id=1)
    assert all(set(probe.ids[17:]) <= set(range(200, 240)) for probe in probes)
    assert 224 in probes[0].ids[17:]
    first = probes[0]
    assert len(first) == 1 + 16 + 12
    assert first.ids[0] == 1
    assert [bool(w & SCORED) for w in first.weights] == [False] * 17 + [True] * 12


def test_probes_do_not_overlap_and_are_at_most_twenty():
    """Twenty places, not one place twenty times."""
    rows = [row([1, *range(1000 * n, 1000 * n + 200)]) for n in range(1, 5)]
    probes = rare_spans(rows, losses_of(rows), bos_id=1)
    assert len(probes) == 20
    spans = [set(probe.ids[17:]) for probe in probes]
    assert sum(map(len, spans)) == len(set().union(*spans))


def test_a_span_across_two_samples_is_no_probe():
    """Its separator is not scored; reciting an order of lines is another matter."""
    weights = [0] + [BOTH] * 20 + [TRAINED] + [BOTH] * 8
    assert rare_spans([row(range(1, 31), weights)], losses_of([row(range(1, 31), weights)]), bos_id=1) == []


def test_a_probe_is_recited_only_word_by_word():
    """Eleven of twelve is not a recitation; the context before does not matter."""
    greedy = torch.zeros(29, dtype=torch.bool)
    greedy[-12:] = True
    nearly = greedy.clone()
    nearly[-5] = False
    assert count_recited([RowLosses(torch.zeros(29), g) for g in (greedy, nearly)]) == 1


def test_one_forward_pass_finds_what_greedy_decoding_would_recite(base, tiny_model):
    """The shortcut agrees with decoding token by token."""
    ids = [1, *range(20, 36)]
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(base(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    parts = SplitModel(base, 3)
    wrong = [*ids[:-1], ids[-1] ^ 1]
    probes = [row(one) for one in (ids, wrong)]
    assert count_recited(row_losses(parts, Activations.compute(parts, probes[:1]))) == 1
    assert count_recited(row_losses(parts, Activations.compute(parts, probes[1:]))) == 0


def test_rows_of_like_length_share_a_batch():
    """Every row once, and hardly a token is padding."""
    rows = [row(range(n)) for n in (3, 250, 4, 256, 3, 255, 5)]
    batches = list(row_batches(rows, 600))
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    assert batches[0] == [3, 5]
    for batch in batches:
        assert max(len(rows[i]) for i in batch) * len(batch) <= 600


def test_a_model_that_the_split_does_not_compute_is_refused(base):
    """Logits are compared at the start; nothing is trained on a wrong forward."""
    norm = base.model.norm
    base.model.norm = torch.nn.Identity()
    parts = None
    try:
        real = base.forward
        base.forward = lambda **kw: _scaled(real(**kw))
        with pytest.raises(UnsupportedModelError, match="Llama"):
            parts = SplitModel(base, 2)
    finally:
        base.model.norm = norm
        base.forward = real
    assert parts is None
    with pytest.raises(UnsupportedModelError):
        SplitModel(torch.nn.Linear(2, 2), 0)


def _scaled(out: Any) -> Any:
    out.logits = out.logits * 1.5
    return out
