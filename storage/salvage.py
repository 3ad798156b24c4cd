"""Make a ring anew from what is good in a damaged one; the damaged one is kept aside whole.

What is looked for, in this order: the newest snapshot whose rows and blocks add up to the sums in its state
row (then nothing is lost, however damaged the meta pages are); else the snapshot of a whole meta page; else
the newest state row there is, or none. What its tree does not reach is taken from pages that no tree names,
as far as its own seal or checksum holds and it cannot be older than what was there: blocks only if nothing
was ever forgotten, or if the sum of all blocks proves that they are the newest. Samples that remain lost
become blank, so that seqs, windows and counters go on.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import logging
import operator
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import lmdb
import msgspec

from storage.block import block_checksum, decode_block, verify_block
from storage.build import FILLED, build_ring, newest_first, quarantine_row, room_for
from storage.dictionary import Dictionary, read_dictionary_file
from storage.durable import (
    fsync_folder,
    make_private_folder,
    remove_folder,
    rename_durably,
    write_file_durably,
)
from storage.errors import CorruptBlockError, StorageError, WriteFailedError
from storage.pages import Item, Meta, PageFile, items, newest_meta, raw_items, read_metas, root_candidates
from storage.ring_header import RING_FORMAT, read_ring_header
from storage.ring_writer import BLOCKS, HEADER, STATE, U32, U64, block_key
from storage.rows import seal, sum_of, unseal
from storage.samples import Samples
from storage.windows import ClosedWindow, DeadLetter, OpenWindow, RingHeader, RingState

__all__ = ["SalvageReport", "finish_rebuild", "rebuild", "set_aside"]

KEPT_FOLDERS = 2  # in quarantine, the newest: each is as large as the ring
SPARE_BYTES = 4 << 20  # beside the file of the new one
MAX_STATES = 4  # raw state rows whose trees are looked for
MAX_ROOTS = 8
LARGEST_HOLE = 1_000_000  # before the oldest good block; a larger one is given up instead of filled
_REPORT = "salvage.json"
_OLD_BLOCKS = b"b"  # of format 1
log = logging.getLogger("edgewater.salvage")


class SalvageReport(msgspec.Struct):
    """What a rebuilt ring holds, and exactly what is lost.

    Attributes:
        shard: Which ring.
        moved_to: Where the damaged one is now.
        proved: Whether sums prove that rows and blocks are those of the newest state: nothing is lost then.
        commits: Number of the commit that the ring goes on after; 0 if no state row was found.
        lost_commits: How many commits after it there may have been.
        samples: Samples kept.
        lost: Runs of seqs that are blank now, or gone at the old end: (first, last).
        lost_rows: Rows that are missing: "windows 3 to 4", "positions", "dead letters 7 to 9".
        new_secret: Whether the header was lost: what was seen before is not recognized when it comes again.
        from_free_pages: Blocks found in pages that the tree no longer reached.
    """

    shard: str
    moved_to: str = ""
    proved: bool = False
    commits: int = 0
    lost_commits: int = 0
    samples: int = 0
    lost: list[tuple[int, int]] = []
    lost_rows: list[str] = []
    new_secret: bool = False
    from_free_pages: int = 0

    @property
    def lost_samples(self) -> int:
        """How many samples are lost."""
        return sum(last - first + 1 for first, last in self.lost)

    def words(self) -> str:
        """One sentence for the log and the audit."""
        parts = [f"ring {self.shard} was damaged and is rebuilt with {self.samples:,} samples"]
        if self.proved:
            parts.append("nothing is lost")
        if self.lost:
            runs = ", ".join(f"{first} to {last}" for first, last in self.lost[:5])
            more = f" and {len(self.lost) - 5} more runs" if len(self.lost) > 5 else ""
            parts.append(f"{self.lost_samples:,} are lost (seqs {runs}{more})")
        if not self.commits:
            parts.append("its state row is lost: counters begin anew")
        elif self.lost_commits:
            parts.append(f"up to {self.lost_commits} commits after commit {self.commits} are lost")
        parts += (f"lost: {row}" for row in self.lost_rows)
        if self.new_secret:
            parts.append("the secret of the dedup hashes is lost: what was stored before may be stored again")
        if self.moved_to:
            parts.append(f"the damaged one lies in {self.moved_to}")
        return "; ".join(parts)


class _Block(msgspec.Struct, frozen=True):
    first_seq: int
    samples: int
    revision: int
    checksum: int
    arrival: float
    tokens: int
    at: int
    size: int

    @property
    def end_seq(self) -> int:
        return self.first_seq + self.samples


class _Snapshot(msgspec.Struct):
    """What one tree holds, as far as seals and checksums vouch for it: places in the file, not bytes."""

    state: RingState | None = None
    header: RingHeader | None = None
    rows: dict[bytes, tuple[int, int]] = {}
    blocks: dict[int, _Block] = {}
    rows_sum: int = 0
    blocks_sum: int = 0
    damaged: int = 0
    tokenizer_id: str = ""

    @property
    def proved(self) -> bool:
        """Whether this is exactly what the commit that wrote the state row left."""
        state = self.state
        return (
            state is not None
            and not self.damaged
            and (state.rows_sum, state.blocks_sum) == (self.rows_sum, self.blocks_sum)
        )


class _Raw(msgspec.Struct):
    """What lies anywhere in the file, in use or not."""

    states: list[tuple[RingState, int]] = []  # with the leaf page
    header: RingHeader | None = None
    rows: dict[bytes, tuple[int, int]] = {}
    blocks: list[_Block] = []
    tokenizer_id: str = ""


# -- the order of things ----------------------------------------------------------------------------


def rebuild(
    folder: Path,
    quarantine: Path,
    *,
    tokenizer_id: str = "",
    max_bytes: int = 0,
    least_window: int = 1,
    least_seq: int = 0,
    dedup_key: bytes = b"",
) -> SalvageReport:
    """Set a damaged ring aside and make a new one of what is good in it. Nobody may have it open.

    Args:
        folder: The ring's folder, named as its shard.
        quarantine: Where the damaged one goes, as ring-<shard>-<n>.
        tokenizer_id, max_bytes: For the new ring where the damaged one does not say.
        least_window, least_seq: Numbers that the registry has not used yet; the ring goes on from there
            at least, so that no number is used twice.
        dedup_key: That of the host's other shards, where the damaged one does not say; empty makes a new one.
    Returns: What is lost. Without a ring if nothing was found and `tokenizer_id` or `max_bytes` is not given:
        ingest makes a new one then.
    Raises: StorageError if the disk has no room for a second ring; FormatTooNewError.
    """
    # 1. <shard>.rebuilt.new/ made of what is good, synced.   Crash: the damaged ring is still in place;
    #                                                         begun anew at the next start.
    # 2. The report, beside the damaged data file.            Crash: as before.
    # 3. The damaged ring renamed into quarantine, synced.    Crash: no ring under its name, and a whole one
    #                                                         aside: finish_rebuild() takes step 4.
    # 4. <shard>.rebuilt.new renamed to <shard>, synced.      From here the ring is the new one.
    try:
        aside, target = set_aside(folder, quarantine)
        report = _make_anew(folder, aside, tokenizer_id, max_bytes, least_window, least_seq, dedup_key)
        report.moved_to = str(target)
        write_file_durably(folder / _REPORT, msgspec.json.encode(report) + b"\n")
        rename_durably(folder, target)
        if aside.exists():
            rename_durably(aside, folder)
    except (lmdb.Error, OSError) as error:
        hint = "free some space, or check the disk; the next start tries again"
        raise WriteFailedError(f"cannot be rebuilt: {error}", path=folder, hint=hint) from error
    log.error("%s", report.words())
    return report


def set_aside(folder: Path, quarantine: Path) -> tuple[Path, Path]:
    """Make room for a rebuild. Returns: where the new one is made, and where the damaged one will go."""
    aside = _aside(folder)
    remove_folder(aside)
    make_private_folder(quarantine)
    prefix = f"ring-{folder.name}" if folder.parent.name == "ring" else folder.name
    # Only the newest damaged ones are kept: a fault that comes back must not fill the disk. And none where
    # they take the room that the new one needs: then ingest would never start again.
    held = [path for path in quarantine.glob(f"{prefix}-*") if path.name.rsplit("-", 1)[1].isdigit()]
    held.sort(key=lambda path: int(path.name.rsplit("-", 1)[1]))
    number = 1 + max((int(path.name.rsplit("-", 1)[1]) for path in held), default=0)
    target = quarantine / f"{prefix}-{number}"
    kept = KEPT_FOLDERS - 1 if _has_room(folder) else 0
    for path in held[: max(0, len(held) - kept)]:
        remove_folder(path)
    fsync_folder(quarantine)
    return aside, target


def _has_room(folder: Path) -> bool:
    """Whether the disk takes a second one as large."""
    with contextlib.suppress(FileNotFoundError):
        return shutil.disk_usage(folder).free > (folder / "data.mdb").stat().st_size + SPARE_BYTES
    return True


def finish_rebuild(folder: Path) -> bool:
    """Finish or undo what a crash left of a rebuild. Returns: whether a ring was put into its place."""
    aside = _aside(folder)
    if not aside.exists():
        return False
    if folder.exists():
        remove_folder(aside)  # it may not be whole: begun anew if the ring is still damaged
        return False
    rename_durably(aside, folder)
    return True


def _aside(folder: Path) -> Path:
    return folder.with_name(folder.name + ".rebuilt.new")


# -- finding ----------------------------------------------------------------------------------------


def _walk(file: PageFile, folder: Path, found: Iterator[Item]) -> _Snapshot:
    """Keep what a walk yields if its seal or checksum holds."""
    snapshot = _Snapshot()
    for item in found:
        assert item.value is not None
        try:
            if item.key[:1] in (BLOCKS, _OLD_BLOCKS):
                block = _block_of(item)
                snapshot.blocks[block.first_seq] = block
                snapshot.blocks_sum ^= block.checksum
            elif item.key == HEADER:
                snapshot.header = read_ring_header(item.value, folder)
            elif item.key == STATE:
                snapshot.state = msgspec.msgpack.decode(unseal(STATE, item.value), type=RingState)
            else:
                unseal(item.key, item.value)
                snapshot.rows[item.key] = (item.at, item.size)
                snapshot.rows_sum ^= sum_of(item.value)
        except (StorageError, msgspec.MsgspecError, UnicodeDecodeError):
            snapshot.damaged += 1
    return snapshot


def _block_of(item: Item) -> _Block:
    """Raises: CorruptBlockError unless it is whole and lies where it belongs."""
    assert item.value is not None
    header = verify_block(item.value)
    keys = (b"", block_key(header.first_seq), U64.pack(_OLD_BLOCKS, header.first_seq))
    if item.key not in keys or (item.key and header.block_bytes != item.size):
        raise CorruptBlockError("lies under another key")
    return _Block(
        header.first_seq,
        header.samples,
        header.revision,
        block_checksum(item.value),
        header.arrival,
        header.tokens,
        item.at,
        header.block_bytes,
    )


def _scan(file: PageFile, folder: Path) -> _Raw:
    """Everything in the file whose seal or checksum holds, stale copies too."""
    raw = _Raw()
    ranks: dict[bytes, int] = {}
    for page, found in itertools.groupby(raw_items(file), lambda item: item.page):
        # The rows that a commit touches share a page with its state: so the newest copy of each is told.
        rank, rows = 0, {}
        for item in found:
            assert item.value is not None
            with contextlib.suppress(StorageError, msgspec.MsgspecError, UnicodeDecodeError):
                if item.key[:1] in (BLOCKS, _OLD_BLOCKS, b""):
                    raw.blocks.append(_block_of(item))
                    raw.tokenizer_id = verify_block(item.value).tokenizer_id
                elif item.key == HEADER:
                    raw.header = read_ring_header(item.value, folder)
                elif item.key == STATE:
                    state = msgspec.msgpack.decode(unseal(STATE, item.value), type=RingState)
                    raw.states.append((state, page))
                    rank = state.commits + 1
                else:
                    unseal(item.key, item.value)
                    rows[item.key] = (item.at, item.size)
        for key, place in rows.items():
            if rank >= ranks.get(key, 0):
                raw.rows[key], ranks[key] = place, rank
    raw.states.sort(key=lambda found: (found[0].txn, found[0].commits), reverse=True)
    return raw


def _choose(file: PageFile, folder: Path, metas: list[Meta], raw: _Raw) -> _Snapshot:
    """The snapshot to go on from; see the module's text."""
    anchored: dict[int, _Snapshot] = {}
    for meta in metas:
        found = items(file, meta.main.root, last_page=meta.last_page, problems=[])
        anchored[meta.txn] = _walk(file, folder, found)
    by_txn = {meta.txn: meta for meta in metas}
    for state, page in raw.states[:MAX_STATES]:
        snapshot = anchored.get(state.txn)
        if snapshot is not None and snapshot.state == state:
            return snapshot  # its meta page names it: it was committed, whatever else is damaged
        for root in reversed(root_candidates(file, page)[:MAX_ROOTS]):
            snapshot = _walk(file, folder, items(file, root, last_page=file.pages - 1, problems=[]))
            if snapshot.proved and snapshot.state == state:
                return snapshot
    # No tree leads to a state row. The newest meta page may still lead to the rest.
    best = anchored[newest_meta(metas).txn] if by_txn else _Snapshot()
    best.state = raw.states[0][0] if raw.states else None
    best.damaged += 1
    return best


