"""Damage in a data folder, one piece at a time: no bit may change what is read without being noticed.

A ring whose contents are computed from a seed (tests/crash/plan.py) is damaged in one place, opened by
Edgewater's own code in a process of its own, and read back. What comes back must be what was sent, or be
said to be lost; then a commit must work, and a reopening find nothing wrong. A process that dies is a
failure: LMDB follows damaged page numbers out of its map.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from storage import registry as registry_module
from storage.check import check_folder
from storage.errors import StorageError
from storage.folder import DataFolder
from storage.opening import open_registry, opened_ring
from storage.pages import PageFile, items, newest_meta, read_metas
from storage.registry import AuditRow, Registry, UpdateRow, UpdateState, VersionRow
from storage.ring import Ring
from storage.samples import Samples
from storage.windows import ClosedWindow, Commit, OpenWindow
from tests.crash.plan import MAP_BYTES, SHARD, TOKENIZER, Moment, Plan

__all__ = ["Counts", "Damage", "Failure", "exhaustive", "seeded", "sweep"]

COMMITS = 60
FORGOTTEN = "crew-b"
PAGE = 4096
WORKER_S = 60.0


@dataclass(frozen=True)
class Damage:
    """One thing done to one file.

    Attributes:
        base: Which data folder: "plain", "forgotten" (a subject was forgotten in it).
        file: "ring" or "registry".
        kind: "flip", "zero", "copy", "cut" or "append".
        at: Offset, bytes.
        size: Of the piece; the bit for a flip; the new length for a cut.
        other: Offset that a copied piece comes from.
    """

    base: str
    file: str
    kind: str
    at: int
    size: int
    other: int = 0

    def apply(self, data: bytearray) -> None:
        """Do it."""
        match self.kind:
            case "flip":
                data[self.at] ^= 1 << self.size
            case "zero":
                data[self.at : self.at + self.size] = bytes(self.size)
            case "copy":
                data[self.at : self.at + self.size] = data[self.other : self.other + self.size]
            case "cut":
                del data[self.size :]
            case "append":
                data += random.Random(self.at).randbytes(self.size)
            case _:
                raise ValueError(self.kind)


class Failure(AssertionError):
    """A damage that was not noticed, or that something could not cope with."""


@dataclass
class Counts:
    """What became of each damage.

    Attributes:
        tried: How many there were.
        outcomes: By file and outcome: "unused" (the truth came back, nothing was noticed), "noticed" (by the
            check only), "blanked", "rebuilt whole", "rebuilt with losses".
        lost_samples: In all.
        failures: What went wrong, with the damage.
    """

    tried: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    lost_samples: int = 0
    failures: list[str] = field(default_factory=list)


# -- the folder that is damaged ---------------------------------------------------------------------


def _small_registries() -> None:
    """Each damage copies one: 32 MiB of empty pages would take longer than all the rest."""
    registry_module.MAP_BYTES = MAP_BYTES


def _build(path: Path, plan: Plan, *, forgotten: bool) -> None:
    data = DataFolder.open(path, create=True)
    try:
        # The plain one is full and has evicted; the other one keeps all, so that much is forgotten.
        size = 2 * MAP_BYTES if forgotten else MAP_BYTES
        folder = data.ring / SHARD
        with Ring.open_or_create(folder, shard=SHARD, tokenizer_id=TOKENIZER, max_bytes=size) as ring:
            for number in range(1, COMMITS + 1):
                ring.commit(plan.commit(number))
                if forgotten and number == COMMITS - 10:
                    ring.forget(FORGOTTEN)
        with Registry.open_or_create(data.registry) as registry:
            for step in _registry_steps(plan.moment(COMMITS).closed):
                with registry.write() as writer:
                    step(writer)
    finally:
        data.close()


def _registry_steps(closed: list[ClosedWindow]) -> list[Callable[[Any], None]]:
    """Transactions as a trainer writes them: windows claimed, decided, versions promoted, one rolled back."""
    steps: list[Callable[[Any], None]] = []

    def update(edges: ClosedWindow, state: UpdateState, version: int = 0) -> UpdateRow:
        result = random.Random(edges.window).randbytes(3_000) if state is not UpdateState.CLAIMED else b""
        return UpdateRow(
            SHARD, edges.window, edges.window, edges.first_seq, edges.last_seq, edges.samples, state,
            version=version, result=result,
        )  # fmt: skip

    states = [UpdateState.CLAIMED, UpdateState.STAGED, UpdateState.EVALUATED, UpdateState.PROMOTED]
    for window in closed[:-1]:
        for state in [*states, UpdateState.ACKNOWLEDGED]:
            version = window.window if state in (UpdateState.PROMOTED, UpdateState.ACKNOWLEDGED) else 0

            row = update(window, state, version)

            def step(writer: Any, row: UpdateRow = row) -> None:
                writer.put_update(row)
                if row.state is UpdateState.PROMOTED:
                    number = row.version
                    folder = f"v{number:06d}-{number:012x}"
                    writer.put_version(
                        VersionRow(number, folder, number - 1, SHARD, row.window, "ab" * 32, "cd" * 32, 1.0)
                    )
                    writer.set_active(number)
                    writer.add_audit(AuditRow(float(number), "trainer", "promote", f"version {number}"))

            steps.append(step)
    steps.append(lambda writer: writer.set_active(3))
    steps.append(lambda writer: writer.add_request())
    steps.append(lambda writer: writer.put_update(update(closed[-1], UpdateState.CLAIMED)))
    return steps


# -- what is damaged --------------------------------------------------------------------------------


def seeded(bases: dict[tuple[str, str], bytes], count: int, seed: int) -> Iterator[Damage]:
    """So many damages: mostly flips in pages that are in use, spread over the kinds of pages."""
    rng = random.Random(seed)
    pages = {key: _pages_by_kind(data) for key, data in bases.items()}
    names = [("plain", "ring")] * 5 + [("forgotten", "ring")] * 3 + [("plain", "registry")] * 2
    for _ in range(count):
        name = rng.choice(names)
        data, kinds = bases[name], pages[name]
        page = rng.choice(kinds[rng.choice(sorted(kinds))])
        draw = rng.random()
        if draw < 0.75:
            # Half of them in the first bytes of a page, where its structure is.
            at = page * PAGE + (rng.randrange(160) if rng.random() < 0.4 else rng.randrange(PAGE))
            yield Damage(*name, "flip", at, rng.randrange(8))
        elif draw < 0.95:
            size = rng.choice((512, PAGE))
            at = page * PAGE + rng.randrange(PAGE // size) * size
            other = rng.choice(kinds[rng.choice(sorted(kinds))]) * PAGE + at % PAGE
            yield Damage(*name, rng.choice(("zero", "copy")), at, size, other)
        elif draw < 0.98:
            yield Damage(*name, "cut", 0, rng.randrange(len(data)))
        else:
            yield Damage(*name, "append", rng.randrange(1 << 30), rng.randrange(1, 3 * PAGE))


def exhaustive(bases: dict[tuple[str, str], bytes]) -> Iterator[Damage]:
    """Every bit of both meta pages, of the state row and of the headers of some pages of each kind."""
    for name, data in bases.items():
        places = [*range(152), *range(PAGE, PAGE + 152)]
        with _opened(data) as file:
            meta = newest_meta(read_metas(file)[0])
            for item in items(file, meta.main.root, last_page=meta.last_page):
                if item.key == b"s" or (item.key == b"H" and name[1] == "ring"):
                    places += range(item.at - 8 - len(item.key), item.at + item.size)
                    places += range(item.page * PAGE, item.page * PAGE + 40)
        for pages in _pages_by_kind(data).values():
            places += (page * PAGE + i for page in pages[-2:] for i in range(20))
        yield from (Damage(*name, "flip", at, bit) for at in sorted(set(places)) for bit in range(8))


class _opened:  # noqa: N801 - used like a function
    """A data file that is only in memory, as a PageFile."""

    def __init__(self, data: bytes) -> None:
        self._file = tempfile.NamedTemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._file.write(data)
        self._file.flush()

    def __enter__(self) -> PageFile:
        self._pages = PageFile(Path(self._file.name))
        return self._pages

    def __exit__(self, *_: object) -> None:
        self._pages.close()
        self._file.close()


def _pages_by_kind(data: bytes) -> dict[str, list[int]]:
    """Pages in use by what they are; a few free ones too."""
    kinds: dict[str, list[int]] = {"meta": [0, 1]}
    with _opened(data) as file:
        meta = newest_meta(read_metas(file)[0])
        used: set[int] = set()
        for item in items(file, meta.main.root, last_page=meta.last_page):
            used.add(item.page)
            kinds.setdefault("leaf", []).append(item.page)
            if item.overflow:
                pages = (item.size + 16 + PAGE - 1) // PAGE
                kinds.setdefault("first", []).append(item.overflow)
                kinds.setdefault("rest", []).extend(range(item.overflow, item.overflow + pages))
                used.update(range(item.overflow, item.overflow + pages))
        kinds["root"] = [meta.main.root, meta.free.root]
        free = [page for page in range(2, meta.last_page + 1) if page not in used]
        if free:
            kinds["free"] = free
    kinds["leaf"] = sorted(set(kinds["leaf"]))
    return kinds


# -- the worker -------------------------------------------------------------------------------------


@functools.cache
def _moments(plan: Plan) -> list[Moment]:
    return [plan.moment(number) for number in range(COMMITS + 1)]


def _truth(plan: Plan, base: str, first: int, last: int) -> Samples:
    samples = plan.samples(first, last)
    if base != "forgotten":
        return samples
    before = _moments(plan)[COMMITS - 10].next_seq
    gone = [i for i, name in enumerate(samples.subjects) if name == FORGOTTEN and first + i < before]
    return samples.without(gone)


class _Alarms(logging.Handler):
    """Everything that was said to be wrong."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.words: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.words.append(record.getMessage())


