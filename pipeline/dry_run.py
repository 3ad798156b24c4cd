"""`edgewater run --dry-run`: connect to every source, and say what would be stored; nothing is.

It is an ingest process without a ring of its own: what dedup remembers and where reading goes on is read
from the rings that are there, as a new shard would, and then nothing is committed, so nothing is acknowledged
and no position moves.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from typing import cast

import msgspec

from pipeline.batching import Assembler, BatchLimits
from pipeline.config import Config
from pipeline.connectors import make_connectors, queue_limits
from pipeline.elsewhere import Elsewhere, OtherRing, newest_positions
from pipeline.events import Batch, Line
from pipeline.flow import Step
from pipeline.ingest import build_steps
from pipeline.roles import model_folder, stop_on_signals
from pipeline.rules import SourceRules
from pipeline.settings import Source
from pipeline.sources.inbox import Inbox, SourceState
from pipeline.tap_text import Redactor, format_source, format_time, printable
from pipeline.tokenization import BatchTokenizer
from pipeline.units import Duration
from storage.folder import DataFolder
from storage.opening import open_ring_reader
from storage.ring import Ring
from storage.ring_header import RING_FORMAT
from storage.windows import RingHeader, RingState

__all__ = ["DryEvent", "DryRun", "dry_run", "format_dry_event", "format_dry_run"]

FLUSH_S = 0.1
_WORDS = {"duplicates": "duplicate", "suppressed": "unchanged", "near_duplicates": "alike"}
SHOWN_TOKENS = 512


class DryEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What would become of one input.

    Attributes:
        source: Whose it is.
        kind: "reading", "text", "exchange" or "feedback"; "" of what is no event.
        time: Its time, seconds since 1970.
        became: "stored", "refused", or what dedup counts it as: "duplicates", "suppressed".
        text: What would be stored, redacted.
        tokens: How many.
        reason: Why it is refused.
        place: Where it came from.
    """

    source: str
    kind: str
    time: float
    became: str
    text: str = ""
    tokens: int = 0
    reason: str = ""
    place: str


class DryRun(msgspec.Struct):
    """How a dry run ended.

    Attributes:
        events: Inputs by what would become of them.
        sources: Connector -> how it stands.
        faults: What broke a source, in words.
    """

    events: dict[str, int]
    sources: dict[str, SourceState]
    faults: list[str]


def dry_run(config: Config, *, max_events: int, timeout_s: float, show: Callable[[DryEvent], None]) -> DryRun:
    """Read some events of the configured sources, until there are so many or the time is over.

    Args:
        show: Called with each, as it comes.
    Raises: StorageError, BaseModelError as ingest would at its start.
    """
    tokenizer = BatchTokenizer(model_folder(config))
    elsewhere = _memory(config)
    ring = cast("Ring", _NoRing(elsewhere.dedup_key))
    steps = build_steps(config, ring, tokenizer, None, elsewhere)
    judge = _Judge(steps, tokenizer, Redactor(SourceRules(config)))
    connectors = make_connectors([_apart(source) for source in config.sources], finite=False)
    positions = newest_positions(elsewhere, [connector.name for connector in connectors])
    # What a broker's session holds unacknowledged is another session's than ours.
    positions = {name: data for name, data in positions.items() if not name.startswith("mqtt:")}
    inbox = Inbox({f"{source.kind}:{source.name}": queue_limits(source) for source in config.sources})
    assembler = Assembler(inbox, BatchLimits(flush_s=FLUSH_S), finite=True)
    counts: dict[str, int] = {}
    faults: list[str] = []
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        for connector in connectors:
            try:
                connector.start(inbox, positions)
            except OSError as error:
                faults.append(f"{connector.name}: {error}")
            else:
                stack.callback(connector.stop)
        stack.callback(inbox.closed.set)
        deadline = time.monotonic() + timeout_s
        seen = 0
        while seen < max_events and not stop.is_set() and time.monotonic() < deadline:
            over = inbox.drained
            batch = assembler.poll(stopping=over)
            if batch is None and over and assembler.empty:
                break
            for line in batch.lines[: max_events - seen] if batch else ():
                event = judge(line)
                counts[event.became] = counts.get(event.became, 0) + 1
                seen += 1
                show(event)
        states = {name: state for name, (state, _) in inbox.states().items()}
    if inbox.fault is not None:
        faults.append(str(inbox.fault))
    return DryRun(counts, states, faults)


