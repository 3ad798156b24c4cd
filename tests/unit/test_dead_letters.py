"""Dead letters: deleted from the ring in any order, and how they are made lines again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipeline import config
from pipeline.control import Request
from pipeline.dead_letters import (
    LetterDesk,
    LetterOutcome,
    LetterRun,
    LetterWork,
    RefusalLog,
    allowed_sources,
    why_not,
)  # fmt: skip
from pipeline.events import MAX_EVENT_BYTES
from pipeline.sources.inbox import Inbox, Settled
from storage.check import check_ring
from storage.export import export_ring, import_ring
from storage.ring import Ring
from storage.salvage import rebuild
from storage.windows import DeadLetter
from tests.unit.test_ring import TOKENIZER, commit, new_ring


def letter(number: int) -> DeadLetter:
    return DeadLetter("site", f"byte {number}", 1.0, "not JSON", b"x" * (number % 50))


def filled(tmp_path: Path, count: int = 10) -> Ring:
    ring = new_ring(tmp_path)
    commit(ring, 1, dead_letters=[letter(number) for number in range(count)])
    return ring


def numbers(ring: Ring) -> list[int]:
    return [number for number, _ in ring.dead_letters(1_000)]


def damage(folder: Path) -> list[str]:
    """What is wrong with rows; the helper's rings have another name and no counters."""
    return [problem.words for problem in check_ring(folder, live=False) if problem.kind == "row"]


def check(ring: Ring) -> None:
    ring.close()
    assert damage(ring.folder) == []


def test_a_letter_deleted_before_older_ones_is_gone_for_every_reader(tmp_path: Path) -> None:
    ring = filled(tmp_path)
    commit(ring, 0, deleted_letters=[4, 7])
    assert numbers(ring) == [0, 1, 2, 3, 5, 6, 8, 9]
    assert ring.dead_letter(4) is None
    assert ring.dead_letter(5) == letter(5)
    check(ring)
    with new_ring(tmp_path) as again:
        assert numbers(again) == [0, 1, 2, 3, 5, 6, 8, 9]


def test_what_deleted_letters_leave_goes_with_the_older_ones(tmp_path: Path) -> None:
    ring = filled(tmp_path)
    commit(ring, 0, deleted_letters=[1, 2])
    assert ring.state.dead_first == 0
    commit(ring, 0, deleted_letters=[0])
    assert ring.state.dead_first == 3
    commit(ring, 0, deleted_letters=range(3, 10))
    assert (ring.state.dead_first, ring.state.dead_next, ring.state.dead_bytes) == (10, 10, 0)
    check(ring)


def test_numbers_that_are_not_there_are_passed_over(tmp_path: Path) -> None:
    ring = filled(tmp_path)
    commit(ring, 0, deleted_letters=[0, 1])
    before = ring.state
    commit(ring, 0, deleted_letters=[0, 1, 10, 1_000, 2**63])
    assert (ring.state.dead_first, ring.state.dead_next) == (before.dead_first, before.dead_next)
    assert numbers(ring) == list(range(2, 10))
    check(ring)


def test_a_number_is_never_used_again(tmp_path: Path) -> None:
    """In one commit the old letter goes and the new one comes, also where it was the last."""
    ring = filled(tmp_path, 1)
    commit(ring, 0, deleted_letters=[0], dead_letters=[letter(7)])
    assert ring.dead_letters() == [(1, letter(7))]
    check(ring)


@pytest.mark.parametrize("seed", range(5))
def test_the_ring_is_whole_however_letters_come_and_go(tmp_path: Path, seed: int) -> None:
    """Against a dict: seeded, with the bound on their bytes at work."""
    chance = random.Random(seed)
    ring = new_ring(tmp_path, 1 << 20)
    held: dict[int, DeadLetter] = {}
    for _ in range(60):
        gone = [n for n in range(ring.state.dead_first, ring.state.dead_next) if chance.random() < 0.2]
        fresh = [
            DeadLetter("s", "p", 1.0, "r", bytes(chance.randrange(4_000)))
            for _ in range(chance.randrange(6))
        ]  # fmt: skip
        first = ring.state.dead_next
        commit(ring, 1, deleted_letters=gone, dead_letters=fresh)
        held = {n: one for n, one in held.items() if n not in gone} | dict(enumerate(fresh, first))
        held = {n: one for n, one in held.items() if n >= ring.state.dead_first}
        assert dict(ring.dead_letters(10_000)) == held
        assert ring.state.dead_bytes <= (1 << 20) // 16
    check(ring)


def test_an_export_and_a_rebuild_keep_deleted_letters_deleted(tmp_path: Path) -> None:
    ring = filled(tmp_path)
    commit(ring, 5, deleted_letters=[3])
    copy = tmp_path / "copy.ring"
    with copy.open("wb") as file:
        export_ring(ring, file)
    ring.close()
    with copy.open("rb") as file:
        import_ring(file, tmp_path / "imported", max_bytes=4 << 20)
    rebuild(ring.folder, tmp_path / "quarantine", tokenizer_id=TOKENIZER, max_bytes=4 << 20)
    for folder in (tmp_path / "imported", ring.folder):
        assert damage(folder) == []
        with Ring.open_reader(folder) as reader:
            assert numbers(reader) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_the_log_tells_of_refused_inputs_at_once_and_then_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [0.0]
    refusals = RefusalLog("main", lambda: now[0])
    for second in range(130):
        now[0] = float(second)
        refusals.note(1_000 if second < 100 else 0)
    words = "main: {} inputs were refused: see `edgewater dlq list`"
    assert [record.getMessage() for record in caplog.records] == [
        words.format("1,000"), words.format("60,000"), words.format("39,000"),
    ]  # fmt: skip


