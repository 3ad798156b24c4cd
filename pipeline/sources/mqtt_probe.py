"""How much a broker sends ahead of acknowledgements, and how much it keeps: for `edgewater doctor`.

No broker tells its limits, so they are measured: 2,000 messages of 8 bytes, published to ourselves at QoS 1
and left unacknowledged until no more come. That is the only thing that Edgewater ever publishes unasked but
for `rebirth`, so it needs leave: `probe_topic` names where. Without it the probe logs in, and no more.

The probe has a client id of its own and leaves no session; ingest's session is not touched, and what others
publish is not read.
"""

from __future__ import annotations

import secrets
import threading
import time

import msgspec

from pipeline.source_settings import MqttSource
from pipeline.sources.mqtt import login_of
from pipeline.sources.mqtt_client import Connection, Waker
from pipeline.sources.mqtt_packets import (
    REFUSED,
    MqttError,
    Packet,
    Publish,
    SubAck,
    Subscription,
    puback,
    publish,
    subscribe,
)

__all__ = ["Credit", "measure_credit"]

MESSAGES = 2_000
ENOUGH = 1_000  # unacknowledged: a Batch, so no commit waits for another
QUIET_S = 1.0
TIMEOUT_S = 15.0


class Credit(msgspec.Struct, frozen=True):
    """What was found.

    Attributes:
        in_flight: Messages that came unacknowledged; None where that was not measured.
        delivered: Messages that came in the end, of MESSAGES.
        fault: Why nothing could be measured, "" if nothing is wrong.
    """

    in_flight: int | None = None
    delivered: int = 0
    fault: str = ""

    @property
    def good(self) -> bool:
        """Whether there is nothing to warn of."""
        if self.fault:
            return False
        return self.in_flight is None or (self.in_flight >= ENOUGH and self.delivered == MESSAGES)

    @property
    def words(self) -> str:
        """For people: what was found, and what to do."""
        if self.fault:
            return self.fault
        if self.in_flight is None:
            return "it lets us in; to measure its limits as well, name a probe_topic"
        if not self.delivered:
            return "nothing came back: let this user publish and subscribe under probe_topic"
        if self.good:
            return f"it sends {self.in_flight:,} messages and more ahead of acknowledgements, and loses none"
        parts = []
        if self.in_flight < ENOUGH:
            parts.append(
                f"it sends only {self.in_flight:,} messages ahead of acknowledgements, then waits for a "
                'commit: set max_inflight_messages 0 in mosquitto.conf, or version = "5" here'
            )
        if self.delivered < MESSAGES:
            parts.append(
                f"of {MESSAGES:,} messages it kept {self.delivered:,} and lost the rest: set "
                "max_queued_messages 0 in mosquitto.conf"
            )
        return "; ".join(parts)


def measure_credit(source: str, settings: MqttSource) -> Credit:
    """Log in, and measure where `probe_topic` allows it. Takes at most TIMEOUT_S and some seconds.

    Args:
        source: Name of the configured source.
        settings: Its table.
    """
    name = f"edgewater-doctor-{secrets.token_hex(6)}"
    login = msgspec.structs.replace(
        login_of(source, settings), client_id=name, clean=True, session_expiry_s=0
    )
    waker = Waker(threading.Event())
    connection = Connection(login, waker)
    try:
        connection.open()
        if not settings.probe_topic:
            return Credit()
        return _Probe(connection, login.version, f"{settings.probe_topic.rstrip('/')}/{name}").run()
    except (OSError, MqttError) as error:
        return Credit(fault=str(error) or type(error).__name__)
    finally:
        connection.close()
        waker.close()


class _Probe:
    """One measurement."""

    def __init__(self, connection: Connection, version: int, topic: str) -> None:
        self._connection = connection
        self._version = version
        self._topic = topic
        self._unacknowledged: list[int] = []
        self._received = 0

    def run(self) -> Credit:
        """Publish, count, acknowledge, count. Raises: OSError, MqttError."""
        self._connection.send(subscribe(self._version, 1, [Subscription(self._topic)]))
        self._until_quiet(acknowledging=False, first=SubAck)
        for number in range(1, MESSAGES + 1):
            self._connection.send(publish(self._version, self._topic, b"%08d" % number, number))
        self._until_quiet(acknowledging=False)
        in_flight = self._received
        self._until_quiet(acknowledging=True)
        return Credit(in_flight, self._received)

    def _until_quiet(self, *, acknowledging: bool, first: type[Packet] | None = None) -> None:
        """Receive until nothing comes for a while, or until a packet of the type that is waited for."""
        began = heard = time.monotonic()
        while (now := time.monotonic()) - heard < QUIET_S and now - began < TIMEOUT_S:
            if acknowledging and self._unacknowledged:
                self._connection.send(puback(self._unacknowledged))
                self._unacknowledged.clear()
            packets = self._connection.receive()
            if packets is None:
                self._connection.wait(reading=True, seconds=0.1)
                continue
            heard = now
            for packet in packets:
                if isinstance(packet, Publish):
                    self._received += 1
                    if packet.packet_id:
                        self._unacknowledged.append(packet.packet_id)
                elif isinstance(packet, SubAck) and any(reason >= REFUSED for reason in packet.reasons):
                    raise MqttError("it does not let us subscribe under probe_topic")
            if first is not None and any(isinstance(packet, first) for packet in packets):
                return
