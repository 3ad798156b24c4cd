"""What must be found out: files replaced without a sync of the file, or without one of their folder.

Not our code. The explorer is run on it to show that it can find faults at all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tests.crash import workload_replace
from tests.crash.plan import say
from tests.crash.workload_replace import TIMES, content

__all__ = ["audit", "prepare", "run"]

prepare = workload_replace.prepare


def run(root: Path, seed: int) -> None:
    """The part that is recorded: odd replacements forget the file's sync, even ones the folder's."""
    for number in range(1, TIMES + 1):
        say(f"try file {number}")
        with (root / "report.json.tmp").open("wb") as file:
            file.write(content(seed, number))
            file.flush()
            if number % 2 == 0:
                os.fsync(file.fileno())
        (root / "report.json.tmp").rename(root / "report.json")
        if number % 2:
            fd = os.open(root, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        say(f"ack file {number}")


def audit(root: Path, seed: int, book: Sequence[str], heard: int) -> None:
    """The same audit as that of the careful way."""
    workload_replace.audit(root, seed, book, heard)
