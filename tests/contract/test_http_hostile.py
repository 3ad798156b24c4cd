"""HTTP from clients that mean harm: the service goes on, memory stays bounded, nothing is smuggled."""

from __future__ import annotations

import contextlib
import random
import threading
import time
import zlib
from pathlib import Path

import pytest
import zstandard

from pipeline.sources.http_body import PIECE_BYTES, unpacker
from pipeline.sources.http_server import MAX_CONNECTIONS
from pipeline.sources.http_wire import MAX_HEAD_BYTES, MAX_PIPELINED, Refusal, Wire
from pipeline.sources.inbox import QueueLimits
from pipeline.units import Duration
from tests.contract.world_http import Client, site

ONE = b'{"kind":"reading","values":{"t":1}}'
CHUNKED = "Transfer-Encoding: chunked"
SMUGGLED = b"POST /v1/events HTTP/1.1\r\nHost: a\r\nContent-Length: 35\r\n\r\n" + ONE


def head(*headers: str) -> bytes:
    return "\r\n".join(["POST /v1/events HTTP/1.1", "Host: a", *headers, "", ""]).encode("latin-1")


def anonymous_kib() -> int:
    """Memory of this process, in which the server runs as well."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


AMBIGUOUS = {
    "length and chunks": head("Content-Length: 5", CHUNKED) + b"0\r\n\r\n" + SMUGGLED,
    "chunks and length": head(CHUNKED, "Content-Length: 5") + b"0\r\n\r\n" + SMUGGLED,
    "two lengths": head("Content-Length: 0", "Content-Length: 99") + SMUGGLED,
    "a list of lengths": head("Content-Length: 0, 99") + SMUGGLED,
    "a signed length": head("Content-Length: +0") + SMUGGLED,
    "a length beyond 64 bits": head("Content-Length: 18446744073709551616") + SMUGGLED,
    "chunks packed": head("Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n" + SMUGGLED,
    "chunks twice": head(CHUNKED, CHUNKED) + b"0\r\n\r\n" + SMUGGLED,
    "nearly chunks": head("Transfer-Encoding: xchunked") + b"0\r\n\r\n" + SMUGGLED,
    "a tab in chunked": head("Transfer-Encoding: \x0bchunked") + b"0\r\n\r\n" + SMUGGLED,
    "a space before the colon": head("Content-Length : 0") + SMUGGLED,
    "a folded header": head("X: a\r\n Content-Length: 0") + SMUGGLED,
    "bare line feeds": head("Content-Length: 0").replace(b"\r\n", b"\n") + SMUGGLED,
    "a bare carriage return": head("X: a\rContent-Length: 0") + SMUGGLED,
    "a NUL": head("X: a\x00b", "Content-Length: 0") + SMUGGLED,
    "a chunk of a wrong size": head(CHUNKED) + b"1\r\nxx\r\n0\r\n\r\n" + SMUGGLED,
    "a chunk size in C": head(CHUNKED) + b"0x1\r\nx\r\n0\r\n\r\n" + SMUGGLED,
    "a chunk size beyond 64 bits": head(CHUNKED) + b"fffffffffffffffff\r\nx\r\n0\r\n\r\n" + SMUGGLED,
    "an upgrade": head("Connection: Upgrade", "Upgrade: h2c", "Content-Length: 0") + SMUGGLED,
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_could_be_framed_in_two_ways_is_400_and_ends_the_connection(case: str) -> None:
    with site() as at:
        client = at.client()
        client.send(AMBIGUOUS[case])
        assert client.answer().status == 400
        assert client.closed()
        assert at.lines == []


def test_slow_heads_and_bodies_hold_few_connections_and_others_are_answered() -> None:
    """FAULTS row 29."""
    with site(timeout=Duration(1)) as at:
        slow = [at.client() for _ in range(3 * MAX_CONNECTIONS)]
        for n, client in enumerate(slow):
            client.send(b"POST /v1/ev" if n % 2 else head("Content-Length: 1000") + b"{")
        began = time.monotonic()
        answers = 0
        while time.monotonic() - began < 1.5:
            for client in slow:
                client.send(b"x")  # each byte in time, the whole never
            assert at.post(ONE, "Content-Type: application/json").status == 200
            answers += 1
            time.sleep(0.05)
        assert answers >= 3
        at.until(lambda: all(_ended(client) for client in slow))  # displaced or timed out
        assert at.counts["displaced"] >= 2 * MAX_CONNECTIONS


def test_when_all_connections_wait_for_us_one_more_is_told_to_come_again() -> None:
    with site() as at:
        at.hold()
        waiting = [at.client() for _ in range(MAX_CONNECTIONS)]
        for client in waiting:
            client.send(head(f"Content-Length: {len(ONE)}") + ONE)
        at.inbox_has(MAX_CONNECTIONS)
        assert at.client().answer().status == 503
        assert at.counts["turned_away"] == 1
        at.release()
        assert [client.answer().status for client in waiting] == [200] * MAX_CONNECTIONS


def test_a_slow_request_is_told_408() -> None:
    with site(timeout=Duration(1)) as at:
        slow_head, slow_body = at.client(), at.client()
        slow_head.send(b"POST /v1/events HTTP/1.1\r\nHost: a\r\n")
        slow_body.send(head("Content-Length: 100") + b"{")
        assert slow_head.answer().status == 408
        assert slow_body.answer().status == 408
        assert slow_head.closed()
        assert slow_body.closed()
        assert at.lines == []


def test_clients_that_say_nothing_are_displaced() -> None:
    """Connections count from when they are accepted."""
    with site() as at:
        silent = [at.client() for _ in range(2 * MAX_CONNECTIONS)]
        assert at.post(ONE).status == 200
        assert sum(not _ended(client) for client in silent) <= MAX_CONNECTIONS


def test_a_body_that_claims_a_gibibyte_costs_nothing() -> None:
    """FAULTS row 21."""
    with site() as at:
        before = anonymous_kib()
        for claim in (head(f"Content-Length: {1 << 30}"), head(CHUNKED) + b"40000000\r\n"):
            client = at.client()
            client.send(claim)
            flood = threading.Thread(target=_pour, args=(client, 64 << 20))
            flood.start()
            assert client.answer().status == 413
            client.connection.close()
            flood.join(20)
        assert anonymous_kib() - before < 24 << 10
        assert at.post(ONE).status == 200


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
@pytest.mark.parametrize("byte", [b"\n", b"0"])
def test_a_small_body_that_unpacks_to_a_gibibyte_is_413(encoding: str, byte: bytes) -> None:
    """FAULTS row 27; also where the frame's header claims nothing, or too much."""
    bomb = _bomb(encoding, byte, 256 << 20)
    assert len(bomb) < 300_000
    with site() as at:
        before = anonymous_kib()
        answers = [at.post(bomb, f"Content-Encoding: {encoding}").status for _ in range(5)]
        assert answers == [413] * 5
        assert anonymous_kib() - before < 40 << 10
        assert at.post(ONE).status == 200


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_pieces_of_a_bomb_are_bounded_each(encoding: str) -> None:
    unpack = unpacker(encoding)
    pieces = unpack.feed(_bomb(encoding, b"0", 64 << 20))
    assert all(len(next(pieces)) <= PIECE_BYTES for _ in range(1_000))


