"""One file replaced again and again (`write_file_durably`), longer and shorter than before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from storage.durable import write_file_durably
from tests.crash.audit import Violation, acknowledged_numbers
from tests.crash.plan import say

__all__ = ["audit", "content", "prepare", "run"]

TIMES = 20


def content(seed: int, number: int) -> bytes:
    """What the file holds after replacement `number`: 17 bytes to 17 KiB."""
    length = 17 << (number * 7 % 11)
    return hashlib.shake_128(f"file {seed} {number}".encode()).digest(length)


def prepare(root: Path, seed: int) -> None:
    """Content number 0, which was there before."""
    (root / "report.json").write_bytes(content(seed, 0))


def run(root: Path, seed: int) -> None:
    """The part that is recorded."""
    for number in range(1, TIMES + 1):
        say(f"try file {number}")
        write_file_durably(root / "report.json", content(seed, number))
        say(f"ack file {number}")


def audit(root: Path, seed: int, book: Sequence[str], heard: int) -> None:
    """The file is one of those that were written, whole, and not older than the last acknowledged one."""
    acknowledged, tried = acknowledged_numbers(book[:heard], "file")
    try:
        found = (root / "report.json").read_bytes()
    except OSError as error:
        raise Violation("I1", f"the file is gone: {error.strerror}") from error
    written = [number for number in range(tried + 1) if found == content(seed, number)]
    if not written:
        raise Violation("atomic", f"a mixture of {len(found)} bytes")
    if written[0] < acknowledged:
        raise Violation("I1", f"replacement {acknowledged} was acknowledged, {written[0]} is there")
    write_file_durably(root / "report.json", b"next")
    if (root / "report.json").read_bytes() != b"next":
        raise Violation("goes on", "the next replacement did not happen")
