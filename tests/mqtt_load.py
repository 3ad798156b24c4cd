"""Load for the MQTT source: a publisher that costs next to nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence

from pipeline.sources.mqtt_packets import connect, publish

__all__ = ["RawPublisher", "encode_all"]

WAIT_S = 60.0
WINDOW = 20_000  # messages that the broker has not acknowledged


def encode_all(topic: str, payloads: Sequence[bytes]) -> list[bytes]:
    """PUBLISH packets at QoS 1, ready to send, 256 in each piece."""
    packets = [publish(4, topic, payload, number % 65_535 + 1) for number, payload in enumerate(payloads)]
    return [b"".join(packets[at : at + 256]) for at in range(0, len(packets), 256)]


class RawPublisher:
    """Sends bytes that were made beforehand, and counts the PUBACKs. MQTT 3.1.1, without a session."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
        self._socket.sendall(connect(4, f"load-{port}-{id(self)}", clean=True))
        assert self._socket.recv(4) == b"\x20\x02\x00\x00", "the broker refuses the publisher"
        self.sent = self._acked_bytes = 0
        self._thread = threading.Thread(target=self._count, daemon=True)
        self._thread.start()

    @property
    def acked(self) -> int:
        """Messages that the broker has."""
        return self._acked_bytes // 4

    def publish(self, topic: str, payloads: Sequence[bytes]) -> None:
        """Send messages; ids go on from the last."""
        first = self.sent
        packets = [publish(4, topic, data, (first + i) % 65_535 + 1) for i, data in enumerate(payloads)]
        self.send(b"".join(packets), len(payloads))

    def send(self, data: bytes, count: int) -> None:
        """Send `count` messages; waits while WINDOW are not acknowledged."""
        self._until(self.sent - WINDOW)
        self._socket.sendall(data)
        self.sent += count

    def drain(self) -> None:
        """Wait until the broker has everything."""
        self._until(self.sent)

    def close(self) -> None:
        """Leave."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(WAIT_S)
        self._socket.close()

    def _until(self, acked: int) -> None:
        deadline = time.monotonic() + WAIT_S
        while self.acked < acked:
            assert time.monotonic() < deadline, f"the broker acknowledged {self.acked} of {self.sent}"
            time.sleep(0.001)

    def _count(self) -> None:
        self._socket.settimeout(None)
        with contextlib.suppress(OSError):
            while data := self._socket.recv(1 << 16):
                self._acked_bytes += len(data)
