"""Processes that run on one data folder again and again, for tests that kill them or let calls fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash import ingest_chain, publish_chain
from tests.crash.lives import Lives, cannot_trace


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := cannot_trace():
        pytest.skip(reason)
    return tmp_path_factory.mktemp("lives")


@pytest.fixture(scope="module")
def ingests(scratch: Path) -> Iterator[Lives]:
    with Lives(ingest_chain.PROGRAM, scratch) as lives:
        yield lives


@pytest.fixture(scope="module")
def trainers(scratch: Path) -> Iterator[Lives]:
    with Lives(publish_chain.PROGRAM, scratch) as lives:
        yield lives
