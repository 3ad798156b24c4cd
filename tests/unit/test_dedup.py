"""Dedup: what counts as the same, how far back, and the same decisions after a restart."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.decode import decode
from pipeline.dedup import MAX_REFERENCE_TAGS, NO_HASH, Dedup, SeenHashes
from pipeline.events import Batch, Line, Origin
from pipeline.render import Deadband


class Stream:
    """A dedup step with a horizon, and the count of samples it let through."""

    def __init__(
        self,
        mode: str = "delivery",
        *,
        horizon: int = 100,
        deadband: Deadband | None = None,
        key: bytes = b"k",
    ) -> None:
        self.mode, self.horizon, self.deadband, self.key = mode, horizon, deadband, key
        self.references: dict[str, bytes] = {}
        self.hashes: list[bytes] = []
        self.tail = 0
        self.open()

    def open(self) -> None:
        """As after a restart: from what the ring holds."""
        held = self.hashes[self.tail :][-self.horizon :] if self.horizon else []
        seen = SeenHashes(self.horizon, len(self.hashes), b"".join(held))
        self.step = Dedup(
            self.key, seen, lambda: self.tail, self.references,
            lambda source, kind: self.mode, lambda source: self.deadband,
        )  # fmt: skip

    def feed(self, *lines: Line) -> Batch:
        batch = self.step(decode(Batch(list(lines))))
        self.hashes += batch.hashes
        self.references |= batch.references
        return batch

    def keeps(self, *lines: Line) -> list[bool]:
        """Which lines are kept, each fed alone."""
        return [bool(self.feed(line).events) for line in lines]


def line(
    offset: int = -1, *, input: str = "in", began: float = 0.0, at: float = 0.0, **event: object
) -> Line:
    event = {"kind": "text", "text": "x"} | event
    if event["kind"] != "text":
        del event["text"]
    return Line(json.dumps(event).encode(), offset, Origin("site", input, at, began=began))


def reading(value: float = 1.0, **more: object) -> Line:
    return line(kind="reading", values={"p": value}, **more)  # type: ignore[arg-type]


def test_an_id_is_the_identity_of_a_delivery() -> None:
    """Whatever else differs; per source."""
    stream = Stream()
    assert stream.keeps(line(id="1"), line(id="1", text="y", ts=5), line(id="2")) == [True, False, True]
    assert stream.keeps(line(id="1", source="other")) == [True]


def test_without_an_id_time_and_content_are() -> None:
    stream = Stream()
    assert stream.keeps(line(ts=5), line(ts=5), line(ts=6), line(ts=5, text="y")) == [True, False, True, True]
    assert stream.keeps(line(ts="1970-01-01T00:00:05Z"), line(ts="1970-01-01T01:00:05+01:00")) == [
        False,
        False,
    ]
    assert stream.keeps(reading(ts=5), reading(ts=5), reading(2.0, ts=5)) == [True, False, True]


def test_the_order_of_a_readings_values_does_not_matter() -> None:
    stream = Stream()
    one = line(kind="reading", ts=5, values={"a": 1, "b": 2})
    two = line(kind="reading", ts=5, values={"b": 2, "a": 1})
    assert stream.keeps(one, two) == [True, False]


def test_without_either_the_position_is() -> None:
    """Of the same content of the same input: a redelivery has the same bytes at the same place."""
    stream = Stream()
    assert stream.keeps(line(7), line(7), line(8)) == [True, False, True]
    assert stream.keeps(line(7, input="other"), line(7, began=1.0), line(7, text="y")) == [True, True, True]


def test_without_any_nothing_is_the_same() -> None:
    stream = Stream()
    assert stream.keeps(line(), line(), reading(), reading()) == [True] * 4
    assert set(stream.hashes) == {NO_HASH}


def test_content_is_the_same_at_any_time_and_place_of_a_source() -> None:
    stream = Stream("content")
    assert stream.keeps(line(ts=5, id="1"), line(7, ts=6, id="2")) == [True, False]
    assert stream.keeps(line(text="y"), line(source="other")) == [True, True]
    turns = [{"role": "user", "content": "E42?"}, {"role": "assistant", "content": "Coolant."}]
    again = [line(kind="exchange", messages=turns, ts=n) for n in (1, 2)]
    assert stream.keeps(*again, line(kind="exchange", messages=turns[::-1])) == [True, False, True]


def test_the_hashes_of_given_events_never_change() -> None:
    """Rings hold them: with others, what is delivered again across an upgrade would be stored twice."""
    origin = Origin("site", "mqtt:plant", 7.0, began=3.0)
    lines = [
        Line(
            '{"kind":"reading","source":"pump-1","ts":1763912345.123,'
            '"values":{"pressure":3.42,"flow":-0.0,"ä":1e300}}'.encode(), -1, origin,
        ),
        Line(b'{"kind":"text","ts":"2026-03-01T08:15:00Z","text":"REPLACE"}', -1, origin),
        Line(b'{"kind":"exchange","ts":5,"messages":[{"role":"user","content":"E42?"}]}', -1, origin),
        Line(b'{"kind":"feedback","ts":5,"about":"9f2c1e","rating":-1}', -1, origin),
        Line(b'{"kind":"text","id":"7","text":"x"}', -1, origin),
        Line(b'{"kind":"text","text":"x"}', -1, origin, "key-1"),
        Line(b'{"kind":"text","text":"x"}', 12, origin),
    ]  # fmt: skip
    found = {mode: Stream(mode, key=b"secret" * 5).feed(*lines).hashes for mode in ("delivery", "content")}
    assert [digest.hex() for digest in found["delivery"]] == [
        "d767d2f5f8f9fc88c371beb016a4b8a8", "b446d00e6d31b9d14c729318d43afde4",
        "b31bb730dd8da27c67412f53090cdeb2", "2c2b1933538fb0b4e38d0e8ecfce3438",
        "e8f1b10b70e8306bcfd34e6c5f66993e", "f54bdcee215e22ebbdc2318893597772",
        "538a68266259f70de05f9ac9a3540087",
    ]  # fmt: skip
    assert [digest.hex() for digest in found["content"]] == [
        "e4e23c4b8f5162ac5dee772e516a7d50", "a123ecc364a6a12413299b150096f193",
        "03567b25abe154f875642be061effdcc", "03c2c9b4056b7240510b26adc919bf8e",
        "cbd453d8eb3d2424a174b5fa3552d367",
    ]  # fmt: skip


def test_none_keeps_everything() -> None:
    assert Stream("none").keeps(line(id="1"), line(id="1")) == [True, True]


def test_the_hashes_are_keyed() -> None:
    """Without the ring's secret nobody can test what was said."""
    one, two = Stream("content", key=b"1"), Stream("content", key=b"2")
    assert one.feed(line()).hashes != two.feed(line()).hashes


