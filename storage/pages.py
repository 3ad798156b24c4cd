"""Read an LMDB 0.9 data file page by page, without LMDB: a damaged file cannot crash, hang or swell this.

LMDB follows page numbers and offsets out of the file into wild memory: a flipped bit ends a process with
SIGSEGV or SIGBUS, or reads another page's bytes without an error. Here every number is checked against its
bounds before it is used, pages come by `pread` (a mapped page past the end of a cut file is a SIGBUS), no
page is visited twice, and the work is bounded by the file's size.

    page 0, 1   meta pages: a commit of transaction t writes page t & 1, so theirs are t and t - 1
    branch      node: key (the first one's counts as empty), child page
    leaf        node: key, value; or key, size and first page of an overflow run
    overflow    one header, then the value over as many pages as the header says
    free DB     transaction id -> pages that it freed; with both trees they are all pages up to the last

Source: mdb.c of LMDB 0.9 (structures MDB_page, MDB_node, MDB_meta, MDB_db); 64 bit, little-endian.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

__all__ = [
    "Item",
    "Meta",
    "PageFile",
    "PageProblem",
    "Tree",
    "check_pages",
    "items",
    "newest_meta",
    "raw_items",
    "read_metas",
    "root_candidates",
]

META_BYTES = 152  # page header, MDB_meta
NO_PAGE = 0xFFFF_FFFF_FFFF_FFFF
MAX_DEPTH = 32  # LMDB's cursor stack
MAX_PROBLEMS = 100  # a shredded file has as many as it has pages
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOW, _META = 1, 2, 4, 8
_BIGDATA = 1
_INTEGER_KEYS = 8
_PAGE = struct.Struct("<QHHHH")  # number, pad, flags, lower, upper
_RUN = struct.Struct("<QHHI")  # number, pad, flags, pages
_NODE = struct.Struct("<HHHH")  # low, high, flags, key size
_HEAD = struct.Struct("<IIQQ")  # magic, version, address, map size
_TREE = struct.Struct(
    "<IHHQQQQQ"
)  # pad (page size, in the free DB's), flags, depth, branch, leaf, overflow, n
_TAIL = struct.Struct("<QQ")  # last page, txn
_NUMBER = struct.Struct("<Q")
_HEADER_BYTES = _PAGE.size
_SCAN_PAGES = 256  # read at a time by a raw scan
_PAGE_SIZES = (4096, 512, 1024, 2048, 8192, 16384, 32768)  # the common one first


class PageProblem(msgspec.Struct, frozen=True):
    """Something that is not as LMDB writes it.

    Attributes:
        kind: "file", "meta", "tree" or "free list".
        page: Where; -1 for the file as a whole.
        words: What is wrong.
    """

    kind: str
    page: int
    words: str

    def __str__(self) -> str:
        return (
            f"{self.kind}, page {self.page}: {self.words}" if self.page >= 0 else f"{self.kind}: {self.words}"
        )


class Tree(msgspec.Struct, frozen=True):
    """What a meta page says of one tree."""

    flags: int
    depth: int
    branch_pages: int
    leaf_pages: int
    overflow_pages: int
    entries: int
    root: int


class Meta(msgspec.Struct, frozen=True):
    """One meta page whose own numbers are in bounds."""

    index: int
    txn: int
    page_bytes: int
    map_bytes: int
    last_page: int
    free: Tree
    main: Tree


class Item(msgspec.Struct, frozen=True):
    """One row of the main tree.

    Attributes:
        key: Its key; b"" for an overflow value that no leaf names (raw scan only).
        value: Its bytes; None where they were not asked for.
        page: The leaf (or, without a key, the overflow page) that it was found in.
        at: Offset of the value in the file.
        size: Length of the value, bytes.
        overflow: First page of the value's own pages, 0 where it lies in the leaf.
    """

    key: bytes
    value: bytes | None
    page: int
    at: int
    size: int
    overflow: int


_Node = tuple[bytes, int, int, int]  # key, size or child page, flags, offset of the value


class _DamagedError(Exception):
    def __init__(self, page: int, words: str) -> None:
        self.page, self.words = page, words
        super().__init__(words)


class PageFile:
    """A data file, read with `pread` only; closes its descriptor as a context."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self.size = os.fstat(self._fd).st_size
        self.page_bytes = 4096

    def read(self, at: int, size: int) -> bytes:
        """Up to `size` bytes at an offset; fewer at the end of the file. Raises: OSError (a bad sector)."""
        return os.pread(self._fd, size, at)

    def page(self, number: int, pages: int = 1) -> bytes:
        """Whole pages. Raises: _DamagedError if the file ends before them."""
        size = pages * self.page_bytes
        data = os.pread(self._fd, size, number * self.page_bytes)
        if len(data) != size:
            raise _DamagedError(number, "lies past the end of the file")
        return data

    @property
    def pages(self) -> int:
        """Whole pages in the file."""
        return self.size // self.page_bytes

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)

    def __enter__(self) -> PageFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -- meta pages -------------------------------------------------------------------------------------


