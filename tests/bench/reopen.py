"""Reopening: from the start of the process to the first event accepted, with 1,000,000 samples in the ring.

What: a ring of real readings, tokenized, in commits of 1,000 and (another ring) of 20 samples; then
`python -m pipeline ingest --finite` with a files source is started, and a reader in this process sees when
the first new sample is committed, which is when it is acknowledged. Warm, and as root also with an empty
page cache (libraries that some process has mapped stay in it); once more with a dedup horizon of the whole
ring. Where the time goes is told by another process that does what ingest does, step by step.

How: `python tests/bench/reopen.py [--pump FILE] [--samples N]`; minutes, most of them to build the rings.

Expected: under 2 s on two cores with the default dedup horizon (200,000 samples).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path as well as with -m

# What tokenizes and what flows is imported where it is used: what this process maps would never be cold.
from storage.folder import DataFolder
from storage.ring import Commit, Ring
from storage.samples import HASH_BYTES, Samples
from storage.windows import OpenWindow
from tests.bench import _report, _streams
from tests.bench._device import scratch_folder

SHARD = "main"
RING_BYTES = 256 << 20
ROOT = Path(__file__).resolve().parents[2]
COMMITS = (1_000, 20)
TARGET_S = 2.0
POLL_S = 0.001
RUNS = 3
LIMIT_S = 60.0


# -- the ring ---------------------------------------------------------------------------------------


def build(data_dir: Path, pump: Path | None, count: int, size: int) -> None:
    """Fill a data folder's ring with `count` samples in commits of `size`."""
    tokenizer_id, real = tokenized(_streams.readings(pump)[1])
    folder = DataFolder.open(data_dir, create=True)
    rng = random.Random(size)
    made = Ring.create(folder.ring / SHARD, shard=SHARD, tokenizer_id=tokenizer_id, max_bytes=RING_BYTES)
    with made as ring:
        for first, samples in zip(range(0, count, size), _parts(real, size), strict=False):
            samples.first_seq = first
            samples.hashes = rng.randbytes(HASH_BYTES * size)
            samples.ts = array("d", (1.6e9 + seq / 10 for seq in samples.seqs))
            counters = {"events": first + size, "samples": first + size}
            ring.commit(Commit(samples, samples.ts[-1], OpenWindow(first_seq=first + size), counters))
    folder.close()


def _parts(real: Samples, size: int) -> Iterator[Samples]:
    parts = [real[i : i + size] for i in range(0, len(real) - size + 1, size)]
    return itertools.cycle(parts)


def tokenized(lines: list[bytes]) -> tuple[str, Samples]:
    """The tokenizer's id, and the lines as samples."""
    from adapters.model_folder import default_model_dir
    from pipeline.config import load
    from pipeline.decode import decode
    from pipeline.events import Batch, Line, Origin
    from pipeline.rules import SourceRules
    from pipeline.tokenization import BatchTokenizer, TokenizeStep

    tokenizer = BatchTokenizer(default_model_dir())
    origin = Origin("pump", "", 0.0)
    batch = decode(Batch([Line(data, 0, origin) for data in lines]))
    batch.hashes = [bytes(HASH_BYTES)] * len(lines)
    render = SourceRules(load(None, require_sources=False)).render
    return tokenizer.manifest.tokenizer_id, TokenizeStep(tokenizer, render)(batch).samples


# -- the measured process ---------------------------------------------------------------------------


def reopen(data_dir: Path, inbox: Path, number: int, horizon: int) -> float:
    """Start ingest on one new event. Returns: seconds from its start to that event's commit."""
    line = {"kind": "text", "source": "cmms", "ts": 1.8e9 + number, "text": f"first order {number}"}
    (inbox / f"{number}.jsonl").write_text(json.dumps(line) + "\n")
    with Ring.open_reader(data_dir / "ring" / SHARD) as reader:
        before = reader.read_state().next_seq
        began = time.monotonic()
        with subprocess.Popen([sys.executable, *_command(data_dir, inbox, horizon)], cwd=ROOT) as process:
            while reader.read_state().next_seq == before:
                if process.poll() is not None or time.monotonic() - began > LIMIT_S:
                    process.kill()
                    raise AssertionError("ingest ended, or took a minute, without the event")
                time.sleep(POLL_S)
            seconds = time.monotonic() - began
            process.wait(LIMIT_S)
    return seconds


def _command(data_dir: Path, inbox: Path, horizon: int) -> list[str]:
    config = data_dir.parent / "bench.toml"
    config.write_text(
        f"data_dir = {json.dumps(str(data_dir))}\nring.flush_ms = 10\ndedup.horizon_events = {horizon}\n"
        'health.listen = ""\n'
        f'[[sources]]\nname = "cmms"\nkind = "files"\npath = {json.dumps(str(inbox / "*.jsonl"))}\n'
    )
    return ["-m", "pipeline", "ingest", "--finite", "--config", str(config)]


