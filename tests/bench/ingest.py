"""Ingest: from a line to its durable commit, on one core, beside the plain way; and what it costs to run.

What: two streams, 30 % of whose lines are sent again (the same bytes, within the next 1,000): pump readings
of 8 values, and short readings of one.
  1. Events a second of one process on one core, every commit synced: Edgewater's whole flow (connector
     thread, inbox, Bytewax, all steps, the ring) and the plain way (_plain.py: stdlib json, HF tokenizers in
     batches, one LMDB value a record with a hash index, 1,000 lines a transaction), in turn. HF tokenizers
     twice: with the pre-tokenizer as SmolLM2 is published, and with the one that `model prepare` writes,
     which gives the same ids faster there too.
  2. What each stage takes of an event, beside its limit: the least that could do its work.
  3. `edgewater ingest` as a process that reads the stream from a file: its peak of RssAnon + RssShmem with a
     full dedup horizon of 200,000, and what it takes of a core when nothing comes.

How: `make bench` or `python tests/bench/ingest.py --pump pump-readings.jsonl.zst` (the readings are not
shipped; without them the demo's weather is fed). The scratch folder must lie on a disk: memory does not sync.

Expected: at least 6 times the plain way's events a second (as published) with pump readings and 5 times with
short ones; at most 110 MB; at most 3 % of a core when idle.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

# Before anything that starts threads is imported: one core means one.
os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path as well as with -m

from adapters.model_folder import default_model_dir
from pipeline.config import load
from pipeline.events import Line, Origin
from pipeline.ingest import IngestOptions, ingest
from pipeline.sources.inbox import Chunk, Inbox, ReaderThread, Settled
from storage.folder import DataFolder
from tests.bench import _report, _streams
from tests.bench._plain import PUBLISHED, PlainIngest
from tests.bench._stages import A_COMMIT, Stage, time_stages

SHARE_TWICE = 0.3
WITHIN = 1_000  # lines: what is sent again was sent so short a time before
HORIZON = 200_000
CHUNK_LINES = 250
STAGED = 100_000  # lines that the stages are timed with
# So many that the horizon is full for most of the run; the plain way has none, and its index grows on.
EVENTS = {"pump": 400_000, "short": 1_000_000}
TARGETS = {"pump": 6.0, "short": 5.0, "memory_mb": 110.0, "idle_percent": 3.0}
IDLE_S = 10.0
POLL_S = 0.05
HEADLINE = "plain, published"
PLAIN = {HEADLINE: PUBLISHED, "plain, prepared": None}


def sent_twice(lines: Iterator[bytes], seed: int = 0) -> Iterator[bytes]:
    """The lines, and between them some of those just sent, so that 30 % of all are repeats."""
    rng = random.Random(seed)
    recent: list[bytes] = []
    while True:
        if recent and rng.random() < SHARE_TWICE:
            yield recent[rng.randrange(len(recent))]
        else:
            recent.append(line := next(lines))
            del recent[:-WITHIN]
            yield line


def short_readings(seed: int = 0) -> Iterator[bytes]:
    """One value a reading, about 10 tokens, of three sources in turn, ten a second."""
    rng = random.Random(seed)
    value, number = 3.0, 0
    while True:
        value += rng.gauss(0.0, 0.02)
        yield b'{"kind":"reading","source":"pump-%d","ts":%.1f,"values":{"pressure":%.4f}}' % (
            number % 3, 1.7e9 + number / 10, value,
        )  # fmt: skip
        number += 1


class Rate(msgspec.Struct, frozen=True):
    """What one run took of an event.

    Attributes:
        events_s: Events a second, by the clock.
        cpu_us: Time on the core, us an event: what else runs on the machine hardly changes it.
    """

    events_s: float
    cpu_us: float


class Watch:
    """Measures a run from its making on."""

    def __init__(self) -> None:
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def rate(self, events: int) -> Rate:
        """What it took until now."""
        seconds, cpu = time.perf_counter() - self._began, time.process_time() - self._cpu
        return Rate(events / seconds, 1e6 * cpu / events)


class ListConnector:
    """Hands over lines that it has, as fast as they are taken."""

    name = "list"

    def __init__(self, lines: Sequence[bytes]) -> None:
        self._lines = lines
        self._thread = ReaderThread()
        self.watch = Watch()

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None:
        """Begin to send."""
        self.watch = Watch()
        self._thread.start(self, inbox, lambda: self._send(inbox))

    def acknowledge(self, settled: list[Settled]) -> None:
        """Nobody waits for it."""

    def stop(self) -> None:
        """Stop sending."""
        self._thread.stop()

    def _send(self, inbox: Inbox) -> None:
        for start in range(0, len(self._lines), CHUNK_LINES):
            origin = Origin("list", "list:lines", time.time())
            lines = [Line(line, -1, origin) for line in self._lines[start : start + CHUNK_LINES]]
            if not inbox.put(Chunk(self, lines, {"list:lines": b"%d" % (start + len(lines))})):
                return


# -- events a second --------------------------------------------------------------------------------


def run_edgewater(work: Path, model: Path, lines: Sequence[bytes]) -> Rate:
    """The whole flow in this process, from the first line to the last commit."""
    own = (f"data_dir={_quoted(work / 'data')}", 'health.listen=""', f"dedup.horizon_events={HORIZON}")
    config = load(None, own, require_sources=False)
    folder = DataFolder.open(config.data_dir, create=True)
    connector = ListConnector(lines)
    state = ingest(config, folder, model, [connector], IngestOptions(finite=True), threading.Event())
    rate = connector.watch.rate(len(lines))
    folder.close()
    expected = len(set(lines))
    if (state.counters["events"], state.counters["samples"]) != (len(lines), expected):
        raise AssertionError(f"of {len(lines)} lines, {expected} distinct, came {state.counters}")
    return rate


def run_plain(work: Path, model: Path, lines: Sequence[bytes], pre_tokenizer: dict[str, Any] | None) -> Rate:
    """The plain way."""
    with contextlib.closing(PlainIngest(work, model / "tokenizer.json", pre_tokenizer)) as plain:
        watch = Watch()
        for start in range(0, len(lines), A_COMMIT):
            plain.commit(lines[start : start + A_COMMIT])
        rate = watch.rate(len(lines))
    if plain.stored != len(set(lines)):
        raise AssertionError(f"the plain way stored {plain.stored} of {len(set(lines))}")
    return rate


def compare(scratch: Path, model: Path, lines: Sequence[bytes], rounds: int) -> dict[str, list[Rate]]:
    """What each way took in each round, by name; in turn, so that all meet the same moods."""
    rates: dict[str, list[Rate]] = {"edgewater": [], **{name: [] for name in PLAIN}}
    for _ in range(rounds):
        for name, found in rates.items():
            with tempfile.TemporaryDirectory(dir=scratch, prefix="edgewater-bench-") as folder:
                work = Path(folder)
                found.append(
                    run_plain(work, model, lines, PLAIN[name]) if name in PLAIN
                    else run_edgewater(work, model, lines)
                )  # fmt: skip
    return rates


# -- the process ------------------------------------------------------------------------------------


def run_process(scratch: Path, lines: Sequence[bytes]) -> dict[str, float]:
    """`edgewater ingest` over a file. Returns: peak MB, CPU us an event, % of a core when idle."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix="edgewater-bench-") as folder:
        work = Path(folder)
        (work / "lines.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        (work / "edgewater.toml").write_text(
            f'data_dir = {_quoted(work / "data")}\n[health]\nlisten = ""\n'
            f"[dedup]\nhorizon_events = {HORIZON}\n"
            '[[sources]]\nname = "bench"\nkind = "files"\npath = "lines.jsonl"\n'
        )
        command = [sys.executable, "-m", "pipeline", "ingest", "--config", str(work / "edgewater.toml")]
        with subprocess.Popen(command, cwd=Path(__file__).resolve().parents[2]) as process:
            try:
                return _watch(process, len(lines))
            finally:
                process.terminate()


