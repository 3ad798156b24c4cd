"""Events over HTTP to their durable commit: bulk in JSON lines, and single posts with their latency.

What: `edgewater ingest` with the real model serves a loopback port. Bulk: connections that each post a body,
wait for its 200 and post the next. Single: 1,000 posts a second, sent when they are due whether or not
earlier ones were answered; the latency counts from when each was due. All events are different, so each is
stored. The load comes from a process of its own with requests made beforehand.

How: `python tests/bench/ingest_http.py [--pump FILE] [--seconds N]`; about a minute and a half.

Expected: at least 50,000 events a second in bulk; of the single posts p99 below 50 ms; every answer a 200.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path as well as with -m

from adapters.model_folder import MANIFEST, default_model_dir
from storage.ring import Ring
from tests.bench import _report
from tests.bench._streams import endless, readings

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """\
data_dir = "{folder}/data"
[health]
listen = "127.0.0.1:{health}"
[[sources]]
name = "http"
kind = "http"
http = {{ listen = "127.0.0.1:{port}", sources = ["*"] }}
"""
HEAD = b"POST /v1/events HTTP/1.1\r\nHost: a\r\nContent-Type: application/%s\r\nContent-Length: %d\r\n\r\n"
SHORT = b'{"kind":"reading","ts":%.2f,"values":{"t":%.2f}}'
RATE = 1_000
SINGLES = 32  # connections of the single posts


class Load(msgspec.Struct):
    """What the load generator saw.

    Attributes:
        seconds: From the first request to the last answer.
        statuses: Answers by status.
        late_s: Latency of each single post.
    """

    seconds: float
    statuses: dict[str, int]
    late_s: list[float] = []


class Served:
    """`edgewater ingest` that listens."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.health = folder, _free_port(), _free_port()
        config = folder / "edgewater.toml"
        config.write_text(CONFIG.format(folder=folder, port=self.port, health=self.health))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "ingest", "--config", str(config)],
            cwd=ROOT, stderr=(folder / "log").open("w"),
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise SystemExit(f"ingest does not listen:\n{(folder / 'log').read_text()[-2_000:]}")

    def commits(self) -> int:
        """How many there were."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.health}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        name = "edgewater_commit_seconds_count"
        return int(float(next((line.split()[1] for line in lines if line.startswith(name)), "0")))

    def cpu_s(self) -> float:
        """Processor seconds so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100

    def memory_mib(self) -> float:
        """RssAnon and RssShmem now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return sum(int(x.split()[1]) for x in status if x.startswith(("RssAnon", "RssShmem"))) / 1024


def watched(at: Served, load: Future[Load]) -> tuple[Load, float]:
    """Wait for the load. Returns: it, and the most memory that ingest had meanwhile, MiB."""
    peak = 0.0
    while not load.done():
        peak = max(peak, at.memory_mib())
        time.sleep(0.02)
    return load.result(), peak


@contextmanager
def served() -> Iterator[Served]:
    """An ingest process with an empty data folder."""
    with tempfile.TemporaryDirectory() as name:
        made = Served(Path(name))
        try:
            yield made
        finally:
            made.process.send_signal(signal.SIGTERM)
            made.process.wait(30)


def bulk(port: int, bodies: Sequence[bytes], connections: int) -> Load:
    """Post bodies, each connection one after the other. Runs in a process of its own."""
    left = deque(bodies)
    statuses: Counter[str] = Counter()
    with _Clients(port, connections) as clients:
        started = time.monotonic()
        waiting: dict[socket.socket, bytes] = {}

        def post(client: socket.socket, body: bytes) -> None:
            waiting[client] = body
            client.sendall(HEAD % (b"x-ndjson", len(body)) + body)

        for client in clients.open[: len(left)]:
            post(client, left.popleft())
        while waiting:
            for client, status in clients.answers(1.0):
                statuses[status] += 1
                body = waiting.pop(client)
                if status != "200":
                    left.append(body)
                    time.sleep(0.01)
                if left:
                    post(client, left.popleft())
        return Load(time.monotonic() - started, dict(statuses))


def single(port: int, requests: Sequence[bytes], rate: float, connections: int) -> Load:
    """Send requests when they are due. Runs in a process of its own."""
    statuses: Counter[str] = Counter()
    late_s: list[float] = []
    with _Clients(port, connections) as clients:
        idle = deque(clients.open)
        due_of: dict[socket.socket, float] = {}
        started = time.monotonic() + 0.1
        sent = 0
        while sent < len(requests) or due_of:
            now = time.monotonic()
            due = started + sent / rate
            while sent < len(requests) and due <= now and idle:
                client = idle.popleft()
                due_of[client] = due
                client.sendall(requests[sent])
                sent += 1
                due = started + sent / rate
            wait = max(0.0, due - time.monotonic()) if idle and sent < len(requests) else 1.0
            for client, status in clients.answers(wait):
                statuses[status] += 1
                late_s.append(time.monotonic() - due_of.pop(client))
                idle.append(client)
        return Load(time.monotonic() - started, dict(statuses), late_s)


class _Clients:
    """Keep-alive connections whose answers are read whole."""

    def __init__(self, port: int, count: int) -> None:
        self.open = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
        self._selector = selectors.DefaultSelector()
        for client in self.open:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(client, selectors.EVENT_READ)

    def __enter__(self) -> _Clients:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.open:
            client.close()
        self._selector.close()

    def answers(self, wait_s: float) -> Iterator[tuple[socket.socket, str]]:
        """Connections that have an answer now, with its status."""
        for key, _ in self._selector.select(wait_s):
            client = key.fileobj
            assert isinstance(client, socket.socket)
            data = b""
            while b"\r\n\r\n" not in data or not data.endswith(b"}\n"):  # every answer is one object
                piece = client.recv(65_536)
                if not piece:
                    raise SystemExit(f"the server closed a connection after {data[:200]!r}")
                data += piece
            yield client, data[9:12].decode()


def run_bulk(lines: list[bytes], a_body: int, connections: int) -> dict[str, object]:
    """One bulk run."""
    bodies = [b"\n".join(lines[at : at + a_body]) for at in range(0, len(lines), a_body)]
    with served() as at, _generator() as pool:
        before, cpu = at.commits(), at.cpu_s()
        load, peak = watched(at, pool.submit(bulk, at.port, bodies, connections))
        stored = _stored(at)
        return {
            "events": len(lines),
            "events_s": len(lines) / load.seconds,
            "lost": len(lines) - stored,
            "commits_s": (at.commits() - before) / load.seconds,
            "cores": (at.cpu_s() - cpu) / load.seconds,
            "peak_mib": peak,
            "statuses": load.statuses,
        }


def run_single(lines: list[bytes], rate: float) -> dict[str, object]:
    """One run of single posts."""
    requests = [HEAD % (b"json", len(line)) + line for line in lines]
    with served() as at, _generator() as pool:
        pool.submit(single, at.port, requests[: int(rate)], rate, SINGLES).result()  # warm
        before, cpu = at.commits(), at.cpu_s()
        load, peak = watched(at, pool.submit(single, at.port, requests[int(rate) :], rate, SINGLES))
        ordered = sorted(load.late_s)
        return {
            "posts_s": len(ordered) / load.seconds,
            "lost": len(lines) - _stored(at),
            "p50_ms": 1_000 * statistics.median(ordered),
            "p99_ms": 1_000 * ordered[math.ceil(len(ordered) * 0.99) - 1],
            "max_ms": 1_000 * ordered[-1],
            "commits_s": (at.commits() - before) / load.seconds,
            "cores": (at.cpu_s() - cpu) / load.seconds,
            "peak_mib": peak,
            "statuses": load.statuses,
        }


def main() -> None:
    """Run all and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pump", type=Path, help="file of pump readings, .zst")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each run, about")
    parser.add_argument("--body", type=int, default=1_000, help="events in a body")
    parser.add_argument("--connections", type=int, default=8, help="of the bulk runs")
    parser.add_argument("--only", choices=("bulk", "single"), help="run only these")
    arguments = parser.parse_args()
    if not (default_model_dir() / MANIFEST).exists():
        raise SystemExit("the embedded model is not prepared: run `edgewater model prepare` first")
    what, source = readings(arguments.pump)
    count = int(50_000 * arguments.seconds)
    short = [
        b'{"kind":"reading","ts":%.2f,"values":{"t":%.2f}}' % (1.7e9 + i / 100, i % 9_973 / 100)
        for i in range(count)
    ]
    streams = {what: list(islice(endless(source), count)), "short readings": short}
    results: dict[str, dict[str, object]] = {}
    if arguments.only != "single":
        for name, lines in streams.items():
            results[name] = run_bulk(lines, arguments.body, arguments.connections)
        keys = ["events_s", "commits_s", "cores", "peak_mib", "lost", "statuses"]
        rows = [[name, *_cells(result, keys)] for name, result in results.items()]
        title = f"Bulk: {arguments.body} events a body, {arguments.connections} connections"
        _report.table(title, ["stream", *keys], rows)
    if arguments.only != "bulk":
        singles = short[: int(RATE * (arguments.seconds + 1))]
        result = results["single"] = run_single(singles, RATE)
        keys = [
            "posts_s",
            "p50_ms",
            "p99_ms",
            "max_ms",
            "commits_s",
            "cores",
            "peak_mib",
            "lost",
            "statuses",
        ]
        title = f"Single posts, {RATE} a second, {SINGLES} connections"
        _report.table(title, keys, [_cells(result, keys)])
    _report.finish("ingest_http", results=results)


def _cells(result: dict[str, object], keys: Sequence[str]) -> list[object]:
    values = [result[key] for key in keys]
    return [json.dumps(value) if isinstance(value, dict) else value for value in values]


def _stored(at: Served) -> int:
    with Ring.open_reader(at.folder / "data" / "ring" / "main") as ring:
        return ring.read_state().next_seq


@contextmanager
def _generator() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
