"""The command line from outside: verbs, exit codes, and messages that say what to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from storage.folder import DataFolder

ROOT = Path(__file__).parents[2]
VERBS = {
    "capture", "config", "demo", "dlq", "doctor", "ingest", "init", "model", "replay", "ring", "run", "score",
    "status", "tap", "train", "update", "versions",
}  # fmt: skip
NOBODY = 65_534
# Modules first: that user may not be able to read them.
AS_NOBODY = f"""
import os, pipeline.cli, pipeline.config, pipeline.ingest, pipeline.running, adapters.model_folder
if os.geteuid() == 0:
    os.setgid({NOBODY})
    os.setuid({NOBODY})
pipeline.cli.main()
"""


def edgewater(*words: object, cwd: Path | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    env.pop("EDGEWATER_CONFIG", None)
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, words)],
        capture_output=True, text=True, cwd=cwd or "/", env=env, timeout=100, check=False, **options,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Ended with a code and a message: no traceback, nothing on standard output."""
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path) -> Path:
    """A configuration that would run."""
    (tmp_path / "events.jsonl").write_text('{"kind":"text","text":"pump leaks"}\n{"kind":"text"}\n')
    path = tmp_path / "edgewater.toml"
    path.write_text(
        f'data_dir = "data"\nmodel.path = "{tiny_model}"\nring.max_bytes = "16MiB"\nhealth.listen = ""\n'
        '[[sources]]\nname = "cmms"\nkind = "files"\npath = "events.jsonl"\n'
    )
    return path


def test_a_bare_command_prints_help_and_starts_nothing(tmp_path: Path) -> None:
    for words in ([], ["--help"], ["versions"], ["config"]):
        done = edgewater(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Usage: edgewater" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_verbs() -> None:
    lines = edgewater("--help").stdout.partition("Commands:")[2].splitlines()
    assert {line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "} == VERBS


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_says_what_it_does(verb: str) -> None:
    done = edgewater(verb, "--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) > 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rnu"], "No such command"),
        (["run", "--onse"], "No such option"),
        (["replay", "x.jsonl"], "x.jsonl"),
        (["replay", "/dev/null"], "--into"),
        (["score"], "give a text"),
        (["capture", "--out", "x", "--max-file-bytes", "lots"], "--max-file-bytes: a size is"),
    ],
)
def test_wrong_usage_exits_2(words: list[str], message: str) -> None:
    refused(edgewater(*words), 2, message)


def test_a_wrong_configuration_exits_2_with_all_faults_and_their_places(tmp_path: Path) -> None:
    """File, line, dotted path and a suggestion, from any verb that reads it."""
    path = tmp_path / "edgewater.toml"
    path.write_text(
        '[ring]\nmax_byts = "1MiB"\n[trigger]\nmin_samples = "many"\n[[sources]]\nname = "A"\n'
        'kind = "stdin"\n'
    )
    for verb in (["config", "check"], ["run"], ["ingest"], ["status"]):
        refused(
            edgewater(*verb, "--config", path), 2,
            f"{path}:2: ring.max_byts", "max_bytes", f"{path}:4: trigger.min_samples",
            f"{path}:6: sources[0].name",
        )  # fmt: skip


def test_no_configuration_and_no_source_exit_2(tmp_path: Path) -> None:
    refused(edgewater("run", "--config", tmp_path / "none.toml"), 2, "none.toml")
    refused(edgewater("run", "--set", "gateway.name=x", cwd=tmp_path), 2, "sources")
    refused(edgewater("status", "--set", "data_dri=x", cwd=tmp_path), 2, "data_dir")


@pytest.mark.parametrize("verb", [["run", "--once"], ["ingest", "--finite"], ["train"]])
def test_a_base_model_that_is_missing_or_changed_exits_3(site: Path, tmp_path: Path, verb: list[str]) -> None:
    missing = f"model.path={tmp_path / 'no-model'}"
    refused(edgewater(*verb, "--config", site, "--set", missing), 3, "no-model", "model prepare")
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "edgewater-model.json").write_text("{}")
    refused(edgewater(*verb, "--config", site, "--set", f"model.path={changed}"), 3, "model prepare")


