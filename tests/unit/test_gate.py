"""The gate's verdicts and its search for a smaller step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest

from adapters.gate import GAIN, Criterion, at_least, at_most, decide, not_applicable
from adapters.recipe import GateLimits

LIMITS = GateLimits()
OfScale = Callable[[float], float]
Evaluate = Callable[[float], Iterator[Criterion]]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("judge", [at_most, at_least])
def test_what_cannot_be_measured_has_failed(judge, value):
    """Fail closed, and JSON can hold the value."""
    criterion = judge("x", value, 0.5, "rule")
    assert (criterion.verdict, criterion.value) == ("failed", None)


def test_a_value_at_its_limit_passes():
    """Limits are inclusive."""
    assert at_most("x", 0.08, 0.08, "r").verdict == at_least("x", 0.01, 0.01, "r").verdict == "passed"
    assert at_most("x", 0.081, 0.08, "r").verdict == at_least("x", 0.009, 0.01, "r").verdict == "failed"


def measures(gain: OfScale, drift: OfScale, seen: list[float] | None = None) -> Evaluate:
    """A candidate whose gain and drift are functions of its scale."""

    def evaluate(scale: float) -> Iterator[Criterion]:
        if seen is not None:
            seen.append(scale)
        yield at_least(GAIN, gain(scale), LIMITS.min_gain, "gain")
        yield at_most("anchor_delta", drift(scale), LIMITS.max_anchor_delta_bits, "drift")

    return evaluate


def test_a_good_candidate_is_promoted_as_it_is():
    """One look is enough."""
    seen: list[float] = []
    decision = decide(measures(lambda s: 0.2 * s, lambda s: 0.05 * s, seen), LIMITS)
    assert (decision.promoted, decision.scale, decision.reason, seen) == (True, 1.0, "", [1.0])


def test_one_that_drifts_is_scaled_down_to_the_largest_step_that_passes():
    """Five bisections of 0.1 to 1 end within 3 % of the limit, below it."""
    seen: list[float] = []
    decision = decide(measures(lambda s: 0.2 * s, lambda s: 0.16 * s, seen), LIMITS)
    assert decision.promoted
    assert 0.5 - 0.9 / 2**5 <= decision.scale <= 0.5
    assert len(seen) == 1 + LIMITS.bisections
    assert "anchor_delta 0.16, limit 0.08" in decision.reason
    assert all(c.verdict == "passed" for c in decision.criteria)


def test_one_that_would_pass_only_with_nothing_left_is_rejected():
    """Never below the smallest scale; the criteria of the full step say why."""
    seen: list[float] = []
    decision = decide(measures(lambda s: 0.2 * s, lambda s: 2.0 * s, seen), LIMITS)
    assert not decision.promoted
    assert min(seen) > LIMITS.min_scale
    assert [c.name for c in decision.criteria if c.verdict == "failed"] == ["anchor_delta"]


def test_the_search_goes_up_again_when_too_little_is_left_of_the_gain():
    """Drift asks for less than 0.8, gain for more than 0.7."""
    decision = decide(measures(lambda s: 0.01 * s / 0.7, lambda s: 0.08 * s / 0.8), LIMITS)
    assert decision.promoted
    assert 0.7 <= decision.scale <= 0.8


def test_a_step_that_overshoots_may_gain_when_smaller():
    """A gain that failed at full scale is sought below it."""
    decision = decide(measures(lambda s: 0.3 * s - 0.4 * s**2, lambda s: 0.0), LIMITS)
    assert decision.promoted
    assert decision.scale < 0.75


def test_what_scaling_cannot_mend_is_not_tried_smaller():
    """A NaN stays one."""
    seen: list[float] = []

    def evaluate(scale):
        seen.append(scale)
        yield at_most("finite", 3.0, 0.0, "not finite")

    assert not decide(evaluate, LIMITS).promoted
    assert seen == [1.0]


def test_an_error_while_measuring_fails():
    """And is told in the reason."""

    def evaluate(scale):
        yield at_least(GAIN, 0.5, 0.01, "gain")
        raise RuntimeError("no such kernel")

    decision = decide(evaluate, LIMITS)
    assert not decision.promoted
    assert decision.criteria[-1] == Criterion(
        "measurement", None, None, "failed", "raised RuntimeError: no such kernel"
    )


def test_no_criterion_at_all_fails():
    """Silence is no consent."""
    decision = decide(lambda scale: iter(()), LIMITS)
    assert (decision.promoted, decision.reason) == (False, "no criterion was measured")


def test_a_criterion_that_does_not_apply_stands_in_nobodys_way():
    """The first window has no past to forget."""

    def evaluate(scale):
        yield at_least(GAIN, 0.5, 0.01, "gain")
        yield not_applicable("retention", "there is no earlier accepted window")

    assert decide(evaluate, LIMITS).promoted