def _watch(process: subprocess.Popen[bytes], events: int) -> dict[str, float]:
    """Poll until it has nothing to do any more, then see what that takes."""
    peak, busy, looked = 0.0, 0.0, time.monotonic()
    while process.poll() is None:
        time.sleep(POLL_S)
        peak = max(peak, _memory_mb(process.pid))
        if time.monotonic() - looked >= 2.0:
            before, busy, looked = busy, _cpu_s(process.pid), time.monotonic()
            if before and busy - before < 0.2:
                break
    time.sleep(IDLE_S)
    idle = (_cpu_s(process.pid) - busy) / (time.monotonic() - looked)
    return {
        "peak_mb": max(peak, _memory_mb(process.pid)),
        "cpu_us_an_event": 1e6 * busy / events,
        "idle_percent": 100 * idle,
    }


def _memory_mb(pid: int) -> float:
    """RssAnon + RssShmem: the pages of the ring that LMDB maps are the kernel's to take back."""
    found = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            found += int(line.split()[1])
    return found * 1024 / 1e6


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _quoted(path: Path) -> str:
    return f'"{path}"'


# -- the report -------------------------------------------------------------------------------------


def report_rates(name: str, rates: dict[str, list[Rate]]) -> dict[str, float]:
    """Print a workload's rates. Returns: how many times each plain way's the own one is, median of rounds."""
    ratios = {way: _median_ratio(rates["edgewater"], rates[way], "events_s") for way in PLAIN}
    rows = [
        (
            way,
            *(round(pick([run.events_s for run in found])) for pick in (statistics.median, min, max)),
            ratios.get(way, 1.0),
            statistics.median([run.cpu_us for run in found]),
            1 / _median_ratio(rates["edgewater"], found, "cpu_us"),
        )
        for way, found in rates.items()
    ]
    columns = (
        "one core, durable",
        "events/s",
        "least",
        "most",
        "edgewater x",
        "CPU us an event",
        "edgewater x",
    )
    _report.table(f"{name}: 30 % sent twice", columns, rows)
    return ratios


