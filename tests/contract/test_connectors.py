"""What every connector promises: order, positions to go on from, a clean stop, bounded memory, bad input."""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
import tracemalloc
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import zstandard

from pipeline.capture import CaptureWriter
from pipeline.events import MAX_EVENT_BYTES, Line, Origin
from pipeline.format_settings import CsvFormat, PatternFormat
from pipeline.sources.csv_rows import CsvPlan, CsvRows
from pipeline.sources.files import FilesConnector
from pipeline.sources.inbox import QUEUE_BYTES, QUEUE_LINES, Connector, Inbox
from pipeline.sources.lines import READ_BYTES
from pipeline.sources.patterns import LinePlan, PatternLines
from pipeline.sources.replay import ReplayConnector
from pipeline.sources.stdin import StdinConnector
from tests.sources import Reader, reading

BAD = [
    b"not json", b"\xff\xfe\x00", b"{" * 1_000, b'{"kind":"text","text":"\\ud800"}', b"\x00", b"null",
    b"x" * (MAX_EVENT_BYTES + 1), "é".encode("latin-1"),
]  # fmt: skip


class Kind(NamedTuple):
    """A connector over given lines.

    Attributes:
        make: (folder, lines) -> a connector that reads them to their end; called again for a restart.
        resumes: Whether it has positions.
    """

    name: str
    make: Callable[[Path, list[bytes]], Connector]
    resumes: bool


def _file(folder: Path, lines: list[bytes], *, packed: bool = False) -> Path:
    path = folder / ("events.jsonl.zst" if packed else "events.jsonl")
    if not path.exists():
        data = b"".join(line + b"\n" for line in lines)
        path.write_bytes(zstandard.ZstdCompressor().compress(data) if packed else data)
    return path


def _csv(folder: Path, lines: list[bytes]) -> Connector:
    """Under a header, the texts of the events; what is no event has one cell too few, and is refused."""
    rows = [re.sub(rb'^{"kind":"text","text":"(\w*)"}$', rb"text|\1", line) for line in lines]
    plan = CsvPlan(CsvFormat(delimiter="|", text="what"))
    return FilesConnector(
        "site", str(_file(folder, [b"kind|what", *rows])), lambda: CsvRows(plan), finite=True
    )


def _log(folder: Path, lines: list[bytes]) -> Connector:
    """The events themselves as log lines, taken apart and made again; what is no event does not fit."""
    regex = r'{"kind":"text","text":"(?P<text>\w*)"}$'
    plan = LinePlan(PatternFormat(regex=regex, strip_control=False))
    return FilesConnector("site", str(_file(folder, lines)), lambda: PatternLines(plan), finite=True)


def _capture(folder: Path, lines: list[bytes]) -> Path:
    if not (folder / "capture").exists():
        with CaptureWriter(folder / "capture", gateway="g", config="c") as writer:
            for start in range(0, len(lines), 100):
                part = enumerate(lines[start : start + 100], start)
                writer.write([Line(data, n, Origin("site", "in", float(n))) for n, data in part])
    return next((folder / "capture").iterdir())


def _pipe(folder: Path, lines: list[bytes]) -> Connector:
    out, into = os.pipe()

    def write() -> None:
        with suppress(BrokenPipeError), os.fdopen(into, "wb") as file:
            file.writelines(line + b"\n" for line in lines)

    threading.Thread(target=write, daemon=True).start()
    return StdinConnector("site", out)