# -- putting together -------------------------------------------------------------------------------


class _Plan(msgspec.Struct):
    """What the new ring will hold."""

    header: RingHeader
    state: RingState
    rows: dict[bytes, bytes]
    blocks: list[_Block]
    holes: list[tuple[int, int]]  # first seq, end
    map_bytes: int


def _make_anew(
    folder: Path,
    aside: Path,
    tokenizer_id: str,
    max_bytes: int,
    least_window: int,
    least_seq: int,
    dedup_key: bytes,
) -> SalvageReport:
    report = SalvageReport(shard=folder.name)
    if not (folder / "data.mdb").is_file():
        report.lost_rows.append("everything: there is no data file")
        return report
    with PageFile(folder / "data.mdb") as file:
        metas, _ = read_metas(file)
        raw = _scan(file, folder)
        snapshot = _choose(file, folder, metas, raw)
        report.commits = snapshot.state.commits if snapshot.state else 0
        report.lost_commits = _lost_commits(snapshot.state, metas, raw) if snapshot.state else 0
        header = snapshot.header or raw.header
        if header is None:
            tokenizer_id = tokenizer_id or raw.tokenizer_id
            if not tokenizer_id:
                report.lost_rows.append("everything: nothing in it can be read")
                return report
            report.new_secret = not dedup_key
            header = RingHeader(RING_FORMAT, folder.name, tokenizer_id, dedup_key or secrets.token_bytes(32))
        # A file of a strange length was cut, or has something at its end: its map says how large it was.
        sizes = {meta.map_bytes for meta in metas}
        map_bytes = sizes.pop() if len(sizes) == 1 else max_bytes or file.size // 4096 * 4096
        newest_txn = max((meta.txn for meta in metas), default=0)
        blocks, holes = _choose_blocks(snapshot, raw, newest_txn, map_bytes, report)
        rows = _choose_rows(file, snapshot, raw)
        dictionaries = _dictionaries(folder, rows)
        rows |= {U32.pack(b"Z", number): found.data for number, found in dictionaries.items()}
        report.proved = not report.lost_commits and _proves(snapshot.state, rows, blocks)
        state = _choose_state(file, snapshot.state, rows, blocks, dictionaries)
        ends = [*(block.end_seq for block in blocks[-1:]), *(end for _, end in holes[-1:])]
        if ends and state.next_seq > max(ends):
            holes.append((max(ends), state.next_seq))
        plan = _Plan(header, state, rows, blocks, holes, map_bytes)
        _fill_windows(plan, report)
        _after_registry(plan, least_window, least_seq, report)
        _report_rows(plan, snapshot, report)
        _write(file, folder, aside, plan)
    report.samples = sum(block.samples for block in plan.blocks)
    report.lost += [(first, end - 1) for first, end in plan.holes]
    return report