def forget_page_cache() -> bool:
    """Empty the page cache. Returns: whether that may be done here."""
    if os.geteuid() != 0:
        return False
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


# -- where the time goes ----------------------------------------------------------------------------


def print_stages(data_dir: Path, horizon: int) -> None:
    """Do what ingest does before its first event, and print the seconds of each step."""
    spent: dict[str, float] = {}
    at = time.perf_counter()

    def note(name: str) -> None:
        nonlocal at
        now = time.perf_counter()
        spent[name], at = now - at, now

    subprocess.run([sys.executable, "-c", "import pipeline.cli, pipeline.roles, pipeline.ingest"], check=True)
    note("python and imports")
    from adapters.model_folder import default_model_dir
    from pipeline.dedup import SeenHashes
    from pipeline.tokenization import BatchTokenizer

    note("(imported again)")
    tokenizer_id = BatchTokenizer(default_model_dir()).manifest.tokenizer_id
    note("tokenizer")
    folder = data_dir / "ring" / SHARD
    ring = Ring.open_or_create(folder, shard=SHARD, tokenizer_id=tokenizer_id, max_bytes=RING_BYTES)
    note("open the ring")
    hashes = ring.newest_hashes(horizon)
    note("hashes out of the blocks")
    SeenHashes(horizon, ring.state.next_seq, hashes)
    note("dedup table")
    ring.close()
    del spent["(imported again)"]
    print(json.dumps(spent))


# -- the command ------------------------------------------------------------------------------------


def child(args: argparse.Namespace, *more: str) -> str:
    """Run this file as another process. Returns: what it printed."""
    command = [sys.executable, __file__, "--samples", str(args.samples), "--horizon", str(args.horizon)]
    command += ["--pump", str(args.pump)] if args.pump else []
    return subprocess.run([*command, *more], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def measure(work: Path, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """One ring: build it, reopen it warm and cold, take it apart."""
    data_dir, inbox = work / f"data-{size}", work / f"inbox-{size}"
    inbox.mkdir()
    with tempfile.TemporaryDirectory(dir=args.build, prefix="edgewater-bench-") as built:
        began = time.monotonic()
        child(args, "--fill", f"{built}/data", "--size", str(size))
        build_s = time.monotonic() - began
        shutil.copytree(f"{built}/data", data_dir, ignore=shutil.ignore_patterns("lock.mdb"))
    numbers = itertools.count()
    warm = [reopen(data_dir, inbox, next(numbers), args.horizon) for _ in range(RUNS)]
    cold = [reopen(data_dir, inbox, next(numbers), args.horizon) for _ in range(RUNS) if forget_page_cache()]
    with Ring.open_reader(data_dir / "ring" / SHARD) as ring:
        held = ring.state.next_seq - ring.state.tail_seq
    taken = json.loads(child(args, "--stages", str(data_dir)))
    return {
        "commit": size,
        "held": held,
        "build_s": round(build_s, 1),
        "warm_s": round(statistics.median(warm), 3),
        "warm_spread_s": round(max(warm) - min(warm), 3),
        "cold_s": round(statistics.median(cold), 3) if cold else None,
        "whole_horizon_s": round(reopen(data_dir, inbox, next(numbers), args.samples), 3),
        "stages_s": {name: round(seconds, 3) for name, seconds in taken.items()},
    }


def main() -> None:
    """Run the bench, or be one of its processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pump", type=Path, help="readings to fill the ring with (.jsonl.zst)")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--horizon", type=int, default=200_000, help="dedup.horizon_events")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="a real disk")
    parser.add_argument("--build", type=Path, default=scratch_folder(), help="where the rings are filled")
    parser.add_argument("--stages", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--fill", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    args, _ = parser.parse_known_args()
    if args.stages:
        print_stages(args.stages, args.horizon)
    elif args.fill:
        build(args.fill, args.pump, args.samples, args.size)
    else:
        name, _ = _streams.readings(args.pump)
        with tempfile.TemporaryDirectory(dir=args.scratch, prefix="edgewater-bench-") as work:
            rows = [measure(Path(work), size, args) for size in COMMITS]
        report(name, args.samples, rows)


def report(name: str, samples: int, rows: list[dict[str, Any]]) -> None:
    """Print what was measured."""
    parts = list(rows[0]["stages_s"])
    keys = [key for key in rows[0] if key not in ("commit", "stages_s")]
    table = [(key, *(row[key] for row in rows)) for key in keys]
    table += [(f"  of it: {part}", *(row["stages_s"][part] for row in rows)) for part in parts]
    heads = [f"{row['commit']:,} a commit" for row in rows]
    _report.table(f"{samples:,} samples ({name}), target {TARGET_S} s", ("", *heads), table)
    passed = all(row["warm_s"] < TARGET_S and (row["cold_s"] or 0) < TARGET_S for row in rows)
    _report.finish("reopen", stream=name, samples=samples, target_s=TARGET_S, rings=rows, passed=passed)


if __name__ == "__main__":
    main()
