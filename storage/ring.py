"""The ring: the newest samples of one shard, in a file that never grows.

One unnamed LMDB database holds everything, because each further database costs a page a commit. Keys are
one prefix byte and a big-endian number or a name; those that a commit touches (newest block, positions,
references, state) sort last and share a leaf page:

    D<u64>   dead letter          b<u64>   block, by its first seq      r<name>  reference values of a source
    H        header               p<name>  position of an input         s        RingState
    W<u32>   closed window

A commit is one transaction. It returns after LMDB's two flushes; only then may an input be acknowledged.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lmdb
import msgspec

from storage.block import HASH_BYTES, MAX_SAMPLES, Samples, decode_block, encode_block, read_header
from storage.env import create_environment, open_environment
from storage.errors import (
    CorruptBlockError,
    ForeignFolderError,
    FormatTooNewError,
    RingFullError,
    StorageError,
    WriteFailedError,
)
from storage.windows import ClosedWindow, Commit, DeadLetter, RingHeader, RingState, RingUsage

__all__ = ["RING_FORMAT", "Commit", "Ring", "RingHeader", "RingUsage"]

RING_FORMAT = 1
HIGH_WATER = 0.75  # of the map: evict from here (deletes fail too once LMDB is full)
LOW_WATER = 0.70  # and down to here, many blocks at a time: an eviction costs pages of its own
LARGEST_COMMIT = 0.25
TRIES = 4  # of a commit that finds no free run of pages, each after making room
MAX_DEAD_LETTERS = 10_000
MAX_WINDOW_ROWS = 4_096
_STATE, _HEADER = b"s", b"H"
_U64 = struct.Struct(">cQ")
_U32 = struct.Struct(">cI")


log = logging.getLogger("edgewater.ring")


class Ring:
    """One shard's ring. One process writes; others read in short transactions."""

    def __init__(self, folder: Path, env: lmdb.Environment, *, readonly: bool) -> None:
        self.folder = folder
        self._env = env
        self._readonly = readonly
        self._pid = os.getpid()
        self._dead = ""
        self.header = self._read_header()
        self.state = self.read_state()

    @classmethod
    def create(cls, folder: Path, *, shard: str, tokenizer_id: str, max_bytes: int) -> Ring:
        """Make a new ring of a fixed size, preallocated, and open it for writing."""
        header = RingHeader(RING_FORMAT, shard, tokenizer_id, secrets.token_bytes(32))
        rows = {_HEADER: msgspec.msgpack.encode(header), _STATE: msgspec.msgpack.encode(RingState())}
        create_environment(folder, max_bytes, rows)
        return cls(folder, open_environment(folder), readonly=False)

    @classmethod
    def open_or_create(cls, folder: Path, *, shard: str, tokenizer_id: str, max_bytes: int) -> Ring:
        """Open the ring of this shard for writing, making it if there is none.

        Raises: ForeignFolderError if it holds tokens of another tokenizer; FormatTooNewError.
        """
        if not folder.exists():
            return cls.create(folder, shard=shard, tokenizer_id=tokenizer_id, max_bytes=max_bytes)
        ring = cls(folder, open_environment(folder), readonly=False)
        if ring.header.tokenizer_id != tokenizer_id:
            ring.close()
            raise ForeignFolderError(
                f"holds tokens of tokenizer {ring.header.tokenizer_id}, the model has {tokenizer_id}",
                path=folder,
                hint="use the model it was made with, or a new data_dir",
            )
        return ring

    @classmethod
    def open_reader(cls, folder: Path) -> Ring:
        """Open for reading beside the writer."""
        return cls(folder, open_environment(folder, readonly=True), readonly=True)

    def close(self) -> None:
        """Close the environment; committed data needs no closing to be safe."""
        self._env.close()

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- writing ----------------------------------------------------------------------------------

    def commit(self, commit: Commit) -> RingState:
        """Make a commit durable: block, positions, references, windows, dead letters, state, all or none.

        Returns: The state after it. When this returns, its inputs may be acknowledged.
        Raises: RingFullError if it cannot fit; WriteFailedError on any I/O error, after which the
            ring refuses everything (LMDB goes on committing after a failed flush, we do not).
        """
        self._check_alive()
        state, samples = self.state, commit.samples
        if len(samples) and samples.first_seq != state.next_seq:
            raise ValueError(f"samples start at {samples.first_seq}, the ring goes on at {state.next_seq}")
        blocks = self._encode(samples, commit.stream_time)
        incoming = sum(len(block) for _, block in blocks)
        if incoming > LARGEST_COMMIT * self.map_bytes:
            hint = "raise ring.max_bytes, or lower ring.flush_ms so that commits get smaller"
            raise RingFullError(f"a commit of {incoming} bytes does not fit", path=self.folder, hint=hint)
        for left in reversed(range(TRIES)):
            try:
                self.state = self._write(commit, blocks, incoming)
                break
            except RingFullError:
                if not left:
                    raise
                self._make_room(incoming)
        return self.state

    def _write(self, commit: Commit, blocks: Sequence[tuple[int, bytes]], incoming: int) -> RingState:
        state, samples = self.state, commit.samples
        with self._writing() as txn:
            # Crash before the transaction's second flush: none of this happened. After: all of it.
            state = msgspec.structs.replace(
                state,
                commits=state.commits + 1,
                next_seq=state.next_seq + len(samples),
                tail_seq=self._evict(txn, incoming),
                digest=samples.extend_digest(state.digest),
                stream_time=commit.stream_time,
                window=commit.window,
                counters=dict(commit.counters),
                request=commit.request,
                clock=commit.clock,
            )
            for first_seq, block in blocks:
                txn.put(_U64.pack(b"b", first_seq), block)
            state = self._put_dead_letters(txn, state, commit.dead_letters)
            self._put_windows(txn, commit.closed)
            for name, position in commit.positions.items():
                _put_or_delete(txn, b"p" + name.encode(), position)
            for name, reference in commit.references.items():
                txn.put(b"r" + name.encode(), reference)
            txn.put(_STATE, msgspec.msgpack.encode(state))
        return state

    def _make_room(self, incoming: int) -> None:
        """Evict for a commit whose block finds no run of free pages long enough.

        LMDB takes a page that a transaction freed again only two transactions later, and a large block
        only where its pages lie side by side; so evict twice its size, and let a second one pass.
        """
        for share in (2 * incoming, 0):
            with self._writing() as txn:
                tail = self._evict_down_to(txn, _live_bytes(txn) - share) if share else self.state.tail_seq
                self.state = msgspec.structs.replace(self.state, tail_seq=tail)
                txn.put(_STATE, msgspec.msgpack.encode(self.state))

    def _encode(self, samples: Samples, arrival: float) -> list[tuple[int, bytes]]:
        parts = (samples[i : i + MAX_SAMPLES] for i in range(0, len(samples), MAX_SAMPLES))
        return [(part.first_seq, encode_block(part, self.header.tokenizer_id, arrival)) for part in parts]

    def _evict(self, txn: lmdb.Transaction, incoming: int) -> int:
        """Delete the oldest blocks above the high-water mark, down to the low one. Returns: the tail."""
        if _live_bytes(txn) + incoming <= HIGH_WATER * self.map_bytes:
            return self.state.tail_seq
        return self._evict_down_to(txn, int(LOW_WATER * self.map_bytes) - incoming)

    def _evict_down_to(self, txn: lmdb.Transaction, live_bytes: int) -> int:
        cursor = txn.cursor()
        while _live_bytes(txn) > live_bytes and cursor.set_range(b"b") and cursor.key()[:1] == b"b":
            cursor.delete()
        return _oldest_seq(txn, self.state.next_seq)

    def evict_older_than(self, stream_time: float) -> int:
        """Delete blocks whose commit is older than a stream time. Returns: samples deleted."""
        self._check_alive()
        state = self.state
        with self._writing() as txn:
            cursor = txn.cursor()
            while cursor.set_range(b"b") and cursor.key()[:1] == b"b":
                if _arrival_of(cursor.value()) >= stream_time:
                    break
                cursor.delete()
            tail = _oldest_seq(txn, state.next_seq)
            if tail != state.tail_seq:
                state = msgspec.structs.replace(state, tail_seq=tail)
                txn.put(_STATE, msgspec.msgpack.encode(state))
        deleted = tail - self.state.tail_seq
        self.state = state
        return deleted

    def _put_dead_letters(
        self, txn: lmdb.Transaction, state: RingState, letters: Sequence[DeadLetter]
    ) -> RingState:
        first, number, size = state.dead_first, state.dead_next, state.dead_bytes
        limit = self.map_bytes // 16
        for letter in letters:
            data = msgspec.msgpack.encode(letter)
            txn.put(_U64.pack(b"D", number), data)
            number, size = number + 1, size + len(data)
        while number - first > MAX_DEAD_LETTERS or (size > limit and number - first > 1):
            key = _U64.pack(b"D", first)
            size -= len(txn.get(key, b""))
            txn.delete(key)
            first += 1
        return msgspec.structs.replace(state, dead_first=first, dead_next=number, dead_bytes=size)

    def _put_windows(self, txn: lmdb.Transaction, closed: Sequence[ClosedWindow]) -> None:
        for row in closed:
            txn.put(_U32.pack(b"W", row.window), msgspec.msgpack.encode(row))
            if row.window > MAX_WINDOW_ROWS:
                txn.delete(_U32.pack(b"W", row.window - MAX_WINDOW_ROWS))

    # -- reading ----------------------------------------------------------------------------------

    @property
    def map_bytes(self) -> int:
        """Size of the file, bytes; fixed."""
        return int(self._env.info()["map_size"])

    def last_transaction(self) -> int:
        """Number of the newest transaction; it changes whenever anything did."""
        # Of a snapshot: the number in info() is of a commit that readers may not see yet.
        with self._reading() as txn:
            return int(txn.id())

    def read_state(self) -> RingState:
        """The state as last committed by whichever process writes."""
        with self._reading() as txn:
            found = txn.get(_STATE)
        return msgspec.msgpack.decode(found, type=RingState) if found else RingState()

    def read(self, first_seq: int, last_seq: int) -> Samples:
        """Copy a range of samples out of the ring; the read transaction ends before decoding.

        Args:
            first_seq, last_seq: Both included.
        Raises: LookupError if any of it is evicted or not there yet; CorruptBlockError.
        """
        raw: list[bytes] = []
        with self._reading() as txn:
            cursor = txn.cursor()
            for value in _blocks_from(cursor, first_seq):
                if read_header(value).first_seq > last_seq:
                    break
                raw.append(bytes(value))
        samples = Samples.concat(decode_block(block) for block in raw)
        start = first_seq - samples.first_seq
        part = samples[start : last_seq - samples.first_seq + 1] if raw and start >= 0 else Samples()
        if len(part) != last_seq - first_seq + 1:
            raise LookupError(f"samples {first_seq} to {last_seq} are no longer, or not yet, in the ring")
        return part

    def windows(self, after: int = 0) -> list[ClosedWindow]:
        """Closed windows with a number above `after`, in order."""
        with self._reading() as txn:
            cursor = txn.cursor()
            rows = []
            found = cursor.set_range(_U32.pack(b"W", after + 1))
            while found and cursor.key()[:1] == b"W":
                rows.append(msgspec.msgpack.decode(cursor.value(), type=ClosedWindow))
                found = cursor.next()
        return rows

    def named(self, prefix: str) -> dict[str, bytes]:
        """Rows by name: prefix "p" for positions, "r" for references."""
        with self._reading() as txn:
            cursor = txn.cursor()
            rows = {}
            found = cursor.set_range(prefix.encode())
            while found and cursor.key()[:1] == prefix.encode():
                rows[bytes(cursor.key()[1:]).decode()] = bytes(cursor.value())
                found = cursor.next()
        return rows

    def dead_letters(self, newest: int = 100) -> list[tuple[int, DeadLetter]]:
        """The newest dead letters with their numbers, oldest first."""
        state = self.read_state()
        start = max(state.dead_first, state.dead_next - newest)
        with self._reading() as txn:
            found = ((n, txn.get(_U64.pack(b"D", n))) for n in range(start, state.dead_next))
            return [(n, msgspec.msgpack.decode(data, type=DeadLetter)) for n, data in found if data]

    def newest_hashes(self, count: int) -> list[bytes]:
        """Dedup hashes of the newest samples, oldest first; the dedup set is rebuilt from them."""
        parts: list[bytes] = []
        with self._reading() as txn:
            cursor = txn.cursor()
            found = cursor.set_range(b"c") and cursor.prev()  # the state row sorts after every block
            while found and count > 0 and cursor.key()[:1] == b"b":
                hashes = _hashes_of(cursor.value())
                take = min(count, len(hashes) // HASH_BYTES)
                parts.append(hashes[len(hashes) - take * HASH_BYTES :])
                count -= take
                found = cursor.prev()
        return [part[i : i + HASH_BYTES] for part in reversed(parts) for i in range(0, len(part), HASH_BYTES)]

    def usage(self) -> RingUsage:
        """How full the ring is."""
        with self._reading() as txn:
            live = _live_bytes(txn)
        state = self.read_state()
        return RingUsage(self.map_bytes, live, state.tail_seq, state.next_seq)

    def check_blocks(self) -> Iterator[tuple[int, str]]:
        """Verify every block's checksum and the order of seqs.

        Yields: (first seq of a block, "" or what is wrong with it), each block copied out first.
        """
        state = self.read_state()
        expected = state.tail_seq
        while expected < state.next_seq:
            with self._reading() as txn:
                cursor = txn.cursor()
                if not cursor.set_range(_U64.pack(b"b", expected)) or cursor.key()[:1] != b"b":
                    yield expected, f"samples from {expected} on are missing"
                    return
                key, data = bytes(cursor.key()), bytes(cursor.value())
            first = _U64.unpack(key)[1]
            problem = "" if first == expected else f"samples {expected} to {first - 1} are missing"
            try:
                samples = decode_block(data)
                expected = first + len(samples)
            except StorageError as error:
                problem, expected = str(error), _after(first, data)
            yield first, problem

    # -- inside -----------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self._readonly:
            raise StorageError(
                "opened for reading only", path=self.folder, hint="only ingest writes the ring"
            )
        if os.getpid() != self._pid:
            raise StorageError("used after a fork", path=self.folder, hint="spawn processes, never fork")
        if self._dead:
            raise WriteFailedError(
                f"an earlier commit failed: {self._dead}", path=self.folder, hint="reopen it"
            )

    @contextmanager
    def _writing(self) -> Iterator[lmdb.Transaction]:
        try:
            with self._env.begin(write=True) as txn:
                yield txn
        except lmdb.MapFullError as error:
            raise RingFullError("the ring is full", path=self.folder, hint="raise ring.max_bytes") from error
        except (lmdb.Error, OSError) as error:
            self._dead = str(error)
            raise WriteFailedError(
                f"a commit failed: {error}",
                path=self.folder,
                hint="check the disk; Edgewater reopens on restart",
            ) from error

    @contextmanager
    def _reading(self) -> Iterator[lmdb.Transaction]:
        if os.getpid() != self._pid:
            raise StorageError("used after a fork", path=self.folder, hint="spawn processes, never fork")
        with self._env.begin(buffers=False) as txn:
            yield txn

    def _read_header(self) -> RingHeader:
        with self._reading() as txn:
            found = txn.get(_HEADER)
        if found is None:
            raise ForeignFolderError("is not a ring", path=self.folder, hint="check data_dir")
        header = msgspec.msgpack.decode(found, type=RingHeader)
        if header.format > RING_FORMAT:
            raise FormatTooNewError(
                f"ring format {header.format} is newer than {RING_FORMAT}",
                path=self.folder,
                hint="upgrade Edgewater",
            )
        return header


def _oldest_seq(txn: lmdb.Transaction, next_seq: int) -> int:
    """First seq of the oldest block, by its key: a block whose header is damaged can be evicted too."""
    cursor = txn.cursor()
    held = cursor.set_range(b"b") and cursor.key()[:1] == b"b"
    return int(_U64.unpack(cursor.key())[1]) if held else next_seq


def _arrival_of(block: bytes | memoryview) -> float:
    try:
        return read_header(block).arrival
    except CorruptBlockError:
        return -math.inf  # nothing can be done with it: it goes first


def _after(first_seq: int, block: bytes) -> int:
    """The seq after a block that may be damaged."""
    try:
        return max(read_header(block).last_seq, first_seq) + 1
    except StorageError:
        return first_seq + 1


def _hashes_of(block: bytes | memoryview) -> bytes:
    """Dedup hashes of a block; zeros, which match nothing, where it is damaged: ingest goes on."""
    try:
        return decode_block(block).hashes
    except CorruptBlockError as error:
        log.error("%s: its samples cannot be recognized when they come again", error)
    try:
        return bytes(HASH_BYTES * read_header(block).samples)
    except CorruptBlockError:
        return b""


def _blocks_from(cursor: lmdb.Cursor, seq: int) -> Iterator[bytes]:
    """Values of the block that holds `seq` and of all after it."""
    key = _U64.pack(b"b", seq)
    found = cursor.set_range(key)  # always true: the state row sorts last
    if cursor.key() != key and (not cursor.prev() or cursor.key()[:1] != b"b"):
        found = cursor.set_range(b"b")  # nothing before: start at the oldest block
    while found and cursor.key()[:1] == b"b":
        yield bytes(cursor.value())
        found = cursor.next()


def _put_or_delete(txn: lmdb.Transaction, key: bytes, value: bytes) -> None:
    if value:
        txn.put(key, value)
    else:
        txn.delete(key)


def _live_bytes(txn: lmdb.Transaction) -> int:
    """Bytes of the pages in use, the free list's not counted."""
    stat = txn.stat()
    return (stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]) * stat["psize"]
