"""Tap: what it shows of a Batch at each step, what it never shows, and what it costs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import config, tap
from pipeline.commit import CommitStep
from pipeline.control import ControlError, Request
from pipeline.events import Batch, Line, Origin
from pipeline.ingest import build_steps
from pipeline.rules import SourceRules
from pipeline.tap import MAX_RATE, STEPS, Tap
from pipeline.tap_text import MAX_TEXT, Redactor, printable
from pipeline.tap_view import format_item
from pipeline.tokenization import BatchTokenizer
from pipeline.triggers import ThresholdTrigger
from storage.ring import Ring

MAIL = "alice@example.com"
SETTINGS = '[[redact]]\npreset = "email"\n[[redact]]\npattern = "M\u00fcller"\nsources = ["hmi"]\n'


class Bench:
    """The steps of ingest over a ring, under a tap."""

    def __init__(self, folder: Path, model: Path, settings: str = SETTINGS) -> None:
        file = folder / "edgewater.toml"
        file.write_text(settings)
        loaded = config.load(file, require_sources=False)
        tokenizer = BatchTokenizer(model)
        self.ring = Ring.open_or_create(
            folder / "main", shard="main", tokenizer_id=tokenizer.manifest.tokenizer_id, max_bytes=4 << 20
        )
        self.tap = Tap(Redactor(SourceRules(loaded)), tokenizer.decode)
        self.plain = build_steps(loaded, self.ring, tokenizer)
        self.steps = self.tap.watching(self.plain)
        self.commit = CommitStep(self.ring, ThresholdTrigger(3, 10**9, 0.0), lambda: 0, lambda closed: None)
        self.talks: list[Any] = []

    def look(self, **wanted: Any) -> Talk:
        talk = Talk(self.tap, Request(1, "tap", **wanted))
        self.talks.append(talk)
        return talk

    def feed(self, *events: dict[str, Any] | bytes, source: str = "site") -> None:
        origin = Origin(source, f"files:{source}:x", 1_000.0)
        data = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in events]
        batch = Batch([Line(one, n, origin) for n, one in enumerate(data)])
        for step in self.steps.values():
            batch = step(batch)
        self.tap.committed(batch, self.commit(batch))

    def close(self) -> None:
        for talk in self.talks:
            talk.close()
        self.ring.close()


class Talk:
    """What one client gets, in its own thread as the control socket gives it."""

    def __init__(self, watched: Tap, request: Request) -> None:
        self.items: list[dict[str, Any]] = []
        self.missed = 0
        self.ended = threading.Event()
        self._closing = False
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(watched, request))
        self._thread.start()
        assert self._ready.wait(10)

    def _read(self, watched: Tap, request: Request) -> None:
        answers = watched.follow(request)
        for item in answers:
            self._ready.set()
            if item is not None and "event" in item:
                self.items.append(dict(item))
            elif item is not None:
                self.missed += item.get("not_shown", 0)
            if self._closing:
                break
        answers.close()
        self.ended.set()

    def until(self, count: int) -> list[dict[str, Any]]:
        deadline = time.monotonic() + 20
        while len(self.items) < count:
            assert time.monotonic() < deadline, self.items
            time.sleep(0.01)
        return self.items

    def close(self) -> None:
        self._closing = True
        self._thread.join(20)


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, tiny_model)
    yield made
    made.close()


def reading(pressure: float, **more: Any) -> dict[str, Any]:
    return {"kind": "reading", "ts": 1_763_912_345.0 + pressure, "values": {"pressure": pressure}, **more}


def told(item: dict[str, Any]) -> tuple[Any, ...]:
    return item["event"], item["step"], item["source"], item.get("kind", ""), item.get("text", "")


def test_one_event_is_followed_through_every_step(bench: Bench) -> None:
    talk = bench.look(max_events=1)
    bench.feed(reading(3.42, source="pump-1"))
    assert talk.ended.wait(20)
    line = '{"kind":"reading","ts":1763912348.42,"values":{"pressure":3.42},"source":"pump-1"}'
    assert [told(item) for item in talk.items] == [
        (1, "source", "site", "", line),
        (1, "decode", "pump-1", "reading", '{"pressure":3.42}'),
        (1, "redact", "pump-1", "reading", '{"pressure":3.42}'),
        (1, "dedup", "pump-1", "reading", "new"),
        (1, "tokenize", "pump-1", "reading", '"pump-1 pressure=3.42"'),
        (1, "commit", "pump-1", "reading", ""),
    ]
    assert [item["step"] for item in talk.items] == list(STEPS)
    tokenized, committed = talk.items[-2:]
    assert tokenized["tokens"] == len(bench.ring.read(0, 0).ids)
    assert (committed["seq"], committed["window"], committed["over"]) == (0, 1, True)


def test_numbers_seqs_and_windows_go_on_across_batches(bench: Bench) -> None:
    """A window of three samples closes inside the second Batch."""
    talk = bench.look(rate=200.0)
    bench.feed(reading(1.0), reading(2.0))
    bench.feed(reading(3.0), reading(4.0))
    stored = [item for item in talk.until(24) if item["step"] == "commit"]
    assert [(item["event"], item["seq"], item["window"]) for item in stored] == [
        (1, 0, 1), (2, 1, 1), (3, 2, 1), (4, 3, 2),
    ]  # fmt: skip


def test_refused_and_repeated_events_end_where_they_end(bench: Bench) -> None:
    talk = bench.look(max_events=3)
    bench.feed(reading(1.0), reading(1.0), b"{not json")
    assert talk.ended.wait(20)
    last = {item["event"]: item for item in talk.items}
    assert [(last[n]["step"], last[n].get("text", "")) for n in (1, 2)] == [
        ("commit", ""), ("dedup", "duplicate"),
    ]  # fmt: skip
    assert last[3]["step"] == "decode"
    assert last[3]["text"].startswith("refused: not JSON")
    assert all(item["over"] for item in last.values())


def test_nothing_unredacted_is_shown_at_any_step(bench: Bench) -> None:
    """In texts, tags, names, keys, escapes, numbers' neighbours, and in what is no event at all."""
    talk = bench.look(rate=200.0)
    bench.feed(
        {"kind": "text", "text": f"mail {MAIL}", "id": MAIL},
        {"kind": "text", "text": "from M\u00fcller"},  # a rule for another source: what is shown gets it too
        {"kind": "reading", "values": {MAIL: 1.0}, "units": {MAIL: MAIL[:16]}},
        {"kind": "exchange", "messages": [{"role": "user", "content": MAIL}]},
        {"kind": "feedback", "about": MAIL, "rating": 1},
        {"kind": "text", "text": "x", MAIL: [MAIL, {MAIL: MAIL}]},
        MAIL.encode(),
        b'{"kind":"text","text":"\\u0061lice\\u0040example.com, M\\u00fcller"',
        b'{"kind":"text","text":"\\u0061lice\\u0040example.com, M\\u00fcller"}',
        f'{{"kind":"reading","values":{{"p":"{MAIL}"}}}}'.encode(),
    )
    talk.until(30)
    time.sleep(0.1)
    shown = json.dumps(talk.items, ensure_ascii=False)
    assert "example.com" not in shown
    assert shown.count("<email>") >= 10
    texts = [item["text"] for item in talk.items if item["step"] in ("source", "decode")]
    assert not [text for text in texts if "ller" in text]


