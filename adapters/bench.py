"""The opened base model with one adapter slot, and the scores that an update takes on it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.adapter_files import AdapterConfig, LoraState, read_adapter
from adapters.anchors import Anchors, read_anchors
from adapters.base_model import load_model
from adapters.batches import SCORED, TRAINED, Row
from adapters.derived import DerivedCache
from adapters.frozen import Activations, SplitModel
from adapters.host import compute_dtype, host_class
from adapters.lora import adapter_config, attach, enable, set_state
from adapters.model_folder import ANCHORS_FILE, ModelManifest, load_manifest
from adapters.scoring import BATCH_TOKENS, RowLosses, Score, padded_token_bytes, row_losses, score_rows
from adapters.update import UpdateTask

__all__ = ["Bench", "anchor_rows", "open_bench", "state_digest"]


def state_digest(state: LoraState | None) -> str:
    """Digest of an adapter's weights; "" for the base."""
    if state is None:
        return ""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].numpy().tobytes())
    return digest.hexdigest()


def anchor_rows(ids: Sequence[Sequence[int]]) -> list[Row]:
    """Anchor sequences as rows: every token but the first counts."""
    return [Row(array("I", row), b"\0" + bytes([SCORED | TRAINED]) * (len(row) - 1), "anchor") for row in ids]


@dataclass(frozen=True, slots=True)
class Bench:
    """A base with an adapter slot.

    Attributes:
        parent: The parent's weights; None is the base.
        beat: Called after each batch of a long forward sweep.
    """

    manifest: ModelManifest
    bytes_of: list[bytes]
    byte_lengths: list[int]
    split: SplitModel
    config: AdapterConfig
    anchors: Anchors
    cache: DerivedCache
    parent: LoraState | None
    beat: Callable[[], None]

    def use(self, state: LoraState | None) -> None:
        """Put an adapter into the slot; None is the base."""
        if state is not None:
            set_state(self.split.model, state)
        enable(self.split.model, state is not None)

    def activate(self, rows: Sequence[Row]) -> Activations:
        """Run the lower blocks over rows."""
        return Activations.compute(self.split, rows, beat=self.beat)

    def cached(self, rows: Sequence[Row]) -> Activations:
        """Lower activations of rows that later updates need again."""
        return self.cache.activations(rows, self.activate)

    def losses(self, stored: Activations, state: LoraState | None) -> list[RowLosses]:
        """Losses of rows under an adapter."""
        self.use(state)
        return row_losses(self.split, stored, beat=self.beat)

    def score(self, stored: Activations, state: LoraState | None) -> list[Score]:
        """Scores of rows under an adapter, kept for the next update: its parent is this one's outcome."""

        def compute() -> list[Score]:
            return score_rows(stored.rows, self.losses(stored, state), self.byte_lengths)

        return self.cache.scores(stored.rows, state_digest(state), compute)


def open_bench(task: UpdateTask, beat: Callable[[], None] = lambda: None) -> Bench:
    """Load the base and the parent. Raises: BaseModelError, AdapterError, UnsupportedModelError."""
    folder = Path(task.model_dir)
    manifest = load_manifest(folder)
    model = load_model(folder, compute_dtype())
    config = adapter_config(model, task.recipe)
    attach(model, config)
    enable(model, False)
    split = SplitModel(model, config.layers_to_transform[0])
    parent = read_adapter(Path(task.parent_dir), config) if task.parent_dir else None
    if parent is not None:
        set_state(model, parent)  # refuses foreign names and shapes before anything is spent
    bytes_of = padded_token_bytes(folder, manifest)
    key = f"{manifest.base_sha256} {split.split} {host_class()} {BATCH_TOKENS} {config.lora_alpha / config.r}"
    return Bench(
        manifest,
        bytes_of,
        [len(piece) for piece in bytes_of],
        split,
        config,
        read_anchors(folder / ANCHORS_FILE),
        DerivedCache(Path(task.cache_dir), key),
        parent,
        beat,
    )
