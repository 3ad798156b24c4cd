"""From files of samples to rows: what an update trains on, scores, holds out and rehearses. No torch.

Held out is for ever: the last fifth of each source in every window, and whatever equals it. Texts are
compared with the held-out texts of all windows at hand, readings with those of their own and the new one (a
sensor that repeats its values would have nothing left to learn from otherwise).
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.batches import (
    Row,
    choose_within,
    held_out_indices,
    pack_rows,
    sample_keys,
    split_window,
    take_tokens,
)
from adapters.model_folder import ModelManifest
from adapters.recipe import Recipe
from storage.block import decode_blocks
from storage.samples import Samples

__all__ = ["RowMaker", "StoredWindow", "WindowRows"]

RETENTION_TOKENS = 1024
"""Tokens of a past window's held-out part that the gate scores."""
REHEARSED_WINDOWS = 16
"""At most so many earlier windows are read for rehearsal, a seeded choice."""


@dataclass(frozen=True, slots=True)
class StoredWindow:
    """A window file, decoded, with what makes two of its samples equal."""

    samples: Samples
    keys: list[Hashable]

    def held_keys(self, *, readings: bool) -> set[Hashable]:
        """Keys of the held-out samples."""
        kinds = self.samples.kinds
        return {self.keys[i] for i in held_out_indices(self.samples) if readings or kinds[i] != "reading"}


@dataclass(frozen=True, slots=True)
class WindowRows:
    """The new window as rows; together they hold every sample once."""

    train: list[Row]
    scored_only: list[Row]
    """Beyond the budget, or equal to a held-out sample."""
    held_out: list[Row]
    samples: dict[str, int]
    """Samples by source."""
    skipped: int
    """Samples beyond the budget."""

    @property
    def all(self) -> list[Row]:
        """Rows in the order train, scored only, held out."""
        return self.train + self.scored_only + self.held_out


class RowMaker:
    """Makes rows for one base model.

    Args:
        manifest: Of the prepared model.
        bytes_of: Bytes that each token id decodes to.
        recipe: Row length and token budget.
        seed: The update's.
    """

    def __init__(self, manifest: ModelManifest, bytes_of: Sequence[bytes], recipe: Recipe, seed: int) -> None:
        self.manifest, self.bytes_of, self.recipe, self.seed = manifest, bytes_of, recipe, seed

    def read(self, path: Path) -> StoredWindow:
        """Read a window file, but for the blank samples. Raises: OSError, CorruptBlockError."""
        samples = decode_blocks(path.read_bytes()).present()
        return StoredWindow(samples, sample_keys(samples, self._decode))

    def _decode(self, many: list[list[int]]) -> list[str]:
        return [b"".join(self.bytes_of[i] for i in ids).decode(errors="replace") for ids in many]

    def _pack(self, samples: Samples, indices: Sequence[int]) -> list[Row]:
        return pack_rows(
            samples,
            indices,
            row_tokens=self.recipe.row_tokens,
            bos_id=self.manifest.bos_id,
            separator_id=self.manifest.separator_id,
        )

    def window(self, new: StoredWindow, earlier: Sequence[StoredWindow]) -> WindowRows:
        """Divide the new window into rows.

        Args:
            new: The window to train on.
            earlier: All other windows at hand, whose held-out texts are kept from training.
        """
        held_elsewhere = {key for window in earlier for key in window.held_keys(readings=False)}
        split = split_window(new.samples, new.keys, held_elsewhere)
        chosen = choose_within(new.samples, split.train, self.recipe.max_tokens, f"{self.seed}:budget")
        aside = sorted(set(split.train) - set(chosen))
        counts: dict[str, int] = {}
        for source in new.samples.sources:
            counts[source] = counts.get(source, 0) + 1
        return WindowRows(
            train=self._pack(new.samples, chosen),
            scored_only=self._pack(new.samples, split.left_out) + self._pack(new.samples, aside),
            held_out=self._pack(new.samples, split.held_out),
            samples=counts,
            skipped=len(aside),
        )

    def rehearsal(self, new: StoredWindow, earlier: Sequence[StoredWindow], new_tokens: int) -> list[Row]:
        """Choose rows of earlier windows to train on beside the new ones.

        Args:
            new: The new window: its held-out samples are kept from rehearsal too.
            earlier: Accepted earlier windows.
            new_tokens: Tokens of the new rows in one pass.
        Returns: As many tokens as the recipe's share over all passes asks for, without repeats.
        """
        if not earlier or not self.recipe.rehearsal_share:
            return []
        held = new.held_keys(readings=True)
        held |= {key for window in earlier for key in window.held_keys(readings=False)}
        rows: list[Row] = []
        for window in earlier:
            split = split_window(window.samples, window.keys, held)
            rows += self._pack(window.samples, split.train)
        wanted = self.recipe.passes * new_tokens * self.recipe.rehearsal_share / self.recipe.new_share
        return take_tokens(rows, max(1, round(wanted)), f"{self.seed}:rehearsal") if rows else []

    def choose_windows(self, files: Sequence[str]) -> list[str]:
        """Choose the earlier windows to rehearse, oldest first."""
        if len(files) <= REHEARSED_WINDOWS:
            return list(files)
        picked = random.Random(f"{self.seed}:windows").sample(range(len(files)), REHEARSED_WINDOWS)
        return [files[i] for i in sorted(picked)]

    def retention(self, past: StoredWindow, number: int) -> list[Row]:
        """Held-out rows of an earlier window, the same ones in every update."""
        rows = self._pack(past.samples, held_out_indices(past.samples))
        return take_tokens(rows, RETENTION_TOKENS, f"retention:{number}") if rows else []
