"""The data folder: where things lie in it, that it is ours, and who may work on it at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec

from storage.durable import make_private_folder, write_file_durably
from storage.env import check_private
from storage.errors import (
    ForeignFolderError,
    FormatTooNewError,
    LockHeldError,
    StorageError,
    WriteFailedError,
)

__all__ = ["DATA_FORMAT", "DataFolder", "RoleLock"]

DATA_FORMAT = 1
_MARKER = "edgewater.json"
NOTE_BYTES = 64


class _Marker(msgspec.Struct, forbid_unknown_fields=False):
    format: int
    uuid: str
    created: float


class RoleLock:
    """An exclusive lock on one role of one data folder, held until closed or until the process ends."""

    def __init__(self, path: Path, role: str) -> None:
        self.role = role
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._fd, NOTE_BYTES, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise LockHeldError(
                f"another {role} process (pid {holder}) works on this data folder",
                path=path.parent.parent,
                hint="stop it first, or use another data_dir",
            ) from error
        try:
            _note(self._fd, str(os.getpid()))
        except OSError as error:
            if error.errno != errno.ENOSPC:  # a full disk: it tells people who holds the lock, no more
                os.close(self._fd)
                raise

    def close(self) -> None:
        """Release the role; a second time nothing happens."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> RoleLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DataFolder:
    """Paths of one data folder, opened only when it is safe and ours."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ring = path / "ring"
        self.registry = path / "registry"
        self.versions = path / "versions"
        self.updates = path / "updates"
        self.accepted = path / "accepted"
        self.cache = path / "cache"
        self.keys = path / "keys"
        self.run = path / "run"
        self.report = path / "report.json"
        self._namespace_fd = -1

    @classmethod
    def open(cls, path: Path, *, create: bool) -> DataFolder:
        """Open a data folder, or make one in an empty or missing place.

        Raises: ForeignFolderError, FormatTooNewError, StorageError.
        """
        folder = cls(path)
        marker = path / _MARKER
        try:
            if create and not path.exists():
                make_private_folder(path)
            if not path.is_dir():
                what = "is a file, not a folder" if path.exists() else "no data folder here"
                raise StorageError(what, path=path, hint="check data_dir, or run Edgewater once")
            check_private(path)
            if not marker.exists():
                with _alone_in(path):
                    if not marker.exists():  # else another process that starts just now was first
                        folder._claim_empty(marker, create)
            folder._check_marker(marker)
            folder._join_namespace()
        except OSError as error:
            raise _unusable(path, error) from error
        return folder

    def _claim_empty(self, marker: Path, create: bool) -> None:
        own = {"ring", "versions", "updates", "accepted", "cache", "keys", "run", f"{_MARKER}.tmp"}
        strangers = [
            p.name
            for p in self.path.iterdir()
            # A file system of its own brings lost+found, which only root may look into.
            if p.name != "lost+found" and (p.name not in own or (p.is_dir() and any(p.iterdir())))
        ]
        if not strangers and not create:
            raise StorageError("nothing is here yet", path=self.path, hint="run Edgewater once")
        if strangers:
            hint = "data_dir must be empty or written by Edgewater"
            raise ForeignFolderError("is not an Edgewater data folder", path=self.path, hint=hint)
        for part in (self.ring, self.versions, self.updates, self.accepted, self.cache, self.keys, self.run):
            make_private_folder(part)
        # The marker is last: a folder that has it is complete. Crash before it: only empty folders of
        # ours lie here, which the check above lets through at the next start.
        text = msgspec.json.encode(_Marker(DATA_FORMAT, uuid.uuid4().hex, time.time()))
        write_file_durably(marker, text + b"\n")

    def _check_marker(self, marker: Path) -> None:
        try:
            found = msgspec.json.decode(marker.read_bytes(), type=_Marker)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ForeignFolderError(
                f"its marker is damaged: {error}", path=marker, hint="restore it"
            ) from error
        if found.format > DATA_FORMAT:
            raise FormatTooNewError(
                f"data format {found.format} is newer than {DATA_FORMAT}",
                path=self.path,
                hint="upgrade Edgewater",
            )

    def _join_namespace(self) -> None:
        """Refuse to share the folder with a process of another PID namespace.

        LMDB locks by process id, so two containers with their own PID namespace corrupt each other.
        Each process holds a shared lock on run/pidns, whose content is the namespace of the holders.
        """
        mine = str(Path("/proc/self/ns/pid").readlink()) if Path("/proc/self/ns/pid").exists() else "none"
        make_private_folder(self.run)
        fd = os.open(self.run / "pidns", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _note(fd, mine)
        except BlockingIOError:
            pass
        fcntl.flock(fd, fcntl.LOCK_SH)
        theirs = os.pread(fd, NOTE_BYTES, 0).decode(errors="replace").strip()
        if theirs and theirs != mine:
            os.close(fd)
            hint = "run all Edgewater processes in one container or pod with a shared PID namespace"
            raise ForeignFolderError("is in use from another PID namespace", path=self.path, hint=hint)
        self._namespace_fd = fd

    def close(self) -> None:
        """Leave the namespace check; paths stay valid."""
        if self._namespace_fd >= 0:
            os.close(self._namespace_fd)
            self._namespace_fd = -1

    def lock(self, role: str) -> RoleLock:
        """Take a role ("ingest-main", "trainer", "server", "admin"). Raises: LockHeldError, StorageError."""
        try:
            make_private_folder(self.run)
            return RoleLock(self.run / f"{role}.lock", role)
        except OSError as error:
            raise _unusable(self.path, error) from error

    def holder(self, role: str) -> int | None:
        """Process id of who holds a role, None if nobody does. Looks, and takes nothing."""
        try:
            inode = (self.run / f"{role}.lock").lstat().st_ino
            locks = Path("/proc/locks").read_text(encoding="ascii")
        except OSError:
            return None
        # "1: FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF"; by the inode alone: btrfs and overlayfs show
        # another device there than stat does.
        fields = (line.split() for line in locks.splitlines())
        held = (line for line in fields if line[1:2] == ["FLOCK"] and line[5].endswith(f":{inode}"))
        return next((int(line[4]) for line in held), None)

    def shards(self, *, unfinished: bool = False) -> list[str]:
        """Shards that have a ring, "main" first, then by number.

        Args:
            unfinished: Also those of which a crash left only what stands beside it: a ring that was being
                rebuilt or migrated, a backup (`main.v1`).
        """
        if not self.ring.is_dir():
            return []
        folders = [path.name for path in self.ring.iterdir() if path.is_dir()]
        names = {name.partition(".")[0] for name in folders if unfinished or "." not in name}
        return sorted(names, key=lambda name: (name != "main", len(name), name))

    def update_folder(self, shard: str, window: int) -> Path:
        """Work folder of one update: the claimed samples, checkpoints, the candidate."""
        return self.updates / f"{shard}-{window:06d}"

    def accepted_file(self, shard: str, window: int) -> Path:
        """Samples of an accepted window, kept for rehearsal."""
        return self.accepted / f"{shard}-{window:06d}.blocks"


@contextlib.contextmanager
def _alone_in(path: Path) -> Iterator[None]:
    """Hold a lock on a folder itself: it is there before anything that could be locked is in it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _note(fd: int, text: str) -> None:
    """Write a line into a lock file, in place: truncated first, it would lose its block to a full disk."""
    data = text.encode().ljust(NOTE_BYTES - 1) + b"\n"
    if os.pread(fd, NOTE_BYTES, 0) != data:
        os.pwrite(fd, data, 0)


def _unusable(path: Path, error: OSError) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
        # The disk, not a decision of ours: a supervisor tries again, and goes on once it can be written.
        hint = "free some space, or check the disk"
        return WriteFailedError(f"cannot be written: {error.strerror}", path=path, hint=hint)
    hint = "make it writable for this user, or choose another data_dir"
    return StorageError(f"cannot be used: {error.strerror}", path=path, hint=hint)
