"""Connections of the HTTP source: a bounded number, each with one request after the other.

| a request's state | ends with | what the client sees |
|---|---|---|
| head | it is complete, or the timeout | 400 401 403 404 405 408 411 413 415 417 431 |
| body | handed over as it comes | 400 408 413; 429 if the first part finds no room, later ones wait |
| waiting | the commit of its last part | 200, or 400 for a single event that is refused; 503 at the end |
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import socket
import ssl
import time
from functools import partial

import msgspec

from pipeline.sources.http_body import unpacker
from pipeline.sources.http_intake import LINE_TYPES, Delivery, Intake, busy, stopping, too_large
from pipeline.sources.http_wire import CONTINUE, Refusal, Request, Wire, answer, answer_json
from pipeline.sources.inbox import SourceState

__all__ = ["MAX_CONNECTIONS", "PATH", "Server", "ServerLimits"]

PATH = "/v1/events"
MAX_CONNECTIONS = 64
READ_BYTES = 64 << 10
IDLE_S = 75.0  # a connection without a request stays open for so long
LINGER_S = 1.0  # for a client that still sends what we refused: a reset would take the answer away
LINGER_BYTES = 1 << 20
END_S = 0.4  # for the last answers when ingest stops
MIN_BYTES_A_SECOND = 1024
_HELP = (
    "Edgewater takes events here: POST /v1/events, one event as application/json or one a line as "
    "application/x-ndjson, as in\n"
    "  curl --data-binary @events.jsonl -H 'Content-Type: application/x-ndjson' "
    "-H 'Idempotency-Key: 1' http://HOST/v1/events\n"
)
log = logging.getLogger("edgewater.http")


class ServerLimits(msgspec.Struct, frozen=True):
    """What a server takes.

    Attributes:
        token: What clients must send, b"" for nothing.
        max_body: Bytes that a body may have.
        timeout_s: For a head; a body has a second for each KiB more.
    """

    token: bytes
    max_body: int
    timeout_s: float


class _Held:
    """A connection that is open.

    Attributes:
        since: When we began to wait for its client; None while the client waits for us.
        accepted: Its socket, until the task took it over: one that is cancelled before it began never does.
    """

    def __init__(self, accepted: socket.socket) -> None:
        self.accepted: socket.socket | None = accepted
        self.since: float | None = time.monotonic()
        self.task: asyncio.Task[None] | None = None


class Server:
    """Accepts connections, and ends those whose clients let us wait when there are too many.

    Args:
        intake: Takes the bodies.
        limits: What is refused.
        state: Where requests and refusals are counted.
        context: For TLS, None without.
    """

    def __init__(
        self, intake: Intake, limits: ServerLimits, state: SourceState, context: ssl.SSLContext | None
    ) -> None:
        self._intake, self._limits, self._state, self._context = intake, limits, state, context
        self._held: set[_Held] = set()

    async def serve(self, listener: socket.socket) -> None:
        """Serve until cancelled; requests that wait are answered before the end."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    accepted, _ = await loop.sock_accept(listener)
                except OSError as error:  # no descriptors left, or the client went at once
                    log.debug("accept: %s", error)
                    await asyncio.sleep(0.05)
                    continue
                self._admit(accepted)
        finally:
            self._intake.stop()
            tasks = [held.task for held in self._held if held.task is not None]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=END_S)

    def _admit(self, accepted: socket.socket) -> None:
        if len(self._held) >= MAX_CONNECTIONS and not self._displace():
            self._state.count("turned_away")
            with accepted, contextlib.suppress(OSError):
                if self._context is None:
                    refusal = busy()
                    accepted.send(answer(503, f"{refusal}\n", refusal.headers, keep_alive=False))
            return
        held = _Held(accepted)
        held.task = asyncio.create_task(self._connection(accepted, held))
        self._held.add(held)
        held.task.add_done_callback(partial(self._gone, held))

    def _displace(self) -> bool:
        """End the connection whose client lets us wait longest. Returns: False if none does."""
        waiting = [held for held in self._held if held.since is not None]
        if not waiting:
            return False
        longest = min(waiting, key=lambda held: held.since or 0.0)
        self._held.discard(longest)
        self._state.count("displaced")
        if longest.task is not None:
            longest.task.cancel()
        return True

    def _gone(self, held: _Held, task: asyncio.Task[None]) -> None:
        self._held.discard(held)
        if held.accepted is not None:
            held.accepted.close()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("a connection ended: %r", error)

    async def _connection(self, accepted: socket.socket, held: _Held) -> None:
        held.accepted = None
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=READ_BYTES // 2)
        protocol = asyncio.StreamReaderProtocol(reader)
        timeouts = (self._limits.timeout_s, LINGER_S) if self._context else (None, None)
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                accepted,
                ssl=self._context,
                ssl_handshake_timeout=timeouts[0],
                ssl_shutdown_timeout=timeouts[1],
            )
        except BaseException:
            accepted.close()
            raise
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            await _Conversation(self._intake, self._limits, self._state, held, reader, writer).hold()
        finally:
            transport.abort()  # what was to be said was said, and had its time to be read


