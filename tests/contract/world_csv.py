"""A CSV file that grows, with a header that maps its columns."""

from __future__ import annotations

from pathlib import Path

from pipeline.format_settings import CsvFormat
from pipeline.sources.csv_rows import CsvPlan, CsvRows
from pipeline.sources.files import FilesConnector
from pipeline.sources.inbox import Connector
from tests.contract.world_files import FileWorld

__all__ = ["make"]

SETTINGS = CsvFormat(
    delimiter=";",
    decimal=",",
    time="Zeit",
    time_format="%d.%m.%Y %H:%M:%S",
    time_zone="Europe/Berlin",
    map={"Druck [bar]": "pressure", "Nummer": "number"},
)


class _Table(FileWorld):
    _plan = CsvPlan(SETTINGS)

    def connector(self) -> Connector:
        return FilesConnector("site", str(self.path), lambda: CsvRows(self._plan))

    def send(self, number: int) -> bytes:
        self.send_raw(b'24.11.2025 08:15:00;"3,5";%d;"ok; checked"' % number)
        return b'"number":%d.0}' % number


def make(folder: Path) -> FileWorld:
    """A folder with one file."""
    return _Table(folder / "pump.csv", b"Zeit;Druck [bar];Nummer;Bemerkung\n")
