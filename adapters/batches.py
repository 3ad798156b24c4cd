"""Rows, the held-out split and the order of steps: pure functions of samples, settings and a seed. No torch.

A row is what the model sees at once: BOS, then the samples of one source in order, a separator after each, so
that a reading sees the readings before it. Attention never leaves the row. Every token has two bits:

| token | SCORED | TRAINED |
|---|---|---|
| of a sample, mask 1 | yes | yes |
| of a sample, mask 0 (a user's turn, a chat prefix) | | |
| separator | | yes: without it no generated line would end |
| BOS | | |

Bits per byte count SCORED tokens only, so a model that has merely learnt our line ends gains nothing.
"""

from __future__ import annotations

import math
import random
import re
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from adapters.recipe import Recipe
from storage.samples import Samples

__all__ = [
    "HELD_OUT_FIFTHS",
    "SCORED",
    "TRAINED",
    "Row",
    "RowRef",
    "Split",
    "choose_within",
    "deal_steps",
    "held_out_indices",
    "normal_form",
    "pack_rows",
    "sample_keys",
    "split_window",
    "take_tokens",
]

SCORED, TRAINED = 1, 2
HELD_OUT_FIFTHS = 5
_ROWS_OF_THEIR_OWN = ("exchange", "feedback")
_NO_WORD = re.compile(r"[\W_]+")


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of at most `row_tokens` tokens and what each of them counts for."""

    ids: array[int]  # (T,)
    weights: bytes  # (T,) bits SCORED and TRAINED
    source: str

    def __len__(self) -> int:
        return len(self.ids)


class RowRef(NamedTuple):
    """A row of a step: which kind of rows, and which among them."""

    kind: str  # "new" | "rehearsal" | "anchor"
    row: int


@dataclass(frozen=True, slots=True)
class Split:
    """What becomes of each sample of a window, by index; the three lists are disjoint and cover it."""

    train: list[int]
    held_out: list[int]
    left_out: list[int]
    """Equal to a held-out sample: scored, never trained on."""


def held_out_indices(samples: Samples) -> list[int]:
    """Indices of the last fifth of each source's samples, in order; of fewer than five samples none."""
    by_source = _by_source(samples, range(len(samples)))
    last = [indices[len(indices) - len(indices) // HELD_OUT_FIFTHS :] for indices in by_source.values()]
    return sorted(i for indices in last for i in indices)


def normal_form(text: str) -> str:
    """Fold case and collapse whitespace and punctuation, so that near duplicates become equal."""
    return _NO_WORD.sub(" ", text.casefold()).strip()


def sample_keys(samples: Samples, decode: Callable[[list[list[int]]], list[str]]) -> list[Hashable]:
    """What must be equal for two samples to count as the same.

    Args:
        samples: The samples.
        decode: Token ids of many samples to their texts.
    Returns: One key a sample: the ids of a reading (a digit matters there), the normal form of other text.
    """
    offsets = samples.offsets()
    ids = [samples.ids[a:b].tolist() for a, b in pairwise(offsets)]
    worded = [i for i, kind in enumerate(samples.kinds) if kind != "reading"]
    texts = dict(zip(worded, decode([ids[i] for i in worded]), strict=True))
    return [
        (samples.sources[i], tuple(ids[i])) if kind == "reading" else normal_form(texts[i])
        for i, kind in enumerate(samples.kinds)
    ]


def split_window(samples: Samples, keys: Sequence[Hashable], held_elsewhere: set[Hashable]) -> Split:
    """Divide a window into samples to train on, held-out ones and near duplicates of held-out ones.

    Args:
        samples: The window.
        keys: Their keys (`sample_keys`).
        held_elsewhere: Keys of samples that other windows hold out.
    """
    held = set(held_out_indices(samples))
    forbidden = {keys[i] for i in held} | held_elsewhere
    rest = [i for i in range(len(samples)) if i not in held]
    return Split(
        train=[i for i in rest if keys[i] not in forbidden],
        held_out=sorted(held),
        left_out=[i for i in rest if keys[i] in forbidden],
    )


def choose_within(samples: Samples, indices: Sequence[int], max_tokens: int, seed: str) -> list[int]:
    """Choose samples up to a token budget, each source in proportion to its tokens.

    Args:
        samples: The window.
        indices: Candidates, ascending.
        max_tokens: Budget in tokens; a source may pass its part of it by less than one sample.
        seed: Decides the choice.
    Returns: Chosen indices, ascending; all of them if they fit.
    """
    total = sum(samples.lengths[i] for i in indices)
    if total <= max_tokens:
        return list(indices)
    chosen: list[int] = []
    for source, members in sorted(_by_source(samples, indices).items()):
        random.Random(f"{seed}:{source}").shuffle(members)
        share = max_tokens * sum(samples.lengths[i] for i in members) / total
        taken = 0
        for i in members:
            if taken >= share:
                break
            chosen.append(i)
            taken += samples.lengths[i]
    return sorted(chosen)


def pack_rows(
    samples: Samples, indices: Iterable[int], *, row_tokens: int, bos_id: int, separator_id: int
) -> list[Row]:
    """Pack samples into rows: one source a row, in order, nothing lost.

    A sample that does not fit into what is left of a row starts the next one. One longer than a row is cut
    into rows that each start with BOS. An exchange has a row of its own and no BOS: it is a whole chat form.

    Args:
        samples: The window.
        indices: Samples to pack, ascending.
        row_tokens: Longest row, >= 2.
        bos_id, separator_id: Ids of BOS and of the newline between samples.
    Returns: Rows by source in order of first appearance; rows without a token that counts are left away.
    """
    offsets = samples.offsets()
    rows: list[Row] = []
    for source, members in _by_source(samples, indices).items():
        packer = _Packer(source, row_tokens, bos_id, separator_id)
        for i in members:
            a, b = offsets[i], offsets[i + 1]
            if samples.kinds[i] in _ROWS_OF_THEIR_OWN:
                packer.add_alone(samples.ids[a:b], samples.mask[a:b])
            elif b > a:
                packer.add(samples.ids[a:b], samples.mask[a:b])
        rows += packer.finish()
    return [row for row in rows if any(row.weights[1:])]


class _Packer:
    """Fills rows of one source."""

    def __init__(self, source: str, row_tokens: int, bos_id: int, separator_id: int) -> None:
        if row_tokens < 2:
            raise ValueError("a row holds BOS and at least one token: set update.row_tokens to 2 or more")
        self.source, self.row_tokens = source, row_tokens
        self.bos_id, self.separator_id = bos_id, separator_id
        self.rows: list[Row] = []
        self.alone: list[Row] = []
        self._start()

    def _start(self) -> None:
        self.ids, self.weights = array("I", [self.bos_id]), bytearray(1)

    def _close(self) -> None:
        if len(self.ids) > 1:
            self.rows.append(Row(self.ids, bytes(self.weights), self.source))
        self._start()

    def add(self, ids: array[int], mask: bytearray) -> None:
        """Append one sample, and the separator where there is room for it."""
        if len(self.ids) + len(ids) > self.row_tokens:
            self._close()
        room = self.row_tokens - 1
        while len(ids) > room:
            self._append(ids[:room], mask[:room])
            self._close()
            ids, mask = ids[room:], mask[room:]
        self._append(ids, mask)
        if len(self.ids) < self.row_tokens:
            self.ids.append(self.separator_id)
            self.weights.append(TRAINED)

    def add_alone(self, ids: array[int], mask: bytearray) -> None:
        """Give one sample rows of its own; only a continuation starts with BOS."""
        self.alone.append(Row(ids[: self.row_tokens], _weights(mask[: self.row_tokens]), self.source))
        room = self.row_tokens - 1
        for start in range(self.row_tokens, len(ids), room):
            part = array("I", [self.bos_id]) + ids[start : start + room]
            self.alone.append(Row(part, b"\0" + _weights(mask[start : start + room]), self.source))

    def _append(self, ids: array[int], mask: bytearray) -> None:
        self.ids += ids
        self.weights += _weights(mask)

    def finish(self) -> list[Row]:
        """All rows of the source."""
        self._close()
        return self.rows + self.alone


def _weights(mask: bytearray) -> bytes:
    return bytes(SCORED | TRAINED if bit else 0 for bit in mask)


def _by_source(samples: Samples, indices: Iterable[int]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i in indices:
        groups.setdefault(samples.sources[i], []).append(i)
    return groups


def take_tokens(rows: Sequence[Row], max_tokens: int, seed: str) -> list[Row]:
    """Take a seeded choice of whole rows, together at most `max_tokens` but at least one, in order."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    taken: list[int] = []
    total = 0
    for i in order:
        if not taken or total + len(rows[i]) <= max_tokens:
            taken.append(i)
            total += len(rows[i])
    return [rows[i] for i in sorted(taken)]


def deal_steps(lengths: dict[str, list[int]], recipe: Recipe, seed: int) -> list[list[RowRef]]:
    """Deal rows to optimizer steps; the whole order of training follows from the arguments.

    Each kind is swept in a new random order a pass. A kind takes its next row when that brings its total
    nearer to its share, so shares hold over a few steps though rows are whole.

    Args:
        lengths: Tokens of each row, by kind; "new" must not be empty, the others may be.
        recipe: Shares, tokens a step, passes and the step limit.
        seed: Decides the orders.
    Returns: For each step its rows, at least one; enough steps for `recipe.passes` over the new tokens.
    """
    if not lengths.get("new"):
        raise ValueError("no new row to train on: a window needs a sample beside its held-out fifth")
    shares = _shares(lengths, recipe)
    new_tokens = recipe.passes * sum(lengths["new"])
    n_steps = max(1, min(recipe.max_steps, math.ceil(new_tokens / (shares["new"] * recipe.step_tokens))))
    dealers = {kind: _Dealer(lengths[kind], f"{seed}:{kind}") for kind in shares}
    steps = []
    for number in range(1, n_steps + 1):
        # The last step ends with the passes: a small window is not swept again to fill it.
        tokens = min(number * recipe.step_tokens, new_tokens / shares["new"])
        step = [
            RowRef(kind, index)
            for kind, share in shares.items()
            for index in dealers[kind].up_to(share * tokens)
        ]
        steps.append(step or [RowRef("new", dealers["new"].next_row())])
    return steps


def _shares(lengths: dict[str, list[int]], recipe: Recipe) -> dict[str, float]:
    shares = {"new": recipe.new_share, "rehearsal": recipe.rehearsal_share, "anchor": recipe.anchor_share}
    if not lengths.get("rehearsal"):
        shares["new"] += shares.pop("rehearsal")
    if not lengths.get("anchor"):
        shares["new"] += shares.pop("anchor")
    return {kind: share for kind, share in shares.items() if share > 0}


class _Dealer:
    """Endless seeded sweeps over the rows of one kind."""

    def __init__(self, lengths: list[int], seed: str) -> None:
        self.lengths, self.random = lengths, random.Random(seed)
        self.order: list[int] = []
        self.dealt_tokens = 0

    def peek(self) -> int:
        """Index of the row that comes next."""
        if not self.order:
            self.order = list(range(len(self.lengths)))
            self.random.shuffle(self.order)
        return self.order[-1]

    def next_row(self) -> int:
        """Deal one row."""
        index = self.peek()
        self.order.pop()
        self.dealt_tokens += self.lengths[index]
        return index

    def up_to(self, tokens: float) -> Iterator[int]:
        """Deal rows while each brings the total nearer to `tokens`."""
        while self.dealt_tokens + self.lengths[self.peek()] / 2 <= tokens:
            yield self.next_row()
