"""Sparkplug B payloads as bytes: the protobuf fields that a host needs, read strictly and in bounds.

A generated reader would bring the protobuf package into ingest for one small message. What is malformed or
out of bounds raises `WireError`; unknown fields are skipped, and of a field that comes twice the last counts,
as protobuf says.

Source: Eclipse Sparkplug 3.0 (sparkplug_b.proto); Protocol Buffers, "Encoding".
"""

from __future__ import annotations

import struct
import zlib

import msgspec

__all__ = ["MAX_METRICS", "Metric", "Payload", "WireError", "encode_rebirth", "read_payload"]

MAX_METRICS = 16_384  # of one payload
MAX_INFLATED_BYTES = 4 << 20
COMPRESSED = "SPBV1.0_COMPRESSED"

INT, LONG, FLOAT, DOUBLE, BOOLEAN = 10, 11, 12, 13, 14  # fields of a metric that hold a number

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_TAG = (1 << 32) - 1
_GZIP_OR_ZLIB = 47  # zlib's word for: whichever of the two the data begins with
_PAYLOAD_TYPES = {1: _VARINT, 2: _BYTES, 3: _VARINT, 4: _BYTES, 5: _BYTES}
_METRIC_TYPES = {
    1: _BYTES, 2: _VARINT, 3: _VARINT, 4: _VARINT, 5: _VARINT, 6: _VARINT, 7: _VARINT, 8: _BYTES, 9: _BYTES,
    10: _VARINT, 11: _VARINT, 12: _FIXED32, 13: _FIXED64, 14: _VARINT, 15: _BYTES, 16: _BYTES, 17: _BYTES,
    18: _BYTES, 19: _BYTES,
}  # fmt: skip
_float = struct.Struct("<f").unpack_from
_double = struct.Struct("<d").unpack_from


class WireError(ValueError):
    """The bytes are no payload; the message says where they stop to be one."""


class Metric(msgspec.Struct, gc=False):
    """A metric as sent.

    Attributes:
        name: "" if it has none: the alias stands for it.
        alias: None if it has none.
        timestamp: Milliseconds since 1970, 0 if it has none.
        datatype: Its number in the specification, 0 if it has none.
        is_null: Whether it says that there is no value.
        field: Number of the field that `value` came in, 0 if there is no value.
        value: Integers are unsigned, as on the wire; None for what is no number.
    """

    name: str = ""
    alias: int | None = None
    timestamp: int = 0
    datatype: int = 0
    is_null: bool = False
    field: int = 0
    value: int | float | None = None


class Payload(msgspec.Struct):
    """A payload as sent.

    Attributes:
        metrics: In their order.
        timestamp: Milliseconds since 1970, 0 if it has none.
        seq: None if it has none.
        uuid: What `body` is, "" if nothing says so.
        body: Whatever; a compressed payload is here.
    """

    metrics: list[Metric]
    timestamp: int = 0
    seq: int | None = None
    uuid: str = ""
    body: bytes = b""


def read_payload(data: bytes) -> Payload:
    """Read a payload, compressed or not.

    Raises: WireError if it is none, or beyond a bound.
    """
    payload = _read_payload(data)
    if payload.uuid != COMPRESSED:
        return payload
    inner = _read_payload(_inflate(payload.body))
    if inner.uuid == COMPRESSED:
        raise WireError("compressed twice")
    # Encoders leave these at one level or the other.
    inner.seq = payload.seq if inner.seq is None else inner.seq
    inner.timestamp = inner.timestamp or payload.timestamp
    return inner


def encode_rebirth(timestamp: int) -> bytes:
    """Write the command that asks a node for its births.

    Args:
        timestamp: Milliseconds since 1970.
    """
    name = b"Node Control/Rebirth"
    time = _varint_bytes(timestamp)
    metric = b"\x0a" + _varint_bytes(len(name)) + name + b"\x18" + time + b"\x20\x0b\x70\x01"  # Boolean, true
    return b"\x08" + time + b"\x12" + _varint_bytes(len(metric)) + metric


