"""The command line. Each verb imports what it needs when it is called, so that --help is instant."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from pipeline.config import Config

__all__ = ["main"]

VERBOSE = "EDGEWATER_VERBOSE"
DONE, FAILED, USAGE, REFUSED = 0, 1, 2, 3
F = TypeVar("F", bound=Callable[..., Any])


class _Context:
    """--config and --set as given, and the configuration they make."""

    def __init__(self, config: Path | None, overrides: tuple[str, ...]) -> None:
        self.path, self.overrides = config, overrides

    def load(self, *more: str, require_sources: bool = False) -> Config:
        from pipeline import config

        path = self.path or config.find()
        return config.load(path, (*self.overrides, *more), require_sources=require_sources)

    def arguments(self, *more: str) -> list[str]:
        """The same settings for a child process."""
        from pipeline import config

        path = self.path or config.find()
        named = ["--config", str(path)] if path else []
        return named + [part for item in (*self.overrides, *more) for part in ("--set", item)]


def configured(command: F) -> F:
    """Give a verb --config and --set."""
    command = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting; repeatable."
    )(command)
    return click.option(
        "-c", "--config", "path", type=click.Path(path_type=Path, dir_okay=False),
        help="Configuration [default: $EDGEWATER_CONFIG, ./edgewater.toml, /etc/edgewater/edgewater.toml].",
    )(command)  # fmt: skip


def recording(command: F) -> F:
    """Give a verb --capture."""
    return click.option(
        "--capture", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
        help="Also record what is ingested, as received (not redacted), to replay it.",
    )(command)  # fmt: skip


def with_json(command: F) -> F:
    """Give a verb --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="edgewater")
@click.option("-v", "--verbose", count=True, envvar=VERBOSE, help="Log more; twice for everything.")
def cli(verbose: int) -> None:
    """Edgewater keeps a generative model on this gateway adapted to its site, with no cloud.

    Start with `edgewater demo`. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 refused for
    safety.
    """
    os.environ[VERBOSE] = str(verbose)  # the processes that a verb starts log alike
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    logging.basicConfig(level=level, format="%(asctime)s %(name)s %(levelname)s %(message)s")


# -- the loop ---------------------------------------------------------------------------------------


@cli.command()
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


@cli.command()
@configured
@click.option("--once", is_flag=True, help="End when the sources are drained and due updates are decided.")
@click.option("--no-updates", is_flag=True, help="Only ingest.")
@click.option("--max-events", type=click.IntRange(min=0), default=0, help="End after so many events.")
@recording
def run(
    path: Path | None,
    overrides: tuple[str, ...],
    once: bool,
    no_updates: bool,
    max_events: int,
    capture: Path | None,
) -> None:
    """The daemon: ingest and trainer, supervised, until SIGTERM."""
    from pipeline.running import run_gateway

    context = _Context(path, overrides)
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


@cli.command()
@configured
@click.option("--finite", is_flag=True, help="End when the sources are drained.")
@click.option("--lockstep", is_flag=True, help="Wait at each window's close until it is decided.")
@click.option("--max-events", type=click.IntRange(min=0), default=0, help="End after so many events.")
@recording
@click.option("--replay", type=click.Path(path_type=Path, exists=True, dir_okay=False), hidden=True)
@click.option("--speed", type=float, default=0.0, hidden=True)
def ingest(
    path: Path | None,
    overrides: tuple[str, ...],
    finite: bool,
    lockstep: bool,
    max_events: int,
    capture: Path | None,
    replay: Path | None,
    speed: float,
) -> None:
    """Only the ingest process: sources into the ring."""
    from pipeline.roles import run_ingest

    config = _Context(path, overrides).load(require_sources=replay is None)
    run_ingest(
        config,
        finite=finite,
        lockstep=lockstep,
        max_events=max_events,
        capture=capture,
        replay=replay,
        speed=speed,
    )


@cli.command()
@configured
@click.option("--lockstep", is_flag=True, help="Never merge or delay windows: the stream waits for each.")
@click.option("--reports", is_flag=True, hidden=True)
def train(path: Path | None, overrides: tuple[str, ...], lockstep: bool, reports: bool) -> None:
    """Only the trainer: due windows into versions."""
    from pipeline.roles import run_trainer

    run_trainer(_Context(path, overrides).load(), lockstep=lockstep, reports=reports)


