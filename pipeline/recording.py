"""`edgewater capture`: the sources into capture files, nothing else."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pipeline.batching import Assembler, BatchLimits
from pipeline.capture import CaptureWriter
from pipeline.config import Config, digest
from pipeline.connectors import make_connectors
from pipeline.elsewhere import Elsewhere, newest_positions, starting
from pipeline.roles import stop_on_signals
from pipeline.shards import numbers, shard_name
from pipeline.sources.inbox import Inbox
from storage.folder import DataFolder

__all__ = ["record_sources"]


def record_sources(
    config: Config, out: Path, *, max_file_bytes: int, max_files: int, max_events: int
) -> tuple[int, Path]:
    """Record every source, from where ingest would go on, until a signal or the end of the sources.

    Into one stream, also where several ingest processes share the sources. Nothing is acknowledged and no
    position moves: a later `run` reads the same events again. Standard input, which cannot be read twice, is
    the exception.
    Returns: lines recorded, and the last file.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        connectors = make_connectors(config.sources, finite=False)
        positions = {}
        if config.data_dir.exists():
            folder = DataFolder.open(config.data_dir, create=False)
            with starting(folder, stop):
                # An ingest process would read standard input as well.
                roles = [f"ingest-{shard_name(number)}" for number in numbers(config)]
                for role in (*roles, *(f"source-{source.name}" for source in config.sources)):
                    stack.enter_context(folder.lock(role))
                everywhere = Elsewhere.read(folder, "", horizon=0)
            positions = newest_positions(everywhere, [connector.name for connector in connectors])
        inbox = Inbox()
        assembler = Assembler(inbox, BatchLimits(flush_s=config.ring.flush_ms / 1_000), finite=True)
        writer = stack.enter_context(
            CaptureWriter(
                out, gateway=config.gateway.name, config=digest(config),
                max_file_bytes=max_file_bytes, max_files=max_files,
            )
        )  # fmt: skip
        for connector in connectors:
            connector.start(inbox, positions)
            stack.callback(connector.stop)
        stack.callback(inbox.closed.set)
        while True:
            if max_events and writer.lines >= max_events:
                break
            over = stop.is_set() or inbox.drained or inbox.fault is not None
            if over:
                inbox.closed.set()
            batch = assembler.poll(stopping=over)
            if batch is not None:
                writer.write(batch.lines)
            elif over and assembler.empty:
                break
        if inbox.fault is not None:
            raise inbox.fault
    return writer.lines, writer.path
