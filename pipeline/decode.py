"""Decode: bytes to events, strictly; what does not fit becomes a dead letter with its reason."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable

import msgspec

from pipeline.events import MAX_EVENT_BYTES, Batch, Event, Line, Origin
from storage.windows import DeadLetter

__all__ = ["MAX_NESTING", "RefusedError", "decode", "decode_event", "event_time"]

MAX_NESTING = 64
_LATEST = 253_402_300_800.0  # 10000-01-01: a ts beyond it is milliseconds or worse
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
# Possessive, and the closing quote optional: linear also where a million quotes never close.
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)


class RefusedError(ValueError):
    """An input that is no event; the message says why and what would be right."""


def decode(batch: Batch, refusal: Callable[[Event], str] = lambda event: "") -> Batch:
    """Decode every line of a Batch; each becomes an event or a dead letter, none is lost.

    Args:
        batch: Lines.
        refusal: Why an event cannot be learned from with this base model, "" if it can.
    """
    events: list[tuple[int, Event]] = []
    times: list[float] = []
    arrivals: list[float] = []
    dead: list[DeadLetter] = []
    dead_lines: list[int] = []
    for number, line in enumerate(batch.lines):
        try:
            if line.refused:
                raise RefusedError(line.refused)
            event = decode_event(line.data)
            if event.source is not None and line.origin.allowed is not None:
                _check_source(event.source, line.origin, line.origin.allowed)
            when = event_time(event, line.origin.arrival)
            if reason := refusal(event):
                raise RefusedError(reason)
        except RefusedError as error:
            dead.append(dead_letter(line, str(error)))
            dead_lines.append(number)
            continue
        events.append((number, event))
        times.append(when)
        arrivals.append(when if line.origin.timed else line.origin.arrival)
    outcome = msgspec.structs.replace(batch.outcome, dead_letters=len(dead))
    return msgspec.structs.replace(
        batch,
        events=events,
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
    if len(data) > MAX_EVENT_BYTES:
        raise RefusedError(f"an event of {len(data)} bytes; at most {MAX_EVENT_BYTES} are taken")
    # Cheap bound first: few brackets cannot nest deeply, and msgspec recurses on the C stack.
    if data.count(b"[") + data.count(b"{") > MAX_NESTING and _nesting(data) > MAX_NESTING:
        raise RefusedError(f"nested deeper than {MAX_NESTING}")
    try:
        return _decoder.decode(data)
    except msgspec.ValidationError as error:
        raise RefusedError(f"not an event: {error}") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise RefusedError(f"not JSON: {error}") from None


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