def _examine_ring(path: Path, plan: Plan, base: str) -> dict[str, Any]:
    """Open, read all, compare with the truth, commit, reopen. Raises: Failure."""
    alarms = _Alarms()
    logging.getLogger("edgewater").addHandler(alarms)
    try:
        data = DataFolder.open(path, create=False)
        try:
            (data.run / f"ring-{SHARD}.open").touch()  # as after a power cut: every block is looked at
            noticed = [p for p in check_folder(data, live=False) if p.kind not in ("stray", "access")]
            with _ring_of(data) as ring:
                said = list(alarms.words)
                lost = _compare(ring, plan, base, said)
                first = ring.state.next_seq
                more = plan.samples(0, 2)
                more.first_seq = first
                ring.dictionaries._next_training = (
                    1 << 60
                )  # training a dictionary takes as long as all the rest
                ring.commit(_next_commit(ring, more))
            with _ring_of(data) as ring:
                if ring.read(first, first + 2) != more:
                    raise Failure("a commit after it reads back otherwise")
            left = [p for p in check_folder(data, live=False) if p.kind not in ("stray", "access")]
            if left:
                raise Failure(f"still wrong after it: {left[0]}")
            if len(alarms.words) > len(said):
                raise Failure(f"more was wrong at the second start: {alarms.words[len(said) :]}")
        finally:
            data.close()
    finally:
        logging.getLogger("edgewater").removeHandler(alarms)
    if said and not noticed:
        raise Failure(f"the check found nothing, opening did: {said}")
    rebuilt = any("is rebuilt" in words for words in said)
    if not said:
        outcome = "noticed" if noticed else "unused"
    elif rebuilt:
        outcome = "rebuilt whole" if "nothing is lost" in said[-1] else "rebuilt with losses"
    else:
        outcome = "blanked"
    return {"outcome": outcome, "lost": lost, "words": said[-1:] or [str(p) for p in noticed[:1]]}


