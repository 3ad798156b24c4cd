"""Claims beside ingest: windows that the trainer copies out of the ring while it turns over at full speed.

What: ingest runs its real flow over a generated stream into a small ring, so that blocks are evicted all the
time; a second process looks for closed windows and reads them the way `Trainer._claim` does (newest, oldest
still held, any between, and up to 20 joined as a backlog is), and compares every sample with what its number
says it must be. Read transactions are timed from begin to end inside the ring. The same ingest alone, and
beside a process that computes as much but reads nothing, shows what the reading itself costs the writer: on
two cores most of the loss is the other process's use of one.

How: `python tests/bench/claims.py [--events N] [--rounds N]`; minutes.

Expected: 0 torn and 0 missing samples; a window that was evicted meanwhile is said to be (LookupError, and
the ring's tail is past it); the longest read transaction under 1 s, in practice a few ms.
"""

from __future__ import annotations

import argparse
import json
import random
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path as well as with -m

from adapters.model_folder import default_model_dir
from pipeline.config import load
from pipeline.decode import decode
from pipeline.events import Batch, Line, Origin
from pipeline.ingest import IngestOptions, ingest
from pipeline.rules import SourceRules
from pipeline.shards import MAIN
from pipeline.tokenization import BatchTokenizer, TokenizeStep
from storage.errors import CorruptBlockError
from storage.folder import DataFolder
from storage.ring import Ring
from storage.samples import Samples
from storage.windows import ClosedWindow
from tests.bench import _report
from tests.bench._device import scratch_folder
from tests.bench._generated import GeneratedConnector, input_of, line

RING = "16MiB"  # the least that the configuration takes
JOINED = 20  # windows that one claim may own when the trainer is behind
TARGET_S = 1.0


class TimedEnvironment:
    """An LMDB environment that notes how long its read transactions last, seconds."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self.longest = 0.0
        self.transactions = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    @contextmanager
    def begin(self, *args: Any, **options: Any) -> Iterator[Any]:
        """A transaction, timed from its begin to its end."""
        began = time.perf_counter()
        try:
            with self._env.begin(*args, **options) as txn:
                yield txn
        finally:
            self.longest = max(self.longest, time.perf_counter() - began)
            self.transactions += 1


# -- the reader, a process of its own ---------------------------------------------------------------


class Reader:
    """Claims windows until it is told to stop, and counts what it found."""

    def __init__(self, ring: Ring, seed: int) -> None:
        self._ring = ring
        self._rng = random.Random(seed)
        self._tokenizer = BatchTokenizer(default_model_dir())
        self._render = SourceRules(load(None, require_sources=False)).render
        self._after = 0
        self.found: Counter[str] = Counter()

    def round(self) -> None:
        """One look of the trainer at the ring."""
        due = self._ring.windows(after=self._after)
        tail = self._ring.read_state().tail_seq
        held = [window for window in due if window.first_seq >= tail]
        if not held:
            time.sleep(0.002)
            return
        self._after = max(self._after, held[-1].window - 4_000)
        for run in self._choose(held):
            self.claim(run)

    def _choose(self, held: list[ClosedWindow]) -> list[list[ClosedWindow]]:
        at = self._rng.randrange(len(held))
        return [held[-1:], held[:1], held[at : at + 1], held[at : at + JOINED], held[:JOINED]]

    def claim(self, run: Sequence[ClosedWindow]) -> None:
        """Read a run of windows, as `Trainer._claim` does, and compare."""
        first, last = run[0].first_seq, run[-1].last_seq
        try:
            samples = self._ring.read(first, last)
        except LookupError:
            evicted = self._ring.read_state().tail_seq > first
            self.found["evicted meanwhile" if evicted else "missing"] += 1
            return
        except CorruptBlockError:
            self.found["torn"] += 1
            return
        self.found["claims"] += 1
        self.found["windows"] += len(run)
        self.found["samples"] += len(samples)
        self.found["torn"] += not same(samples, self.expected(first, last))

    def expected(self, first: int, last: int) -> Samples:
        """What the stream says these samples are."""
        origin = Origin("generated", "", 0.0)
        lines = [Line(line(input_of(seq)), 0, origin) for seq in range(first, last + 1)]
        batch = decode(Batch(lines))
        batch.hashes = [bytes(16)] * len(lines)
        samples = TokenizeStep(self._tokenizer, self._render)(batch).samples
        samples.first_seq = first
        return samples


def same(read: Samples, expected: Samples) -> bool:
    """Whether everything but the hashes is equal."""
    names = ("first_seq", "sources", "kinds", "ts", "lengths", "ids", "mask")
    return all(getattr(read, name) == getattr(expected, name) for name in names)


def run_reader(folder: Path, seed: int, *, blind: bool) -> None:
    """Be the reader until standard input closes; print what was found. Blind, only compute as one does."""
    while not (folder / "data.mdb").exists():
        time.sleep(0.01)
    with Ring.open_reader(folder) as ring:
        timed = TimedEnvironment(ring._env)
        ring._env = timed  # type: ignore[assignment]  # inside the ring: so every way to read is timed
        reader = Reader(ring, seed)
        while not select.select([sys.stdin], [], [], 0)[0]:
            if blind:
                reader.expected(0, 299)
            else:
                reader.round()
    timing = {"longest_s": timed.longest, "transactions": timed.transactions}
    print(json.dumps({**reader.found, **timing}))


class Round(msgspec.Struct, frozen=True):
    """Events a second of three runs, and what the reader of the last found."""

    alone: float
    blind: float
    beside: float
    found: dict[str, float]


# -- the writer -------------------------------------------------------------------------------------


def run_writer(data_dir: Path, events: int) -> float:
    """Ingest so many generated events. Returns: events a second."""
    own = (f"data_dir={json.dumps(str(data_dir))}", f'ring.max_bytes="{RING}"', 'health.listen=""')
    config = load(None, own, require_sources=False)
    folder = DataFolder.open(data_dir, create=True)
    began = time.monotonic()
    connector = GeneratedConnector(events)
    options = IngestOptions(finite=True)
    state = ingest(config, folder, default_model_dir(), [connector], options, threading.Event())
    seconds = time.monotonic() - began
    folder.close()
    if state.counters["events"] != events:
        raise AssertionError(f"inputs were lost: {state.counters}")
    if not state.tail_seq:
        raise AssertionError("nothing was evicted: feed more --events")
    return events / seconds


def run_beside(work: Path, number: int, events: int, *, blind: bool) -> tuple[float, dict[str, float]]:
    """Ingest beside a reader. Returns: events a second, and what the reader found."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        data_dir = Path(folder) / "data"
        command = [sys.executable, __file__, "--reader", str(data_dir / "ring" / MAIN)]
        command += ["--seed", str(number), *(["--blind"] if blind else [])]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
            rate = run_writer(data_dir, events)
            out, _ = reader.communicate()
    return rate, json.loads(out)


