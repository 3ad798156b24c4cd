"""The real steps, decode to commit: the same events give the same ring and windows, however they arrive."""

from __future__ import annotations

import functools
import itertools
import json
import random
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import config
from pipeline.commit import CommitStep
from pipeline.config import Config
from pipeline.decode import decode
from pipeline.events import Batch, Line, Origin
from pipeline.ingest import build_steps
from pipeline.tokenization import BatchTokenizer
from pipeline.triggers import ThresholdTrigger
from storage.ring import Ring
from storage.windows import ClosedWindow, RingState

TRIGGERS = {
    "samples": ThresholdTrigger(37, 10**9),
    "tokens": ThresholdTrigger(10**9, 400),
    "age": ThresholdTrigger(10**9, 10**9, 30.0),
    "all": ThresholdTrigger(60, 900, 20.0),
}
CONFIG = """
[dedup]
horizon_events = 60
[[redact]]
preset = "email"
[[sources]]
name = "quiet"
kind = "files"
path = "x"
deadband = 0.5
max_silence = "15s"
"""


@functools.cache
def tokenizer(model: Path) -> BatchTokenizer:
    return BatchTokenizer(model)


@functools.cache
def settings_of(text: str) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edgewater.toml"
        path.write_text(text)
        return config.load(path, require_sources=False)


def stream(seed: int, count: int) -> list[Line]:
    """Every kind of event, with and without id, time and position; repeats, redactions and bad lines."""
    rng = random.Random(seed)
    lines: list[Line] = []
    arrival = 1_000.0
    for n in range(count - 1):
        arrival += rng.choice([0, 0, 0.2, 1, 1, 5])
        origin = Origin("site", rng.choice(["a", "b"]), arrival - rng.choice([0, 0, 0.5]))
        offset = rng.choice([n, rng.randrange(8), -1])
        if lines and rng.random() < 0.1:
            again = rng.choice(lines)
            lines.append(
                Line(again.data, again.offset, msgspec.structs.replace(again.origin, arrival=arrival))
            )
            continue
        lines.append(Line(rng.choice((_text, _reading, _exchange, _other))(rng), offset, origin))
    # One that is always kept: a tick may close a window that otherwise no later sample would.
    return [*lines, Line(b'{"kind":"text","text":"the last"}', -1, Origin("site", "a", arrival))]


def _text(rng: random.Random) -> bytes:
    words = rng.choices(["pump", "leaks", "a@b.example", "é", "<|im_end|>", "hose"], k=rng.randint(1, 6))
    return _event(rng, kind="text", text=" ".join(words))


def _reading(rng: random.Random) -> bytes:
    values = {"p": round(rng.uniform(0, 2), 1), "q": 1}
    return _event(rng, kind="reading", source=rng.choice(["quiet", "pump-1"]), values=values)


def _exchange(rng: random.Random) -> bytes:
    turns = [
        {"role": role, "content": rng.choice(["E42?", "Coolant.", ""])} for role in ("user", "assistant")
    ]
    return _event(rng, kind="exchange", messages=turns[: rng.randint(1, 2)])


def _other(rng: random.Random) -> bytes:
    bad = [b"{", b"\xff", b'{"kind":"text","text":"a@b.example","x":1}', b'{"kind":"feedback","about":"x"}']
    return rng.choice(bad)


def _event(rng: random.Random, **fields: object) -> bytes:
    if rng.random() < 0.3:
        fields["id"] = str(rng.randrange(60))
    if rng.random() < 0.3:
        fields["ts"] = rng.randrange(40)
    return json.dumps(fields).encode()


class Outcome(NamedTuple):
    """What the ring holds in the end."""

    digest: bytes
    edges: list[tuple[int, int, int, int, str]]
    counters: dict[str, int]
    rest: object