def _ring_of(data: DataFolder) -> Any:
    return opened_ring(data, shard=SHARD, tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES)


def _next_commit(ring: Ring, samples: Samples) -> Commit:
    state = ring.state
    window = OpenWindow(
        state.window.window,
        state.window.first_seq,
        state.window.samples + len(samples),
        state.window.tokens + len(samples.ids),
        state.window.first_arrival,
    )
    counters = {**state.counters, "samples": state.next_seq + len(samples)}
    return Commit(samples, state.stream_time + 1, window, counters)


def _compare(ring: Ring, plan: Plan, base: str, said: list[str]) -> int:
    """Everything that the ring tells is the truth, or said to be lost.

    Returns: Samples lost.
    Raises: Failure.
    """
    state, newest = ring.read_state(), _moments(plan)[COMMITS]
    whole = not said or ("nothing is lost" in said[-1])
    lost = _compare_samples(ring, plan, base, said)
    if whole and lost:
        raise Failure(f"{lost} samples are lost and nothing was said")
    moment = _moments(plan)[min(state.commits, COMMITS)]
    if whole:
        _same("commits", state.commits, COMMITS)
        _same("next seq", state.next_seq, newest.next_seq)
    if state.commits == COMMITS:
        for name in ("digest", "stream_time", "window", "counters", "request"):
            _same(name, getattr(state, name), getattr(moment, name))
    elif not any(
        "are lost" in words or "state row is lost" in words or "may be lost" in words for words in said
    ):
        raise Failure(f"commit {state.commits} is taken for the newest")
    _compare_rows(ring, plan, whole)
    return lost


