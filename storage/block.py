"""Samples as columns, and the checksummed block that holds them in the ring and in window files.

The bytes are specified in FORMAT.md. A block is a header and a zstd frame of columns; everything a
reader needs to refuse it (magic, format, counts, checksum) is in the header.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator

import msgspec
import zstandard

from storage.errors import CorruptBlockError, FormatTooNewError

__all__ = [
    "BLOCK_FORMAT",
    "HASH_BYTES",
    "KINDS",
    "BlockHeader",
    "Samples",
    "decode_block",
    "decode_blocks",
    "encode_block",
    "encode_blocks",
    "read_header",
]

BLOCK_FORMAT = 1
HASH_BYTES = 16
KINDS = ("reading", "text", "exchange", "feedback")
MAX_SAMPLES = 65_535  # the name columns hold 16-bit indices
MAX_RAW_BYTES = 64 << 20  # a header that claims more is refused before anything is allocated

_MAGIC = b"EWB1"
# magic, format, codec, flags, tokenizer id, samples, tokens, first seq, arrival, raw bytes, stored bytes
_FIELDS = struct.Struct("<4sHBB8sIIQdII")
_CHECKSUM_BYTES = 8
HEADER_BYTES = _FIELDS.size + _CHECKSUM_BYTES
_ZSTD = 1
_WIDE_IDS, _HAS_MASK, _HAS_TEXT = 1, 2, 4
_LEVEL = 3

_KIND_CODE = {kind: code for code, kind in enumerate(KINDS)}
_BIT_PACK = bytes.maketrans(b"\x00\x01", b"01")

if sys.byteorder != "little":  # pragma: no cover - no such gateway is supported
    raise ImportError("Edgewater stores little-endian columns; this machine is big-endian")


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
                out.texts = None if part.texts is None else []
            elif part.first_seq != out.first_seq + len(out):
                raise ValueError(f"runs do not follow each other: {part.first_seq} after {out.seqs}")
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

    def extend_digest(self, digest: bytes) -> bytes:
        """Chain the samples into the ring digest: source, event time, token ids, mask, in order.

        Args:
            digest: 32 bytes, the chain so far (zeros for an empty ring).
        Returns: 32 bytes. Equal for equal sequences however they were cut into blocks.
        """
        blake2b = hashlib.blake2b
        ids, mask, t0 = memoryview(self.ids), memoryview(self.mask), 0
        pack = struct.Struct("<dI").pack
        for source, ts, length in zip(self.sources, self.ts, self.lengths, strict=True):
            t1 = t0 + length
            link = blake2b(digest, digest_size=32)
            link.update(source.encode() + b"\0" + pack(ts, length))
            link.update(ids[t0:t1])
            link.update(mask[t0:t1])
            digest, t0 = link.digest(), t1
        return digest


class BlockHeader(msgspec.Struct, frozen=True):
    """What a block says of itself, checked."""

    tokenizer_id: str
    samples: int
    tokens: int
    first_seq: int
    arrival: float
    raw_bytes: int
    stored_bytes: int
    flags: int

    @property
    def last_seq(self) -> int:
        """Seq of the last sample."""
        return self.first_seq + self.samples - 1

    @property
    def block_bytes(self) -> int:
        """Length of the whole block."""
        return HEADER_BYTES + self.stored_bytes


def encode_block(samples: Samples, tokenizer_id: str, arrival: float = 0.0) -> bytes:
    """Encode 1 to 65,535 samples as one block.

    Args:
        samples: The samples.
        tokenizer_id: 16 hexadecimal digits.
        arrival: Stream time of the commit, seconds; eviction by age reads it.
    Raises: ValueError if there is no sample or there are too many.
    """
    if not 0 < len(samples) <= MAX_SAMPLES:
        raise ValueError(f"a block holds 1 to {MAX_SAMPLES} samples, not {len(samples)}")
    wide = _WIDE_IDS if samples.ids and max(samples.ids) > 0xFFFF else 0
    masked = _HAS_MASK if 0 in samples.mask else 0
    text = _HAS_TEXT if samples.texts is not None else 0
    raw = b"".join(_columns(samples, wide, masked))
    payload = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False).compress(raw)
    fields = _FIELDS.pack(
        _MAGIC, BLOCK_FORMAT, _ZSTD, wide | masked | text, bytes.fromhex(tokenizer_id),
        len(samples), len(samples.ids), samples.first_seq, arrival, len(raw), len(payload),
    )  # fmt: skip
    return fields + _checksum(fields, payload) + payload


def read_header(data: bytes | memoryview) -> BlockHeader:
    """Read and check a block's header (not its checksum).

    Raises: CorruptBlockError, FormatTooNewError.
    """
    if len(data) < HEADER_BYTES:
        raise CorruptBlockError(f"a block of {len(data)} bytes is shorter than its header")
    magic, fmt, codec, flags, tok, n, tokens, first, arrival, raw, stored = _FIELDS.unpack_from(data)
    if magic != _MAGIC:
        raise CorruptBlockError("no block starts here (wrong magic)")
    if fmt > BLOCK_FORMAT:
        raise FormatTooNewError(f"block format {fmt} is newer than {BLOCK_FORMAT}", hint="upgrade Edgewater")
    if codec != _ZSTD or not 0 < n <= MAX_SAMPLES or raw > MAX_RAW_BYTES:
        raise CorruptBlockError("the block's header is damaged")
    return BlockHeader(tok.hex(), n, tokens, first, arrival, raw, stored, flags)


def decode_block(data: bytes | memoryview) -> Samples:
    """Decode one block; every byte is covered by the checksum.

    Raises: CorruptBlockError if a single bit differs from what was written.
    """
    header = read_header(data)
    payload = bytes(data[HEADER_BYTES : header.block_bytes])
    if len(payload) != header.stored_bytes:
        raise CorruptBlockError("the block is cut short")
    if bytes(data[_FIELDS.size : HEADER_BYTES]) != _checksum(bytes(data[: _FIELDS.size]), payload):
        raise CorruptBlockError(
            f"checksum of the block at seq {header.first_seq} is wrong",
            hint="its samples are lost",
        )
    # The checksum holds, so the size that the frame states is ours; it is still bounded by the header's.
    raw = zstandard.ZstdDecompressor().decompress(payload, max_output_size=header.raw_bytes)
    if len(raw) != header.raw_bytes:
        raise CorruptBlockError("the block unpacks to another size than it states")
    return _parse(raw, header)


def encode_blocks(samples: Samples, tokenizer_id: str, samples_a_block: int = 1_000) -> bytes:
    """Encode any number of samples as blocks one after the other (a window file)."""
    step = range(0, len(samples), samples_a_block)
    return b"".join(encode_block(samples[i : i + samples_a_block], tokenizer_id) for i in step)


def decode_blocks(data: bytes) -> Samples:
    """Decode what `encode_blocks` wrote. Raises: CorruptBlockError."""
    return Samples.concat(_each_block(data))


def _each_block(data: bytes) -> Iterator[Samples]:
    view, at = memoryview(data), 0
    while at < len(view):
        yield decode_block(view[at:])
        at += read_header(view[at:]).block_bytes


def _checksum(fields: bytes, payload: bytes) -> bytes:
    digest = hashlib.blake2b(fields, digest_size=_CHECKSUM_BYTES)
    digest.update(payload)
    return digest.digest()


def _name_column(names: list[str]) -> tuple[list[str], bytes]:
    table = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return list(table), array("H", [table[name] for name in names]).tobytes()


def _columns(samples: Samples, wide: int, masked: int) -> Iterator[bytes]:
    sources, source_column = _name_column(samples.sources)
    subjects, subject_column = _name_column(samples.subjects)
    tables = msgspec.msgpack.encode((sources, subjects, samples.texts))
    yield struct.pack("<I", len(tables))
    yield tables
    yield source_column
    yield subject_column
    yield bytes(_KIND_CODE[kind] for kind in samples.kinds)
    yield samples.ts.tobytes()
    yield samples.lengths.tobytes()
    yield (samples.ids if wide else array("H", samples.ids)).tobytes()
    if masked:
        yield _pack_bits(samples.mask)
    yield samples.hashes


def _pack_bits(mask: bytearray) -> bytes:
    n_bytes = (len(mask) + 7) // 8
    digits = mask.translate(_BIT_PACK) + b"0" * (n_bytes * 8 - len(mask))
    return int(digits, 2).to_bytes(n_bytes, "big") if n_bytes else b""


def _unpack_bits(packed: bytes, n: int) -> bytearray:
    digits = bin(int.from_bytes(b"\x01" + packed, "big"))[3:]
    return bytearray(digits[:n].encode().translate(bytes.maketrans(b"01", b"\x00\x01")))


class _Reader:
    """Takes columns off a buffer and refuses to run past its end."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def take(self, n: int) -> bytes:
        part = self.raw[self.at : self.at + n]
        if len(part) != n:
            raise CorruptBlockError("the block's columns are shorter than its counts")
        self.at += n
        return part

    def numbers(self, code: str, n: int) -> array[int]:
        out: array[int] = array(code)
        out.frombytes(self.take(n * out.itemsize))
        return out


