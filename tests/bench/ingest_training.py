"""Ingest while an update trains on the same cores: what it still takes, and how long an event waits.

What: `edgewater run` with the real model follows files. One window closes first, so that an update trains;
then 1,000 readings a second arrive for a while, then a flood of them is read as fast as it goes. The same
without updates, alternating. Throughput is counted in the ring; the wait of an event is from the `ts` that
it was written with to the moment when a reader first sees its commit. That the update was training all the
while is shown by its processor time.

How: `python tests/bench/ingest_training.py [--pump FILE] [--rounds N]`; about two minutes a round.

Expected: no event lost, at least half the throughput, p99 of the wait below 1 s at flush_ms = 200.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path as well as with -m

from adapters.model_folder import default_model_dir
from storage.errors import StorageError
from storage.ring import Ring
from storage.windows import RingState
from tests.bench import _report
from tests.bench._streams import endless, readings

ROOT = Path(__file__).resolve().parents[2]
WINDOW = 300
RATE = 1_000  # events a second of the paced part
PACE_S = 0.05
WAIT_S = 120.0
CONFIG = """\
data_dir = "{folder}/data"
[ring]
flush_ms = 200
[trigger]
min_samples = {window}
min_tokens = 100000
[health]
listen = ""
[[sources]]
name = "first"
kind = "files"
path = "{folder}/first.jsonl"
[[sources]]
name = "flood"
kind = "files"
path = "{folder}/flood.jsonl"
[[sources]]
name = "paced"
kind = "files"
path = "{folder}/paced.jsonl"
"""


class Gateway:
    """`edgewater run` in a folder, watched from outside."""

    def __init__(self, folder: Path, *, updates: bool) -> None:
        self.folder, self.updates = folder, updates
        config = folder / "edgewater.toml"
        config.write_text(CONFIG.format(folder=folder, window=WINDOW))
        flags = [] if updates else ["--no-updates"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "run", "--config", str(config), *flags],
            cwd=ROOT, stderr=(folder / "log").open("w"),
        )  # fmt: skip

    def state(self) -> RingState:
        """The ring's state."""
        with Ring.open_reader(self.folder / "data" / "ring" / "main") as ring:
            return ring.read_state()

    def until(self, happens: Callable[[], bool], what: str) -> None:
        """Wait for something."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise SystemExit(f"edgewater run ended:\n{(self.folder / 'log').read_text()[-2_000:]}")
            try:
                if happens():
                    return
            except StorageError:
                pass
            time.sleep(0.05)
        raise SystemExit(f"not within {WAIT_S:.0f} s: {what}\n{(self.folder / 'log').read_text()[-2_000:]}")

    def training_s(self) -> float:
        """Processor seconds of the update that trains now, 0 where none does."""
        return sum(_cpu_s(pid) for pid in _descendants(self.process.pid) if "adapters.update" in _words(pid))

    def waits(self, seen: int) -> tuple[list[float], int]:
        """Seconds from writing to now of the paced samples from seq `seen` on. Returns: them, next seq."""
        with Ring.open_reader(self.folder / "data" / "ring" / "main") as ring:
            state = ring.read_state()
            if state.next_seq == seen:
                return [], seen
            samples = ring.read(max(seen, state.tail_seq), state.next_seq - 1)
        now = time.time()
        own = zip(samples.sources, samples.ts, strict=True)
        return [now - ts for source, ts in own if source == "paced"], state.next_seq


@contextmanager
def gateway(lines: Iterator[bytes], flood: int, *, updates: bool) -> Iterator[Gateway]:
    """A gateway, in mid-update if it makes any, with a flood file ready beside it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, count in (("first.jsonl", WINDOW), ("flood.part", flood)):
            with (folder / file).open("wb") as out:
                out.writelines(line + b"\n" for line in islice(lines, count))
        made = Gateway(folder, updates=updates)
        try:
            made.until(lambda: made.state().next_seq >= WINDOW, "the first window")
            if updates:
                made.until(lambda: made.training_s() > 8.0, "an update past its imports")
            yield made
        finally:
            made.process.send_signal(signal.SIGTERM)
            made.process.wait(30)


def throughput(at: Gateway, seconds: float) -> tuple[float, float]:
    """Events a second while the flood is read, and the share of a core that an update had meanwhile."""
    before = at.state().counters["events"]
    (at.folder / "flood.part").rename(at.folder / "flood.jsonl")
    at.until(lambda: at.state().counters["events"] > before, "the flood")
    began, first, trained = time.monotonic(), at.state().counters["events"], at.training_s()
    time.sleep(seconds)
    events, took = at.state().counters["events"] - first, time.monotonic() - began
    return events / took, max(0.0, at.training_s() - trained) / took


def delays(at: Gateway, lines: Iterator[bytes], seconds: float) -> list[float]:
    """Waits of events that come at RATE."""
    out, seen = list[float](), at.state().next_seq
    paced = at.folder / "paced.jsonl"
    end = due = time.monotonic()
    end += seconds
    sent = 0
    while due < end:
        with paced.open("ab") as file:
            for line in islice(lines, int(RATE * PACE_S)):
                event = msgspec.json.decode(line)
                file.write(msgspec.json.encode(event | {"source": "paced", "ts": time.time()}) + b"\n")
                sent += 1
        due += PACE_S
        time.sleep(max(0.0, due - time.monotonic()))
        new, seen = at.waits(seen)
        out += new
    deadline = time.monotonic() + 10
    while len(out) < sent and time.monotonic() < deadline:
        new, seen = at.waits(seen)
        out += new
        time.sleep(0.02)
    if len(out) != sent:
        raise SystemExit(f"{sent} events were written, {len(out)} stored")
    return sorted(out)


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [child for word in task.read_text().split() for child in _descendants(int(word))]
    return found


def _words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pump", type=Path, help="pump readings (JSON lines, .zst)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each part")
    parser.add_argument("--flood", type=int, default=800_000, help="readings to read at once")
    args = parser.parse_args()
    if not (default_model_dir() / "edgewater-model.json").exists():
        raise SystemExit("prepare the model first: edgewater model prepare")
    name, found = readings(args.pump)
    rows, shares = list[list[object]](), list[float]()
    rates: dict[bool, list[float]] = {}
    p99s: dict[bool, list[float]] = {}
    for turn in range(args.rounds):
        for updates in (False, True) if turn % 2 == 0 else (True, False):
            lines = endless(found, seed=turn)
            with gateway(lines, args.flood, updates=updates) as at:
                waits = delays(at, lines, args.seconds)
                rate, share = throughput(at, args.seconds)
                flood_end = WINDOW + args.flood + len(waits)
                at.until(lambda end=flood_end: at.state().counters["events"] == end, "every event")  # type: ignore[misc]
            p99 = waits[int(0.99 * len(waits))]
            rates.setdefault(updates, []).append(rate)
            p99s.setdefault(updates, []).append(p99)
            shares += [share] if updates else []
            rows.append(["training" if updates else "alone", rate, statistics.median(waits), p99, share])
            print(json.dumps(rows[-1]), flush=True)
    columns = ["", "events/s", "wait p50 s", "wait p99 s", "update's share of a core"]
    _report.table(f"ingest beside an update, {name}", columns, rows)
    ratio = statistics.median(rates[True]) / statistics.median(rates[False])
    _report.finish(
        "ingest_training", stream=name, lost=0, ratio=round(ratio, 3), update_share=min(shares),
        events_per_s={"alone": rates[False], "training": rates[True]},
        wait_p99_s={"alone": p99s[False], "training": p99s[True]},
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
