"""What the rings of other shards give to the one that starts: secret, hashes, reference values."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pipeline.elsewhere import Elsewhere, newest_positions, starting
from storage.errors import LockHeldError, StorageError
from storage.folder import DataFolder
from storage.opening import mend_ring, opened_ring
from storage.ring import Commit, Ring
from storage.samples import Samples

TOKENIZER = "00" * 8
MAP_BYTES = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[DataFolder]:
    opened = DataFolder.open(tmp_path / "data", create=True)
    yield opened
    opened.close()


def read(folder: DataFolder, shard: str, horizon: int = 100) -> Elsewhere:
    return Elsewhere.read(folder, shard, horizon=horizon, tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES)


def ring_of(folder: DataFolder, shard: str, dedup_key: bytes = b"") -> Ring:
    make = {"shard": shard, "tokenizer_id": TOKENIZER, "max_bytes": MAP_BYTES, "dedup_key": dedup_key}
    return Ring.open_or_create(folder.ring / shard, **make)  # type: ignore[arg-type]


def hash_of(number: int) -> bytes:
    return number.to_bytes(8, "little") * 2


def store(ring: Ring, numbers: range, references: dict[str, bytes] | None = None) -> None:
    """Commit a sample with a hash for each number."""
    count = len(numbers)
    samples = Samples(
        ring.state.next_seq, ["s"] * count, ["text"] * count, [""] * count, array("d", numbers),
        array("I", [1] * count), array("I", [3] * count), bytearray(bytes([1])) * count,
        b"".join(map(hash_of, numbers)),
    )  # fmt: skip
    window = msgspec.structs.replace(ring.state.window, samples=ring.state.window.samples + count)
    ring.commit(
        Commit(samples=samples, stream_time=1.0, window=window, counters={}, references=references or {})
    )


def reference(at: float) -> bytes:
    return msgspec.msgpack.encode({"at": at, "values": {"v": at}})


def test_a_host_of_one_shard_has_nothing_elsewhere(folder: DataFolder) -> None:
    with ring_of(folder, "main") as ring:
        store(ring, range(1, 5))
        elsewhere = read(folder, "main")
        assert elsewhere == Elsewhere()
        assert (elsewhere.dedup_key, elsewhere.seen(ring.header.dedup_key)) == (b"", None)


def test_a_new_shard_shares_the_secret_of_the_first(folder: DataFolder) -> None:
    with ring_of(folder, "main") as main:
        key = main.header.dedup_key
    assert read(folder, "shard-2").dedup_key == key
    with ring_of(folder, "shard-2", key) as second:
        assert second.header.dedup_key == key


def test_a_ring_that_lost_its_header_takes_the_secret_of_the_others(folder: DataFolder) -> None:
    """Then what was stored before is still recognized: the hashes in its blocks are of that secret."""
    with ring_of(folder, "main") as main:
        key = main.header.dedup_key
    with ring_of(folder, "shard-2", key) as second:
        store(second, range(1, 5))
        with second._env.begin(write=True) as txn:
            txn.delete(b"H")
    mend_ring(folder, "shard-2", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES, dedup_key=key)
    with Ring.open_reader(folder.ring / "shard-2") as again:
        assert again.header.dedup_key == key
        assert again.newest_hashes(4) == b"".join(map(hash_of, range(1, 5)))


def test_a_ring_at_rest_that_lost_its_header_takes_the_own_secret(folder: DataFolder) -> None:
    with ring_of(folder, "shard-2", bytes([7]) * 32):
        pass
    with ring_of(folder, "main", bytes([7]) * 32) as main, main._env.begin(write=True) as txn:
        txn.delete(b"H")
    (found,) = read(folder, "shard-2").rings
    assert (found.shard, found.dedup_key) == ("main", bytes([7]) * 32)


@pytest.mark.parametrize("left", ["shard-2.rebuilt.new", "shard-2.v1"])
def test_a_ring_whose_rebuild_was_cut_short_is_found(folder: DataFolder, left: str) -> None:
    """The damaged one is away, the new one has not its name yet: the positions in it still count."""
    with ring_of(folder, "shard-2") as ring:
        store(ring, range(1, 5))
    if left == "shard-2.v1":
        (folder.ring / left).mkdir()
    else:
        (folder.ring / "shard-2").rename(folder.ring / left)
    (found,) = read(folder, "main").rings
    assert (found.shard, len(found.hashes)) == ("shard-2", 4 * 16)


def test_hashes_of_all_other_shards_come_within_one_horizon(folder: DataFolder) -> None:
    """The newest of each, the same share."""
    for number, shard in enumerate(("main", "shard-2", "shard-3")):
        with ring_of(folder, shard, bytes([7]) * 32) as ring:
            store(ring, range(100 * number + 1, 100 * number + 81))
    seen = read(folder, "shard-3", horizon=100).seen(bytes([7]) * 32)
    assert seen is not None
    assert len(seen) == 100
    found = [number for number in range(1, 400) if hash_of(number) in seen]
    assert found == [*range(31, 81), *range(131, 181)]


def test_hashes_of_another_secret_are_left_out_and_that_is_said(
    folder: DataFolder, caplog: pytest.LogCaptureFixture
) -> None:
    with ring_of(folder, "main") as ring:
        store(ring, range(1, 5))
    with caplog.at_level(logging.WARNING):
        assert read(folder, "shard-2").seen(bytes(32)) is None
    assert "ring main has another dedup secret" in caplog.text


def test_of_each_source_the_newest_reference_values_count(folder: DataFolder) -> None:
    with ring_of(folder, "main") as ring:
        store(ring, range(1, 2), {"a": reference(5.0), "b": reference(5.0), "c": reference(5.0)})
    own = {"a": reference(4.0), "b": reference(6.0), "d": reference(1.0)}
    found = read(folder, "shard-2").references(own)
    assert found == {"a": reference(5.0), "b": reference(6.0), "c": reference(5.0), "d": reference(1.0)}


def test_the_newest_positions_of_all_rings_are_found_without_moving_any(folder: DataFolder) -> None:
    """What `capture` reads from: it ingests nothing."""
    rows = {
        "main": {"files:a:x": b"1", "files:b:x": b"1"},
        "shard-2": {"files:a:x": b"2", "@files:a": msgspec.msgpack.encode(1)},
    }
    for shard, positions in rows.items():
        with ring_of(folder, shard) as ring:
            state = ring.state
            ring.commit(
                Commit(
                    samples=Samples(), stream_time=1.0, window=state.window, counters={}, positions=positions
                )
            )
    found = newest_positions(read(folder, ""), ["files:a", "files:b", "files:c"])
    assert found == {"files:a:x": b"2", "files:b:x": b"1"}
    with Ring.open_reader(folder.ring / "main") as ring:
        assert ring.named("p") == rows["main"]


def test_the_ring_of_a_living_process_is_read_and_left_as_it_is(folder: DataFolder) -> None:
    with (
        folder.lock("ingest-main"),
        opened_ring(folder, shard="main", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES) as ring,
    ):
        store(ring, range(1, 5))
        path = folder.path / "seen-by-another"
        program = (
            "import sys; from pathlib import Path; from storage.folder import DataFolder\n"
            "from pipeline.elsewhere import Elsewhere\n"
            "found = Elsewhere.read(DataFolder(Path(sys.argv[1])), 'shard-2', horizon=9)\n"
            "Path(sys.argv[2]).write_text(str(len(found.rings[0].hashes)))\n"
        )
        subprocess.run([sys.executable, "-c", program, str(folder.path), str(path)], check=True, timeout=60)
        assert path.read_text() == str(4 * 16)


def test_a_ring_that_cannot_be_read_is_no_ring_without_positions(folder: DataFolder) -> None:
    """Whoever goes on would read a source that moved from its start."""
    with ring_of(folder, "main"):
        pass
    (folder.ring / "main" / "data.mdb").chmod(0o666)
    with pytest.raises(StorageError):
        read(folder, "shard-2")


def test_one_starts_at_a_time(folder: DataFolder) -> None:
    stop, began = threading.Event(), threading.Event()

    def second() -> None:
        with starting(folder, threading.Event()):
            began.set()

    with starting(folder, stop) as lock:
        thread = threading.Thread(target=second)
        thread.start()
        assert not began.wait(0.3)
        lock.close()
        assert began.wait(10), "the ring is open: the next one may start"
    thread.join()


def test_who_waits_to_start_can_be_told_to_stop(folder: DataFolder) -> None:
    stop = threading.Event()
    stop.set()
    with (
        starting(folder, threading.Event()),
        pytest.raises(LockHeldError, match="starting"),
        starting(folder, stop),
    ):
        pass
