"""The first start on an empty disk, from the first mkdir on: data folder, ring, registry, first commits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tests.crash.audit import Violation, acknowledged_numbers, audit_plan, opened
from tests.crash.plan import Plan, say

__all__ = ["audit", "prepare", "run"]

COMMITS = 6


@lru_cache(maxsize=2)
def _plan(seed: int) -> Plan:
    return Plan(seed, COMMITS + 1)


def prepare(root: Path, seed: int) -> None:
    """Nothing: there is only the folder that the data folder is made in."""


def run(root: Path, seed: int) -> None:
    """The part that is recorded."""
    plan = _plan(seed)
    with opened(root / "var" / "data") as data:
        for number in range(1, COMMITS + 1):
            say(f"try commit {number}")
            data.ring.commit(plan.commit(number))
            say(f"ack commit {number}")
            with data.registry.write() as writer:
                writer.add_request()
            say(f"ack request {number}")


def audit(root: Path, seed: int, book: Sequence[str], heard: int) -> None:
    """Opening works at any point, and what was acknowledged is there."""
    path = root / "var" / "data"
    audit_plan(path, _plan(seed), *acknowledged_numbers(book[:heard], "commit"))
    with opened(path) as data:
        requests, (acknowledged, _) = data.registry.requests(), acknowledged_numbers(book[:heard], "request")
        if not acknowledged <= requests <= acknowledged + 1:
            raise Violation("I1", f"the registry is at request {requests}, {acknowledged} was acknowledged")
        with data.registry.write() as writer:
            if writer.add_request() != requests + 1:
                raise Violation("goes on", "the registry does not count on")