def _compare_samples(ring: Ring, plan: Plan, base: str, said: list[str]) -> int:
    state = ring.read_state()
    if state.next_seq > _moments(plan)[COMMITS].next_seq:
        raise Failure(f"goes on at {state.next_seq}, more than were ever sent")
    if state.tail_seq == state.next_seq:
        return state.next_seq
    held = ring.read(state.tail_seq, state.next_seq - 1)
    wanted = _truth(plan, base, state.tail_seq, state.next_seq - 1)
    if held == wanted:
        return 0
    lost = 0
    starts, others = held.offsets(), wanted.offsets()
    for i in range(len(held)):
        if held.kinds[i] == "blank" and wanted.kinds[i] != "blank":
            lost += 1
            continue
        mine, theirs = _sample(held, starts, i), _sample(wanted, others, i)
        if mine != theirs:
            raise Failure(f"sample {held.first_seq + i} is {mine!r:.100}, sent {theirs!r:.100}")
        hashes = held.hashes[16 * i : 16 * i + 16], wanted.hashes[16 * i : 16 * i + 16]
        if hashes[0] not in (hashes[1], bytes(16)):
            raise Failure(f"hash of sample {held.first_seq + i} changed")
    if lost and lost > state.lost:
        raise Failure(f"{lost} samples are blank, {state.lost} are counted as lost")
    return lost


def _sample(samples: Samples, starts: list[int], i: int) -> tuple[Any, ...]:
    tokens = slice(starts[i], starts[i + 1])
    return (
        samples.sources[i], samples.kinds[i], samples.subjects[i], samples.ts[i],
        samples.ids[tokens], samples.mask[tokens], samples.texts[i] if samples.texts else "",
    )  # fmt: skip


def _compare_rows(ring: Ring, plan: Plan, whole: bool) -> None:
    moments = _moments(plan)
    newest = moments[-1]
    for what, found in (("positions", ring.named("p")), ("references", ring.named("r"))):
        if whole:
            _same(what, found, getattr(newest, what))
        for name, value in found.items():
            if all(getattr(moment, what).get(name) != value for moment in moments):
                raise Failure(f"{what}: {name} was never at {value!r}")
    windows = ring.windows()
    if whole:
        _same("windows", windows, newest.closed)
    for row in windows:
        # A row that was lost and made anew has the edges it had, or says whole that it has others.
        made_anew = not whole and row.reason == "rebuilt"
        if row not in newest.closed and not made_anew:
            raise Failure(f"window {row} was never closed so")
    for number, letter in ring.dead_letters(100_000):
        if letter != plan.letter(number) and letter.reason != "lost to damage":
            raise Failure(f"dead letter {number} is {letter!r:.100}")
        if whole:
            _same(f"dead letter {number}", letter, plan.letter(number))


