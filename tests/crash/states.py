"""Every state that a power cut may leave of a recorded run, numbered by a seed and an index.

The model of the medium:

- A file holds what was synced (fsync or fdatasync of it; an O_DSYNC write that returned) plus any subset of
  the pieces of later writes: sectors of 512 bytes or pages of 4 KiB, each whole or not at all, with what the
  page cache held of it after that write. A piece written twice may be there as first written.
- Its size is the synced one, or any later one, in order; it and the pieces are independent, so a file may
  have grown over zeros, or hold new pieces that its old size hides.
- Names are those that an fsync of their folder made durable, plus a prefix of the later changes: in one order
  for all folders (a journal), or in an order for each folder. A rename within this is atomic.
- lock.mdb, written through a map, holds zeros or what it held at the end of the run.

It is more hostile than ext4, which commits the names of all folders in one journal, makes a new file's name
durable with the file's fsync, and writes a file's data before a rename over another. What it does not have: a
sector half written, and a medium that lies about a flush (FORMAT.md says why).
"""

from __future__ import annotations

import os
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from tests.crash.recording import (
    PAGE_BYTES,
    ROOT,
    ZEROS,
    Names,
    Operation,
    Recording,
    Resize,
    Said,
    Sync,
    Write,
    cut_pages,
    set_page,
)

__all__ = ["CrashState", "CrashStates"]

SECTOR_BYTES = 512
_SECTORS = PAGE_BYTES // SECTOR_BYTES
_GOLDEN = 0.618_033_988_749_895  # multiples of it, modulo 1, fall evenly however many are taken
HEAVIEST = 40  # a crash point with more pieces pending gets no more states than one with so many


@dataclass(frozen=True)
class CrashState:
    """One state: which point in time, and what of the pending changes is there.

    Attributes:
        index: Its number.
        heard: How many lines the program had said.
        files: File inode -> (pages, size).
        names: Folder inode -> names in it.
        text: What was chosen, for people.
    """

    index: int
    heard: int
    files: dict[int, tuple[dict[int, bytes], int]]
    names: dict[int, dict[str, int]]
    text: str


@dataclass
class _PendingWrite:
    write: Write
    sectors: dict[int, bytes]
    pages: dict[int, bytes]


@dataclass
class _PendingSize:
    operation: Write | Resize
    size: int


@dataclass
class _File:
    durable: dict[int, bytes]
    size: int
    cached: dict[int, bytes] = field(default_factory=dict)
    cached_size: int = 0
    pending: list[_PendingWrite | _PendingSize] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cached, self.cached_size = dict(self.durable), self.size


