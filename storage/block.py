"""The checksummed block that holds samples in the ring and in window files.

The bytes are specified in FORMAT.md. A block is a header, the dedup hashes as they are (hashes do not
compress, and a restart reads them without unpacking anything), and a zstd frame of columns; everything a
reader needs to refuse it (magic, format, counts, checksum) is in the header.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
import struct
import sys
from array import array
from collections.abc import Callable, Iterator
from typing import Literal

import msgspec
import zstandard

from storage.dictionary import Dictionary
from storage.errors import CorruptBlockError, MissingDictionaryError
from storage.samples import HASH_BYTES, KINDS, Samples

__all__ = [
    "BLOCK_FORMAT",
    "LEVEL",
    "MAX_SAMPLES",
    "BlockHeader",
    "block_checksum",
    "block_hashes",
    "column_bytes",
    "decode_block",
    "decode_blocks",
    "encode_block",
    "encode_blocks",
    "read_header",
    "verify_block",
]

BLOCK_FORMAT = 2
MAX_SAMPLES = 65_535  # the name columns hold 16-bit indices
MAX_RAW_BYTES = 64 << 20  # a header that claims more is refused before anything is allocated

_MAGIC = b"EWB1"
_CHECKSUM_BYTES = 8
# magic, format, codec, flags, tokenizer id, samples, tokens, first seq, arrival, raw bytes, stored bytes
_FIELDS_1 = struct.Struct("<4sHBB8sIIQdII")
# The same and: dictionary id, revision.
_FIELDS_2 = struct.Struct("<4sHBB8sIIQdIIII")
_PREFIX = struct.Struct("<4sH")
_ZSTD = 1
_WIDE_IDS, _HAS_MASK, _HAS_TEXT, _HAS_HASHES, _HAS_MICROS = 1, 2, 4, 8, 16
# Token ids of pump readings in blocks of 20, with a dictionary, an event: level 3 15.2 bytes in 0.2 us,
# level 6 13.3 in 1.1 us, level 9 13.1 in 2.1 us, level 19 11.7 in 25 us.
LEVEL = 6
# From here on a block repeats itself enough: a dictionary saves 0 to 4 %, and is one more thing to lose.
LONG_BYTES = 64 << 10
_LENGTH_CODES = ("B", "H", "I")

_KIND_CODE = {kind: code for code, kind in enumerate(KINDS)}
_BIT_PACK = bytes.maketrans(b"\x00\x01", b"01")

if sys.byteorder != "little":  # pragma: no cover - no such gateway is supported
    raise ImportError("Edgewater stores little-endian columns; this machine is big-endian")


class BlockHeader(msgspec.Struct, frozen=True):
    """What a block says of itself.

    Attributes:
        format: 1, or 2 with hashes outside the frame.
        header_bytes: 56 or 64.
        tokenizer_id: 16 hexadecimal digits.
        samples, tokens, first_seq: What it holds.
        arrival: Stream time of its commit (the newest one, where several were merged), seconds.
        raw_bytes, stored_bytes: Of the columns, unpacked and as stored.
        dictionary: Id of the dictionary that unpacks them, 0 for none.
        revision: How often samples in it were blanked: the higher of two copies is the newer.
        flags: See FORMAT.md.
    """

    format: int
    header_bytes: int
    tokenizer_id: str
    samples: int
    tokens: int
    first_seq: int
    arrival: float
    raw_bytes: int
    stored_bytes: int
    dictionary: int
    revision: int
    flags: int

    @property
    def last_seq(self) -> int:
        """Seq of the last sample."""
        return self.first_seq + self.samples - 1

    @property
    def hash_bytes(self) -> int:
        """Length of the hashes between header and frame."""
        return HASH_BYTES * self.samples if self.flags & _HAS_HASHES else 0

    @property
    def block_bytes(self) -> int:
        """Length of the whole block."""
        return self.header_bytes + self.hash_bytes + self.stored_bytes


def encode_block(
    samples: Samples,
    tokenizer_id: str,
    arrival: float = 0.0,
    dictionary: Dictionary | None = None,
    revision: int = 0,
) -> bytes:
    """Encode 1 to 65,535 samples as one block.

    Args:
        samples: The samples.
        tokenizer_id: 16 hexadecimal digits.
        arrival: Stream time of the commit, seconds; eviction by age reads it.
        dictionary: To pack with, where the block is short; whoever reads it needs the dictionary too.
        revision: One more than that of the block it replaces.
    Raises: ValueError if there is no sample or there are too many.
    """
    if not 0 < len(samples) <= MAX_SAMPLES:
        raise ValueError(f"a block holds 1 to {MAX_SAMPLES} samples, not {len(samples)}")
    raw, flags = _columns(samples)
    if len(raw) >= LONG_BYTES:
        dictionary = None
    packer = dictionary.compressor(LEVEL) if dictionary else _plain_compressor()
    payload = packer.compress(raw)
    hashes = samples.hashes if any(samples.hashes) else b""
    fields = _FIELDS_2.pack(
        _MAGIC, BLOCK_FORMAT, _ZSTD, flags | (_HAS_HASHES if hashes else 0), bytes.fromhex(tokenizer_id),
        len(samples), len(samples.ids), samples.first_seq, arrival, len(raw), len(payload),
        dictionary.id if dictionary else 0, revision,
    )  # fmt: skip
    return b"".join((fields, _checksum(fields, hashes, payload), hashes, payload))


@functools.cache
def _plain_compressor() -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=False)


def column_bytes(samples: Samples) -> bytes:
    """The columns as they are before they are packed; a dictionary is trained on them."""
    return _columns(samples)[0]


def read_header(data: bytes | memoryview) -> BlockHeader:
    """Read and check a block's header (not its checksum).

    Raises: CorruptBlockError.
    """
    if len(data) < _FIELDS_1.size + _CHECKSUM_BYTES:
        raise CorruptBlockError(f"a block of {len(data)} bytes is shorter than its header")
    magic, fmt = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise CorruptBlockError("no block starts here (wrong magic)")
    fields = _FIELDS_1 if fmt == 1 else _FIELDS_2
    size = fields.size + _CHECKSUM_BYTES
    # A newer format comes with a newer ring, which is refused as a whole: here it is a flipped bit.
    if not 1 <= fmt <= BLOCK_FORMAT or len(data) < size:
        raise CorruptBlockError("the block's header is damaged")
    _, _, codec, flags, tok, n, tokens, first, arrival, raw, stored, *more = fields.unpack_from(data)
    if codec != _ZSTD or not 0 < n <= MAX_SAMPLES or raw > MAX_RAW_BYTES:
        raise CorruptBlockError("the block's header is damaged")
    dictionary, revision = more or (0, 0)
    return BlockHeader(
        fmt, size, tok.hex(), n, tokens, first, arrival, raw, stored, dictionary, revision, flags
    )


def verify_block(data: bytes | memoryview) -> BlockHeader:
    """Check that not one bit of a block changed since it was written; nothing is unpacked.

    Raises: CorruptBlockError.
    """
    header = read_header(data)
    view = memoryview(data)[: header.block_bytes]
    if len(view) != header.block_bytes:
        raise CorruptBlockError("the block is cut short")
    fields = header.header_bytes - _CHECKSUM_BYTES
    if bytes(view[fields : header.header_bytes]) != _checksum(view[:fields], view[header.header_bytes :]):
        raise CorruptBlockError(f"checksum of the block at seq {header.first_seq} is wrong")
    return header


def decode_block(
    data: bytes | memoryview, dictionaries: Callable[[int], Dictionary | None] = lambda number: None
) -> Samples:
    """Decode one block; every byte is covered by the checksum.

    Args:
        dictionaries: Finds a dictionary by its id.
    Raises: CorruptBlockError if a single bit differs from what was written; MissingDictionaryError.
    """
    header = verify_block(data)
    start = header.header_bytes + header.hash_bytes
    payload = bytes(data[start : header.block_bytes])
    if header.dictionary:
        found = dictionaries(header.dictionary)
        if found is None:
            raise MissingDictionaryError(
                f"the block at seq {header.first_seq} needs dictionary {header.dictionary:08x}, which is lost"
            )
        unpacker = found.decompressor
    else:
        unpacker = zstandard.ZstdDecompressor()
    # The checksum holds, so the size that the frame states is ours; it is still bounded by the header's.
    try:
        raw = unpacker.decompress(payload, max_output_size=header.raw_bytes)
    except zstandard.ZstdError as error:
        raise CorruptBlockError(f"the block at seq {header.first_seq} does not unpack: {error}") from error
    if len(raw) != header.raw_bytes:
        raise CorruptBlockError("the block unpacks to another size than it states")
    if header.format == 1:
        return _parse_1(raw, header)
    hashes = bytes(data[header.header_bytes : start]) or bytes(HASH_BYTES * header.samples)
    return _parse(raw, header, hashes)


def block_hashes(data: bytes | memoryview) -> bytes:
    """Dedup hashes of a block, 16 bytes a sample, without unpacking its columns.

    Raises: CorruptBlockError.
    """
    header = verify_block(data)
    if header.format == 1:
        return decode_block(data).hashes
    start = header.header_bytes
    return bytes(data[start : start + header.hash_bytes]) or bytes(HASH_BYTES * header.samples)


def block_checksum(data: bytes | memoryview) -> int:
    """The checksum that a block states, as a number: what the state row's sum of all blocks is made of."""
    at = (_FIELDS_1 if data[4:6] == b"\x01\x00" else _FIELDS_2).size
    return int.from_bytes(data[at : at + _CHECKSUM_BYTES], "big")


