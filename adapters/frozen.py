"""A model in two parts: frozen lower blocks, run once a row, and adapted upper blocks over their activations.

Works on decoders built like Llama (embed_tokens, layers, norm, rotary_emb, lm_head): Llama, Mistral, Qwen2,
Qwen3, SmolLM. `SplitModel` proves that on start by comparing logits with the model's, and refuses others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters.batches import Row

__all__ = ["Activations", "SplitModel", "UnsupportedModelError", "pad_hidden", "row_batches"]

_PROBE = 24  # tokens
_ROUND_TOKENS = 32
_PROBE_TOLERANCE = 0.05  # of the logits' spread; bf16 differs by 1 % between batch shapes


class UnsupportedModelError(Exception):
    """The base is no Llama-like decoder, or its code computes something that the split does not."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"this base cannot be split into lower and upper blocks: {what}; choose a Llama-like model"
        )


def row_batches(rows: Sequence[Row], max_tokens: int) -> Iterator[list[int]]:
    """Group rows of like length, so that hardly a token of a batch is padding.

    Args:
        rows: The rows.
        max_tokens: Largest product of rows and their greatest length in a batch (one row may pass it).
    Yields: Indices of a batch's rows, longest first.
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(rows[batch[0]]) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _rounded(tokens: int) -> int:
    """Padded length: few lengths make few shapes, and a new shape costs time and memory (NOTES.md)."""
    return -(-tokens // _ROUND_TOKENS) * _ROUND_TOKENS


def pad_hidden(hidden: Sequence[Tensor]) -> Tensor:
    """Stack activations (T_i, D) of rows as (B, T, D), zero-padded on the right."""
    padded = nn.utils.rnn.pad_sequence(list(hidden), batch_first=True)
    return nn.functional.pad(padded, (0, 0, 0, _rounded(padded.shape[1]) - padded.shape[1]))


def pad_ids(rows: Sequence[Row]) -> Tensor:
    """Token ids of rows, (B, T) int64, padded with 0 on the right, where causal attention never looks."""
    ids = torch.zeros(len(rows), _rounded(max(len(row) for row in rows)), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row.ids)
    return ids


class SplitModel:
    """Lower blocks, upper blocks, final norm and head of one model.

    Attributes:
        split: First block of the upper part.
        head: Output embedding, (V, D).
    """

    def __init__(self, model: Any, split: int) -> None:
        self.model, self.split = model, split
        try:
            inner = model.model
            self.embed, self.blocks, self.norm = inner.embed_tokens, inner.layers, inner.norm
            self.rotary = inner.rotary_emb
            self.head: Tensor = model.lm_head.weight
        except AttributeError as error:
            raise UnsupportedModelError(str(error)) from error
        self._positions: dict[int, tuple[Tensor, Tensor]] = {}
        self._probe()

    @property
    def width(self) -> int:
        """D, the size of a hidden state."""
        return int(self.head.shape[1])

    def _run(self, blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
        n_tokens = hidden.shape[1]
        if n_tokens not in self._positions:
            position_ids = torch.arange(n_tokens).unsqueeze(0)
            self._positions[n_tokens] = self.rotary(hidden, position_ids)
        for block in blocks:
            out = block(hidden, attention_mask=None, position_embeddings=self._positions[n_tokens])
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    @torch.no_grad()
    def lower(self, ids: Tensor) -> Tensor:
        """Hidden states before the first adapted block.

        Args:
            ids: (B, T) int64; padding on the right.
        Returns: (B, T, D) in the base's dtype.
        """
        return self._run(self.blocks[: self.split], self.embed(ids))

    def upper(self, hidden: Tensor) -> Tensor:
        """Normed hidden states after the last block, (B, T, D), with gradients for the adapter if enabled."""
        out: Tensor = self.norm(self._run(self.blocks[self.split :], hidden))
        return out

    @torch.no_grad()
    def _probe(self) -> None:
        """Compare with the model's own forward on one row. Raises: UnsupportedModelError."""
        n = min(_PROBE, int(self.head.shape[0]))
        ids = (torch.arange(n) * 7919 % self.head.shape[0]).unsqueeze(0)
        try:
            own = self.upper(self.lower(ids)) @ self.head.t()
        except (TypeError, RuntimeError, AttributeError) as error:
            raise UnsupportedModelError(str(error)) from error
        true = self.model(input_ids=ids, use_cache=False).logits
        gap = (own.float() - true.float()).abs().max().item()
        if not gap <= _PROBE_TOLERANCE * true.float().std().item() + 1e-3:
            raise UnsupportedModelError(f"logits differ by {gap:.3g} from the model's own")


class Activations:
    """Hidden states of many rows before the adapted blocks, each computed once."""

    def __init__(self, rows: Sequence[Row], hidden: list[Tensor]) -> None:
        self.rows, self._hidden = rows, hidden

    @classmethod
    def compute(
        cls,
        split: SplitModel,
        rows: Sequence[Row],
        batch_tokens: int = 2048,
        beat: Callable[[], None] = lambda: None,
    ) -> Activations:
        """Run the lower blocks over rows.

        Args:
            split: The model.
            rows: Rows to run.
            batch_tokens: Tokens a forward pass; fixed, since bf16 sums depend on the batch's shape.
            beat: Called after each batch: a sign of life.
        """
        hidden: list[Tensor] = [torch.empty(0)] * len(rows)
        for batch in row_batches(rows, batch_tokens):
            out = split.lower(pad_ids([rows[i] for i in batch]))
            for place, i in enumerate(batch):
                hidden[i] = out[place, : len(rows[i])].clone()
            beat()
        return cls(rows, hidden)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Activations of some rows, (B, T, D), zero-padded on the right."""
        return pad_hidden([self._hidden[i] for i in indices])

    def row(self, index: int) -> Tensor:
        """Activations of one row, (T, D), not padded."""
        return self._hidden[index]

    def part(self, indices: Sequence[int]) -> Activations:
        """Some of the rows, sharing their memory."""
        return Activations([self.rows[i] for i in indices], [self._hidden[i] for i in indices])
