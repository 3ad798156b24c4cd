"""A real journal, written by systemd-journal-remote as if another machine had sent it."""

from __future__ import annotations

import contextlib
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from pipeline.source_settings import JournalSource
from pipeline.sources.inbox import Connector
from pipeline.sources.journal import JournalConnector

__all__ = ["REMOTE", "Journal", "make"]

REMOTE = "/lib/systemd/systemd-journal-remote"


class Journal:
    """A folder with one journal file that grows.

    Attributes:
        folder: Where the file is.
        settings: What a connector to it needs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "journal"
        self.folder.mkdir()
        self.settings = JournalSource(directory=str(self.folder), since="all")
        self._boot = uuid.uuid4().hex
        self._last_us = 0
        self._sent = 0
        self._open("a")

    def _open(self, name: str) -> None:
        path = self.folder / f"{name}.journal"
        self._writer = subprocess.Popen(
            [REMOTE, "-o", str(path), "-"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        _until(path.exists)  # it finds its file by name, which a test may move

    def connector(self) -> Connector:
        return JournalConnector("site", self.settings)

    def ready(self) -> None:
        """What was written is found, whenever."""

    def flush(self) -> None:
        """Wait until the last entry can be read."""
        command = ["journalctl", f"--directory={self.folder}", "--output=export", "--lines=1"]
        last = f"__REALTIME_TIMESTAMP={self._last_us}\n".encode()
        _until(lambda: last in subprocess.run(command, capture_output=True, timeout=10, check=False).stdout)

    def write(self, message: bytes, **fields: str) -> None:
        """Append an entry in the export format; binary fields carry their length."""
        self._sent += 1
        self._last_us = max(int(1e6 * time.time()), self._last_us + 1)
        wanted = {"SYSLOG_IDENTIFIER": "app", "PRIORITY": "6", "_SYSTEMD_UNIT": "app.service", **fields}
        head = {
            "__REALTIME_TIMESTAMP": str(self._last_us),
            "__MONOTONIC_TIMESTAMP": str(1_000_000 + self._sent),
            "_BOOT_ID": self._boot,
            "_MACHINE_ID": self._boot,
        }
        entry = b"".join(f"{name}={value}\n".encode() for name, value in {**head, **wanted}.items())
        entry += b"MESSAGE\n" + len(message).to_bytes(8, "little") + message + b"\n\n"
        assert self._writer.stdin is not None
        self._writer.stdin.write(entry)
        self._writer.stdin.flush()

    def send(self, number: int) -> bytes:
        text = b"event %d." % number
        self.write(text)
        return text

    def send_raw(self, data: bytes) -> None: ...

    def reboot(self) -> None:
        """What comes next is of another boot."""
        self._boot = uuid.uuid4().hex

    def vacuum(self) -> None:
        """Begin a new file and delete what was written so far."""
        before = list(self.folder.iterdir())
        self.close()
        for path in before:
            path.unlink()
        self._open(f"b{self._sent}")

    def cut(self) -> None:
        """Move the folder away; what writes into its file goes on."""
        self.folder.rename(self.folder.with_suffix(".away"))

    def mend(self) -> None:
        self.folder.with_suffix(".away").rename(self.folder)

    def close(self) -> None:
        assert self._writer.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._writer.stdin.close()
        self._writer.wait(10)


def _until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not happens():
        assert time.monotonic() < deadline, "systemd-journal-remote wrote nothing"
        time.sleep(0.01)


def make(folder: Path) -> Journal:
    """An empty journal."""
    return Journal(folder)
