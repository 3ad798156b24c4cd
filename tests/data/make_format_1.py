"""Make format-1.tar.zst: a data folder as Edgewater wrote it before ring format 2, for the migration's tests.

Run by the code of that time, which is in this project's history:

    git archive 53923dd | tar x -C /tmp/before && cd /tmp/before && python .../tests/data/make_format_1.py OUT

Everything that a data folder of that time could hold is in it: evicted, dropped and forgotten rows, samples
of every kind, with and without mask, subject and hash, narrow and wide ids, text. `expected.json` beside the
folder says what is in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import sys
import tarfile
import tempfile
from array import array
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from storage.folder import DataFolder
from storage.registry import AuditRow, Registry, UpdateRow, UpdateState, VersionRow
from storage.ring import Commit, Ring
from storage.samples import Samples
from storage.windows import ClosedWindow, DeadLetter, OpenWindow

TOKENIZER = "00112233aabbccdd"
KINDS = ("reading", "text", "exchange", "feedback")


def make_samples(first: int, n: int, rng: random.Random, wide: bool) -> Samples:
    lengths = array("I", [rng.randrange(30) for _ in range(n)])
    total = sum(lengths)
    top = 100_000 if wide else 300
    return Samples(
        first,
        [rng.choice(("pump-1", "cmms", "hmi")) for _ in range(n)],
        [rng.choice(KINDS) for _ in range(n)],
        [rng.choice(("", "", "crew-b", "operator-17")) for _ in range(n)],
        array("d", [1e9 + first + i / 4 for i in range(n)]),
        lengths,
        array("I", [rng.randrange(top) for _ in range(total)]),
        bytearray(rng.choice((0, 1, 1)) if wide else 1 for _ in range(total)),
        b"".join(bytes(16) if i % 9 == 0 else (first + i).to_bytes(16, "big") for i in range(n)),
        [f"text {first + i}" for i in range(n)],
    )


def make_ring(folder: Path) -> dict[str, Any]:
    rng = random.Random(3)
    held: list[Samples] = []
    with Ring.create(folder, shard="main", tokenizer_id=TOKENIZER, max_bytes=1 << 20) as ring:
        for n in range(40):
            first = ring.state.next_seq
            held.append(make_samples(first, 12 + n % 5, rng, wide=n % 7 == 0))
            last = first + len(held[-1]) - 1
            ring.commit(
                Commit(
                    samples=held[-1],
                    stream_time=1e9 + 60.0 * n,
                    window=OpenWindow(n + 2, last + 1, 0, 0, 0.0),
                    counters={
                        "events": last + 3,
                        "samples": last + 1,
                        "duplicates": 1,
                        "dead_letters": n + 1,
                    },
                    closed=[
                        ClosedWindow(n + 1, first, last, last - first + 1, 99, 1e9 + 60.0 * n, "samples")
                    ],
                    positions={f"/var/log/plant {n % 6}.log": b"" if n == 39 else b"position %d" % n},
                    references={f"pump-{n % 3}": b"reference %d" % n},
                    dead_letters=[DeadLetter("cmms", f"byte {n}", 1e9 + n, "not JSON", b"{" * 3_000)],
                    request=n // 10,
                )
            )
        ring.evict_older_than(1e9 + 60.0 * 5)
        state, kept = ring.state, Samples.concat(held)[ring.state.tail_seq :]
        return {
            "state": msgspec.to_builtins(state),
            "dedup_key": ring.header.dedup_key.hex(),
            "kept": kept.extend_digest(bytes(32)).hex(),
            "kept_hashes": hashlib.sha256(kept.hashes).hexdigest(),
            "kept_subjects": kept.subjects,
            "windows": [msgspec.to_builtins(row) for row in ring.windows()],
            "positions": {name: value.decode() for name, value in ring.named("p").items()},
            "references": {name: value.decode() for name, value in ring.named("r").items()},
            "letters": [[number, letter.position] for number, letter in ring.dead_letters(10_000)],
        }


def make_registry(folder: Path) -> dict[str, Any]:
    with Registry.open_or_create(folder) as registry:
        with registry.write() as writer:
            for window in range(1, 6):
                row = UpdateRow("main", window, window, 0, 9, 10, UpdateState.CLAIMED, result=b'{"a":1}')
                for state in (UpdateState.CLAIMED, UpdateState.STAGED, UpdateState.REJECTED):
                    if window < 5 or state == UpdateState.CLAIMED:
                        writer.put_update(msgspec.structs.replace(row, state=state))
            writer.put_version(VersionRow(1, "v000001-1f3a", 0, "main", 1, "ab" * 32, "cd" * 32, 1.7e9))
            writer.put_version(VersionRow(2, "v000002-2f3a", 1, "main", 2, "ef" * 32, "cd" * 32, 1.7e9))
            writer.set_active(1)
            writer.set_active(2)
            writer.add_request()
            writer.add_audit(AuditRow(1.7e9, "trainer", "promote", "version 1"))
            writer.add_audit(AuditRow(1.7e9, "trainer", "promote", "version 2"))
        return {
            "updates": msgspec.to_builtins(registry.updates()),
            "versions": msgspec.to_builtins(registry.versions()),
            "active": msgspec.to_builtins(registry.active()),
            "cursor": registry.cursor("main"),
            "requests": registry.requests(),
            "audit": msgspec.to_builtins(registry.audit()),
        }


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        folder = DataFolder.open(Path(work, "data"), create=True)
        expected = {"ring": make_ring(folder.ring / "main"), "registry": make_registry(folder.registry)}
        folder.close()
        Path(work, "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
        for lock in Path(work).rglob("lock.mdb"):
            lock.unlink()
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(work, arcname=".")
    out.write_bytes(zstandard.ZstdCompressor(level=19).compress(packed.getvalue()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
