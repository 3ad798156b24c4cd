"""Back a ring up into one file while it is written, and make a ring of such a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from storage.block import BlockHeader, decode_block, encode_block, read_header, verify_block
from storage.build import blank_blocks, build_ring, newest_that_fit, quarantine_row
from storage.durable import remove_folder, rename_durably
from storage.errors import CorruptBlockError, StorageError
from storage.ring import Ring
from storage.ring_file import BLOCK, DamagedFileError, RingFileWriter, read_ring_file
from storage.ring_header import RING_FORMAT, read_ring_header
from storage.ring_writer import HEADER, STATE, U32, U64
from storage.rows import rows_from
from storage.walk import walk_blocks, walk_letters
from storage.windows import OpenWindow, RingHeader, RingState

__all__ = ["Exported", "Imported", "export_ring", "export_to_file", "import_ring"]

Progress = Callable[[float, str], None]  # share done, numbers behind it

_SMALL = (b"Q", b"W", b"Z", b"p", b"r")  # copied together with the state, in one transaction


class Exported(msgspec.Struct, frozen=True):
    """What an export holds.

    Attributes:
        first_seq, next_seq: Its samples, the second not included.
        blocks, bytes: Blocks in the file, and its size.
        evicted: Samples that the ring evicted before the export reached them, so that it has them not.
        damaged: Samples in it that are blank because their blocks are damaged.
    """

    first_seq: int
    next_seq: int
    blocks: int
    bytes: int
    evicted: int
    damaged: int

    @property
    def samples(self) -> int:
        """Samples in the file."""
        return self.next_seq - self.first_seq


class Imported(msgspec.Struct, frozen=True):
    """What an import made.

    Attributes:
        first_seq, next_seq: Samples of the new ring, the second not included.
        blocks: Blocks taken from the file.
        left_out: Older samples of the file, for which the new ring has no room.
        lost: Samples after those of the file that the registry knows of: they are blank.
        window: Number of the open window.
    """

    first_seq: int
    next_seq: int
    blocks: int
    left_out: int
    lost: int
    window: int


def _no_progress(share: float, words: str) -> None:
    """Nobody looks."""


# -- export -----------------------------------------------------------------------------------------


def export_to_file(ring: Ring, path: Path, progress: Progress = _no_progress) -> Exported:
    """Export into a file that only its owner may read, replacing an older one when it is complete.

    Raises: OSError as the system reports it, StorageError; an older file is then still in place.
    """
    # 1. path.PID.tmp written and synced. Crash: a stray .tmp.
    # 2. Renamed over path, synced.       Crash: the older export or this one, each complete.
    if path.exists() and not path.is_file():
        raise StorageError("is not a file", path=path, hint="name a file, or - for standard output")
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, 0o600)  # whatever the umask: the file holds the dedup secret
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
    copied after it, in transactions that last milliseconds: what exists of them never changes its place.
    What ingest evicts meanwhile may be missing at the old end, never in between. Damaged blocks become blank
    samples, as `Ring.quarantine` would make them.
    Raises: CorruptRingError if a row is damaged.
    """
    state, header, rows = _snapshot(ring)
    writer = RingFileWriter(out, RING_FORMAT)
    writer.row(HEADER, header)
    for key, value in rows.items():
        writer.row(key, value)
    letters = _export_letters(ring, writer, state)
    known = {key for key in rows if key[:1] == b"Z"}
    first_seq, expected, blocks, lost = state.tail_seq, state.tail_seq, 0, 0
    for piece in _pieces(ring, state):
        if piece.first_seq != expected:  # eviction overtook the export: what is before here is of no use
            first_seq, blocks, lost = piece.first_seq, 0, 0
        if piece.dictionary and (key := U32.pack(b"Z", piece.dictionary)) not in known:
            if found := ring.dictionaries.find(piece.dictionary):  # trained since the snapshot
                writer.row(key, found.data)
            known.add(key)
        if piece.damaged:
            at = state.stream_time
            writer.row(*quarantine_row(piece.first_seq, piece.end_seq, "damaged when it was exported", at))
            lost += piece.end_seq - piece.first_seq
        writer.block(piece.block)
        expected, blocks = piece.end_seq, blocks + 1
        progress((expected - state.tail_seq) / (state.next_seq - state.tail_seq), f"{writer.bytes:,} bytes")
    if expected != state.next_seq:
        first_seq, blocks, lost = state.next_seq, 0, 0
    kept = msgspec.structs.replace(
        letters, tail_seq=first_seq, lost=state.lost + lost, txn=0, rows_sum=0, blocks_sum=0
    )
    writer.row(STATE, msgspec.msgpack.encode(kept))
    return Exported(first_seq, state.next_seq, blocks, writer.finish(), first_seq - state.tail_seq, lost)