def test_what_is_too_long_to_redact_in_passing_is_told_by_its_size(bench: Bench) -> None:
    talk = bench.look(max_events=1)
    bench.feed({"kind": "text", "text": "a " * 10_000})
    assert talk.ended.wait(20)
    assert [item["text"] for item in talk.items[:3]] == ["(20,028 bytes: too long to show)"] * 3
    assert talk.items[4]["text"] == "(too long to show)"


def test_a_text_is_cut_after_it_was_redacted(tmp_path: Path) -> None:
    file = tmp_path / "edgewater.toml"
    file.write_text(SETTINGS)
    redactor = Redactor(SourceRules(config.load(file, require_sources=False)))
    shown = redactor.text("x" * (MAX_TEXT - 5) + f" {MAIL}" + " y" * 100)
    assert "alice" not in shown
    assert shown.endswith("characters)")


def test_one_source_can_be_followed_alone(bench: Bench) -> None:
    """By the name in the event, or that of the configured source where it has none."""
    talk = bench.look(source="pump-1", max_events=2)
    bench.feed(reading(1.0), reading(2.0, source="pump-1"), b"broken")
    bench.feed(b"broken", source="pump-1")
    assert talk.ended.wait(20)
    assert {item["event"] for item in talk.items} == {2, 4}


