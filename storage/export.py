"""Back a ring up into one file while it is written, and make a ring of such a file."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import lmdb
import msgspec

from storage.block import decode_block, read_header
from storage.durable import fsync_folder, remove_folder, rename_durably
from storage.env import create_environment, open_environment
from storage.errors import CorruptBlockError, StorageError
from storage.ring import RING_FORMAT, Ring
from storage.ring_file import BLOCK, DamagedFileError, RingFileWriter, read_ring_file
from storage.ring_writer import HIGH_WATER
from storage.walk import walk
from storage.windows import OpenWindow, RingHeader, RingState

__all__ = ["Exported", "Imported", "export_ring", "export_to_file", "import_ring"]

Progress = Callable[[float, str], None]  # share done, numbers behind it

_STATE, _HEADER = b"s", b"H"
_SMALL = (b"H", b"W", b"p", b"r")  # copied together with the state, in one transaction
_U64 = struct.Struct(">cQ")
_COPY_BYTES = 8 << 20  # a transaction of the import
_PAGE_BYTES = 4096


class Exported(msgspec.Struct, frozen=True):
    """What an export holds.

    Attributes:
        first_seq, next_seq: Its samples, the second not included.
        blocks, bytes: Blocks in the file, and its size.
        evicted: Samples that the ring evicted before the export reached them, so that it has them not.
    """

    first_seq: int
    next_seq: int
    blocks: int
    bytes: int
    evicted: int

    @property
    def samples(self) -> int:
        """Samples in the file."""
        return self.next_seq - self.first_seq


class Imported(msgspec.Struct, frozen=True):
    """What an import made.

    Attributes:
        first_seq, next_seq: Samples of the new ring, the second not included.
        left_out: Older samples of the file, for which the new ring has no room.
        window: Number of the open window.
    """

    first_seq: int
    next_seq: int
    blocks: int
    left_out: int
    window: int


def _no_progress(share: float, words: str) -> None:
    """Nobody looks."""


# -- export -----------------------------------------------------------------------------------------


def export_to_file(ring: Ring, path: Path, progress: Progress = _no_progress) -> Exported:
    """Export into a file that only its owner may read, replacing an older one when it is complete.

    Raises: OSError as the system reports it, StorageError; an older file is then still in place.
    """
    # 1. path.tmp written and synced.    Crash: a stray .tmp, overwritten by the next export.
    # 2. Renamed over path, synced.      Crash: the older export or this one, each complete.
    if path.exists() and not path.is_file():
        raise StorageError("is not a file", path=path, hint="name a file, or - for standard output")
    tmp = path.with_name(path.name + ".tmp")
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, 0o600)  # an older .tmp keeps its mode, and the file holds the dedup secret
            done = export_ring(ring, file, progress)
            os.fsync(fd)
        rename_durably(tmp, path)
    except BaseException:
        with suppress(OSError):
            tmp.unlink()
        raise
    return done


def export_ring(ring: Ring, out: BinaryIO, progress: Progress = _no_progress) -> Exported:
    """Write all that a ring holds at this moment, while ingest goes on writing it.

    State, windows, positions and references come from one snapshot; dead letters and blocks are
    copied after it, in transactions that last milliseconds: what exists of them never changes its number.
    What ingest evicts meanwhile may be missing at the old end, never in between.
    Raises: CorruptBlockError on a damaged block.
    """
    state, rows = _snapshot(ring)
    writer = RingFileWriter(out, RING_FORMAT)
    for key, value in rows:
        writer.row(key, value)
    state = _export_dead_letters(ring, writer, state)
    first_seq, expected, blocks = state.tail_seq, state.tail_seq, 0
    for seq, data in walk(ring, b"b", state.tail_seq, state.next_seq, bytes):
        if seq != expected:  # eviction overtook the export: what it has before here is of no use
            first_seq, blocks = seq, 0
        expected = _checked(data, seq) + 1
        writer.block(data)
        blocks += 1
        progress((expected - state.tail_seq) / (state.next_seq - state.tail_seq), f"{writer.bytes:,} bytes")
    if expected != state.next_seq:
        first_seq, blocks = state.next_seq, 0
    kept = msgspec.structs.replace(state, tail_seq=first_seq)
    writer.row(_STATE, msgspec.msgpack.encode(kept))
    return Exported(first_seq, state.next_seq, blocks, writer.finish(), first_seq - state.tail_seq)


def _snapshot(ring: Ring) -> tuple[RingState, list[tuple[bytes, bytes]]]:
    """The state and all rows that change in place, as of one moment."""
    with ring._reading() as txn:
        found = txn.get(_STATE)
        rows = [row for prefix in _SMALL for row in _rows_of(txn, prefix)]
    return msgspec.msgpack.decode(found, type=RingState) if found else RingState(), rows


def _rows_of(txn: lmdb.Transaction, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    cursor = txn.cursor()
    found = cursor.set_range(prefix)
    while found and cursor.key()[:1] == prefix:
        yield bytes(cursor.key()), bytes(cursor.value())
        found = cursor.next()


def _export_dead_letters(ring: Ring, writer: RingFileWriter, state: RingState) -> RingState:
    first, size = state.dead_next, 0
    for number, data in walk(ring, b"D", state.dead_first, state.dead_next, bytes):
        first, size = min(first, number), size + len(data)
        writer.row(_U64.pack(b"D", number), data)
    return msgspec.structs.replace(state, dead_first=first, dead_bytes=size)


def _checked(data: bytes, seq: int) -> int:
    """The last seq of a block whose bytes and key are right. Raises: CorruptBlockError."""
    header = read_header(data)
    decode_block(data)
    if header.first_seq != seq:
        raise CorruptBlockError(f"the block at seq {seq} says that it begins at {header.first_seq}")
    return header.last_seq


# -- import -----------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where in the file a block lies."""

    first_seq: int
    last_seq: int
    offset: int
    bytes: int


