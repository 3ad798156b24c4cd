"""Settings of one update: how it trains (Recipe) and when it may become active (GateLimits).

Light on purpose: configuration, trainer loop and the child that trains import it; only the child has torch.
Numbers start from shared measurements (adapters/NOTES.md); change one only with a measurement beside it.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import msgspec

__all__ = ["FULL_LEARNING_RATE", "LEARNING_RATE", "GateLimits", "Profile", "Recipe", "adapted_blocks"]

Profile = Literal["fast", "full", "tiny"]

LEARNING_RATE: Final = 2e-3
"""Peak rate for rank 16 on the upper blocks of a small model (NOTES.md); 7B and more want 5e-5."""
FULL_LEARNING_RATE: Final = 5e-4
"""Peak rate when every block is adapted."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that decides the bytes of an adapter beside the data, the seed and the base."""

    profile: Profile = "fast"
    """fast: the upper quarter of the blocks; full: every block; tiny: the upper eighth."""
    rank: int = 16
    """LoRA rank; fixed for the life of a data folder."""
    alpha: int = 32
    """LoRA alpha; the update is scaled by alpha / rank."""
    learning_rate: float = 0.0
    """Peak learning rate; 0 takes the profile's."""
    max_steps: int = 100
    """At most so many optimizer steps in one update."""
    step_tokens: int = 1024
    """Tokens of one optimizer step, all three kinds together."""
    row_tokens: int = 256
    """Length of a packed row with its BOS."""
    new_share: float = 0.55
    """Share of a step's tokens that is new data."""
    rehearsal_share: float = 0.25
    """Share that is accepted earlier windows; new data while there is none."""
    anchor_share: float = 0.20
    """Share that is the base's own text, held in place by KL to its cached logits."""
    anchor_weight: float = 4.0
    """Weight of an anchor token's KL beside a data token's cross-entropy."""
    passes: float = 2.0
    """Sweeps over the new tokens, as far as max_steps allows."""
    warmup: float = 0.10
    """Share of the steps in which the learning rate rises linearly."""
    final_lr: float = 0.05
    """Learning rate at the last step as a share of the peak (cosine)."""
    clip: float = 1.0
    """Largest L2 norm of a step's gradient."""
    max_tokens: int = 32_768
    """Token budget of one update; from a window above it a seeded choice, stratified by source, is taken."""

    def peak_rate(self) -> float:
        """Peak learning rate with the profile's default filled in."""
        if self.learning_rate > 0:
            return self.learning_rate
        return FULL_LEARNING_RATE if self.profile == "full" else LEARNING_RATE


class GateLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits that a candidate must keep to become active; whatever cannot be measured has failed."""

    min_gain: float = 0.01
    """Held-out bits per byte must fall below the parent's by at least this share."""
    max_anchor_delta_bits: float = 0.08
    """Largest rise of the measured anchors over the base, bits per token (STABLE, arXiv 2510.16089)."""
    max_retention_loss: float = 0.03
    """Held-out parts of past windows may rise at most by this share above the parent's."""
    max_recited: int = 1
    """At most so many of the 20 rarest spans may be continued word by word."""
    max_norm: float = 100.0
    """Largest Frobenius norm of one module's (alpha / rank) B A."""
    bisections: int = 5
    """Tries with a smaller LoRA scale before a candidate is rejected."""
    min_scale: float = 0.1
    """Smallest scale that bisection tries."""


def adapted_blocks(n_blocks: int, profile: Profile) -> range:
    """Indices of the blocks that a profile adapts: the uppermost ones.

    Args:
        n_blocks: Transformer blocks of the base, >= 1.
        profile: Which share of them, rounded up: fast a quarter, tiny an eighth, full all.
    Returns: A range that ends at n_blocks and is never empty.
    """
    share = {"fast": 4, "tiny": 8, "full": 1}[profile]
    return range(n_blocks - math.ceil(n_blocks / share), n_blocks)