def read_metas(file: PageFile) -> tuple[list[Meta], list[PageProblem]]:
    """Read both meta pages; set the file's page size from the first that is whole.

    Returns: Those that are in bounds, in the order of their pages, and what is wrong with them, alone
        and together.
    """
    problems: list[PageProblem] = []
    found: list[Meta] = []
    # Page 1 lies where page 0 says; if that is damaged, at one of the sizes that LMDB knows.
    for index in (0, 1):
        errors = []
        for size in (found[0].page_bytes,) if found else _PAGE_SIZES:
            try:
                found.append(_read_meta(file, index, size))
                break
            except _DamagedError as error:
                errors.append(error)
        else:
            problems.append(PageProblem("meta", index, errors[0].words))
    if found:
        file.page_bytes = max(found, key=lambda meta: meta.txn).page_bytes
    if len(found) == 2:
        problems += _compare(*found)
    if found and (wrong := _beyond(newest_meta(found))):
        problems.append(wrong)
        found.remove(newest_meta(found))
    problems += (
        PageProblem("meta", meta.index, f"transaction {meta.txn} does not belong on page {meta.index}")
        for meta in found
        if meta.txn & 1 != meta.index and meta.txn
    )
    return found, problems


def _beyond(meta: Meta) -> PageProblem | None:
    """A tree larger than its own meta allows, for the newest of both only.

    When writing a meta page fails, LMDB writes it again with the number and the last page of the transaction
    before the last: its roots are then those of the transaction that failed. Nothing reads it, and the next
    transaction writes over it.
    """
    for name, tree in (("free", meta.free), ("main", meta.main)):
        if tree.root != NO_PAGE and tree.root > meta.last_page:
            return PageProblem("meta", meta.index, f"root {tree.root} of the {name} tree")
        if max(tree.branch_pages, tree.leaf_pages, tree.overflow_pages) > meta.last_page:
            return PageProblem("meta", meta.index, f"page counts of the {name} tree")
    return None


def newest_meta(metas: list[Meta]) -> Meta:
    """The one that LMDB would open."""
    return max(metas, key=lambda meta: (meta.txn, -meta.index))


def _read_meta(file: PageFile, index: int, page_bytes: int) -> Meta:
    data = file.read(index * page_bytes, META_BYTES)
    if len(data) < META_BYTES:
        raise _DamagedError(index, "lies past the end of the file")
    number, _, flags, _, _ = _PAGE.unpack_from(data)
    magic, version, address, map_bytes = _HEAD.unpack_from(data, _HEADER_BYTES)
    if magic != _MAGIC or flags != _META or number != index:
        raise _DamagedError(index, "is no meta page")
    if version != _VERSION:
        raise _DamagedError(index, f"data version {version}, not {_VERSION}")
    at = _HEADER_BYTES + _HEAD.size
    free, main = _TREE.unpack_from(data, at), _TREE.unpack_from(data, at + _TREE.size)
    last_page, txn = _TAIL.unpack_from(data, at + 2 * _TREE.size)
    if free[0] != page_bytes:
        raise _DamagedError(index, f"pages of {free[0]} bytes")
    pages = file.size // page_bytes
    meta = Meta(index, txn, page_bytes, map_bytes, last_page, Tree(*free[1:]), Tree(*main[1:]))
    _bounds(meta, pages, address, main[0])
    return meta


