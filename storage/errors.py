"""The errors that a caller of storage can decide on; each message ends in what to do."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "CorruptBlockError",
    "CorruptRingError",
    "ForeignFolderError",
    "FormatTooNewError",
    "LockHeldError",
    "MissingDictionaryError",
    "RingFullError",
    "StorageError",
    "WriteFailedError",
]


class StorageError(Exception):
    """Say what failed, where, and what to do."""

    def __init__(self, message: str, *, path: Path | None = None, hint: str = "") -> None:
        self.path = path
        self.hint = hint
        place = f"{path}: " if path is not None else ""
        super().__init__(f"{place}{message}" + (f" ({hint})" if hint else ""))


class CorruptBlockError(StorageError):
    """A block whose checksum or shape is wrong; it must not be trained on."""


class MissingDictionaryError(CorruptBlockError):
    """A block whose dictionary is lost: its columns cannot be unpacked, its hashes can be read."""


class CorruptRingError(StorageError):
    """A row, or the tree that holds it, is damaged: the ring must be repaired before it is used."""


class ForeignFolderError(StorageError):
    """A folder that is not ours, or not safe to use (owner, mode, symlink, other PID namespace)."""


class FormatTooNewError(StorageError):
    """A folder written by a newer Edgewater; an older one must not touch it."""


class LockHeldError(StorageError):
    """Another process already holds this role on this data folder."""


class RingFullError(StorageError):
    """One commit is larger than the ring can take, even after eviction."""


class WriteFailedError(StorageError):
    """A write or sync failed: the handle is dead, reopen and verify before going on."""
