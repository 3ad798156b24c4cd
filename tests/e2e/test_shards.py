"""Several ingest processes from outside: each reads its share, and what moves between them is stored once.

The auditor knows what was written into the sources, and counts it over all rings by each event's own time.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from storage.folder import DataFolder
from storage.registry import Registry
from storage.ring import Ring
from tests.crash.lives import cannot_trace
from tests.e2e.stream import SETTINGS, edgewater, environment

pytestmark = pytest.mark.slow
WAIT_S = 90


class Site:
    """A gateway with some file sources, run by so many ingest processes as a test says."""

    def __init__(self, folder: Path, model: Path, sources: int = 3, dedup: str = "none") -> None:
        self.folder, self.data, self.model = folder, folder / "data", model
        self.config = folder / "edgewater.toml"
        self.config.write_text(
            f'data_dir = "{self.data}"\nmodel.path = "{model}"\n'
            f'ring.flush_ms = 100\nhealth.listen = ""\n'
            + "".join(
                f'[[sources]]\nname = "s{n}"\nkind = "files"\npath = "s{n}.jsonl"\ndedup = "{dedup}"\n'
                for n in range(sources)
            )
        )
        self.names = [f"s{n}" for n in range(sources)]
        self.sent: dict[str, int] = dict.fromkeys(self.names, 0)
        for name in self.names:
            self.file(name).touch()

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def words(self, processes: int, *more: str) -> list[str]:
        settings = [*SETTINGS, f"ingest.processes={processes}", *more]
        return ["--config", str(self.config), *(part for item in settings for part in ("--set", item))]

    def send(self, name: str, count: int) -> None:
        """Write events into a source, each with a time that no other has."""
        self.sent[name] += count
        with self.file(name).open("a") as file:
            for ts in self.times(name)[-count:]:
                file.write(f'{{"kind":"reading","ts":{ts},"values":{{"v":{ts % 1e6}}}}}\n')

    def send_all(self, count: int) -> None:
        for name in self.names:
            self.send(name, count)

    def held(self, shard: str) -> Counter[float]:
        """Events of one ring by their time."""
        with Ring.open_reader(self.data / "ring" / shard) as ring:
            state = ring.read_state()
            if state.next_seq == state.tail_seq:
                return Counter()
            return Counter(ring.read(state.tail_seq, state.next_seq - 1).ts)

    def stored(self) -> Counter[float]:
        """Events of all rings by their time."""
        return sum((self.held(shard) for shard in self.shards()), Counter[float]())

    def shards(self) -> list[str]:
        return DataFolder(self.data).shards()

    def times(self, name: str) -> list[float]:
        """When what a source was sent happened."""
        return [1e9 + 1e6 * self.names.index(name) + number for number in range(self.sent[name])]

    def everything(self) -> Counter[float]:
        return Counter(time for name in self.names for time in self.times(name))

    def once(self, processes: int, *more: str) -> None:
        edgewater("run", "--once", "--no-updates", *self.words(processes, *more))


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path) -> Site:
    return Site(tmp_path, tiny_model)


class Gateway:
    """A running `edgewater run`."""

    def __init__(self, words: list[str]) -> None:
        self.process = subprocess.Popen([sys.executable, "-m", "pipeline", "run", *words], env=environment())

    def pid_of(self, site: Site, shard: str) -> int:
        pids: list[int] = []

        def runs() -> bool:
            pids[:] = [pid for pid in [DataFolder(site.data).holder(f"ingest-{shard}")] if pid]
            return bool(pids)

        until(runs, f"{shard} runs")
        return pids[0]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture
def run() -> Iterator[Callable[[list[str]], Gateway]]:
    """Start gateways that end with the test."""
    gateways: list[Gateway] = []

    def start(words: list[str]) -> Gateway:
        gateways.append(Gateway(words))
        return gateways[-1]

    yield start
    for gateway in gateways:
        if gateway.process.poll() is None:
            gateway.process.terminate()
            try:
                gateway.process.wait(25)
            except subprocess.TimeoutExpired:
                gateway.process.kill()
                gateway.process.wait()


def until(happens: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happens():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        time.sleep(0.1)


def test_rescaling_loses_nothing_and_doubles_nothing(site: Site) -> None:
    """1 -> 2 -> 1 -> 3 -> 1, without any dedup: where each source goes on is all that keeps it straight."""
    for processes in (1, 2, 1, 3, 2, 1):
        site.send_all(40)
        site.once(processes)
        assert site.stored() == site.everything()
    assert site.shards() == ["main", "shard-2", "shard-3"]
    # s2 was read by the third process only while there were three, s1 by the second in all runs but two.
    assert site.held("shard-3") == Counter(site.times("s2")[120:160])
    assert site.held("shard-2") == Counter([*site.times("s1")[40:80], *site.times("s1")[120:200]])
    report = json.loads(edgewater("status", "--json", *site.words(1)).stdout)
    assert report["events"] == report["samples"] == 3 * 240
    stored = {shard["shard"]: shard["samples"] for shard in report["shards"]}
    assert stored == {"main": 3 * 240 - 40 - 120, "shard-2": 120, "shard-3": 40}
    assert [shard["pid"] for shard in report["shards"]] == [None, None, None]
    assert [shard["configured"] for shard in report["shards"]] == [True, False, False]
    text = edgewater("status", *site.words(1)).stdout.decode()
    assert "shard-3: no process reads for it any more; its open window stays open" in text
    assert "main: no process runs; it would read s0, s1, s2" in text


def test_what_a_mover_sends_again_is_recognized(site: Site) -> None:
    """Standard input has no position: ids alone tell a redelivery, also in another shard than before."""
    site.config.write_text(
        f'data_dir = "{site.data}"\nmodel.path = "{site.model}"\nhealth.listen = ""\n'
        '[[sources]]\nname = "s0"\nkind = "files"\npath = "s0.jsonl"\n'
        '[[sources]]\nname = "s1"\nkind = "stdin"\n'
    )
    for processes, numbers in ((1, range(50)), (2, range(20, 90)), (1, range(60, 120)), (2, range(120))):
        lines = "".join(f'{{"kind":"reading","id":"n{n}","ts":{n},"values":{{"v":1}}}}\n' for n in numbers)
        words = ["run", "--once", "--no-updates", *site.words(processes)]
        edgewater(*words, input=lines.encode())
        assert site.stored() == Counter(float(n) for n in range(max(numbers) + 1))
    assert site.held("shard-2") == Counter(float(n) for n in range(50, 90))


def test_a_deadband_goes_on_in_another_shard(site: Site) -> None:
    """What was last reported there is what the next reading is compared with."""
    with site.config.open("a") as file:
        file.write('[[sources]]\nname = "band"\nkind = "files"\npath = "band.jsonl"\ndeadband = 0.5\n')
    kept: list[float] = []
    readings = [  # by how many processes, value, whether it is reported
        (1, 1.0, True), (2, 1.2, False), (2, 2.0, True), (1, 2.2, False), (2, 2.3, False), (1, 3.0, True),
    ]  # fmt: skip
    for ts, (processes, value, reported) in enumerate(readings, 1):
        with site.file("band").open("a") as file:
            file.write(f'{{"kind":"reading","ts":{ts},"values":{{"v":{value}}}}}\n')
        site.once(processes)
        kept += [float(ts)] if reported else []
        assert site.stored() == Counter(kept)
    assert site.held("shard-2") == Counter([3.0])


def test_a_request_that_is_repeated_after_a_rescale_is_stored_once(
    site: Site, run: Callable[[list[str]], Gateway]
) -> None:
    """A client that got no answer posts again, by then to another process: known by its key or by the ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with site.config.open("a") as file:
        file.write(f'[[sources]]\nname = "api"\nkind = "http"\nhttp.listen = "{address}"\n')
    url = f"http://{address}/v1/events"
    ids = range(9)
    bodies = {
        "by-id": b"".join(b'{"kind":"reading","ts":%d,"id":"n%d","values":{"v":1}}\n' % (n, n) for n in ids),
        "by-key": b'{"kind":"reading","ts":99,"values":{"v":1}}',
    }  # fmt: skip

    def post(name: str) -> bool:
        key = "a" if name == "by-key" else str(time.time())
        headers = {"Idempotency-Key": key, "Content-Type": "application/x-ndjson"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, bodies[name], headers), timeout=10
            ) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    for processes in (1, 2, 1):
        gateway = run([*site.words(processes), "--no-updates"])
        for name in bodies:
            until(lambda name=name: post(name), "an answer")  # type: ignore[misc]
        assert gateway.stop() == 0
        assert site.stored() == Counter([*map(float, ids), 99.0])
    report = json.loads(edgewater("status", "--json", *site.words(2)).stdout)
    assert [shard["duplicates"] for shard in report["shards"]] == [10, 10]


