"""Error sweeps: a write, flush or rename that fails, anywhere in a process's life, with the auditor outside.

    python -m tests.crash.errors --errors 500 --seed 1

A writer that met an error must end, say so in one line, and acknowledge nothing after it: what a failed flush
left in memory says nothing about the disk, and a second flush would report success (FAULTS 7).
"""

from __future__ import annotations

import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash import ingest_chain, publish_chain
from tests.crash.audit import Violation
from tests.crash.ingest_chain import Chain, Shape, shape_of
from tests.crash.kills import prepared_model
from tests.crash.lives import Life, Lives, cannot_trace
from tests.crash.publish_chain import PublishChain, make_site
from tests.crash.sweep_command import run_sweep

__all__ = ["ERRORS", "Counts", "check_end", "check_said", "fail_ingest", "fail_publish", "sweep"]

ERRORS = ("EIO", "ENOSPC")
_LOGGED = re.compile(r"^[-0-9]+ [:,0-9]+ edgewater\.\w+ (WARNING|ERROR) ")
LIVES_A_CHAIN = 16
PUBLISH_SHARE = 4  # every fourth chain is of trainers


@dataclass
class Counts:
    """What a sweep did.

    Attributes:
        errors: Calls that failed.
        missed: Lifetimes that ended before their point.
        chains: Data folders.
        at: Errors by system call and error number.
        violations: What did not hold, each with how to see it again.
    """

    errors: int = 0
    missed: int = 0
    chains: int = 0
    at: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        """Take another's counts in."""
        self.errors += other.errors
        self.missed += other.missed
        self.chains += other.chains
        self.at += other.at
        self.violations += other.violations

    def book(self, life: Life) -> None:
        """Count a lifetime."""
        assert life.point is not None
        if life.hit >= 0:
            self.errors += 1
            self.at[f"{life.point.call} {life.point.what}"] += 1
        else:
            self.missed += 1

    def __str__(self) -> str:
        where = ", ".join(f"{name} {count}" for name, count in self.at.most_common())
        return (
            f"{self.errors} errors in {self.chains} data folders ({where}); {self.missed} lifetimes ended "
            f"before their point; {len(self.violations)} violations"
        )


def check_end(life: Life, *, may_go_on: bool = False) -> None:
    """A lifetime that met an error ended with one clear line, and acknowledged nothing after it.

    Args:
        may_go_on: Something else than this process may have met it, and was given up.
    Raises: Violation.
    """
    if life.code is None:
        raise Violation("hang", f"{life.point}: after {life.seconds:.0f} s; {life.err[-300:]}")
    if life.hit >= 0 and not _does_without(life):
        late = [call.text for call in life.calls[life.hit + 1 :] if call.path.endswith("/out")]
        if late and not may_go_on:
            raise Violation("acknowledged", f"{life.point}: after the error: {late}")
        if life.code == 0 and not may_go_on:
            raise Violation("fail-stop", f"{life.point}: went on after the error")
    elif life.code != 0 and life.hit < 0:
        raise Violation("ends", f"with {life.code} though nothing failed: {life.err[-300:]}")
    check_said(life)


def _does_without(life: Life) -> bool:
    """Whether what failed is not needed: a log line, a lock's pid, a dictionary's copy, an audit row."""
    text = life.calls[life.hit].text
    if life.calls[life.hit].path.endswith("/err"):
        return True
    if "/registry/data.mdb>" in text:
        # All that ingest writes there: that it rebuilt the ring, which it has logged as well.
        return "is rebuilt with" in life.err
    return "ENOSPC" in text and (".lock>" in text or "/dictionary-" in text)


def check_said(life: Life) -> None:
    """A lifetime that ended with an error said so in one line, after what it logged. Raises: Violation."""
    if life.hit >= 0 and life.calls[life.hit].path.endswith("/err"):
        return  # the line that failed was one of its log, which then shows that instead
    said = [line for line in life.err.splitlines() if not _LOGGED.match(line)]
    clear = len(said) == 1 and said[0].startswith("edgewater: ")
    if life.code is None or life.code < 0 or (life.code > 0 and not clear):
        raise Violation("message", f"{life.point}: ended with {life.code} and said {said[-4:]}")


