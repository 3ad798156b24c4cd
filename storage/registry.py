"""The registry: which windows are being learned, which versions exist, which one is active.

    state       event                        next          durable effect
    (due)       claim: samples copied out    claimed       window file, then this row
    claimed     the child ended, files whole staged        candidate and result synced, then this row
    staged      verdicts recomputed, passed  evaluated     scores in the row
    staged      a criterion failed           rejected      scores in the row; the cursor moves on
    evaluated   version signed and renamed   promoted      version row, active pointer and this row together
    promoted    window kept for rehearsal    acknowledged  work folder gone; the cursor moves on
    claimed     five own failures            quarantined   the cursor moves on
    (due)       evicted before its claim     expired       the cursor moves on
    (due)       nothing in it to learn       skipped       the cursor moves on

Each arrow is one short transaction, written after the files that it names are durable, and may be repeated
after a crash with the same outcome. Every row is sealed (storage/rows.py), and each transaction writes a row
with its own id and the sum of the seals, so that damage never passes for an older truth.
"""

from __future__ import annotations

import enum
import fcntl
import functools
import operator
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import lmdb
import msgspec

from storage.env import begin_read, create_environment, open_environment
from storage.errors import (
    CorruptRingError,
    ForeignFolderError,
    StorageError,
    WriteFailedError,
)
from storage.rows import SealedRows, open_header, rows_from, seal, seal_header, sum_of, unseal

__all__ = [
    "ActivePointer",
    "AuditRow",
    "Registry",
    "RegistryWriter",
    "UpdateRow",
    "UpdateState",
    "VersionRow",
    "first_rows",
]

REGISTRY_FORMAT = 2
MAP_BYTES = 32 << 20
MAX_AUDIT_ROWS = 10_000
MAX_UPDATE_ROWS = 4_096  # windows back; a row without its result takes 200 bytes
MAX_RESULTS = 512  # windows back that keep their scores, 3 KiB each
SWEPT_ROWS = 16  # a decision may jump over so many merged windows and still sweep each
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")


class UpdateState(enum.StrEnum):
    """Where an update stands."""

    CLAIMED = "claimed"
    STAGED = "staged"
    EVALUATED = "evaluated"
    PROMOTED = "promoted"
    ACKNOWLEDGED = "acknowledged"
    REJECTED = "rejected"
    QUARANTINED = "quarantined"
    SKIPPED = "skipped"
    EXPIRED = "expired"


_ARROWS: dict[UpdateState | None, frozenset[UpdateState]] = {
    None: frozenset({UpdateState.CLAIMED, UpdateState.EXPIRED, UpdateState.SKIPPED}),
    UpdateState.CLAIMED: frozenset({UpdateState.STAGED, UpdateState.QUARANTINED, UpdateState.CLAIMED}),
    UpdateState.STAGED: frozenset({UpdateState.EVALUATED, UpdateState.REJECTED, UpdateState.CLAIMED}),
    UpdateState.EVALUATED: frozenset({UpdateState.PROMOTED, UpdateState.CLAIMED}),
    UpdateState.PROMOTED: frozenset({UpdateState.ACKNOWLEDGED}),
}
_DECIDED = frozenset(
    {
        UpdateState.ACKNOWLEDGED,
        UpdateState.REJECTED,
        UpdateState.QUARANTINED,
        UpdateState.SKIPPED,
        UpdateState.EXPIRED,
    }
)


