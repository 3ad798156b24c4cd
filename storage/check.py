"""Verify a data folder: what is wrong with it, where, and what cures it. Nothing here writes.

Rings and registries are read page by page (storage/pages.py), never through LMDB, which a damaged file can
crash. What each kind of damage is caught by:

    meta pages           their bounds, their order, and the transaction id in the state row
    pages, free list     their own numbers, bounds and order; each page used once; counts as stated
    rows                 a seal each, and the sum of all seals in the state row
    blocks               a checksum each, the seq in it, no gap, and the sum of all checksums
    files                a checksum or a hash each
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import lmdb
import msgspec

from storage.block import block_checksum, decode_blocks, verify_block
from storage.dictionary import read_dictionary_file
from storage.env import begin_read, open_environment
from storage.errors import CorruptBlockError, CorruptRingError, FormatTooNewError, StorageError
from storage.folder import DataFolder
from storage.pages import Item, Meta, PageFile, check_pages, items, newest_meta, read_metas
from storage.registry import REGISTRY_FORMAT, ActivePointer, AuditRow, UpdateRow, VersionRow
from storage.ring_header import read_ring_header
from storage.ring_writer import BLOCKS, HEADER, STATE, U32, U64, block_key, seq_of
from storage.rows import open_header, sum_of, unseal
from storage.windows import ClosedWindow, DeadLetter, QuarantineRow, RingHeader, RingState

__all__ = [
    "Cure",
    "Problem",
    "check_folder",
    "check_registry",
    "check_ring",
    "quick_check",
]

PIN_S = 0.1  # a live check holds a snapshot for so long, then lets the writer have its pages back
Cure = Literal["rebuild", "quarantine", "none"]
Progress = Callable[[str, int], None]
log = logging.getLogger("edgewater.check")


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong.

    Attributes:
        kind: "file", "meta", "tree", "free list", "header", "state", "row", "block", "dictionary", "window",
            "stray", "access" or "registry".
        where: Path or place, for people.
        words: What is wrong.
        hint: What to do.
        cure: What `doctor --repair` does: rebuild the whole (it cannot be trusted), put blanks in place of
            damaged blocks, or nothing.
    """

    kind: str
    where: str
    words: str
    hint: str = ""
    cure: Cure = "none"

    def __str__(self) -> str:
        return f"{self.where}: {self.words}" + (f" ({self.hint})" if self.hint else "")


class RingRows(msgspec.Struct):
    """The rows of a ring that are not blocks, each as its seal vouches for it.

    Attributes:
        header, state: None where they are lost.
        windows, letters, dictionaries: By number.
        total: XOR of the seals of all rows that count.
        bad: Keys whose seal or content is wrong.
    """

    header: RingHeader | None = None
    state: RingState | None = None
    windows: dict[int, ClosedWindow] = {}
    letters: dict[int, int] = {}
    dictionaries: dict[int, bytes] = {}
    total: int = 0
    bad: list[bytes] = []


# -- the ring ---------------------------------------------------------------------------------------


def check_ring(folder: Path, *, live: bool, progress: Progress = lambda what, n: None) -> list[Problem]:
    """Verify one ring: pages, rows and blocks.

    Args:
        folder: The ring's folder.
        live: Whether its writer may be running. Then a read transaction keeps the pages of the snapshot
            that is looked at from being written again: retrying until nothing changed would never end
            beside a busy writer. It is held for the walk over branches and leaves, then for a tenth of a
            second at a time; what spans the whole ring (the sum of the blocks) is only checked if the first
            such time was enough.
        progress: Told what is looked at and how much of it was.
    Returns: What is wrong.
    Raises: FormatTooNewError.
    """
    problems = list(_access(folder, {"data.mdb", "lock.mdb"}, "dictionary-"))
    if any(problem.kind == "access" for problem in problems) or not (folder / "data.mdb").exists():
        return problems or [_missing(folder)]
    start = BLOCKS
    while True:
        with _snapshot(folder, live=live) as (file, meta, found):
            if start == BLOCKS:
                problems += found
                if meta is None:
                    return problems
                rows, wrong = _check_structure(file, meta, folder, progress)
                problems += wrong
                if any(p.cure == "rebuild" for p in wrong) or rows.state is None or rows.header is None:
                    return problems
                walk = _BlockWalk(folder, rows.header, rows.state, rows)
            assert meta is not None
            deadline = time.monotonic() + PIN_S if live else float("inf")
            start = walk.go_on(file, meta, start, deadline, progress)
            if not start:
                problems += walk.finish()
                return problems


