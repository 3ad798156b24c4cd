"""A data folder of format 1 becomes one of format 2, whole, wherever the power is cut on the way."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard

from storage import migrate
from storage.durable import remove_folder
from storage.errors import CorruptRingError, FormatTooNewError, LockHeldError, StorageError
from storage.folder import DataFolder
from storage.registry import Registry, UpdateState
from storage.ring import Ring
from storage.rows import seal_header
from storage.windows import Commit, OpenWindow
from tests.unit.test_ring import samples

ROOT = Path(__file__).parents[2]
PACKED = ROOT / "tests/data/format-1.tar.zst"
TOKENIZER = "00112233aabbccdd"


@pytest.fixture(scope="session")
def packed() -> bytes:
    return zstandard.ZstdDecompressor().decompress(PACKED.read_bytes(), max_output_size=64 << 20)


def unpacked(packed: bytes, into: Path, *, registry: bool = True) -> tuple[DataFolder, dict[str, Any]]:
    """A data folder as the code of format 1 left it, and what that code said is in it."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        wanted = [m for m in archive.getmembers() if registry or "registry/" not in m.name]
        archive.extractall(into, wanted, filter="data")
    if not registry:
        (into / "data" / "registry").rmdir()
    return DataFolder(into / "data"), json.loads((into / "expected.json").read_text())


def open_ring(folder: DataFolder) -> Ring:
    return Ring.open_or_create(folder.ring / "main", shard="main", tokenizer_id=TOKENIZER, max_bytes=1 << 20)


def plain(value: Any) -> Any:
    """A row as the code of format 1 showed it: structs by name, bytes as base64."""
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return msgspec.to_builtins(value)


def problems(ring: Ring) -> list[str]:
    return [problem for _, problem in ring.check_blocks() if problem]


def check_ring(ring: Ring, expected: dict[str, Any]) -> None:
    """All that format 1 held is there: samples in order, state, windows, positions, references, letters."""
    state = plain(ring.state)
    assert {name: state[name] for name in expected["state"]} == expected["state"]
    assert ring.header.dedup_key.hex() == expected["dedup_key"]
    kept = ring.read(ring.state.tail_seq, ring.state.next_seq - 1)
    assert kept.extend_digest(bytes(32)).hex() == expected["kept"]
    assert hashlib.sha256(kept.hashes).hexdigest() == expected["kept_hashes"]
    assert kept.subjects == expected["kept_subjects"]
    assert kept.texts is not None
    assert kept.texts[0] == f"text {ring.state.tail_seq}"
    assert plain(ring.windows()) == expected["windows"]
    assert {name: value.decode() for name, value in ring.named("p").items()} == expected["positions"]
    assert {name: value.decode() for name, value in ring.named("r").items()} == expected["references"]
    letters = [[number, letter.position] for number, letter in ring.dead_letters(10_000)]
    assert letters == expected["letters"]
    assert problems(ring) == []


def check_registry(registry: Registry, expected: dict[str, Any]) -> None:
    assert plain(registry.updates()) == expected["updates"]
    assert plain(registry.versions()) == expected["versions"]
    assert plain(registry.active()) == expected["active"]
    assert registry.cursor("main") == expected["cursor"]
    assert registry.requests() == expected["requests"]
    assert plain(registry.audit()) == expected["audit"]


def digest_of(folder: Path) -> str:
    return hashlib.sha256((folder / "data.mdb").read_bytes()).hexdigest()


def test_a_ring_of_format_1_is_migrated_when_ingest_opens_it(packed: bytes, tmp_path: Path) -> None:
    """Everything is there, it goes on, and the old one lies beside it as it was."""
    folder, expected = unpacked(packed, tmp_path, registry=False)
    before = digest_of(folder.ring / "main")
    with open_ring(folder) as ring:
        assert ring.header.format == 2
        check_ring(ring, expected["ring"])
        next_seq = ring.state.next_seq
        for n in range(100):
            batch = samples(ring.state.next_seq, 50, 100)
            batch.texts = [""] * 50
            ring.commit(Commit(samples=batch, stream_time=2e9 + n, window=OpenWindow(41), counters={}))
        assert ring.read(next_seq + 4_950, next_seq + 4_999).seqs.stop == ring.state.next_seq
        assert problems(ring) == []
    assert digest_of(folder.ring / "main.v1") == before
    assert sorted(path.name for path in folder.ring.iterdir()) == ["main", "main.v1"]
    with open_ring(folder) as ring:
        assert ring.state.next_seq == next_seq + 5_000
    assert sorted(path.name for path in folder.ring.iterdir()) == ["main", "main.v1"]


def test_a_registry_of_format_1_is_migrated_when_it_is_opened(packed: bytes, tmp_path: Path) -> None:
    folder, expected = unpacked(packed, tmp_path)
    before = digest_of(folder.registry)
    for _ in range(2):
        with Registry.open_or_create(folder.registry) as registry:
            check_registry(registry, expected["registry"])
    with Registry.open_or_create(folder.registry) as registry, registry.write() as writer:
        (row,) = (row for row in registry.updates() if row.window == 5)
        writer.put_update(msgspec.structs.replace(row, state=UpdateState.STAGED))
    assert digest_of(folder.path / "registry.v1") == before


