"""Tap: events and samples as they pass each step, for whoever looks; redacted, sampled, and never waited for.

A step costs one look at an attribute and Batch while nobody taps. While somebody does, the dataflow picks at
most `rate` events a second and puts what each step made of them into the client's bounded queue; what finds
no room is counted. The client's own thread makes text of it. A picked event has a number, by which it can be
followed from step to step.

Nothing unredacted leaves: what is shown goes through every rule as text, whatever its source, as dead letters
do; and what is too long to be shown whole is not shown at all, because a cut could hide half of a match.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, Literal

import msgspec

from pipeline.commit import Committed
from pipeline.control import Answers, ControlError, Request
from pipeline.events import Batch, Event, Line
from pipeline.flow import Step
from pipeline.tap_text import Redactor

__all__ = ["MAX_RATE", "STEPS", "Shown", "Tap"]

StepName = Literal["source", "decode", "redact", "dedup", "tokenize", "commit"]
STEPS: Final[tuple[StepName, ...]] = ("source", "decode", "redact", "dedup", "tokenize", "commit")
MAX_RATE = 200.0
QUEUE_ITEMS = 1_000
WHOLE_BYTES = 8 << 10  # longer lines are told by their size
SHOWN_TOKENS = 512
MAX_UNDER_WAY = 16
LOOK_S = 0.5
SAY_S = 1.0
# How its text is made, in the client's thread, and of what.
_Told = tuple[Callable[[Any], str], Any]
log = logging.getLogger("edgewater.tap")


class Shown(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One event at one step, as a client gets it.

    Attributes:
        at: When, seconds since 1970.
        event: Its number since the first look at this process.
        step: Name of the step it passed.
        source: Whose event it is.
        kind: "reading", "text", "exchange", "feedback"; "" before it is decoded.
        text: What the step made of it.
        tokens: How many, where it was tokenized.
        seq, window: Where it is stored.
        over: Whether nothing follows.
    """

    at: float
    event: int
    step: StepName
    source: str
    kind: str = ""
    text: str = ""
    tokens: int | None = None
    seq: int | None = None
    window: int | None = None
    over: bool = False


class _Picked:
    """Events of one Batch that one client follows, by their lines."""

    def __init__(self, client: _Client, first_number: int, lines: list[int]) -> None:
        self.client, self.first_number, self.lines = client, first_number, lines


class _Client:
    """One who looks: a budget, a bounded queue and what did not get into it."""

    def __init__(self, request: Request) -> None:
        self.source = request.source
        self.rate = min(request.rate or MAX_RATE, MAX_RATE)
        self.left = request.max_events or 1 << 62
        self.open = 0  # picked, and not at their end yet
        self.missed = 0
        self._items: deque[Callable[[], Shown]] = deque()
        self._filled = threading.Condition()
        self._most = max(1.0, self.rate)  # at once, after a pause
        self._allowed, self._asked = self._most, time.monotonic()

    def budget(self) -> int:
        """How many events may be picked now."""
        now = time.monotonic()
        self._allowed = min(self._most, self._allowed + (now - self._asked) * self.rate)
        self._asked = now
        return min(int(self._allowed), self.left)

    def spend(self, picked: int) -> None:
        self._allowed -= picked
        self.left -= picked
        self.open += picked

    def put(self, item: Callable[[], Shown]) -> None:
        with self._filled:
            if len(self._items) >= QUEUE_ITEMS:
                self.missed += 1
                return
            self._items.append(item)
            self._filled.notify()

    def take(self, timeout_s: float) -> tuple[list[Callable[[], Shown]], bool]:
        """What came, waiting for something; and whether nothing more will come."""
        with self._filled:
            if not self._items and not self.ended:
                self._filled.wait(timeout_s)
            items = list(self._items)
            self._items.clear()
            return items, self.ended

    @property
    def ended(self) -> bool:
        return not self.left and not self.open

    def close_one(self) -> None:
        with self._filled:
            self.open -= 1
            self._filled.notify()


