"""Scores: bits per byte of rows under the base or an adapter; one function for all that is compared.

Bits are summed over SCORED tokens, bytes are those that these tokens decode to: tokenizers can be compared.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters.base_model import load_model
from adapters.batches import SCORED, TRAINED, Row
from adapters.frozen import Activations, SplitModel, row_batches
from adapters.host import compute_dtype
from adapters.lora import enable, load_adapter
from adapters.losses import distill, token_nll
from adapters.model_folder import ModelManifest, load_manifest, replace_unencodable, token_bytes

__all__ = [
    "EmptyScoreError",
    "OpenModel",
    "RowLosses",
    "Score",
    "count_recited",
    "kl_bits",
    "mean_bits",
    "open_model",
    "padded_token_bytes",
    "predicted",
    "rare_spans",
    "row_losses",
    "score_rows",
    "score_texts",
    "total",
]

BATCH_TOKENS = 2048
SPAN_TOKENS, SPAN_CONTEXT, MAX_SPANS = 12, 16, 20


class EmptyScoreError(ValueError):
    """Nothing to score: no token counts, or none that decodes to a byte."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: there is nothing to score; give it at least one byte of text")


class Score(NamedTuple):
    """Summed loss of some tokens."""

    bits: float
    bytes: int
    tokens: int

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of UTF-8. Raises: EmptyScoreError without a byte."""
        if not self.bytes:
            raise EmptyScoreError("bits per byte of no bytes")
        return self.bits / self.bytes


def total(scores: Iterable[Score]) -> Score:
    """Sum scores."""
    bits, n_bytes, tokens = 0.0, 0, 0
    for score in scores:
        bits, n_bytes, tokens = bits + score.bits, n_bytes + score.bytes, tokens + score.tokens
    return Score(bits, n_bytes, tokens)


@dataclass(frozen=True, slots=True)
class RowLosses:
    """Loss of each token of one row."""

    nll: Tensor  # (T,) float32, nats; 0 where nothing counts
    greedy: Tensor  # (T,) bool; greedy decoding of the tokens before gives this one


def predicted(rows: Sequence[Row], bit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the tokens with a weight bit are predicted from.

    Args:
        rows: The rows of a batch, in order.
        bit: SCORED or TRAINED (or both: either).
    Returns: Row numbers and positions to predict from, (N,) each, and the ids to predict, (N,), all int64.
    """
    where: tuple[list[int], list[int], list[int]] = ([], [], [])
    for number, row in enumerate(rows):
        for t in range(1, len(row)):
            if row.weights[t] & bit:
                where[0].append(number)
                where[1].append(t - 1)
                where[2].append(row.ids[t])
    at, before, targets = (torch.tensor(column, dtype=torch.int64) for column in where)
    return at, before, targets


@torch.no_grad()
def row_losses(
    split: SplitModel,
    stored: Activations,
    bit: int = SCORED | TRAINED,
    beat: Callable[[], None] = lambda: None,
) -> list[RowLosses]:
    """Loss of every counted token of rows, under whatever adapter is enabled.

    Args:
        split: The model.
        stored: Rows with their lower activations.
        bit: Which tokens count.
        beat: Called after each batch: a sign of life.
    Returns: One entry a row, in order.
    """
    out = [RowLosses(torch.zeros(len(row)), torch.zeros(len(row), dtype=torch.bool)) for row in stored.rows]
    for batch in row_batches(stored.rows, BATCH_TOKENS):
        at, before, targets = predicted([stored.rows[i] for i in batch], bit)
        hidden = split.upper(stored.batch(batch))
        nll, greedy = token_nll(hidden[at, before], split.head, targets)
        for place, i in enumerate(batch):
            mine = at == place
            out[i].nll[before[mine] + 1] = nll[mine]
            out[i].greedy[before[mine] + 1] = greedy[mine]
        beat()
    return out


def score_rows(rows: Sequence[Row], losses: Sequence[RowLosses], byte_lengths: Sequence[int]) -> list[Score]:
    """Sum each row's losses over its SCORED tokens.

    Args:
        rows, losses: From `row_losses`.
        byte_lengths: Bytes that each token id decodes to.
    """
    scores = []
    for row, loss in zip(rows, losses, strict=True):
        scored = [t for t in range(1, len(row)) if row.weights[t] & SCORED]
        bits = loss.nll[scored].sum(dtype=torch.float64).item() / math.log(2)
        scores.append(Score(bits, sum(byte_lengths[row.ids[t]] for t in scored), len(scored)))
    return scores


def mean_bits(losses: Sequence[RowLosses]) -> float:
    """Mean loss of all counted tokens, bits per token. Raises: EmptyScoreError."""
    tokens = sum(len(loss.nll) - 1 for loss in losses)
    if not tokens:
        raise EmptyScoreError("mean loss of no tokens")
    return sum(loss.nll.sum(dtype=torch.float64).item() for loss in losses) / tokens / math.log(2)


