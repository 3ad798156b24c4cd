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
_DAMAGED = (StorageError, msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError)


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
        lost.append("what the last transaction wrote may be among them")
        _put_right(rows, lost)
        known = {msgspec.msgpack.decode(v, type=VersionRow).folder for k, v in rows.items() if k[:1] == b"V"}
        if strangers := [name for name in versions if name not in known and not name.endswith(".tmp")]:
            lost.append(f"the rows of {', '.join(strangers)}")
    create_environment(aside, registry.MAP_BYTES, first_rows(rows))
    rename_durably(folder, target)
    rename_durably(aside, folder)
    said = "nothing is lost" if proved else "; ".join(["rows are lost", *lost])
    return (
        f"the registry was damaged and is rebuilt with {len(rows)} rows; {said}; the old one lies in {target}"
    )


def _registry_rows(folder: Path) -> tuple[dict[bytes, bytes], bool]:
    """Rows whose seals hold, unsealed, and whether they are proved to be the newest."""
    if not (folder / "data.mdb").is_file():
        return {}, False
    best: tuple[int, dict[bytes, bytes]] = (-1, {})
    whole: tuple[int, dict[bytes, bytes]] = (-1, {})
    with PageFile(folder / "data.mdb") as file:
        metas, wrong = read_metas(file)
        trees = [(meta.main.root, meta.last_page) for meta in metas]
        loose: list[tuple[int, dict[bytes, bytes]]] = []
        leaves: list[tuple[int, int]] = []
        for page, found in itertools.groupby(raw_items(file, orphans=False), lambda item: item.page):
            rows, txn, _ = _sealed_rows(found)
            loose.append((txn, rows))
            leaves.append((txn, page))
        for txn, page in sorted(leaves, reverse=True)[:MAX_STATES]:
            if txn > 0:
                trees += ((root, file.pages - 1) for root in root_candidates(file, page)[:MAX_ROOTS])
        newest = max([0, *(txn for txn, _ in leaves), *(meta.txn for meta in metas if not wrong)])
        for root, last_page in trees:
            rows, txn, total = _sealed_rows(items(file, root, last_page=last_page, problems=[]))
            if total == 0 and txn > whole[0]:
                whole = (txn, rows)
            if txn > best[0]:
                best = (txn, rows)
    if whole[0] > 0:  # one transaction back, if that is all that is whole: its steps are taken again
        certain = len(metas) == 2 or whole[0] > max(meta.txn for meta in metas)
        return whole[1], whole[0] >= newest and certain
    merged: dict[bytes, bytes] = {}
    for _, rows in sorted(loose, key=lambda found: found[0]):
        merged |= rows
    # Versions never change; of the rest only what the best tree holds is not too old for sure.
    kept = {key: value for key, value in merged.items() if key[:1] in (b"V", b"c", b"q", b"n", b"U")}
    return {**kept, **best[1]}, False


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
