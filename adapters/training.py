"""The optimizer steps of one update: AdamW over the adapter, rows dealt beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.batches import TRAINED, Row, RowRef
from adapters.frozen import Activations, SplitModel, pad_hidden, row_batches
from adapters.lora import enable
from adapters.losses import anchor_loss, next_token_loss
from adapters.recipe import Recipe
from adapters.scoring import predicted

__all__ = ["TrainingRows", "learning_rate", "make_optimizer", "train"]

_MICRO_TOKENS = {"fast": 1280, "tiny": 1280, "full": 512}
"""Tokens of one forward and backward; in `full` all blocks keep activations, so it takes fewer."""


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Lower activations of rows by kind: "new", "rehearsal", "anchor"."""

    rows: Mapping[str, Activations]

    def row(self, ref: RowRef) -> Row:
        """The row that a step refers to."""
        return self.rows[ref.kind].rows[ref.row]


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Rate of one step: linear warm-up, then a cosine that ends at `final_lr` of the peak.

    Args:
        recipe: Peak, warm-up and final share.
        step: 1 for the first.
        steps: Number of steps.
    """
    peak = recipe.peak_rate()
    warm = max(1, round(recipe.warmup * steps))
    if step <= warm:
        return peak * step / warm
    done = (step - warm) / max(1, steps - warm)
    return peak * (recipe.final_lr + (1 - recipe.final_lr) * (1 + math.cos(math.pi * done)) / 2)


def make_optimizer(parameters: Sequence[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW as the recipe fixes it: no weight decay, torch's default moments."""
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)


def train(
    split: SplitModel,
    data: TrainingRows,
    steps: Sequence[Sequence[RowRef]],
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    first: int,
    after_step: Callable[[int, float], None],
) -> None:
    """Take the steps from `first` on.

    Args:
        split: Model with the adapter enabled.
        data: Rows and anchors that the steps refer to.
        steps: All steps, the ones done included.
        recipe: Rates and clipping.
        optimizer: Over the adapter's parameters.
        first: Steps already done.
        after_step: Told the number of steps done and the step's mean loss, nats a token; may raise to stop.
    """
    parameters = optimizer.param_groups[0]["params"]
    for done in range(first, len(steps)):
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, done + 1, len(steps))
        optimizer.zero_grad()
        loss = _accumulate(split, data, steps[done], recipe)
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        after_step(done + 1, loss)


def _accumulate(split: SplitModel, data: TrainingRows, step: Sequence[RowRef], recipe: Recipe) -> float:
    """Add up the gradients of a step's mean loss. Returns: That loss."""
    refs = list(step)
    counted = sum(_counted(data, ref) for ref in refs)
    loss = 0.0
    rows = [data.row(ref) for ref in refs]
    for batch in row_batches(rows, _MICRO_TOKENS[recipe.profile]):
        part = _batch_loss(split, data, [refs[i] for i in batch], recipe) / counted
        part.backward()
        loss += part.item()
    return loss


def _counted(data: TrainingRows, ref: RowRef) -> int:
    row = data.row(ref)
    return sum(1 for weight in row.weights[1:] if weight & TRAINED)


def _batch_loss(split: SplitModel, data: TrainingRows, refs: list[RowRef], recipe: Recipe) -> Tensor:
    """Summed loss of some rows: cross-entropy on data, KL to the base on anchors."""
    rows = [data.row(ref) for ref in refs]
    hidden = split.upper(_padded(data, refs))
    loss = torch.zeros(())
    learn = [place for place, ref in enumerate(refs) if ref.kind != "anchor"]
    if learn:
        at, before, targets = predicted([rows[place] for place in learn], TRAINED)
        loss = loss + next_token_loss(hidden[torch.tensor(learn)[at], before], split.head, targets)
    keep = [place for place, ref in enumerate(refs) if ref.kind == "anchor"]
    if keep:
        at, before, _ = predicted([rows[place] for place in keep], TRAINED)
        base = _base_hidden(split, data, [refs[place] for place in keep])[at, before]
        distance = anchor_loss(hidden[torch.tensor(keep)[at], before], split.head, base)
        loss = loss + recipe.anchor_weight * distance
    return loss


@torch.no_grad()
def _base_hidden(split: SplitModel, data: TrainingRows, refs: list[RowRef]) -> Tensor:
    """The base's normed hidden states on anchor rows, (B, T, D).

    Computed again each time: a row comes about once an update, and its 20 likeliest tokens, which could be
    kept, hold only 70 % of what the base expects of text that it samples at temperature 1 (NOTES.md).
    """
    enable(split.model, False)
    try:
        return split.upper(_padded(data, refs))
    finally:
        enable(split.model, True)


def _padded(data: TrainingRows, refs: list[RowRef]) -> Tensor:
    return pad_hidden([data.rows[ref.kind].row(ref.row) for ref in refs])
