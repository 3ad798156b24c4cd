"""A TCP relay between a connector and its server: the network that a test cuts, mends or silences."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from tests.loops import LoopInThread

__all__ = ["Relay"]


class Relay:
    """Relays connections to a port of this machine.

    Attributes:
        port: Where it listens; stays the same over cuts.
        connections: How many are open.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = LoopInThread()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._silent = False
        self.connections = 0
        self.port = 0
        self.mend()

    def cut(self) -> None:
        """Close all connections, refuse new ones."""
        self._loop.run(self._cut())

    def mend(self) -> None:
        """Relay again."""
        self._silent = False
        self._loop.run(self._listen())

    def silence(self) -> None:
        """Keep connections open, take new ones, and let no byte through, in either direction."""
        self._silent = True

    def close(self) -> None:
        """End it."""
        self.cut()
        self._loop.close()

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()
        while self.connections:
            await asyncio.sleep(0.005)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers.add(back)
            try:
                await asyncio.gather(self._copy(reader, back), self._copy(there, writer))
            finally:
                self._writers.discard(back)
                back.transport.abort()
        except OSError:
            pass  # nobody there: the caller sees the connection end
        finally:
            self._writers.discard(writer)
            writer.transport.abort()
            self.connections -= 1

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                if not self._silent:
                    writer.write(data)
                    await writer.drain()
        writer.transport.abort()
