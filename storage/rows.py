"""Sealed rows: LMDB has no checksums, so each row carries its own, and their sum tells of lost ones.

A row is its value and 8 bytes of blake2b over key and value: a flipped bit in either is seen when it is
read. The XOR of all seals, kept in a row that every transaction overwrites, tells of rows that vanished, came
back from an earlier transaction, or sit under another key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import lmdb

from storage.errors import CorruptRingError

__all__ = ["SEAL_BYTES", "SealedRows", "rows_from", "seal", "sum_of", "unseal"]

SEAL_BYTES = 8


def seal(key: bytes, value: bytes) -> bytes:
    """A value as it is stored under a key."""
    return value + _seal_of(key, value)


def unseal(key: bytes, data: bytes | memoryview) -> bytes:
    """The value of a stored row.

    Raises: CorruptRingError if a bit of key or value differs from what was written.
    """
    data = bytes(data)
    value = data[:-SEAL_BYTES]
    if data[-SEAL_BYTES:] != _seal_of(key, value):
        raise CorruptRingError(f"the row {key[:24]!r} is damaged", hint="run 'edgewater doctor'")
    return value


def sum_of(data: bytes | memoryview) -> int:
    """What a stored row adds to the sum of its table: its seal as a number."""
    return int.from_bytes(data[-SEAL_BYTES:], "big")


def rows_from(txn: lmdb.Transaction, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of the rows whose keys begin with a prefix, in order, unsealed.

    Args:
        start: First key to look at; the prefix itself if empty.
    Raises: CorruptRingError at a damaged row.
    """
    cursor = txn.cursor()
    found = cursor.set_range(start or prefix)
    while found:
        key = bytes(cursor.key())
        if not key.startswith(prefix):
            return
        yield key, unseal(key, cursor.value())
        found = cursor.next()


class SealedRows:
    """The rows of one write transaction, with their sum.

    Args:
        txn: The transaction.
        total: The sum before it.
    """

    def __init__(self, txn: lmdb.Transaction, total: int) -> None:
        self._txn = txn
        self.total = total
        self.changed = False

    def get(self, key: bytes) -> bytes | None:
        """The value under a key. Raises: CorruptRingError."""
        found = self._txn.get(key)
        return None if found is None else unseal(key, found)

    def put(self, key: bytes, value: bytes) -> None:
        """Write a row, in place of the one under its key if there is one."""
        self._forget(key)
        self.changed = True
        data = seal(key, value)
        self.total ^= sum_of(data)
        self._txn.put(key, data)

    def delete(self, key: bytes) -> None:
        """Delete the row under a key, if there is one."""
        if self._forget(key):
            self.changed = True
            self._txn.delete(key)

    def _forget(self, key: bytes) -> bool:
        found = self._txn.get(key)
        if found is None:
            return False
        self.total ^= sum_of(found)
        return True


def _seal_of(key: bytes, value: bytes) -> bytes:
    # The key's length first: no two pairs of key and value read alike.
    return hashlib.blake2b(b"".join((bytes([len(key) >> 8, len(key) & 255]), key, value)),
                           digest_size=SEAL_BYTES).digest()  # fmt: skip
