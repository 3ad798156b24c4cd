"""Connectors with their real outside, so that the same checks run on each: a broker, a server, a folder.

What differs between kinds (a file has positions, a broker redelivers, a poller sees only the present) is said
by a kind's attributes; a check that cannot apply to a kind is not run on it.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from pipeline.sources.inbox import Connector

__all__ = ["WORLDS", "World", "WorldKind"]


class World(Protocol):
    """One outside, running."""

    def connector(self) -> Connector:
        """A connector to it, as ingest would make it; called again for each restart."""

    def ready(self) -> None:
        """Wait until the connector that runs would see what is sent now."""

    def send(self, number: int) -> bytes:
        """Make event `number` happen outside. Returns: a text that the line of this event, and no other,
        holds (see `tests.sources.Reader.data`)."""

    def send_raw(self, data: bytes) -> None:
        """Send bytes that are no event; only where `takes_raw`."""

    def cut(self) -> None:
        """Cut the connection; what is sent meanwhile waits outside, where it can."""

    def mend(self) -> None:
        """Let connections through again."""

    def close(self) -> None:
        """End the outside."""


class WorldKind(msgspec.Struct, frozen=True):
    """How to make a world.

    Attributes:
        name: For test ids.
        module: Under tests.contract; it has `make(folder) -> World`.
        needs: Programs it cannot do without: the tests are skipped where one is missing.
        resumes: Whether what was handed over but not committed comes again after a kill; False where the
            outside cannot repeat itself (a request that its client gave up, polled values).
        networked: Whether the connection can be cut.
        takes_raw: Whether any bytes can be sent through it (a register takes no text).
    """

    name: str
    module: str
    needs: tuple[str, ...] = ()
    resumes: bool = True
    networked: bool = True
    takes_raw: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def missing(self) -> str:
        """The first program that is not installed, "" if all are."""
        return next((name for name in self.needs if shutil.which(name) is None), "")

    def make(self, folder: Path) -> World:
        """Start the outside; its files lie in `folder`."""
        make: Callable[[Path], World] = importlib.import_module(f"tests.contract.{self.module}").make
        return make(folder)


WORLDS: list[WorldKind] = [
    WorldKind("files", "world_files", networked=False),
    WorldKind("csv", "world_csv", networked=False),
    WorldKind("lines", "world_lines", networked=False),
    WorldKind("folder", "world_folder", networked=False),
    WorldKind(
        "journal",
        "world_journal",
        needs=("journalctl", "/lib/systemd/systemd-journal-remote"),
        takes_raw=False,
    ),
    WorldKind("http", "world_http", resumes=False, networked=False),
    WorldKind("mqtt", "world_mqtt", needs=("mosquitto",)),
    WorldKind("modbus", "world_modbus", resumes=False, takes_raw=False),
    WorldKind("opcua", "world_opcua", resumes=False, takes_raw=False),
]