def _proves(state: RingState | None, rows: dict[bytes, bytes], blocks: list[_Block]) -> bool:
    """Whether these are the rows and blocks that a state row sums up, no more and no less."""
    if state is None:
        return False
    return (_sum_of_rows(rows), _sum(blocks)) == (state.rows_sum, state.blocks_sum)


def _sum_of_rows(rows: dict[bytes, bytes]) -> int:
    return functools.reduce(operator.xor, (sum_of(seal(key, value)) for key, value in rows.items()), 0)


def _lost_commits(state: RingState, metas: list[Meta], raw: _Raw) -> int:
    """How many commits may have come after the one that wrote a state row."""
    newest = max((other.txn for other, _ in raw.states), default=0)
    agreeing = len(metas) == 2 and abs(metas[0].txn - metas[1].txn) == 1 and metas[0].txn & 1 == 0
    whole = [
        meta.txn for meta in metas if meta.txn & 1 == meta.index and (agreeing or meta.txn <= newest + 1)
    ]
    if whole and not agreeing and state.txn == max(whole) and len(metas) == 1:
        # Transaction t lies on page t & 1: the lost page is of the transaction before this one, or after it.
        newest = max(newest, state.txn + 1)
    return max([newest, *whole]) - state.txn


def _choose_blocks(
    snapshot: _Snapshot, raw: _Raw, newest_txn: int, map_bytes: int, report: SalvageReport
) -> tuple[list[_Block], list[tuple[int, int]]]:
    """Blocks in the order of their seqs, and the runs between them that no block fills."""
    state, held = snapshot.state, snapshot.blocks
    # A copy in a free page may be older than a forgetting: the revision tells, the sum proves.
    forgetful = any(block.revision for block in (*raw.blocks, *held.values())) or bool(
        state and state.forgotten
    )
    if state is None:
        blocks = _newest_run([*held.values(), *([] if forgetful else raw.blocks)])
        holes: list[tuple[int, int]] = []
    else:
        inside = {seq: b for seq, b in held.items() if state.tail_seq <= seq and b.end_seq <= state.next_seq}
        spare = raw.blocks
        if report.lost_commits:
            # The lost one may have forgotten samples. A copy of a higher revision tells.
            inside = {seq: b for seq, b in inside.items() if not _is_stale(b, raw.blocks)}
            spare = [block for block in raw.blocks if not _is_stale(block, raw.blocks)]
        blocks, holes = _fill(inside, spare, state.tail_seq, state.next_seq)
        if forgetful and _sum(blocks) != state.blocks_sum:
            blanked = [block for block in spare if block.revision]
            blocks, holes = _fill(inside, blanked, state.tail_seq, state.next_seq)
        elif state.txn < newest_txn or not newest_txn:
            blocks += _follow(raw.blocks, state.next_seq)
    report.from_free_pages = sum(block.first_seq not in held for block in blocks)
    size = cut = 0
    for block in reversed(blocks):
        size += room_for(block.size)
        if size > FILLED * map_bytes:
            cut = block.end_seq
            break
    if holes and blocks and blocks[0].first_seq - holes[0][0] > LARGEST_HOLE:
        cut = max(cut, blocks[0].first_seq)
    if cut:
        oldest = min(first for first, _ in [(blocks[0].first_seq, 0), *holes])
        report.lost.append((oldest, cut - 1))
        blocks = [block for block in blocks if block.first_seq >= cut]
        holes = [(max(first, cut), end) for first, end in holes if end > cut]
    return blocks, holes


