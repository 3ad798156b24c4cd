"""A file of JSON lines that grows."""

from __future__ import annotations

from pathlib import Path

from pipeline.sources.files import FilesConnector
from pipeline.sources.inbox import Connector

__all__ = ["make"]


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._path = folder / "events.jsonl"
        self._path.touch()

    def connector(self) -> Connector:
        return FilesConnector("site", str(self._path), finite=False)

    def ready(self) -> None:
        """A file waits."""

    def send(self, number: int) -> bytes:
        text = b'"event %d"' % number
        self.send_raw(b'{"kind":"text","text":%s}' % text)
        return text

    def send_raw(self, data: bytes) -> None:
        with self._path.open("ab") as file:
            file.write(data + b"\n")

    def cut(self) -> None: ...

    def mend(self) -> None: ...

    def close(self) -> None: ...


def make(folder: Path) -> _Folder:
    """A folder with one file."""
    return _Folder(folder)
