"""MQTT at QoS 1 through mosquitto to the durable commit: how fast, and what is lost when things break.

What: `edgewater ingest` with the real model subscribes to a mosquitto on this machine (Debian's, with
`max_inflight_messages 0`, `max_queued_messages 0` and persistence). Speed: messages that were encoded
beforehand, sent by a process of its own as fast as mosquitto takes them; from the first byte sent until the
last is committed. Loss: plain numbers, which have neither id nor time, 2,000 a second, across a restart of
the broker (SIGTERM), a wire that goes dead, and a kill -9 of ingest; then each number is looked for in the
ring. The publisher waits for its own acknowledgements before the broker stops: what it would send twice is
not what is measured here.

How: `python tests/bench/ingest_mqtt.py [--pump FILE] [--seconds N] [--partition N]`; about three minutes.

Expected: at least 12,000 messages a second; 0 lost, 0 doubled, connected again within 30 s of the mending.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path as well as with -m

from adapters.model_folder import MANIFEST, default_model_dir
from tests.bench import _report
from tests.bench._streams import endless, readings
from tests.mosquitto import Mosquitto
from tests.mqtt_load import Gateway, RawPublisher, cpu_s, encode_all
from tests.relay import Relay

RATE = 2_000
STEP_S = 0.02
MENDED_S = 90.0


class Plant(NamedTuple):
    """What runs."""

    broker: Mosquitto
    relay: Relay | None
    gateway: Gateway

    def subscriptions(self) -> int:
        """How often the gateway subscribed."""
        return self.broker.log().count(" 1 load/number")


@contextlib.contextmanager
def plant(folder: Path, *, far: bool = False, version: str = "5", limits: bool = False) -> Iterator[Plant]:
    """A broker and a gateway that has subscribed.

    Args:
        folder: For all files.
        far: Whether a relay stands between the two.
        version: Of MQTT.
        limits: Whether the broker keeps mosquitto's own limits.
    """
    broker = Mosquitto(folder / "broker", () if limits else Mosquitto.UNLIMITED, logged="subscribe")
    broker.start()
    relay = Relay(broker.port) if far else None
    gateway = Gateway(folder, default_model_dir(), relay.port if relay else broker.port, version)
    made = Plant(broker, relay, gateway)
    try:
        until(lambda: made.subscriptions() > 0, gateway)
        yield made
    finally:
        gateway.stop()
        if relay:
            relay.close()
        broker.stop()


def until(happens: Callable[[], bool], gateway: Gateway, seconds: float = MENDED_S) -> float:
    """Wait for something. Returns: how long, seconds."""
    began = time.monotonic()
    while not happens():
        if time.monotonic() - began > seconds:
            raise SystemExit(f"nothing happened for {seconds:.0f} s:\n{gateway.log()}")
        time.sleep(0.02)
    return time.monotonic() - began


def flood(port: int, pieces: list[bytes], count: int) -> float:
    """Send everything. Runs in a process of its own. Returns: how long until the broker had it, seconds."""
    publisher = RawPublisher(port)
    began = time.monotonic()
    for number, piece in enumerate(pieces):
        publisher.send(piece, min(256, count - 256 * number))
    publisher.drain()
    publisher.close()
    return time.monotonic() - began


def run_speed(what: str, topic: str, payloads: list[bytes], **how: object) -> dict[str, object]:
    """One run at full speed."""
    pieces = encode_all(topic, payloads)
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as name,
        plant(Path(name), **how) as at,  # type: ignore[arg-type]
        ProcessPoolExecutor(1, mp_context=context) as pool,
    ):
        pool.submit(time.sleep, 0).result()
        before, broker_before = at.gateway.cpu_s(), cpu_s(at.broker.pid)
        began, peak = time.monotonic(), 0.0
        sending = pool.submit(flood, at.broker.port, pieces, len(payloads))
        while (stored := at.gateway.stored()) < len(payloads):
            if time.monotonic() - began > MENDED_S:
                break
            peak = max(peak, at.gateway.memory_mib())
            time.sleep(0.02)
        seconds = time.monotonic() - began
        return {
            "stream": what,
            "messages": len(payloads),
            "messages_s": stored / seconds,
            "published_s": len(payloads) / sending.result(),
            "lost": len(payloads) - stored,
            "cores": (at.gateway.cpu_s() - before) / seconds,
            "broker_cores": (cpu_s(at.broker.pid) - broker_before) / seconds,
            "peak_mib": peak,
        }


class Stream:
    """Numbers, one after the other, at a steady rate."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._publisher = RawPublisher(port)
        self.sent = 0

    def run(self, seconds: float, meanwhile: Callable[[], bool] = lambda: False) -> None:
        """Publish for so long, or until something holds."""
        began, first = time.monotonic(), self.sent
        while (now := time.monotonic()) - began < seconds and not meanwhile():
            due = first + int((now - began) * RATE)
            if due > self.sent:
                self._publisher.publish("load/number", [b"%d" % n for n in range(self.sent, due)])
                self.sent = due
            time.sleep(STEP_S)

    def pause(self) -> None:
        """The broker has everything, and nobody is connected to it."""
        self._publisher.drain()
        self._publisher.close()

    def resume(self) -> None:
        """Connect again."""
        self._publisher = RawPublisher(self._port)


