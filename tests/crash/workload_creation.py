"""The first start on an empty disk, from the first mkdir on: data folder, ring, registry, first commits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from storage.durable import make_private_folder
from storage.folder import DataFolder
from tests.crash.audit import Violation, acknowledged_numbers, audit_plan, opened
from tests.crash.plan import SHARD, Plan, say

__all__ = ["audit", "prepare", "run"]

COMMITS = 6


@lru_cache(maxsize=2)
def _plan(seed: int) -> Plan:
    return Plan(seed, COMMITS + 1)


def prepare(root: Path, seed: int) -> None:
    """Nothing, or by the seed what a start left that was cut short before its marker, or after it."""
    path = root / "var" / "data"
    if seed % 3 == 1:
        for part in ("ring", "versions"):
            make_private_folder(path / part)
        (path / "edgewater.json.tmp").write_bytes(b'{"format":')
    if seed % 3 == 2:
        data = DataFolder.open(path, create=True)
        for aside in (data.ring / f"{SHARD}.new", data.registry.with_name("registry.new")):
            make_private_folder(aside)
            (aside / "data.mdb").write_bytes(bytes(5_000) + b"half a page")
            (aside / "lock.mdb").write_bytes(b"\xff" * 4_224)
        data.close()


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
