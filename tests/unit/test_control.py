"""The control socket: who may ask, what a hostile client costs, how its end is noticed."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import control
from pipeline.control import Answers, ControlError, ControlServer, NoIngestError, Request, ask, stream
from pipeline.looking import _live_sources
from storage.folder import DataFolder


class Served:
    """A control server with verbs for these tests."""

    def __init__(self, path: Path) -> None:
        self.folder = DataFolder.open(path, create=True)
        self.path = self.folder.run / "ingest-main.sock"
        self.ended = threading.Event()
        verbs = {
            "echo": self.echo, "ticks": self.ticks, "late": self.late, "no": self.no, "flood": self.flood,
        }  # fmt: skip
        self.server = ControlServer(self.folder.run, "main", verbs)

    def echo(self, request: Request) -> Answers:
        yield {"letters": request.letters}

    def ticks(self, request: Request) -> Answers:
        try:
            yield {"tick": 1}
            while True:
                time.sleep(0.02)
                yield None
        finally:
            self.ended.set()

    def late(self, request: Request) -> Answers:
        for _ in range(20):
            yield None
        yield {"late": True}

    def no(self, request: Request) -> Answers:
        raise ControlError("not today")
        yield {}

    def flood(self, request: Request) -> Answers:
        try:
            while True:
                yield {"filler": "x" * 10_000}
        finally:
            self.ended.set()

    def raw(self, data: bytes) -> bytes:
        """What comes back for bytes that are sent as they are."""
        with self.connect() as sock:
            got = b""
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # it need not take all
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                while part := sock.recv(1 << 16):
                    got += part
            return got

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(str(self.path))
        return sock


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path / "data")
    yield made
    made.server.close()
    made.folder.close()


def until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_answer_comes_back_from_every_shard_that_listens(served: Served) -> None:
    second = ControlServer(served.folder.run, "2", {"echo": served.echo})
    try:
        expected = {"main": {"letters": [3, 4]}, "2": {"letters": [3, 4]}}
        assert ask(served.folder, "echo", letters=[3, 4]) == expected
    finally:
        second.close()
    assert ask(served.folder, "echo") == {"main": {"letters": []}}


def test_without_ingest_the_message_says_what_to_start(served: Served) -> None:
    served.server.close()
    assert not served.path.exists()
    with pytest.raises(NoIngestError, match=r"no ingest runs on .*data: start `edgewater run`"):
        ask(served.folder, "echo")


def test_the_socket_of_a_killed_process_counts_as_none_and_the_next_one_takes_its_place(
    served: Served,
) -> None:
    served.server.close()
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(served.path))
    left.close()
    with pytest.raises(NoIngestError):
        ask(served.folder, "echo")
    served.server = ControlServer(served.folder.run, "main", {"echo": served.echo})
    assert ask(served.folder, "echo") == {"main": {"letters": []}}


def test_a_data_folder_may_lie_deeper_than_a_socket_address_is_long(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["a-name-of-twenty-let"] * 8)
    deep.mkdir(parents=True)
    served = Served(deep / "data")
    try:
        assert ask(served.folder, "echo", letters=[1]) == {"main": {"letters": [1]}}
    finally:
        served.server.close()
        served.folder.close()


def test_only_its_owner_may_open_the_socket(served: Served) -> None:
    assert stat.S_IMODE(served.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(served.folder.run.stat().st_mode) & 0o077 == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused_even_where_the_modes_let_it_in(served: Served) -> None:
    """The kernel says who connected: modes that somebody changed do not matter."""
    served.path.chmod(0o777)
    other = (
        "import os, socket, sys\n"
        "sock = socket.socket(socket.AF_UNIX); sock.connect(sys.argv[1])\n"
        "os.setresuid(*3 * [int(sys.argv[2])])\n"
        "sock.settimeout(10)\n"
        'sock.sendall(b\'{"v":1,"do":"echo"}\\n\')\n'
        "print(sock.recv(1000))\n"
    )
    # A connection has the identity of the moment it was made: so this one is ours still, the next is not.
    early = subprocess.run(
        [sys.executable, "-c", other, str(served.path), "65534"], capture_output=True, check=True, timeout=30
    )
    assert b'"letters":[]' in early.stdout
    late = other.replace("os.setresuid(*3 * [int(sys.argv[2])])\n", "")
    late = "import os, sys\nos.chdir(sys.argv[3])\nos.setresuid(*3 * [int(sys.argv[2])])\n" + late
    words = [sys.executable, "-c", late, served.path.name, "65534", str(served.folder.run)]
    for part in (served.folder.path, served.folder.run):
        part.chmod(0o755)
    refused = subprocess.run(words, capture_output=True, check=False, timeout=30)
    assert refused.stdout in (b"b''\n", b"")  # nothing at all, or a connection that is closed
    assert b"PermissionError" not in refused.stderr  # it did get in


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\n", "not a request"),
        (b"\xff\xfe\n", "not a request"),
        (b"[" * 20_000 + b"\n", "not a request"),
        (b'{"v":1,"do":"echo","more":1}\n', "not a request"),
        (b'{"v":1,"do":"echo","letters":["a"]}\n', "not a request"),
        (b'{"v":2,"do":"echo"}\n', "version 2 of the protocol"),
        (b'{"v":1,"do":"shutdown"}\n', "no verb 'shutdown'"),
        (b'{"v":1,"do":"no"}\n', "not today"),
        (b'{"v":1,"do":"echo"}', "ends with a line end"),
        (b"x" * (control.REQUEST_BYTES + 5_000), "a request of more than"),
    ],
)
def test_what_is_no_request_gets_a_reason_and_nothing_else(served: Served, data: bytes, says: str) -> None:
    answer = served.raw(data)
    assert answer.startswith(b'{"v":1,"error":')
    assert says in answer.decode()
    assert ask(served.folder, "echo") == {"main": {"letters": []}}


def test_a_client_that_says_nothing_is_sent_away(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "REQUEST_S", 0.2)
    with served.connect() as sock:
        for byte in b'{"v"':  # one byte at a time does not help
            sock.sendall(bytes([byte]))
        assert b"no request within" in sock.recv(1_000)
        assert sock.recv(1_000) == b""


def test_more_clients_than_places_are_told_so_and_the_others_go_on(served: Served) -> None:
    talks = [stream(served.folder, "main", "ticks", 5.0) for _ in range(control.MAX_CLIENTS)]
    assert [next(talk) for talk in talks] == [{"tick": 1}] * control.MAX_CLIENTS
    with pytest.raises(ControlError, match="others ask already"):
        ask(served.folder, "echo")
    for talk in talks:
        talk.close()  # type: ignore[attr-defined]

    def free() -> bool:
        try:
            return bool(ask(served.folder, "echo"))
        except ControlError:
            return False

    until(free)


def test_a_client_that_waits_is_not_taken_for_one_that_left(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "SEND_S", 0.05)  # looking whether it left must not wait, nor end it
    assert ask(served.folder, "late") == {"main": {"late": True}}


def test_a_client_that_left_ends_what_it_asked_for(served: Served) -> None:
    talk = stream(served.folder, "main", "ticks", 5.0)
    assert next(talk) == {"tick": 1}
    talk.close()  # type: ignore[attr-defined]
    assert served.ended.wait(10)


def test_a_client_that_takes_nothing_is_let_go(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "SEND_S", 0.2)
    with served.connect() as sock:
        sock.sendall(b'{"v":1,"do":"flood"}\n')
        assert served.ended.wait(10)


def test_the_end_of_the_server_ends_a_talk_and_what_it_runs(served: Served) -> None:
    talk = stream(served.folder, "main", "ticks", 5.0)
    assert next(talk) == {"tick": 1}
    served.server.close()
    assert list(talk) == []
    assert served.ended.wait(10)


def test_an_answer_that_does_not_come_is_an_error_that_says_so(served: Served) -> None:
    talk = stream(served.folder, "main", "ticks", 0.2)
    next(talk)
    with pytest.raises(ControlError, match="did not answer within"):
        next(talk)


def test_a_process_that_says_nothing_hides_no_other_from_status(tmp_path: Path) -> None:
    folder = DataFolder.open(tmp_path / "data", create=True)

    def sources(request: Request) -> Answers:
        yield {"sources": {"stdin:a": {"connected": None}}}

    def silent(request: Request) -> Answers:
        yield from ()

    servers = [
        ControlServer(folder.run, "main", {"sources": silent}),
        ControlServer(folder.run, "shard-2", {"sources": sources}),
    ]
    try:
        assert _live_sources(folder) == [{"shard": "shard-2", "name": "stdin:a", "connected": None}]
    finally:
        for server in servers:
            server.close()