def _is_stale(block: _Block, others: list[_Block]) -> bool:
    """Whether samples in it were blanked since: any copy of them with a higher revision is newer."""
    return any(
        other.revision > block.revision
        and other.first_seq < block.end_seq
        and block.first_seq < other.end_seq
        for other in others
        if other.revision
    )


def _sum(blocks: list[_Block]) -> int:
    total = 0
    for block in blocks:
        total ^= block.checksum
    return total


def _fill(
    held: dict[int, _Block], spare: list[_Block], tail: int, end: int
) -> tuple[list[_Block], list[tuple[int, int]]]:
    """Cover the seqs from `tail` to `end` with blocks of the tree, and spare ones where it has none."""
    by_start: dict[int, list[_Block]] = {}
    for block in spare:
        if tail <= block.first_seq and block.end_seq <= end:
            by_start.setdefault(block.first_seq, []).append(block)
    starts = sorted({*held, *by_start})
    tree = sorted(held)
    blocks: list[_Block] = []
    holes: list[tuple[int, int]] = []
    at = tail
    while at < end:
        if at in held:
            blocks.append(held[at])
            at = held[at].end_seq
            continue
        limit = _next(tree, at, end)
        fitting = [block for block in by_start.get(at, []) if block.end_seq <= limit]
        if fitting:
            blocks.append(max(fitting, key=lambda block: (block.revision, block.samples)))
            at = blocks[-1].end_seq
            continue
        after = _next(starts, at, end)
        if holes and holes[-1][1] == at:
            holes[-1] = (holes[-1][0], after)
        else:
            holes.append((at, after))
        at = after
    return blocks, holes


