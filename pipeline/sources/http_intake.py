"""From the bodies of requests to the inbox, and back from the commit to whoever waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import cast

from pipeline.events import Line, Origin
from pipeline.sources.http_body import PIECE_BYTES, Cutter, LineCutter, WholeCutter, unpacker
from pipeline.sources.http_wire import Refusal, Request
from pipeline.sources.inbox import Chunk, Connector, Inbox, Settled

__all__ = ["LINE_TYPES", "Delivery", "Intake", "busy", "settle", "stopping", "too_large"]

LINE_TYPES = frozenset({"application/x-ndjson", "application/jsonl", "application/ndjson", ""})
MAX_PACKED = 8  # requests that unpack at once: each may take 8 MiB to do it
MAX_REASONS = 100  # refused lines that an answer tells of
ROOM_S = 0.25  # a request waits so long for room before it gets 429: ten commits
STUCK_S = 60.0  # nothing was taken or committed for so long: the client shall try again
POLL_S = 0.005
MANY_LINES = 256  # a request with so many waits for no others


class Delivery:
    """What one request handed over, until all of it is committed.

    Attributes:
        lines: How many.
        done: Ends when they are committed.
        accepted: Lines that did not become dead letters.
        refused: (number in the body, why) of the first that did.
        refused_count: Of all that did.
    """

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lines = self.accepted = self.refused_count = 0
        self.refused: list[tuple[int, str]] = []
        self._parts = 0
        self._sealed = False

    def add(self, lines: int) -> None:
        """A chunk was handed over."""
        self._parts += 1
        self.lines += lines

    def seal(self) -> None:
        """Nothing more will be."""
        self._sealed = True
        self._look()

    def settle(self, numbers: list[int], refused: list[tuple[int, str]]) -> None:
        """A chunk was committed."""
        self._parts -= 1
        self.accepted += len(numbers) - len(refused)
        self.refused_count += len(refused)
        room = MAX_REASONS - len(self.refused)
        self.refused += [(numbers[at], why) for at, why in refused[:room]]
        self._look()

    def _look(self) -> None:
        if self._sealed and not self._parts and not self.done.done():
            self.done.set_result(None)


def settle(settled: list[Settled]) -> None:
    """Pass on what a commit made of chunks."""
    for one in settled:
        delivery, numbers = cast("tuple[Delivery, list[int]]", one.receipt)
        delivery.settle(numbers, one.refused)


class Intake:
    """Hands bodies over to the inbox and waits for their commits; requests gather for one.

    Args:
        connector: Whose chunks they are.
        inbox: Where they go.
        origin: Makes the origin of lines that arrive now.
        max_body: Bytes that a body may have, unpacked.
        gather_s: Requests that come within this time share a commit.
    """

    def __init__(
        self,
        connector: Connector,
        inbox: Inbox,
        origin: Callable[[], Origin],
        *,
        max_body: int,
        gather_s: float,
    ) -> None:
        self._connector, self._inbox, self._origin = connector, inbox, origin
        self._max_body, self._gather_s = max_body, gather_s
        self._gathering = self._stopped = False
        self._packed = 0

    @property
    def closed(self) -> bool:
        """Whether ingest stops: nothing more is taken."""
        return self._stopped or self._inbox.closed.is_set()

    def stop(self) -> None:
        """Take nothing more."""
        self._stopped = True

    async def take(self, request: Request, read: Callable[[], Awaitable[bytes]]) -> Delivery:
        """Hand a body over as it comes, and wait for the commit.

        Args:
            request: Whose body.
            read: Gives the next piece of it, b"" at its end.
        Raises: Refusal.
        """
        packed = request.encoding not in ("", "identity")
        if packed and self._packed >= MAX_PACKED:
            raise busy()
        self._packed += packed
        try:
            delivery = await self._cut(request, read)
        finally:
            self._packed -= packed
        try:
            async with asyncio.timeout(STUCK_S):
                await delivery.done
        except TimeoutError:
            message = "not committed yet: send it again later, with the same Idempotency-Key"
            raise Refusal(503, message, {"Retry-After": "10"}) from None
        return delivery

    async def _cut(self, request: Request, read: Callable[[], Awaitable[bytes]]) -> Delivery:
        by_line = request.media_type in LINE_TYPES
        cutter: Cutter = LineCutter() if by_line else WholeCutter()
        unpack = unpacker(request.encoding)
        body = _Body(request.text(b"idempotency-key"), by_line)
        unpacked = 0
        while data := await read():
            for piece in unpack.feed(data):
                unpacked += len(piece)
                if unpacked > self._max_body:
                    raise too_large(self._max_body)
                if body.waiting_bytes + len(piece) > PIECE_BYTES:
                    await self._hand_over(body, urgent=False)
                body.add(cutter.feed(piece), len(piece))
        unpack.finish()
        body.add(cutter.finish(), 0)
        count = body.delivery.lines + len(body.waiting)
        if not count:
            raise Refusal(400, "the body holds no event")
        hurry = not self._gather_s or count >= MANY_LINES
        await self._hand_over(body, urgent=hurry)
        if not hurry:
            self._gather()
        body.delivery.seal()
        return body.delivery

    async def _hand_over(self, body: _Body, *, urgent: bool) -> None:
        """Put what waits into the inbox, as one chunk. Raises: Refusal where there is no room for long."""
        delivery = body.delivery
        chunk = body.chunk(self._connector, self._origin(), urgent=urgent)
        if not chunk.lines and not urgent:
            return
        # One that has begun to be stored is rather finished.
        deadline = time.monotonic() + (STUCK_S if delivery.lines else ROOM_S)
        while not self._inbox.offer(chunk):
            if self.closed:
                raise stopping()
            if time.monotonic() > deadline:
                raise busy()
            await asyncio.sleep(POLL_S)
        delivery.add(len(chunk.lines))

    def _gather(self) -> None:
        """Ask for a commit when others had time to join."""
        if not self._gathering:
            self._gathering = True
            asyncio.get_running_loop().call_later(self._gather_s, self._hurry)

    def _hurry(self) -> None:
        if self.closed or self._inbox.offer(Chunk(self._connector, [], urgent=True)):
            self._gathering = False
        else:  # full: it is being emptied right now
            asyncio.get_running_loop().call_later(POLL_S, self._hurry)


class _Body:
    """Events of a body that are not handed over yet."""

    def __init__(self, key: str, by_line: bool) -> None:
        self.delivery = Delivery()
        self.waiting: list[tuple[int, bytes]] = []
        self.waiting_bytes = 0
        self._key, self._by_line = key, by_line

    def add(self, events: list[tuple[int, bytes]], data_bytes: int) -> None:
        """Events were cut."""
        self.waiting += events
        self.waiting_bytes += data_bytes

    def chunk(self, connector: Connector, origin: Origin, *, urgent: bool) -> Chunk:
        """What waits, as a chunk; nothing waits then."""
        events, self.waiting, self.waiting_bytes = self.waiting, [], 0
        key = self._key
        if key and self._by_line:
            lines = [Line(data, -1, origin, f"{key}:{number}") for number, data in events]
        else:
            lines = [Line(data, -1, origin, key) for _, data in events]
        receipt = (self.delivery, [number for number, _ in events])
        return Chunk(connector, lines, receipt=receipt, urgent=urgent)


def busy() -> Refusal:
    """There is no room."""
    message = "busy: send it again after a pause, with the same Idempotency-Key"
    return Refusal(429, message, {"Retry-After": "1"})


def stopping() -> Refusal:
    """Ingest ends."""
    message = "stopping: send it again later, with the same Idempotency-Key"
    return Refusal(503, message, {"Retry-After": "5"})


def too_large(limit: int) -> Refusal:
    """A body has too many bytes."""
    return Refusal(413, f"a body of more than {limit} bytes: send it in parts")
