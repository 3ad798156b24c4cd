"""HTTP: each answer, when it comes, and what it says to do."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import ssl
import stat
import subprocess
import time
from pathlib import Path

import pytest
import zstandard

from pipeline.sources.http_server import MAX_CONNECTIONS
from pipeline.sources.inbox import QueueLimits
from pipeline.units import Duration, Size
from tests.contract.world_http import Client, site

JSON = "Content-Type: application/json"
LINES = "Content-Type: application/x-ndjson"
ONE = b'{"kind":"reading","values":{"t":1}}'
TOKEN = "0123456789abcdef"


def head(*headers: str, first: str = "POST /v1/events") -> bytes:
    """The head of a request."""
    return "\r\n".join([f"{first} HTTP/1.1", "Host: a", *headers, "", ""]).encode()


POST_ONE = head(f"Content-Length: {len(ONE)}") + ONE


def numbered(count: int) -> bytes:
    return b"".join(b'{"kind":"text","text":"event %d"}\n' % number for number in range(count))


def test_one_event_is_answered_after_its_commit_and_not_before() -> None:
    with site() as at:
        at.hold()
        client = at.client()
        client.send(POST_ONE)
        client.connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.answer()
        client.connection.settimeout(10)
        at.release()
        answer = client.answer()
        assert (answer.status, answer.json) == (200, {"accepted": 1, "refused": []})
        assert [line.data for line in at.lines] == [ONE]


def test_json_lines_are_events_with_numbers_that_count_empty_lines() -> None:
    with site() as at:
        answer = at.post(b"\r\n" + ONE + b"\r\n\n  \nnot json\n" + ONE, LINES)
        assert answer.status == 200
        assert answer.json["accepted"] == 2
        ((refused,),) = (answer.json["refused"],)
        assert refused["line"] == 5
        assert refused["reason"].startswith("not JSON")
        assert len(at.lines) == 3


@pytest.mark.parametrize("kind", ["", LINES, "Content-Type: application/jsonl; charset=utf-8"])
def test_a_body_without_a_type_is_json_lines(kind: str) -> None:
    with site() as at:
        answer = at.post(ONE + b"\n" + ONE, *([kind] if kind else []))
        assert answer.json["accepted"] == 2


def test_one_event_may_be_written_over_many_lines() -> None:
    with site() as at:
        body = json.dumps(json.loads(ONE), indent=2).encode() + b"\n"
        assert at.post(body, JSON).json == {"accepted": 1, "refused": []}
        assert len(at.lines) == 1


def test_a_single_event_that_is_refused_is_400_with_the_reason_and_still_handed_over() -> None:
    with site() as at:
        client = at.client()
        answer = client.post(b'{"kind":"reading","values":{}}', JSON)
        assert answer.status == 400
        assert "not an event" in answer.json["refused"][0]["reason"]
        assert len(at.lines) == 1
        assert client.post(ONE, JSON).status == 200, "the connection goes on"


def test_the_idempotency_key_is_the_identity_of_each_event() -> None:
    with site() as at:
        at.post(ONE, JSON, "Idempotency-Key: k1")
        at.post(ONE + b"\n\n" + ONE, LINES, "Idempotency-Key: k2")
        at.post(ONE, LINES)
        assert [line.key for line in at.lines] == ["k1", "k2:1", "k2:3", ""]


def test_an_event_names_only_sources_that_are_listed() -> None:
    body = b"\n".join(
        b'{"kind":"text","text":"x","source":"%s"}' % name for name in (b"site", b"pump-1", b"other")
    )
    with site(sources=("pump-1",)) as at:
        answer = at.post(body, LINES)
        assert [refused["line"] for refused in answer.json["refused"]] == [3]
        assert "may not be named" in answer.json["refused"][0]["reason"]
    with site() as at:
        assert at.post(body, LINES).json["accepted"] == 1
    with site(sources=("*",)) as at:
        assert at.post(body, LINES).json["accepted"] == 3


def test_a_long_body_is_handed_over_in_parts_and_answered_once() -> None:
    with site() as at:
        body = numbered(50_000)
        answer = at.post(body, LINES)
        assert answer.json == {"accepted": 50_000, "refused": []}
        assert len(at.lines) == 50_000
        assert b"\n".join(line.data for line in at.lines) + b"\n" == body
        assert len(at.chunks) > 40


def test_refused_lines_beyond_a_hundred_are_counted() -> None:
    with site() as at:
        answer = at.post(b"x\n" * 5_000 + ONE, LINES)
        assert answer.json["accepted"] == 1
        assert len(answer.json["refused"]) == 100
        assert answer.json["more_refused"] == 4_900


def test_a_line_that_is_too_long_is_refused_and_the_next_taken() -> None:
    with site() as at:
        body = b'{"kind":"text","text":"' + b"x" * 600_000 + b'"}\n' + ONE
        answer = at.post(body, LINES)
        assert answer.json["accepted"] == 1
        assert "bytes" in answer.json["refused"][0]["reason"]
        assert at.post(body[:600_000], JSON).status == 400
        assert max(len(line.data) for line in at.lines) < 270_000


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_packed_bodies_are_unpacked(encoding: str) -> None:
    pack = gzip.compress if encoding == "gzip" else zstandard.compress
    body = numbered(20_000)
    with site() as at:
        answer = at.post(pack(body), LINES, f"Content-Encoding: {encoding}")
        assert answer.json == {"accepted": 20_000, "refused": []}
        joined = pack(body[:1_000]) + pack(body[1_000:])  # files put one after another
        assert at.post(joined, LINES, f"Content-Encoding: {encoding}").json["accepted"] == 20_000
        cut = at.post(pack(body)[:-3], LINES, f"Content-Encoding: {encoding}")
        assert (cut.status, cut.json["error"]) == (400, f"the {encoding} body is cut short")
        broken = at.post(b"no such thing", LINES, f"Content-Encoding: {encoding}")
        assert broken.status == 400


def test_a_chunked_body_is_taken() -> None:
    with site() as at:
        client = at.client()
        client.send(head("Transfer-Encoding: chunked"))
        for at_byte in range(0, len(ONE), 7):
            piece = ONE[at_byte : at_byte + 7]
            client.send(b"%x\r\n%s\r\n" % (len(piece), piece))
        client.send(b"0\r\nX-Trailer: ignored\r\n\r\n")
        assert client.answer().json["accepted"] == 1
        assert client.post(ONE, JSON).status == 200


EMPTY = "Content-Length: 0"
REFUSALS: list[tuple[int, str, bytes]] = [
    (400, "no event", head(EMPTY)),
    (400, "no event", head("Content-Length: 3") + b"\n \n"),
    (400, "not a request", b"hello\r\n\r\n"),
    (400, "not a request", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),  # TLS
    (400, "Host", b"POST /v1/events HTTP/1.1\r\nContent-Length: 0\r\n\r\n"),
    (400, "other protocol", head("Connection: Upgrade", "Upgrade: h2c")),
    (400, "Idempotency-Key", head(EMPTY, "Idempotency-Key:")),
    (400, "Idempotency-Key", head(EMPTY, "Idempotency-Key: " + "k" * 256)),
    (400, "twice", head(EMPTY, "Idempotency-Key: a", "Idempotency-Key: b")),
    (403, "web pages", head(EMPTY, "Origin: http://elsewhere")),
    (404, "/v1/events", head(EMPTY, first="POST /v2/events")),
    (405, "POST", head(first="GET /v1/events")),
    (405, "POST", head(first="DELETE /v1/events?all=1")),
    (411, "Content-Length", head()),
    (413, "8388608", head("Content-Length: 8388609")),
    (415, "application/json", head(EMPTY, "Content-Type: application/x-www-form-urlencoded")),
    (415, "zstd", head(EMPTY, "Content-Encoding: br")),
    (417, "100-continue", head(EMPTY, "Expect: more")),
    (431, "headers", head("X-Long: " + "x" * 20_000)),
    (431, "headers", head(*["X: 12345"] * 2_000)),
    (431, "headers", head("X-Long: " + "x" * 20_000)[:-4]),
]


@pytest.mark.parametrize(
    ("status", "words", "request_bytes"), REFUSALS, ids=[f"{n}-{case[0]}" for n, case in enumerate(REFUSALS)]
)
def test_what_is_refused_says_why(status: int, words: str, request_bytes: bytes) -> None:
    with site() as at:
        client = at.client()
        client.send(request_bytes)
        answer = client.answer()
        assert answer.status == status
        assert words in answer.json["error"]
        assert at.lines == []
        assert at.counts[f"status_{status}"] == 1
        assert at.post(ONE, JSON).status == 200


def test_a_get_tells_what_is_here() -> None:
    with site() as at:
        client = at.client()
        client.send(head(first="GET /"))
        assert "curl" in client.answer().text
        assert client.post(ONE, JSON).status == 200


def test_a_body_that_would_be_too_large_is_refused_before_it_is_sent() -> None:
    """As curl does with large bodies: it waits for 100 Continue."""
    with site(max_body=Size(2_000)) as at:
        client = at.client()
        client.send(head("Expect: 100-continue", "Content-Length: 2001"))
        assert client.answer().status == 413
        client = at.client()
        client.send(head("Expect: 100-continue", f"Content-Length: {len(ONE)}"))
        assert client.answer().status == 100
        client.send(ONE)
        assert client.answer().status == 200


def test_a_chunked_or_packed_body_is_refused_where_it_becomes_too_large() -> None:
    with site(max_body=Size(100_000)) as at:
        client = at.client()
        client.send(head("Transfer-Encoding: chunked"))
        for _ in range(30):
            client.send(b"%x\r\n%s\r\n" % (4_096, b"\n" * 4_096))
        assert client.answer().status == 413
        assert client.closed()
        packed = zstandard.compress(b"\n" * 100_001)
        assert len(packed) < 100
        assert at.post(packed, LINES, "Content-Encoding: zstd").status == 413


def test_the_token_is_asked_for_before_anything_is_taken() -> None:
    with site(token=TOKEN) as at:
        for wrong in ((), ("Authorization: Bearer 0123456789abcdeX",), (f"Authorization: Basic {TOKEN}",),
                      ("Authorization: Bearer",), ("Authorization: Bearer \xff",)):  # fmt: skip
            answer = at.post(ONE, JSON, *wrong)
            assert answer.status == 401
            assert answer.headers["www-authenticate"].startswith("Bearer")
        assert at.lines == []
        assert at.post(ONE, JSON, f"Authorization: bearer {TOKEN}").status == 200


def test_a_full_queue_is_429_and_what_was_handed_over_is_still_answered() -> None:
    with site(limits=QueueLimits(lines=1)) as at:
        at.hold()
        first = at.client()
        first.send(POST_ONE)
        at.inbox_has(1)
        second = at.client()
        answer = second.post(ONE, JSON, "Idempotency-Key: k")
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        at.release()
        assert first.answer().status == 200
        assert second.post(ONE, JSON, "Idempotency-Key: k").status == 200


def test_a_long_body_waits_for_room_once_it_began() -> None:
    with site(limits=QueueLimits(lines=10)) as at:
        assert at.post(numbered(5_000), LINES).json["accepted"] == 5_000


def test_requests_that_come_together_share_a_commit() -> None:
    """One request to close the Batch comes after those that it is for."""
    with site(gather=Duration(0.2)) as at:
        clients = [at.client() for _ in range(20)]
        for client in clients:
            client.send(POST_ONE)
        for client in clients:
            assert client.answer().status == 200
        assert at.chunks.count(1) == 20
        assert at.chunks.count(0) <= 5, "each of these closes a Batch"


def test_requests_that_wait_when_ingest_stops_get_503_and_committed_ones_200() -> None:
    with site() as at:
        idle, done, waiting = at.client(), at.client(), at.client()
        assert done.post(ONE, JSON).status == 200
        at.hold()
        waiting.send(POST_ONE)
        at.inbox_has(1)
        before = time.monotonic()
        at.stop()
        assert time.monotonic() - before < 1.0
        answer = waiting.answer()
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert idle.closed()
        assert at.inbox.fault is None


def test_an_answer_to_what_was_committed_goes_out_although_ingest_stops() -> None:
    with site() as at:
        at.hold()
        client = at.client()
        client.send(POST_ONE)
        at.inbox_has(1)
        at.inbox.closed.set()
        at.release()
        at.connector.stop()
        assert client.answer().status == 200


def test_a_client_that_half_closes_still_gets_its_answer() -> None:
    with site() as at:
        client = at.client()
        client.send(b"POST /v1/events HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(ONE), ONE))
        client.connection.shutdown(1)
        assert client.answer().status == 200
        assert client.closed()


def test_pipelined_requests_are_answered_in_order() -> None:
    with site() as at:
        client = at.client()
        for number in range(10):
            body = b'{"kind":"text","text":"%d"}' % number
            client.send(
                b"POST /v1/events HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
        client.send(head(first="GET /"))
        assert [client.answer().status for _ in range(11)] == [200] * 11
        assert [json.loads(line.data)["text"] for line in at.lines] == [str(n) for n in range(10)]


def test_a_socket_in_the_file_system_is_for_user_and_group(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    for _ in range(2):
        with site(listen=f"unix:{path}") as at:
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            assert at.post(ONE, JSON).status == 200
            with site(listen=f"unix:{path}") as second:
                assert "another process listens there" in str(second.inbox.fault)
            assert at.post(ONE, JSON).status == 200
        assert not path.exists()
        os.mknod(path, 0o600 | stat.S_IFSOCK)  # as a killed process leaves it
    path.unlink()


def test_a_port_that_is_taken_is_said() -> None:
    with site() as at:
        assert at.connector.address is not None
        with site(listen=f"127.0.0.1:{at.connector.address[1]}") as second:
            assert "cannot listen on 127.0.0.1" in str(second.inbox.fault)


def test_tls_encrypts_and_a_plain_client_is_turned_away(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    with site(cert_file=str(cert), key_file=str(key), token=TOKEN) as at:
        context = ssl.create_default_context(cafile=str(cert))
        plain = at.client()
        plain.send(b"POST /v1/events HTTP/1.1\r\nHost: a\r\n\r\n")
        assert plain.closed()
        wrapped = context.wrap_socket(at.client().connection, server_hostname="localhost")
        with wrapped:
            client = Client(wrapped)
            answer = client.post(numbered(20_000), LINES, f"Authorization: Bearer {TOKEN}")
            assert answer.json["accepted"] == 20_000
            assert client.post(ONE, JSON).status == 401
    with site(cert_file=str(key)) as at:
        assert "cannot use the certificate" in str(at.inbox.fault)


def test_a_connection_is_displaced_only_by_one_too_many() -> None:
    with site() as at:
        held = [at.client() for _ in range(MAX_CONNECTIONS)]
        for client in held:
            assert client.post(ONE, JSON).status == 200
        assert at.client().post(ONE, JSON).status == 200
        assert held[0].closed()
        assert held[1].post(ONE, JSON).status == 200
        assert at.counts["displaced"] == 1