class _Conversation:
    """The requests of one connection, one after the other."""

    def __init__(
        self,
        intake: Intake,
        limits: ServerLimits,
        state: SourceState,
        held: _Held,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._intake, self._limits, self._state, self._held = intake, limits, state, held
        self._reader, self._writer = reader, writer
        self._wire = Wire()

    async def hold(self) -> None:
        """Answer requests until one of both sides ends the connection."""
        while True:
            try:
                request = await self._next()
            except Refusal as refusal:
                await self._refuse(refusal, None)
                return
            if request is None or not await self._answer(request):
                return

    async def _next(self) -> Request | None:
        """The next request's head; None when no other comes. Raises: Refusal."""
        deadline = None
        while not self._wire.requests:
            if self._wire.fault is not None:
                raise self._wire.fault
            if deadline is None and not self._wire.quiet:
                deadline = time.monotonic() + self._limits.timeout_s
            left = IDLE_S if deadline is None else deadline - time.monotonic()
            try:
                if not await self._read(left):
                    return None
            except TimeoutError:
                if deadline is None:
                    return None
                raise Refusal(408, "the head of the request did not come in time") from None
        return self._wire.requests.popleft()

    async def _read(self, timeout_s: float) -> bool:
        """Feed the wire. Returns: False at the end of what the client sends. Raises: TimeoutError."""
        self._held.since = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                data = await self._reader.read(READ_BYTES)
        except ConnectionError:
            data = b""
        self._held.since = None
        self._wire.feed(data)
        return bool(data)

    async def _answer(self, request: Request) -> bool:
        """Answer one request. Returns: whether the connection goes on."""
        self._state.count("requests")
        try:
            if request.path == "/" and request.method in ("GET", "HEAD"):
                bare = request.method == "HEAD"
                return await self._send(request, answer(200, _HELP, keep_alive=request.goes_on, bare=bare))
            _check(request, self._limits)
            if self._intake.closed:
                raise stopping()
            if b"expect" in request.headers and not request.body and not request.complete:
                self._writer.write(CONTINUE)
            delivery = await self._intake.take(request, _Reading(self, request).read)
        except Refusal as refusal:
            return await self._refuse(refusal, request)
        except asyncio.CancelledError:
            if self._intake.closed:
                self._say(stopping(), request, goes_on=False)
            raise
        except Exception:
            log.exception("a request could not be answered")
            return await self._refuse(Refusal(500, "a fault of this program; its log says more"), request)
        return await self._settled(request, delivery)

    async def _settled(self, request: Request, delivery: Delivery) -> bool:
        refused = [{"line": number, "reason": why} for number, why in delivery.refused]
        content: dict[str, object] = {"accepted": delivery.accepted, "refused": refused}
        if more := delivery.refused_count - len(refused):
            content["more_refused"] = more
        status = 400 if request.media_type not in LINE_TYPES and delivery.refused_count else 200
        if status != 200:
            self._state.count(f"status_{status}")
        return await self._send(request, answer_json(status, content, keep_alive=request.goes_on))

    async def _send(self, request: Request, data: bytes) -> bool:
        self._writer.write(data)
        with contextlib.suppress(OSError):  # who went away gets no answer
            async with asyncio.timeout(self._limits.timeout_s):
                await self._writer.drain()
            return request.goes_on
        return False

    async def _refuse(self, refusal: Refusal, request: Request | None) -> bool:
        """Answer with a refusal. Returns: whether another request may follow."""
        # Only if this one is here whole: what is still to come would be taken for the next.
        goes_on = request is not None and request.goes_on and self._wire.fault is None
        self._say(refusal, request, goes_on=goes_on)
        if request is not None and goes_on:
            return await self._send(request, b"")
        with contextlib.suppress(OSError):
            async with asyncio.timeout(LINGER_S):
                await self._linger()
        return False

    def _say(self, refusal: Refusal, request: Request | None, *, goes_on: bool) -> None:
        self._state.count(f"status_{refusal.status}")
        bare = request is not None and request.method == "HEAD"
        content = {"error": str(refusal)}
        self._writer.write(
            answer_json(refusal.status, content, refusal.headers, keep_alive=goes_on, bare=bare)
        )

    async def _linger(self) -> None:
        """Read for a moment what the client still sends, so that it comes to read our answer."""
        await self._writer.drain()
        if self._writer.can_write_eof():
            self._writer.write_eof()
        self._held.since = time.monotonic()
        left = LINGER_BYTES
        while left > 0 and (data := await self._reader.read(READ_BYTES)):
            left -= len(data)

    async def more(self, request: Request, timeout_s: float) -> None:
        """Wait until more of a request's body is here. Raises: Refusal."""
        if self._wire.fault is not None:
            raise self._wire.fault
        try:
            more = await self._read(timeout_s)
        except TimeoutError:
            raise Refusal(408, "the body did not come in time") from None
        if not more:
            raise Refusal(400, "the body is cut short")

    @property
    def limits(self) -> ServerLimits:
        """What is refused."""
        return self._limits


class _Reading:
    """Reads the body of one request; time in which we held the client back is not held against it."""

    def __init__(self, conversation: _Conversation, request: Request) -> None:
        self._conversation, self._request = conversation, request
        self._came, self._waited_s = 0, 0.0

    async def read(self) -> bytes:
        """The next piece, b"" at the end. Raises: Refusal where it is too slow, too large or broken."""
        request, limits = self._request, self._conversation.limits
        while not request.body:
            if request.complete:
                return b""
            before = time.monotonic()
            allowed_s = limits.timeout_s + self._came / MIN_BYTES_A_SECOND
            await self._conversation.more(request, allowed_s - self._waited_s)
            self._waited_s += time.monotonic() - before
        data = b"".join(request.body)
        request.body.clear()
        self._came += len(data)
        if self._came > limits.max_body:
            raise too_large(limits.max_body)
        return data


def _check(request: Request, limits: ServerLimits) -> None:
    """Refuse by the head alone what will not be taken. Raises: Refusal."""
    if request.path != PATH:
        raise Refusal(404, f"nothing is here: POST events to {PATH}")
    if request.method != "POST":
        message = f"events are sent with POST {PATH}; nothing can be read here"
        raise Refusal(405, message, {"Allow": "POST"})
    if b"origin" in request.headers:
        # Any page in a browser on this machine could write to a loopback address.
        raise Refusal(403, "events are not taken from web pages: send them without the header Origin")
    _authorize(request, limits.token)
    length = request.content_length
    if length is None and b"transfer-encoding" not in request.headers:
        raise Refusal(411, "Content-Length is missing")
    if length is not None and length > limits.max_body:
        raise too_large(limits.max_body)
    if request.media_type not in LINE_TYPES and request.media_type != "application/json":
        raise Refusal(
            415,
            "send one event as Content-Type: application/json, or one a line as application/x-ndjson "
            "(curl --data-binary @FILE -H 'Content-Type: application/x-ndjson')",
        )
    unpacker(request.encoding)
    if request.headers.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise Refusal(417, "only 100-continue may be expected")
    key = request.headers.get(b"idempotency-key")
    if key is not None and not (1 <= len(key) <= 255 and key.isascii() and key.decode().isprintable()):
        raise Refusal(400, "an Idempotency-Key is 1 to 255 printable ASCII characters")


def _authorize(request: Request, token: bytes) -> None:
    if not token:
        return
    scheme, _, given = request.headers.get(b"authorization", b"").partition(b" ")
    if not hmac.compare_digest(given.strip(), token) or scheme.lower() != b"bearer":
        challenge = {"WWW-Authenticate": 'Bearer realm="edgewater"'}
        raise Refusal(401, "send Authorization: Bearer and the token of this source", challenge)
