"""From topics to sources, and from payloads to events: what the table [sources.mqtt.topics] says.

A topic's rule decides which source a message speaks for. The event inside may name another one only if the
rule lists it, so that whoever may publish to one topic cannot speak as somebody else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec

from pipeline.events import NAME_PATTERN
from pipeline.source_settings import MqttTopic
from pipeline.sources.mqtt_settings import placeholders
from pipeline.sources.sparkplug import SparkplugHost, SparkplugTopic

__all__ = ["MAX_LINES", "Converted", "Route", "TopicMap"]

MAX_LINES = 1_000  # of one message: they share a chunk, which is never cut
MAX_ROUTES = 8_192  # topics whose rule is remembered
MAX_NAMES = 4_096  # sources that topics make
MAX_NUMBER_BYTES = 64
_MILLISECONDS = 1e11  # a time beyond it, in the year 5138 as seconds, is milliseconds
_NAME = re.compile(NAME_PATTERN)
_NUMBER = re.compile(rb"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_JSON: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])

Converted = list[tuple[bytes, str]]  # (an event as JSON, "") or (the bytes as received, why they are none)


class Route(msgspec.Struct, frozen=True):
    """What becomes of the messages of one topic.

    Attributes:
        source: Whom they speak for.
        allowed: Which other sources an event may name, None for any.
        convert: Payload -> events; None takes the payload as the event.
        refused: Why the topic has no source, "" if it has.
    """

    source: str
    allowed: frozenset[str] | None
    convert: Callable[[bytes], Converted] | None
    refused: str = ""


class TopicMap:
    """Finds the route of a topic.

    Args:
        source: Name of the configured source: what a rule without `source` speaks for.
        topics: Filter -> rule.
        sparkplug: Keeps the state of Sparkplug nodes.
        count: Counts something by name.
    """

    def __init__(
        self,
        source: str,
        topics: Mapping[str, MqttTopic],
        sparkplug: SparkplugHost,
        count: Callable[[str, int], None],
    ) -> None:
        self._source = source
        self._rules = [(_pattern(filter), rule) for filter, rule in topics.items()]
        self._sparkplug = sparkplug
        self._count = count
        self._routes: dict[bytes, Route | None] = {}
        self._names: dict[str, str] = {}

    def route(self, topic: bytes) -> Route | None:
        """The route of a topic, None where no rule lists it."""
        try:
            return self._routes[topic]
        except KeyError:
            if len(self._routes) >= MAX_ROUTES:
                self._routes.clear()
            route = self._routes[topic] = self._find(topic)
            return route

    def _find(self, topic: bytes) -> Route | None:
        try:
            text = topic.decode()
        except UnicodeDecodeError:
            return None
        if text.startswith("$"):
            return None
        for pattern, rule in self._rules:
            if match := pattern.fullmatch(text):
                return self._make(text, rule, match)
        return None

    def _make(self, topic: str, rule: MqttTopic, match: re.Match[str]) -> Route | None:
        allowed = None if "*" in rule.sources else frozenset(rule.sources)
        texts = {str(number): text for number, text in enumerate(match.groups(), 1)}
        node: SparkplugTopic | None = None
        if rule.payload == "sparkplug":
            node = SparkplugTopic.parse(topic)
            if node is None:
                return None
            texts |= {"group": node.group, "edge": node.edge, "device": node.device}
        template = rule.source or ("{group}.{edge}.{device}" if node else "")
        source, refused = self._name(template, texts)
        convert: Callable[[bytes], Converted] | None = None
        match rule.payload:
            case "lines":
                convert = _lines
            case "number":
                tag = _fill(rule.tag or "value", texts)
                if not 1 <= len(tag) <= 64:
                    refused = refused or f"the tag {tag[:80]!r} is not of 1 to 64 characters"
                convert = _number_converter(tag, rule.unit)
            case "json":
                convert = partial(_flat_json, rule.time, self._count)
            case "sparkplug":
                assert node is not None
                convert = partial(self._sparkplug.take, node)
        return Route(source, allowed, convert, refused)

    def _name(self, template: str, texts: Mapping[str, str]) -> tuple[str, str]:
        """The source that a template gives, and why it is none.

        Two texts may give one name ("Pump 1" and "pump-1"): only the first to come gets it, unless the other
        is that very name; else whoever may publish under one could speak as the other.
        """
        if not template or not placeholders(template):
            return template or self._source, ""
        text = _fill(template, texts).strip(".")
        name = re.sub(r"[^a-z0-9._-]", "-", text.lower())
        if not _NAME.match(name):
            return self._source, f"the topic gives the source {name[:80]!r}, which is no name"
        if len(self._names) >= MAX_NAMES and name not in self._names:
            return self._source, f"topics made {MAX_NAMES} sources already; no more are taken"
        owner = self._names.get(name)
        if owner is None or text == name:
            if owner not in (None, text):
                self._routes.clear()  # those of the other one
            self._names[name] = owner = text
        if owner != text:
            return self._source, f"the source {name!r} belongs to the topic part {owner[:80]!r}"
        return name, ""


def _pattern(filter: str) -> re.Pattern[str]:
    """A filter as a regular expression with a group for each wildcard; linear: no two touch."""
    if filter == "#":
        return re.compile(r"(.*)", re.DOTALL)
    levels = filter.split("/")
    if levels[-1] == "#":
        head = "/".join("([^/]*)" if level == "+" else re.escape(level) for level in levels[:-1])
        return re.compile(rf"{head}(?:/(.*))?", re.DOTALL)
    return re.compile("/".join("([^/]*)" if level == "+" else re.escape(level) for level in levels))


def _fill(template: str, texts: Mapping[str, str | None]) -> str:
    """Put texts in the places of a template; what has none becomes nothing."""
    return re.sub(r"\{(\w+)\}", lambda found: texts.get(found[1]) or "", template)


def _lines(payload: bytes) -> Converted:
    lines = [line for line in payload.split(b"\n", MAX_LINES + 1) if line.strip()]
    if payload.count(b"\n") > MAX_LINES:
        return [(payload, f"more than {MAX_LINES:,} lines in one message: send smaller ones")]
    return [(line, "") for line in lines]


def _number_converter(tag: str, unit: str) -> Callable[[bytes], Converted]:
    head = b'{"kind":"reading","values":{' + msgspec.json.encode(tag) + b":"
    tail = (
        b'},"units":{' + msgspec.json.encode(tag) + b":" + msgspec.json.encode(unit) + b"}}"
        if unit
        else b"}}"
    )

    def convert(payload: bytes) -> Converted:
        number = payload.strip()
        if len(number) > MAX_NUMBER_BYTES or not _NUMBER.fullmatch(number):
            return [(payload, 'not a number; `payload = "number"` takes one as in "21.5"')]
        return [(head + number + tail, "")]

    return convert


def _flat_json(time_key: str, count: Callable[[str, int], None], payload: bytes) -> Converted:
    try:
        found = _JSON.decode(payload)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return [(payload, 'not a JSON object; `payload = "json"` takes {"name": number, ...}')]
    time = found.pop(time_key, None) if time_key else None
    values = {
        name: float(value) if isinstance(value, bool) else value
        for name, value in found.items()
        if isinstance(value, (int, float)) and abs(value) < 1e300 and 1 <= len(name) <= 64
    }
    if len(values) < len(found):
        count("ignored_values", len(found) - len(values))
    if not values:
        return [(payload, "no numbers in the JSON object")]
    event: dict[str, object] = {"kind": "reading", "values": values}
    if isinstance(time, (int, float)) and not isinstance(time, bool):
        time = max(-1e300, min(time, 1e300))  # an integer of any length; decode refuses what is no time
        event["ts"] = time / 1_000 if abs(time) > _MILLISECONDS else time
    elif isinstance(time, str):
        event["ts"] = time
    elif time_key:
        return [(payload, f"no time under {time_key!r}")]
    try:
        return [(msgspec.json.encode(event), "")]
    except (OverflowError, UnicodeError):
        return [(payload, "a number of more than 64 bits")]
