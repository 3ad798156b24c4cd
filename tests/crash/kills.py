"""Kill sweeps: SIGKILL at write-like system calls, anywhere in a process's life, with the auditor outside.

    python -m tests.crash.kills --kills 5000 --seed 1

Chains are independent: chain `i` of a seed is the same whenever and beside whatever it runs. A run that came
to its end before its point is counted as such and is no kill.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash import ingest_chain, publish_chain
from tests.crash.audit import Violation
from tests.crash.ingest_chain import Chain, Shape, shape_of
from tests.crash.lives import Life, Lives, Point, cannot_trace
from tests.crash.publish_chain import PublishChain, make_site
from tests.crash.sweep_command import run_sweep

__all__ = ["Counts", "kill_ingest", "kill_publish", "prepared_model", "sweep"]

WORKERS = 2
LIVES_A_CHAIN = 60
PUBLISH_SHARE = 6  # every sixth chain is of trainers


@dataclass
class Counts:
    """What a sweep did.

    Attributes:
        kills: Lifetimes that died by SIGKILL at the call meant.
        astray: Those that died by SIGKILL elsewhere (another thread made the call); audited as well.
        ended: Those that came to their end before their point.
        chains: Data folders.
        at: Kills by system call.
        violations: What did not hold, each with how to see it again.
    """

    kills: int = 0
    astray: int = 0
    ended: int = 0
    chains: int = 0
    at: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        """Take another's counts in."""
        self.kills += other.kills
        self.astray += other.astray
        self.ended += other.ended
        self.chains += other.chains
        self.at += other.at
        self.violations += other.violations

    def book(self, life: Life) -> bool:
        """Count a lifetime. Returns: whether it came to its end. Raises: Violation if it ended otherwise."""
        if life.killed:
            assert life.point is not None
            self.kills += 1
            self.at[life.point.call] += 1
        elif life.code == -9:
            self.astray += 1
        elif life.code == 0:
            self.ended += life.point is not None
            return True
        elif life.code is None:
            raise Violation("hang", f"after {life.seconds:.0f} s; {life.err[-300:]}")
        else:
            raise Violation("ends", f"with {life.code}: {life.err[-300:]}")
        return False

    def __str__(self) -> str:
        where = ", ".join(f"{name} {count}" for name, count in self.at.most_common())
        return (
            f"{self.kills} kills in {self.chains} data folders ({where}); {self.ended} lifetimes ended "
            f"before their point, {self.astray} were killed elsewhere; {len(self.violations)} violations"
        )


def kill_ingest(
    lives: Lives, model: Path, work: Path, shape: Shape, rng: random.Random, limit: int
) -> Counts:
    """Kill ingest again and again on one data folder, from its first creation to the end of its traffic.

    Args:
        lives: Of ingest.
        work: Empty folder.
        limit: At most so many lifetimes before the undisturbed last one.
    Raises: Violation.
    """
    counts = Counts(chains=1)
    with Chain(lives, model, work, shape) as chain:
        steps = chain.steps()
        creations = 0 if shape.files else rng.choice((0, 1, 3))
        point: Point | None = None
        try:
            for number in range(limit):
                if number < creations:
                    point, reach = rng.choice(steps.creating).point(), 1
                else:
                    point, reach = steps.pick(rng, near=shape.files)
                ended = counts.book(chain.live(point, reach, again=rng.choice((0, 0, 5, 25))))
                chain.audit()
                if chain.complete or (ended and shape.files):
                    break
            point = None
            counts.book(chain.live(None))
            chain.audit(ended=True)
        except Violation as error:
            raise Violation(error.invariant, f"lifetime {len(chain.began)}, {point}: {error}") from error
    return counts


