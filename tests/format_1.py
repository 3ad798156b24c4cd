"""Write a ring as format 1 was: rows unsealed, structs as maps, blocks oldest first with 56-byte headers.

Written from FORMAT.md a second time, on purpose: `tests/data` holds what the code of format 1 itself wrote.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from storage.durable import remove_folder
from storage.env import create_environment, open_environment
from storage.ring import Ring
from storage.samples import KINDS, Samples
from storage.windows import ClosedWindow, DeadLetter, RingState

__all__ = ["encode_block_1", "write_format_1"]

_NEWER = ("clock", "txn", "rows_sum", "blocks_sum", "lost", "forgotten")


def encode_block_1(samples: Samples, tokenizer_id: str, arrival: float) -> bytes:
    """One block of format 1; 32-bit ids and the mask always."""
    tables = msgspec.msgpack.encode((sorted(set(samples.sources)), sorted(set(samples.subjects)), None))
    bits = "".join(map(str, samples.mask)).ljust(-(-len(samples.mask) // 8) * 8, "0")
    raw = b"".join((
        struct.pack("<I", len(tables)), tables,
        array("H", [sorted(set(samples.sources)).index(name) for name in samples.sources]).tobytes(),
        array("H", [sorted(set(samples.subjects)).index(name) for name in samples.subjects]).tobytes(),
        bytes(KINDS.index(kind) for kind in samples.kinds), samples.ts.tobytes(), samples.lengths.tobytes(),
        samples.ids.tobytes(), bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)), samples.hashes,
    ))  # fmt: skip
    stored = zstandard.compress(raw)
    fields = struct.pack("<4sHBB8sIIQdII", b"EWB1", 1, 1, 1 | 2, bytes.fromhex(tokenizer_id), len(samples),
                         len(samples.ids), samples.first_seq, arrival, len(raw), len(stored))  # fmt: skip
    return fields + hashlib.blake2b(fields + stored, digest_size=8).digest() + stored


def write_format_1(ring: Ring, runs: list[tuple[float, Samples]]) -> Path:
    """Close a ring and put one of format 1 with the same content into its place.

    Args:
        runs: What it holds: arrival and samples of each block.
    Returns: Its folder.
    """
    folder, size, header = ring.folder, ring.map_bytes, ring.header
    rows = {
        b"H": msgspec.msgpack.encode(_map(header, "check") | {"format": 1}),
        b"s": msgspec.msgpack.encode(_map(ring.state, *_NEWER) | {"window": _map(ring.state.window)}),
    }
    for number, letter in ring.dead_letters(10_000):
        rows[struct.pack(">cQ", b"D", number)] = msgspec.msgpack.encode(_map(letter))
    for window in ring.windows():
        rows[struct.pack(">cI", b"W", window.window)] = msgspec.msgpack.encode(_map(window))
    for prefix in ("p", "r"):
        rows |= {(prefix + name).encode(): value for name, value in ring.named(prefix).items()}
    for arrival, samples in runs:
        block = encode_block_1(samples, header.tokenizer_id, arrival)
        rows[struct.pack(">cQ", b"b", samples.first_seq)] = block
    ring.close()
    remove_folder(folder)
    create_environment(folder, size, rows)
    open_environment(folder).close()  # as a program that ran on it leaves it: with a lock file
    return folder


def _map(value: RingState | ClosedWindow | DeadLetter | Any, *left_out: str) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__struct_fields__ if name not in left_out}
