"""A ring in one file: the format that `edgewater ring export` writes and `ring import` reads.

    offset  bytes  field
    0       8      magic "EWRING\\r\\n": the line end betrays a transfer as text
    8       2, 2   file format, 1; ring format of what is in it
    12      ...    records, each:
                     4   length of the payload
                     1   kind: "r" row, "b" block
                     8   blake2b-64 of kind, length and payload
                     ... payload: u16 key length, key and value of a row; a block as it lies in the ring
    end-56  8      magic "EWREND\\r\\n", where a record could not begin: its length would be too large
    end-48  8      records in the file
    end-40  8      u64 bytes of the whole file
    end-32  32     blake2b-256 of everything before it

Little-endian. Rows come first, in the order of their keys, then blocks in the order of their seqs; the state
row is the last record, since only then it is known which samples the file holds. Every byte is covered
twice, so a file that is cut short, damaged or has something behind its end is refused, and told where.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from storage.errors import FormatTooNewError, StorageError

__all__ = ["BLOCK", "FILE_FORMAT", "ROW", "DamagedFileError", "Record", "RingFileWriter", "read_ring_file"]

FILE_FORMAT = 1
ROW, BLOCK = b"r", b"b"
MAX_PAYLOAD = 256 << 20  # a record that claims more is damaged: nothing is allocated for it
_MAGIC, _END = b"EWRING\r\n", b"EWREND\r\n"
_HEAD = struct.Struct("<8sHH")
_RECORD = struct.Struct("<Ic8s")
_TRAILER = struct.Struct("<8sQQ")
_KEY = struct.Struct("<H")


class DamagedFileError(StorageError):
    """A ring file that is cut short, damaged, or none at all."""


class Record(NamedTuple):
    """One record: a row by its key, or a block, whose key is in it."""

    kind: bytes
    key: bytes
    value: bytes


class RingFileWriter:
    """Writes a ring file front to back, so that it can be a pipe.

    Args:
        out: Where to write.
        ring_format: Of the rows and blocks that follow.
    """

    def __init__(self, out: BinaryIO, ring_format: int) -> None:
        self._out = out
        self._digest = hashlib.blake2b(digest_size=32)
        self.records = self.bytes = 0
        self._write(_HEAD.pack(_MAGIC, FILE_FORMAT, ring_format))

    def row(self, key: bytes, value: bytes) -> None:
        """Add a row."""
        self._record(ROW, _KEY.pack(len(key)) + key + value)

    def block(self, data: bytes) -> None:
        """Add a block."""
        self._record(BLOCK, data)

    def finish(self) -> int:
        """Write the trailer; without it the file is refused. Returns: bytes of the file."""
        size = self.bytes + _TRAILER.size + self._digest.digest_size
        self._write(_TRAILER.pack(_END, self.records, size))
        self._write(self._digest.digest())
        self._out.flush()
        return self.bytes

    def _record(self, kind: bytes, payload: bytes) -> None:
        self._write(_RECORD.pack(len(payload), kind, _checksum(kind, payload)))
        self._write(payload)
        self.records += 1

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._out.write(data)
        self.bytes += len(data)


class _Source:
    """Reads exactly, digests what it read, and says where it stopped."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.blake2b(digest_size=32)
        self.at = 0

    def take(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise DamagedFileError(
                f"the file is cut short at byte {self.at + len(data)}", hint="copy or export it again"
            )
        self.digest.update(data)
        self.at += count
        return data


def read_ring_file(file: BinaryIO, max_ring_format: int) -> Iterator[Record]:
    """Yield the records of a ring file, each checked; the last check is behind the last record.

    Args:
        file: Open at its start.
        max_ring_format: Newest ring format that the caller understands.
    Raises: DamagedFileError, FormatTooNewError.
    """
    source, records = _Source(file), 0
    magic, file_format, ring_format = _HEAD.unpack(source.take(_HEAD.size))
    if magic != _MAGIC:
        raise DamagedFileError("is not a ring export", hint="name a file that `edgewater ring export` wrote")
    if file_format > FILE_FORMAT or ring_format > max_ring_format:
        raise FormatTooNewError(
            f"ring file format {file_format}.{ring_format} is newer than {FILE_FORMAT}.{max_ring_format}",
            hint="upgrade Edgewater",
        )
    while (head := source.take(_RECORD.size))[: len(_END)] != _END:
        yield _record(source, head)
        records += 1
    trailer = head + source.take(_TRAILER.size - len(head))
    found = source.digest.digest()
    if source.take(len(found)) != found or trailer != _TRAILER.pack(_END, records, source.at):
        raise DamagedFileError("its checksum over the whole is wrong", hint="copy or export it again")
    if file.read(1):
        raise DamagedFileError(f"something follows its end at byte {source.at}", hint="copy it again")


def _record(source: _Source, head: bytes) -> Record:
    at = source.at - len(head)
    length, kind, checksum = _RECORD.unpack(head)
    if kind not in (ROW, BLOCK) or length > MAX_PAYLOAD:
        raise DamagedFileError(f"no record begins at byte {at}", hint="copy or export it again")
    payload = source.take(length)
    if checksum != _checksum(kind, payload):
        raise DamagedFileError(f"the record at byte {at} is damaged", hint="copy or export it again")
    if kind == BLOCK:
        return Record(kind, b"", payload)
    end = _KEY.size + int.from_bytes(payload[: _KEY.size], "little")
    return Record(kind, payload[_KEY.size : end], payload[end:])


def _checksum(kind: bytes, payload: bytes) -> bytes:
    digest = hashlib.blake2b(_RECORD.pack(len(payload), kind, bytes(8)), digest_size=8)
    digest.update(payload)
    return digest.digest()
