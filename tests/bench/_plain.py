"""The plain way to ingest: stdlib json, HF tokenizers in batches, one LMDB value a record, a hash index."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lmdb

__all__ = ["PUBLISHED", "PlainIngest"]

# As SmolLM2 is published; `model prepare` writes another form of it that gives the same ids faster.
PUBLISHED = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


class PlainIngest:
    """Lines to token ids on stable storage, each line once; preallocated, full syncs, nothing ever deleted.

    Args:
        folder: For the database.
        tokenizer: The model's tokenizer.json.
        pre_tokenizer: Put in the place of the file's own, None to leave that.
        map_bytes: Size of the database.
    """

    def __init__(
        self, folder: Path, tokenizer: Path, pre_tokenizer: dict[str, Any] | None, map_bytes: int = 1 << 30
    ) -> None:
        from tokenizers import Tokenizer

        parts = json.loads(tokenizer.read_text(encoding="utf-8"))
        if pre_tokenizer is not None:
            parts["pre_tokenizer"] = pre_tokenizer
        self._tokenizer = Tokenizer.from_str(json.dumps(parts))
        self._env = lmdb.open(str(folder), map_size=map_bytes, max_dbs=2, lib_version=0)
        with (folder / "data.mdb").open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, map_bytes)
            os.fsync(file.fileno())
        self._records = self._env.open_db(b"records", integerkey=True)
        self._hashes = self._env.open_db(b"hashes")
        self.stored = 0

    def commit(self, lines: Sequence[bytes]) -> None:
        """Store those that are new, in one transaction."""
        events = [json.loads(line) for line in lines]
        digests = [hashlib.blake2b(line, digest_size=16).digest() for line in lines]
        with self._env.begin(write=True) as txn:
            new: list[dict[str, Any]] = []
            for digest, event in zip(digests, events, strict=True):
                number = (self.stored + len(new)).to_bytes(8, "little")
                if txn.put(digest, number, db=self._hashes, overwrite=False):
                    new.append(event)
            texts = [text_of(event) for event in new]
            encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for event, encoding in zip(new, encoded, strict=True):
                record = {"source": event["source"], "ts": event["ts"], "ids": encoding.ids}
                number = self.stored.to_bytes(8, "little")
                txn.put(number, json.dumps(record).encode(), db=self._records, append=True)
                self.stored += 1

    def close(self) -> None:
        """Close the database."""
        self._env.close()


def text_of(event: dict[str, Any]) -> str:
    """A reading as text, values with 3 significant digits."""
    return " ".join([event["source"], *(f"{tag}={value:.3g}" for tag, value in event["values"].items())])
