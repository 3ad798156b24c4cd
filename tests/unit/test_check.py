"""The check names every kind of damage, offline and live, and what cures it; healthy folders have none."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import pytest

from storage.check import Problem, check_folder, check_ring, quick_check
from storage.durable import remove_folder
from storage.errors import CorruptRingError, FormatTooNewError, LockHeldError, StorageError
from storage.folder import DataFolder
from storage.opening import mend_registry, open_registry, open_ring_reader, opened_ring, repair
from storage.pages import PageFile, items, newest_meta, read_metas
from storage.registry import AuditRow, Registry, UpdateRow, UpdateState, VersionRow
from storage.ring import Ring
from storage.ring_writer import BLOCKS, seq_of
from storage.salvage import finish_rebuild, rebuild
from storage.samples import Samples
from storage.windows import ClosedWindow, Commit, DeadLetter, OpenWindow

TOKENIZER = "00112233aabbccdd"
MAP_BYTES = 1 << 20
PAGE = 4096


def samples(first: int, count: int) -> Samples:
    rng = random.Random(first)
    ids = [rng.randrange(60_000) for _ in range(3 * count)]
    return Samples(
        first,
        ["pump-1"] * count,
        ["reading"] * count,
        [""] * count,
        array("d", [float(first + i) for i in range(count)]),
        array("I", [3] * count),
        array("I", ids),
        bytearray(b"\x01" * len(ids)),
        rng.randbytes(16 * count),
    )


def fill(ring: Ring, commits: int, size: int = 700) -> None:
    """Commit samples; every one closes a window and has a dead letter and positions with it."""
    for _ in range(commits):
        state = ring.state
        first, number = state.next_seq, state.window.window
        closed = ClosedWindow(number, first, first + size - 1, size, 3 * size, float(number), "samples")
        ring.commit(
            Commit(
                samples(first, size),
                float(number),
                OpenWindow(number + 1, first + size),
                {"events": first + size, "samples": first + size},
                [closed],
                {"file-a": b"%d" % first, "file-b": b"%d" % number},
                {"pump-1": b"%d" % number},
                [DeadLetter("cmms", "line 1", float(number), "no event", b"x" * 50)],
            )
        )


@pytest.fixture
def data(tmp_path: Path) -> Iterator[DataFolder]:
    folder = DataFolder.open(tmp_path / "data", create=True)
    with opened(folder) as ring:
        fill(ring, 20)
    yield folder
    folder.close()


def opened(folder: DataFolder) -> Ring:
    return Ring.open_or_create(
        folder.ring / "main", shard="main", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES
    )


def places(path: Path) -> dict[bytes, tuple[int, int]]:
    """Where each row lies in the file."""
    with PageFile(path) as file:
        meta = newest_meta(read_metas(file)[0])
        return {i.key: (i.at, i.size) for i in items(file, meta.main.root, last_page=meta.last_page)}


def a_block(path: Path) -> tuple[int, int, int, int]:
    """One in the middle of the ring: its first seq, the one after its last, where it lies, its size."""
    found = sorted((seq_of(key), *place) for key, place in places(path).items() if key[:1] == BLOCKS)
    i = len(found) // 2
    first, at, size = found[i]
    return first, found[i + 1][0], at, size


def damage(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def the_one(problems: list[Problem], kind: str) -> Problem:
    assert {problem.kind for problem in problems} == {kind}, problems
    return problems[0]


def test_a_healthy_folder_has_no_problem(data: DataFolder) -> None:
    Registry.open_or_create(data.registry).close()
    assert check_folder(data, live=False) == []
    assert check_folder(data, live=True) == []


def test_a_check_beside_a_busy_writer_finds_nothing(data: DataFolder) -> None:
    """Another process looks while this one commits: its snapshot is held, so no page changes under it."""
    folder = data.ring / "busy"
    code = (
        "import sys; from pathlib import Path; from storage.check import check_ring\n"
        "looks = 0\n"
        "while not looks or not Path(sys.argv[2]).exists():\n"
        "    found = check_ring(Path(sys.argv[1]), live=True)\n"
        "    if found: sys.exit(str(found))\n"
        "    looks += 1\n"
        "print('done')"
    )
    with (
        Ring.create(folder, shard="busy", tokenizer_id=TOKENIZER, max_bytes=16 << 20) as ring,
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(data.path / "stop")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
            text=True,
        ) as process,
    ):
        for _ in range(100):
            fill(ring, 1, 300)
            time.sleep(0.005)
        (data.path / "stop").touch()
        out, errors = process.communicate()
        assert (out, errors, process.returncode) == ("done\n", "", 0)


def test_a_live_check_takes_no_merge_between_its_snapshots_for_damage(
    data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block in a snapshot of its own, and commits between: a block may hold what was looked at."""

    @contextlib.contextmanager
    def unpinned(*_: object, **__: object) -> Iterator[int]:
        yield 0  # this process has the ring open itself; it writes only between the snapshots

    def meanwhile(what: str, count: int) -> None:
        if what == "blocks":
            fill(ring, 1, 10)

    monkeypatch.setattr("storage.check.PIN_S", 0.0)
    monkeypatch.setattr("storage.check._pinned", unpinned)
    with Ring.create(data.ring / "busy", shard="busy", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES) as ring:
        for _ in range(30):
            fill(ring, 3, 10)
            assert check_ring(data.ring / "busy", live=True, progress=meanwhile) == []


