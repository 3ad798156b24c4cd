"""The whole crash suite: 20,000 power cuts, 5,000 kills, failing calls and flipped bits, with counts.

    python -m tests.crash.torture --states 20000 --kills 5000 --seed 1

Each workload is recorded anew for every thousand states, under a seed of its own. A failure names workload,
seed and index; its recording is kept, and the line printed with it runs that one state again. The last line
is one JSON object. Exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.explore import REPOSITORY, Exploration, explore, record_workload, scratch_folder
from tests.crash.recorder import load, strace_problem
from tests.crash.states import CrashStates

__all__ = ["POWER_CUTS", "SWEEPS", "Part", "main", "parts"]

STATES_A_RECORDING = 1_000
PROGRESS_EVERY_S = 10.0
KEPT = Path("test-results") / "crash"
# Which workloads are recorded, and each one's share of the states.
POWER_CUTS = {
    "workload_ring": 0.35,
    "workload_upkeep": 0.17,
    "workload_creation": 0.12,
    "workload_publish": 0.18,
    "workload_migration": 0.04,
    "workload_rebuild": 0.04,
    "workload_replace": 0.1,
}
SWEEPS = ("kills", "errors", "flips")


@dataclass(frozen=True)
class Part:
    """States of one recording."""

    workload: str
    seed: int
    states: int


def parts(states: int, seed: int, only: str = "") -> Iterator[Part]:
    """Split a number of states over the workloads, then over recordings with seeds of their own."""
    shares = {name: share for name, share in POWER_CUTS.items() if only in name}
    left, total = states, sum(shares.values())
    for nth, (name, share) in enumerate(shares.items()):
        own = left if nth == len(shares) - 1 else round(states * share / total)
        left -= own
        for first in range(0, own, STATES_A_RECORDING):
            yield Part(name, seed * 1_000 + first // STATES_A_RECORDING, min(STATES_A_RECORDING, own - first))


@dataclass
class _Report:
    """Prints a line now and then, and adds up."""

    states: int = 0
    failures: int = 0
    by_workload: dict[str, int] = field(default_factory=dict)
    sweeps: dict[str, dict[str, int]] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)
    printed: float = field(default_factory=time.monotonic)

    def progress(self, found: Exploration) -> None:
        """One more state of a recording was audited."""
        done, failed = self.states + found.states, self.failures + len(found.failures)
        rate = done / max(time.monotonic() - self.begun, 1.0)
        self.line(f"{done} states, {rate:.0f} a second, {failed} failures ({found.workload})")

    def line(self, text: str) -> None:
        """A line of progress, unless there was one a moment ago."""
        if time.monotonic() - self.printed >= PROGRESS_EVERY_S:
            self.printed = time.monotonic()
            print(f"  {text}", flush=True)

    def add(self, found: Exploration) -> None:
        """A recording is done with."""
        self.states += found.states
        self.failures += len(found.failures)
        self.by_workload[found.workload] = self.by_workload.get(found.workload, 0) + found.states
        rate = found.states / found.seconds if found.seconds else 0.0
        print(
            f"{found.workload} seed {found.seed}: {found.states} states of {found.points} points in "
            f"{found.operations} operations, {len(found.failures)} failures, {rate:.0f} states/s",
            flush=True,
        )


def _cut_power(report: _Report, states: int, seed: int, only: str, keep: Path) -> None:
    for part in parts(states, seed, only):
        with scratch_folder() as scratch:
            work = scratch / "recording"
            work.mkdir()
            recording = record_workload(part.workload, part.seed, work)
            found = explore(
                part.workload, recording, range(part.states), part.seed, scratch, progress=report.progress
            )
            if found.failures:
                kept = keep / f"{part.workload}-{part.seed}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(work, kept)
                for failure in found.failures[:20]:
                    print(f"FAILED {failure}")
                    print(f"    again: {_again(kept, part, failure.index)}", flush=True)
            report.add(found)


def _again(kept: Path, part: Part, index: int) -> str:
    where = f"--recording {kept} --only {part.workload} --seed {part.seed} --index {index}"
    return f"python -m tests.crash.torture {where}"


def _one_state(recording: Path, workload: str, seed: int, index: int) -> int:
    """Audit one state of a kept recording, and leave an untouched copy of it beside for a look."""
    states, copy = CrashStates(load(recording), seed), recording / f"state-{index}"
    shutil.rmtree(copy, ignore_errors=True)
    for state in states.build([index]):
        states.write(state, copy)
        print(f"{copy}: {state.text}")
    with scratch_folder() as scratch:
        found = explore(workload, recording, [index], seed, scratch, workers=1)
    print(found.failures[0] if found.failures else f"{workload} seed {seed} state {index}: holds")
    return 1 if found.failures else 0


def _sweep(report: _Report, name: str, count: int, seed: int) -> None:
    """One of the other sweeps: a module of this package whose `sweep` returns its counts."""
    module = importlib.import_module(f"tests.crash.{name}")
    counts = dataclasses.asdict(module.sweep(count, seed, report.line))
    failures = [text for field_name in ("violations", "failures") for text in counts.get(field_name, [])]
    report.sweeps[name] = {field_name: n for field_name, n in counts.items() if isinstance(n, int)}
    report.failures += len(failures)
    for failure in failures:
        print(f"FAILED {failure}")
    words = ", ".join(f"{n} {field_name}" for field_name, n in report.sweeps[name].items())
    print(f"{name} seed {seed}: {words}, {len(failures)} failures", flush=True)


def _prepare_model() -> None:
    """The tiny model that the sweeps run ingest with is made by the first test that needs it."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/crash/test_kill.py"]
    subprocess.run(command, cwd=REPOSITORY, check=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make torture", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--states", type=int, default=20_000, help="power-cut states to audit")
    parser.add_argument("--kills", type=int, default=5_000, help="kills at write-like system calls")
    parser.add_argument("--errors", type=int, default=500, help="write-like system calls that fail")
    parser.add_argument("--flips", type=int, default=2_000, help="damaged bits")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="part of a workload's name, or kills, errors, flips")
    parser.add_argument("--keep", type=Path, default=KEPT, help="where recordings of failures go")
    parser.add_argument("--recording", type=Path, help="a kept recording: audit one state of it (--index)")
    parser.add_argument("--index", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    """Run it. Returns: The exit status."""
    args = _parse()
    if args.recording:
        return _one_state(args.recording.resolve(), args.only, args.seed, args.index)
    if problem := strace_problem():
        print(f"cannot run here: {problem}", file=sys.stderr)
        return 1
    report = _Report()
    if any(args.only in name for name in POWER_CUTS):
        _cut_power(report, args.states, args.seed, args.only, args.keep)
    sweeps = {name: getattr(args, name) for name in SWEEPS if args.only in name and getattr(args, name)}
    if sweeps.keys() - {"flips"}:
        _prepare_model()
    for name, count in sweeps.items():
        _sweep(report, name, count, args.seed)
    result = {
        "states": report.states,
        "states_by_workload": report.by_workload,
        **report.sweeps,
        "failures": report.failures,
        "seed": args.seed,
        "seconds": round(time.monotonic() - report.begun, 1),
    }
    print(json.dumps(result))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