def test_duplicates_within_one_batch_are_found_and_every_input_is_counted() -> None:
    stream = Stream("content")
    batch = stream.feed(line(), line(), line(text="y"), Line(b"bad", 0, Origin("site", "in", 0.0)), line())
    assert [number for number, _ in batch.events] == [0, 2]
    assert len(batch.times) == len(batch.arrivals) == len(batch.hashes) == 2
    assert (batch.outcome.duplicates, batch.outcome.dead_letters) == (2, 1)


def test_the_oldest_sample_is_forgotten_beyond_the_horizon() -> None:
    """A duplicate takes no place in it, a sample that nothing identifies does."""
    stream = Stream(horizon=3)
    assert stream.keeps(line(id="1"), line(id="2"), line(id="1"), line(id="1")) == [True, True, False, False]
    assert stream.keeps(line(), line(id="1")) == [True, False]
    assert stream.keeps(line(id="3"), line(id="2"), line(id="1")) == [True, False, True]


def test_a_horizon_of_nothing_remembers_nothing() -> None:
    assert Stream(horizon=0).keeps(line(id="1"), line(id="1")) == [True, True]


def test_what_the_ring_evicted_is_forgotten() -> None:
    """As a restart would: the same stream is then decided the same with and without one."""
    stream = Stream()
    stream.keeps(line(id="1"), line(id="2"))
    stream.tail = 1
    assert stream.keeps(line(id="2"), line(id="1")) == [False, True]


EVENTS = st.one_of(
    st.builds(lambda n: line(id=str(n)), st.integers(0, 8)),
    st.builds(lambda n: line(ts=n), st.integers(0, 4)),
    st.builds(lambda n: line(n), st.integers(0, 3)),
    st.just(line()),
    st.builds(lambda v, at: reading(v, at=at), st.integers(0, 3), st.integers(0, 50)),
)


