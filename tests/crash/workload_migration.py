"""The first start of this Edgewater on a data folder of ring format 1, then its first commits."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from storage.registry import Registry
from storage.ring import Ring
from storage.windows import Commit, OpenWindow, RingState
from tests.crash.audit import Violation, acknowledged_numbers, check_acknowledged, opened
from tests.crash.plan import Plan, say

__all__ = ["audit", "prepare", "run"]

PACKED = Path(__file__).resolve().parents[1] / "data" / "format-1.tar.zst"
COMMITS, SAMPLES = 4, 30


@lru_cache(maxsize=2)
def _plan(seed: int) -> Plan:
    return Plan(seed, COMMITS + 2)  # each of its commits may hold a few samples less than one here


def prepare(root: Path, seed: int) -> None:
    """A data folder as the code of format 1 wrote it, and beside it what that code said is in it."""
    data = zstandard.ZstdDecompressor().decompress(PACKED.read_bytes(), max_output_size=64 << 20)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(root, filter="data")


def _commit(plan: Plan, state: RingState, number: int) -> Commit:
    """Commit `number` after the migration: a part of the plan's samples, one input, nothing else."""
    samples = plan.samples((number - 1) * SAMPLES, number * SAMPLES - 1)
    samples.first_seq = state.next_seq
    return Commit(
        samples=samples,
        stream_time=state.stream_time + 1,
        window=OpenWindow(state.window.window, state.window.first_seq, number * SAMPLES),
        counters={"events": number},
        positions={"after": b"%d" % number},
    )


def run(root: Path, seed: int) -> None:
    """The part that is recorded."""
    with opened(root / "data") as data:
        say("ack opened 1")
        for number in range(1, COMMITS + 1):
            say(f"try commit {number}")
            data.ring.commit(_commit(_plan(seed), data.ring.state, number))
            say(f"ack commit {number}")


def audit(root: Path, seed: int, book: Sequence[str], heard: int) -> None:
    """All that format 1 held is there, once, at any point of the migration and after it."""
    expected = json.loads((root / "expected.json").read_text())
    acknowledged, tried = acknowledged_numbers(book[:heard], "commit")
    with opened(root / "data") as data:
        commits = data.ring.state.commits - expected["ring"]["state"]["commits"]
        check_acknowledged(commits, acknowledged, tried)
        _check_ring(data.ring, expected["ring"], commits)
        _check_added(data.ring, _plan(seed), expected["ring"]["state"]["next_seq"], commits)
        _check_registry(data.registry, expected["registry"])
        data.ring.commit(_commit(_plan(seed), data.ring.state, commits + 1))
        with data.registry.write() as writer:
            writer.add_request()
    with opened(root / "data") as data:
        _check_ring(data.ring, expected["ring"], commits + 1)
        _check_added(data.ring, _plan(seed), expected["ring"]["state"]["next_seq"], commits + 1)
        _same("requests", data.registry.requests(), expected["registry"]["requests"] + 1)


def _check_ring(ring: Ring, expected: dict[str, Any], commits: int) -> None:
    if problems := [words for _, words in ring.check_blocks() if words]:
        raise Violation("I3", f"bad blocks: {problems}")
    old, state = expected["state"], _plain(ring.state)
    unmoved = set(old) if not commits else {"tail_seq", "dead_first", "dead_next", "dead_bytes"}
    _same("state", {name: state[name] for name in unmoved}, {name: old[name] for name in unmoved})
    _same("dedup key", ring.header.dedup_key.hex(), expected["dedup_key"])
    kept = ring.read(ring.state.tail_seq, old["next_seq"] - 1)
    _same("samples", kept.extend_digest(bytes(32)).hex(), expected["kept"])
    _same("hashes", hashlib.sha256(kept.hashes).hexdigest(), expected["kept_hashes"])
    _same("windows", _plain(ring.windows()), expected["windows"])
    positions = {name: value.decode() for name, value in ring.named("p").items()}
    _same("position after", positions.pop("after", "0"), str(commits))
    _same("positions", positions, expected["positions"])
    references = {name: value.decode() for name, value in ring.named("r").items()}
    _same("references", references, expected["references"])
    letters = [[number, letter.position] for number, letter in ring.dead_letters(10_000)]
    _same("dead letters", letters, expected["letters"])


def _check_added(ring: Ring, plan: Plan, first_seq: int, commits: int) -> None:
    _same("next seq", ring.state.next_seq, first_seq + commits * SAMPLES)
    if commits:
        wanted = plan.samples(0, commits * SAMPLES - 1)
        wanted.first_seq = first_seq
        if ring.read(first_seq, ring.state.next_seq - 1) != wanted:
            raise Violation("I1", "samples committed after the migration differ from those sent")


def _check_registry(registry: Registry, expected: dict[str, Any]) -> None:
    _same("updates", _plain(registry.updates()), expected["updates"])
    _same("versions", _plain(registry.versions()), expected["versions"])
    _same("active", _plain(registry.active()), expected["active"])
    _same("cursor", registry.cursor("main"), expected["cursor"])
    _same("requests", registry.requests(), expected["requests"])
    _same("audit", _plain(registry.audit()), expected["audit"])


def _plain(value: Any) -> Any:
    """Structs by the names of their fields, whatever form they are stored in; bytes in base64."""
    match value:
        case msgspec.Struct():
            return {name: _plain(item) for name, item in msgspec.structs.asdict(value).items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return msgspec.to_builtins(value)


def _same(name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise Violation("migration", f"{name} is {found!r:.300}, expected {expected!r:.300}")
