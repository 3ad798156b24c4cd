"""MQTT in a plant: certificates for clients, Sparkplug nodes, and brokers that are none or mean harm."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.source_settings import MqttSource, MqttTopic
from pipeline.sources.inbox import Settled
from pipeline.sources.mqtt import MqttConnector
from tests.mosquitto import Mosquitto, Publisher
from tests.sources import Reader, reading
from tests.unit.test_sparkplug import DOUBLE, encode

pytestmark = pytest.mark.skipif(
    shutil.which("mosquitto") is None or shutil.which("openssl") is None, reason="needs mosquitto and openssl"
)
SPARKPLUG = {"spBv1.0/#": MqttTopic(payload="sparkplug")}


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


def connector(port: int, **settings: Any) -> MqttConnector:
    values: dict[str, Any] = {
        "url": f"mqtt://127.0.0.1:{port}",
        "topics": {"site/events": MqttTopic()},
        "client_id": "edgewater-test",
    }
    return MqttConnector("site", MqttSource(**(values | settings)))


def connected(reader: Reader) -> None:
    state = reader.inbox.state(reader.connector)
    reader.until(lambda: state.connected is True)


def test_a_broker_that_wants_a_certificate_gets_ours(tmp_path: Path) -> None:
    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=tmp_path, check=True, capture_output=True, timeout=30)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *new, "-days", "2", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca")
    (tmp_path / "names").write_text("subjectAltName=DNS:localhost\n")
    for who in ("localhost", "gateway"):
        openssl("req", *new, "-keyout", f"{who}.key", "-out", f"{who}.csr", "-subj", f"/CN={who}")
        openssl("x509", "-req", "-in", f"{who}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-days", "2", "-out", f"{who}.pem", "-extfile", "names")  # fmt: skip
    files = {"cafile": "ca.pem", "certfile": "localhost.pem", "keyfile": "localhost.key"}
    listener = tuple(f"{key} {tmp_path}/{file}" for key, file in files.items())
    broker = Mosquitto(tmp_path / "b", listener=(*listener, "require_certificate true"))
    broker.start()
    secure = {"url": f"mqtts://localhost:{broker.port}", "ca_file": str(tmp_path / "ca.pem")}
    ours = {"cert_file": str(tmp_path / "gateway.pem"), "key_file": str(tmp_path / "gateway.key")}
    with reading(connector(broker.port, **secure, **ours)) as reader:
        connected(reader)
        with reading(connector(broker.port, **secure)) as refused:
            state = refused.inbox.state(refused.connector)
            refused.until(lambda: state.connected is False)
    broker.stop()


def test_what_births_said_is_known_after_a_kill_and_nothing_is_published(
    broker: Mosquitto, publisher: Publisher
) -> None:
    birth = encode({"name": "Motor/Speed", "alias": 7, "datatype": DOUBLE, "double_value": 50.0}, seq=0)
    with reading(connector(broker.port, topics=SPARKPLUG)) as reader:
        connected(reader)
        publisher.publish("spBv1.0/Plant/NBIRTH/edge-1", birth)
        reader.until_lines(1)
        reader.connector.acknowledge([Settled(receipt) for receipt in reader.receipts()])
        time.sleep(0.2)
    with reading(connector(broker.port, topics=SPARKPLUG), reader.positions) as again:
        connected(again)
        publisher.publish("spBv1.0/Plant/NDATA/edge-1", encode({"alias": 7, "double_value": 51.5}, seq=1))
        publisher.publish("spBv1.0/Plant/NDATA/edge-1", encode({"alias": 8, "double_value": 1.0}, seq=5))
        again.until_lines(2)
        again.settle(0.2)
    known, unknown = again.lines
    assert known.origin.source == "plant.edge-1"
    assert msgspec.json.decode(known.data)["values"] == {"Motor/Speed": 51.5}
    assert unknown.refused
    assert again.inbox.state(again.connector).counts["gaps"] == 3
    assert "NCMD" not in broker.log(), "nothing leaves the device that the configuration does not allow"


def test_a_rebirth_is_asked_for_where_that_is_allowed(broker: Mosquitto, publisher: Publisher) -> None:
    with reading(connector(broker.port, topics=SPARKPLUG, rebirth=True)) as reader:
        connected(reader)
        for seq in (3, 4, 5):
            payload = encode({"alias": 7, "double_value": 1.0}, seq=seq)
            publisher.publish("spBv1.0/Plant/NDATA/edge-1", payload)
        reader.until_lines(3)
        reader.settle(0.2)
        assert broker.log().count("Received PUBLISH from edgewater-test") == 1, "once a minute"
        assert "'spBv1.0/Plant/NCMD/edge-1'" in broker.log()


@contextmanager
def pretender(answer: bytes) -> Iterator[int]:
    """A server that answers CONNECT with given bytes, and then listens."""
    listener = socket.create_server(("127.0.0.1", 0))
    closing = threading.Event()
    held: list[socket.socket] = []

    def serve() -> None:
        listener.settimeout(0.05)
        while not closing.is_set():
            with suppress(TimeoutError, OSError):
                near, _ = listener.accept()
                held.append(near)
                near.recv(1_000)
                near.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    closing.set()
    thread.join(5)
    for one in [listener, *held]:
        one.close()


CONNACK = b"\x20\x03\x00\x00\x00"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no MQTT broker"),
        (b"\xf0\x00", "no MQTT broker"),
        (b"\x20\x03\x00\x84\x00", 'version = "3.1.1"'),
        (b"\x20\x03\x00\x85\x00", "client id"),
        (CONNACK + b"\xf0\x00", "type 15"),
        (CONNACK + b"\x34\x06\x00\x01t\x00\x01x", "QoS 2"),
        (CONNACK + b"\x30\xff\xff\xff\xff\xff", "four bytes"),
        (CONNACK + b"\xe0\x02\x8e\x00", "client_id must be unique"),
        (CONNACK + CONNACK, "second CONNACK"),
        (b"\x20\xff\xff\xff\x7f", "no message"),
    ],
)
def test_what_is_no_broker_is_left_and_tried_again_later(answer: bytes, said: str) -> None:
    with pretender(answer) as port, reading(connector(port)) as reader:
        state = reader.inbox.state(reader.connector)
        reader.until(lambda: state.connected is False and said in state.detail)
        assert state.detail
        assert reader.inbox.fault is None


def test_it_stops_at_once_while_a_server_does_not_answer() -> None:
    with pretender(b"") as port:
        reader = Reader(connector(port))
        time.sleep(0.3)
        began = time.monotonic()
        reader.stop()
        assert time.monotonic() - began < 1