@given(
    st.lists(EVENTS, max_size=60),
    st.integers(0, 12),
    st.lists(st.integers(0, 60), max_size=4),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3)), max_size=3),
)
def test_a_restart_anywhere_changes_no_decision(
    lines: list[Line], horizon: int, restarts: list[int], evictions: list[tuple[int, int]]
) -> None:
    """With ids, times, positions and none of them, deadbands, and evictions in between."""
    deadband = Deadband({}, 1.0, 20.0)
    quiet, restarted = (Stream(horizon=horizon, deadband=deadband) for _ in range(2))
    for n, item in enumerate(lines):
        for at, count in evictions:
            if at == n:
                for stream in (quiet, restarted):
                    stream.tail = min(stream.tail + count, len(stream.hashes))
        if n in restarts:
            restarted.open()
        assert quiet.feed(item).outcome == restarted.feed(item).outcome
    assert quiet.hashes == restarted.hashes
    assert quiet.references == restarted.references


@given(st.integers(1, 5), st.lists(st.binary(min_size=1, max_size=1), max_size=40), st.integers(0, 40))
def test_seen_hashes_are_those_of_the_newest_samples(horizon: int, keys: list[bytes], cut: int) -> None:
    """Against a deque; built from what the ring holds, it is the same, also where two are alike."""
    digests = [key * 16 for key in keys]
    model = deque(digests[:cut], horizon)
    seen = SeenHashes(horizon, len(digests[:cut]), b"".join(model))
    for digest in digests[cut:]:
        assert all((known in seen) == (known in model) for known in digests if known != NO_HASH)
        if digest not in model:
            seen.add(digest)
            model.append(digest)
    assert {known for known in digests if known in seen} == set(model) - {NO_HASH}
    assert len(seen) == len([known for known in model if known != NO_HASH])


class ListOfHashes:
    """What SeenHashes promises, written down as plainly as can be: a list of keys by seq."""

    def __init__(self, horizon: int, next_seq: int, hashes: Sequence[bytes]) -> None:
        self.horizon, self.first = horizon, next_seq - len(hashes)
        self.keys = [digest[:8] for digest in hashes]

    @property
    def seen(self) -> set[bytes]:
        return {*self.keys} - {bytes(8)}

    def add(self, digest: bytes) -> None:
        if self.horizon:
            self.keys.append(digest[:8])
            self.forget_before(self.first + len(self.keys) - self.horizon)

    def forget_before(self, seq: int) -> None:
        while self.keys and self.first < seq:
            del self.keys[0]
            self.first += 1

    def admit(self, digests: Sequence[bytes]) -> list[bool]:
        new = []
        for digest in digests:
            new.append(digest[:8] not in self.seen)
            if new[-1]:
                self.add(digest)
        return new


# Few keys of a small table, so that they meet, wrap around and come again; 0 is no key.
KEYS = st.one_of(
    st.integers(0, 12), st.integers(0, 3).map(lambda n: 2**64 - 1 - n), st.integers(0, 2**64 - 1)
)
DIGESTS = KEYS.map(lambda n: n.to_bytes(8, "little") + b"restrest")


@settings(max_examples=300)
@given(
    st.integers(0, 9),
    st.integers(0, 30),
    st.lists(DIGESTS, max_size=9),
    st.lists(st.one_of(DIGESTS, st.integers(0, 60), st.lists(DIGESTS, max_size=12)), max_size=60),
)
def test_the_table_is_the_set_it_stands_for(
    horizon: int, next_seq: int, held: list[bytes], steps: list[bytes | int | list[bytes]]
) -> None:
    """Adding, also what is there, admitting and forgetting: the same answers and the same length."""
    held = held[: min(horizon, next_seq)]
    model = ListOfHashes(horizon, next_seq, held)
    seen = SeenHashes(horizon, next_seq, b"".join(held))
    known = [*held, *(step for step in steps if isinstance(step, bytes))]
    known += [digest for step in steps if isinstance(step, list) for digest in step]
    for step in [0, *steps]:
        if isinstance(step, bytes):
            model.add(step)
            seen.add(step)
        elif isinstance(step, list):
            assert [*seen.admit(step)] == model.admit(step)
        else:
            model.forget_before(step)
            seen.forget_before(step)
        assert [digest in seen for digest in known] == [digest[:8] in model.seen for digest in known]
        assert len(seen) == len([key for key in model.keys if key != bytes(8)])


