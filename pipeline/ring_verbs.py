"""`edgewater ring`: look at the ring, back it up into one file, and make a ring of such a file."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from pipeline.config import Config
from pipeline.progress import Progress
from pipeline.shards import MAIN
from storage.block import BlockHeader, read_header
from storage.errors import CorruptBlockError, StorageError
from storage.export import Exported, Imported, export_ring, export_to_file, import_ring
from storage.folder import DataFolder
from storage.opening import open_ring_reader
from storage.registry import Registry
from storage.ring import Ring
from storage.walk import walk_blocks

__all__ = ["RingInfo", "export_from", "import_into", "ring_info"]

SILENT_S = 1.0


class RingInfo(msgspec.Struct, frozen=True):
    """How a ring stands.

    Attributes:
        map_bytes, live_bytes: Size of the file, which never changes, and what of it is in use.
        first_seq, next_seq, samples: What it holds.
        oldest, newest: Stream time of the oldest commit that is held and of the newest, seconds.
        blocks, block_bytes, raw_bytes: Blocks, and their size with and without compression.
        bytes_a_sample: Of the blocks.
        dictionaries: Ids of the zstd dictionaries that they are packed with.
        closed_windows, open_window, open_samples: Number of the newest closed window and of the open one.
        lost, forgotten: Samples blanked because of damage, and because their subject was forgotten, ever.
        quarantined: Cases of damage that are on record.
        damaged_blocks: Blocks whose header cannot be read; `edgewater doctor` checks the rest of them too.
    """

    folder: str
    format: int
    tokenizer_id: str
    map_bytes: int
    live_bytes: int
    commits: int
    first_seq: int
    next_seq: int
    samples: int
    oldest: float | None
    newest: float | None
    blocks: int
    block_bytes: int
    raw_bytes: int
    bytes_a_sample: float | None
    dictionaries: list[str]
    closed_windows: int
    open_window: int
    open_samples: int
    dead_letters: int
    lost: int
    forgotten: int
    quarantined: int
    damaged_blocks: int


def ring_info(config: Config, shard: str = MAIN) -> tuple[RingInfo, str]:
    """Look at the ring of a shard, live or at rest; takes no lock."""
    with ExitStack() as stack:
        ring = _open(stack, config, shard)
        state, usage = ring.read_state(), ring.usage()
        seen = [found for _, found in walk_blocks(ring, state.tail_seq, state.next_seq, _header_of)]
        headers = [header for header, _ in seen if header]
        block_bytes = sum(size for _, size in seen)
        samples = state.next_seq - state.tail_seq
        info = RingInfo(
            folder=str(ring.folder),
            format=ring.header.format,
            tokenizer_id=ring.header.tokenizer_id,
            map_bytes=usage.map_bytes,
            live_bytes=usage.live_bytes,
            commits=state.commits,
            first_seq=state.tail_seq,
            next_seq=state.next_seq,
            samples=samples,
            oldest=headers[0].arrival if headers else None,
            newest=state.stream_time if state.commits else None,
            blocks=len(seen),
            block_bytes=block_bytes,
            raw_bytes=sum(header.block_bytes - header.stored_bytes + header.raw_bytes for header in headers),
            bytes_a_sample=block_bytes / samples if samples else None,
            dictionaries=sorted({f"{header.dictionary:08x}" for header in headers if header.dictionary}),
            closed_windows=state.window.window - 1,
            open_window=state.window.window,
            open_samples=state.window.samples,
            dead_letters=len(ring.dead_letters(state.dead_next - state.dead_first)),
            lost=state.lost,
            forgotten=state.forgotten,
            quarantined=len(ring.quarantined()),
            damaged_blocks=len(seen) - len(headers),
        )
    return info, _format_info(info)


def _header_of(block: bytes | memoryview) -> tuple[BlockHeader | None, int]:
    try:
        return read_header(block), len(block)
    except CorruptBlockError:
        return None, len(block)


def export_from(config: Config, target: Path | BinaryIO, shard: str = MAIN) -> tuple[dict[str, Any], str]:
    """Back the ring of a shard up into a file, or a stream; takes no lock, ingest may run."""
    with ExitStack() as stack:
        ring, show = _open(stack, config, shard), _shown(stack, "exporting the ring")
        if isinstance(target, Path):
            done = export_to_file(ring, target, show)
        else:
            done = export_ring(ring, target, show)
    place = str(target) if isinstance(target, Path) else "-"
    return {"file": place, "samples": done.samples, **msgspec.to_builtins(done)}, _format_export(done, place)


def import_into(
    config: Config, source: Path | BinaryIO, max_bytes: int, shard: str = MAIN
) -> tuple[dict[str, Any], str]:
    """Make the ring of a shard that has none. Raises: StorageError if it has one, LockHeldError."""
    with ExitStack() as stack:
        show = _shown(stack, "importing the ring")
        folder = DataFolder.open(config.data_dir, create=True)
        stack.callback(folder.close)
        for role in ("starting", f"ingest-{shard}", "admin"):  # no other shard looks for it meanwhile
            stack.enter_context(folder.lock(role))
        file = _seekable(stack, source, folder)
        window, seq = _used_numbers(folder, shard)
        done = import_ring(
            file, folder.ring / shard, max_bytes, least_window=window, least_seq=seq, shard=shard,
            progress=show,
        )  # fmt: skip
    lines = [
        f"{done.next_seq - done.first_seq:,} samples, {_seqs(done)}, "
        f"{done.blocks:,} blocks, are the ring of {folder.path}",
        f"window {done.window} is open",
    ]
    if done.lost:
        lines.append(f"{done.lost:,} samples that came in after the backup are lost; their seqs are blank")
    if done.left_out:
        lines.append(f"the oldest {done.left_out:,} samples of the file were left out: the ring is smaller")
    return {"data_dir": str(folder.path), **msgspec.to_builtins(done)}, "\n".join(lines)


def _open(stack: ExitStack, config: Config, shard: str) -> Ring:
    folder = DataFolder.open(config.data_dir, create=False)
    stack.callback(folder.close)
    place = folder.ring / shard
    if not place.is_dir():
        raise StorageError("no ring here yet", path=place, hint="run Edgewater once")
    return stack.enter_context(open_ring_reader(place))


def _shown(stack: ExitStack, label: str) -> Callable[[float, str], None]:
    """Progress of work that may be long; what is done within a second shows none."""
    progress, begun = Progress(), time.monotonic()
    stack.callback(progress.clear)

    def show(share: float, words: str) -> None:
        if time.monotonic() - begun > SILENT_S:
            progress.show(label, share, words)

    return show


def _seekable(stack: ExitStack, source: Path | BinaryIO, folder: DataFolder) -> BinaryIO:
    """The export as a file; a pipe's bytes go into one without a name, since they are read twice."""
    if isinstance(source, Path):
        return stack.enter_context(source.open("rb"))
    file = stack.enter_context(tempfile.TemporaryFile(dir=folder.path))  # noqa: SIM115 - the stack closes it
    shutil.copyfileobj(source, file, 1 << 20)
    return file


