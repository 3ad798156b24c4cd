"""What a commit holds, and the rows it writes: windows, dead letters, the state of the shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from storage.samples import Samples

__all__ = [
    "ClockState",
    "ClosedWindow",
    "Commit",
    "DeadLetter",
    "OpenWindow",
    "QuarantineRow",
    "Reader",
    "RingHeader",
    "RingState",
    "RingUsage",
]


class OpenWindow(msgspec.Struct, frozen=True, array_like=True):
    """The window that the next sample joins.

    Attributes:
        window: Its number, from 1.
        first_seq: Seq of its first sample.
        samples, tokens: What it holds so far.
        first_arrival: Stream time of its first sample, seconds; 0 while it is empty.
    """

    window: int = 1
    first_seq: int = 0
    samples: int = 0
    tokens: int = 0
    first_arrival: float = 0.0


class ClockState(msgspec.Struct, frozen=True, array_like=True):
    """How stream time follows arrivals whose clock was moved; `pipeline.clock` explains and owns it.

    Attributes:
        offset: Stream time less arrival, seconds; 0 while nothing is wrong.
        pending: First arrival after a step forward that does not count yet, seconds; 0 while there is none.
        behind: First arrival of a clock that lies behind, seconds; 0 while there is none.
        behind_count: Arrivals of that clock without one between them that does not lie behind.
    """

    offset: float = 0.0
    pending: float = 0.0
    behind: float = 0.0
    behind_count: int = 0


class ClosedWindow(msgspec.Struct, frozen=True, array_like=True):
    """A window whose edges are fixed for ever.

    Attributes:
        window: Its number.
        first_seq, last_seq: Its samples, both included.
        samples, tokens: What it holds.
        closed_at: Stream time of the close, seconds.
        reason: "samples", "tokens", "age" or "request".
    """

    window: int
    first_seq: int
    last_seq: int
    samples: int
    tokens: int
    closed_at: float
    reason: str


class DeadLetter(msgspec.Struct, frozen=True):
    """An input that was refused, as received, with its reason.

    Attributes:
        source: Name of the source it came from.
        position: Where in the source, for people ("work.jsonl line at byte 812").
        arrival: Stream time, seconds.
        reason: Why, and what would be right.
        data: The bytes, cut at the size that an event may have.
    """

    source: str
    position: str
    arrival: float
    reason: str
    data: bytes

    @property
    def deleted(self) -> bool:
        """Whether it only keeps the place of a letter that was deleted before older ones."""
        return not self.reason


class RingState(msgspec.Struct, frozen=True, array_like=True):
    """The one row that every commit overwrites.

    Attributes:
        commits: Commits so far.
        next_seq: Seq of the next sample.
        tail_seq: Oldest seq that is still held (= next_seq when none is).
        digest: Ring digest, 32 bytes.
        stream_time: Largest arrival seen, seconds.
        window: The open window.
        counters: Events by outcome: "events", "samples", "duplicates", "suppressed", "dead_letters".
        request: Number of the last update request that closed a window or found none to close.
        dead_first, dead_next, dead_bytes: Bounds of the dead-letter database.
        txn: Id of the LMDB transaction that wrote this row; a snapshot of another id has a damaged meta page.
        rows_sum: XOR of the seals of all rows but this one, the header and the blocks.
        blocks_sum: XOR of the checksums of all blocks.
        lost: Samples lost to damage, ever; they are blank.
        forgotten: Samples blanked because their subject was forgotten, ever.
        clock: What stream time adds to the arrivals.
    """

    commits: int = 0
    next_seq: int = 0
    tail_seq: int = 0
    digest: bytes = bytes(32)
    stream_time: float = 0.0
    window: OpenWindow = OpenWindow()
    counters: dict[str, int] = {}
    request: int = 0
    dead_first: int = 0
    dead_next: int = 0
    dead_bytes: int = 0
    clock: ClockState = ClockState()
    txn: int = 0
    rows_sum: int = 0
    blocks_sum: int = 0
    lost: int = 0
    forgotten: int = 0


class RingHeader(msgspec.Struct, frozen=True):
    """Written once: what the ring is.

    Attributes:
        format: RING_FORMAT of the writer.
        shard: Name of the shard.
        tokenizer_id: 16 hexadecimal digits; token ids mean nothing without it.
        dedup_key: Secret of the keyed dedup hashes, 32 bytes.
        check: What `storage.rows.seal_header` puts in; "" before.
    """

    format: int
    shard: str
    tokenizer_id: str
    dedup_key: bytes
    check: bytes = b""


class Commit(msgspec.Struct, frozen=True):
    """Everything that becomes durable together.

    Attributes:
        samples: New samples; `samples.first_seq` must be the ring's next_seq. May be empty.
        stream_time: Stream time after this commit, seconds.
        window: The open window after this commit.
        closed: Windows that this commit closes.
        counters: Totals by outcome, after this commit.
        positions: Input name -> position, only those that moved; b"" forgets the input.
        references: Source name -> reference values of its deadband, only those that changed.
        dead_letters: Refused inputs.
        deleted_letters: Numbers of dead letters that go with this commit: purged, or fed again in it.
        request: Last honoured update request.
        clock: What stream time adds to the arrivals, after this commit.
    """

    samples: Samples
    stream_time: float
    window: OpenWindow
    counters: dict[str, int]
    closed: Sequence[ClosedWindow] = ()
    positions: Mapping[str, bytes] = {}
    references: Mapping[str, bytes] = {}
    dead_letters: Sequence[DeadLetter] = ()
    deleted_letters: Sequence[int] = ()
    request: int = 0
    clock: ClockState = ClockState()


class QuarantineRow(msgspec.Struct, frozen=True):
    """Samples that were lost to damage and are blank now.

    Attributes:
        first_seq, samples: Which ones.
        reason: What was wrong.
        at: Stream time when it was found, seconds.
        file: Name of the damaged bytes in the quarantine folder, "" where there were none or too many.
    """

    first_seq: int
    samples: int
    reason: str
    at: float
    file: str = ""


class Reader(msgspec.Struct, frozen=True):
    """A process that is inside a read transaction.

    Attributes:
        pid: Its process id.
        txn: Id of the snapshot that it looks at.
        behind: Transactions committed since: their freed pages cannot be used again until it ends.
    """

    pid: int
    txn: int
    behind: int


class RingUsage(msgspec.Struct, frozen=True):
    """How full the ring is, bytes and counts."""

    map_bytes: int
    live_bytes: int
    first_seq: int
    next_seq: int