def run_loss(version: str, steady_s: float, partition_s: float) -> dict[str, object]:
    """One run through all three faults."""
    with tempfile.TemporaryDirectory() as name, plant(Path(name), far=True, version=version) as at:
        assert at.relay is not None
        stream = Stream(at.broker.port)
        stream.run(steady_s)

        stream.pause()
        seen = at.subscriptions()
        at.broker.stop()
        at.broker.start()
        stream.resume()
        healed = _healed(at, stream, seen)
        stream.run(steady_s)

        at.relay.silence()
        stream.run(partition_s)
        seen = at.subscriptions()
        at.relay.mend()
        mended = _healed(at, stream, seen)
        stream.run(steady_s)

        at.gateway.kill()
        at.gateway.start()
        stream.run(steady_s)
        stream.pause()
        caught_up = until(lambda: at.gateway.stored() >= stream.sent, at.gateway)
        time.sleep(2)  # for what is doubled
        found = Counter(at.gateway.numbers())
        return {
            "version": version,
            "messages": stream.sent,
            "lost": stream.sent - len(found),
            "doubled": found.total() - len(found),
            "strange": sum(not 0 <= number < stream.sent for number in found),
            "after_restart_s": healed,
            "after_partition_s": mended,
            "caught_up_s": caught_up,
        }


def _healed(at: Plant, stream: Stream, seen: int) -> float:
    """Publish until the gateway subscribed again. Returns: how long that took, seconds."""
    began = time.monotonic()
    stream.run(MENDED_S, lambda: at.subscriptions() > seen)
    return time.monotonic() - began


def main() -> None:
    """Run all and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pump", type=Path, help="file of pump readings, .zst")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each part, about")
    parser.add_argument("--partition", type=float, default=60.0, help="seconds that the wire is dead")
    parser.add_argument("--only", choices=("speed", "loss"), help="run only these")
    arguments = parser.parse_args()
    if not (default_model_dir() / MANIFEST).exists():
        raise SystemExit("the embedded model is not prepared: run `edgewater model prepare` first")
    speed: list[dict[str, object]] = []
    loss: list[dict[str, object]] = []
    if arguments.only != "loss":
        what, source = readings(arguments.pump)
        count = int(20_000 * arguments.seconds)
        events = list(islice(endless(source), count))
        numbers = [b"%d.%d" % (i, i % 7) for i in range(count)]
        speed = [
            run_speed(what, "load/event", events),
            run_speed("plain numbers", "load/number", numbers),
            run_speed(f"{what}, MQTT 3.1.1", "load/event", events, version="3.1.1"),
        ]
        keys = list(speed[0])
        _report.table("Speed, published as fast as mosquitto takes it", keys, [[*r.values()] for r in speed])
    if arguments.only != "speed":
        loss = [run_loss(version, arguments.seconds, arguments.partition) for version in ("5", "3.1.1")]
        title = (
            f"Loss: {RATE:,} a second, broker restarted, wire dead for {arguments.partition:.0f} s, kill -9"
        )
        _report.table(title, list(loss[0]), [[*r.values()] for r in loss])
    _report.finish("ingest_mqtt", speed=speed, loss=loss)


if __name__ == "__main__":
    main()
