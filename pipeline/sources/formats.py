"""From lines of a file to events: JSON as it is, CSV and log lines by their settings; and what both need.

A shaper belongs to one file, whose header it may know, and makes one line of each line that it is given: an
event as JSON, or the raw bytes with the reason why they are none. Offsets stay those of the raw line.
"""

from __future__ import annotations

import datetime
import math
import re
import zoneinfo
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

from pipeline.events import MAX_EVENT_BYTES, NAME_PATTERN, Line, Origin

if TYPE_CHECKING:
    from pipeline.settings import Source

__all__ = [
    "Encoding",
    "JsonLines",
    "RowError",
    "Shaper",
    "checked_id",
    "checked_source",
    "clean",
    "event_json",
    "lines_of",
    "number",
    "shaper_for",
    "texts_of",
    "time_reader",
    "time_zone_named",
]

Encoding = Literal["utf-8", "latin-1", "cp1252"]
NumberedLine = tuple[int, bytes]  # offset of its first byte, the line without its end
_MAX_ID = 128  # as in an event
_LATEST_S = 253_402_300_800.0  # 10000-01-01, as in decode
_CONTROL = re.compile(
    # ANSI: CSI, OSC (title, links), single escapes; then the rest of C0, DEL and C1, but tab and line end.
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b\n]*(?:\x07|\x1b\\)?|\x1b[@-Z\\^_]"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
_source = re.compile(NAME_PATTERN).match
_encode = msgspec.json.Encoder().encode
_is_offset = re.compile(r"[+-]\d\d:\d\d").fullmatch


class RowError(ValueError):
    """A line that no event can be made of; the message says why and what to do."""


class Shaper(Protocol):
    """Makes events of the lines of one file."""

    def shape(
        self, lines: Sequence[NumberedLine], origin: Origin, first_line: bytes
    ) -> tuple[list[Line], int]:
        """Make events of lines that follow each other.

        Args:
            lines: Not empty; the first may be the first of its file.
            origin: Where they come from.
            first_line: The file's first line where reading began behind it, else b"".
        Returns: events and refused lines in order, and how many lines are neither, by the settings.
        """

    def is_whole(self, line: bytes) -> bool:
        """Whether the last line of a file, which has no line end, is complete."""


class JsonLines:
    """Lines that are events already; decode judges them."""

    def shape(
        self, lines: Sequence[NumberedLine], origin: Origin, first_line: bytes
    ) -> tuple[list[Line], int]:
        """Hand over lines as they are."""
        return [Line(data, at, origin) for at, data in lines], 0

    def is_whole(self, line: bytes) -> bool:
        """Whether it is whole JSON."""
        try:
            msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return False
        return True


def shaper_for(source: Source) -> Callable[[], Shaper]:
    """What makes the shaper of each file of a source."""
    match source.format:
        case "jsonl":
            return JsonLines
        case "csv":
            from pipeline.format_settings import CsvFormat
            from pipeline.sources.csv_rows import CsvPlan, CsvRows

            csv_plan = CsvPlan(source.csv or CsvFormat())
            return lambda: CsvRows(csv_plan)
        case "lines":
            from pipeline.format_settings import PatternFormat
            from pipeline.sources.patterns import LinePlan, PatternLines

            line_plan = LinePlan(source.pattern or PatternFormat())
            return lambda: PatternLines(line_plan)


def lines_of(
    lines: Sequence[NumberedLine],
    origin: Origin,
    make: Callable[..., bytes | None],
    *columns: Iterable[object],
) -> tuple[list[Line], int]:
    """Make an event of each line; the reason stands beside one of which none can be made.

    Args:
        make: (what each column has for a line, the line) -> the event, None to skip it; raises RowError.
        columns: One value a line each.
    Returns: the lines, and how many were skipped.
    """
    out: list[Line] = []
    skipped = 0
    for (at, data), *values in zip(lines, *columns, strict=True):
        try:
            event = make(*values, data)
        except RowError as error:
            out.append(Line(data, at, origin, "", str(error)))
            continue
        if event is None:
            skipped += 1
        else:
            out.append(Line(event, at, origin))
    return out, skipped


def texts_of(lines: Sequence[NumberedLine], encoding: Encoding, *, replace: bool) -> list[str | None]:
    """Decode lines, all at once where that goes; None for each that is not of the encoding."""
    if not lines:
        return []  # to join and split them again would give one
    raw = b"\n".join([data for _, data in lines])
    try:
        return [*raw.decode(encoding, "replace" if replace else "strict").split("\n")]
    except UnicodeDecodeError:
        return [_decoded(data, encoding) for _, data in lines]


def _decoded(data: bytes, encoding: Encoding) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def clean(text: str) -> str:
    """Take ANSI escapes and control characters out of a text; tab and line end stay.

    >>> clean("\x1b[31mpump\x1b[0m stopped\x07")
    'pump stopped'
    """
    return _CONTROL.sub("", text)