class UpdateRow(msgspec.Struct, frozen=True):
    """One update, keyed by shard and window.

    Attributes:
        window, last_window: Its windows, both included; more than one where due windows were merged.
        first_seq, last_seq, samples: What it owns.
        samples_sha256: Of the window file.
        parent: Version that it starts from, 0 for the base.
        seed: A hash of update.seed, shard and window.
        failures: Attempts that ended by themselves without passing a new checkpoint.
        outside_kills: Attempts killed from outside, without progress.
        progress: Steps of the newest checkpoint.
        version: Version that it made, 0 while there is none.
        reason: Why it was rejected, quarantined, skipped or expired.
        result: The child's result as JSON, b"" before it is staged.
        settings: Digest of the model, recipe and limits that it was claimed under.
        claimed_at: Stream time of the claim, seconds; the cooldown runs from it.
    """

    shard: str
    window: int
    last_window: int
    first_seq: int
    last_seq: int
    samples: int
    state: UpdateState
    parent: int = 0
    samples_sha256: str = ""
    seed: int = 0
    failures: int = 0
    outside_kills: int = 0
    progress: int = 0
    version: int = 0
    reason: str = ""
    result: bytes = b""
    settings: str = ""
    claimed_at: float = 0.0

    @property
    def decided(self) -> bool:
        """Whether the next window of the shard may start."""
        return self.state in _DECIDED


class VersionRow(msgspec.Struct, frozen=True):
    """One version that the gate let through.

    Attributes:
        version: Its number, from 1.
        folder: Name of its folder under versions/.
        parent: Version it was trained from, 0 for the base.
        shard, window: The update that made it.
        sha256: Of adapter_model.safetensors.
        manifest_sha256: Of manifest.json.
        created: Wall-clock seconds; for people, no decision reads it.
    """

    version: int
    folder: str
    parent: int
    shard: str
    window: int
    sha256: str
    manifest_sha256: str
    created: float


class ActivePointer(msgspec.Struct, frozen=True):
    """Which version is active, and which was before: 0 is the base."""

    version: int = 0
    previous: int = 0


class AuditRow(msgspec.Struct, frozen=True):
    """Who changed what: promotions, rollbacks, requests, alarms."""

    at: float
    actor: str
    action: str
    detail: str


class _Header(msgspec.Struct, frozen=True):
    format: int
    check: bytes = b""


class _State(msgspec.Struct, frozen=True):
    """Which transaction wrote last, and the XOR of the seals of all rows but this one and the header."""

    txn: int
    rows_sum: int


_HEADER, _STATE = b"H", b"s"


