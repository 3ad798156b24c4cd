"""What an OPC UA server says about its nodes, as readings and texts.

Values of one source with the same timestamp in one message become one reading. A value that the connector saw
last from the same node, with the same timestamp, is the same sample: a server repeats it after each new
subscription, and so does a node that is named anew; it is left out, counted as "redelivered".

| what the server says | what becomes of it | counted as |
|---|---|---|
| good | stored | |
| uncertain | stored | "uncertain" |
| bad, or a number that is none (NaN, infinite) | left out, or a dead letter (`bad_values`) | "bad" |
| its queue ran over before this value | stored | "gaps" |
| no value, or an empty text | left out | "empty" |
| another type than the node's table expects | a dead letter | |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

import msgspec
from asyncua import ua

from pipeline.events import Line, Origin
from pipeline.source_settings import OpcuaNode, OpcuaSource
from pipeline.sources.inbox import SourceState
from pipeline.sources.made import encode_reading, encode_text

__all__ = ["Change", "Shaper", "status_name"]

OVERFLOW: Final = 0x0480  # the bits that say: this is about a data value, and its queue ran over
CODE: Final = 0xFFFF_0000  # without those bits
QUOTED: Final = 1_000  # characters of a value in a dead letter


class Change(msgspec.Struct, frozen=True):
    """What a server says of a node: its id as configured, its settings, the value."""

    node: str
    settings: OpcuaNode
    data: ua.DataValue


class Shaper:
    """Makes lines of changes.

    Args:
        settings: The source's table.
        state: Where it counts.
    """

    def __init__(self, settings: OpcuaSource, state: SourceState) -> None:
        self._refuse_bad = settings.bad_values == "refuse"
        self._state = state
        self._last: dict[str, tuple[float, object]] = {}  # node -> timestamp and value that came last
        self._units: dict[str, dict[str, str]] = {}
        for node in settings.nodes.values():
            if node.unit:
                self._units.setdefault(node.source, {})[node.tag] = node.unit

    def lines(self, changes: Sequence[Change], origin: Origin) -> list[Line]:
        """Make lines of one message's changes, in the order of their time."""
        made: list[tuple[float, Line]] = []
        groups: dict[tuple[str, float | None], list[dict[str, float]]] = {}
        for change in changes:
            ts = _timestamp(change.data)
            value = change.data.Value.Value if change.data.Value is not None else None
            if self._repeated(change.node, ts, value, change.data):
                continue
            at = origin.arrival if ts is None else ts
            source = change.settings.source
            refused = self._refused(change, value)
            if refused is None:
                continue
            if refused:
                made.append((at, Line(_quoted(change, value, ts), -1, origin, refused=refused)))
            elif change.settings.text:
                made.append((at, Line(encode_text(_text(value), ts=ts, source=source), -1, origin)))
            else:
                _put(groups.setdefault((source, ts), []), change.settings.tag, float(value))  # type: ignore[arg-type]
        for (source, ts), readings in groups.items():
            at = origin.arrival if ts is None else ts
            made += [(at, self._reading(values, ts, source, origin)) for values in readings]
        made.sort(key=lambda pair: pair[0])
        return [line for _, line in made]

    def _reading(self, values: dict[str, float], ts: float | None, source: str, origin: Origin) -> Line:
        units = _only(self._units.get(source, {}), values)
        return Line(encode_reading(values, ts=ts, source=source, units=units), -1, origin)

    def _repeated(self, node: str, ts: float | None, value: object, data: ua.DataValue) -> bool:
        """Whether this is the sample that came last from the node; count what its status tells."""
        if ts is not None:
            sample = (ts, _comparable(value))
            if self._last.get(node) == sample:
                self._state.count("redelivered")
                return True
            self._last[node] = sample
        code = _code(data)
        if code & OVERFLOW == OVERFLOW:
            self._state.count("gaps")
        if code >> 30 == 1:
            self._state.count("uncertain")
        return False

    def _refused(self, change: Change, value: object) -> str | None:
        """Why no event can be made of a value, "" if one can; None: it is counted and left out."""
        code = _code(change.data)
        if code >> 30 >= 2:
            return self._bad(f"the server calls the value bad: {status_name(code)}")
        if value is None or value == "" or (isinstance(value, ua.LocalizedText) and not value.Text):
            self._state.count("empty")
            return None
        if change.settings.text:
            if isinstance(value, (str, int, float, ua.LocalizedText)):
                return ""
            return f"holds {type(value).__name__}, of which no text can be made: remove the node"
        if not isinstance(value, (int, float)):
            hint = "set text = true" if isinstance(value, (str, ua.LocalizedText)) else "remove the node"
            return f"holds {type(value).__name__}, no number: {hint}"
        if not math.isfinite(value):
            return self._bad("the value is no finite number")
        return ""

    def _bad(self, why: str) -> str | None:
        self._state.count("bad")
        return why if self._refuse_bad else None


def status_name(code: int) -> str:
    """Name of a status code, as in "BadNodeIdUnknown"."""
    return str(ua.StatusCode(code & CODE).name)  # type: ignore[arg-type]


def _code(data: ua.DataValue) -> int:
    return int(data.StatusCode.value) if data.StatusCode is not None else 0


def _timestamp(data: ua.DataValue) -> float | None:
    """When it was measured; else when the server got it; else nobody knows."""
    moment: datetime | None = data.SourceTimestamp or data.ServerTimestamp
    return moment.timestamp() if moment is not None else None


def _put(readings: list[dict[str, float]], tag: str, value: float) -> None:
    """Put a value into the first of the readings that lacks its tag."""
    for values in readings:
        if tag not in values:
            values[tag] = value
            return
    readings.append({tag: value})


def _only(units: Mapping[str, str], values: Mapping[str, float]) -> dict[str, str]:
    return {tag: units[tag] for tag in values if tag in units}


def _text(value: object) -> str:
    """A value as Unicode: bytes that are no UTF-8 come as lone surrogates, which no JSON can hold."""
    text = str(value.Text) if isinstance(value, ua.LocalizedText) else str(value)
    return text.encode(errors="replace").decode()


def _comparable(value: object) -> object:
    """A value that equals itself: NaN does not. Of what is large only the hash is kept."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return value
    text = repr(value)
    return text if len(text) < QUOTED else hash(text)


def _quoted(change: Change, value: object, ts: float | None) -> bytes:
    """What the dead letter shows."""
    quoted = None if value is None else _text(value)[:QUOTED]
    return msgspec.json.encode({"node": change.node, "value": quoted, "ts": ts})