def test_readers_say_that_the_format_is_older_and_change_nothing(packed: bytes, tmp_path: Path) -> None:
    folder, _ = unpacked(packed, tmp_path)
    before = digest_of(folder.ring / "main"), digest_of(folder.registry)
    with pytest.raises(StorageError, match=r"is of format 1 \(the next start of `edgewater run`"):
        Ring.open_reader(folder.ring / "main")
    with pytest.raises(StorageError, match=r"is of format 1 \(the next start of `edgewater run`"):
        Registry.open_reader(folder.registry)
    assert (digest_of(folder.ring / "main"), digest_of(folder.registry)) == before


def test_a_supervisor_migrates_what_it_looks_at(packed: bytes, tmp_path: Path) -> None:
    """Before ingest starts; an older ingest that still runs is not disturbed."""
    folder, expected = unpacked(packed, tmp_path)
    before = digest_of(folder.ring / "main")
    with folder.lock("ingest-main"), pytest.raises(LockHeldError):
        migrate.migrate_folder(folder)
    assert digest_of(folder.ring / "main") == before
    migrate.migrate_folder(folder)
    with Ring.open_reader(folder.ring / "main") as ring:
        check_ring(ring, expected["ring"])
    with Registry.open_reader(folder.registry) as registry:
        check_registry(registry, expected["registry"])
    with folder.lock("ingest-main"):
        migrate.migrate_folder(folder)  # nothing to do: no lock is needed


def test_a_second_backup_takes_another_name(packed: bytes, tmp_path: Path) -> None:
    """Migrated, brought back by hand for the older version, migrated again: nothing is overwritten."""
    folder, expected = unpacked(packed, tmp_path, registry=False)
    (folder.ring / "main.v1").mkdir()
    (folder.ring / "main.v1" / "data.mdb").write_bytes(b"precious")
    with open_ring(folder) as ring:
        check_ring(ring, expected["ring"])
    assert (folder.ring / "main.v1" / "data.mdb").read_bytes() == b"precious"
    assert (folder.ring / "main.v1-2" / "data.mdb").is_file()


def damage_block(data: Path, first_seq: int) -> None:
    """Flip a bit in each copy of the block that begins at a seq, in use or not."""
    raw = bytearray(data.read_bytes())
    at = -1
    while (at := raw.find(b"EWB1\x01\x00\x01", at + 1)) >= 0:
        if int.from_bytes(raw[at + 24 : at + 32], "little") == first_seq:
            raw[at + 70] ^= 1
    data.write_bytes(raw)


def test_damaged_blocks_become_blank_samples_on_the_way(packed: bytes, tmp_path: Path) -> None:
    """The others are taken over, and what is lost is on record."""
    folder, expected = unpacked(packed, tmp_path, registry=False)
    data = folder.ring / "main" / "data.mdb"
    windows = [(row["first_seq"], row["last_seq"]) for row in expected["ring"]["windows"]]
    lost = [windows[10], windows[11], windows[-1]]  # a window is a block here
    for first, _ in lost:
        damage_block(data, first)
    with open_ring(folder) as ring:
        assert problems(ring) == []
        assert ring.state.lost == sum(last - first + 1 for first, last in lost)
        assert ring.state.next_seq == expected["ring"]["state"]["next_seq"]
        rows = [(row.first_seq, row.first_seq + row.samples - 1) for row in ring.quarantined()]
        assert rows == [(lost[0][0], lost[1][1]), lost[2]]
        for first, last in windows[5:]:
            kinds = set(ring.read(first, last).kinds)
            assert (kinds == {"blank"}) == ((first, last) in lost)


def test_a_ring_whose_state_is_gone_is_refused_and_left_alone(packed: bytes, tmp_path: Path) -> None:
    folder, _ = unpacked(packed, tmp_path, registry=False)
    data = folder.ring / "main" / "data.mdb"
    data.write_bytes(data.read_bytes().replace(b"\xa7commits", b"\xa7comm\xffts"))
    before = digest_of(folder.ring / "main")
    with pytest.raises(CorruptRingError, match="its state is damaged"):
        open_ring(folder)
    assert digest_of(folder.ring / "main") == before
    assert [path.name for path in folder.ring.iterdir()] == ["main"]


def test_a_newer_format_is_refused_and_left_alone(packed: bytes, tmp_path: Path) -> None:
    folder, _ = unpacked(packed, tmp_path, registry=False)
    with open_ring(folder) as ring:
        header = seal_header(msgspec.structs.replace(ring.header, format=3))
        with ring._env.begin(write=True) as txn:
            txn.put(b"H", header)
    before = digest_of(folder.ring / "main")
    with pytest.raises(FormatTooNewError, match="upgrade Edgewater"):
        open_ring(folder)
    assert digest_of(folder.ring / "main") == before


