"""Sealed rows: LMDB has no checksums, so each row carries its own, and their sum tells of lost ones.

A row is its value and 8 bytes of blake2b over key and value: a flipped bit in either is seen when it is
read. The XOR of all seals, kept in a row that every transaction overwrites, tells of rows that vanished, came
back from an earlier transaction, or sit under another key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from storage.errors import CorruptRingError, FormatTooNewError

__all__ = [
    "SEAL_BYTES",
    "SealedRows",
    "open_header",
    "rows_from",
    "seal",
    "seal_header",
    "sum_of",
    "unseal",
]

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


def seal_header(header: msgspec.Struct) -> bytes:
    """A header row: a map with a field `check`, the blake2b-64 of the map where that field is empty.

    Inside the row, not behind it as in all others, and over whatever fields there are: every version of
    Edgewater must be able to tell the format of any other's files from damage.
    """
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(header)) | {"check": b""}
    return msgspec.msgpack.encode(fields | {"check": _digest(msgspec.msgpack.encode(fields))})


def open_header(data: bytes, newest: int, folder: Path) -> dict[str, Any]:
    """The fields of a header row, checked; of format 1, which had no check, as they are.

    Args:
        newest: The newest format that is known.
    Raises: CorruptRingError, FormatTooNewError.
    """
    try:
        fields = msgspec.msgpack.decode(data, type=dict[str, Any])
        check = fields.get("check")
        whole = check == _digest(msgspec.msgpack.encode(fields | {"check": b""}))
        if whole and fields["format"] > newest:
            words = f"format {fields['format']} is newer than {newest}"
            raise FormatTooNewError(words, path=folder, hint="upgrade Edgewater")
        if whole or (fields["format"] == 1 and check is None):
            return fields
        reason = "its check is wrong"
    except (msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError) as error:
        reason = str(error)
    raise CorruptRingError(f"its header is damaged: {reason}", path=folder, hint="run 'edgewater doctor'")


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
    return _digest(b"".join((bytes([len(key) >> 8, len(key) & 255]), key, value)))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=SEAL_BYTES).digest()
