"""POST /v1/events: events over HTTP, answered when they are on stable storage.

What was handed over is committed also where the client went away meanwhile: its repetition is dropped by the
Idempotency-Key, or by the events' own `id` or `ts`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import stat
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from pipeline.events import Origin
from pipeline.source_settings import HttpSource
from pipeline.sources.http_intake import Intake, settle
from pipeline.sources.http_server import Server, ServerLimits
from pipeline.sources.inbox import Inbox, Settled
from pipeline.sources.loop_thread import LoopThread

__all__ = ["HttpConnector"]

BACKLOG = 128
log = logging.getLogger("edgewater.http")


class HttpConnector:
    """A server in a thread of its own.

    Args:
        source: Name of the configured source.
        settings: Its table.
    Attributes:
        address: What it listens on, once it does: (host, port), or a path.
    """

    def __init__(self, source: str, settings: HttpSource) -> None:
        self.name = f"http:{source}"
        self.address: tuple[str, int] | str | None = None
        self._source, self._settings = source, settings
        self._allowed = None if "*" in settings.sources else frozenset(settings.sources)
        self._thread = LoopThread()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None:
        """Begin to listen."""
        self._thread.start(self, inbox, partial(self._run, inbox))

    def acknowledge(self, settled: list[Settled]) -> None:
        """Answer the requests that are committed whole now."""
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, settled)

    def stop(self) -> None:
        """Take no more requests; those that were committed are still answered."""
        self._thread.stop()

    async def _run(self, inbox: Inbox) -> None:
        settings = self._settings
        context = _tls(settings)
        listener = _listen(settings.listen)
        self._loop = asyncio.get_running_loop()
        try:
            named = listener.getsockname()
            self.address = named if isinstance(named, str) else (named[0], named[1])
            state = inbox.state(self)
            state.detail = _described(self.address, context is not None)
            log.info("source %s %s", self._source, state.detail)
            max_body = int(settings.max_body)
            intake = Intake(self, inbox, self._origin, max_body=max_body, gather_s=float(settings.gather))
            limits = ServerLimits(settings.token.encode(), max_body, float(settings.timeout))
            await Server(intake, limits, state, context).serve(listener)
        finally:
            self._loop = None
            listener.close()
            if isinstance(self.address, str):
                Path(self.address).unlink(missing_ok=True)

    def _origin(self) -> Origin:
        return Origin(self._source, self.name, time.time(), allowed=self._allowed)


def _tls(settings: HttpSource) -> ssl.SSLContext | None:
    """What encrypts, None for nothing. Raises: OSError that says what is wrong with the certificate."""
    if not settings.cert_file:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.cert_file, settings.key_file or None)
    except OSError as error:  # ssl's own errors are some
        raise OSError(f"cannot use the certificate {settings.cert_file}: {error}") from error
    return context


def _listen(listen: str) -> socket.socket:
    """A listening socket. Raises: OSError that says where it could not listen."""
    try:
        if listen.startswith("unix:"):
            return _listen_local(Path(listen.removeprefix("unix:")))
        host, _, port = listen.rpartition(":")
        host = "127.0.0.1" if host == "localhost" else host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, int(port)), family=family, backlog=BACKLOG)
    except OSError as error:
        raise OSError(f"cannot listen on {listen}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


def _listen_local(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.lstat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise OSError("another process listens there")
            path.unlink()  # left by one that was killed
        listener.bind(str(path))
        path.chmod(0o660)  # nobody can connect before the next line
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _described(address: tuple[str, int] | str, encrypted: bool) -> str:
    if isinstance(address, str):
        return f"listens on unix:{address}"
    host, port = address
    host = f"[{host}]" if ":" in host else host
    return f"listens on {'https' if encrypted else 'http'}://{host}:{port}"