def _snapshot(ring: Ring) -> tuple[RingState, bytes, dict[bytes, bytes]]:
    """The state, the header, and all rows that change in place, as of one moment."""
    with ring.reading() as txn:
        state = ring._state_in(txn)
        rows = {key: value for prefix in _SMALL for key, value in rows_from(txn, prefix)}
        return state, bytes(txn.get(HEADER, b"")), rows


def _export_letters(ring: Ring, writer: RingFileWriter, state: RingState) -> RingState:
    first, size = state.dead_next, 0
    for key, data in walk_letters(ring, state.dead_first, state.dead_next):
        first, size = min(first, U64.unpack(key)[1]), size + len(data)
        writer.row(key, data)
    return msgspec.structs.replace(state, dead_first=first, dead_bytes=size)


class _Piece(NamedTuple):
    """A block of the export."""

    first_seq: int
    end_seq: int
    block: bytes
    dictionary: int = 0
    damaged: bool = False


def _pieces(ring: Ring, state: RingState) -> Iterator[_Piece]:
    """Blocks from the tail to the end of a snapshot, one behind the other but where eviction overtook."""
    expected = state.tail_seq
    for key, block in walk_blocks(ring, expected, state.next_seq, bytes):
        try:
            header = verify_block(block)
            if header.first_seq != key or header.last_seq < expected:
                continue
            piece = _Piece(key, header.last_seq + 1, block, header.dictionary)
            if key < expected or piece.end_seq > state.next_seq:
                piece = _cut(ring, header, block, expected, state.next_seq)
        except CorruptBlockError:
            continue
        if piece.first_seq > expected and ring.read_state().tail_seq <= expected:
            yield from _blanks(ring, header.arrival, expected, piece.first_seq)
        yield piece
        expected = piece.end_seq
    if expected < state.next_seq and ring.read_state().tail_seq <= expected:
        yield from _blanks(ring, state.stream_time, expected, state.next_seq)


def _cut(ring: Ring, header: BlockHeader, block: bytes, first_seq: int, stop: int) -> _Piece:
    """The wanted part of a block that was merged since the snapshot."""
    part = decode_block(block, ring.dictionaries.find)[max(0, first_seq - header.first_seq) :]
    part = part[: stop - part.first_seq]
    dictionary = ring.dictionaries.find(header.dictionary) if header.dictionary else None
    data = encode_block(part, header.tokenizer_id, header.arrival, dictionary, header.revision)
    return _Piece(part.first_seq, part.first_seq + len(part), data, header.dictionary)


