"""One data folder through many lifetimes of ingest, each killed or hurt, and the audit after each.

What must hold is computed from the traffic alone: which lines become samples, in which order, under which
hashes. Only token ids, window edges and the digest come from an undisturbed run of the same traffic, whose
texts are checked against the traffic first.
"""

from __future__ import annotations

import hashlib
import random
import struct
from array import array
from collections import Counter
from contextlib import ExitStack
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

import msgspec

from adapters.model_folder import token_bytes
from pipeline.sources.files import FilePosition
from storage.ring import Ring
from storage.samples import Samples
from storage.windows import ClosedWindow, RingState
from tests.crash.audit import Violation, check_contents, check_eviction
from tests.crash.life_ingest import SOURCE, IngestLife, Sent, Traffic, hash_of, write_config
from tests.crash.lives import Call, Life, Lives, Point

__all__ = ["PROGRAM", "Chain", "Shape", "Steps", "shape_of"]

PROGRAM = "tests.crash.life_ingest"
SHARD = "main"
LEAST_CALLS = 4  # of a commit: one or two writes of pages, a flush, the meta page, the acknowledgement
_HEAD = struct.Struct("<dI")


class Shape(msgspec.Struct, frozen=True):
    """How a chain's traffic looks.

    Attributes:
        seed: Of the traffic.
        lines: So many of them.
        bulk: Characters in a text that do not compress.
        ring_bytes: Size of the ring.
        chunk, window: Lines a chunk, and chunks that may wait for their acknowledgement.
        files: They lie in files, whose positions are committed; else a sender sends again what was not
            acknowledged.
        witness: The auditor keeps the ring open for reading all the time, as a trainer does: then the lock
            file outlives its writers, and a killed one leaves its lock and its reader slot in it.
    """

    seed: int
    lines: int = 1_200
    bulk: int = 0
    ring_bytes: int = 2 << 20
    chunk: int = 5
    window: int = 1
    files: bool = False
    witness: bool = False


def shape_of(seed: int) -> Shape:
    """The shape that a seed chooses: half of them evict, one in seven reads files, half have a witness."""
    rng = random.Random(f"shape {seed}")
    # Files are read in commits of up to 1 MiB, a whole file before the next only while they are smaller.
    files = rng.random() < 0.15
    bulk = 0 if files else rng.choice((0, 4_000))
    return Shape(
        seed=seed,
        lines=rng.randint(3_000, 5_000)
        if files
        else rng.randint(900, 1_300)
        if bulk
        else rng.randint(500, 1_000),
        bulk=bulk,
        ring_bytes=(1 << 20) if bulk and not files else (2 << 20),
        chunk=rng.choice((1, 3, 7)),
        window=rng.choice((1, 2, 4)),
        files=files,
        witness=rng.random() < 0.5,
    )


class Quiet(msgspec.Struct, frozen=True):
    """What an undisturbed run of the same traffic gave.

    Attributes:
        state: The ring's last state.
        samples: All samples, by seq.
        windows: All closed windows.
        digests: The ring digest before each seq, and after the last: computed here, by FORMAT.md.
        life: The run, with every call that it made.
    """

    state: RingState
    samples: Samples
    windows: list[ClosedWindow]
    digests: list[bytes]
    life: Life


