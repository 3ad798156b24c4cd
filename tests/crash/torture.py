"""The whole crash suite: power cuts in 20,000 states and 5,000 kills, with counts of everything.

    python -m tests.crash.torture --states 20000 --kills 5000 --seed 1

Each workload is recorded anew for every thousand states, under a seed of its own. A failure names workload,
seed and index; its recording is kept, and the line printed with it runs that one state again. The last line
is one JSON object. Exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.crash.explore import Exploration, explore, record_workload, scratch_folder
from tests.crash.recorder import load, strace_problem
from tests.crash.states import CrashStates

__all__ = ["POWER_CUTS", "Part", "main", "parts"]

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
    kills: dict[str, Any] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)
    printed: float = field(default_factory=time.monotonic)

    def progress(self, found: Exploration) -> None:
        """One more state of a recording was audited."""
        if time.monotonic() - self.printed < PROGRESS_EVERY_S:
            return
        self.printed = time.monotonic()
        done, rate = self.states + found.states, (self.states + found.states) / (self.printed - self.begun)
        failed = self.failures + len(found.failures)
        print(f"  {done} states, {rate:.0f} a second, {failed} failures ({found.workload})", flush=True)

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


def _kill(report: _Report, kills: int, seed: int) -> None:
    """The sweep of kills, once it is there."""
    sweep = importlib.import_module("tests.crash.kills").sweep
    counts = sweep(kills, seed, lambda text: print(f"  {text}", flush=True))
    report.kills = {name: getattr(counts, name) for name in ("kills", "astray", "ended", "chains")}
    report.failures += len(counts.violations)
    for violation in counts.violations:
        print(f"FAILED {violation}", flush=True)


def main() -> int:
    """Run it. Returns: The exit status."""
    parser = argparse.ArgumentParser(prog="make torture", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--states", type=int, default=20_000, help="power-cut states to audit")
    parser.add_argument("--kills", type=int, default=5_000, help="kills at write-like system calls")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="'kills', or part of a workload's name")
    parser.add_argument(
        "--keep", type=Path, default=Path("crash-failures"), help="where recordings of failures go"
    )
    parser.add_argument("--recording", type=Path, help="a kept recording: audit one state of it (--index)")
    parser.add_argument("--index", type=int, default=0)
    args = parser.parse_args()
    if args.recording:
        return _one_state(args.recording.resolve(), args.only, args.seed, args.index)
    if problem := strace_problem():
        print(f"cannot run here: {problem}", file=sys.stderr)
        return 1
    report = _Report()
    if args.only != "kills":
        _cut_power(report, args.states, args.seed, args.only, args.keep)
    if args.only in {"", "kills"} and args.kills:
        _kill(report, args.kills, args.seed)
    result = {
        "states": report.states,
        "states_by_workload": report.by_workload,
        **report.kills,
        "failures": report.failures,
        "seed": args.seed,
        "seconds": round(time.monotonic() - report.begun, 1),
    }
    print(json.dumps(result))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