def _next(starts: list[int], at: int, end: int) -> int:
    i = bisect.bisect_right(starts, at)
    return min(starts[i], end) if i < len(starts) else end


def _follow(spare: list[_Block], seq: int) -> list[_Block]:
    """Blocks of commits after the newest state row that was found, as far as they follow each other."""
    by_start: dict[int, _Block] = {}
    for block in spare:
        if block.first_seq not in by_start or block.samples > by_start[block.first_seq].samples:
            by_start[block.first_seq] = block
    found = []
    while seq in by_start:
        found.append(by_start[seq])
        seq = found[-1].end_seq
    return found


def _newest_run(blocks: list[_Block]) -> list[_Block]:
    """The blocks that follow each other up to the highest seq."""
    by_end: dict[int, _Block] = {}
    for block in blocks:
        if block.end_seq not in by_end or block.samples > by_end[block.end_seq].samples:
            by_end[block.end_seq] = block
    run: list[_Block] = []
    end = max(by_end, default=0)
    while end in by_end:
        run.append(by_end[end])
        end = run[-1].first_seq
    return run[::-1]


def _choose_rows(file: PageFile, snapshot: _Snapshot, raw: _Raw) -> dict[bytes, bytes]:
    """Rows of the tree; where some are missing, copies from anywhere that are not out of bounds."""
    places, state = dict(snapshot.rows), snapshot.state
    if state is None or state.rows_sum != snapshot.rows_sum:
        places = {**raw.rows, **places}
    rows = {key: unseal(key, file.read(at, size)) for key, (at, size) in places.items()}
    if state is None:
        return rows
    return {
        key: value
        for key, value in rows.items()
        if not (key[:1] == b"W" and U32.unpack(key)[1] >= state.window.window)
        and not (key[:1] == b"D" and not state.dead_first <= U64.unpack(key)[1] < state.dead_next)
    }


