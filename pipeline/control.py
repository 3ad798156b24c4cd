"""The control socket of an ingest process: what it alone can answer, asked by the same user on this machine.

`data_dir/run/ingest-<shard>.sock` (0600, in a folder of 0700); whoever connects is asked for its user by
SO_PEERCRED. One connection is one request: a line of JSON, and back one line or, for `tap`, a stream of them
until either side ends.

    -> {"v":1,"do":"sources"}
    <- {"v":1,"sources":{"mqtt:plant":{"connected":true,...}}}
    -> {"v":1,"do":"retry","letters":[17]}
    <- {"v":1,"error":"why not"}

Each client has a thread of its own, and they are few: whatever one does, it holds up nobody but itself.
Nothing that must not be lost goes this way: an answer that does not come back means look, and ask again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from storage.folder import DataFolder
from storage.wake import socket_address

__all__ = [
    "MAX_CLIENTS", "REQUEST_BYTES", "Answers", "ControlError", "ControlServer", "NoIngestError", "Request",
    "ask", "listening", "stream",
]  # fmt: skip

VERSION = 1
REQUEST_BYTES = 32 << 10
ANSWER_BYTES = 4 << 20  # of one line, as a client takes it
MAX_CLIENTS = 8
REQUEST_S = 5.0  # a request must be here by then
SEND_S = 10.0  # a client that takes nothing for so long is gone
_PEER = struct.Struct("3i")  # pid, uid, gid
_SOCKET = re.compile(r"ingest-([a-z0-9][a-z0-9._-]*)\.sock")
log = logging.getLogger("edgewater.control")


class ControlError(Exception):
    """A request that an ingest process refused; the message says why."""


class NoIngestError(Exception):
    """No ingest process answers on a data folder."""


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is asked for.

    Attributes:
        v: Version of the protocol.
        do: Name of the verb.
        source: `tap`: only this source, "" for all.
        rate: `tap`: follow at most so many events a second.
        max_events: `tap`: end after so many, 0 never.
        letters: `retry`, `purge`: numbers of dead letters.
    """

    v: int
    do: str
    source: str = ""
    rate: float = 0.0
    max_events: int = 0
    letters: list[int] = []


# Yields what to send, one line each; None where there is nothing yet, so that a client that left is noticed.
Answers = Generator[Mapping[str, Any] | None, None, None]
Verb = Callable[[Request], Answers]


