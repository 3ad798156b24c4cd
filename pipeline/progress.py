"""Progress of long work: one line that is redrawn on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from typing import Any, TextIO

__all__ = ["Progress", "describe"]

BAR_CELLS = 24
PLAIN_EVERY_S = 10.0


class Progress:
    """Shows what is going on; safe to call from several threads.

    Args:
        stream: Where to write; standard error, so that standard output stays data.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._lock = threading.Lock()
        self._drawn = ""
        self._printed_at = 0.0

    def show(self, label: str, done: float, detail: str = "") -> None:
        """Redraw the line.

        Args:
            label: What is being done.
            done: Share that is done, 0 to 1; below 0 where it is unknown.
            detail: Numbers behind the bar.
        """
        with self._lock:
            if self._terminal:
                self._redraw(f"{label:<22} {_bar(done)} {detail}")
            elif not self._printed_at or time.monotonic() - self._printed_at > PLAIN_EVERY_S:
                share = f" {100 * done:.0f} %" if done >= 0 else ""
                print(f"{label}{share} {detail}".rstrip(), file=self._stream, flush=True)
                self._printed_at = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        with self._lock:
            self._redraw("")
            print(text, file=self._stream, flush=True)

    def clear(self) -> None:
        """Take the redrawn line away."""
        with self._lock:
            self._redraw("")

    def _redraw(self, text: str) -> None:
        if not self._terminal or text == self._drawn:
            return
        width = shutil.get_terminal_size().columns - 1
        self._stream.write("\r\x1b[K" + text[:width])
        self._stream.flush()
        self._drawn = text


def _bar(done: float) -> str:
    if done < 0:
        return " " * (BAR_CELLS + 7)
    full = round(min(done, 1.0) * BAR_CELLS)
    return f"[{'#' * full}{'.' * (BAR_CELLS - full)}] {100 * min(done, 1.0):3.0f} %"


def describe(report: dict[str, Any]) -> tuple[float, str]:
    """Share done and words for what a running update reports."""
    steps = report.get("steps") or 0
    step = report.get("step") or 0
    words = str(report.get("phase", ""))
    if steps:
        words += f" step {step}/{steps}"
    if report.get("loss") is not None:
        words += f" loss {report['loss']:.2f}"
    return (step / steps if steps else -1.0), words
