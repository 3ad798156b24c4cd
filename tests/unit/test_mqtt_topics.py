"""[sources.mqtt]: what its keys may say, and what becomes of topics and payloads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Config, ConfigError, load, show
from pipeline.config_decode import Secret
from pipeline.decode import RefusedError, decode_event
from pipeline.events import MAX_EVENT_BYTES
from pipeline.source_settings import MqttSource, MqttTopic
from pipeline.sources.mqtt import login_of
from pipeline.sources.mqtt_settings import faults
from pipeline.sources.mqtt_topics import MAX_LINES, MAX_NAMES, Route, TopicMap
from pipeline.sources.sparkplug import SparkplugHost
from pipeline.units import Duration

URL = "mqtts://broker.local"


class Counted(TopicMap):
    """A map whose counts can be looked at."""

    def __init__(self, topics: dict[str, MqttTopic]) -> None:
        self.counts: Counter[str] = Counter()

        def count(name: str, number: int) -> None:
            self.counts[name] += number

        super().__init__("site", topics, SparkplugHost(count), count)


def route(topics: dict[str, MqttTopic], topic: str) -> Route | None:
    return Counted(topics).route(topic.encode())


def convert(rule: MqttTopic, payload: bytes) -> list[tuple[bytes, str]]:
    found = route({"t": rule}, "t")
    assert found is not None
    assert found.convert is not None
    return found.convert(payload)


@pytest.mark.parametrize(
    ("filter", "topic", "matches"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/+", "a/b", True),
        ("a/+", "a/", True),
        ("a/+", "a", False),
        ("a/+/c", "a/b/c", True),
        ("a/+/c", "a/b/b/c", False),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("a/#", "ab", False),
        ("#", "a/b", True),
        ("#", "$SYS/broker/uptime", False),
        ("+/broker/#", "$SYS/broker/uptime", False),
        ("a.b", "axb", False),
    ],
)
def test_filters_match_as_the_standard_says(filter: str, topic: str, matches: bool) -> None:
    assert (route({filter: MqttTopic()}, topic) is not None) is matches


@pytest.mark.parametrize(
    ("source", "topic", "name"),
    [
        ("", "plant/pump-1/x", "site"),
        ("{1}", "plant/pump-1/x", "pump-1"),
        ("{1}", "plant/Pump 1/x", "pump-1"),
        ("line.{1}.{2}", "plant/a/b/c", "line.a.b-c"),
        ("{1}", "plant/Größe/x", "gr--e"),
        ("{1}", "plant//x", None),
        ("{1}", "plant/-x/x", None),
        ("{1}", f"plant/{'x' * 65}/x", None),
    ],
)
def test_a_topic_s_text_becomes_a_source_or_is_refused(source: str, topic: str, name: str | None) -> None:
    found = route({"plant/+/#": MqttTopic(source=source)}, topic)
    assert found is not None
    assert bool(found.refused) is (name is None)
    assert name is None or found.source == name


def test_two_topics_never_speak_as_one_source_by_their_spelling() -> None:
    topics = Counted({"plant/+": MqttTopic(source="{1}")})
    for topic, right in ((b"plant/Pump 1", True), (b"plant/PUMP-1", False), (b"plant/pump-1", True)):
        found = topics.route(topic)
        assert found is not None
        assert (found.refused == "") is right, topic
    late = topics.route(b"plant/Pump 1")
    assert late is not None
    assert late.refused, "the name belongs to the topic that is spelled so"


def test_topics_make_a_bounded_number_of_sources() -> None:
    topics = Counted({"plant/+": MqttTopic(source="{1}")})
    found = [topics.route(b"plant/p%d" % number) for number in range(MAX_NAMES + 5)]
    assert [bool(one and one.refused) for one in found[-6:]] == [False, *[True] * 5]


@pytest.mark.parametrize(
    ("payload", "value"),
    [
        (b"21.5", 21.5), (b" 21.5\n", 21.5), (b"-0", 0.0), (b"1e3", 1_000.0), (b"0.001", 0.001),
        (b"", None), (b"NaN", None), (b"Infinity", None), (b"0x10", None), (b"1_000", None), (b"+5", None),
        (b"12 bar", None), (b"1,5", None), (b"007", None), (b"1" * 65, None), (b"\xff", None),
        (b'1},"x":{"y":2', None),
    ],
)  # fmt: skip
def test_numbers_are_taken_as_json_writes_them(payload: bytes, value: float | None) -> None:
    rule = MqttTopic(payload="number", tag="temp", unit="°C")
    ((data, refused),) = convert(rule, payload)
    if value is None:
        assert refused
        assert data == payload
    else:
        assert msgspec.json.decode(data) == {
            "kind": "reading", "values": {"temp": value}, "units": {"temp": "°C"}
        }  # fmt: skip
        assert decode_event(data)


def test_the_tag_may_come_from_the_topic_and_cannot_break_out() -> None:
    topic = 'plant/"},"subject":"x'
    found = route({"plant/+": MqttTopic(payload="number", tag="{1}")}, topic)
    assert found is not None
    assert found.convert is not None
    ((data, refused),) = found.convert(b"1")
    assert not refused
    assert msgspec.json.decode(data) == {"kind": "reading", "values": {'"},"subject":"x': 1}}


@pytest.mark.parametrize(
    ("payload", "event"),
    [
        (b'{"a":1,"b":2.5}', {"values": {"a": 1, "b": 2.5}}),
        (b'{"a":1,"on":true,"mode":"auto","in":{"x":1},"no":null}', {"values": {"a": 1, "on": 1.0}}),
        (b'{"a":"text"}', None),
        (b"[1]", None),
        (b"7", None),
        (b'{"a":1e999}', None),
        (b'{"a":' + b"9" * 400 + b"}", None),
        (b'{"a":' + b"[" * 50_000, None),
        (b'{"\xff":1}', None),
    ],
)
def test_flat_json_gives_its_numbers(payload: bytes, event: dict[str, object] | None) -> None:
    ((data, refused),) = convert(MqttTopic(payload="json"), payload)
    if event is None:
        assert refused
        assert data == payload
    else:
        assert msgspec.json.decode(data) == {"kind": "reading"} | event


@pytest.mark.parametrize(
    ("time", "ts"),
    [
        (b"1763912345", 1_763_912_345),
        (b"1763912345.5", 1_763_912_345.5),
        (b"1763912345123", 1_763_912_345.123),
        (b'"2026-03-01T08:15:00Z"', "2026-03-01T08:15:00Z"),
        (b"null", None),
        (b"true", None),
    ],
)
def test_flat_json_brings_its_time(time: bytes, ts: object) -> None:
    payload = b'{"t":%s,"a":1}' % time
    ((data, refused),) = convert(MqttTopic(payload="json", time="t"), payload)
    if ts is None:
        assert "no time" in refused
    else:
        assert msgspec.json.decode(data) == {"kind": "reading", "values": {"a": 1}, "ts": ts}


@pytest.mark.parametrize("time", [b"9" * 400, b"-" + b"9" * 400])
def test_a_time_with_more_digits_than_a_float_holds_breaks_nothing(time: bytes) -> None:
    """It did: the broker sent the message again to each new ingest process, and each of them ended."""
    ((data, refused),) = convert(MqttTopic(payload="json", time="t"), b'{"t":%s,"a":1}' % time)
    assert not refused
    assert abs(msgspec.json.decode(data)["ts"]) > 1e15, "decode refuses it: no time is so far away"


def test_lines_are_events_and_too_many_are_refused_whole() -> None:
    rule = MqttTopic(payload="lines")
    assert convert(rule, b"a\n\n b \nc") == [(b"a", ""), (b" b ", ""), (b"c", "")]
    assert convert(rule, b"") == []
    assert len(convert(rule, b"a\n" * MAX_LINES)) == MAX_LINES
    ((data, refused),) = convert(rule, b"a\n" * (MAX_LINES + 1))
    assert refused
    assert len(data) == 2 * (MAX_LINES + 1)


@given(payload=st.binary(max_size=300), kind=st.sampled_from(["number", "json", "lines", "sparkplug"]))
def test_any_payload_is_events_or_refused_and_nothing_raises(payload: bytes, kind: str) -> None:
    rules = {"spBv1.0/#": MqttTopic(payload=kind)}  # type: ignore[arg-type]
    found = route(rules, "spBv1.0/g/NDATA/e")
    assert found is not None
    assert found.convert is not None
    for data, refused in found.convert(payload):
        assert len(data) <= MAX_EVENT_BYTES
        if not refused and kind != "lines":
            try:
                decode_event(data)
            except RefusedError as error:
                assert "range" in str(error) or "finite" in str(error) or "number" in str(error)


def test_bytes_that_are_no_text_are_no_topic() -> None:
    assert Counted({"#": MqttTopic()}).route(b"\xff/\xfe") is None


def fault_of(**settings: object) -> list[str]:
    values = {"url": URL, "topics": {"a": MqttTopic()}} | settings
    return [f"{key}: {message}" for key, message, _ in faults(MqttSource(**values))]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"url": "http://x"}, "url: expected an address"),
        ({"url": "mqtt://user:secret@x"}, "url: user and password belong"),
        ({"url": "mqtt://x/topic"}, "url: nothing may follow"),
        ({"url": "mqtt://x:99999"}, "url: "),
        ({"url": "mqtt://x", "ca_file": "/ca"}, "ca_file: has no effect without encryption"),
        ({"key_file": "/k"}, "key_file: has no effect without cert_file"),
        ({"username": "u", "password": "plain"}, "password: stands in the configuration"),
        ({"password": Secret("p", "${cred:p}")}, "username: missing"),
        ({"session_expiry": Duration(5)}, "session_expiry: shorter than a minute"),
        ({"keepalive": Duration(1)}, "keepalive: out of range"),
        ({"probe_topic": "a/#"}, "probe_topic: not a topic"),
        ({"client_id": "a\nb"}, "client_id: not a client id"),
        ({"topics": {}}, "topics: no topic"),
        ({"topics": {"a/#/b": MqttTopic()}}, 'topics: "a/#/b": not a topic filter'),
        ({"topics": {"a+": MqttTopic()}}, 'topics: "a+": not a topic filter'),
        ({"topics": {"$SYS/#": MqttTopic()}}, 'topics: "$SYS/#": topics that begin with $'),
        ({"topics": {"$share/g/a": MqttTopic()}}, 'topics: "$share/g/a": topics that begin with $'),
        ({"topics": {"a": MqttTopic(source="{1}")}}, 'topics: "a": source has a place {1}'),
        ({"topics": {"a": MqttTopic(source="Pump")}}, 'topics: "a": source "Pump" is no name'),
        ({"topics": {"a": MqttTopic(sources=("X",))}}, 'topics: "a": "X" in sources is no name'),
        ({"topics": {"a": MqttTopic(unit="bar")}}, 'topics: "a": unit has no effect'),
        ({"topics": {"a/#": MqttTopic(), "a/b": MqttTopic()}}, 'topics: "a/b" overlaps "a/#"'),
        ({"topics": {"a/+": MqttTopic(), "+/b": MqttTopic()}}, 'topics: "+/b" overlaps "a/+"'),
        ({"topics": {"a": MqttTopic(), "a/#": MqttTopic()}}, 'topics: "a/#" overlaps "a"'),
    ],
)
def test_what_does_not_fit_is_named(settings: dict[str, object], fault: str) -> None:
    assert any(found.startswith(fault) for found in fault_of(**settings)), fault_of(**settings)


def test_what_fits_is_taken() -> None:
    topics = {"a/+": MqttTopic(source="{1}"), "b/#": MqttTopic(sources=("*",)), "a/b/c": MqttTopic()}
    assert fault_of(topics=topics) == []


TEXT = """
[[sources]]
name = "plant"
kind = "mqtt"
[sources.mqtt]
url = "mqtts://broker.local"
username = "gateway"
password = "${file:password}"
ca_file = "ca.pem"
[sources.mqtt.topics]
"plant/+/pressure" = { payload = "number", source = "{1}", tag = "pressure", unit = "bar" }
"plant/events" = {}
"""


def loaded(folder: Path, text: str = TEXT) -> Config:
    (folder / "password").write_text("open sesame\n")
    path = folder / "edgewater.toml"
    path.write_text(text)
    return load(path)


def test_the_file_is_read_as_the_readme_writes_it(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    (source,) = config.sources
    assert source.mqtt is not None
    assert source.mqtt.topics["plant/+/pressure"].tag == "pressure"
    login = login_of("plant", source.mqtt)
    assert (login.host, login.port, login.password) == ("broker.local", 8883, "open sesame")
    assert login.tls is not None
    assert login.tls.ca_file == str(tmp_path / "ca.pem"), "relative to the file"


def test_a_password_is_shown_nowhere(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    (source,) = config.sources
    assert source.mqtt is not None
    login = login_of("plant", source.mqtt)
    for shown in (show(config), show(config, as_json=True), repr(config), repr(login), str(login)):
        assert "sesame" not in shown


def test_a_fault_of_a_topic_has_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, TEXT.replace('"plant/events"', '"plant/#"'))
    assert "overlaps" in str(error.value)
    assert "edgewater.toml:10" in str(error.value), "where the topics begin"


def test_client_ids_differ_by_source_and_stay() -> None:
    settings = MqttSource(url=URL, topics={"a": MqttTopic()})
    first, again, other = (login_of(name, settings).client_id for name in ("a", "a", "b"))
    assert first == again
    assert first != other
    assert first.startswith("edgewater-a-")
