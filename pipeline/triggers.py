"""Triggers: where windows end, as a pure function of the samples, their stream times and the ticks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

import msgspec

from storage.windows import ClosedWindow, OpenWindow

__all__ = ["MIN_AGED_SAMPLES", "ThresholdTrigger", "Trigger", "walk"]

MIN_AGED_SAMPLES = 32  # a window closed by age alone must hold enough to learn from and to hold out


class ThresholdTrigger(msgspec.Struct, frozen=True):
    """Close by count, by tokens or by age, whichever comes first.

    Attributes:
        min_samples: Close right after this many samples.
        min_tokens: Close right after this many tokens.
        max_age_s: Close before the first sample or tick this long after the window's first; 0 never.
    """

    min_samples: int
    min_tokens: int
    max_age_s: float = 0.0

    def full(self, window: OpenWindow) -> str:
        """Why a window that just took a sample closes, "" if it stays open."""
        if window.samples >= self.min_samples:
            return "samples"
        return "tokens" if window.tokens >= self.min_tokens else ""

    def aged(self, window: OpenWindow, now: float) -> bool:
        """Whether the window closes before a sample or tick at stream time `now`."""
        return (
            self.max_age_s > 0
            and window.samples >= MIN_AGED_SAMPLES
            and now - window.first_arrival >= self.max_age_s
        )


Trigger = ThresholdTrigger


def walk(
    trigger: Trigger,
    window: OpenWindow,
    first_seq: int,
    tokens: Sequence[int],
    arrivals: Sequence[float],
    *,
    tick: float = 0.0,
    requested: bool = False,
) -> tuple[OpenWindow, list[ClosedWindow]]:
    """Walk samples one by one and close windows where the trigger says, then look once at the tick.

    Args:
        trigger: When windows close.
        window: The open window before the first sample.
        first_seq: Seq of the first sample.
        tokens, arrivals: Tokens and stream time of each sample; stream time never goes back.
        tick: Stream time of a tick after them, 0 for none.
        requested: Whether a person asked for the window to close now.
    Returns: The open window after them, and the windows closed, in order. Equal for equal sequences,
        however they are cut into calls.
    """
    closed: list[ClosedWindow] = []

    def close(at: float, reason: str) -> None:
        nonlocal window
        last = window.first_seq + window.samples - 1
        closed.append(
            ClosedWindow(window.window, window.first_seq, last, window.samples, window.tokens, at, reason)
        )
        window = OpenWindow(window.window + 1, last + 1)

    # totals[k] is the sum of the first k: how far a window reaches is looked up, not counted one by one.
    n, i = len(tokens), 0
    totals = [0, *accumulate(tokens)]
    while i < n:
        if trigger.aged(window, arrivals[i]):
            close(arrivals[i], "age")
        if not window.samples:
            window = OpenWindow(window.window, first_seq + i, 0, 0, arrivals[i])
        before = totals[i] - window.tokens
        end = min(i + max(1, trigger.min_samples - window.samples), n)  # it holds this many samples, or
        end = min(bisect_left(totals, before + trigger.min_tokens, i + 1, end), end)  # this many tokens
        if trigger.max_age_s > 0:
            end = _first_aged(trigger, window, arrivals, i, end)
        window = OpenWindow(
            window.window, window.first_seq, window.samples + end - i, totals[end] - before,
            window.first_arrival,
        )  # fmt: skip
        i = end
        if reason := trigger.full(window):
            close(arrivals[i - 1], reason)
    if tick and trigger.aged(window, tick):
        close(tick, "age")
    if requested and window.samples:
        close(tick or (arrivals[-1] if arrivals else window.first_arrival), "request")
    return window, closed


def _first_aged(
    trigger: Trigger, window: OpenWindow, arrivals: Sequence[float], joined: int, end: int
) -> int:
    """The first sample after `joined`, and before `end`, that the window closes before; `end` if none."""
    start = joined + max(1, MIN_AGED_SAMPLES - window.samples)
    if start >= end:
        return end

    def aged(arrival: float) -> bool:
        return arrival - window.first_arrival >= trigger.max_age_s

    return bisect_left(arrivals, True, start, end, key=aged)