def _dictionaries(folder: Path, rows: dict[bytes, bytes]) -> dict[int, Dictionary]:
    found = {}
    for path in folder.glob("dictionary-*"):
        with contextlib.suppress(ValueError, OSError):
            number = int(path.name.partition("-")[2], 16)
            if copy := read_dictionary_file(folder, number):
                found[number] = copy
    for key, value in rows.items():
        if key[:1] == b"Z":
            found[U32.unpack(key)[1]] = Dictionary(value)
    return found


def _choose_state(
    file: PageFile,
    state: RingState | None,
    rows: dict[bytes, bytes],
    blocks: list[_Block],
    dictionaries: dict[int, Dictionary],
) -> RingState:
    """The state row to go on from: as found, grown by blocks that came after it, or made of the rest."""
    windows = [msgspec.msgpack.decode(v, type=ClosedWindow) for k, v in sorted(rows.items()) if k[:1] == b"W"]
    letters = {U64.unpack(key)[1]: value for key, value in rows.items() if key[:1] == b"D"}
    end = blocks[-1].end_seq if blocks else 0
    if state is None:
        state = RingState()
        if windows:
            last = windows[-1]
            window = OpenWindow(last.window + 1, last.last_seq + 1, 0, 0, last.closed_at)
            state = _replace(state, window=window, next_seq=last.last_seq + 1, stream_time=last.closed_at)
        elif blocks:
            first = blocks[0].first_seq
            state = _replace(state, window=OpenWindow(1, first), next_seq=first)
        if letters:
            numbers = (min(letters), max(letters) + 1)
            state = _replace(state, dead_first=numbers[0], dead_next=numbers[1])
        state = _replace(state, counters={"events": state.next_seq, "samples": state.next_seq})
    if end > state.next_seq:
        state = _grow(file, state, [b for b in blocks if b.end_seq > state.next_seq], dictionaries)
    for number in range(state.dead_first, state.dead_next):
        if number not in letters:
            # A number stays taken: people and `dlq` know letters by it.
            letter = DeadLetter("", "", state.stream_time, "lost to damage", b"")
            rows[U64.pack(b"D", number)] = letters[number] = msgspec.msgpack.encode(letter)
    return _replace(state, dead_bytes=sum(map(len, letters.values())))


