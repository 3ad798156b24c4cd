"""Health and metrics: what monitoring asks on loopback, and nothing else."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from http.server import ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseServer

import msgspec
import pytest

from pipeline import health
from pipeline.commit import Committed
from pipeline.events import Outcome
from pipeline.health import HealthServer, IngestMetrics
from pipeline.readers import ReaderReport
from storage.registry import Registry, UpdateRow, UpdateState
from storage.ring import Ring
from storage.windows import ClockState, OpenWindow, RingState


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server hears of its end within its poll, half a second."""
    monkeypatch.setattr(
        ThreadingHTTPServer, "serve_forever", lambda self: BaseServer.serve_forever(self, 0.01)
    )


@pytest.fixture
def metrics() -> IngestMetrics:
    return IngestMetrics()


@pytest.fixture
def server(metrics: IngestMetrics):
    made = HealthServer("127.0.0.1:0", metrics)
    yield made
    made.close()


def ask(server: HealthServer, path: str, host: str = "127.0.0.1", **more: object) -> tuple[int, str]:
    request = urllib.request.Request(f"http://{host}:{server.port}{path}", **more)  # type: ignore[arg-type]
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def committed(seconds: float = 0.003, **counters: int) -> Committed:
    state = RingState(counters=counters, window=OpenWindow(1, 0, 17))
    return Committed(state, Outcome(), [], seconds)


def test_ready_is_told_when_the_first_batch_went_through(
    server: HealthServer, metrics: IngestMetrics
) -> None:
    assert ask(server, "/readyz") == (503, "starting\n")
    metrics.observe(committed())
    assert ask(server, "/readyz?verbose") == (200, "ok\n")