def test_a_frame_that_wants_more_memory_than_allowed_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = packer.compress(b"x" * 1_000) + packer.flush()
    with pytest.raises(Refusal, match="not zstd"):
        list(unpacker("zstd").feed(packed))


def test_a_head_without_an_end_is_given_up_in_whatever_pieces_it_comes() -> None:
    for piece in (b"x", b"X: y\r\n", b"x" * 1_000):
        wire = Wire()
        wire.feed(b"POST / HTTP/1.1\r\nHost: a\r\nX: ")
        fed = 0
        while wire.fault is None:
            wire.feed(piece)
            fed += len(piece)
            assert fed < 2 * MAX_HEAD_BYTES
        assert wire.fault.status in (400, 431)


def test_a_trailer_or_chunk_extension_without_an_end_is_given_up() -> None:
    for begin in (b"0\r\nX-Trailer: ", b"5;extension="):
        wire = Wire()
        wire.feed(head(CHUNKED) + begin)
        for _ in range(40):
            wire.feed(b"x" * 1_000)
        assert wire.fault is not None


def test_requests_ahead_of_their_answers_are_bounded() -> None:
    wire = Wire()
    wire.feed(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 1_000)
    assert len(wire.requests) <= MAX_PIPELINED
    assert wire.fault is not None


