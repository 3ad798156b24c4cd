"""Dead letters in the ingest process: fed again or deleted on request, and said in the log, not too often.

The ring has one writer, the dataflow; so a request travels as a chunk like any other, with the letters that
it is about in its receipt:

    retry   the letters' bytes are lines again; the commit that holds what became of them deletes the letters
    purge   no line at all; the commit deletes the letters

Before that commit the letters are there, after it the outcome is: a kill in between changes nothing, and a
letter that is refused again is a new one, with a new number and the reason of now.
"""

from __future__ import annotations

import bisect
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from pipeline.control import Answers, ControlError, Request
from pipeline.events import MAX_EVENT_BYTES, Batch, Line, Origin
from pipeline.settings import Config
from pipeline.sources.inbox import Chunk, Inbox, ReaderThread, Settled
from storage.ring import Ring
from storage.windows import DeadLetter

__all__ = [
    "NAME", "LetterDesk", "LetterOutcome", "LetterRun", "LetterWork", "RefusalLog", "allowed_sources",
    "why_not", "with_letters",
]  # fmt: skip

NAME = "dlq:letters"  # of the connector
# As much as a connector hands over at a time, at most: no Batch may be too large for the smallest ring.
CHUNK_LETTERS, CHUNK_BYTES = 256, 32 << 10
POLL_S = 0.1
SAY_S = 60.0
Allowed = Callable[[str], frozenset[str] | None]
log = logging.getLogger("edgewater.dead_letters")


class LetterOutcome(msgspec.Struct, frozen=True):
    """What became of one letter.

    Attributes:
        number: The letter's.
        became: "stored", "dropped" (a duplicate, or within the deadband), "refused" (it is a new letter),
            "purged", "kept" (it cannot be retried), "gone" (there is no such letter).
        reason: Why it was refused or kept.
    """

    number: int
    became: Literal["stored", "dropped", "refused", "purged", "kept", "gone"]
    reason: str = ""


class LetterWork:
    """The receipt of a chunk of letters; the dataflow notes here what became of them.

    Attributes:
        numbers: Of the letters, one a line of the chunk; those of a purge have no lines.
        outcomes: One a number, noted before the commit; they hold once it is `settled`.
        settled: Set when the commit is on stable storage.
    """

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers
        self.outcomes = [LetterOutcome(number, "purged") for number in numbers]
        self.settled = threading.Event()


def why_not(letter: DeadLetter) -> str:
    """Why a letter cannot be fed again, "" if it can: what is no whole JSON is refused whatever changes."""
    if len(letter.data) >= MAX_EVENT_BYTES:
        return f"it was cut at {MAX_EVENT_BYTES >> 10} KiB: its source must send it again"
    if not isinstance(_decoded(letter.data), dict):
        return "it is no JSON object: its source must send it again"
    return ""


def allowed_sources(config: Config) -> Allowed:
    """Which sources an event of a source may name besides it, None for any.

    A letter does not say by which topic it came: of the rules of an MQTT source the strictest holds.
    """
    found: dict[str, frozenset[str] | None] = {}
    rules: list[tuple[str, ...]] = []
    for source in config.sources:
        found[source.name] = None
        if source.http is not None:
            found[source.name] = _allowed([source.http.sources])
        if source.mqtt is not None:
            topics = [topic.sources for topic in source.mqtt.topics.values()]
            found[source.name] = _allowed(topics)
            rules += topics
    # One that the configuration does not name was made by a topic, or is gone and may have allowed nothing.
    unnamed = _allowed(rules) if rules else frozenset()
    return lambda source: found.get(source, unnamed)


def with_letters(batch: Batch) -> Batch:
    """A Batch that is ready for its commit, with the letters that go with it; notes what becomes of them."""
    works = [receipt for receipt in batch.receipts if isinstance(receipt.token, LetterWork)]
    if not works:
        return batch
    kept = [number for number, _ in batch.events]
    for receipt in works:
        assert isinstance(receipt.token, LetterWork)
        for i in range(receipt.end - receipt.first):
            outcome = _outcome(batch, kept, receipt.first + i, receipt.token.numbers[i])
            receipt.token.outcomes[i] = outcome
    deleted = [number for receipt in works for number in receipt.token.numbers]  # type: ignore[attr-defined]
    return msgspec.structs.replace(batch, deleted_letters=deleted)