def _bounds(meta: Meta, pages: int, address: int, main_pad: int) -> None:
    if address or main_pad:
        raise _DamagedError(meta.index, "fields that LMDB leaves zero are not")
    if not 1 <= meta.last_page < pages:
        raise _DamagedError(meta.index, f"last page {meta.last_page} of a file of {pages}")
    if meta.map_bytes % meta.page_bytes or meta.map_bytes <= meta.last_page * meta.page_bytes:
        raise _DamagedError(meta.index, f"a map of {meta.map_bytes} bytes")
    for name, tree, flags in (("free", meta.free, _INTEGER_KEYS), ("main", meta.main, 0)):
        if tree.flags != flags:
            raise _DamagedError(meta.index, f"flags {tree.flags} of the {name} tree, not {flags}")
        if (tree.root == NO_PAGE) != (tree.depth == 0) or tree.depth > MAX_DEPTH:
            raise _DamagedError(meta.index, f"depth {tree.depth} of the {name} tree")
        if tree.root != NO_PAGE and not 2 <= tree.root < pages:
            raise _DamagedError(meta.index, f"root {tree.root} of the {name} tree")
        if max(tree.branch_pages, tree.leaf_pages, tree.overflow_pages) >= pages:
            raise _DamagedError(meta.index, f"page counts of the {name} tree")


def _compare(first: Meta, second: Meta) -> Iterator[PageProblem]:
    newest, other = sorted((first, second), key=lambda meta: -meta.txn)
    if newest.txn - other.txn != 1 and newest.txn:
        words = f"transactions {first.txn} and {second.txn} do not follow each other"
        yield PageProblem("meta", newest.index, words)
    if first.page_bytes != second.page_bytes or first.map_bytes != second.map_bytes:
        yield PageProblem("meta", newest.index, "both meta pages differ in what never changes")
    if newest.last_page < other.last_page:
        yield PageProblem("meta", newest.index, "the last page went back")


# -- nodes ------------------------------------------------------------------------------------------


def _open_page(file: PageFile, number: int, kinds: int) -> tuple[bytes, int, tuple[int, ...]]:
    """A branch or leaf page, its kind and its node offsets. Raises: _DamagedError."""
    data = file.page(number)
    own, _, flags, lower, upper = _PAGE.unpack_from(data)
    if own != number:
        raise _DamagedError(number, f"calls itself page {own}")
    if flags not in (_BRANCH, _LEAF) or not flags & kinds:
        raise _DamagedError(number, f"flags {flags:#x}, of another kind of page")
    if lower & 1 or not _HEADER_BYTES < lower <= upper <= len(data):
        raise _DamagedError(number, f"bounds {lower} and {upper}")
    return data, flags, struct.unpack_from(f"<{(lower - _HEADER_BYTES) >> 1}H", data, _HEADER_BYTES)