def test_a_hash_costs_24_bytes_however_many_there_are() -> None:
    """Taken when it starts, and never more."""
    horizon = 20_000
    rng = random.Random(1)
    tracemalloc.start()
    try:
        seen = SeenHashes(horizon, horizon, rng.randbytes(16 * horizon))
        full = tracemalloc.get_traced_memory()[0]
        for _ in range(2 * horizon):
            seen.add(rng.randbytes(16))
        assert tracemalloc.get_traced_memory()[0] - full < 4_096
    finally:
        tracemalloc.stop()
    assert len(seen) == horizon
    assert 24 * horizon <= full <= 24 * horizon + 4_096


def test_more_hashes_than_the_horizon_are_refused() -> None:
    with pytest.raises(ValueError, match="3 hashes for a horizon of 2"):
        SeenHashes(2, 10, bytes(48))


# -- readings that report by exception --------------------------------------------------------------


def test_readings_within_the_deadband_are_suppressed() -> None:
    """Compared with the last one kept, not the last one seen: a slow drift is told in the end."""
    stream = Stream(deadband=Deadband({}, 1.0, 0.0))
    assert stream.keeps(*(reading(value) for value in (0.0, 0.6, 1.0, 1.2, 1.9, 2.3))) == [
        True, False, False, True, False, True,
    ]  # fmt: skip
    assert stream.feed(reading(2.3)).outcome.suppressed == 1


def test_other_kinds_of_event_know_no_deadband() -> None:
    stream = Stream("none", deadband=Deadband({}, 1.0, 0.0))
    assert stream.keeps(line(), line()) == [True, True]


def test_a_reading_is_kept_after_the_longest_silence_in_stream_time() -> None:
    """By its arrival: a device whose clock stands still is heard all the same."""
    stream = Stream(deadband=Deadband({}, 1.0, 60.0))
    assert stream.keeps(reading(at=0.0, ts=5), reading(at=59.0, ts=6), reading(at=60.0, ts=7)) == [
        True, False, True,
    ]  # fmt: skip
    assert stream.keeps(reading(at=100.0, ts=9e9)) == [False]


def test_a_clock_that_steps_back_silences_nobody() -> None:
    """An hour back: the next reading is kept, and its silence counts by the new clock; a slip is no step."""
    stream = Stream(deadband=Deadband({}, 1.0, 60.0))
    assert stream.keeps(reading(at=9_000.0, ts=1), reading(at=8_950.0, ts=2)) == [True, False]
    assert stream.keeps(reading(at=5_400.0, ts=3), reading(at=5_459.0, ts=4), reading(at=5_460.0, ts=5)) == [
        True, False, True,
    ]  # fmt: skip
    by_value = Stream(deadband=Deadband({}, 1.0, 0.0))
    assert by_value.keeps(reading(at=9_000.0, ts=1), reading(at=5_400.0, ts=2)) == [True, False]


def test_tags_that_a_reading_lacks_keep_their_last_value() -> None:
    stream = Stream(deadband=Deadband({}, 1.0, 0.0))
    both = line(kind="reading", values={"a": 1, "b": 1})
    only = line(kind="reading", values={"b": 1.5})
    assert stream.keeps(both, only, both) == [True, False, False]


def test_a_suppressed_reading_takes_no_place_in_the_memory() -> None:
    stream = Stream(deadband=Deadband({}, 1.0, 0.0), horizon=2)
    stream.keeps(reading(1.0, id="a"), *(reading(1.0, id=f"s{n}") for n in range(5)))
    assert stream.keeps(reading(9.0, id="a")) == [False]


def test_references_stay_small_however_many_tags_a_source_invents() -> None:
    stream = Stream("none", deadband=Deadband({}, 1.0, 0.0))
    for n in range(30):
        stream.feed(line(kind="reading", values={f"t{n}-{i}": 1 for i in range(100)}))
    assert len(stream.step._references["site"].values) == MAX_REFERENCE_TAGS


