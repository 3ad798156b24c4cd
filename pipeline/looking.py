"""`status`, `score` and `update`: look at a data folder, and ask for an update."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import msgspec

from pipeline.config import Config
from pipeline.control import ControlError, NoIngestError, listening, stream
from pipeline.report import Report, ShardReport, build_report, format_report, window_label
from pipeline.roles import model_folder
from pipeline.shards import numbers, shard_name, sources_of
from pipeline.tap_text import format_source
from storage.folder import DataFolder
from storage.opening import open_ring_reader
from storage.registry import AuditRow, Registry
from storage.wake import wake

__all__ = ["request_update", "score_texts", "status"]

NEWEST_DEAD = 3
LIVE_S = 5.0  # a running ingest process says within it how its sources stand


class ShardStatus(ShardReport, kw_only=True):
    """One shard, and how it stands.

    Attributes:
        pid: Of the ingest process that works on it, None where none does.
        configured: Whether a process would, by the present configuration.
        sources: What that one reads.
        ring_bytes: "live" of "map".
        first_seq, next_seq: Samples that it holds.
    """

    pid: int | None
    configured: bool
    sources: list[str]
    ring_bytes: dict[str, int]
    first_seq: int
    next_seq: int


class Status(Report, kw_only=True):
    """The learning report, and how the data folder stands.

    Attributes:
        ring_bytes: Of all rings together.
        first_seq, next_seq: Of the first shard.
        live_sources: How each source of a running ingest stands: shard, name, connected, detail, counts and
            lines that are waiting.
    """

    shards: list[ShardStatus]  # type: ignore[assignment]  # a ShardReport and more
    data_dir: str
    active_version: int
    ring_bytes: dict[str, int]
    first_seq: int
    next_seq: int
    newest_dead_letters: list[dict[str, Any]]
    under_way: str
    live_sources: list[dict[str, Any]]


def status(config: Config) -> tuple[Status, str]:
    """Look at a data folder, live or at rest; takes no lock."""
    folder = DataFolder.open(config.data_dir, create=False)
    report = build_report(folder)
    shards, letters = [], []
    for stored in report.shards:
        shard, newest = _look_at(folder, config, stored)
        shards.append(shard)
        letters += newest
    letters.sort(key=lambda letter: letter[0])
    active = next((version.version for version in report.versions if version.active), 0)
    under_way = [
        f"window {window_label(report, window.shard, window.window)} {window.decision}"
        for window in report.windows
        if not (window.reason or window.steps)
    ]
    whole = Status(
        data_dir=str(folder.path),
        active_version=active,
        ring_bytes=_summed([shard.ring_bytes for shard in shards]),
        first_seq=shards[0].first_seq if shards else 0,
        next_seq=shards[0].next_seq if shards else 0,
        newest_dead_letters=[letter for _, letter in letters[-NEWEST_DEAD:]],
        under_way=", ".join(under_way[-1:]),
        live_sources=_live_sources(folder),
        **{name: getattr(report, name) for name in Report.__struct_fields__} | {"shards": shards},
    )
    return whole, _format(whole)


def _live_sources(folder: DataFolder) -> list[dict[str, Any]]:
    """What running ingest processes say of their sources; those that say nothing are left out."""
    rows: list[dict[str, Any]] = []
    for shard in listening(folder):  # each on its own: one that is stalled hides no other
        with contextlib.suppress(NoIngestError, ControlError, OSError):
            for answer in stream(folder, shard, "sources", LIVE_S):
                rows += [{"shard": shard, "name": name, **state} for name, state in answer["sources"].items()]
    return rows


def _look_at(
    folder: DataFolder, config: Config, stored: ShardReport
) -> tuple[ShardStatus, list[tuple[float, dict[str, Any]]]]:
    """How a shard stands, and its newest dead letters with when they came."""
    name = stored.shard
    number = next((number for number in numbers(config) if shard_name(number) == name), 0)
    with open_ring_reader(folder.ring / name) as reader:
        usage = reader.usage()
        letters = [
            (letter.arrival, {"shard": name, "place": letter.position, "reason": letter.reason})
            for _, letter in reader.dead_letters(NEWEST_DEAD)
        ]
    status = ShardStatus(
        pid=folder.holder(f"ingest-{name}"),
        configured=number > 0,
        sources=[source.name for source in sources_of(config, number)],
        ring_bytes={"live": usage.live_bytes, "map": usage.map_bytes},
        first_seq=usage.first_seq,
        next_seq=usage.next_seq,
        **msgspec.structs.asdict(stored),
    )
    return status, letters


def _summed(parts: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(part[name] for part in parts) for name in (parts[0] if parts else ())}


def request_update(config: Config) -> int:
    """Note a request that ingest's next tick honours. Returns: its number."""
    folder = DataFolder.open(config.data_dir, create=False)
    with (
        folder.lock("admin"),
        Registry.open_or_create(folder.registry) as registry,
        registry.write() as writer,
    ):
        number = writer.add_request()
        writer.add_audit(AuditRow(time.time(), "command line", "update", f"request {number}"))
    wake(folder.run)
    return number


