"""Replay: a capture or plain lines, packed or not, from a committed position, at a speed."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest
import zstandard

from pipeline.capture import CaptureHeader, CaptureLine, CaptureWriter
from pipeline.events import MAX_EVENT_BYTES, Line, Origin
from pipeline.sources.replay import ReplayConnector
from tests.sources import reading

HEADER = msgspec.json.encode(CaptureHeader(1, 0.0, "g", "c", 1)) + b"\n"


def numbered(count: int) -> list[bytes]:
    return [b'{"kind":"text","text":"%d","ts":%d}' % (n, n) for n in range(count)]


def plain(path: Path, count: int, *, packed: bool = False) -> Path:
    data = b"".join(line + b"\n" for line in numbered(count))
    path.write_bytes(zstandard.ZstdCompressor().compress(data) if packed else data)
    return path


def captured(folder: Path, count: int) -> Path:
    with CaptureWriter(folder, gateway="g", config="c") as writer:
        for n, data in enumerate(numbered(count)):
            writer.write([Line(data, n, Origin("site", "in", 100.0 + n))])
    return writer.path


@pytest.mark.parametrize("packed", [False, True])
def test_plain_lines_take_stream_time_from_their_own_ts(tmp_path: Path, packed: bool) -> None:
    with reading(ReplayConnector(plain(tmp_path / "lines", 3, packed=packed))) as reader:
        assert reader.to_end() == numbered(3)
    assert {(line.origin.timed, line.origin.source, line.origin.input) for line in reader.lines} == {
        (True, "replay", "replay:lines")
    }
    assert [line.offset for line in reader.lines] == [0, 34, 68]


def test_a_captures_lines_keep_their_source_and_arrival(tmp_path: Path) -> None:
    with reading(ReplayConnector(captured(tmp_path, 3))) as reader:
        assert reader.to_end() == numbered(3)
    assert [line.origin for line in reader.lines] == [Origin("site", "in", 100.0 + n) for n in range(3)]


def test_every_committed_position_is_one_to_go_on_from(tmp_path: Path) -> None:
    """Of a capture and of plain lines: after each chunk, the rest is what had not come yet."""
    many = 3_000
    for path in (plain(tmp_path / "lines", many), captured(tmp_path / "captures", many)):
        marks = [(0, dict[str, bytes]())]
        with reading(ReplayConnector(path)) as reader:
            while not reader.inbox.drained:
                if reader.take():
                    marks.append((len(reader.lines), dict(reader.positions)))
        assert reader.data == numbered(many)
        assert len(marks) > 3
        for count, positions in marks:
            with reading(ReplayConnector(path), positions) as again:
                assert again.to_end() == numbered(many)[count:]


def test_a_damaged_line_of_a_capture_is_refused_and_the_rest_goes_on(tmp_path: Path) -> None:
    """Cut, nested without end, of the wrong shape, with a second header in the middle: each is a line for
    decode to refuse, with its place in the capture."""
    good = msgspec.json.encode(CaptureLine(5.0, "site", "in", 1, raw="ok"))
    bad = [
        b'{"at":1.0', b'{"at":1.0,"source":"s","input":"i","raw64":"!"}', b'{"x":' + b"[" * 200_000, b"[]",
        HEADER.strip(), b'{"at":1.0,"source":"s","input":"i","raw64":"\xff"}',
    ]  # fmt: skip
    path = tmp_path / "capture.jsonl"
    path.write_bytes(HEADER + b"\n".join([*bad, good]) + b"\n")
    with reading(ReplayConnector(path)) as reader:
        reader.to_end()
    assert reader.inbox.fault is None
    assert reader.data == [*(line[: MAX_EVENT_BYTES + 1] for line in bad), b"ok"]
    assert all(line.offset > 0 and line.origin.input == "replay:capture.jsonl" for line in reader.lines[:-1])


def test_an_overlong_plain_line_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"a" * 5_000_000 + b"\nnext\n")
    with reading(ReplayConnector(path)) as reader:
        assert [len(data) for data in reader.to_end()] == [MAX_EVENT_BYTES + 1, 4]


def test_a_newer_capture_breaks_the_connector(tmp_path: Path) -> None:
    path = tmp_path / "capture.jsonl"
    path.write_bytes(HEADER.replace(b'capture":1', b'capture":2'))
    with reading(ReplayConnector(path)) as reader:
        while not reader.inbox.drained:
            reader.take()
    assert "upgrade Edgewater" in str(reader.inbox.fault)


@pytest.mark.parametrize("kind", ["capture", "plain"])
def test_a_replay_at_a_speed_keeps_the_recorded_pauses(tmp_path: Path, kind: str) -> None:
    """Four seconds of stream at twenty times the speed; a bad line waits for nothing."""
    path = captured(tmp_path, 5) if kind == "capture" else plain(tmp_path / "lines", 5)
    if kind == "plain":
        with path.open("ab") as file:
            file.write(b"bad\n")
    started = time.monotonic()
    with reading(ReplayConnector(path, speed=20.0)) as reader:
        reader.to_end()
        assert reader.data[:5] == numbered(5)
    assert 0.15 < time.monotonic() - started < 2.0


def test_a_slow_replay_stops_at_once(tmp_path: Path) -> None:
    path = plain(tmp_path / "lines", 5)
    with reading(ReplayConnector(path, speed=0.001)) as reader:
        reader.until_lines(1)
        started = time.monotonic()
        reader.stop()
        assert time.monotonic() - started < 1.0
