"""MQTT 3.1.1 and 5 as bytes: the packets that a subscriber at QoS 1 needs, nothing else.

The parser takes what one `recv` brought and gives every whole packet in it: a message costs about 1 us. It
holds at most one packet of `limit_bytes` back. A longer PUBLISH is never buffered: its head is read (topic
and packet id, so that it can be refused and acknowledged), the rest is counted down and let go.

Source: OASIS MQTT 3.1.1 (2014) and 5.0 (2019).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

__all__ = [
    "ConnAck",
    "Disconnect",
    "MqttError",
    "Packet",
    "Parser",
    "PingResp",
    "PubAck",
    "Publish",
    "SubAck",
    "Subscription",
    "UnsubAck",
    "Version",
    "connect",
    "disconnect",
    "ping",
    "puback",
    "publish",
    "reason_text",
    "subscribe",
    "unsubscribe",
]

Version = int  # 4 for 3.1.1, 5 for 5
RECEIVE_MAXIMUM = 65_535
MAX_REMAINING = 268_435_455
REFUSED = 0x80  # reason codes from here on are failures

_SESSION_EXPIRY, _RECEIVE_MAXIMUM, _MAX_PACKET_SIZE = 0x11, 0x21, 0x27
_SERVER_KEEP_ALIVE, _REASON_STRING = 0x13, 0x1F
# Property -> how it is written: number of bytes, or V a varint, S a text or binary, P a pair of texts.
_PROPERTIES: dict[int, int | str] = {
    0x01: 1, 0x02: 4, 0x03: "S", 0x08: "S", 0x09: "S", 0x0B: "V", 0x11: 4, 0x12: "S", 0x13: 2, 0x15: "S",
    0x16: "S", 0x17: 1, 0x18: 4, 0x19: 1, 0x1A: "S", 0x1C: "S", 0x1F: "S", 0x21: 2, 0x22: 2, 0x23: 2,
    0x24: 1, 0x25: 1, 0x26: "P", 0x27: 4, 0x28: 1, 0x29: 1, 0x2A: 1,
}  # fmt: skip
_CONNECT_REASONS_3 = {
    1: "it does not speak MQTT 3.1.1",
    2: "it refuses the client id",
    3: "it is not available",
    4: "user name or password are wrong",
    5: "not authorized: see user name, password and what the broker allows them",
}
_REASONS = {
    0x81: "malformed packet",
    0x82: "protocol error",
    0x84: 'it does not speak MQTT 5: set version = "3.1.1"',
    0x85: "it refuses the client id",
    0x86: "user name or password are wrong",
    0x87: "not authorized: see user name, password and what the broker allows them",
    0x88: "it is not available",
    0x89: "it is busy",
    0x8A: "banned",
    0x8B: "it is shutting down",
    0x8D: "keep alive timeout",
    0x8E: "another client took the session over: client_id must be unique",
    0x8F: "topic filter not valid",
    0x93: "receive maximum exceeded",
    0x95: "packet too large",
    0x97: "quota exceeded",
    0x9E: "shared subscriptions are not supported",
    0xA2: "wildcard subscriptions are not supported",
}


class MqttError(Exception):
    """The other side broke the protocol, or refused us; the message says how, the connection ends."""


class Publish(msgspec.Struct, frozen=True, gc=False):
    """A message.

    Attributes:
        topic, payload: As received.
        packet_id: 0 at QoS 0.
        oversize: Its bytes where it was longer than the limit; the payload is empty then.
    """

    topic: bytes
    payload: bytes
    packet_id: int = 0
    dup: bool = False
    retain: bool = False
    oversize: int = 0


class ConnAck(msgspec.Struct, frozen=True):
    """The answer to CONNECT; `keepalive_s` is None where the broker takes ours."""

    session_present: bool
    reason: int
    text: str = ""
    keepalive_s: int | None = None
    session_expiry_s: int | None = None


class SubAck(msgspec.Struct, frozen=True):
    """The answer to SUBSCRIBE: the granted QoS of each filter, or a refusal from 0x80 on."""

    packet_id: int
    reasons: list[int]


class UnsubAck(msgspec.Struct, frozen=True):
    """The answer to UNSUBSCRIBE."""

    packet_id: int


class PubAck(msgspec.Struct, frozen=True):
    """The broker has a message of ours."""

    packet_id: int


class PingResp(msgspec.Struct, frozen=True):
    """The broker has read everything that was sent before the ping."""


class Disconnect(msgspec.Struct, frozen=True):
    """The broker ends the connection."""

    reason: int
    text: str = ""


class Subscription(msgspec.Struct, frozen=True):
    """A filter that is subscribed to at QoS 1.

    Attributes:
        retain_handling: MQTT 5: 0 sends retained messages, 1 only for a new subscription, 2 never.
    """

    filter: str
    retain_handling: int = 0


Packet = Publish | ConnAck | SubAck | UnsubAck | PubAck | PingResp | Disconnect


class Parser:
    """Cuts a byte stream into packets.

    Args:
        version: Of the protocol.
        limit_bytes: Longest packet that is taken, without its first two to five bytes.
    """

    def __init__(self, version: Version, limit_bytes: int) -> None:
        self._five = version == 5
        self._limit = limit_bytes
        self._parts: list[bytes] = []
        self._held = 0
        self._wanted = 2  # bytes until more can be said about the packet that `_parts` begins with
        self._skip = 0  # bytes of an oversize message that are still to come

    @property
    def held_bytes(self) -> int:
        """What is held back for the next packet."""
        return self._held

    def feed(self, data: bytes) -> list[Packet]:
        """Take bytes. Returns: the packets that they complete. Raises: MqttError."""
        if self._skip:
            skip, self._skip = self._skip, max(0, self._skip - len(data))
            data = data[skip:]
        if not data:
            return []
        self._parts.append(data)
        self._held += len(data)
        if self._held < self._wanted:
            return []
        whole = b"".join(self._parts) if len(self._parts) > 1 else data
        packets, at = self._parse(whole)
        self._parts = [whole[at:]] if at < len(whole) else []
        self._held = len(whole) - min(at, len(whole))
        self._skip = max(0, at - len(whole))
        return packets

    def _parse(self, data: bytes) -> tuple[list[Packet], int]:
        """Returns: the whole packets, and where the rest begins; beyond the end, so much is to be skipped."""
        packets: list[Packet] = []
        at, end = 0, len(data)
        self._wanted = 2
        while end - at >= 2:
            first, length, start = data[at], data[at + 1], at + 2
            if length > 127:
                found = _varint(data, at + 1, end)
                if found is None:
                    self._wanted = end - at + 1
                    break
                length, start = found
            stop = start + length
            if length > self._limit:
                head = self._oversize(first, data, start, length)
                if head is None:
                    self._wanted = end - at + 1
                    break
                packets.append(head)
            elif stop > end:
                self._wanted = stop - at
                break
            elif first & 0xF0 == 0x30:
                packets.append(self._publish(first, data, start, stop))
            else:
                packets.append(self._other(first, data[start:stop]))
            at = stop
        return packets, at

    def _publish(self, first: int, data: bytes, start: int, stop: int) -> Publish:
        at = start + 2 + (data[start] << 8 | data[start + 1] if stop - start >= 2 else MAX_REMAINING)
        topic = data[start + 2 : at]
        packet_id = 0
        qos = first & 0x06
        if qos == 0x02:
            packet_id = int.from_bytes(data[at : at + 2], "big")
            at += 2
            if not packet_id:
                raise MqttError("a message without a packet id")
        elif qos:
            raise MqttError("a message at QoS 2, which was not asked for")
        if self._five and at < stop:
            length = data[at]
            at += 1
            if length > 127:
                length, at = _varint(data, at - 1, stop) or (MAX_REMAINING, at)
            at += length
        elif self._five:
            at = stop + 1
        if at > stop or not topic:
            raise MqttError("a message that is shorter than its own fields, or without a topic")
        return Publish(topic, data[at:stop], packet_id, first & 0x08 != 0, first & 0x01 != 0)

    def _oversize(self, first: int, data: bytes, start: int, length: int) -> Publish | None:
        """The head of a message that is too long, None until enough of it is here."""
        if first & 0xF0 != 0x30:
            raise MqttError(f"a packet of {length} bytes that is no message")
        if len(data) < start + 2:
            return None
        at = start + 2 + (data[start] << 8 | data[start + 1])
        if at + 2 > start + length:
            raise MqttError("a message that is shorter than its own fields")
        if len(data) < at + 2:
            return None
        packet_id = int.from_bytes(data[at : at + 2], "big") if first & 0x06 else 0
        if first & 0x06 and (first & 0x06 != 0x02 or not packet_id):
            raise MqttError("a message at QoS 2, or without a packet id")
        topic = data[start + 2 : at]
        return Publish(topic, b"", packet_id, first & 0x08 != 0, first & 0x01 != 0, oversize=length)

    def _other(self, first: int, body: bytes) -> Packet:
        try:
            match first:
                case 0x20:
                    return self._connack(body)
                case 0x40:
                    return PubAck(_u16(body, 0))
                case 0x90:
                    return self._suback(body)
                case 0xB0:
                    return UnsubAck(_u16(body, 0))
                case 0xD0:
                    return PingResp()
                case 0xE0 if self._five:
                    reason = body[0] if body else 0
                    return Disconnect(reason, _text(_properties(body, 1)[0], _REASON_STRING))
        except IndexError:
            raise MqttError("a packet that is shorter than its own fields") from None
        raise MqttError(f"a packet of type {first >> 4}, flags {first & 15}, which a client does not take")

    def _connack(self, body: bytes) -> ConnAck:
        if body[0] > 1:
            raise MqttError("a CONNACK with flags that do not exist")
        if not self._five:
            return ConnAck(body[0] == 1, body[1])
        properties, _ = _properties(body, 2)
        return ConnAck(
            body[0] == 1, body[1], _text(properties, _REASON_STRING),
            _number(properties, _SERVER_KEEP_ALIVE), _number(properties, _SESSION_EXPIRY),
        )  # fmt: skip

    def _suback(self, body: bytes) -> SubAck:
        at = _properties(body, 2)[1] if self._five else 2
        return SubAck(_u16(body, 0), list(body[at:]))


def connect(
    version: Version,
    client_id: str,
    *,
    username: str = "",
    password: str = "",
    keepalive_s: int = 0,
    clean: bool = False,
    session_expiry_s: int = 0,
    max_packet_bytes: int = MAX_REMAINING,
    receive_maximum: int = RECEIVE_MAXIMUM,
) -> bytes:
    """CONNECT; all but `clean`, `username`, `password` and `keepalive_s` is for MQTT 5."""
    flags = (0x80 if username else 0) | (0x40 if password else 0) | (0x02 if clean else 0)
    body = _string("MQTT") + bytes([version, flags]) + keepalive_s.to_bytes(2, "big")
    if version == 5:
        expiry = b"" if clean else bytes([_SESSION_EXPIRY]) + session_expiry_s.to_bytes(4, "big")
        properties = (
            expiry
            + bytes([_RECEIVE_MAXIMUM]) + receive_maximum.to_bytes(2, "big")
            + bytes([_MAX_PACKET_SIZE]) + max_packet_bytes.to_bytes(4, "big")
        )  # fmt: skip
        body += bytes([len(properties)]) + properties
    body += _string(client_id)
    body += _string(username) if username else b""
    body += _string(password) if password else b""
    return _packet(0x10, body)


def subscribe(version: Version, packet_id: int, subscriptions: Iterable[Subscription]) -> bytes:
    """SUBSCRIBE at QoS 1."""
    body = packet_id.to_bytes(2, "big") + (b"\0" if version == 5 else b"")
    for wanted in subscriptions:
        options = 0x01 | (wanted.retain_handling << 4 if version == 5 else 0)
        body += _string(wanted.filter) + bytes([options])
    return _packet(0x82, body)


def unsubscribe(version: Version, packet_id: int, filters: Iterable[str]) -> bytes:
    """UNSUBSCRIBE."""
    body = packet_id.to_bytes(2, "big") + (b"\0" if version == 5 else b"")
    return _packet(0xA2, body + b"".join(_string(filter) for filter in filters))


def publish(version: Version, topic: str, payload: bytes, packet_id: int = 0) -> bytes:
    """PUBLISH at QoS 1, at QoS 0 without a packet id."""
    body = _string(topic) + (packet_id.to_bytes(2, "big") if packet_id else b"")
    return _packet(0x32 if packet_id else 0x30, body + (b"\0" if version == 5 else b"") + payload)


def puback(packet_ids: Sequence[int]) -> bytes:
    """A PUBACK for each, in this order; alike in both versions."""
    return b"".join([b"\x40\x02" + packet_id.to_bytes(2, "big") for packet_id in packet_ids])


def ping() -> bytes:
    """PINGREQ."""
    return b"\xc0\x00"


def disconnect() -> bytes:
    """DISCONNECT, which keeps the session."""
    return b"\xe0\x00"


def reason_text(version: Version, reason: int, text: str = "") -> str:
    """A reason code in words; `text` is what the broker says itself."""
    known = _REASONS if version == 5 else _CONNECT_REASONS_3
    said = "".join(char if char.isprintable() else "?" for char in text[:100])
    return known.get(reason, f"reason {reason:#04x}") + (f" ({said})" if said else "")


def _packet(first: int, body: bytes) -> bytes:
    length, head = len(body), bytearray([first])
    while True:
        head.append(length & 127 | (128 if length > 127 else 0))
        length >>= 7
        if not length:
            return bytes(head) + body


def _string(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(2, "big") + data


def _varint(data: bytes, at: int, end: int) -> tuple[int, int] | None:
    """Returns: the number and where it ends, None where it goes on beyond `end`."""
    value = 0
    for count in range(4):
        if at >= end:
            return None
        value |= (data[at] & 127) << 7 * count
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise MqttError("a length of more than four bytes")


def _u16(data: bytes, at: int) -> int:
    return data[at] << 8 | data[at + 1]


def _properties(body: bytes, at: int) -> tuple[dict[int, int | bytes], int]:
    """Properties at a place (none where the body ends there), and where they end."""
    if at >= len(body):
        return {}, at
    found = _varint(body, at, len(body))
    if found is None:
        raise IndexError
    at, stop = found[1], found[1] + found[0]
    if stop > len(body):
        raise IndexError
    properties: dict[int, int | bytes] = {}
    while at < stop:
        name, kind = body[at], _PROPERTIES.get(body[at])
        at += 1
        match kind:
            case int():
                properties[name] = int.from_bytes(body[at : at + kind], "big")
                at += kind
            case "V":
                value, at = _varint(body, at, stop) or (0, stop + 1)
                properties[name] = value
            case "S" | "P":
                for _ in range(2 if kind == "P" else 1):
                    length = _u16(body, at)
                    properties[name] = body[at + 2 : at + 2 + length]
                    at += 2 + length
            case _:
                raise MqttError(f"a property {name:#04x} that does not exist")
    if at != stop:
        raise IndexError
    return properties, at


def _number(properties: dict[int, int | bytes], name: int) -> int | None:
    value = properties.get(name)
    return value if isinstance(value, int) else None


def _text(properties: dict[int, int | bytes], name: int) -> str:
    value = properties.get(name)
    return value.decode(errors="replace") if isinstance(value, bytes) else ""
