"""Standard input: lines as soon as they are written, packed or not, to the end of the pipe."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Iterator

import pytest
import zstandard

from pipeline.events import MAX_EVENT_BYTES
from pipeline.sources.stdin import StdinConnector
from tests.sources import reading


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


def test_the_first_line_comes_while_the_pipe_stays_open(pipe: tuple[int, int]) -> None:
    """And every line after it: nothing waits in a buffer for more to be written."""
    with reading(StdinConnector("site", pipe[0])) as reader:
        for n in range(1, 4):
            os.write(pipe[1], b'{"line":%d}\n' % n * 3)
            reader.until_lines(3 * n)
        os.write(pipe[1], b"the last, without its end")
        os.close(pipe[1])
        assert reader.to_end()[-1] == b"the last, without its end"
    assert {(line.offset, line.origin.source, line.origin.input) for line in reader.lines} == {
        (-1, "site", "stdin:site")
    }
    assert reader.positions == {}


def test_a_packed_stream_comes_as_it_is_flushed(pipe: tuple[int, int]) -> None:
    packer = zstandard.ZstdCompressor().compressobj()
    with reading(StdinConnector("site", pipe[0])) as reader:
        for n in range(1, 4):
            os.write(
                pipe[1], packer.compress(b"line\n" * 20_000) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
            )
            reader.until_lines(20_000 * n)
        os.write(pipe[1], packer.flush() + zstandard.ZstdCompressor().compress(b"second frame"))
        os.close(pipe[1])
        assert reader.to_end()[60_000:] == [b"second frame"]


def test_a_packed_stream_that_unpacks_to_a_lot_costs_no_memory(pipe: tuple[int, int]) -> None:
    data = zstandard.ZstdCompressor().compress(bytes(200 << 20) + b"\nnext\n")
    assert len(data) < 32 << 10
    os.write(pipe[1], data)
    os.close(pipe[1])
    tracemalloc.start()
    with reading(StdinConnector("site", pipe[0])) as reader:
        found = reader.to_end()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [len(line) for line in found] == [MAX_EVENT_BYTES + 1, 4]
    assert peak < 4 << 20


def test_a_damaged_packed_stream_breaks_the_connector(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], zstandard.ZstdCompressor().compress(b"one\n") + b"this is no frame of zstd")
    os.close(pipe[1])
    with reading(StdinConnector("site", pipe[0])) as reader:
        while not reader.inbox.drained:
            reader.take()
    assert isinstance(reader.inbox.fault, OSError)
    assert "standard input: cannot unpack it further" in str(reader.inbox.fault)


@pytest.mark.parametrize("data", [b"", b"\n", b"a", b"abc\n"])
def test_a_stream_shorter_than_a_frames_magic_is_plain(pipe: tuple[int, int], data: bytes) -> None:
    os.write(pipe[1], data)
    os.close(pipe[1])
    with reading(StdinConnector("site", pipe[0])) as reader:
        assert reader.to_end() == ([data.strip()] if data.strip() else [])


@pytest.mark.parametrize("written", [b"", b"half a li"])
def test_a_silent_pipe_is_left_at_once_when_told_to_stop(pipe: tuple[int, int], written: bytes) -> None:
    """A line that was not whole is not handed over: it is not known whether it was."""
    os.write(pipe[1], written)
    with reading(StdinConnector("site", pipe[0])) as reader:
        reader.settle(0.1)
        started = time.monotonic()
        reader.stop()
        assert time.monotonic() - started < 1.0
        assert reader.settle(0.05) == []
