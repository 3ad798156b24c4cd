"""A file of JSON lines that grows; other worlds of files differ in what a line is, or where it goes."""

from __future__ import annotations

from pathlib import Path

from pipeline.sources.files import FilesConnector
from pipeline.sources.inbox import Connector

__all__ = ["FileWorld", "make"]


class FileWorld:
    """One file, of JSON lines.

    Args:
        path: The file.
        head: What it begins with.
    """

    def __init__(self, path: Path, head: bytes = b"") -> None:
        self.path = path
        self.path.write_bytes(head)

    def connector(self) -> Connector:
        """As ingest makes it."""
        return FilesConnector("site", str(self.path), finite=False)

    def ready(self) -> None:
        """A file waits."""

    def send(self, number: int) -> bytes:
        """Write an event."""
        text = b'"event %d"' % number
        self.send_raw(b'{"kind":"text","text":%s}' % text)
        return text

    def send_raw(self, data: bytes) -> None:
        """Write a line."""
        with self.path.open("ab") as file:
            file.write(data + b"\n")

    def cut(self) -> None:
        """There is nothing to cut."""

    def mend(self) -> None:
        """Nor to mend."""

    def close(self) -> None:
        """Nor to end."""


def make(folder: Path) -> FileWorld:
    """A folder with one file."""
    return FileWorld(folder / "events.jsonl")
