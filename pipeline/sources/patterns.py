"""Log lines become texts, or readings where a pattern takes numbers out of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.events import Line, Origin
from pipeline.sources.formats import (
    RowError,
    checked_id,
    checked_source,
    clean,
    event_json,
    lines_of,
    number,
    texts_of,
    time_reader,
)

if TYPE_CHECKING:
    from pipeline.format_settings import PatternFormat

__all__ = ["SPECIAL_GROUPS", "LinePlan", "PatternLines", "nests_repetitions"]

SPECIAL_GROUPS = ("text", "ts", "source", "id")


class LinePlan:
    """The settings, ready to be used; shared by all files of a source."""

    def __init__(self, settings: PatternFormat) -> None:
        self.settings = settings
        self.max_bytes = int(settings.max_line)
        self.match = re.compile(settings.regex).match if settings.regex else None
        self.time = time_reader(settings.time_format, settings.time_zone) if settings.has_time else None
        groups = [name for name in settings.groups if name not in SPECIAL_GROUPS]
        self.values = [(name, settings.map.get(name, name)) for name in groups]


class PatternLines:
    """Makes an event of each line of one file; what it knows is the same for all files."""

    def __init__(self, plan: LinePlan) -> None:
        self._plan = plan
        self._settings = plan.settings

    def shape(
        self, lines: Sequence[tuple[int, bytes]], origin: Origin, first_line: bytes
    ) -> tuple[list[Line], int]:
        """Make an event of each line that fits the pattern; the settings say what becomes of the others."""
        settings = self._settings
        texts = texts_of(lines, settings.encoding, replace=settings.invalid == "replace")
        if settings.strip_control:
            texts = _cleaned(texts)
        return lines_of(lines, origin, self._event, texts)

    def is_whole(self, line: bytes) -> bool:
        """Nothing tells: it is taken as it is."""
        return True

    def _event(self, text: str | None, data: bytes) -> bytes | None:
        """Write the event of a line, None for one that is to be skipped. Raises: RowError."""
        if len(data) > self._plan.max_bytes:
            raise RowError(f"a line of more than {self._plan.max_bytes} bytes: raise max_line to take it")
        if text is None:
            raise RowError(f'not {self._settings.encoding} text: set encoding, or invalid = "replace"')
        if not text.strip():
            return None  # of an empty line nothing is lost
        if self._plan.match is None:
            return event_json({"kind": "text", "text": text})
        found = self._plan.match(text)
        if found is not None:
            return event_json(self._fields(found))
        match self._settings.unmatched:
            case "skip":
                return None
            case "text":
                return event_json({"kind": "text", "text": text})
            case "refuse":
                raise RowError("does not fit the pattern")

    def _fields(self, found: re.Match[str]) -> dict[str, object]:
        groups = found.groupdict()
        event: dict[str, object] = {"kind": "reading"}
        if self._plan.time and (ts := groups.get("ts")) is not None:
            event["ts"] = self._plan.time(ts)
        if source := groups.get("source"):
            event["source"] = checked_source(source)
        if identity := groups.get("id"):
            event["id"] = checked_id(identity)
        if not self._plan.values:
            event["kind"] = "text"
            event["text"] = groups.get("text", found.string)
            if not event["text"]:
                raise RowError("the group text is empty")
            return event
        values = {tag: _value(name, text) for name, tag in self._plan.values if (text := groups[name])}
        if not values:
            raise RowError("no group with a value took part in the match")
        event["values"] = values
        return event


def _value(name: str, text: str) -> float:
    try:
        return number(text)
    except RowError as error:
        raise RowError(f"group {name!r}: {error}") from None


def _cleaned(texts: list[str | None]) -> list[str | None]:
    if None in texts:
        return [text if text is None else clean(text) for text in texts]
    return [*clean("\n".join(text for text in texts if text is not None)).split("\n")]


def nests_repetitions(pattern: str) -> bool:
    """Whether a pattern repeats what repeats itself, as in (a+)+: that can take for ever on one line.

    A possessive inner repetition, (a++)+, or an atomic group gives nothing back, and so is none. What it does
    not see is an alternation whose branches begin alike, as in (a|aa)+.
    """
    from re import _parser  # type: ignore[attr-defined] # no public way to a parsed pattern

    return _nested(_parser.parse(pattern), inside=False)


def _nested(part: Any, *, inside: bool) -> bool:
    """Walk a parsed pattern: lists of (operation, argument), nested in tuples and lists of arguments."""
    if isinstance(part, tuple) and len(part) == 2 and str(part[0]) in ("MAX_REPEAT", "MIN_REPEAT"):
        low, high, body = part[1]
        # A few turns cost little, and an inner one that always takes as many has nothing to try.
        return (inside and high > max(low, 8)) or _nested(body, inside=inside or high > 8)
    if isinstance(part, tuple) and len(part) == 2 and str(part[0]) in ("POSSESSIVE_REPEAT", "ATOMIC_GROUP"):
        return _nested(part[1], inside=False)
    if isinstance(part, (tuple, list)) or hasattr(part, "data"):
        return any(_nested(inner, inside=inside) for inner in part)
    return False