def _used_numbers(folder: DataFolder, shard: str) -> tuple[int, int]:
    """First window number and seq that the registry does not know: an older backup must give none again."""
    if not folder.registry.is_dir():
        return 1, 0
    with Registry.open_reader(folder.registry) as registry:
        return registry.unused_numbers(shard)


def _format_info(info: RingInfo) -> str:
    lines = [
        f"ring         {info.folder} (format {info.format}, tokenizer {info.tokenizer_id})",
        f"size         {info.live_bytes >> 10:,} of {info.map_bytes >> 10:,} KiB in use",
        f"samples      {info.samples:,}, {_seqs(info)}, {info.commits:,} commits",
    ]
    if info.oldest is not None and info.newest is not None:
        lines.append(f"stream time  {_time(info.oldest)} to {_time(info.newest)}")
    if info.bytes_a_sample is not None:
        ratio = info.raw_bytes / max(1, info.block_bytes)
        lines.append(
            f"blocks       {info.blocks:,}, {info.block_bytes >> 10:,} KiB,"
            f" {info.bytes_a_sample:.1f} bytes a sample, packed {ratio:.1f} to 1"
        )
    if info.dictionaries:
        lines.append(f"dictionary   {', '.join(info.dictionaries)}")
    lines.append(
        f"windows      {info.closed_windows:,} closed, window {info.open_window} open"
        f" with {info.open_samples:,} samples"
    )
    lines.append(f"dead letters {info.dead_letters:,}")
    lines.append(
        f"blank        {info.lost:,} samples lost to damage ({info.quarantined:,} cases),"
        f" {info.forgotten:,} forgotten"
    )
    if info.damaged_blocks:
        lines.append(f"damaged      {info.damaged_blocks:,} blocks: run `edgewater doctor --repair`")
    return "\n".join(lines)


def _format_export(done: Exported, place: str) -> str:
    lines = [
        f"{done.samples:,} samples, {_seqs(done)}, {done.blocks:,} blocks,"
        f" {done.bytes:,} bytes" + (f" in {place}" if place != "-" else ""),
    ]
    if done.damaged:
        lines.append(
            f"{done.damaged:,} samples are blank in it, their blocks are damaged: run `edgewater doctor`"
        )
    if done.evicted:
        lines.append(f"{done.evicted:,} of the oldest samples were evicted while it ran: they are not in it")
    return "\n".join(lines)


def _time(stream_time: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(stream_time))


def _seqs(held: Exported | Imported | RingInfo) -> str:
    """The first and the last seq, both included, for people."""
    return f"seqs {held.first_seq:,} to {max(held.first_seq, held.next_seq - 1):,}"