def score_texts(config: Config, texts: list[str], names: list[str]) -> tuple[list[dict[str, Any]], str]:
    """Score texts under the base and versions.

    Args:
        names: Version numbers, "active", "previous" or "base"; none is base and active.
    Returns: One row a text with bits per byte by version, and a table.
    """
    from adapters.model_folder import verify
    from adapters.scoring import score_texts as score

    model = model_folder(config)
    manifest = verify(model, weights=True)
    folders = _version_folders(config, names, manifest.base_sha256)
    columns = {name: score(model, path, texts) for name, path in folders.items()}
    rows: list[dict[str, Any]] = []
    for i, text in enumerate(texts):
        cells = {name: scores[i] for name, scores in columns.items()}
        rows.append(
            {
                "text": text,
                "bytes": next(iter(cells.values())).bytes,
                "bits_per_byte": {
                    name: (cell.bits / cell.bytes if cell.bytes else None) for name, cell in cells.items()
                },
            }
        )
    totals = {
        name: sum(cell.bits for cell in scores) / max(1, sum(cell.bytes for cell in scores))
        for name, scores in columns.items()
    }
    head = "  ".join(f"{name:>8}" for name in columns)
    lines = [f"bits per byte\n{head}  text"]
    for row in rows:
        cells_text = "  ".join(
            f"{value:8.3f}" if value is not None else f"{'-':>8}" for value in row["bits_per_byte"].values()
        )
        lines.append(f"{cells_text}  {row['text'][:70]}")
    if len(rows) > 1:
        lines.append("  ".join(f"{value:8.3f}" for value in totals.values()) + f"  all {len(rows)} texts")
    return rows, "\n".join(lines)


def _version_folders(config: Config, names: list[str], base_sha256: str) -> dict[str, Path | None]:
    from adapters import versions
    from pipeline.registry_verbs import find_version

    if not names:
        names = ["base", "active"]
    out: dict[str, Path | None] = {}
    for name in names:
        if name == "base":
            out["base"] = None
            continue
        folder = DataFolder.open(config.data_dir, create=False)
        with Registry.open_reader(folder.registry) as registry:
            if name == "active" and not registry.active().version:
                out.setdefault("base", None)
                continue
        row = find_version(folder, name)
        versions.verify(folder, row, base_sha256)
        out[f"v{row.version}"] = versions.folder_of(folder, row)
    return out


def _format(whole: Status) -> str:
    lines = [
        f"data folder  {whole.data_dir}",
        f"active       {f'version {whole.active_version}' if whole.active_version else 'the base model'}",
    ]
    if len(whole.shards) > 1:
        lines.append(f"rings        {_filled(whole.ring_bytes)} in {len(whole.shards)} shards")
    for shard in whole.shards:
        newest = max(shard.first_seq, shard.next_seq - 1)
        seqs = f"seqs {shard.first_seq:,} to {newest:,}, {shard.open_window_samples} in the open window"
        if len(whole.shards) > 1:
            lines.append(f"shard        {shard.shard}: {_standing(shard)}")
        lines.append(f"ring         {_filled(shard.ring_bytes)}, {seqs}")
    for source in whole.live_sources:
        standing = (source["connected"], source["detail"], source["counts"], source["waiting"])
        lines.append(format_source(source["name"], *standing))
    if whole.under_way:
        lines.append(f"under way    {whole.under_way}")
    for letter in whole.newest_dead_letters:
        lines.append(f"dead letter  {letter['place']}: {letter['reason']}")
    fields = {name: getattr(whole, name) for name in Report.__struct_fields__}
    return "\n".join(lines) + "\n\n" + format_report(Report(**fields))


def _filled(ring_bytes: dict[str, int]) -> str:
    return f"{ring_bytes.get('live', 0) >> 10:,} of {ring_bytes.get('map', 0) >> 10:,} KiB"


def _standing(shard: ShardStatus) -> str:
    """Whether a process works on a shard, in words."""
    if shard.pid is not None:
        return f"process {shard.pid} reads {', '.join(shard.sources) or 'nothing of this configuration'}"
    if shard.configured:
        return f"no process runs; it would read {', '.join(shard.sources)}"
    words = "no process reads for it any more"
    if shard.open_window_samples:
        words += "; its open window stays open"
    return words
