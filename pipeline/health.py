"""Health and metrics of the ingest process on loopback: /livez, /readyz, /metrics, /version."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from pipeline.commit import Committed
from pipeline.readers import ReaderReport
from pipeline.shards import MAIN
from pipeline.source_metrics import States, source_metrics
from storage.registry import Registry
from storage.ring import Ring

__all__ = ["HealthServer", "IngestMetrics", "our_version"]

STALLED_S = 30.0  # the flow ticks once a second: silent for so long, it hangs
_COMMIT_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
log = logging.getLogger("edgewater.health")


def our_version() -> str:
    """The installed version, "unknown" where a checkout runs without being installed."""
    try:
        return version("edgewater")
    except PackageNotFoundError:
        return "unknown"


OUTCOMES = ("samples", "duplicates", "near_duplicates", "suppressed", "dead_letters", "dropped")


class IngestMetrics:
    """What the dataflow tells of itself, and what the registry knows, as Prometheus metrics.

    Args:
        shard: Whose they are: each ingest process answers on a port of its own, so they carry no such label.
    """

    def __init__(self, shard: str = MAIN) -> None:
        self.registry = CollectorRegistry()
        self._shard = shard
        self._commits = Histogram(
            "edgewater_commit_seconds",
            "Time of a commit, seconds",
            buckets=_COMMIT_BUCKETS,
            registry=self.registry,
        )
        self._ring: Ring | None = None
        self._learning: Registry | None = None
        self._last: Committed | None = None
        self._readers = ReaderReport()
        self._sources: States = dict
        self.beat = time.monotonic()
        self.registry.register(self)

    def observe(self, committed: Committed) -> None:
        """Take note of a Batch or tick that went through."""
        self._last = committed
        self.beat = time.monotonic()
        if committed.seconds:
            self._commits.observe(committed.seconds)

    def observe_readers(self, report: ReaderReport) -> None:
        """Take note of the ring's readers; the flow moves, also where it waits for room in a full ring."""
        self._readers = report
        self.beat = time.monotonic()

    def attach(self, ring: Ring | None, learning: Registry | None) -> None:
        """Read these from now on (LMDB allows one handle a process: they are the ingest's own)."""
        self._ring, self._learning = ring, learning

    def watch(self, states: States) -> None:
        """Tell of these sources from now on."""
        self._sources = states

    @property
    def ready(self) -> bool:
        """Whether the dataflow runs."""
        return self._last is not None

    @property
    def alive(self) -> bool:
        """Whether the dataflow moved lately."""
        return time.monotonic() - self.beat < STALLED_S

    def collect(self) -> Iterable[Metric]:
        """Metrics that are read when they are asked for."""
        who = GaugeMetricFamily(
            "edgewater_ingest_info", "The shard whose figures these are", labels=["shard"]
        )
        who.add_metric([self._shard], 1)
        yield who
        if self._last is not None:
            yield from self._stream_metrics(self._last)
        if self._ring is not None:
            usage = self._ring.usage()
            ring = GaugeMetricFamily("edgewater_ring_bytes", "Bytes of the ring by kind", labels=["kind"])
            ring.add_metric(["live"], usage.live_bytes)
            ring.add_metric(["map"], usage.map_bytes)
            yield ring
            yield from _reader_metrics(self._readers)
        if self._learning is not None:
            yield from _learning_metrics(self._learning)
        yield from source_metrics(self._sources)

    def _stream_metrics(self, last: Committed) -> Iterable[Metric]:
        events = CounterMetricFamily("edgewater_events", "Inputs by outcome", labels=["outcome"])
        for outcome in OUTCOMES:
            events.add_metric([outcome], last.state.counters.get(outcome, 0))
        yield events
        help_text = "Samples whose content is gone, by why"
        gone = CounterMetricFamily("edgewater_blank_samples", help_text, labels=["reason"])
        gone.add_metric(["damage"], last.state.lost)
        gone.add_metric(["forgotten"], last.state.forgotten)
        yield gone
        window = last.state.window
        yield GaugeMetricFamily("edgewater_open_window_samples", "Samples in the open window", window.samples)
        help_text = "Stream time less the clock, seconds: not 0 after the clock was moved"
        yield GaugeMetricFamily("edgewater_clock_offset_seconds", help_text, last.state.clock.offset)


def _reader_metrics(report: ReaderReport) -> Iterable[Metric]:
    help_text = "Commits that the ring's slowest reader does not see, while it holds their pages"
    yield GaugeMetricFamily("edgewater_ring_reader_lag", help_text, report.lag)
    help_text = "Readers that held the ring back, by what was done"
    readers = CounterMetricFamily("edgewater_ring_readers", help_text, labels=["action"])
    for action in ("warned", "ended", "cleared"):
        readers.add_metric([action], getattr(report, action))
    yield readers


def _learning_metrics(registry: Registry) -> Iterable[Metric]:
    rows = registry.updates()
    states = GaugeMetricFamily("edgewater_windows", "Windows by state", labels=["state"])
    for state in sorted({row.state for row in rows}):
        states.add_metric([state], sum(row.state == state for row in rows))
    yield states
    active = registry.active().version
    yield GaugeMetricFamily("edgewater_active_version", "Active version, 0 is the base", active)
    scored = [row for row in rows if row.result]
    if scored:
        # Rows lie by shard, then window: the newest is the one that was claimed last.
        result = json.loads(max(reversed(scored), key=lambda row: row.claimed_at).result)
        help_text = "Prequential score of the newest update's window"
        bits = GaugeMetricFamily("edgewater_bits_per_byte", help_text, labels=["under"])
        for under in ("base", "active"):
            value = result.get(f"{under}_bits_per_byte")
            if value is not None:
                bits.add_metric([under], value)
        yield bits


class _IPv6Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6


class HealthServer:
    """Answers GET on a loopback address; read-only.

    Args:
        listen: "host:port".
        metrics: What to tell.
    """

    def __init__(self, listen: str, metrics: IngestMetrics) -> None:
        host, _, port = listen.rpartition(":")
        address = (host.strip("[]"), int(port))
        self._server = (_IPv6Server if ":" in address[0] else ThreadingHTTPServer)(address, _handler(metrics))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()

    @property
    def port(self) -> int:
        """The port that it got (of interest where 0 was asked for)."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()


def _handler(metrics: IngestMetrics) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 5  # a client that says nothing holds a thread no longer
        server_version = "edgewater"
        sys_version = ""

        def do_GET(self) -> None:
            match self.path.partition("?")[0]:
                case "/livez":
                    self._answer(200 if metrics.alive else 503, "ok\n" if metrics.alive else "stalled\n")
                case "/readyz":
                    self._answer(200 if metrics.ready else 503, "ok\n" if metrics.ready else "starting\n")
                case "/version":
                    self._answer(200, our_version() + "\n")
                case "/metrics":
                    self._answer(200, generate_latest(metrics.registry).decode(), "text/plain; version=0.0.4")
                case _:
                    self._answer(404, "try /livez, /readyz, /metrics or /version\n")

        def _answer(self, code: int, text: str, kind: str = "text/plain") -> None:
            body = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            log.debug(format, *args)

    return Handler
