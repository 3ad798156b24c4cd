"""Make a registry anew from the rows of a damaged one whose seals hold; the damaged one is kept aside."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from storage import registry
from storage.durable import rename_durably
from storage.env import create_environment
from storage.errors import StorageError
from storage.pages import Item, PageFile, items, raw_items, read_metas, root_candidates
from storage.registry import UpdateRow, VersionRow, first_rows
from storage.rows import sum_of, unseal
from storage.salvage import set_aside

__all__ = ["rebuild_registry"]

MAX_STATES = 4  # raw state rows whose trees are looked for
MAX_ROOTS = 8


def rebuild_registry(folder: Path, quarantine: Path, versions: Sequence[str]) -> str:
    """Set a damaged registry aside and make a new one of the rows whose seals hold. Nobody may have it open.

    What is lost is put on the safe side: an unknown active version becomes the base; an update whose row is
    lost and whose version is there counts as decided; no window is decided twice.

    Args:
        versions: Names of the version folders: a version whose row is lost is named in the words returned.
    Returns: What was done, for log and audit. The steps are those of `rebuild`.
    """
    aside, target = set_aside(folder, quarantine)
    rows, proved = _registry_rows(folder)
    lost: list[str] = []
    if not proved:
        _put_right(rows, lost)
        known = {msgspec.msgpack.decode(v, type=VersionRow).folder for k, v in rows.items() if k[:1] == b"V"}
        if strangers := [name for name in versions if name not in known and not name.endswith(".tmp")]:
            lost.append(f"the rows of {', '.join(strangers)}")
    create_environment(aside, registry.MAP_BYTES, first_rows(rows))
    rename_durably(folder, target)
    rename_durably(aside, folder)
    said = "nothing is lost" if proved else "; ".join(["rows are lost, older ones stand in for them", *lost])
    return (
        f"the registry was damaged and is rebuilt with {len(rows)} rows; {said}; the old one lies in {target}"
    )


def _registry_rows(folder: Path) -> tuple[dict[bytes, bytes], bool]:
    """Rows whose seals hold, unsealed, and whether they are proved to be those of the last transaction.

    If they are not: those of the newest tree, and for what is missing in it those of the newest tree that is
    whole. But never its active pointer: what was rolled back must not become active again by itself.
    """
    if not (folder / "data.mdb").is_file():
        return {}, False
    versions: dict[bytes, bytes] = {}
    leaves: list[tuple[int, int]] = []  # transaction that a state row names, its page
    top: tuple[int, dict[bytes, bytes]] = (-1, {})
    whole: tuple[int, dict[bytes, bytes]] = (-1, {})
    with PageFile(folder / "data.mdb") as file:
        metas, wrong = read_metas(file)
        for page, found in itertools.groupby(raw_items(file, orphans=False), lambda item: item.page):
            rows, txn, _ = _sealed_rows(found)
            versions |= {key: value for key, value in rows.items() if key[:1] == b"V"}
            leaves.append((txn, page))
        # A meta page that may be the damaged one is only believed as far as its state row says the same.
        trees = [(meta.main.root, meta.last_page, -1 if wrong else meta.txn) for meta in metas]
        for txn, page in sorted(leaves, reverse=True)[:MAX_STATES]:
            if txn > 0:
                trees += ((root, file.pages - 1, -1) for root in root_candidates(file, page)[:MAX_ROOTS])
        newest = max([0, *(txn for txn, _ in leaves), *(txn for _, _, txn in trees)])
        for root, last_page, said in trees:
            rows, txn, total = _sealed_rows(items(file, root, last_page=last_page, problems=[]))
            if total == 0 and txn > max(0, whole[0]):
                whole = (txn, rows)
            if max(txn, said) > top[0]:
                top = (max(txn, said), rows)
    certain = len(metas) == 2 or whole[0] > max([0, *(meta.txn for meta in metas)])
    if whole[0] >= max(newest, 1) and certain:
        return whole[1], True
    older = {key: value for key, value in whole[1].items() if key != b"a"}
    return {**versions, **older, **top[1]}, False


def _sealed_rows(found: Iterator[Item]) -> tuple[dict[bytes, bytes], int, int]:
    """Rows whose seals hold, the transaction of their state row, and their sum XOR the one that it states."""
    rows: dict[bytes, bytes] = {}
    txn, total = -1, 0
    for item in found:
        if item.value is None or item.key == b"H":
            continue
        with contextlib.suppress(
            StorageError, msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError
        ):
            value = unseal(item.key, item.value)
            if item.key == b"s":
                state = msgspec.msgpack.decode(value)
                txn, total = int(state["txn"]), total ^ int(state["rows_sum"])
            else:
                rows[item.key] = value
                total ^= sum_of(item.value)
    return rows, txn, total


def _put_right(rows: dict[bytes, bytes], lost: list[str]) -> None:
    """Fill in what can be told from other rows, and name what cannot."""
    if b"a" not in rows and any(key[:1] == b"V" for key in rows):
        lost.append("which version is active: the base is, promote one with 'edgewater versions promote'")
    cursors: dict[bytes, int] = {}
    for key, value in rows.items():
        if key[:1] == b"U":
            update = msgspec.msgpack.decode(value, type=UpdateRow)
            if update.decided:
                name = b"c" + update.shard.encode()
                cursors[name] = max(cursors.get(name, 0), update.last_window)
        elif key[:1] == b"V":
            version = msgspec.msgpack.decode(value, type=VersionRow)
            name = b"c" + version.shard.encode()
            cursors[name] = max(cursors.get(name, 0), version.window)
    for name, window in cursors.items():
        known = int.from_bytes(rows.get(name, b""), "big")
        rows[name] = max(window, known).to_bytes(8, "big")
    # An update behind the cursor was decided, whatever an old copy of its row says.
    for key in [key for key in rows if key[:1] == b"U"]:
        update = msgspec.msgpack.decode(rows[key], type=UpdateRow)
        if not update.decided and update.window <= int.from_bytes(
            rows.get(b"c" + update.shard.encode(), b""), "big"
        ):
            del rows[key]
            lost.append(f"how the update of window {update.window} ended")
