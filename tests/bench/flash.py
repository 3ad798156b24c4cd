"""Flash wear: bytes that reach the device for each byte of event payload, and a day's worth of them.

What: Edgewater's ring behind its real steps, plain LMDB (one value a record and a hash index) and a SQLite
table (WAL, synchronous=FULL, a UNIQUE hash index), each on an ext4 image of its own with 4 KiB blocks and a
journal, by the sector counter of its loop device, a sync before each look. Payload is the event lines as
received. Sectors are exact whatever else the machine does.
  1. 1,000 events a commit, as fast as it goes: the stream as it is, then until the ring evicts (young), then
     until it turned over twice (steady).
  2. What a commit of 1,000 writes, page by page.
  3. 10 events a second with a commit every 2 s (flush_ms = 2000) and every 10 s (eco): hours of it, with
     what the journal's timers would have written (_pacing.py), in GB a day. Young and steady as in 1.
  4. With --real-seconds: the same against the clock, all stores at once, to prove 3.
"unwritten" is a young ring on a file that posix_fallocate only set aside: the first touch of a block then
changes an extent, which the journal writes. Ring.create writes its file whole, once, to save that.

How: as root, `make bench` or `python tests/bench/flash.py --pump pump-readings.jsonl.zst` (the readings are
not shipped; without them the demo's weather is fed). --quick for a look.

Expected: at most 0.35 bytes a byte at 1,000 a commit with the pump readings; at most 1.0 GB a day at 2 s and
0.25 GB in eco.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path as well as with -m

from adapters.model_folder import default_model_dir
from pipeline.config import load
from pipeline.tokenization import BatchTokenizer
from storage.ring_writer import newest_blocks
from tests.bench import _device, _report, _streams
from tests.bench._device import Device
from tests.bench._pacing import Journal
from tests.bench._pages import PAGE_BYTES, written_pages
from tests.bench._stores import EdgewaterStore, LmdbStore, SqliteStore, Store

BULK = 1_000  # events a commit
EVENTS_A_SECOND = 10
DAY_S = 86_400
GB = 1e9
TURNS = 2  # how often the steady ring is filled again
TARGETS = {"bulk": 0.35, "flush": 1.0, "eco": 0.25}
PROFILES = {"flush": 2.0, "eco": 10.0}  # seconds between commits
SETTLE_S = (
    36.0  # the journal's timer and the inodes' write-back come that late; a sync would force them early
)
DEVICE_BYTES = 4 << 30
Make = Callable[[Path], Store]


class Setup(msgspec.Struct, frozen=True):
    """What all parts of the bench share."""

    lines: list[bytes]
    tokenizer: BatchTokenizer
    scratch: Path
    ring_bytes: int
    mount: str

    def edgewater(self, *, unwritten: bool = False) -> Callable[[Path], EdgewaterStore]:
        """How a ring is made."""
        config = load(None, require_sources=False)
        return lambda folder: EdgewaterStore(
            folder, config, self.tokenizer, self.ring_bytes, unwritten=unwritten
        )

    def others(self) -> list[Make]:
        """How the two plain stores are made."""
        return [lambda folder: LmdbStore(folder, DEVICE_BYTES // 4), SqliteStore]

    @contextlib.contextmanager
    def device(self) -> Iterator[Device]:
        """A fresh file system."""
        with _device.device(self.scratch, DEVICE_BYTES, self.mount) as made:
            yield made

    def stream(self, size: int) -> Iterator[list[bytes]]:
        """The stream in lists of `size`, without end."""
        return _streams.chunks(_streams.endless(self.lines), size)


class Phase(msgspec.Struct):
    """What a stretch of a run wrote."""

    store: str
    phase: str
    commits: int = 0
    payload: int = 0
    device: int = 0

    @property
    def ratio(self) -> float:
        """Bytes written a byte of payload."""
        return self.device / self.payload if self.payload else 0.0


# -- 1,000 events a commit --------------------------------------------------------------------------


def bulk(setup: Setup) -> list[Phase]:
    """The same stream through all stores; the ring's phases decide where the others' begin."""
    with setup.device() as device, contextlib.closing(setup.edgewater()(device.folder)) as store:
        stream = setup.stream(BULK)
        first = feed(store, device, stream, "as it is", lambda n: n >= max(1, len(setup.lines) // BULK))
        young = feed(store, device, stream, "young", lambda n: store.ring.state.tail_seq > 0)
        turn = store.ring.state.next_seq // BULK
        steady = feed(store, device, stream, "steady", lambda n: n >= TURNS * turn)
    stretches = [(p.phase, p.commits) for p in (first, young, steady)]
    unwritten = bulk_other(setup, setup.edgewater(unwritten=True), stretches[:2])
    for phase in unwritten:
        phase.store += ", unwritten"
    others = [phase for make in setup.others() for phase in bulk_other(setup, make, stretches)]
    return [first, young, steady, *unwritten, *others]


def bulk_other(setup: Setup, make: Make, stretches: Sequence[tuple[str, int]]) -> list[Phase]:
    """Another store over the same stretches of the stream."""
    with setup.device() as device, contextlib.closing(make(device.folder)) as store:
        stream = setup.stream(BULK)
        return [feed(store, device, stream, name, _after(count)) for name, count in stretches]


def feed(
    store: Store, device: Device, stream: Iterator[list[bytes]], phase: str, over: Callable[[int], bool]
) -> Phase:
    """Commit until it is over; `over` is asked after each commit, with the number of them."""
    made = Phase(store.name, phase)
    before = device.written()
    for lines in stream:
        store.commit(lines)
        made.commits += 1
        made.payload += sum(map(len, lines))
        if over(made.commits):
            break
    made.device = device.written() - before
    return made


def _after(count: int) -> Callable[[int], bool]:
    return lambda n: n >= count


# -- one commit, page by page -----------------------------------------------------------------------


def breakdown(setup: Setup, size: int, commits: int, *, steady: bool) -> dict[str, float]:
    """Mean of what a commit of `size` events writes, bytes."""
    with setup.device() as device, contextlib.closing(setup.edgewater()(device.folder)) as store:
        stream = setup.stream(size)
        fill(store, stream, turns=1.2 if steady else 0.0)
        pages: Counter[str] = Counter()
        sums: Counter[str] = Counter()
        before = device.written()
        for lines in itertools.islice(stream, commits):
            old = store.data.read_bytes()
            store.commit(lines)
            pages += written_pages(old, store.data.read_bytes())
            sums["payload"] += sum(map(len, lines))
            sums["block as stored"] += newest_block_bytes(store)
        sums["device"] = device.written() - before
    sums |= Counter({f"{kind} pages": n * PAGE_BYTES for kind, n in pages.items()})
    sums["journal, inode, rest"] = sums["device"] - sum(pages.values()) * PAGE_BYTES
    return {name: total / commits for name, total in sums.items()}


def newest_block_bytes(store: EdgewaterStore) -> int:
    """Length of the newest block: what the last commit stored, or merged it into."""
    # The ring's own handle: LMDB opens an environment once a process.
    with store.ring._env.begin() as txn:
        return next((len(block) for _, block in newest_blocks(txn)), 0)


def fill(store: EdgewaterStore, stream: Iterator[list[bytes]], turns: float) -> None:
    """Commit until the ring has turned over so often; 0 nothing."""
    first_turn = 0
    while turns and (not first_turn or store.ring.state.next_seq < turns * first_turn):
        store.commit(next(stream))
        if not first_turn and store.ring.state.tail_seq > 0:
            first_turn = store.ring.state.next_seq


# -- 10 events a second -----------------------------------------------------------------------------


def paced(setup: Setup, seconds: float) -> list[dict[str, object]]:
    """GB a day of every store in both profiles, `seconds` of stream time each."""
    rows = []
    for profile, every_s in PROFILES.items():
        size = round(EVENTS_A_SECOND * every_s)
        for name, make, turns in _paced_lanes(setup):
            with setup.device() as device, contextlib.closing(make(device.folder)) as store:
                stream = setup.stream(size)
                if isinstance(store, EdgewaterStore):
                    fill(store, stream, turns)
                commits = round(seconds / every_s)
                written = pace(store, device, stream, commits, every_s, setup.mount)
            rows.append(_day(store.name, name, profile, commits, written, every_s))
    return rows


def _paced_lanes(setup: Setup) -> list[tuple[str, Make, float]]:
    lmdb_store, sqlite_store = setup.others()
    return [
        ("young", setup.edgewater(), 0.0),
        ("young, unwritten", setup.edgewater(unwritten=True), 0.0),
        ("steady", setup.edgewater(), 1.2),
        ("young", lmdb_store, 0.0),
        ("young", sqlite_store, 0.0),
    ]


def pace(
    store: Store, device: Device, stream: Iterator[list[bytes]], commits: int, every_s: float, mount: str = ""
) -> int:
    """Commit so often with the journal's timers in between. Returns: bytes written."""
    journal = Journal(device.folder, store.touched(), mount)
    before = device.written()
    for n, lines in enumerate(itertools.islice(stream, commits)):
        journal.before_commit(n * every_s)
        store.commit(lines)
    journal.before_commit((commits + 3) * every_s)
    journal.close()
    return device.written() - before