def test_a_flood_is_bounded_and_told_to_pause() -> None:
    lines = b"\n".join([ONE] * 1_000)
    with site(limits=QueueLimits(lines=2_000)) as at:
        at.hold()
        statuses: list[int] = []

        def flood() -> None:
            statuses.append(at.post(lines).status)

        threads = [threading.Thread(target=flood) for _ in range(20)]
        before = anonymous_kib()
        for thread in threads:
            thread.start()
        at.until(lambda: len(statuses) >= 10)
        assert set(statuses) == {429}
        ((_, waiting),) = at.inbox.states().values()
        assert waiting <= 2_000 + 1_000
        assert anonymous_kib() - before < 24 << 10
        at.release()
        for thread in threads:
            thread.join(10)
        assert statuses.count(200) * 1_000 == len(at.lines)


def test_random_bytes_break_nothing() -> None:
    """FAULTS row 23: whatever comes, an answer or an end, and the next client is served."""
    rng = random.Random(4)
    seeds = [
        head("Content-Length: 35") + ONE,
        head(CHUNKED) + b"23\r\n" + ONE + b"\r\n0\r\n\r\n",
        *AMBIGUOUS.values(),
    ]
    with site() as at:
        for _ in range(300):
            data = bytearray(rng.choice(seeds) if rng.random() < 0.8 else rng.randbytes(300))
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            client = at.client()
            client.send(bytes(data[: rng.randrange(1, len(data) + 1)]))
            if rng.random() < 0.3:
                client.connection.close()
            else:
                client.connection.shutdown(1)
                assert client.closed()
        assert "status_500" not in at.counts
        assert at.post(ONE).status == 200
        assert at.inbox.fault is None


def test_random_bytes_never_raise_in_the_parser() -> None:
    rng = random.Random(5)
    for _ in range(20_000):
        wire = Wire()
        wire.feed(b"POST / HTTP/1.1\r\n" * rng.randrange(2) + rng.randbytes(rng.randrange(1, 60)))
        wire.feed(rng.randbytes(20))


def test_hostile_events_become_dead_letters_with_reasons() -> None:
    """FAULTS rows 22, 23 and 25."""
    bad = [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"\xff\xfe",
        b'{"kind":"text","text":"\\ud800"}',
        b'{"kind":"text","text":1}',
        b'{"kind":"text","text":"x","unknown":1}',
        b'{"kind":"reading","values":{"t":NaN}}',
        b"\x00" * 100,
    ]
    with site() as at:
        answer = at.post(b"\n".join([*bad, ONE]))
        assert answer.json["accepted"] == 1
        assert [refused["line"] for refused in answer.json["refused"]] == list(range(1, len(bad) + 1))
        for data in bad:
            assert at.post(data, "Content-Type: application/json").status == 400


def _ended(client: Client) -> bool:
    client.connection.settimeout(0.01)
    try:
        while client.connection.recv(65_536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def _pour(client: Client, count: int) -> None:
    piece = b"\n" * 65_536
    with contextlib.suppress(OSError):
        for _ in range(count // len(piece)):
            client.connection.sendall(piece)


def _bomb(encoding: str, byte: bytes, size: int) -> bytes:
    packer = zlib.compressobj(9, wbits=31) if encoding == "gzip" else zstandard.ZstdCompressor().compressobj()
    piece = byte * (1 << 20)
    return b"".join(packer.compress(piece) for _ in range(size >> 20)) + packer.flush()
