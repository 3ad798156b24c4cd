"""A ring in one file: the same ring again, or a refusal; never a wrong one, never a long transaction."""

from __future__ import annotations

import io
import os
import random
import shutil
from array import array
from pathlib import Path
from typing import Any

import msgspec
import pytest

from storage.block import encode_block
from storage.build import build_ring, newest_that_fit
from storage.check import check_ring
from storage.errors import FormatTooNewError, StorageError
from storage.export import export_ring, export_to_file, import_ring
from storage.ring import Commit, Ring
from storage.ring_file import DamagedFileError
from storage.ring_writer import STATE, block_key
from storage.rows import seal
from storage.windows import ClosedWindow, DeadLetter, OpenWindow, RingHeader, RingState
from tests.unit.test_ring import TOKENIZER, commit, samples

OWN = ("txn", "rows_sum", "blocks_sum")  # of a state: what belongs to one LMDB file


def grown(folder: Path, commits: int, *, max_bytes: int = 4 << 20, tokens: int = 5) -> Ring:
    """A ring of so many commits of ten samples, each with everything that a commit can hold."""
    ring = Ring.open_or_create(folder, shard="main", tokenizer_id=TOKENIZER, max_bytes=max_bytes)
    for n in range(commits):
        add(ring, n, tokens)
    return ring


def add(ring: Ring, n: int, tokens: int = 5) -> None:
    first = ring.state.next_seq
    closed = ClosedWindow(n + 1, first, first + 9, 10, 50, 1e9, "samples")
    ring.commit(
        Commit(
            samples=samples(first, 10, tokens), stream_time=1e9 + n, window=OpenWindow(n + 2, first + 10),
            counters={"events": first + 11}, closed=[closed],
            positions={f"file-{n % 3}": b"%d" % n}, references={"s": b"%d" % n},
            dead_letters=[DeadLetter("s", f"byte {n}", 1.0, "not JSON", b"{")],
        )
    )  # fmt: skip


def readings(folder: Path, commits: int) -> Ring:
    """A ring of samples that look alike, so that a dictionary gains something."""
    ring = Ring.open_or_create(folder, shard="main", tokenizer_id=TOKENIZER, max_bytes=4 << 20)
    readings_more(ring, commits)
    return ring


def readings_more(ring: Ring, commits: int) -> None:
    for _ in range(commits):
        first = ring.state.next_seq
        batch, rng = samples(first, 20, 40), random.Random(first)
        words = [range(100 * n, 100 * n + 8) for n in range(200)]
        batch.ids = array("I", [i for _ in range(20 * 5) for i in rng.choice(words)])
        ring.commit(Commit(samples=batch, stream_time=1e9, window=OpenWindow(), counters={}))


def problems(ring: Ring) -> list[str]:
    return [problem for _, problem in ring.check_blocks() if problem]


def exported(ring: Ring) -> io.BytesIO:
    out = io.BytesIO()
    export_ring(ring, out)
    out.seek(0)
    return out


def contents(ring: Ring) -> dict[str, Any]:
    """All that a ring shows of itself."""
    state = ring.read_state()
    return {
        "header": ring.header, "state": logical(state), "windows": ring.windows(),
        "positions": ring.named("p"), "references": ring.named("r"), "letters": ring.dead_letters(10_000),
        "samples": ring.read(state.tail_seq, state.next_seq - 1), "hashes": ring.newest_hashes(10**6),
    }  # fmt: skip


def logical(state: Any) -> dict[str, Any]:
    """The state without what belongs to one LMDB file."""
    return {name: getattr(state, name) for name in state.__struct_fields__ if name not in OWN}


