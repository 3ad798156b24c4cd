"""What flows: events as producers send them, and the Batch that carries them through every step."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from storage.samples import Samples
from storage.windows import DeadLetter

__all__ = [
    "MAX_EVENT_BYTES",
    "NAME_PATTERN",
    "Batch",
    "Event",
    "KIND_OF",
    "Exchange",
    "Feedback",
    "Line",
    "Message",
    "Origin",
    "Outcome",
    "Reading",
    "Receipt",
    "Text",
]

MAX_EVENT_BYTES = 256 << 10
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$(?!\n)"  # Python's $ would also match before a final newline

Name = str  # decode checks NAME_PATTERN, once a name: msgspec would for every event, a third of its time
Tag = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Unit = Annotated[str, msgspec.Meta(max_length=16)]
Identity = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class _Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", gc=False):
    """Fields that every event has; `source` left out means the source that the event came through."""

    # gc=False here and below: made by the thousand, they hold nothing that could lead back to them.

    source: Name | None = None
    ts: float | str | None = None
    id: Identity | None = None
    subject: Name | None = None


class Reading(_Event, frozen=True, tag="reading", kw_only=True):
    """Values that a device measured at one moment."""

    values: Annotated[dict[Tag, float], msgspec.Meta(min_length=1)]
    units: dict[Tag, Unit] = {}


class Text(_Event, frozen=True, tag="text", kw_only=True):
    """A text that somebody or something wrote: a work order, a log line."""

    text: Annotated[str, msgspec.Meta(min_length=1)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One turn of an exchange."""

    role: Literal["system", "user", "assistant"]
    content: str


class Exchange(_Event, frozen=True, tag="exchange", kw_only=True):
    """A dialogue; the assistant's turns are learned."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1, max_length=256)]


class Feedback(_Event, frozen=True, tag="feedback", kw_only=True):
    """A verdict on an answer that was given under the response id `about`."""

    about: Identity
    rating: Annotated[int, msgspec.Meta(ge=-1, le=1)] = 0
    correction: str | None = None


Event = Reading | Text | Exchange | Feedback
KIND_OF: dict[type[Event], str] = {
    Reading: "reading",
    Text: "text",
    Exchange: "exchange",
    Feedback: "feedback",
}


class Origin(msgspec.Struct, frozen=True, gc=False):
    """Where a run of lines came from, shared by all of them.

    Attributes:
        source: Name of the configured source.
        input: Name of the partition within it, unique on the host ("files:cmms:/var/log/cmms.jsonl").
        arrival: When it arrived, seconds since 1970; in a replay, when it arrived at first.
        timed: Whether stream time takes the event's own `ts` (plain lines of a finite stream).
        began: When reading of this content began, seconds; a file that was truncated, or came in the place
            of a rotated one, holds other lines at the same offsets.
        allowed: Which other sources an event may name as its own here, None for any: whoever may write
            to this source may not write as another one.
    """

    source: str
    input: str
    arrival: float
    timed: bool = False
    began: float = 0.0
    allowed: frozenset[str] | None = None


class Line(msgspec.Struct, frozen=True, gc=False):
    """One input line before decoding.

    Attributes:
        data: The bytes as received, without the line end.
        offset: Where it begins in its input, bytes; -1 where an input has no position.
        origin: Where it came from.
        key: What the transport says identifies this delivery (an Idempotency-Key), "" for nothing; the
            event's own `id` goes before it.
        refused: Why the connector could not make an event of `data`, "" if it is one: a dead letter.
    """

    data: bytes
    offset: int
    origin: Origin
    key: str = ""
    refused: str = ""

    @property
    def place(self) -> str:
        """Position for people."""
        return f"{self.origin.input} byte {self.offset}" if self.offset >= 0 else self.origin.input


class Outcome(msgspec.Struct):
    """What became of the inputs of one Batch; every input ends in exactly one of these."""

    samples: int = 0
    duplicates: int = 0
    suppressed: int = 0
    dead_letters: int = 0
    dropped: int = 0
    near_duplicates: int = 0


class Receipt(msgspec.Struct, frozen=True):
    """What a connector gets back after the commit of a chunk that it handed over.

    Attributes:
        connector: Whose it is.
        token: What the connector put into the chunk.
        first, end: The chunk's lines in the Batch.
    """

    connector: object
    token: object
    first: int
    end: int


class Batch(msgspec.Struct):
    """The one item that flows. Steps return a changed copy; none buffers across calls.

    Attributes:
        lines: Inputs as received. Empty in a tick.
        now: Stream time of a tick, seconds; 0 in a finite stream, whose ticks close nothing.
        positions: Input -> position after this Batch, opaque to all but the connector.
        receipts: What to acknowledge after the commit.
        events: Decoded events with the number of their line.
        sources: Name of the source that each event is of.
        times: Event time of each event, seconds.
        arrivals: Stream time of each event, seconds, never going back within an origin.
        hashes: 16 bytes an event, zeros where nothing identifies it.
        references: Source -> reference values of its deadband, those that changed.
        dead: Refused inputs.
        dead_lines: The number of the line of each.
        deleted_letters: Numbers of dead letters that go with the commit: purged, or fed again in it.
        outcome: Counts; those dropped in a full queue are not among the lines.
        samples: What is stored, in order (without seqs: the commit gives them).
    """

    lines: list[Line]
    now: float = 0.0
    positions: dict[str, bytes] = {}
    receipts: list[Receipt] = []
    events: list[tuple[int, Event]] = []
    sources: list[str] = []
    times: list[float] = []
    arrivals: list[float] = []
    hashes: list[bytes] = []
    references: dict[str, bytes] = {}
    dead: list[DeadLetter] = []
    dead_lines: list[int] = []
    deleted_letters: list[int] = []
    outcome: Outcome = msgspec.field(default_factory=Outcome)
    samples: Samples = msgspec.field(default_factory=Samples)