class Registry:
    """Small rows that several processes read and, in short transactions, write."""

    def __init__(self, folder: Path, env: lmdb.Environment) -> None:
        self.folder = folder
        self._env = env
        with begin_read(env, folder) as txn:
            found = txn.get(_HEADER)
            if found is None:
                raise ForeignFolderError("is not a registry", path=folder, hint="check data_dir")
            number = open_header(bytes(found), REGISTRY_FORMAT, folder)["format"]
            if number < REGISTRY_FORMAT:
                hint = "the next start of `edgewater run` brings it up to date"
                raise StorageError(f"is of format {number}", path=folder, hint=hint)
            self._check_rows(txn)

    @classmethod
    def open_or_create(cls, folder: Path) -> Registry:
        """Open the registry, making it if there is none; safe against others doing the same.

        A registry of an older format is brought up to date.
        """
        from storage.migrate import migrate_registry

        fd = os.open(folder.parent / "run" / "registry.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            migrate_registry(folder)
            if not folder.exists():
                create_environment(folder, MAP_BYTES, first_rows({}))
        finally:
            os.close(fd)
        return cls._opened(folder, readonly=False)

    @classmethod
    def open_reader(cls, folder: Path) -> Registry:
        """Open for reading only."""
        return cls._opened(folder, readonly=True)

    @classmethod
    def _opened(cls, folder: Path, *, readonly: bool) -> Registry:
        env = open_environment(folder, readonly=readonly)
        try:
            return cls(folder, env)
        except BaseException:
            env.close()  # opening it a second time in one process would fail
            raise

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def last_transaction(self) -> int:
        """Number of the newest transaction; unchanged means that nothing happened."""
        # Of a snapshot: the number in info() is of a commit that readers may not see yet.
        with begin_read(self._env, self.folder) as txn:
            return int(txn.id())

    @contextmanager
    def write(self) -> Iterator[RegistryWriter]:
        """One transaction: everything in it happens, or nothing.

        Raises: WriteFailedError on an I/O error; CorruptRingError.
        """
        try:
            with self._env.begin(write=True) as txn:
                # Its own id is one more than that of the snapshot it starts from.
                rows = SealedRows(txn, _state_in(txn, txn.id() - 1, self.folder).rows_sum)
                yield RegistryWriter(txn, rows)
                if rows.changed:
                    state = _State(txn.id(), rows.total)
                    txn.put(_STATE, seal(_STATE, msgspec.msgpack.encode(state)))
        except lmdb.Error as error:
            raise WriteFailedError(
                f"a registry commit failed: {error}", path=self.folder, hint="check the disk, then restart"
            ) from error

    def updates(self, shard: str | None = None) -> list[UpdateRow]:
        """All updates in order of shard and window, or those of one shard."""
        prefix = b"U" if shard is None else b"U" + shard.encode() + b"\0"
        return [msgspec.msgpack.decode(value, type=UpdateRow) for _, value in self._rows(prefix)]

    def cursor(self, shard: str) -> int:
        """Number of the last window that is decided, 0 before the first."""
        return self._number(b"c" + shard.encode())

    def unused_numbers(self, shard: str) -> tuple[int, int]:
        """The first window number and the first seq of a shard that no update owns or passed."""
        rows = self.updates(shard)
        window = max([self.cursor(shard), *(row.last_window for row in rows)])
        return window + 1, max([0, *(row.last_seq + 1 for row in rows)])

    def versions(self) -> list[VersionRow]:
        """All versions in order of their numbers."""
        return [msgspec.msgpack.decode(value, type=VersionRow) for _, value in self._rows(b"V")]

    def active(self) -> ActivePointer:
        """The active version."""
        with begin_read(self._env, self.folder) as txn:
            found = _get(txn, b"a")
        return msgspec.msgpack.decode(found, type=ActivePointer) if found else ActivePointer()

    def requests(self) -> int:
        """Number of the newest update request."""
        return self._number(b"q")

    def audit(self, newest: int = 100) -> list[AuditRow]:
        """The newest audit rows, oldest first."""
        rows = [msgspec.msgpack.decode(value, type=AuditRow) for _, value in self._rows(b"A")]
        return rows[max(0, len(rows) - newest) :]

    def _rows(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        with begin_read(self._env, self.folder) as txn:
            return list(rows_from(txn, prefix))

    def _check_rows(self, txn: lmdb.Transaction) -> None:
        """Every row as it was sealed, and none lost. Raises: CorruptRingError."""
        total, cursor = 0, txn.cursor()
        for key, value in cursor.iternext(keys=True, values=True):
            if key not in (_HEADER, _STATE):
                unseal(bytes(key), value)
                total ^= sum_of(value)
        if total != _state_in(txn, txn.id(), self.folder).rows_sum:
            raise CorruptRingError("rows are lost", path=self.folder, hint="run 'edgewater doctor'")

    def _number(self, key: bytes) -> int:
        with begin_read(self._env, self.folder) as txn:
            found = _get(txn, key)
        return int(_U64.unpack(found)[0]) if found else 0


def first_rows(rows: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """What the first transaction of a registry with these rows (unsealed) holds."""
    sealed = {key: seal(key, value) for key, value in rows.items()}
    total = functools.reduce(operator.xor, map(sum_of, sealed.values()), 0)
    state = msgspec.msgpack.encode(_State(1, total))
    return {_HEADER: seal_header(_Header(REGISTRY_FORMAT)), **sealed, _STATE: seal(_STATE, state)}


def _state_in(txn: lmdb.Transaction, expected: int, folder: Path) -> _State:
    hint = "run 'edgewater doctor'"
    found = txn.get(_STATE)
    if found is None:
        raise CorruptRingError("has no state row", path=folder, hint=hint)
    state = msgspec.msgpack.decode(unseal(_STATE, found), type=_State)
    if state.txn != expected:
        what = f"a meta page is damaged: transaction {expected} holds the state of {state.txn}"
        raise CorruptRingError(what, path=folder, hint=hint)
    return state


def _get(txn: lmdb.Transaction, key: bytes) -> bytes | None:
    found = txn.get(key)
    return None if found is None else unseal(key, found)


class RegistryWriter:
    """The writes that one registry transaction may hold."""

    def __init__(self, txn: lmdb.Transaction, rows: SealedRows) -> None:
        self._txn, self._rows = txn, rows

    def put_update(self, row: UpdateRow) -> None:
        """Write an update's row; a decided one moves the shard's cursor.

        Raises: ValueError on an arrow that the table above does not have (writing the same row again
            is none: a crash may repeat it).
        """
        key = b"U" + row.shard.encode() + b"\0" + _U32.pack(row.window)
        found = self._rows.get(key)
        before = msgspec.msgpack.decode(found, type=UpdateRow) if found else None
        if before != row and row.state not in _ARROWS.get(before.state if before else None, frozenset()):
            raise ValueError(f"window {row.window}: {before.state if before else 'due'} -> {row.state}")
        self._rows.put(key, msgspec.msgpack.encode(row))
        if row.decided:
            # Only ever forward: a row that a crash repeats may be older than the newest decision.
            found = self._rows.get(b"c" + row.shard.encode())
            newest = max(row.last_window, _U64.unpack(found)[0] if found else 0)
            self._rows.put(b"c" + row.shard.encode(), _U64.pack(newest))
            self._forget_old(row)

    def _forget_old(self, row: UpdateRow) -> None:
        """Keep the registry bounded: old rows lose their results (manifests have theirs), then go."""
        prefix = b"U" + row.shard.encode() + b"\0"
        cursor = self._txn.cursor()
        while cursor.set_range(prefix) and bytes(cursor.key()).startswith(prefix):
            if _U32.unpack(bytes(cursor.key())[len(prefix) :])[0] > row.window - MAX_UPDATE_ROWS:
                break
            self._rows.delete(bytes(cursor.key()))
        found = cursor.set_range(prefix + _U32.pack(max(row.window - MAX_RESULTS, 0)))
        for _ in range(SWEPT_ROWS if found else 0):
            if not cursor.prev() or not bytes(cursor.key()).startswith(prefix):
                break
            old = msgspec.msgpack.decode(unseal(bytes(cursor.key()), cursor.value()), type=UpdateRow)
            if old.result:
                slim = msgspec.structs.replace(old, result=b"")
                self._rows.put(bytes(cursor.key()), msgspec.msgpack.encode(slim))

    def put_version(self, row: VersionRow) -> None:
        """Write a version's row."""
        self._rows.put(b"V" + _U32.pack(row.version), msgspec.msgpack.encode(row))

    def active(self) -> int:
        """The active version inside this transaction."""
        found = self._rows.get(b"a")
        return msgspec.msgpack.decode(found, type=ActivePointer).version if found else 0

    def set_active(self, version: int) -> None:
        """Move the active pointer; the version that was active becomes the previous one."""
        found = self._rows.get(b"a")
        before = msgspec.msgpack.decode(found, type=ActivePointer) if found else ActivePointer()
        if version != before.version:
            self._rows.put(b"a", msgspec.msgpack.encode(ActivePointer(version, before.version)))

    def add_request(self) -> int:
        """Ask that the open window be closed now. Returns: the request's number."""
        found = self._rows.get(b"q")
        number = (_U64.unpack(found)[0] if found else 0) + 1
        self._rows.put(b"q", _U64.pack(number))
        return int(number)

    def add_audit(self, row: AuditRow) -> None:
        """Append to the audit; the oldest rows go when there are more than 10,000."""
        found = self._rows.get(b"n")
        number = _U64.unpack(found)[0] if found else 0
        self._rows.put(b"A" + _U64.pack(number), msgspec.msgpack.encode(row))
        self._rows.put(b"n", _U64.pack(number + 1))
        if number >= MAX_AUDIT_ROWS:
            self._rows.delete(b"A" + _U64.pack(number - MAX_AUDIT_ROWS))