def _parse(raw: bytes, header: BlockHeader) -> Samples:
    reader, n = _Reader(raw), header.samples
    (size,) = struct.unpack("<I", reader.take(4))
    sources, subjects, texts = msgspec.msgpack.decode(
        reader.take(size), type=tuple[list[str], list[str], list[str] | None]
    )
    source_column, subject_column = reader.numbers("H", n), reader.numbers("H", n)
    kinds = reader.take(n)
    ts: array[float] = array("d")
    ts.frombytes(reader.take(8 * n))
    lengths = reader.numbers("I", n)
    wide = header.flags & _WIDE_IDS
    ids = reader.numbers("I" if wide else "H", header.tokens)
    masked = header.flags & _HAS_MASK
    mask = (
        _unpack_bits(reader.take((header.tokens + 7) // 8), header.tokens)
        if masked
        else bytearray(b"\x01") * header.tokens
    )
    hashes = reader.take(n * HASH_BYTES)
    if reader.at != len(raw) or sum(lengths) != header.tokens:
        raise CorruptBlockError("the block's columns disagree with its counts")
    return Samples(
        header.first_seq,
        [sources[i] for i in source_column],
        [KINDS[code] for code in kinds],
        [subjects[i] for i in subject_column],
        ts,
        lengths,
        ids if wide else array("I", ids),
        mask,
        hashes,
        texts,
    )
