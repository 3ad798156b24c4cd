"""Which pages of an LMDB file a commit wrote, by kind: the file before and after, read page by page.

Knows the 0.9 engine's format on a 64-bit little-endian machine. For looking at only.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator

__all__ = ["PAGE_BYTES", "written_pages"]

PAGE_BYTES = 4096
_BRANCH, _LEAF, _OVERFLOW = 1, 2, 4
_BIG_DATA = 1
_HEADER = struct.Struct("<QHHHH")  # page number, pad, flags, lower, upper
_NODE = struct.Struct("<HHHH")  # size or page low, high; flags; key size
_FREE_ROOT, _MAIN_ROOT, _TXN = 80, 128, 144
_NONE = (1 << 64) - 1


def written_pages(before: bytes, after: bytes) -> Counter[str]:
    """Count the pages that differ, by kind: meta, branch, leaf, overflow, freelist, unused."""
    kinds = dict(_kinds(after))
    changed: Counter[str] = Counter()
    view_a, view_b = memoryview(before), memoryview(after)
    for at in range(0, len(after), PAGE_BYTES):
        if view_a[at : at + PAGE_BYTES] != view_b[at : at + PAGE_BYTES]:
            number = at // PAGE_BYTES
            changed["meta" if number < 2 else kinds.get(number, "unused")] += 1
    return changed


def _kinds(data: bytes) -> Iterator[tuple[int, str]]:
    meta = max(0, PAGE_BYTES, key=lambda at: int(struct.unpack_from("<Q", data, at + _TXN)[0]))
    (free,) = struct.unpack_from("<Q", data, meta + _FREE_ROOT)
    (main,) = struct.unpack_from("<Q", data, meta + _MAIN_ROOT)
    yield from ((page, "freelist") for page, _ in _tree(data, free))
    yield from _tree(data, main)


def _tree(data: bytes, root: int) -> Iterator[tuple[int, str]]:
    if root == _NONE:
        return
    base = root * PAGE_BYTES
    _, _, flags, lower, _ = _HEADER.unpack_from(data, base)
    yield root, "branch" if flags & _BRANCH else "leaf"
    for slot in range((lower - _HEADER.size) // 2):
        (offset,) = struct.unpack_from("<H", data, base + _HEADER.size + 2 * slot)
        low, high, node_flags, key_bytes = _NODE.unpack_from(data, base + offset)
        if flags & _BRANCH:
            yield from _tree(data, low | high << 16 | node_flags << 32)
        elif node_flags & _BIG_DATA:
            (first,) = struct.unpack_from("<Q", data, base + offset + _NODE.size + key_bytes)
            (pages,) = struct.unpack_from("<I", data, first * PAGE_BYTES + 12)
            yield from ((first + i, "overflow") for i in range(pages))
