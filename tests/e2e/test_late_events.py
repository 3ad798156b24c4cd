"""Events that come late and out of order: each keeps its own time, none is lost, none is trained on twice."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from storage.ring import Ring
from tests.e2e.stream import WINDOW, arguments, edgewater

pytestmark = pytest.mark.slow
T0 = 1_763_900_000.0
COUNT = 650
LATE_S = 3_600.0


def event(number: int) -> dict[str, object]:
    """One event every 10 s; each has an id, so that coming again is no new event."""
    return {"kind": "text", "id": f"e{number}", "ts": T0 + 10.0 * number, "text": f"reset of line {number}"}


def test_late_events_keep_their_time_and_belong_to_one_window(tmp_path: Path, tiny_model: Path) -> None:
    """FAULTS.md row 18: up to an hour late, shuffled, a tenth of them delivered twice."""
    rng = random.Random(18)
    order = sorted(range(COUNT), key=lambda n: 10.0 * n + rng.uniform(0, LATE_S))
    again = [number for number in order if rng.random() < 0.1]
    stream = tmp_path / "late.jsonl"
    stream.write_text("".join(json.dumps(event(number)) + "\n" for number in [*order, *again]))
    data = tmp_path / "data"
    settings = [*arguments(tiny_model, f"data_dir={data}"), "--set", 'health.listen=""']
    edgewater("ingest", "--finite", "--replay", str(stream), *settings)
    with Ring.open_reader(data / "ring" / "main") as ring:
        state = ring.read_state()
        samples = ring.read(0, state.next_seq - 1)
        windows = ring.windows()
    assert list(samples.ts) == [T0 + 10.0 * number for number in order], "stored as they came, each once"
    assert state.counters["duplicates"] == len(again)
    assert state.stream_time == T0 + 10.0 * (COUNT - 1), "a late event moves stream time neither way"
    edges = [(window.first_seq, window.last_seq) for window in windows]
    assert edges == [(n * WINDOW, n * WINDOW + WINDOW - 1) for n in range(COUNT // WINDOW)]
    assert state.window.first_seq == COUNT // WINDOW * WINDOW