def encode_blocks(samples: Samples, tokenizer_id: str, samples_a_block: int = 1_000) -> bytes:
    """Encode any number of samples as blocks one after the other (a window file), readable alone."""
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


def _checksum(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=_CHECKSUM_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


# -- columns ------------------------------------------------------------------------------------------


def _columns(samples: Samples) -> tuple[bytes, int]:
    """The columns of format 2, and the flags that say how they are written."""
    id_column, wide = _id_column(samples.ids)
    masked = _HAS_MASK if 0 in samples.mask else 0
    text = _HAS_TEXT if samples.texts is not None else 0
    sources, source_column = _name_column(samples.sources)
    subjects, subject_column = _name_column(samples.subjects)
    longest = max(samples.lengths)
    code = _LENGTH_CODES[(longest > 0xFF) + (longest > 0xFFFF)]
    times, micros = _time_column(samples.ts)
    tables = msgspec.msgpack.encode((sources, subjects, code, samples.texts))
    parts = [
        struct.pack("<I", len(tables)),
        tables,
        source_column,
        subject_column,
        bytes(map(_KIND_CODE.__getitem__, samples.kinds)),
        times,
        array(code, samples.lengths).tobytes(),
        id_column,
    ]
    if masked:
        parts.append(_pack_bits(samples.mask))
    return b"".join(parts), wide | masked | text | micros


def _id_column(ids: array[int]) -> tuple[bytes | bytearray, int]:
    """Token ids in 16 bits where all fit, else in 32, and the flag that says so.

    Every other pair of bytes: number by number it would take longer than all other columns together.
    """
    raw = ids.tobytes()
    if raw[2::4] != (none := bytes(len(ids))) or raw[3::4] != none:
        return raw, _WIDE_IDS
    column = bytearray(2 * len(ids))
    column[::2], column[1::2] = raw[::4], raw[1::4]
    return column, 0


def _name_column(names: list[str]) -> tuple[list[str], bytes]:
    """The distinct names in order, and the index of each sample's in 8 bits, or 16 from 257 names on."""
    table = {name: i for i, name in enumerate(dict.fromkeys(names))}
    if len(table) == 1:
        return [names[0]], bytes(len(names))
    return list(table), array(_index_code(len(table)), map(table.__getitem__, names)).tobytes()


def _index_code(names: int) -> str:
    return "B" if names <= 256 else "H"


def _time_column(ts: array[float]) -> tuple[bytes, int]:
    """Event times as second differences of whole microseconds where that is exact, else as they are.

    A steady source has second differences of 0, which pack to nothing.
    """
    try:
        micros = [round(t * 1e6) for t in ts]
        if array("d", [m / 1e6 for m in micros]).tobytes() != ts.tobytes():
            return ts.tobytes(), 0
        steps = _differences(_differences(micros))
        return array("q", steps).tobytes(), _HAS_MICROS
    except (OverflowError, ValueError):
        return ts.tobytes(), 0


def _differences(numbers: list[int]) -> list[int]:
    return [*map(operator.sub, numbers, itertools.chain((0,), numbers))]


def _times_of(data: array[int]) -> array[float]:
    return array("d", [m / 1e6 for m in itertools.accumulate(itertools.accumulate(data))])


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


def _parse(raw: bytes, header: BlockHeader, hashes: bytes) -> Samples:
    reader, n = _Reader(raw), header.samples
    (size,) = struct.unpack("<I", reader.take(4))
    sources, subjects, code, texts = msgspec.msgpack.decode(
        reader.take(size), type=tuple[list[str], list[str], Literal["B", "H", "I"], list[str] | None]
    )
    source_column = reader.numbers(_index_code(len(sources)), n)
    subject_column = reader.numbers(_index_code(len(subjects)), n)
    kinds = reader.take(n)
    if header.flags & _HAS_MICROS:
        ts = _times_of(reader.numbers("q", n))
    else:
        ts = array("d")
        ts.frombytes(reader.take(8 * n))
    lengths = array("I", reader.numbers(code, n))
    ids, mask = _tokens(reader, header)
    return _samples(reader, header, (sources, source_column), (subjects, subject_column), kinds, ts, lengths,
                    ids, mask, hashes, texts)  # fmt: skip


def _parse_1(raw: bytes, header: BlockHeader) -> Samples:
    """The columns of format 1: wider, and the hashes among them."""
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
    ids, mask = _tokens(reader, header)
    hashes = reader.take(n * HASH_BYTES)
    return _samples(reader, header, (sources, source_column), (subjects, subject_column), kinds, ts, lengths,
                    ids, mask, hashes, texts)  # fmt: skip


def _tokens(reader: _Reader, header: BlockHeader) -> tuple[array[int], bytearray]:
    wide = header.flags & _WIDE_IDS
    ids = reader.numbers("I" if wide else "H", header.tokens)
    if header.flags & _HAS_MASK:
        mask = _unpack_bits(reader.take((header.tokens + 7) // 8), header.tokens)
    else:
        mask = bytearray(b"\x01") * header.tokens
    return (ids if wide else array("I", ids)), mask


def _samples(
    reader: _Reader,
    header: BlockHeader,
    sources: tuple[list[str], array[int]],
    subjects: tuple[list[str], array[int]],
    kinds: bytes,
    ts: array[float],
    lengths: array[int],
    ids: array[int],
    mask: bytearray,
    hashes: bytes,
    texts: list[str] | None,
) -> Samples:
    if reader.at != len(reader.raw) or sum(lengths) != header.tokens:
        raise CorruptBlockError("the block's columns disagree with its counts")
    return Samples(
        header.first_seq,
        [sources[0][i] for i in sources[1]],
        [KINDS[code] for code in kinds],
        [subjects[0][i] for i in subjects[1]],
        ts,
        lengths,
        ids,
        mask,
        hashes,
        texts,
    )