def quick_check(folder: Path, *, live: bool = False) -> list[Problem]:
    """Everything but the content of the blocks: that the ring can be opened by LMDB and its rows be trusted.

    Reads branch and leaf pages and the first header of each large value: 0.1 s for 100,000 values.
    Raises: FormatTooNewError.
    """
    if not (folder / "data.mdb").exists():
        return [_missing(folder)]
    with _snapshot(folder, live=live) as (file, meta, problems):
        if meta is None:
            return problems
        return problems + _check_structure(file, meta, folder, lambda what, n: None)[1]


def _missing(folder: Path) -> Problem:
    return Problem("file", str(folder / "data.mdb"), "is missing", _REBUILD, "rebuild")


@contextmanager
def _snapshot(folder: Path, *, live: bool) -> Iterator[tuple[PageFile, Meta | None, list[Problem]]]:
    """The data file, its newest meta page (None if there is none) and what is wrong with both."""
    path = folder / "data.mdb"
    with PageFile(path) as file, _pinned(folder, live=live) as pinned:
        for _ in range(10):
            metas, wrong = read_metas(file)
            meta = next((m for m in metas if m.txn == pinned), None) if pinned else None
            if meta or not pinned:
                break
            time.sleep(0.001)  # the writer is just replacing the other one
        problems = [
            Problem("meta", str(path), f"page {p.page}: {p.words}", _REBUILD, "rebuild")
            for p in wrong
            if not pinned
        ]
        if meta is None and metas:
            meta = newest_meta(metas)
            for other in metas:
                # A flipped bit can turn t into t - 2, which looks like a file one commit ago. But the state
                # row of the snapshot before the newest is whole too: LMDB keeps its pages so long.
                if other is not meta and _stated_txn(file, other) not in (None, other.txn):
                    words = f"page {other.index} names another transaction than its snapshot"
                    problems.append(Problem("meta", str(path), words, _REBUILD, "rebuild"))
        if meta is not None and file.size != meta.map_bytes:
            words = f"is {file.size} bytes long, its map is {meta.map_bytes}"
            problems.append(Problem("file", str(path), words, _REBUILD, "rebuild"))
        yield file, meta, problems


def _stated_txn(file: PageFile, meta: Meta) -> int | None:
    """The transaction that a snapshot's state row names, of a ring or a registry; None if it has none."""
    for item in items(file, meta.main.root, last_page=meta.last_page, depth=meta.main.depth, start=STATE):
        if item.key != STATE or item.value is None:
            return None
        with contextlib.suppress(CorruptRingError, msgspec.MsgspecError):
            value = unseal(STATE, item.value)
            with contextlib.suppress(msgspec.ValidationError):
                return msgspec.msgpack.decode(value, type=_RegistryState).txn
            return msgspec.msgpack.decode(value, type=RingState).txn
        return None
    return None


@contextmanager
def _pinned(folder: Path, *, live: bool) -> Iterator[int]:
    """Hold a read transaction if somebody may write. Yields: its id, 0 for none."""
    if not live:
        yield 0
        return
    with PageFile(folder / "data.mdb") as file:
        if len(read_metas(file)[0]) < 2:  # LMDB looks at nothing but these to begin a transaction
            yield 0
            return
    try:
        env = open_environment(folder, readonly=True)
    except StorageError as error:
        if isinstance(error.__cause__, lmdb.ReadersFullError):
            raise  # not held, pages would change under the check, and pass for damage
        yield 0
        return
    with closing(env), begin_read(env, folder) as txn:
        yield int(txn.id())