@pytest.mark.parametrize("name", ["ring/main", "registry"])
def test_a_full_disk_is_refused_with_what_to_do_and_the_old_one_is_as_it_was(
    packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whether the room is missing at once, or somebody else takes it meanwhile."""
    folder, _ = unpacked(packed, tmp_path)
    before = digest_of(folder.path / name)

    def start() -> None:
        (open_ring(folder) if name == "ring/main" else Registry.open_or_create(folder.registry)).close()

    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
        with pytest.raises(StorageError, match=r"no room .* \(free \d+ MiB and start again"):
            start()
    with monkeypatch.context() as patch:

        def full(fd: int, offset: int, size: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(StorageError, match="No space left"):
            start()
    assert digest_of(folder.path / name) == before
    assert not list(folder.path.rglob("*.new"))
    start()


def holder(path: Path, seconds: float) -> subprocess.Popen[str]:
    """Another process that has an environment open."""
    code = (
        "import lmdb, sys, time\n"
        "env = lmdb.open(sys.argv[1], map_size=1 << 20, readonly=True, lib_version=0)\n"
        "print('open', flush=True)\ntime.sleep(float(sys.argv[2]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "open\n"
    return process


def test_a_ring_that_an_older_process_has_open_is_not_taken_from_under_it(
    packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that only looks is waited for."""
    folder, expected = unpacked(packed, tmp_path, registry=False)
    before = digest_of(folder.ring / "main")
    with holder(folder.ring / "main", 60) as process:
        monkeypatch.setattr(migrate, "WAIT_S", 0.1)
        with pytest.raises(StorageError, match="open in another process"):
            open_ring(folder)
        process.kill()
    assert digest_of(folder.ring / "main") == before
    monkeypatch.setattr(migrate, "WAIT_S", 30.0)
    with holder(folder.ring / "main", 0.5), open_ring(folder) as ring:
        check_ring(ring, expected["ring"])


class PowerCut(BaseException):
    """The machine is off; nothing after it runs."""


class Steps:
    """Counts durable operations, and cuts the power before one of them.

    Args:
        cut: Before which; 0 never.
        forget: Whether a rename that was not synced yet is undone by the cut.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cut: int, forget: bool) -> None:
        self.count, self.cut, self.forget = 0, cut, forget
        self._unsynced: list[tuple[Path, Path]] = []
        self._rename, self._fsync = Path.rename, os.fsync
        monkeypatch.setattr(Path, "rename", lambda source, target: self._renamed(source, target))
        monkeypatch.setattr(os, "fsync", self._synced)
        for owner, name in ((os, "posix_fallocate"), (Path, "mkdir")):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))
        for module in ("storage.env", "storage.build", "storage.migrate"):
            monkeypatch.setattr(f"{module}.remove_folder", self._counted(remove_folder))

    def _counted(self, real: Any) -> Any:
        def counted(*args: Any, **more: Any) -> Any:
            self._step()
            return real(*args, **more)

        return counted

    def _renamed(self, source: Path, target: Path) -> None:
        self._step()
        self._rename(source, target)
        self._unsynced.append((source, target))

    def _synced(self, fd: int) -> None:
        self._step()
        self._fsync(fd)
        self._unsynced.clear()

    def _step(self) -> None:
        if self.count == self.cut > 0:  # also for whoever would tidy up: a dead machine does nothing
            while self.forget and self._unsynced:
                source, target = self._unsynced.pop()
                self._rename(target, source)
            raise PowerCut
        self.count += 1


@pytest.mark.parametrize("forget", [False, True], ids=["renames-kept", "renames-forgotten"])
@pytest.mark.parametrize("name", ["ring", "registry"])
def test_a_cut_at_any_step_is_finished_by_the_next_start(
    packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, forget: bool
) -> None:
    """One run counts the steps, then one dies at each; the old data is never gone, the new never half."""

    def start(folder: DataFolder) -> Ring | Registry:
        return open_ring(folder) if name == "ring" else Registry.open_or_create(folder.registry)

    def prepare(cut: int) -> tuple[DataFolder, dict[str, Any]]:
        (tmp_path / f"{cut}").mkdir()
        return unpacked(packed, tmp_path / f"{cut}", registry=name == "registry")

    folder, _ = prepare(0)
    with monkeypatch.context() as patch:
        steps = Steps(patch, 0, forget)
        start(folder).close()
    assert steps.count >= 9
    outcomes = set()
    for cut in range(1, steps.count):
        folder, expected = prepare(cut)
        place = folder.ring / "main" if name == "ring" else folder.registry
        before = digest_of(place)
        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            Steps(patch, cut, forget)
            start(folder)
        kept = place.with_name(place.name + ".v1")
        old = kept if kept.exists() else place
        assert digest_of(old) == before  # until the new one is in its place, and after
        outcomes.add((kept.exists(), place.exists()))
        with start(folder) as found:
            if isinstance(found, Ring):
                check_ring(found, expected["ring"])
            else:
                check_registry(found, expected["registry"])
        assert digest_of(kept) == before
        names = {path.name for path in place.parent.iterdir() if path.name.startswith(place.name)}
        assert names == {place.name, kept.name}
        shutil.rmtree(tmp_path / f"{cut}")
    # Untouched, between the two renames, and after them.
    assert outcomes == {(False, True), (True, False), (True, True)} - ({(True, True)} if forget else set())
