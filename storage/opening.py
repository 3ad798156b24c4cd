"""Open a ring or a registry for writing after looking whether it can be: damage never makes a crash loop.

    found at the start                             then
    half a rebuild, left by a crash                finished or undone
    format 1                                       migrated (storage/migrate.py)
    pages, rows or sums wrong                      rebuilt from what is good, the damaged one kept aside
    the last run did not end cleanly               every block read: blanks for the damaged ones
    a newer format, a stranger's file, a symlink   refused, as it is

Reading the structure of 100,000 values takes 0.1 s, so it is looked at before every opening; LMDB itself is
let near the file only then. Blocks carry a checksum each and are looked at when they are read anyway; all of
them are read only after an unclean end, which a mark in run/ betrays.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from storage.check import Problem, check_registry, check_ring, quick_check
from storage.durable import fsync_folder, make_private_folder, remove_folder
from storage.env import check_private
from storage.errors import CorruptRingError, StorageError
from storage.folder import DataFolder
from storage.migrate import migrate_registry, migrate_ring
from storage.registry import AuditRow, Registry
from storage.ring import Ring
from storage.salvage import finish_rebuild, rebuild
from storage.salvage_registry import rebuild_registry

__all__ = ["open_registry", "open_ring_reader", "opened_ring", "repair"]

REFUSED_S = 60.0
_refused: dict[Path, float] = {}  # when a damaged ring may be looked at again
log = logging.getLogger("edgewater.storage")


@contextmanager
def opened_ring(
    data: DataFolder, *, shard: str, tokenizer_id: str, max_bytes: int, dedup_key: bytes = b""
) -> Iterator[Ring]:
    """The ring of a shard, open for writing, mended first where that is needed.

    Args:
        dedup_key: Of the host's other shards, for a ring that is made, or made anew without its header.

    The caller holds the role `ingest-<shard>`. What was mended is logged as an error and written to the
    registry's audit.
    Raises: as Ring.open_or_create, and StorageError if the disk has no room for a second ring.
    """
    folder, mark = data.ring / shard, data.run / f"ring-{shard}.open"
    mend_ring(data, shard, tokenizer_id=tokenizer_id, max_bytes=max_bytes, dedup_key=dedup_key)
    for stray in data.ring.glob(f"{shard}.*new"):
        remove_folder(stray)  # of an import, say, that a crash cut short: as large as the ring
    unclean = mark.exists()
    damaged = _damaged_blocks(folder) if unclean and folder.exists() else []
    # Where the ring is gone altogether, a new one goes on: windows that the registry knows are not learned.
    window, seq = (1, 0) if folder.exists() or not data.registry.exists() else _used_numbers(data, shard)
    _put_mark(mark)
    with Ring.open_or_create(
        folder, shard=shard, tokenizer_id=tokenizer_id, max_bytes=max_bytes,
        least_window=window, least_seq=seq, dedup_key=dedup_key,
    ) as ring:  # fmt: skip
        if damaged and not _quarantine(data, ring):
            _alarm(data, str(damaged[0]))  # no block is damaged, but one is not the newest
        yield ring
    mark.unlink(missing_ok=True)  # after a clean end only: an exception leaves it


def open_ring_reader(folder: Path) -> Ring:
    """The ring for reading beside its writer, unless its pages could end this process.

    Raises: StorageError; for a minute after a look that found damage without looking again.
    """
    if time.monotonic() < _refused.get(folder, 0.0):
        raise CorruptRingError("is damaged", path=folder, hint="restart ingest: it rebuilds it")
    if problems := [problem for problem in quick_check(folder, live=True) if problem.cure == "rebuild"]:
        _refused[folder] = time.monotonic() + REFUSED_S
        log.error("%s; restart ingest: it rebuilds it", problems[0])
        raise CorruptRingError(problems[0].words, path=folder, hint="restart ingest: it rebuilds it")
    return Ring.open_reader(folder)


def mend_ring(
    data: DataFolder, shard: str, *, tokenizer_id: str = "", max_bytes: int = 0, dedup_key: bytes = b""
) -> list[Problem]:
    """Rebuild a ring that cannot be trusted. Returns: what was wrong with it."""
    folder = data.ring / shard
    if finish_rebuild(folder):
        _alarm(data, f"ring {shard}: a rebuild that a crash cut short is finished")
    migrate_ring(folder)
    if not folder.exists():
        return []
    check_private(folder)
    if (folder / "data.mdb").exists():
        check_private(folder / "data.mdb")
    problems = [problem for problem in quick_check(folder) if problem.cure == "rebuild"]
    if not problems:
        return []
    for problem in problems[:10]:
        log.error("%s", problem)
    window, seq = _used_numbers(data, shard)
    report = rebuild(
        folder,
        data.path / "quarantine",
        tokenizer_id=tokenizer_id,
        max_bytes=max_bytes,
        least_window=window,
        least_seq=seq,
        dedup_key=dedup_key,
    )
    _alarm(data, report.words())
    return problems


def open_registry(data: DataFolder) -> Registry:
    """The registry, rebuilt first where it cannot be trusted.

    Raises: StorageError if it is damaged and other processes have it open.
    """
    mend_registry(data)
    return Registry.open_or_create(data.registry)


def mend_registry(data: DataFolder) -> list[Problem]:
    """Rebuild a registry that cannot be trusted. Returns: what was wrong with it."""
    make_private_folder(data.run)
    fd = os.open(data.run / "registry.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        finish_rebuild(data.registry)
        migrate_registry(data.registry)
        if not data.registry.exists():
            return []
        live = _in_use(data.registry)
        problems = [p for p in check_registry(data.registry, live=live) if p.cure == "rebuild"]
        if not problems:
            return []
        if live:
            hint = "stop all Edgewater processes: the next start rebuilds it"
            raise StorageError(f"is damaged: {problems[0].words}", path=data.registry, hint=hint)
        for problem in problems[:10]:
            log.error("%s", problem)
        words = rebuild_registry(data.registry, data.path / "quarantine", _versions_on_disk(data))
    finally:
        os.close(fd)
    _alarm(data, words)
    return problems


def repair(data: DataFolder) -> list[str]:
    """Mend everything that can be mended offline: what `edgewater doctor --repair` does.

    Returns: what was done, in words.
    Raises: LockHeldError while ingest, the trainer, the server or a verb that writes runs.
    """
    done: list[str] = []
    with contextlib.ExitStack() as stack:
        shards = data.shards(unfinished=True)
        ingests = (f"ingest-{shard}" for shard in sorted({"main", *shards}))
        roles = ("starting", *ingests, "trainer", "server", "admin")
        for role in roles:
            stack.enter_context(data.lock(role))
        for problem in mend_registry(data):
            done.append(f"rebuilt the registry: {problem.words}")
        for shard in shards:
            for problem in mend_ring(data, shard):
                done.append(f"rebuilt ring {shard}: {problem.words}")
            if not (data.ring / shard).exists():
                done.append(f"ring {shard} is empty: ingest makes a new one")
                continue
            with Ring.open_reader(data.ring / shard) as reader:
                header, max_bytes = reader.header, reader.map_bytes
            with Ring.open_or_create(
                data.ring / shard, shard=shard, tokenizer_id=header.tokenizer_id, max_bytes=max_bytes
            ) as ring:
                done += (f"ring {shard}: {words}" for words in _quarantine(data, ring))
    return done


def _damaged_blocks(folder: Path) -> list[Problem]:
    """What the checksums of all blocks tell: 0.1 s for a million samples."""
    started = time.monotonic()
    found = [problem for problem in check_ring(folder, live=False) if problem.kind == "block"]
    log.info("the last run did not end cleanly: read every block in %.2f s", time.monotonic() - started)
    return found


def _quarantine(data: DataFolder, ring: Ring) -> list[str]:
    """Put blanks in place of damaged blocks, and say so."""
    words = [
        f"samples {row.first_seq} to {row.first_seq + row.samples - 1} are lost: {row.reason}"
        for row in ring.quarantine(data.path / "quarantine")
    ]
    for line in words:
        _alarm(data, f"ring {ring.header.shard}: {line}")
    return words


def _put_mark(mark: Path) -> None:
    make_private_folder(mark.parent)
    os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    fsync_folder(mark.parent)


def _used_numbers(data: DataFolder, shard: str) -> tuple[int, int]:
    """The first window number and seq that the registry does not know yet; (1, 0) if it cannot say."""
    try:
        with open_registry(data) as registry:
            return registry.unused_numbers(shard)
    except (StorageError, lmdb.Error) as error:
        log.error("the registry cannot say which windows are decided: %s", error)
        return 1, 0


def _alarm(data: DataFolder, words: str) -> None:
    """An error in the log, and a row in the registry's audit if it can be opened."""
    log.error("%s", words)
    if data.registry.exists() and check_registry(data.registry, live=_in_use(data.registry)):
        return  # LMDB is not let near it before it is mended
    row = AuditRow(time.time(), "storage", "damage", words[:1000])
    with (
        contextlib.suppress(StorageError, lmdb.Error),
        Registry.open_or_create(data.registry) as registry,
        registry.write() as writer,
    ):
        writer.add_audit(row)


def _versions_on_disk(data: DataFolder) -> list[str]:
    return sorted(path.name for path in data.versions.iterdir()) if data.versions.is_dir() else []


def _in_use(folder: Path) -> bool:
    """Whether a process has an environment open: LMDB holds a record lock on lock.mdb while it has.

    Asked of the kernel by inode: opening and closing the file here would drop a lock of our own on it. By
    the inode alone: btrfs and overlayfs show another device there than stat does.
    """
    try:
        info = (folder / "lock.mdb").lstat()
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return False
    fields = (line.replace("->", "").split() for line in locks.splitlines())
    return any("POSIX" in line and line[5].endswith(f":{info.st_ino}") for line in fields)