class Tap:
    """Watches the steps of one dataflow.

    Args:
        redactor: Makes text that may leave the process.
        decode: Token ids -> their text; called in the dataflow's thread.
    """

    def __init__(self, redactor: Redactor, decode: Callable[[list[int]], str]) -> None:
        self._redactor = redactor
        self._decode = decode
        self._clients: tuple[_Client, ...] = ()
        self._lock = threading.Lock()
        self._numbered = 0
        # By the list of lines, which a Batch keeps through all steps; held, so that no other gets its id.
        self._under_way: dict[int, tuple[list[Line], list[_Picked]]] = {}

    # -- in the dataflow's thread -----------------------------------------------------------------

    def watching(self, steps: dict[str, Step]) -> dict[str, Step]:
        """The same steps, with a look at what they made."""
        return {name: self._watching(name, step) for name, step in steps.items()}

    def committed(self, batch: Batch, committed: Committed) -> None:
        """A Batch is on stable storage."""
        if self._clients:
            self._safely(self._note_commit, batch, committed)

    def _watching(self, name: str, step: Step) -> Step:
        note = {
            "decode": self._note_decode, "redact": self._note_redact, "dedup": self._note_dedup,
            "tokenize": self._note_tokenize,
        }.get(name)  # fmt: skip
        if note is None:
            return step

        def watched(batch: Batch) -> Batch:
            after = step(batch)
            if self._clients:
                self._safely(note, batch, after)
            return after

        return watched

    def _safely(self, note: Callable[..., None], *batches: Any) -> None:
        try:
            note(*batches)
        except Exception:  # ours, and no reason to stop storing
            log.exception("a tap failed, and is closed")
            with self._lock:
                for client in self._clients:
                    client.left = client.open = 0
                self._clients = ()
            self._under_way.clear()

    def _note_decode(self, before: Batch, after: Batch) -> None:
        first, self._numbered = self._numbered, self._numbered + len(before.lines)
        if not before.lines:
            return
        events = dict(after.events)
        dead = dict(zip(after.dead_lines, after.dead, strict=True))
        picks = [_pick(client, first + 1, before, events) for client in self._clients]
        picks = [pick for pick in picks if pick.lines]
        for pick in picks:
            for n in pick.lines:
                line = before.lines[n]
                self._show(pick, n, "source", line.origin.source, "", self._raw(line))
                if n in dead:
                    reason = self._redactor.text, f"refused: {dead[n].reason}"
                    self._show(pick, n, "decode", line.origin.source, "", reason, over=True)
                else:
                    self._show_event(pick, n, "decode", line, events[n])
        if picks:
            if len(self._under_way) >= MAX_UNDER_WAY:
                self._under_way.pop(next(iter(self._under_way)))
            self._under_way[id(after.lines)] = (after.lines, picks)

    def _note_redact(self, before: Batch, after: Batch) -> None:
        events = None
        for pick in self._picks(after):
            events = dict(after.events) if events is None else events
            for n in pick.lines:
                if n in events:
                    self._show_event(pick, n, "redact", after.lines[n], events[n])

    def _note_dedup(self, before: Batch, after: Batch) -> None:
        picks = self._picks(after)
        if not picks:
            return
        events, kept = dict(before.events), {n for n, _ in after.events}
        names = {
            "duplicates": "duplicate",
            "near_duplicates": "near duplicate",
            "suppressed": "within the deadband",
        }
        counts = msgspec.structs.asdict(after.outcome)
        other = {"samples", "dead_letters", "dropped"}
        why = [names.get(name, name) for name, count in counts.items() if count and name not in other]
        for pick in picks:
            for n in pick.lines:
                if n not in events:
                    continue
                source, kind = _named(events[n], after.lines[n])
                # A Batch holds counts only: where both kinds of dropped events are in it, both are said.
                text = "new" if n in kept else " or ".join(why) or "dropped"
                self._show(pick, n, "dedup", source, kind, (str, text), over=n not in kept)

    def _note_tokenize(self, before: Batch, after: Batch) -> None:
        picks = self._picks(after)
        if not picks:
            return
        places = {n: (i, event) for i, (n, event) in enumerate(after.events)}
        samples = after.samples
        for pick in picks:
            for n in pick.lines:
                if n not in places:
                    continue
                i, event = places[n]
                source, kind = _named(event, after.lines[n])
                start = sum(samples.lengths[:i])
                count = samples.lengths[i]
                told: _Told = (str, "(too long to show)")
                if count <= SHOWN_TOKENS:
                    told = self._redactor.quoted, self._decode(list(samples.ids[start : start + count]))
                self._show(pick, n, "tokenize", source, kind, told, tokens=count)

    def _note_commit(self, batch: Batch, committed: Committed) -> None:
        found = self._under_way.pop(id(batch.lines), None)
        if found is None:
            return
        places = {n: (i, event) for i, (n, event) in enumerate(batch.events)}
        for pick in found[1]:
            for n in pick.lines:
                if n in places:
                    i, event = places[n]
                    source, kind = _named(event, batch.lines[n])
                    seq = batch.samples.first_seq + i
                    window = _window_of(seq, committed)
                    self._show(pick, n, "commit", source, kind, (str, ""), seq=seq, window=window, over=True)
                pick.client.close_one()

    def _picks(self, batch: Batch) -> list[_Picked]:
        found = self._under_way.get(id(batch.lines))
        return found[1] if found else []

    def _show_event(self, pick: _Picked, n: int, step: StepName, line: Line, event: Event) -> None:
        source, kind = _named(event, line)
        told: _Told = (self._redactor.event, event)
        if len(line.data) > WHOLE_BYTES:
            told = str, f"({len(line.data):,} bytes: too long to show)"
        self._show(pick, n, step, source, kind, told)

    def _raw(self, line: Line) -> _Told:
        if len(line.data) > WHOLE_BYTES:
            return str, f"({len(line.data):,} bytes: too long to show)"
        return self._redactor.raw, line.data

    def _show(
        self, pick: _Picked, n: int, step: StepName, source: str, kind: str,
        told: _Told, **more: Any,
    ) -> None:  # fmt: skip
        at, number, (make, what) = time.time(), pick.first_number + n, told
        clean = self._redactor.text
        pick.client.put(
            lambda: Shown(
                at=at, event=number, step=step, source=clean(source), kind=kind, text=make(what), **more
            )
        )

    # -- in a client's thread ---------------------------------------------------------------------

    def follow(self, request: Request) -> Answers:
        """What passes from now on; yields what is shown, and at most once a second what was not."""
        if not 0 <= request.rate <= MAX_RATE:
            raise ControlError(f"a rate of 0 to {MAX_RATE:.0f} events a second can be followed")
        if request.max_events < 0:
            raise ControlError("max_events is 0 or more")
        client = _Client(request)
        with self._lock:
            self._clients = (*self._clients, client)
        try:
            yield {"steps": STEPS}
            yield from self._shown(client)
        finally:
            with self._lock:
                self._clients = tuple(one for one in self._clients if one is not client)

    def _shown(self, client: _Client) -> Iterator[dict[str, Any] | None]:
        told, said = 0, 0.0
        while True:
            items, ended = client.take(LOOK_S)
            for item in items:
                yield msgspec.to_builtins(item())
            missed, now = client.missed, time.monotonic()
            if missed > told and (ended or now - said >= SAY_S):
                yield {"not_shown": missed - told}
                told, said = missed, now
            if ended:
                return
            yield None


def _pick(client: _Client, first_number: int, batch: Batch, events: dict[int, Event]) -> _Picked:
    """Choose from a Batch what a client follows, spread evenly over it."""
    if not client.left:
        return _Picked(client, first_number, [])
    found: range | list[int] = range(len(batch.lines))
    if client.source:
        wanted = client.source
        found = [
            n for n, line in enumerate(batch.lines)
            if (line.origin.source if n not in events else events[n].source or line.origin.source) == wanted
        ]  # fmt: skip
    count = min(client.budget(), len(found))
    if count < client.left:  # else these were the last that it asked for
        client.missed += len(found) - count
    client.spend(count)
    return _Picked(client, first_number, [found[k * len(found) // count] for k in range(count)])


def _named(event: Event, line: Line) -> tuple[str, str]:
    return event.source or line.origin.source, str(type(event).__struct_config__.tag)


def _window_of(seq: int, committed: Committed) -> int:
    held = (window.window for window in committed.closed if window.first_seq <= seq <= window.last_seq)
    return next(held, committed.state.window.window)
