"""Dedup: drop what was delivered or said before, within a horizon; the one step that remembers events.

Its memory is the newest `horizon` hashes, which lie in the ring's blocks and are read back at the start,
so nothing has to be written for it; and so do the texts that near duplicates are told by. Readings that
report by exception are suppressed here too, because their reference values are the same kind of memory.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import compress

import msgspec

from pipeline.clock import HOLD_S
from pipeline.events import KIND_OF, Batch, Event, Exchange, Line, Outcome, Reading, Text
from pipeline.near_duplicates import NearDuplicates
from pipeline.render import Deadband
from storage.samples import HASH_BYTES

__all__ = ["Dedup", "DedupMode", "SeenHashes"]

MAX_REMEMBERED = 4_096
MAX_REFERENCE_TAGS = 1_024  # a source that invents tags must not grow its row without end
DedupMode = str  # "delivery" | "content" | "none", checked by the configuration
NO_HASH = bytes(HASH_BYTES)
_key = struct.Struct("<Q").unpack_from  # of a hash; alike in array("Q"), since blocks are little-endian too


class SeenHashes:
    """Hashes of the newest `horizon` samples, first in first out, as far as the ring holds them.

    Holds the leading 8 bytes of each as an integer, its key: among 200,000 of them a new event is taken for
    an old one by chance once in 10^14. 24 bytes a hash, taken once: the keys by seq, 8 bytes, in the cell
    `seq % horizon + 1` of a circle; and two tables of twice as many slots, 4 bytes each, that find the cell
    of a key. It stands in the first free slot from `key % slots` downward: downward, because Python's
    negative indices then wrap around by themselves.

    Nothing is ever deleted from a table. A key is forgotten when its cell takes another: a slot that names a
    cell with another key finds nothing. New keys go into the young table; each time the circle is full, it
    becomes the old one, and the old one, whose last cell was just overwritten, is emptied. So neither is more
    than half full, and a search ends after about two slots in each.

    Args:
        horizon: So many samples back.
        next_seq: Seq of the next sample.
        hashes: Those of the samples before it, HASH_BYTES each, oldest first, at most `horizon`.
    """

    def __init__(self, horizon: int, next_seq: int = 0, hashes: bytes = b"") -> None:
        count = len(hashes) // HASH_BYTES
        if count > horizon:
            raise ValueError(f"{count} hashes for a horizon of {horizon}")
        self._horizon = horizon
        self._keys = array("Q", [0]) * (horizon + 1)  # 0 where nothing identifies the sample; cell 0 is none
        self._young, self._old = self._empty_table(), self._empty_table()
        self._first = self._next = next_seq - count
        for key in array("Q", hashes)[:: HASH_BYTES // 8]:
            self._put(key)

    @property
    def next_seq(self) -> int:
        """Seq of the next sample."""
        return self._next

    @property
    def first_seq(self) -> int:
        """Seq of the oldest sample that is not forgotten."""
        return max(self._first, self._next - self._horizon)

    def __len__(self) -> int:
        return len(self._keys) - self._keys.count(0)

    def __contains__(self, digest: bytes) -> bool:
        return self._holds(_key(digest)[0])

    def add(self, digest: bytes) -> None:
        """Remember the hash of the next sample; the one beyond the horizon is forgotten."""
        if self._horizon:
            self._put(_key(digest)[0])

    def admit(self, digests: Sequence[bytes]) -> bytearray:
        """Remember those that are new, one after the other. Returns: a 1 for each of them, 0 for the others.

        As `in` and `add` for each in turn would, but for the calls: it runs for every event.
        """
        horizon, keys = self._horizon, self._keys
        new = bytearray(b"\x01") * len(digests)
        if not horizon:
            return new
        count = 2 * horizon
        young, old, following = self._young, self._old, self._next
        for i, key in enumerate(array("Q", b"".join(digests))[:: HASH_BYTES // 8]):
            if key:
                free = at = key % count
                while (cell := young[free]) and keys[cell] != key:
                    free -= 1
                if not cell:
                    while (cell := old[at]) and keys[cell] != key:
                        at -= 1
                if cell:
                    new[i] = 0
                    continue
            cell = following % horizon + 1
            if cell == 1 and following:
                self._turn()
                young, old, free = self._young, self._old, key % count
            keys[cell] = key
            if key:
                young[free] = cell
            following += 1
        self._next = following
        return new

    def forget_before(self, seq: int) -> None:
        """Forget samples before a seq: a restart could not read them back, and must not decide otherwise."""
        self._first = self.first_seq
        while self._first < min(seq, self._next):
            self._keys[self._first % self._horizon + 1] = 0
            self._first += 1

    def _holds(self, key: int) -> bool:
        keys = self._keys
        for slots in (self._young, self._old) if key else ():
            at = key % len(slots)
            while cell := slots[at]:
                if keys[cell] == key:
                    return True
                at -= 1
        return False

    def _put(self, key: int) -> None:
        cell = self._next % self._horizon + 1
        if cell == 1 and self._next:
            self._turn()
        slots, keys = self._young, self._keys
        if key:
            at = key % len(slots)
            while slots[at] and keys[slots[at]] != key:
                at -= 1
            slots[at] = cell  # the newer of two equal ones counts
        keys[cell] = key
        self._next += 1

    def _turn(self) -> None:
        self._old = self._young
        self._young = self._empty_table()

    def _empty_table(self) -> array[int]:
        return array("I", [0]) * (2 * self._horizon or 1)


class Reference(msgspec.Struct, frozen=True):
    """What the next reading of a source is compared with.

    Attributes:
        at: Stream time of the last reported reading, seconds.
        values: Tag -> value when it was last reported.
        written: Tag that is written on change -> stream time at which it last was, seconds.
    """

    at: float
    values: dict[str, float]
    written: dict[str, float] = {}


class Dedup:
    """Drops duplicates and unremarkable readings of each Batch.

    Args:
        key: Secret of the hashes, so that they tell nothing of what was said.
        seen: Hashes of the newest samples.
        held_from: Oldest seq that the ring holds.
        references: Source -> encoded Reference, as the ring holds them.
        mode_of: (source, kind of event) -> "delivery", "content" or "none".
        deadband_of: Source -> its deadband, None if it reports everything.
        elsewhere: Hashes of what other shards of the host stored before this process began.
        horizon: After so many samples of its own those are too old to matter, and are forgotten.
        near: Source -> its newest texts, for the sources whose near duplicates are dropped.
        clean: A text as it can be read back from the ring.
    """

    def __init__(
        self,
        key: bytes,
        seen: SeenHashes,
        held_from: Callable[[], int],
        references: Mapping[str, bytes],
        mode_of: Callable[[str, str], DedupMode],
        deadband_of: Callable[[str], Deadband | None],
        elsewhere: SeenHashes | None = None,
        horizon: int = 0,
        near: Mapping[str, NearDuplicates] = {},
        clean: Callable[[str], str] = str,
    ) -> None:
        self._elsewhere, self._horizon = elsewhere or None, horizon  # None as well where it holds nothing
        self._near, self._clean = near, clean
        # Copied for each event, which costs less than to make one with this key.
        self._hasher = hashlib.blake2b(digest_size=HASH_BYTES, key=key)
        self._seen = seen
        self._held_from = held_from
        decode = msgspec.msgpack.Decoder(Reference).decode
        self._references = {source: decode(data) for source, data in references.items()}
        self._mode_of = mode_of
        self._modes: dict[tuple[str, type[Event]], DedupMode] = {}
        self._deadband_of = deadband_of

    def __call__(self, batch: Batch) -> Batch:
        """Keep the first of each; count the rest as duplicates or suppressed."""
        self._seen.forget_before(self._held_from())
        digests = self._digests(batch)
        events, changed, outcome = (
            [*batch.events],
            dict[str, Reference](),
            msgspec.structs.replace(batch.outcome),
        )
        if self._elsewhere is None and not any(map(self._looks_closer, {*batch.sources})):
            kept = self._seen.admit(digests)
        else:
            kept = self._admit_each(batch, digests, events, changed, outcome)
        count = sum(kept)
        self._horizon -= count
        if self._horizon <= 0:
            self._elsewhere = None
        outcome.duplicates = len(digests) - count - outcome.suppressed - outcome.near_duplicates
        return msgspec.structs.replace(
            batch,
            events=[*compress(events, kept)],
            sources=[*compress(batch.sources, kept)],
            times=[*compress(batch.times, kept)],
            arrivals=[*compress(batch.arrivals, kept)],
            hashes=[*compress(digests, kept)],
            references={source: msgspec.msgpack.encode(reference) for source, reference in changed.items()},
            outcome=outcome,
        )

    def _admit_each(
        self,
        batch: Batch,
        digests: list[bytes],
        events: list[tuple[int, Event]],
        changed: dict[str, Reference],
        outcome: Outcome,
    ) -> bytearray:
        """Which events are kept, where more than their hashes decides.

        Args:
            events: Those of the Batch; a reading of which only a part is kept is replaced by it.
            changed: Takes the references that changed.
            outcome: Takes the counts, but for the duplicates.
        """
        kept = bytearray(len(digests))
        for i, digest in enumerate(digests):
            if digest in self._seen or (self._elsewhere is not None and digest in self._elsewhere):
                continue
            number, event = events[i]
            if isinstance(event, Reading):
                told = self._told(event, batch.sources[i], batch.arrivals[i], changed)
                if told is None:
                    outcome.suppressed += 1
                    continue
                events[i] = (number, told)
            elif isinstance(event, Text) and self._said_before(event, batch.sources[i]):
                outcome.near_duplicates += 1
                continue
            # What is stored is remembered, in its order: the set that a restart reads back is this one.
            self._seen.add(digest)
            kept[i] = 1
        return kept

    def _looks_closer(self, source: str) -> bool:
        return source in self._near or self._deadband_of(source) is not None

    def _said_before(self, event: Text, source: str) -> bool:
        """Whether a text is a near duplicate; else it is remembered under the seq that it gets."""
        near = self._near.get(source)
        if near is None:
            return False
        near.forget_before(self._seen.first_seq)
        text = self._clean(event.text)
        if near.find(text) is not None:
            return True
        near.add(self._seen.next_seq, text)
        return False

    def _digests(self, batch: Batch) -> list[bytes]:
        """The hash of each event, NO_HASH where nothing identifies it."""
        encode, copied, modes, lines = msgspec.msgpack.encode, self._hasher.copy, self._modes, batch.lines
        digests: list[bytes] = []
        for (number, event), source, when in zip(batch.events, batch.sources, batch.times, strict=True):
            kind = type(event)
            mode = modes.get((source, kind)) or self._mode(source, kind)
            line = lines[number]
            if mode == "delivery" and event.id is None and event.ts is not None and not line.key:
                content = sorted(event.values.items()) if type(event) is Reading else _content(event)
                identity: object = ("t", source, when, content)  # nearly all; the others stand in _identity
            else:
                identity = _identity(mode, source, event, line, when)
            if identity is None:
                digests.append(NO_HASH)
                continue
            hasher = copied()
            hasher.update(encode(identity))
            digests.append(hasher.digest())
        return digests

    def _mode(self, source: str, kind: type[Event]) -> DedupMode:
        mode = self._mode_of(source, KIND_OF[kind])
        if len(self._modes) >= MAX_REMEMBERED:  # names come from the events: remember only so many
            self._modes.clear()
        self._modes[source, kind] = mode
        return mode

    def _told(self, event: Reading, source: str, now: float, changed: dict[str, Reference]) -> Reading | None:
        """What is kept of a reading: all, all but the tags that did not change, or nothing (None)."""
        deadband = self._deadband_of(source)
        if deadband is None:
            return event
        last, values = self._references.get(source), event.values
        quiet: set[str] = set()
        # A clock that stepped back says nothing about the silence: report all, and count from the new time.
        back = deadband.max_silence_s > 0 and last is not None and now - last.at <= -HOLD_S
        if last and not back:
            quiet = deadband.unchanged(last.values, last.written, values, now)
            changes = not deadband.on_change & values.keys() <= quiet
            if not changes and deadband.silent(last.values, values, now - last.at):
                return None
        told = {tag: value for tag, value in values.items() if tag not in quiet} if quiet else values
        kept = dict(list({**(last.values if last else {}), **told}.items())[-MAX_REFERENCE_TAGS:])
        written = {**(last.written if last else {}), **dict.fromkeys(told.keys() & deadband.on_change, now)}
        self._references[source] = changed[source] = Reference(now, kept, written)
        return event if told is values else msgspec.structs.replace(event, values=told)


def _identity(mode: DedupMode, source: str, event: Event, line: Line, ts: float) -> object:
    """What tells an event from others, None where nothing does; rings hold hashes of it: it never changes."""
    if mode == "none":
        return None
    if mode == "content":
        return ("c", source, _content(event))
    if event.id is not None:
        return ("i", source, event.id)
    if line.key:
        return ("k", line.origin.input, line.key)
    if event.ts is not None:
        return ("t", source, ts, _content(event))
    if line.offset >= 0:
        return ("p", line.origin.input, line.origin.began, line.offset, line.data)
    return None  # nothing tells a redelivery from a new event: see the README


def _content(event: Event) -> object:
    match event:
        case Reading():
            return sorted(event.values.items())
        case Text():
            return event.text
        case Exchange():
            return [(m.role, m.content) for m in event.messages]
        case _:
            return (event.about, event.rating, event.correction)
