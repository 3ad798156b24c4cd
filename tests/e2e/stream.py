"""A small real stream and the settings that make the tiny model learn from it in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.demo import demo_lines

WINDOW = 100
SETTINGS = (
    f"trigger.min_samples={WINDOW}",
    "ring.max_bytes=16MiB",
    "update.max_steps=4",
    "update.row_tokens=64",
    "update.threads=1",
    "gate.max_anchor_delta_bits=10",
    "gate.min_gain=0.0",
    "gate.max_retention_loss=10.0",
    "gate.max_recited=20",
)


def lines(count: int) -> list[bytes]:
    """The first events of the demo's stream, readings after work orders as there."""
    stream = list(demo_lines(everything=False))
    readings = [line for line in stream if b'"reading"' in line]
    orders = [line for line in stream if b'"text"' in line]
    out = [line for pair in zip(orders, readings, strict=False) for line in pair]
    return out[:count]


def distinct(count: int) -> list[bytes]:
    """The same, without the repeats that dedup would drop."""
    return list({line.partition(b'"text"')[2] or line: line for line in lines(2 * count)}.values())[:count]


def arguments(model: Path, *more: str) -> list[str]:
    """--set options for the tiny model."""
    return [part for item in (f"model.path={model}", *SETTINGS, *more) for part in ("--set", item)]


def edgewater(*words: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the command to its end."""
    command = [sys.executable, "-m", "pipeline", *words]
    done = subprocess.run(
        command, capture_output=True, timeout=240, check=False, env=environment(), **options
    )
    if check:
        assert done.returncode == 0, done.stderr.decode()
    return done


def environment() -> dict[str, str]:
    """Ours, with this checkout first."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def outcome(report: bytes) -> tuple[str, list[tuple[int, str]], list[str]]:
    """What two runs must agree on: ring digest, decisions, adapter files."""
    data = json.loads(report)
    decisions = [(window["window"], window["decision"]) for window in data["windows"]]
    return data["ring_digest"], decisions, [version["sha256"] for version in data["versions"]]