class Lane(msgspec.Struct):
    """One store on its own device, committing by the clock."""

    store: Store
    device: Device
    stream: Iterator[list[bytes]]
    state: str
    profile: str
    commits: int = 0
    before: int = 0

    @property
    def every_s(self) -> float:
        """Seconds between commits."""
        return PROFILES[self.profile]

    def row(self) -> dict[str, object]:
        """What it wrote since `before`."""
        written = self.device.written() - self.before
        return _day(self.store.name, self.state, self.profile, self.commits, written, self.every_s)


def real(setup: Setup, seconds: float) -> list[dict[str, object]]:
    """The same against the clock: every store in both profiles side by side, each on its own device."""
    with contextlib.ExitStack() as stack:
        lanes = []
        for profile, (name, make, turns) in itertools.product(PROFILES, _paced_lanes(setup)):
            device = stack.enter_context(setup.device())
            store = stack.enter_context(contextlib.closing(make(device.folder)))
            stream = setup.stream(round(EVENTS_A_SECOND * PROFILES[profile]))
            if isinstance(store, EdgewaterStore):
                fill(store, stream, turns)
            lanes.append(Lane(store, device, stream, name, profile))
        for lane in lanes:
            lane.before = lane.device.written()
        run_clock(lanes, seconds)
        time.sleep(SETTLE_S)
        return [lane.row() for lane in lanes]