@pytest.mark.parametrize(
    "verb", [["run", "--once"], ["ingest"], ["train"], ["status"], ["update"], ["versions", "list"]]
)
def test_a_foreign_data_folder_exits_3_and_is_left_alone(site: Path, verb: list[str]) -> None:
    data = site.parent / "data"
    data.mkdir()
    (data / "photo.jpg").touch()
    refused(edgewater(*verb, "--config", site), 3, "not an Edgewater data folder", "data_dir")
    assert [path.name for path in data.iterdir()] == ["photo.jpg"]


def test_a_looking_verb_makes_no_data_folder(site: Path) -> None:
    for verb in (["status"], ["versions", "list"], ["update"]):
        refused(edgewater(*verb, "--config", site), 3, "no data folder here", "data_dir")
    assert not (site.parent / "data").exists()


def test_a_folder_of_a_newer_version_exits_3(site: Path) -> None:
    DataFolder.open(site.parent / "data", create=True).close()
    (site.parent / "data" / "edgewater.json").write_text('{"format": 99, "uuid": "", "created": 0}')
    refused(edgewater("run", "--once", "--config", site), 3, "upgrade Edgewater")


@pytest.mark.parametrize("locked", ["data", "data/run"])
def test_a_data_folder_that_cannot_be_written_exits_3(locked: str) -> None:
    """Root may write everywhere: where the tests run as root, the command runs as nobody."""
    with tempfile.TemporaryDirectory() as home:
        site, data = Path(home), Path(home, "data")
        (site / "edgewater.toml").write_text(
            'data_dir = "data"\n[[sources]]\nname = "cmms"\nkind = "files"\npath = "x"\n'
        )
        if locked == "data/run":
            DataFolder.open(data, create=True).close()
        data.mkdir(exist_ok=True)
        (site / locked).chmod(0o500)
        if os.geteuid() == 0:
            for path in (site, *site.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        words = ("run", "--once", "--no-updates", "--config", str(site / "edgewater.toml"))
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, *words], capture_output=True, text=True, cwd="/",
            env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=100, check=False,
        )  # fmt: skip
        (site / locked).chmod(0o700)
    refused(done, 3, "cannot be used", "make it writable for this user, or choose another data_dir")


@pytest.mark.parametrize(
    ("role", "verb"),
    [
        ("supervisor", ["run", "--once"]),
        ("ingest-main", ["ingest", "--finite"]),
        ("trainer", ["train"]),
        ("admin", ["update"]),
        ("ingest-main", ["capture", "--out", "captures"]),
        ("trainer", ["doctor", "--repair"]),
    ],
)
def test_a_second_instance_on_one_folder_exits_3(site: Path, role: str, verb: list[str]) -> None:
    folder = DataFolder.open(site.parent / "data", create=True)
    with folder.lock(role):
        done = edgewater(*verb, "--config", site, cwd=site.parent)
    folder.close()
    refused(done, 3, f"another {role} process (pid {os.getpid()})", "stop it first, or use another data_dir")


def test_ingest_alone_stores_what_its_sources_hold(site: Path) -> None:
    """And `status` tells of it, the refused line with its place and reason."""
    assert edgewater("ingest", "--finite", "--config", site).returncode == 0
    told = json.loads(edgewater("status", "--json", "--config", site).stdout)
    assert (told["events"], told["samples"], told["dead_letters"]) == (2, 1, 1)
    (letter,) = told["newest_dead_letters"]
    assert letter["place"].endswith("events.jsonl byte 36")
    assert "missing required field `text`" in letter["reason"]
    assert edgewater("ingest", "--finite", "--config", site).returncode == 0
    again = json.loads(edgewater("status", "--json", "--config", site).stdout)
    assert again["events"] == 2
    text = edgewater("status", "--config", site).stdout
    assert "2 events: 1 samples" in text


