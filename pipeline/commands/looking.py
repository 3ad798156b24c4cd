"""Looking: status, tap, doctor, score."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pipeline.commands.common import DONE, FAILED, Context, configured, fail, say, with_json

__all__ = ["doctor", "score", "status", "tap"]


@click.command()
@configured
@with_json
def status(path: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """What is stored, learned and active."""
    from pipeline.looking import status as look

    report, text = look(Context(path, overrides).load())
    say(report, text, as_json)


@click.command()
@configured
@with_json
@click.argument("source", default="")
@click.option("--step", type=click.Choice(["source", "decode", "redact", "dedup", "tokenize", "commit"]),
              help="Only at this step.")  # fmt: skip
@click.option("--max-events", type=click.IntRange(min=0), default=0, help="End after so many events.")
@click.option("--rate", type=click.FloatRange(min=0.1, max=200), default=10, show_default=True,
              help="Follow at most so many events a second.")  # fmt: skip
def tap(
    path: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
    source: str,
    step: str | None,
    max_events: int,
    rate: float,
) -> None:
    """Watch events pass each step of the running ingest, redacted; of SOURCE, or of all.

    A number follows an event from step to step. Ingest never waits: what is not shown is counted.
    """
    import msgspec

    from pipeline.control import ControlError, NoIngestError
    from pipeline.tap_view import format_item
    from pipeline.tap_view import tap as look

    def show(item: dict[str, object]) -> None:
        click.echo(msgspec.json.encode(item).decode() if as_json else format_item(item))

    config = Context(path, overrides).load()
    try:
        look(config, show, source=source, step=step or "", rate=rate, max_events=max_events)
    except (ControlError, NoIngestError) as error:
        fail(FAILED, str(error))


@click.command()
@configured
@with_json
@click.option("--repair", "mend", is_flag=True,
              help="First mend the data folder; refused while Edgewater runs on it.")  # fmt: skip
def doctor(path: Path | None, overrides: tuple[str, ...], as_json: bool, mend: bool) -> None:
    """Check everything that can be wrong; exit 1 if something is.

    With --repair, a ring or registry that cannot be trusted is made anew of what is good in it, blank samples
    take the place of damaged ones, and what was damaged is kept in the data folder's quarantine.
    """
    from pipeline.doctor import examine, format_findings, repair

    findings = repair(Context(path, overrides)) if mend else examine(Context(path, overrides))
    say([finding.to_dict() for finding in findings], format_findings(findings), as_json)
    sys.exit(FAILED if any(finding.level == "wrong" for finding in findings) else DONE)


@click.command()
@configured
@with_json
@click.argument("texts", nargs=-1)
@click.option("--file", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Score its lines.")
@click.option("--version", "names", multiple=True, metavar="N|active|base",
              help="Under which versions [default: base and active].")  # fmt: skip
def score(
    path: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
    texts: tuple[str, ...],
    file: Path | None,
    names: tuple[str, ...],
) -> None:
    """Bits per byte of texts under the base and versions: how well each predicts them."""
    from pipeline.looking import score_texts

    try:
        lines = [*texts, *(file.read_text(encoding="utf-8").splitlines() if file else [])]
    except UnicodeDecodeError:
        raise click.BadParameter(f"{file} is not UTF-8 text", param_hint="--file") from None
    lines = [line for line in lines if line]
    if not lines:
        raise click.UsageError("give a text, or --file")
    rows, text = score_texts(Context(path, overrides).load(), lines, list(names))
    say(rows, text, as_json)
