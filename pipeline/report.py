"""The learning report: what the stream became, what each update did, which versions there are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from pipeline.shards import MAIN
from storage.durable import write_file_durably
from storage.folder import DataFolder
from storage.opening import open_ring_reader
from storage.registry import Registry, UpdateRow, UpdateState, VersionRow
from storage.windows import RingState

__all__ = [
    "TABLE_HEAD",
    "Report",
    "ShardReport",
    "VersionReport",
    "WindowReport",
    "build_report",
    "format_report",
    "window_label",
    "write_report",
]

_SCORES = (
    "base_bits_per_byte", "active_bits_per_byte", "held_out_before_bits_per_byte",
    "held_out_after_bits_per_byte", "anchor_delta_bits_per_token",
)  # fmt: skip
_COUNTERS = (
    "events", "samples", "duplicates", "near_duplicates", "suppressed", "dead_letters", "dropped",
)  # fmt: skip


class WindowReport(msgspec.Struct, kw_only=True):
    """One update. Scores are null where nothing was measured.

    Attributes:
        shard: Whose window; each shard numbers its own.
        by_source: Source -> {"samples", "base", "active"}, prequential bits per byte.
        base_bits_per_byte, active_bits_per_byte: The whole window, before any step.
        decision: "promoted", "rejected", "quarantined", "skipped", "expired", or the state under way.
    """

    shard: str = MAIN
    window: int
    last_window: int
    first_seq: int
    last_seq: int
    by_source: dict[str, dict[str, Any]] = {}
    base_bits_per_byte: float | None = None
    active_bits_per_byte: float | None = None
    held_out_before_bits_per_byte: float | None = None
    held_out_after_bits_per_byte: float | None = None
    anchor_delta_bits_per_token: float | None = None
    decision: str = ""
    reason: str = ""
    version: int = 0
    scale: float | None = None
    criteria: list[dict[str, Any]] = []
    skipped: int = 0
    steps: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0


class VersionReport(msgspec.Struct, kw_only=True):
    """One version."""

    version: int
    sha256: str
    active: bool
    parent: int
    shard: str = MAIN
    window: int
    folder: str


class ShardReport(msgspec.Struct, kw_only=True):
    """What one ingest process stored."""

    shard: str
    events: int = 0
    samples: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    suppressed: int = 0
    dead_letters: int = 0
    dropped: int = 0
    lost: int = 0
    ring_digest: str = ""
    open_window_samples: int = 0


class Report(msgspec.Struct, kw_only=True):
    """What `demo`, `replay` and `status` print with --json, and what lies in report.json.

    Attributes:
        events, samples, duplicates, near_duplicates, suppressed, dead_letters, dropped, lost,
            open_window_samples: Of all shards.
        ring_digest: Of the one ring; of several, blake2b-256 over "<shard>\\0<digest>" of each, "main" first.
        shards: The same of each shard, "main" first, also of those that no process writes any more.
    """

    events: int = 0
    samples: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    suppressed: int = 0
    dead_letters: int = 0
    dropped: int = 0
    lost: int = 0
    ring_digest: str = ""
    open_window_samples: int = 0
    shards: list[ShardReport] = []
    windows: list[WindowReport] = []
    versions: list[VersionReport] = []


def build_report(folder: DataFolder) -> Report:
    """Read the rings and the registry of a data folder; a part that is not there yet is left empty."""
    states = {}
    for shard in folder.shards():
        with open_ring_reader(folder.ring / shard) as ring:
            states[shard] = ring.state
    if not folder.registry.is_dir():
        return _report(states, [], [], 0)
    with Registry.open_reader(folder.registry) as registry:
        return _report(states, registry.updates(), registry.versions(), registry.active().version)


def write_report(folder: DataFolder, report: Report) -> None:
    """Keep the report in the data folder."""
    write_file_durably(folder.report, msgspec.json.format(msgspec.json.encode(report)) + b"\n")


def format_report(report: Report) -> str:
    """The report as a table for people."""
    lines = [
        f"{report.events:,} events: {report.samples:,} samples, {report.duplicates:,} duplicates, "
        f"{report.suppressed:,} suppressed, {report.dead_letters:,} dead letters"
        + (f", {report.near_duplicates:,} near duplicates" if report.near_duplicates else "")
        + (f", {report.dropped:,} dropped from full queues" if report.dropped else ""),
    ]
    if report.lost:
        lines.append(f"{report.lost:,} samples were lost to damage and are blank: see `edgewater doctor`")
    if len(report.shards) > 1:
        lines += (
            f"  {shard.shard}: {shard.events:,} events, {shard.samples:,} samples, "
            f"{shard.open_window_samples} in the open window"
            for shard in report.shards
        )
    if report.windows:
        lines += ["", *_table(report)]
    if report.versions:
        lines += ["", "versions"]
        for version in report.versions:
            mark = "active" if version.active else ""
            window = window_label(report, version.shard, version.window)
            line = f"  v{version.version:<3} from window {window:<4} {version.sha256[:16]}  {mark}"
            lines.append(line.rstrip())
    lines += ["", f"ring digest {report.ring_digest[:32]}"]
    return "\n".join(lines)


def _digest_of(states: Mapping[str, RingState]) -> str:
    """What two runs on the same streams must agree on."""
    if len(states) < 2:
        return next(iter(states.values()), RingState()).digest.hex()
    parts = (shard.encode() + b"\0" + state.digest for shard, state in states.items())
    return hashlib.blake2b(b"".join(parts), digest_size=32).hexdigest()


def _shard(shard: str, state: RingState) -> ShardReport:
    counted = {name: state.counters.get(name, 0) for name in _COUNTERS}
    return ShardReport(
        shard=shard, lost=state.lost, ring_digest=state.digest.hex(),
        open_window_samples=state.window.samples, **counted,
    )  # fmt: skip


def _report(
    states: Mapping[str, RingState], rows: list[UpdateRow], versions: list[VersionRow], active: int
) -> Report:
    shards = [_shard(shard, state) for shard, state in states.items()]
    totals = {
        name: sum(getattr(shard, name) for shard in shards)
        for name in (*_COUNTERS, "lost", "open_window_samples")
    }
    return Report(
        **totals,
        ring_digest=_digest_of(states),
        shards=shards,
        windows=[_window(row) for row in rows],
        versions=[
            VersionReport(
                version=v.version, sha256=v.sha256, active=v.version == active, parent=v.parent,
                shard=v.shard, window=v.window, folder=v.folder,
            )
            for v in versions
        ],
    )  # fmt: skip


def _window(row: UpdateRow) -> WindowReport:
    decision = "promoted" if row.version and row.decided else row.state.value
    report = WindowReport(
        shard=row.shard,
        window=row.window,
        last_window=row.last_window,
        first_seq=row.first_seq,
        last_seq=row.last_seq,
        decision=decision,
        reason=row.reason,
        version=row.version,
    )
    if row.result and row.state is not UpdateState.CLAIMED:
        result = msgspec.json.decode(row.result)
        for name in (
            *_SCORES, "by_source", "scale", "criteria", "skipped", "steps", "trained_tokens", "seconds",
            "peak_rss_bytes",
        ):  # fmt: skip
            if name in result:
                setattr(report, name, result[name])
    return report


TABLE_HEAD = (
    "window",
    "source",
    "samples",
    "base",
    "active",
    "ratio",
    "held-out",
    "anchors",
    "decision",
    "tokens",
    "s",
)
_FORMAT = "{:>{width}}  {:<14} {:>7} {:>6} {:>6} {:>6}  {:>11} {:>7}  {:<14} {:>6} {:>5}"


def _table(report: Report) -> list[str]:
    """Rows by window and source; a window of one source needs one line."""
    lines = ["prequential bits per byte (scored before it is trained on) under base and active version"]
    width = max([6, *(len(window_label(report, window.shard, window.window)) for window in report.windows)])
    lines.append(_FORMAT.format(*TABLE_HEAD, width=width))
    for window in report.windows:
        label = window_label(report, window.shard, window.window)
        sources = list(window.by_source.items())
        whole = {"base": window.base_bits_per_byte, "active": window.active_bits_per_byte,
                 "samples": window.last_seq - window.first_seq + 1}  # fmt: skip
        name, scores = sources[0] if len(sources) == 1 else ("all", whole)
        lines.append(_row(width, label, window, name, scores))
        if len(sources) > 1:
            lines += [_row(width, "", None, source, scores) for source, scores in sources]
        if window.reason:
            lines.append(f"{'':{width + 2}}{window.reason}")
    return [line.rstrip() for line in lines]


def window_label(report: Report, shard: str, window: int) -> str:
    """A window's number, with its shard where there is more than one."""
    return f"{shard}/{window}" if len(report.shards) > 1 else str(window)


def _row(width: int, label: str, window: WindowReport | None, source: str, scores: dict[str, Any]) -> str:
    base, active = scores.get("base"), scores.get("active")
    ratio = f"{active / base:.2f}" if base and active is not None else "-"
    cells = [label, source[:14], scores.get("samples", ""), _number(base), _number(active), ratio]
    if window is None:
        return _FORMAT.format(*cells, "", "", "", "", "", width=width)
    before, after = window.held_out_before_bits_per_byte, window.held_out_after_bits_per_byte
    held_out = f"{_number(before)}>{_number(after)}" if before is not None else "-"
    anchors = window.anchor_delta_bits_per_token
    decision = f"promoted v{window.version}" if window.decision == "promoted" else window.decision
    return _FORMAT.format(
        *cells, held_out, "-" if anchors is None else f"{anchors:+.3f}", decision, window.trained_tokens,
        f"{window.seconds:.0f}", width=width,
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
