"""Blank the samples of one subject, wherever they lie in a ring."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from storage.block import decode_block, read_header
from storage.errors import CorruptBlockError
from storage.samples import Samples

if TYPE_CHECKING:
    from storage.ring import Ring

__all__ = ["forget"]

# Blocks rewritten in one transaction, at most; their old pages come back two transactions later.
FORGET_BYTES = 1 << 20
FORGET_SHARE = 1 / 16  # of the map, for small rings


class _Found(msgspec.Struct, frozen=True):
    """A block with samples about the subject: its samples, their indices, what its header says."""

    samples: Samples
    gone: list[int]
    arrival: float
    revision: int


def forget(ring: Ring, subject: str) -> int:
    """Blank a subject's samples; see `Ring.forget`."""
    forgotten, seq = 0, ring.state.tail_seq
    while seq < ring.state.next_seq:
        found, seq = _find(ring, subject, seq)
        if not found:
            continue
        count = sum(len(block.gone) for block in found)
        with ring.writing() as writer:
            for block in found:
                less, revision = block.samples.without(block.gone), block.revision + 1
                for first_seq, data in writer.encode(less, arrival=block.arrival, revision=revision):
                    writer.put_block(first_seq, data)
            writer.state = msgspec.structs.replace(writer.state, forgotten=writer.state.forgotten + count)
        forgotten += count
    return forgotten


def _find(ring: Ring, subject: str, seq: int) -> tuple[list[_Found], int]:
    """Blocks from a seq on that hold samples about a subject, a transaction's worth; where to go on."""
    found, size = [], 0
    for key, data in ring.copied_blocks(seq):
        seq = key + 1
        try:
            header, samples = read_header(data), decode_block(data, ring.dictionaries.find)
        except CorruptBlockError:
            continue  # unreadable is forgotten too
        seq = header.last_seq + 1
        gone = [i for i, name in enumerate(samples.subjects) if name == subject]
        if gone:
            found.append(_Found(samples, gone, header.arrival, header.revision))
            size += len(data)
            if size >= min(FORGET_BYTES, FORGET_SHARE * ring.map_bytes):
                return found, seq
    return found, ring.state.next_seq
