"""The settings of what is not JSON lines: [sources.csv] and [sources.pattern].

As in settings.py the text below a field is what users read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from pipeline.events import MAX_EVENT_BYTES
from pipeline.source_settings import SourceFault
from pipeline.units import Size

__all__ = ["CsvFormat", "PatternFormat"]

MAX_TAG: Final = 64  # characters, as in an event


class CsvFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How rows of CSV files become events. A row is one line: no line ends within quotes."""

    columns: tuple[str, ...] = ()
    """Names of the columns, for files without a header; empty: the first line of each file names them."""
    delimiter: Annotated[str, Meta(min_length=1)] = ","
    """One character between cells; "\\t" is a tab."""
    quote: str = '"'
    """The character around cells that hold the delimiter; empty for none."""
    encoding: Literal["utf-8", "latin-1", "cp1252"] = "utf-8"
    """How the files are encoded."""
    invalid: Literal["refuse", "replace"] = "refuse"
    """What becomes of a row with bytes that are not of the encoding: a dead letter, or it is read with a
    question mark in their place."""
    decimal: Literal[".", ","] = "."
    """What stands before the decimals of a number."""
    map: dict[str, Annotated[str, Meta(min_length=1)]] = {}
    """Which columns are values, and their tags, as in { "Pressure [bar]" = "pressure" }; empty: all columns
    that are named nowhere else here, under their own names."""
    text: str = ""
    """Column whose cell is the text of the event; rows then become texts instead of readings."""
    time: str = ""
    """Column with the time of the row; empty: when it was read."""
    time_format: str = "iso"
    """How times are written: "iso", "unix" or "unix_ms" (seconds or milliseconds since 1970), or a pattern of
    strptime, as in "%d.%m.%Y %H:%M:%S"."""
    time_zone: str = ""
    """Time zone of times that name none: "UTC", "+01:00" or a name such as "Europe/Berlin". Without one such
    times are refused."""
    source: str = ""
    """Column with the event's source; empty: the name of this source."""
    id: str = ""
    """Column that identifies the event, for dedup."""
    missing: tuple[str, ...] = ("NaN", "nan", "NA", "N/A", "NULL", "null", "None", "-")
    """Cells that are no value, beside empty ones."""
    not_numeric: Literal["refuse", "ignore"] = "refuse"
    """What becomes of a row with a value that is no number: a dead letter, or only the value is left out."""

    def faults(self) -> Iterator[SourceFault]:
        """What does not fit."""
        yield from _time_faults(self.time_format, self.time_zone)
        if len(self.delimiter) != 1 or self.delimiter in "\r\n":
            yield "delimiter", "expected one character", 'as in ";"'
        if len(self.quote) > 1 or self.quote in ("\r", "\n", self.delimiter, " "):
            yield "quote", "expected one character, another than the delimiter", "or an empty text for none"
        if self.decimal == self.delimiter:
            yield "decimal", "is also the delimiter", 'set delimiter, as in ";"'
        if self.map and self.text:
            yield "map", "has no effect beside text", "remove one of the two"
        if len(set(self.map.values())) != len(self.map):
            yield "map", "gives two columns the same tag", "give each a tag of its own"
        if any(len(tag) > MAX_TAG for tag in self.map.values()):
            yield "map", f"holds a tag of more than {MAX_TAG} characters", "shorten it"
        if len(set(self.columns)) != len(self.columns):
            yield "columns", "names a column twice", "give each a name of its own"
        used = {self.text, self.time, self.source, self.id, *self.map} - {""}
        for name in sorted(used - set(self.columns)) if self.columns else ():
            yield "columns", f'lacks "{name}", which is named beside it', "add it, or correct the name"


class PatternFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How log lines become events."""

    regex: str = ""
    """A regular expression of Python's re, in single quotes, that a line must fit from its beginning. Its
    named groups make the event: (?P<text>...) the text, (?P<ts>...) the time, (?P<source>...) the source,
    (?P<id>...) what identifies it; any others are values of a reading. Without the group text the whole line
    is. Empty takes every line as a text."""
    map: dict[str, Annotated[str, Meta(min_length=1)]] = {}
    """Tags of groups with values, where they are not the groups' names, as in { p = "pressure (bar)" }."""
    time_format: str = "iso"
    """How the group ts is written: "iso", "unix" or "unix_ms" (seconds or milliseconds since 1970), or a
    pattern of strptime, as in "%b %d %H:%M:%S"; of a time without a year the last such day is meant."""
    time_zone: str = ""
    """Time zone of times that name none: "UTC", "+01:00" or a name such as "Europe/Berlin". Without one such
    times are refused."""
    unmatched: Literal["refuse", "text", "skip"] = "refuse"
    """What becomes of a line that does not fit: a dead letter, a text as it stands, or nothing but a count in
    `status`."""
    max_line: Size = Size.parse("16KiB")
    """Longer lines are refused: what a regular expression may take grows with the line. At most "256KiB"."""
    strip_control: bool = True
    """Take colours and other control sequences of terminals out of the line first."""
    encoding: Literal["utf-8", "latin-1", "cp1252"] = "utf-8"
    """How the files are encoded."""
    invalid: Literal["refuse", "replace"] = "refuse"
    """What becomes of a line with bytes that are not of the encoding: a dead letter, or it is read with a
    question mark in their place."""

    @property
    def groups(self) -> tuple[str, ...]:
        """The named groups, in order."""
        return tuple(re.compile(self.regex).groupindex)

    @property
    def has_time(self) -> bool:
        """Whether the pattern finds a time."""
        return "ts" in self.groups

    def faults(self) -> Iterator[SourceFault]:
        """What does not fit."""
        from pipeline.sources.patterns import SPECIAL_GROUPS, nests_repetitions

        try:
            groups = set(self.groups)
            nested = nests_repetitions(self.regex)
        except (re.error, RecursionError, OverflowError) as error:
            hint = "write it in single quotes, in the syntax of Python's re module"
            yield "regex", f"not a regular expression: {error}", hint
            return
        if nested:
            hint = "let the inner one give nothing back: write (a++)+ for (a+)+"
            yield "regex", "repeats a repetition: one line could take for ever", hint
        values = groups.difference(SPECIAL_GROUPS)
        if self.regex and not groups:
            yield "regex", "has no named group", "write (?P<text>...) around what the event is to say"
        if values and "text" in groups:
            hint = "remove one: an event is a text or a reading"
            yield "regex", f'has the group text beside the value "{min(values)}"', hint
        for name in sorted(set(self.map) - values):
            yield "map", f'names "{name}", which is no group of regex with a value', "correct the name"
        tags = [self.map.get(name, name) for name in values]
        if len(set(tags)) != len(tags) or any(len(tag) > MAX_TAG for tag in tags):
            hint = f"give each a tag of its own, of at most {MAX_TAG} characters"
            yield "map", "gives two values the same tag, or one too long", hint
        if not 1 <= self.max_line <= MAX_EVENT_BYTES:
            yield "max_line", "out of range", 'from "1B" to "256KiB"'
        if self.has_time:
            yield from _time_faults(self.time_format, self.time_zone)


def _time_faults(form: str, zone: str) -> Iterator[SourceFault]:
    from pipeline.sources.formats import time_reader, time_zone_named

    hint = 'as in "UTC", "+01:00" or "Europe/Berlin" (Debian\'s package tzdata)'
    try:
        time_zone_named(zone)
    except ValueError as error:
        yield "time_zone", str(error), hint
        return
    try:
        time_reader(form, zone)
    except ValueError as error:
        key = "time_zone" if "time_zone" in str(error) else "time_format"
        yield key, str(error), hint if key == "time_zone" else 'as in "iso" or "%Y-%m-%d %H:%M:%S%z"'
