"""What must hold in [sources.mqtt] beyond single values: addresses, topic filters, templates."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipeline.config_decode import Secret
from pipeline.events import NAME_PATTERN

if TYPE_CHECKING:
    from pipeline.source_settings import MqttSource, MqttTopic, SourceFault

__all__ = ["broker_address", "faults", "placeholders"]


def placeholders(template: str) -> list[str]:
    """The names in braces of a template."""
    return re.findall(r"\{(\w*)\}", template)


def broker_address(url: str) -> tuple[str, int, bool]:
    """Host, port and whether TLS is used. Raises: ValueError with what is wrong."""
    parts = urlsplit(url)
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
        raise ValueError('expected an address as in "mqtts://broker.local:8883"')
    if parts.username is not None or parts.password is not None:
        raise ValueError("user and password belong into the keys username and password")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("nothing may follow the port: topics are listed in the table topics")
    secure = parts.scheme == "mqtts"
    return parts.hostname, parts.port or (8883 if secure else 1883), secure


def faults(mqtt: MqttSource) -> Iterator[SourceFault]:
    """What single values of [sources.mqtt] cannot show: (key, what is wrong, what to do)."""
    secure = True
    try:
        secure = broker_address(mqtt.url)[2]
    except ValueError as error:
        yield "url", str(error), 'write it as in "mqtts://broker.local:8883"'
    for key in () if secure else ("ca_file", "cert_file", "key_file"):
        if getattr(mqtt, key):
            yield key, "has no effect without encryption", 'begin the url with "mqtts://"'
    if mqtt.key_file and not mqtt.cert_file:
        yield "key_file", "has no effect without cert_file", "name the certificate too"
    if mqtt.password and not isinstance(mqtt.password, Secret):
        yield "password", "stands in the configuration", 'write "${cred:NAME}" or "${file:PATH}"'
    if mqtt.password and not mqtt.username:
        yield "username", "missing; the password needs it", "name the user"
    if len(mqtt.client_id.encode()) > 256 or not mqtt.client_id.isprintable():
        yield "client_id", "not a client id", "at most 256 printable characters"
    if not 60 <= mqtt.session_expiry < 2**32:
        yield "session_expiry", "shorter than a minute: every restart would lose messages", 'as in "7d"'
    if not 2 <= mqtt.keepalive <= 65_535:
        yield "keepalive", "out of range", 'from "2s" to "18h"'
    if mqtt.probe_topic and (set("+#") & set(mqtt.probe_topic) or mqtt.probe_topic.startswith("$")):
        yield "probe_topic", "not a topic", "a topic has no wildcards and does not begin with $"
    if not mqtt.topics:
        yield "topics", "no topic: there is nothing to subscribe to", '"plant/events" = {}'
    for at, (topic, rule) in enumerate(mqtt.topics.items()):
        for message, hint in _topic_faults(topic, rule):
            yield "topics", f'"{topic}": {message}', hint
        for other in list(mqtt.topics)[:at]:
            if _overlap(topic.split("/"), other.split("/")):
                message = f'"{topic}" overlaps "{other}": a message under both would come twice'
                yield "topics", message, "make them exclude each other"


def _topic_faults(topic: str, rule: MqttTopic) -> Iterator[tuple[str, str]]:
    levels = topic.split("/")
    wild = sum(level in ("+", "#") for level in levels)
    if not topic or "\0" in topic or len(topic.encode()) > 65_535:
        yield "not a topic filter", "from 1 to 65535 bytes of text"
    elif any(set("+#") & set(level) and level not in ("+", "#") for level in levels) or "#" in levels[:-1]:
        yield "not a topic filter", "+ and # take a whole level, and # is the last"
    elif topic.startswith("$"):
        yield "topics that begin with $ are the broker's own", "remove it"
    known = {str(number) for number in range(1, wild + 1)}
    of_nodes = {"group", "edge", "device"} if rule.payload == "sparkplug" else set()
    for key, template, places in (("source", rule.source, known | of_nodes), ("tag", rule.tag, known)):
        for name in set(placeholders(template)) - places:
            hint = f"known here: {', '.join(sorted(places)) or 'none'}"
            yield f"{key} has a place {{{name}}} for what the filter does not have", hint
    if rule.source and not placeholders(rule.source) and not re.fullmatch(NAME_PATTERN, rule.source):
        yield f'source "{rule.source}" is no name', "a-z, 0-9, dot, underscore and dash, at most 64"
    for name in rule.sources:
        if name != "*" and not re.fullmatch(NAME_PATTERN, name):
            yield f'"{name}" in sources is no name', 'a-z, 0-9, dot, underscore and dash; or ["*"]'
    own = {"sources": ("event", "lines"), "tag": ("number",), "unit": ("number",), "time": ("json",)}
    for key, kinds in own.items():
        if getattr(rule, key) and rule.payload not in kinds:
            yield f'{key} has no effect for payload "{rule.payload}"', "remove it"


def _overlap(one: list[str], other: list[str]) -> bool:
    """Whether some topic matches both filters."""
    for a, b in zip(one, other, strict=False):
        if "#" in (a, b):
            return True
        if "+" not in (a, b) and a != b:
            return False
    longer = one if len(one) > len(other) else other
    return len(one) == len(other) or longer[min(len(one), len(other)) :] == ["#"]
