"""The header of a ring, and the rows that its first transaction holds."""

from __future__ import annotations

from pathlib import Path

import msgspec

from storage.errors import CorruptRingError
from storage.ring_writer import HEADER, STATE
from storage.rows import open_header, seal, seal_header
from storage.windows import RingHeader, RingState

__all__ = ["RING_FORMAT", "first_rows", "read_ring_header"]

RING_FORMAT = 2


def first_rows(header: RingHeader, state: RingState) -> dict[bytes, bytes]:
    """The rows that a new ring's first transaction holds."""
    state = msgspec.structs.replace(state, txn=1)
    return {HEADER: seal_header(header), STATE: seal(STATE, msgspec.msgpack.encode(state))}


def read_ring_header(data: bytes, folder: Path) -> RingHeader:
    """Decode and check a header row.

    Raises: CorruptRingError, FormatTooNewError.
    """
    fields = open_header(data, RING_FORMAT, folder)
    try:
        return msgspec.convert(fields, RingHeader)
    except msgspec.ValidationError as error:
        hint = "run 'edgewater doctor'"
        raise CorruptRingError(f"its header is damaged: {error}", path=folder, hint=hint) from error
