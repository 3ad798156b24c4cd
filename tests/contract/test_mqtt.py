"""MQTT against a real mosquitto: what is acknowledged when, what comes again, who may speak for whom."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.config_decode import Secret
from pipeline.decode import RefusedError, decode_event
from pipeline.source_settings import MqttSource, MqttTopic
from pipeline.sources.inbox import Settled
from pipeline.sources.mqtt import LIMIT_BYTES, MqttConnector
from pipeline.units import Duration
from tests.mosquitto import Mosquitto, Publisher
from tests.sources import Reader, reading

pytestmark = pytest.mark.skipif(shutil.which("mosquitto") is None, reason="needs mosquitto")
VERSIONS = pytest.mark.parametrize("version", ["5", "3.1.1"])


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    made = Mosquitto(tmp_path / "broker")
    made.start()
    yield made
    made.stop()


@pytest.fixture
def publisher(broker: Mosquitto) -> Iterator[Publisher]:
    made = Publisher(broker.port)
    yield made
    made.close()


def connector(broker: Mosquitto, **settings: Any) -> MqttConnector:
    values = {
        "url": f"mqtt://127.0.0.1:{broker.port}",
        "topics": {"site/events": MqttTopic()},
        "client_id": "edgewater-test",
    }
    return MqttConnector("site", msgspec.convert(values | settings, MqttSource, from_attributes=True))


def connected(reader: Reader) -> None:
    state = reader.inbox.state(reader.connector)
    reader.until(lambda: state.connected is True)


def settle(reader: Reader) -> None:
    """Acknowledge what was taken, and let it leave."""
    reader.connector.acknowledge([Settled(receipt) for receipt in reader.receipts()])
    time.sleep(0.2)


def counts(reader: Reader) -> dict[str, int]:
    return reader.inbox.state(reader.connector).counts


@VERSIONS
def test_what_a_topic_s_rule_says_becomes_of_its_messages(
    broker: Mosquitto, publisher: Publisher, version: str
) -> None:
    topics = {
        "plant/+/pressure": MqttTopic(payload="number", source="{1}", tag="pressure", unit="bar"),
        "plant/+/state": MqttTopic(payload="json", source="{1}", time="t"),
        "logs": MqttTopic(payload="lines"),
        "site/events": MqttTopic(),
    }
    with reading(connector(broker, version=version, topics=topics)) as reader:
        connected(reader)
        publisher.publish("plant/Pump 1/pressure", b"3.42\n")
        publisher.publish("plant/pump-2/state", b'{"t":1763912345123,"flow":7,"on":true,"mode":"auto"}')
        publisher.publish("logs", b'{"kind":"text","text":"one"}\n{"kind":"text","text":"two"}\n')
        publisher.publish("site/events", b'{"kind":"text","text":"three"}')
        reader.until_lines(5)
    found = [(line.origin.source, msgspec.json.decode(line.data)) for line in reader.lines]
    assert found == [
        ("pump-1", {"kind": "reading", "values": {"pressure": 3.42}, "units": {"pressure": "bar"}}),
        ("pump-2", {"kind": "reading", "values": {"flow": 7, "on": 1.0}, "ts": 1763912345.123}),
        ("site", {"kind": "text", "text": "one"}),
        ("site", {"kind": "text", "text": "two"}),
        ("site", {"kind": "text", "text": "three"}),
    ]
    assert all(decode_event(line.data) for line in reader.lines)
    assert counts(reader)["ignored_values"] == 1


def test_nobody_speaks_for_a_source_that_the_topic_s_rule_does_not_list(
    broker: Mosquitto, publisher: Publisher
) -> None:
    topics = {"a": MqttTopic(source="a"), "b": MqttTopic(source="b", sources=("pump-1",))}
    with reading(connector(broker, topics=topics)) as reader:
        connected(reader)
        for topic in ("a", "b"):
            publisher.publish(topic, b'{"kind":"text","source":"pump-1","text":"E42"}')
        reader.until_lines(2)
    allowed = {line.origin.source: line.origin.allowed for line in reader.lines}
    assert allowed == {"a": frozenset(), "b": frozenset({"pump-1"})}


@VERSIONS
def test_filters_that_the_topics_no_longer_have_are_unsubscribed(
    broker: Mosquitto, publisher: Publisher, version: str
) -> None:
    """The broker's session remembers them: where an old and a new one overlap, messages would come twice."""
    with reading(connector(broker, version=version, topics={"site/#": MqttTopic()})) as reader:
        connected(reader)
        reader.settle(0.2)
    publisher.publish("site/old", b'{"kind":"text","text":"old"}')
    with reading(connector(broker, version=version), reader.positions) as again:
        connected(again)
        again.settle(0.3)
        assert counts(again)["unlisted"] == 1, "what waited in the session under the old filter"
        publisher.publish("site/old", b'{"kind":"text","text":"old"}')
        publisher.publish("site/events", b'{"kind":"text","text":"new"}')
        again.until_lines(1)
        assert again.settle(0.3) == [b'{"kind":"text","text":"new"}']
        assert counts(again)["unlisted"] == 1
        settle(again)
    with reading(connector(broker, version=version), again.positions) as third:
        connected(third)
        publisher.publish("site/events", b'{"kind":"text","text":"last"}')
        third.until_lines(1)
        assert third.settle(0.3) == [b'{"kind":"text","text":"last"}']