class _Medium:
    """What is durable and what is pending at one point in time; it moves forward only."""

    def __init__(self, recording: Recording) -> None:
        self._inodes = recording.inodes
        self.files = {
            inode: _File(dict(recording.pages_before.get(inode, {})), recording.sizes_before.get(inode, 0))
            for inode, kind in recording.inodes.items()
            if not kind.folder
        }
        self.named: list[tuple[Names, set[int]]] = []  # and the folders synced since
        self.heard = 0
        self.last: Operation | None = None

    def apply(self, operation: Operation, ended: bool) -> None:
        """Let an operation begin, or end."""
        self.last = operation
        match operation:
            case Write():
                self._write_ended(operation) if ended else self._write_begun(operation)
            case Resize() if not ended:
                self._resize_begun(operation)
            case Sync() if ended:
                self._synced(operation)
            case Names() if not ended:
                self.named.append((operation, set()))
            case Said() if not ended:
                self.heard += 1
            case _:
                pass

    def _write_begun(self, write: Write) -> None:
        file, end = self.files[write.inode], write.offset + len(write.data)
        if end > file.cached_size:
            file.cached_size = end
            file.pending.append(_PendingSize(write, end))
        pages = {}
        for number in range(write.offset // PAGE_BYTES, -(-end // PAGE_BYTES)):
            start = number * PAGE_BYTES
            low, high = max(write.offset, start), min(end, start + PAGE_BYTES)
            page = bytearray(file.cached.get(number, ZEROS))
            page[low - start : high - start] = write.data[low - write.offset : high - write.offset]
            file.cached[number] = pages[number] = bytes(page)
        sectors = {
            number: pages[number // _SECTORS][number % _SECTORS * SECTOR_BYTES :][:SECTOR_BYTES]
            for number in range(write.offset // SECTOR_BYTES, -(-end // SECTOR_BYTES))
        }
        file.pending.append(_PendingWrite(write, sectors, pages))

    def _write_ended(self, write: Write) -> None:
        if not write.durable:
            return
        file = self.files[write.inode]
        (own,) = [p for p in file.pending if isinstance(p, _PendingWrite) and p.write is write]
        for p in file.pending:
            if isinstance(p, _PendingSize):
                cut_pages(file.durable, p.size)
        file.size = file.cached_size
        file.pending = [p for p in file.pending if isinstance(p, _PendingWrite) and p is not own]
        for number, data in own.sectors.items():
            _put_sector(file.durable, number, data)
            for other in file.pending:
                # What is durable now cannot be undone by an older piece of the same sector.
                assert isinstance(other, _PendingWrite)
                other.sectors.pop(number, None)
                if number // _SECTORS in other.pages:
                    _put_sector(other.pages, number, data)

    def _resize_begun(self, resize: Resize) -> None:
        file = self.files[resize.inode]
        cut_pages(file.cached, resize.size)
        file.cached_size = resize.size
        file.pending.append(_PendingSize(resize, resize.size))

    def _synced(self, sync: Sync) -> None:
        if self._inodes[sync.inode].folder:
            for names, folders in self.named:
                if names.ended < sync.began:
                    folders.add(sync.inode)
            return
        file, later = self.files[sync.inode], []
        for p in file.pending:
            operation = p.write if isinstance(p, _PendingWrite) else p.operation
            if operation.ended > sync.began:
                later.append(p)
            elif isinstance(p, _PendingWrite):
                for number, page in p.pages.items():
                    set_page(file.durable, number, page)
            else:
                cut_pages(file.durable, p.size)
                file.size = p.size
        file.pending = later

    # -- what is pending --------------------------------------------------------------------------

    def writes(self) -> list[_PendingWrite]:
        """Pending writes of all files, in the order in which they began."""
        found = [p for f in self.files.values() for p in f.pending if isinstance(p, _PendingWrite)]
        return sorted(found, key=lambda p: p.write.began)

    def weight(self) -> int:
        """How many states this point in time deserves."""
        pieces = sum(len(p.sectors) for p in self.writes())
        sizes = sum(isinstance(p, _PendingSize) for f in self.files.values() for p in f.pending)
        names = sum(not _durable(*entry) for entry in self.named)
        pending = pieces + 2 * sizes + 2 * names
        return 1 + min(HEAVIEST, pending + 4) if pending else 1


def _durable(names: Names, synced: set[int]) -> bool:
    return all(folder in synced for folder, _, _ in names.changes)


def _put_sector(pages: dict[int, bytes], number: int, data: bytes) -> None:
    page, at = pages.get(number // _SECTORS, ZEROS), number % _SECTORS * SECTOR_BYTES
    pages[number // _SECTORS] = page[:at] + data + page[at + SECTOR_BYTES :]


class CrashStates:
    """The states of one recording under one seed. State number i is the same however many are asked for."""

    def __init__(self, recording: Recording, seed: int) -> None:
        self._recording, self._seed = recording, seed
        both = [(op.began, op, False) for op in recording.operations]
        both += [(op.ended, op, True) for op in recording.operations]
        self._events = sorted(both, key=lambda event: event[0])
        medium = _Medium(recording)
        weights = [medium.weight()]
        for _, operation, ended in self._events:
            medium.apply(operation, ended)
            weights.append(medium.weight())
        self._ends = list(accumulate(weights))
        self._start = random.Random(f"start {seed}").random()

    @property
    def points(self) -> int:
        """Different points in time at which the power may go."""
        return len(self._ends)

    def _point(self, index: int) -> int:
        share = (self._start + index * _GOLDEN) % 1.0
        return bisect_right(self._ends, share * self._ends[-1])

    def build(self, indices: list[int]) -> Iterator[CrashState]:
        """The states with these numbers, in order of time and not of number."""
        medium, done = _Medium(self._recording), 0
        for index in sorted(indices, key=lambda i: (self._point(i), i)):
            for _, operation, ended in self._events[done : self._point(index)]:
                medium.apply(operation, ended)
            done = max(done, self._point(index))
            yield self._choose(medium, index)

    def _choose(self, medium: _Medium, index: int) -> CrashState:
        rng = random.Random(f"state {self._seed} {index}")
        sectors = rng.random() < 0.5
        pieces = [
            (nth, piece)
            for nth, p in enumerate(medium.writes())
            for piece in (p.sectors if sectors else p.pages)
        ]
        kept, how = _choose_pieces(rng, pieces)
        files = {}
        writes = {id(p): nth for nth, p in enumerate(medium.writes())}
        for inode, file in medium.files.items():
            if self._recording.inodes[inode].scratch:
                files[inode] = self._scratch(rng, inode, file)
            else:
                files[inode] = _content(rng, file, writes, kept, sectors)
        names, named = self._choose_names(rng, medium)
        point = medium.last
        text = (
            f"tick {point.began if point else 0} ({type(point).__name__}), {how} of {len(pieces)} pieces "
            f"of {SECTOR_BYTES if sectors else PAGE_BYTES} bytes, {named}, {medium.heard} lines said"
        )
        return CrashState(index, medium.heard, files, names, text)

    def _scratch(self, rng: random.Random, inode: int, file: _File) -> tuple[dict[int, bytes], int]:
        after = self._recording.scratch_after.get(inode, b"")
        size = rng.choice([file.size, file.cached_size])
        if rng.random() < 0.5:
            return {}, size
        pages = {n: after[n * PAGE_BYTES :][:PAGE_BYTES] for n in range(-(-len(after) // PAGE_BYTES))}
        return {n: page.ljust(PAGE_BYTES, b"\0") for n, page in pages.items()}, size

    def _choose_names(self, rng: random.Random, medium: _Medium) -> tuple[dict[int, dict[str, int]], str]:
        names = {folder: dict(entries) for folder, entries in self._recording.names_before.items()}
        durable = [_durable(names_, synced) for names_, synced in medium.named]
        open_ = [i for i, safe in enumerate(durable) if not safe]
        how = rng.choice(["journal", "prefix", "folders"])
        if how == "journal":  # one order: whatever is older than a durable change is durable too
            newest = max((i for i, safe in enumerate(durable) if safe), default=-1)
            open_ = [i for i in open_ if i > newest]
        keep = {i for i in range(len(durable)) if i not in open_}
        share = rng.choice([0.0, 1.0, rng.random()])
        if how == "folders":
            folders = sorted({folder for i in open_ for folder, _, _ in medium.named[i][0].changes})
            dropped: set[int] = set()
            for folder in folders:
                own = [i for i in open_ if any(f == folder for f, _, _ in medium.named[i][0].changes)]
                dropped |= set(own[rng.choice([0, len(own), rng.randint(0, len(own))]) :])
            keep |= set(open_) - dropped
        else:
            keep |= set(open_[: round(share * len(open_))])
        for i in sorted(keep):
            for folder, name, inode in medium.named[i][0].changes:
                entries = names.setdefault(folder, {})
                if inode is None:
                    entries.pop(name, None)
                else:
                    entries[name] = inode
        return names, f"{len(keep)} of {len(durable)} name changes ({how})"

    def write(self, state: CrashState, target: Path) -> None:
        """Build a state as a folder, which must not exist."""
        self._write_folder(state, ROOT, str(target))

    def _write_folder(self, state: CrashState, inode: int, path: str) -> None:
        folder = Path(path)
        folder.mkdir(mode=0o700)
        for name, child in state.names.get(inode, {}).items():
            kind, place = self._recording.inodes[child], f"{path}/{name}"
            if kind.folder:
                self._write_folder(state, child, place)
            else:
                _write_file(place, kind.mode, *state.files[child])
        folder.chmod(self._recording.inodes[inode].mode)


_Piece = tuple[int, int]


def _choose_pieces(rng: random.Random, pieces: list[_Piece]) -> tuple[set[_Piece], str]:
    """A subset: an extreme one, a run of the oldest or newest, or a random one of some density."""
    count = len(pieces)
    match rng.randrange(10):
        case 0:
            return set(), "none"
        case 1:
            return set(pieces), "all"
        case 2:
            return set(pieces[-1:]), "the newest"
        case 3 | 4 if count:
            missing = rng.randrange(count)
            return set(pieces) - {pieces[missing]}, f"all but number {missing}"
        case 5:
            first = rng.randint(0, count)
            return set(pieces[:first]), f"the first {first}"
        case 6:
            last = rng.randint(0, count)
            return set(pieces[count - last :]), f"the last {last}"
        case _:
            density = rng.choice([0.1, 0.5, 0.9])
            kept = {piece for piece in pieces if rng.random() < density}
            return kept, f"random {len(kept)}"


def _content(
    rng: random.Random, file: _File, writes: dict[int, int], kept: set[_Piece], sectors: bool
) -> tuple[dict[int, bytes], int]:
    """A file's pages and size with the chosen pieces and some of the changes of its size."""
    if not file.pending:
        return dict(file.durable), file.size
    pages, size = dict(file.durable), file.size
    sizes = sum(isinstance(p, _PendingSize) for p in file.pending)
    left = rng.choice([0, sizes, rng.randint(0, sizes)])
    for p in file.pending:
        if isinstance(p, _PendingSize):
            if left:
                left -= 1
                cut_pages(pages, p.size)
                size = p.size
            elif p.size < size:
                break  # what was written after a cut lies in other places than what it cut off
            continue
        put: Callable[[dict[int, bytes], int, bytes], None] = _put_sector if sectors else set_page
        for number, data in (p.sectors if sectors else p.pages).items():
            if (writes[id(p)], number) in kept:
                put(pages, number, data)
    return pages, size


def _write_file(path: str, mode: int, pages: dict[int, bytes], size: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.fchmod(fd, mode)
        os.ftruncate(fd, size)  # the rest are holes: a map of 32 MiB costs what is in it
        run: list[bytes] = []
        numbers = sorted(n for n in pages if n * PAGE_BYTES < size)
        for i, number in enumerate(numbers):
            run.append(pages[number])
            if i + 1 == len(numbers) or numbers[i + 1] != number + 1:
                start = (number + 1 - len(run)) * PAGE_BYTES
                os.pwrite(fd, b"".join(run)[: size - start], start)
                run = []
    finally:
        os.close(fd)