class ControlServer:
    """Answers on the control socket of one shard until it is closed; its caller holds the shard's lock.

    Args:
        run_folder: The data folder's `run`.
        shard: Name of the shard.
        verbs: Name -> what answers it, called in a thread of its own; what it raises as ControlError is said.
    Raises: OSError where no socket can be made.
    """

    def __init__(self, run_folder: Path, shard: str, verbs: Mapping[str, Verb]) -> None:
        self._verbs = verbs
        self._path = run_folder / f"ingest-{shard}.sock"
        self._clients: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closing = False
        self._path.unlink(missing_ok=True)  # of one that was killed: the lock says that none lives
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with socket_address(run_folder, self._path.name) as address:
                self._sock.bind(address)
            self._path.chmod(0o600)
            self._sock.listen(MAX_CLIENTS)  # only from here on can anybody connect
        except OSError:
            self._sock.close()
            raise
        self._thread = threading.Thread(target=self._accept, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering; who is connected sees the end."""
        with self._lock:
            self._closing = True
            open_now = [self._sock, *self._clients]
        for sock in open_now:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=2)
        self._sock.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._sock.accept()
            except OSError as error:
                if self._closing:
                    return
                log.warning("the control socket: %s", error)  # no free file descriptor, say
                time.sleep(1.0)
                continue
            if self._admits(client):
                thread = threading.Thread(target=self._serve, args=(client,), name="control", daemon=True)
                thread.start()
            else:
                client.close()

    def _admits(self, client: socket.socket) -> bool:
        if _uid_of(client) != os.geteuid():
            log.debug("the control socket: a process of user %d was refused", _uid_of(client))
            return False
        with self._lock:
            if self._closing:
                return False
            free = len(self._clients) < MAX_CLIENTS
            if free:
                self._clients.add(client)
        if not free:
            client.setblocking(False)
            with contextlib.suppress(OSError):
                _send(client, {"error": f"{MAX_CLIENTS} others ask already: try again"})
        return free

    def _serve(self, client: socket.socket) -> None:
        try:
            self._answer(client)
        except OSError:
            pass  # it left, or took nothing for too long
        except Exception:
            log.exception("the control socket: a request failed")
        finally:
            with self._lock:
                self._clients.discard(client)
            client.close()

    def _answer(self, client: socket.socket) -> None:
        try:
            request = _decode_request(_read_line(client, REQUEST_BYTES, REQUEST_S))
            verb = self._verbs.get(request.do)
            if verb is None:
                raise ControlError(f"no verb {request.do[:40]!r}")
            # Closed in every case, so that a verb ends what it began when its client leaves.
            with contextlib.closing(verb(request)) as answers:
                client.settimeout(SEND_S)
                for answer in answers:
                    if answer is not None:
                        _send(client, answer)
                    elif self._closing or _left(client):
                        return
        except ControlError as error:
            _send(client, {"error": str(error)})


def listening(folder: DataFolder) -> list[str]:
    """Shards whose ingest process may be running: those that have a socket."""
    found = (_SOCKET.fullmatch(path.name) for path in folder.run.glob("ingest-*.sock"))
    return sorted(match[1] for match in found if match)


def stream(
    folder: DataFolder, shard: str, do: str, timeout_s: float, **fields: Any
) -> Iterator[dict[str, Any]]:
    """Ask one shard; yield what it answers until it ends.

    Args:
        timeout_s: The longest silence.
        fields: As in Request.
    Raises: NoIngestError where nobody listens; ControlError if it refused, said nothing in time or broke off.
    """
    request = msgspec.json.encode(Request(VERSION, do, **fields)) + b"\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            with socket_address(folder.run, f"ingest-{shard}.sock") as address:
                sock.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            raise NoIngestError(_nobody(folder)) from None
        try:
            sock.sendall(request)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it may have said why before it closed
        except TimeoutError:
            raise ControlError(f"ingest ({shard}) took nothing for {timeout_s:.0f} s") from None
        yield from _lines_of(sock, shard, timeout_s)


def ask(folder: DataFolder, do: str, timeout_s: float = 5.0, **fields: Any) -> dict[str, dict[str, Any]]:
    """Ask every running ingest process for one answer. Returns: shard -> its answer.

    Raises: NoIngestError where none runs; ControlError if one refused or did not answer.
    """
    answers: dict[str, dict[str, Any]] = {}
    for shard in listening(folder):
        with contextlib.suppress(NoIngestError):
            for answer in stream(folder, shard, do, timeout_s, **fields):
                answers[shard] = answer
    if not answers:
        raise NoIngestError(_nobody(folder))
    return answers


def _nobody(folder: DataFolder) -> str:
    return f"no ingest runs on {folder.path}: start `edgewater run`"


def _lines_of(sock: socket.socket, shard: str, timeout_s: float) -> Iterator[dict[str, Any]]:
    held, answered = bytearray(), False
    while True:
        try:
            data = sock.recv(1 << 16)
        except TimeoutError:
            raise ControlError(f"ingest ({shard}) did not answer within {timeout_s:.0f} s") from None
        except ConnectionResetError:
            data = b""
        if not data:
            if not answered:
                raise ControlError(f"ingest ({shard}) ended, or refused this user, without an answer")
            return
        held += data
        while (end := held.find(b"\n")) >= 0:
            line = bytes(held[:end])
            del held[: end + 1]
            yield _decode_answer(line, shard)
            answered = True
        if len(held) > ANSWER_BYTES:
            raise ControlError(f"ingest ({shard}) sent a line without end")


def _decode_answer(line: bytes, shard: str) -> dict[str, Any]:
    try:
        answer = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError):
        raise ControlError(f"ingest ({shard}) sent what is no answer") from None
    if answer.pop("v", None) != VERSION:
        raise ControlError(f"ingest ({shard}) is of another version: restart it")
    if "error" in answer:
        raise ControlError(str(answer["error"]))
    return answer


def _decode_request(line: bytes) -> Request:
    try:
        request = msgspec.json.decode(line, type=Request)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ControlError(f"not a request: {error}") from None
    if request.v != VERSION:
        raise ControlError(f"version {request.v} of the protocol is not spoken here, {VERSION} is")
    return request


def _read_line(client: socket.socket, most_bytes: int, most_s: float) -> bytes:
    """One line. Raises: ControlError if it is too long or too slow."""
    deadline = time.monotonic() + most_s
    held = bytearray()
    while b"\n" not in held:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise ControlError(f"no request within {most_s:.0f} s")
        client.settimeout(left_s)
        try:
            data = client.recv(4_096)
        except TimeoutError:
            continue
        if not data:
            raise ControlError("a request ends with a line end")
        held += data
        if len(held) > most_bytes:
            raise ControlError(f"a request of more than {most_bytes} bytes")
    return bytes(held[: held.index(b"\n")])


def _send(client: socket.socket, answer: Mapping[str, Any]) -> None:
    client.sendall(msgspec.json.encode({"v": VERSION, **answer}) + b"\n")


def _left(client: socket.socket) -> bool:
    """Whether the other end is closed."""
    readable = select.poll()  # asked first: a socket with a timeout waits in recv, whatever the flags
    readable.register(client, select.POLLIN)
    return bool(readable.poll(0)) and client.recv(1, socket.MSG_PEEK) == b""


def _uid_of(client: socket.socket) -> int:
    data = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(data)[1])
