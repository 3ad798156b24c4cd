"""A mosquitto, and an independent client that publishes."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.source_settings import MqttSource, MqttTopic
from pipeline.sources.inbox import Connector
from pipeline.sources.mqtt import MqttConnector
from tests.mosquitto import Mosquitto, Publisher

__all__ = ["make"]


class _Broker:
    def __init__(self, folder: Path) -> None:
        self._mosquitto = Mosquitto(folder / "broker")
        self._mosquitto.start()
        self._publisher = Publisher(self._mosquitto.port)
        self._subscribed = 0

    def connector(self) -> Connector:
        self._subscribed = self._mosquitto.log().count("Sending SUBACK")
        url = f"mqtt://127.0.0.1:{self._mosquitto.port}"
        settings = MqttSource(url=url, topics={"site/events": MqttTopic()}, client_id="contract")
        return MqttConnector("site", settings)

    def ready(self) -> None:
        deadline = time.monotonic() + 10
        while self._mosquitto.log().count("Sending SUBACK") <= self._subscribed:
            assert time.monotonic() < deadline, self._mosquitto.log()
            time.sleep(0.02)

    def send(self, number: int) -> bytes:
        text = b'"event %d"' % number
        self.send_raw(b'{"kind":"text","text":%s}' % text)
        return text

    def send_raw(self, data: bytes) -> None:
        self._publisher.publish("site/events", data)

    def cut(self) -> None:
        self._mosquitto.stop()

    def mend(self) -> None:
        self._mosquitto.start()
        self._publisher = Publisher(self._mosquitto.port)

    def close(self) -> None:
        self._publisher.close()
        self._mosquitto.stop()


def make(folder: Path) -> _Broker:
    """A broker on a free port."""
    return _Broker(folder)
