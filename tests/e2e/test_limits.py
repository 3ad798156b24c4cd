"""What the ingest process may take: no torch, and little memory, with the real model's tokenizer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.stream import environment

pytestmark = pytest.mark.slow
MEMORY_BYTES = 110 << 20


def test_ingest_stays_small_and_loads_no_torch(smollm2: Path, tmp_path: Path) -> None:
    """Peak RssAnon + RssShmem of a whole stream of 60,000 readings, and every library it mapped."""
    values = '{{"pressure":{:.3f},"flow":{:.2f},"current":{:.3f}}}'
    line = '{{"kind":"reading","source":"p","ts":{},"values":' + values + "}}\n"
    stream = tmp_path / "events.jsonl"
    stream.write_text("".join(line.format(i, i % 977 / 7, i % 613 / 3, i % 89 / 11) for i in range(60_000)))
    words = ["ingest", "--finite", "--replay", str(stream)]
    settings = [f"data_dir={tmp_path / 'data'}", f"model.path={smollm2}", 'health.listen=""']
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *words, *(part for item in settings for part in ("--set", item))],
        env=environment(),
    )
    peak, libraries = 0, set[str]()
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        except OSError:
            break
        peak = max(peak, sum(1024 * int(kib) for kib in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", status)))
        libraries |= set(re.findall(r"/(libtorch\w*|\w*bytewax)[^/\n]*\.so", maps))
    assert process.wait() == 0
    assert 0 < peak <= MEMORY_BYTES
    assert {name for name in libraries if "torch" in name} == set()
    assert any("bytewax" in name for name in libraries), "the look at the maps saw nothing"
