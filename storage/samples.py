"""Samples as columns: a run of events as they are stored, with consecutive seqs."""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterable

__all__ = ["BLANK", "HASH_BYTES", "KINDS", "Samples"]

HASH_BYTES = 16
BLANK = "blank"
_TIME_AND_LENGTH = struct.Struct("<dI")
_PLAIN_HASHER = hashlib.blake2b(digest_size=32)
KINDS = ("reading", "text", "exchange", "feedback", BLANK)


class Samples:
    """A run of samples with consecutive seqs, one list or array a column.

    Attributes:
        first_seq: Seq of the first sample.
        sources, kinds, subjects: One name a sample; a subject may be "".
        ts: Event times, seconds since 1970.
        lengths: Tokens of each sample, may be 0.
        ids: Token ids of all samples, flat.
        mask: One byte a token, 1 where the loss counts.
        hashes: 16 bytes a sample, keyed dedup hashes.
        texts: The texts, only where the tokenizer is not lossless; else None.
    """

    __slots__ = (
        "first_seq",
        "hashes",
        "ids",
        "kinds",
        "lengths",
        "mask",
        "sources",
        "subjects",
        "texts",
        "ts",
    )

    def __init__(
        self,
        first_seq: int = 0,
        sources: list[str] | None = None,
        kinds: list[str] | None = None,
        subjects: list[str] | None = None,
        ts: array[float] | None = None,
        lengths: array[int] | None = None,
        ids: array[int] | None = None,
        mask: bytearray | None = None,
        hashes: bytes = b"",
        texts: list[str] | None = None,
    ) -> None:
        self.first_seq = first_seq
        self.sources = sources if sources is not None else []
        self.kinds = kinds if kinds is not None else []
        self.subjects = subjects if subjects is not None else []
        self.ts = ts if ts is not None else array("d")
        self.lengths = lengths if lengths is not None else array("I")
        self.ids = ids if ids is not None else array("I")
        self.mask = mask if mask is not None else bytearray()
        self.hashes = hashes
        self.texts = texts

    def __len__(self) -> int:
        return len(self.sources)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Samples):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    __hash__ = None  # type: ignore[assignment]  # columns are mutable

    @property
    def seqs(self) -> range:
        """The seqs of the samples."""
        return range(self.first_seq, self.first_seq + len(self))

    def offsets(self) -> list[int]:
        """Start of each sample in `ids`, and the end of the last: n + 1 numbers."""
        total, starts = 0, [0]
        for length in self.lengths:
            total += length
            starts.append(total)
        return starts

    def token_ids(self, i: int) -> list[int]:
        """Token ids of sample `i`."""
        start = sum(self.lengths[:i])
        return self.ids[start : start + self.lengths[i]].tolist()

    def token_mask(self, i: int) -> list[int]:
        """Loss mask of sample `i`, one 0 or 1 a token."""
        start = sum(self.lengths[:i])
        return list(self.mask[start : start + self.lengths[i]])

    def __getitem__(self, part: slice) -> Samples:
        """A contiguous part, copied; steps other than 1 are refused."""
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError("samples are consecutive: a slice takes no step")
        stop = max(stop, start)
        t0 = sum(self.lengths[:start])
        t1 = t0 + sum(self.lengths[start:stop])
        return Samples(
            self.first_seq + start,
            self.sources[start:stop],
            self.kinds[start:stop],
            self.subjects[start:stop],
            self.ts[start:stop],
            self.lengths[start:stop],
            self.ids[t0:t1],
            self.mask[t0:t1],
            self.hashes[start * HASH_BYTES : stop * HASH_BYTES],
            None if self.texts is None else self.texts[start:stop],
        )

    @staticmethod
    def concat(parts: Iterable[Samples]) -> Samples:
        """Join runs that follow each other; a gap between them is an error."""
        out = Samples()
        hashes = []
        for n, part in enumerate(parts):
            if n == 0:
                out.first_seq = part.first_seq
            elif part.first_seq != out.first_seq + len(out):
                raise ValueError(f"runs do not follow each other: {part.first_seq} after {out.seqs}")
            if part.texts is not None and out.texts is None:
                out.texts = [""] * len(out)  # what came before is blank, or of a lossless tokenizer
            out.sources += part.sources
            out.kinds += part.kinds
            out.subjects += part.subjects
            out.ts += part.ts
            out.lengths += part.lengths
            out.ids += part.ids
            out.mask += part.mask
            hashes.append(part.hashes)
            if out.texts is not None:
                out.texts += part.texts or [""] * len(part)
        out.hashes = b"".join(hashes)
        return out

    @staticmethod
    def blank(first_seq: int, count: int, hashes: bytes = b"") -> Samples:
        """Samples whose content is gone: their seqs remain, so that everything after them keeps its place.

        Args:
            hashes: Their dedup hashes where those are still known; else none will be recognized again.
        """
        return Samples(
            first_seq,
            [""] * count,
            [BLANK] * count,
            [""] * count,
            array("d", bytes(8 * count)),
            array("I", bytes(4 * count)),
            hashes=hashes or bytes(HASH_BYTES * count),
        )

    def without(self, gone: Iterable[int]) -> Samples:
        """The same samples with those at some indices blank, but for their hashes and arrival order."""
        lost = set(gone)
        starts = self.offsets()
        kept = [i for i in range(len(self)) if i not in lost]
        out = Samples.blank(self.first_seq, len(self), self.hashes)
        out.texts = None if self.texts is None else [""] * len(self)
        for i in kept:
            out.sources[i], out.kinds[i], out.subjects[i] = self.sources[i], self.kinds[i], self.subjects[i]
            out.ts[i], out.lengths[i] = self.ts[i], self.lengths[i]
            out.ids += self.ids[starts[i] : starts[i + 1]]
            out.mask += self.mask[starts[i] : starts[i + 1]]
            if out.texts is not None and self.texts is not None:
                out.texts[i] = self.texts[i]
        return out

    def present(self) -> Samples:
        """Only the samples that are not blank; their seqs no longer follow each other."""
        if BLANK not in self.kinds:
            return self
        kept = [i for i, kind in enumerate(self.kinds) if kind != BLANK]
        return Samples(
            self.first_seq,
            [self.sources[i] for i in kept],
            [self.kinds[i] for i in kept],
            [self.subjects[i] for i in kept],
            array("d", [self.ts[i] for i in kept]),
            array("I", [self.lengths[i] for i in kept]),
            self.ids,  # a blank sample has no tokens
            self.mask,
            b"".join(self.hashes[i * HASH_BYTES : (i + 1) * HASH_BYTES] for i in kept),
            None if self.texts is None else [self.texts[i] for i in kept],
        )

    def extend_digest(self, digest: bytes) -> bytes:
        """Chain the samples into the ring digest: source, event time, token ids, mask, in order.

        Args:
            digest: 32 bytes, the chain so far (zeros for an empty ring).
        Returns: 32 bytes. Equal for equal sequences however they were cut into blocks.
        """
        ids, mask, pack = self.ids.tobytes(), bytes(self.mask), _TIME_AND_LENGTH.pack
        names = {source: source.encode() + b"\0" for source in {*self.sources}}
        ends = self.offsets()
        width = self.ids.itemsize
        at = [width * end for end in ends]
        links = [
            names[source] + pack(ts, length) + ids[i0:i1] + mask[m0:m1]
            for source, ts, length, i0, i1, m0, m1 in zip(
                self.sources, self.ts, self.lengths, at[:-1], at[1:], ends[:-1], ends[1:], strict=True
            )
        ]
        fresh = _PLAIN_HASHER.copy  # costs less than to make one
        for link in links:
            hasher = fresh()
            hasher.update(digest + link)
            digest = hasher.digest()
        return digest
