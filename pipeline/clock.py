"""Stream time: what the arrivals' clock says, less what only its being moved explains.

A gateway's clock is set by NTP, by hand or by nobody, and a board without a battery starts in 1970. Windows,
ages and eviction follow stream time, so no single step of the clock may close a window or evict by age, and
a clock that is put right again must not leave stream time standing. `follow` decides that for one arrival
after the other, from nothing but the arrivals, so that a replay decides the same and batches do not matter.

An arrival *fits* when it lies less than 60 s behind stream time and at most 24 h ahead of it. Rules in
order, the first that holds; `pending` and `behind` are those of ClockState:

| the arrival | stream time | state after |
|---|---|---|
| is 0: an event without a time | stands | unchanged |
| is the first | is it | no offset |
| fits as it is: the clock is right (again) | goes to it, never back | no offset |
| with the offset, lies 60 s or more behind | stands | `behind` is the first of these arrivals, counted |
| ... and these were 32, over 60 s, with none between that fits | goes on as if it had not stood | an offset |
| with the offset, lies more than 24 h ahead | stands | an offset that makes it now, `pending` |
| ... and so did the one before: a sparse stream | goes to the one before | as above, for this one |
| with the offset, fits | goes on with it | unchanged |
| ... and those since `pending` cover 24 h | goes to the arrival: a leap | no offset |

Why these numbers. 60 s: threads, devices and files hand lines over in slightly the wrong order, and NTP
slews or steps by seconds; to stand for so long costs an age nothing. The same 60 s, and 32 arrivals, before a
lower clock is believed: sources whose clocks differ must take no turns in pushing stream time forward, and
while the one that is ahead speaks at least so often, it leads. 24 h: a box that was off for a night comes
back at once. A longer gap cannot be told from a clock set wrong, so it counts when it proved to last.

Where events bring their own time (plain lines that are replayed) those behind are late, and no clock was set
back: the two rows of `behind` are left out.

A sparse stream, each event days after the one before, is then stamped one event late and no more: an
event after a gap shows that the one before was no slip. Gaps of years are only believed after 24 h with an
event in each, because a clock that is wrong by years (1970, 2038, the 1,024 weeks of GPS) may well step
twice. A live stream is never sparse: it ticks once a second.
"""

from __future__ import annotations

from collections.abc import Iterable

from storage.windows import ClockState

__all__ = ["BEHIND_COUNT", "HOLD_S", "LEAP_S", "LONGEST_GAP_S", "follow"]

HOLD_S = 60.0
BEHIND_COUNT = 32
LEAP_S = 86_400.0
LONGEST_GAP_S = 366 * 86_400.0
_RIGHT = ClockState()


def follow(
    stream_time: float, clock: ClockState, arrivals: Iterable[float], *, events_own: bool = False
) -> tuple[list[float], ClockState]:
    """Turn arrivals into stream times; equal for equal sequences, however they are cut into calls.

    Args:
        stream_time: That before them, seconds; 0 where nothing ever arrived.
        clock: The state before them.
        arrivals: Seconds since 1970, in the order in which they came.
        events_own: Whether these are times that events brought along. Then those behind are late events,
            however many, and no clock that was set back: they leave stream time where it is.
    Returns: The stream time of each, never decreasing, and the state after them.
    """
    arrivals = [*arrivals]
    if clock is _RIGHT and arrivals and _runs_on(stream_time, arrivals):  # nearly always
        return arrivals, clock
    times: list[float] = []
    for arrival in arrivals:
        stream_time, clock = _step(stream_time, clock, arrival, events_own)
        times.append(stream_time)
    return times, clock


def _runs_on(now: float, arrivals: list[float]) -> bool:
    """Whether each arrival fits, and none lies behind the one before it."""
    return now <= arrivals[0] and arrivals[-1] - now <= LEAP_S and arrivals == sorted(arrivals)


def _step(now: float, clock: ClockState, arrival: float, events_own: bool) -> tuple[float, ClockState]:
    """Take one arrival: the table of this module, row by row."""
    if not arrival:
        return now, clock
    if not now:
        return max(arrival, 0.0), _RIGHT
    if -HOLD_S < arrival - now <= LEAP_S:
        return max(now, arrival), _RIGHT
    step = arrival + clock.offset - now
    if step <= -HOLD_S:
        if events_own:
            return now, clock
        return _step_behind(now, clock, arrival)
    if step > LEAP_S:
        return _step_ahead(now, clock, arrival)
    pending = clock.pending
    if pending and clock.behind_count:
        pending = arrival  # another clock spoke in between: the 24 h begin anew
    if pending and arrival - pending >= LEAP_S:
        return max(now, arrival), _RIGHT
    return max(now, now + step), ClockState(clock.offset, pending)


def _step_behind(now: float, clock: ClockState, arrival: float) -> tuple[float, ClockState]:
    lasted, count = arrival - clock.behind, clock.behind_count + 1
    if count == 1 or not -HOLD_S < lasted <= LEAP_S:  # none before, or that was another clock
        return now, ClockState(clock.offset, clock.pending, arrival, 1)
    if lasted < HOLD_S or count < BEHIND_COUNT:
        return now, ClockState(clock.offset, clock.pending, clock.behind, count)
    return now + lasted, ClockState(now - clock.behind)


def _step_ahead(now: float, clock: ClockState, arrival: float) -> tuple[float, ClockState]:
    if clock.pending and -clock.offset <= LONGEST_GAP_S:
        now -= clock.offset  # to the arrival before
    offset = now - arrival
    # Where stream time is ahead of this clock even so, there is nothing to make up for later.
    return now, ClockState(offset, arrival if offset < 0 else 0.0)
