"""Near duplicates: found exactly, within a horizon, and the same after a restart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.commit import CommitStep
from pipeline.config import load
from pipeline.events import Batch, Line, Origin
from pipeline.ingest import build_steps
from pipeline.near_duplicates import MAX_SHINGLES, NearDuplicates, shingles
from pipeline.tokenization import BatchTokenizer
from pipeline.triggers import ThresholdTrigger
from storage.ring import Ring

WORDS = ("pump", "leaks", "replace", "bucket", "teeth", "hose", "r/h", "12", "13")
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join)


def similarity(a: str, b: str) -> float:
    """The Jaccard similarity itself."""
    x, y = set(shingles(a)), set(shingles(b))
    return len(x & y) / len(x | y)


@settings(max_examples=300)
@given(st.lists(TEXTS, max_size=25), st.sampled_from([0.3, 0.5, 0.8, 0.9, 1.0]), st.integers(1, 10))
def test_a_near_duplicate_is_found_just_where_the_similarity_says(
    texts: list[str], threshold: float, horizon: int
) -> None:
    """Against a comparison with every text of the horizon."""
    memory = NearDuplicates(threshold, horizon)
    held: list[tuple[int, str]] = []
    for seq, text in enumerate(texts):
        near = [other for other, known in held[-horizon:] if similarity(text, known) >= threshold]
        assert memory.find(text) == (near[-1] if near else None)
        memory.add(seq, text)
        held.append((seq, text))
        assert len(memory) == min(len(held), horizon)


def test_a_letter_case_and_spaces_hardly_matter() -> None:
    memory = NearDuplicates(0.8, 10)
    memory.add(7, "REPLACE R/H SWING PUMP CHIP SENSOR")
    assert memory.find("replace  r/h swing pump chip sensor ") == 7
    assert memory.find("REPLACE R/H SWING PUMP CHIP SENSER") == 7
    assert memory.find("REPLACE L/H TRAVEL MOTOR HOSE") is None


@pytest.mark.parametrize("text", ["", "a", "ab", "\ud800", "é" * 500, "x" * 100_000])
def test_any_text_is_one(text: str) -> None:
    memory = NearDuplicates(0.9, 2)
    assert memory.find(text) is None
    memory.add(0, text)
    assert memory.find(text) == 0
    assert len(shingles(text)) <= MAX_SHINGLES


def test_forgotten_texts_leave_nothing_behind() -> None:
    memory = NearDuplicates(0.5, 100)
    for seq in range(50):
        memory.add(seq, f"order {seq} of {seq % 7}")
    memory.forget_before(50)
    assert (len(memory), memory._index) == (0, {})


def test_of_real_work_orders_none_is_dropped_that_is_not_similar() -> None:
    """And none kept that is: the texts are short enough for the comparison to be exact."""
    packed = files("pipeline.demo_data").joinpath("work-orders.jsonl.zst").read_bytes()
    lines = zstandard.ZstdDecompressor().stream_reader(packed).read().splitlines()
    texts = [json.loads(line)["text"] for line in lines[:1_200]]
    memory = NearDuplicates(0.8, 300)
    held: list[set[str]] = []
    dropped = 0
    for seq, text in enumerate(texts):
        own = set(_runs(text))
        near = any(len(own & other) >= 0.8 * len(own | other) for other in held[-300:])
        assert (memory.find(text) is not None) == near
        if near:
            dropped += 1
            continue
        memory.add(seq, text)
        held.append(own)
    assert dropped > 20


def _runs(text: str) -> Iterator[str]:
    text = " ".join(text.lower().split())
    return (text[i : i + 3] for i in range(max(1, len(text) - 2)))


class Ingest:
    """The real steps over a ring, which can be opened again."""

    def __init__(self, folder: Path, model: Path, horizon: int = 200_000) -> None:
        own = (
            f"dedup.horizon_events={horizon}",
            'sources=[{name="cmms",kind="stdin",near_duplicates=0.8,near_horizon=5}]',
        )
        self._config = load(None, own, require_sources=False)
        self._folder, self._tokenizer = folder, BatchTokenizer(model)
        self.open()

    def open(self) -> None:
        """As after a restart."""
        self.ring = Ring.open_or_create(
            self._folder, shard="main", tokenizer_id=self._tokenizer.manifest.tokenizer_id, max_bytes=16 << 20
        )
        self._steps = build_steps(self._config, self.ring, self._tokenizer)
        self._commit = CommitStep(self.ring, ThresholdTrigger(300, 32_768), lambda: 0, lambda closed: None)

    def feed(self, texts: Sequence[tuple[str, str]]) -> list[int]:
        """(source, text) of each. Returns: which were stored."""
        lines = [
            Line(json.dumps({"kind": "text", "source": s, "text": t}).encode(), -1, Origin("cmms", "in", 5.0))
            for s, t in texts
        ]
        batch = Batch(lines)
        for step in self._steps.values():
            batch = step(batch)
        stored = [number for number, _ in batch.events]
        self._commit(batch)
        return stored


@pytest.fixture
def ingest(tmp_path: Path, tiny_model: Path) -> Iterator[Ingest]:
    made = Ingest(tmp_path / "ring", tiny_model)
    yield made
    made.ring.close()


def test_near_duplicates_are_counted_as_what_they_are(ingest: Ingest) -> None:
    """Only of a source that says so; the same text again is a duplicate."""
    first, near = "replace the bucket teeth of unit", "replace the bucket teeth of units"
    assert ingest.feed([("cmms", first), ("cmms", near), ("cmms", first), ("log", first), ("log", near)]) == [
        0,
        3,
        4,
    ]
    counters = ingest.ring.state.counters
    assert (counters["near_duplicates"], counters["duplicates"], counters["samples"]) == (1, 1, 3)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_restarts_and_batches_do_not_matter(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: st.DataObject
) -> None:
    texts = data.draw(st.lists(st.tuples(st.sampled_from(["cmms", "log"]), TEXTS), max_size=20))
    horizon = data.draw(st.sampled_from([3, 200_000]))
    whole = Ingest(tmp_path_factory.mktemp("whole") / "ring", tiny_model, horizon)
    cut = Ingest(tmp_path_factory.mktemp("cut") / "ring", tiny_model, horizon)
    expected = whole.feed(texts)
    found, at = [], 0
    while at < len(texts):
        size = data.draw(st.integers(1, len(texts) - at))
        found += [at + number for number in cut.feed(texts[at : at + size])]
        at += size
        cut.ring.close()
        cut.open()
    assert found == expected
    for made in (whole, cut):
        made.ring.close()
