"""What every bench prints: a table for people, one JSON line last."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

__all__ = ["finish", "machine", "table"]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; the first column to the left, the others to the right."""
    cells = [[str(column) for column in columns], *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    print(f"\n{title}")
    for n, row in enumerate(cells):
        line = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, len(row)))]
        print("  " + "  ".join(line).rstrip())
        if n == 0:
            print("  " + "  ".join("-" * width for width in widths))


def finish(bench: str, **figures: object) -> None:
    """Print the JSON line that machines read."""
    print("\n" + json.dumps({"bench": bench, "machine": machine(), **figures}), flush=True)


def machine() -> str:
    """Where this ran, as far as figures depend on it."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release().partition('-')[0]}"


def _text(cell: object) -> str:
    match cell:
        case bool() | str() | None:
            return str(cell)
        case int():
            return f"{cell:,}"
        case float():
            return f"{cell:,.3f}" if abs(cell) < 10 else f"{cell:,.1f}"
        case _:
            return str(cell)
