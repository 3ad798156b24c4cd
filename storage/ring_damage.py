"""Damaged blocks: find them, keep their bytes for whoever wants to look, put blank samples in their place."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from storage.block import block_checksum, block_hashes, decode_block, read_header
from storage.durable import make_private_folder, write_file_durably
from storage.errors import CorruptBlockError, MissingDictionaryError, StorageError
from storage.ring_writer import U64, RingWriter, arrival_of, block_key, blocks_from
from storage.rows import rows_from
from storage.samples import HASH_BYTES, Samples
from storage.windows import QuarantineRow

if TYPE_CHECKING:
    from storage.ring import Ring

__all__ = ["Damage", "find_damages", "quarantine", "sum_of_blocks"]

MAX_QUARANTINE_ROWS = 1_000
MAX_QUARANTINE_BYTES = 16 << 20  # of damaged bytes that are kept for whoever wants to look at them

log = logging.getLogger("edgewater.ring")


class Damage(msgspec.Struct, frozen=True):
    """A run of seqs whose samples cannot be read, or a block where none belongs (`end_seq` = `first_seq`).

    Attributes:
        first_seq, end_seq: The samples, the end not included.
        reason: What is wrong.
        key: First seq of the block to take out; -1 where there is none.
        hashes: The samples' dedup hashes where those are still known.
    """

    first_seq: int
    end_seq: int
    reason: str
    key: int = -1
    hashes: bytes = b""


def find_damages(ring: Ring) -> Iterator[Damage]:
    """Read every block and say which samples cannot be read; each block is copied out first."""
    state = ring.read_state()  # a reader that stays open has an older one
    expected = state.tail_seq
    last: tuple[int, str, bytes] | None = None  # a damaged block: where it ends, the next one tells
    for key, block in ring.copied_blocks():
        if last:
            first, reason, hashes = last
            yield Damage(first, max(key, first), reason, first, _fitting(hashes, key - first))
            expected, last = max(key, expected), None
        if key < expected or key >= state.next_seq:
            yield Damage(key, key, "a block where none belongs", key)
            continue
        if key > expected:
            yield Damage(expected, key, "the block is missing")
        try:
            header = read_header(block)
            if header.first_seq != key:
                raise CorruptBlockError(f"the block of seq {header.first_seq} lies under another key")
            expected = key + len(decode_block(block, ring.dictionaries.find))
        except MissingDictionaryError as error:
            last = (key, str(error), block_hashes(block))
        except StorageError as error:
            last = (key, str(error), b"")
    if last:
        first, reason, hashes = last
        yield Damage(first, state.next_seq, reason, first, _fitting(hashes, state.next_seq - first))
    elif expected < state.next_seq:
        yield Damage(expected, state.next_seq, "the block is missing")


def sum_of_blocks(ring: Ring) -> int:
    """XOR of the checksums of all blocks as they lie there."""
    total = 0
    for _, block in ring.copied_blocks():
        total ^= block_checksum(block)
    return total


def quarantine(ring: Ring, into: Path) -> list[QuarantineRow]:
    """Replace damaged blocks by blanks; see `Ring.quarantine`."""
    damages = list(find_damages(ring))
    rows = []
    for damage in damages:
        # 1. The damaged bytes are durable in a file.   Crash: found again at the next check.
        name = _keep_bytes(ring, damage, into)
        # 2. Blanks take their place.                   From here the ring is whole.
        with ring.writing() as writer:
            row = _replace_by_blanks(writer, damage, name)
        if row.samples:
            rows.append(row)
            log.error("samples %d to %d are lost: %s", row.first_seq, damage.end_seq - 1, row.reason)
    whole = sum_of_blocks(ring) == ring.state.blocks_sum
    if not whole and not damages:
        log.error("a block of the ring %s is not the one that was written last", ring.folder)
    if not whole:
        with ring.writing() as writer:
            writer.sum_blocks_anew()
    return rows


def _keep_bytes(ring: Ring, damage: Damage, into: Path) -> str:
    with ring.reading() as txn:
        found = txn.get(block_key(damage.key)) if damage.key >= 0 else None
    if found is None:
        return ""
    name = f"{ring.header.shard}-{damage.key}.block"
    try:
        make_private_folder(into)
        if sum(path.stat().st_size for path in into.iterdir() if path.is_file()) > MAX_QUARANTINE_BYTES:
            return ""
        write_file_durably(into / name, bytes(found))
    except OSError as error:  # a full disk: the ring needs none of it to go on
        log.warning("the damaged bytes at seq %d are not kept: %s", damage.key, error)
        return ""
    return name


def _replace_by_blanks(writer: RingWriter, damage: Damage, name: str) -> QuarantineRow:
    if damage.key >= 0:
        writer.delete_block(damage.key)
    count = damage.end_seq - damage.first_seq
    row = QuarantineRow(damage.first_seq, count, damage.reason, writer.state.stream_time, name)
    if count:
        blanks = Samples.blank(damage.first_seq, count, damage.hashes)
        # As old as its neighbour: were it of now, eviction by age would stop at it, before what is older.
        near = (arrival_of(block) for _, block in blocks_from(writer.txn, damage.end_seq))
        arrival = next((time for time in near if math.isfinite(time)), writer.state.stream_time)
        for first_seq, block in writer.encode(blanks, arrival=arrival):
            writer.put_block(first_seq, block)
        writer.rows.put(U64.pack(b"Q", damage.first_seq), msgspec.msgpack.encode(row))
        held = [bytes(key) for key, _ in rows_from(writer.txn, b"Q")]
        for key in held[: max(0, len(held) - MAX_QUARANTINE_ROWS)]:
            writer.rows.delete(key)
        writer.state = msgspec.structs.replace(writer.state, lost=writer.state.lost + count)
    return row


def _fitting(hashes: bytes, count: int) -> bytes:
    return hashes if len(hashes) == HASH_BYTES * count else b""
