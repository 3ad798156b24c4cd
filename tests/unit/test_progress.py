"""Progress: redrawn on a terminal, few plain lines elsewhere."""

from __future__ import annotations

import io
import time

import pytest

from pipeline.progress import Progress, describe


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_one_line_redrawn_and_words_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    shown = Progress(out)
    shown.show("stream", 0.25, "10 of 40 events")
    shown.show("stream", 0.25, "10 of 40 events")
    shown.say("window 1 promoted")
    shown.show("window 2", -1.0, "scoring")
    shown.clear()
    parts = out.getvalue().split("\r\x1b[K")
    assert parts[1] == f"{'stream':<22} [{'#' * 6}{'.' * 18}]  25 % 10 of 40 events"
    assert parts[2] == "window 1 promoted\n"
    assert parts[3].split() == ["window", "2", "scoring"]
    assert parts[4] == ""
    assert len(parts) == 5


def test_a_line_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    out = Terminal()
    Progress(out).show("stream", 2.0, "x" * 100)
    assert len(out.getvalue().removeprefix("\r\x1b[K")) == 29


def test_elsewhere_a_line_comes_every_ten_seconds_whatever_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays is said at once."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    shown = Progress(out)
    for share in (0.1, 0.2, 0.3):
        shown.show("stream", share, "events")
        now[0] += 6
    shown.show("model", -1.0)
    now[0] += 6
    shown.show("model", -1.0)
    shown.say("done")
    shown.clear()
    assert out.getvalue().splitlines() == ["stream 10 % events", "stream 30 % events", "model", "done"]


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"phase": "train", "step": 5, "steps": 20, "loss": 1.23456}, (0.25, "train step 5/20 loss 1.23")),
        ({"phase": "load"}, (-1.0, "load")),
        ({}, (-1.0, "")),
        ({"phase": "gate", "steps": None, "loss": None}, (-1.0, "gate")),
    ],
)
def test_a_running_update_is_described(report: dict[str, object], expected: tuple[float, str]) -> None:
    assert describe(report) == expected
