"""`edgewater tap` and the live part of `status`, from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.ingesting import Site, until
from tests.e2e.stream import environment

pytestmark = pytest.mark.slow
STEPS = ["source", "decode", "redact", "dedup", "tokenize", "commit"]


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path) -> Iterator[Site]:
    made = Site(tmp_path, tiny_model)
    yield made
    made.stop()


class Tapping:
    """A running `edgewater tap`."""

    def __init__(self, site: Site, out: Path, *words: str) -> None:
        self.out = out
        with out.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", "tap", *site.words, *words], env=environment(), stdout=file
            )

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def items(self) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in self.out.read_text().splitlines(keepends=True) if line[-1] == "\n"
        ]


@pytest.fixture
def tap(tmp_path: Path) -> Iterator[Callable[..., Tapping]]:
    """Start taps that end with the test."""
    taps: list[Tapping] = []

    def start(site: Site, *words: str) -> Tapping:
        taps.append(Tapping(site, tmp_path / f"tap-{len(taps)}", *words))
        return taps[-1]

    yield start
    for one in taps:
        one.end()


def reading(number: int, **more: Any) -> dict[str, Any]:
    return {"kind": "reading", "ts": 1e9 + number, "values": {"pressure": number}, **more}


def send_until_over(site: Site, tapping: Tapping, source: str = "site", **more: Any) -> None:
    """A tap shows what comes after it began, which nothing tells from outside."""
    count = 0

    def over() -> bool:
        nonlocal count
        count += 1
        site.send(reading(count, **more), source=source)
        return tapping.process.poll() is not None

    until(over, "the tap saw enough")
    assert tapping.process.returncode == 0


def test_events_are_seen_passing_and_redacted(site: Site, tap: Callable[..., Tapping]) -> None:
    site.start()
    tapping = tap(site, "--max-events", "2")
    send_until_over(site, tapping, source="site", subject="crew-b", id="bob@example.com")
    text = tapping.out.read_text()
    assert "example.com" not in text
    assert "<email>" in text
    lines = [line.split() for line in text.splitlines() if not line.startswith("...")]
    numbers = list(dict.fromkeys(line[1] for line in lines))
    assert len(numbers) == 2
    first = [line for line in lines if line[1] == numbers[0]]
    assert [next(word for word in line if word in STEPS) for line in first] == STEPS
    assert "tokens" in first[4]
    assert first[5][-4::2] == ["seq", "window"]


def test_one_step_of_one_source_as_json(
    tmp_path: Path, tiny_model: Path, tap: Callable[..., Tapping]
) -> None:
    """Of two ingest processes, whose sockets are merged."""
    site = Site(tmp_path, tiny_model, ("a", "b"), "[ingest]\nprocesses = 2\n")
    try:
        for name in ("a", "b"):
            site.send(reading(0), source=name)
        site.start()
        until(lambda: len(list(site.data.glob("run/ingest-*.sock"))) == 2, "both answer")
        tapping = tap(site, "b", "--step", "commit", "--json", "--max-events", "2")
        site.send(*(reading(n) for n in range(5)), source="a")
        send_until_over(site, tapping, source="b")
        items = [item for item in tapping.items() if "event" in item]
        assert [(item["shard"], item["source"], item["step"]) for item in items] == [
            ("shard-2", "b", "commit")
        ] * 2
        both = tap(site, "--json", "--rate", "200")
        count = 0

        def seen() -> bool:
            nonlocal count
            count += 1
            site.send(reading(1_000 + count), source="a")
            site.send(reading(1_000 + count), source="b")
            return {item.get("shard") for item in both.items()} >= {"main", "shard-2"}

        until(seen, "both are shown")
        both.process.send_signal(signal.SIGINT)
        assert both.process.wait(20) == 1
    finally:
        site.stop()


def test_a_tap_that_hangs_does_not_slow_ingest(site: Site, tap: Callable[..., Tapping]) -> None:
    """Stopped in the middle: its pipe fills up, then its queue, and ingest goes on."""
    site.start()
    tapping = tap(site, "--rate", "200", "--json")
    count = 0

    def sees() -> bool:
        nonlocal count
        count += 1
        site.send(reading(count))
        return bool(tapping.items())

    until(sees, "it sees events")
    tapping.process.send_signal(signal.SIGSTOP)
    site.send(*(reading(n) for n in range(10_000, 40_000)))
    site.until_events(count + 30_000)
    tapping.process.send_signal(signal.SIGCONT)
    until(lambda: any("not_shown" in item for item in tapping.items()), "the gap is counted")
    assert site.state().counters["samples"] == count + 30_000


def test_a_tap_ends_with_its_ingest(site: Site, tap: Callable[..., Tapping]) -> None:
    site.start()
    tapping = tap(site, "--json")
    until(lambda: bool(_connections(site)), "it is connected")
    site.stop()
    assert tapping.process.wait(20) == 0


def test_where_no_ingest_runs_the_message_says_what_to_start(site: Site) -> None:
    for _ in range(2):
        done = site.do("tap", check=False)
        assert done.returncode == 1
        assert f"no ingest runs on {site.data}: start `edgewater run`" in done.stderr.decode()
        site.send(reading(1))
        site.once()  # the second time there is a data folder


def test_status_shows_how_the_sources_stand_while_ingest_runs(site: Site) -> None:
    site.send(reading(1))
    site.start()
    site.until_events(1)
    assert "source       site  files  reading, 0 waiting" in site.do("status").stdout.decode()
    (source,) = site.json("status")["live_sources"]
    assert (source["shard"], source["name"], source["waiting"]) == ("main", "files:site", 0)
    site.stop()
    assert site.json("status")["live_sources"] == []


def _connections(site: Site) -> list[str]:
    """Connected peers of its control socket, as the kernel lists them."""
    inode_lines = Path("/proc/net/unix").read_text().splitlines()
    name = "ingest-main.sock"
    return [line for line in inode_lines if line.endswith(name) and line.split()[5] == "03"]


def test_the_socket_is_for_its_user_alone(site: Site) -> None:
    site.start()
    sock = site.data / "run" / "ingest-main.sock"
    assert (sock.stat().st_mode & 0o777, sock.stat().st_uid) == (0o600, os.geteuid())
