"""What every move of a source between shards promises, whatever order moves, crashes and forgetting come in.

An oracle knows what the last owner of each source committed; real rings, and a crash at every moment that a
move has: before its commit, and after.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.elsewhere import Elsewhere, take_over
from storage.check import check_ring
from storage.folder import DataFolder
from storage.opening import opened_ring
from storage.ring import Commit, Ring
from storage.samples import Samples

TOKENIZER = "00" * 8
MAP_BYTES = 1 << 20
SHARDS = ["main", "shard-2", "shard-3"]
SOURCES = ["files:a", "files:a.b", "mqtt:plant"]


class Crash(Exception):
    """The process is gone."""


class Host:
    """Rings of one data folder, and what the owner of each source committed last."""

    def __init__(self, folder: DataFolder) -> None:
        self.folder = folder
        self.truth: dict[str, dict[str, bytes]] = {source: {} for source in SOURCES}

    @contextmanager
    def process(self, shard: str, sources: list[str], crash: str = "") -> Iterator[Ring]:
        """An ingest process of a shard: it takes its sources over, then works, then ends or dies."""
        elsewhere = Elsewhere.read(
            self.folder, shard, horizon=100, tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES
        )
        opening = opened_ring(
            self.folder, shard=shard, tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES,
            dedup_key=elsewhere.dedup_key,
        )  # fmt: skip
        with opening as ring:
            if crash == "before":
                raise Crash
            take_over(ring, elsewhere, sources)
            if crash == "after":
                raise Crash
            yield ring

    def positions(self, ring: Ring, source: str) -> dict[str, bytes]:
        """Those that the connector of a source would find."""
        rows = ring.named("p")
        return {name: data for name, data in rows.items() if name == source or name.startswith(f"{source}:")}

    def commit(self, ring: Ring, source: str, positions: dict[str, bytes]) -> None:
        commit(ring, positions)
        self.truth[source] = {k: v for k, v in (self.truth[source] | positions).items() if v}


def commit(ring: Ring, positions: dict[str, bytes]) -> None:
    state = ring.state
    ring.commit(
        Commit(
            samples=Samples(), stream_time=1.0, window=state.window, counters=state.counters,
            positions=positions,
        )
    )  # fmt: skip


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    folder = DataFolder.open(tmp_path / "data", create=True)
    yield Host(folder)
    folder.close()


@pytest.mark.parametrize("seed", range(4))
def test_a_source_goes_on_where_its_last_owner_was(host: Host, seed: int) -> None:
    """60 rescales: each process that begins finds exactly what the last owner of a source committed."""
    rng = random.Random(seed)
    value = 0
    for _ in range(60):
        used = rng.randint(1, len(SHARDS))
        owned: dict[str, list[str]] = {shard: [] for shard in SHARDS[:used]}
        for source in SOURCES:
            owned[rng.choice(SHARDS[:used])].append(source)
        for shard, sources in owned.items():
            crash = rng.choice(("", "", "before", "after"))
            try:
                with host.process(shard, sources, crash) as ring:
                    for source in sources:
                        assert host.positions(ring, source) == host.truth[source]
                        inputs = [source, f"{source}:x", f"{source}:y"]
                        value += 1
                        written = {name: b"%d" % value for name in rng.sample(inputs, rng.randint(0, 2))}
                        gone = [name for name in host.truth[source] if rng.random() < 0.3]
                        host.commit(ring, source, written | dict.fromkeys(gone, b""))
            except Crash:
                pass
    for shard in host.folder.shards():
        assert check_ring(host.folder.ring / shard, live=False) == []


def test_a_move_is_one_commit_and_beginning_again_moves_nothing(host: Host) -> None:
    """Each further start finds its own ring to be the newest: nothing is written for it."""
    with host.process("main", ["files:a"]) as ring:
        host.commit(ring, "files:a", {"files:a:x": b"1", "files:a:y": b"2"})
        before = ring.state.commits
    with host.process("main", ["files:a"]) as ring:
        assert ring.state.commits == before
    with host.process("shard-2", ["files:a"]) as ring:
        assert ring.state.commits == 1
        assert host.positions(ring, "files:a") == host.truth["files:a"]
    with host.process("shard-2", ["files:a"]) as ring:
        assert ring.state.commits == 1


def test_an_input_that_was_forgotten_does_not_come_back_with_an_older_ring(host: Host) -> None:
    """main holds the position of a file that shard-2 has seen to its end and deleted."""
    with host.process("main", ["files:a"]) as ring:
        host.commit(ring, "files:a", {"files:a:x": b"1"})
    with host.process("shard-2", ["files:a"]) as ring:
        host.commit(ring, "files:a", {"files:a:x": b""})
    for shard in ("main", "shard-3", "main"):
        with host.process(shard, ["files:a"]) as ring:
            assert host.positions(ring, "files:a") == {}


def test_a_source_that_stays_is_not_touched_by_another_that_moves(host: Host) -> None:
    """Names that begin alike are different sources."""
    with host.process("main", SOURCES) as ring:
        for source in SOURCES:
            host.commit(ring, source, {f"{source}:x": source.encode()})
    with host.process("shard-2", ["files:a.b"]) as ring:
        assert ring.named("p").keys() == {"files:a.b:x", "@files:a.b"}
        host.commit(ring, "files:a.b", {"files:a.b:x": b"2"})
    with host.process("main", ["files:a", "mqtt:plant"]) as ring:
        for source in ("files:a", "mqtt:plant"):
            assert host.positions(ring, source) == host.truth[source]


def test_a_damaged_ring_that_nobody_writes_any_more_is_mended_before_it_is_believed(host: Host) -> None:
    """A source that comes from it goes on where it was, with the page that named its position lost."""
    with host.process("main", []):
        pass
    with host.process("shard-2", ["files:a"]) as ring:
        for number in range(1, 6):
            host.commit(ring, "files:a", {"files:a:x": b"%d" % number})
    data = host.folder.ring / "shard-2" / "data.mdb"
    page = bytearray(data.read_bytes()[:8_192])
    page[16:24] = page[4_112:4_120] = bytes(8)  # both meta pages lose their magic
    with data.open("r+b") as file:
        file.write(page)
    with host.process("main", ["files:a"]) as ring:
        assert host.positions(ring, "files:a") == host.truth["files:a"]
    assert [path.name for path in (host.folder.path / "quarantine").iterdir()] == ["ring-shard-2-1"]
