"""The ring: the newest samples of one shard, in a file that never grows.

One unnamed LMDB database holds everything, because each further database costs a page a commit. Keys are
one prefix byte and a big-endian number or a name; those that a commit touches (positions, references, state,
newest block) lie side by side and share a leaf page:

    D<u64>   dead letter            W<u32>   closed window          r<name>  reference values of a source
    H        header                 Z<u32>   zstd dictionary        s        RingState
    Q<u64>   quarantined samples    p<name>  position of an input   t<u64>   block, by 2^64-1 - first seq

A commit is one transaction. It returns after LMDB's two flushes; only then may an input be acknowledged.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import lmdb
import msgspec

from storage.block import block_hashes, decode_block, read_header
from storage.env import begin_read, create_environment, open_environment
from storage.errors import (
    CorruptBlockError,
    CorruptRingError,
    ForeignFolderError,
    RingFullError,
    StorageError,
    WriteFailedError,
)
from storage.forgetting import forget
from storage.ring_damage import find_damages, quarantine, sum_of_blocks
from storage.ring_dictionary import RingDictionaries
from storage.ring_header import RING_FORMAT, first_rows, read_ring_header
from storage.ring_writer import (
    HEADER,
    STATE,
    U32,
    U64,
    RingWriter,
    arrival_of,
    block_key,
    blocks_from,
    encode_runs,
    is_block,
    live_bytes,
    newest_blocks,
    seq_of,
)
from storage.rows import rows_from, sum_of, unseal
from storage.samples import HASH_BYTES, Samples
from storage.windows import (
    ClosedWindow,
    Commit,
    DeadLetter,
    OpenWindow,
    QuarantineRow,
    Reader,
    RingHeader,
    RingState,
    RingUsage,
)

__all__ = ["Commit", "Ring", "RingHeader", "RingUsage"]

LARGEST_COMMIT = 0.25
TRIES = 4  # of a commit that finds no free run of pages, each after making room

log = logging.getLogger("edgewater.ring")


class Ring:
    """One shard's ring. One process writes; others read in short transactions.

    Attributes:
        header: What it is.
        state: As last committed; of a reader, as it was when it was opened.
        merge_span_s: Stream time that merged commits may span, seconds; whoever evicts by age sets a part of
            the age, because a block is evicted whole when the newest in it is old enough.
    """

    def __init__(self, folder: Path, env: lmdb.Environment, *, readonly: bool) -> None:
        self.folder = folder
        self._env = env
        self._readonly = readonly
        self._page_bytes = int(env.stat()["psize"])
        self._pid = os.getpid()
        self._dead = ""
        self.merge_span_s = math.inf
        self.dictionaries = RingDictionaries(self)
        self.header = self._read_header()
        self.state = self.read_state()
        if not readonly:
            self._check_rows()
            self.dictionaries.mend()

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        shard: str,
        tokenizer_id: str,
        max_bytes: int,
        least_window: int = 1,
        least_seq: int = 0,
        dedup_key: bytes = b"",
    ) -> Ring:
        """Make a new ring of a fixed size, preallocated, and open it for writing.

        Args:
            least_window, least_seq: Where its numbers begin: a ring before it may have used those below.
            dedup_key: Secret of the host's other shards, so that what moves between them is recognized; empty
                makes a new one.
        """
        header = RingHeader(RING_FORMAT, shard, tokenizer_id, dedup_key or secrets.token_bytes(32))
        state = RingState(
            next_seq=least_seq,
            tail_seq=least_seq,
            window=OpenWindow(least_window, least_seq),
            counters={"events": least_seq, "samples": least_seq} if least_seq else {},
        )
        create_environment(folder, max_bytes, first_rows(header, state), written=True)
        return cls(folder, open_environment(folder), readonly=False)

    @classmethod
    def open_or_create(
        cls,
        folder: Path,
        *,
        shard: str,
        tokenizer_id: str,
        max_bytes: int,
        least_window: int = 1,
        least_seq: int = 0,
        dedup_key: bytes = b"",
    ) -> Ring:
        """Open the ring of this shard for writing; make it if there is none, migrate an older format.

        Args:
            least_window, least_seq, dedup_key: As of `create`.
        Raises: ForeignFolderError if it holds tokens of another tokenizer; FormatTooNewError;
            CorruptRingError if a row is damaged (`storage.salvage` repairs it).
        """
        from storage.migrate import migrate_ring

        migrate_ring(folder)
        if not folder.exists():
            return cls.create(
                folder, shard=shard, tokenizer_id=tokenizer_id, max_bytes=max_bytes,
                least_window=least_window, least_seq=least_seq, dedup_key=dedup_key,
            )  # fmt: skip
        ring = cls._opened(folder, readonly=False)
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
        return cls._opened(folder, readonly=True)

    @classmethod
    def _opened(cls, folder: Path, *, readonly: bool) -> Ring:
        env = open_environment(folder, readonly=readonly)
        try:
            return cls(folder, env, readonly=readonly)
        except BaseException:
            env.close()  # opening it a second time in one process would fail
            raise

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
        blocks = self._encode(samples, arrival=commit.stream_time)
        incoming = sum(len(block) for _, block in blocks)
        if incoming > LARGEST_COMMIT * self.map_bytes:
            hint = "raise ring.max_bytes, or lower ring.flush_ms so that commits get smaller"
            raise RingFullError(f"a commit of {incoming} bytes does not fit", path=self.folder, hint=hint)
        for left in reversed(range(TRIES)):
            try:
                self._write(commit, blocks, incoming, merging=left == TRIES - 1)
                break
            except RingFullError:
                if not left:
                    raise
                with contextlib.suppress(RingFullError):
                    self._make_room(incoming)
        self.dictionaries.train_once()
        return self.state

    def _write(
        self, commit: Commit, blocks: Sequence[tuple[int, bytes]], incoming: int, *, merging: bool
    ) -> None:
        state, samples = self.state, commit.samples
        with self.writing() as writer:
            # Crash before the transaction's second flush: none of this happened. After: all of it.
            writer.make_room(incoming)
            for first_seq, block in blocks:
                writer.put_block(first_seq, block)
            if merging:
                writer.merge_small_blocks(self.merge_span_s)
            writer.put_windows(commit.closed)
            for name, position in commit.positions.items():
                writer.put_named(b"p", name, position)
            for name, reference in commit.references.items():
                writer.put_named(b"r", name, reference)
            writer.state = msgspec.structs.replace(
                writer.put_dead_letters(
                    writer.delete_dead_letters(state, commit.deleted_letters), commit.dead_letters
                ),
                commits=state.commits + 1,
                next_seq=state.next_seq + len(samples),
                digest=samples.extend_digest(state.digest),
                stream_time=commit.stream_time,
                window=commit.window,
                counters=dict(commit.counters),
                request=commit.request,
                clock=commit.clock,
            )

    def _make_room(self, incoming: int) -> None:
        """Evict for a commit whose block finds no run of free pages long enough.

        LMDB takes a page that a transaction freed again only two transactions later, and a large block
        only where its pages lie side by side; so evict twice its size, and let a second one pass.
        """
        for share in (2 * incoming, 0):
            with self.writing() as writer:
                if share:
                    writer.evict_down_to(live_bytes(writer.txn) - share)

    def evict_older_than(self, stream_time: float) -> int:
        """Delete blocks whose commit is older than a stream time. Returns: samples deleted."""
        self._check_alive()
        with self.reading() as txn:
            oldest = next(blocks_from(txn), None)
            if oldest is None or arrival_of(oldest[1]) >= stream_time:
                return 0
        before = self.state.tail_seq
        with self.writing() as writer:
            writer.evict_older_than(stream_time)
        return self.state.tail_seq - before

    def forget(self, subject: str) -> int:
        """Blank every sample about a subject. Returns: how many there were.

        Their seqs remain, and their hashes, so that what is delivered again stays out. The ring digest is
        of what came in and does not change. A large ring takes several transactions; after a crash between
        two of them, forgetting again finishes.
        """
        self._check_alive()
        return forget(self, subject)

    # -- damage -----------------------------------------------------------------------------------

    def quarantine(self, into: Path) -> list[QuarantineRow]:
        """Set damaged blocks aside and put blank samples in their place, so that everything goes on.

        Args:
            into: Folder for the damaged bytes.
        Returns: What was lost, as it was noted.
        """
        self._check_alive()
        return quarantine(self, into)

    def quarantined(self) -> list[QuarantineRow]:
        """Samples that were lost to damage, the newest 1,000 cases, in the order of their seqs."""
        with self.reading() as txn:
            return [msgspec.msgpack.decode(value, type=QuarantineRow) for _, value in rows_from(txn, b"Q")]

    def check_blocks(self) -> Iterator[tuple[int, str]]:
        """Verify every block, as the writer or where nobody writes: checksum, columns, order of seqs.

        Yields: (first seq, what is wrong from there on) for each damage.
        """
        for damage in find_damages(self):
            yield damage.first_seq, damage.reason
        state = self.read_state()
        if sum_of_blocks(self) != state.blocks_sum:
            yield state.tail_seq, "a block is not the one that was written last"

    def _check_rows(self) -> None:
        """Every row as it was sealed, and none lost. Raises: CorruptRingError."""
        total = 0
        with self.reading() as txn:
            for prefix in (b"D", b"Q", b"W", b"Z", b"p", b"r"):
                cursor = txn.cursor()
                found = cursor.set_range(prefix)
                while found and cursor.key()[:1] == prefix:
                    value = cursor.value()
                    if prefix != b"Z":  # a dictionary has a copy
                        unseal(bytes(cursor.key()), value)
                    total ^= sum_of(value)
                    found = cursor.next()
        if total != self.state.rows_sum:
            raise CorruptRingError("rows are lost", path=self.folder, hint="run 'edgewater doctor'")

    # -- reading ----------------------------------------------------------------------------------

    @property
    def map_bytes(self) -> int:
        """Size of the file, bytes; fixed."""
        return int(self._env.info()["map_size"])

    def last_transaction(self) -> int:
        """Number of the newest transaction; it changes whenever anything did."""
        # Of a snapshot: the number in info() is of a commit that readers may not see yet.
        with self.reading() as txn:
            return int(txn.id())

    def read_state(self) -> RingState:
        """The state as last committed by whichever process writes. Raises: CorruptRingError."""
        with self.reading() as txn:
            return self._state_in(txn)

    def _state_in(self, txn: lmdb.Transaction) -> RingState:
        found = txn.get(STATE)
        if found is None:
            raise CorruptRingError("has no state row", path=self.folder, hint="run 'edgewater doctor'")
        state = msgspec.msgpack.decode(unseal(STATE, found), type=RingState)
        if state.txn != txn.id():
            # Each transaction writes its own id: this snapshot is not the one that its meta page claims.
            what = f"a meta page is damaged: transaction {txn.id()} holds the state of {state.txn}"
            raise CorruptRingError(what, path=self.folder, hint="run 'edgewater doctor'")
        return state

    def read(self, first_seq: int, last_seq: int) -> Samples:
        """Copy a range of samples out of the ring; the read transaction ends before decoding.

        Args:
            first_seq, last_seq: Both included.
        Returns: The samples; those of a damaged block are blank.
        Raises: LookupError if any of it is evicted or not there yet; CorruptRingError.
        """
        raw: list[tuple[int, bytes]] = []
        with self.reading() as txn:
            state = self._state_in(txn)
            if not state.tail_seq <= first_seq <= last_seq < state.next_seq:
                raise LookupError(f"samples {first_seq} to {last_seq} are no longer, or not yet, in the ring")
            end = state.next_seq
            for key, block in blocks_from(txn, first_seq):
                if key > last_seq:
                    end = key
                    break
                raw.append((key, bytes(block)))
        ends = [*(key for key, _ in raw[1:]), end]
        parts = list(self._whole(first_seq, raw, ends))
        samples = Samples.concat(parts)
        start = first_seq - samples.first_seq
        return samples[start : last_seq - samples.first_seq + 1]

    def _whole(
        self, first_seq: int, raw: Sequence[tuple[int, bytes]], ends: Sequence[int]
    ) -> Iterator[Samples]:
        """The blocks' samples, with blanks for what is damaged or missing."""
        if not raw or raw[0][0] > first_seq:
            yield Samples.blank(first_seq, (raw[0][0] if raw else ends[-1]) - first_seq)
        for (key, block), end in zip(raw, ends, strict=True):
            try:
                samples = decode_block(block, self.dictionaries.find)
                if samples.first_seq != key or len(samples) > end - key:
                    raise CorruptBlockError(f"the block at seq {key} is not the one that was written there")
            except CorruptBlockError as error:
                log.error("%s", error)
                samples = Samples.blank(key, end - key)
            if len(samples):
                yield samples
            if len(samples) < end - key:
                yield Samples.blank(key + len(samples), end - key - len(samples))

    def windows(self, after: int = 0) -> list[ClosedWindow]:
        """Closed windows with a number above `after`, in order."""
        with self.reading() as txn:
            rows = rows_from(txn, b"W", U32.pack(b"W", after + 1))
            return [msgspec.msgpack.decode(value, type=ClosedWindow) for _, value in rows]

    def named(self, prefix: str) -> dict[str, bytes]:
        """Rows by name: prefix "p" for positions, "r" for references."""
        with self.reading() as txn:
            return {key[1:].decode(): value for key, value in rows_from(txn, prefix.encode())}

    def dead_letters(self, newest: int = 100) -> list[tuple[int, DeadLetter]]:
        """The newest dead letters with their numbers, oldest first."""
        with self.reading() as txn:
            state = self._state_in(txn)
            start = max(state.dead_first, state.dead_next - newest)
            rows = rows_from(txn, b"D", U64.pack(b"D", start))
            letters = [
                (U64.unpack(key)[1], msgspec.msgpack.decode(value, type=DeadLetter)) for key, value in rows
            ]
            return [(number, letter) for number, letter in letters if not letter.deleted]

    def dead_letter(self, number: int) -> DeadLetter | None:
        """One dead letter; None if it was deleted, made way for newer ones, or never was."""
        with self.reading() as txn:
            key = U64.pack(b"D", number)
            found = txn.get(key)
            letter = None if found is None else msgspec.msgpack.decode(unseal(key, found), type=DeadLetter)
            return None if letter is None or letter.deleted else letter

    def newest_hashes(self, count: int) -> bytes:
        """Dedup hashes of the newest samples, 16 bytes each, oldest first: dedup is rebuilt from them.

        Zeros, which match nothing, stand for a sample that nothing identifies or whose block is damaged.
        """
        parts: list[bytes] = []
        with self.reading() as txn:
            end = self._state_in(txn).next_seq
            for first, block in newest_blocks(txn):
                hashes = _hashes_of(block, first, end)
                take = min(count, len(hashes) // HASH_BYTES)
                parts.append(hashes[len(hashes) - take * HASH_BYTES :])
                count, end = count - take, first
                if not count:
                    break
        return b"".join(reversed(parts))

    def usage(self) -> RingUsage:
        """How full the ring is."""
        with self.reading() as txn:
            state = self._state_in(txn)
            return RingUsage(self.map_bytes, live_bytes(txn), state.tail_seq, state.next_seq)

    def readers(self) -> list[Reader]:
        """Processes inside a read transaction, those furthest behind first."""
        newest = self._env.info()["last_txnid"]
        lines = (line.split() for line in self._env.readers().splitlines()[1:])
        rows = [line for line in lines if len(line) == 3 and line[2].isdigit()]
        found = [Reader(int(pid), int(txn), newest - int(txn)) for pid, _, txn in rows]
        return sorted(found, key=lambda reader: reader.txn)

    def clear_stale_readers(self) -> int:
        """Free the slots of readers that died inside a transaction. Returns: how many."""
        return int(self._env.reader_check())

    # -- inside -----------------------------------------------------------------------------------

    def copied_blocks(self, seq: int = 0) -> Iterator[tuple[int, bytes]]:
        """Blocks from a seq on by their keys, each copied out of a short transaction of its own."""
        while True:
            with self.reading() as txn:
                cursor = txn.cursor()
                found = cursor.set_range(block_key(seq))
                if not found or bytes(cursor.key()) != block_key(seq):
                    found = cursor.prev() if found else cursor.last()  # the block after the one that holds it
                if not found or not is_block(cursor):
                    return
                first, block = seq_of(cursor.key()), bytes(cursor.value())
            yield first, block
            seq = first + 1

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

    @contextlib.contextmanager
    def writing(self) -> Iterator[RingWriter]:
        """One transaction: what the writer did and its state row, or nothing; then `state` is the new one."""
        used = (self._env.info()["last_pgno"] + 1) * self._page_bytes
        try:
            with self._env.begin(write=True, buffers=True) as txn:
                writer = RingWriter(
                    txn, self.state, self.map_bytes, self._encode, self.dictionaries.find, used
                )
                yield writer
                state = writer.finish(writer.state)
        except lmdb.MapFullError as error:
            raise RingFullError("the ring is full", path=self.folder, hint="raise ring.max_bytes") from error
        except (lmdb.Error, OSError) as error:
            raise self.failed("a commit failed", error) from error
        self.state = state

    def failed(self, what: str, error: Exception) -> WriteFailedError:
        """Note that the disk failed: this handle refuses everything from now on. Returns: what to raise."""
        self._dead = str(error)
        hint = "check the disk; Edgewater reopens on restart"
        return WriteFailedError(f"{what}: {error}", path=self.folder, hint=hint)

    def _encode(self, samples: Samples, *, arrival: float, revision: int = 0) -> list[tuple[int, bytes]]:
        newest = self.dictionaries.newest
        return encode_runs(samples, self.header.tokenizer_id, arrival, newest, revision)

    @contextlib.contextmanager
    def reading(self) -> Iterator[lmdb.Transaction]:
        if os.getpid() != self._pid:
            raise StorageError("used after a fork", path=self.folder, hint="spawn processes, never fork")
        with begin_read(self._env, self.folder) as txn:
            yield txn

    def _read_header(self) -> RingHeader:
        with self.reading() as txn:
            found = txn.get(HEADER)
        if found is None:
            raise ForeignFolderError("is not a ring", path=self.folder, hint="check data_dir")
        header = read_ring_header(bytes(found), self.folder)
        if header.format < RING_FORMAT:
            hint = "the next start of `edgewater run` or `ingest` brings it up to date"
            raise StorageError(f"is of format {header.format}", path=self.folder, hint=hint)
        return header


def _hashes_of(block: bytes | memoryview, first_seq: int, end_seq: int) -> bytes:
    """Dedup hashes of a block; zeros where it is damaged: ingest goes on."""
    try:
        hashes = block_hashes(block)
        if read_header(block).first_seq == first_seq and len(hashes) == HASH_BYTES * (end_seq - first_seq):
            return hashes
        log.error("the block at seq %d is not the one that was written there", first_seq)
    except CorruptBlockError as error:
        log.error("%s: its samples cannot be recognized when they come again", error)
    return bytes(HASH_BYTES * (end_seq - first_seq))
