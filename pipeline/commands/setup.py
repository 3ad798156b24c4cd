"""Setting up: init, config, model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from pipeline.commands.common import REFUSED, USAGE, Context, configured, fail, say, with_json

__all__ = ["config_group", "init", "model"]


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), default=Path("edgewater.toml"))
@click.option("--data-dir", default="edgewater-data", show_default=True, help="Data folder to write into it.")
@click.option("--source", default="events/*.jsonl", show_default=True, help="Path of the first source.")
@click.option("--force", is_flag=True, help="Overwrite the file.")
def init(file: Path, data_dir: str, source: str, force: bool) -> None:
    """Write a commented configuration."""
    from pipeline.config import example

    if file.exists() and not force:
        fail(REFUSED, f"{file} exists; add --force to overwrite it")
    file.write_text(example(data_dir, source), encoding="utf-8")
    click.echo(f"{file} written; check it with `edgewater config check --config {file}`")


@click.group("config")
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
        Context(path, overrides).load(require_sources=True)
    except ConfigError as error:
        if as_json:
            click.echo(json.dumps([msgspec.to_builtins(fault) for fault in error.faults], indent=1))
            sys.exit(USAGE)
        raise
    say([], "the configuration is right", as_json)


@config_group.command("show")
@configured
@with_json
def config_show(path: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """The configuration in effect, defaults filled in, secrets masked."""
    from pipeline.config import show

    click.echo(show(Context(path, overrides).load(), as_json))


@config_group.command("schema")
def config_schema() -> None:
    """JSON Schema of the configuration, for editors."""
    from pipeline.config import schema

    click.echo(json.dumps(schema(), indent=1))


@click.group()
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
    say(named, words, as_json)


def _slug(source: str) -> str:
    """A folder name for a base model's source."""
    name = Path(source).name.removesuffix(".gguf").lower()
    return "".join(char if char.isalnum() or char in "-._" else "-" for char in name)
