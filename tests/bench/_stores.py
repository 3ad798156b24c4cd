"""What the flash bench compares: Edgewater's ring behind its real steps, plain LMDB, a SQLite table.

All take lists of lines as received, make each list durable in one commit, and drop what they had before by
a 16-byte keyed hash. The two plain ones keep everything: nothing is ever deleted there, which favours them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sqlite3
from pathlib import Path
from typing import Protocol

import lmdb
import msgspec

from pipeline.commit import CommitStep
from pipeline.config import Config
from pipeline.decode import decode_event
from pipeline.events import Batch, Line, Origin
from pipeline.ingest import build_steps
from pipeline.sources.tail import FilePosition
from pipeline.tokenization import BatchTokenizer
from pipeline.triggers import ThresholdTrigger
from storage.ring import Ring

__all__ = ["EdgewaterStore", "LmdbStore", "SqliteStore", "Store"]

EVENTS_A_SECOND = 10.0  # how fast the stream's clock runs; only the clock of the ring sees it
_KEY = b"bench"
_BLOCK = 4_096
_ZERO_RANGE = 0x10  # FALLOC_FL_ZERO_RANGE: ext4 marks the extents unwritten
_libc = ctypes.CDLL(None, use_errno=True)
_INPUT = "files:pump:/var/spool/edgewater/pump.jsonl"


class Store(Protocol):
    """Something that makes events durable."""

    name: str

    def commit(self, lines: list[bytes]) -> None:
        """Make these durable, all or none."""

    def touched(self) -> list[Path]:
        """Files that a commit writes: what the journal's timer finds changed."""

    def close(self) -> None:
        """Let go of the files."""


class EdgewaterStore:
    """Lines through decode, redact, dedup, tokenize and commit, as ingest strings them together."""

    name = "edgewater"

    def __init__(
        self,
        folder: Path,
        config: Config,
        tokenizer: BatchTokenizer,
        ring_bytes: int,
        *,
        unwritten: bool = False,
    ) -> None:
        tokenizer_id = tokenizer.manifest.tokenizer_id
        make = {"shard": "main", "tokenizer_id": tokenizer_id, "max_bytes": ring_bytes}
        self.data = folder / "ring" / "data.mdb"
        self.ring = Ring.open_or_create(folder / "ring", **make)  # type: ignore[arg-type]
        if unwritten:
            self.ring.close()
            _only_allocate(self.data)
            self.ring = Ring.open_or_create(folder / "ring", **make)  # type: ignore[arg-type]
        self._steps = list(build_steps(config, self.ring, tokenizer).values())
        trigger = ThresholdTrigger(config.trigger.min_samples, config.trigger.min_tokens)
        self._commit = CommitStep(self.ring, trigger, lambda: 0, lambda closed: None)
        self._lines = self._offset = 0

    def commit(self, lines: list[bytes]) -> None:
        """One Batch through every step."""
        batch = self._batch(lines)
        for step in self._steps:
            batch = step(batch)
        done = self._commit(batch)
        if done.outcome.samples != len(lines):
            raise AssertionError(f"of {len(lines)} events {done.outcome.samples} were stored: {done.outcome}")

    def touched(self) -> list[Path]:
        """The ring's one file."""
        return [self.data]

    def close(self) -> None:
        """Close the ring."""
        self.ring.close()

    def _batch(self, lines: list[bytes]) -> Batch:
        arrival = 1.6e9 + self._lines / EVENTS_A_SECOND
        origin = Origin("pump", _INPUT, arrival, began=1.6e9)
        made = []
        for line in lines:
            made.append(Line(line, self._offset, origin))
            self._offset += len(line) + 1
        self._lines += len(lines)
        position = FilePosition(7, 4711, self._offset, bytes(16), 4096, _INPUT.split(":")[2], 1.6e9)
        return Batch(made, positions={_INPUT: msgspec.msgpack.encode(position)})


class LmdbStore:
    """One value a record, and a second database that finds each hash; preallocated, full syncs."""

    name = "lmdb, a value a record"

    def __init__(self, folder: Path, map_bytes: int) -> None:
        self._folder = folder / "lmdb"
        self._env = lmdb.open(str(self._folder), map_size=map_bytes, max_dbs=2, lib_version=0)
        with (self._folder / "data.mdb").open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, map_bytes)
            os.fsync(file.fileno())
        self._records = self._env.open_db(b"records", integerkey=True)
        self._hashes = self._env.open_db(b"hashes")
        self._next = 0

    def commit(self, lines: list[bytes]) -> None:
        """Put each that is new under the next number, and its hash beside it."""
        with self._env.begin(write=True) as txn:
            for line in lines:
                digest, event = _record(line)
                number = self._next.to_bytes(8, "little")
                if txn.put(digest, number, db=self._hashes, overwrite=False):
                    txn.put(number, event, db=self._records, append=True)
                    self._next += 1

    def touched(self) -> list[Path]:
        """Its one file."""
        return [self._folder / "data.mdb"]

    def close(self) -> None:
        """Close it."""
        self._env.close()


class SqliteStore:
    """A table with a UNIQUE index on the hash; write-ahead log, synchronous=FULL."""

    name = "sqlite, wal"

    def __init__(self, folder: Path) -> None:
        self._path = folder / "events.sqlite"
        self._db = sqlite3.connect(self._path, isolation_level=None)
        self._db.execute("PRAGMA page_size = 4096")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, hash BLOB UNIQUE, event BLOB)")

    def commit(self, lines: list[bytes]) -> None:
        """Insert each that is new."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany(
            "INSERT OR IGNORE INTO events (hash, event) VALUES (?, ?)", [_record(line) for line in lines]
        )
        self._db.execute("COMMIT")

    def touched(self) -> list[Path]:
        """The table and its log (the shared-memory index is written back like any mapped file)."""
        return [self._path, self._path.with_name(self._path.name + "-wal")]

    def close(self) -> None:
        """Close it, which empties the log."""
        self._db.close()


def _record(line: bytes) -> tuple[bytes, bytes]:
    event = decode_event(line)
    return hashlib.blake2b(line, digest_size=16, key=_KEY).digest(), msgspec.msgpack.encode(event)


def _only_allocate(path: Path) -> None:
    """Leave the empty rest of a new file as posix_fallocate would have: allocated, but never written."""
    data = path.read_bytes()
    used = len(data.rstrip(b"\0")) + _BLOCK & -_BLOCK
    with path.open("rb+") as file:
        if _libc.fallocate(file.fileno(), _ZERO_RANGE, ctypes.c_long(used), ctypes.c_long(len(data) - used)):
            raise OSError(ctypes.get_errno(), "fallocate failed", str(path))
        os.fsync(file.fileno())
