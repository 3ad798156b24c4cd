"""The demo as a new user meets it, with a tiny model in place of the embedded one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import report
from tests.e2e.stream import arguments, edgewater, environment

pytestmark = pytest.mark.slow


def test_a_demo_is_killed_resumed_finished_and_shown_again(tiny_model: Path, tmp_path: Path) -> None:
    """Killed, it goes on where it was; finished, it trains nothing and says so; --fresh starts over."""
    into = tmp_path / "demo"
    words = ["demo", "--data-dir", str(into), *arguments(tiny_model, "trigger.min_samples=900")]
    process = subprocess.Popen([sys.executable, "-m", "pipeline", *words], env=environment())
    state = into / "state"
    while not list((state / "updates").glob("main-000001")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    learned = json.loads(edgewater(*words, "--json").stdout)
    assert learned["events"] == 2_400
    assert [window["decision"] for window in learned["windows"]] == ["promoted"] * 2
    assert {"cmms", "weather-1"} == set(learned["windows"][-1]["by_source"])
    versions = sorted(path.name for path in (state / "versions").iterdir())

    shown = edgewater(*words).stdout.decode()
    assert "nothing is trained" in shown
    assert "--fresh starts over" in shown
    assert "promoted v2" in shown
    assert "adapted" in shown
    assert sorted(path.name for path in (state / "versions").iterdir()) == versions

    longer = edgewater(*words, "--all", check=False)
    assert longer.returncode == 2
    assert b"--fresh" in longer.stderr


def test_fresh_deletes_only_what_a_demo_made(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("the only copy")
    refused = edgewater("demo", "--fresh", "--data-dir", str(tmp_path), check=False)
    assert refused.returncode == 3
    assert (tmp_path / "thesis.txt").exists()


def test_the_readme_shows_what_a_demo_prints() -> None:
    """Its table has the columns of the real one, and no placeholder is left in it."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert " ".join(report.TABLE_HEAD) in " ".join(text.split())
    assert "DEMO_OUTPUT" not in text
