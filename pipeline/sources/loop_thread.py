"""The thread of a connector that awaits: an event loop of its own, cancelled where it stands by stop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from pipeline.sources.inbox import Connector, Inbox, ReaderThread

__all__ = ["LoopThread", "cancel_others"]

log = logging.getLogger("edgewater.sources")


class LoopThread:
    """Runs one coroutine in a thread of its own until it ends, breaks or is told to stop."""

    def __init__(self) -> None:
        self._thread = ReaderThread()
        self._lock = threading.Lock()  # the loop must not close between the look at it and the call into it
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    def start(
        self, connector: Connector, inbox: Inbox, main: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """Begin; what `main` raises is what broke the connector."""
        self._thread.start(connector, inbox, partial(self._run, main))

    def stop(self) -> None:
        """Cancel whatever is awaited, and wait for the end."""
        self._thread.stopping.set()
        with self._lock:
            if self._loop is not None and self._task is not None:
                self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.stop()

    def _run(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(_note)
        try:
            with self._lock:
                if self._thread.stopping.is_set():
                    return
                self._loop, self._task = loop, loop.create_task(main())
            loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            if not self._thread.stopping.is_set():
                raise RuntimeError("the event loop was cancelled from within") from None
        finally:
            with self._lock:
                self._loop = self._task = None
            loop.run_until_complete(cancel_others())
            loop.run_until_complete(asyncio.sleep(0))  # transports close a turn later
            # Not asyncio.run: it would wait for a name that is still being looked up.
            loop.close()


async def cancel_others() -> None:
    """Cancel all tasks of this loop but the current one, and wait for them."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _note(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What a library's own task raised: the connector finds out by itself, people may want to know why."""
    log.debug("%s: %r", context.get("message"), context.get("exception"))
