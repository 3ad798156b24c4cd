"""The smallest ring that the configuration takes holds whatever one Batch can bring: it never fills."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from pipeline import config
from pipeline.batching import Assembler, limits_for
from pipeline.commit import CommitStep
from pipeline.config import ConfigError
from pipeline.events import MAX_EVENT_BYTES, Batch, Line, Origin
from pipeline.ingest import build_steps
from pipeline.sources.inbox import Chunk, Inbox, QueueLimits, Settled
from pipeline.sources.lines import READ_BYTES
from pipeline.tokenization import BatchTokenizer
from pipeline.triggers import ThresholdTrigger
from storage.ring import LARGEST_COMMIT, Ring

SMALLEST = 16 << 20
ORIGIN = Origin("noise", "files:noise:/a/folder/with/a/long/name/for/every/dead/letter/noise.jsonl", 1_000.0)
WORST_RATIO = 1.3  # bytes of a block per byte of lines; 1.06 was the most that any noise gave


class Nobody:
    """A connector that needs no acknowledgement."""

    name = "nobody"

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None: ...

    def acknowledge(self, settled: list[Settled]) -> None: ...

    def stop(self) -> None: ...


def noise(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.ascii_letters + string.digits + string.punctuation, k=count))


def event(rng: random.Random, length: int) -> bytes:
    """A text event of so many bytes in all that no dictionary knows."""
    empty = len(b'{"kind":"text","text":""}')
    text = noise(rng, length - empty).replace('"', "x").replace("\\", "y")
    return b'{"kind":"text","text":"%b"}' % text.encode()


def long_lines(rng: random.Random) -> Iterator[bytes]:
    """A chunk as a connector hands it over: 32 KiB and one line as long as an event may be."""
    yield from (event(rng, 1_024) for _ in range(READ_BYTES >> 10))
    yield event(rng, MAX_EVENT_BYTES)


def refused_lines(rng: random.Random) -> Iterator[bytes]:
    """16,384 lines of one byte, and one that is as long as is kept of it."""
    yield from [b"x"] * (READ_BYTES // 2)
    yield b"y" * (MAX_EVENT_BYTES + 1)


def many_values(rng: random.Random) -> Iterator[bytes]:
    """Readings whose numbers become longer than they were: 1e15 is written with 16 digits."""
    for _ in range(40):
        values = {f"{a}{b}": rng.randint(1, 999) * 1e13 for a in "abcdefgh" for b in "ijklmnop"}
        yield json.dumps({"kind": "reading", "values": values}, separators=(",", ":")).encode()


KINDS = [long_lines, refused_lines, many_values]


@pytest.mark.parametrize("kinds", [[long_lines], KINDS], ids=["long", "mixed"])
def test_the_smallest_ring_takes_whatever_one_batch_can_bring(
    tiny_model: Path, tmp_path: Path, kinds: list[Callable[[random.Random], Iterator[bytes]]]
) -> None:
    """Noise, floods of refused lines and numbers that grow, until it evicts, and on: never full."""
    rng = random.Random(7)
    tokenizer = BatchTokenizer(tiny_model)
    ring = Ring.create(
        tmp_path / "ring", shard="main", tokenizer_id=tokenizer.manifest.tokenizer_id, max_bytes=SMALLEST
    )
    settings = config.load(None, ["dedup.horizon_events=1000"], require_sources=False)
    inbox = Inbox({Nobody.name: QueueLimits(lines=1 << 30, data_bytes=1 << 30)})
    assembler = Assembler(inbox, limits_for(ring.map_bytes, 0.0), finite=True)
    steps = build_steps(settings, ring, tokenizer)
    commit = CommitStep(ring, ThresholdTrigger(300, 32_768), lambda: 0, lambda closed: None)

    def commit_what_waits() -> int:
        batch = assembler.poll()
        while batch is None or not batch.lines:
            batch = assembler.poll()
        size = sum(len(line.data) for line in batch.lines)
        for step in steps.values():
            batch = step(batch)
        commit(batch)
        return size

    with ring:
        largest = 0
        for n in range(56 if kinds is KINDS else 36):
            for kind in (kinds * 3)[: 3 if n % 2 else 1]:
                lines = [Line(data, -1, ORIGIN) for data in kind(rng)]
                inbox.put(Chunk(Nobody(), lines))
            while not assembler.empty or not inbox.drained:
                largest = max(largest, commit_what_waits())
        assert largest <= SMALLEST / 64 + READ_BYTES + MAX_EVENT_BYTES + 1
        assert largest * WORST_RATIO < LARGEST_COMMIT * SMALLEST / 4
        if long_lines in kinds:
            assert ring.state.tail_seq > 0, "it was full enough to evict"
            held = ring.usage()
            assert held.live_bytes <= 0.86 * SMALLEST


def test_noise_is_not_much_larger_in_the_ring_than_it_was(tiny_model: Path, tmp_path: Path) -> None:
    """On that the share of a commit rests."""
    rng = random.Random(8)
    tokenizer = BatchTokenizer(tiny_model)
    with Ring.create(
        tmp_path / "ring", shard="main", tokenizer_id=tokenizer.manifest.tokenizer_id, max_bytes=SMALLEST
    ) as ring:
        batch = Batch([Line(data, -1, ORIGIN) for data in long_lines(rng)])
        size = sum(len(line.data) for line in batch.lines)
        for step in build_steps(config.Config(), ring, tokenizer).values():
            batch = step(batch)
        assert 0.5 * size < sum(len(block) for _, block in ring._encode(batch.samples, arrival=0.0))
        assert sum(len(block) for _, block in ring._encode(batch.samples, arrival=0.0)) < WORST_RATIO * size


def load(folder: Path, more: str) -> config.Config:
    path = folder / "edgewater.toml"
    path.write_text(f'[[sources]]\nname = "a"\nkind = "stdin"\n{more}', encoding="utf-8")
    return config.load(path)


@pytest.mark.parametrize(
    ("template", "fits"),
    [
        ("x" * 4_000 + "{a}", True),
        ("x" * 4_096 + "{a}", False),
        ("{a}" * 45, True),
        ("{a}" * 60, False),
        ("".join(f"t{n}={{t{n}}} " for n in range(300)), True),
    ],
)
def test_a_template_that_swells_readings_is_refused(tmp_path: Path, template: str, fits: bool) -> None:
    """Text and repeats cost a reading nothing; a value that is written once was in it."""
    text = f"render.template = '{template}'\n"
    if fits:
        load(tmp_path, text)
        return
    with pytest.raises(ConfigError, match=r"render.template: adds up to \d+ bytes to each reading"):
        load(tmp_path, text)


def test_a_unit_is_as_long_as_in_an_event_at_most(tmp_path: Path) -> None:
    load(tmp_path, 'render.units = { a = "0123456789abcdef" }\n')
    with pytest.raises(ConfigError, match=r"render\.units"):
        load(tmp_path, 'render.units = { a = "0123456789abcdefg" }\n')
