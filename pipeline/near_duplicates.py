"""Near duplicates: texts that say again, in almost the same words, what their source said not long ago.

Two texts are near duplicates when the Jaccard similarity of their shingles, all runs of 3 characters of the
text in lower case, reaches a threshold: of a work order of 35 characters, one mistyped letter leaves 0.83.

Similar ones are found exactly, not by chance. Shingles have an order, that of their hashes. Sets of
similarity t or more share at least one of their first `n - ceil(t * n) + 1` shingles, n being the size of the
set; so only those are indexed, and only texts that share one are compared. A text of more than MAX_SHINGLES
shingles is represented by its first ones, which estimates the similarity (a bottom-k sketch); a work order
has about 50. What most texts of a source have in common, dates and names, makes many candidates; most of them
are dismissed by one AND of two bit sets, which bounds what they share from above.

Source: prefix filtering after Chaudhuri, Ganti, Kaushik 2006; bottom-k sketches after Broder 1997.
"""

from __future__ import annotations

import math
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from storage.ring import Ring
from storage.samples import Samples

__all__ = ["MAX_SHINGLES", "NearDuplicates", "recalled", "shingles"]

READ_SAMPLES = 4_096  # at a time
M = TypeVar("M", bound="Mapping[str, NearDuplicates]")

SHINGLE_BYTES = 3
MAX_SHINGLES = 128
SET_BITS = 512
ROUNDING = 1e-9


def shingles(text: str) -> list[int]:
    """The hashes of a text's shingles, each once, in order; at most MAX_SHINGLES."""
    data = " ".join(text.lower().split()).encode(errors="replace")
    runs = {data[i : i + SHINGLE_BYTES] for i in range(max(1, len(data) - SHINGLE_BYTES + 1))}
    # crc32 for the order alone: it must be the same in every process, and that of no letter in particular.
    return sorted({zlib.crc32(run) for run in runs})[:MAX_SHINGLES]


class _Text:
    """A text as it is compared.

    Attributes:
        seq: Its sample's.
        shingles: Their hashes, in order.
        bits: A set of SET_BITS bits: that of each shingle is set.
        lost: How many shingles have no bit of their own.
    """

    __slots__ = ("bits", "lost", "seq", "shingles")

    def __init__(self, seq: int, found: list[int]) -> None:
        self.seq, self.shingles = seq, array("I", found)
        places = {shingle % SET_BITS for shingle in found}
        self.bits = sum(1 << place for place in places)
        self.lost = len(found) - len(places)


class NearDuplicates:
    """The newest texts of one source, and whether another is like one of them.

    Takes about 3 KB a text of 100 characters.

    Args:
        similarity: Jaccard similarity from which on texts are near duplicates, above 0, at most 1.
        horizon: So many texts are remembered.

    Attributes:
        horizon: As given.
    """

    def __init__(self, similarity: float, horizon: int) -> None:
        self._similarity, self.horizon = similarity, horizon
        self._texts: deque[_Text] = deque()  # oldest first
        self._index: dict[int, list[_Text]] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def find(self, text: str) -> int | None:
        """The seq of the newest text that this one is a near duplicate of, None if there is none."""
        found = _Text(0, shingles(text))
        bits, lost, size, least = found.bits, found.lost, len(found.shingles), self._similarity
        candidates = {
            other.seq: other
            for shingle in self._prefix(found)
            for other in self._index.get(shingle, ())
            # That two sets of n and m have s in common is a similarity of s / (n + m - s).
            if (1 + least) * ((bits & other.bits).bit_count() + min(lost, other.lost))
            >= least * (size + len(other.shingles)) - ROUNDING
        }
        own = set(found.shingles)
        for seq in sorted(candidates, reverse=True):
            other = candidates[seq].shingles
            shared = len(own.intersection(other))
            if shared >= least * (size + len(other) - shared):
                return seq
        return None

    def add(self, seq: int, text: str) -> None:
        """Remember a text that is stored under a seq; the oldest beyond the horizon is forgotten."""
        made = _Text(seq, shingles(text))
        self._texts.append(made)
        for shingle in self._prefix(made):
            self._index.setdefault(shingle, []).append(made)
        if len(self._texts) > self.horizon:
            self._forget_oldest()

    def forget_before(self, seq: int) -> None:
        """Forget texts before a seq: a restart could not read them back."""
        while self._texts and self._texts[0].seq < seq:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        for shingle in self._prefix(self._texts.popleft()):
            texts = self._index[shingle]
            del texts[0]  # they are in the order of their seqs: it is the oldest here too
            if not texts:
                del self._index[shingle]

    def _prefix(self, text: _Text) -> Iterable[int]:
        # Less the rounding: a product just above a whole number must not shorten the prefix.
        size = len(text.shingles)
        return text.shingles[: size - math.ceil(self._similarity * size - ROUNDING) + 1]


def recalled(
    memories: M, ring: Ring, horizon: int, texts_of: Callable[[Samples, Sequence[int]], list[str]]
) -> M:
    """Fill empty memories with what the ring holds, so that a restart decides as before.

    Args:
        memories: Source -> its memory.
        ring: The ring.
        horizon: So many samples back dedup looks; 0 not at all.
        texts_of: Texts of some samples, by their indices.
    Returns: The memories.
    """
    if not memories:
        return memories
    newest: dict[str, deque[tuple[int, str]]] = {
        source: deque(maxlen=memory.horizon) for source, memory in memories.items()
    }
    state = ring.state
    for first in range(max(state.tail_seq, state.next_seq - horizon), state.next_seq, READ_SAMPLES):
        samples = ring.read(first, min(first + READ_SAMPLES, state.next_seq) - 1)
        named = zip(samples.sources, samples.kinds, strict=True)
        chosen = [i for i, (source, kind) in enumerate(named) if kind == "text" and source in memories]
        for i, text in zip(chosen, texts_of(samples, chosen), strict=True):
            newest[samples.sources[i]].append((first + i, text))
    for source, texts in newest.items():
        for seq, text in texts:
            memories[source].add(seq, text)
    return memories
