"""`edgewater run --dry-run`: says what would be stored, and leaves no trace."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.ingesting import Site, until
from tests.e2e.stream import environment
from tests.mosquitto import Mosquitto, Publisher

pytestmark = pytest.mark.slow


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path) -> Iterator[Site]:
    made = Site(tmp_path, tiny_model)
    yield made
    made.stop()


def reading(number: float, **more: Any) -> dict[str, Any]:
    return {"kind": "reading", "ts": 1e9 + number, "values": {"pressure": number}, **more}


def dry(site: Site, *words: str, code: int = 0) -> list[dict[str, Any]]:
    done = site.do("run", "--dry-run", "--json", *words, check=False)
    assert done.returncode == code, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


class Running:
    """A dry run that has begun."""

    def __init__(self, site: Site, count: str, out: Path) -> None:
        self._out = out
        words = ["--dry-run", "--json", "--timeout", "30s", "--max-events", count, *site.words]
        with out.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", "run", *words], env=environment(), stdout=file
            )

    def end(self) -> list[dict[str, Any]]:
        assert self.process.wait(40) == 0
        return [json.loads(line) for line in self._out.read_text().splitlines()]


@pytest.fixture
def dry_runs(tmp_path: Path) -> Iterator[Callable[[Site, str], Running]]:
    """Start dry runs that end with the test."""
    begun: list[Running] = []

    def start(site: Site, count: str) -> Running:
        begun.append(Running(site, count, tmp_path / f"dry-{len(begun)}"))
        return begun[-1]

    yield start
    for one in begun:
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait()


def contents(folder: Path) -> dict[str, bytes]:
    """Files and what is in them; LMDB's table of readers is no content."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock.mdb")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_what_would_be_stored_is_told_and_nothing_is_written(site: Site) -> None:
    site.send(
        reading(3.42, source="pump-1"),
        {"kind": "text", "text": "mail bob@example.com", "ts": "2026-03-01T08:15:00Z"},
        reading(3.42, source="pump-1"),
        {"kind": "text", "text": "x", "mail": "bob@example.com"},
    )
    before = contents(site.path)
    events = dry(site, "--timeout", "1s")
    told = [(event["source"], event["kind"], event["became"], event["text"]) for event in events]
    assert told == [
        ("pump-1", "reading", "stored", '"pump-1 pressure=3.42"'),
        ("site", "text", "stored", '"mail <email>"'),
        ("pump-1", "reading", "duplicates", ""),
        ("site", "", "refused", ""),
    ]
    assert events[1]["time"] == 1_772_352_900.0
    assert events[0]["tokens"] > 0
    assert "unknown field `mail`" in events[3]["reason"]
    assert contents(site.path) == before
    assert not site.data.exists()


def test_for_people_it_ends_with_what_it_comes_to(site: Site) -> None:
    site.send(reading(1), reading(1), b"\x1b[2Jbroken")
    out = site.do("run", "--dry-run", "--timeout", "1s").stdout.decode()
    assert 'site reading  stored     "site pressure=1"' in out
    assert "3 events: 1 stored, 1 duplicate, 1 refused; nothing was written" in out
    assert "source       site  files  reading" in out
    assert "\x1b" not in out


def test_it_ends_at_the_number_of_events_that_was_asked_for(site: Site) -> None:
    site.send(*(reading(n) for n in range(30)))
    assert len(dry(site)) == 10
    assert [event["text"] for event in dry(site, "--max-events", "2")] == [
        '"site pressure=0"', '"site pressure=1"',
    ]  # fmt: skip


def test_it_goes_on_where_ingest_stands_and_ingest_goes_on_where_it_stood(site: Site) -> None:
    """Beside a running daemon: it knows what was stored, and moves nothing."""
    site.send(reading(1), reading(2))
    site.start()
    site.until_events(2)
    os.kill(site.ingest_pid(), signal.SIGSTOP)  # so that it is not faster
    before = site.state()
    site.send(reading(1), reading(3))
    told = [(event["became"], event["text"]) for event in dry(site, "--max-events", "2")]
    assert told == [("duplicates", ""), ("stored", '"site pressure=3"')]
    assert site.state() == before
    os.kill(site.ingest_pid(), signal.SIGCONT)
    site.until_events(4)
    counters = site.state().counters
    assert (counters["samples"], counters["duplicates"]) == (3, 1)


def test_a_port_that_a_daemon_holds_is_said_and_the_other_sources_are_tried(site: Site) -> None:
    site.send(reading(1))
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        site.configure(
            f'[[sources]]\nname = "hmi"\nkind = "http"\n[sources.http]\nlisten = "127.0.0.1:{port}"\n'
        )
        done = site.do("run", "--dry-run", "--timeout", "2s", check=False)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stdout.decode()
    assert "1 events: 1 stored" in done.stdout.decode()


@pytest.mark.skipif(not shutil.which("mosquitto"), reason="needs mosquitto (apt install mosquitto)")
@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_an_mqtt_session_of_the_daemon_keeps_its_messages(
    site: Site, tmp_path: Path, version: str, dry_runs: Callable[[Site, str], Running]
) -> None:
    """What waits for the daemon still waits after a dry run, and the dry run leaves no session behind."""
    broker = Mosquitto(tmp_path / "broker")
    broker.start()
    publisher = Publisher(broker.port)
    try:
        site.configure(
            f'[[sources]]\nname = "plant"\nkind = "mqtt"\n[sources.mqtt]\nurl = "mqtt://127.0.0.1:{broker.port}"\n'
            f'version = "{version}"\nclient_id = "gateway-7"\n[sources.mqtt.topics]\n"plant/#" = {{}}\n'
        )
        site.start()
        until(lambda: "gateway-7 1 plant/#" in broker.log(), "subscribed")
        site.stop()
        for n in range(3):
            publisher.publish("plant/a", json.dumps(reading(n, id=f"early-{n}")).encode())
        running = dry_runs(site, "2")
        until(lambda: bool(re.search(r"gateway-7-dry-\d+ 1 plant/#", broker.log())), "subscribed")
        for n in range(2):
            publisher.publish("plant/a", json.dumps(reading(10 + n, id=f"late-{n}")).encode())
        assert [event["text"] for event in running.end()] == [
            '"plant pressure=10"', '"plant pressure=11"',
        ]  # fmt: skip
        site.start()
        site.until_events(5)
        assert site.state().counters["samples"] == 5
        site.stop()
        broker.stop()  # it writes the sessions that it keeps
        kept = (tmp_path / "broker" / "mosquitto.db").read_bytes()
        assert b"gateway-7" in kept
        assert b"-dry" not in kept
    finally:
        publisher.close()
        broker.stop()


@pytest.mark.parametrize("words", [["--once"], ["--no-updates"], ["--capture", "x"]])
def test_options_that_store_make_no_sense_with_it(site: Site, words: list[str]) -> None:
    assert site.do("run", "--dry-run", *words, check=False).returncode == 2


def test_its_options_need_it(site: Site) -> None:
    for words in (["--timeout", "1s"], ["--json"]):
        done = site.do("run", *words, check=False)
        assert (done.returncode, b"go with --dry-run" in done.stderr) == (2, True)
    assert site.do("run", "--dry-run", "--timeout", "soon", check=False).returncode == 2