def kill_publish(lives: Lives, model: Path, site: Path, work: Path, rng: random.Random) -> Counts:
    """Kill trainers on one data folder until every window is decided.

    Args:
        lives: Of trainers.
        site: As `make_site` left it.
        work: Where the data folder lives; must not exist.
    Raises: Violation.
    """
    counts = Counts(chains=1)
    quiet = PublishChain(lives, model, site, work / "quiet")
    life = quiet.live(None, traced=True)
    counts.book(life)
    quiet.audit(recover=True, ended=True)
    points = [call.point() for call in life.calls if call.thread == life.pid]
    chain = PublishChain(lives, model, site, work / "killed")
    point: Point | None = None
    try:
        for _ in range(LIVES_A_CHAIN):
            point = points[rng.randrange(rng.choice((10, 10, 30, 60)))]
            ended = counts.book(chain.live(point))
            chain.audit(recover=rng.random() < 0.5, ended=ended)
            if ended:
                break
        else:
            point = None
            counts.book(chain.live(None))
            chain.audit(recover=True, ended=True)
    except Violation as error:
        raise Violation(error.invariant, f"{point}: {error}") from error
    return counts


def sweep(
    kills: int, seed: int, report: Callable[[str], None] = lambda line: None, model: Path | None = None
) -> Counts:
    """Kill at least so many times, and audit after each.

    Args:
        kills: At least so many.
        seed: Decides every chain.
        report: Called with a line of progress now and then, and with each violation.
        model: A prepared base; None takes the tiny one of the tests.
    Raises: RuntimeError where processes cannot be traced.
    """
    if reason := cannot_trace():
        raise RuntimeError(reason)
    model = model or prepared_model()
    total, lock, numbers = Counts(), threading.Lock(), iter(range(1 << 30))
    started = time.monotonic()

    def work(folder: Path) -> None:
        folder.mkdir()
        with Lives(ingest_chain.PROGRAM, folder) as ingests, Lives(publish_chain.PROGRAM, folder) as trainers:
            while True:
                with lock:
                    if total.kills >= kills or len(total.violations) >= 20:
                        return
                    number = next(numbers)
                counts = _chain(ingests, trainers, model, seed, number)
                with lock:
                    total.add(counts)
                    for violation in counts.violations:
                        report(violation)
                    report(f"{time.monotonic() - started:.0f} s: {total}")

    with tempfile.TemporaryDirectory(prefix="kills-") as scratch, ThreadPoolExecutor(WORKERS) as pool:
        for future in [pool.submit(work, Path(scratch, f"worker-{n}")) for n in range(WORKERS)]:
            future.result()
    return total


def _chain(ingests: Lives, trainers: Lives, model: Path, seed: int, number: int) -> Counts:
    """Chain `number` of a seed."""
    rng = random.Random(f"chain {seed} {number}")
    counts = Counts(chains=1)
    with tempfile.TemporaryDirectory(prefix="chain-") as scratch:
        work = Path(scratch)
        try:
            if number % PUBLISH_SHARE == PUBLISH_SHARE - 1:
                (work / "site").mkdir()
                make_site(ingests, model, work / "site", rng.randrange(1 << 30))
                return kill_publish(trainers, model, work / "site", work, rng)
            shape = shape_of(rng.randrange(1 << 30))
            return kill_ingest(ingests, model, work, shape, rng, LIVES_A_CHAIN)
        except Violation as error:
            counts.violations.append(
                f"{error} (python -m tests.crash.kills --seed {seed} --chain {number} repeats it)"
            )
    return counts


def prepared_model() -> Path:
    """The tiny base of the tests, prepared."""
    from tests import conftest

    folder = conftest._cache() / f"tiny-{conftest._builder_hash()}"
    if not folder.is_dir():
        raise RuntimeError("run the tests first: they prepare the tiny model that this needs")
    return folder


def main() -> int:
    """Run a sweep, or one chain of it again. Returns: 1 if anything did not hold."""

    def again(ingests: Lives, trainers: Lives, seed: int, number: int) -> Counts:
        return _chain(ingests, trainers, prepared_model(), seed, number)

    return run_sweep(__doc__, "kills", 1_000, sweep, again)


if __name__ == "__main__":
    sys.exit(main())