class _Contents(NamedTuple):
    """A file that was read to its end and found right."""

    header: RingHeader
    state: RingState
    rows: dict[bytes, bytes]
    blocks: list[_Place]


def import_ring(
    file: BinaryIO, folder: Path, max_bytes: int, *, next_window: int = 0, progress: Progress = _no_progress
) -> Imported:
    """Make a ring of an export, at a place where there is none.

    Args:
        file: The export, open at its start; it is read twice.
        folder: Folder of the new ring.
        max_bytes: Its size; where the file holds more, the oldest samples are left out.
        next_window: Lowest number that the open window may have. If it is higher than the file's, the
            open window starts anew at the end: its samples belong to a window that was decided already.
    Raises: DamagedFileError, FormatTooNewError, StorageError; no ring is made then.
    """
    # 1. The file is read and checked to its end.              Crash: nothing happened.
    # 2. folder.import.new/ is made, rows and blocks added.    Crash: a stray folder, deleted by the next.
    # 3. Renamed to folder, synced.                            Crash: no ring, or this one, complete.
    if folder.exists():
        raise StorageError(
            "there is a ring already", path=folder, hint="import into a new data_dir, or move this ring away"
        )
    contents = _read_contents(file, progress)
    aside = folder.with_name(folder.name + ".import.new")
    remove_folder(aside)
    try:
        create_environment(aside, max_bytes, {_HEADER: contents.rows[_HEADER]})
        env = open_environment(aside)
        try:
            done = _fill(env, file, contents, next_window, progress)
        finally:
            env.close()
        (aside / "lock.mdb").unlink(missing_ok=True)
        fsync_folder(aside)
        rename_durably(aside, folder)
    except BaseException:
        remove_folder(aside)
        raise
    return done


