"""What a program did to a folder: every write with its data, every sync, every change of names, in order.

Time is counted in ticks: an operation begins at one and ends at a later one; between them it may have
happened in part.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "PAGE_BYTES",
    "ROOT",
    "ZEROS",
    "Inode",
    "Names",
    "Operation",
    "Recording",
    "RecordingError",
    "Resize",
    "Said",
    "Sync",
    "Write",
    "cut_pages",
    "set_page",
]

PAGE_BYTES = 4_096
ZEROS = bytes(PAGE_BYTES)
ROOT = 0  # inode of the folder that is recorded


class RecordingError(Exception):
    """The program did something that the recorder does not follow: states made from it would lie."""


@dataclass(frozen=True)
class Inode:
    """A file or folder: its kind and mode, for ever; names and content are separate."""

    folder: bool
    mode: int
    scratch: bool = False


@dataclass(frozen=True)
class Write:
    """Bytes written to a file; `durable` if the call returns only when they are on the medium (O_DSYNC)."""

    began: int
    ended: int
    inode: int
    offset: int
    data: bytes
    durable: bool


@dataclass(frozen=True)
class Resize:
    """A file's size set by truncate, O_TRUNC or fallocate."""

    began: int
    ended: int
    inode: int
    size: int


@dataclass(frozen=True)
class Sync:
    """fsync or fdatasync of a file, or fsync of a folder."""

    began: int
    ended: int
    inode: int


@dataclass(frozen=True)
class Names:
    """One atomic change of names: (folder inode, name, inode now there or None)."""

    began: int
    ended: int
    changes: tuple[tuple[int, str, int | None], ...]


@dataclass(frozen=True)
class Said:
    """One line on standard output: what the world outside knows from `began` on."""

    began: int
    ended: int
    line: str


Operation = Write | Resize | Sync | Names | Said


@dataclass
class Recording:
    """A folder as it was before the program ran, on the medium, and what the program did then.

    Attributes:
        inodes: Every inode, also those that ended unlinked; 0 is the folder recorded.
        names_before: Folder inode -> names in it, before.
        pages_before: File inode -> its pages by number, all zero ones left out.
        sizes_before: File inode -> size, bytes.
        operations: In the order in which they began.
        scratch_after: Content of scratch files at the end, by inode.
    """

    inodes: dict[int, Inode] = field(default_factory=dict)
    names_before: dict[int, dict[str, int]] = field(default_factory=dict)
    pages_before: dict[int, dict[int, bytes]] = field(default_factory=dict)
    sizes_before: dict[int, int] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    scratch_after: dict[int, bytes] = field(default_factory=dict)

    def said(self) -> list[str]:
        """Every line that the program said."""
        return [op.line for op in self.operations if isinstance(op, Said)]


def cut_pages(pages: dict[int, bytes], size: int) -> None:
    """Cut a file's pages at a size: what is beyond reads as zeros if it grows again."""
    for number in [n for n in pages if n * PAGE_BYTES >= size]:
        del pages[number]
    last, rest = divmod(size, PAGE_BYTES)
    if rest and last in pages:
        set_page(pages, last, pages[last][:rest].ljust(PAGE_BYTES, b"\0"))


def set_page(pages: dict[int, bytes], number: int, page: bytes) -> None:
    if page == ZEROS:
        pages.pop(number, None)
    else:
        pages[number] = page
