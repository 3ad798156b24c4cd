"""An MQTT broker: a kept session at QoS 1, each message acknowledged when its commit is durable.

One thread reads, converts, hands over and acknowledges. It never waits for the inbox with its socket
unattended: while there is no room it stops reading (the broker keeps what it has), but goes on to acknowledge
and to show that it lives.

| seen | done |
|---|---|
| the connection broke, or the broker was silent for `keepalive` | connect again, with backoff |
| the broker kept no session, and we had one | subscribe anew, count `sessions_lost` and `missed_s` |
| `topics` were changed since the last start | what the session had and nobody wants is unsubscribed |
| DUP set, and the message is in a commit or on its way to one | acknowledged, counted `redelivered` |
| `in_flight` unacknowledged, and then silence | the Batch closes now: the broker may be waiting for us |
| a topic that no rule lists, `$SYS`, a retained message | acknowledged in its turn, counted, dropped |
| a message longer than an event may be | its head is read, the rest passed over: a dead letter |

What is exactly once, and why, stands in `mqtt_session`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import platform
import time
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import cast

import msgspec

from pipeline.events import MAX_EVENT_BYTES, Line, Origin
from pipeline.source_settings import MqttSource
from pipeline.sources.inbox import Backoff, Chunk, Inbox, ReaderThread, Settled
from pipeline.sources.mqtt_client import Connection, Login, Stopped, Tls, Waker
from pipeline.sources.mqtt_packets import (
    REFUSED,
    ConnAck,
    MqttError,
    Packet,
    PingResp,
    Publish,
    SubAck,
    Subscription,
    UnsubAck,
    Version,
    puback,
    publish,
    reason_text,
    subscribe,
    unsubscribe,
)
from pipeline.sources.mqtt_session import REDELIVERY_S, Deliveries, Run
from pipeline.sources.mqtt_settings import broker_address
from pipeline.sources.mqtt_topics import Route, TopicMap
from pipeline.sources.sparkplug import SparkplugHost, rebirth_payload

__all__ = ["MqttConnector", "login_of"]

LIMIT_BYTES = MAX_EVENT_BYTES + (64 << 10)  # a packet: an event, its topic and properties
CHUNK_BYTES = 32 << 10  # a chunk is closed here: see pipeline/batching.py, which counts on it
CHUNK_LINES = 512
OFFER_S = 0.02  # how often a full inbox is tried again
GATHER_S = 0.005  # after a message, so that those behind it share its chunk
IDLE_S = 5.0
STALLED_S = 0.05  # silence from which a broker whose limit may be reached is taken to wait
HELD_S = 5.0  # a connection that stood so long begins the backoff anew
SUBSCRIBE_ID, UNSUBSCRIBE_ID = 1, 2
FILTERS = "filters"  # names the row of what the session is subscribed to
log = logging.getLogger("edgewater.sources")


class MqttConnector:
    """Subscribes to a broker.

    Args:
        source: Name of the configured source.
        settings: Its table.
    """

    def __init__(self, source: str, settings: MqttSource) -> None:
        self.name = f"mqtt:{source}"
        self._source = source
        self._settings = settings
        self._login = login_of(source, settings)
        self._thread = ReaderThread()
        self._waker: Waker | None = None
        self._settled: deque[Run] = deque()  # committed, for the thread to acknowledge
        self._waiting: deque[Chunk] = deque()  # for room in the inbox
        self._births_wanted: list[str] = []  # topics of nodes that are to say again what they have

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None:
        """Connect, in a thread of its own; `positions` tell what of the session is committed."""
        self._state = inbox.state(self)
        self._waker = Waker(self._thread.stopping)
        login = self._login
        identity = f"{login.host}:{login.port}/{login.client_id}"
        self._deliveries = Deliveries(identity, self.name, positions)
        ask = self._births_wanted.append if self._settings.rebirth else None
        self._sparkplug = SparkplugHost(self._state.count, ask)
        self._sparkplug.restore(self.name, positions)
        self._filters = _filters_of(positions.get(f"{self.name}:{FILTERS}", b""))
        self._topics = TopicMap(self._source, self._settings.topics, self._sparkplug, self._state.count)
        self._peak = 0
        self._hurried = False  # whether the Batch was asked to close since the last commit
        self._connected_at = self._lost_at = 0.0
        self._thread.start(self, inbox, partial(self._run, inbox, self._waker))

    def acknowledge(self, settled: list[Settled]) -> None:
        """Let the thread acknowledge what is committed."""
        self._settled.extend(cast("Run", one.receipt) for one in settled)
        if self._waker is not None:
            self._waker.wake()

    def stop(self) -> None:
        """Stop reading; what is committed is still acknowledged."""
        self._thread.stopping.set()
        if self._waker is not None:
            self._waker.wake()
        self._thread.stop()

    def _run(self, inbox: Inbox, waker: Waker) -> None:
        backoff = Backoff()
        try:
            while not waker.stopping.is_set():
                connection = Connection(self._login, waker)
                try:
                    self._serve(connection, inbox)
                except (OSError, MqttError) as error:
                    self._note_lost(str(error) or type(error).__name__)
                finally:
                    with contextlib.suppress(OSError, MqttError):
                        self._acknowledge(connection)
                    connection.close()
                if self._connected_at and time.monotonic() - self._connected_at >= HELD_S:
                    backoff.reset()
                self._connected_at = 0.0
                waker.sleep(backoff.next_s())
        except Stopped:
            pass
        finally:
            waker.close()

    def _serve(self, connection: Connection, inbox: Inbox) -> None:
        """Read from one connection until it ends, by OSError, MqttError or Stopped."""
        self._log_in(connection.open())
        connection.send(subscribe(self._login.version, SUBSCRIBE_ID, self._subscriptions()))
        # After it: in between the other way round nothing would be subscribed.
        if gone := self._filters - set(self._settings.topics):
            connection.send(unsubscribe(self._login.version, UNSUBSCRIBE_ID, sorted(gone)))
        began = heard = time.monotonic()
        gathering = False
        while True:
            self._acknowledge(connection)
            self._offer(inbox)
            if self._waiting:
                connection.wait(reading=False, seconds=OFFER_S)
                continue
            packets = connection.receive()
            if packets:
                self._take(packets, connection)
                gathering, heard = True, time.monotonic()
            elif packets is None and gathering:
                time.sleep(GATHER_S)
                gathering = False
            elif packets is None:
                if began and time.monotonic() - began > REDELIVERY_S:
                    self._deliveries.forget_old()
                    began = 0.0
                stalled = self._may_wait(time.monotonic() - heard)
                if stalled >= STALLED_S:
                    self._hurried = inbox.offer(Chunk(self, [], urgent=True))
                connection.wait(reading=True, seconds=STALLED_S if 0 < stalled < STALLED_S else IDLE_S)

    def _log_in(self, answer: ConnAck) -> None:
        lost = self._deliveries.connected(answer.session_present)
        if lost:
            self._state.count("sessions_lost")
            away = round(time.monotonic() - self._lost_at) if self._lost_at else 0
            if away:
                self._state.count("missed_s", away)
            log.warning("%s: the broker kept no session: what was published meanwhile is missing", self.name)
        if not answer.session_present:  # from now on its loss is noticed, also after a restart
            self._waiting.append(Chunk(self, [], self._deliveries.session_row()))
        self._session = "after its session was lost" if lost else "with its session"

    def _subscribed(self, answer: SubAck) -> None:
        """The broker answered our SUBSCRIBE: now we are connected."""
        named = zip(self._settings.topics, answer.reasons, strict=False)
        refused = [f'"{topic}"' for topic, reason in named if reason >= REFUSED]
        login = self._login
        where = f"{login.host}:{login.port} {self._session}"
        if refused:
            why = reason_text(5, max(answer.reasons)) if login.version == 5 else "the broker does not say why"
            where += f"; it refuses {', '.join(refused)[:200]}: {why}"
            log.warning("%s: connected to %s", self.name, where)
        elif 0 in answer.reasons:
            where += "; it grants QoS 0 only: what is published while we are away is lost"
            log.warning("%s: connected to %s", self.name, where)
        else:
            log.info("%s: connected to %s", self.name, where)
        if not self._filters - set(self._settings.topics):
            self._keep_filters()
        if self._lost_at or self._state.counts.get("reconnects"):
            self._state.count("reconnects")
        self._connected_at, self._lost_at = time.monotonic(), 0.0
        self._state.detail, self._state.connected = where, True

    def _keep_filters(self) -> None:
        """Have the next commit keep what the session is subscribed to, where that is news."""
        wanted = set(self._settings.topics)
        if wanted != self._filters:
            self._filters = wanted
            row = {f"{self.name}:{FILTERS}": msgspec.msgpack.encode(sorted(wanted))}
            self._waiting.append(Chunk(self, [], row))

    def _note_lost(self, why: str) -> None:
        if self._state.connected is not False or self._state.detail != why:
            log.warning("%s: %s:%d: %s", self.name, self._login.host, self._login.port, why)
        if self._connected_at:
            self._lost_at = time.monotonic()
        self._state.detail, self._state.connected = why, False

    def _subscriptions(self) -> list[Subscription]:
        handling = 2 if self._settings.retained == "ignore" else 1
        return [Subscription(topic, handling) for topic in self._settings.topics]

    def _acknowledge(self, connection: Connection) -> None:
        """Send the PUBACKs that are due, and ask the broker whether it has those before."""
        while self._settled:
            self._deliveries.settled(self._settled.popleft())
            self._hurried = False
        if due := self._deliveries.acknowledge():
            connection.send(puback(due))
        if not connection.asking and self._deliveries.ask():
            connection.ask()

    def _offer(self, inbox: Inbox) -> None:
        while self._waiting and inbox.offer(self._waiting[0]):
            self._waiting.popleft()
        if inbox.closed.is_set():
            raise Stopped

    def _take(self, packets: list[Packet], connection: Connection) -> None:
        opened = _Opened(self, self._deliveries.begin())
        for packet in packets:
            match packet:
                case Publish():
                    self._message(packet, opened)
                    if opened.full:
                        self._close(opened)
                        opened = _Opened(self, self._deliveries.begin())
                case SubAck() if packet.packet_id == SUBSCRIBE_ID:
                    self._subscribed(packet)
                case UnsubAck() if packet.packet_id == UNSUBSCRIBE_ID:
                    self._keep_filters()
                case PingResp():
                    self._deliveries.answered()
        self._close(opened)
        for topic in self._births_wanted:
            connection.send(publish(self._login.version, topic, rebirth_payload()))
        self._births_wanted.clear()

    def _message(self, message: Publish, opened: _Opened) -> None:
        if message.retain and self._settings.retained == "ignore":
            route, what = None, "retained_ignored"
        else:
            route, what = self._topics.route(message.topic), "unlisted"
        if route is None:
            self._state.count(what)
            self._deliveries.pass_over(message, opened.run)
        elif not self._deliveries.take(message, opened.run):
            self._state.count("redelivered")
        elif message.oversize:
            why = f"a message of {message.oversize} bytes; an event has at most {MAX_EVENT_BYTES}"
            opened.add(route, message.topic[:256], why)
        elif route.refused:
            opened.add(route, message.payload, route.refused)
        elif route.convert is None:
            opened.add(route, message.payload)
        else:
            for data, refused in route.convert(message.payload):
                opened.add(route, data, refused)

    def _close(self, opened: _Opened) -> None:
        """Hand over the lines of a chunk, with what the commit must keep of the session."""
        rows = self._sparkplug.rows(self.name)
        if not opened.lines and not rows:
            self._deliveries.release(opened.run)
            return
        rows |= self._deliveries.close(opened.run)
        self._waiting.append(Chunk(self, opened.lines, rows, opened.run))
        count = self._deliveries.unacknowledged
        if count > self._peak:
            self._peak = self._state.counts["in_flight_peak"] = count

    def _may_wait(self, silent_s: float) -> float:
        """How long the broker may have been waiting for acknowledgements, seconds; 0 if it surely does not.

        No broker tells how many messages it sends ahead of them, and what was seen once proves nothing:
        mosquitto with a limit of 20 sent 40. So from `in_flight` on, silence may mean that it waits; but not
        below half of what it once sent ahead.
        """
        count = self._deliveries.unacknowledged
        reached = count >= self._settings.in_flight and 2 * count >= self._peak
        return silent_s if reached and not self._hurried else 0.0


class _Opened:
    """A chunk that is being filled."""

    def __init__(self, connector: MqttConnector, run: Run) -> None:
        self.run = run
        self.lines: list[Line] = []
        self._connector = connector
        self._bytes = 0
        self._arrival = time.time()
        self._route: Route | None = None
        self._origins: dict[tuple[str, frozenset[str] | None], Origin] = {}

    @property
    def full(self) -> bool:
        return self._bytes >= CHUNK_BYTES or len(self.lines) >= CHUNK_LINES

    def add(self, route: Route, data: bytes, refused: str = "") -> None:
        if route is not self._route:
            self._route = route
            self._origin = self._origin_of(route)
        self.lines.append(Line(data, -1, self._origin, refused=refused))
        self._bytes += len(data)

    def _origin_of(self, route: Route) -> Origin:
        origin = self._origins.get((route.source, route.allowed))
        if origin is None:
            origin = Origin(route.source, self._connector.name, self._arrival, allowed=route.allowed)
            self._origins[route.source, route.allowed] = origin
        return origin


def login_of(source: str, settings: MqttSource) -> Login:
    """How a source logs in at its broker."""
    host, port, secure = broker_address(settings.url)
    version: Version = 5 if settings.version == "5" else 4
    return Login(
        host=host,
        port=port,
        client_id=settings.client_id or _default_client_id(source),
        version=version,
        username=settings.username,
        password=settings.password,
        tls=Tls(settings.ca_file, settings.cert_file, settings.key_file) if secure else None,
        keepalive_s=round(settings.keepalive),
        session_expiry_s=round(settings.session_expiry),
        clean=not round(settings.session_expiry),  # 3.1.1 has no expiry: a session for ever, or none
        limit_bytes=LIMIT_BYTES,
    )


def _filters_of(row: bytes) -> set[str]:
    """The filters that a session had; none where that is not known."""
    try:
        return set(msgspec.msgpack.decode(row, type=list[str])) if row else set()
    except msgspec.MsgspecError:
        return set()


def _default_client_id(source: str) -> str:
    """The same at each start, another on each machine; the machine's id itself stays secret."""
    try:
        machine = Path("/etc/machine-id").read_text().strip()
    except OSError:
        machine = ""
    digest = hashlib.blake2b((machine or platform.node()).encode(), digest_size=4, person=b"edgewater")
    return f"edgewater-{source}-{digest.hexdigest()}"