def _check_structure(
    file: PageFile, meta: Meta, folder: Path, progress: Progress
) -> tuple[RingRows, list[Problem]]:
    path = str(folder / "data.mdb")
    problems = [
        Problem(found.kind, path, f"page {found.page}: {found.words}", _REBUILD, "rebuild")
        for found in check_pages(file, meta, progress=lambda n: progress("pages", n))
    ]
    rows = read_rows(
        items(file, meta.main.root, last_page=meta.last_page, depth=meta.main.depth, wanted=not_block), folder
    )
    if rows.header is None or rows.header.format > 1:  # before that rows had no seals: migration reads them
        problems += _check_rows(rows, meta, folder)
    return rows, problems


def not_block(key: bytes) -> bool:
    """Whether a key is of a row that is read whole: blocks are large, and looked at one by one."""
    return key[:1] != BLOCKS


def read_rows(found: Iterator[Item], folder: Path) -> RingRows:
    """Unseal and decode every row but the blocks. Raises: FormatTooNewError."""
    rows = RingRows()
    for item in found:
        if item.value is None or not not_block(item.key):
            continue
        try:
            _take_row(rows, item.key, item.value, folder)
        except (CorruptRingError, msgspec.MsgspecError, UnicodeDecodeError, ValueError):
            rows.bad.append(item.key)
    return rows


def _take_row(rows: RingRows, key: bytes, data: bytes, folder: Path) -> None:
    if key == HEADER:
        rows.header = read_ring_header(data, folder)
        return
    if key == STATE:
        rows.state = msgspec.msgpack.decode(unseal(key, data), type=RingState)
        return
    rows.total ^= sum_of(data)
    value, prefix = unseal(key, data), key[:1]
    if prefix == b"W":
        rows.windows[_number(key, U32)] = msgspec.msgpack.decode(value, type=ClosedWindow)
    elif prefix == b"D":
        msgspec.msgpack.decode(value, type=DeadLetter)
        rows.letters[_number(key, U64)] = len(value)
    elif prefix == b"Q":
        _number(key, U64)
        msgspec.msgpack.decode(value, type=QuarantineRow)
    elif prefix == b"Z":
        rows.dictionaries[_number(key, U32)] = value
    elif prefix in (b"p", b"r"):
        key[1:].decode()
    else:
        raise ValueError("no row that a ring has")


def _number(key: bytes, form: Any) -> int:
    if len(key) != form.size:
        raise ValueError("no number in this key")
    return int(form.unpack(key)[1])


def _check_rows(rows: RingRows, meta: Meta, folder: Path) -> Iterator[Problem]:
    where = f"ring {folder.name}"

    def broken(kind: str, words: str) -> Problem:
        return Problem(kind, where, words, _REBUILD, "rebuild")

    for key in rows.bad:
        kind = {HEADER: "header", STATE: "state"}.get(key, "dictionary" if key[:1] == b"Z" else "row")
        if kind == "dictionary" and _copy_is_whole(folder, key):
            yield Problem(
                kind, where, f"{key!r} is damaged", "it is put back from its copy at the next start"
            )
        else:
            yield broken(kind, f"the row {key[:24]!r} is damaged")
    if rows.header is None and HEADER not in rows.bad:
        yield broken("header", "there is no header row")
    elif rows.header is not None and rows.header.shard != folder.name.split(".")[0]:
        yield Problem("header", where, f"is of shard {rows.header.shard!r}", "give the folder its name back")
    state = rows.state
    if state is None:
        if STATE not in rows.bad:
            yield broken("state", "there is no state row")
        return
    if state.txn != meta.txn:
        yield broken(
            "state", f"transaction {meta.txn} holds the state of {state.txn}: a meta page is damaged"
        )
    if state.rows_sum != rows.total:
        yield broken("row", "rows are lost, or others than those that were written last")
    if not state.tail_seq <= state.next_seq:
        yield broken("state", f"samples {state.tail_seq} to {state.next_seq} cannot be")
    if state.counters.get("samples", state.next_seq) != state.next_seq:
        yield Problem(
            "state", where, f"counts {state.counters['samples']} samples, holds seqs to {state.next_seq}"
        )
    yield from _check_windows(where, rows.windows, state)
    wanted = range(state.dead_first, state.dead_next)
    if sorted(rows.letters) != list(wanted) or sum(rows.letters.values()) != state.dead_bytes:
        yield Problem("row", where, f"{len(rows.letters)} dead letters, the state says {len(wanted)}")