@VERSIONS
def test_retained_messages_are_news_only_where_the_settings_say_so(
    broker: Mosquitto, publisher: Publisher, version: str
) -> None:
    publisher.publish("site/events", b'{"kind":"text","text":"old"}', retain=True)
    for retained, expected in (("ignore", [b"new"]), ("take", [b"old", b"new"])):
        settings = {"version": version, "retained": retained, "client_id": f"{retained}-{version}"}
        with reading(connector(broker, **settings)) as reader:
            connected(reader)
            publisher.publish("site/events", b'{"kind":"text","text":"new"}')
            reader.until(lambda reader=reader: any(b"new" in data for data in reader.data))  # type: ignore[misc]
            assert [data[23:26] for data in reader.data] == expected


@VERSIONS
def test_a_redelivery_between_commit_and_puback_is_known_and_dropped(
    broker: Mosquitto, publisher: Publisher, version: str
) -> None:
    """The kill: what was taken is committed with its row, and no acknowledgement left. Plain numbers have
    neither id nor ts, so nothing but the row can tell."""
    topics = {"n": MqttTopic(payload="number")}
    with reading(connector(broker, version=version, topics=topics)) as reader:
        connected(reader)
        for _ in range(10):
            publisher.publish("n", b"7")  # equal ones, as a sensor sends them
        reader.until_lines(10)
    with reading(connector(broker, version=version, topics=topics), reader.positions) as again:
        connected(again)
        publisher.publish("n", b"8")
        again.until_lines(1)
        again.settle(0.3)
        assert [line.data for line in again.lines] == [b'{"kind":"reading","values":{"value":8}}']
        assert counts(again)["redelivered"] == 10
        settle(again)
    with reading(connector(broker, version=version, topics=topics), again.positions) as third:
        connected(third)
        assert third.settle(0.5) == [], "all are acknowledged now"
        assert counts(third).get("redelivered", 0) == 0


@VERSIONS
def test_a_redelivery_of_what_was_never_committed_is_handed_over(
    broker: Mosquitto, publisher: Publisher, version: str
) -> None:
    topics = {"n": MqttTopic(payload="number")}
    with reading(connector(broker, version=version, topics=topics)) as reader:
        connected(reader)
        publisher.publish("n", b"1")
        reader.until_lines(1)
        committed = dict(reader.positions)
        publisher.publish("n", b"2")
        publisher.publish("n", b"1")
        reader.until_lines(3)
    with reading(connector(broker, version=version, topics=topics), committed) as again:
        again.until_lines(2)
        again.settle(0.3)
        values = [msgspec.json.decode(line.data)["values"]["value"] for line in again.lines]
        assert values == [2, 1]


def test_a_cut_while_the_commit_is_under_way_doubles_nothing(broker: Mosquitto, publisher: Publisher) -> None:
    topics = {"n": MqttTopic(payload="number")}
    with reading(connector(broker, topics=topics)) as reader:
        connected(reader)
        for number in range(5):
            publisher.publish("n", b"%d" % number)
        reader.until_lines(5)
        state = reader.inbox.state(reader.connector)
        publisher.close()
        broker.stop()
        reader.until(lambda: state.connected is False)
        broker.start()
        reader.until(lambda: state.connected is True)
        reader.until(lambda: state.counts.get("redelivered", 0) == 5)
        settle(reader)
        reader.settle(0.3)
        assert len(reader.lines) == 5
    with reading(connector(broker, topics=topics), reader.positions) as again:
        connected(again)
        assert again.settle(0.4) == []


def test_a_session_that_the_broker_lost_is_counted(broker: Mosquitto, publisher: Publisher) -> None:
    with reading(connector(broker)) as reader:
        connected(reader)
        publisher.publish("site/events", b'{"kind":"text","text":"a"}')
        reader.until_lines(1)
        settle(reader)
        state = reader.inbox.state(reader.connector)
        publisher.close()
        broker.stop()
        (broker.folder / "mosquitto.db").unlink()
        broker.start()
        reader.until(lambda: state.counts.get("sessions_lost") == 1 and state.connected is True)
    broker.stop()
    (broker.folder / "mosquitto.db").unlink()
    broker.start()
    with reading(connector(broker), reader.positions) as again:
        connected(again)
        assert counts(again)["sessions_lost"] == 1, "known from the row that the commit kept"


def test_a_half_open_connection_is_given_up(broker: Mosquitto) -> None:
    with reading(connector(broker, keepalive=Duration(2))) as reader:
        connected(reader)
        state = reader.inbox.state(reader.connector)
        broker.pause()
        reader.until(lambda: state.connected is False)
        assert "silent" in state.detail
        broker.resume()
        reader.until(lambda: state.connected is True)