def test_only_a_whole_json_object_can_be_fed_again() -> None:
    def letter(data: bytes) -> DeadLetter:
        return DeadLetter("s", "p", 1.0, "r", data)

    assert why_not(letter(b'{"kind":"text","prio":1}')) == ""
    for data in (b"", b"x", b"[1]", b"3", b'{"a":1', b"\xff", b"[" * 100_000):
        assert "no JSON object" in why_not(letter(data))
    assert "cut at 256 KiB" in why_not(letter(b'{"a":"' + b"x" * MAX_EVENT_BYTES))


def test_an_event_without_a_time_gets_the_one_at_which_it_was_refused() -> None:
    """As data, so that a capture holds it; what says its own time, or is no event, stays as it is."""
    cases = {
        b' {"kind":"text","text":"x"}': b'{"ts":1700000000.25,"kind":"text","text":"x"}',
        b'{"ts":1,"kind":"text"}': b'{"ts":1,"kind":"text"}',
        b"{}": b"{}",
    }
    letters = [(n, DeadLetter("s", "p", 1_700_000_000.25, "r", data)) for n, data in enumerate(cases)]
    run = LetterRun(letters, "retry", lambda source: frozenset())
    (chunk,) = run._chunks
    assert [line.data for line in chunk.lines] == list(cases.values())
    assert [line.place for line in chunk.lines] == ["p"] * 3


def test_a_retry_may_name_no_source_that_its_connector_would_refuse(tmp_path: Path) -> None:
    """Of the rules of an MQTT source the strictest; of one that the configuration does not name, none."""
    file = tmp_path / "edgewater.toml"
    file.write_text(
        '[[sources]]\nname = "f"\nkind = "files"\npath = "/x"\n'
        '[[sources]]\nname = "h"\nkind = "http"\n[sources.http]\nsources = ["a"]\n'
        '[[sources]]\nname = "any"\nkind = "http"\n'
        '[sources.http]\nlisten = "127.0.0.1:9"\nsources = ["*"]\n'
        '[[sources]]\nname = "m"\nkind = "mqtt"\n[sources.mqtt]\nurl = "mqtt://127.0.0.1"\n'
        '[sources.mqtt.topics]\n"x/#" = { sources = ["a", "b"] }\n"y/#" = { sources = ["b"] }\n'
        '"z/#" = { sources = ["*"] }\n'
    )
    allowed = allowed_sources(config.load(file, require_sources=False))
    assert [allowed(name) for name in ("f", "h", "any", "m", "made-by-a-topic")] == [
        None, frozenset({"a"}), None, frozenset({"b"}), frozenset({"b"}),
    ]  # fmt: skip
    file.write_text('[[sources]]\nname = "f"\nkind = "files"\npath = "/x"\n')
    assert allowed_sources(config.load(file, require_sources=False))("gone") == frozenset()


def test_letters_go_in_chunks_that_the_smallest_ring_can_take() -> None:
    data = [b'{"a":"%s"}' % (b"x" * 1_000 * (n % 40)) for n in range(400)]
    letters = [(n, DeadLetter("s", "p", 1.0, "r", one)) for n, one in enumerate(data)]
    for do, most in (("retry", 400), ("purge", 256)):
        chunks = LetterRun(letters, do, lambda source: None)._chunks  # type: ignore[arg-type]
        works = [chunk.receipt for chunk in chunks if isinstance(chunk.receipt, LetterWork)]
        assert [n for work in works for n in work.numbers] == list(range(400))
        for chunk, work in zip(chunks, works, strict=True):
            sizes = [len(line.data) for line in chunk.lines]
            assert len(work.numbers) <= most
            assert sum(sizes) <= (33 << 10) or len(sizes) == 1


def test_a_letter_whose_client_left_before_the_commit_is_not_fed_again_until_it(tmp_path: Path) -> None:
    ring, inbox = new_ring(tmp_path), Inbox()
    refused = DeadLetter("site", "byte 0", 1.0, "too old a version", b'{"kind":"text","text":"a"}')
    commit(ring, 1, dead_letters=[refused])
    desk = LetterDesk(ring, inbox, lambda source: None)
    left = desk.retry(Request(1, "retry", letters=[0]))
    assert next(left) is None  # handed over, and waiting for the commit
    left.close()
    again = desk.retry(Request(1, "retry", letters=[0]))
    assert [next(again), next(again)] == [None, None]
    chunk = inbox.get(0)
    assert chunk is not None
    assert inbox.get(0) is None
    commit(ring, 1, deleted_letters=[0])
    desk.acknowledge([Settled(chunk.receipt)])
    answers = [answer for answer in again if answer is not None]
    assert answers == [{"letters": [LetterOutcome(0, "gone")]}, {"done": True}]
    assert inbox.get(0) is None
    check(ring)
