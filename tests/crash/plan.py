"""What a workload sends: commits that are a pure function of a seed and a number.

The workload writes them, the auditor computes them again: neither needs to be told by the other what a ring
should hold after commit number n. The sizes are those that LMDB treats differently: a few samples (a value
inside a leaf page), a thousand short ones, and a few dozen long ones (values on pages of their own).
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
from array import array
from dataclasses import dataclass
from itertools import accumulate, pairwise

from storage.samples import Samples
from storage.windows import ClosedWindow, Commit, DeadLetter, OpenWindow

__all__ = ["MAP_BYTES", "SHARD", "TOKENIZER", "Moment", "Plan", "say"]

MAP_BYTES = 1 << 20
SHARD = "main"
TOKENIZER = "00112233aabbccdd"
WINDOW_SAMPLES = 400
FIRST_COMMITS = 36  # all of one size: the dictionary is trained on about 1,000 samples of them
LONG_TEXT_BYTES = 640  # a text is kept with each sample, because it is the cheapest way to fill a ring
INPUTS = ("file-a", "file-b", "file-c", "file-d", "file-e")
_SOURCES = ("pump-1", "cmms", "hmi")
_WORDS = ("pump", "chip sensor", "replace", "bearing", "coolant low", "line 3", "bar", "ok", "reset")
_KINDS = ("reading", "text", "exchange", "feedback")
_DIGEST_HEAD = struct.Struct("<dI")


def _long(number: int) -> bool:
    """Whether a commit is one of long samples."""
    bulk = number % 10 in {6, 9} or number % 20 == 13
    return bulk and number > FIRST_COMMITS and not _quiet(number)


def _quiet(number: int) -> bool:
    """Whether a commit lies in a stretch of small ones, long enough that the ring merges their blocks."""
    return number % 50 in range(20, 44)


def say(line: str) -> None:
    """Tell the world outside, at once and in one piece: from here it relies on what the line says."""
    os.write(1, f"{line}\n".encode())


@dataclass(frozen=True)
class Moment:
    """All that a ring says besides its samples, right after one commit.

    Attributes:
        commits: Number of the commit.
        next_seq, digest, stream_time, window, counters, request: As in `RingState`.
        positions, references: The rows by name.
        closed: Every window closed so far, oldest first.
        letters: Dead letters written so far, also those that went again.
    """

    commits: int
    next_seq: int
    digest: bytes
    stream_time: float
    window: OpenWindow
    counters: dict[str, int]
    request: int
    positions: dict[str, bytes]
    references: dict[str, bytes]
    closed: list[ClosedWindow]
    letters: int


class Plan:
    """The commits 1 to `commits` of a seed, and what the ring must say after each."""

    def __init__(self, seed: int, commits: int) -> None:
        self.seed, self.commits = seed, commits
        self._sizes = [self._size(number) for number in range(1, commits + 1)]
        self._ends = list(accumulate(self._sizes, initial=0))
        self._all = self._make_samples()
        self._tokens = list(accumulate(self._all.lengths, initial=0))
        self._letter_ends = list(accumulate((self._letters_of(n) for n in range(1, commits + 1)), initial=0))
        self._digests = self._chain()

    # -- samples ----------------------------------------------------------------------------------

    def samples(self, first_seq: int, last_seq: int) -> Samples:
        """The samples of a range of seqs, both ends included."""
        return self._all[first_seq : last_seq + 1]

    def _size(self, number: int) -> int:
        rng = random.Random(f"size {self.seed} {number}")
        if number <= FIRST_COMMITS:
            return rng.randint(28, 34)
        if _long(number):
            return rng.randint(70, 120)
        if number % 10 == 0:
            return 0
        if _quiet(number):
            return rng.randint(1, 5)
        match number % 10:
            case 3:
                return rng.randint(900, 1_000)
            case 5:
                return rng.randint(60, 140)
            case _:
                return rng.randint(1, 5)

    def _make_samples(self) -> Samples:
        lengths, ids, mask, hashes, texts = array("I"), array("I"), bytearray(), [], []
        numbers = [n for n, size in enumerate(self._sizes, 1) for _ in range(size)]
        for seq, number in enumerate(numbers):
            random_bytes = hashlib.shake_128(f"sample {self.seed} {seq}".encode()).digest(32)
            length = random_bytes[0] % 7
            tokens = array("H", random_bytes[2 : 2 + 2 * length])
            lengths.append(length)
            # Now and then an id that needs 32 bits, which widens its block's whole column.
            ids.extend(token + 65_536 if seq % 5_000 == 17 else token for token in tokens)
            mask.extend(bytes(length) if seq % 300 == 5 else b"\x01" * length)
            hashes.append(random_bytes[16:32])
            texts.append(self._text(number, seq))
        return Samples(
            0,
            [_SOURCES[seq % 3] for seq in range(len(numbers))],
            [_KINDS[seq % 4] for seq in range(len(numbers))],
            ["crew-b" if seq % 11 == 0 else "" for seq in range(len(numbers))],
            array("d", [1_700_000_000.0 + seq / 4 for seq in range(len(numbers))]),
            lengths,
            ids,
            mask,
            b"".join(hashes),
            texts,
        )

    def _text(self, number: int, seq: int) -> str:
        rng = random.Random(f"text {self.seed} {seq}")
        if _long(number):
            return rng.randbytes(rng.randrange(LONG_TEXT_BYTES)).hex()
        return " ".join(rng.choices(_WORDS, k=rng.randint(8, 20))) + f" {rng.randrange(1_000)}"

    def _chain(self) -> list[bytes]:
        """The digest after each commit, computed from FORMAT.md and not by the code under test."""
        digest, out = bytes(32), [bytes(32)]
        everything, tokens = self._all, self._tokens
        for first, end in pairwise(self._ends):
            for seq in range(first, end):
                ids = everything.ids[tokens[seq] : tokens[seq + 1]]
                head = everything.sources[seq].encode() + b"\0"
                head += _DIGEST_HEAD.pack(everything.ts[seq], len(ids))
                mask = bytes(everything.mask[tokens[seq] : tokens[seq + 1]])
                digest = hashlib.blake2b(digest + head + ids.tobytes() + mask, digest_size=32).digest()
            out.append(digest)
        return out

    # -- rows -------------------------------------------------------------------------------------

    def _letters_of(self, number: int) -> int:
        return 1 + number % 3 if number % 4 == 1 else 0

    def letter(self, index: int) -> DeadLetter:
        """Dead letter number `index`, from 0; some are longer than a page."""
        data = hashlib.shake_128(f"letter {self.seed} {index}".encode()).digest(40 if index % 5 else 5_000)
        return DeadLetter("cmms", f"line {index}", float(index), "not an event", data)

    def _positions_moved(self, number: int) -> dict[str, bytes]:
        moved = {INPUTS[number % len(INPUTS)]: f"byte {number * 812}".encode()}
        if number % 4 == 0:
            moved[INPUTS[(number // 4) % len(INPUTS)]] = b""  # this input is gone
        return moved

    def _references_changed(self, number: int) -> dict[str, bytes]:
        return {_SOURCES[number % 2]: f"pressure={number}".encode()} if number % 3 == 0 else {}

    def _window(self, number: int) -> int:
        """How many windows are closed after a commit."""
        return self._ends[number] // WINDOW_SAMPLES

    def _closed(self, number: int) -> list[ClosedWindow]:
        return [
            ClosedWindow(
                window=window + 1,
                first_seq=window * WINDOW_SAMPLES,
                last_seq=(window + 1) * WINDOW_SAMPLES - 1,
                samples=WINDOW_SAMPLES,
                tokens=self._tokens[(window + 1) * WINDOW_SAMPLES] - self._tokens[window * WINDOW_SAMPLES],
                closed_at=self._time(number),
                reason="samples",
            )
            for window in range(self._window(number - 1), self._window(number))
        ]

    def _open_window(self, number: int) -> OpenWindow:
        first, end = self._window(number) * WINDOW_SAMPLES, self._ends[number]
        tokens = self._tokens[end] - self._tokens[first]
        arrival = self._time(number) if end > first else 0.0
        return OpenWindow(self._window(number) + 1, first, end - first, tokens, arrival)

    def _time(self, number: int) -> float:
        return 1_800_000_000.0 + number

    def _counters(self, number: int) -> dict[str, int]:
        samples, letters = self._ends[number], self._letter_ends[number]
        return {"events": samples + letters, "samples": samples, "dead_letters": letters}

    def commit(self, number: int) -> Commit:
        """Commit `number`, from 1; what it holds depends on nothing but the seed."""
        return Commit(
            samples=self.samples(self._ends[number - 1], self._ends[number] - 1),
            stream_time=self._time(number),
            window=self._open_window(number),
            counters=self._counters(number),
            closed=self._closed(number),
            positions=self._positions_moved(number),
            references=self._references_changed(number),
            dead_letters=[self.letter(i) for i in range(*self._letter_ends[number - 1 : number + 1])],
            request=number // 7,
        )

    def moment(self, number: int) -> Moment:
        """What the ring says after commit `number`; 0 is before the first."""
        positions: dict[str, bytes] = {}
        references: dict[str, bytes] = {}
        for n in range(1, number + 1):
            positions |= self._positions_moved(n)
            positions = {name: value for name, value in positions.items() if value}
            references |= self._references_changed(n)
        return Moment(
            commits=number,
            next_seq=self._ends[number],
            digest=self._digests[number],
            stream_time=self._time(number) if number else 0.0,
            window=self._open_window(number) if number else OpenWindow(),
            counters=self._counters(number) if number else {},
            request=number // 7,
            positions=positions,
            references=references,
            closed=[row for n in range(1, number + 1) for row in self._closed(n)],
            letters=self._letter_ends[number],
        )
