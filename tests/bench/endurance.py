"""Endurance: ten million events through a 256 MiB ring; the file must not grow and memory must stay flat.

What: ingest's real flow (`pipeline.ingest.ingest`) over a generated stream of readings and texts, of which
one in 500 comes twice and one in 500 is no event; memory (RssAnon: what the process itself holds, not pages
of the ring that it mapped) every 100,000 events.

How: `python tests/bench/endurance.py [--events 200000] [--ring 16MiB]`; the whole takes minutes, see the
events/s that it prints.

Expected: the file's size and blocks the same to the byte before and after, evictions running, at most 10,000
dead letters, memory without a slope once the dedup table is full (its 200,000 hashes take the first events).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path as well as with -m

from adapters.model_folder import default_model_dir
from pipeline.commit import Committed
from pipeline.config import load
from pipeline.health import IngestMetrics
from pipeline.ingest import IngestOptions, ingest
from pipeline.shards import MAIN
from storage.folder import DataFolder
from storage.ring import Ring
from storage.ring_writer import MAX_DEAD_LETTERS
from storage.windows import RingState
from tests.bench import _report
from tests.bench._device import scratch_folder
from tests.bench._generated import PERIOD, GeneratedConnector

EVERY = 100_000  # events between looks at the memory
WARM_UP = 500_000  # events until the dedup table is full and the allocator has settled
FLAT_BYTES = 1 << 20  # a million events: below it the slope is noise


class Look(msgspec.Struct, frozen=True):
    """The process and its file at one moment."""

    events: int
    anonymous_bytes: int
    size: int
    blocks: int
    seconds: float


class Watch(IngestMetrics):
    """Ingest's own metrics, and a look every so many events."""

    def __init__(self, data: Path, every: int) -> None:
        super().__init__()
        self._data, self._every = data, every
        self._began = time.monotonic()
        self.looks: list[Look] = []

    def observe(self, committed: Committed) -> None:
        """Look, if it is time."""
        super().observe(committed)
        events = committed.state.counters.get("events", 0)
        if not self.looks or events - self.looks[-1].events >= self._every:
            self.looks.append(self._look(events))

    def _look(self, events: int) -> Look:
        info = self._data.stat()
        seconds = time.monotonic() - self._began
        return Look(events, anonymous_bytes(), info.st_size, info.st_blocks, seconds)


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status does not tell RssAnon")


def run(data_dir: Path, events: int, ring: str, every: int) -> tuple[list[Look], RingState]:
    """Ingest so many events. Returns: the looks, and the ring's last state."""
    own = (f"data_dir={json.dumps(str(data_dir))}", f'ring.max_bytes="{ring}"', 'health.listen=""')
    config = load(None, own, require_sources=False)
    folder = DataFolder.open(data_dir, create=True)
    watch = Watch(folder.ring / MAIN / "data.mdb", every)
    options = IngestOptions(finite=True)
    connector = GeneratedConnector(events)
    state = ingest(config, folder, default_model_dir(), [connector], options, threading.Event(), watch)
    folder.close()
    return watch.looks, state


def damaged_blocks(data_dir: Path) -> int:
    """Blocks that do not decode or do not follow each other."""
    with Ring.open_reader(data_dir / "ring" / MAIN) as ring:
        return sum(bool(problem) for _, problem in ring.check_blocks())


def slope(looks: list[Look]) -> float:
    """Bytes of memory gained a million events, by least squares; 0 where there is too little to tell."""
    if len(looks) < 3:
        return 0.0
    fit = statistics.linear_regression([w.events for w in looks], [w.anonymous_bytes for w in looks])
    return fit.slope * 1e6


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--ring", default="256MiB")
    parser.add_argument("--scratch", type=Path, default=scratch_folder(), help="where the ring lies")
    args, _ = parser.parse_known_args()
    args.events += -args.events % PERIOD  # whole periods, so that the counts are known
    every = min(EVERY, max(args.events // 20, 1_000))
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="edgewater-bench-") as work:
        data_dir = Path(work) / "data"
        looks, state = run(data_dir, args.events, args.ring, every)
        damaged = damaged_blocks(data_dir)
    report(args.events, args.ring, looks, state, damaged)


def report(events: int, ring: str, looks: list[Look], state: RingState, damaged: int) -> None:
    """Print what was seen."""
    first, last = looks[0], looks[-1]
    # A short run has no steady part: its last half, then.
    warm = [look for look in looks if look.events >= min(WARM_UP, events // 2)]
    memory = [look.anonymous_bytes for look in warm]
    letters = state.dead_next - state.dead_first
    figures = {
        "file bytes before": first.size,
        "file bytes after": last.size,
        "st_blocks before": first.blocks,
        "st_blocks after": last.blocks,
        "RssAnon after the first commit": first.anonymous_bytes,
        "RssAnon after warm-up, least": min(memory),
        "RssAnon after warm-up, most": max(memory),
        "RssAnon slope, bytes a million events": round(slope(warm)),
        "events/s": round(last.events / last.seconds),
        "samples evicted": state.tail_seq,
        "samples held": state.next_seq - state.tail_seq,
        "duplicates dropped": state.counters["duplicates"],
        "dead letters seen": state.counters["dead_letters"],
        "dead letters held": letters,
        "damaged blocks": damaged,
    }
    _report.table(f"{events:,} events through a ring of {ring}", ("", "figure"), [*figures.items()])
    passed = (
        {(look.size, look.blocks) for look in looks} == {(first.size, first.blocks)}
        and slope(warm) < FLAT_BYTES
        and letters <= MAX_DEAD_LETTERS
        and state.counters["dead_letters"] == state.counters["duplicates"] == events // PERIOD
        and not damaged
    )
    named = {name.replace(",", "").replace(" ", "_"): value for name, value in figures.items()}
    _report.finish("endurance", events=events, ring=ring, passed=passed, evicting=state.tail_seq > 0, **named)


if __name__ == "__main__":
    main()
