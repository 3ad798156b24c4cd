"""Bring a ring or a registry of format 1 to format 2, the old one kept beside it.

Format 1 had its rows unsealed, blocks sorted oldest first, and no sums. Its blocks are taken over byte for
byte, once their checksums are verified; damaged ones become blank samples. The old file is read page by page
without LMDB, which a damaged one could crash, and never written: `<name>.v1` is what the older Edgewater
left, and opens with it again.

Each function below runs the same steps and is called under the lock of the only writer:

    # 1. <name>.migrated.new/ made, whole, synced.            Crash: a stray folder, made anew next time.
    # 2. <name> renamed to <name>.v1, synced.                 Crash: nothing under the name, a whole new one
    #                                                         aside: the next opening takes step 3.
    # 3. <name>.migrated.new renamed to <name>, synced.       From here it is format 2.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from storage.block import verify_block
from storage.build import build_ring, newest_first, newest_that_fit, quarantine_row
from storage.durable import fsync_folder, remove_folder, rename_durably
from storage.env import check_private, create_environment
from storage.errors import CorruptBlockError, CorruptRingError, StorageError
from storage.folder import DataFolder
from storage.pages import Item, PageFile, PageProblem, items, newest_meta, read_metas
from storage.registry import (
    MAP_BYTES,
    REGISTRY_FORMAT,
    ActivePointer,
    AuditRow,
    Registry,
    UpdateRow,
    VersionRow,
    first_rows,
)
from storage.ring_header import RING_FORMAT
from storage.ring_writer import U64
from storage.windows import ClosedWindow, DeadLetter, OpenWindow, RingHeader, RingState

__all__ = ["migrate_folder", "migrate_registry", "migrate_ring"]

SPARE_BYTES = 16 << 20  # of the disk, left to everybody else
WAIT_S = 5.0
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid
log = logging.getLogger("edgewater.storage")


def migrate_folder(data: DataFolder) -> None:
    """Migrate what is of format 1 in a data folder, for who looks at it before ingest opens it.

    Raises: as `migrate_ring` and `migrate_registry`; LockHeldError while an older ingest runs.
    """
    for folder in sorted(data.ring.iterdir()) if data.ring.is_dir() else ():
        shard = folder.name.partition(".")[0]
        if (_format_of(folder) == 1 and folder.name == shard) or _aside(data.ring / shard).exists():
            with data.lock(f"ingest-{shard}"):
                migrate_ring(data.ring / shard)
    if data.registry.is_dir() or _aside(data.registry).exists():
        Registry.open_or_create(data.registry).close()


def migrate_ring(folder: Path) -> bool:
    """Make a ring of format 1 one of format 2; one of format 2 or later, or none, is left as it is.

    Returns: Whether it was migrated, or a migration that a crash cut short was finished.
    Raises: StorageError if the disk has no room for a second ring, CorruptRingError if nothing can be made
        of the old one; it is untouched then.
    """
    finished = _finish(folder)
    if _format_of(folder) != 1:
        return finished
    _wait_until_free(folder)
    with PageFile(folder / "data.mdb") as file:
        old = _read_ring(folder, file)
        map_bytes = (folder / "data.mdb").stat().st_size
        _check_space(folder, map_bytes)
        plan = _plan(old, map_bytes)
        try:
            build_ring(_aside(folder), old.header, plan.state, plan.rows, _blocks(file, plan, old), map_bytes)
        except BaseException:
            remove_folder(_aside(folder))
            raise
    _swap(folder)
    log.warning(
        "the ring %s is brought to format %d with %d samples; the older one lies in %s.v1, delete it when all"
        " is well", folder, RING_FORMAT, plan.state.next_seq - plan.first_seq, folder,
    )  # fmt: skip
    for first, end in plan.holes:
        log.error("samples %d to %d were damaged: they are lost and blank", first, end - 1)
    return True


def migrate_registry(folder: Path) -> bool:
    """Make a registry of format 1 one of format 2; a later one, or none, is left as it is.

    Returns: Whether it was migrated, or a migration that a crash cut short was finished.
    Raises: StorageError if the disk has no room, CorruptRingError if it is damaged; it is untouched then.
    """
    finished = _finish(folder)
    if _format_of(folder) != 1:
        return finished
    _wait_until_free(folder)
    rows = _read_registry(folder)
    _check_space(folder, MAP_BYTES)
    aside = _aside(folder)
    remove_folder(aside)
    create_environment(aside, MAP_BYTES, first_rows(rows))
    _swap(folder)
    log.warning("the registry %s is brought to format %d; the older one lies in %s.v1",
                folder, REGISTRY_FORMAT, folder)  # fmt: skip
    return True


# -- steps ------------------------------------------------------------------------------------------


def _aside(folder: Path) -> Path:
    return folder.with_name(folder.name + ".migrated.new")


def _swap(folder: Path) -> None:
    names = (
        folder.with_name(f"{folder.name}.v1{n}")
        for n in itertools.chain([""], map("-{}".format, itertools.count(2)))
    )
    rename_durably(folder, next(name for name in names if not name.exists()))  # 2.
    rename_durably(_aside(folder), folder)  # 3.


def _finish(folder: Path) -> bool:
    """Finish or undo what a crash left. Returns: whether a new one was put into its place."""
    aside = _aside(folder)
    if not aside.exists():
        return False
    if folder.exists():
        remove_folder(aside)  # it may not be whole
        fsync_folder(folder.parent)
        return False
    rename_durably(aside, folder)  # 3.
    return True


def _wait_until_free(folder: Path) -> None:
    """Refuse while another process has it open: an older one would go on with the file that is set aside.

    A process of this version looks at it for a moment only, sees the format and leaves.
    """
    until = time.monotonic() + WAIT_S
    while _in_use(folder):
        if time.monotonic() > until:
            raise StorageError(
                "is of format 1 and open in another process",
                path=folder,
                hint="stop every Edgewater process on this data folder, then start again",
            )
        time.sleep(0.02)


def _in_use(folder: Path) -> bool:
    """Whether another process has an environment open: LMDB holds a lock on its lock file meanwhile."""
    try:
        fd = os.open(folder / "lock.mdb", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
        return bool(_FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)


def _check_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted + SPARE_BYTES:
        short = (wanted + SPARE_BYTES - free + (1 << 20) - 1) >> 20
        raise StorageError(
            f"is of format 1, and the disk has no room to bring it to format {RING_FORMAT}",
            path=folder,
            hint=f"free {short} MiB and start again; it is as it was",
        )


# -- the old file -----------------------------------------------------------------------------------


class _AnyHeader(msgspec.Struct):
    format: int
    check: bytes = b""  # in every later format


class _OldRing(NamedTuple):
    """A ring of format 1 as far as it can be read: blocks are places in the file."""

    header: RingHeader
    state: RingState
    rows: dict[bytes, bytes]
    blocks: dict[int, tuple[int, int, int]]  # first seq -> end seq, place, bytes


def _format_of(folder: Path) -> int:
    """1, or 0 for no environment, a later format, and what whoever opens it next will complain of."""
    data = folder / "data.mdb"
    if not data.is_file() or data.is_symlink():
        return 0
    check_private(folder)
    check_private(data)
    with PageFile(data) as file:
        metas, _ = read_metas(file)
        if not metas:
            return 0
        meta = newest_meta(metas)
        found = items(
            file, meta.main.root, last_page=meta.last_page, start=b"H", wanted=lambda key: key == b"H"
        )
        header = next((item.value for item in found if item.key == b"H"), None)
    try:
        found_header = msgspec.msgpack.decode(header or b"", type=_AnyHeader)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return 0
    return 0 if found_header.check else found_header.format


def _rows_of(file: PageFile, problems: list[PageProblem]) -> Iterator[Item]:
    metas, _ = read_metas(file)
    meta = newest_meta(metas)
    return items(file, meta.main.root, last_page=meta.last_page, problems=problems)


def _read_ring(folder: Path, file: PageFile) -> _OldRing:
    header: RingHeader | None = None
    state: RingState | None = None
    rows: dict[bytes, bytes] = {}
    blocks: dict[int, tuple[int, int, int]] = {}
    for item in _rows_of(file, []):
        value = item.value or b""
        try:
            match item.key[:1]:
                case b"H":
                    header = _struct(value, RingHeader)
                case b"s":
                    state = _struct(value, RingState, window=OpenWindow)
                case b"b":
                    first, found = U64.unpack(item.key)[1], verify_block(value)
                    if found.first_seq == first:
                        blocks[first] = (found.last_seq + 1, item.at, found.block_bytes)
                case b"W":
                    rows[item.key] = msgspec.msgpack.encode(_struct(value, ClosedWindow))
                case b"D":
                    rows[item.key] = msgspec.msgpack.encode(_struct(value, DeadLetter))
                case b"p" | b"r":
                    rows[item.key] = value
        except (CorruptBlockError, msgspec.MsgspecError, UnicodeDecodeError, TypeError) as error:
            log.error("%s: %r is damaged and left out: %s", folder, item.key, error)
    if header is None or state is None:
        hint = "move it away and start anew, or restore a backup"
        raise CorruptRingError("cannot be brought to format 2: its state is damaged", path=folder, hint=hint)
    return _OldRing(header, state, rows, blocks)


_REGISTRY_ROWS: dict[bytes, type[msgspec.Struct]] = {
    b"U": UpdateRow, b"V": VersionRow, b"A": AuditRow, b"a": ActivePointer,
}  # fmt: skip


def _read_registry(folder: Path) -> dict[bytes, bytes]:
    problems: list[PageProblem] = []
    rows: dict[bytes, bytes] = {}
    try:
        with PageFile(folder / "data.mdb") as file:
            for item in _rows_of(file, problems):
                value, kind = item.value or b"", _REGISTRY_ROWS.get(item.key[:1])
                rows[item.key] = msgspec.msgpack.encode(_struct(value, kind)) if kind else value
        if problems:
            raise ValueError(str(problems[0]))
    except (ValueError, TypeError) as error:  # MsgspecError and UnicodeDecodeError are ValueErrors
        hint = "restore a backup, or move it away: the versions themselves are not in it"
        raise CorruptRingError(f"cannot be brought to format 2: {error}", path=folder, hint=hint) from error
    del rows[b"H"]
    return rows


S = TypeVar("S", bound=msgspec.Struct)


def _struct(value: bytes, kind: type[S], **parts: type[msgspec.Struct]) -> S:
    """A row of format 1, where structs were maps by the names of their fields, as it is written now.

    Args:
        parts: Fields that are structs themselves.
    Raises: MsgspecError, UnicodeDecodeError, TypeError if it is not what it should be.
    """
    fields = msgspec.msgpack.decode(value, type=dict[str, Any])
    for name, part in parts.items():
        fields[name] = part(**fields[name])
    return msgspec.msgpack.decode(msgspec.msgpack.encode(kind(**fields)), type=kind)


class _Plan(NamedTuple):
    """What the new ring will hold."""

    state: RingState
    rows: dict[bytes, bytes]
    runs: list[tuple[int, int]]  # first and end seq of each good block that is taken, in order
    holes: list[tuple[int, int]]
    first_seq: int


def _plan(old: _OldRing, map_bytes: int) -> _Plan:
    state, rows = old.state, dict(old.rows)
    starts = sorted(first for first in old.blocks if state.tail_seq <= first < state.next_seq)
    taken = newest_that_fit([old.blocks[first][2] for first in starts], rows, map_bytes)
    runs = [(first, old.blocks[first][0]) for first in starts[len(starts) - taken :]]
    first_seq = state.tail_seq if taken == len(starts) else runs[0][0] if runs else state.next_seq
    ends = [first_seq, *(end for _, end in runs)]
    begins = [*(first for first, _ in runs), state.next_seq]
    holes = [(end, first) for end, first in zip(ends, begins, strict=True) if end < first]
    for first, end in holes:
        key, value = quarantine_row(first, end, "damaged when it was brought to format 2", state.stream_time)
        rows[key] = value
    lost = sum(end - first for first, end in holes)
    return _Plan(msgspec.structs.replace(state, lost=lost), rows, runs, holes, first_seq)


def _blocks(file: PageFile, plan: _Plan, old: _OldRing) -> Iterator[tuple[int, bytes]]:
    """Good blocks as they are, and blanks where one is missing, the newest first."""
    good = ((first, *old.blocks[first][1:]) for first, _ in plan.runs)
    return newest_first(file.read, good, plan.holes, old.header.tokenizer_id, old.state.stream_time)
