"""What holds for a source: its own settings, or the defaults of its kind of event."""

from __future__ import annotations

import re
from functools import cached_property

import msgspec

from pipeline.config import source_defaults
from pipeline.events import Batch, Event, Exchange, Feedback, Message, Reading, Text
from pipeline.near_duplicates import NearDuplicates
from pipeline.render import Deadband, ReadingText
from pipeline.settings import Config, Render, Source
from storage.windows import DeadLetter

__all__ = ["SourceRules"]

MAX_REMEMBERED = 4_096
MAX_NAMES = 262_144  # of tags, in all that is remembered of how sources are written: 26 MB
MAX_BRACKETS = 256  # of JSON that is looked into: deeper than an event may be, and no risk to the stack
ALL_MOVED = -1.0  # a band that every value has left
# What JSON can write as itself, which a rule must see; and a backslash of its own, which begins nothing.
_ESCAPED = re.compile(rb"\\\\|\\/|\\u([0-9A-Fa-f]{4})")


class SourceRules:
    """Answers per source what dedup, redact and render ask; an unnamed source gets the defaults."""

    def __init__(self, config: Config) -> None:
        self._sources = {source.name: source for source in config.sources}
        self._redactions = [(rule.compiled(), frozenset(rule.sources)) for rule in config.redact]
        self._horizon = config.dedup.horizon_events
        self._renderers: dict[str, ReadingText] = {}
        self._names = 0  # of tags, that they remember

    def dedup_mode(self, source: str, kind: str) -> str:
        """ "delivery", "content" or "none" for events of a kind from a source."""
        if not self._horizon:
            return "none"
        defaults = source_defaults(source, kind)
        return self._sources.get(source, defaults).dedup or defaults.dedup or "none"

    def deadband(self, source: str) -> Deadband | None:
        """The source's deadband, None if every reading is kept."""
        return self._deadbands.get(source)

    def near_duplicates(self) -> dict[str, NearDuplicates]:
        """A memory, still empty, for each source whose near duplicates are dropped."""
        return {
            name: NearDuplicates(source.near_duplicates, source.near_horizon)
            for name, source in self._sources.items()
            if source.near_duplicates and self._horizon
        }

    def render(self, source: str, event: Reading) -> str:
        """A reading as text."""
        return (self._renderers.get(source) or self._renderer(source))(event)

    def _renderer(self, source: str) -> ReadingText:
        named = self._sources.get(source)
        how = named.render if named else Render()
        made = ReadingText(
            source,
            template=how.template,
            tags=how.tags,
            units=how.units,
            digits=how.digits,
            grown=self._grown,
        )
        if len(self._renderers) >= MAX_REMEMBERED:  # names come from the events: remember only so many
            self._forget()
        self._renderers[source] = made
        return made

    def _grown(self, names: int) -> None:
        self._names += names
        if self._names > MAX_NAMES:
            self._forget()

    def _forget(self) -> None:
        self._renderers.clear()
        self._names = 0

    def redact(self, batch: Batch) -> Batch:
        """Take out of events and dead letters what the rules name, before anything is hashed or stored."""
        if not self._redactions:
            return batch
        events = [
            (number, self._redact_event(event, source))
            for (number, event), source in zip(batch.events, batch.sources, strict=True)
        ]
        return msgspec.structs.replace(batch, events=events, dead=[*map(self._redact_letter, batch.dead)])

    @cached_property
    def _deadbands(self) -> dict[str, Deadband]:
        return {name: band for name, source in self._sources.items() if (band := _deadband(source))}

    def _clean(self, text: str, source: str | None) -> str:
        for (pattern, replacement), sources in self._redactions:
            if not sources or source is None or source in sources:
                text = pattern.sub(replacement, text)
        return text

    def redact_text(self, text: str) -> str:
        """Take out of a text what any rule names, also one for other sources."""
        return self._clean(text, None)

    def redact_data(self, data: bytes) -> bytes:
        """The same for bytes that need not be an event."""
        text = _ESCAPED.sub(_unescape, data).decode(errors="surrogateescape")
        return self._redact_strings(self._clean(text, None).encode(errors="surrogateescape"))

    def _redact_strings(self, data: bytes) -> bytes:
        """Take out of JSON what a rule sees only in its strings: a line end, say, cannot stand as itself."""
        if b"\\" not in data or data.count(b"[") + data.count(b"{") > MAX_BRACKETS:
            return data
        try:
            value = msgspec.json.decode(data)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return data
        clean = self._cleaned(value)
        return data if clean == value else msgspec.json.encode(clean)

    def _cleaned(self, value: object) -> object:
        match value:
            case str():
                return self.redact_text(value)
            case list():
                return [self._cleaned(one) for one in value]
            case dict():
                return {self.redact_text(key): self._cleaned(one) for key, one in value.items()}
        return value

    def _redact_letter(self, letter: DeadLetter) -> DeadLetter:
        # Every rule: whose event this was meant to be is not known. The reason may quote the input.
        data, reason = self.redact_data(letter.data), self.redact_text(letter.reason)
        # A letter without a reason is one that was deleted.
        return msgspec.structs.replace(letter, data=data, reason=reason or "refused")

    def _redact_event(self, event: Event, source: str) -> Event:
        match event:
            case Text():
                return msgspec.structs.replace(event, text=self._clean(event.text, source))
            case Exchange():
                messages = [Message(m.role, self._clean(m.content, source)) for m in event.messages]
                return msgspec.structs.replace(event, messages=messages)
            case Reading():
                return self._redact_reading(event, source)
            case Feedback() if event.correction is not None:
                return msgspec.structs.replace(event, correction=self._clean(event.correction, source))
            case _:
                return event

    def _redact_reading(self, event: Reading, source: str) -> Reading:
        # Tags and units are text too, and are rendered.
        values = {self._clean(tag, source): value for tag, value in event.values.items()}
        units = {self._clean(tag, source): self._clean(unit, source) for tag, unit in event.units.items()}
        return msgspec.structs.replace(event, values=values, units=units)


def _unescape(found: re.Match[bytes]) -> bytes:
    if found[0] == b"\\/":
        return b"/"
    code = int(found[1] or b"22", 16)
    if code < 0x20 or 0xD800 <= code < 0xE000 or chr(code) in '"\\':
        return found[0]
    return chr(code).encode()


def _deadband(source: Source) -> Deadband | None:
    silence, on_change = float(source.max_silence), frozenset(source.render.on_change)
    if isinstance(source.deadband, dict) and source.deadband:
        return Deadband(source.deadband, None, silence, on_change)
    if not isinstance(source.deadband, dict) and source.deadband:
        return Deadband({}, source.deadband, silence, on_change)
    return Deadband({}, ALL_MOVED, silence, on_change) if on_change else None
