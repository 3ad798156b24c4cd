"""What must be found out: LMDB without its syncs (`sync=False`), as many examples on the web open it.

Not our code. The explorer is run on it to show that it can find faults at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import lmdb

from tests.crash.audit import Violation, acknowledged_numbers
from tests.crash.plan import say

__all__ = ["audit", "prepare", "run"]

COMMITS = 60
SYNC_EVERY = 15


def _open(root: Path, sync: bool) -> lmdb.Environment:
    return lmdb.open(str(root / "env"), map_size=1 << 20, sync=sync, lib_version=0)


def _rows(seed: int, number: int) -> dict[bytes, bytes]:
    digest = hashlib.shake_128(f"rows {seed} {number}".encode()).digest(500)
    # A new row, one that every commit overwrites, and the oldest one gone.
    return {b"row %06d" % number: digest, b"state": b"%d" % number}


def prepare(root: Path, seed: int) -> None:
    """An environment that was closed well."""
    with _open(root, sync=True) as env, env.begin(write=True) as txn:
        txn.put(b"state", b"0")


def run(root: Path, seed: int) -> None:
    """The part that is recorded."""
    with _open(root, sync=False) as env:
        for number in range(1, COMMITS + 1):
            say(f"try commit {number}")
            with env.begin(write=True) as txn:
                for key, value in _rows(seed, number).items():
                    txn.put(key, value)
                txn.delete(b"row %06d" % (number - 20))
            if number % SYNC_EVERY == 0:
                env.sync(True)
            say(f"ack commit {number}")


def audit(root: Path, seed: int, book: Sequence[str], heard: int) -> None:
    """The rows are those of one commit, not older than the last acknowledged one."""
    acknowledged, tried = acknowledged_numbers(book[:heard], "commit")
    try:
        with _open(root, sync=True) as env, env.begin() as txn:
            rows = {bytes(key): bytes(value) for key, value in txn.cursor()}
    except lmdb.Error as error:
        raise Violation("opens", str(error)) from error
    commits = int(rows.get(b"state", b"-1"))
    expected = {b"state": b"%d" % commits}
    for number in range(max(1, commits - 19), commits + 1):
        expected |= {key: value for key, value in _rows(seed, number).items() if key != b"state"}
    if rows != expected:
        raise Violation("atomic", f"the rows are not those of commit {commits}")
    if not acknowledged <= commits <= tried:
        raise Violation("I1", f"commit {acknowledged} was acknowledged, {commits} is there")