def test_a_killed_or_hung_process_costs_the_others_nothing(
    site: Site, run: Callable[[list[str]], Gateway]
) -> None:
    """SIGKILL: started again alone. SIGSTOP: the other goes on, and it catches up when it may."""
    gateway = run([*site.words(2), "--no-updates"])
    site.send_all(50)
    until(lambda: site.stored() == site.everything(), "the first events")
    first, second = gateway.pid_of(site, "main"), gateway.pid_of(site, "shard-2")
    os.kill(first, signal.SIGSTOP)
    site.send_all(50)
    until(lambda: site.held("shard-2") == Counter(site.times("s1")), "the other goes on")
    assert len(site.held("main")) == 100
    os.kill(first, signal.SIGCONT)
    until(lambda: site.stored() == site.everything(), "the stopped one catches up")
    os.kill(second, signal.SIGKILL)
    site.send_all(50)
    until(lambda: site.held("main") == Counter(site.times("s0") + site.times("s2")), "the other goes on")
    until(lambda: site.stored() == site.everything(), "the killed one is started again")
    assert gateway.pid_of(site, "main") == first
    assert gateway.pid_of(site, "shard-2") != second
    assert gateway.stop() == 0
    assert site.stored() == site.everything()


def test_killed_at_any_moment_of_a_rescale_everything_is_stored_once(site: Site) -> None:
    """Processes of changing numbers, all killed while they start, move sources or read."""
    rng = random.Random(4)
    for _ in range(7):
        site.send_all(20)
        processes = rng.choice((1, 2, 3))
        words = ["-m", "pipeline", "ingest", *site.words(processes), "--shard"]
        living = [
            subprocess.Popen([sys.executable, *words, str(number)], env=environment())
            for number in range(1, processes + 1)
        ]
        time.sleep(rng.uniform(0.3, 1.2))
        for process in living:
            process.kill()
            process.wait()
        assert not site.stored() - site.everything()
    site.once(2)
    assert site.stored() == site.everything()
    assert len(site.shards()) > 1


