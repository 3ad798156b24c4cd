"""A folder into which a file comes for each few events, as gateways drop them."""

from __future__ import annotations

from pathlib import Path

from pipeline.sources.files import FilesConnector
from pipeline.sources.inbox import Connector
from tests.contract.world_files import FileWorld

__all__ = ["make"]

EVENTS_A_FILE = 50


class _Inbox(FileWorld):
    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        super().__init__(folder / "000000.jsonl")
        self._written = 0

    def connector(self) -> Connector:
        return FilesConnector("site", str(self.path.parent))

    def send_raw(self, data: bytes) -> None:
        self.path = self.path.with_name(f"{self._written // EVENTS_A_FILE:06}.jsonl")
        self._written += 1
        super().send_raw(data)


def make(folder: Path) -> FileWorld:
    """A folder with an empty file."""
    return _Inbox(folder / "inbox")