def _median_ratio(own: Sequence[Rate], other: Sequence[Rate], field: str) -> float:
    ratios = [getattr(a, field) / getattr(b, field) for a, b in zip(own, other, strict=True)]
    return float(statistics.median(ratios))


def report_stages(name: str, found: Sequence[Stage]) -> None:
    """Print what each stage takes."""
    rows = [
        (s.name, 1e6 * s.own_s, 1e6 * s.limit_s, s.own_s / s.limit_s if s.limit_s else None, s.limit)
        for s in found
    ]
    rows.append(("all", 1e6 * sum(s.own_s for s in found), 1e6 * sum(s.limit_s for s in found), None, ""))
    _report.table(f"{name}: us an event", ("stage", "own", "limit", "x", "the limit is"), rows)


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pump", type=Path, help="pump-readings.jsonl.zst")
    parser.add_argument("--events", type=int, help=f"lines of each stream, instead of {EVENTS}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp"), help="a folder on a disk")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    args, _ = parser.parse_known_args()
    machine = _report.machine()
    os.sched_setaffinity(0, {args.core})
    model = default_model_dir()
    named, readings = _streams.readings(args.pump)
    sources = {"pump": _streams.endless(readings), "short": short_readings()}
    figures: dict[str, Any] = {}
    passed = True
    print(f"{machine}; core {args.core}; pump readings are {named}")
    for name, source in sources.items():
        lines = [*islice(sent_twice(source), args.events or EVENTS[name])]
        rates = compare(args.scratch, model, lines, args.rounds)
        ratios = report_rates(name, rates)
        with tempfile.TemporaryDirectory(dir=args.scratch, prefix="edgewater-bench-") as folder:
            found = time_stages(Path(folder), model, lines[:STAGED])
        report_stages(name, found)
        process = run_process(args.scratch, lines)
        rows = [*process.items()]
        _report.table(f"{name}: edgewater ingest, dedup horizon {HORIZON:,}", ("", "figure"), rows)
        passed &= ratios[HEADLINE] >= TARGETS[name]
        passed &= process["peak_mb"] <= TARGETS["memory_mb"]
        passed &= process["idle_percent"] <= TARGETS["idle_percent"]
        figures[name] = {
            "events_a_second": {way: [round(run.events_s) for run in rates[way]] for way in rates},
            "cpu_us_an_event": {way: [round(run.cpu_us, 2) for run in rates[way]] for way in rates},
            "ratios": {way: round(ratio, 2) for way, ratio in ratios.items()},
            "stages_us": {s.name: [round(1e6 * s.own_s, 3), round(1e6 * s.limit_s, 3)] for s in found},
            "process": {key: round(value, 2) for key, value in process.items()},
        }
        sys.stdout.flush()
    _report.finish("ingest", events=args.events or EVENTS, targets=TARGETS, passed=bool(passed), **figures)


if __name__ == "__main__":
    main()