def test_killed_at_each_write_of_a_move_the_source_is_read_once(site: Site) -> None:
    """s1 goes to and fro between two shards; whoever takes it over dies at its n-th write, then all go on."""
    if reason := cannot_trace():
        pytest.skip(reason)
    site.send_all(5)
    site.once(1)
    for n in itertools.count(1):
        site.send_all(5)
        processes = 2 if n % 2 else 1
        inject = f"inject=fdatasync,pwrite64,pwritev:signal=SIGKILL:when={n}"
        words = ["-m", "pipeline", "ingest", "--finite", *site.words(processes), "--shard", str(processes)]
        command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", inject, sys.executable, *words]
        done = subprocess.run(command, env=environment(), timeout=60, check=False, capture_output=True)
        assert not site.stored() - site.everything()
        # The one that died goes on, or the move is taken back.
        site.once(processes if n % 4 < 2 else 3 - processes)
        assert site.stored() == site.everything()
        if done.returncode == 0:
            break
        assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert n > 6, "three calls are the commit of the move, three that of the events"
    assert max(_revision(site, shard) for shard in site.shards()) >= 3


def _revision(site: Site, shard: str) -> int:
    with Ring.open_reader(site.data / "ring" / shard) as ring:
        return int(msgspec.msgpack.decode(ring.named("p").get("@files:s1", b"\0")))


def test_a_process_that_hangs_does_not_keep_another_from_its_start(
    site: Site, run: Callable[[list[str]], Gateway]
) -> None:
    gateway = run([*site.words(2), "--no-updates"])
    site.send_all(10)
    until(lambda: site.stored() == site.everything(), "the first events")
    os.kill(gateway.pid_of(site, "main"), signal.SIGSTOP)
    killed = gateway.pid_of(site, "shard-2")
    os.kill(killed, signal.SIGKILL)
    site.send("s1", 10)
    until(lambda: site.held("shard-2") == Counter(site.times("s1")), "started beside a stopped one")
    os.kill(gateway.pid_of(site, "main"), signal.SIGCONT)
    assert gateway.stop() == 0


def test_a_number_that_is_changed_in_the_file_waits_for_the_next_run(
    site: Site, run: Callable[[list[str]], Gateway]
) -> None:
    """A process that starts again meanwhile goes on with all that it read."""
    words = ["--config", str(site.config), "--set", "ring.max_bytes=16MiB"]
    gateway = run([*words, "--no-updates"])
    site.send_all(10)
    until(lambda: site.stored() == site.everything(), "the first events")
    site.config.write_text("ingest.processes = 2\n" + site.config.read_text())
    os.kill(gateway.pid_of(site, "main"), signal.SIGKILL)
    site.send_all(10)
    until(lambda: site.stored() == site.everything(), "all sources go on")
    assert site.shards() == ["main"]
    assert gateway.stop() == 0
    site.send_all(10)
    edgewater("run", "--once", "--no-updates", *words)
    assert site.shards() == ["main", "shard-2"]
    assert site.stored() == site.everything()