def _grow(
    file: PageFile, state: RingState, blocks: list[_Block], dictionaries: dict[int, Dictionary]
) -> RingState:
    """The state after blocks whose own state row is lost."""
    digest, window, count, time = state.digest, state.window, state.next_seq, state.stream_time
    for block in blocks:
        time = max(time, block.arrival)
        part = Samples.blank(block.first_seq, block.samples)
        with contextlib.suppress(CorruptBlockError):  # only its dictionary can be missing
            part = decode_block(file.read(block.at, block.size), dictionaries.get)
        part = part[max(0, count - block.first_seq) :]
        digest, count = part.extend_digest(digest), block.end_seq
        samples, tokens = window.samples + len(part), window.tokens + sum(part.lengths)
        window = OpenWindow(window.window, window.first_seq, samples, tokens, window.first_arrival or time)
    grown = count - state.next_seq
    counters = dict(state.counters)
    for name in ("events", "samples"):
        counters[name] = counters.get(name, 0) + grown
    return _replace(state, next_seq=count, digest=digest, stream_time=time, window=window, counters=counters)


def _fill_windows(plan: _Plan, report: SalvageReport) -> None:
    """Windows whose rows are lost between others: what lies between those is shared out among them.

    One alone gets back the very edges it had. Several may get others, but each sample is in one window still.
    """
    found = {U32.unpack(key)[1]: value for key, value in plan.rows.items() if key[:1] == b"W"}
    edges = {number: msgspec.msgpack.decode(value, type=ClosedWindow) for number, value in found.items()}
    window = plan.state.window
    for number in sorted(edges):
        after = min([n for n in edges if n > number] + [window.window])
        last = (edges[after].first_seq if after in edges else window.first_seq) - 1
        missing, first = after - number - 1, edges[number].last_seq + 1
        for i in range(missing):
            count = (last - first + 1) // (missing - i)
            tokens = sum(block.tokens for block in plan.blocks if first <= block.first_seq < first + count)
            time = edges[after].closed_at if after in edges else plan.state.stream_time
            row = ClosedWindow(number + 1 + i, first, first + count - 1, count, tokens, time, "rebuilt")
            plan.rows[U32.pack(b"W", row.window)] = msgspec.msgpack.encode(row)
            first += count
        if missing:
            report.lost_rows.append(f"the rows of windows {number + 1} to {after - 1}, made anew")


def _after_registry(plan: _Plan, least_window: int, least_seq: int, report: SalvageReport) -> None:
    """Go on with numbers that the registry has not seen: a window is decided once."""
    state = plan.state
    if state.window.window >= least_window:
        return
    first = max(least_seq, state.window.first_seq)
    if first > state.next_seq:
        plan.holes.append((state.next_seq, first))
        counters = {**state.counters, "samples": first}
        state = _replace(state, next_seq=first, counters=counters)
    window = OpenWindow(least_window, first, state.next_seq - first, 0, state.stream_time)
    # Rows of windows before it are decided: nothing reads them any more, and they would leave a gap.
    gone = [key for key in plan.rows if key[:1] == b"W"]
    for key in gone:
        del plan.rows[key]
    if gone:
        report.lost_rows.append("edges of windows that are decided")
    plan.state = _replace(state, window=window)


def _report_rows(plan: _Plan, snapshot: _Snapshot, report: SalvageReport) -> None:
    """Say which rows are missing."""
    if report.proved or (snapshot.state and snapshot.state.rows_sum == _sum_of_rows(plan.rows)):
        return
    lost = sum(key[:1] == b"D" and b"lost to damage" in value for key, value in plan.rows.items())
    if lost:
        report.lost_rows.append(f"{lost} dead letters")
    if not report.lost_rows:
        report.lost_rows.append("positions or reference values: those kept may be older ones")


# -- writing ----------------------------------------------------------------------------------------


def _write(file: PageFile, folder: Path, aside: Path, plan: _Plan) -> None:
    """Make the new ring aside, whole and synced."""
    lost = plan.state.lost + sum(end - first for first, end in plan.holes)
    noted = (quarantine_row(*hole, "lost to damage", plan.state.stream_time) for hole in plan.holes)
    good = ((block.first_seq, block.at, block.size) for block in plan.blocks)
    build_ring(
        aside,
        _replace(plan.header, shard=folder.name),
        _replace(plan.state, lost=lost),
        plan.rows | dict(noted),
        newest_first(file.read, good, plan.holes, plan.header.tokenizer_id, plan.state.stream_time),
        plan.map_bytes,
    )


_replace = msgspec.structs.replace
