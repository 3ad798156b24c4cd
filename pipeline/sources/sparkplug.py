"""Sparkplug B: what nodes publish becomes readings, through the births that say what their aliases mean.

A node's birth (NBIRTH) and those of its devices (DBIRTH) list every metric with its name, alias and datatype.
The messages after it carry aliases only, numbered by `seq` from 0 to 255 and round again over the node and
its devices. What the host knows of a node:

| message | node unknown | node born |
|---|---|---|
| NBIRTH | born: aliases kept, seq taken | born anew, without devices; the same once more: no change |
| DBIRTH | unborn: rebirth asked, values taken | seq followed, the device's aliases kept |
| NDATA, DDATA | unborn: rebirth asked; only named values taken | seq followed, values taken |
| DDEATH | unborn: rebirth asked | seq followed, the device forgotten |
| NDEATH | nothing | forgotten, if its bdSeq is the birth's; else it is of an earlier session |

A gap in seq is counted and asks for a rebirth; values are still taken, since aliases hold until a birth.
What births said is kept over a restart: `rows` gives it to the commit that holds their values, `restore`
takes it back. Where the seq stood is not: the first message after a restart shows no gap.

Source: Eclipse Sparkplug 3.0.
"""

from __future__ import annotations

import hashlib
import math
import time
from array import array
from collections.abc import Callable, Iterable, Mapping
from itertools import islice

import msgspec

from pipeline.sources import sparkplug_wire as wire
from pipeline.sources.made import encode_reading

__all__ = ["SparkplugHost", "SparkplugTopic", "rebirth_payload"]

ROWS = "sparkplug"  # names the rows among those of a connector
MAX_NODES = 1_024
MAX_NODE_METRICS = 16_384  # with its devices, each of which counts as one more
MAX_HOST_METRICS = 100_000  # some 300 bytes each
MAX_NAME = 256  # characters of a metric, group, node or device
MAX_TAG = 64
MAX_READINGS = 1_000  # of one message: they share a chunk, which is never cut
MAX_TAGS = 500  # of one reading: the longest tags fit in what an event may have
MAX_ROW_BYTES = 64 << 10  # a node with more is not kept over a restart: some 1,000 metrics
REBIRTH_PERIOD_S = 60.0
SILENT_S = 3_600.0  # a node that was silent for so long may lose its place to another

_KINDS = frozenset({"NBIRTH", "NDATA", "NDEATH", "DBIRTH", "DDATA", "DDEATH"})
_CONTROLS = ("Node Control/", "Device Control/")
_BDSEQ = "bdSeq"
_SIGNED = {1: 8, 2: 16, 3: 32, 4: 64}  # datatype -> bits
_UNSIGNED = {5: 8, 6: 16, 7: 32, 8: 64}
_FLOATS = frozenset({9, 10})
_BOOLEAN = 11
_SELF_EVIDENT = {wire.FLOAT: 9, wire.DOUBLE: 10, wire.BOOLEAN: 11}  # field -> datatype, where none is given

Converted = list[tuple[bytes, str]]  # (an event as JSON, "") or (the bytes as received, why they are none)


class SparkplugTopic(msgspec.Struct, frozen=True):
    """Who sent a message, and of which kind it is; `device` is "" for a message of the node itself."""

    group: str
    kind: str
    edge: str
    device: str = ""

    @classmethod
    def parse(cls, topic: str) -> SparkplugTopic | None:
        """Read "spBv1.0/GROUP/KIND/EDGE[/DEVICE]"; None for commands, STATE and what is no such topic."""
        namespace, *levels = topic.split("/")
        if namespace != "spBv1.0" or not 3 <= len(levels) <= 4 or levels[1] not in _KINDS:
            return None
        if (levels[1][0] == "D") != (len(levels) == 4):
            return None
        if any(not 0 < len(level) <= MAX_NAME or set(level) & set("+#\0") for level in levels):
            return None
        return cls(*levels)


class _Known(msgspec.Struct, frozen=True, gc=False):
    """What a birth says of a metric. The tag is None where there is none for it, "" where it is no value."""

    tag: str | None
    datatype: int