class Ingest:
    """Steps and ring as the ingest process has them, without a process."""

    def __init__(self, folder: Path, model: Path, trigger: ThresholdTrigger) -> None:
        self.folder, self.model, self.trigger = folder, model, trigger
        self.config = settings_of(CONFIG)
        self.open()

    def open(self) -> None:
        manifest = tokenizer(self.model).manifest
        self.ring = Ring.open_or_create(
            self.folder / "ring", shard="main", tokenizer_id=manifest.tokenizer_id, max_bytes=1 << 20
        )
        self.steps = build_steps(self.config, self.ring, tokenizer(self.model))
        self.commit = CommitStep(self.ring, self.trigger, lambda: 0, lambda closed: None)

    def kill(self) -> None:
        """Lose the handle without a close, and all memory with it."""
        del self.ring, self.steps, self.commit
        self.open()

    def feed(self, batch: Batch) -> None:
        for step in self.steps.values():
            batch = step(batch)
        self.commit(batch)

    def outcome(self) -> Outcome:
        """What must not depend on how the events came."""
        state: RingState = self.ring.read_state()
        held = self.ring.read(state.tail_seq, state.next_seq - 1) if state.next_seq else None
        letters = [letter for _, letter in self.ring.dead_letters(10_000)]
        edges = [_edges(window) for window in self.ring.windows()]
        rest = (state.window, held and (held.sources, held.kinds, held.lengths, held.ids, held.mask), letters,
                self.ring.named("r"))  # fmt: skip
        return Outcome(state.digest, edges, state.counters, rest)


def _edges(window: ClosedWindow) -> tuple[int, int, int, int, str]:
    return window.window, window.first_seq, window.last_seq, window.tokens, window.reason


def run(
    model: Path,
    lines: list[Line],
    trigger: ThresholdTrigger,
    cuts: Iterable[int] = (),
    ticks: Collection[int] = (),
    kills: Collection[int] = (),
) -> Outcome:
    with tempfile.TemporaryDirectory() as home:
        ingest = Ingest(Path(home), model, trigger)
        edges = sorted({0, len(lines), *(cut for cut in cuts if cut <= len(lines))})
        for start, end in itertools.pairwise(edges):
            if start in kills:
                ingest.kill()
            if start in ticks:
                # As the assembler does: not later than any line that is still to come.
                ingest.feed(Batch([], now=min(line.origin.arrival for line in lines[start:]) - 0.01))
            ingest.feed(Batch(lines[start:end]))
        found = ingest.outcome()
        ingest.ring.close()
        return found


@pytest.mark.parametrize("trigger", list(TRIGGERS.values()), ids=list(TRIGGERS))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    cuts=st.lists(st.integers(0, 250), max_size=30),
    ticks=st.sets(st.integers(0, 250), max_size=10),
    kills=st.sets(st.integers(0, 250), max_size=5),
)
def test_batches_ticks_and_kills_change_neither_ring_nor_windows(
    tiny_model: Path, trigger: ThresholdTrigger, seed: int, cuts: list[int], ticks: set[int], kills: set[int]
) -> None:
    """All at once, or in random Batches with ticks between them and kills after random commits."""
    lines = stream(seed, 250)
    whole = run(tiny_model, lines, trigger)
    assert run(tiny_model, lines, trigger, [*cuts, *ticks, *kills], ticks, kills) == whole


def test_the_stream_of_this_test_reaches_every_outcome(tiny_model: Path) -> None:
    """A property of a stream without duplicates, refusals or windows would prove nothing."""
    for trigger in TRIGGERS.values():
        found = run(tiny_model, stream(1, 250), trigger)
        assert len(found.edges) >= 2
        counts = [found.counters[name] for name in ("samples", "duplicates", "suppressed", "dead_letters")]
        assert min(counts) >= 5
        assert found.counters["events"] == 250 == sum(counts)


def test_nothing_of_a_rule_is_stored(tiny_model: Path) -> None:
    lines = [
        line for line in stream(2, 250) if b"a@b" in line.data or decode(Batch([line])).dead
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as home:
        ingest = Ingest(Path(home), tiny_model, TRIGGERS["samples"])
        ingest.feed(Batch(lines))
        letters = ingest.ring.dead_letters(1_000)
        assert any(b"<email>" in letter.data for _, letter in letters)
        ingest.ring.close()
        assert b"a@b.example" not in (Path(home) / "ring" / "data.mdb").read_bytes()
