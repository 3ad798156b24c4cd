"""`edgewater ring` from outside: look, back up while ingest runs, restore, go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.folder import DataFolder
from storage.registry import Registry, UpdateRow, UpdateState
from storage.ring import Ring

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
EVENTS = 500


def edgewater(*words: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, words)],
        input=stdin, capture_output=True, cwd="/", env=ENV, timeout=100, check=False,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[bytes], code: int, *words: str) -> None:
    assert (done.returncode, done.stdout) == (code, b""), done.stderr
    for word in words:
        assert word in done.stderr.decode()


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path) -> Path:
    """A gateway that has ingested some readings into windows of 100 samples."""
    lines = "".join(f'{{"kind":"reading","ts":{n},"values":{{"p":{n}}}}}\n' for n in range(EVENTS))
    (tmp_path / "events.jsonl").write_text(lines)
    path = tmp_path / "edgewater.toml"
    path.write_text(
        f'data_dir = "data"\nmodel.path = "{tiny_model}"\nring.max_bytes = "16MiB"\nhealth.listen = ""\n'
        'trigger.min_samples = 100\n[[sources]]\nname = "pump"\nkind = "files"\npath = "events.jsonl"\n'
    )
    done = edgewater("ingest", "--finite", "--config", path)
    assert done.returncode == 0, done.stderr
    return path


def told(verb: str, site: Path, *words: object) -> dict[str, object]:
    """What a verb says as JSON."""
    done = edgewater(*verb.split(), "--json", *words, "--config", site)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


def test_info_tells_how_the_ring_stands(site: Path) -> None:
    info = told("ring info", site)
    assert (info["first_seq"], info["next_seq"], info["samples"]) == (0, EVENTS, EVENTS)
    assert (info["map_bytes"], info["closed_windows"], info["open_window"]) == (16 << 20, 5, 6)
    assert info["blocks"] and info["block_bytes"] == pytest.approx(info["bytes_a_sample"] * EVENTS)  # type: ignore[operator]
    text = edgewater("ring", "info", "--config", site).stdout.decode()
    assert f"samples      {EVENTS}, seqs 0 to {EVENTS - 1}" in text


def test_a_restored_ring_goes_on_where_the_backup_ended(site: Path, tmp_path: Path) -> None:
    """In a data folder of its own: same digest, same windows; nothing is stored again, new events are."""
    backup, other = tmp_path / "backup.ring", f'data_dir="{tmp_path / "restored"}"'
    assert told("ring export", site, backup)["samples"] == EVENTS
    assert backup.stat().st_mode & 0o777 == 0o600
    made = told("ring import", site, backup, "--set", other)
    assert (made["first_seq"], made["next_seq"], made["left_out"], made["window"]) == (0, EVENTS, 0, 6)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"kind":"reading","ts":1e6,"values":{"p":7}}\n')
    for words in ([], ["--set", other]):
        assert edgewater("ingest", "--finite", "--config", site, *words).returncode == 0
    before, after = told("status", site), told("status", site, "--set", other)
    assert before["samples"] == after["samples"] == EVENTS + 1
    assert before["ring_digest"] == after["ring_digest"]


def test_an_export_goes_through_pipes(site: Path, tmp_path: Path) -> None:
    """To a program that encrypts it or a host that keeps it, and back."""
    done = edgewater("ring", "export", "-", "--config", site)
    assert done.returncode == 0
    assert f"{EVENTS} samples" in done.stderr.decode()
    made = edgewater(
        "ring", "import", "-", "--config", site, "--set", f'data_dir="{tmp_path / "b"}"', stdin=done.stdout
    )
    assert made.returncode == 0, made.stderr
    assert b"window 6 is open" in made.stdout
    assert sorted(p.name for p in (tmp_path / "b" / "ring").iterdir()) == ["main"]


def test_an_export_into_a_pipe_that_breaks_is_a_failed_one(site: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "ring", "export", "-", "--config", str(site)],
        cwd="/", env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.wait(60) == 1
    assert b"it is not complete" in process.stderr.read()
    process.stderr.close()


def test_a_folder_that_has_a_ring_or_is_in_use_is_refused(site: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup.ring"
    told("ring export", site, backup)
    refused(edgewater("ring", "import", backup, "--config", site), 3, "there is a ring already", "data_dir")
    folder = DataFolder.open(tmp_path / "busy", create=True)
    with folder.lock("ingest-main"):
        busy = edgewater("ring", "import", backup, "--config", site, "--set", f'data_dir="{folder.path}"')
    folder.close()
    refused(busy, 3, "another ingest-main process")


def test_a_damaged_file_and_wrong_usage_are_refused_with_what_to_do(site: Path, tmp_path: Path) -> None:
    backup, other = tmp_path / "backup.ring", f'data_dir="{tmp_path / "b"}"'
    told("ring export", site, backup)
    backup.write_bytes(backup.read_bytes()[:-100])
    words = ("ring", "import", backup, "--config", site, "--set", other)
    refused(edgewater(*words), 3, "cut short at byte", "export it again")
    assert not (tmp_path / "b" / "ring" / "main").exists()
    refused(edgewater(*words, "--max-bytes", "much"), 2, "--max-bytes: a size is")
    refused(edgewater("ring", "import", tmp_path / "none", "--config", site), 2, "none")
    refused(edgewater("ring", "info", "--config", site, "--set", other), 3, "no ring here yet")
    refused(edgewater("ring", "export", tmp_path, "--config", site), 2, "directory")


def test_an_older_backup_gives_no_window_number_twice(site: Path, tmp_path: Path) -> None:
    """The registry beside it has decided more windows than the backup closed."""
    backup = tmp_path / "backup.ring"
    told("ring export", site, backup)
    folder = DataFolder.open(tmp_path / "data", create=False)
    with Registry.open_or_create(folder.registry) as registry, registry.write() as writer:
        writer.put_update(UpdateRow("main", 9, 9, 800, 899, 100, UpdateState.SKIPPED))
    folder.close()
    (tmp_path / "data" / "ring" / "main").rename(tmp_path / "lost")
    made = told("ring import", site, backup)
    assert (made["window"], made["next_seq"], made["lost"]) == (10, 900, 400)
    assert told("ring info", site)["lost"] == 400
    assert edgewater("ingest", "--finite", "--config", site).returncode == 0


def test_a_backup_of_a_running_gateway_is_whole(site: Path, tmp_path: Path) -> None:
    """Taken while ingest commits as fast as it can: every block is right, the counts agree."""
    with (tmp_path / "events.jsonl").open("a") as file:
        for n in range(EVENTS, 1_000_000):
            file.write(f'{{"kind":"reading","ts":{n},"values":{{"p":{n}}}}}\n')
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "ingest", "--config", str(site)], cwd="/", env=ENV
    )
    try:
        deadline = time.monotonic() + 60
        while told("ring info", site)["next_seq"] == EVENTS:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        made = [told("ring export", site, tmp_path / f"{n}.ring") for n in range(2)]
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(30)
    assert made[0]["next_seq"] < made[1]["next_seq"]  # type: ignore[operator]
    for n, done in enumerate(made):
        told("ring import", site, tmp_path / f"{n}.ring", "--set", f'data_dir="{tmp_path / str(n)}"')
        with Ring.open_reader(tmp_path / str(n) / "ring" / "main") as ring:
            state = ring.read_state()
            assert (state.tail_seq, state.next_seq) == (done["first_seq"], done["next_seq"])
            assert [problem for _, problem in ring.check_blocks() if problem] == []
            assert state.counters["samples"] == state.next_seq
            assert ring.windows()[-1].last_seq < state.next_seq


def test_each_shard_is_looked_at_exported_and_imported_as_itself(site: Path, tmp_path: Path) -> None:
    """A second source makes a second ring; its backup does not become another shard's ring."""
    with site.open("a") as file:
        file.write('[ingest]\nprocesses = 2\n[[sources]]\nname = "two"\nkind = "files"\npath = "two.jsonl"\n')
    (tmp_path / "two.jsonl").write_text('{"kind":"reading","ts":1,"values":{"p":1}}\n')
    done = edgewater("ingest", "--finite", "--shard", "2", "--config", site)
    assert done.returncode == 0, done.stderr
    assert told("ring info", site)["samples"] == EVENTS
    assert told("ring info", site, "--shard", "2")["samples"] == 1
    backup = tmp_path / "backup"
    assert told("ring export", site, backup, "--shard", "shard-2")["samples"] == 1
    into = ("--set", f"data_dir={tmp_path / 'new'}", "--config", site)
    refused(edgewater("ring", "import", backup, *into), 3, "--shard shard-2")
    done = edgewater("ring", "import", backup, "--shard", "2", *into)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "new" / "ring").iterdir()) == ["shard-2"]
    refused(edgewater("ring", "info", "--shard", "../main", "--config", site), 2, "expected the number")
