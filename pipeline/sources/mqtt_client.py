"""A connection to an MQTT broker: TCP or TLS, never blocking, so that one thread reads and acknowledges.

Why not a library. 40,000 messages at QoS 1 from mosquitto 2.0.11, acknowledged by hand in runs of 500, on two
cores that others used too, in one sitting: the rates are rough, the processor time (with imports) less so:

| client | messages/s | us of processor a message |
|---|---|---|
| paho-mqtt 2.2.0 | 18,000 to 21,000 | 26 |
| paho-mqtt 2.2.0, its socket read through a buffer | 18,000 | 25 |
| gmqtt 0.8.0 (cannot acknowledge by hand) | 35,000 | 13 |
| awscrt 0.38.1 (MQTT 5 only) | 27,000 | 21 |
| this one (the publisher was the limit) | 42,000 to 51,000 | 4 |

Each is fast enough alone, but shares a core with decoding, tokenizing and the commit. What decides is this:
paho buffers a message of up to 256 MiB before anybody can refuse it (3.1.1 has no Maximum Packet Size), sends
each PUBACK by itself, and tells nobody of a PINGRESP, from which `mqtt_session` learns what the broker knows.

A hostile broker: every length is checked before it is used, nothing longer than one packet of `limit_bytes`
is held, and what breaks the protocol ends the connection with `MqttError`.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import threading
import time

import msgspec

from pipeline.sources.mqtt_packets import (
    REFUSED,
    ConnAck,
    Disconnect,
    MqttError,
    Packet,
    Parser,
    PingResp,
    Publish,
    Version,
    connect,
    disconnect,
    ping,
    reason_text,
)

__all__ = ["Connection", "Login", "Stopped", "Tls", "Waker"]

CONNECT_S = 8.0  # for name, TCP, TLS and CONNACK together
READ_BYTES = 64 << 10
MAX_UNSENT_BYTES = 1 << 20  # more: the broker takes nothing any more

Addresses = list[tuple[socket.AddressFamily, object]]


class Stopped(Exception):
    """Reading must end."""


class Waker:
    """Ends a wait from another thread.

    Attributes:
        stopping: Set when reading must end; set it before `wake`.
    """

    def __init__(self, stopping: threading.Event) -> None:
        self.stopping = stopping
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = threading.Lock()

    def fileno(self) -> int:
        """For poll."""
        return self._fd

    def wake(self) -> None:
        """End the wait that goes on, or the next."""
        with self._closing, contextlib.suppress(BlockingIOError):
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Forget wakes so far."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def sleep(self, seconds: float) -> None:
        """Wait; a stop ends it, a wake does not."""
        deadline = time.monotonic() + seconds
        while not self.stopping.is_set() and (left := deadline - time.monotonic()) > 0:
            if select.select([self._fd], [], [], left)[0]:
                self.clear()

    def close(self) -> None:
        """Give the descriptor back."""
        with self._closing:
            os.close(self._fd)
            self._fd = -1


class Tls(msgspec.Struct, frozen=True):
    """What a TLS connection trusts and shows; empty paths are the system's trust and no certificate."""

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    def context(self) -> ssl.SSLContext:
        """Read the files. Raises: OSError naming the file that cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            if self.ca_file:
                context.load_verify_locations(self.ca_file)
            else:
                context.load_default_certs()
        except (OSError, ssl.SSLError) as error:
            raise OSError(f"cannot use ca_file {self.ca_file}: {_words(error)}") from None
        if self.cert_file:
            try:
                context.load_cert_chain(self.cert_file, self.key_file or None)
            except (OSError, ssl.SSLError) as error:
                raise OSError(f"cannot use cert_file {self.cert_file}: {_words(error)}") from None
        return context


class Login(msgspec.Struct, frozen=True):
    """Where to connect, and as whom.

    Attributes:
        tls: None for a plain connection.
        keepalive_s: A broker that is silent for so long is given up.
        clean: Begin without a session, and leave none.
        limit_bytes: Longest packet that is taken.
    """

    host: str
    port: int
    client_id: str
    version: Version = 5
    username: str = ""
    password: str = ""
    tls: Tls | None = None
    keepalive_s: int = 20
    clean: bool = False
    session_expiry_s: int = 0
    limit_bytes: int = 1 << 20

    def __repr__(self) -> str:
        """No password, wherever it is printed."""
        return f"Login({self.host}:{self.port}, {self.client_id})"


class Connection:
    """One connection. Every method raises OSError or MqttError when it is over; close it then.

    Args:
        login: Where and as whom.
        waker: Ends waits, and says when to stop.
    """

    def __init__(self, login: Login, waker: Waker) -> None:
        self._login = login
        self._waker = waker
        self._socket: socket.socket | ssl.SSLSocket | None = None
        self._parser = Parser(login.version, login.limit_bytes)
        self._unsent = bytearray()
        self._early: list[Packet] = []
        self._keepalive_s = float(login.keepalive_s)
        self._sent_at = self._heard_at = time.monotonic()
        self._pings = 0  # sent and not answered
        self._asked_at = 0.0  # when the first of them was sent; 0 for none

    def open(self) -> ConnAck:
        """Connect and log in. Raises: also Stopped."""
        deadline = time.monotonic() + CONNECT_S
        login = self._login
        context = login.tls.context() if login.tls else None
        addresses = _resolve(login.host, login.port, self._waker.stopping, deadline)
        self._socket = plain = self._connect_any(addresses, deadline)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            self._socket = context.wrap_socket(
                plain, server_hostname=login.host, do_handshake_on_connect=False
            )
            self._shake_hands(self._socket, deadline)
        self.send(
            connect(
                login.version, login.client_id, username=login.username, password=login.password,
                keepalive_s=login.keepalive_s, clean=login.clean,
                session_expiry_s=login.session_expiry_s, max_packet_bytes=login.limit_bytes,
            )
        )  # fmt: skip
        return self._logged_in(deadline)

    def receive(self) -> list[Packet] | None:
        """The packets that one read completes, perhaps none of them; None where there is nothing to read."""
        if self._early:
            early, self._early = self._early, []
            return self._for_caller(early)
        assert self._socket is not None
        try:
            data = self._socket.recv(READ_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        if not data:
            raise ConnectionResetError("the broker closed the connection")
        self._heard_at = time.monotonic()
        return self._for_caller(self._parser.feed(data))

    def send(self, data: bytes) -> None:
        """Send, now as far as the other side takes it, the rest when it does."""
        self._unsent += data
        self._flush()
        if len(self._unsent) > MAX_UNSENT_BYTES:
            raise ConnectionAbortedError("the broker takes nothing any more")

    @property
    def asking(self) -> bool:
        """Whether a ping is under way."""
        return self._pings > 0

    def ask(self) -> None:
        """Send a ping; `receive` gives a PingResp when all that were sent are answered."""
        self._pings += 1
        self._asked_at = self._asked_at or time.monotonic()
        self.send(ping())

    def wait(self, *, reading: bool, seconds: float) -> None:
        """Wait until something can be read (if `reading`) or sent, or somebody wakes; keep it alive."""
        assert self._socket is not None
        self._keep_alive(reading)
        poll = select.poll()
        events = (select.POLLIN if reading else 0) | (select.POLLOUT if self._unsent else 0)
        poll.register(self._socket, events)
        poll.register(self._waker, select.POLLIN)
        buffered = reading and isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0
        happened = dict(poll.poll(0 if buffered or self._early else 1_000 * min(seconds, self._patience())))
        if self._waker.fileno() in happened:
            self._waker.clear()
        if self._waker.stopping.is_set():
            raise Stopped
        what = happened.get(self._socket.fileno(), 0)
        if what & select.POLLOUT:
            self._flush()
        if what & (select.POLLERR | select.POLLHUP) and not reading:
            raise ConnectionResetError("the connection broke")

    def close(self) -> None:
        """End it in order where it still stands."""
        if self._socket is None:
            return
        with contextlib.suppress(OSError, MqttError, ValueError):
            self.send(disconnect())
        self._socket.close()
        self._socket = None

    def _for_caller(self, packets: list[Packet]) -> list[Packet]:
        return [packet for packet in packets if type(packet) is Publish or self._pass(packet)]

    def _pass(self, packet: Packet) -> bool:
        """Whether a packet that is no message is for the caller."""
        match packet:
            case Disconnect():
                raise MqttError(reason_text(self._login.version, packet.reason, packet.text))
            case ConnAck():
                raise MqttError("a second CONNACK")
            case PingResp():
                self._pings = max(0, self._pings - 1)
                self._asked_at = time.monotonic() if self._pings else 0.0
                return not self._pings
        return True

    def _connect_any(
        self, addresses: list[tuple[socket.AddressFamily, object]], deadline: float
    ) -> socket.socket:
        failed: OSError = OSError("no address")
        for count, (family, address) in enumerate(addresses):
            made = socket.socket(family, socket.SOCK_STREAM)
            made.setblocking(False)
            left = (deadline - time.monotonic()) / (len(addresses) - count)
            try:
                with contextlib.suppress(BlockingIOError):
                    made.connect(address)  # type: ignore[arg-type]
                self._until(made, select.POLLOUT, time.monotonic() + left)
                if number := made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(number, os.strerror(number))
                return made
            except OSError as error:
                made.close()
                failed = error
            except Stopped:
                made.close()
                raise
        raise failed

    def _shake_hands(self, tls: ssl.SSLSocket, deadline: float) -> None:
        while True:
            try:
                tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                self._until(tls, select.POLLIN, deadline)
            except ssl.SSLWantWriteError:
                self._until(tls, select.POLLOUT, deadline)

    def _logged_in(self, deadline: float) -> ConnAck:
        assert self._socket is not None
        while True:
            try:
                data = self._socket.recv(READ_BYTES)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                self._until(self._socket, select.POLLIN, deadline)
                continue
            if not data:
                raise ConnectionResetError("the broker closed the connection instead of answering")
            if data[0] != 0x20 and not self._parser.held_bytes:
                raise MqttError("no MQTT broker: it did not answer with CONNACK")
            packets = self._parser.feed(data)
            if not packets:
                continue
            first = packets[0]
            version = self._login.version
            assert isinstance(first, ConnAck), "its first byte says so"
            if first.reason >= (REFUSED if version == 5 else 1):
                raise MqttError(f"the broker refuses us: {reason_text(version, first.reason, first.text)}")
            if first.keepalive_s:
                self._keepalive_s = min(self._keepalive_s, float(first.keepalive_s))
            self._early = packets[1:]
            return first

    def _until(self, what: socket.socket, event: int, deadline: float) -> None:
        """Wait for one event of a socket that is being set up. Raises: Stopped, TimeoutError."""
        poll = select.poll()
        poll.register(what, event)
        poll.register(self._waker, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("no answer in time")
            happened = dict(poll.poll(1_000 * left))
            if self._waker.fileno() in happened:
                self._waker.clear()
            if self._waker.stopping.is_set():
                raise Stopped
            if what.fileno() in happened:
                return

    def _flush(self) -> None:
        assert self._socket is not None
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                return
            del self._unsent[:sent]
            self._sent_at = time.monotonic()

    def _patience(self) -> float:
        """Seconds until keepalive has to be looked after."""
        half = self._keepalive_s / 2
        now = time.monotonic()
        due = min(self._sent_at, self._heard_at) + half
        return max(0.01, (self._asked_at + half if self._asked_at else due) - now)

    def _keep_alive(self, reading: bool) -> None:
        """Ping after half the keepalive time of silence; no answer in the other half is the end."""
        now, half = time.monotonic(), self._keepalive_s / 2
        if not reading:  # we do not listen: its silence says nothing, but it must hear from us
            self._heard_at = now
            if self._asked_at:
                self._asked_at = now
            if now - self._sent_at >= half:
                self.ask()
        elif self._asked_at:
            if now - max(self._asked_at, self._heard_at) >= half:
                raise TimeoutError(f"the broker was silent for {self._keepalive_s:.0f} s")
        elif now - min(self._sent_at, self._heard_at) >= half:
            self.ask()


def _resolve(host: str, port: int, stopping: threading.Event, deadline: float) -> Addresses:
    """The addresses of a name. The system's resolver cannot be interrupted, so a thread waits for it."""
    found: Addresses = []
    failed: list[OSError] = []

    def look_up() -> None:
        try:
            for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                found.append((family, address))
        except OSError as error:
            failed.append(error)
        except UnicodeError:
            failed.append(OSError(f"{host!r} is no host name: correct the url"))

    thread = threading.Thread(target=look_up, name=f"look up {host}", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        if stopping.is_set():
            raise Stopped
        if time.monotonic() >= deadline:
            raise TimeoutError(f"the name {host} was not resolved in time")
    if failed:
        raise failed[0]
    return found


def _words(error: Exception) -> str:
    return str(getattr(error, "strerror", "") or getattr(error, "reason", "") or error)
