"""A ring in one file: the same ring again, or a refusal; never a wrong one, never a long transaction."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from storage.errors import FormatTooNewError, StorageError
from storage.export import export_ring, export_to_file, import_ring
from storage.ring import Commit, Ring
from storage.ring_file import DamagedFileError
from storage.windows import ClosedWindow, DeadLetter, OpenWindow
from tests.unit.test_ring import TOKENIZER, commit, samples


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
    return {name: getattr(state, name) for name in state.__struct_fields__ if name not in ("txn", "rows_sum")}


def test_an_import_is_the_same_ring_and_goes_on_like_it(tmp_path: Path) -> None:
    """State with the digest, windows, positions, references, letters, samples; then the same commit."""
    with grown(tmp_path / "a", 30) as ring:
        done = export_to_file(ring, tmp_path / "ring.export")
        assert (done.first_seq, done.next_seq, done.blocks, done.evicted) == (0, 300, 30, 0)
        assert done.bytes == (tmp_path / "ring.export").stat().st_size
        with (tmp_path / "ring.export").open("rb") as file:
            made = import_ring(file, tmp_path / "b", 4 << 20)
        assert (made.first_seq, made.next_seq, made.blocks, made.left_out) == (0, 300, 30, 0)
        with grown(tmp_path / "b", 0) as again:
            assert contents(again) == contents(ring)
            assert [problem for _, problem in again.check_blocks() if problem] == []
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
    (tmp_path / "ring.export.tmp").touch(0o644)  # left by a crash
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
    with grown(tmp_path / "a", 5) as ring:
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
    with grown(tmp_path / "a", 10) as ring:
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
        with ring._reading():
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
            assert usage.live_bytes <= 0.75 * usage.map_bytes
            assert usage.live_bytes > 0.7 * usage.map_bytes
            assert again.read(made.first_seq, 999) == ring.read(made.first_seq, 999)
            assert again.state.digest == state.digest
            for n in range(100, 150):
                add(again, n, 1000)
            assert [problem for _, problem in again.check_blocks() if problem] == []


def test_small_blocks_that_share_pages_all_fit_again(tmp_path: Path) -> None:
    """A ring is not measured by its pages as if each block had its own."""
    with Ring.create(tmp_path / "a", shard="main", tokenizer_id=TOKENIZER, max_bytes=1 << 20) as ring:
        while not ring.state.tail_seq:
            commit(ring, 1)
        made = import_ring(exported(ring), tmp_path / "b", 1 << 20)
    assert made.left_out <= 0.1 * (made.next_seq - made.first_seq)


def test_a_ring_that_is_too_small_is_refused_and_makes_nothing(tmp_path: Path) -> None:
    with grown(tmp_path / "a", 1, max_bytes=16 << 20) as ring:
        commit(ring, 1000, tokens=1000)
        with pytest.raises(StorageError, match="the ring would be too small"):
            import_ring(exported(ring), tmp_path / "b", 1 << 20)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_ring_that_exists_is_never_imported_over(tmp_path: Path) -> None:
    with grown(tmp_path / "a", 2) as ring:
        before = contents(ring)
        with pytest.raises(StorageError, match="there is a ring already"):
            import_ring(exported(ring), tmp_path / "a", 1 << 20)
        assert contents(ring) == before


def test_an_open_window_that_was_decided_meanwhile_starts_anew(tmp_path: Path) -> None:
    """An older backup beside a newer registry: no window number is given twice, none of its samples again."""
    with grown(tmp_path / "a", 2) as ring:
        file = exported(ring)
    assert import_ring(file, tmp_path / "same", 1 << 20, next_window=3).window == 3
    made = import_ring(file, tmp_path / "later", 1 << 20, next_window=8)
    assert made.window == 8
    with Ring.open_reader(tmp_path / "later") as again:
        assert again.state.window == OpenWindow(8, first_seq=20)
        assert [row.window for row in again.windows()] == [1, 2]


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
