"""Decode: bytes to events, strictly; what does not fit becomes a dead letter with its reason."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable

import msgspec

from pipeline.events import MAX_EVENT_BYTES, NAME_PATTERN, Batch, Event, Line, Origin, Reading, Text
from storage.windows import DeadLetter

__all__ = ["MAX_NESTING", "RefusedError", "decode", "decode_event", "event_time"]

MAX_NESTING = 64
_LATEST = 253_402_300_800.0  # 10000-01-01: a ts beyond it is milliseconds or worse
# So many bytes cannot nest deeper than msgspec's own limit (1,000) takes them; as every event's nesting is
# that of its kind, what nests deeper than MAX_NESTING is refused also there, and the reason found afterwards.
SMALL_BYTES = 1_000
MAX_REMEMBERED = 4_096
_decode: Callable[[bytes], Event] = msgspec.json.Decoder(Event).decode
_FAULTS = (msgspec.DecodeError, UnicodeError, RecursionError)
_is_name = re.compile(NAME_PATTERN).search
_names: dict[str, str] = {}  # that are known to be right
# Possessive, and the closing quote optional: linear also where a million quotes never close.
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)


class RefusedError(ValueError):
    """An input that is no event; the message says why and what would be right."""


def decode(batch: Batch, refusal: Callable[[Event], str] = lambda event: "") -> Batch:
    """Decode every line of a Batch; each becomes an event or a dead letter, none is lost.

    Args:
        batch: Lines.
        refusal: Why an exchange or feedback cannot be learned from with this base model, "" if it can.
    """
    events: list[Event] = []
    sources: list[str] = []
    times: list[float] = []
    arrivals: list[float] = []
    dead: list[DeadLetter] = []
    dead_lines: list[int] = []
    # The loop that every input passes: what nearly all have in common stands in it, the rest in functions.
    origin: Origin | None = None
    for number, line in enumerate(batch.lines):
        data = line.data
        if line.origin is not origin:
            origin = line.origin
            arrival, timed, allowed = origin.arrival, origin.timed, origin.allowed
        try:
            if line.refused:
                raise RefusedError(line.refused)
            if len(data) > SMALL_BYTES:
                _check_bounds(data)
            event = _decode(data)
            if (source := event.source) is None:
                source = origin.source
            else:
                source = _names.get(source) or _checked_name(source, "source")
                if allowed is not None:
                    _check_source(source, origin, allowed)
            if event.subject is not None and event.subject not in _names:
                _checked_name(event.subject, "subject")
            ts = event.ts
            if type(ts) is not float or not -_LATEST < ts < _LATEST:
                ts = event_time(event, arrival)
            kind = type(event)
            # Any base model can learn from readings and texts.
            if kind is not Reading and kind is not Text and (reason := refusal(event)):
                raise RefusedError(reason)
        except RefusedError as error:
            dead.append(dead_letter(line, str(error)))
            dead_lines.append(number)
            continue
        except _FAULTS as error:
            dead.append(dead_letter(line, _reason(data, error)))
            dead_lines.append(number)
            continue
        events.append(event)
        sources.append(source)
        times.append(ts)
        arrivals.append(ts if timed else arrival)
    numbers = sorted({*range(len(batch.lines))}.difference(dead_lines)) if dead else range(len(batch.lines))
    outcome = msgspec.structs.replace(batch.outcome, dead_letters=len(dead))
    return msgspec.structs.replace(
        batch,
        events=[*zip(numbers, events, strict=True)],
        sources=sources,
        times=times,
        arrivals=arrivals,
        dead=dead,
        dead_lines=dead_lines,
        outcome=outcome,
    )


def dead_letter(line: Line, reason: str) -> DeadLetter:
    """A refused line with its place and reason, cut at the size an event may have."""
    origin = line.origin
    return DeadLetter(origin.source, line.place, origin.arrival, reason, line.data[:MAX_EVENT_BYTES])


def decode_event(data: bytes) -> Event:
    """Decode one event.

    Raises: RefusedError; msgspec's own errors and RecursionError never get out.
    """
    try:
        _check_bounds(data)
        event = _decode(data)
    except _FAULTS as error:
        raise RefusedError(_reason(data, error)) from None
    for field in ("source", "subject"):
        name = getattr(event, field)
        if name is not None:
            _checked_name(name, field)
    return event


def event_time(event: Event, arrival: float) -> float:
    """Event time in seconds since 1970: the event's `ts`, else its arrival.

    Raises: RefusedError if `ts` is no time.
    """
    ts = event.ts
    if ts is None:
        return arrival
    if isinstance(ts, str):
        try:
            moment = datetime.datetime.fromisoformat(ts)
        except ValueError:
            raise RefusedError(f"ts {ts[:40]!r} is neither seconds since 1970 nor RFC 3339") from None
        if moment.tzinfo is None:
            raise RefusedError(f"ts {ts[:40]!r} has no time zone (append Z or an offset)")
        ts = moment.timestamp()
    if not -_LATEST < ts < _LATEST:
        raise RefusedError(f"ts {ts} is out of range (milliseconds? seconds since 1970 are taken)")
    return ts


def _checked_name(name: str, field: str) -> str:
    """The name, one object for each, so that the steps behind find it faster. Raises: RefusedError."""
    known = _names.get(name)
    if known is not None:
        return known
    if not _is_name(name):
        raise RefusedError(f"not an event: Expected `str` matching regex {NAME_PATTERN!r} - at `$.{field}`")
    if len(_names) >= MAX_REMEMBERED:  # names come from the events: remember only so many
        _names.clear()
    _names[name] = name
    return name


def _check_bounds(data: bytes) -> None:
    """Refuse what is too large or too deep. Raises: RefusedError."""
    if len(data) > MAX_EVENT_BYTES:
        raise RefusedError(f"an event of {len(data)} bytes; at most {MAX_EVENT_BYTES} are taken")
    # Cheap bound first: few brackets cannot nest deeply, and msgspec recurses on the C stack.
    if data.count(b"[") + data.count(b"{") > MAX_NESTING and _nesting(data) > MAX_NESTING:
        raise RefusedError(f"nested deeper than {MAX_NESTING}")


def _reason(data: bytes, error: Exception) -> str:
    """Why bytes that msgspec refused are no event."""
    try:
        _check_bounds(data)
    except RefusedError as refused:
        return str(refused)
    what = "an event" if isinstance(error, msgspec.ValidationError) else "JSON"
    return f"not {what}: {error}"


def _check_source(source: str, origin: Origin, allowed: frozenset[str]) -> None:
    if source != origin.source and source not in allowed:
        raise RefusedError(
            f"source {source!r} may not be named here: leave it out, or add it to the `sources` of "
            f"{origin.source!r}"
        )


def _nesting(data: bytes) -> int:
    depth = deepest = 0
    for token in _STRING_OR_BRACKET.finditer(data):
        mark = token.group()
        if mark in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif mark in b"]}":
            depth -= 1
    return deepest
