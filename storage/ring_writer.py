"""One write transaction of the ring: rows, blocks, eviction and merging, with the sums that guard them."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence

import lmdb
import msgspec

from storage.block import MAX_SAMPLES, block_checksum, decode_block, encode_block, read_header
from storage.dictionary import Dictionary
from storage.errors import CorruptBlockError, RingFullError
from storage.rows import SealedRows, seal
from storage.samples import Samples
from storage.windows import ClosedWindow, DeadLetter, RingState

__all__ = [
    "HIGH_WATER",
    "RingWriter",
    "arrival_of",
    "block_key",
    "blocks_from",
    "encode_runs",
    "is_block",
    "live_bytes",
    "newest_blocks",
    "seq_of",
]

HIGH_WATER = 0.75  # of the map: what the ring fills before it evicts (deletes fail too once LMDB is full)
REFUSE_WATER = 0.90
# Free pages between what is live and the highest page ever used. LMDB writes the list of them anew with every
# commit: with 5 % of the map evicted at a time that took 2 to 20 pages a commit, with so few it takes one.
# Where no run of them is long enough for a large block it takes new pages, and the pool grows by those.
POOL_BYTES = 256 << 10
POOL_SHARE = 1 / 16  # of the map, for small rings
FULLEST = 0.85  # of the map: live bytes are never more, however far the highest page has come
MAX_TOKENS = 8 << 20  # of a block: 32 MiB as wide ids, well below what a reader refuses
MAX_DEAD_LETTERS = 10_000
MAX_WINDOW_ROWS = 4_096
# Commits of a few samples leave small blocks, which are merged twice, each time when the newest ones below a
# size have come to so many bytes together. First those that lie inside the leaf page, before it would split;
# then what became of them, so that the tree stays at two levels and 48 bytes a reading become 28. A run of
# more pages would be hard to find among the free ones: LMDB then looks through all of them, and writes the
# list of all of them with every commit (blocks of 64 KiB: 26 KB a commit of 20 readings instead of 18).
MERGES = ((1_900, 2_400), (8_192, 32_768))
LARGEST_MERGE = 1 / 32  # of the map, for small rings
# A text that repeats itself packs 1,000 to 1: 32 KiB of such blocks are a gigabyte of tokens to decode.
MERGED_TOKENS = 1 << 20
STATE, HEADER, BLOCKS = b"s", b"H", b"t"
_EMPTY_LETTER = msgspec.msgpack.encode(DeadLetter("", "", 0.0, "", b""))
_LAST_SEQ = 2**64 - 1
U64 = struct.Struct(">cQ")
U32 = struct.Struct(">cI")


def block_key(seq: int) -> bytes:
    """Key of the block that begins at a seq: the newest block sorts first, right behind the state row.

    So a commit writes one leaf page. With ascending keys LMDB's page split leaves the rows that every commit
    overwrites alone on a page, and the newest block on another: 4 KiB more a commit.
    """
    return U64.pack(BLOCKS, _LAST_SEQ - seq)


def seq_of(key: bytes | memoryview) -> int:
    """The seq in a block's key."""
    return _LAST_SEQ - int(U64.unpack(key)[1])


def is_block(cursor: lmdb.Cursor) -> bool:
    """Whether the cursor stands on a block."""
    return bytes(cursor.key()[:1]) == BLOCKS


def blocks_from(txn: lmdb.Transaction, seq: int = 0) -> Iterator[tuple[int, bytes | memoryview]]:
    """First seq and value of the block that holds `seq` and of all after it, the oldest first."""
    cursor = txn.cursor()
    found = cursor.set_range(block_key(seq)) or cursor.last()  # none that old: the oldest sorts last
    while found and is_block(cursor):
        yield seq_of(cursor.key()), cursor.value()
        found = cursor.prev()


def newest_blocks(txn: lmdb.Transaction) -> Iterator[tuple[int, bytes | memoryview]]:
    """First seq and value of every block, the newest first."""
    cursor = txn.cursor()
    found = cursor.set_range(BLOCKS)
    while found and is_block(cursor):
        yield seq_of(cursor.key()), cursor.value()
        found = cursor.next()


def live_bytes(txn: lmdb.Transaction) -> int:
    """Bytes of the pages in use, the free list's not counted."""
    stat = txn.stat()
    return int((stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]) * stat["psize"])


