"""The ingest process: connectors, dataflow and ring of one shard, until a clean stop. No torch here."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
from bytewax.testing import run_main

from pipeline.batching import Assembler, limits_for
from pipeline.capture import CaptureWriter
from pipeline.commit import CommitStep, Committed
from pipeline.config import Config
from pipeline.connectors import queue_limits
from pipeline.decode import decode
from pipeline.dedup import Dedup, SeenHashes
from pipeline.desk import Desk
from pipeline.elsewhere import Elsewhere, take_over
from pipeline.events import Batch
from pipeline.flow import Step, build_flow
from pipeline.health import IngestMetrics
from pipeline.near_duplicates import recalled
from pipeline.readers import ReaderWatch
from pipeline.rules import SourceRules
from pipeline.shards import MAIN
from pipeline.sources.inbox import Connector, Inbox
from pipeline.tokenization import BatchTokenizer, TokenizeStep
from pipeline.triggers import ThresholdTrigger
from storage.folder import DataFolder
from storage.opening import open_registry, opened_ring
from storage.registry import Registry
from storage.ring import Ring
from storage.wake import wake
from storage.windows import ClosedWindow, RingState

__all__ = ["IngestOptions", "build_steps", "ingest"]

T = TypeVar("T")
LOCKSTEP_POLL_S = 0.05
COLLECT_EVERY = 50_000  # objects more than were freed
# Of the time alone, only where an age or a cooldown waits for it: 35 and 7 MB of flash a day.
TICK_COMMIT_S = {"standard": 60.0, "eco": 300.0}
log = logging.getLogger("edgewater.ingest")


class IngestOptions(msgspec.Struct, frozen=True):
    """How one run of ingest differs from the configuration.

    Attributes:
        finite: The sources end; nothing is closed by age after their end.
        lockstep: Go on after a window's close only when that window is decided.
        max_events: End after at least so many inputs; 0 never.
        capture: Folder to record the inputs in; None records nothing.
        shard: Whose ring it writes.
    """

    finite: bool = False
    lockstep: bool = False
    max_events: int = 0
    capture: Path | None = None
    shard: str = MAIN


def ingest(
    config: Config,
    folder: DataFolder,
    model: Path,
    connectors: Sequence[Connector],
    options: IngestOptions,
    stop: threading.Event,
    metrics: IngestMetrics | None = None,
    opened: Callable[[], None] = lambda: None,
) -> RingState:
    """Run the dataflow until its sources end or `stop` is set; everything acknowledged is then durable.

    Args:
        opened: Called when the ring is open and holds the newest positions of the connectors: until then no
            other ingest process may start on this data folder.
    Returns: The ring's last state.
    Raises: StorageError, BaseModelError before anything is read; WriteFailedError when a commit failed;
        OSError when a source broke.
    """
    tokenizer = BatchTokenizer(model)
    tokenizer_id, max_bytes = tokenizer.manifest.tokenizer_id, int(config.ring.max_bytes)
    elsewhere = Elsewhere.read(
        folder, options.shard, horizon=config.dedup.horizon_events, tokenizer_id=tokenizer_id,
        max_bytes=max_bytes,
    )  # fmt: skip
    opening = opened_ring(
        folder, shard=options.shard, tokenizer_id=tokenizer_id, max_bytes=max_bytes,
        dedup_key=elsewhere.dedup_key,
    )  # fmt: skip
    with (
        opening as ring,
        open_registry(folder) as registry,
        _capturing(config, options) as recorder,
        _rare_collections(),
    ):
        take_over(ring, elsewhere, [connector.name for connector in connectors])
        opened()
        decided = partial(_announce, folder, options.shard)
        if options.lockstep:
            decided = partial(_await_decisions, folder, options.shard, registry, stop, metrics)
            decided(ring.windows(after=registry.cursor(options.shard)))
        if metrics:
            metrics.attach(ring, registry)
        try:
            steps = build_steps(config, ring, tokenizer, recorder, elsewhere)
            del elsewhere  # as large as the hashes of a whole horizon
            desk = Desk(config, tokenizer, ring, folder.run, options.shard)
            _run(config, ring, steps, connectors, options, stop, registry, decided, metrics, desk)
        finally:
            if metrics:
                metrics.attach(None, None)
        return ring.state


def _run(
    config: Config,
    ring: Ring,
    steps: dict[str, Step],
    connectors: Sequence[Connector],
    options: IngestOptions,
    stop: threading.Event,
    registry: Registry,
    decided: Callable[[list[ClosedWindow]], None],
    metrics: IngestMetrics | None,
    desk: Desk,
) -> None:
    inbox = Inbox({f"{source.kind}:{source.name}": queue_limits(source) for source in config.sources})
    if metrics:
        metrics.watch(inbox.states)
    limits = limits_for(ring.map_bytes, config.ring.flush_ms / 1_000)
    max_age_s = float(config.ring.max_age)
    tick_s = TICK_COMMIT_S[config.ring.profile] if max_age_s or config.trigger.cooldown else 0.0
    watch = ReaderWatch(ring, metrics.observe_readers if metrics else lambda report: None, stop.is_set)
    commit = CommitStep(
        ring, _trigger(config), registry.requests, decided, max_age_s, tick_s, watch.relieve
    )  # fmt: skip
    log.info(
        "a commit comes at %d lines, %d KiB or %d ms, whichever is first",
        limits.lines, limits.data_bytes >> 10, config.ring.flush_ms,
    )  # fmt: skip

    def commit_and_look(batch: Batch) -> Committed:
        batch = desk.prepared(batch)
        committed = commit(batch)
        desk.committed(batch, committed)
        watch.look()
        return committed

    faults: list[BaseException] = []
    flow = build_flow(
        inbox=inbox,
        assembler=Assembler(inbox, limits, finite=options.finite),
        stopping=lambda: stop.is_set() or bool(faults),
        steps={name: _guarded(step, faults) for name, step in desk.watching(steps).items()},
        commit=_guarded(commit_and_look, faults),
        done=metrics.observe if metrics else lambda committed: None,
        max_events=options.max_events,
    )
    positions, started = ring.named("p"), list[Connector]()
    with desk.serving(inbox):
        try:
            for connector in connectors:  # where one cannot begin, those before it are ended properly
                connector.start(inbox, positions)
                started.append(connector)
            run_main(flow)  # type: ignore[no-untyped-call]
        finally:
            inbox.closed.set()
            for connector in started:
                connector.stop()
    if faults:
        raise faults[0]
    if inbox.fault is not None:
        raise inbox.fault


def build_steps(
    config: Config,
    ring: Ring,
    tokenizer: BatchTokenizer,
    recorder: CaptureWriter | None = None,
    elsewhere: Elsewhere | None = None,
) -> dict[str, Step]:
    """Build the steps before the commit, by name in their order, with what the rings remember for them."""
    rules, elsewhere = SourceRules(config), elsewhere or Elsewhere()
    horizon = config.dedup.horizon_events
    started = time.monotonic()
    seen = SeenHashes(horizon, ring.state.next_seq, ring.newest_hashes(horizon))
    log.info("read %d dedup hashes back in %.2f s", len(seen), time.monotonic() - started)
    dedup = Dedup(
        ring.header.dedup_key,
        seen,
        lambda: ring.state.tail_seq,
        elsewhere.references(ring.named("r")),
        rules.dedup_mode,
        rules.deadband,
        elsewhere.seen(ring.header.dedup_key),
        horizon,
        recalled(rules.near_duplicates(), ring, horizon, tokenizer.texts_of),
        tokenizer.clean,
    )
    steps: dict[str, Step] = {
        "decode": partial(decode, refusal=tokenizer.refusal),
        "redact": rules.redact,
        "dedup": dedup,
        "tokenize": TokenizeStep(tokenizer, rules.render),
    }
    return {"capture": partial(_record, recorder), **steps} if recorder else steps


def _trigger(config: Config) -> ThresholdTrigger:
    trigger = config.trigger
    return ThresholdTrigger(trigger.min_samples, trigger.min_tokens, float(trigger.max_age))


def _guarded(step: Callable[[Batch], T], faults: list[BaseException]) -> Callable[[Batch], list[T]]:
    """Note a step's own error, and let nothing through any more: the source then ends the flow.

    Raised into Bytewax it would end the flow as well, but behind a panic's backtrace of fifty lines.
    """

    def guarded(batch: Batch) -> list[T]:
        if faults:
            return []
        try:
            return [step(batch)]
        except Exception as error:
            faults.append(error)
            return []

    return guarded


def _record(recorder: CaptureWriter, batch: Batch) -> Batch:
    recorder.write(batch.lines)
    return batch


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Look for cycles of garbage rarely, and not at all among what is there already.

    A Batch makes thousands of objects and no cycle: to look through them at every 700th took 4 % of the time.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


@contextlib.contextmanager
def _capturing(config: Config, options: IngestOptions) -> Iterator[CaptureWriter | None]:
    if options.capture is None:
        yield None
        return
    from pipeline.config import digest

    with CaptureWriter(options.capture, gateway=config.gateway.name, config=digest(config)) as writer:
        yield writer


def _announce(folder: DataFolder, shard: str, closed: list[ClosedWindow]) -> None:
    for window in closed:
        log.info(
            "window %d of %s closed by %s: %d samples", window.window, shard, window.reason, window.samples
        )
    wake(folder.run)


def _await_decisions(
    folder: DataFolder,
    shard: str,
    registry: Registry,
    stop: threading.Event,
    metrics: IngestMetrics | None,
    closed: list[ClosedWindow],
) -> None:
    """Lockstep: hold the stream at a window's close until the trainer decided it."""
    if not closed:
        return
    _announce(folder, shard, closed)
    seen = -1
    while not stop.is_set():
        if seen != (seen := registry.last_transaction()) and registry.cursor(shard) >= closed[-1].window:
            return
        if metrics:
            metrics.beat = time.monotonic()  # it waits as it should: an update takes minutes
        time.sleep(LOCKSTEP_POLL_S)
