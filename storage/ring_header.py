"""The header of a ring, and the rows that its first transaction holds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from storage.errors import CorruptRingError, FormatTooNewError
from storage.ring_writer import HEADER, STATE
from storage.rows import seal
from storage.windows import RingHeader, RingState

__all__ = ["RING_FORMAT", "first_rows", "read_ring_header"]

RING_FORMAT = 2


def first_rows(header: RingHeader, state: RingState) -> dict[bytes, bytes]:
    """The rows that a new ring's first transaction holds."""
    sealed = msgspec.structs.replace(header, check=_check_of(header))
    state = msgspec.structs.replace(state, txn=1)
    return {HEADER: msgspec.msgpack.encode(sealed), STATE: seal(STATE, msgspec.msgpack.encode(state))}


def read_ring_header(data: bytes, folder: Path) -> RingHeader:
    """Decode and check a header row.

    Raises: CorruptRingError, FormatTooNewError.
    """
    hint = "run 'edgewater doctor'"
    try:
        header = msgspec.msgpack.decode(data, type=RingHeader)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptRingError(f"its header is damaged: {error}", path=folder, hint=hint) from error
    whole = header.check == _check_of(header)
    if header.format > RING_FORMAT:
        raise FormatTooNewError(
            f"ring format {header.format} is newer than {RING_FORMAT}",
            path=folder,
            hint="upgrade Edgewater",
        )
    if header.format > 1 and not whole:
        raise CorruptRingError("its header is damaged", path=folder, hint=hint)
    return header


def _check_of(header: RingHeader) -> bytes:
    plain = msgspec.msgpack.encode(msgspec.structs.replace(header, check=b""))
    return hashlib.blake2b(plain, digest_size=8).digest()
