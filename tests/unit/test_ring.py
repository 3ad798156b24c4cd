"""The ring: commits, edges, eviction, refusal."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

import pytest

from storage.errors import ForeignFolderError, RingFullError, StorageError
from storage.ring import Commit, Ring
from storage.ring_writer import FULLEST
from storage.samples import Samples
from storage.windows import ClosedWindow, DeadLetter, OpenWindow

TOKENIZER = "00112233aabbccdd"


def samples(first: int, n: int, tokens: int = 5) -> Samples:
    total = n * tokens
    return Samples(
        first, ["s"] * n, ["text"] * n, [""] * n,
        array("d", range(first, first + n)), array("I", [tokens] * n),
        array("I", random.Random(first).choices(range(49_152), k=total)), bytearray(b"\x01" * total),
        b"".join((first + i).to_bytes(16, "big") for i in range(n)),
    )  # fmt: skip


def commit(ring: Ring, n: int, **more: object) -> None:
    state = ring.state
    batch = samples(state.next_seq, n, int(more.pop("tokens", 5)))  # type: ignore[call-overload]
    more.setdefault("stream_time", float(state.next_seq + n))
    ring.commit(Commit(samples=batch, window=OpenWindow(), counters={}, **more))  # type: ignore[arg-type]


def new_ring(tmp_path: Path, max_bytes: int = 4 << 20) -> Ring:
    return Ring.open_or_create(tmp_path / "ring", shard="main", tokenizer_id=TOKENIZER, max_bytes=max_bytes)


def test_what_a_commit_wrote_is_there_after_reopening(tmp_path: Path) -> None:
    """Samples, windows, positions, references, dead letters and state come back together."""
    letter = DeadLetter("s", "byte 3", 1.0, "not JSON", b"{")
    window = ClosedWindow(1, 0, 9, 10, 50, 10.0, "samples")
    with new_ring(tmp_path) as ring:
        commit(
            ring, 10, closed=[window], positions={"a": b"1"}, references={"s": b"2"}, dead_letters=[letter]
        )
        state = ring.state
    with new_ring(tmp_path) as ring:
        assert ring.state == state
        assert ring.read(0, 9) == samples(0, 10)
        assert ring.windows() == [window]
        assert ring.named("p") == {"a": b"1"}
        assert ring.named("r") == {"s": b"2"}
        assert ring.dead_letters() == [(0, letter)]


@pytest.mark.parametrize(("first", "last"), [(0, 0), (3, 12), (9, 10), (10, 19), (0, 29), (29, 29)])
def test_a_range_is_read_across_blocks(tmp_path: Path, first: int, last: int) -> None:
    with new_ring(tmp_path) as ring:
        for _ in range(3):
            commit(ring, 10)
        assert (
            ring.read(first, last) == Samples.concat(samples(i * 10, 10) for i in range(3))[first : last + 1]
        )


def test_a_range_that_is_not_all_there_is_refused(tmp_path: Path) -> None:
    with new_ring(tmp_path) as ring:
        commit(ring, 10)
        with pytest.raises(LookupError):
            ring.read(5, 10)


def test_the_file_never_grows_and_the_newest_samples_stay(tmp_path: Path) -> None:
    """Ten times its size goes through the ring: same file size, contiguous seqs, no error."""
    with new_ring(tmp_path, 1 << 20) as ring:
        data = ring.folder / "data.mdb"
        size, blocks = data.stat().st_size, data.stat().st_blocks
        for _ in range(400):
            commit(ring, 100, tokens=150)
        assert (data.stat().st_size, data.stat().st_blocks) == (size, blocks)
        assert 0 < ring.state.tail_seq < ring.state.next_seq == 40_000
        assert ring.usage().live_bytes <= FULLEST * size
        assert [problem for _, problem in ring.check_blocks() if problem] == []
        assert len(ring.read(ring.state.tail_seq, 39_999)) == 40_000 - ring.state.tail_seq
        with pytest.raises(LookupError):
            ring.read(ring.state.tail_seq - 1, 39_999)


def test_a_commit_larger_than_the_ring_is_refused_and_loses_nothing(tmp_path: Path) -> None:
    with new_ring(tmp_path, 1 << 20) as ring:
        commit(ring, 10)
        state = ring.state
        with pytest.raises(RingFullError):
            commit(ring, 5_000, tokens=200)
        assert ring.state == state
        assert ring.read(0, 9) == samples(0, 10)
        commit(ring, 1)


def test_eviction_by_age_removes_old_commits_only(tmp_path: Path) -> None:
    with new_ring(tmp_path) as ring:
        for stream_time in (10.0, 20.0, 30.0):
            commit(ring, 10, stream_time=stream_time)
        assert ring.evict_older_than(20.0) == 10
        assert ring.read(10, 29).seqs == range(10, 30)
        assert ring.read_state().tail_seq == 10


def test_newest_hashes_come_back_in_order(tmp_path: Path) -> None:
    with new_ring(tmp_path) as ring:
        assert ring.newest_hashes(5) == b""
        for _ in range(3):
            commit(ring, 10)
        assert ring.newest_hashes(15) == b"".join(i.to_bytes(16, "big") for i in range(15, 30))
        assert len(ring.newest_hashes(1_000)) == 30 * 16


def test_dead_letters_are_bounded(tmp_path: Path) -> None:
    with new_ring(tmp_path, 1 << 20) as ring:
        for n in range(40):
            letter = DeadLetter("s", str(n), 0.0, "too long", bytes(4_000))
            commit(ring, 1, dead_letters=[letter])
        kept = ring.dead_letters(1_000)
        assert kept[-1][1].position == "39"
        assert sum(len(letter.data) for _, letter in kept) <= (1 << 20) // 16


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    new_ring(tmp_path).close()
    with pytest.raises(ForeignFolderError, match="tokenizer"):
        Ring.open_or_create(tmp_path / "ring", shard="main", tokenizer_id="ff" * 8, max_bytes=1 << 20)


def test_a_symlinked_data_file_is_refused(tmp_path: Path) -> None:
    """LMDB would follow it and write to the target."""
    new_ring(tmp_path).close()
    data = tmp_path / "ring" / "data.mdb"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ForeignFolderError, match="symbolic"):
        new_ring(tmp_path)


def test_a_reader_sees_commits_and_cannot_write(tmp_path: Path) -> None:
    """The trainer opens the ring in another process; here the same folder through a copy of the handle."""
    import subprocess
    import sys

    with new_ring(tmp_path) as ring:
        commit(ring, 10)
        code = (
            "import sys; from pathlib import Path; from storage.ring import Ring\n"
            "r = Ring.open_reader(Path(sys.argv[1])); print(len(r.read(0, 9)), r.read_state().next_seq)"
        )
        out = subprocess.run(
            [sys.executable, "-c", code, str(ring.folder)], capture_output=True, text=True, check=True
        )
        assert out.stdout.split() == ["10", "10"]
    with Ring.open_reader(tmp_path / "ring") as reader, pytest.raises(StorageError, match="reading only"):
        commit(reader, 1)


def test_a_ring_whose_making_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    """A crash before the rename leaves a folder aside, which the next start replaces."""
    aside = tmp_path / "ring.new"
    aside.mkdir()
    (aside / "data.mdb").write_bytes(bytes(100))
    with new_ring(tmp_path) as ring:
        commit(ring, 3)
        assert ring.state.next_seq == 3
    assert not aside.exists()


def test_a_ring_is_never_seen_without_its_header(tmp_path: Path) -> None:
    """The header is in the environment before its name is, so a reader at any moment finds it or nothing."""
    from storage.env import create_environment

    create_environment(tmp_path / "other", 1 << 20, {})
    with pytest.raises(ForeignFolderError, match="not a ring"):
        Ring.open_reader(tmp_path / "other")


def test_large_commits_find_room_again_and_again(tmp_path: Path) -> None:
    """A block wants its pages side by side; the ring makes such room instead of refusing for ever."""
    with new_ring(tmp_path, 1 << 20) as ring:
        for size in (900, 300, 1_100, 500) * 6:
            commit(ring, size // 10, tokens=1_000)
        assert [problem for _, problem in ring.check_blocks() if problem] == []
        assert ring.read(ring.state.next_seq - 50, ring.state.next_seq - 1) == samples(
            ring.state.next_seq - 50, 50, 1_000
        )


def test_a_failed_write_ends_the_handle(tmp_path: Path) -> None:
    """After a failed flush LMDB would go on; we refuse everything until the ring is opened again."""
    import lmdb

    from storage.errors import WriteFailedError

    class Broken:
        def __init__(self, env: lmdb.Environment) -> None:
            self._env = env

        def begin(self, write: bool = False, buffers: bool = False) -> object:
            if write:
                raise lmdb.DiskError("mdb_txn_commit: Input/output error")
            return self._env.begin()

        def __getattr__(self, name: str) -> object:
            return getattr(self._env, name)

    for act in (lambda ring: commit(ring, 1), lambda ring: ring.evict_older_than(1e9)):
        with new_ring(tmp_path) as ring:
            commit(ring, 1)
            state, whole = ring.state, ring._env
            ring._env = Broken(whole)  # type: ignore[assignment]  # a disk that fails, for once
            with pytest.raises(WriteFailedError, match="check the disk"):
                act(ring)
            ring._env = whole
            with pytest.raises(WriteFailedError, match="reopen it"):
                commit(ring, 1)
            assert ring.state == ring.read_state() == state
