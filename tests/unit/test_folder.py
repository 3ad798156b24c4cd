"""The data folder: made whole or not at all, refused where it is not ours or not safe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.errors import ForeignFolderError, FormatTooNewError, LockHeldError, StorageError
from storage.folder import DataFolder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "data"


def test_a_folder_is_made_with_its_parts_readable_by_the_owner_only(path: Path) -> None:
    folder = DataFolder.open(path, create=True)
    assert sorted(p.name for p in path.iterdir()) == sorted(
        ["accepted", "cache", "edgewater.json", "keys", "ring", "run", "updates", "versions"]
    )
    assert {p.stat().st_mode & 0o077 for p in [path, *path.rglob("*")]} == {0}
    folder.close()


def test_a_folder_opens_again_with_the_same_identity(path: Path) -> None:
    for _ in range(2):
        DataFolder.open(path, create=True).close()
    marker = json.loads((path / "edgewater.json").read_text())
    DataFolder.open(path, create=False).close()
    assert json.loads((path / "edgewater.json").read_text()) == marker
    assert marker["format"] == 1


def test_processes_that_start_together_make_one_folder(path: Path) -> None:
    """As those of a service manager do at a site's first boot: none finds it half made, or another's."""
    program = (
        "import sys, time; from pathlib import Path; from storage.folder import DataFolder\n"
        "time.sleep(max(0.0, float(sys.argv[2]) - time.time()))\n"
        "folder = DataFolder.open(Path(sys.argv[1]), create=True)\n"
        "(folder.ring / f'main-{time.time()}').mkdir()\n"
        "print((folder.path / 'edgewater.json').read_text())\n"
    )
    for turn in range(5):
        together = str(time.time() + 0.4)
        words = [sys.executable, "-c", program, str(path / str(turn)), together]
        running = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(4)]
        told = [process.communicate(timeout=60)[0] for process in running]
        assert [process.returncode for process in running] == [0] * 4
        assert len({*told}) == 1


def test_looking_makes_nothing(path: Path) -> None:
    with pytest.raises(StorageError, match="no data folder here"):
        DataFolder.open(path, create=False)
    assert not path.exists()
    path.mkdir(parents=True)
    with pytest.raises(StorageError, match="nothing is here yet"):
        DataFolder.open(path, create=False)
    assert list(path.iterdir()) == []


def test_somebody_elses_folder_is_refused_and_left_alone(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "photo.jpg").touch()
    with pytest.raises(ForeignFolderError, match="must be empty or written by Edgewater"):
        DataFolder.open(path, create=True)
    assert [p.name for p in path.iterdir()] == ["photo.jpg"]


def test_a_name_of_ours_with_somebody_elses_files_in_it_is_refused(path: Path) -> None:
    (path / "cache").mkdir(parents=True)
    (path / "cache" / "thumbnail").touch()
    with pytest.raises(ForeignFolderError):
        DataFolder.open(path, create=True)


def test_a_folder_whose_making_was_cut_short_is_finished(path: Path) -> None:
    """The marker is last: what a crash before it left is empty folders of ours and a half-written marker."""
    for name in ("ring", "versions"):
        (path / name).mkdir(parents=True, mode=0o700)
    (path / "edgewater.json.tmp").write_text('{"form')
    DataFolder.open(path, create=True).close()
    assert (path / "edgewater.json").exists()


def test_a_file_system_of_its_own_may_be_the_data_folder(path: Path) -> None:
    """ext4 puts lost+found into its root."""
    (path / "lost+found").mkdir(parents=True, mode=0o700)
    DataFolder.open(path, create=True).close()


def test_a_damaged_marker_is_refused(path: Path) -> None:
    DataFolder.open(path, create=True).close()
    for damage in (b"", b"{", b"[]", b'{"format": "1"}', b"\xff"):
        (path / "edgewater.json").write_bytes(damage)
        with pytest.raises(ForeignFolderError, match="marker is damaged"):
            DataFolder.open(path, create=True)


def test_a_newer_folder_is_refused(path: Path) -> None:
    DataFolder.open(path, create=True).close()
    (path / "edgewater.json").write_text('{"format": 2, "uuid": "x", "created": 0, "more": 1}')
    with pytest.raises(FormatTooNewError, match="upgrade"):
        DataFolder.open(path, create=True)


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_can_write_to_is_refused(path: Path, mode: int) -> None:
    DataFolder.open(path, create=True).close()
    path.chmod(mode)
    with pytest.raises(ForeignFolderError, match="chmod go-w"):
        DataFolder.open(path, create=True)


def test_a_symbolic_link_is_refused(path: Path, tmp_path: Path) -> None:
    DataFolder.open(path, create=True).close()
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ForeignFolderError, match="symbolic link"):
        DataFolder.open(tmp_path / "link", create=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="cannot be used"):
        DataFolder.open(tmp_path / "dangling", create=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_another_users_folder_is_refused_even_to_root(path: Path) -> None:
    DataFolder.open(path, create=True).close()
    os.chown(path, 65_534, 65_534)
    with pytest.raises(ForeignFolderError, match="belongs to user 65534"):
        DataFolder.open(path, create=True)


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(StorageError):
        DataFolder.open(tmp_path / "data", create=True)
    with pytest.raises(StorageError, match="choose another data_dir"):
        DataFolder.open(tmp_path / "data" / "below", create=True)


def test_a_link_in_place_of_a_lock_is_not_followed(path: Path, tmp_path: Path) -> None:
    """A lock file is written to: through a link that would be somebody's file."""
    folder = DataFolder.open(path, create=True)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (path / "run" / "trainer.lock").symlink_to(victim)
    with pytest.raises(StorageError, match="cannot be used"):
        folder.lock("trainer")
    folder.close()
    (path / "run" / "pidns").unlink()
    (path / "run" / "pidns").symlink_to(victim)
    with pytest.raises(StorageError, match="cannot be used"):
        DataFolder.open(path, create=True)
    assert victim.read_text() == "precious"


