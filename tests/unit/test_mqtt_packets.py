"""MQTT packets: whole whatever the reads were, bounded whatever the other side sends."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sources.mqtt_packets import (
    ConnAck,
    Disconnect,
    MqttError,
    Packet,
    Parser,
    PingResp,
    PubAck,
    Publish,
    SubAck,
    Subscription,
    UnsubAck,
    connect,
    puback,
    publish,
    reason_text,
    subscribe,
    unsubscribe,
)

LIMIT = 4_096
VERSIONS = pytest.mark.parametrize("version", [4, 5])


def in_pieces(data: bytes, cuts: Sequence[int]) -> Iterator[bytes]:
    """The bytes as several reads might bring them."""
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    for start, end in itertools.pairwise(places):
        yield data[start:end]


def parse(version: int, data: bytes, cuts: Sequence[int] = (), limit: int = LIMIT) -> list[Packet]:
    parser = Parser(version, limit)
    return [packet for piece in in_pieces(data, cuts) for packet in parser.feed(piece)]


MESSAGES = st.lists(
    st.tuples(st.text("abc/é", min_size=1, max_size=20), st.binary(max_size=300), st.integers(0, 65_535)),
    max_size=20,
)


@VERSIONS
@given(messages=MESSAGES, cuts=st.lists(st.integers(0, 5_000), max_size=30))
def test_messages_come_whole_however_the_reads_cut_them(
    version: int, messages: list[tuple[str, bytes, int]], cuts: list[int]
) -> None:
    data = b"".join(publish(version, topic, payload, number) for topic, payload, number in messages)
    expected = [Publish(topic.encode(), payload, number) for topic, payload, number in messages]
    assert parse(version, data, cuts) == expected


@VERSIONS
@given(
    size=st.integers(LIMIT, 3 * LIMIT),
    packet_id=st.integers(0, 65_535),
    cuts=st.lists(st.integers(0, 15_000), max_size=20),
)
def test_a_message_that_is_too_long_is_passed_over_and_what_follows_is_read(
    version: int, size: int, packet_id: int, cuts: list[int]
) -> None:
    data = publish(version, "t", b"x" * size, packet_id) + publish(version, "t", b"next", 7)
    found = parse(version, data, cuts)
    head = 3 + (2 if packet_id else 0) + (version == 5)
    assert found == [Publish(b"t", b"", packet_id, oversize=head + size), Publish(b"t", b"next", 7)]


def test_a_message_of_the_longest_length_costs_no_memory() -> None:
    parser = Parser(4, LIMIT)
    head = b"\x32\xff\xff\xff\x7f\x00\x01t\x00\x09"
    tracemalloc.start()
    (found,) = parser.feed(head)
    for _ in range(1_000):
        assert parser.feed(bytes(65_536)) == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(found, Publish)
    assert found.oversize == 268_435_455
    assert peak < 1 << 20


@VERSIONS
@settings(max_examples=500)
@given(data=st.binary(max_size=200), cuts=st.lists(st.integers(0, 200), max_size=10))
def test_any_bytes_are_packets_or_an_error_and_nothing_else(
    version: int, data: bytes, cuts: list[int]
) -> None:
    parser = Parser(version, LIMIT)
    try:
        for piece in in_pieces(data, cuts):
            parser.feed(piece)
            assert parser.held_bytes <= LIMIT + 5
    except MqttError:
        pass


@VERSIONS
@settings(max_examples=500)
@given(kind=st.sampled_from([0x20, 0x40, 0x90, 0xD0, 0xE0, 0x30, 0x32, 0x3B]), body=st.binary(max_size=60))
def test_any_body_of_a_known_packet_is_read_or_refused(version: int, kind: int, body: bytes) -> None:
    try:
        (found,) = parse(version, bytes([kind, len(body)]) + body)
    except MqttError:
        return
    if isinstance(found, Publish):
        assert found.topic
        assert len(found.topic) + len(found.payload) <= len(body)


@pytest.mark.parametrize(
    ("version", "data", "why"),
    [
        (4, b"\x36\x06\x00\x01t\x00\x01x", "QoS 2"),
        (4, b"\x34\x06\x00\x01t\x00\x01x", "QoS 2"),
        (4, b"\x32\x05\x00\x01t\x00\x00", "without a packet id"),
        (4, b"\x30\x02\x00\x09", "shorter than its own fields"),
        (4, b"\x30\x02\x00\x00", "without a topic"),
        (5, b"\x30\x03\x00\x01t", "shorter than its own fields"),
        (5, b"\x30\x04\x00\x01t\x05", "shorter than its own fields"),
        (4, b"\x32\xff\xff\xff\xff\x01", "more than four bytes"),
        (4, b"\x10\x00", "type 1"),
        (5, b"\xf0\x00", "type 15"),
        (4, b"\xe0\x00", "type 14"),
        (4, b"\x20\x01\x00", "shorter than its own fields"),
        (4, b"\x20\x02\x02\x00", "flags that do not exist"),
        (5, b"\x20\x05\x00\x00\x02\x55\x00", "a property 0x55"),
        (4, b"\x90\xff\x7f", "no message"),
    ],
)
def test_what_breaks_the_protocol_is_named(version: int, data: bytes, why: str) -> None:
    with pytest.raises(MqttError, match=why):
        parse(version, data, limit=128)


def test_answers_are_read() -> None:
    assert parse(4, b"\x20\x02\x01\x00") == [ConnAck(True, 0)]
    properties = b"\x13\x00\x0a\x11\x00\x00\x00\x3c\x26\x00\x01a\x00\x01b"
    body = b"\x00\x00" + bytes([len(properties)]) + properties
    expected = [ConnAck(False, 0, "", keepalive_s=10, session_expiry_s=60)]
    assert parse(5, b"\x20" + bytes([len(body)]) + body) == expected
    assert parse(4, b"\x90\x04\x00\x01\x01\x80") == [SubAck(1, [1, 0x80])]
    assert parse(5, b"\x90\x05\x00\x01\x00\x01\x87") == [SubAck(1, [1, 0x87])]
    assert parse(4, b"\x40\x02\x01\x02\xd0\x00") == [PubAck(258), PingResp()]
    assert parse(5, b"\xe0\x02\x8e\x00") == [Disconnect(0x8E)]
    assert parse(5, b"\xe0\x00") == [Disconnect(0)]


def test_flags_and_properties_of_a_message_are_told_apart_from_its_payload() -> None:
    assert parse(5, b"\x3b\x0a\x00\x01t\x00\x07\x02\x01\x01ab") == [
        Publish(b"t", b"ab", 7, dup=True, retain=True)
    ]


def test_what_we_send_is_what_the_standard_says() -> None:
    """Written out from the standard, not by our own reader."""
    assert connect(4, "id", username="u", password="p", keepalive_s=20) == (
        b"\x10\x14\x00\x04MQTT\x04\xc0\x00\x14\x00\x02id\x00\x01u\x00\x01p"
    )
    assert connect(5, "id", session_expiry_s=60, max_packet_bytes=1_024) == (
        b"\x10\x1c\x00\x04MQTT\x05\x00\x00\x00\x0d\x11\x00\x00\x00\x3c\x21\xff\xff\x27\x00\x00\x04\x00\x00\x02id"
    )
    assert subscribe(4, 1, [Subscription("a/#", 2)]) == b"\x82\x08\x00\x01\x00\x03a/#\x01"
    assert subscribe(5, 1, [Subscription("a/#", 2)]) == b"\x82\x09\x00\x01\x00\x00\x03a/#\x21"
    assert unsubscribe(4, 2, ["a/#"]) == b"\xa2\x07\x00\x02\x00\x03a/#"
    assert unsubscribe(5, 2, ["a/#"]) == b"\xa2\x08\x00\x02\x00\x00\x03a/#"
    assert Parser(5, 1_000).feed(b"\xb0\x04\x00\x02\x00\x00") == [UnsubAck(2)]
    assert Parser(4, 1_000).feed(b"\xb0\x02\x00\x02") == [UnsubAck(2)]
    assert puback([1, 515]) == b"\x40\x02\x00\x01\x40\x02\x02\x03"


def test_what_a_broker_says_cannot_forge_a_line_of_the_log() -> None:
    shown = reason_text(5, 0x87, "no\nway\x1b[2J" + "x" * 500)
    assert shown.isprintable()
    assert len(shown) < 200
