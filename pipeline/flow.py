"""The dataflow: source -> decode -> redact -> dedup -> tokenize -> commit, one Batch at a time.

Bytewax schedules it and keeps no state: recovery, offsets and dedup are the ring's. One partition, one
worker: several partitions would be polled in turn, each waiting for the others.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import TypeVar

import bytewax.operators as op
from bytewax.dataflow import Dataflow
from bytewax.inputs import DynamicSource, StatelessSourcePartition
from bytewax.outputs import DynamicSink, StatelessSinkPartition

from pipeline.batching import Assembler
from pipeline.commit import Committed
from pipeline.events import Batch
from pipeline.sources.inbox import Inbox

__all__ = ["Step", "build_flow"]

Step = Callable[[Batch], Batch]
T = TypeVar("T")
Guarded = Callable[[Batch], list[T]]
# A time in the past: always ready. The wait is the queue's, so a clock that steps back stalls nothing. Before
# 1970, where boards without a battery start: Bytewax would sleep until this time, deaf to signals.
_NOW = datetime.datetime(1900, 1, 1, tzinfo=datetime.UTC)


class _Partition(StatelessSourcePartition[Batch]):
    def __init__(self, assembler: Assembler, inbox: Inbox, stopping: Callable[[], bool], limit: int) -> None:
        self._assembler, self._inbox, self._stopping = assembler, inbox, stopping
        self._left = limit

    def next_batch(self) -> list[Batch]:
        if self._left <= 0:
            raise StopIteration  # what waits was not committed: it is read again
        over = self._stopping() or self._inbox.drained or self._inbox.fault is not None
        if over:
            self._inbox.closed.set()  # else a connector that outruns the commits would keep us here
        batch = self._assembler.poll(stopping=over)
        if batch is None:
            if over and self._assembler.empty:
                raise StopIteration
            return []
        self._left -= len(batch.lines)
        return [batch]

    def next_awake(self) -> datetime.datetime | None:
        return _NOW


class _Source(DynamicSource[Batch]):
    def __init__(self, make: Callable[[], _Partition]) -> None:
        self._make = make

    def build(self, step_id: str, worker_index: int, worker_count: int) -> _Partition:
        if worker_count != 1:
            raise ValueError("the ingest flow runs in one worker: use ingest.processes to scale out")
        return self._make()


class _SinkPartition(StatelessSinkPartition[Committed]):
    def __init__(self, done: Callable[[Committed], None]) -> None:
        self._done = done

    def write_batch(self, items: list[Committed]) -> None:
        for item in items:
            self._done(item)


class _Sink(DynamicSink[Committed]):
    def __init__(self, done: Callable[[Committed], None]) -> None:
        self._done = done

    def build(self, step_id: str, worker_index: int, worker_count: int) -> _SinkPartition:
        return _SinkPartition(self._done)


def build_flow(
    *,
    inbox: Inbox,
    assembler: Assembler,
    stopping: Callable[[], bool],
    steps: dict[str, Guarded[Batch]],
    commit: Guarded[Committed],
    done: Callable[[Committed], None],
    max_events: int = 0,
) -> Dataflow:
    """Build the dataflow.

    Args:
        inbox, assembler: Where Batches come from.
        stopping: True when the flow must end: the last Batch is still committed.
        steps: Name -> step, in order; each returns what goes on, nothing once one of them failed.
        commit: The writing step.
        done: Called with what each Batch became.
        max_events: End after at least so many inputs; 0 never.
    """
    flow = Dataflow("edgewater")
    limit = max_events or 1 << 62
    stream = op.input("source", flow, _Source(lambda: _Partition(assembler, inbox, stopping, limit)))
    for name, step in steps.items():
        stream = op.flat_map(name, stream, step)
    committed = op.flat_map("commit", stream, commit)
    op.output("done", committed, _Sink(done))
    return flow