def _blanks(ring: Ring, arrival: float, first_seq: int, end_seq: int) -> Iterator[_Piece]:
    for first, data in blank_blocks(first_seq, end_seq, ring.header.tokenizer_id, arrival):
        yield _Piece(first, read_header(data).last_seq + 1, data, damaged=True)


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
    file: BinaryIO,
    folder: Path,
    max_bytes: int,
    *,
    least_window: int = 1,
    least_seq: int = 0,
    shard: str = "",
    progress: Progress = _no_progress,
) -> Imported:
    """Make a ring of an export, at a place where there is none.

    Args:
        file: The export, open at its start; it is read twice.
        folder: Folder of the new ring.
        max_bytes: Its size; where the file holds more, the oldest samples are left out.
        least_window, least_seq: First numbers that the registry does not know. Where the file is older than
            that, the samples between are lost, thus blank, and the open window starts anew after them: no
            number is given twice.
        shard: Which shard's the file must be; empty takes any.
    Raises: DamagedFileError, FormatTooNewError, StorageError; no ring is made then.
    """
    # 1. The file is read and checked to its end.          Crash: nothing happened.
    # 2. <shard>.import.new/ made of it, synced.           Crash: a stray folder, deleted by the next import.
    # 3. Renamed to <shard>, synced.                       From here the ring is there, whole.
    if folder.exists():
        raise StorageError(
            "there is a ring already", path=folder, hint="import into a new data_dir, or move this ring away"
        )
    contents = _without_letters_beyond(_read_contents(file, progress), max_bytes // 16)
    if shard and contents.header.shard != shard:
        hint = f"import it with --shard {contents.header.shard}"
        raise StorageError(f"the file is the ring of shard {contents.header.shard}", path=folder, hint=hint)
    state, blocks = contents.state, contents.blocks
    fitting = newest_that_fit([place.bytes for place in blocks], contents.rows, max_bytes)
    if blocks and not fitting:
        raise StorageError("the ring would be too small", hint="raise ring.max_bytes or --max-bytes")
    kept = blocks[len(blocks) - fitting :]
    first_seq = kept[0].first_seq if kept else state.next_seq
    made, end = _gone_on(contents, least_window, least_seq), state.next_seq
    lost = blank_blocks(end, made.state.next_seq, contents.header.tokenizer_id, state.stream_time)
    aside = folder.with_name(folder.name + ".import.new")
    try:
        build_ring(
            aside,
            contents.header,
            made.state,
            made.rows,
            chain(reversed(list(lost)), _copied(file, kept[::-1], progress)),
            max_bytes,
        )
        rename_durably(aside, folder)
    except BaseException:
        remove_folder(aside)
        raise
    return Imported(
        first_seq, made.state.next_seq, fitting, first_seq - state.tail_seq, made.state.next_seq - end,
        made.state.window.window,
    )  # fmt: skip


def _read_contents(file: BinaryIO, progress: Progress) -> _Contents:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    rows: dict[bytes, bytes] = {}
    blocks: list[_Place] = []
    for record in read_ring_file(file, RING_FORMAT):
        if record.kind == BLOCK:
            header = verify_block(record.value)
            offset = file.tell() - len(record.value)
            blocks.append(_Place(header.first_seq, header.last_seq, offset, len(record.value)))
        else:
            rows[record.key] = record.value
        progress(file.tell() / size, f"{file.tell():,} bytes checked")
    try:
        ring_header = read_ring_header(rows.pop(HEADER), Path("the export"))
        state = msgspec.msgpack.decode(rows.pop(STATE), type=RingState)
    except (KeyError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DamagedFileError(f"it lacks a header or a state: {error}") from error
    blocks = [place for place in blocks if place.first_seq >= state.tail_seq]  # eviction overtook the others
    ends = [state.tail_seq, *(place.last_seq + 1 for place in blocks)]
    if [place.first_seq for place in blocks] != ends[:-1] or ends[-1] != state.next_seq:
        raise DamagedFileError("its blocks are not the samples that it states", hint="export it again")
    return _Contents(ring_header, state, rows, blocks)


def _without_letters_beyond(contents: _Contents, limit: int) -> _Contents:
    """Take the oldest dead letters out until the rest fits into a ring's share for them."""
    state = contents.state
    first, size = state.dead_first, state.dead_bytes
    while size > limit and first < state.dead_next:
        size -= len(contents.rows.pop(U64.pack(b"D", first), b""))
        first += 1
    return contents._replace(state=msgspec.structs.replace(state, dead_first=first, dead_bytes=size))


def _gone_on(contents: _Contents, least_window: int, least_seq: int) -> _Contents:
    """Let numbers go on behind those that the registry knows already."""
    state, rows = contents.state, dict(contents.rows)
    if least_seq > state.next_seq:
        reason = "came in after the backup that the ring was restored from"
        key, value = quarantine_row(state.next_seq, least_seq, reason, state.stream_time)
        rows[key] = value
        lost = state.lost + least_seq - state.next_seq
        counters = {**state.counters, "samples": least_seq}
        state = msgspec.structs.replace(state, next_seq=least_seq, lost=lost, counters=counters)
    if least_window > state.window.window or state.next_seq != contents.state.next_seq:
        window = OpenWindow(max(least_window, state.window.window), state.next_seq)
        if least_window > state.window.window:
            # Those before it are decided: nothing reads their rows any more, and they would leave a gap.
            rows = {key: value for key, value in rows.items() if key[:1] != b"W"}
        state = msgspec.structs.replace(state, window=window)
    return contents._replace(state=state, rows=rows)


def _copied(file: BinaryIO, places: Sequence[_Place], progress: Progress) -> Iterator[tuple[int, bytes]]:
    """The blocks, read again and checked again: the file may have changed since it was checked."""
    copied, total = 0, sum(place.bytes for place in places)
    for place in places:
        file.seek(place.offset)
        data = file.read(place.bytes)
        if verify_block(data).first_seq != place.first_seq:
            raise DamagedFileError("it changed while it was read", hint="import it again")
        yield place.first_seq, data
        copied += place.bytes
        progress(copied / total, f"{copied:,} bytes copied")