def _nodes(data: bytes, number: int, kind: int, offsets: tuple[int, ...]) -> list[_Node]:
    """(key, size or child page, flags, offset of the value) of each node, in order.

    LMDB packs nodes from the page's end without a gap, so that their sizes must fill it.
    """
    upper = _PAGE.unpack_from(data)[4]
    end, unpack, filled = len(data), _NODE.unpack_from, dict[int, int]()
    nodes: list[_Node] = []
    for at in offsets:
        if at & 1 or at < upper or at + 8 > end:
            raise _DamagedError(number, f"a node at {at}")
        low, high, flags, key_size = unpack(data, at)
        value_at = at + 8 + key_size
        if kind == _BRANCH:
            size, number_or_size = 0, low | high << 16 | flags << 32
        else:
            number_or_size = low | high << 16
            if flags & ~_BIGDATA:
                raise _DamagedError(number, f"node flags {flags}")
            size = 8 if flags else number_or_size
        if value_at + size > end:
            raise _DamagedError(number, "a node runs past its page")
        filled[at] = (value_at + size + 1) & ~1
        nodes.append((data[at + 8 : value_at], number_or_size, flags, value_at))
    at = upper
    for start in sorted(filled):
        if start != at:
            break
        at = filled[start]
    if at != end or len(filled) != len(offsets):
        raise _DamagedError(number, "its nodes overlap or leave gaps")
    return nodes


def _overflow(file: PageFile, first: int, size: int, last_page: int, leaf: int) -> int:
    """Pages of an overflow run that must hold `size` bytes. Raises: _DamagedError."""
    if not 2 <= first <= last_page:
        raise _DamagedError(leaf, f"a value on page {first}, which is none")
    data = file.read(first * file.page_bytes, _RUN.size)
    own, _, flags, pages = _RUN.unpack(data.ljust(_RUN.size, b"\0"))
    if own != first or flags != _OVERFLOW:
        raise _DamagedError(first, "does not begin the value that its leaf names")
    if not pages or first + pages - 1 > last_page:
        raise _DamagedError(first, f"a value over {pages} pages")
    if size > pages * file.page_bytes - _HEADER_BYTES:
        raise _DamagedError(leaf, f"a value of {size} bytes in {pages} pages")
    return int(pages)


def _place(file: PageFile, number: int, data: bytes, node: _Node) -> tuple[int, int]:
    """Offset in the file of a leaf node's value, and its first overflow page or 0."""
    if not node[2]:
        return number * file.page_bytes + node[3], 0
    (first,) = _NUMBER.unpack_from(data, node[3])
    return first * file.page_bytes + _HEADER_BYTES, first


def _value(file: PageFile, data: bytes, node: _Node) -> bytes:
    """A leaf node's value; its run of overflow pages was checked before."""
    _, size, flags, at = node
    if not flags:
        return data[at : at + size]
    (first,) = _NUMBER.unpack_from(data, at)
    value = file.read(first * file.page_bytes + _HEADER_BYTES, size)
    if len(value) != size:
        raise _DamagedError(first, "lies past the end of the file")
    return value


# -- trees ------------------------------------------------------------------------------------------