@torch.no_grad()
def kl_bits(split: SplitModel, stored: Activations) -> float:
    """Mean KL(base, attached adapter) over the scored tokens of rows, bits per token.

    Args:
        split: A model with an adapter, which is left enabled.
        stored: Rows with their lower activations.
    Raises: EmptyScoreError.
    """
    nats, tokens = 0.0, 0
    for batch in row_batches(stored.rows, BATCH_TOKENS):
        at, before, _ = predicted([stored.rows[i] for i in batch], SCORED)
        enable(split.model, False)
        base = split.upper(stored.batch(batch))[at, before]
        enable(split.model, True)
        nats += distill(split.upper(stored.batch(batch))[at, before], base, split.head)
        tokens += len(at)
    if not tokens:
        raise EmptyScoreError("KL over no tokens")
    return nats / tokens / math.log(2)


def rare_spans(rows: Sequence[Row], base: Sequence[RowLosses], bos_id: int) -> list[Row]:
    """The spans that would show recitation: those that occur once and that the base finds least likely.

    Args:
        rows: Rows that are trained on.
        base: Their losses under the base.
        bos_id: Starts each probe.
    Returns: At most 20 probe rows: BOS, the 16 tokens before a span, its 12 tokens (alone SCORED); from rows
        that hold so many; no two spans overlap.
    """
    counts: dict[tuple[int, ...], int] = {}
    places: list[tuple[float, int, int]] = []
    for number, row in enumerate(rows):
        worth = base[number].nll.double().cumsum(0).tolist()
        for start in range(1, len(row) - SPAN_TOKENS + 1):
            gram = tuple(row.ids[start : start + SPAN_TOKENS])
            counts[gram] = counts.get(gram, 0) + 1
            whole = all(weight & SCORED for weight in row.weights[start : start + SPAN_TOKENS])
            if whole and start >= SPAN_CONTEXT:
                places.append((worth[start + SPAN_TOKENS - 1] - worth[start - 1], number, start))
    chosen: list[tuple[int, int]] = []
    for _, number, start in sorted(places, key=lambda place: (-place[0], place[1], place[2])):
        unique = counts[tuple(rows[number].ids[start : start + SPAN_TOKENS])] == 1
        if unique and all(number != n or abs(start - s) >= SPAN_TOKENS for n, s in chosen):
            chosen.append((number, start))
            if len(chosen) == MAX_SPANS:
                break
    return [_probe(rows[number], start, bos_id) for number, start in chosen]


def _probe(row: Row, start: int, bos_id: int) -> Row:
    ids = array("I", [bos_id]) + row.ids[start - SPAN_CONTEXT : start + SPAN_TOKENS]
    return Row(ids, bytes(1 + SPAN_CONTEXT) + bytes([SCORED]) * SPAN_TOKENS, row.source)


def count_recited(losses: Sequence[RowLosses]) -> int:
    """Number of probes whose span greedy decoding continues word by word.

    Greedy decoding gives the span exactly when it would choose each of its tokens after the true ones before,
    so one forward pass over the true tokens decides it.
    """
    return sum(bool(loss.greedy[-SPAN_TOKENS:].all()) for loss in losses)


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A prepared model, loaded, with what turns text into ids and back."""

    model: Any
    manifest: ModelManifest
    tokenizer: Any
    bytes_of: list[bytes]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no text gives a control token."""
        clean = replace_unencodable(self.manifest)(text)
        ids: list[int] = self.tokenizer.encode(clean, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; half characters become U+FFFD."""
        return b"".join(self.bytes_of[i] for i in ids).decode(errors="replace")


def padded_token_bytes(model_dir: Path, manifest: ModelManifest) -> list[bytes]:
    """Bytes of every id that the model can emit; ids that the tokenizer does not use have none."""
    table = token_bytes(model_dir)
    return table + [b""] * (manifest.vocab_size - len(table))


def open_model(model_dir: Path, version_dir: Path | None) -> OpenModel:
    """Load a base, with a version on it if one is given. Raises: BaseModelError, AdapterError."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    model = load_model(model_dir, compute_dtype())
    if version_dir is not None:
        load_adapter(model, version_dir)
    manifest = load_manifest(model_dir)
    return OpenModel(model, manifest, tokenizer, padded_token_bytes(model_dir, manifest))


def score_texts(
    model_dir: Path, version_dir: Path | None, texts: Sequence[str], row_tokens: int = 256
) -> list[Score]:
    """Score each text for itself under the base or a version.

    Args:
        model_dir: Prepared model.
        version_dir: A version's folder; None is the base.
        texts: Texts; a long one is cut into rows that each start with BOS.
        row_tokens: Longest row.
    Returns: One score a text; an empty text has no bytes.
    """
    opened = open_model(model_dir, version_dir)
    split = SplitModel(opened.model, 0)
    byte_lengths = [len(piece) for piece in opened.bytes_of]
    owners: list[int] = []
    rows: list[Row] = []
    for number, text in enumerate(texts):
        ids = opened.encode(text)
        for start in range(0, len(ids), row_tokens - 1):
            part = array("I", [opened.manifest.bos_id, *ids[start : start + row_tokens - 1]])
            rows.append(Row(part, b"\0" + bytes([SCORED]) * (len(part) - 1), ""))
            owners.append(number)
    scores = score_rows(rows, row_losses(split, Activations.compute(split, rows)), byte_lengths)
    by_text = [Score(0.0, 0, 0)] * len(texts)
    for number, score in zip(owners, scores, strict=True):
        by_text[number] = total((by_text[number], score))
    return by_text