@cli.command()
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

    context = _Context(path, overrides)
    own = (f"data_dir={json.dumps(str(into.absolute()))}", 'health.listen=""')
    report = run_replay(
        context.load(*own), context.arguments(*own), file.absolute(), resume=resume, speed=speed,
        updates=not no_updates, progress=Progress(),
    )  # fmt: skip
    _print_report(report, as_json)


@cli.command()
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
    config = _Context(path, overrides).load(require_sources=True)
    lines, last = record_sources(config, out, max_file_bytes=size, max_files=max_files, max_events=max_events)
    _say(
        {"lines": lines, "file": str(last)},
        f"{lines:,} lines recorded" + (f", the last into {last}" if lines else ""),
        as_json,
    )


@cli.command()
@configured
@with_json
def update(path: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Train now: ask ingest to close the open window at its next tick."""
    from pipeline.looking import request_update

    number = request_update(_Context(path, overrides).load())
    _say({"request": number}, f"request {number} noted; a running ingest honours it within a second", as_json)


# -- looking ----------------------------------------------------------------------------------------


@cli.command()
@configured
@with_json
def status(path: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """What is stored, learned and active."""
    from pipeline.looking import status as look

    report, text = look(_Context(path, overrides).load())
    _say(report, text, as_json)


@cli.command()
@configured
@with_json
def doctor(path: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check everything that can be wrong; exit 1 if something is."""
    from pipeline.doctor import examine, format_findings

    findings = examine(_Context(path, overrides))
    _say([finding.to_dict() for finding in findings], format_findings(findings), as_json)
    sys.exit(FAILED if any(finding.level == "wrong" for finding in findings) else DONE)


@cli.command()
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
    rows, text = score_texts(_Context(path, overrides).load(), lines, list(names))
    _say(rows, text, as_json)


@cli.group()
def versions() -> None:
    """The registry of versions."""


@versions.command("list")
@configured
@with_json
def versions_list(path: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """All versions, the active one marked."""
    from pipeline.registry_verbs import list_versions

    _say_both(list_versions(_Context(path, overrides).load()), as_json)


@versions.command("show")
@configured
@with_json
@click.argument("version")
def versions_show(path: Path | None, overrides: tuple[str, ...], as_json: bool, version: str) -> None:
    """A version's manifest: lineage, scores, criteria. VERSION is a number, "active" or "previous"."""
    from pipeline.registry_verbs import show_version

    _say_both(show_version(_Context(path, overrides).load(), version), as_json)


@versions.command("verify")
@configured
@with_json
@click.argument("version", required=False)
def versions_verify(
    path: Path | None, overrides: tuple[str, ...], as_json: bool, version: str | None
) -> None:
    """Check signature, hashes and base of a version, or of all; exit 1 if one is bad."""
    from pipeline.registry_verbs import verify_versions

    rows, text = verify_versions(_Context(path, overrides).load(), version)
    _say(rows, text, as_json)
    sys.exit(FAILED if any(row["problem"] for row in rows) else DONE)


@versions.command("promote")
@configured
@with_json
@click.argument("version")
def versions_promote(path: Path | None, overrides: tuple[str, ...], as_json: bool, version: str) -> None:
    """Make a version active again ("base" for none), after checking it."""
    from pipeline.registry_verbs import promote

    _say_both(promote(_Context(path, overrides).load(), version), as_json)


@versions.command("rollback")
@configured
@with_json
def versions_rollback(path: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Go back to the version that the active one was trained from, at last to the base."""
    from pipeline.registry_verbs import rollback

    _say_both(rollback(_Context(path, overrides).load()), as_json)


# -- setting up -------------------------------------------------------------------------------------


@cli.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), default=Path("edgewater.toml"))
@click.option("--data-dir", default="edgewater-data", show_default=True, help="Data folder to write into it.")
@click.option("--source", default="events/*.jsonl", show_default=True, help="Path of the first source.")
@click.option("--force", is_flag=True, help="Overwrite the file.")
def init(file: Path, data_dir: str, source: str, force: bool) -> None:
    """Write a commented configuration."""
    from pipeline.config import example

    if file.exists() and not force:
        _fail(REFUSED, f"{file} exists; add --force to overwrite it")
    file.write_text(example(data_dir, source), encoding="utf-8")
    click.echo(f"{file} written; check it with `edgewater config check --config {file}`")


@cli.group("config")
def config_group() -> None:
    """The configuration."""


@config_group.command("check")
@configured
@with_json
def config_check(path: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say all that is wrong with the configuration, with line and suggestion; exit 2 if anything is."""
    import msgspec

    from pipeline.config import ConfigError

    try:
        _Context(path, overrides).load(require_sources=True)
    except ConfigError as error:
        if as_json:
            click.echo(json.dumps([msgspec.to_builtins(fault) for fault in error.faults], indent=1))
            sys.exit(USAGE)
        raise
    _say([], "the configuration is right", as_json)


@config_group.command("show")
@configured
@with_json
def config_show(path: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """The configuration in effect, defaults filled in, secrets masked."""
    from pipeline.config import show

    click.echo(show(_Context(path, overrides).load(), as_json))


@config_group.command("schema")
def config_schema() -> None:
    """JSON Schema of the configuration, for editors."""
    from pipeline.config import schema

    click.echo(json.dumps(schema(), indent=1))


@cli.group()
def model() -> None:
    """Base models."""


@model.command("prepare")
@with_json
@click.argument("source", default="embedded")
@click.option("--into", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Folder to write [default: the cache folder, by name].")  # fmt: skip
@click.option("--anchors", type=click.IntRange(min=2), default=256, show_default=True,
              help="Texts that the base writes for its own anchors (the embedded model's ship).")  # fmt: skip
def model_prepare(as_json: bool, source: str, into: Path | None, anchors: int) -> None:
    """Prepare, prove and hash a base model: "embedded", a GGUF file, a Hugging Face folder or a hub id."""
    from adapters.base_model import prepare
    from adapters.model_folder import default_model_dir
    from pipeline.progress import Progress

    target = into or (default_model_dir() if source == "embedded" else default_model_dir(_slug(source)))
    progress = Progress()
    manifest = prepare(
        source, target, anchors=anchors, progress=lambda phase, done: progress.show(phase, done)
    )
    progress.clear()
    hashes = f"base {manifest.base_sha256[:16]} tokenizer {manifest.tokenizer_id}"
    words = f"{manifest.name} is ready in {target}\n{hashes}"
    named = {"path": str(target), "name": manifest.name, "base_sha256": manifest.base_sha256,
             "tokenizer_id": manifest.tokenizer_id}  # fmt: skip
    _say(named, words, as_json)


def main() -> None:
    """Run the command line; every known error becomes one clear message and its exit code."""
    try:
        cli.main(prog_name="edgewater", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(DONE)
    except click.ClickException as error:
        error.show()
        sys.exit(USAGE)
    except (click.Abort, KeyboardInterrupt):
        _fail(FAILED, "stopped")
    except BrokenPipeError:
        sys.exit(DONE)
    except Exception as error:
        _fail(_code_of(error), str(error), error)


def _code_of(error: Exception) -> int | None:
    """The exit code of an error that a user can act on, None for one of ours."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "ConfigError" in names:
        return USAGE
    if names & {"WriteFailedError", "RingFullError", "CorruptBlockError", "CaptureError", "OSError"}:
        return FAILED
    refused = {"StorageError", "BaseModelError", "VersionError", "AdapterError", "StartupError"}
    return REFUSED if names & refused else None


def _fail(code: int | None, message: str, error: Exception | None = None) -> NoReturn:
    if code is None and error is not None:
        raise error
    click.echo(f"edgewater: {message}", err=True)
    sys.exit(code)


def _say(data: Any, text: str, as_json: bool) -> None:
    if not as_json:
        click.echo(text)
        return
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(data)).decode())


def _say_both(answer: tuple[Any, str], as_json: bool) -> None:
    _say(answer[0], answer[1], as_json)


def _print_report(report: Any, as_json: bool) -> None:
    from pipeline.report import format_report

    _say(report, format_report(report), as_json)


def _slug(source: str) -> str:
    """A folder name for a base model's source."""
    name = Path(source).name.removesuffix(".gguf").lower()
    return "".join(char if char.isalnum() or char in "-._" else "-" for char in name)
