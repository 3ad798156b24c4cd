"""Walk the numbered rows of a ring without holding a transaction open."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from storage.ring import Ring

__all__ = ["walk"]

CHUNK_BYTES = 1 << 20
CHUNK_S = 0.05  # a reader holds back the reuse of pages, so that the ring would fill up behind it
_U64 = struct.Struct(">cQ")
T = TypeVar("T")


def walk(
    ring: Ring, prefix: bytes, first: int, stop: int, take: Callable[[bytes | memoryview], T]
) -> Iterator[tuple[int, T]]:
    """Yield the rows from `first` to before `stop`, in order, while others write.

    Args:
        ring: A ring, opened either way.
        prefix: b"b" for blocks, b"D" for dead letters.
        take: What to keep of a value, called inside the transaction.
    Yields: (number, what `take` returned). What is evicted before it is reached is left out.
    """
    while first < stop:
        chunk: list[tuple[int, T]] = []
        size, until = 0, time.monotonic() + CHUNK_S
        with ring._reading() as txn:
            cursor = txn.cursor()
            found = cursor.set_range(_U64.pack(prefix, first))
            while found and cursor.key()[:1] == prefix and size < CHUNK_BYTES:
                number, value = _U64.unpack(cursor.key())[1], cursor.value()
                if number >= stop or (chunk and time.monotonic() > until):
                    break
                chunk.append((number, take(value)))
                size += len(value)
                found = cursor.next()
        if not chunk:
            return
        yield from chunk
        first = chunk[-1][0] + 1
