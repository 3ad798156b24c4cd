"""The learning report: what the stream became, what each update did, which versions there are."""

from __future__ import annotations

from typing import Any

import msgspec

from storage.durable import write_file_durably
from storage.folder import DataFolder
from storage.opening import open_ring_reader
from storage.registry import Registry, UpdateRow, UpdateState, VersionRow
from storage.windows import RingState

__all__ = [
    "TABLE_HEAD",
    "Report",
    "VersionReport",
    "WindowReport",
    "build_report",
    "format_report",
    "write_report",
]

_SCORES = (
    "base_bits_per_byte", "active_bits_per_byte", "held_out_before_bits_per_byte",
    "held_out_after_bits_per_byte", "anchor_delta_bits_per_token",
)  # fmt: skip


class WindowReport(msgspec.Struct, kw_only=True):
    """One update. Scores are null where nothing was measured.

    Attributes:
        by_source: Source -> {"samples", "base", "active"}, prequential bits per byte.
        base_bits_per_byte, active_bits_per_byte: The whole window, before any step.
        decision: "promoted", "rejected", "quarantined", "skipped", "expired", or the state under way.
    """

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
    window: int
    folder: str


class Report(msgspec.Struct, kw_only=True):
    """What `demo`, `replay` and `status` print with --json, and what lies in report.json."""

    events: int = 0
    samples: int = 0
    duplicates: int = 0
    suppressed: int = 0
    dead_letters: int = 0
    lost: int = 0
    ring_digest: str = ""
    open_window_samples: int = 0
    windows: list[WindowReport] = []
    versions: list[VersionReport] = []


def build_report(folder: DataFolder, shard: str = "main") -> Report:
    """Read the ring and the registry of a data folder; a part that is not there yet is left empty."""
    state = RingState()
    if (folder.ring / shard).is_dir():
        with open_ring_reader(folder.ring / shard) as ring:
            state = ring.state
    if not folder.registry.is_dir():
        return _report(state, [], [], 0)
    with Registry.open_reader(folder.registry) as registry:
        return _report(state, registry.updates(), registry.versions(), registry.active().version)


def write_report(folder: DataFolder, report: Report) -> None:
    """Keep the report in the data folder."""
    write_file_durably(folder.report, msgspec.json.format(msgspec.json.encode(report)) + b"\n")


def format_report(report: Report) -> str:
    """The report as a table for people."""
    lines = [
        f"{report.events:,} events: {report.samples:,} samples, {report.duplicates:,} duplicates, "
        f"{report.suppressed:,} suppressed, {report.dead_letters:,} dead letters",
    ]
    if report.lost:
        lines.append(f"{report.lost:,} samples were lost to damage and are blank: see `edgewater doctor`")
    if report.windows:
        lines += ["", *_table(report)]
    if report.versions:
        lines += ["", "versions"]
        for version in report.versions:
            mark = "active" if version.active else ""
            line = f"  v{version.version:<3} from window {version.window:<4} {version.sha256[:16]}  {mark}"
            lines.append(line.rstrip())
    lines += ["", f"ring digest {report.ring_digest[:32]}"]
    return "\n".join(lines)


def _report(state: RingState, rows: list[UpdateRow], versions: list[VersionRow], active: int) -> Report:
    counters = state.counters
    return Report(
        events=counters.get("events", 0),
        samples=counters.get("samples", 0),
        duplicates=counters.get("duplicates", 0),
        suppressed=counters.get("suppressed", 0),
        dead_letters=counters.get("dead_letters", 0),
        lost=state.lost,
        ring_digest=state.digest.hex(),
        open_window_samples=state.window.samples,
        windows=[_window(row) for row in rows],
        versions=[
            VersionReport(
                version=v.version, sha256=v.sha256, active=v.version == active, parent=v.parent,
                window=v.window, folder=v.folder,
            )
            for v in versions
        ],
    )  # fmt: skip


def _window(row: UpdateRow) -> WindowReport:
    decision = "promoted" if row.version and row.decided else row.state.value
    report = WindowReport(
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
_FORMAT = "{:>6}  {:<14} {:>7} {:>6} {:>6} {:>6}  {:>11} {:>7}  {:<14} {:>6} {:>5}"


def _table(report: Report) -> list[str]:
    """Rows by window and source; a window of one source needs one line."""
    lines = ["prequential bits per byte (scored before it is trained on) under base and active version"]
    lines.append(_FORMAT.format(*TABLE_HEAD))
    for window in report.windows:
        sources = list(window.by_source.items())
        whole = {"base": window.base_bits_per_byte, "active": window.active_bits_per_byte,
                 "samples": window.last_seq - window.first_seq + 1}  # fmt: skip
        name, scores = sources[0] if len(sources) == 1 else ("all", whole)
        lines.append(_row(window, name, scores))
        if len(sources) > 1:
            lines += [_row(None, source, scores) for source, scores in sources]
        if window.reason:
            lines.append(f"{'':8}{window.reason}")
    return [line.rstrip() for line in lines]


def _row(window: WindowReport | None, source: str, scores: dict[str, Any]) -> str:
    base, active = scores.get("base"), scores.get("active")
    ratio = f"{active / base:.2f}" if base and active is not None else "-"
    cells = ["", source[:14], scores.get("samples", ""), _number(base), _number(active), ratio]
    if window is None:
        return _FORMAT.format(*cells, "", "", "", "", "")
    before, after = window.held_out_before_bits_per_byte, window.held_out_after_bits_per_byte
    held_out = f"{_number(before)}>{_number(after)}" if before is not None else "-"
    anchors = window.anchor_delta_bits_per_token
    decision = f"promoted v{window.version}" if window.decision == "promoted" else window.decision
    cells[0] = window.window
    return _FORMAT.format(
        *cells, held_out, "-" if anchors is None else f"{anchors:+.3f}", decision, window.trained_tokens,
        f"{window.seconds:.0f}",
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
