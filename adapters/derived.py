"""Files that only save time: activations and scores that follow from their key. Delete any of them any time.

A file is the SHA-256 of its content and the content; one that does not match is computed again. A hit and a
miss give the same bits, since both come from the same function over the same batches.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
from safetensors.torch import load, save

from adapters.batches import Row
from adapters.frozen import Activations
from adapters.scoring import Score

__all__ = ["DerivedCache"]

_HASH_BYTES = 32
MAX_BYTES = 64 << 20


class DerivedCache:
    """A bounded folder of derived values.

    Args:
        folder: Where; made if missing.
        model_key: Names everything but the rows and the adapter that decides a value's bits.
    """

    def __init__(self, folder: Path, model_key: str) -> None:
        self.folder, self.model_key = folder, model_key
        folder.mkdir(parents=True, exist_ok=True)

    def activations(
        self, rows: Sequence[Row], compute: Callable[[Sequence[Row]], Activations]
    ) -> Activations:
        """Lower activations of rows, from the cache if they are there."""
        path = self._path("activations", rows, "")
        if (data := _read(path)) is not None:
            tensors = load(data)
            return Activations(rows, [tensors[str(i)] for i in range(len(rows))])
        fresh = compute(rows)
        self._write(path, save({str(i): fresh.row(i) for i in range(len(rows))}))
        return fresh

    def scores(self, rows: Sequence[Row], adapter: str, compute: Callable[[], list[Score]]) -> list[Score]:
        """Scores of rows under an adapter (its digest; "" is the base), from the cache if they are there."""
        path = self._path("scores", rows, adapter)
        if (data := _read(path)) is not None:
            return msgspec.json.decode(data, type=list[Score])
        fresh = compute()
        self._write(path, msgspec.json.encode(fresh))
        return fresh

    def _path(self, what: str, rows: Iterable[Row], adapter: str) -> Path:
        digest = hashlib.blake2b(f"{what}\0{self.model_key}\0{adapter}\0".encode(), digest_size=16)
        for row in rows:
            digest.update(array("I", [len(row)]).tobytes() + row.ids.tobytes() + row.weights)
        return self.folder / f"{what}-{digest.hexdigest()}"

    def _write(self, path: Path, data: bytes) -> None:
        # Not synced: after a power cut the hash tells a torn file, and it is computed again.
        tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        tmp.write_bytes(hashlib.sha256(data).digest() + data)
        tmp.rename(path)
        self._evict()

    def _evict(self) -> None:
        """Delete the longest unused files above the size limit."""
        files = [(path.stat(), path) for path in self.folder.iterdir() if path.is_file()]
        size = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda item: item[0].st_mtime_ns):
            if size <= MAX_BYTES:
                return
            path.unlink(missing_ok=True)
            size -= stat.st_size


def _read(path: Path) -> bytes | None:
    try:
        raw = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    data = raw[_HASH_BYTES:]
    return data if hashlib.sha256(data).digest() == raw[:_HASH_BYTES] else None
