"""Windows end where the samples, their stream times and the ticks say, however they are cut into calls."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pipeline.triggers import MIN_AGED_SAMPLES, ThresholdTrigger, walk
from storage.windows import ClosedWindow, OpenWindow

NEVER = 10**9


def sizes(closed: list[ClosedWindow]) -> list[tuple[int, str]]:
    return [(window.samples, window.reason) for window in closed]


def test_a_window_closes_right_after_the_sample_that_fills_it() -> None:
    trigger = ThresholdTrigger(3, NEVER)
    window, closed = walk(trigger, OpenWindow(), 0, [5] * 7, [float(i) for i in range(7)])
    assert closed == [
        ClosedWindow(1, 0, 2, 3, 15, 2.0, "samples"),
        ClosedWindow(2, 3, 5, 3, 15, 5.0, "samples"),
    ]
    assert window == OpenWindow(3, 6, 1, 5, 6.0)


def test_a_window_closes_right_after_the_token_that_fills_it() -> None:
    """A sample is never cut; one that is larger than a window is a window."""
    _, closed = walk(ThresholdTrigger(NEVER, 10), OpenWindow(), 0, [4, 4, 4, 100, 0, 9], [0.0] * 6)
    assert sizes(closed) == [(3, "tokens"), (1, "tokens")]


def test_a_window_closes_before_the_sample_that_comes_too_late() -> None:
    trigger = ThresholdTrigger(NEVER, NEVER, 10.0)
    arrivals = [*([0.0] * MIN_AGED_SAMPLES), 9.9, 10.0]
    window, closed = walk(trigger, OpenWindow(), 0, [1] * len(arrivals), arrivals)
    assert [(w.last_seq, w.closed_at, w.reason) for w in closed] == [(MIN_AGED_SAMPLES, 10.0, "age")]
    assert (window.samples, window.first_arrival) == (1, 10.0)


def test_age_alone_does_not_close_what_is_too_small_to_learn_from() -> None:
    trigger = ThresholdTrigger(NEVER, NEVER, 10.0)
    few = MIN_AGED_SAMPLES - 1
    window, closed = walk(trigger, OpenWindow(), 0, [1] * few, [0.0] * few, tick=1_000.0)
    assert closed == []
    window, closed = walk(trigger, window, few, [1, 1], [1_000.0, 1_000.0])
    assert sizes(closed) == [(MIN_AGED_SAMPLES, "age")], "the sample that makes it large enough is its last"
    assert window.samples == 1


def test_a_tick_closes_what_is_old_enough() -> None:
    trigger = ThresholdTrigger(NEVER, NEVER, 10.0)
    window, _ = walk(trigger, OpenWindow(), 0, [1] * 40, [5.0] * 40)
    assert walk(trigger, window, 40, [], [], tick=14.9) == (window, [])
    after, closed = walk(trigger, window, 40, [], [], tick=15.0)
    assert closed == [ClosedWindow(1, 0, 39, 40, 40, 15.0, "age")]
    assert after == OpenWindow(2, 40)


def test_a_request_closes_whatever_there_is_and_an_empty_window_never_closes() -> None:
    trigger = ThresholdTrigger(NEVER, NEVER, 10.0)
    window, closed = walk(trigger, OpenWindow(), 0, [1], [3.0], requested=True)
    assert closed == [ClosedWindow(1, 0, 0, 1, 1, 3.0, "request")]
    assert walk(trigger, window, 1, [], [], tick=99.0, requested=True) == (OpenWindow(2, 1), [])


TRIGGERS = st.builds(
    ThresholdTrigger,
    st.sampled_from([1, 7, 40, NEVER]),
    st.sampled_from([1, 50, 300, NEVER]),
    st.sampled_from([0.0, 0.5, 20.0]),
)
SAMPLES = st.lists(st.tuples(st.integers(0, 30), st.sampled_from([0.0, 0.0, 0.1, 3.0, 60.0])), max_size=150)


@given(TRIGGERS, SAMPLES, st.lists(st.integers(0, 150), max_size=12), st.integers(0, 1_000))
def test_edges_do_not_depend_on_how_samples_are_cut_into_calls(
    trigger: ThresholdTrigger, steps: list[tuple[int, float]], cuts: list[int], first: int
) -> None:
    tokens = [count for count, _ in steps]
    arrivals = list(itertools.accumulate(later for _, later in steps))
    start = OpenWindow(1, first)
    whole = walk(trigger, start, first, tokens, arrivals)
    window, closed = start, []
    for a, b in itertools.pairwise(sorted({0, *cuts, len(steps)})):
        window, more = walk(trigger, window, first + a, tokens[a:b], arrivals[a:b])
        closed += more
    assert (window, closed) == whole


@given(TRIGGERS, SAMPLES, st.lists(st.tuples(st.integers(0, 150), st.floats(0, 1)), max_size=20))
def test_ticks_find_the_edges_that_the_samples_would(
    trigger: ThresholdTrigger, steps: list[tuple[int, float]], ticks: list[tuple[int, float]]
) -> None:
    """Live has ticks, a replay of its capture has none: a tick between two samples closes only what the
    second of them would have closed."""
    tokens = [count for count, _ in steps]
    arrivals = list(itertools.accumulate(later for _, later in steps))
    quiet, expected = walk(trigger, OpenWindow(), 0, tokens, arrivals)
    window, closed = OpenWindow(), []
    for i, (count, arrival) in enumerate(zip(tokens, arrivals, strict=True)):
        before = arrivals[i - 1] if i else 0.0
        for share in sorted(share for at, share in ticks if at == i):
            window, more = walk(trigger, window, i, [], [], tick=before + share * (arrival - before))
            closed += more
        window, more = walk(trigger, window, i, [count], [arrival])
        closed += more
    edges = [(w.window, w.first_seq, w.last_seq, w.tokens, w.reason) for w in closed]
    assert edges == [(w.window, w.first_seq, w.last_seq, w.tokens, w.reason) for w in expected]
    assert window == quiet


def one_by_one(
    trigger: ThresholdTrigger, window: OpenWindow, tokens: list[int], arrivals: list[float]
) -> tuple[OpenWindow, list[tuple[int, int, int, float, str]]]:
    """The definition: each sample is looked at alone. Returns: the window, and the closed ones' figures."""
    closed: list[tuple[int, int, int, float, str]] = []

    def close(at: float, reason: str) -> OpenWindow:
        last = window.first_seq + window.samples - 1
        closed.append((window.first_seq, last, window.tokens, at, reason))
        return OpenWindow(window.window + 1, last + 1)

    for i, (count, arrival) in enumerate(zip(tokens, arrivals, strict=True)):
        if trigger.aged(window, arrival):
            window = close(arrival, "age")
        first = window.first_arrival if window.samples else arrival
        start = window.first_seq if window.samples else i
        window = OpenWindow(window.window, start, window.samples + 1, window.tokens + count, first)
        if reason := trigger.full(window):
            window = close(arrival, reason)
    return window, closed