def _read_contents(file: BinaryIO, progress: Progress) -> _Contents:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    rows: dict[bytes, bytes] = {}
    blocks: list[_Place] = []
    for record in read_ring_file(file, RING_FORMAT):
        if record.kind == BLOCK:
            first = read_header(record.value).first_seq
            last = _checked(record.value, first)
            blocks.append(_Place(first, last, file.tell() - len(record.value), len(record.value)))
        else:
            rows[record.key] = record.value
        progress(file.tell() / size, f"{file.tell():,} bytes checked")
    try:
        header = msgspec.msgpack.decode(rows[_HEADER], type=RingHeader)
        state = msgspec.msgpack.decode(rows.pop(_STATE), type=RingState)
    except (KeyError, msgspec.MsgspecError) as error:
        raise DamagedFileError(f"it lacks a header or a state: {error}") from error
    blocks = [place for place in blocks if place.first_seq >= state.tail_seq]  # eviction overtook the others
    ends = [state.tail_seq, *(place.last_seq + 1 for place in blocks)]
    if [place.first_seq for place in blocks] != ends[:-1] or ends[-1] != state.next_seq:
        raise DamagedFileError("its blocks are not the samples that it states", hint="export it again")
    return _Contents(header, state, rows, blocks)


def _fill(
    env: lmdb.Environment, file: BinaryIO, contents: _Contents, next_window: int, progress: Progress
) -> Imported:
    map_bytes = int(env.info()["map_size"])
    state = _with_room_for_letters(contents, map_bytes // 16)
    with env.begin(write=True) as txn:
        for key, value in contents.rows.items():
            txn.put(key, value)
        stat = txn.stat()
        used = (stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]) * stat["psize"]
    blocks = _newest_that_fit(contents.blocks, int(HIGH_WATER * map_bytes) - used)
    if contents.blocks and not blocks:
        raise StorageError("the ring would be too small", hint="raise ring.max_bytes or --max-bytes")
    first_seq = blocks[0].first_seq if blocks else state.next_seq
    state = msgspec.structs.replace(state, tail_seq=first_seq)
    if next_window > state.window.window:
        state = msgspec.structs.replace(state, window=OpenWindow(next_window, state.next_seq))
    copied, total = 0, sum(place.bytes for place in blocks) or 1
    for chunk in _chunks(blocks):
        with env.begin(write=True) as txn:
            for place in chunk:
                file.seek(place.offset)
                data = file.read(place.bytes)
                _checked(data, place.first_seq)
                txn.put(_U64.pack(b"b", place.first_seq), data)
                copied += place.bytes
        progress(copied / total, f"{copied:,} bytes copied")
    with env.begin(write=True) as txn:
        txn.put(_STATE, msgspec.msgpack.encode(state))
    left_out = first_seq - contents.state.tail_seq
    return Imported(first_seq, state.next_seq, len(blocks), left_out, state.window.window)


def _with_room_for_letters(contents: _Contents, limit: int) -> RingState:
    """Take the oldest dead letters out until the rest fits into a ring's share for them."""
    state = contents.state
    first, size = state.dead_first, state.dead_bytes
    while size > limit and first < state.dead_next:
        size -= len(contents.rows.pop(_U64.pack(b"D", first), b""))
        first += 1
    return msgspec.structs.replace(state, dead_first=first, dead_bytes=size)


def _newest_that_fit(blocks: Sequence[_Place], room: int) -> list[_Place]:
    taken = 0
    for block in reversed(blocks):
        room -= _room_of(block.bytes)
        if room < 0:
            break
        taken += 1
    return list(blocks[len(blocks) - taken :])


def _room_of(block_bytes: int) -> int:
    """What a block takes of the map, bytes: its share of a leaf page, or pages of its own."""
    node = block_bytes + 20  # node header, key, and the node's place in the page
    if node <= _PAGE_BYTES // 2 - 10:
        return _PAGE_BYTES // ((_PAGE_BYTES - 16) // node)
    return -(-(block_bytes + 16) // _PAGE_BYTES) * _PAGE_BYTES + 32


def _chunks(blocks: Sequence[_Place]) -> Iterator[list[_Place]]:
    chunk: list[_Place] = []
    for block in blocks:
        chunk.append(block)
        if sum(place.bytes for place in chunk) >= _COPY_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
