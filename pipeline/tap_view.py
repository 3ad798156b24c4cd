"""`edgewater tap` and the lines of a dry run, as people see them."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.config import Config
from pipeline.control import ControlError, NoIngestError, ask, listening, stream
from pipeline.tap_text import printable
from storage.errors import StorageError
from storage.folder import DataFolder

__all__ = ["format_item", "tap"]

SILENCE_S = 3_600.0  # nothing may pass for long; a process that ends closes its socket
WIDTH = 9  # of the longest step's name, and one
Item = dict[str, Any]


def tap(
    config: Config, show: Callable[[Item], None], *, source: str, step: str, rate: float, max_events: int
) -> None:
    """Show what passes the steps of all running ingest processes, until they end or enough was seen.

    Args:
        show: Called with each item; "shard" is in it where several run.
        source: Only this one, "" for all.
        step: Only this one, "" for all.
        rate: Follow at most so many events a second of each process, 0 as many as possible.
        max_events: End after so many, 0 never.
    Raises: NoIngestError where none runs; ControlError if one refused.
    """
    try:
        folder = DataFolder.open(config.data_dir, create=False)
    except StorageError as error:
        if config.data_dir.exists():
            raise
        raise NoIngestError(f"no ingest runs on {config.data_dir}: start `edgewater run`") from error
    shards = sorted(ask(folder, "sources")) or listening(folder)
    followed: set[tuple[str, int]] = set()
    over = 0
    for item in _merged(folder, shards, source=source, rate=rate, max_events=max_events):
        if max_events and "event" in item:
            # Each process follows so many: of several these are more than were asked for.
            if len(followed) >= max_events and (item["shard"], item["event"]) not in followed:
                continue
            followed.add((item["shard"], item["event"]))
            over += bool(item.get("over"))
        if len(shards) < 2:
            item.pop("shard", None)
        if not step or item.get("step", step) == step:
            show(item)
        if max_events and over >= max_events:
            return


def format_item(item: Item) -> str:
    """One item as a line."""
    if "event" not in item:
        return f"... {item['not_shown']:,} not shown"
    at = item["at"]
    when = time.strftime("%H:%M:%S", time.localtime(at)) + f".{int(at % 1 * 1_000):03d}"
    who = " ".join(word for word in (item["source"], item.get("kind", "")) if word)
    where = f"{item['shard']} " if "shard" in item else ""
    words = item.get("text", "")
    if "tokens" in item:
        words += f" {item['tokens']} tokens"
    if "seq" in item:
        words = f"seq {item['seq']} window {item['window']}"
    line = f"{when}  {where}#{item['event']:<5} {who}  {item['step']:<{WIDTH}} {words}"
    return printable(line.rstrip())


def _merged(
    folder: DataFolder, shards: list[str], *, source: str, rate: float, max_events: int
) -> Iterator[Item]:
    """What all processes show, as it comes."""
    items: queue.Queue[tuple[str, Item | Exception | None]] = queue.Queue(maxsize=1_000)
    ended = threading.Event()

    def put(shard: str, item: Item | Exception | None) -> bool:
        while not ended.is_set():
            with contextlib.suppress(queue.Full):
                items.put((shard, item), timeout=0.2)
                return True
        return False

    def read(shard: str) -> None:
        told: Exception | None = None
        try:
            for item in stream(
                folder, shard, "tap", SILENCE_S, source=source, rate=rate, max_events=max_events
            ):
                if not put(shard, item):
                    return
        except (ControlError, NoIngestError, OSError) as error:
            told = error
        put(shard, told)

    for shard in shards:
        threading.Thread(target=read, args=(shard,), name=f"tap {shard}", daemon=True).start()
    left = len(shards)
    try:
        while left:
            try:
                shard, item = items.get(timeout=0.5)
            except queue.Empty:
                continue  # so that a signal is seen
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            elif "event" in item or "not_shown" in item:
                yield {"shard": shard, **item}
    finally:
        ended.set()
