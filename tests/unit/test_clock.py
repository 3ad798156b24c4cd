"""Stream time: no step of a clock closes, evicts or freezes anything, whatever steps it takes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.clock import HOLD_S, LEAP_S, follow
from pipeline.decode import decode
from pipeline.demo import demo_lines
from pipeline.events import Batch, Line, Origin
from storage.windows import ClockState

NOW = 1_900_000_000.0
DAY, YEAR = 86_400.0, 366 * 86_400.0
RIGHT = ClockState()


def times(arrivals: Sequence[float]) -> list[float]:
    """Stream times of arrivals from the very first on."""
    return follow(0.0, RIGHT, arrivals)[0]


def every(step: float, count: int, start: float) -> list[float]:
    """Arrivals of an even stream."""
    return [start + n * step for n in range(count)]


def longest_step(found: Sequence[float]) -> float:
    return max(after - before for before, after in itertools.pairwise(found))


def test_a_clock_that_is_right_is_stream_time() -> None:
    arrivals = every(1.0, 500, NOW) + every(3_600.0, 100, NOW + 4_000) + every(DAY, 10, NOW + 400_000)
    assert follow(0.0, RIGHT, arrivals) == (arrivals, RIGHT)


def test_slightly_out_of_order_arrivals_hold_it() -> None:
    assert times([NOW, NOW - 59, NOW + 1, NOW - 30, NOW + 2]) == [NOW, NOW, NOW + 1, NOW + 1, NOW + 2]


def test_an_arrival_without_a_time_leaves_it() -> None:
    """Plain lines without `ts` arrive at 0: they are no clock in 1970."""
    assert times([0.0, NOW, *[0.0] * 500, NOW + 1]) == [0.0, *[NOW] * 501, NOW + 1]


@pytest.mark.parametrize("back", [200.0, 3_600.0, NOW - 10.0], ids=["minutes", "an hour", "to 1970"])
def test_stream_time_goes_on_after_a_step_back(back: float) -> None:
    """It stands for a minute, and then makes up for it."""
    found = times(every(1.0, 100, NOW) + every(1.0, 200, NOW + 100 - back))
    assert found[-1] - found[0] == pytest.approx(298.0)
    assert found[100:160] == [NOW + 99] * 60
    assert longest_step(found[161:]) == pytest.approx(1.0)
    assert longest_step(found) == pytest.approx(HOLD_S)


def test_a_clock_that_stepped_back_and_is_put_right_is_stream_time_again() -> None:
    wrong = every(1.0, 1_000, NOW - 3_600)
    found, clock = follow(0.0, RIGHT, [*every(1.0, 100, NOW - 100), *wrong, *every(1.0, 100, NOW + 1_000)])
    assert found[-100:] == every(1.0, 100, NOW + 1_000)
    assert longest_step(found) <= HOLD_S
    assert clock == RIGHT


def test_ten_years_forward_and_back_again_is_as_if_nothing_had_been() -> None:
    away = every(1.0, 3_000, NOW + 10 * YEAR)
    found, clock = follow(0.0, RIGHT, [*every(1.0, 100, NOW), *away, *every(1.0, 100, NOW + 3_100)])
    assert found[-100:] == every(1.0, 100, NOW + 3_100)
    assert found[99:102] == [NOW + 99, NOW + 99, NOW + 100]
    assert clock == RIGHT


def test_ten_years_forward_for_good_count_after_a_day() -> None:
    """Until then stream time goes on as before the step."""
    found, clock = follow(0.0, RIGHT, every(60.0, 10, NOW) + every(60.0, 1_500, NOW + 10 * YEAR))
    leap = next(n for n, time in enumerate(found) if time > NOW + YEAR)
    assert leap == 10 + DAY / 60
    assert longest_step(found[:leap]) == pytest.approx(60.0)
    assert found[leap:] == every(60.0, 1_500, NOW + 10 * YEAR)[leap - 10 :]
    assert clock == RIGHT


def test_another_clock_in_between_begins_the_day_anew() -> None:
    """Half the arrivals say so, half say otherwise: nothing is proved."""
    mixed = [at for n in range(3_000) for at in (NOW + n * 60, NOW + 10 * YEAR + n * 60)]
    assert max(times(mixed)) == NOW + 2_999 * 60


def test_a_board_that_starts_in_1970_and_is_set_by_the_network() -> None:
    """With a ring from before it goes on from there; with none, its first day counts from 1970."""
    boot = [*every(1.0, 20, 5.0), *every(1.0, 20, NOW + 25.0)]
    found, clock = follow(NOW, RIGHT, boot)
    assert found == [NOW] * 20 + every(1.0, 20, NOW + 25.0)
    assert clock == RIGHT
    assert longest_step(times(boot)) == 1.0


def test_a_box_that_was_off_for_days_counts_them_after_a_day() -> None:
    found = times(every(600.0, 10, NOW) + every(600.0, 200, NOW + 5 * DAY))
    assert found[10] == found[9]
    assert found[-1] == NOW + 5 * DAY + 199 * 600
    assert longest_step(found[:153]) <= 600.0


def test_late_events_that_bring_their_own_time_are_no_clock_that_was_set_back() -> None:
    """An hour late, in any number: stream time is the latest time that came."""
    rng = random.Random(18)
    times = sorted((NOW + 10.0 * n for n in range(1_000)), key=lambda at: at + rng.uniform(0, 3_600))
    found, clock = follow(0.0, RIGHT, times, events_own=True)
    assert (found, clock) == (list(itertools.accumulate(times, max)), RIGHT)


def test_a_sparse_stream_is_one_event_late_and_no_more() -> None:
    """Events days apart, however far: each is stamped with the time of the one before."""
    rng = random.Random(3)
    arrivals = list(itertools.accumulate((rng.uniform(1.1, 60) * DAY for _ in range(200)), initial=NOW))
    assert times(arrivals)[1:] == pytest.approx(arrivals[:-1])


def test_the_work_orders_of_the_demo_are_at_most_one_date_late() -> None:
    """Plain lines by their own dates, ten years of them, often days apart."""
    lines = [Line(data, 0, Origin("x", "x", 0.0, timed=True)) for data in demo_lines(everything=True)]
    arrivals = decode(Batch([line for line in lines if b'"cmms"' in line.data])).arrivals
    dates = sorted(set(arrivals))
    assert len(arrivals) > 5_000
    for at, found in zip(arrivals, times(arrivals), strict=True):
        assert found >= dates[max(0, dates.index(at) - 1)]


def test_years_must_be_kept_to_for_a_day_also_when_the_clock_steps_twice() -> None:
    """1970 to 2038 to where it ends: two wrong clocks in a row prove nothing."""
    arrivals = [*every(1.0, 10, NOW), *every(1.0, 10, NOW + 8 * YEAR), *every(1.0, 500, NOW + 20 * YEAR)]
    assert max(times(arrivals)) < NOW + 600


@pytest.mark.parametrize("steps", [[40.0, 0.0], [0.0, 40.0], [0.0, 100.0, 200.0], [3_600.0, 90.0, 0.0, 7e8]])
def test_sources_whose_clocks_differ_do_not_make_time_run_fast(steps: list[float]) -> None:
    """The one that is ahead leads; the others take no turns in pushing."""
    rng = random.Random(5)
    arrivals = [
        NOW + n - (steps[n % len(steps)] if n % 7 else 0.0) + rng.uniform(-2, 2) for n in range(9_000)
    ]
    found = times(arrivals)
    assert found[-1] - found[0] == pytest.approx(9_000, abs=120)
    assert all(time <= high for time, high in zip(found, itertools.accumulate(arrivals, max), strict=True))


def test_a_source_that_is_ahead_and_falls_silent_leaves_the_others_going() -> None:
    ahead = [at for n in range(100) for at in (NOW + n + 3_600, NOW + n)]
    found = times(ahead + every(1.0, 1_000, NOW + 100))
    assert found[-1] == pytest.approx(NOW + 3_600 + 99 + 1_000, abs=3)


STEPS = st.one_of(
    st.floats(-59, 120),
    st.sampled_from(
        [0.0, 1.0, 59.0, 60.0, -60.0, -61.0, -3_600.0, LEAP_S, LEAP_S + 1, -DAY, 10 * YEAR, -NOW]
    ),
    st.floats(-1e9, 1e9),
)


def arrivals_of(steps: list[float]) -> list[float]:
    return list(itertools.accumulate(steps, initial=NOW))


@given(st.lists(STEPS, max_size=60))
def test_it_never_decreases(steps: list[float]) -> None:
    found = times(arrivals_of(steps))
    assert found == sorted(found)


@given(st.lists(STEPS, max_size=60), st.lists(st.integers(0, 60), max_size=10))
def test_cuts_do_not_matter(steps: list[float], cuts: list[int]) -> None:
    """Nor does a restart, which reads the state back."""
    arrivals = arrivals_of(steps)
    edges = sorted({0, len(arrivals), *(min(cut, len(arrivals)) for cut in cuts)})
    found: list[float] = []
    now, clock = 0.0, RIGHT
    for start, end in itertools.pairwise(edges):
        part, clock = follow(
            now,
            ClockState(clock.offset, clock.pending, clock.behind, clock.behind_count),
            arrivals[start:end],
        )
        found += part
        now = found[-1]
    assert (found, clock) == follow(0.0, RIGHT, arrivals)


@given(
    st.lists(st.floats(0, 3_600), min_size=1, max_size=30),
    st.one_of(st.floats(-NOW, -HOLD_S), st.floats(LEAP_S + 3_600, 1e9)),
    st.lists(st.floats(0, 2_700), min_size=1, max_size=30),
)
def test_no_single_step_moves_it_by_more_than_what_passed(
    before: list[float], step: float, after: list[float]
) -> None:
    """So it evicts nothing by age, and closes no window: within a day of it, at least."""
    first = list(itertools.accumulate(before, initial=NOW))
    second = list(itertools.accumulate(after, initial=first[-1] + step))
    found = times([*first, *second])
    assert found[len(first) - 1] == first[-1]
    assert found[-1] - first[-1] <= second[-1] - second[0] + 1e-3
