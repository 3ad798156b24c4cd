"""A process of a gateway: told to stop by a signal, or by the end of its supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.roles import stop_on_signals

CHILD = """
import os, sys, time
from pathlib import Path
from pipeline.roles import stop_on_signals
with stop_on_signals() as stop:
    Path(sys.argv[1]).touch()
    Path(sys.argv[2]).write_text(str(stop.wait(30)))
"""
SUPERVISOR = """
import os, subprocess, sys, time
os.environ["EDGEWATER_SUPERVISOR"] = str(os.getpid())
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
time.sleep(60)
"""


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 20
    while not path.exists() or (path.name == "end" and not path.read_text()):
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.02)
    return path.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_to_stop_and_the_second_is_obeyed(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.wait(5)
        assert signal.getsignal(number) is signal.SIG_DFL
    assert signal.getsignal(number) is before


def test_an_orphan_stops_though_nobody_reads_what_it_says(tmp_path: Path) -> None:
    """The supervisor was killed, and with it whoever read their standard error."""
    start, end = tmp_path / "start", tmp_path / "end"
    words = [sys.executable, "-c", SUPERVISOR, CHILD, str(start), str(end)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as supervisor:
        wait_for(start)
        supervisor.kill()
    assert wait_for(end) == "True"