def fail_ingest(lives: Lives, model: Path, work: Path, shape: Shape, rng: random.Random) -> Counts:
    """Let ingest meet one error a lifetime on one data folder, from its creation to the end of its traffic.

    Args:
        lives: Of ingest.
        work: Empty folder.
    Raises: Violation.
    """
    counts = Counts(chains=1)
    with Chain(lives, model, work, shape) as chain:
        steps = chain.steps(own=True)
        creations = rng.choice((1, 4))
        for number in range(LIVES_A_CHAIN):
            what = rng.choice(ERRORS)
            if number < creations:
                point, reach = rng.choice(steps.creating).point(what), 1
            else:
                point, reach = steps.pick(rng, what, near=shape.files)
            life = chain.live(point, reach, again=rng.choice((0, 5, 25)))
            counts.book(life)
            check_end(life)
            chain.audit()
            if chain.complete or (life.code == 0 and shape.files):
                break
        check_end(chain.live(None))
        chain.audit(ended=True)
    return counts


def fail_publish(lives: Lives, model: Path, site: Path, work: Path, rng: random.Random) -> Counts:
    """Let trainers meet one error a lifetime on one data folder, until every window is decided.

    Args:
        lives: Of trainers.
        site: As `make_site` left it.
        work: Where the data folder lives; must not exist.
    Raises: Violation.
    """
    counts = Counts(chains=1)
    quiet = PublishChain(lives, model, site, work / "quiet").live(None, traced=True)
    calls = [call for call in quiet.calls if call.thread == quiet.pid and not call.path.endswith("/err")]
    chain = PublishChain(lives, model, site, work / "hurt")
    for _ in range(LIVES_A_CHAIN):
        point = calls[rng.randrange(rng.choice((24, len(calls))))].point(rng.choice(ERRORS))
        life = chain.live(point)
        counts.book(life)
        check_end(life, may_go_on=True)
        ended = life.code == 0 and not life.out
        chain.audit(recover=rng.random() < 0.5, ended=ended)
        if ended:
            return counts
    check_end(chain.live(None))
    chain.audit(recover=True, ended=True)
    return counts


def sweep(
    errors: int, seed: int, report: Callable[[str], None] = lambda line: None, model: Path | None = None
) -> Counts:
    """Inject at least so many errors, and audit after each.

    Args:
        errors: At least so many.
        seed: Decides every chain.
        report: Called with a line of progress after each chain, and with each violation.
        model: A prepared base; None takes the tiny one of the tests.
    Raises: RuntimeError where processes cannot be traced.
    """
    if reason := cannot_trace():
        raise RuntimeError(reason)
    model = model or prepared_model()
    total, number = Counts(), 0
    with tempfile.TemporaryDirectory(prefix="errors-") as scratch:
        folder = Path(scratch)
        with Lives(ingest_chain.PROGRAM, folder) as ingests, Lives(publish_chain.PROGRAM, folder) as trainers:
            while total.errors < errors and len(total.violations) < 20:
                counts = chain_of(ingests, trainers, model, seed, number)
                total.add(counts)
                for violation in counts.violations:
                    report(violation)
                report(str(total))
                number += 1
    return total


def chain_of(ingests: Lives, trainers: Lives, model: Path, seed: int, number: int) -> Counts:
    """Chain `number` of a seed."""
    rng = random.Random(f"errors {seed} {number}")
    with tempfile.TemporaryDirectory(prefix="chain-") as scratch:
        work = Path(scratch)
        try:
            if number % PUBLISH_SHARE == PUBLISH_SHARE - 1:
                (work / "site").mkdir()
                make_site(ingests, model, work / "site", rng.randrange(1 << 30))
                return fail_publish(trainers, model, work / "site", work, rng)
            return fail_ingest(ingests, model, work, shape_of(rng.randrange(1 << 30)), rng)
        except Violation as error:
            again = f"python -m tests.crash.errors --seed {seed} --chain {number} repeats it"
            return Counts(chains=1, violations=[f"{error} ({again})"])


def main() -> int:
    """Run a sweep, or one chain of it again. Returns: 1 if anything did not hold."""

    def again(ingests: Lives, trainers: Lives, seed: int, number: int) -> Counts:
        return chain_of(ingests, trainers, prepared_model(), seed, number)

    return run_sweep(__doc__, "errors", 200, sweep, again)


if __name__ == "__main__":
    sys.exit(main())