class _Table(msgspec.Struct):
    """The metrics of a node itself or of one device."""

    names: dict[str, _Known] = {}
    aliases: dict[int, _Known] = {}

    @property
    def size(self) -> int:
        """What it counts towards the limits; nothing is had for nothing."""
        return max(len(self.names), len(self.aliases)) + 1

    def find(self, metric: wire.Metric) -> _Known | None:
        """What is known of a metric; one with a name is known by that alone."""
        if metric.name:
            return self.names.get(metric.name) or _Known(_tag(metric.name), metric.datatype)
        return None if metric.alias is None else self.aliases.get(metric.alias)


class _Node(msgspec.Struct):
    """A node that was born.

    Attributes:
        birth: bdSeq and timestamp of its birth.
        seq: Of its last message, -1 where that is not known.
        heard_s: When that came, seconds of the host's clock.
        times: seq -> timestamp of the last message that had it.
        tables: Device -> its metrics, "" for the node's own.
        size: Of all tables.
    """

    birth: tuple[int | None, int]
    seq: int
    heard_s: float
    times: array[int]
    tables: dict[str, _Table] = {}
    size: int = 0


class _Row(msgspec.Struct, frozen=True, array_like=True):
    """What a commit keeps of a node."""

    group: str
    edge: str
    birth: tuple[int | None, int]
    tables: dict[str, _Table]


