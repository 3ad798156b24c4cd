"""Build a ring aside from rows and blocks from elsewhere: an export, an older format, a damaged ring."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import msgspec

from storage.block import read_header
from storage.dictionary import Dictionary, write_dictionary_file
from storage.durable import fsync_folder, remove_folder
from storage.env import create_environment, open_environment
from storage.ring_header import RING_FORMAT, first_rows
from storage.ring_writer import U64, RingWriter, encode_runs
from storage.samples import Samples
from storage.windows import QuarantineRow, RingHeader, RingState

__all__ = [
    "FILLED",
    "blank_blocks",
    "build_ring",
    "newest_first",
    "newest_that_fit",
    "quarantine_row",
    "room_for",
]

FILLED = 0.80  # of the map may be filled with blocks; the oldest beyond it are left out
_COPY_BYTES = 8 << 20  # of blocks in one transaction
_BLANKS_AT_ONCE = 65_535
_PAGE_BYTES = 4096


def build_ring(
    aside: Path,
    header: RingHeader,
    state: RingState,
    rows: Mapping[bytes, bytes],
    blocks: Iterable[tuple[int, bytes]],
    map_bytes: int,
) -> None:
    """Make a whole and synced ring under a name that nothing looks for yet; an older try is deleted.

    Args:
        aside: Its folder, to be renamed into place.
        state: Its state; the tail and all sums are taken from what it really holds.
        rows: All rows but header, state and blocks, not sealed, by key.
        blocks: First seq and bytes, the newest first: appended in the order of their keys they fill LMDB's
            pages; split in any other way these stay half empty, and a ring that was full would not fit.
        map_bytes: Size of its file.
    Raises: StorageError if the disk has no room for it.
    """
    header = msgspec.structs.replace(header, format=RING_FORMAT)
    remove_folder(aside)
    create_environment(aside, map_bytes, first_rows(header, RingState()), written=True)

    def encode(samples: Samples, *, arrival: float, revision: int = 0) -> list[tuple[int, bytes]]:
        return encode_runs(samples, header.tokenizer_id, arrival, None, revision)

    written = msgspec.structs.replace(state, txn=0, rows_sum=0, blocks_sum=0)
    with closing(open_environment(aside)) as env:
        # In the order of their keys, rows then blocks, newest first and appended: so LMDB fills its pages.
        for part in itertools.chain([None], _transactions(blocks)):
            with env.begin(write=True, buffers=True) as txn:
                writer = RingWriter(txn, written, map_bytes, encode, lambda number: None)
                if part is None:
                    for key, value in sorted(rows.items()):
                        writer.rows.put(key, value)
                for first_seq, block in part or ():
                    writer.put_block(first_seq, block, append=True)
                written = writer.finish(writer.state)
    for key, value in rows.items():
        if key[:1] == b"Z":
            write_dictionary_file(aside, Dictionary(value))
    (aside / "lock.mdb").unlink(missing_ok=True)
    fsync_folder(aside)


def _transactions(blocks: Iterable[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    part: list[tuple[int, bytes]] = []
    size = 0
    for block in blocks:
        part.append(block)
        size += len(block[1])
        if size >= _COPY_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def blank_blocks(
    first_seq: int, end_seq: int, tokenizer_id: str, arrival: float
) -> Iterator[tuple[int, bytes]]:
    """Blocks of blank samples in place of lost ones, so that all others keep their seqs."""
    for at in range(first_seq, end_seq, _BLANKS_AT_ONCE):
        blanks = Samples.blank(at, min(_BLANKS_AT_ONCE, end_seq - at))
        yield from encode_runs(blanks, tokenizer_id, arrival, None)


def newest_first(
    read: Callable[[int, int], bytes],
    good: Iterable[tuple[int, int, int]],
    holes: Iterable[tuple[int, int]],
    tokenizer_id: str,
    arrival: float,
) -> Iterator[tuple[int, bytes]]:
    """Blocks as they lie in an old file, and blanks in the holes between them, the newest first.

    Args:
        read: Bytes at a place, so many of them.
        good: First seq, place and size of each block.
        holes: First and end seq of each.
        arrival: Stream time of blanks behind the newest block, seconds.
    """
    parts = [(first, at, size) for first, at, size in good] + [(first, end, 0) for first, end in holes]
    for first, second, size in sorted(parts, reverse=True):
        if size:
            block = read(second, size)
            arrival = read_header(block).arrival  # blanks are as old as what follows them
            yield first, block
        else:
            yield from reversed(list(blank_blocks(first, second, tokenizer_id, arrival)))


def quarantine_row(first_seq: int, end_seq: int, reason: str, at: float) -> tuple[bytes, bytes]:
    """The row that tells of lost samples, key and value."""
    row = QuarantineRow(first_seq, end_seq - first_seq, reason, at)
    return U64.pack(b"Q", first_seq), msgspec.msgpack.encode(row)


def newest_that_fit(sizes: Sequence[int], rows: Mapping[bytes, bytes], map_bytes: int) -> int:
    """How many of the blocks, counted from the newest, a new ring takes.

    A little more than the high-water mark of a commit: a ring that was full fits into one of its size, and
    its next commit evicts as ever.

    Args:
        sizes: Bytes of each block, in the order of their seqs.
        rows: The rows that go beside them.
    """
    room = int(FILLED * map_bytes) - sum(room_for(len(key) + len(value)) for key, value in rows.items())
    for count, size in enumerate(reversed(sizes)):
        room -= room_for(size)
        if room < 0:
            return count
    return len(sizes)


def room_for(value_bytes: int) -> int:
    """What a value takes of the map, bytes: its share of a leaf page, or pages of its own."""
    node = value_bytes + 20  # node header, key, and the node's place in the page
    if node <= _PAGE_BYTES // 2 - 10:
        return _PAGE_BYTES // ((_PAGE_BYTES - 16) // node)
    return -(-(value_bytes + 16) // _PAGE_BYTES) * _PAGE_BYTES + 32
