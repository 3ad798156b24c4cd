"""Readings as text, and which of them say something new."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.events import Reading
from pipeline.render import Deadband, ReadingText, TemplateError, compile_template, format_value


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (233.062, 3, "233"), (1234.5, 3, "1230"), (0.0265878, 3, "0.0266"), (32.0, 3, "32"),
        (-0.0, 3, "0"), (0.0, 3, "0"), (-0.0001234, 3, "-0.000123"), (999.9, 3, "1000"), (1e6, 3, "1000000"),
        (123456789.0, 3, "123000000"), (1e15, 3, "1000000000000000"), (1e16, 3, "1e+16"),
        (1e-6, 3, "0.000001"), (1.5e-7, 3, "1.5e-07"), (1e300, 3, "1e+300"), (5.0, 1, "5"),
        (0.1 + 0.2, 17, "0.30000000000000004"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_people_write_them(value: float, digits: int, text: str) -> None:
    assert format_value(value, digits) == text


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 17))
def test_a_written_number_is_the_rounded_one(value: float, digits: int) -> None:
    assert float(format_value(value, digits)) == float(f"{value:.{digits}g}")


def render(event: Reading, **how: object) -> str:
    plain: dict[str, object] = {"template": "", "tags": (), "units": {}, "digits": 3}
    return ReadingText("pump-1", **{**plain, **how})(event)  # type: ignore[arg-type]


READING = Reading(values={"pressure": 3.4219, "flow": 122.64}, units={"pressure": "bar"})


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({}, "pump-1 pressure=3.42bar flow=123"),
        ({"tags": ("flow", "absent")}, "pump-1 flow=123"),
        ({"tags": ("flow", "pressure"), "units": {"flow": "l/s"}}, "pump-1 flow=123l/s pressure=3.42bar"),
        ({"units": {"pressure": ""}}, "pump-1 pressure=3.42 flow=123"),
        ({"digits": 1}, "pump-1 pressure=3bar flow=100"),
        ({"template": "p {pressure}, {absent}, {{{flow}}}."}, "p 3.42bar, ?, {123}."),
        ({"template": "100% e-{pressure} %s {flow}"}, "100% e-3.42bar %s 123"),
        ({"units": {"pressure": "%", "flow": "e+"}}, "pump-1 pressure=3.42% flow=123e+"),
    ],
)
def test_a_reading_is_written_as_its_source_says(how: dict[str, object], text: str) -> None:
    assert render(READING, **how) == text


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["a", "e", "e-", "100%", "%s"]),
            st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1013.2, 1e-5]),
            min_size=1,
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 17),
)
def test_readings_are_written_value_by_value(readings: list[dict[str, float]], digits: int) -> None:
    """However their tags, values and units change from one to the next: what is kept of a form fits it."""
    written = ReadingText("site-e", template="", tags=(), units={"e": "e+"}, digits=digits)
    for n, values in enumerate(readings):
        units = {"a": "°C"} if n % 2 else {}
        event = Reading(values=values, units=units)
        pairs = [
            f"{tag}={format_value(value, digits)}{'e+' if tag == 'e' else units.get(tag, '')}"
            for tag, value in values.items()
        ]
        assert written(event) == " ".join(["site-e", *pairs])


@pytest.mark.parametrize("template", ["{", "}", "{}", "{a:.3f}", "{a!r}", "{a", "{:x}"])
def test_a_template_that_asks_for_more_than_a_value_is_refused(template: str) -> None:
    with pytest.raises(TemplateError):
        compile_template(template)


@pytest.mark.parametrize("template", ["{a.__class__}", "{a[0]}", "{0}"])
def test_no_template_reaches_anything_but_a_readings_values(template: str) -> None:
    """What looks like an attribute or an index is the name of a tag that is not there."""
    assert render(READING, template=template) == "?"


def test_a_deadband_is_silent_while_nothing_moves_beyond_it() -> None:
    band = Deadband({"p": 0.5}, None, 0.0)
    assert band.silent({"p": 1.0, "q": 1.0}, {"p": 1.5, "q": 9.0}, 0.0), "q is not looked at"
    assert not band.silent({"p": 1.0}, {"p": 1.51}, 0.0)
    assert not band.silent({"q": 1.0}, {"p": 1.0}, 0.0), "p was never told"
    both = Deadband({"p": 0.5}, 0.1, 0.0)
    assert not both.silent({"p": 1.0, "q": 1.0}, {"p": 1.5, "q": 1.2}, 0.0)


def test_a_deadband_speaks_after_its_longest_silence() -> None:
    band = Deadband({}, 1.0, 60.0)
    assert band.silent({"p": 1.0}, {"p": 1.0}, 59.9)
    assert not band.silent({"p": 1.0}, {"p": 1.0}, 60.0)


def test_a_source_that_invents_thousands_of_tags_does_not_fill_the_memory() -> None:
    write = ReadingText("s", template="", tags=(), units={}, digits=3)
    tracemalloc.start()
    for event in range(20):
        text = write(Reading(values={f"{event}-{tag}": 1.0 for tag in range(8_000)}))
        assert text.startswith(f"s {event}-0=1 ") and text.endswith(f" {event}-7999=1")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 8 << 20  # of all 20 together it would be 20 MB
