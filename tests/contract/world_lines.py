"""A log whose lines fit a pattern."""

from __future__ import annotations

from pathlib import Path

from pipeline.format_settings import PatternFormat
from pipeline.sources.files import FilesConnector
from pipeline.sources.inbox import Connector
from pipeline.sources.patterns import LinePlan, PatternLines
from tests.contract.world_files import FileWorld

__all__ = ["make"]

SETTINGS = PatternFormat(
    regex=r"(?P<ts>\S++) (?:[A-Z]++ )?\[(?P<source>[^\]]*+)\] (?P<text>.*)",
    time_zone="UTC",
)


class _Log(FileWorld):
    _plan = LinePlan(SETTINGS)

    def connector(self) -> Connector:
        return FilesConnector("site", str(self.path), lambda: PatternLines(self._plan))

    def send(self, number: int) -> bytes:
        self.send_raw(b"2025-11-24T08:15:00 WARN [pump-1] \x1b[31mseal %d.\x1b[0m leaks" % number)
        return b"seal %d." % number


def make(folder: Path) -> FileWorld:
    """A folder with one log."""
    return _Log(folder / "app.log")
