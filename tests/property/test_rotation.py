"""Any mixture of writes, rotations and restarts: every line of every file exactly once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sources import files as files_module
from pipeline.sources.files import FilesConnector
from tests.sources import Reader

KEPT = 3  # generations


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    before, files_module.POLL_S = files_module.POLL_S, 0.002
    yield
    files_module.POLL_S = before


class Site:
    """A log that somebody writes and rotates, and a connector that reads it."""

    def __init__(self, home: Path, pattern: str) -> None:
        self.log = home / "app.log"
        self.pattern = f"{home}/{pattern}"
        self.written: list[bytes] = []
        self.read: list[bytes] = []
        self.reader = Reader(FilesConnector("site", self.pattern))

    def write(self, count: int) -> None:
        with self.log.open("ab") as file:
            for _ in range(count):
                line = b'{"line":%d}' % len(self.written)
                self.written.append(line)
                file.write(line + b"\n")

    def rename(self) -> None:
        """As logrotate does: the oldest generation is deleted, each other gets the next number."""
        if not self.log.exists():
            return
        generations = [self.log.with_suffix(f".log.{n}") for n in range(1, KEPT + 1)]
        for older, newer in zip(reversed(generations), [*reversed(generations[:-1]), self.log], strict=True):
            if newer.exists():
                newer.rename(older)
        self.log.touch()

    def copytruncate(self) -> None:
        if self.log.exists():
            shutil.copy(self.log, self.log.with_suffix(".log.1"))
            self.log.write_bytes(b"")

    def restart(self) -> None:
        """What was handed over and not taken is not committed: it comes again."""
        self.reader.stop()
        self.read += self.reader.data
        self.reader = Reader(FilesConnector("site", self.pattern), self.reader.positions)

    def catch_up(self) -> None:
        self.reader.until(lambda: len(self.read) + len(self.reader.lines) >= len(self.written))

    def check(self) -> None:
        self.catch_up()
        found = self.read + self.reader.settle(0.03)
        assert sorted(found) == sorted(self.written)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 30)),
        st.tuples(st.sampled_from(["rotate", "restart", "take", "catch up"]), st.just(0)),
    ),
    max_size=14,
)


def play(site: Site, step: str, count: int, rotate: str) -> None:
    match step:
        case "write":
            site.write(count)
        case "rotate":
            getattr(site, rotate)()
        case "restart":
            site.restart()
        case "take":
            site.reader.take()
        case _:
            site.catch_up()


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_renamed_files_that_still_match_are_read_once(steps: list[tuple[str, int]]) -> None:
    """The pattern names all generations; none is missed, however fast they follow each other, unless it is
    deleted before anybody looked."""
    with tempfile.TemporaryDirectory() as home:
        site, rotations = Site(Path(home), "app.log*"), 0
        for step, count in steps:
            rotations += step == "rotate"
            if step == "rotate" and rotations % KEPT == 0:
                site.catch_up()
            play(site, step, count, "rename")
        site.check()
        site.reader.stop()


@settings(max_examples=40, deadline=None)
@given(STEPS, st.sampled_from(["rename", "copytruncate"]))
def test_a_followed_log_is_read_once_through_rotations(steps: list[tuple[str, int]], rotate: str) -> None:
    """The pattern names the log alone: one file after the other, what was not read before a rotation too.

    But a content of which nothing was read before the next rotation is not known to have been."""
    with tempfile.TemporaryDirectory() as home:
        site, unknown = Site(Path(home), "app.log"), True
        for step, count in steps:
            if step == "rotate" and unknown:
                site.catch_up()
            play(site, step, count, rotate)
            unknown = step == "rotate" or (unknown and step != "catch up")
            unknown = unknown or site.log.stat().st_size == 0 if site.log.exists() else True
        site.check()
        assert site.read + site.reader.data == site.written
        site.reader.stop()