KINDS = [
    Kind("files", lambda at, lines: FilesConnector("site", str(_file(at, lines)), finite=True), True),
    Kind(
        "packed files",
        lambda at, lines: FilesConnector("site", str(_file(at, lines, packed=True)), finite=True),
        True,
    ),
    Kind("csv", _csv, True),
    Kind("log lines", _log, True),
    Kind("stdin", _pipe, False),
    Kind("replayed lines", lambda at, lines: ReplayConnector(_file(at, lines)), True),
    Kind("replayed capture", lambda at, lines: ReplayConnector(_capture(at, lines)), True),
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture(params=[kind for kind in KINDS if kind.resumes], ids=lambda kind: kind.name)
def resuming(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


def numbered(count: int, size: int = 0) -> list[bytes]:
    return [b'{"kind":"text","text":"%d%s"}' % (n, b"x" * size) for n in range(count)]


def test_every_line_comes_once_and_in_order(kind: Kind, tmp_path: Path) -> None:
    with reading(kind.make(tmp_path, numbered(20_000))) as reader:
        assert reader.to_end() == numbered(20_000)
    assert reader.inbox.fault is None


def test_malformed_lines_come_as_they_are(kind: Kind, tmp_path: Path) -> None:
    """To refuse is decode's; a connector neither drops nor mends, nor stops, and the next line is whole."""
    with reading(kind.make(tmp_path, [*BAD, b"last"])) as reader:
        assert reader.to_end() == [*BAD, b"last"]


def test_offsets_rise_within_an_input(kind: Kind, tmp_path: Path) -> None:
    """Or there are none at all."""
    with reading(kind.make(tmp_path, numbered(5_000))) as reader:
        reader.to_end()
    offsets = [line.offset for line in reader.lines]
    assert len({line.origin.input for line in reader.lines}) == 1
    assert offsets == sorted(set(offsets)) if kind.resumes else set(offsets) == {-1}


def test_reading_goes_on_after_any_chunk_that_was_committed(resuming: Kind, tmp_path: Path) -> None:
    """Stopped and made anew from the position, as after a crash: nothing twice, nothing lost."""
    lines, done = numbered(20_000), 0
    positions: Mapping[str, bytes] = {}
    while done < len(lines):
        with reading(resuming.make(tmp_path, lines), positions) as reader:
            for _ in range(5):
                reader.take()
            if not reader.lines:
                reader.to_end()
        assert reader.data == lines[done : done + len(reader.lines)]
        done += len(reader.lines)
        positions = reader.positions
    with reading(resuming.make(tmp_path, lines), positions) as reader:
        assert reader.to_end() == []


def test_chunks_that_were_not_committed_come_again(resuming: Kind, tmp_path: Path) -> None:
    """Handing over moves no position: only what the ring holds counts at the next start."""
    lines = numbered(5_000)
    with reading(resuming.make(tmp_path, lines)) as reader:
        reader.take()
        committed = dict(reader.positions)
        first = len(reader.lines)
        reader.to_end()
    with reading(resuming.make(tmp_path, lines), committed) as again:
        assert again.to_end() == lines[first:]


def test_positions_of_others_are_left_alone(resuming: Kind, tmp_path: Path) -> None:
    others = {"files:other:/a": b"junk", "mqtt:x": b"", "replay-2": b"junk", "files:site-2:/a": b"junk"}
    with reading(resuming.make(tmp_path, numbered(3)), others) as reader:
        assert reader.to_end() == numbered(3)
    assert {name: reader.positions[name] for name in others} == others


def test_it_stops_within_a_second_while_nobody_takes(kind: Kind, tmp_path: Path) -> None:
    """The queue is full and stays so: the thread ends all the same, and has told that it did."""
    reader = Reader(kind.make(tmp_path, numbered(100_000, size=100)))
    reader.take()
    time.sleep(0.2)
    started = time.monotonic()
    reader.stop()
    assert time.monotonic() - started < 1.0
    names = {thread.name for thread in threading.enumerate()}
    assert reader.connector.name not in names
    reader.settle(0.1)
    assert reader.inbox.drained


def test_what_waits_is_bounded(kind: Kind, tmp_path: Path) -> None:
    """Nobody takes: a connector fills the queue and waits, and holds no more than that."""
    connector = kind.make(tmp_path, numbered(100_000, size=200))
    tracemalloc.start()
    reader = Reader(connector)
    time.sleep(0.5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    ((_, lines),) = reader.inbox.states().values()
    assert 0 < lines <= QUEUE_LINES + READ_BYTES
    assert 200 * lines < QUEUE_BYTES + READ_BYTES + MAX_EVENT_BYTES
    reader.stop()
    assert peak < 16 << 20


def test_the_flow_hears_when_a_connector_breaks(tmp_path: Path) -> None:
    class Gone(Inbox):
        def put(self, chunk: object) -> bool:
            raise OSError("the disk is gone")

    for made in KINDS:
        folder = tmp_path / made.name
        folder.mkdir()
        connector, inbox = made.make(folder, numbered(3)), Gone()
        connector.start(inbox, {})
        deadline = time.monotonic() + 5
        while not inbox.drained and time.monotonic() < deadline:
            time.sleep(0.01)
        connector.stop()
        assert str(inbox.fault) == "the disk is gone"
        shutil.rmtree(folder)
