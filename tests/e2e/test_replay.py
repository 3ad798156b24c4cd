"""The whole loop from outside: captured, replayed, killed, resumed; the same bytes each time."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from tests.e2e.stream import WINDOW, arguments, edgewater, environment, lines, outcome

pytestmark = pytest.mark.slow
EVENTS = 250


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "events.jsonl"
    path.write_bytes(b"".join(lines(EVENTS)) + b'{"kind":"reading","values":{}}\n')
    return path


@pytest.fixture(scope="module")
def quiet(stream: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The report of an undisturbed replay."""
    into = tmp_path_factory.mktemp("quiet") / "data"
    return edgewater("replay", str(stream), "--into", str(into), "--json", *arguments(tiny_model)).stdout


def test_a_replay_learns_and_tells_what_it_learned(quiet: bytes) -> None:
    """The report has the fields that others rely on, and the loop really closed."""
    report = json.loads(quiet)
    assert report["events"] == EVENTS + 1
    assert report["dead_letters"] == 1
    assert report["samples"] + report["duplicates"] + report["dead_letters"] == report["events"]
    assert len(report["windows"]) == report["samples"] // WINDOW
    assert [window["decision"] for window in report["windows"]] == ["promoted"] * len(report["windows"])
    first, second = report["windows"][:2]
    assert (first["first_seq"], first["last_seq"], second["first_seq"]) == (0, WINDOW - 1, WINDOW)
    assert first["active_bits_per_byte"] == first["base_bits_per_byte"]
    assert second["active_bits_per_byte"] < second["base_bits_per_byte"]
    assert set(first["by_source"]) == {"cmms", "weather-1"}
    assert [version["active"] for version in report["versions"]] == [False] * (
        len(report["versions"]) - 1
    ) + [True]


def test_a_live_run_its_capture_and_two_replays_agree(
    stream: Path, tiny_model: Path, quiet: bytes, tmp_path: Path
) -> None:
    """A run records what it ingests; replaying that twice gives its ring and its adapters again."""
    config = tmp_path / "edgewater.toml"
    config.write_text('[health]\nlisten = ""\n[[sources]]\nname = "live"\nkind = "stdin"\n')
    live = ["--config", str(config), *arguments(tiny_model, f"data_dir={tmp_path / 'live'}")]
    edgewater("run", "--once", "--capture", str(tmp_path / "run"), *live, input=stream.read_bytes())
    (recorded,) = (tmp_path / "run").glob("*.jsonl.zst")
    words = ["replay", str(recorded), "--json", *arguments(tiny_model), "--into"]
    replays = [outcome(edgewater(*words, str(tmp_path / name)).stdout) for name in ("one", "two")]
    assert replays[0] == replays[1]
    assert outcome((tmp_path / "live" / "report.json").read_bytes()) == replays[0]
    # Every event of this stream has its own time, so plain lines give the same again.
    assert outcome(quiet) == replays[0]


