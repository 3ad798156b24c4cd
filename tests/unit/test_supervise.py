"""The supervisor: what it restarts, what it gives up on, and how it ends what it started. Real processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import supervise
from pipeline.supervise import Child, Supervisor

# In the place of our command: what it is told to be, and a note of each start.
SCRIPT = """
import os, signal, sys, time
how = sys.argv[1:]
with open(f"starts-{how[0]}", "a") as file:
    print(os.getpid(), os.environ["EDGEWATER_SUPERVISOR"], os.getsid(0), file=file)
for word in how[1:]:
    if word == "hang":
        time.sleep(60)
    elif word == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif word == "gentle":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    elif word == "read":
        with open("heard", "ab") as file:
            file.write(os.read(0, 2))
    elif word.startswith("say:"):
        print(word[4:], flush=True)
    elif word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        sys.exit(int(word))
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__main__.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(supervise, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(supervise, "LONGEST_WAIT_S", 0.1)
    monkeypatch.setattr(supervise, "POLL_S", 0.01)
    monkeypatch.setattr(supervise, "STOP_S", 1.0)
    yield tmp_path


def child(name: str, *words: str, **more: Any) -> Child:
    return Child(name, [name, *words], **more)


def starts(name: str) -> list[list[int]]:
    path = Path(f"starts-{name}")
    return (
        [[int(word) for word in line.split()] for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )


def run(*children: Child, until: Any = lambda: False, seconds: float = 20.0) -> int:
    """Supervise until something holds; a test that would hang fails."""
    deadline = time.monotonic() + seconds

    def finished() -> bool:
        assert time.monotonic() < deadline, "it never ended"
        return bool(until())

    return Supervisor(children, threading.Event()).run(finished)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_child_that_is_done_is_not_started_again() -> None:
    one = child("one", "0")
    other = child("other", "hang")
    assert run(one, other, until=lambda: one.done and starts("other")) == 0
    assert len(starts("one")) == 1
    assert gone(starts("other")[0][0])


def test_a_child_that_has_no_end_of_its_own_is_started_again() -> None:
    """A trainer that somebody told to end: nothing would ever be decided again."""
    trainer = child("trainer", "0", ends=False)
    assert run(trainer, until=lambda: len(starts("trainer")) >= 3) == 0


@pytest.mark.parametrize("code", [2, 3])
def test_a_refusal_ends_everything_with_its_code(code: int) -> None:
    refused, other = child("refused", str(code)), child("other", "hang")
    assert run(refused, other) == code
    assert len(starts("refused")) == 1
    assert all(gone(pid) for pid, *_ in starts("other"))


def test_a_daemons_child_is_started_again_for_ever_with_longer_pauses() -> None:
    failing = child("failing", "1")
    began = time.monotonic()
    run(failing, until=lambda: len(starts("failing")) >= supervise.MAX_ERRORS + 2)
    assert time.monotonic() - began > 0.02 + 0.04 + 0.08 + 3 * 0.1


def test_a_finite_run_gives_up_on_an_error_that_keeps_coming_back() -> None:
    assert run(child("failing", "1", patient=False)) == 1
    assert len(starts("failing")) == supervise.MAX_ERRORS


def test_a_kill_from_outside_is_no_error_of_the_child() -> None:
    """Also of a finite run: a killed ingest loses nothing, and must be able to come back."""
    killed = child("killed", "die", patient=False)
    assert run(killed, until=lambda: len(starts("killed")) > supervise.MAX_ERRORS + 1) == 0


def test_a_life_long_enough_forgets_the_failures_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "HEALTHY_S", 0.0)
    failing = child("failing", "1", patient=False)
    run(failing, until=lambda: len(starts("failing")) > supervise.MAX_ERRORS + 1)


def test_stop_ends_the_gentle_at_once_and_the_deaf_by_force() -> None:
    stop = threading.Event()
    children = [child("gentle", "gentle", "hang"), child("deaf", "deaf", "hang")]

    def watch() -> None:
        if starts("gentle") and starts("deaf"):
            time.sleep(0.2)  # they set their handlers after their note
            stop.set()

    began = time.monotonic()
    assert Supervisor(children, stop).run(lambda: False, watch) == 0
    assert 1.0 < time.monotonic() - began < 10.0
    assert all(gone(starts(name)[0][0]) for name in ("gentle", "deaf"))


def test_children_end_also_when_the_supervisor_fails() -> None:
    def fail() -> None:
        if starts("other"):
            raise RuntimeError("progress broke")

    with pytest.raises(RuntimeError, match="progress"):
        Supervisor([child("other", "hang")], threading.Event()).run(lambda: False, fail)
    assert gone(starts("other")[0][0])


def test_children_know_their_supervisor_and_have_a_session_of_their_own() -> None:
    """A terminal's Ctrl-C must not reach them: they are ended in order."""
    one = child("one", "0")
    run(one, until=lambda: one.done)
    ((pid, supervisor, session),) = starts("one")
    assert (supervisor, session) == (os.getpid(), pid)


def test_reports_are_json_objects_and_nothing_else() -> None:
    told: list[dict[str, Any]] = []
    one = child("one", "say:warming up", "say:5", 'say:{"step": 1}', "say:[]", 'say:{"step": 2}', "0",
                reports=told.append)  # fmt: skip
    run(one, until=lambda: one.done and len(told) == 2)
    assert told == [{"step": 1}, {"step": 2}]


def test_a_restarted_child_reads_on_from_standard_input() -> None:
    """What the dead one had not read is still in the pipe."""
    before = os.dup(0)
    out, into = os.pipe()
    try:
        os.dup2(out, 0)
        os.write(into, b"abcdef")
        reader = child("reader", "read", "die", stdin=True)
        run(reader, until=lambda: Path("heard").exists() and len(Path("heard").read_bytes()) == 6)
    finally:
        os.dup2(before, 0)
        for end in (before, out, into):
            os.close(end)
    assert Path("heard").read_bytes() == b"abcdef"


def test_other_children_have_no_standard_input() -> None:
    one = child("one", "read", "0")
    run(one, until=lambda: one.done)
    assert Path("heard").read_bytes() == b""


def test_a_stop_that_comes_before_a_start_starts_nothing() -> None:
    stop = threading.Event()
    stop.set()
    assert Supervisor([child("one", "hang")], stop).run(lambda: False) == 0
    assert starts("one") == []


def test_a_child_is_told_to_end_by_sigterm() -> None:
    one = child("one", "hang")
    one.look(time.monotonic())
    while not starts("one"):
        time.sleep(0.01)
    one.terminate()
    assert one.wait(time.monotonic() + 5) == -signal.SIGTERM
