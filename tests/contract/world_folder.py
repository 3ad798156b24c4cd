"""A folder into which a file comes for each few events, as gateways drop them."""

from __future__ import annotations

from pathlib import Path

from pipeline.sources.files import FilesConnector
from pipeline.sources.inbox import Connector

__all__ = ["make"]

EVENTS_A_FILE = 50


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder / "inbox"
        self._folder.mkdir()
        self._written = 0

    def connector(self) -> Connector:
        return FilesConnector("site", str(self._folder))

    def ready(self) -> None:
        """A folder waits."""

    def send(self, number: int) -> bytes:
        text = b'"event %d"' % number
        self.send_raw(b'{"kind":"text","text":%s}' % text)
        return text

    def send_raw(self, data: bytes) -> None:
        with (self._folder / f"{self._written // EVENTS_A_FILE:06}.jsonl").open("ab") as file:
            file.write(data + b"\n")
        self._written += 1

    def cut(self) -> None: ...

    def mend(self) -> None: ...

    def close(self) -> None: ...


def make(folder: Path) -> _Folder:
    """An empty folder."""
    return _Folder(folder)