def _check_windows(where: str, windows: dict[int, ClosedWindow], state: RingState) -> Iterator[Problem]:
    """Closed windows follow each other and the open one follows them."""
    for number, row in windows.items():
        if number != row.window or row.samples != row.last_seq - row.first_seq + 1:
            yield Problem("window", where, f"window {number} has edges that cannot be")
    edges = [(row.window, row.first_seq, row.last_seq) for _, row in sorted(windows.items())]
    edges.append((state.window.window, state.window.first_seq, state.next_seq - 1))
    for (number, _, last), (after, first, _) in itertools.pairwise(edges):
        if after != number + 1 or first != last + 1:
            yield Problem("window", where, f"window {after} does not follow window {number}")
    if state.window.first_seq + state.window.samples != state.next_seq:
        words = f"the open window {state.window.window} does not reach the newest sample"
        yield Problem("window", where, words)


def _copy_is_whole(folder: Path, key: bytes) -> bool:
    return len(key) == U32.size and read_dictionary_file(folder, _number(key, U32)) is not None


class _BlockWalk:
    """Checks blocks from the newest to the oldest, over as many snapshots as it takes."""

    def __init__(self, folder: Path, header: RingHeader, state: RingState, rows: RingRows) -> None:
        self._where = f"ring {folder.name}"
        self._folder, self._header, self._state, self._rows = folder, header, state, rows
        self._end = state.next_seq  # of the block that comes next; a block reaches to the one after it
        self._total = self._snapshots = self._blocks = 0
        self._resumed = False  # the next block is the first of a later snapshot
        self._problems: list[Problem] = []
        self._dictionaries: dict[int, bool] = {0: True}

    def go_on(self, file: PageFile, meta: Meta, start: bytes, deadline: float, progress: Progress) -> bytes:
        """Check blocks from a key on until a deadline. Returns: the key to go on at, b"" at the end."""
        self._snapshots += 1
        self._resumed = self._snapshots > 1
        tree = meta.main
        for item in items(
            file, tree.root, last_page=meta.last_page, depth=tree.depth, start=start, wanted=lambda key: False
        ):
            if item.key[:1] != BLOCKS:
                continue
            self._check(item, file.read(item.at, item.size))
            self._blocks += 1
            progress("blocks", self._blocks)
            if time.monotonic() > deadline:
                return item.key + b"\0"
        return b""

    def finish(self) -> list[Problem]:
        """What was wrong with all of them."""
        if self._snapshots > 1:
            return self._problems  # the oldest may have been evicted meanwhile
        if self._end > self._state.tail_seq:
            words = f"samples {self._state.tail_seq} to {self._end - 1} are missing"
            self._bad(self._state.tail_seq, words)
        elif self._total != self._state.blocks_sum and not self._problems:
            words = "a block is not the one that was written last"
            self._problems.append(Problem("block", self._where, words, "old content may be back"))
        return self._problems

    def _check(self, item: Item, data: bytes) -> None:
        if len(item.key) != U64.size or not self._state.tail_seq <= seq_of(item.key) < self._end:
            self._bad(self._end, f"a block where none belongs, under the key {item.key[:24]!r}")
            return
        seq, end, resumed = seq_of(item.key), self._end, self._resumed
        self._end, self._resumed = seq, False
        try:
            header = verify_block(data)
            self._total ^= block_checksum(data)
            if block_key(header.first_seq) != item.key or header.block_bytes != item.size:
                raise CorruptBlockError(f"holds the block of seq {header.first_seq}")
            # Merged since the last snapshot, a block may hold what was looked at there.
            if header.last_seq + 1 != end and not (resumed and header.last_seq >= end):
                raise CorruptBlockError(f"ends at seq {header.last_seq}, the next block begins at {end}")
            if header.tokenizer_id != self._header.tokenizer_id:
                raise CorruptBlockError(f"is of tokenizer {header.tokenizer_id}")
            if not self._dictionary(header.dictionary):
                raise CorruptBlockError(f"needs dictionary {header.dictionary:08x}, which is lost")
        except StorageError as error:
            self._bad(seq, str(error))

    def _dictionary(self, number: int) -> bool:
        if number not in self._dictionaries:
            copy = read_dictionary_file(self._folder, number)
            self._dictionaries[number] = number in self._rows.dictionaries or copy is not None
        return self._dictionaries[number]

    def _bad(self, seq: int, words: str) -> None:
        where = f"{self._where}, block at seq {seq}"
        self._problems.append(Problem("block", where, words, _QUARANTINE, "quarantine"))