def run_round(work: Path, number: int, events: int) -> Round:
    """Ingest alone, beside a process that only computes, and beside a reader."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        alone = run_writer(Path(folder) / "data", events)
    blind, _ = run_beside(work, number, events, blind=True)
    beside, found = run_beside(work, number, events, blind=False)
    return Round(alone, blind, beside, found)


def main() -> None:
    """Run the bench, or be its reader."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--events", type=int, default=600_000, help="a run")
    parser.add_argument("--rounds", type=int, default=2, help="runs alone and with a reader")
    parser.add_argument("--scratch", type=Path, default=scratch_folder(), help="where the rings lie")
    parser.add_argument("--reader", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--blind", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args, _ = parser.parse_known_args()
    if args.reader:
        run_reader(args.reader, args.seed, blind=args.blind)
        return
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="edgewater-bench-") as work:
        rounds = [run_round(Path(work), number, args.events) for number in range(args.rounds)]
    report(rounds, args.events)


def report(rounds: list[Round], events: int) -> None:
    """Print what was found."""
    names = ("claims", "windows", "samples", "evicted meanwhile", "torn", "missing", "transactions")
    found = {name: int(sum(made.found.get(name, 0) for made in rounds)) for name in names}
    longest = max(made.found["longest_s"] for made in rounds)
    arms = ("alone", "blind", "beside")
    rates = {arm: statistics.median(getattr(made, arm) for made in rounds) for arm in arms}
    rows: list[tuple[object, ...]] = [*found.items()]
    rows += [
        ("longest read transaction, ms", longest * 1e3),
        ("events/s alone", rates["alone"]),
        ("events/s beside a process that only computes", rates["blind"]),
        ("events/s beside the reader", rates["beside"]),
        ("reader / only computes", rates["beside"] / rates["blind"]),
    ]
    _report.table(f"{len(rounds)} x {events:,} events into a ring of {RING}", ("", "figure"), rows)
    _report.finish(
        "claims",
        **{name.replace(" ", "_"): count for name, count in found.items()},
        longest_transaction_s=round(longest, 4),
        target_s=TARGET_S,
        events_a_second={name: round(rate) for name, rate in rates.items()},
        slowdown_by_reading=round(rates["blind"] / rates["beside"], 3),
        passed=found["torn"] == found["missing"] == 0
        and longest < TARGET_S
        and found["transactions"] > found["claims"] > 0,
    )


if __name__ == "__main__":
    main()
