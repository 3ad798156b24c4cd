"""Sparkplug B: the reader takes what Google's protobuf writes, and births, aliases and seq are followed."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections import Counter
from typing import Any

import pytest
from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
)
from hypothesis import given
from hypothesis import strategies as st

from pipeline.decode import decode_event
from pipeline.sources import sparkplug, sparkplug_wire
from pipeline.sources.sparkplug import SparkplugHost, SparkplugTopic, rebirth_payload
from pipeline.sources.sparkplug_wire import MAX_METRICS, WireError, read_payload

INT8, INT16, INT32, INT64, UINT8, UINT16, UINT32, UINT64 = range(1, 9)
FLOAT, DOUBLE, BOOLEAN, STRING, DATE_TIME, TEXT, UUID = range(9, 16)
NOW_MS = 1_700_000_000_000


def _payload_class() -> Any:
    """sparkplug_b.proto, as far as the field numbers go that the specification gives."""
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="sparkplug_b.proto", package="sparkplug", syntax="proto2")
    u32, u64, text, raw, flag = (
        types.TYPE_UINT32,
        types.TYPE_UINT64,
        types.TYPE_STRING,
        types.TYPE_BYTES,
        types.TYPE_BOOL,
    )
    metric = file.message_type.add(name="Metric")
    fields = [
        ("name", text), ("alias", u64), ("timestamp", u64), ("datatype", u32), ("is_historical", flag),
        ("is_transient", flag), ("is_null", flag), ("metadata", raw), ("properties", raw),
        ("int_value", u32), ("long_value", u64), ("float_value", types.TYPE_FLOAT),
        ("double_value", types.TYPE_DOUBLE), ("boolean_value", flag), ("string_value", text),
        ("bytes_value", raw), ("dataset_value", raw), ("template_value", raw), ("extension_value", raw),
    ]  # fmt: skip
    metric.oneof_decl.add(name="value")
    for number, (name, kind) in enumerate(fields, 1):
        field = metric.field.add(name=name, number=number, type=kind, label=types.LABEL_OPTIONAL)
        if number >= 10:
            field.oneof_index = 0
    unknown = [("later_number", 40, u64), ("later_text", 41, text), ("later_fixed", 42, types.TYPE_FIXED64)]
    for name, number, kind in [*unknown, ("later_short", 43, types.TYPE_FIXED32)]:
        metric.field.add(name=name, number=number, type=kind, label=types.LABEL_OPTIONAL)
    payload = file.message_type.add(name="Payload")
    for name, number, kind in [("timestamp", 1, u64), ("seq", 3, u64), ("uuid", 4, text), ("body", 5, raw)]:
        payload.field.add(name=name, number=number, type=kind, label=types.LABEL_OPTIONAL)
    payload.field.add(
        name="metrics",
        number=2,
        type=types.TYPE_MESSAGE,
        type_name=".sparkplug.Metric",
        label=types.LABEL_REPEATED,
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("sparkplug.Payload"))


PAYLOAD = _payload_class()


def encode(*metrics: dict[str, Any], seq: int | None = None, ts: int | None = NOW_MS, **fields: Any) -> bytes:
    """Write a payload with the protobuf package."""
    if seq is not None:
        fields["seq"] = seq
    if ts is not None:
        fields["timestamp"] = ts
    written: bytes = PAYLOAD(metrics=metrics, **fields).SerializeToString()
    return written


def topic(kind: str, device: str = "", edge: str = "E") -> SparkplugTopic:
    return SparkplugTopic("G", kind, edge, device)


class Host:
    """A host with its clock, its counts and the rebirths that it asked for."""

    def __init__(self, asks: bool = True) -> None:
        self.counts: Counter[str] = Counter()
        self.asked: list[str] = []
        self.now_s = 0.0

        def count(name: str, number: int) -> None:
            assert number > 0
            self.counts[name] += number

        self.host = SparkplugHost(count, self.asked.append if asks else None, lambda: self.now_s)

    def take(
        self, kind: str, *metrics: dict[str, Any], device: str = "", edge: str = "E", **more: Any
    ) -> Any:
        """Pairs of an event, decoded as the pipeline does, and a reason."""
        return self.raw(kind, encode(*metrics, **more), device, edge)

    def raw(self, kind: str, payload: bytes, device: str = "", edge: str = "E") -> Any:
        taken = self.host.take(topic(kind, device, edge), payload)
        for data, refused in taken:
            if not refused:
                decode_event(data)
            else:
                assert data == payload
        return [(json.loads(data) if not refused else data, refused) for data, refused in taken]

    def values(self, kind: str, *metrics: dict[str, Any], **more: Any) -> dict[str, float]:
        """The values of the one reading that a message makes."""
        ((event, refused),) = self.take(kind, *metrics, **more)
        assert not refused
        values: dict[str, float] = event["values"]
        return values

    def born(self, edge: str = "E", bdseq: int = 3, seq: int = 0, ts: int = NOW_MS) -> Host:
        self.take(
            "NBIRTH",
            {"name": "bdSeq", "datatype": INT64, "long_value": bdseq},
            {"name": "Node Control/Rebirth", "datatype": BOOLEAN, "boolean_value": False},
            {"name": "temperature", "alias": 7, "datatype": DOUBLE, "double_value": 20.5},
            seq=seq,
            edge=edge,
            ts=ts,
        )
        return self

    def data(self, seq: int, value: float = 21.0, ts: int | None = None, edge: str = "E") -> Any:
        at = NOW_MS + seq + 1 if ts is None else ts
        return self.take("NDATA", {"alias": 7, "double_value": value}, seq=seq, ts=at, edge=edge)


# The wire.

uint32, uint64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
VALUES = {
    "int_value": uint32,
    "long_value": uint64,
    "float_value": st.floats(width=32),
    "double_value": st.floats(),
    "boolean_value": st.booleans(),
    "string_value": st.text(max_size=20),
    "bytes_value": st.binary(max_size=20),
}


@st.composite
def metrics(draw: st.DrawFn) -> dict[str, Any]:
    optional = {
        "name": st.text(min_size=1, max_size=20),
        "alias": uint64,
        "timestamp": uint64,
        "datatype": uint32,
        "is_historical": st.booleans(),
        "is_null": st.booleans(),
        "metadata": st.binary(max_size=8),
        "properties": st.binary(max_size=8),
        "later_number": uint64,
        "later_text": st.text(max_size=9),
        "later_fixed": uint64,
        "later_short": uint32,
    }
    metric: dict[str, Any] = draw(st.fixed_dictionaries({}, optional=optional))
    if field := draw(st.sampled_from([None, *VALUES])):
        metric[field] = draw(VALUES[field])
    return metric


@given(st.lists(metrics(), max_size=6), st.none() | uint64, st.none() | uint64)
def test_what_protobuf_writes_is_read(sent: list[dict[str, Any]], seq: int | None, ts: int | None) -> None:
    payload = read_payload(encode(*sent, seq=seq, ts=ts, uuid="some", body=b"body"))
    assert (payload.seq, payload.timestamp) == (seq, ts or 0)
    assert (payload.uuid, payload.body) == ("some", b"body")
    assert len(payload.metrics) == len(sent)
    for metric, written in zip(payload.metrics, sent, strict=True):
        assert metric.name == written.get("name", "")
        assert metric.alias == written.get("alias")
        assert metric.timestamp == written.get("timestamp", 0)
        assert metric.datatype == written.get("datatype", 0)
        assert metric.is_null == written.get("is_null", False)
        field = next((name for name in VALUES if name in written), None)
        value = written.get(field) if field else None
        if isinstance(value, (str, bytes)) or value is None:
            assert metric.value is None
        else:
            assert metric.value == value or (math.isnan(value) and math.isnan(metric.value or 0))
        assert bool(metric.field) == (field is not None)


@given(st.binary(max_size=200))
def test_random_bytes_are_read_or_refused(data: bytes) -> None:
    read_or_refuse(data)


@given(st.lists(metrics(), max_size=4), st.data())
def test_damaged_payloads_are_read_or_refused(sent: list[dict[str, Any]], data: st.DataObject) -> None:
    whole = bytearray(encode(*sent, seq=5))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    read_or_refuse(bytes(whole[: data.draw(st.integers(0, len(whole)))]))


def read_or_refuse(data: bytes) -> None:
    """What we read protobuf reads as well; for each kind of message there is an event or a reason."""
    try:
        read = read_payload(data)
    except WireError:
        read = None
    if read and not read.uuid:
        reference = PAYLOAD()
        reference.ParseFromString(data)
        assert [metric.alias or 0 for metric in read.metrics] == [
            metric.alias for metric in reference.metrics
        ]
        assert (read.seq or 0) == reference.seq
    host = Host().born()
    for kind in ("NDATA", "DBIRTH", "DDATA", "NBIRTH", "DDEATH", "NDEATH"):
        taken = host.raw(kind, data, "D" if kind[0] == "D" else "")
        assert all(refused for _, refused in taken) or read is not None


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x08", "ends within a number"),
        (b"\x08" + b"\xff" * 11, "more than 64 bits"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "more than 64 bits"),
        (b"\x12\x7f\x00", "ends within a field"),
        (b"\x12\x08\x69" + bytes(7), "ends within a field"),
        (b"\x12\x04\x65" + bytes(3), "ends within a field"),
        (b"\x12\x02\x0a\x05abcde", "ends within a field"),
        (b"\x10\x01", "field 2 has the wire type 0"),
        (b"\x00\x00", "no field has the number 0"),
        (b"\x53\x54", "wire type 3"),
        (b"\x12\x03\x0a\x01\xff", "no UTF-8"),
        (b"21.5", "ends within a field"),
    ],
)
def test_malformed_payloads_are_refused_with_the_reason(data: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        read_payload(data)
    ((given_back, refused),) = Host().born().raw("NDATA", data)
    assert given_back == data
    assert refused.startswith("no Sparkplug B payload: ")


def test_a_payload_has_a_limit_of_metrics() -> None:
    assert len(read_payload(b"\x12\x00" * MAX_METRICS).metrics) == MAX_METRICS
    with pytest.raises(WireError, match="16,384 metrics"):
        read_payload(b"\x12\x00" * (MAX_METRICS + 1))


@pytest.mark.parametrize("bits", [15, 31], ids=["deflate", "gzip"])
def test_compressed_payloads_are_unpacked(bits: int) -> None:
    packer = zlib.compressobj(wbits=bits)
    body = packer.compress(encode({"alias": 7, "double_value": 1.5}, seq=1)) + packer.flush()
    host = Host().born()
    whole = encode(uuid="SPBV1.0_COMPRESSED", body=body, ts=None)
    ((event, _),) = host.raw("NDATA", whole)
    assert event["values"] == {"temperature": 1.5}
    ((_, refused),) = host.raw("NDATA", encode(uuid="SPBV1.0_COMPRESSED", body=body[:-9]))
    assert "cut off" in refused
    assert not host.counts["gaps"]


def test_a_compressed_body_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparkplug_wire, "MAX_INFLATED_BYTES", 1_000)
    bomb = encode(uuid="SPBV1.0_COMPRESSED", body=zlib.compress(b"\x12\x00" * 501))
    with pytest.raises(WireError, match="unpacks to more"):
        read_payload(bomb)
    for body, why in [
        (b"no", "neither"),
        (zlib.compress(bomb)[:0], "cut off"),
        (zlib.compress(bomb), "twice"),
    ]:
        with pytest.raises(WireError, match=why):
            read_payload(encode(uuid="SPBV1.0_COMPRESSED", body=body))


def test_the_rebirth_command_is_what_the_specification_asks_for() -> None:
    command = PAYLOAD()
    command.ParseFromString(rebirth_payload(NOW_MS / 1_000))
    (metric,) = command.metrics
    assert (command.timestamp, metric.timestamp) == (NOW_MS, NOW_MS)
    assert (metric.name, metric.datatype, metric.boolean_value) == ("Node Control/Rebirth", BOOLEAN, True)
    command.ParseFromString(rebirth_payload())
    assert command.timestamp > NOW_MS


# Topics.


@pytest.mark.parametrize("kind", ["NBIRTH", "NDATA", "NDEATH"])
def test_a_topic_of_a_node_is_read(kind: str) -> None:
    assert SparkplugTopic.parse(f"spBv1.0/G/{kind}/E") == SparkplugTopic("G", kind, "E", "")
    assert SparkplugTopic.parse(f"spBv1.0/G/{kind}/E/D") is None


@pytest.mark.parametrize("kind", ["DBIRTH", "DDATA", "DDEATH"])
def test_a_topic_of_a_device_is_read(kind: str) -> None:
    assert SparkplugTopic.parse(f"spBv1.0/G/{kind}/E/D") == SparkplugTopic("G", kind, "E", "D")
    assert SparkplugTopic.parse(f"spBv1.0/G/{kind}/E") is None


@pytest.mark.parametrize(
    "text",
    [
        "spBv1.0/G/NCMD/E",
        "spBv1.0/G/DCMD/E/D",
        "spBv1.0/STATE/host",
        "STATE/host",
        "spAv1.0/G/NDATA/E",
        "spBv1.0/G/DDATA/E/D/more",
        "spBv1.0//NDATA/E",
        "spBv1.0/G/DDATA/E/",
        "spBv1.0/G/NDATA/" + "e" * 257,
        "spBv1.0/G/NDATA/+",
        "",
    ],
)
def test_other_topics_are_none(text: str) -> None:
    assert SparkplugTopic.parse(text) is None


# Values.


@pytest.mark.parametrize(
    ("datatype", "field", "sent", "value"),
    [
        (INT8, "int_value", 2**32 - 5, -5),
        (INT8, "int_value", 0xFB, -5),
        (INT8, "int_value", 127, 127),
        (INT16, "int_value", 2**32 - 30_000, -30_000),
        (INT32, "int_value", 2**31, -(2**31)),
        (INT32, "int_value", 2**31 - 1, 2**31 - 1),
        (INT32, "long_value", 2**64 - 1, -1),
        (INT64, "long_value", 2**63, -(2**63)),
        (INT64, "long_value", 2**64 - 1, -1),
        (INT64, "int_value", 12, 12),
        (UINT8, "int_value", 255, 255),
        (UINT16, "int_value", 65_535, 65_535),
        (UINT32, "int_value", 2**32 - 1, 2**32 - 1),
        (UINT32, "long_value", 2**32 - 1, 2**32 - 1),
        (UINT64, "long_value", 2**64 - 1, 2.0**64),
        (FLOAT, "float_value", 0.5, 0.5),
        (DOUBLE, "double_value", -1.7e308, -1.7e308),
        (BOOLEAN, "boolean_value", True, 1.0),
        (BOOLEAN, "boolean_value", False, 0.0),
    ],
)
def test_a_value_is_read_by_its_datatype(datatype: int, field: str, sent: Any, value: float) -> None:
    host = Host()
    birth = {"name": "v", "alias": 1, "datatype": datatype, field: sent}
    assert host.values("NBIRTH", birth, seq=0) == {"v": value}
    assert host.values("NDATA", {"alias": 1, field: sent}, seq=1) == {"v": value}
    assert not host.counts


@given(st.sampled_from([(INT8, 8), (INT16, 16), (INT32, 32)]), st.data())
def test_each_signed_integer_comes_back(kind: tuple[int, int], data: st.DataObject) -> None:
    datatype, bits = kind
    value = data.draw(st.integers(-(1 << bits - 1), (1 << bits - 1) - 1))
    metric = {"name": "v", "datatype": datatype, "int_value": value % (1 << 32)}
    assert Host().values("NBIRTH", metric, seq=0) == {"v": value}


@pytest.mark.parametrize(
    "metric",
    [
        {"datatype": STRING, "string_value": "running"},
        {"datatype": DATE_TIME, "long_value": NOW_MS},
        {"datatype": DOUBLE, "double_value": math.nan},
        {"datatype": FLOAT, "float_value": math.inf},
        {"datatype": DOUBLE, "string_value": "1.5"},
        {"datatype": INT8, "int_value": 300},
        {"datatype": UINT8, "int_value": 256},
        {"datatype": BOOLEAN, "int_value": 1},
        {"datatype": UINT16},
        {"int_value": 4},
        {"datatype": 99, "int_value": 4},
    ],
)
def test_what_is_no_number_is_ignored_and_counted(metric: dict[str, Any]) -> None:
    host = Host()
    good = {"name": "good", "datatype": DOUBLE, "double_value": 1.0}
    assert host.values("NBIRTH", {"name": "v", **metric}, good, seq=0) == {"good": 1.0}
    assert host.counts == {"ignored_values": 1}


def test_null_and_controls_are_no_values_and_not_counted() -> None:
    host = Host().born()
    assert host.take("NDATA", {"alias": 7, "is_null": True}, {"name": "bdSeq", "long_value": 1}, seq=1) == []
    assert not host.counts


def test_a_long_name_keeps_its_end_and_a_tag_has_one_owner() -> None:
    host = Host()
    first, second = ("Line 1/" + "x" * 70, "Line 2/" + "x" * 70)
    births = [
        {"name": name, "alias": alias, "datatype": DOUBLE, "double_value": float(alias)}
        for alias, name in enumerate([first, second, "y" * 300, "z" * 256])
    ]
    assert host.values("NBIRTH", *births, seq=0) == {"x" * 64: 0.0, "z" * 64: 3.0}
    assert host.counts == {"ignored_values": 2}
    # Also alone the second one does not speak under the tag of the first.
    assert host.take("NDATA", {"alias": 1, "double_value": 5.0}, seq=1) == []
    assert host.counts == {"ignored_values": 3}


def test_historical_metrics_become_a_reading_each_time() -> None:
    host = Host().born()
    sent = [
        {"alias": 7, "double_value": 1.0, "timestamp": NOW_MS - 2_500, "is_historical": True},
        {"alias": 7, "double_value": 2.0, "timestamp": NOW_MS - 1_500, "is_historical": True},
        {"alias": 7, "double_value": 3.0},
    ]
    events = [event for event, _ in host.take("NDATA", *sent, seq=1, ts=NOW_MS)]
    now = NOW_MS / 1_000
    assert [(event["ts"], event["values"]["temperature"]) for event in events] == [
        (now - 2.5, 1.0),
        (now - 1.5, 2.0),
        (now, 3.0),
    ]
    ((event, _),) = host.take("NDATA", {"alias": 7, "double_value": 3.0}, seq=2, ts=None)
    assert event == {"kind": "reading", "values": {"temperature": 3.0}}


def test_many_metrics_are_several_readings_and_too_many_times_none() -> None:
    host = Host()
    births = [
        {"name": f"{i:0200}", "alias": i, "datatype": DOUBLE, "double_value": 1.0} for i in range(1_200)
    ]
    taken = host.take("NBIRTH", *births, seq=0)
    assert [len(event["values"]) for event, _ in taken] == [500, 500, 200]
    late = [{"alias": 1, "double_value": 1.0, "timestamp": NOW_MS + i} for i in range(1_001)]
    ((_, refused),) = host.take("NDATA", *late, seq=1)
    assert "more than 1,000 readings" in refused
    assert len(host.take("NDATA", *late[:1_000], seq=2)) == 1_000


def test_the_longest_reading_fits_in_an_event() -> None:
    """Decoded by `Host.take`; a control character takes six bytes in JSON."""
    births = [
        {"name": "\x01" * 60 + f"{i:04}", "datatype": DOUBLE, "double_value": -1.2345678901234567e-300}
        for i in range(500)
    ]
    assert len(Host().values("NBIRTH", *births, seq=0)) == 500


# Births, aliases, deaths.


def test_births_and_the_data_after_them_are_readings() -> None:
    host = Host().born()
    pump = {
        "name": "flow",
        "alias": 7,
        "datatype": FLOAT,
        "float_value": 1.5,
    }  # an alias that the node has too
    assert host.values("DBIRTH", pump, device="pump", seq=1) == {"flow": 1.5}
    assert host.values("DDATA", {"alias": 7, "float_value": 2.5}, device="pump", seq=2) == {"flow": 2.5}
    assert host.values("NDATA", {"alias": 7, "double_value": 3.5}, seq=3) == {"temperature": 3.5}
    assert host.values("NDATA", {"name": "temperature", "double_value": 4.5}, seq=4) == {"temperature": 4.5}
    assert not host.counts
    assert not host.asked


@pytest.mark.parametrize("kind", ["NDATA", "DDATA"])
def test_data_before_the_birth_is_refused_and_asks_for_it(kind: str) -> None:
    host = Host()
    device = "pump" if kind == "DDATA" else ""
    ((_, refused),) = host.take(kind, {"alias": 7, "double_value": 1.0}, seq=9, device=device)
    assert "no birth of" in refused and "it is asked for" in refused
    assert host.counts == {"unborn": 1, "unknown_aliases": 1, "rebirths": 1}
    assert host.asked == ["spBv1.0/G/NCMD/E"]


def test_without_leave_nobody_is_asked_and_the_reason_says_so() -> None:
    host = Host(asks=False)
    ((_, refused),) = host.data(4)
    assert "set rebirth = true" in refused
    assert host.counts == {"unborn": 1, "unknown_aliases": 1}


def test_an_integer_that_no_birth_gives_a_type_is_refused() -> None:
    host = Host()
    ((_, refused),) = host.take("NDATA", {"name": "count", "int_value": 4}, seq=1)
    assert "no birth" in refused


def test_named_values_need_no_birth() -> None:
    host = Host()
    assert host.values("NDATA", {"name": "count", "datatype": INT8, "int_value": 4}, seq=1) == {"count": 4.0}
    assert host.counts["unborn"] == 1


def test_an_unknown_alias_after_the_birth_asks_and_the_known_ones_are_taken() -> None:
    host = Host().born()
    sent = [{"alias": 7, "double_value": 1.0}, {"alias": 8, "double_value": 2.0}]
    assert host.values("NDATA", *sent, seq=1) == {"temperature": 1.0}
    assert host.counts == {"unknown_aliases": 1, "rebirths": 1}
    ((_, refused),) = host.take("DDATA", sent[0], seq=2, device="pump")
    assert "'E/pump'" in refused


def test_a_device_that_died_has_no_aliases_until_it_is_born_again() -> None:
    host = Host().born()
    birth = {"name": "flow", "alias": 1, "datatype": FLOAT, "float_value": 1.5}
    data = {"alias": 1, "float_value": 2.0}
    host.take("DBIRTH", birth, device="pump", seq=1)
    assert host.take("DDEATH", device="pump", seq=2) == []
    ((_, refused),) = host.take("DDATA", data, device="pump", seq=3)
    assert refused
    host.take("DBIRTH", birth, device="pump", seq=4)
    assert host.values("DDATA", data, device="pump", seq=5) == {"flow": 2.0}
    assert not host.counts["gaps"]


def test_a_death_ends_the_session_of_its_birth_only() -> None:
    host = Host().born(bdseq=3)
    death = {"name": "bdSeq", "datatype": INT64, "long_value": 2}
    assert host.take("NDEATH", death) == []
    assert host.counts == {"stale_deaths": 1}
    assert not host.data(1)[0][1]
    assert host.take("NDEATH", {**death, "long_value": 3}) == []
    assert host.data(2)[0][1]
    host.born(bdseq=4)
    assert not host.data(1)[0][1]
    assert not host.counts["gaps"]


def test_a_new_birth_forgets_the_old_aliases_and_devices() -> None:
    host = Host().born()
    host.take("DBIRTH", {"name": "flow", "alias": 1, "datatype": FLOAT}, device="pump", seq=1)
    host.take("NBIRTH", {"name": "pressure", "alias": 7, "datatype": DOUBLE}, seq=0, ts=NOW_MS + 9)
    assert host.values("NDATA", {"alias": 7, "double_value": 1.0}, seq=1) == {"pressure": 1.0}
    assert host.take("DDATA", {"alias": 1, "float_value": 2.0}, device="pump", seq=2)[0][1]


# seq.


def test_seq_goes_round_after_255() -> None:
    host = Host().born(seq=254)
    for seq in (255, 0, 1):
        assert not host.data(seq)[0][1]
    assert not host.counts


@given(st.integers(0, 255), st.integers(0, 254))
def test_a_gap_is_counted_by_the_messages_that_are_missing(last: int, missing: int) -> None:
    host = Host().born(seq=last)
    assert not host.data((last + 1 + missing) % 256)[0][1]
    assert host.counts["gaps"] == missing
    assert len(host.asked) == (missing > 0)
    host.data((last + 2 + missing) % 256)
    assert host.counts["gaps"] == missing


def test_every_kind_of_message_but_a_node_death_counts_in_seq() -> None:
    host = Host().born()
    host.take(
        "DBIRTH", {"name": "flow", "alias": 1, "datatype": FLOAT, "is_null": True}, device="pump", seq=1
    )
    host.data(2)
    host.take("DDATA", {"alias": 1, "float_value": 1.0}, device="pump", seq=3)
    host.take("DDEATH", device="pump", seq=4)
    host.data(5)
    assert not host.counts
    host.take("DDEATH", device="pump", seq=8)
    assert host.counts["gaps"] == 2


def test_what_is_delivered_again_is_no_gap() -> None:
    host = Host().born()
    for seq in (1, 2, 3, 3, 1, 2, 3, 4):
        assert not host.data(seq)[0][1]
    host.born()  # the same birth, again
    host.data(5)
    assert not host.counts
    host.data(2, ts=NOW_MS + 77)  # another message under an old seq
    assert host.counts["gaps"] == 252


def test_a_zero_that_an_encoder_left_out_is_no_gap() -> None:
    host = Host().born(seq=255)
    host.take("NDATA", {"alias": 7, "double_value": 1.0})
    host.data(1)
    assert not host.counts


def test_a_seq_beyond_255_is_refused() -> None:
    ((_, refused),) = Host().born().data(256)
    assert "256 is not of 0 to 255" in refused


def test_a_node_is_asked_once_a_minute_and_each_for_itself() -> None:
    host = Host().born().born(edge="F")
    for seq in (5, 10, 15):
        host.data(seq)
    host.data(9, edge="F")
    assert host.asked == ["spBv1.0/G/NCMD/E", "spBv1.0/G/NCMD/F"]
    host.now_s = 59.0
    host.data(20)
    assert len(host.asked) == 2
    host.now_s = 60.0
    host.data(25)
    assert host.asked[2:] == ["spBv1.0/G/NCMD/E"]
    assert host.counts["rebirths"] == 3


# Bounds.


def test_rebirths_are_bounded_over_all_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparkplug, "MAX_NODES", 3)
    host = Host()
    for edge in "ABCDE":
        host.data(1, edge=edge)
    assert len(host.asked) == 3
    host.now_s = 61.0
    host.data(2, edge="E")
    assert host.asked[-1] == "spBv1.0/G/NCMD/E"


def test_nodes_are_bounded_and_a_silent_one_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparkplug, "MAX_NODES", 2)
    host = Host().born(edge="A").born(edge="B")
    ((_, refused),) = host.take("NBIRTH", {"name": "v", "datatype": DOUBLE, "double_value": 1.0}, edge="C")
    assert "nodes are known already" in refused
    host.now_s = 3_600.0
    host.data(1, edge="A")
    host.born(edge="C")
    assert not host.data(1, edge="C")[0][1]
    assert not host.data(2, edge="A")[0][1]
    assert host.data(2, edge="B")[0][1]


def test_metrics_are_bounded_and_counted_back_when_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparkplug, "MAX_NODE_METRICS", 10)
    monkeypatch.setattr(sparkplug, "MAX_HOST_METRICS", 16)
    host = Host()

    def birth(number: int, edge: str, ts: int) -> str:
        sent = [{"name": f"m{i}", "alias": i, "datatype": DOUBLE, "double_value": 1.0} for i in range(number)]
        ((_, refused),) = host.take("NBIRTH", *sent, edge=edge, seq=0, ts=ts)
        return str(refused)

    assert "the node and its devices" in birth(10, "A", 1)
    for again in range(5):
        assert not birth(9, "A", 2 + again)
    assert "the nodes have" in birth(6, "B", 1)
    assert not birth(5, "B", 2)
    host.take("NDEATH", edge="A")
    assert not birth(9, "B", 3)
    assert not birth(5, "A", 9)
    # The host is full; when B dies there is room for devices, also for one after the other without end.
    device = {"name": "v", "datatype": DOUBLE, "double_value": 1.0}
    assert "the nodes have" in host.take("DBIRTH", device, device="d", edge="A", seq=1)[0][1]
    host.take("NDEATH", edge="B")
    for seq in range(2, 42, 2):
        assert not host.take("DBIRTH", device, device=f"d{seq}", edge="A", seq=seq)[0][1]
        host.take("DDEATH", device=f"d{seq}", edge="A", seq=seq + 1)


def test_a_float_is_read_with_all_its_bits() -> None:
    (exact,) = struct.unpack("<f", struct.pack("<f", 21.3))
    assert Host().values("NBIRTH", {"name": "v", "datatype": FLOAT, "float_value": 21.3}) == {"v": exact}