class LetterDesk:
    """Takes requests about letters while ingest runs: the connector of what they become.

    Args:
        ring: The shard's ring.
        inbox: Of the dataflow.
        allowed: Source -> which other sources its events may name.
    """

    name = NAME

    def __init__(self, ring: Ring, inbox: Inbox, allowed: Allowed) -> None:
        self._ring, self._inbox, self._allowed = ring, inbox, allowed
        self._busy = threading.Lock()
        self._newest: LetterWork | None = None  # that the dataflow was given

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None:
        """It is part of the dataflow that it feeds, and reads nothing by itself."""

    def acknowledge(self, settled: list[Settled]) -> None:
        """The letters' outcome is on stable storage."""
        _settle(settled)

    def stop(self) -> None:
        """Nothing runs."""

    def retry(self, request: Request) -> Answers:
        """Feed letters again; yields outcomes as they become durable."""
        yield from self._do(request, self._retries)

    def purge(self, request: Request) -> Answers:
        """Delete letters; yields outcomes as they become durable."""
        yield from self._do(request, self._purges)

    def _do(
        self, request: Request, work_for: Callable[[list[int]], Iterator[Chunk | list[LetterOutcome]]]
    ) -> Answers:
        # One at a time: two of them about one letter would feed it twice.
        if not self._busy.acquire(timeout=1.0):
            raise ControlError("another request about dead letters is at work: try again")
        try:
            # A client may have left before its commit: read again until then, its letters would be fed twice.
            while self._newest is not None and not self._newest.settled.wait(POLL_S):
                yield None
            for step in work_for(list(dict.fromkeys(request.letters))):
                outcomes = step
                if isinstance(step, Chunk):
                    yield from self._through(step)
                    assert isinstance(step.receipt, LetterWork)
                    outcomes = step.receipt.outcomes
                yield {"letters": outcomes}
            yield {"done": True}
        finally:
            self._busy.release()

    def _through(self, chunk: Chunk) -> Answers:
        """Wait for the commit of a chunk. A client that leaves earlier does not hold it up any more."""
        while not self._inbox.offer(chunk):
            if self._inbox.closed.is_set():
                raise ControlError("ingest is ending")
            time.sleep(POLL_S)
            yield None
        assert isinstance(chunk.receipt, LetterWork)
        self._newest = chunk.receipt
        while not chunk.receipt.settled.wait(POLL_S):
            yield None

    def _retries(self, numbers: list[int]) -> Iterator[Chunk | list[LetterOutcome]]:
        for first in range(0, len(numbers), CHUNK_LETTERS):
            part = numbers[first : first + CHUNK_LETTERS]
            letters = [(number, self._ring.dead_letter(number)) for number in part]
            fed, left = _sorted_out(letters)
            if left:
                yield left
            yield from _retry_chunks(self, fed, self._allowed)

    def _purges(self, numbers: list[int]) -> Iterator[Chunk | list[LetterOutcome]]:
        for first in range(0, len(numbers), CHUNK_LETTERS):
            part = numbers[first : first + CHUNK_LETTERS]
            gone = [number for number in part if self._ring.dead_letter(number) is None]
            if gone:
                yield [LetterOutcome(number, "gone") for number in gone]
            yield from _purge_chunks(self, [number for number in part if number not in gone])


class LetterRun:
    """The same where no ingest runs: a source that holds these letters and then ends.

    Args:
        letters: What is to be done, as the ring holds it.
        do: "retry" or "purge".
        allowed: As of the desk.
    """

    name = NAME

    def __init__(
        self,
        letters: Sequence[tuple[int, DeadLetter | None]],
        do: Literal["retry", "purge"],
        allowed: Allowed,
    ) -> None:
        self._outcomes: list[LetterOutcome] = []
        self._chunks: list[Chunk] = []
        self._thread = ReaderThread()
        if do == "retry":
            fed, self._outcomes = _sorted_out(letters)
            self._chunks = list(_retry_chunks(self, fed, allowed))
        else:
            self._outcomes = [LetterOutcome(n, "gone") for n, letter in letters if letter is None]
            self._chunks = list(_purge_chunks(self, [n for n, letter in letters if letter is not None]))

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self._chunks

    def outcomes(self) -> list[LetterOutcome]:
        """What is certain by now."""
        works = [chunk.receipt for chunk in self._chunks if isinstance(chunk.receipt, LetterWork)]
        done = [outcome for work in works if work.settled.is_set() for outcome in work.outcomes]
        return [*self._outcomes, *done]

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None:
        """Hand everything over."""
        self._thread.start(self, inbox, lambda: self._read(inbox))

    def acknowledge(self, settled: list[Settled]) -> None:
        """The letters' outcome is on stable storage."""
        _settle(settled)

    def stop(self) -> None:
        """Hand over no more."""
        self._thread.stop()

    def _read(self, inbox: Inbox) -> None:
        for chunk in self._chunks:
            if not inbox.put(chunk):
                return


