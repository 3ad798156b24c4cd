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

import errno
import hashlib
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lmdb
import msgspec

from storage.block import (
    HASH_BYTES,
    LEVEL,
    Samples,
    block_checksum,
    block_hashes,
    column_bytes,
    decode_block,
    read_header,
)
from storage.dictionary import (
    MAX_TRAINING_BYTES,
    MIN_TRAINING_BYTES,
    MIN_TRAINING_SAMPLES,
    TRAINING_RUN,
    Dictionary,
    read_dictionary_file,
    train,
    write_dictionary_file,
)
from storage.durable import make_private_folder, write_file_durably
from storage.env import create_environment, open_environment
from storage.errors import (
    CorruptBlockError,
    CorruptRingError,
    ForeignFolderError,
    FormatTooNewError,
    MissingDictionaryError,
    RingFullError,
    StorageError,
    WriteFailedError,
)
from storage.ring_writer import (
    HEADER,
    STATE,
    U32,
    U64,
    RingWriter,
    block_key,
    blocks_from,
    encode_runs,
    is_block,
    live_bytes,
    newest_blocks,
    seq_of,
)
from storage.rows import rows_from, seal, sum_of, unseal
from storage.windows import (
    ClosedWindow,
    Commit,
    DeadLetter,
    QuarantineRow,
    Reader,
    RingHeader,
    RingState,
    RingUsage,
)

__all__ = ["RING_FORMAT", "Commit", "Ring", "RingHeader", "RingUsage", "first_rows"]

RING_FORMAT = 2
LARGEST_COMMIT = 0.25
TRIES = 4  # of a commit that finds no free run of pages, each after making room
MAX_QUARANTINE_ROWS = 1_000
MAX_QUARANTINE_BYTES = 16 << 20  # of damaged bytes that are kept for whoever wants to look at them
FORGET_BYTES = 1 << 20  # blocks rewritten in one transaction

log = logging.getLogger("edgewater.ring")


class Damage(msgspec.Struct, frozen=True):
    """A run of seqs whose samples cannot be read, or a block where none belongs (`end_seq` = `first_seq`).

    Attributes:
        first_seq, end_seq: The samples, the end not included.
        reason: What is wrong.
        key: First seq of the block to take out; -1 where there is none.
        hashes: The samples' dedup hashes where those are still known.
    """

    first_seq: int
    end_seq: int
    reason: str
    key: int = -1
    hashes: bytes = b""


