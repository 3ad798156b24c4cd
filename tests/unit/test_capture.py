"""Captures: every line comes back exactly as it was received, with when and where it arrived."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pipeline.capture import CaptureError, CaptureLine, CaptureWriter, read_header
from pipeline.events import MAX_EVENT_BYTES, Line, Origin
from pipeline.sources.replay import ReplayConnector
from tests.sources import reading

ORIGIN = Origin("site", "files:site:/a", 1_763_912_345.123456, began=7.25)
ODD = [
    b'{"kind":"text","text":"x"}', b"", b"\xff\xfe\x00", b"\xed\xa0\x80", b"a\rb",
    "é\u2028\U0001f600".encode(),
    b'"\\\x01\x1f', b"\x00", b"{" * 1_000,
]  # fmt: skip


def writer(folder: Path, **more: int) -> CaptureWriter:
    return CaptureWriter(folder, gateway="box-1", config="abc", **more)


def replayed(path: Path) -> list[Line]:
    with reading(ReplayConnector(path)) as reader:
        reader.to_end()
        return reader.lines


def test_a_capture_reads_back_as_it_was_recorded(tmp_path: Path) -> None:
    """Bytes, offset, source, input, arrival and content, also of what is not UTF-8."""
    lines = [Line(data, 10 * n - 1, ORIGIN) for n, data in enumerate(ODD)]
    with writer(tmp_path) as capture:
        capture.write(lines[:3])
        capture.write([])
        capture.write(lines[3:])
    assert replayed(capture.path) == lines
    assert capture.lines == len(lines)


def test_a_replay_refuses_the_sources_that_were_refused(tmp_path: Path) -> None:
    """Which sources an event may name is a setting of the source; the capture brings it along."""
    origins = [
        Origin("site", "http:site", 1.0, allowed=allowed) for allowed in (None, frozenset(), frozenset("ab"))
    ]
    lines = [Line(b"{}", -1, origin, "key-1") for origin in origins]
    with writer(tmp_path) as capture:
        capture.write(lines)
    assert replayed(capture.path) == lines


@given(st.binary(max_size=100), st.integers(-1, 2**60), st.floats(0, 4e9), st.floats(0, 4e9))
def test_any_bytes_survive_a_captured_line(data: bytes, offset: int, at: float, began: float) -> None:
    import msgspec

    line = Line(data, offset, Origin("s", "in", at, began=began))
    packed = msgspec.json.encode(CaptureLine.of(line))
    assert b"\n" not in packed
    assert msgspec.json.decode(packed, type=CaptureLine).line() == line


@pytest.mark.parametrize("char", [b"a", b'"', b"\x01", b"\xff"])
def test_the_largest_event_survives_whatever_its_characters_cost_in_json(tmp_path: Path, char: bytes) -> None:
    """A line as long as a connector hands one over: a byte more than allowed, to be refused again."""
    line = Line(char * (MAX_EVENT_BYTES + 1), 0, ORIGIN)
    with writer(tmp_path) as capture:
        capture.write([line])
    assert replayed(capture.path) == [line]


def test_other_tools_can_read_a_capture(tmp_path: Path) -> None:
    """zstdcat and jq: a header with version, gateway and digest, then one JSON object a line."""
    with writer(tmp_path) as capture:
        capture.write([Line(b"x", 3, ORIGIN)])
    header, line = zstandard.ZstdDecompressor().stream_reader(capture.path.read_bytes()).read().splitlines()
    told = json.loads(header)
    assert (told["edgewater_capture"], told["gateway"], told["config"], told["part"]) == (
        1,
        "box-1",
        "abc",
        1,
    )
    assert json.loads(line) == {
        "at": ORIGIN.arrival, "source": "site", "input": "files:site:/a", "offset": 3, "raw": "x",
        "began": 7.25,
    }  # fmt: skip


def test_a_capture_begins_a_new_file_at_a_size_and_keeps_the_newest(tmp_path: Path) -> None:
    import os

    with writer(tmp_path, max_file_bytes=2_000, max_files=3) as capture:
        for n in range(40):
            capture.write([Line(os.urandom(500), n, ORIGIN)])
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    assert files[-1] == capture.path
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)
    kept = [line.offset for path in files for line in replayed(path)]
    assert kept == list(range(40 - len(kept), 40))
    assert len(kept) >= 8


def test_a_capture_cut_by_a_crash_gives_all_batches_before_the_last(tmp_path: Path) -> None:
    capture = writer(tmp_path)
    for n in range(5):
        capture.write([Line(b"%d" % n, n, ORIGIN)])
    assert [line.data for line in replayed(capture.path)] == [b"0", b"1", b"2", b"3", b"4"]
    capture.close()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    with writer(tmp_path) as one:
        one.write([Line(b"x", 0, ORIGIN)])
        two = writer(tmp_path)
        two._stamp = one._stamp
        with pytest.raises(FileExistsError):
            two.write([Line(b"y", 0, ORIGIN)])


def test_an_empty_capture_leaves_no_file(tmp_path: Path) -> None:
    with writer(tmp_path) as capture:
        capture.write([])
    assert list(tmp_path.iterdir()) == []


def test_a_newer_or_damaged_header_is_refused_and_plain_lines_have_none() -> None:
    header = b'{"edgewater_capture":1,"started":1.0,"gateway":"g","config":"c","part":1}'
    found = read_header(header)
    assert found is not None
    assert found.gateway == "g"
    with pytest.raises(CaptureError, match="upgrade"):
        read_header(header.replace(b'e":1', b'e":2'))
    with pytest.raises(CaptureError, match="damaged"):
        read_header(header[:-3])
    assert read_header(b'{"kind":"text"}') is None