class RefusalLog:
    """Mentions refused inputs in the log: at once, then at most once a minute, however many there are.

    Never what they were: a log is read by more people than the ring.
    """

    def __init__(self, shard: str, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._shard, self._monotonic = shard, monotonic
        self._count = 0
        self._said = -SAY_S

    def note(self, refused: int) -> None:
        """Count refused inputs of a commit; 0 only lets time pass."""
        self._count += refused
        if self._count and (now := self._monotonic()) - self._said >= SAY_S:
            words = "1 input was" if self._count == 1 else f"{self._count:,} inputs were"
            log.warning("%s: %s refused: see `edgewater dlq list`", self._shard, words)
            self._count, self._said = 0, now


def _outcome(batch: Batch, kept: list[int], line: int, number: int) -> LetterOutcome:
    at = bisect.bisect_left(batch.dead_lines, line)
    if at < len(batch.dead_lines) and batch.dead_lines[at] == line:
        return LetterOutcome(number, "refused", batch.dead[at].reason)
    at = bisect.bisect_left(kept, line)
    return LetterOutcome(number, "stored" if at < len(kept) and kept[at] == line else "dropped")


def _sorted_out(
    letters: Iterable[tuple[int, DeadLetter | None]],
) -> tuple[list[tuple[int, DeadLetter]], list[LetterOutcome]]:
    """Letters that can be fed again, and the others' outcome."""
    fed: list[tuple[int, DeadLetter]] = []
    left: list[LetterOutcome] = []
    for number, letter in letters:
        if letter is None:
            left.append(LetterOutcome(number, "gone"))
        elif reason := why_not(letter):
            left.append(LetterOutcome(number, "kept", reason))
        else:
            fed.append((number, letter))
    return fed, left


def _retry_chunks(
    connector: LetterDesk | LetterRun, letters: Sequence[tuple[int, DeadLetter]], allowed: Allowed
) -> Iterator[Chunk]:
    group: list[tuple[int, DeadLetter]] = []
    size = 0
    for number, letter in letters:
        if group and (size + len(letter.data) > CHUNK_BYTES or len(group) == CHUNK_LETTERS):
            yield _retry_chunk(connector, group, allowed)
            group, size = [], 0
        group.append((number, letter))
        size += len(letter.data)
    if group:
        yield _retry_chunk(connector, group, allowed)


def _retry_chunk(
    connector: LetterDesk | LetterRun, letters: list[tuple[int, DeadLetter]], allowed: Allowed
) -> Chunk:
    now = time.time()
    # Its old place is its input: refused again it says where it came from, and it has no position there.
    lines = [
        Line(_dated(letter), -1, Origin(letter.source, letter.position, now, allowed=allowed(letter.source)))
        for _, letter in letters
    ]
    return Chunk(connector, lines, receipt=LetterWork([number for number, _ in letters]), urgent=True)


def _purge_chunks(connector: LetterDesk | LetterRun, numbers: Sequence[int]) -> Iterator[Chunk]:
    for first in range(0, len(numbers), CHUNK_LETTERS):
        work = LetterWork(list(numbers[first : first + CHUNK_LETTERS]))
        yield Chunk(connector, [], receipt=work, urgent=True)


def _dated(letter: DeadLetter) -> bytes:
    """Its data, with the time at which it first came as the `ts` of an event that says none.

    In the data, so that a capture holds it and a replay gives the same sample.
    """
    fields = _decoded(letter.data)
    if not isinstance(fields, dict) or not fields or "ts" in fields or letter.arrival <= 0:
        return letter.data
    dated = b'{"ts":%s,%s' % (repr(letter.arrival).encode(), letter.data.lstrip()[1:])
    return dated if len(dated) <= MAX_EVENT_BYTES else letter.data


def _decoded(data: bytes) -> object:
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None


def _allowed(rules: Sequence[Sequence[str]]) -> frozenset[str] | None:
    """What every one of some rules allows."""
    strict = [frozenset(names) for names in rules if "*" not in names]
    return frozenset.intersection(*strict) if strict else None


def _settle(settled: list[Settled]) -> None:
    for one in settled:
        if isinstance(one.receipt, LetterWork):
            one.receipt.settled.set()
