"""Decode: whatever bytes come, an event or a reason, quickly, and never an exception."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.decode import RefusedError, decode, decode_event, event_time
from pipeline.events import MAX_EVENT_BYTES, Batch, Exchange, Feedback, Line, Message, Origin, Reading, Text

ORIGIN = Origin("site", "files:site:/a", 1_000.0)


def text(**fields: object) -> bytes:
    return json.dumps({"kind": "text", "text": "x", **fields}).encode()


def reason(data: bytes) -> str:
    """Why an input is refused, with its place, as a dead letter says it."""
    batch = decode(Batch([Line(data, 7, ORIGIN)]))
    assert batch.events == []
    (letter,) = batch.dead
    assert (letter.source, letter.position, letter.arrival) == ("site", "files:site:/a byte 7", 1_000.0)
    assert letter.data == data[:MAX_EVENT_BYTES]
    return letter.reason


def test_the_four_kinds_of_event_are_decoded() -> None:
    """As DESIGN shows them."""
    cases = {
        b'{"kind":"reading","source":"pump-1","ts":1763912345.123,"values":{"pressure":3.42,"flow":122},'
        b'"units":{"pressure":"bar"}}': Reading(
            "pump-1", 1763912345.123, values={"pressure": 3.42, "flow": 122.0}, units={"pressure": "bar"}
        ),
        b'{"kind":"text","source":"cmms","ts":"2026-03-01T08:15Z","text":"REPLACE","subject":"crew-b"}': Text(
            "cmms", "2026-03-01T08:15Z", subject="crew-b", text="REPLACE"
        ),
        b'{"kind":"exchange","id":"7","messages":[{"role":"user","content":"E42?"},'
        b'{"role":"assistant","content":""}]}': Exchange(
            id="7", messages=[Message("user", "E42?"), Message("assistant", "")]
        ),
        b'{"kind":"feedback","about":"9f2c1e","rating":-1,"correction":"Bleed line 3 first."}': Feedback(
            about="9f2c1e", rating=-1, correction="Bleed line 3 first."
        ),
    }
    for data, event in cases.items():
        assert decode_event(data) == event


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"   ", "not JSON"),
        (b"pump-1 pressure=3.4", "not JSON"),
        (b"\xff\xfe\x00\x00", "not JSON"),
        (b"\xef\xbb\xbf" + text(), "not JSON"),
        (text() + b"x", "not JSON"),
        (text() + b"\x00", "not JSON"),
        (text()[:-1], "not JSON"),
        (b"null", "got `null`"),
        (b"[]", "got `array`"),
        (b'"text"', "got `str`"),
        (b"{}", "missing required field `kind`"),
        (b'{"kind":"alarm"}', "'alarm' - at `$.kind`"),
        (b'{"kind":7}', "`$.kind`"),
        (b'{"kind":"text"}', "missing required field `text`"),
        (text(text=""), "length >= 1 - at `$.text`"),
        (text(text=5), "got `int` - at `$.text`"),
        (text(tezt="x"), "unknown field `tezt`"),
        (text(values={"a": 1}), "unknown field `values`"),
        (text(source="Pump 1"), "$.source"),
        (text(source="pump-1\n"), "$.source"),
        (text(source="p" * 65), "$.source"),
        (text(source=""), "$.source"),
        (text(subject="../x"), "$.subject"),
        (text(id=""), "$.id"),
        (text(id=5), "$.id"),
        (text(id="i" * 129), "$.id"),
        (text(ts=True), "$.ts"),
        (text(ts=[1]), "$.ts"),
        (b'{"kind":"reading","values":{}}', "$.values"),
        (b'{"kind":"reading","values":{"a":true}}', "$.values"),
        (b'{"kind":"reading","values":{"a":"1"}}', "$.values"),
        (b'{"kind":"reading","values":{"a":null}}', "$.values"),
        (b'{"kind":"reading","values":{"":1}}', "$.values"),
        (b'{"kind":"reading","values":{"a":NaN}}', "not JSON"),
        (b'{"kind":"reading","values":{"a":Infinity}}', "not JSON"),
        (b'{"kind":"reading","values":{"a":-Infinity}}', "not JSON"),
        (b'{"kind":"reading","values":{"a":1e999}}', "out of range"),
        (b'{"kind":"reading","values":{"a":' + b"9" * 400 + b"}}", "out of range"),
        (b'{"kind":"reading","values":{"a":1},"units":{"a":"' + b"u" * 17 + b'"}}', "$.units"),
        (b'{"kind":"exchange","messages":[]}', "$.messages"),
        (b'{"kind":"exchange","messages":[{"role":"tool","content":""}]}', "role"),
        (b'{"kind":"feedback","about":"x","rating":2}', "$.rating"),
        (b'{"kind":"feedback","about":"x","rating":0.5}', "$.rating"),
        (b'{"kind":"text","text":"\\ud800"}', "not JSON"),
        (b'{"kind":"text","text":"\xed\xa0\x80"}', "not JSON"),
        (b'{"kind":"text","text":"\\x"}', "not JSON"),
        (b'{"kind":"text","text":"a\nb"}', "not JSON"),
        (b'{"kind":"text","kind":"reading","values":{"a":1}}', "`$.kind`"),
    ],
)
def test_what_is_no_event_is_refused_with_its_reason(data: bytes, words: str) -> None:
    assert words in reason(data)


@pytest.mark.parametrize(
    ("ts", "words"),
    [
        (1763912345123, "milliseconds?"),
        (-1763912345123, "out of range"),
        (1e300, "out of range"),
        ("yesterday", "neither seconds since 1970 nor RFC 3339"),
        ("1763912345", "neither seconds since 1970 nor RFC 3339"),
        ("2026-13-01T00:00:00Z", "neither seconds since 1970 nor RFC 3339"),
        ("2026-03-01T25:00:00Z", "neither seconds since 1970 nor RFC 3339"),
        ("2026-03-01T08:15:00", "no time zone"),
        ("2026-03-01", "no time zone"),
        ("9999-12-31T23:59:59-23:59", "out of range"),
        ("\x00" * 30_000, "neither"),
    ],
)
def test_a_time_that_is_none_is_refused(ts: object, words: str) -> None:
    found = reason(text(ts=ts))
    assert words in found
    assert len(found) < 300, "a reason quotes little of the input"


def test_times_are_seconds_since_1970_whatever_their_form() -> None:
    for ts in (1772352900, 1772352900.0, "2026-03-01T08:15:00Z", "2026-03-01T09:15:00+01:00"):
        assert event_time(decode_event(text(ts=ts)), 5.0) == 1772352900.0
    assert event_time(decode_event(text(ts="0001-01-01T00:00:00+23:59")), 5.0) < 0
    assert event_time(decode_event(text()), 5.0) == 5.0


def test_odd_but_allowed_input_is_taken_the_same_way_always() -> None:
    """NUL is a character; of a repeated key the last counts; a zero keeps its sign."""
    assert decode_event(b'{"kind":"text","text":"\\u0000"}') == Text(text="\0")
    assert decode_event(b'{"kind":"text","text":"a","text":"b"}') == Text(text="b")
    reading = decode_event(b'{"kind":"reading","values":{"a":-0.0,"b":1e308,"c":5e-324}}')
    assert isinstance(reading, Reading)
    assert str(reading.values["a"]) == "-0.0"


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 1_000_000,
        b"[" * MAX_EVENT_BYTES,
        b'{"a":' * (MAX_EVENT_BYTES // 5),
        b'{"kind":"text","text":"x","more":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"[" * 65 + b'\\"' * 130_000,
        b"[" * 65 + b'"' + b"\\" * 260_000,
        b"[]" * 131_000,
        b'"' * 262_000,
        b"[" * 70 + b'"' * 262_000,
        b"{" * 70 + b'"a\\\\"' * 50_000,
    ],
)
def test_no_input_takes_long_or_crashes(data: bytes) -> None:
    """Deep nesting would overflow the C stack; unclosed quotes made the check of it quadratic."""
    started = time.perf_counter()
    with pytest.raises(RefusedError):
        decode_event(data)
    assert time.perf_counter() - started < 1.0


def test_brackets_in_strings_are_no_nesting() -> None:
    event = decode_event(text(text="[" * 500 + '"\\' + "{" * 500))
    assert isinstance(event, Text)
    assert len(event.text) == 1_002
    deep = b'{"kind":"text","text":"x","more":' + b"[" * 64 + b"]" * 64 + b"}"
    assert reason(deep) == "nested deeper than 64"
    assert "unknown field" in reason(deep.replace(b"[" * 64, b"[" * 63).replace(b"]" * 64, b"]" * 63))


def test_an_event_may_be_as_large_as_allowed_and_not_a_byte_more() -> None:
    room = MAX_EVENT_BYTES - len(text())
    assert decode_event(text(text="x" * (room + 1)))
    assert f"at most {MAX_EVENT_BYTES}" in reason(text(text="x" * (room + 2)))


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RefusedError):
        decode_event(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = (
    "kind",
    "source",
    "ts",
    "id",
    "subject",
    "text",
    "values",
    "units",
    "messages",
    "about",
    "rating",
    "x",
)


@given(
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6),
    st.sampled_from(["reading", "text", "exchange", "feedback", None]),
)
def test_random_json_becomes_an_event_or_a_dead_letter(fields: dict[str, object], kind: str | None) -> None:
    data = json.dumps({**fields, **({"kind": kind} if kind else {})}).encode()
    batch = decode(Batch([Line(data, 0, ORIGIN)]))
    assert len(batch.events) + len(batch.dead) == 1
    assert batch.outcome.dead_letters == len(batch.dead)


def test_every_line_ends_as_an_event_or_a_dead_letter_in_order() -> None:
    """Times and arrivals belong to the events; plain lines of a replay take stream time from their own ts."""
    timed = Origin("replay", "replay:x", 0.0, timed=True)
    lines = [
        Line(text(ts=50), 0, ORIGIN), Line(b"bad", 9, ORIGIN), Line(text(), 12, ORIGIN),
        Line(text(ts=60), 30, timed), Line(text(), 50, timed),
    ]  # fmt: skip
    batch = decode(Batch(lines))
    assert [number for number, _ in batch.events] == [0, 2, 3, 4]
    assert batch.times == [50.0, 1_000.0, 60.0, 0.0]
    assert batch.arrivals == [1_000.0, 1_000.0, 60.0, 0.0]
    assert [letter.data for letter in batch.dead] == [b"bad"]


def test_what_the_model_cannot_learn_from_is_a_dead_letter_too() -> None:
    rating = b'{"kind":"feedback","about":"x"}'
    batch = decode(Batch([Line(rating, 0, ORIGIN)]), lambda event: f"no {type(event).__name__} here")
    assert [letter.reason for letter in batch.dead] == ["no Feedback here"]


@pytest.mark.parametrize(
    ("allowed", "named", "taken"),
    [
        (None, "pump-9", True),
        (frozenset(), "pump-9", False),
        (frozenset({"pump-1"}), "pump-9", False),
        (frozenset({"pump-9"}), "pump-9", True),
        (frozenset(), "site", True),
        (frozenset(), None, True),
    ],
)
def test_an_event_names_only_a_source_that_its_origin_allows(
    allowed: frozenset[str] | None, named: str | None, taken: bool
) -> None:
    """The origin's own source may always be named."""
    origin = Origin("site", "http:site", 1_000.0, allowed=allowed)
    batch = decode(Batch([Line(text(source=named), -1, origin)]))
    assert [event.source for _, event in batch.events] == ([named] if taken else [])
    assert [letter.reason.partition(":")[0] for letter in batch.dead] == (
        [] if taken else ["source 'pump-9' may not be named here"]
    )