# -- the registry ------------------------------------------------------------------------------------

_REGISTRY_ROWS: dict[bytes, Any] = {b"U": UpdateRow, b"V": VersionRow, b"A": AuditRow, b"a": ActivePointer}


class _RegistryState(msgspec.Struct):
    txn: int
    rows_sum: int


def check_registry(folder: Path, *, live: bool) -> list[Problem]:
    """Verify the registry: pages, seals and their sum. Live as in `check_ring`.

    Raises: FormatTooNewError.
    """
    if not (folder / "data.mdb").exists():
        return [_missing(folder)]
    with _snapshot(folder, live=live) as (file, meta, problems):
        if meta is None:
            return problems
        path = str(folder / "data.mdb")
        for found in check_pages(file, meta):
            words = f"page {found.page}: {found.words}"
            problems.append(Problem(found.kind, path, words, _REBUILD, "rebuild"))
        rows = items(file, meta.main.root, last_page=meta.last_page, depth=meta.main.depth)
        return problems + list(_check_registry_rows(rows, meta, str(folder)))


def _check_registry_rows(found: Iterator[Item], meta: Meta, where: str) -> Iterator[Problem]:
    def broken(words: str) -> Problem:
        return Problem("registry", where, words, _REBUILD, "rebuild")

    total, state, header = 0, None, False
    for item in found:
        assert item.value is not None
        try:
            if item.key == b"H":
                header = bool(open_header(item.value, REGISTRY_FORMAT, Path(where)))
                continue
            value = unseal(item.key, item.value)
            if item.key == b"s":
                state = msgspec.msgpack.decode(value, type=_RegistryState)
                continue
            total ^= sum_of(item.value)
            if form := _REGISTRY_ROWS.get(item.key[:1]):
                msgspec.msgpack.decode(value, type=form)
        except FormatTooNewError:
            raise  # no damage: an older program must not touch it
        except (StorageError, msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError):
            yield broken(f"the row {item.key[:24]!r} is damaged")
    if not header:
        yield broken("there is no header row")
    if state is None:
        yield broken("there is no state row")
    elif state.txn != meta.txn:
        yield broken(f"transaction {meta.txn} holds the state of {state.txn}: a meta page is damaged")
    elif state.rows_sum != total:
        yield broken("rows are lost, or others than those that were written last")


