"""Load for the MQTT source: a publisher that costs next to nothing, and the process that takes it in."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from pipeline.sources.mqtt_packets import connect, publish
from storage.errors import StorageError
from storage.ring import Ring

__all__ = ["Gateway", "RawPublisher", "cpu_s", "encode_all"]

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """\
data_dir = "{folder}/data"
[model]
path = "{model}"
[health]
listen = ""
[ring]
flush_ms = 200
[[sources]]
name = "plant"
kind = "mqtt"
render = {{ digits = 17 }}
[sources.mqtt]
url = "mqtt://127.0.0.1:{port}"
client_id = "bench"
version = "{version}"
[sources.mqtt.topics]
"load/event" = {{ sources = ["*"] }}
"load/number" = {{ payload = "number" }}
"""
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
        self._socket.settimeout(None)  # before there are two threads: it changes how both of them wait
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
        with contextlib.suppress(OSError):
            while data := self._socket.recv(1 << 16):
                self._acked_bytes += len(data)


class Gateway:
    """`edgewater ingest`, subscribed to a port; it can be killed and started again."""

    def __init__(self, folder: Path, model: Path, port: int, version: str = "5") -> None:
        self._folder, self._model = folder, model
        self._config = folder / "edgewater.toml"
        self._config.write_text(CONFIG.format(folder=folder, model=model, port=port, version=version))
        self.process = self._start()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()
        self.process.wait()

    def start(self) -> None:
        """Start it again."""
        self.process = self._start()

    def stop(self) -> None:
        """End it in order."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)

    def stored(self) -> int:
        """Samples in the ring."""
        try:
            with Ring.open_reader(self._folder / "data" / "ring" / "main") as ring:
                return ring.read_state().next_seq
        except (StorageError, OSError):
            return 0

    def numbers(self) -> list[int]:
        """Every number in the ring, as its text says."""
        decode = Tokenizer.from_file(str(self._model / "tokenizer.json")).decode_batch
        found: list[int] = []
        with Ring.open_reader(self._folder / "data" / "ring" / "main") as ring:
            end = ring.read_state().next_seq
            for first in range(ring.read_state().tail_seq, end, 5_000):
                samples = ring.read(first, min(first + 5_000, end) - 1)
                rows, at = [], 0
                for length in samples.lengths:
                    rows.append(list(samples.ids[at : at + length]))
                    at += length
                found += [int(text.rpartition("=")[2]) for text in decode(rows)]
        return found

    def cpu_s(self) -> float:
        """Processor seconds so far."""
        return cpu_s(self.process.pid)

    def memory_mib(self) -> float:
        """RssAnon and RssShmem now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return sum(int(x.split()[1]) for x in status if x.startswith(("RssAnon", "RssShmem"))) / 1024

    def log(self) -> str:
        """What it said last."""
        return (self._folder / "log").read_text()[-2_000:]

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pipeline", "ingest", "--config", str(self._config)]
        with (self._folder / "log").open("a") as log:
            return subprocess.Popen(command, cwd=ROOT, stderr=log)


def cpu_s(pid: int) -> float:
    """Processor seconds that a process used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
