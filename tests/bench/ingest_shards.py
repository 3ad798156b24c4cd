"""Two ingest processes against one, on two cores: the same two files, read as `ingest.processes` says.

What: two files of readings of the same size lie aside; `edgewater ingest` runs with `ingest.processes = 1`,
or twice with 2, each with one of the files, every commit synced. When all of them wait, both files appear.
Counted is from then until the rings hold every event. In turn, so that both meet the same moods of the
machine. All of it is held to two cores, also where there are more.

How: `python tests/bench/ingest_shards.py --pump pump-readings.jsonl.zst` (the readings are not shipped;
without them the demo's weather is fed). The scratch folder must lie on a disk: memory does not sync.

Expected: two processes store at least 1.6 times the events a second of one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path as well as with -m

from pipeline.shards import shard_name
from storage.errors import StorageError
from storage.folder import DataFolder
from storage.ring import Ring
from tests.bench import _report, _streams

TARGET = 1.6
CORES = 2
SOURCES = ("a", "b")
POLL_S = 0.02
WAITING_S = 1.0  # for a process whose ring is open to come to its sources
LONGEST_S = 600.0


class Run:
    """One run: processes that wait for their files.

    Attributes:
        rate: Events a second, all together.
        cpu_s: Processor seconds of each process until then.
    """

    def __init__(self, work: Path, aside: Path, processes: int, events: int) -> None:
        self._work, self._processes, self._events = work, processes, events
        self._data = work / "data"
        (work / "edgewater.toml").write_text(
            f'data_dir = "{self._data}"\n[health]\nlisten = ""\n[ingest]\nprocesses = {processes}\n'
            "[ring]\nflush_ms = 100\n"  # the last events would wait 2 s for more
            + "".join(f'[[sources]]\nname = "{s}"\nkind = "files"\npath = "{s}.jsonl"\n' for s in SOURCES)
        )
        with self._running() as running:
            for source in SOURCES:
                os.link(aside / f"{source}.jsonl", work / f"{source}.jsonl")
            began = time.perf_counter()
            with contextlib.ExitStack() as stack:
                rings = [stack.enter_context(Ring.open_reader(path)) for path in self._rings()]
                while (stored := sum(ring.read_state().next_seq for ring in rings)) < events:
                    if time.perf_counter() - began > LONGEST_S:
                        raise AssertionError(f"{stored:,} of {events:,} events after {LONGEST_S} s")
                    time.sleep(POLL_S)
            self.rate = events / (time.perf_counter() - began)
            self.cpu_s = [_cpu_s(process.pid) for process in running]

    def _rings(self) -> list[Path]:
        return [self._data / "ring" / shard_name(number + 1) for number in range(self._processes)]

    @contextlib.contextmanager
    def _running(self) -> Iterator[list[subprocess.Popen[bytes]]]:
        command = [sys.executable, "-m", "pipeline", "ingest", "--config", str(self._work / "edgewater.toml")]
        running = [
            subprocess.Popen([*command, "--shard", str(number + 1)], cwd=Path(__file__).resolve().parents[2])
            for number in range(self._processes)
        ]
        try:
            while not self._open():
                if any(process.poll() is not None for process in running):
                    raise AssertionError("a process ended before its files came")
                time.sleep(POLL_S)
            time.sleep(WAITING_S)
            yield running
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()

    def _open(self) -> bool:
        folder = DataFolder(self._data)
        for path in self._rings():
            if folder.holder(f"ingest-{path.name}") is None:
                return False
            with contextlib.suppress(StorageError), Ring.open_reader(path):
                continue
            return False
        return True


def compare(scratch: Path, lines: Sequence[bytes], rounds: int) -> dict[int, list[Run]]:
    """Runs of one process and of two, in turn."""
    runs: dict[int, list[Run]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(dir=scratch, prefix="edgewater-bench-") as folder:
        aside = Path(folder)
        for place, source in enumerate(SOURCES):
            (aside / f"{source}.jsonl").write_bytes(b"\n".join(lines[place :: len(SOURCES)]) + b"\n")
        for _ in range(rounds):
            for processes, found in runs.items():
                with tempfile.TemporaryDirectory(dir=aside) as work:
                    found.append(Run(Path(work), aside, processes, len(lines)))
    return runs


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pump", type=Path, help="pump-readings.jsonl.zst")
    parser.add_argument("--events", type=int, default=1_000_000, help="of both files together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp"), help="a folder on a disk")
    args, _ = parser.parse_known_args()
    machine = _report.machine()
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    os.sched_setaffinity(0, cores)
    named, readings = _streams.readings(args.pump)
    print(f"{machine}; cores {cores}; readings are {named}")
    # Distinct, so that what is stored tells how much was read.
    lines = [*dict.fromkeys(islice(_streams.endless(readings), args.events))]
    runs = compare(args.scratch, lines[: len(lines) // 2 * 2], args.rounds)
    rates = {processes: [run.rate for run in found] for processes, found in runs.items()}
    ratio = statistics.median(rates[2]) / statistics.median(rates[1])
    told = {str(processes): [round(rate) for rate in found] for processes, found in rates.items()}
    rows = [
        (
            f"{processes}", round(statistics.median(rates[processes])), round(min(rates[processes])),
            round(max(rates[processes])), statistics.median(sum(run.cpu_s) for run in found),
        )
        for processes, found in runs.items()
    ]  # fmt: skip
    columns = ("ingest processes", "events/s, median", "least", "most", "processor s")
    _report.table(f"two files of {len(lines) // 2:,} readings, durable, {len(cores)} cores", columns, rows)
    print(f"\n  two against one: {ratio:.2f} times (at least {TARGET})")
    _report.finish(
        "ingest_shards", events=len(lines), readings=named, cores=len(cores),
        events_a_second=told, ratio=round(ratio, 2), target=TARGET, passed=ratio >= TARGET,
    )  # fmt: skip


if __name__ == "__main__":
    main()