def test_a_role_is_held_by_one_at_a_time(path: Path) -> None:
    """The same role is refused with the holder's process id; other roles are free; closing releases it."""
    folder = DataFolder.open(path, create=True)
    with folder.lock("trainer"):
        with pytest.raises(LockHeldError, match=rf"another trainer process \(pid {os.getpid()}\)"):
            folder.lock("trainer")
        folder.lock("ingest-main").close()
    folder.lock("trainer").close()
    folder.close()


def test_a_role_ends_with_its_process(path: Path) -> None:
    """SIGKILL leaves the lock file and no lock."""
    code = (
        "import sys; from pathlib import Path; from storage.folder import DataFolder\n"
        "lock = DataFolder.open(Path(sys.argv[1]), create=True).lock('trainer')\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        folder = DataFolder.open(path, create=True)
        with pytest.raises(LockHeldError, match=f"pid {holder.pid}"):
            folder.lock("trainer")
        holder.kill()
    folder.lock("trainer").close()
    folder.close()


def test_another_pid_namespace_is_refused_while_one_holds_the_folder(path: Path) -> None:
    """LMDB locks by process id, so two namespaces would corrupt each other; once all have left it is free."""
    first = DataFolder.open(path, create=True)
    second = DataFolder.open(path, create=True)
    (path / "run" / "pidns").write_text("pid:[1]")
    with pytest.raises(ForeignFolderError, match="PID namespace"):
        DataFolder.open(path, create=True)
    first.close()
    with pytest.raises(ForeignFolderError, match="PID namespace"):
        DataFolder.open(path, create=True)
    second.close()
    third = DataFolder.open(path, create=True)
    assert (path / "run" / "pidns").read_text().strip() == str(Path("/proc/self/ns/pid").readlink())
    third.close()
