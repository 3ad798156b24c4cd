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
    """capture records standard input; replaying the capture twice gives one ring and one set of adapters."""
    config = tmp_path / "edgewater.toml"
    config.write_text('[health]\nlisten = ""\n[[sources]]\nname = "live"\nkind = "stdin"\n')
    live = arguments(tiny_model, f"data_dir={tmp_path / 'live'}")
    edgewater(
        "capture",
        "--config",
        str(config),
        "--out",
        str(tmp_path / "captures"),
        *live,
        input=stream.read_bytes(),
    )
    (capture,) = (tmp_path / "captures").glob("*.jsonl.zst")
    replays = [
        outcome(
            edgewater(
                "replay", str(capture), "--into", str(tmp_path / name), "--json", *arguments(tiny_model)
            ).stdout
        )
        for name in ("one", "two")
    ]
    assert replays[0] == replays[1]
    edgewater("run", "--once", "--config", str(config), *live, input=stream.read_bytes())
    report = (tmp_path / "live" / "report.json").read_bytes()
    assert outcome(report) == replays[0]
    # Every event of this stream has its own time, so plain lines give the same again.
    assert outcome(quiet) == replays[0]


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
