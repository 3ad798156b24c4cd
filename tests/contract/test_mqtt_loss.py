"""`edgewater ingest` killed where it hurts: plain numbers, without id or time, are stored once each."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from tests.mosquitto import Mosquitto
from tests.mqtt_load import Gateway, RawPublisher
from tests.relay import Relay

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("mosquitto") is None, reason="needs mosquitto"),
]
WAIT_S = 60.0
STEP = 40  # messages each 20 ms: 2,000 a second


def until(happens: Callable[[], bool], gateway: Gateway) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happens():
        assert time.monotonic() < deadline, gateway.log()
        time.sleep(0.02)


class Numbers:
    """Publishes 0, 1, 2, ...; the broker has them when `flush` returns."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._publisher = RawPublisher(port)
        self.sent = 0

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._publisher.publish("load/number", [b"%d" % (self.sent + i) for i in range(STEP)])
            self.sent += STEP
            time.sleep(0.02)

    def flush(self) -> None:
        self._publisher.drain()

    def leave(self) -> None:
        self.flush()
        self._publisher.close()

    def come_back(self) -> None:
        self._publisher = RawPublisher(self._port)


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_nothing_is_lost_or_doubled_when_broker_wire_and_process_fail(
    tmp_path: Path, tiny_model: Path, version: Literal["5", "3.1.1"]
) -> None:
    broker = Mosquitto(tmp_path / "broker")
    broker.start()
    relay = Relay(broker.port)
    gateway = Gateway(tmp_path, tiny_model, relay.port, version)
    try:
        until(lambda: "Sending SUBACK to bench" in broker.log(), gateway)
        numbers = Numbers(broker.port)
        numbers.run(1.0)

        numbers.leave()
        broker.stop()
        broker.start()
        numbers.come_back()
        numbers.run(1.0)
        until(lambda: gateway.stored() == numbers.sent, gateway)

        numbers.run(0.3)
        relay.silence()  # from here on no PUBACK leaves; what had come is committed
        before = gateway.stored()
        numbers.run(1.0)
        until(lambda: gateway.stored() > before, gateway)
        time.sleep(0.5)
        gateway.kill()
        redelivered = broker.log().count("Sending PUBLISH to bench (d1")
        relay.cut()
        relay.mend()
        gateway.start()
        numbers.run(1.0)
        numbers.flush()
        until(lambda: gateway.stored() >= numbers.sent, gateway)
        time.sleep(0.5)  # for what is doubled
        found = Counter(gateway.numbers())
        again = broker.log().count("Sending PUBLISH to bench (d1") - redelivered
        numbers.leave()
    finally:
        gateway.stop()
        relay.close()
        broker.stop()
    assert again > 0, "the broker sent nothing again: nothing was tested"
    assert sorted(found) == [*range(numbers.sent)]
    assert found.total() == numbers.sent