def test_a_flow_that_moves_no_more_is_told_as_stalled(
    server: HealthServer, metrics: IngestMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(server, "/livez") == (200, "ok\n")
    metrics.beat = time.monotonic() - health.STALLED_S - 1
    assert ask(server, "/livez") == (503, "stalled\n")
    metrics.observe(committed(0.0))
    assert ask(server, "/livez") == (200, "ok\n")


def test_a_flow_that_waits_for_room_in_a_full_ring_is_alive(
    server: HealthServer, metrics: IngestMetrics
) -> None:
    """A restart would find the same ring."""
    metrics.beat = time.monotonic() - health.STALLED_S - 1
    metrics.observe_readers(ReaderReport())
    assert ask(server, "/livez") == (200, "ok\n")


def test_a_moved_clock_is_told(server: HealthServer, metrics: IngestMetrics) -> None:
    state = RingState(clock=ClockState(offset=-3_600.0))
    metrics.observe(Committed(state, Outcome(), [], 0.0))
    assert "edgewater_clock_offset_seconds -3600.0" in ask(server, "/metrics")[1].splitlines()


def test_version_and_unknown_paths(server: HealthServer) -> None:
    assert ask(server, "/version") == (200, health.our_version() + "\n")
    code, words = ask(server, "/secrets")
    assert code == 404
    assert "/metrics" in words


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_changed_here(server: HealthServer, method: str) -> None:
    assert ask(server, "/metrics", method=method, data=b"x")[0] == 501


def test_metrics_count_inputs_by_outcome(server: HealthServer, metrics: IngestMetrics) -> None:
    """Ticks count as signs of life, not as commits."""
    metrics.observe(committed(samples=5, duplicates=2, suppressed=1, dead_letters=3))
    metrics.observe(committed(0.0, samples=5, duplicates=2, suppressed=1, dead_letters=3))
    lines = ask(server, "/metrics")[1].splitlines()
    for name, count in {"samples": 5, "duplicates": 2, "suppressed": 1, "dead_letters": 3}.items():
        assert f'edgewater_events_total{{outcome="{name}"}} {float(count)}' in lines
    assert "edgewater_open_window_samples 17.0" in lines
    assert "edgewater_commit_seconds_count 1.0" in lines
    assert 'edgewater_commit_seconds_bucket{le="0.005"} 1.0' in lines
    assert all(line.startswith(("#", "edgewater_")) for line in lines)


def test_metrics_tell_of_ring_and_learning_while_they_are_open(
    server: HealthServer, metrics: IngestMetrics, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    result = json.dumps({"base_bits_per_byte": 2.0, "active_bits_per_byte": 1.5}).encode()
    rows = [
        UpdateRow("main", 1, 1, 0, 9, 10, UpdateState.EXPIRED),
        UpdateRow("main", 2, 2, 10, 19, 10, UpdateState.CLAIMED, result=result),
    ]
    opened = Ring.open_or_create(tmp_path / "ring", shard="main", tokenizer_id="00" * 8, max_bytes=1 << 20)
    with opened as ring, Registry.open_or_create(tmp_path / "registry") as registry:
        with registry.write() as writer:
            for row in rows:
                writer.put_update(row)
            writer.set_active(4)
        metrics.attach(ring, registry)
        metrics.observe_readers(ReaderReport(lag=7, ended=2))
        lines = ask(server, "/metrics")[1].splitlines()
        assert 'edgewater_ring_bytes{kind="map"} 1.048576e+06' in lines
        assert {"edgewater_ring_reader_lag 7.0", 'edgewater_ring_readers_total{action="ended"} 2.0'} <= {
            *lines
        }
        assert {'edgewater_windows{state="expired"} 1.0', 'edgewater_windows{state="claimed"} 1.0'} <= {
            *lines
        }
        assert 'edgewater_ingest_info{shard="main"} 1.0' in lines
        assert {"edgewater_active_version 4.0", 'edgewater_bits_per_byte{under="active"} 1.5'} <= {*lines}
        metrics.attach(None, None)
    assert "edgewater_ring_bytes" not in ask(server, "/metrics")[1]


def test_the_newest_score_is_that_of_the_window_that_was_claimed_last(
    server: HealthServer, metrics: IngestMetrics, tmp_path: Path
) -> None:
    """Not that of the last shard by name."""
    (tmp_path / "run").mkdir()
    with Registry.open_or_create(tmp_path / "registry") as registry:
        with registry.write() as writer:
            for shard, at in (("main", 9.0), ("shard-2", 5.0)):
                result = json.dumps({"base_bits_per_byte": at}).encode()
                state = UpdateState.CLAIMED
                row = UpdateRow(shard, 1, 1, 0, 9, 10, state, result=result, claimed_at=at)
                writer.put_update(row)
        metrics.attach(None, registry)
        text = ask(server, "/metrics")[1]
        metrics.attach(None, None)
    assert 'edgewater_bits_per_byte{under="base"} 9.0' in text


def test_a_score_that_is_missing_is_left_out(
    server: HealthServer, metrics: IngestMetrics, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    row = UpdateRow("main", 1, 1, 0, 9, 10, UpdateState.CLAIMED, result=b'{"base_bits_per_byte": null}')
    with Registry.open_or_create(tmp_path / "registry") as registry:
        with registry.write() as writer:
            writer.put_update(row)
            writer.put_update(msgspec.structs.replace(row, reason="again"))
        metrics.attach(None, registry)
        code, text = ask(server, "/metrics")
        metrics.attach(None, None)
    assert code == 200
    assert "edgewater_bits_per_byte{" not in text


def test_a_client_that_says_nothing_stops_nobody(server: HealthServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)):
        assert ask(server, "/livez")[0] == 200


def test_a_port_that_is_taken_is_an_error(server: HealthServer, metrics: IngestMetrics) -> None:
    with pytest.raises(OSError, match="in use"):
        HealthServer(f"127.0.0.1:{server.port}", metrics)


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_ipv6_loopback_is_loopback_too(metrics: IngestMetrics) -> None:
    if not _has_ipv6():  # nothing to bind: then it must be said
        with pytest.raises(OSError, match=r"\[Errno"):
            HealthServer("[::1]:0", metrics)
        return
    server = HealthServer("[::1]:0", metrics)
    try:
        assert ask(server, "/livez", host="[::1]") == (200, "ok\n")
    finally:
        server.close()