def test_an_import_is_the_same_ring_and_goes_on_like_it(tmp_path: Path) -> None:
    """State with the digest, windows, positions, references, letters, samples; then the same commit."""
    with grown(tmp_path / "a", 30) as ring:
        done = export_to_file(ring, tmp_path / "ring.export")
        assert (done.first_seq, done.next_seq, done.evicted, done.damaged) == (0, 300, 0, 0)
        assert done.bytes == (tmp_path / "ring.export").stat().st_size
        with (tmp_path / "ring.export").open("rb") as file:
            made = import_ring(file, tmp_path / "b", 4 << 20)
        assert (made.first_seq, made.next_seq, made.blocks, made.left_out) == (0, 300, done.blocks, 0)
        with grown(tmp_path / "b", 0) as again:
            assert contents(again) == contents(ring)
            assert problems(again) == []
            for each in (ring, again):
                add(each, 30)
            assert contents(again) == contents(ring)


def test_an_empty_ring_and_one_that_evicted_come_back_too(tmp_path: Path) -> None:
    with grown(tmp_path / "empty", 0) as ring:
        import_ring(exported(ring), tmp_path / "empty-again", 1 << 20)
        with Ring.open_reader(tmp_path / "empty-again") as again:
            assert again.header == ring.header
            assert logical(again.read_state()) == logical(ring.state)
    with grown(tmp_path / "full", 250, max_bytes=1 << 20, tokens=1500) as ring:
        assert ring.state.tail_seq > 0
        import_ring(exported(ring), tmp_path / "full-again", 1 << 20)
        with Ring.open_reader(tmp_path / "full-again") as again:
            assert contents(again) == contents(ring)


def test_the_file_is_for_its_owner_only_and_appears_when_it_is_complete(tmp_path: Path) -> None:
    """An older export stays until then, also where the new one fails; nothing is left lying about."""
    path = tmp_path / "ring.export"
    path.write_bytes(b"older")
    with grown(tmp_path / "a", 3) as ring:
        seen = []
        export_to_file(ring, path, lambda share, words: seen.append((share, path.read_bytes())))
        assert [share for share, _ in seen] == pytest.approx([1 / 3, 2 / 3, 1])
        assert {before for _, before in seen} == {b"older"}
        assert path.stat().st_mode & 0o777 == 0o600
        whole = path.read_bytes()

        def full(share: float, words: str) -> None:
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match="No space left"):
            export_to_file(ring, path, full)
        with pytest.raises(StorageError, match="not a file"):
            export_to_file(ring, tmp_path)
    assert path.read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "ring.export"]


def test_a_file_cut_short_anywhere_is_refused_and_makes_nothing(tmp_path: Path) -> None:
    with grown(tmp_path / "a", 2) as ring:
        whole = exported(ring).getvalue()
    for size in range(len(whole)):
        with pytest.raises(DamagedFileError, match=r"cut short|not a ring export"):
            import_ring(io.BytesIO(whole[:size]), tmp_path / "b", 1 << 20)
    with pytest.raises(DamagedFileError, match=f"follows its end at byte {len(whole)}"):
        import_ring(io.BytesIO(whole + b"\0"), tmp_path / "b", 1 << 20)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_any_flipped_bit_is_refused_and_makes_nothing(tmp_path: Path) -> None:
    with grown(tmp_path / "a", 2) as ring:
        whole = exported(ring).getvalue()
    damaged = bytearray(whole)
    for at in range(len(whole)):
        damaged[at] ^= 1 << at % 8
        with pytest.raises(StorageError):
            import_ring(io.BytesIO(damaged), tmp_path / "b", 1 << 20)
        damaged[at] ^= 1 << at % 8
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    import_ring(io.BytesIO(damaged), tmp_path / "b", 1 << 20)


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    with grown(tmp_path / "a", 1) as ring:
        whole = bytearray(exported(ring).getvalue())
    for at in (8, 10):  # the format of the file, that of the ring
        newer = bytearray(whole)
        newer[at] = 200
        with pytest.raises(FormatTooNewError, match="upgrade Edgewater"):
            import_ring(io.BytesIO(newer), tmp_path / "b", 1 << 20)