def format_dry_event(event: DryEvent) -> str:
    """One event as a line."""
    when = format_time(event.time)
    who = f"{event.source} {event.kind}".rstrip()
    what = _WORDS.get(event.became, event.became.replace("_", " "))
    words = f"{event.text} {event.tokens} tokens" if event.became == "stored" else ""
    if event.reason:
        words = f"{event.reason} ({event.place})"
    return printable(f"{when}  {who}  {what:<10} {words}".rstrip())


def format_dry_run(run: DryRun) -> str:
    """What all of them come to, and how the sources stand."""
    counts = ", ".join(
        f"{count} {_WORDS.get(name, name.replace('_', ' '))}" for name, count in run.events.items()
    )
    total = sum(run.events.values())
    lines = [f"{total} events{f': {counts}' if counts else ''}; nothing was written"]
    lines += [format_source(name, state.connected, state.detail) for name, state in run.sources.items()]
    return "\n".join([*lines, *(f"not tried: {fault}" for fault in run.faults)])


class _Judge:
    """Sends one line at a time through the steps, so that what became of it is certain."""

    def __init__(self, steps: dict[str, Step], tokenizer: BatchTokenizer, redactor: Redactor) -> None:
        self._steps, self._tokenizer, self._redactor = steps, tokenizer, redactor

    def __call__(self, line: Line) -> DryEvent:
        batch = Batch([line])
        source, kind, when = line.origin.source, "", line.origin.arrival
        for step in self._steps.values():
            batch = step(batch)
            if batch.events:
                (_, event), (source,), (when,) = batch.events[0], batch.sources, batch.times
                kind = str(type(event).__struct_config__.tag)
        text, tokens, reason = "", 0, ""
        outcome = msgspec.structs.asdict(batch.outcome)
        became = next((name for name, count in outcome.items() if count), "dropped")
        if batch.dead:
            became, reason = "refused", self._redactor.text(batch.dead[0].reason)
        elif len(batch.samples):
            became, tokens = "stored", batch.samples.lengths[0]
            told = tokens <= SHOWN_TOKENS
            text = self._redactor.quoted(self._tokenizer.decode(list(batch.samples.ids))) if told else ""
        return DryEvent(
            source=source, kind=kind, time=when, became=became, text=text, tokens=tokens, reason=reason,
            place=self._redactor.text(line.place),
        )  # fmt: skip


class _NoRing:
    """An empty ring, as far as the steps ask one; it lies nowhere."""

    def __init__(self, dedup_key: bytes) -> None:
        self.header = RingHeader(RING_FORMAT, "", "", dedup_key or os.urandom(32))
        self.state = RingState()

    def newest_hashes(self, count: int) -> bytes:
        """None."""
        return b""

    def named(self, prefix: str) -> dict[str, bytes]:
        """None."""
        return {}


def _memory(config: Config) -> Elsewhere:
    """What the rings hold, where there are some; nothing is locked or mended for it."""
    if not (config.data_dir / "edgewater.json").exists():
        return Elsewhere()
    folder = DataFolder.open(config.data_dir, create=False)
    rings: list[OtherRing] = []
    shards = folder.shards()
    for shard in shards:
        with open_ring_reader(folder.ring / shard) as ring:
            hashes = ring.newest_hashes(config.dedup.horizon_events // len(shards))
            rings.append(OtherRing(shard, ring.header.dedup_key, ring.named("p"), ring.named("r"), hashes))
    return Elsewhere(tuple(rings))


def _apart(source: Source) -> Source:
    """A source read beside a running ingest process: an MQTT session of its own, which ends with it."""
    if source.mqtt is None:
        return source
    name = source.mqtt.client_id or f"edgewater-{source.name}-{socket.gethostname()}"
    mqtt = msgspec.structs.replace(
        source.mqtt, client_id=f"{name[:200]}-dry-{os.getpid()}", session_expiry=Duration(0), rebirth=False
    )
    return msgspec.structs.replace(source, mqtt=mqtt)
