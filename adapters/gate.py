"""The gate: whether a candidate may become active. Pure decisions; what cannot be measured has failed.

A criterion is an inequality with its value and limit stored beside it. A candidate that fails one that a
smaller step would mend is tried again at smaller scales between its parent (0) and itself (1), by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec

from adapters.recipe import GateLimits

__all__ = ["Criterion", "Decision", "at_least", "at_most", "decide", "not_applicable"]

Verdict = Literal["passed", "failed", "not_applicable"]

GAIN = "held_out_gain"
MENDABLE = frozenset({GAIN, "anchor_delta", "retention", "recitation", "norm"})
"""Criteria that a smaller step may meet; the others are about being an adapter at all."""


class Criterion(msgspec.Struct, frozen=True):
    """One inequality of the gate, as measured."""

    name: str
    value: float | None
    limit: float | None
    verdict: Verdict
    rule: str


def at_most(name: str, value: float | None, limit: float, rule: str) -> Criterion:
    """Pass when value <= limit; None, NaN and infinity fail."""
    return _judge(name, value, limit, value is not None and value <= limit, rule)


def at_least(name: str, value: float | None, limit: float, rule: str) -> Criterion:
    """Pass when value >= limit; None, NaN and infinity fail."""
    return _judge(name, value, limit, value is not None and value >= limit, rule)


def not_applicable(name: str, rule: str) -> Criterion:
    """A criterion that has nothing to measure, for a reason that the rule states."""
    return Criterion(name, None, None, "not_applicable", rule)


def _judge(name: str, value: float | None, limit: float, kept: bool, rule: str) -> Criterion:
    measured = value is not None and math.isfinite(value)
    # JSON has no NaN: an unmeasured value is stored as null, and failed.
    verdict: Verdict = "passed" if measured and kept else "failed"
    return Criterion(name, value if measured else None, limit, verdict, rule)


@dataclass(frozen=True, slots=True)
class Decision:
    """What the gate decided, and at which scale."""

    promoted: bool
    scale: float
    criteria: list[Criterion]
    reason: str


def decide(evaluate: Callable[[float], Iterator[Criterion]], limits: GateLimits) -> Decision:
    """Judge a candidate, at smaller scales if that may help.

    Args:
        evaluate: Measures a candidate at a scale, cheap criteria first. An exception in it is a failure.
        limits: Number of bisections and the smallest scale.
    Returns: The largest scale found to pass; else a rejection with the criteria at scale 1.
    """
    full = list(_guarded(evaluate, 1.0))
    failed = [c.name for c in full if c.verdict == "failed"]
    if not failed and full:
        return Decision(True, 1.0, full, "")
    reason = ", ".join(_words(c) for c in full if c.verdict == "failed") or "no criterion was measured"
    if not full or not MENDABLE.issuperset(failed):
        return Decision(False, 1.0, full, reason)
    return _bisect(evaluate, limits, full, GAIN in failed) or Decision(False, 1.0, full, reason)


def _bisect(
    evaluate: Callable[[float], Iterator[Criterion]], limits: GateLimits, full: list[Criterion], too_far: bool
) -> Decision | None:
    low, high, best = limits.min_scale, 1.0, None
    for _ in range(limits.bisections):
        scale = (low + high) / 2
        criteria: list[Criterion] = []
        for criterion in _guarded(evaluate, scale):
            criteria.append(criterion)
            if criterion.verdict == "failed":
                break
        failed = [c.name for c in criteria if c.verdict == "failed"]
        if criteria and not failed:
            reason = "scaled down: " + ", ".join(_words(c) for c in full if c.verdict == "failed")
            best, low = Decision(True, scale, criteria, reason), scale
        elif failed == [GAIN] and not too_far:
            low = scale  # too little is left of it, for the full step did gain
        else:
            high = scale
    return best


def _guarded(evaluate: Callable[[float], Iterator[Criterion]], scale: float) -> Iterator[Criterion]:
    try:
        yield from evaluate(scale)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        yield Criterion("measurement", None, None, "failed", f"raised {type(error).__name__}: {error}")


def _words(criterion: Criterion) -> str:
    value = "not measured" if criterion.value is None else f"{criterion.value:.4g}"
    limit = "" if criterion.limit is None else f", limit {criterion.limit:.4g}"
    return f"{criterion.name} {value}{limit}"
