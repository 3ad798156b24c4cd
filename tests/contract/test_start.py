"""Ingest that cannot begin: what began before is ended in order."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline import config
from pipeline.ingest import IngestOptions, ingest
from pipeline.sources.files import FilesConnector
from pipeline.sources.inbox import Inbox
from storage.folder import DataFolder


class Refused(FilesConnector):
    """A source that cannot be read, as where a port is taken."""

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None:
        raise OSError("the port is taken")


def test_where_a_source_cannot_begin_those_before_it_are_stopped(tmp_path: Path, tiny_model: Path) -> None:
    """Else each try to begin again would leave a child of journalctl, or a session at a broker."""
    data = tmp_path / "data"
    settings = config.load(None, (f'data_dir="{data}"',), require_sources=False)
    folder = DataFolder.open(data, create=True)
    good = FilesConnector("good", str(tmp_path / "*.jsonl"))
    bad = Refused("bad", str(tmp_path / "*.jsonl"))
    with pytest.raises(OSError, match="the port is taken"):
        ingest(settings, folder, tiny_model, [good, bad], IngestOptions(), threading.Event())
    folder.close()
    assert good.name not in {thread.name for thread in threading.enumerate()}
