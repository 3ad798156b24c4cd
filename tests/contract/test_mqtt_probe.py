"""What `doctor` finds out about a broker, against mosquitto with its own limits and without."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

from pipeline.source_settings import MqttSource, MqttTopic
from pipeline.sources.mqtt_probe import MESSAGES, Credit, measure_credit
from tests.mosquitto import Mosquitto, free_port

pytestmark = pytest.mark.skipif(shutil.which("mosquitto") is None, reason="needs mosquitto")
ANYBODY = ("allow_anonymous true",)


@contextmanager
def broker(
    folder: Path, settings: tuple[str, ...] = (), access: tuple[str, ...] = ANYBODY
) -> Iterator[Mosquitto]:
    made = Mosquitto(folder / "broker", settings, access=access)
    made.start()
    try:
        yield made
    finally:
        made.stop()


def measure(port: int, version: Literal["5", "3.1.1"] = "5", probe: str = "edgewater/probe") -> Credit:
    url, topics = f"mqtt://127.0.0.1:{port}", {"site/events": MqttTopic()}
    return measure_credit("site", MqttSource(url=url, topics=topics, version=version, probe_topic=probe))


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_a_broker_without_limits_is_good(tmp_path: Path, version: Literal["5", "3.1.1"]) -> None:
    with broker(tmp_path, Mosquitto.UNLIMITED) as at:
        credit = measure(at.port, version)
    assert credit == Credit(in_flight=MESSAGES, delivered=MESSAGES)
    assert credit.good


def test_mosquitto_s_own_limits_are_found_and_the_cure_is_named(tmp_path: Path) -> None:
    with broker(tmp_path) as at:
        credit = measure(at.port, "3.1.1")
    assert credit == Credit(in_flight=20, delivered=1_020)
    assert not credit.good
    assert "max_inflight_messages 0" in credit.words
    assert "max_queued_messages 0" in credit.words


def test_without_a_probe_topic_nothing_is_published(tmp_path: Path) -> None:
    with broker(tmp_path) as at:
        credit = measure(at.port, probe="")
        log = at.log()
    assert credit == Credit()
    assert credit.good
    assert "probe_topic" in credit.words
    assert "Sending CONNACK to edgewater-doctor-" in log
    assert "Received PUBLISH" not in log
    assert "Received SUBSCRIBE" not in log


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_the_probe_leaves_nothing_at_the_broker(tmp_path: Path, version: Literal["5", "3.1.1"]) -> None:
    with broker(tmp_path) as at:
        measure(at.port, version)
    assert b"edgewater" not in (at.folder / "mosquitto.db").read_bytes(), "no session, no message"


def test_a_broker_that_is_not_there_is_said(tmp_path: Path) -> None:
    credit = measure(free_port())
    assert not credit.good
    assert "refused" in credit.words


def test_a_broker_that_lets_nothing_through_is_said(tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    rules.write_text("topic read site/#\n")
    with broker(tmp_path, access=(*ANYBODY, f"acl_file {rules}")) as at:
        credit = measure(at.port)
    assert not credit.good
    assert "probe_topic" in credit.words