def test_processes_run_alone_each_with_its_number(site: Site) -> None:
    """As systemd or containers run them: nobody supervises, nobody is taken for another."""
    site.send_all(30)
    words = site.words(2)
    ambiguous = edgewater("ingest", "--finite", *words, check=False)
    assert (ambiguous.returncode, b"say which one" in ambiguous.stderr) == (2, True)
    third = edgewater("ingest", "--finite", "--shard", "3", *words, check=False)
    assert (third.returncode, b"there are 2" in third.stderr) == (2, True)
    edgewater("ingest", "--finite", "--shard", "shard-2", *words)
    assert site.stored() == Counter(site.times("s1"))
    edgewater("ingest", "--finite", "--shard", "1", *words)
    assert site.stored() == site.everything()
    idle = edgewater("ingest", "--finite", "--shard", "4", *site.words(4), check=False)
    assert (idle.returncode, b"has no source" in idle.stderr) == (3, True)


def test_a_source_does_not_move_while_it_is_read(site: Site, run: Callable[[list[str]], Gateway]) -> None:
    """A second process of a new configuration beside one of the old: refused, not read twice."""
    gateway = run([*site.words(1), "--no-updates"])
    site.send_all(10)
    until(lambda: site.stored() == site.everything(), "the first events")
    early = edgewater("ingest", "--finite", "--shard", "2", *site.words(2), check=False)
    assert (early.returncode, b"source-s1" in early.stderr) == (3, True)
    assert gateway.stop() == 0
    edgewater("ingest", "--finite", "--shard", "2", *site.words(2))
    assert site.stored() == site.everything()


def test_a_request_closes_the_window_of_every_shard_and_all_are_trained(
    site: Site, run: Callable[[list[str]], Gateway]
) -> None:
    gateway = run(site.words(2))
    site.send_all(50)
    until(lambda: site.stored() == site.everything(), "the events")
    edgewater("update", *site.words(2))

    def decided() -> bool:
        with Registry.open_reader(DataFolder(site.data).registry) as registry:
            return all(registry.cursor(shard) == 1 for shard in ("main", "shard-2"))

    until(decided, "both windows")
    report = json.loads(edgewater("status", "--json", *site.words(2)).stdout)
    assert sorted((w["shard"], w["window"]) for w in report["windows"]) == [("main", 1), ("shard-2", 1)]
    assert report["open_window_samples"] == 0
    assert all(shard["pid"] for shard in report["shards"])
    text = edgewater("status", *site.words(2)).stdout.decode()
    assert "shard-2/1" in text
    assert "reads s0, s2" in text
    assert gateway.stop() == 0
    edgewater("doctor", *site.words(2))


def test_run_once_decides_the_windows_of_every_shard(tmp_path: Path, tiny_model: Path) -> None:
    """Lockstep in each: nothing is merged, and the run ends when all are decided."""
    site = Site(tmp_path, tiny_model, sources=2)
    site.send_all(110)
    edgewater("run", "--once", *site.words(2))
    report = json.loads(edgewater("status", "--json", *site.words(2)).stdout)
    windows = [(window["shard"], window["window"]) for window in report["windows"]]
    assert windows == [("main", 1), ("shard-2", 1)]
    assert all(window["decision"] in ("promoted", "rejected") for window in report["windows"])


def test_a_capture_holds_the_sources_of_all_shards(site: Site) -> None:
    """From where each of them stands, in one file; replayed it is one process's work."""
    site.send_all(20)
    site.once(2)
    site.send_all(20)
    out = site.folder / "captured"
    recorded = edgewater("capture", "--out", str(out), "--max-events", "60", "--json", *site.words(2))
    assert json.loads(recorded.stdout)["lines"] == 60
    (file,) = out.iterdir()
    into = site.folder / "replayed"
    replayed = edgewater("replay", str(file), "--into", str(into), "--no-updates", "--json", *site.words(2))
    report = json.loads(replayed.stdout)
    assert (report["samples"], [shard["shard"] for shard in report["shards"]]) == (60, ["main"])
    site.once(2)
    assert site.stored() == site.everything()