def test_a_damaged_block_is_named_by_its_seq_and_can_be_quarantined(data: DataFolder) -> None:
    path = data.ring / "main" / "data.mdb"
    seq, _, at, size = a_block(path)
    damage(path, at + size // 2)
    problem = the_one(check_ring(data.ring / "main", live=False), "block")
    assert problem.where.endswith(f"seq {seq}")
    assert (problem.cure, quick_check(data.ring / "main")) == ("quarantine", [])


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (b"s", "state"),
        (b"H", "header"),
        (b"pfile-a", "row"),
        (b"rpump-1", "row"),
        (b"W" + (3).to_bytes(4, "big"), "row"),
        (b"D" + (3).to_bytes(8, "big"), "row"),
    ],
)
def test_a_damaged_row_is_named_and_the_ring_is_to_be_rebuilt(
    data: DataFolder, key: bytes, kind: str
) -> None:
    path = data.ring / "main" / "data.mdb"
    at, size = places(path)[key]
    damage(path, at + size // 2)
    problems = check_ring(data.ring / "main", live=False)
    assert kind in {problem.kind for problem in problems}
    assert "rebuild" in {problem.cure for problem in problems}


def test_a_flip_that_makes_a_meta_page_one_commit_older_is_noticed(data: DataFolder) -> None:
    """Transaction t with bit 1 gone is t - 2: both meta pages then tell of the snapshot before the newest."""
    folder = data.ring / "main"
    with opened(data) as ring:
        # Until no new page is taken any more: a last page that goes back would tell too.
        fill(ring, 30, 5)
        while not ring.last_transaction() & 2:
            fill(ring, 1, 5)
    with PageFile(folder / "data.mdb") as file:
        newest = newest_meta(read_metas(file)[0])
    damage(folder / "data.mdb", newest.index * PAGE + 144, 1)
    assert the_one(check_ring(folder, live=False), "meta").cure == "rebuild"
    report = rebuild(folder, data.path / "quarantine")
    assert report.proved
    with opened(data) as ring:
        assert ring.state.commits == report.commits


@pytest.mark.parametrize("length", [0, 100, 3 * PAGE, MAP_BYTES - 1, MAP_BYTES + 500])
def test_a_file_of_another_length_is_to_be_rebuilt(data: DataFolder, length: int) -> None:
    path = data.ring / "main" / "data.mdb"
    os.truncate(path, length)
    assert "rebuild" in {problem.cure for problem in check_ring(data.ring / "main", live=False)}


def test_a_missing_data_file_is_a_problem_and_the_next_start_goes_on(data: DataFolder) -> None:
    (data.ring / "main" / "data.mdb").unlink()
    assert the_one(check_ring(data.ring / "main", live=False), "file").cure == "rebuild"
    with opened_ring(data, shard="main", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES) as ring:
        assert ring.state.next_seq == 0


def test_strangers_and_open_doors_are_named(data: DataFolder, tmp_path: Path) -> None:
    (data.path / "notes.txt").write_text("mine")
    (data.ring / "main" / "core.1234").write_bytes(b"x")
    (data.accepted / "main-000001.blocks").symlink_to(tmp_path / "elsewhere")
    (data.ring / "main" / "data.mdb").chmod(0o666)
    found = {(problem.kind, Path(problem.where).name) for problem in check_folder(data, live=False)}
    assert found >= {
        ("stray", "notes.txt"),
        ("stray", "core.1234"),
        ("access", "main-000001.blocks"),
        ("access", "data.mdb"),
    }


# -- what becomes of it -----------------------------------------------------------------------------


def truth(ring: Ring) -> tuple[object, ...]:
    state = ring.read_state()
    held = ring.read(state.tail_seq, state.next_seq - 1)
    return held, ring.windows(), ring.named("p"), ring.named("r"), ring.dead_letters(), state.counters


def ways_to_damage(path: Path) -> dict[str, Callable[[bytearray], None]]:
    """What loses nothing: all that is damaged can be told from the rest."""
    with PageFile(path) as file:
        metas, _ = read_metas(file)
        meta = newest_meta(metas)
    older = 1 - meta.index

    def zero_meta(data: bytearray) -> None:
        data[meta.index * PAGE : meta.index * PAGE + 200] = bytes(200)

    def both_metas(data: bytearray) -> None:
        data[: 2 * PAGE] = bytes(2 * PAGE)

    def root(data: bytearray) -> None:
        data[meta.index * PAGE + 16 + 24 + 48 + 40] ^= 4

    def old_meta(data: bytearray) -> None:
        data[older * PAGE + 16] ^= 1

    def free_list(data: bytearray) -> None:
        data[meta.free.root * PAGE : (meta.free.root + 1) * PAGE] = bytes(PAGE)

    def cut(data: bytearray) -> None:
        del data[(meta.last_page + 1) * PAGE + 5 :]

    return {f.__name__: f for f in (zero_meta, both_metas, root, old_meta, free_list, cut)}


@pytest.mark.parametrize("how", ["zero_meta", "both_metas", "root", "old_meta", "free_list", "cut"])
def test_a_ring_whose_tree_cannot_be_entered_loses_nothing(data: DataFolder, how: str) -> None:
    folder = data.ring / "main"
    path = folder / "data.mdb"
    with opened(data) as ring:
        before, state = truth(ring), ring.state
    content = bytearray(path.read_bytes())
    ways_to_damage(path)[how](content)
    path.write_bytes(content)
    with opened_ring(data, shard="main", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES) as ring:
        assert truth(ring) == before
        assert (ring.state.digest, ring.state.window, ring.state.lost) == (state.digest, state.window, 0)
        fill(ring, 1)
    assert check_folder(data, live=False) == []
    assert (data.path / "quarantine" / "ring-main-1" / "data.mdb").read_bytes() == content
    with Registry.open_reader(data.registry) as registry:
        assert "is rebuilt" in registry.audit()[-1].detail


def test_a_start_after_a_clean_end_reads_no_block_and_after_an_unclean_one_all(data: DataFolder) -> None:
    path = data.ring / "main" / "data.mdb"
    seq, end, at, size = a_block(path)
    damage(path, at + size // 2)
    with opened_ring(data, shard="main", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES) as ring:
        assert ring.quarantined() == []
    with (
        pytest.raises(KeyboardInterrupt),
        opened_ring(data, shard="main", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES),
    ):
        raise KeyboardInterrupt
    with opened_ring(data, shard="main", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES) as ring:
        assert [(row.first_seq, row.samples) for row in ring.quarantined()] == [(seq, end - seq)]
        assert set(ring.read(seq, end - 1).kinds) == {"blank"}
        assert ring.read(end, end + 699).ids == samples(end, 700).ids


class PowerCut(BaseException):
    """The machine is off; nothing after it runs."""


def test_a_power_cut_at_every_step_of_a_rebuild_leaves_the_damaged_ring_or_the_new_one(
    data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps are the durable operations: each run dies at the next one, until one gets through."""
    folder = data.ring / "main"
    path = folder / "data.mdb"
    with opened(data) as ring:
        before = truth(ring)
    content = bytearray(path.read_bytes())
    ways_to_damage(path)["both_metas"](content)
    path.write_bytes(content)
    step, cut = 0, 0

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **more: object) -> object:
            nonlocal step
            step += 1
            if step == cut:
                raise PowerCut
            return real(*args, **more)

        return run

    cuts = 0
    while cut < 200:
        step, cut = 0, cut + 1
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", counted(os.fsync))
            patch.setattr(Path, "rename", counted(Path.rename))
            try:
                with opened_ring(data, shard="main", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES) as ring:
                    assert truth(ring) == before
                break
            except PowerCut:
                cuts += 1
        # After each cut the ring is whole, or can be made whole again.
        whole = folder.exists() and quick_check(folder) == []
        assert whole or (folder / "data.mdb").exists() or (data.ring / "main.rebuilt.new").exists()
        if whole:
            with opened(data) as ring:
                assert truth(ring) == before
            remove_folder(data.path / "quarantine")
            path.write_bytes(content)
    assert cuts > 5
    assert check_folder(data, live=False) == []


def test_a_rebuild_that_is_finished_twice_changes_nothing(data: DataFolder) -> None:
    assert not finish_rebuild(data.ring / "main")
    (data.ring / "main").rename(data.ring / "main.rebuilt.new")
    assert finish_rebuild(data.ring / "main")
    assert not finish_rebuild(data.ring / "main")
    assert check_ring(data.ring / "main", live=False) == []


def test_forgotten_samples_do_not_come_back_from_free_pages(data: DataFolder) -> None:
    """Their old blocks lie in the file with good checksums; the leaf that names the new ones is lost."""
    folder = data.ring / "main"
    path = folder / "data.mdb"
    with opened(data) as ring:
        first = ring.state.next_seq
        secret = samples(first, 600)
        secret.subjects = ["crew-b"] * 600
        state = ring.state
        ring.commit(
            Commit(
                secret,
                99.0,
                OpenWindow(state.window.window, first, 600, 1800),
                {"events": first + 600, "samples": first + 600},
            )
        )
        assert ring.forget("crew-b") == 600
    with PageFile(path) as file:
        meta = newest_meta(read_metas(file)[0])
        # Blocks sort from the newest to the oldest: the first at or before the seq holds it.
        leaf = next(
            item.page
            for item in items(file, meta.main.root, last_page=meta.last_page)
            if item.key[:1] == BLOCKS and seq_of(item.key) <= first
        )
    content = bytearray(path.read_bytes())
    content[leaf * PAGE : leaf * PAGE + PAGE] = bytes(PAGE)
    path.write_bytes(content)
    with opened_ring(data, shard="main", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES) as ring:
        last = ring.state.next_seq - 1
        assert not any("crew-b" in ring.read(seq, seq).subjects for seq in range(first, last + 1, 50))


def test_quarantine_keeps_the_newest_two_damaged_rings(data: DataFolder) -> None:
    for _ in range(4):
        path = data.ring / "main" / "data.mdb"
        at, size = places(path)[b"pfile-a"]
        damage(path, at + size // 2)
        with opened_ring(data, shard="main", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES):
            pass
    names = sorted(path.name for path in (data.path / "quarantine").iterdir())
    assert names == ["ring-main-3", "ring-main-4"]


def test_older_damaged_rings_make_way_where_a_new_one_finds_no_room(
    data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two faults on a small disk would end ingest for good."""
    path = data.ring / "main" / "data.mdb"
    free = [1 << 40]
    usage = shutil.disk_usage(path.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=free[0]))
    for free[0] in (1 << 40, 1 << 40, path.stat().st_size):
        at, size = places(path)[b"pfile-a"]
        damage(path, at + size // 2)
        with opened_ring(data, shard="main", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES):
            pass
    assert [path.name for path in (data.path / "quarantine").iterdir()] == ["ring-main-3"]


def test_the_ring_goes_on_behind_what_the_registry_decided(data: DataFolder) -> None:
    """All is lost: numbers of windows and seqs that the registry knows are not used again."""
    with Registry.open_or_create(data.registry) as registry, registry.write() as writer:
        writer.put_update(UpdateRow("main", 7, 9, 100, 399, 300, UpdateState.EXPIRED))
    os.truncate(data.ring / "main" / "data.mdb", 0)
    with opened_ring(data, shard="main", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES) as ring:
        assert (ring.state.window.window, ring.state.next_seq) == (10, 400)
        assert ring.state.window.first_seq == 400


@pytest.mark.parametrize("gone", ["", "data.mdb"])
def test_a_ring_that_is_gone_begins_behind_what_the_registry_decided(data: DataFolder, gone: str) -> None:
    """Else its first windows would count as decided, and never be learned."""
    with Registry.open_or_create(data.registry) as registry, registry.write() as writer:
        writer.put_update(UpdateRow("main", 7, 9, 100, 399, 300, UpdateState.EXPIRED))
    if gone:
        (data.ring / "main" / gone).unlink()
    else:
        remove_folder(data.ring / "main")
    with opened_ring(data, shard="main", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES) as ring:
        assert (ring.state.window, ring.state.next_seq) == (OpenWindow(10, 400), 400)
    assert check_ring(data.ring / "main", live=False) == []


@pytest.mark.parametrize(
    "name", ["new", "import.new", "import.new.new", "rebuilt.new.new", "migrated.new.new"]
)
def test_what_a_crash_left_of_a_ring_goes_at_the_next_start(data: DataFolder, name: str) -> None:
    (data.ring / f"main.{name}").mkdir(mode=0o700)
    (data.ring / f"main.{name}" / "data.mdb").write_bytes(b"half of it")
    with opened_ring(data, shard="main", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES) as ring:
        assert ring.state.commits == 20
    assert [path.name for path in data.ring.iterdir()] == ["main"]


def test_a_newer_registry_is_refused_and_no_damage(data: DataFolder) -> None:
    import msgspec

    from storage.registry import REGISTRY_FORMAT, first_rows
    from storage.rows import seal_header
    from storage.windows import RingHeader

    Registry.open_or_create(data.registry).close()
    header = seal_header(RingHeader(REGISTRY_FORMAT + 1, "", "", b""))
    assert set(msgspec.msgpack.decode(first_rows({})[b"H"])) <= set(msgspec.msgpack.decode(header))
    with (
        lmdb.open(str(data.registry), map_size=32 << 20, lib_version=0) as env,
        env.begin(write=True) as txn,
    ):
        txn.put(b"H", header)
    before = (data.registry / "data.mdb").read_bytes()
    with pytest.raises(FormatTooNewError):
        open_registry(data)
    with pytest.raises(FormatTooNewError):
        check_folder(data, live=False)
    assert (data.registry / "data.mdb").read_bytes() == before
    assert not (data.path / "quarantine").exists()


def test_a_newer_format_is_refused_and_left_alone(data: DataFolder) -> None:
    import msgspec

    from storage.ring_header import RING_FORMAT, first_rows
    from storage.windows import RingHeader, RingState

    header = RingHeader(RING_FORMAT + 1, "main", TOKENIZER, bytes(32))
    row = first_rows(header, RingState())[b"H"]
    assert msgspec.msgpack.decode(row)["format"] == RING_FORMAT + 1
    with (
        lmdb.open(str(data.ring / "main"), map_size=MAP_BYTES, lib_version=0) as env,
        env.begin(write=True) as txn,
    ):
        txn.put(b"H", row)
    with (
        pytest.raises(FormatTooNewError),
        opened_ring(data, shard="main", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES),
    ):
        pass
    assert not (data.path / "quarantine").exists()


def test_a_reader_is_kept_from_a_ring_that_could_end_its_process(data: DataFolder) -> None:
    path = data.ring / "main" / "data.mdb"
    open_ring_reader(data.ring / "main").close()
    with PageFile(path) as file:
        meta = newest_meta(read_metas(file)[0])
    content = bytearray(path.read_bytes())
    content[meta.main.root * PAGE + PAGE - 60 : (meta.main.root + 1) * PAGE] = b"\xff" * 60
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(CorruptRingError, match="restart ingest"):
            open_ring_reader(data.ring / "main")


# -- the registry -----------------------------------------------------------------------------------


def promoted(data: DataFolder) -> None:
    with Registry.open_or_create(data.registry) as registry:
        for number in (1, 2, 3):
            row = VersionRow(number, f"v{number:06d}", number - 1, "main", number, "ab", "cd", 1.0)
            with registry.write() as writer:
                writer.put_version(row)
                writer.set_active(number)
                writer.add_audit(AuditRow(1.0, "trainer", "promote", str(number)))


def test_a_lost_active_pointer_becomes_the_base_and_is_said(data: DataFolder) -> None:
    promoted(data)
    path = data.registry / "data.mdb"
    at, size = places(path)[b"a"]
    damage(path, at + size // 2)
    assert "rebuild" in {problem.cure for problem in check_folder(data, live=False)}
    with open_registry(data) as registry:
        assert registry.active().version == 0
        assert [row.version for row in registry.versions()] == [1, 2, 3]
        assert "promote one" in registry.audit()[-1].detail


def test_a_damaged_meta_page_of_the_registry_does_not_bring_an_old_pointer_back(data: DataFolder) -> None:
    promoted(data)
    path = data.registry / "data.mdb"
    with PageFile(path) as file:
        newest = newest_meta(read_metas(file)[0])
    content = bytearray(path.read_bytes())
    content[newest.index * PAGE : newest.index * PAGE + 200] = bytes(200)
    path.write_bytes(content)
    with open_registry(data) as registry:
        assert registry.active().version == 3
        assert "nothing is lost" in registry.audit()[-1].detail


def test_a_registry_in_use_is_not_rebuilt_under_its_users(data: DataFolder) -> None:
    from storage.errors import StorageError

    promoted(data)
    path = data.registry / "data.mdb"
    at, size = places(path)[b"a"]
    with Registry.open_reader(data.registry):
        damage_in_place(path, at + size // 2)
        with pytest.raises(StorageError, match="stop all"):
            mend_registry(data)
    assert mend_registry(data)


def damage_in_place(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("role", ["ingest-main", "trainer", "server", "admin"])
def test_repair_is_refused_while_anybody_may_write(data: DataFolder, role: str) -> None:
    with data.lock(role), pytest.raises(LockHeldError):
        repair(data)


def test_a_live_look_at_a_ring_without_a_free_reader_slot_says_so(
    data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys; from pathlib import Path; from storage.env import MAX_READERS, open_environment\n"
        "env = open_environment(Path(sys.argv[1]), readonly=True)\n"
        "held = [env.begin() for _ in range(MAX_READERS)]\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    monkeypatch.setattr("storage.env.SLOT_WAIT_S", 0.0)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(data.ring / "main")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).resolve().parents[2], text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match="reader slots"):
            quick_check(data.ring / "main", live=True)
        process.communicate("")


def test_repair_mends_all_and_a_second_one_finds_nothing(data: DataFolder) -> None:
    promoted(data)
    path = data.ring / "main" / "data.mdb"
    _, _, at, size = a_block(path)
    damage(path, at + size // 2)
    at, size = places(path)[b"pfile-a"]
    damage(path, at + size // 2)
    damage(data.registry / "data.mdb", places(data.registry / "data.mdb")[b"a"][0] + 2)
    done = repair(data)
    assert any("ring main" in words for words in done)
    assert any("registry" in words for words in done)
    assert check_folder(data, live=False) == []
    assert repair(data) == []