class Chain:
    """Lifetimes on one data folder.

    Args:
        lives: Starts them.
        model: The prepared base.
        work: Folder for the data folder, its configuration and its inputs; must exist and be empty.
        shape: Of the traffic.
        quiet: Where the undisturbed run has its data folder; None takes a place in `work`. Or a chain of the
            same shape, whose undisturbed run will do.
    """

    def __init__(
        self, lives: Lives, model: Path, work: Path, shape: Shape, quiet: Path | Chain | None = None
    ) -> None:
        self.shape, self._lives, self._model, self._work = shape, lives, model, work
        self.traffic = Traffic(shape.seed, shape.bulk)
        self.acked = 0
        self.began: list[int] = []  # the first line that each lifetime sent
        self._witness: Ring | None = None
        self._witness_of = 0  # inode of its data file
        self._stack = ExitStack()
        self.data = work / "data"
        self._same = quiet if isinstance(quiet, Chain) else None
        self._quiet_work = quiet if isinstance(quiet, Path) else work / "quiet"
        self._config = work / "edgewater.toml"
        pattern = str(work / "*.jsonl") if shape.files else ""
        write_config(self._config, model, ring_bytes=shape.ring_bytes, pattern=pattern)
        if shape.files:
            self._write_files(work)

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- what was sent -------------------------------------------------------------------------------

    @cached_property
    def lines(self) -> list[Sent]:
        """All lines of the traffic."""
        return [self.traffic.line(number) for number in range(self.shape.lines)]

    @cached_property
    def expected(self) -> list[Sent]:
        """The lines that become samples: their place here is their seq."""
        return [sent for sent in self.lines if sent.sample]

    def _write_files(self, work: Path) -> None:
        third = self.shape.lines // 3 + 1
        for name, start in (("a", 0), ("b", third), ("c", 2 * third)):
            part = self.lines[start : start + third]
            (work / f"{name}.jsonl").write_bytes(b"".join(sent.data + b"\n" for sent in part))

    # -- the undisturbed run -------------------------------------------------------------------------

    @cached_property
    def quiet(self) -> Quiet:
        """Run the same traffic undisturbed, in a ring that holds all of it, and check what it stored."""
        if self._same is not None:
            return self._same.quiet
        work = self._quiet_work
        work.mkdir()
        config = work / "edgewater.toml"
        pattern = str(self._work / "*.jsonl") if self.shape.files else ""
        write_config(config, self._model, ring_bytes=8 << 20, pattern=pattern)
        life = self._lives.run(self._order(str(config), 0), traced=True)
        if life.code != 0:
            raise Violation("undisturbed", f"ended with {life.code}: {life.err[-400:]}")
        with Ring.open_reader(work / "data" / "ring" / SHARD) as ring:
            state = ring.read_state()
            samples = ring.read(0, state.next_seq - 1)
            windows = ring.windows()
        self._check_texts(samples)
        return Quiet(state, samples, windows, _digests(samples), life)

    def steps(self, *, own: bool = False) -> Steps:
        """Where a life of this chain can be hurt.

        Args:
            own: Leave out what it says to the outside, on standard output and error.
        """
        creating, committing = _split(self.quiet.life, own)
        starting, _ = _split(self._restart, own)
        # Numbers count from the start of a life, and a start makes fewer calls than a creation.
        less = Counter(call.name for call in creating)
        less.subtract(call.name for call in starting)
        shifted = [msgspec.structs.replace(call, number=call.number - less[call.name]) for call in committing]
        return Steps(creating, starting, shifted)

    @property
    def complete(self) -> bool:
        """Whether all lines are acknowledged (a file's never are)."""
        return self.acked == self.shape.lines

    @cached_property
    def _restart(self) -> Life:
        self.quiet  # noqa: B018 - it comes first
        config = self._quiet_work / "edgewater.toml"
        first = self.shape.lines - 3 * self.shape.chunk * self.shape.window
        return self._lives.run(self._order(str(config), first), traced=True)

    def _check_texts(self, samples: Samples) -> None:
        """The tokens of a text are those of its bytes; every sample is where its line says."""
        _same("I1", "samples of an undisturbed run", len(samples), len(self.expected))
        spelled = token_bytes(self._model)
        starts = samples.offsets()
        for i, sent in enumerate(self.expected):
            event = msgspec.json.decode(sent.data)
            _same("I1", f"time of sample {i}", samples.ts[i], sent.arrival)
            _same("I1", f"source of sample {i}", samples.sources[i], event.get("source", SOURCE))
            _same("I1", f"kind of sample {i}", samples.kinds[i], event["kind"])
            _same("I1", f"subject of sample {i}", samples.subjects[i], event.get("subject", ""))
            if event["kind"] == "text":
                ids = samples.ids[starts[i] : starts[i + 1]]
                _same("I1", f"text of sample {i}", b"".join(spelled[t] for t in ids), event["text"].encode())

    # -- lifetimes -----------------------------------------------------------------------------------

    def _order(self, config: str, first: int) -> IngestLife:
        shape = self.shape
        return IngestLife(
            config=config, seed=shape.seed, bulk=shape.bulk, first=first, end=shape.lines,
            chunk=shape.chunk, window=shape.window, files=shape.files,
        )  # fmt: skip

    def live(self, point: Point | None, reach: int = 0, again: int = 0, cheat: str = "") -> Life:
        """Live once, from what was acknowledged, and note what is acknowledged now.

        Args:
            point: Where to be hurt; None lives to the end.
            reach: Send no more than commits of about so many calls need, so that there is something left to
                do after it; 0 sends all. Files are always read to their end.
            again: So many acknowledged lines are sent again first.
            cheat: A promise that it breaks (`IngestLife.cheat`).
        """
        first = max(self.acked - again, 0)
        self.began.append(first)
        lines = (reach // LEAST_CALLS + 2) * self.shape.chunk * self.shape.window if reach else 1 << 30
        end = min(self.acked + lines, self.shape.lines)
        order = msgspec.structs.replace(self._order(str(self._config), first), end=end, cheat=cheat)
        life = self._lives.run(order, point)
        told = [int(line) for line in life.out.splitlines(keepends=True) if line.endswith(b"\n")]
        self.acked = max([self.acked, *told])
        return life

    # -- the audit -----------------------------------------------------------------------------------

    def audit(self, *, ended: bool = False) -> RingState:
        """Everything that must hold after a fault, whatever it was.

        Args:
            ended: The last lifetime came to the end of the traffic by itself.
        Returns: The ring's state.
        """
        folder = self.data / "ring" / SHARD
        if not folder.is_dir():
            _same("I1", "acknowledged lines without a ring", self.acked, 0)
            return RingState()
        number = (folder / "data.mdb").stat().st_ino
        if self._witness is not None and self._witness_of != number:
            self._witness.close()  # of a ring that a start found damaged and put aside
            self._witness = None
        with ExitStack() as stack:
            ring = self._witness
            if ring is None:
                ring = Ring.open_reader(folder)
                (self._stack if self.shape.witness else stack).callback(ring.close)
                self._witness, self._witness_of = ring if self.shape.witness else None, number
            return self._audit(ring, ended)

    def _audit(self, ring: Ring, ended: bool) -> RingState:
        state, quiet = ring.read_state(), self.quiet
        committed = sum(sent.sample for sent in self.lines[: self.acked])
        if not committed <= state.next_seq <= len(self.expected):
            raise Violation("I1", f"{committed} samples were acknowledged, the ring is at {state.next_seq}")
        key = ring.header.dedup_key
        check_contents(ring, lambda first, last: self._sent(first, last, key))
        check_eviction(ring)
        if not self.shape.bulk:
            _same("I1", "oldest seq of a ring with room for all", state.tail_seq, 0)
        self._check_windows(ring, state)
        _same("I3", "ring digest", state.digest, quiet.digests[state.next_seq])
        counters = Counter(state.counters)
        outcomes = sum(counters[name] for name in ("samples", "duplicates", "suppressed", "dead_letters"))
        _same("counters", "events", counters["events"], outcomes)
        _same("counters", "samples", counters["samples"], state.next_seq)
        self._check_letters(ring, state)
        if self.shape.files:
            self._check_positions(ring, state)
        if ended:
            self._check_end(ring, state)
        return state

    def _sent(self, first: int, last: int, key: bytes) -> Samples:
        part = self.quiet.samples[first : last + 1]
        part.hashes = b"".join(hash_of(sent, key) for sent in self.expected[first : last + 1])
        return part

    def _check_windows(self, ring: Ring, state: RingState) -> None:
        rows = [_timeless(row) if self.shape.files else row for row in ring.windows()]
        quiet = [_timeless(row) if self.shape.files else row for row in self.quiet.windows]
        _same("windows", "closed windows", rows, quiet[: len(rows)])
        first = rows[-1].last_seq + 1 if rows else 0
        _same("windows", "first seq of the open window", state.window.first_seq, first)
        _same("windows", "number of the open window", state.window.window, len(rows) + 1)
        _same("windows", "samples in the open window", state.window.samples, state.next_seq - first)

    def _check_letters(self, ring: Ring, state: RingState) -> None:
        """Each broken line is kept, once where a position says how far a file was read.

        A sender without positions repeats what was committed but not acknowledged, and nothing identifies a
        broken line: it may be kept once for each time it was sent.
        """
        letters = [letter.data for _, letter in ring.dead_letters(1_000_000)]
        broken = [sent for sent in self.lines if sent.broken]
        if self.shape.files:
            kept_of = broken[state.dead_first : state.dead_next]  # the oldest go when there are too many
            _same("letters", "dead letters", letters, [sent.data for sent in kept_of])
            return
        kept = Counter(letters)
        for sent in broken:
            sendings = sum(first <= sent.number for first in self.began)
            least = 1 if sent.number < self.acked else 0
            if not least <= kept.pop(sent.data, 0) <= sendings:
                raise Violation("letters", f"line {sent.number} was sent {sendings} times, kept otherwise")
        _same("letters", "dead letters that nobody sent", dict(kept), {})

    def _check_positions(self, ring: Ring, state: RingState) -> None:
        """Positions and samples are of one commit: the lines before the positions are those stored."""
        rows = ring.named("p")
        reached = 0
        for name, data in rows.items():
            offset = msgspec.msgpack.decode(data, type=FilePosition).offset
            reached += Path(name.split(":", 2)[2]).read_bytes()[:offset].count(b"\n")
        read = self.lines[:reached]
        _same("atomic", "samples before the positions", sum(sent.sample for sent in read), state.next_seq)
        _same("atomic", "letters before the positions", sum(sent.broken for sent in read), state.dead_next)

    def _check_end(self, ring: Ring, state: RingState) -> None:
        quiet = self.quiet.state
        _same("end", "samples", state.next_seq, quiet.next_seq)
        _same("end", "digest", state.digest, quiet.digest)
        _same("end", "closed windows", len(ring.windows()), len(self.quiet.windows))
        if not self.shape.files:  # a file's lines arrive when they are read
            _same("end", "lines acknowledged", self.acked, self.shape.lines)
            _same("end", "stream time", state.stream_time, quiet.stream_time)
            _same("end", "open window", state.window, quiet.window)


class Steps(msgspec.Struct, frozen=True):
    """Where ingest can be hurt: the calls of its main thread, which is the one that commits.

    Attributes:
        creating: Of a life that makes its data folder, up to the first commit.
        starting: Of a life that finds it, up to the first commit.
        committing: From the first commit on; numbered as in a life that finds its data folder.
    """

    creating: list[Call]
    starting: list[Call]
    committing: list[Call]

    def pick(self, rng: random.Random, what: str = "SIGKILL", *, near: bool = False) -> tuple[Point, int]:
        """A point of a life that finds its data folder: in its start, its first commits, or further on.

        Mostly early: the traffic is soon over where each lifetime gets far, and with it the chain.

        Args:
            near: Only in the start and the first commits: files are read in few large ones.
        Returns: The point, and how many calls of commits a life must make to be sure to come there.
        """
        dice = rng.random()
        if dice < 0.15:
            return rng.choice(self.starting).point(what), 1
        whole = len(self.committing)
        reach = 8 if near else 24 if dice < 0.5 else whole // (12 if dice < 0.95 else 2)
        reach = max(min(reach, whole), 1)
        return self.committing[rng.randrange(reach)].point(what), reach


def _split(life: Life, own: bool) -> tuple[list[Call], list[Call]]:
    """Its calls before the ring's first commit, and from it on."""
    mine = [call for call in life.calls if call.thread == life.pid]
    mine = [call for call in mine if not (own and call.path.endswith(("/out", "/err")))]
    ring = f"/ring/{SHARD}/data.mdb"
    first = next((i for i, call in enumerate(mine) if call.path.endswith(ring)), len(mine))
    return mine[:first], mine[first:]


def _timeless(row: ClosedWindow) -> ClosedWindow:
    return msgspec.structs.replace(row, closed_at=0.0)


def _digests(samples: Samples) -> list[bytes]:
    """The ring digest before each seq and after the last, from FORMAT.md and not by the code under test."""
    digest, out = bytes(32), [bytes(32)]
    ids: array[int] = array("I", samples.ids)
    ends = accumulate(samples.lengths, initial=0)
    for i, (start, end) in enumerate(pairwise(ends)):
        head = samples.sources[i].encode() + b"\0" + _HEAD.pack(samples.ts[i], end - start)
        body = ids[start:end].tobytes() + bytes(samples.mask[start:end])
        digest = hashlib.blake2b(digest + head + body, digest_size=32).digest()
        out.append(digest)
    return out


def _same(invariant: str, name: str, found: object, expected: object) -> None:
    if found != expected:
        raise Violation(invariant, f"{name}: {found!r:.300}, expected {expected!r:.300}")