# -- the folder --------------------------------------------------------------------------------------


def check_folder(
    folder: DataFolder, *, live: bool, progress: Progress = lambda what, n: None
) -> list[Problem]:
    """Verify everything in a data folder but versions, which `adapters.versions.verify` checks.

    Args:
        folder: The data folder.
        live: Whether Edgewater may be running on it.
        progress: Told what is looked at and how much of it was.
    Returns: What is wrong.
    """
    problems = list(_strays(folder))
    for path in sorted(folder.ring.iterdir()) if folder.ring.is_dir() else ():
        if path.is_dir() and "." not in path.name:
            problems += check_ring(path, live=live, progress=progress)
    if folder.registry.is_dir():
        found = list(_access(folder.registry, {"data.mdb", "lock.mdb"}))
        problems += found
        if not any(problem.kind == "access" for problem in found):
            problems += check_registry(folder.registry, live=live)
    files = [*folder.updates.glob("*/samples.blocks"), *folder.accepted.glob("*.blocks")]
    for count, path in enumerate(sorted(files), 1):
        progress("window files", count)
        problems += _check_window_file(path)
    return problems


def _check_window_file(path: Path) -> Iterator[Problem]:
    claimed = path.name == "samples.blocks"
    try:
        decode_blocks(path.read_bytes())
    except FileNotFoundError:
        return  # a running trainer was just done with it
    except (StorageError, ValueError, OSError) as error:
        hint = (
            "the trainer gives the window up after five tries; nothing damaged is trained on"
            if claimed
            else "delete it: its samples are no longer rehearsed"
        )
        yield Problem("file", str(path), str(error), hint)


_PARTS = {
    "ring", "registry", "registry.v1", "versions", "updates", "accepted", "cache", "keys", "run",
    "quarantine", "exports", "captures", "edgewater.json", "report.json", "replay.json", "lost+found",
}  # fmt: skip


def _strays(folder: DataFolder) -> Iterator[Problem]:
    """Files that nothing of ours wrote, and names that somebody else could change."""
    yield from _access(folder.path, _PARTS)
    for part in (folder.versions, folder.updates, folder.accepted, folder.keys, folder.run):
        if part.is_dir():
            yield from _access(part, None)
    for path in sorted(folder.ring.iterdir()) if folder.ring.is_dir() else ():
        if not path.is_dir() or path.is_symlink():
            yield Problem("stray", str(path), "is no ring", "move it away")
        elif path.name.endswith(".new"):
            words = "was left by a crash while a ring was made"
            yield Problem("stray", str(path), words, "the next start of ingest takes care of it")


def _access(folder: Path, known: set[str] | None, prefix: str = "") -> Iterator[Problem]:
    """Symlinks, strange owners and modes in a folder; names in it that are not `known`, if that is given."""
    for path in (folder, *sorted(folder.iterdir())):
        try:
            info = path.lstat()
        except FileNotFoundError:
            continue  # gone since it was listed
        if stat.S_ISLNK(info.st_mode):
            yield Problem("access", str(path), "is a symbolic link", "name the real file or folder")
        elif info.st_uid != os.geteuid():
            hint = "run as its owner or chown it"
            yield Problem("access", str(path), f"belongs to user {info.st_uid}, not {os.geteuid()}", hint)
        elif info.st_mode & 0o022 and not stat.S_ISSOCK(info.st_mode):
            yield Problem("access", str(path), "can be written by others", "chmod go-w it")
        elif not (
            known is None
            or path == folder
            or path.name in known
            or (prefix and path.name.startswith(prefix))
            or path.name.endswith(".tmp")
        ):
            yield Problem("stray", str(path), "was not written by Edgewater", "move it away")


_REBUILD = "stop ingest and run 'edgewater doctor --repair'; the next start of ingest does the same"
_QUARANTINE = "its samples are lost; 'edgewater doctor --repair' puts blanks in their place"
