"""A real mosquitto for tests, on a free port and in a folder of its own, and a client that is not ours."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

__all__ = ["Mosquitto", "Publisher", "free_port"]

READY_S = 10.0


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Mosquitto:
    """One broker; it keeps its sessions in `folder` through a restart.

    Args:
        folder: For its configuration, database and log.
        settings: Lines of mosquitto.conf; by default those that the README asks for.
        port: Where it listens; 0 takes a free one.
        listener: Further lines for the listener (TLS).
        access: Lines that say who is let in.
        persistent: Whether sessions outlive it.
        logged: What its log shows; "all" names every packet, which is slow.
    """

    UNLIMITED = ("max_inflight_messages 0", "max_queued_messages 0")

    def __init__(
        self,
        folder: Path,
        settings: tuple[str, ...] = UNLIMITED,
        port: int = 0,
        listener: tuple[str, ...] = (),
        access: tuple[str, ...] = ("allow_anonymous true",),
        persistent: bool = True,
        logged: str = "all",
    ) -> None:
        self.port = port or free_port()
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "mosquitto.log"
        kept = ("persistence true", f"persistence_location {folder}/") if persistent else ()
        lines = [
            f"listener {self.port} 127.0.0.1", *listener, *access, *settings, *kept,
            f"log_dest file {self._log}", f"log_type {logged}", "user root",
        ]  # fmt: skip
        self._conf = folder / "mosquitto.conf"
        self._conf.write_text("\n".join(lines) + "\n")

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        program = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
        self._process = subprocess.Popen(
            [program, "-c", str(self._conf)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + READY_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert self._process.poll() is None, self.log()
                assert time.monotonic() < deadline, self.log()
                time.sleep(0.02)

    def stop(self) -> None:
        """End it with SIGTERM: it writes its sessions to disk."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Stop it from running: its connections are half-open from now on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    @property
    def pid(self) -> int:
        """Of its process."""
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """What it wrote to its log."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.send_signal(signal.SIGCONT)
            process.wait(timeout=READY_S)


class Publisher:
    """A client that is not ours; what it published the broker has, when `publish` returns."""

    def __init__(self, port: int, **login: str) -> None:
        self._client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv311)
        if login:
            self._client.username_pw_set(login["username"], login["password"])
        self._client.connect("127.0.0.1", port, keepalive=600)
        self._client.loop_start()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish at QoS 1."""
        self._client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(READY_S)

    def send(self, topic: str, payload: bytes) -> None:
        """Publish at QoS 1, without waiting."""
        self._client.publish(topic, payload, qos=1)

    def close(self) -> None:
        """Leave."""
        self._client.disconnect()
        self._client.loop_stop()
