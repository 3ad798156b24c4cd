"""`status`, `score` and `update`: look at a data folder, and ask for an update."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec

from pipeline.config import Config
from pipeline.report import Report, build_report, format_report
from pipeline.roles import model_folder
from storage.folder import DataFolder
from storage.opening import open_ring_reader
from storage.registry import AuditRow, Registry
from storage.wake import wake

__all__ = ["request_update", "score_texts", "status"]

SHARD = "main"
NEWEST_DEAD = 3


class Status(Report, kw_only=True):
    """The learning report, and how the data folder stands."""

    data_dir: str
    active_version: int
    ring_bytes: dict[str, int]
    first_seq: int
    next_seq: int
    newest_dead_letters: list[dict[str, Any]]
    under_way: str


def status(config: Config) -> tuple[Status, str]:
    """Look at a data folder, live or at rest; takes no lock."""
    folder = DataFolder.open(config.data_dir, create=False)
    report = build_report(folder)
    ring: dict[str, Any] = {"ring_bytes": {}, "first_seq": 0, "next_seq": 0, "newest_dead_letters": []}
    if (folder.ring / SHARD).is_dir():
        with open_ring_reader(folder.ring / SHARD) as reader:
            usage = reader.usage()
            ring["ring_bytes"] = {"live": usage.live_bytes, "map": usage.map_bytes}
            ring["first_seq"], ring["next_seq"] = usage.first_seq, usage.next_seq
            ring["newest_dead_letters"] = [
                {"place": letter.position, "reason": letter.reason}
                for _, letter in reader.dead_letters(NEWEST_DEAD)
            ]
    active = next((version.version for version in report.versions if version.active), 0)
    last = report.windows[-1] if report.windows else None
    under_way = f"window {last.window} {last.decision}" if last and not last.reason and not last.steps else ""
    whole = Status(
        data_dir=str(folder.path), active_version=active, under_way=under_way,
        **{name: getattr(report, name) for name in Report.__struct_fields__}, **ring,
    )  # fmt: skip
    return whole, _format(whole)


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
    live, size = whole.ring_bytes.get("live", 0), whole.ring_bytes.get("map", 0)
    newest = max(whole.first_seq, whole.next_seq - 1)
    seqs = f"seqs {whole.first_seq:,} to {newest:,}, {whole.open_window_samples} in the open window"
    lines = [
        f"data folder  {whole.data_dir}",
        f"active       {f'version {whole.active_version}' if whole.active_version else 'the base model'}",
        f"ring         {live >> 10:,} of {size >> 10:,} KiB, {seqs}",
    ]
    if whole.under_way:
        lines.append(f"under way    {whole.under_way}")
    for letter in whole.newest_dead_letters:
        lines.append(f"dead letter  {letter['place']}: {letter['reason']}")
    fields = {name: getattr(whole, name) for name in Report.__struct_fields__}
    return "\n".join(lines) + "\n\n" + format_report(msgspec.convert(fields, Report, from_attributes=True))
