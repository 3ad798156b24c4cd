"""Triggers: where windows end, as a pure function of the samples, their stream times and the ticks."""

from __future__ import annotations

from collections.abc import Sequence

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
        tokens, arrivals: Tokens and stream time of each sample.
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

    for i, (count, arrival) in enumerate(zip(tokens, arrivals, strict=True)):
        if trigger.aged(window, arrival):
            close(arrival, "age")
        if not window.samples:
            window = OpenWindow(window.window, first_seq + i, 0, 0, arrival)
        window = msgspec.structs.replace(window, samples=window.samples + 1, tokens=window.tokens + count)
        if reason := trigger.full(window):
            close(arrival, reason)
    if tick and trigger.aged(window, tick):
        close(tick, "age")
    if requested and window.samples:
        close(tick or (arrivals[-1] if arrivals else window.first_arrival), "request")
    return window, closed