def test_commits_during_an_export_are_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the moment at which it began, whole: state, windows and samples agree."""
    monkeypatch.setattr("storage.walk.CHUNK_BYTES", 1)
    with grown(tmp_path / "a", 5, tokens=1000) as ring:
        before, out = contents(ring), io.BytesIO()
        export_ring(ring, out, lambda share, words: add(ring, ring.state.next_seq // 10))
        assert ring.state.next_seq == 100
        import_ring(out, tmp_path / "b", 4 << 20)
    with Ring.open_reader(tmp_path / "b") as again:
        assert contents(again) == before


def test_eviction_that_overtakes_an_export_costs_the_oldest_samples_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it holds is contiguous up to its moment, and it says what it lacks."""
    monkeypatch.setattr("storage.walk.CHUNK_BYTES", 1)
    with grown(tmp_path / "a", 10, tokens=1000) as ring:
        before, out, cut = ring.read(0, 99), io.BytesIO(), iter([None, None, 1e9 + 6])

        def evict(share: float, words: str) -> None:
            if older_than := next(cut, None):
                ring.evict_older_than(older_than)

        done = export_ring(ring, out, evict)
        assert (done.first_seq, done.next_seq, done.blocks, done.evicted) == (60, 100, 4, 60)
        made = import_ring(out, tmp_path / "b", 4 << 20)
        assert (made.first_seq, made.next_seq) == (60, 100)
        with Ring.open_reader(tmp_path / "b") as again:
            assert again.read(60, 99) == before[60:]
            assert again.read_state().tail_seq == 60
            assert again.read_state().digest == ring.state.digest
        # Nothing left at all is an export too.
        out, cut = io.BytesIO(), iter([2e9])
        done = export_ring(ring, out, evict)
        assert (done.first_seq, done.next_seq, done.blocks, done.evicted) == (100, 100, 0, 40)
        import_ring(out, tmp_path / "c", 4 << 20)
    with Ring.open_reader(tmp_path / "c") as again:
        assert again.read_state().tail_seq == again.read_state().next_seq == 100


def test_no_transaction_is_open_while_the_file_is_written(tmp_path: Path) -> None:
    """However slow the disk or the pipe is, ingest can reuse its pages."""

    class Out(io.BytesIO):
        def write(self, data: Any) -> int:
            active = [line for line in str(ring._env.readers()).splitlines()[1:] if line.split()[-1] != "-"]
            assert active == []
            return super().write(data)

    with grown(tmp_path / "a", 3) as ring:
        with ring.reading():
            readers = str(ring._env.readers())
        assert readers.splitlines()[1].split()[-1] != "-"  # an open one would be seen
        export_ring(ring, Out())


def test_a_smaller_ring_takes_the_newest_samples(tmp_path: Path) -> None:
    with grown(tmp_path / "a", 100, tokens=1000) as ring:
        file, state = exported(ring), ring.state
        made = import_ring(file, tmp_path / "b", 1 << 20)
        assert made.left_out == made.first_seq > 0
        with Ring.open_or_create(
            tmp_path / "b", shard="main", tokenizer_id=TOKENIZER, max_bytes=1 << 20
        ) as again:
            usage = again.usage()
            assert usage.live_bytes <= 0.85 * usage.map_bytes
            assert usage.live_bytes > 0.7 * usage.map_bytes
            assert again.read(made.first_seq, 999) == ring.read(made.first_seq, 999)
            assert again.state.digest == state.digest
            for n in range(100, 150):
                add(again, n, 1000)
            assert problems(again) == []


def test_a_ring_that_is_too_small_is_refused_and_makes_nothing(tmp_path: Path) -> None:
    with grown(tmp_path / "a", 1, max_bytes=16 << 20) as ring:
        commit(ring, 1000, tokens=1000)
        with pytest.raises(StorageError, match="the ring would be too small"):
            import_ring(exported(ring), tmp_path / "b", 1 << 20)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("tokens", [40, 280, 580, 880])
