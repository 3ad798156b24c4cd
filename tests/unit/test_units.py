"""Durations and sizes: what is read, what is refused, and that what is printed reads back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.units import Duration, Size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10s", 10),
        ("500ms", 0.5),
        ("1h30m", 5400),
        ("2min", 120),
        ("1.5h", 5400),
        ("7d", 604800),
        ("0s", 0),
        (" 1 s ", 1),
    ],
)
def test_a_duration_is_read_in_seconds(text: str, seconds: float) -> None:
    """Units may follow each other and carry fractions."""
    assert Duration.parse(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "10", "s", "-1s", "10 parsecs", "1e3s", "10s5", "१s", "9999999d", "nan s"]
)
def test_a_duration_without_a_unit_or_sense_is_refused(text: str) -> None:
    """A bare number would be seconds to one reader and milliseconds to another."""
    with pytest.raises(ValueError, match="a duration is"):
        Duration.parse(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("256MiB", 2**28),
        ("1.5GB", 1_500_000_000),
        ("512 B", 512),
        ("0B", 0),
        ("3kB", 3000),
        ("1024TiB", 2**50),
    ],
)
def test_a_size_is_read_in_bytes(text: str, count: int) -> None:
    """Binary and decimal units differ, as their names say."""
    assert Size.parse(text) == count


@pytest.mark.parametrize("text", ["", "256", "MiB", "-1B", "1 mib", "1KB", "2000TiB", "1e3B"])
def test_a_size_without_a_unit_or_sense_is_refused(text: str) -> None:
    """The case of a unit matters: MB and Mb are not the same."""
    with pytest.raises(ValueError, match="a size is"):
        Size.parse(text)


@given(st.integers(0, 10**9))
def test_a_printed_duration_reads_back(milliseconds: int) -> None:
    """What `config show` prints loads to the same value, to the millisecond and below."""
    duration = Duration(milliseconds / 1000)
    assert Duration.parse(str(duration)) == pytest.approx(duration, abs=1e-6)


@given(st.integers(0, 2**50))
def test_a_printed_size_reads_back_exactly(count: int) -> None:
    """No byte is lost in printing."""
    assert Size.parse(str(Size(count))) == count


def test_units_print_short() -> None:
    """The largest unit that fits is used."""
    assert [str(Duration(s)) for s in (0, 0.25, 90, 5400, 86400, 604800, 1.5)] == [
        "0s", "250ms", "90s", "90m", "1d", "1w", "1.5s",
    ]  # fmt: skip
    assert [str(Size(n)) for n in (0, 1000, 2**20, 3 * 2**29)] == ["0B", "1000B", "1MiB", "1536MiB"]
