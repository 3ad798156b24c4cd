"""HTTP through a real ingest process: what its answers promise holds in the ring."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.ring import Ring
from storage.windows import RingState
from tests.contract.world_http import Answer, Client, connected, free_port

JSON = "Content-Type: application/json"
ONE = b'{"kind":"reading","values":{"t":%d}}'
LIVING = "from pipeline.cli import main; main()"
# Dies where the commit is on stable storage and nobody was told.
DYING = """
import os, sys
from pipeline.sources.http import HttpConnector
HttpConnector.acknowledge = lambda self, settled: os._exit(9)
from pipeline.cli import main
main()
"""


class Ingest:
    """`edgewater ingest` with one HTTP source, in one data folder over several lives."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.config = folder / "edgewater.toml"
        self.config.write_text(
            f'data_dir = "{folder}/data"\n[model]\npath = "{model}"\n[health]\nlisten = ""\n'
            f'[ring]\nmax_bytes = "16MiB"\n[trigger]\nmin_samples = 1000000\nmin_tokens = 100000\n'
            f'[[sources]]\nname = "site"\nkind = "http"\nhttp = {{ listen = "127.0.0.1:{self.port}" }}\n'
        )

    @contextmanager
    def running(
        self, program: str = "from pipeline.cli import main; main()"
    ) -> Iterator[subprocess.Popen[bytes]]:
        """One life; ends with SIGTERM if it still lives."""
        words = ["ingest", "--config", str(self.config)]
        process = subprocess.Popen([sys.executable, "-c", program, *words], stderr=subprocess.PIPE)
        try:
            yield process
        finally:
            process.terminate()
            _, said = process.communicate(timeout=30)
            assert process.returncode in (0, 9), said.decode()

    def client(self) -> Client:
        """A connection, once it listens."""
        return Client(connected(self.port))

    def post(self, body: bytes, *headers: str) -> Answer:
        """Post on a connection of its own."""
        client = self.client()
        try:
            return client.post(body, *headers)
        finally:
            client.connection.close()

    @property
    def state(self) -> RingState:
        """The ring's."""
        with Ring.open_reader(self.folder / "data" / "ring" / "main") as ring:
            return ring.read_state()


def test_what_was_answered_is_stored_and_repeating_a_request_stores_nothing(
    tmp_path: Path, tiny_model: Path
) -> None:
    """FAULTS row 17."""
    ingest = Ingest(tmp_path, tiny_model)
    lines = b"\n".join([ONE % 1, b"not json", ONE % 2])
    with ingest.running():
        for _ in range(3):
            answer = ingest.post(lines, "Content-Type: application/x-ndjson", "Idempotency-Key: a")
            assert (answer.status, answer.json["accepted"], len(answer.json["refused"])) == (200, 2, 1)
            assert ingest.post(ONE % 1, JSON, "Idempotency-Key: b").status == 200
        assert ingest.state.next_seq == 3
        assert ingest.state.counters["duplicates"] == 6
        refused = ingest.post(b'{"kind":"reading"}', JSON)
        assert refused.status == 400
        assert ingest.state.counters["dead_letters"] == 4
    with ingest.running():
        assert ingest.post(ONE % 1, JSON, "Idempotency-Key: b").status == 200
        assert ingest.post(ONE % 1, JSON, "Idempotency-Key: c").status == 200, "a new key is a new delivery"
    assert ingest.state.next_seq == 4


def test_killed_between_commit_and_answer_the_repetition_stores_nothing_twice(
    tmp_path: Path, tiny_model: Path
) -> None:
    """FAULTS row 17."""
    ingest = Ingest(tmp_path, tiny_model)
    request = (b"\n".join(ONE % n for n in range(500)), "Idempotency-Key: delivery-7")
    with ingest.running(DYING) as process:
        client = ingest.client()
        lines = [
            "POST /v1/events HTTP/1.1",
            "Host: a",
            f"Content-Length: {len(request[0])}",
            request[1],
            "",
            "",
        ]
        client.send("\r\n".join(lines).encode() + request[0])
        assert client.closed()
        client.connection.close()
        assert process.wait(30) == 9
    assert ingest.state.next_seq == 500, "it was committed, and nobody knows"
    with ingest.running():
        answer = ingest.post(*request)
        assert (answer.status, answer.json) == (200, {"accepted": 500, "refused": []})
    assert ingest.state.next_seq == 500
    assert ingest.state.counters["duplicates"] == 500


def test_captured_events_with_an_id_that_somebody_posts_again_are_dropped(
    tmp_path: Path, tiny_model: Path
) -> None:
    """FAULTS row 55: another key, another body around it, the same event."""
    ingest = Ingest(tmp_path, tiny_model)
    event = b'{"kind":"reading","id":"nonce-1","values":{"t":1}}'
    with ingest.running():
        assert ingest.post(event, JSON, "Idempotency-Key: a").status == 200
        assert ingest.post(event + b"\n" + event, "Idempotency-Key: b").json["accepted"] == 2
        assert ingest.post(b" " + event, JSON).status == 200
        assert ingest.state.next_seq == 1


def test_told_to_stop_it_answers_what_it_committed_and_refuses_the_rest(
    tmp_path: Path, tiny_model: Path
) -> None:
    """However the moment falls: each request that was answered with 200 is stored, once."""
    ingest = Ingest(tmp_path, tiny_model)
    answered = unanswered = 0
    with ingest.running() as process:
        client = ingest.client()
        for n in range(2_000):
            if n == 50:
                process.terminate()
            try:
                answer = client.post(ONE % n, JSON, f"Idempotency-Key: {n}")
            except (AssertionError, ConnectionError):
                unanswered += 1
                break
            if answer.status != 200:
                assert answer.status == 503
                assert answer.headers["retry-after"]
                break
            answered += 1
        client.connection.close()
        assert process.wait(10) == 0
    assert answered >= 50
    assert answered <= ingest.state.next_seq <= answered + unanswered + 1


def test_it_ends_although_a_client_stays_connected(tmp_path: Path, tiny_model: Path) -> None:
    """A connection without a request holds nothing up."""
    ingest = Ingest(tmp_path, tiny_model)
    with ingest.running() as process:
        idle = ingest.client()
        process.terminate()
        assert process.wait(10) == 0
        assert idle.closed()
        idle.connection.close()
