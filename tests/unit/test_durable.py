"""Files replaced whole or not at all, synced before they are named; and the wake-up that nothing needs."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from storage.durable import make_private_folder, remove_folder, rename_durably, write_file_durably
from storage.wake import Waker, wake


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Syncs and renames in the order in which they happen."""
    seen: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_sync(fd: int) -> None:
        seen.append("sync " + Path(f"/proc/self/fd/{fd}").readlink().name)
        fsync(fd)

    def note_rename(self: Path, target: Path) -> Path:
        seen.append(f"rename {self.name} {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    return seen


def test_a_file_is_synced_before_it_is_named_and_its_name_after(tmp_path: Path, steps: list[str]) -> None:
    """Any other order leaves a moment in which a power cut gives an empty file under the right name."""
    path = tmp_path / "report.json"
    path.write_bytes(b"old")
    write_file_durably(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert steps == ["sync report.json.tmp", "rename report.json.tmp report.json", f"sync {tmp_path.name}"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_file_durably(path, b"old")

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            write_file_durably(path, b"new")
    assert path.read_bytes() == b"old"
    write_file_durably(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "report.json.tmp").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic"):
        write_file_durably(tmp_path / "report.json", b"new")
    assert victim.read_bytes() == b"precious"


def test_a_rename_between_folders_syncs_both(tmp_path: Path, steps: list[str]) -> None:
    (tmp_path / "a" / "x").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    rename_durably(tmp_path / "a" / "x", tmp_path / "b" / "x")
    assert steps == ["rename x x", "sync b", "sync a"]


def test_folders_are_made_private_with_all_their_parents(tmp_path: Path) -> None:
    made = tmp_path / "a" / "b" / "c"
    make_private_folder(made)
    make_private_folder(made)
    assert {path.stat().st_mode & 0o777 for path in (made, made.parent, made.parent.parent)} == {0o700}
    remove_folder(tmp_path / "a")
    remove_folder(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_wake_up_ends_the_wait(tmp_path: Path) -> None:
    waker = Waker(tmp_path)
    threading.Timer(0.1, wake, (tmp_path,)).start()
    started = time.monotonic()
    waker.wait(10.0)
    assert time.monotonic() - started < 5.0
    waker.close()


def test_wake_ups_that_came_together_are_one(tmp_path: Path) -> None:
    waker = Waker(tmp_path)
    for _ in range(3):
        wake(tmp_path)
    waker.wait(10.0)
    started = time.monotonic()
    waker.wait(0.1)
    assert time.monotonic() - started > 0.05
    waker.close()


def test_nobody_waiting_is_no_error(tmp_path: Path) -> None:
    """Nor is a socket that a killed process left, nor one that is never read."""
    wake(tmp_path)
    Waker(tmp_path).close()
    wake(tmp_path)
    waker = Waker(tmp_path)
    for _ in range(5_000):
        wake(tmp_path)
    waker.close()


def test_a_data_folder_may_lie_deep(tmp_path: Path) -> None:
    """A socket's address has 108 bytes; without this the trainer could not start there."""
    deep = tmp_path / ("x" * 200) / ("y" * 200)
    deep.mkdir(parents=True)
    waker = Waker(deep)
    wake(deep)
    started = time.monotonic()
    waker.wait(5.0)
    assert time.monotonic() - started < 2.0
    waker.close()
