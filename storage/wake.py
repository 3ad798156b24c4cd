"""A datagram that shortens a wait. Nothing depends on it: every waiter looks once a second anyway."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Waker", "socket_address", "wake"]


def wake(run_folder: Path) -> None:
    """Tell whoever waits on this data folder to look now; nobody waiting is no error."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.setblocking(False)
        with socket_address(run_folder, "wake.sock") as address:
            sock.sendto(b"1", address)


class Waker:
    """The waiting end: one process (the trainer) binds it."""

    def __init__(self, run_folder: Path) -> None:
        path = run_folder / "wake.sock"
        path.unlink(missing_ok=True)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with socket_address(run_folder, "wake.sock") as address:
            self._sock.bind(address)

    def wait(self, timeout_s: float) -> None:
        """Return on a datagram or after the timeout, whichever is first."""
        self._sock.settimeout(timeout_s)
        with contextlib.suppress(TimeoutError):
            self._sock.recv(16)
            self._sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:  # one look serves all that came together
                    self._sock.recv(16)

    def close(self) -> None:
        """Stop listening."""
        self._sock.close()


@contextlib.contextmanager
def socket_address(folder: Path, name: str) -> Iterator[str]:
    """A path short enough for a socket address (108 bytes), however deep the data folder lies."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
