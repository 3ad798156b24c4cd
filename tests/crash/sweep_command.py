"""The command line of a sweep: run it, or one chain of it again."""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from tests.crash import ingest_chain, publish_chain
from tests.crash.lives import Lives

__all__ = ["Counted", "run_sweep"]


class Counted(Protocol):
    """What a sweep counts; its text is the last line of progress."""

    violations: list[str]


C = TypeVar("C", bound=Counted)


def run_sweep(
    doc: str | None,
    what: str,
    count: int,
    sweep: Callable[[int, int, Callable[[str], None]], C],
    chain: Callable[[Lives, Lives, int, int], C],
) -> int:
    """Be the command.

    Args:
        doc: Its help.
        what: What is counted, the name of the option.
        count: Its default.
        sweep: Runs at least so many under a seed, with a line of progress now and then.
        chain: Runs the chain of a seed and number, on processes of ingest and of trainers.
    Returns: 1 if anything did not hold.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument(f"--{what}", type=int, default=count, dest="count")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--chain", type=int, help="only this one")
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    if chosen.chain is None:
        counts = sweep(chosen.count, chosen.seed, lambda line: print(line, flush=True))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            with Lives(ingest_chain.PROGRAM, folder) as one, Lives(publish_chain.PROGRAM, folder) as other:
                counts = chain(one, other, chosen.seed, chosen.chain)
    print(counts, *counts.violations, sep="\n")
    return 1 if counts.violations else 0
