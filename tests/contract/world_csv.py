"""A CSV file that grows, with a header that maps its columns."""

from __future__ import annotations

from pathlib import Path

from pipeline.format_settings import CsvFormat
from pipeline.sources.csv_rows import CsvPlan, CsvRows
from pipeline.sources.files import FilesConnector
from pipeline.sources.inbox import Connector

__all__ = ["make"]

SETTINGS = CsvFormat(
    delimiter=";",
    decimal=",",
    time="Zeit",
    time_format="%d.%m.%Y %H:%M:%S",
    time_zone="Europe/Berlin",
    map={"Druck [bar]": "pressure", "Nummer": "number"},
)


class _Log:
    def __init__(self, folder: Path) -> None:
        self._path = folder / "pump.csv"
        self._path.write_text("Zeit;Druck [bar];Nummer;Bemerkung\n", "utf-8")
        self._plan = CsvPlan(SETTINGS)

    def connector(self) -> Connector:
        return FilesConnector("site", str(self._path), lambda: CsvRows(self._plan))

    def ready(self) -> None:
        """A file waits."""

    def send(self, number: int) -> bytes:
        self.send_raw(b'24.11.2025 08:15:00;"3,5";%d;"ok; checked"' % number)
        return b'"number":%d.0}' % number

    def send_raw(self, data: bytes) -> None:
        with self._path.open("ab") as file:
            file.write(data + b"\n")

    def cut(self) -> None: ...

    def mend(self) -> None: ...

    def close(self) -> None: ...


def make(folder: Path) -> _Log:
    """A folder with one file."""
    return _Log(folder)