def encode_runs(
    samples: Samples,
    tokenizer_id: str,
    arrival: float,
    dictionary: Dictionary | None,
    revision: int = 0,
) -> list[tuple[int, bytes]]:
    """Samples as blocks by their first seq: one, but for a commit larger than a block may be."""
    if not len(samples):
        return []
    if len(samples) > MAX_SAMPLES or len(samples.ids) > MAX_TOKENS:
        half = len(samples) // 2
        parts = (samples[:half], samples[half:])
        return [
            pair for part in parts for pair in encode_runs(part, tokenizer_id, arrival, dictionary, revision)
        ]
    return [(samples.first_seq, encode_block(samples, tokenizer_id, arrival, dictionary, revision))]


class RingWriter:
    """What one write transaction does to the ring; `finish` writes the state row that makes it whole.

    Args:
        txn: The transaction, opened with buffers.
        state: The state before it.
        map_bytes: Size of the file.
        encode: `encode_runs` for this ring.
        dictionaries: Finds any dictionary by its id.
        used_bytes: Of the file, up to the highest page that was ever used.
    """

    def __init__(
        self,
        txn: lmdb.Transaction,
        state: RingState,
        map_bytes: int,
        encode: Callable[..., list[tuple[int, bytes]]],
        dictionaries: Callable[[int], Dictionary | None],
        used_bytes: int = 0,
    ) -> None:
        self.txn = txn
        self.state = state
        self.rows = SealedRows(txn, state.rows_sum)
        self.blocks_sum = state.blocks_sum
        self._map_bytes, self._used_bytes = map_bytes, used_bytes
        self.encode = encode
        self._dictionaries = dictionaries

    def finish(self, state: RingState) -> RingState:
        """Write the state row: the last write of every transaction."""
        state = msgspec.structs.replace(
            state,
            txn=self.txn.id(),
            tail_seq=self._oldest_seq(state.next_seq),
            rows_sum=self.rows.total,
            blocks_sum=self.blocks_sum,
        )
        self.txn.put(STATE, seal(STATE, msgspec.msgpack.encode(state)))
        return state

    # -- blocks -----------------------------------------------------------------------------------

    def put_block(self, first_seq: int, block: bytes, *, append: bool = False) -> None:
        """Write a block, in place of the one that began at the same seq.

        Args:
            append: Whether it is older than all others: LMDB then fills its pages, and does not split them.
        """
        key = block_key(first_seq)
        if (before := self.txn.get(key)) is not None:
            self.blocks_sum ^= block_checksum(before)
        self.blocks_sum ^= block_checksum(block)
        if not self.txn.put(key, block, append=append):
            self.txn.put(key, block)  # it is not the oldest

    def delete_block(self, first_seq: int) -> None:
        """Delete the block that begins at a seq."""
        key = block_key(first_seq)
        if (before := self.txn.get(key)) is not None:
            self.blocks_sum ^= block_checksum(before)
            self.txn.delete(key)

    def sum_blocks_anew(self) -> None:
        """Take the sum of the blocks as they lie there: damaged ones made the old sum meaningless."""
        self.blocks_sum = 0
        for _, block in newest_blocks(self.txn):
            self.blocks_sum ^= block_checksum(block)

    def make_room(self, incoming: int) -> None:
        """Evict the oldest blocks where the free pages would become too few.

        Raises: RingFullError if other rows than blocks fill the ring, before it is full: then deletes fail.
        """
        used = min(max(HIGH_WATER * self._map_bytes, self._used_bytes), FULLEST * self._map_bytes)
        pool = min(POOL_BYTES, POOL_SHARE * self._map_bytes)
        self.evict_down_to(int(used - pool - incoming))
        if live_bytes(self.txn) + incoming > REFUSE_WATER * self._map_bytes:
            raise RingFullError("rows other than blocks fill the ring", hint="raise ring.max_bytes")

    def evict_down_to(self, left: int) -> None:
        """Delete the oldest blocks until so many bytes are live."""
        cursor = self.txn.cursor()
        while live_bytes(self.txn) > left and cursor.last() and is_block(cursor):
            self.blocks_sum ^= block_checksum(cursor.value())
            cursor.delete()

    def evict_older_than(self, stream_time: float) -> None:
        """Delete the blocks whose commits are older than a stream time."""
        cursor = self.txn.cursor()
        while cursor.last() and is_block(cursor) and arrival_of(cursor.value()) < stream_time:
            self.blocks_sum ^= block_checksum(cursor.value())
            cursor.delete()

    def merge_small_blocks(self, span_s: float) -> None:
        """Make one block of the newest ones, where those below a size have come to enough bytes together.

        Args:
            span_s: Stream time that a merged block may span, seconds: age evicts it whole, by its newest.
        """
        for small_bytes, merged_bytes in MERGES:
            enough = min(merged_bytes, LARGEST_MERGE * self._map_bytes)
            run = self._newest_run(small_bytes, enough, span_s)
            if len(run) > 1 and sum(len(block) for _, block in run) >= enough:
                self._merge(run)

    def _newest_run(self, small_bytes: int, enough: float, span_s: float) -> list[tuple[int, bytes]]:
        """The newest blocks below a size, until they come to enough bytes together."""
        run: list[tuple[int, bytes]] = []
        size, newest = 0, 0.0
        for first_seq, block in newest_blocks(self.txn):
            arrival = arrival_of(block)
            # A block says when its newest commit came, not its oldest: that was after the block before it.
            if run and newest - arrival > span_s:
                run.pop()
                return run
            if len(block) >= small_bytes or size >= enough:
                return run
            newest = newest if run else arrival
            run.append((first_seq, bytes(block)))
            size += len(block)
        return run if math.isinf(span_s) else run[:-1]

    def _merge(self, run: list[tuple[int, bytes]]) -> None:
        try:
            headers = [read_header(block) for _, block in run]
            if sum(header.samples for header in headers) > MAX_SAMPLES:
                return
            if sum(header.tokens for header in headers) > MERGED_TOKENS:
                return
            merged = Samples.concat([decode_block(block, self._dictionaries) for _, block in reversed(run)])
        except (CorruptBlockError, ValueError):
            return  # found and set aside by the next check; until then they stay as they are
        for first_seq, _ in run:
            self.delete_block(first_seq)
        # The newest arrival, so that age evicts none before its time; the highest revision, so that the
        # merged block is newer than every copy of its parts.
        arrival, revision = max(h.arrival for h in headers), max(h.revision for h in headers)
        for first_seq, block in self.encode(merged, arrival=arrival, revision=revision):
            self.put_block(first_seq, block)

    def _oldest_seq(self, next_seq: int) -> int:
        """First seq of the oldest block, by its key: a block whose header is damaged can be evicted too."""
        return next((seq for seq, _ in blocks_from(self.txn)), next_seq)

    # -- rows -------------------------------------------------------------------------------------

    def put_dead_letters(self, state: RingState, letters: Sequence[DeadLetter]) -> RingState:
        """Append dead letters; the oldest go when there are too many or they take too much."""
        first, number, size = state.dead_first, state.dead_next, state.dead_bytes
        limit = self._map_bytes // 16
        for letter in letters:
            data = msgspec.msgpack.encode(letter)
            self.rows.put(U64.pack(b"D", number), data)
            number, size = number + 1, size + len(data)
        while number - first > MAX_DEAD_LETTERS or (size > limit and number - first > 1):
            key = U64.pack(b"D", first)
            size -= len(self.rows.get(key) or b"")
            self.rows.delete(key)
            first += 1
        return msgspec.structs.replace(state, dead_first=first, dead_next=number, dead_bytes=size)

    def delete_dead_letters(self, state: RingState, numbers: Sequence[int]) -> RingState:
        """Delete dead letters; a number that is not there is passed over.

        Numbers of letters follow each other without a gap, so that a lost row is seen as one: a letter that
        is deleted before older ones leaves an empty one, which goes with them.
        """
        if not numbers:
            return state
        first, size = state.dead_first, state.dead_bytes
        for number in numbers:
            key = U64.pack(b"D", number) if first <= number < state.dead_next else b""
            if key and (found := self.rows.get(key)) is not None:
                size += len(_EMPTY_LETTER) - len(found)
                self.rows.put(key, _EMPTY_LETTER)
        while first < state.dead_next and self.rows.get(key := U64.pack(b"D", first)) == _EMPTY_LETTER:
            self.rows.delete(key)
            first, size = first + 1, size - len(_EMPTY_LETTER)
        return msgspec.structs.replace(state, dead_first=first, dead_bytes=size)

    def put_windows(self, closed: Sequence[ClosedWindow]) -> None:
        """Write closed windows; those too far back go."""
        for row in closed:
            self.rows.put(U32.pack(b"W", row.window), msgspec.msgpack.encode(row))
            if row.window > MAX_WINDOW_ROWS:
                self.rows.delete(U32.pack(b"W", row.window - MAX_WINDOW_ROWS))

    def put_named(self, prefix: bytes, name: str, value: bytes) -> None:
        """Write a position or a reference; an empty value forgets it."""
        key = prefix + name.encode()
        if value:
            self.rows.put(key, value)
        else:
            self.rows.delete(key)


def arrival_of(block: bytes | memoryview) -> float:
    """Stream time of the newest commit in a block; before all times where its header is damaged."""
    try:
        return read_header(block).arrival
    except CorruptBlockError:
        return -math.inf  # nothing can be done with it: it goes first
