"""What the gate measures of a candidate, each number beside the parent's or the base's over the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from adapters import gate
from adapters.adapter_files import LoraState
from adapters.bench import Bench, anchor_rows
from adapters.frozen import Activations
from adapters.gate import Criterion
from adapters.lora import adapter_parameters, interpolate, module_norms
from adapters.recipe import GateLimits
from adapters.scoring import Score, count_recited, score_rows, total

__all__ = ["MEASURED_ANCHORS", "Examination", "Measured"]

MEASURED_ANCHORS = 32
"""Sequences of the measured half that the gate scores, always the same: their base score is computed once."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Numbers of a candidate at one scale, for the report; None where not reached or not measurable."""

    held_out_after: float | None = None
    anchor_delta: float | None = None


@dataclass(slots=True)
class Examination:
    """Measures a trained candidate at any scale.

    Attributes:
        bench: The model.
        limits: The gate's.
        candidate: Trained weights.
        held_out: Held-out rows of the new window.
        held_out_before: Their score under the parent.
        probes: Recitation probes; may be empty.
        past: Held-out rows of past windows; may be empty.
        tell: Called before each long measurement.
    """

    bench: Bench
    limits: GateLimits
    candidate: LoraState
    held_out: Activations
    held_out_before: Score
    probes: Activations
    past: Sequence[Activations]
    tell: Callable[[str], None]
    measured: dict[float, Measured] = field(default_factory=dict)

    def criteria(self, scale: float) -> Iterator[Criterion]:
        """Measure the candidate at a scale, cheap criteria first, each only when asked for."""
        state = interpolate(self.bench.parent, self.candidate, scale)
        self.measured[scale] = Measured()
        yield from self._is_an_adapter(state)
        if not all(bool(torch.isfinite(weight).all()) for weight in state.values()):
            return  # the forward passes would only measure NaN
        yield self._gain(state, scale)
        yield self._recitation(state)
        yield self._anchors(state, scale)
        yield self._retention(state)

    def _is_an_adapter(self, state: LoraState) -> Iterator[Criterion]:
        wrong = sum(int((~torch.isfinite(weight)).sum()) for weight in state.values())
        yield gate.at_most("finite", float(wrong), 0.0, "numbers in the adapter that are not finite")
        own = adapter_parameters(self.bench.split.model)
        misfits = len(own.keys() ^ state.keys()) + sum(
            own[name].shape != weight.shape or weight.dtype != torch.float32
            for name, weight in state.items()
            if name in own
        )
        yield gate.at_most("shape", float(misfits), 0.0, "tensors of another name, shape, rank or dtype")
        config = self.bench.config
        norms = module_norms(state, config.lora_alpha, config.r).values()
        largest = math.nan if any(math.isnan(norm) for norm in norms) else max(norms)
        rule = "largest Frobenius norm of (alpha / rank) B A over the modules"
        yield gate.at_most("norm", largest, self.limits.max_norm, rule)

    def _gain(self, state: LoraState, scale: float) -> Criterion:
        rule = "held-out bits per byte of the window, fall below the parent's as a share of it"
        before = self.held_out_before
        if not before.bytes:
            return gate.at_least(gate.GAIN, None, self.limits.min_gain, rule + "; no held-out byte")
        losses = self.bench.losses(self.held_out, state)
        after = total(score_rows(self.held_out.rows, losses, self.bench.byte_lengths))
        self.measured[scale] = Measured(held_out_after=_finite(after.bits_per_byte))
        gain = 1 - after.bits_per_byte / before.bits_per_byte if before.bits else math.nan
        return gate.at_least(gate.GAIN, gain, self.limits.min_gain, rule)

    def _recitation(self, state: LoraState) -> Criterion:
        rule = "rare 12-token spans of the window that greedy decoding continues word by word"
        if not self.probes.rows:
            return gate.not_applicable(
                "recitation", rule + "; no span of 12 tokens occurs once behind 16 others"
            )
        recited = count_recited(self.bench.losses(self.probes, state))
        return gate.at_most("recitation", float(recited), float(self.limits.max_recited), rule)

    def _anchors(self, state: LoraState, scale: float) -> Criterion:
        self.tell("anchors")
        rows = anchor_rows(self.bench.anchors.measured_ids[:MEASURED_ANCHORS].tolist())
        stored = self.bench.cached(rows)
        base, own = (total(self.bench.score(stored, each)) for each in (None, state))
        delta = (own.bits - base.bits) / base.tokens if base.tokens else math.nan
        after = self.measured[scale].held_out_after
        self.measured[scale] = Measured(held_out_after=after, anchor_delta=_finite(delta))
        rule = "rise of the measured anchors above the base, bits per token"
        return gate.at_most("anchor_delta", delta, self.limits.max_anchor_delta_bits, rule)

    def _retention(self, state: LoraState) -> Criterion:
        rule = "held-out bits per byte of past windows, rise above the parent's as a share of it"
        if not self.past:
            return gate.not_applicable("retention", rule + "; there is no earlier accepted window")
        before, after = Score(0.0, 0, 0), Score(0.0, 0, 0)
        for stored in self.past:
            self.tell("retention")
            before = total((before, *self.bench.score(stored, self.bench.parent)))
            after = total((after, *self.bench.score(stored, state)))
        rise = after.bits / before.bits - 1 if before.bits and before.bytes else math.nan
        return gate.at_most("retention", rise, self.limits.max_retention_loss, rule)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