def _dump(registry: Registry) -> dict[str, Any]:
    return {
        "updates": registry.updates(),
        "versions": registry.versions(),
        "active": registry.active(),
        "cursor": registry.cursor(SHARD),
        "requests": registry.requests(),
        "audit": [row for row in registry.audit() if row.actor != "storage"],
    }


def _examine_registry(path: Path, truth: dict[str, Any]) -> dict[str, Any]:
    alarms = _Alarms()
    logging.getLogger("edgewater").addHandler(alarms)
    data = DataFolder.open(path, create=False)
    try:
        noticed = [p for p in check_folder(data, live=False) if p.kind not in ("stray", "access")]
        with open_registry(data) as registry:
            said = " ".join(alarms.words)
            found = _dump(registry)
            with registry.write() as writer:
                writer.add_request()
            _same("requests after another", registry.requests(), found["requests"] + 1)
        with open_registry(data) as registry:
            _same("active after reopening", registry.active(), found["active"])
        left = [p for p in check_folder(data, live=False) if p.kind not in ("stray", "access")]
        if left:
            raise Failure(f"still wrong after it: {left[0]}")
    finally:
        data.close()
        logging.getLogger("edgewater").removeHandler(alarms)
    if said and not noticed:
        raise Failure(f"the check found nothing, opening did: {said}")
    if not said or "nothing is lost" in said:
        for name, value in truth.items():
            _same(name, found[name], value)
        return {
            "outcome": "rebuilt whole" if said else "noticed" if noticed else "unused",
            "lost": 0,
            "words": said,
        }
    _registry_is_safe(found, truth, said)
    return {"outcome": "rebuilt with losses", "lost": 0, "words": said}


def _registry_is_safe(found: dict[str, Any], truth: dict[str, Any], said: str) -> None:
    """What is lost is said, and what is kept is true or on the safe side."""
    if found["active"] != truth["active"] and (
        found["active"].version or "which version is active" not in said
    ):
        raise Failure(f"active is {found['active']}, {truth['active']} was set: {said}")
    for row in found["versions"]:
        if row not in truth["versions"]:
            raise Failure(f"version row {row} was never written")
    if found["cursor"] not in (truth["cursor"], truth["cursor"] - 1):
        raise Failure(f"cursor {found['cursor']}, {truth['cursor']} was decided")
    decided = {row.window for row in truth["updates"] if row.decided}
    for row in found["updates"]:
        if row.window in decided and not row.decided and row.window <= found["cursor"]:
            raise Failure(f"window {row.window} would be decided twice")


