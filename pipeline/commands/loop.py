"""The loop: demo, run, ingest, train, replay, capture, update."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from pipeline.commands.common import FAILED, SHARD, Context, configured, recording, say, with_json

__all__ = ["capture", "demo", "ingest", "replay", "run", "train", "update"]


@click.command()
@with_json
@click.option("--data-dir", type=click.Path(path_type=Path, file_okay=False), default=Path("edgewater-demo"),
              show_default=True, help="Where the demo keeps its state.")  # fmt: skip
@click.option("--all", "everything", is_flag=True, help="All 5,485 work orders instead of the first 1,800.")
@click.option("--fresh", is_flag=True, help="Delete what an earlier demo left and start over.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting.")
def demo(as_json: bool, data_dir: Path, everything: bool, fresh: bool, overrides: tuple[str, ...]) -> None:
    """The whole loop on a real stream, with the embedded model."""
    from pipeline.demo import run_demo

    run_demo(data_dir.absolute(), everything=everything, fresh=fresh, as_json=as_json, overrides=overrides)


@click.command()
@configured
@click.option("--once", is_flag=True, help="End when the sources are drained and due updates are decided.")
@click.option("--no-updates", is_flag=True, help="Only ingest.")
@click.option(
    "--max-events",
    type=click.IntRange(min=0),
    default=0,
    help="End after so many events of each ingest process.",
)
@recording
@click.option(
    "--dry-run",
    "dry",
    is_flag=True,
    help="Only connect, and print what would be stored of 10 events (--max-events); write nothing.",
)
@click.option("--timeout", metavar="DURATION", help="With --dry-run: end after so long [default: 30s].")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: a line of JSON an event.")  # fmt: skip
def run(
    path: Path | None,
    overrides: tuple[str, ...],
    once: bool,
    no_updates: bool,
    max_events: int,
    capture: Path | None,
    dry: bool,
    timeout: str | None,
    as_json: bool,
) -> None:
    """The daemon: ingest and trainer, supervised, until SIGTERM."""
    from pipeline.running import run_gateway

    context = Context(path, overrides)
    if dry:
        if once or no_updates or capture:
            raise click.UsageError("--dry-run stores and records nothing: leave the other options out")
        _dry_run(context, max_events, timeout, as_json)
        return
    if timeout or as_json:
        raise click.UsageError("--timeout and --json go with --dry-run")
    config = context.load(require_sources=True)
    code = run_gateway(
        config,
        context.arguments(),
        once=once or bool(max_events),
        updates=not no_updates,
        max_events=max_events,
        capture=capture.absolute() if capture else None,
    )
    sys.exit(code)


@click.command()
@configured
@click.option("--finite", is_flag=True, help="End when the sources are drained.")
@click.option("--lockstep", is_flag=True, help="Wait at each window's close until it is decided.")
@click.option("--max-events", type=click.IntRange(min=0), default=0, help="End after so many events.")
@recording
@click.option("--shard", type=SHARD, metavar="N",
              help="Which of several ingest processes to be: its number from 1, or its shard.")  # fmt: skip
@click.option("--replay", type=click.Path(path_type=Path, exists=True, dir_okay=False), hidden=True)
@click.option("--speed", type=float, default=0.0, hidden=True)
def ingest(
    path: Path | None,
    overrides: tuple[str, ...],
    finite: bool,
    lockstep: bool,
    max_events: int,
    capture: Path | None,
    shard: str | None,
    replay: Path | None,
    speed: float,
) -> None:
    """Only one ingest process: its sources into its ring."""
    from pipeline.roles import run_ingest
    from pipeline.shards import shard_number

    config = Context(path, overrides).load(require_sources=replay is None)
    processes = config.ingest.processes
    if shard is None and replay is None and processes > 1:
        raise click.UsageError(
            f"ingest.processes is {processes}: say which one to be, as in --shard 1, or use `edgewater run`"
        )
    number = shard_number(shard) if shard else 1
    if number > processes:
        raise click.BadParameter(f"there are {processes} (ingest.processes)", param_hint="--shard")
    run_ingest(
        config,
        finite=finite,
        lockstep=lockstep,
        max_events=max_events,
        capture=capture,
        replay=replay,
        speed=speed,
        number=number,
    )


@click.command()
@configured
@click.option("--lockstep", is_flag=True, help="Never merge or delay windows: the stream waits for each.")
@click.option("--reports", is_flag=True, hidden=True)
def train(path: Path | None, overrides: tuple[str, ...], lockstep: bool, reports: bool) -> None:
    """Only the trainer: due windows into versions."""
    from pipeline.roles import run_trainer

    run_trainer(Context(path, overrides).load(), lockstep=lockstep, reports=reports)


@click.command()
@configured
@with_json
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--into", required=True, type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Data folder of its own.")  # fmt: skip
@click.option("--speed", type=click.FloatRange(min=0), default=0.0,
              help="1 as recorded, 10 ten times as fast, 0 as fast as possible [default].")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on after a kill.")
@click.option("--no-updates", is_flag=True, help="Only ingest.")
def replay(
    path: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
    file: Path,
    into: Path,
    speed: float,
    resume: bool,
    no_updates: bool,
) -> None:
    """Feed a capture, or plain lines of events, again; print what was learned."""
    from pipeline.progress import Progress
    from pipeline.running import run_replay

    context = Context(path, overrides)
    own = (f"data_dir={json.dumps(str(into.absolute()))}", 'health.listen=""')
    report = run_replay(
        context.load(*own), context.arguments(*own), file.absolute(), resume=resume, speed=speed,
        updates=not no_updates, progress=Progress(),
    )  # fmt: skip
    _print_report(report, as_json)


@click.command()
@configured
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Folder to record into.")  # fmt: skip
@click.option("--max-file-bytes", default="64MiB", show_default=True, help="Begin a new file at this size.")
@click.option(
    "--max-files", type=click.IntRange(min=0), default=0, help="Keep only the newest so many files."
)
@click.option("--max-events", type=click.IntRange(min=0), default=0, help="End after so many events.")
@with_json
def capture(
    path: Path | None,
    overrides: tuple[str, ...],
    out: Path,
    max_file_bytes: str,
    max_files: int,
    max_events: int,
    as_json: bool,
) -> None:
    """Record every source as received (not redacted), to replay it; stores and acknowledges nothing."""
    from pipeline.recording import record_sources
    from pipeline.units import Size

    try:
        size = int(Size.parse(max_file_bytes))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--max-file-bytes") from None
    config = Context(path, overrides).load(require_sources=True)
    lines, last = record_sources(config, out, max_file_bytes=size, max_files=max_files, max_events=max_events)
    say(
        {"lines": lines, "file": str(last)},
        f"{lines:,} lines recorded" + (f", the last into {last}" if lines else ""),
        as_json,
    )


@click.command()
@configured
@with_json
def update(path: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Train now: ask ingest to close the open window at its next tick."""
    from pipeline.looking import request_update

    number = request_update(Context(path, overrides).load())
    say({"request": number}, f"request {number} noted; a running ingest honours it within a second", as_json)


def _dry_run(context: Context, max_events: int, timeout: str | None, as_json: bool) -> None:
    import msgspec

    from pipeline.dry_run import DryEvent, dry_run, format_dry_event, format_dry_run
    from pipeline.units import Duration

    try:
        timeout_s = float(Duration.parse(timeout or "30s"))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--timeout") from None
    config = context.load(require_sources=True)

    def show(event: DryEvent) -> None:
        click.echo(msgspec.json.encode(event).decode() if as_json else format_dry_event(event))

    done = dry_run(config, max_events=max_events or 10, timeout_s=timeout_s, show=show)
    click.echo(format_dry_run(done), err=as_json)
    sys.exit(FAILED if done.faults else 0)


def _print_report(report: Any, as_json: bool) -> None:
    from pipeline.report import format_report

    say(report, format_report(report), as_json)