def _read_payload(data: bytes) -> Payload:
    payload = Payload([])
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at, end)
        field = _known(tag, _PAYLOAD_TYPES)
        if not field:
            at = _skip(data, at, end, tag)
        elif tag & 7 == _VARINT:
            number, at = _varint(data, at, end)
            if field == 1:
                payload.timestamp = number
            else:
                payload.seq = number
        else:
            start, at = _span(data, at, end)
            if field == 2:
                if len(payload.metrics) == MAX_METRICS:
                    raise WireError(f"more than {MAX_METRICS:,} metrics")
                payload.metrics.append(_read_metric(data, start, at))
            elif field == 4:
                payload.uuid = _text(data[start:at])
            else:
                payload.body = data[start:at]
    return payload


def _read_metric(data: bytes, at: int, end: int) -> Metric:
    metric = Metric()
    while at < end:
        tag, at = _varint(data, at, end)
        field = _known(tag, _METRIC_TYPES)
        wire_type = tag & 7
        if not field:
            at = _skip(data, at, end, tag)
        elif wire_type == _VARINT:
            number, at = _varint(data, at, end)
            _set_number(metric, field, number)
        elif wire_type == _BYTES:
            start, at = _span(data, at, end)
            if field == 1:
                metric.name = _text(data[start:at])
            elif field >= 15:
                metric.field, metric.value = field, None
        else:
            start, at = at, _skip(data, at, end, tag)
            (metric.value,) = (_float if field == FLOAT else _double)(data, start)
            metric.field = field
    return metric


def _set_number(metric: Metric, field: int, number: int) -> None:
    match field:
        case 2:
            metric.alias = number
        case 3:
            metric.timestamp = number
        case 4:
            metric.datatype = number & 0xFFFFFFFF
        case 7:
            metric.is_null = number != 0
        case 10:  # some write a negative number in ten bytes; protobuf takes the low 32 bits
            metric.field, metric.value = INT, number & 0xFFFFFFFF
        case 11:
            metric.field, metric.value = LONG, number
        case 14:
            metric.field, metric.value = BOOLEAN, int(number != 0)


def _known(tag: int, types: dict[int, int]) -> int:
    """The field's number, 0 for one that is not of ours."""
    field = tag >> 3
    if not field > 0 or tag > _MAX_TAG:
        raise WireError(f"no field has the number {field}")
    if field not in types:
        return 0
    if types[field] != tag & 7:
        raise WireError(f"field {field} has the wire type {tag & 7}")
    return field


def _skip(data: bytes, at: int, end: int, tag: int) -> int:
    match tag & 7:
        case 0:
            return _varint(data, at, end)[1]
        case 1:
            at += 8
        case 2:
            return _span(data, at, end)[1]
        case 5:
            at += 4
        case other:
            raise WireError(f"wire type {other}")
    if at > end:
        raise WireError("it ends within a field")
    return at


def _span(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Where a field with a length begins and ends."""
    length, at = _varint(data, at, end)
    if length > end - at:
        raise WireError("it ends within a field")
    return at, at + length


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number and where it ends."""
    number = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            if number >> 64:
                break
            return number, at
        shift += 7
        if shift == 70:
            break
    else:
        raise WireError("it ends within a number")
    raise WireError("a number of more than 64 bits")


def _varint_bytes(number: int) -> bytes:
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise WireError("a text that is no UTF-8") from None


def _inflate(body: bytes) -> bytes:
    unpacker = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        data = unpacker.decompress(body, MAX_INFLATED_BYTES)
    except zlib.error:
        raise WireError("its body is neither GZIP nor DEFLATE") from None
    if not unpacker.eof:
        whole = len(data) < MAX_INFLATED_BYTES
        raise WireError("its compressed body is cut off" if whole else "its body unpacks to more than 4 MiB")
    return data