def run_clock(lanes: Sequence[Lane], seconds: float) -> None:
    """Commit each lane whenever its time comes."""
    began = time.monotonic()
    while (now := time.monotonic() - began) < seconds:
        for lane in lanes:
            if lane.commits * lane.every_s <= now:
                lane.store.commit(next(lane.stream))
                lane.commits += 1
        time.sleep(0.02)


def _day(
    store: str, ring: str, profile: str, commits: int, written: int, every_s: float
) -> dict[str, object]:
    a_commit = written / commits
    return {
        "store": store,
        "state": ring,
        "profile": profile,
        "commits": commits,
        "bytes_a_commit": round(a_commit),
        "gb_a_day": round(a_commit * DAY_S / every_s / GB, 3),
    }


# -- the command ------------------------------------------------------------------------------------


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pump", type=Path, help="readings to feed (.jsonl.zst)")
    parser.add_argument("--ring-mib", type=int, default=16)
    parser.add_argument("--hours", type=float, default=1.0, help="of stream time, in part 3")
    parser.add_argument("--real-seconds", type=float, default=0.0, help="also run part 4 for so long")
    parser.add_argument("--mount", default="", help="mount options, as in commit=60")
    parser.add_argument("--scratch", type=Path, default=_device.scratch_folder(), help="where images lie")
    parser.add_argument("--parts", default="123", help="which of the parts 1 to 3 to run")
    parser.add_argument("--quick", action="store_true", help="a 4 MiB ring and a quarter of the time")
    args, _ = parser.parse_known_args()
    if reason := _device.why_not():
        print(f"flash: not run: it {reason}")
        _report.finish("flash", skipped=reason)
        return
    name, lines = _streams.readings(args.pump)
    ring_mib, hours = (4, args.hours / 4) if args.quick else (args.ring_mib, args.hours)
    setup = Setup(lines, BatchTokenizer(default_model_dir()), args.scratch, ring_mib << 20, args.mount)
    mean = sum(map(len, lines)) / len(lines)
    print(f"{name}: {len(lines):,} readings, {mean:.0f} B each; ring {ring_mib} MiB")
    figures: dict[str, object] = {"stream": name, "ring_bytes": setup.ring_bytes, "mount": args.mount}
    if "1" in args.parts:
        figures["bulk"] = report_bulk(bulk(setup))
    if "2" in args.parts:
        figures["breakdown"] = report_breakdown(setup)
    if "3" in args.parts:
        figures["paced"] = report_paced(
            f"{hours:g} h of stream time, journal timers emulated", paced(setup, hours * 3_600)
        )
    if args.real_seconds:
        figures["real"] = report_paced(
            f"{args.real_seconds:g} s by the clock", real(setup, args.real_seconds)
        )
    _report.finish("flash", targets=TARGETS, **figures)


def report_bulk(phases: Sequence[Phase]) -> list[dict[str, object]]:
    """Part 1 for people. Returns: for machines."""
    _report.table(
        f"{BULK:,} events a commit (target of the ring: at most {TARGETS['bulk']})",
        ("store", "phase", "commits", "payload B", "device B", "ratio"),
        [(p.store, p.phase, p.commits, p.payload, p.device, p.ratio) for p in phases],
    )
    return [{**msgspec.structs.asdict(p), "ratio": round(p.ratio, 4)} for p in phases]


def report_breakdown(setup: Setup) -> dict[str, dict[str, float]]:
    """Part 2 for people. Returns: for machines."""
    kinds = {
        "1,000 young": breakdown(setup, BULK, 40, steady=False),
        "1,000 steady": breakdown(setup, BULK, 40, steady=True),
        "20 young": breakdown(setup, 20, 100, steady=False),
        "20 steady": breakdown(setup, 20, 100, steady=True),
    }
    names = list(dict.fromkeys(name for found in kinds.values() for name in found))
    rows = [(name, *(round(found.get(name, 0.0)) for found in kinds.values())) for name in names]
    _report.table("Bytes a commit of the ring", ("", *kinds), rows)
    return {kind: {name: round(value, 1) for name, value in found.items()} for kind, found in kinds.items()}


def report_paced(title: str, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Parts 3 and 4 for people. Returns: the same rows."""
    heading = f"{EVENTS_A_SECOND} events/s, {title} (targets: {TARGETS['flush']} GB, eco {TARGETS['eco']})"
    _report.table(
        heading,
        ("store", "state", "profile", "commits", "B a commit", "GB a day"),
        [tuple(row.values()) for row in rows],
    )
    return rows


if __name__ == "__main__":
    main()
