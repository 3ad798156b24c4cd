"""Dedup: drop what was delivered or said before, within a horizon; the one step that remembers events.

Its memory is the newest `horizon` hashes, which lie in the ring's blocks and are read back at the start,
so nothing has to be written for it. Readings that report by exception are suppressed here too, because
their reference values are the same kind of memory.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Callable, Mapping

import msgspec

from pipeline.clock import HOLD_S
from pipeline.events import Batch, Event, Exchange, Line, Reading, Text
from pipeline.render import Deadband
from storage.samples import HASH_BYTES

__all__ = ["Dedup", "DedupMode", "SeenHashes"]

MAX_REFERENCE_TAGS = 1_024  # a source that invents tags must not grow its row without end
DedupMode = str  # "delivery" | "content" | "none", checked by the configuration
NO_HASH = bytes(HASH_BYTES)
_key = struct.Struct("<Q").unpack_from  # of a hash; alike in array("Q"), since blocks are little-endian too


class SeenHashes:
    """Hashes of the newest `horizon` samples, first in first out, as far as the ring holds them.

    Holds the leading 8 bytes of each as an integer, its key: among 200,000 of them a new event is taken for
    an old one by chance once in 10^14. 24 bytes a hash, taken once: the keys by seq, 8 bytes, and a table of
    twice as many slots, 8 bytes each, in which a key lies at the first free slot from `key % slots` downward.

    Downward, because Python's negative indices then wrap around by themselves; and never more than half full,
    so a search ends after about two slots. A key that is forgotten leaves no tombstone: those that passed
    over it on their way move up, so the table never has to be rebuilt while events wait.

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
        self._keys = array("Q", [0]) * horizon  # by seq, 0 where nothing identifies the sample
        self._slots = array("Q", [0]) * (2 * horizon or 1)  # 0 is free
        self._held = 0
        self._first, self._next = next_seq - count, next_seq
        if count:
            keys = self._fill(array("Q", hashes)[:: HASH_BYTES // 8])
            start = self._first % horizon
            self._keys[start : start + count] = keys[: horizon - start]
            self._keys[: max(0, start + count - horizon)] = keys[horizon - start :]

    def __len__(self) -> int:
        return self._held

    def __contains__(self, digest: bytes) -> bool:
        key = _key(digest)[0]
        slots = self._slots
        at = key % len(slots)
        while held := slots[at]:
            if held == key:
                return True
            at -= 1
        return False

    def add(self, digest: bytes) -> None:
        """Remember the hash of the next sample; the one beyond the horizon is forgotten."""
        if not self._horizon:
            return
        if self._first <= self._next - self._horizon:
            self.forget_before(self._next + 1 - self._horizon)
        key = _key(digest)[0]
        slots = self._slots
        at = key % len(slots)
        while (held := slots[at]) and held != key:
            at -= 1
        if held or not key:
            key = 0
        else:
            slots[at] = key
            self._held += 1
        self._keys[self._next % self._horizon] = key
        self._next += 1

    def forget_before(self, seq: int) -> None:
        """Forget samples before a seq: a restart could not read them back, and must not decide otherwise."""
        while self._first < min(seq, self._next):
            if key := self._keys[self._first % self._horizon]:
                self._remove(key)
            self._first += 1

    def _fill(self, keys: array[int]) -> array[int]:
        """Put the keys of consecutive samples into the empty table. Returns: them, 0 for a repeated one."""
        slots = self._slots
        count = len(slots)
        for i in range(len(keys) - 1, -1, -1):  # the newer of two equal ones keeps it
            key = keys[i]
            at = key % count
            while (held := slots[at]) and held != key:
                at -= 1
            if held or not key:
                keys[i] = 0
            else:
                slots[at] = key
                self._held += 1
        return keys

    def _remove(self, key: int) -> None:
        slots = self._slots
        count = len(slots)
        hole = key % count
        while slots[hole] != key:
            hole -= 1
        at = hole - 1
        while held := slots[at]:
            # A search for `held` starts at `held % count` and goes down: does it pass the hole before `at`?
            if (held - at) % count >= hole - at:
                slots[hole] = held
                hole = at
            at -= 1
        slots[hole] = 0
        self._held -= 1


class Reference(msgspec.Struct, frozen=True):
    """The last reported reading of a source, at its stream time: what the next is compared with."""

    at: float
    values: dict[str, float]


class Dedup:
    """Drops duplicates and unremarkable readings of each Batch.

    Args:
        key: Secret of the hashes, so that they tell nothing of what was said.
        seen: Hashes of the newest samples.
        held_from: Oldest seq that the ring holds.
        references: Source -> encoded Reference, as the ring holds them.
        mode_of: (source, kind of event) -> "delivery", "content" or "none".
        deadband_of: Source -> its deadband, None if it reports everything.
    """

    def __init__(
        self,
        key: bytes,
        seen: SeenHashes,
        held_from: Callable[[], int],
        references: Mapping[str, bytes],
        mode_of: Callable[[str, str], DedupMode],
        deadband_of: Callable[[str], Deadband | None],
    ) -> None:
        self._key = key
        self._seen = seen
        self._held_from = held_from
        decode = msgspec.msgpack.Decoder(Reference).decode
        self._references = {source: decode(data) for source, data in references.items()}
        self._mode_of = mode_of
        self._deadband_of = deadband_of

    def __call__(self, batch: Batch) -> Batch:
        """Keep the first of each; count the rest as duplicates or suppressed."""
        keep: list[int] = []
        hashes: list[bytes] = []
        changed: dict[str, Reference] = {}
        duplicates = suppressed = 0
        self._seen.forget_before(self._held_from())
        for i, (number, event) in enumerate(batch.events):
            line = batch.lines[number]
            digest = self._hash(event, line, batch.times[i])
            if digest in self._seen:
                duplicates += 1
            elif isinstance(event, Reading) and not self._reports(event, line, batch.arrivals[i], changed):
                suppressed += 1
            else:
                # What is stored is remembered, in its order: the set that a restart reads back is this one.
                self._seen.add(digest)
                keep.append(i)
                hashes.append(digest)
        return msgspec.structs.replace(
            batch,
            events=[batch.events[i] for i in keep],
            times=[batch.times[i] for i in keep],
            arrivals=[batch.arrivals[i] for i in keep],
            hashes=hashes,
            references={source: msgspec.msgpack.encode(ref) for source, ref in changed.items()},
            outcome=msgspec.structs.replace(batch.outcome, duplicates=duplicates, suppressed=suppressed),
        )

    def _hash(self, event: Event, line: Line, ts: float) -> bytes:
        source = event.source or line.origin.source
        mode = self._mode_of(source, type(event).__struct_config__.tag)  # type: ignore[arg-type]
        if mode == "none":
            return NO_HASH
        if mode == "content":
            identity: object = ("c", source, _content(event))
        elif event.id is not None:
            identity = ("i", source, event.id)
        elif line.key:
            identity = ("k", line.origin.input, line.key)
        elif event.ts is not None:
            identity = ("t", source, ts, _content(event))
        elif line.offset >= 0:
            identity = ("p", line.origin.input, line.origin.began, line.offset, line.data)
        else:
            return NO_HASH  # nothing tells a redelivery from a new event: see the README
        data = msgspec.msgpack.encode(identity)
        return hashlib.blake2b(data, digest_size=HASH_BYTES, key=self._key).digest()

    def _reports(self, event: Reading, line: Line, now: float, changed: dict[str, Reference]) -> bool:
        source = event.source or line.origin.source
        deadband = self._deadband_of(source)
        if deadband is None:
            return True
        last = self._references.get(source)
        # A clock that stepped back says nothing about the silence: report, and count from the new time.
        back = deadband.max_silence_s > 0 and last is not None and now - last.at <= -HOLD_S
        if last and not back and deadband.silent(last.values, event.values, now - last.at):
            return False
        values = {**(last.values if last else {}), **event.values}
        kept = dict(list(values.items())[-MAX_REFERENCE_TAGS:])
        self._references[source] = changed[source] = Reference(now, kept)
        return True


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