@pytest.mark.parametrize("changed", [True, False])
def test_only_references_that_changed_are_written(changed: bool) -> None:
    stream = Stream(deadband=Deadband({}, 1.0, 0.0))
    stream.feed(reading(1.0))
    assert bool(stream.feed(reading(5.0 if changed else 1.0)).references) is changed


# -- tags that are written on change ----------------------------------------------------------------

ON_CHANGE = Deadband({}, -1.0, 0.0, frozenset({"mode", "alarm"}))


def values(stream: Stream, at: float = 0.0, **values: float) -> dict[str, float] | None:
    """What is kept of a reading with these values, None if it is suppressed."""
    batch = stream.feed(line(kind="reading", values=values, at=at))
    assert len(batch.events) + batch.outcome.suppressed == 1
    return batch.events[0][1].values if batch.events else None  # type: ignore[union-attr]


def test_a_tag_on_change_is_written_only_with_another_value() -> None:
    stream = Stream("none", deadband=ON_CHANGE)
    assert values(stream, p=1, mode=2, alarm=0) == {"p": 1, "mode": 2, "alarm": 0}
    assert values(stream, p=1, mode=2, alarm=0) == {"p": 1}
    assert values(stream, p=1, mode=3, alarm=0) == {"p": 1, "mode": 3}
    assert values(stream, p=1, mode=2) == {"p": 1, "mode": 2}, "compared with the last one, not with any"


def test_a_reading_with_nothing_but_unchanged_tags_on_change_is_suppressed() -> None:
    stream = Stream("none", deadband=ON_CHANGE)
    assert values(stream, mode=2) == {"mode": 2}
    assert values(stream, mode=2) is None
    assert values(stream, mode=2, alarm=1) == {"alarm": 1}
    assert values(stream, mode=2, alarm=1) is None


def test_a_tag_on_change_is_written_again_after_the_longest_silence() -> None:
    """Counted from when it was written, however often the others were meanwhile; alone as well."""
    stream = Stream("none", deadband=Deadband({}, -1.0, 60.0, frozenset({"mode"})))
    assert values(stream, 100, p=1, mode=2) == {"p": 1, "mode": 2}
    assert values(stream, 159, p=1, mode=2) == {"p": 1}
    assert values(stream, 160, mode=2) == {"mode": 2}
    assert values(stream, 161, mode=2) is None


def test_a_change_is_told_within_the_deadband_of_the_others() -> None:
    """Then the reading is a kept one, with all values that are not quiet."""
    stream = Stream("none", deadband=Deadband({}, 1.0, 0.0, frozenset({"mode"})))
    assert values(stream, p=1, mode=2) == {"p": 1, "mode": 2}
    assert values(stream, p=1.5, mode=2) is None
    assert values(stream, p=1.5, mode=3) == {"p": 1.5, "mode": 3}
    assert values(stream, p=2.4, mode=3) is None, "compared with the reading that was kept"
    assert values(stream, p=2.6, mode=3) == {"p": 2.6}


@given(st.data())
def test_tags_on_change_do_not_depend_on_batches_or_restarts(data: st.DataObject) -> None:
    number = st.sampled_from([0.0, 1.0, 2.0])
    lines = []
    for at in range(data.draw(st.integers(0, 20))):
        chosen = data.draw(st.dictionaries(st.sampled_from(["p", "mode", "alarm"]), number, min_size=1))
        lines.append(line(kind="reading", values=chosen, at=10.0 * at))
    band = Deadband({}, 1.0, 30.0, frozenset({"mode", "alarm"}))
    whole, cut = Stream("none", deadband=band), Stream("none", deadband=band)
    expected = [event for _, event in whole.feed(*lines).events]
    found, rest = [], lines
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        found += [event for _, event in cut.feed(*rest[:size]).events]
        rest = rest[size:]
        cut.open()
    assert found == expected
    assert cut.references == whole.references


def test_what_is_told_of_a_reading_leaves_the_batch_before_as_it_was() -> None:
    stream = Stream("none", deadband=ON_CHANGE)
    before = decode(Batch([line(kind="reading", values={"p": 1, "mode": 2}) for _ in range(2)]))
    stream.step(before)
    assert [event.values for _, event in before.events] == 2 * [{"p": 1, "mode": 2}]  # type: ignore[union-attr]