@VERSIONS
def test_a_message_that_is_too_large_stops_nothing(
    broker: Mosquitto, publisher: Publisher, version: str
) -> None:
    """Under MQTT 5 the broker does not send it; under 3.1.1 it is skipped as it comes, and a dead letter."""
    with reading(connector(broker, version=version)) as reader:
        connected(reader)
        publisher.publish("site/events", b"x" * (LIMIT_BYTES + 1_000))
        publisher.publish("site/events", b'{"kind":"text","text":"next"}')
        reader.until(lambda: b'{"kind":"text","text":"next"}' in reader.data)
        refused = [line.refused for line in reader.lines if line.refused]
        assert len(refused) == (version == "3.1.1")
        settle(reader)
    with reading(connector(broker, version=version), reader.positions) as again:
        connected(again)
        assert again.settle(0.4) == []


def test_a_broker_that_sends_no_more_until_it_is_acknowledged_gets_its_commit_at_once(
    tmp_path: Path,
) -> None:
    """mosquitto's defaults: 20 in flight. An urgent chunk asks for the commit; nothing has to time out."""
    broker = Mosquitto(tmp_path / "limited", settings=())
    broker.start()
    publisher = Publisher(broker.port)
    with reading(connector(broker, version="3.1.1")) as reader:
        connected(reader)
        for number in range(200):
            publisher.send("site/events", b'{"kind":"text","text":"%d"}' % number)
        deadline = time.monotonic() + 10
        while len(reader.lines) < 200:
            assert time.monotonic() < deadline, f"{len(reader.lines)} lines, then nothing asked for a commit"
            chunk = reader.take()
            if chunk is not None and chunk.urgent:
                reader.connector.acknowledge([Settled(receipt) for receipt in reader.receipts()])
    publisher.close()
    broker.stop()


def test_another_client_of_our_name_is_said(broker: Mosquitto) -> None:
    with reading(connector(broker)) as one:
        connected(one)
        state = one.inbox.state(one.connector)
        with reading(connector(broker)) as other:
            connected(other)
            one.until(lambda: state.connected is False or state.counts.get("reconnects", 0) > 0)
        one.until(lambda: state.connected is True)


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Callable[[], tuple[Mosquitto, Path]]]:
    """A broker that wants TLS and a password; its authority's certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path / "tls"
    folder.mkdir()

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=30)

    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=plant authority")  # fmt: skip
    openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "broker.key",
            "-out", "broker.csr", "-subj", "/CN=localhost")  # fmt: skip
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    openssl("x509", "-req", "-in", "broker.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", "2", "-out", "broker.pem", "-extfile", "names")  # fmt: skip
    passwords = folder / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(passwords), "gateway", "right"], check=True)
    broker = Mosquitto(
        tmp_path / "secured",
        listener=(f"certfile {folder}/broker.pem", f"keyfile {folder}/broker.key"),
        access=("allow_anonymous false", f"password_file {passwords}"),
    )
    broker.start()
    yield lambda: (broker, folder)
    broker.stop()


def test_tls_and_password_let_us_in_and_nothing_else_does(
    secured: Callable[[], tuple[Mosquitto, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    broker, folder = secured()
    right = {
        "url": f"mqtts://localhost:{broker.port}",
        "ca_file": str(folder / "ca.pem"),
        "username": "gateway",
        "password": Secret("right", "${cred:broker}"),
    }
    with reading(connector(broker, **right)) as reader:
        connected(reader)
    wrong: list[tuple[dict[str, object], str]] = [
        ({"password": Secret("sesame", "${cred:broker}")}, "not authorized"),
        ({"ca_file": ""}, "certificate"),
        ({"ca_file": str(folder / "passwords")}, "ca_file"),
        ({"url": f"mqtts://ip6-localhost.invalid:{broker.port}"}, "name"),
    ]
    for change, said in wrong:
        with reading(connector(broker, **(right | change))) as refused:
            state = refused.inbox.state(refused.connector)
            refused.until(lambda state=state: state.connected is False)  # type: ignore[misc]
            assert said in state.detail.lower()
            assert "sesame" not in state.detail
    assert "sesame" not in caplog.text


def test_bad_messages_are_dead_letters_not_the_end(broker: Mosquitto, publisher: Publisher) -> None:
    topics = {"n": MqttTopic(payload="number"), "site/events": MqttTopic()}
    with reading(connector(broker, topics=topics)) as reader:
        connected(reader)
        for payload in (b"", b"NaN", b"12 bar", b"\xff"):
            publisher.publish("n", payload)
        publisher.publish("site/events", b"{" * 5_000)
        reader.until_lines(5)
        assert [bool(line.refused) for line in reader.lines] == [True] * 4 + [False]
        with pytest.raises(RefusedError):
            decode_event(reader.lines[4].data)


def test_a_host_that_no_name_can_have_is_said(broker: Mosquitto) -> None:
    with reading(connector(broker, url=f"mqtt://{'x' * 70}.local")) as reader:
        state = reader.inbox.state(reader.connector)
        reader.until(lambda: state.connected is False)
        assert "is no host name" in state.detail
