"""Open LMDB environments the one safe way; the caveats and their reasons are in FORMAT.md."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path

import lmdb

from storage.durable import fsync_folder, remove_folder
from storage.errors import ForeignFolderError, StorageError, WriteFailedError

__all__ = ["begin_read", "check_private", "create_environment", "open_environment"]

MAX_READERS = 64
SLOT_TRIES, SLOT_WAIT_S = 10, 0.1
MIN_MAP_BYTES = 1 << 20
_FILL_BYTES = 16 << 20


def check_private(path: Path) -> None:
    """Refuse a path that is a symlink, belongs to another user, or that others may write to.

    LMDB follows a symlinked data.mdb and writes its target; a folder that others can write to lets
    them swap files under us.
    Raises: ForeignFolderError.
    """
    info = path.lstat()
    if stat.S_ISLNK(info.st_mode):
        raise ForeignFolderError("is a symbolic link", path=path, hint="name the real folder")
    if info.st_uid != os.geteuid():
        raise ForeignFolderError(
            f"belongs to user {info.st_uid}, not {os.geteuid()}",
            path=path,
            hint="run as its owner or chown it",
        )
    if info.st_mode & 0o022:
        raise ForeignFolderError("can be written by others", path=path, hint="chmod go-w it")


def create_environment(
    folder: Path, map_bytes: int, rows: Mapping[bytes, bytes], *, written: bool = False
) -> None:
    """Create a preallocated environment that appears all at once, with its first rows in it.

    Args:
        folder: The environment's folder; must not exist.
        map_bytes: Size of the map and of the file, fixed for its life, bytes.
        rows: What whoever opens it must find, its header above all.
        written: Whether to write the whole file, for an environment that commits all day (see `_allocate`).
    Raises: WriteFailedError if the disk has no room for it or fails; nothing is left behind then.
    """
    # 1. folder.new/ is made with the rows, synced.   Crash: a stray folder.new, deleted at the next start.
    # 2. Renamed to folder, synced.                   Crash: no environment, or a complete one.
    # (LMDB killed inside its first meta write leaves a file that it cannot open: hence aside.)
    aside = folder.with_name(folder.name + ".new")
    remove_folder(aside)
    try:
        _create_aside(aside, map_bytes, rows, written)
        aside.rename(folder)
        fsync_folder(folder.parent)
    except (OSError, lmdb.Error) as error:
        remove_folder(aside)
        hint = f"free {map_bytes >> 20} MiB or lower ring.max_bytes; look at the disk if there is room"
        raise WriteFailedError(
            f"cannot set aside {map_bytes} bytes: {error}", path=folder, hint=hint
        ) from error


def _create_aside(aside: Path, map_bytes: int, rows: Mapping[bytes, bytes], written: bool) -> None:
    aside.mkdir(mode=0o700)
    with _lmdb_open(aside, map_bytes, readonly=False) as env, env.begin(write=True) as txn:
        for key, value in rows.items():
            txn.put(key, value)
    _allocate(aside / "data.mdb", map_bytes, written)
    (aside / "lock.mdb").unlink(missing_ok=True)
    fsync_folder(aside)


def _allocate(data: Path, size: int, written: bool) -> None:
    """Set aside a file's whole size, so that it never grows and never finds the disk full.

    Space that is only set aside costs ext4 a journal transaction of 12 KB when a page of it is written first,
    that is with nearly every commit until each page was touched once: a young ring wrote 0.24 bytes a byte of
    payload instead of 0.18 at 1,000 events a commit, and 0.30 GB a day instead of 0.22 at a commit every 10 s
    (tests/bench/flash.py). Zeros written once end that.
    """
    fd = os.open(data, os.O_RDWR)
    try:
        at = os.fstat(fd).st_size
        os.posix_fallocate(fd, 0, size)  # a full disk says so here, before anything is written
        zeros = bytes(_FILL_BYTES if written else 0)
        while written and at < size:
            at += os.pwrite(fd, zeros[: size - at], at)
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, at, os.POSIX_FADV_DONTNEED)  # nobody reads them: leave memory alone
        os.fsync(fd)
    finally:
        os.close(fd)


def open_environment(folder: Path, *, readonly: bool = False) -> lmdb.Environment:
    """Open an existing environment with full syncs, at its own size, after the safety checks.

    Raises: ForeignFolderError, StorageError; WriteFailedError where the disk fails.
    """
    data = folder / "data.mdb"
    try:
        check_private(folder)
        check_private(data)
        map_bytes = data.stat().st_size
    except FileNotFoundError as error:
        raise StorageError("no data file here", path=folder, hint="check data_dir") from error
    try:
        env = _lmdb_open(folder, max(map_bytes, MIN_MAP_BYTES), readonly=readonly)
        env.reader_check()
    except lmdb.ReadersFullError as error:
        raise _no_slot(folder) from error
    except lmdb.Error as error:
        # The disk fails, or the file is damaged: only the first may pass by itself.
        failed = isinstance(error, lmdb.DiskError) or str(error).endswith(os.strerror(errno.EIO))
        raise (WriteFailedError if failed else StorageError)(
            f"cannot be opened: {error}", path=folder, hint="run 'edgewater doctor'"
        ) from error
    return env


def begin_read(env: lmdb.Environment, folder: Path) -> lmdb.Transaction:
    """Begin a read transaction; where all reader slots are taken, free those of the dead, then wait a little.

    Raises: StorageError if they stay taken.
    """
    for left in reversed(range(SLOT_TRIES)):
        try:
            return env.begin()
        except lmdb.ReadersFullError as error:
            if not left:
                raise _no_slot(folder) from error
            env.reader_check()
            time.sleep(SLOT_WAIT_S)
    raise AssertionError("the last try returns or raises")


def _no_slot(folder: Path) -> StorageError:
    hint = "too many processes look at once: stop some of them"
    return StorageError(f"all {MAX_READERS} reader slots are in use", path=folder, hint=hint)


def _lmdb_open(folder: Path, map_bytes: int, *, readonly: bool) -> lmdb.Environment:
    # sync and metasync stay on: with sync=False 18 % of simulated power cuts left a corrupt file.
    # lib_version=0 names the 0.9 engine: 3.0.0 carries two whose files the other cannot read.
    # max_spare_txns=0: a spare reader slot kept across processes is a stale one.
    return lmdb.open(
        str(folder), map_size=map_bytes, mode=0o600, max_readers=MAX_READERS, readonly=readonly,
        max_spare_txns=0, readahead=False, lib_version=0,
    )  # fmt: skip