def test_ingest_ends_after_so_many_events(site: Path) -> None:
    """Though the source has many more, faster than they can be committed."""
    (site.parent / "events.jsonl").write_text('{"kind":"reading","values":{"p":1}}\n' * 200_000)
    done = edgewater("ingest", "--finite", "--max-events", 10, "--config", site)
    assert done.returncode == 0
    told = json.loads(edgewater("status", "--json", "--config", site).stdout)
    assert 10 <= told["events"] < 5_000


def test_updates_of_a_model_that_changed_its_tokenizer_exit_3(site: Path, tiny_model: Path) -> None:
    """The ids in the ring mean nothing to another."""
    from storage.ring import Ring

    folder = DataFolder.open(site.parent / "data", create=True)
    Ring.create(folder.ring / "main", shard="main", tokenizer_id="ff" * 8, max_bytes=1 << 20).close()
    folder.close()
    refused(edgewater("ingest", "--finite", "--config", site), 3, "tokenizer", "a new data_dir")


def test_a_replay_is_never_mixed_into_a_live_folder(site: Path) -> None:
    assert edgewater("ingest", "--finite", "--config", site).returncode == 0
    lines = site.parent / "events.jsonl"
    done = edgewater("replay", lines, "--into", site.parent / "data", "--no-updates", "--config", site)
    refused(done, 3, "holds a live stream", "choose an empty folder")


def test_doctor_repairs_what_it_finds_damaged(site: Path) -> None:
    """A block with a flipped bit: found, set aside, blank from then on, and nothing is wrong any more."""
    assert edgewater("ingest", "--finite", "--config", site).returncode == 0
    data = site.parent / "data" / "ring" / "main" / "data.mdb"
    raw = bytearray(data.read_bytes())
    raw[raw.rindex(b"EWB1") + 70] ^= 1
    data.write_bytes(raw)
    found = edgewater("doctor", "--config", site)
    assert (found.returncode, "BAD " in found.stdout) == (1, True), found.stdout
    folder = DataFolder.open(site.parent / "data", create=False)
    with folder.lock("ingest-main"):
        refused(edgewater("doctor", "--repair", "--config", site), 3, "another ingest-main process")
    folder.close()
    mended = edgewater("doctor", "--repair", "--config", site)
    assert mended.returncode == 0, mended.stdout
    assert "samples 0 to 0 are lost" in mended.stdout
    assert json.loads(edgewater("ring", "info", "--json", "--config", site).stdout)["lost"] == 1
    assert "was nothing to mend" in edgewater("doctor", "--repair", "--config", site).stdout


def test_init_writes_a_configuration_that_is_right_and_overwrites_none(tmp_path: Path) -> None:
    path = tmp_path / "edgewater.toml"
    assert edgewater("init", path).returncode == 0
    assert edgewater("config", "check", "--config", path).returncode == 0
    before = path.read_text()
    refused(edgewater("init", path), 3, "--force")
    assert path.read_text() == before


def test_captures_record_and_move_nothing(site: Path) -> None:
    """The run after it reads the same events."""
    out = site.parent / "captures"
    done = edgewater("capture", "--out", out, "--max-events", 2, "--config", site, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["lines"] == 2
    assert len(list(out.iterdir())) == 1
    assert edgewater("ingest", "--finite", "--config", site).returncode == 0
    assert json.loads(edgewater("status", "--json", "--config", site).stdout)["events"] == 2


def test_a_terminated_ingest_ends_well_though_its_source_has_more(site: Path) -> None:
    """What waits in the queue is committed, the rest of two million lines is not read first."""
    with (site.parent / "events.jsonl").open("w") as file:
        for n in range(1_500_000):
            file.write(f'{{"kind":"reading","ts":{n},"values":{{"p":{n}}}}}\n')
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "ingest", "--config", str(site)], cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    data = site.parent / "data" / "ring" / "main" / "data.mdb"
    deadline = time.monotonic() + 60
    while not data.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    told = json.loads(edgewater("status", "--json", "--config", site).stdout)
    assert 0 < told["events"] < 1_500_000
