"""`edgewater dlq`: dead letters listed, shown, fed again and deleted, whether or not ingest runs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.check import check_ring
from storage.ring import Ring
from storage.samples import Samples
from storage.windows import Commit, DeadLetter
from tests.e2e.ingesting import Site
from tests.e2e.stream import edgewater

pytestmark = pytest.mark.slow
UNKNOWN = b'{"kind":"text","text":"pump leaks","prio":1}'


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path) -> Iterator[Site]:
    made = Site(tmp_path, tiny_model)
    yield made
    made.stop()


def text(words: str) -> bytes:
    return b'{"kind":"text","text":"%s"}' % words.encode()


def letter(data: bytes, arrival: float = 1_700_000_000.0) -> DeadLetter:
    return DeadLetter("site", f"work.jsonl byte {len(data)}", arrival, "an older version said no", data)


def refused(site: Site, *letters: DeadLetter, shard: str = "main") -> None:
    """Put letters into the ring of a site at rest, as a configuration that was changed since left them."""
    with Ring.open_reader(site.data / "ring" / shard) as reader:
        tokenizer_id, max_bytes = reader.header.tokenizer_id, reader.map_bytes
    with Ring.open_or_create(
        site.data / "ring" / shard, shard=shard, tokenizer_id=tokenizer_id, max_bytes=max_bytes
    ) as ring:
        state = ring.state
        counters = dict(state.counters)
        for name in ("events", "dead_letters"):
            counters[name] = counters.get(name, 0) + len(letters)
        ring.commit(
            Commit(
                samples=Samples(first_seq=state.next_seq), stream_time=state.stream_time, window=state.window,
                counters=counters, dead_letters=letters, clock=state.clock,
            )
        )  # fmt: skip


def stored(site: Site, shard: str = "main") -> list[float]:
    """Event times of the samples."""
    with Ring.open_reader(site.data / "ring" / shard) as ring:
        state = ring.state
        return list(ring.read(state.tail_seq, state.next_seq - 1).ts) if state.next_seq else []


def whole(site: Site) -> None:
    assert list(check_ring(site.data / "ring" / "main", live=False)) == []
    counters = site.state().counters
    outcomes = ("samples", "duplicates", "suppressed", "dead_letters", "dropped", "near_duplicates")
    assert counters["events"] == sum(counters.get(name, 0) for name in outcomes)


def became(answer: dict[str, Any]) -> dict[str, str]:
    return {row["letter"]: row["became"] for row in answer["letters"]}


def test_letters_are_listed_and_shown_redacted(site: Site) -> None:
    site.send(UNKNOWN, b"not JSON \x1b[2J bob@example.com", b"\xff\xfe")
    site.once()
    rows = site.json("dlq", "list")
    assert [(row["letter"], row["source"], row["bytes"]) for row in rows] == [
        ("0", "site", len(UNKNOWN)), ("1", "site", len(b"not JSON \x1b[2J <email>")), ("2", "site", 2),
    ]  # fmt: skip
    assert "unknown field `prio`" in rows[0]["reason"]
    shown = site.json("dlq", "show", "0")
    assert (shown["data"], shown["retry"]) == (UNKNOWN.decode(), True)
    assert site.json("dlq", "show", "1")["retry"] is False
    assert site.json("dlq", "show", "2")["data_base64"] == "//4="
    for words in (["list"], ["show", "1"]):
        out = site.do("dlq", *words).stdout
        assert b"\x1b" not in out
        assert b"example.com" not in out
    assert site.do("dlq", "list", "--source", "other").stdout == b"no dead letters\n"
    assert [row["letter"] for row in site.json("dlq", "list", "--newest", "1")] == ["2"]
    for name in ("3", "x", "main:", "shard-9:1", "\u0663", "9" * 30):
        done = site.do("dlq", "show", name, check=False)
        assert (done.returncode, b"dlq list" in done.stderr) == (3, True), name


@pytest.mark.parametrize("running", [True, False], ids=["beside ingest", "without ingest"])
def test_letters_are_fed_again_and_deleted(site: Site, running: bool) -> None:
    """One that is taken now, its duplicate, one refused again, two that cannot be, one that is gone."""
    site.send(text("a first one"))
    site.once()
    cut = b'{"kind":"text","text":"' + b"x" * (256 << 10)
    refused(
        site, letter(text("now right")), letter(text("now right")), letter(UNKNOWN), letter(b"plain"),
        letter(cut[: 256 << 10]), letter(text("of no interest")),
    )  # fmt: skip
    if running:
        site.start()
    answer = site.json("dlq", "retry", "0", "1", "2", "3", "4", "77", check=False)
    assert became(answer) == {
        "0": "stored", "1": "dropped", "2": "refused", "3": "kept", "4": "kept", "77": "gone",
    }  # fmt: skip
    reasons = {row["letter"]: row["reason"] for row in answer["letters"]}
    assert "unknown field `prio`" in reasons["2"]
    assert "no JSON object" in reasons["3"]
    assert "cut at 256 KiB" in reasons["4"]
    left = {row["letter"]: row for row in site.json("dlq", "list")}
    assert list(left) == ["3", "4", "5", "6"]
    assert "unknown field `prio`" in left["6"]["reason"]
    assert left["6"]["position"] == f"work.jsonl byte {len(UNKNOWN)}"
    assert stored(site)[1:] == [1_700_000_000.0]  # an event without ts is of when it came at first
    assert site.do("dlq", "purge", "5", "6").stdout == b"2 dead letters: 2 purged\n"
    assert site.do("dlq", "purge", "--all", check=False).returncode == 2
    assert site.do("dlq", "purge", "--all", "--yes").stdout == b"2 dead letters: 2 purged\n"
    assert site.do("dlq", "list").stdout == b"no dead letters\n"
    assert site.do("dlq", "retry", "--all").stdout == b"no dead letters: nothing to do\n"
    site.send(text("a last one"))
    if running:
        site.until_events(1 + 6 + 3 + 1)
        site.stop()
    else:
        site.once()
    whole(site)


def test_letters_of_a_source_that_may_not_name_others_may_not_by_way_of_a_retry(site: Site) -> None:
    site.send(text("x"))
    site.once()
    named = b'{"kind":"text","source":"pump-1","text":"not mine to say"}'
    site.configure('[[sources]]\nname = "hmi"\nkind = "http"\n[sources.http]\nlisten = "127.0.0.1:8086"\n')
    refused(site, DeadLetter("hmi", "http:hmi", 1.0, "source 'pump-1' may not be named here", named))
    answer = site.json("dlq", "retry", "0", check=False)
    assert became(answer) == {"0": "refused"}
    assert "may not be named here" in answer["letters"][0]["reason"]


def test_with_several_shards_letters_have_their_names(tmp_path: Path, tiny_model: Path) -> None:
    site = Site(tmp_path, tiny_model, ("a", "b"), "[ingest]\nprocesses = 2\n")
    try:
        for name in ("a", "b"):
            site.send(UNKNOWN, text("x"), source=name)
        site.once()
        assert sorted(row["letter"] for row in site.json("dlq", "list")) == ["main:0", "shard-2:0"]
        done = site.do("dlq", "show", "0", check=False)
        assert b"of which shard: main:0, shard-2:0?" in done.stderr
        site.start()
        assert site.do("dlq", "purge", "shard-2:0").stdout == b"1 dead letters: 1 purged\n"
        assert became(site.json("dlq", "retry", "--all", check=False)) == {"main:0": "refused"}
        assert [row["letter"] for row in site.json("dlq", "list")] == ["main:1"]
    finally:
        site.stop()


def test_a_kill_while_letters_are_fed_again_loses_and_doubles_none(site: Site) -> None:
    """Killed in the middle: each letter is a letter still, or a sample, and never both."""
    site.send(text("x"))
    site.once()
    count = 6_000
    refused(site, *(letter(text(f"t{n}"), arrival=1e9 + n) for n in range(count)))
    everything = [1e9 + n for n in range(count)]
    cut_short = 0
    for _ in range(3):
        site.start()
        with Ring.open_reader(site.data / "ring" / "main") as ring:
            first = ring.state.dead_first
            verb = threading.Thread(
                target=lambda: edgewater("dlq", "retry", "--all", *site.words, check=False)
            )
            verb.start()
            pid = site.ingest_pid()
            while ring.read_state().dead_first == first and verb.is_alive():
                time.sleep(0.001)
            os.kill(pid, signal.SIGKILL)
        verb.join(60)
        assert not verb.is_alive()
        site.stop()
        letters = [one.arrival for _, one in site.letters()]
        samples = [ts for ts in stored(site) if 1e9 <= ts < 1e9 + count]
        assert sorted(letters + samples) == everything
        cut_short += bool(letters and samples)
    assert cut_short
    site.do("dlq", "retry", "--all", check=False)
    assert site.letters() == []
    assert sorted(ts for ts in stored(site) if 1e9 <= ts < 1e9 + count) == everything
    whole(site)


def test_a_flood_of_bad_lines_does_not_flood_the_log(site: Site) -> None:
    """FAULTS row 65: 100,000 refused inputs, the most that can be logged: a few lines, and no payload."""
    site.file().write_bytes(b'{"secret payload\n' * 100_000)
    done = edgewater("-vv", "run", "--once", "--no-updates", *site.words)
    assert site.state().counters["dead_letters"] == 100_000
    assert len(site.letters()) <= 10_000
    log = done.stdout + done.stderr
    assert b"inputs were refused: see `edgewater dlq list`" in log
    assert b"secret" not in log
    assert len(log) < 16 << 10
    whole(site)


def test_captured_events_that_are_sent_again_are_not_stored_again(site: Site) -> None:
    """FAULTS row 55: whoever recorded events and sends them again, in any order and file, gets none in."""
    events = [
        b'{"kind":"reading","id":"%d","ts":%d,"values":{"p":%d}}' % (n, 10**9 + n, n) for n in range(200)
    ] + [b'{"kind":"text","id":"t%d","text":"order %d"}' % (n, n) for n in range(50)]
    site.send(*events)
    site.once()
    assert site.state().counters["samples"] == 250
    digest = site.state().digest
    site.file().rename(site.file().with_suffix(".old"))
    again = list(reversed(events))
    site.send(*again)
    site.start()
    site.until_events(500)
    site.send(*events)
    site.until_events(750)
    site.stop()
    counters = site.state().counters
    assert (counters["samples"], counters["duplicates"]) == (250, 500)
    assert site.state().digest == digest
    whole(site)