def test_a_ring_full_of_blocks_that_share_pages_fits_into_one_of_its_size(
    tmp_path: Path, tokens: int
) -> None:
    """Pages filled to the brim: split as keys come in, they would stay half empty, and the map overflow."""
    rng, map_bytes = random.Random(1), 4 << 20

    def block(seq: int) -> tuple[int, bytes]:
        made = samples(seq, 1, tokens)
        made.ids = array("I", [rng.randrange(60_000) for _ in range(tokens)])
        return seq, encode_block(made, TOKENIZER)

    blocks = [block(seq) for seq in range(map_bytes // (2 * tokens + 150))]
    kept = newest_that_fit([len(data) for _, data in blocks], {}, map_bytes)
    assert 0 < kept < len(blocks)
    header, state = RingHeader(2, "main", TOKENIZER, bytes(32)), RingState(next_seq=len(blocks))
    build_ring(tmp_path / "main", header, state, {}, reversed(blocks[-kept:]), map_bytes)
    with Ring.open_or_create(
        tmp_path / "main", shard="main", tokenizer_id=TOKENIZER, max_bytes=map_bytes
    ) as ring:
        assert ring.state.next_seq - ring.state.tail_seq == kept
        assert ring.usage().live_bytes < 0.82 * map_bytes
        assert problems(ring) == []


def test_a_ring_that_exists_is_never_imported_over(tmp_path: Path) -> None:
    with grown(tmp_path / "a", 2) as ring:
        before = contents(ring)
        with pytest.raises(StorageError, match="there is a ring already"):
            import_ring(exported(ring), tmp_path / "a", 1 << 20)
        assert contents(ring) == before


def test_numbers_that_were_given_since_an_older_backup_are_not_given_again(tmp_path: Path) -> None:
    """The registry knows them: samples between are lost and blank, the open window starts behind them."""
    with grown(tmp_path / "a", 2) as ring:
        file, before = exported(ring), ring.read(0, 19)
    assert import_ring(file, tmp_path / "same", 1 << 20, least_window=3, least_seq=20).window == 3
    made = import_ring(file, tmp_path / "main", 1 << 20, least_window=8, least_seq=75)
    assert (made.first_seq, made.next_seq, made.lost, made.window) == (0, 75, 55, 8)
    assert check_ring(tmp_path / "main", live=False) == []
    with grown(tmp_path / "main", 0) as again:
        assert again.state.window == OpenWindow(8, first_seq=75)
        assert again.windows() == []  # they are decided, and windows leave no gap
        assert again.read(0, 19) == before
        assert set(again.read(20, 74).kinds) == {"blank"}
        assert [(row.first_seq, row.samples) for row in again.quarantined()] == [(20, 55)]
        assert (again.state.lost, problems(again)) == (55, [])
        commit(again, 10)


def test_damaged_blocks_are_blank_in_the_export_and_the_rest_is_whole(tmp_path: Path) -> None:
    """At the old end, in between, two side by side, and the newest."""
    with grown(tmp_path / "a", 10, tokens=2000) as ring:
        before = ring.read(0, 99)
        with ring._env.begin(write=True) as txn:
            for first in (0, 40, 50, 90):
                block = bytearray(txn.get(block_key(first), b""))
                block[len(block) // 2 if first else 2] ^= 16
                txn.put(block_key(first), bytes(block))
            state = msgspec.structs.replace(ring.state, txn=txn.id())
            txn.put(STATE, seal(STATE, msgspec.msgpack.encode(state)))
        out = io.BytesIO()
        assert export_ring(ring, out).damaged == 40
        import_ring(out, tmp_path / "b", 4 << 20)
        assert ring.state.lost == 0
    with grown(tmp_path / "b", 0) as again:
        assert (again.state.lost, problems(again)) == (40, [])
        assert [(row.first_seq, row.samples) for row in again.quarantined()] == [(0, 10), (40, 20), (90, 10)]
        for first in range(0, 100, 10):
            found = again.read(first, first + 9)
            if first in (0, 40, 50, 90):
                assert found.kinds == ["blank"] * 10
            else:
                assert found == before[first : first + 10]


def test_blocks_that_ingest_merges_meanwhile_are_exported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merged block that began before the export's place, and one that ends after its moment."""
    monkeypatch.setattr("storage.walk.CHUNK_BYTES", 1)
    for start in range(1, 17):
        with grown(tmp_path / f"a{start}", 20) as ring:
            before, out, left = contents(ring), io.BytesIO(), iter(range(20 - start, 20))

            def go_on(share: float, words: str, ring: Ring = ring, left: Any = left) -> None:
                if next(left, None) is None:
                    for _ in range(16):
                        add(ring, ring.state.next_seq // 10)

            done = export_ring(ring, out, go_on)
            assert (done.first_seq, done.next_seq, done.evicted, done.damaged) == (0, 200, 0, 0)
            import_ring(out, tmp_path / f"b{start}", 1 << 20)
        with Ring.open_reader(tmp_path / f"b{start}") as again:
            assert contents(again) == before
            assert problems(again) == []


def test_a_dictionary_goes_with_the_blocks_that_need_it(tmp_path: Path) -> None:
    """And its copy lies beside the new ring too."""
    with readings(tmp_path / "a", 60) as ring:
        dictionary = ring.dictionaries.newest
        assert dictionary
        before, file = ring.read(0, ring.state.next_seq - 1), exported(ring)
    import_ring(file, tmp_path / "b", 4 << 20)
    (copy,) = (tmp_path / "b").glob("dictionary-*")
    assert copy.read_bytes() == dictionary.data
    with readings(tmp_path / "b", 0) as again:
        assert again.read(0, again.state.next_seq - 1) == before
        assert problems(again) == []


def test_a_dictionary_that_is_trained_meanwhile_goes_with_what_it_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block from before it is packed anew with it, since a subject in it is forgotten meanwhile."""
    monkeypatch.setattr("storage.walk.CHUNK_BYTES", 1)
    monkeypatch.setattr("storage.ring_writer.MERGES", ())  # long blocks do without a dictionary
    with readings(tmp_path / "a", 20) as ring:
        batch = samples(400, 20, 40)
        batch.subjects[-1] = "crew-b"
        ring.commit(Commit(samples=batch, stream_time=1e9, window=OpenWindow(), counters={}))
        assert not ring.dictionaries.newest
        before, out, calls = ring.read(0, 418), io.BytesIO(), list[float]()

        def go_on(share: float, words: str) -> None:
            calls.append(share)
            if len(calls) == 1:
                readings_more(ring, 60)
                assert ring.forget("crew-b") == 1

        export_ring(ring, out, go_on)
        dictionary = ring.dictionaries.newest
        assert dictionary
    import_ring(out, tmp_path / "b", 4 << 20)
    (copy,) = (tmp_path / "b").glob("dictionary-*")
    assert copy.read_bytes() == dictionary.data
    with Ring.open_reader(tmp_path / "b") as again:
        assert again.read(0, 418) == before
        assert again.read(419, 419).kinds == ["blank"]
        assert problems(again) == []


class PowerCut(BaseException):
    """The machine is off; nothing after it runs."""


def test_a_cut_at_any_step_of_an_import_leaves_no_ring_or_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run counts the steps, then one dies at each; the next import makes the ring all the same."""
    with grown(tmp_path / "a", 3) as ring:
        file, expected = exported(ring), contents(ring)

    def run(folder: Path, cut: int) -> int:
        count = 0

        def counted(real: Any) -> Any:
            def step(*args: Any, **more: Any) -> Any:
                nonlocal count
                count += 1
                if count == cut:
                    raise PowerCut
                return real(*args, **more)

            return step

        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "mkdir"), (os, "posix_fallocate")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            patch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)  # a dead machine tidies nothing
            import_ring(file, folder / "ring", 1 << 20)
        return count

    (tmp_path / "0").mkdir()
    steps = run(tmp_path / "0", 0)
    assert steps >= 8
    for cut in range(1, steps + 1):
        folder = tmp_path / f"{cut}"
        folder.mkdir()
        with pytest.raises(PowerCut):
            run(folder, cut)
        if not (folder / "ring").exists():
            import_ring(file, folder / "ring", 1 << 20)
        with Ring.open_reader(folder / "ring") as again:
            assert contents(again) == expected
        assert [path.name for path in folder.iterdir()] == ["ring"]
