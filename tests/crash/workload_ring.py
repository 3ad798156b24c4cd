"""Steady work on a full ring: commits of all sizes, evictions, windows, inputs that come and go."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tests.crash.audit import acknowledged_numbers, audit_plan, opened
from tests.crash.plan import Plan, say

__all__ = ["audit", "prepare", "run"]

BEFORE = 105  # commits that fill the ring before the recording starts
RECORDED = 60
LAST = BEFORE + RECORDED
BY_AGE_EVERY, BY_AGE_KEEPS = 20, 78  # every so many commits, those older than so many go by age


@lru_cache(maxsize=2)
def _plan(seed: int) -> Plan:
    return Plan(seed, LAST + 1)


def prepare(root: Path, seed: int) -> None:
    """Fill the ring up to where eviction begins."""
    plan = _plan(seed)
    with opened(root / "data") as data:
        for number in range(1, BEFORE + 1):
            data.ring.commit(plan.commit(number))


def run(root: Path, seed: int) -> None:
    """The part that is recorded."""
    plan = _plan(seed)
    with opened(root / "data") as data:
        ring = data.ring
        say(f"ack commit {BEFORE} {ring.state.tail_seq}")
        for number in range(BEFORE + 1, LAST + 1):
            say(f"try commit {number}")
            ring.commit(plan.commit(number))
            say(f"ack commit {number} {ring.state.tail_seq}")
            if number % BY_AGE_EVERY == 0:
                ring.evict_older_than(plan.commit(number - BY_AGE_KEEPS).stream_time)


def audit(root: Path, seed: int, book: Sequence[str], heard: int) -> None:
    """Compare what is left with the plan.

    Args:
        book: All that the undisturbed run said.
        heard: How many of its lines were said before the cut.
    """
    acknowledged, tried = acknowledged_numbers(book[:heard], "commit")
    tails = {int(line.split()[2]): int(line.split()[3]) for line in book if line.startswith("ack")}

    def around(commits: int) -> tuple[int, int]:
        # Making room and eviction by age are transactions between two commits.
        return tails[commits], tails.get(commits + 1, tails[commits])

    before = max(acknowledged, BEFORE)
    audit_plan(root / "data", _plan(seed), before, max(tried, before), around)
