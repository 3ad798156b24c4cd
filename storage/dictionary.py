"""The zstd dictionary of one install, trained on its own early blocks.

Blocks of a few samples are too short to find repetitions in; a dictionary of what this site's samples look
like stands in for them, until they are merged into long ones, which do without it. It lies in the ring (a `Z`
row, in every export) and a second time beside it, since without it the short blocks cannot be read:

    row damaged or gone     the copy beside it is put back into the ring
    copy damaged or gone    written again from the row
    both gone               the newest, short blocks count as damaged (their hashes lie outside the
                            dictionary's reach, so dedup still knows them); a new one is trained
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import zstandard

from storage.durable import write_file_durably

__all__ = [
    "MAX_TRAINING_BYTES",
    "MIN_TRAINING_BYTES",
    "MIN_TRAINING_SAMPLES",
    "TRAINING_RUN",
    "Dictionary",
    "read_dictionary_file",
    "train",
    "write_dictionary_file",
]

DICTIONARY_BYTES = 16_384  # 4 KiB is as good for one kind of source, 64 KiB gains 4 % on work orders only
MIN_TRAINING_SAMPLES = 1_000
MIN_TRAINING_BYTES = 64 << 10
MAX_TRAINING_BYTES = 1 << 20
TRAINING_RUN = 20  # samples: the blocks that gain most are those of a few seconds
_MIN_GAIN = 0.03  # below this share saved, a dictionary is one more thing to lose


class Dictionary:
    """A trained dictionary, digested once for each use.

    Attributes:
        data: Its bytes, as trained.
        id: The first 4 bytes of its hash as a number, never 0: a block names it.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.id = int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "big") or 1

    @functools.cached_property
    def digested(self) -> zstandard.ZstdCompressionDict:
        """The form that zstandard takes."""
        return zstandard.ZstdCompressionDict(self.data)

    @functools.cached_property
    def decompressor(self) -> zstandard.ZstdDecompressor:
        """Unpacks frames that were packed with it."""
        return zstandard.ZstdDecompressor(dict_data=self.digested)

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a ring has one dictionary, for life
    def compressor(self, level: int) -> zstandard.ZstdCompressor:
        """Packs with it; the frame does not name it, the block's header does."""
        self.digested.precompute_compress(level=level)
        return zstandard.ZstdCompressor(
            level=level, dict_data=self.digested, write_checksum=False, write_dict_id=False
        )


def train(columns: Sequence[bytes], level: int) -> Dictionary | None:
    """Train a dictionary on the unpacked columns of small blocks.

    Args:
        columns: What `storage.block.column_bytes` gives for `TRAINING_RUN` samples each; 64 KiB to 1 MiB.
        level: zstd level that the blocks are packed with.
    Returns: The dictionary, or None where there is too little to learn from, or nothing gained by it.
    """
    learned, held_out = columns[: len(columns) * 3 // 4], columns[len(columns) * 3 // 4 :]
    try:
        trained = zstandard.train_dictionary(DICTIONARY_BYTES, [*learned], level=level)
    except zstandard.ZstdError:  # too few pieces, or all alike
        return None
    made = Dictionary(trained.as_bytes())
    plain = zstandard.ZstdCompressor(level=level, write_checksum=False)
    without = sum(len(plain.compress(part)) for part in held_out)
    saved = without - sum(len(made.compressor(level).compress(part)) for part in held_out)
    return made if saved > _MIN_GAIN * without else None


def dictionary_file(folder: Path, number: int) -> Path:
    """Where the copy of a dictionary lies."""
    return folder / f"dictionary-{number:08x}"


def write_dictionary_file(folder: Path, dictionary: Dictionary) -> None:
    """Write the copy beside the ring, durably."""
    write_file_durably(dictionary_file(folder, dictionary.id), dictionary.data)


def read_dictionary_file(folder: Path, number: int) -> Dictionary | None:
    """Read the copy beside the ring; None if it is not there or not what its name says."""
    try:
        found = Dictionary(dictionary_file(folder, number).read_bytes())
    except OSError:
        return None
    return found if found.id == number else None