def test_capture_records_without_ingesting(stream: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Recorded alone, the stream replays to the same ring; nothing was stored meanwhile."""
    config = tmp_path / "edgewater.toml"
    config.write_text('[health]\nlisten = ""\n[[sources]]\nname = "live"\nkind = "stdin"\n')
    live = ["--config", str(config), *arguments(tiny_model, f"data_dir={tmp_path / 'live'}")]
    edgewater("capture", "--out", str(tmp_path / "alone"), *live, input=stream.read_bytes())
    assert not (tmp_path / "live").exists()
    (recorded,) = (tmp_path / "alone").glob("*.jsonl.zst")
    words = ["replay", "--json", "--no-updates", *arguments(tiny_model)]
    digests = {
        outcome(edgewater(*words, str(file), "--into", str(tmp_path / name)).stdout)[0]
        for name, file in (("captured", recorded), ("plain", stream))
    }
    assert len(digests) == 1


@pytest.mark.parametrize("seed", [1, 2])
def test_a_killed_and_resumed_replay_ends_as_a_quiet_one(
    stream: Path, tiny_model: Path, quiet: bytes, tmp_path: Path, seed: int
) -> None:
    """SIGKILL to ingest, trainer, child or all at random moments: the same ring, the same adapters."""
    random_source = random.Random(seed)
    into = tmp_path / "data"
    words = ["replay", str(stream), "--into", str(into), "--json", "--resume", *arguments(tiny_model)]
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *words],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
        )  # fmt: skip
        time.sleep(random_source.uniform(0.5, 9.0))
        victims = _family(process.pid)
        for victim in random_source.sample(victims, random_source.randint(1, len(victims))):
            _kill(victim)
        if random_source.random() < 0.7:
            _kill(process.pid)
            process.wait()
        else:
            time.sleep(1.0)
            process.terminate()
            process.wait(30)
    assert outcome(edgewater(*words).stdout) == outcome(quiet)
    assert not list((into / "updates").iterdir())


def test_a_finished_replay_trains_nothing_again(stream: Path, tiny_model: Path, tmp_path: Path) -> None:
    into = tmp_path / "data"
    words = ["replay", str(stream), "--into", str(into), "--json", "--no-updates", *arguments(tiny_model)]
    first = edgewater(*words).stdout
    before = (into / "ring/main/data.mdb").read_bytes()
    assert edgewater(*words).stdout == first
    assert (into / "ring/main/data.mdb").read_bytes() == before


def test_an_ingest_that_somebody_ends_is_started_again(
    stream: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """SIGTERM to the child alone is not the end of the stream: nothing is called finished half way."""
    long = tmp_path / "long.jsonl"
    reading = b'{"kind":"reading","source":"p","ts":%d,"values":{"v":1}}\n'
    long.write_bytes(b"".join(reading % i for i in range(2_000)))
    words = ["--into", str(tmp_path / "data"), "--json", "--no-updates", *arguments(tiny_model)]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "replay", str(long), "--speed", "500", *words],
        stdout=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    while len(_family(process.pid)) < 2:
        time.sleep(0.05)
    time.sleep(1.5)
    os.kill(_family(process.pid)[1], signal.SIGTERM)
    report, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(report)["events"] == 2_000


def test_updates_are_made_up_for_in_a_replay_that_only_ingested(
    stream: Path, tiny_model: Path, quiet: bytes, tmp_path: Path
) -> None:
    words = ["replay", str(stream), "--into", str(tmp_path / "data"), "--json", *arguments(tiny_model)]
    edgewater(*words, "--no-updates")
    assert outcome(edgewater(*words).stdout) == outcome(quiet)


def test_a_damaged_file_is_refused_in_words_and_a_short_one_is_named(
    stream: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """A capture that ends with a power cut is fed as far as it goes, and that is said."""
    packed = zstandard.ZstdCompressor(write_checksum=True).compress(stream.read_bytes())
    file = tmp_path / "events.jsonl.zst"
    words = ["replay", str(file), "--no-updates", *arguments(tiny_model), "--into"]
    file.write_bytes(packed[: len(packed) // 2] + b"\xff" * 40 + packed[len(packed) // 2 + 40 :])
    refused = edgewater(*words, str(tmp_path / "damaged"), check=False)
    assert refused.returncode == 1
    assert b"cannot be unpacked" in refused.stderr
    assert b"Traceback" not in refused.stderr
    file.write_bytes(packed[:-10])
    assert b"is cut short" in edgewater(*words, str(tmp_path / "short")).stderr
    file.write_bytes(packed + packed)
    assert b"is cut short" not in edgewater(*words, str(tmp_path / "whole")).stderr


def test_an_unfinished_or_other_replay_is_refused(stream: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Without --resume nothing is mixed into a folder that holds something."""
    into = tmp_path / "data"
    words = ["--into", str(into), "--no-updates", *arguments(tiny_model)]
    edgewater("replay", str(stream), *words)
    other = tmp_path / "other.jsonl"
    other.write_bytes(b"".join(lines(3)))
    refused = edgewater("replay", str(other), *words, check=False)
    assert refused.returncode == 3
    assert b"choose another folder" in refused.stderr


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _family(pid: int) -> list[int]:
    """The process and everything that it started."""
    found = [pid]
    for candidate in Path("/proc").iterdir():
        if candidate.name.isdigit():
            try:
                parent = int((candidate / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == pid:
                found += _family(int(candidate.name))
    return found
