"""What a tap or a dry run may show of an event: text that every redaction has seen."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping
from typing import Any

import msgspec

from pipeline.events import Event, Feedback, Reading, Text
from pipeline.rules import SourceRules

__all__ = ["Redactor", "format_source", "format_time", "printable"]

MAX_TEXT = 1_000
MAX_BRACKETS = 256  # of JSON that is looked into; deeper than an event may be, and no risk to the stack


class Redactor:
    """Makes text that may leave the process.

    A rule for some sources is applied to all: whose data this is may be what is wrong with it.

    Args:
        rules: The configuration's.
    """

    def __init__(self, rules: SourceRules) -> None:
        self._rules = rules

    def text(self, text: str) -> str:
        """Any text."""
        return _cut(self._rules.redact_text(text))

    def quoted(self, text: str) -> str:
        """A text as JSON writes it."""
        return _cut(self._rules.redact_text(_json(self._rules.redact_text(text))))

    def event(self, event: Event) -> str:
        """What an event says, as JSON: the values of a reading, the fields of the others."""
        return _cut(self._rules.redact_text(_json(self._strings(_content(event)))))

    def raw(self, data: bytes) -> str:
        """A line as it came."""
        if data.count(b"[") + data.count(b"{") <= MAX_BRACKETS:
            try:
                # Into its strings first: a rule does not see through JSON's escapes.
                inside = self._strings(msgspec.json.decode(data))
                return _cut(self._rules.redact_text(_json(inside)))
            except (msgspec.MsgspecError, UnicodeError, RecursionError):
                pass
        return self.text(self._rules.redact_data(data).decode(errors="replace"))

    def _strings(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._rules.redact_text(value)
        if isinstance(value, list):
            return [self._strings(one) for one in value]
        if isinstance(value, dict):
            return {self._rules.redact_text(key): self._strings(one) for key, one in value.items()}
        return value


def printable(text: str) -> str:
    """A text that a terminal shows as it is: no byte of an event may steer it."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def format_time(seconds: float) -> str:
    """A time for people, in local time; "-" where there is none."""
    if seconds > 0:
        with contextlib.suppress(ValueError, OverflowError, OSError):
            return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "seconds")
    return f"{'-':<19}"


def format_source(
    name: str, connected: bool | None, detail: str, counts: Mapping[str, int] = {}, waiting: int | None = None
) -> str:
    """How a source stands, as a line.

    Args:
        name: Of its connector, "mqtt:plant".
        connected, detail, counts: As it says itself.
        waiting: Lines that wait, None where nobody asked.
    """
    kind, _, source = name.partition(":")
    standing = {True: "connected", False: "not connected", None: ""}[connected]
    words = [f"{standing}: {detail}" if standing and detail else standing or detail or "reading"]
    words += [f"{count:,} {what.replace('_', ' ')}" for what, count in sorted(counts.items()) if count]
    if waiting is not None:
        words.append(f"{waiting:,} waiting")
    return printable(f"source       {source}  {kind}  {', '.join(words)}")


def _content(event: Event) -> Any:
    match event:
        case Reading():
            return event.values
        case Text():
            return event.text
        case Feedback():
            return {"about": event.about, "rating": event.rating, "correction": event.correction}
        case _:
            return msgspec.to_builtins(event.messages)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... ({len(text):,} characters)"
