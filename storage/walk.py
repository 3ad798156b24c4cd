"""Walk a ring while it is written, without holding a transaction open."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from storage.block import read_header
from storage.errors import CorruptBlockError
from storage.ring import Ring
from storage.ring_writer import U64, blocks_from
from storage.rows import rows_from

__all__ = ["walk_blocks", "walk_letters"]

CHUNK_BYTES = 1 << 20
CHUNK_S = 0.05  # a reader holds back the reuse of pages, so that the ring would fill up behind it
T = TypeVar("T")


def walk_blocks(
    ring: Ring, seq: int, stop: int, take: Callable[[bytes | memoryview], T]
) -> Iterator[tuple[int, T]]:
    """Yield the blocks that hold samples from `seq` to before `stop`, the oldest first.

    Ingest goes on meanwhile: what it evicts before it is reached is left out, and where it merges blocks, the
    next one may begin before the end of the last one, or end after `stop`.

    Args:
        ring: A ring, opened either way.
        take: What to keep of a block, called inside the transaction.
    Yields: (seq in its key, what `take` returned).
    """
    more = True
    while more and seq < stop:
        chunk: list[tuple[int, T]] = []
        size, until, more = 0, time.monotonic() + CHUNK_S, False
        with ring.reading() as txn:
            for key, block in blocks_from(txn, seq):
                if key >= stop:
                    break
                if chunk and (size >= CHUNK_BYTES or time.monotonic() > until):
                    more = True
                    break
                end = _end_of(key, block)
                if end <= seq:
                    continue  # it was had already, or lies before
                chunk.append((key, take(block)))
                size, seq = size + len(block), end
        yield from chunk


def walk_letters(ring: Ring, number: int, stop: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values of the dead letters from a number to before `stop`.

    Raises: CorruptRingError at a damaged row.
    """
    more = True
    while more and number < stop:
        chunk: list[tuple[bytes, bytes]] = []
        size, more = 0, False
        with ring.reading() as txn:
            for key, value in rows_from(txn, b"D", U64.pack(b"D", number)):
                if size >= CHUNK_BYTES or U64.unpack(key)[1] >= stop:
                    more = size >= CHUNK_BYTES
                    break
                chunk.append((key, value))
                size, number = size + len(value), U64.unpack(key)[1] + 1
        yield from chunk


def _end_of(key: int, block: bytes | memoryview) -> int:
    """The seq after a block, as far as a damaged one tells."""
    try:
        header = read_header(block)
    except CorruptBlockError:
        return key + 1
    return header.last_seq + 1 if header.first_seq == key else key + 1