class _Walk:
    """One walk over one tree: skips what is damaged, notes why, counts, and visits no page twice."""

    def __init__(self, file: PageFile, name: str, last_page: int, used: bytearray) -> None:
        self.file, self.last_page, self.used = file, min(last_page, max(file.pages - 1, 0)), used
        self.problems: list[PageProblem] = []
        self.branch_pages = self.leaf_pages = self.overflow_pages = self.entries = 0
        self._name, self._integers = name, name == "free list"

    def leaves(self, root: int, depth: int, start: bytes = b"") -> Iterator[tuple[int, bytes, list[_Node]]]:
        """(page, bytes, nodes) of every leaf that can be reached, in order of keys.

        Args:
            depth: Of the tree, at which all leaves must lie; 0 if it is not known.
            start: Leaves whose keys all come before it are left out.
        """
        # Entries: page, its level, and the keys that its own must lie between (None where unbounded).
        stack: list[tuple[int, int, bytes | None, bytes | None]] = [(root, 1, None, None)]
        while stack:
            number, level, low, high = stack.pop()
            if start and high is not None and high <= start:
                continue
            try:
                self._take(number, 1)
                kinds = (_LEAF if level == depth else _BRANCH) if depth else _BRANCH | _LEAF
                data, kind, offsets = _open_page(self.file, number, kinds)
                nodes = _nodes(data, number, kind, offsets)
                if kind == _BRANCH:
                    stack += reversed(self._children(number, level, nodes, low, high))
                    self.branch_pages += 1
                    continue
                self._check_keys(number, [node[0] for node in nodes], low, high)
                nodes = [node for node in nodes if self._whole_value(number, data, node)]
            except _DamagedError as error:
                self.note(error.page, error.words)
                continue
            except OSError as error:  # a bad sector
                self.note(number, f"cannot be read: {error.strerror}")
                continue
            self.leaf_pages += 1
            self.entries += len(nodes)
            yield number, data, nodes

    def note(self, page: int, words: str) -> None:
        """Keep a problem, unless there are very many."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(PageProblem(self._name, page, words))

    def _take(self, first: int, pages: int) -> None:
        if not 2 <= first <= first + pages - 1 <= self.last_page:
            raise _DamagedError(first, "is named, and is no page of this file")
        if self.used.find(1, first, first + pages) >= 0:
            raise _DamagedError(first, "is used twice")
        self.used[first : first + pages] = b"\x01" * pages

    def _children(
        self,
        number: int,
        level: int,
        nodes: list[_Node],
        low: bytes | None,
        high: bytes | None,
    ) -> list[tuple[int, int, bytes | None, bytes | None]]:
        if level >= MAX_DEPTH:
            raise _DamagedError(number, "the tree is too deep")
        if len(nodes) < 2 and not self._integers:
            raise _DamagedError(number, "a branch of one child")  # LMDB aborts on it
        keys = [node[0] for node in nodes[1:]]
        self._check_keys(number, keys, low, high)
        edges = [low, *keys, high]
        return [(node[1], level + 1, edges[i], edges[i + 1]) for i, node in enumerate(nodes)]

    def _check_keys(self, number: int, keys: list[bytes], low: bytes | None, high: bytes | None) -> None:
        if self._integers:
            if any(len(key) != 8 for key in keys):
                raise _DamagedError(number, "a key that is no transaction id")
            keys = [key[::-1] for key in keys]
            low, high = low and low[::-1], high and high[::-1]
        if not all(a < b for a, b in itertools.pairwise(keys)):
            raise _DamagedError(number, "keys out of order")
        if keys and ((low is not None and keys[0] < low) or (high is not None and keys[-1] >= high)):
            raise _DamagedError(number, "keys that belong on another page")

    def _whole_value(self, number: int, data: bytes, node: _Node) -> bool:
        """Whether a value lies in the leaf or in a whole run of pages; only one that does not is left out."""
        _, size, flags, at = node
        if not flags:
            return True
        (first,) = _NUMBER.unpack_from(data, at)
        try:
            pages = _overflow(self.file, first, size, self.last_page, number)
            self._take(first, pages)
        except _DamagedError as error:
            self.note(error.page, error.words)
            return False
        except OSError as error:  # a bad sector
            self.note(first, f"cannot be read: {error.strerror}")
            return False
        self.overflow_pages += pages
        return True


def check_pages(
    file: PageFile, meta: Meta, *, progress: Callable[[int], None] = lambda pages: None
) -> list[PageProblem]:
    """Verify both trees of a snapshot: every page in its place, used once, and free or used.

    Args:
        file: The file; what overflow values hold is not read, only their first header.
        meta: The snapshot, as `newest_meta` chose it.
        progress: Told the number of pages looked at so far, now and then.
    Returns: What is wrong, at most about 200 problems. Bytes that nothing uses are not looked at.
    """
    last_page = min(meta.last_page, max(file.pages - 1, 1))
    used, free = bytearray(last_page + 1), bytearray(last_page + 1)
    problems: list[PageProblem] = []
    for name, tree in (("free list", meta.free), ("tree", meta.main)):
        walk = _Walk(file, name, last_page, used)
        for number, data, nodes in walk.leaves(tree.root, tree.depth) if tree.depth else ():
            progress(walk.leaf_pages + walk.overflow_pages)
            if tree is meta.free:
                _mark_freed(walk, number, data, nodes, meta.txn, free)
        problems += walk.problems
        problems += _counts(name, tree, walk)
    problems += _accounts(used, free, last_page)
    return problems


def _mark_freed(walk: _Walk, number: int, data: bytes, nodes: list[_Node], txn: int, free: bytearray) -> None:
    """Mark the pages that the records of one free-list leaf give back."""
    for node in nodes:
        try:
            if not 1 <= _NUMBER.unpack(node[0])[0] <= txn:
                raise _DamagedError(number, "freed by a transaction that has not been")
            for page in _freed(walk, number, data, node):
                if not 2 <= page <= walk.last_page or free[page]:
                    raise _DamagedError(number, f"page {page} is none, or free twice")
                free[page] = 1
        except _DamagedError as error:
            walk.note(error.page, error.words)


def _freed(walk: _Walk, number: int, data: bytes, node: _Node) -> tuple[int, ...]:
    """Pages of one record: a count, then so many numbers, falling."""
    size = node[1] if not node[2] else min(node[1], 8 * (walk.last_page + 1))  # no list is longer
    value = _value(walk.file, data, (node[0], size, node[2], node[3]))
    if size < 8 or _NUMBER.unpack_from(value)[0] > size // 8 - 1:
        raise _DamagedError(number, "a list longer than its record")
    ids = struct.unpack_from(f"<{_NUMBER.unpack_from(value)[0]}Q", value, 8)
    if not all(a > b for a, b in itertools.pairwise(ids)):
        raise _DamagedError(number, "a list out of order")
    return ids


def _counts(name: str, tree: Tree, walk: _Walk) -> Iterator[PageProblem]:
    for field in ("branch_pages", "leaf_pages", "overflow_pages", "entries"):
        said, found = getattr(tree, field), getattr(walk, field)
        if said != found:
            yield PageProblem(
                name, tree.root if tree.root != NO_PAGE else -1, f"{field} {said}, found {found}"
            )


def _accounts(used: bytearray, free: bytearray, last_page: int) -> Iterator[PageProblem]:
    """Every page up to the last is used or free, and none both."""
    both = missing = first = 0
    for page in range(2, last_page + 1):
        if used[page] == free[page]:
            both += used[page]
            missing += not used[page]
            first = first or page
    if both:  # the next commits would write over them
        yield PageProblem("free list", first, f"{both} pages are free and in use")
    if missing:
        yield PageProblem("free list", first, f"{missing} pages are neither free nor in use")


def items(
    file: PageFile,
    root: int,
    *,
    last_page: int,
    depth: int = 0,
    start: bytes = b"",
    wanted: Callable[[bytes], bool] = lambda key: True,
    problems: list[PageProblem] | None = None,
) -> Iterator[Item]:
    """Rows of a main tree in order of their keys, as far as it can be walked.

    Args:
        root, depth: As the meta page says; depth 0 if it is not known.
        start: First key wanted; pages that lie before it are not read.
        wanted: By key, whether the value is read; else it is None.
        problems: Takes what was skipped and why.
    """
    walk = _Walk(file, "tree", last_page, bytearray(min(last_page, max(file.pages - 1, 1)) + 1))
    if problems is not None:
        walk.problems = problems
    for number, data, nodes in walk.leaves(root, depth, start) if root != NO_PAGE else ():
        for node in nodes:
            if node[0] < start:
                continue
            try:
                value = _value(file, data, node) if wanted(node[0]) else None
            except (_DamagedError, OSError) as error:
                walk.note(number, str(error))
                continue
            at, overflow = _place(file, number, data, node)
            yield Item(node[0], value, number, at, node[1], overflow)


# -- without a tree ---------------------------------------------------------------------------------


def raw_items(file: PageFile, *, orphans: bool = True) -> Iterator[Item]:
    """Every row of every page that looks like a leaf, in use or not, and values that no leaf names.

    Free pages keep old rows until they are written again, so a key may come several times, and stale: the
    caller decides by what the values themselves prove. One damaged node does not hide the others.
    """
    named = bytearray(file.pages + 1)
    runs = bytearray(file.pages + 1)
    for number, data in _scan(file):
        own, _, flags, lower, _ = _PAGE.unpack_from(data)
        if own != number:
            continue
        if flags == _OVERFLOW:
            runs[number] = 1
        elif flags == _LEAF and _HEADER_BYTES < lower <= len(data):
            for item in _loose_nodes(file, number, data, lower):
                if item.overflow:
                    named[item.overflow] = 1
                yield item
    if not orphans:
        return
    for number in range(2, file.pages):
        if runs[number] and not named[number]:
            pages = _RUN.unpack(file.read(number * file.page_bytes, _RUN.size))[3]
            if 1 <= pages <= file.pages - number:
                size = pages * file.page_bytes - _HEADER_BYTES
                at = number * file.page_bytes + _HEADER_BYTES
                try:
                    value = file.read(at, size)
                except OSError:
                    continue
                yield Item(b"", value, number, at, len(value), number)


def root_candidates(file: PageFile, leaf: int) -> list[int]:
    """A page and all branch pages that are above it, the highest last.

    A snapshot whose meta page is lost is found again so: the leaf with the row that every commit writes has
    its root among its ancestors. Stale branches in free pages are among them too: the caller checks what it
    finds below.
    """
    parents: dict[int, list[int]] = {}
    for number, data in _scan(file):
        own, _, flags, lower, _ = _PAGE.unpack_from(data)
        if own != number or flags != _BRANCH or lower & 1 or not _HEADER_BYTES < lower <= len(data):
            continue
        for at in struct.unpack_from(f"<{(lower - _HEADER_BYTES) >> 1}H", data, _HEADER_BYTES):
            if at + 8 <= len(data):
                low, high, more, _ = _NODE.unpack_from(data, at)
                parents.setdefault(low | high << 16 | more << 32, []).append(number)
    found = [leaf]
    for number in found:  # grows while it is read
        found += (parent for parent in dict.fromkeys(parents.get(number, ())) if parent not in found)
    return found


def _scan(file: PageFile) -> Iterator[tuple[int, bytes]]:
    """Every whole page from 2 on; those of a piece that cannot be read are tried one by one."""
    size = file.page_bytes
    for start in range(2, file.pages, _SCAN_PAGES):
        count = min(_SCAN_PAGES, file.pages - start)
        try:
            piece = file.read(start * size, count * size)
        except OSError:
            piece = b"".join(_readable(file, start + i) for i in range(count))
        for i in range(len(piece) // size):
            yield start + i, piece[i * size : (i + 1) * size]


def _readable(file: PageFile, number: int) -> bytes:
    try:
        return file.read(number * file.page_bytes, file.page_bytes).ljust(file.page_bytes, b"\0")
    except OSError:
        return bytes(file.page_bytes)


def _loose_nodes(file: PageFile, number: int, data: bytes, lower: int) -> Iterator[Item]:
    last_page = file.pages - 1
    for at in struct.unpack_from(f"<{(lower - _HEADER_BYTES) >> 1}H", data, _HEADER_BYTES):
        if at + 8 > len(data):
            continue
        low, high, flags, key_size = _NODE.unpack_from(data, at)
        size, value_at = low | high << 16, at + 8 + key_size
        if flags & ~_BIGDATA or not key_size or value_at + (8 if flags else size) > len(data):
            continue
        node = (data[at + 8 : value_at], size, flags, value_at)
        try:
            if flags:
                _overflow(file, _NUMBER.unpack_from(data, value_at)[0], size, last_page, number)
            value = _value(file, data, node)
        except (_DamagedError, OSError):
            continue
        at, overflow = _place(file, number, data, node)
        yield Item(node[0], value, number, at, size, overflow)