def test_at_most_the_rate_is_followed_and_the_rest_is_counted(bench: Bench) -> None:
    talk = bench.look(rate=5.0)
    for n in range(10):
        bench.feed(*(reading(100 * n + k) for k in range(100)))
    talk.until(30)
    time.sleep(2.0)
    followed = sorted({item["event"] for item in talk.items})
    assert 5 <= len(followed) <= 5 + 5 * 10
    assert talk.missed + len(followed) == 1_000
    assert followed[:5] == [1, 21, 41, 61, 81]  # spread over its Batch


def test_a_client_that_takes_nothing_holds_no_more_than_its_queue(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tap, "QUEUE_ITEMS", 20)
    answers = bench.tap.follow(Request(1, "tap", rate=200.0))
    next(answers)
    next(answers)  # it looks once, then never again
    for n in range(20):
        bench.feed(*(reading(100 * n + k) for k in range(50)))
    (client,) = bench.tap._clients
    assert len(client._items) == 20
    assert bench.ring.state.next_seq == 1_000
    answers.close()
    assert bench.tap._clients == ()


def test_a_step_is_the_plain_one_but_for_one_look_while_nobody_taps(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is counted, kept or built."""

    def never(*_: object) -> None:
        raise AssertionError("nobody taps")

    monkeypatch.setattr(Tap, "_safely", never)
    bench.feed(reading(1.0))
    assert bench.tap._numbered == 0
    assert bench.tap._under_way == {}
    talk = bench.look()
    talk.close()
    bench.feed(reading(2.0))


def test_a_fault_of_the_tap_ends_the_tap_and_not_the_flow(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = bench.look()
    monkeypatch.setattr(bench.tap, "_decode", None)
    bench.feed(reading(1.0))
    assert talk.ended.wait(20)
    bench.feed(reading(2.0))
    assert bench.ring.state.next_seq == 2


def test_batches_that_never_came_to_a_commit_are_let_go(bench: Bench) -> None:
    talk = bench.look(rate=200.0)
    for n in range(tap.MAX_UNDER_WAY + 5):
        batch = Batch([Line(json.dumps(reading(float(n))).encode(), 0, Origin("site", "x", 1.0))])
        bench.steps["decode"](batch)
    assert len(bench.tap._under_way) == tap.MAX_UNDER_WAY
    talk.close()


@pytest.mark.parametrize(
    "wrong", [{"rate": -1.0}, {"rate": MAX_RATE + 1}, {"rate": float("nan")}, {"max_events": -1}]
)
def test_a_request_that_makes_no_sense_is_refused(bench: Bench, wrong: dict[str, Any]) -> None:
    with pytest.raises(ControlError):
        next(bench.tap.follow(Request(1, "tap", **wrong)))


def test_no_byte_of_an_event_steers_a_terminal() -> None:
    """Escapes, bells, line ends, and marks that turn the direction of writing."""
    assert printable("a\x1b[31m\x07\nb\u202ec\u00e9") == "a\\x1b[31m\\x07\\x0ab\\x202ec\u00e9"
    item = {"at": 0.0, "event": 1, "step": "decode", "source": "s", "text": "refused: \x1b[2J"}
    assert "\x1b" not in format_item(item)
