"""The stages between a line and its durable commit, each timed beside the least that could do its work."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import lmdb
import msgspec
import zstandard

from pipeline.commit import CommitStep
from pipeline.config import load
from pipeline.events import Batch, Event, Line, Origin, Reading
from pipeline.ingest import build_steps
from pipeline.tokenization import BatchTokenizer, TokenizeStep
from pipeline.triggers import ThresholdTrigger
from storage.block import LEVEL, column_bytes, encode_block
from storage.ring import Ring
from storage.samples import Samples

__all__ = ["Stage", "time_stages"]

A_COMMIT = 1_000
RING_BYTES = 256 << 20
LIMITS = {
    "decode": "msgspec into the event's struct",
    "dedup": "blake2b of the line",
    "render": "one % for each reading, its tags known",
    "tokenize": "fastokens",
    "columns": "",
    "encode block": f"zstd level {LEVEL} of the columns",
    "ring digest": "blake2b over all ids and masks at once",
    "commit": "LMDB append of the block, synced",
}
T = TypeVar("T")


class Stage(msgspec.Struct, frozen=True):
    """What a stage, and its limit, took of an event, seconds; a limit of 0 is none."""

    name: str
    limit: str
    own_s: float
    limit_s: float


def time_stages(folder: Path, model: Path, lines: Sequence[bytes]) -> list[Stage]:
    """Run a stream through every step by hand, in one thread, and through each step's limit."""
    run = _Run(folder, model)
    try:
        for start in range(0, len(lines), A_COMMIT):
            run.batch(lines[start : start + A_COMMIT])
    finally:
        run.close()
    own, least, n = run.own, run.least, len(lines)
    # A step is timed as a whole, its parts once more alone: what is left of it is the rest.
    own["columns"] = max(0, own.pop("tokenize step") - own["render"] - own["tokenize"])
    own["commit"] = own.pop("commit step") - own["encode block"] - own["ring digest"]
    return [Stage(name, limit, own[name] / n, least[name] / n) for name, limit in LIMITS.items()]


class _Run:
    """Adds up what each stage takes over the batches of a stream."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.own: Counter[str] = Counter()
        self.least: Counter[str] = Counter()
        self._tokenizer = BatchTokenizer(model)
        self._tokenizer_id = self._tokenizer.manifest.tokenizer_id
        config = load(None, require_sources=False)
        self._ring = Ring.open_or_create(
            folder / "ring", shard="main", tokenizer_id=self._tokenizer_id, max_bytes=RING_BYTES
        )
        self._steps = build_steps(config, self._ring, self._tokenizer)
        trigger = ThresholdTrigger(config.trigger.min_samples, config.trigger.min_tokens)
        self._commit = CommitStep(self._ring, trigger, lambda: 0, lambda closed: None)
        self._bare = lmdb.open(str(folder / "bare"), map_size=RING_BYTES, lib_version=0)
        self._packer = zstandard.ZstdCompressor(level=LEVEL)
        self._decode = msgspec.json.Decoder(Event).decode

    def close(self) -> None:
        """Close both databases."""
        self._ring.close()
        self._bare.close()

    def batch(self, lines: Sequence[bytes]) -> None:
        """One Batch through all steps."""
        own, least, decode = self.own, self.least, self._decode
        origin = Origin("bench", "bench:lines", 1.7e9)
        batch = Batch([Line(line, -1, origin) for line in lines])
        batch = _timed(own, "decode", lambda: self._steps["redact"](self._steps["decode"](batch)))
        _timed(least, "decode", lambda: [decode(line) for line in lines])
        batch = _timed(own, "dedup", lambda: self._steps["dedup"](batch))
        _timed(least, "dedup", lambda: [hashlib.blake2b(line, digest_size=16).digest() for line in lines])
        batch = self._tokenize(batch)
        samples = batch.samples
        samples.first_seq = self._ring.state.next_seq
        block = self._store(samples)
        _timed(own, "commit step", lambda: self._commit(batch))
        _timed(least, "commit", lambda: self._append(samples.first_seq, block))

    def _tokenize(self, batch: Batch) -> Batch:
        step = cast("TokenizeStep", self._steps["tokenize"])
        pairs: list[tuple[str, Any]] = [
            (source, event) for (_, event), source in zip(batch.events, batch.sources, strict=True)
        ]
        texts = _timed(self.own, "render", lambda: [step._render(*pair) for pair in pairs])
        readings = [event.values for _, event in pairs if isinstance(event, Reading)]
        forms = {tags: " ".join(f"{tag}=%.3g" for tag in tags) for tags in {(*r,) for r in readings}}
        ready = [(forms[*values,], (*values.values(),)) for values in readings]
        _timed(self.least, "render", lambda: [form % numbers for form, numbers in ready])
        _timed(self.own, "tokenize", lambda: self._tokenizer.encode_flat(texts))
        encode = self._tokenizer._tokenizer.encode_batch_flat
        _timed(self.least, "tokenize", lambda: encode(texts, False, True))
        return _timed(self.own, "tokenize step", lambda: step(batch))

    def _store(self, samples: Samples) -> bytes:
        block = _timed(self.own, "encode block", lambda: encode_block(samples, self._tokenizer_id, 1.7e9))
        columns = column_bytes(samples)
        _timed(self.least, "encode block", lambda: self._packer.compress(columns))
        _timed(self.own, "ring digest", lambda: samples.extend_digest(bytes(32)))
        flat = samples.ids.tobytes() + bytes(samples.mask)
        _timed(self.least, "ring digest", lambda: hashlib.blake2b(flat).digest())
        return block

    def _append(self, seq: int, block: bytes) -> None:
        with self._bare.begin(write=True) as txn:
            txn.put(seq.to_bytes(8, "big"), block, append=True)


def _timed(sums: Counter[str], name: str, work: Callable[[], T]) -> T:
    began = time.perf_counter()
    result = work()
    sums[name] += time.perf_counter() - began  # type: ignore[assignment]  # seconds, not counts
    return result