class Ring:
    """One shard's ring. One process writes; others read in short transactions."""

    def __init__(self, folder: Path, env: lmdb.Environment, *, readonly: bool) -> None:
        self.folder = folder
        self._env = env
        self._readonly = readonly
        self._pid = os.getpid()
        self._dead = ""
        self._dictionaries: dict[int, Dictionary] = {}
        self._next_training = MIN_TRAINING_SAMPLES
        self.header = self._read_header()
        self.state = self.read_state()
        if not readonly:
            self._check_rows()
            self._keep_dictionaries()

    @classmethod
    def create(cls, folder: Path, *, shard: str, tokenizer_id: str, max_bytes: int) -> Ring:
        """Make a new ring of a fixed size, preallocated, and open it for writing."""
        header = RingHeader(RING_FORMAT, shard, tokenizer_id, secrets.token_bytes(32))
        create_environment(folder, max_bytes, first_rows(header, RingState()), written=True)
        return cls(folder, open_environment(folder), readonly=False)

    @classmethod
    def open_or_create(cls, folder: Path, *, shard: str, tokenizer_id: str, max_bytes: int) -> Ring:
        """Open the ring of this shard for writing; make it if there is none, migrate an older format.

        Raises: ForeignFolderError if it holds tokens of another tokenizer; FormatTooNewError;
            CorruptRingError if a row is damaged (`storage.salvage` repairs it).
        """
        from storage.migrate import migrate_ring

        migrate_ring(folder)
        if not folder.exists():
            return cls.create(folder, shard=shard, tokenizer_id=tokenizer_id, max_bytes=max_bytes)
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
                self._write(commit, blocks, incoming)
                break
            except RingFullError:
                if not left:
                    raise
                self._make_room(incoming)
        if not self._dictionaries and self.state.next_seq - self.state.tail_seq >= self._next_training:
            self._train_dictionary()
        return self.state

    def _write(self, commit: Commit, blocks: Sequence[tuple[int, bytes]], incoming: int) -> None:
        state, samples = self.state, commit.samples
        with self._writing() as writer:
            # Crash before the transaction's second flush: none of this happened. After: all of it.
            writer.make_room(incoming)
            for first_seq, block in blocks:
                writer.put_block(first_seq, block)
            writer.merge_small_blocks()
            writer.put_windows(commit.closed)
            for name, position in commit.positions.items():
                writer.put_named(b"p", name, position)
            for name, reference in commit.references.items():
                writer.put_named(b"r", name, reference)
            writer.state = msgspec.structs.replace(
                writer.put_dead_letters(state, commit.dead_letters),
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
            with self._writing() as writer:
                if share:
                    writer.evict_down_to(live_bytes(writer.txn) - share)

    def evict_older_than(self, stream_time: float) -> int:
        """Delete blocks whose commit is older than a stream time. Returns: samples deleted."""
        self._check_alive()
        with self._reading() as txn:
            oldest = next(blocks_from(txn), None)
            if oldest is None or _arrival_of(oldest[1]) >= stream_time:
                return 0
        before = self.state.tail_seq
        with self._writing() as writer:
            writer.evict_older_than(stream_time)
        return self.state.tail_seq - before

    def forget(self, subject: str) -> int:
        """Blank every sample about a subject. Returns: how many there were.

        Their seqs remain, and their hashes, so that what is delivered again stays out. The ring digest is
        of what came in and does not change. A large ring takes several transactions; after a crash between
        two of them, forgetting again finishes.
        """
        self._check_alive()
        forgotten, seq = 0, self.state.tail_seq
        while seq < self.state.next_seq:
            found, seq = self._find_subject(subject, seq)
            if not found:
                continue
            with self._writing() as writer:
                for samples, gone, arrival, revision in found:
                    for first_seq, block in writer.encode(
                        samples.without(gone), arrival=arrival, revision=revision + 1
                    ):
                        writer.put_block(first_seq, block)
                    forgotten += len(gone)
                count = writer.state.forgotten + sum(len(gone) for _, gone, _, _ in found)
                writer.state = msgspec.structs.replace(writer.state, forgotten=count)
        return forgotten

    def _find_subject(
        self, subject: str, seq: int
    ) -> tuple[list[tuple[Samples, list[int], float, int]], int]:
        """Blocks from a seq on that hold samples about a subject, a transaction's worth; where to go on."""
        found, size = [], 0
        for key, block in self._copied_blocks(seq):
            seq = key + 1
            try:
                header, samples = read_header(block), decode_block(block, self._dictionary)
            except CorruptBlockError:
                continue  # unreadable is forgotten too
            seq = header.last_seq + 1
            gone = [i for i, name in enumerate(samples.subjects) if name == subject]
            if gone:
                found.append((samples, gone, header.arrival, header.revision))
                size += len(block)
                if size >= FORGET_BYTES:
                    return found, seq
        return found, self.state.next_seq

    # -- damage -----------------------------------------------------------------------------------

    def quarantine(self, into: Path) -> list[QuarantineRow]:
        """Set damaged blocks aside and put blank samples in their place, so that everything goes on.

        Args:
            into: Folder for the damaged bytes.
        Returns: What was lost, as it was noted.
        """
        self._check_alive()
        damages = list(self.damages())
        rows = []
        for damage in damages:
            # 1. The damaged bytes are durable in a file.   Crash: found again at the next check.
            name = self._keep_bytes(damage, into)
            # 2. Blanks take their place.                   From here the ring is whole.
            with self._writing() as writer:
                row = self._replace_by_blanks(writer, damage, name)
            if row.samples:
                rows.append(row)
                log.error("samples %d to %d are lost: %s", row.first_seq, damage.end_seq - 1, row.reason)
        if damages or self._sum_of_blocks() != self.state.blocks_sum:
            with self._writing() as writer:
                writer.sum_blocks_anew()
        return rows

    def _keep_bytes(self, damage: Damage, into: Path) -> str:
        with self._reading() as txn:
            found = txn.get(block_key(damage.key)) if damage.key >= 0 else None
        if found is None:
            return ""
        make_private_folder(into)
        if sum(path.stat().st_size for path in into.iterdir() if path.is_file()) > MAX_QUARANTINE_BYTES:
            return ""
        name = f"{self.header.shard}-{damage.key}.block"
        write_file_durably(into / name, bytes(found))
        return name

    def _replace_by_blanks(self, writer: RingWriter, damage: Damage, name: str) -> QuarantineRow:
        if damage.key >= 0:
            writer.delete_block(damage.key)
        count = damage.end_seq - damage.first_seq
        row = QuarantineRow(damage.first_seq, count, damage.reason, writer.state.stream_time, name)
        if count:
            blanks = Samples.blank(damage.first_seq, count, damage.hashes)
            for first_seq, block in writer.encode(blanks, arrival=writer.state.stream_time):
                writer.put_block(first_seq, block)
            writer.rows.put(U64.pack(b"Q", damage.first_seq), msgspec.msgpack.encode(row))
            held = [bytes(key) for key, _ in rows_from(writer.txn, b"Q")]
            for key in held[: max(0, len(held) - MAX_QUARANTINE_ROWS)]:
                writer.rows.delete(key)
            writer.state = msgspec.structs.replace(writer.state, lost=writer.state.lost + count)
        return row

    def quarantined(self) -> list[QuarantineRow]:
        """Samples that were lost to damage, the newest 1,000 cases, in the order of their seqs."""
        with self._reading() as txn:
            return [msgspec.msgpack.decode(value, type=QuarantineRow) for _, value in rows_from(txn, b"Q")]

    def damages(self) -> Iterator[Damage]:
        """Read every block and say which samples cannot be read; each block is copied out first."""
        state = self.state if not self._readonly else self.read_state()
        expected = state.tail_seq
        last: tuple[int, str, bytes] | None = None  # a damaged block: where it ends, the next one tells
        for key, block in self._copied_blocks(0):
            if last:
                first, reason, hashes = last
                yield Damage(first, max(key, first), reason, first, _fitting(hashes, key - first))
                expected, last = max(key, expected), None
            if key < expected or key >= state.next_seq:
                if self._readonly and key >= state.next_seq:
                    return  # came in while we looked
                yield Damage(key, key, "a block where none belongs", key)
                continue
            if key > expected:
                yield Damage(expected, key, "the block is missing")
            try:
                header = read_header(block)
                if header.first_seq != key:
                    raise CorruptBlockError(f"the block of seq {header.first_seq} lies under another key")
                expected = key + len(decode_block(block, self._dictionary))
            except MissingDictionaryError as error:
                last = (key, str(error), block_hashes(block))
            except StorageError as error:
                last = (key, str(error), b"")
        if last:
            first, reason, hashes = last
            yield Damage(first, state.next_seq, reason, first, _fitting(hashes, state.next_seq - first))
        elif expected < state.next_seq:
            yield Damage(expected, state.next_seq, "the block is missing")

    def check_blocks(self) -> Iterator[tuple[int, str]]:
        """Verify every block: checksum, columns, order of seqs.

        Yields: (first seq, what is wrong from there on) for each damage, (next seq, "") at the end if none.
        """
        for damage in self.damages():
            yield damage.first_seq, damage.reason
        if self._sum_of_blocks() != self.read_state().blocks_sum:
            yield self.read_state().tail_seq, "a block is not the one that was written last"

    def _sum_of_blocks(self) -> int:
        total = 0
        with self._reading() as txn:
            for _, block in blocks_from(txn):
                total ^= block_checksum(block)
        return total

    def _check_rows(self) -> None:
        """Every row as it was sealed, and none lost. Raises: CorruptRingError."""
        total = 0
        with self._reading() as txn:
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

    # -- dictionary -------------------------------------------------------------------------------

    def _train_dictionary(self) -> None:
        """Train the install's dictionary on the blocks that are there, once there are enough."""
        columns: list[bytes] = []
        for _, block in self._copied_blocks(self.state.tail_seq):
            try:
                samples = decode_block(block)
            except CorruptBlockError:
                continue
            runs = range(0, len(samples), TRAINING_RUN)
            columns += (column_bytes(samples[i : i + TRAINING_RUN]) for i in runs)
            if sum(map(len, columns)) >= MAX_TRAINING_BYTES:
                break
        self._next_training = 2 * (self.state.next_seq - self.state.tail_seq)
        enough = sum(map(len, columns)) >= MIN_TRAINING_BYTES
        dictionary = train(columns, LEVEL) if enough else None
        if dictionary is None:
            return
        # 1. The copy beside the ring is durable.  Crash: a stray file that no block names.
        # 2. The row.                              From here blocks may name it.
        if not self._copy_dictionary(dictionary):
            return  # the ring goes on without it on a full disk, and tries again later
        with self._writing() as writer:
            writer.rows.put(U32.pack(b"Z", dictionary.id), dictionary.data)
        self._dictionaries[dictionary.id] = dictionary
        log.info("trained the dictionary %08x on %d bytes", dictionary.id, sum(map(len, columns)))

    def _copy_dictionary(self, dictionary: Dictionary) -> bool:
        """Write the copy beside the ring. Returns: whether there was room; the ring itself needs none."""
        try:
            write_dictionary_file(self.folder, dictionary)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                self._dead = str(error)
                raise WriteFailedError(
                    f"the dictionary's copy cannot be written: {error}",
                    path=self.folder,
                    hint="check the disk",
                ) from error
            log.warning("no room for a copy of the dictionary beside %s", self.folder)
            return False
        return True

    def _keep_dictionaries(self) -> None:
        """Read the dictionaries, and mend the row by the copy or the copy by the row."""
        lost = []
        for number, data in self._dictionary_rows().items():
            copy = read_dictionary_file(self.folder, number)
            found = Dictionary(data) if data is not None else copy
            if found is None or found.id != number:
                lost.append(number)
                log.error("dictionary %08x is lost: the blocks that need it cannot be read", number)
                continue
            self._dictionaries[number] = found
            if copy is None:
                self._copy_dictionary(found)
            if data is None:
                log.warning("dictionary %08x was damaged and is put back from its copy", number)
                with self._writing() as writer:
                    writer.rows.put(U32.pack(b"Z", number), found.data)
        if lost:
            with self._writing() as writer:
                for number in lost:
                    writer.rows.delete(U32.pack(b"Z", number))

    def _encode(self, samples: Samples, *, arrival: float, revision: int = 0) -> list[tuple[int, bytes]]:
        newest = next(reversed(self._dictionaries.values()), None)
        return encode_runs(samples, self.header.tokenizer_id, arrival, newest, revision)

    def _dictionary_rows(self) -> dict[int, bytes | None]:
        """Id -> dictionary as its row holds it, None where the row is damaged."""
        rows: dict[int, bytes | None] = {}
        with self._reading() as txn:
            cursor = txn.cursor()
            found = cursor.set_range(b"Z")
            while found and cursor.key()[:1] == b"Z" and len(cursor.key()) == U32.size:
                try:
                    data: bytes | None = unseal(bytes(cursor.key()), cursor.value())
                except CorruptRingError:
                    data = None
                rows[U32.unpack(cursor.key())[1]] = data
                found = cursor.next()
        return rows

    def _dictionary(self, number: int) -> Dictionary | None:
        """A dictionary by its id; one that came after this ring was opened is looked up."""
        if number not in self._dictionaries:
            data = self._dictionary_rows().get(number)
            found = Dictionary(data) if data is not None else read_dictionary_file(self.folder, number)
            if found is None or found.id != number:
                return None
            self._dictionaries[number] = found
        return self._dictionaries[number]

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
        """The state as last committed by whichever process writes. Raises: CorruptRingError."""
        with self._reading() as txn:
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
        with self._reading() as txn:
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
                samples = decode_block(block, self._dictionary)
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
        with self._reading() as txn:
            rows = rows_from(txn, b"W", U32.pack(b"W", after + 1))
            return [msgspec.msgpack.decode(value, type=ClosedWindow) for _, value in rows]

    def named(self, prefix: str) -> dict[str, bytes]:
        """Rows by name: prefix "p" for positions, "r" for references."""
        with self._reading() as txn:
            return {key[1:].decode(): value for key, value in rows_from(txn, prefix.encode())}

    def dead_letters(self, newest: int = 100) -> list[tuple[int, DeadLetter]]:
        """The newest dead letters with their numbers, oldest first."""
        with self._reading() as txn:
            state = self._state_in(txn)
            start = max(state.dead_first, state.dead_next - newest)
            rows = rows_from(txn, b"D", U64.pack(b"D", start))
            return [
                (U64.unpack(key)[1], msgspec.msgpack.decode(value, type=DeadLetter)) for key, value in rows
            ]

    def newest_hashes(self, count: int) -> bytes:
        """Dedup hashes of the newest samples, 16 bytes each, oldest first: dedup is rebuilt from them.

        Zeros, which match nothing, stand for a sample that nothing identifies or whose block is damaged.
        """
        parts: list[bytes] = []
        with self._reading() as txn:
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
        with self._reading() as txn:
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

    def _copied_blocks(self, seq: int) -> Iterator[tuple[int, bytes]]:
        """Blocks from a seq on by their keys, each copied out of a short transaction of its own."""
        while True:
            with self._reading() as txn:
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

    @contextmanager
    def _writing(self) -> Iterator[RingWriter]:
        """One transaction: what the writer did and its state row, or nothing; then `state` is the new one."""
        try:
            with self._env.begin(write=True, buffers=True) as txn:
                writer = RingWriter(
                    txn,
                    self.state,
                    self.map_bytes,
                    self._encode,
                    self._dictionary,
                )
                yield writer
                state = writer.finish(writer.state)
        except lmdb.MapFullError as error:
            raise RingFullError("the ring is full", path=self.folder, hint="raise ring.max_bytes") from error
        except (lmdb.Error, OSError) as error:
            self._dead = str(error)
            raise WriteFailedError(
                f"a commit failed: {error}",
                path=self.folder,
                hint="check the disk; Edgewater reopens on restart",
            ) from error
        self.state = state

    @contextmanager
    def _reading(self) -> Iterator[lmdb.Transaction]:
        if os.getpid() != self._pid:
            raise StorageError("used after a fork", path=self.folder, hint="spawn processes, never fork")
        with self._env.begin(buffers=False) as txn:
            yield txn

    def _read_header(self) -> RingHeader:
        with self._reading() as txn:
            found = txn.get(HEADER)
        if found is None:
            raise ForeignFolderError("is not a ring", path=self.folder, hint="check data_dir")
        header = read_ring_header(bytes(found), self.folder)
        if header.format < RING_FORMAT:
            hint = "the next start of `edgewater run` or `ingest` brings it up to date"
            raise StorageError(f"is of format {header.format}", path=self.folder, hint=hint)
        return header


def first_rows(header: RingHeader, state: RingState) -> dict[bytes, bytes]:
    """The rows that a new ring's first transaction holds."""
    sealed = msgspec.structs.replace(header, check=_check_of(header))
    state = msgspec.structs.replace(state, txn=1)
    return {HEADER: msgspec.msgpack.encode(sealed), STATE: seal(STATE, msgspec.msgpack.encode(state))}


def read_ring_header(data: bytes, folder: Path) -> RingHeader:
    """Decode and check a header row.

    Raises: CorruptRingError, FormatTooNewError.
    """
    hint = "run 'edgewater doctor'"
    try:
        header = msgspec.msgpack.decode(data, type=RingHeader)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptRingError(f"its header is damaged: {error}", path=folder, hint=hint) from error
    whole = header.check == _check_of(header)
    if header.format > RING_FORMAT:
        raise FormatTooNewError(
            f"ring format {header.format} is newer than {RING_FORMAT}",
            path=folder,
            hint="upgrade Edgewater",
        )
    if header.format > 1 and not whole:
        raise CorruptRingError("its header is damaged", path=folder, hint=hint)
    return header


def _check_of(header: RingHeader) -> bytes:
    plain = msgspec.msgpack.encode(msgspec.structs.replace(header, check=b""))
    return hashlib.blake2b(plain, digest_size=8).digest()


def _arrival_of(block: bytes | memoryview) -> float:
    try:
        return read_header(block).arrival
    except CorruptBlockError:
        return 0.0


def _fitting(hashes: bytes, count: int) -> bytes:
    return hashes if len(hashes) == HASH_BYTES * count else b""


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