def number(text: str, decimal: str = ".") -> float:
    """Read a finite number. Raises: RowError.

    >>> number("-1,5", ","), number("3e2")
    (-1.5, 300.0)
    """
    plain = text if decimal == "." else text.replace(".", "_").replace(decimal, ".")
    try:
        value = math.nan if "_" in plain else float(plain)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RowError(f"{text[:40]!r} is no number")
    return value


def checked_source(name: str) -> str:
    """A name as events carry it. Raises: RowError if it is none."""
    if _source(name) is None:
        raise RowError(f"{name[:70]!r} is no name of a source (a-z, 0-9, dot, underscore, dash, at most 64)")
    return name


def checked_id(text: str) -> str:
    """An id as events carry it. Raises: RowError if it is too long."""
    if len(text) > _MAX_ID:
        raise RowError(f"an id of {len(text)} characters; at most {_MAX_ID} are taken")
    return text


def event_json(event: dict[str, object]) -> bytes:
    """Write an event. Raises: RowError if it becomes larger than an event may be."""
    data = _encode(event)
    if len(data) > MAX_EVENT_BYTES:
        raise RowError(f"becomes an event of {len(data)} bytes; at most {MAX_EVENT_BYTES} are taken")
    return data


def time_zone_named(name: str) -> datetime.tzinfo | None:
    """A time zone: "" is none, "UTC", "+01:00", or a name of the time zone database.

    Raises: ValueError if it is none of them.
    """
    if not name:
        return None
    if name in ("UTC", "Z"):
        return datetime.UTC
    if _is_offset(name):
        return datetime.datetime.fromisoformat(f"2000-01-01T00:00{name}").tzinfo
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, OSError):
        raise ValueError(f"no time zone {name!r} is installed here") from None


def time_reader(form: str, zone_name: str) -> Callable[[str], float]:
    """Make what turns a time as text into seconds since 1970; it raises RowError for what is none.

    Args:
        form: "iso", "unix" or "unix_ms" (numbers), or a pattern of strptime, which holds a %.
        zone_name: Of times that name none; of an hour that comes twice the first is meant.
    Raises: ValueError if one of them is not usable.
    """
    zone = time_zone_named(zone_name)
    if form in ("unix", "unix_ms"):
        divisor = 1.0 if form == "unix" else 1000.0
        return lambda text: _in_range(number(text) / divisor, text)
    if form != "iso" and "%" not in form:
        raise ValueError('expected "iso", "unix", "unix_ms" or a pattern of strptime, as in "%d.%m.%Y %H:%M"')
    parse = datetime.datetime.fromisoformat if form == "iso" else _strptime(form)
    if form != "iso":
        _check_strptime(form)
    has_zone = "%z" in form

    def read(text: str) -> float:
        try:
            moment = parse(text.strip())
        except (ValueError, OverflowError):
            raise RowError(f"{text[:40]!r} is no time of the form {form}") from None
        if moment.tzinfo is None:
            if zone is None:
                raise RowError(f"{text[:40]!r} has no time zone: set time_zone to the one it is meant in")
            moment = moment.replace(tzinfo=zone)
        try:
            return _in_range(moment.timestamp(), text)
        except (ValueError, OverflowError):
            raise RowError(f"the time {text[:40]!r} is out of range") from None

    if form != "iso" and not has_zone and zone is None:
        raise ValueError("times of this form name no time zone: set time_zone to the one they are meant in")
    return read


def _in_range(seconds: float, text: str) -> float:
    if not -_LATEST_S < seconds < _LATEST_S:
        raise RowError(f"the time {text[:40]!r} is out of range; is it in another unit?")
    return seconds


def _strptime(form: str) -> Callable[[str], datetime.datetime]:
    strptime = datetime.datetime.strptime
    if any(mark in form for mark in ("%Y", "%y", "%G", "%c", "%x", "%D")):
        return lambda text: strptime(text, form)

    def in_this_year(text: str) -> datetime.datetime:
        """The last year in which it is not more than a day ahead: syslog writes none."""
        today = datetime.datetime.now(datetime.UTC)
        moment = None
        for year in (today.year + 1, today.year, today.year - 1):
            try:
                moment = strptime(f"{year} {text}", f"%Y {form}")
            except ValueError:
                if year < today.year:
                    raise
                continue  # 29 February, perhaps
            aware = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
            if aware <= today + datetime.timedelta(days=1):
                return moment
        raise ValueError("in no year")

    return in_this_year


def _check_strptime(form: str) -> None:
    """Try a pattern on a time that it wrote itself. Raises: ValueError."""
    sample = datetime.datetime(2024, 5, 17, 13, 45, 6, tzinfo=datetime.UTC)
    try:
        datetime.datetime.strptime(sample.strftime(form), form)
    except (ValueError, re.error) as error:
        raise ValueError(f"not a pattern of strptime: {error}") from None