@given(
    st.builds(
        ThresholdTrigger, st.integers(1, 60), st.integers(1, 200), st.sampled_from([0.0, 0.1, 5.0, 40.0])
    ),
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from([0.0, 0.1, 0.3, 7.0])), max_size=150),
)
def test_windows_end_where_looking_at_each_sample_would_end_them(
    trigger: ThresholdTrigger, steps: list[tuple[int, float]]
) -> None:
    tokens = [count for count, _ in steps]
    arrivals = [*itertools.accumulate((step for _, step in steps), initial=1.7e9)][1:]
    window, closed = walk(trigger, OpenWindow(), 0, tokens, arrivals)
    expected_window, expected = one_by_one(trigger, OpenWindow(), tokens, arrivals)
    assert window == expected_window
    assert [(w.first_seq, w.last_seq, w.tokens, w.closed_at, w.reason) for w in closed] == expected


@given(TRIGGERS, SAMPLES)
def test_every_sample_is_in_exactly_one_window(
    trigger: ThresholdTrigger, steps: list[tuple[int, float]]
) -> None:
    tokens = [count for count, _ in steps]
    arrivals = list(itertools.accumulate(later for _, later in steps))
    window, closed = walk(trigger, OpenWindow(), 0, tokens, arrivals)
    assert [w.window for w in closed] == list(range(1, len(closed) + 1))
    seqs = [seq for w in closed for seq in range(w.first_seq, w.last_seq + 1)]
    assert seqs + list(range(window.first_seq, window.first_seq + window.samples)) == list(range(len(steps)))
    assert sum(w.tokens for w in closed) + window.tokens == sum(tokens)
    assert all(w.samples == w.last_seq - w.first_seq + 1 for w in closed)