class SparkplugHost:
    """Keeps the state of nodes, and makes readings of their messages.

    Args:
        count: Counts something by name: `gaps` (messages lost), `unborn` (messages of a node without a
            birth), `unknown_aliases`, `ignored_values` (texts, what is not finite, names without a tag),
            `stale_deaths`, `rebirths` (asked for).
        rebirth: Asks a node for its births, by the topic to publish `rebirth_payload` to; None to ask nobody.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        count: Callable[[str, int], None],
        rebirth: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count = count
        self._rebirth = rebirth
        self._clock = clock
        self._nodes: dict[tuple[str, str], _Node] = {}
        self._size = 0
        self._asked_s: dict[tuple[str, str], float] = {}
        self._changed: set[tuple[str, str]] = set()

    def restore(self, name: str, positions: Mapping[str, bytes]) -> None:
        """Take back what commits kept under `name`; what cannot be read is asked for again."""
        decode = msgspec.msgpack.Decoder(_Row).decode
        for key, data in positions.items():
            if key.startswith(f"{name}:{ROWS}:") and len(self._nodes) < MAX_NODES:
                try:
                    row = decode(data)
                except msgspec.MsgspecError:
                    continue
                size = sum(table.size for table in row.tables.values())
                times = array("Q", bytes(8 * 256))
                node = _Node(row.birth, -1, self._clock(), times, row.tables, size)
                self._nodes[row.group, row.edge] = node
                self._size += size

    def rows(self, name: str) -> dict[str, bytes]:
        """What the next commit must keep under `name`: nodes whose births changed; b"" forgets one."""
        rows = {}
        for group, edge in self._changed:
            node = self._nodes.get((group, edge))
            row = b""
            if node is not None:
                row = msgspec.msgpack.encode(_Row(group, edge, node.birth, node.tables))
            digest = hashlib.blake2b(f"{group}/{edge}".encode(), digest_size=16).hexdigest()
            rows[f"{name}:{ROWS}:{digest}"] = row if len(row) <= MAX_ROW_BYTES else b""
        self._changed.clear()
        return rows

    def take(self, node: SparkplugTopic, payload: bytes) -> Converted:
        """Make readings of a message, each as (JSON, ""), or give it back with the reason against it."""
        try:
            message = wire.read_payload(payload)
        except wire.WireError as error:
            return [(payload, f"no Sparkplug B payload: {error}; see what publishes to this topic")]
        if message.seq is not None and message.seq > 255:
            return [(payload, f"its seq {message.seq} is not of 0 to 255; see what publishes to this topic")]
        key = (node.group, node.edge)
        if node.kind == "NDEATH":
            self._end(key, message)
            return []
        known = self._nodes.get(key)
        again = False
        if node.kind == "NBIRTH":
            known, again = self._begin(key, known, message)
            if known is None:
                return [(payload, f"{MAX_NODES:,} nodes are known already: subscribe to fewer")]
        elif known is None:
            self._count("unborn", 1)
            self._ask(key)
        else:
            again = self._follow(key, known, message)
        if node.kind == "DDEATH":
            if known and not again:
                self._drop(known, node.device)
                self._changed.add(key)
            return []
        if node.kind.endswith("BIRTH"):
            table = _read_birth(message.metrics)
            if known:
                self._changed.add(key)
                if fault := self._keep(known, node.device, table):
                    return [(payload, fault)]
        else:
            table = (known and known.tables.get(node.device)) or _Table()
        return self._readings(node, message, table, payload)

    def _begin(
        self, key: tuple[str, str], known: _Node | None, message: wire.Payload
    ) -> tuple[_Node | None, bool]:
        """The node of a birth, None if there is no room, and whether this birth is the one that is known."""
        birth = (_bdseq(message), message.timestamp)
        if known and message.timestamp and known.birth == birth:
            return known, True
        if known is None and not self._make_room():
            return None, False
        self._forget(key)
        times = array("Q", bytes(8 * 256))
        seq = message.seq or 0
        times[seq] = message.timestamp
        node = self._nodes[key] = _Node(birth, seq, self._clock(), times)
        self._changed.add(key)
        return node, False

    def _make_room(self) -> bool:
        """Whether there is room for one node more; one that is long silent makes it."""
        if len(self._nodes) < MAX_NODES:
            return True
        oldest = min(self._nodes, key=lambda key: self._nodes[key].heard_s)
        if self._clock() - self._nodes[oldest].heard_s < SILENT_S:
            return False
        self._forget(oldest)
        return True

    def _forget(self, key: tuple[str, str]) -> None:
        if node := self._nodes.pop(key, None):
            self._size -= node.size
            self._changed.add(key)

    def _drop(self, node: _Node, device: str) -> None:
        if table := node.tables.pop(device, None):
            node.size -= table.size
            self._size -= table.size

    def _keep(self, node: _Node, device: str, table: _Table) -> str:
        """Keep the metrics of a birth; say why not if there are too many."""
        self._drop(node, device)
        if node.size + table.size > MAX_NODE_METRICS:
            return (
                f"the node and its devices have {MAX_NODE_METRICS:,} metrics or more: let them publish fewer"
            )
        if self._size + table.size > MAX_HOST_METRICS:
            return f"the nodes have {MAX_HOST_METRICS:,} metrics or more: subscribe to fewer"
        node.tables[device] = table
        node.size += table.size
        self._size += table.size
        return ""

    def _follow(self, key: tuple[str, str], node: _Node, message: wire.Payload) -> bool:
        """Follow a node's seq; tells whether this message came before.

        The broker delivers again what was not acknowledged when a connection ended, in the old order: neither
        that nor the last message twice is a gap.
        """
        node.heard_s = self._clock()
        expected = (node.seq + 1) % 256
        seq = message.seq
        if seq is None:  # some encoders leave out a 0
            if expected or node.seq < 0:
                return False
            seq = 0
        if node.seq >= 0 and seq != expected:
            if seq == node.seq or (message.timestamp and node.times[seq] == message.timestamp):
                return True
            self._count("gaps", (seq - expected) % 256)
            self._ask(key)
        node.seq = seq
        node.times[seq] = message.timestamp
        return False

    def _end(self, key: tuple[str, str], message: wire.Payload) -> None:
        """A node died, unless the death is of an earlier session: the broker sends it late."""
        node = self._nodes.get(key)
        if node is None:
            return
        of = _bdseq(message)
        if None not in (of, node.birth[0]) and of != node.birth[0]:
            self._count("stale_deaths", 1)
        else:
            self._forget(key)

    def _ask(self, key: tuple[str, str]) -> None:
        """Ask for a rebirth, at most once a minute a node and of MAX_NODES nodes a minute."""
        if self._rebirth is None:
            return
        now = self._clock()
        if now - self._asked_s.get(key, -math.inf) < REBIRTH_PERIOD_S:
            return
        if len(self._asked_s) >= MAX_NODES:
            self._asked_s = {k: asked for k, asked in self._asked_s.items() if now - asked < REBIRTH_PERIOD_S}
            if len(self._asked_s) >= MAX_NODES:
                return
        self._asked_s[key] = now
        self._count("rebirths", 1)
        self._rebirth(f"spBv1.0/{key[0]}/NCMD/{key[1]}")

    def _readings(
        self, node: SparkplugTopic, message: wire.Payload, table: _Table, payload: bytes
    ) -> Converted:
        unknown = ignored = 0
        moments: dict[int, dict[str, float]] = {}
        for metric in message.metrics:
            known = table.find(metric)
            if known is None:
                unknown += 1
                continue
            if known.tag == "" or metric.is_null:
                continue
            value = _value(metric, metric.datatype or known.datatype)
            values = moments.setdefault(metric.timestamp or message.timestamp, {})
            if known.tag is None or value is None or known.tag in values:
                ignored += 1
            else:
                values[known.tag] = value
        if ignored:
            self._count("ignored_values", ignored)
        events = [
            (encode_reading(values, ts=moment / 1_000 if moment else None), "")
            for moment, all_values in moments.items()
            for values in _cut(all_values)
        ]
        if unknown:
            self._count("unknown_aliases", unknown)
            self._ask((node.group, node.edge))
        if not events and (unknown or (ignored and (node.group, node.edge) not in self._nodes)):
            return [(payload, self._reason(node))]
        if len(events) > MAX_READINGS:
            return [
                (payload, f"it makes more than {MAX_READINGS:,} readings: send fewer times in one message")
            ]
        return events

    def _reason(self, node: SparkplugTopic) -> str:
        who = f"{node.edge}/{node.device}" if node.device else node.edge
        what = "it is asked for" if self._rebirth else "set rebirth = true, or restart the node"
        return f"no birth of {who[:80]!r} names its metrics, so they mean nothing; {what}"


def rebirth_payload(now_s: float | None = None) -> bytes:
    """The command that asks a node for its births, to publish to the topic that `rebirth` was given.

    Args:
        now_s: Seconds since 1970; None for the clock's.
    """
    return wire.encode_rebirth(int((time.time() if now_s is None else now_s) * 1_000))


def _read_birth(metrics: Iterable[wire.Metric]) -> _Table:
    """What a birth says; of two names that make one tag the first has it."""
    names: dict[str, _Known] = {}
    aliases: dict[int, _Known] = {}
    owners: dict[str, str] = {}
    for metric in metrics:
        if not metric.name:
            continue
        tag = _tag(metric.name)
        if tag and owners.setdefault(tag, metric.name) != metric.name:
            tag = None
        known = _Known(tag, metric.datatype)
        if len(metric.name) <= MAX_NAME:
            names[metric.name] = known
        if metric.alias is not None:
            aliases[metric.alias] = known
    return _Table(names, aliases)


def _tag(name: str) -> str | None:
    """The tag of a metric: the end of its name says most. None if the name is too long, "" for no value."""
    if name == _BDSEQ or name.startswith(_CONTROLS):
        return ""
    return name[-MAX_TAG:] if len(name) <= MAX_NAME else None


def _bdseq(message: wire.Payload) -> int | None:
    for metric in message.metrics:
        if metric.name == _BDSEQ and metric.field in (wire.INT, wire.LONG):
            return int(metric.value or 0)
    return None


def _value(metric: wire.Metric, datatype: int) -> float | None:
    """The value as a number, None where it is none, is not finite or is not of its datatype."""
    value, field = metric.value, metric.field
    if value is None:
        return None
    datatype = datatype or _SELF_EVIDENT.get(field, 0)
    if datatype in _FLOATS and field in (wire.FLOAT, wire.DOUBLE):
        return value if math.isfinite(value) else None
    if datatype == _BOOLEAN and field == wire.BOOLEAN:
        return float(value)
    # UInt32 comes in the long field from some encoders, so the field's width and the type's are apart.
    if not isinstance(value, int) or field not in (wire.INT, wire.LONG):
        return None
    if bits := _UNSIGNED.get(datatype):
        return float(value) if value < 1 << bits else None
    if bits := _SIGNED.get(datatype):
        return _signed(value, bits, 32 if field == wire.INT else 64)
    return None


def _signed(value: int, bits: int, width: int) -> float | None:
    """Two's complement, in the width of the field or, as some write it, in that of the type."""
    whole = value - (1 << width) if value >> (width - 1) else value
    half = 1 << (bits - 1)
    if -half <= whole < half:
        return float(whole)
    return float(value - 2 * half) if half <= value < 2 * half else None


def _cut(values: dict[str, float]) -> Iterable[dict[str, float]]:
    """Parts of which each fits in an event; none of nothing."""
    items = iter(values.items())
    while part := dict(islice(items, MAX_TAGS)):
        yield part