def _same(name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise Failure(f"{name} is {found!r:.200}, expected {expected!r:.200}")


def _work(home: Path, seed: int) -> None:
    """Read damages from standard input, one JSON line each; answer each with a line."""
    _small_registries()
    plan = Plan(seed, COMMITS)
    with Registry.open_reader(home / "plain" / "registry") as registry:
        truth = _dump(registry)
    for number, line in enumerate(sys.stdin):
        damage = Damage(**json.loads(line))
        path = home / f"work-{os.getpid()}-{number}"
        try:
            shutil.copytree(home / damage.base, path, ignore=shutil.ignore_patterns("lock.mdb"))
            file = path / ("registry" if damage.file == "registry" else f"ring/{SHARD}") / "data.mdb"
            data = bytearray(file.read_bytes())
            damage.apply(data)
            file.write_bytes(data)
            if damage.file == "ring":
                answer = _examine_ring(path, plan, damage.base)
            else:
                answer = _examine_registry(path, truth)
        except Failure as error:
            answer = {"failure": str(error)}
        except StorageError as error:
            answer = {"failure": f"refused: {error}"}
        except Exception as error:
            logging.getLogger().exception("worker")
            answer = {"failure": f"{type(error).__name__}: {error}"}
        finally:
            shutil.rmtree(path, ignore_errors=True)
        print(json.dumps(answer), flush=True)


# -- the sweep --------------------------------------------------------------------------------------


def sweep(
    flips: int,
    seed: int,
    report: Callable[[str], None] = lambda line: None,
    *,
    every_meta_bit: bool = False,
    workers: int = 2,
    home: Path | None = None,
) -> Counts:
    """Try so many damages, drawn from a seed.

    Args:
        flips: How many.
        seed: Of contents and damages.
        report: Told each failure, and the progress every 500.
        every_meta_bit: Also every bit of the meta pages, the state row and page headers (some 10,000).
        workers: Processes at a time.
        home: Where to work; a temporary folder by default, in memory where the system has one.
    Returns: What became of them. It does not raise at a failure.
    """
    counts = Counts()
    memory = Path("/dev/shm")
    place = home or (memory if os.access(memory, os.W_OK) else None)
    with tempfile.TemporaryDirectory(dir=place, prefix="edgewater-flips-") as name:
        work = Path(name)
        plan = Plan(seed, COMMITS)
        usual = registry_module.MAP_BYTES
        _small_registries()
        for base in ("plain", "forgotten"):
            _build(work / base, plan, forgotten=base == "forgotten")
        registry_module.MAP_BYTES = usual
        bases = {
            (base, file): (work / base / folder / "data.mdb").read_bytes()
            for base, file, folder in (
                ("plain", "ring", f"ring/{SHARD}"),
                ("forgotten", "ring", f"ring/{SHARD}"),
                ("plain", "registry", "registry"),
            )
        }
        damages = list(exhaustive(bases)) if every_meta_bit else []
        damages += seeded(bases, flips, seed)
        # Processes work, threads wait for them; the outcome of a damage does not depend on the others.
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        pool = [_Worker(work, seed) for _ in range(workers)]
        for worker in pool:
            idle.put(worker)
        lock = threading.Lock()

        def one(damage: Damage) -> None:
            worker = idle.get()
            try:
                answer = worker.ask(damage)
            finally:
                idle.put(worker)
            with lock:
                _count(counts, damage, answer, report)

        try:
            with ThreadPoolExecutor(workers) as threads:
                for _ in threads.map(one, damages):
                    pass
        finally:
            for worker in pool:
                worker.close()
    return counts


def _count(counts: Counts, damage: Damage, answer: dict[str, Any], report: Callable[[str], None]) -> None:
    counts.tried += 1
    if failure := answer.get("failure"):
        counts.failures.append(f"{damage}: {failure}")
        report(f"FAILED {counts.failures[-1]}")
    else:
        key = f"{damage.file} {answer['outcome']}"
        counts.outcomes[key] = counts.outcomes.get(key, 0) + 1
        counts.lost_samples += answer["lost"]
    if counts.tried % 500 == 0:
        report(f"{counts.tried} damages, {len(counts.failures)} failures, {counts.outcomes}")


class _Worker:
    """A process that opens what is damaged; started again when it dies."""

    def __init__(self, home: Path, seed: int) -> None:
        self._home, self._seed = home, seed
        self._process: subprocess.Popen[str] | None = None

    def ask(self, damage: Damage) -> dict[str, Any]:
        """What became of one damage; a dead worker is a failure."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.crash.flips", str(self._home), str(self._seed)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL if "FLIPS_STDERR" not in os.environ else None,
                text=True,
                cwd=Path(__file__).resolve().parents[2],
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(asdict(damage)) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return dict(json.loads(line))
        code = self._process.wait(WORKER_S)
        self._process = None
        return {"failure": f"the process ended with {code}"}

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            self._process.wait(WORKER_S)
            self._process.stdout.close()


if __name__ == "__main__":
    _work(Path(sys.argv[1]), int(sys.argv[2]))
