"""Bytes into lines: every offset right, nothing longer than an event held, whatever the pieces."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pipeline.events import MAX_EVENT_BYTES
from pipeline.sources.lines import LineSplitter, open_stream

PIECES = st.lists(
    st.binary(max_size=20) | st.sampled_from([b"\n", b"\r\n", b"\n\n", b"ab\ncd", b"\r", b"", b"\xff\xfe\n"]),
    max_size=30,
)


@given(PIECES, st.integers(0, 1_000))
def test_lines_and_offsets_do_not_depend_on_the_pieces(pieces: list[bytes], offset: int) -> None:
    """As if the whole had been split at once: blank lines left out, line ends of both kinds taken off."""
    whole = b"".join(pieces)
    expected, at = [], offset
    for line in whole.split(b"\n"):
        if line.rstrip(b"\r"):
            expected.append((at, line.rstrip(b"\r")))
        at += len(line) + 1
    splitter = LineSplitter(offset)
    found = [line for piece in pieces for line in splitter.feed(piece)]
    assert splitter.offset == offset + whole.rfind(b"\n") + 1
    found += splitter.finish()
    assert found == expected
    assert splitter.offset == offset + len(whole)


@pytest.mark.parametrize("piece", [1_000, 32 << 10, MAX_EVENT_BYTES, 1 << 20])
def test_an_overlong_line_is_cut_and_the_next_is_whole(piece: int) -> None:
    """One byte more than an event may have is kept, so that decode refuses it; offsets go on behind it."""
    data = b"a" * 1_000_000 + b"\nnext\n"
    splitter, found = LineSplitter(), []
    for start in range(0, len(data), piece):
        found += splitter.feed(data[start : start + piece])
    assert found == [(0, b"a" * (MAX_EVENT_BYTES + 1)), (1_000_001, b"next")]
    assert splitter.offset == len(data)


def test_a_line_at_the_limit_is_whole_with_either_line_end() -> None:
    line = b"a" * MAX_EVENT_BYTES
    for end in (b"\n", b"\r\n"):
        assert LineSplitter().feed(line + end) == [(0, line)]


def test_a_cut_line_is_never_taken_for_a_whole_one() -> None:
    """The cut may fall behind a carriage return; stripped, the line would be as long as an event may be."""
    ((_, line),) = LineSplitter().feed(b"a" * MAX_EVENT_BYTES + b"\r" + b"rest" + b"\n")
    assert len(line) == MAX_EVENT_BYTES + 1


def test_an_endless_line_costs_no_memory() -> None:
    splitter, piece = LineSplitter(), b"a" * (32 << 10)
    tracemalloc.start()
    for _ in range(2_000):
        assert splitter.feed(piece) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * MAX_EVENT_BYTES
    assert splitter.feed(b"\nx\n")[1:] == [(2_000 * len(piece) + 1, b"x")]


def test_zstd_is_recognized_by_its_content_and_read_across_frames(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    pack = zstandard.ZstdCompressor().compress
    path.write_bytes(pack(b"one\n") + pack(b"two\n"))
    with open_stream(path) as stream:
        assert stream.read(100) == b"one\ntwo\n"
    path.write_bytes(b"plain")
    with open_stream(io.FileIO(path)) as stream:
        assert stream.read(100) == b"plain"


def test_a_small_file_that_claims_to_be_huge_costs_nothing(tmp_path: Path) -> None:
    """64 MiB of zeros in 2 KB, read piece by piece; a window of 128 MiB is refused."""
    path = tmp_path / "bomb.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(bytes(64 << 20)))
    tracemalloc.start()
    with open_stream(path) as stream:
        read = 0
        while data := stream.read(32 << 10):
            read += len(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read == 64 << 20
    assert peak < 1 << 20
    wide = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    path.write_bytes(zstandard.ZstdCompressor(compression_params=wide).compress(bytes(1 << 20) * 130))
    with open_stream(path) as stream, pytest.raises(zstandard.ZstdError, match="memory"):
        stream.read(1)
