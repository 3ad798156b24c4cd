"""The ring: info, export, import."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pipeline.commands.common import FAILED, SHARD, Context, configured, fail, say, say_both, with_json

__all__ = ["ring"]

of_shard = click.option(
    "--shard", type=SHARD, default="main", show_default=True, metavar="N",
    help="Whose ring, of several: the number of the ingest process, or its shard.",
)  # fmt: skip


@click.group()
def ring() -> None:
    """The ring: how it stands, back it up, restore it."""


@ring.command("info")
@configured
@with_json
@of_shard
def ring_info(path: Path | None, overrides: tuple[str, ...], as_json: bool, shard: str) -> None:
    """Size, samples, windows, blocks and compression of the ring."""
    from pipeline.ring_verbs import ring_info as look

    say_both(look(Context(path, overrides).load(), shard), as_json)


@ring.command("export")
@configured
@with_json
@of_shard
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
def ring_export(path: Path | None, overrides: tuple[str, ...], as_json: bool, shard: str, file: Path) -> None:
    """Back the ring up into FILE (- for standard output), consistent while ingest runs.

    FILE appears, or replaces an older one, when it is complete. It holds the stored samples in the clear
    and the secret of the dedup hashes: keep it as safe as the data folder (mode 0600), or pipe it into
    a program that encrypts it. Versions and the registry are not in it.
    """
    from pipeline.ring_verbs import export_from

    config = Context(path, overrides).load()
    if str(file) != "-":
        say_both(export_from(config, file.absolute(), shard), as_json)
        return
    if sys.stdout.isatty():
        raise click.UsageError("standard output is a terminal: pipe it into a file or a program")
    try:
        data, text = export_from(config, sys.stdout.buffer, shard)
        sys.stdout.flush()
    except BrokenPipeError:
        fail(FAILED, "who read the export has ended: it is not complete")
    say(data, text, as_json, err=True)


@ring.command("import")
@configured
@with_json
@of_shard
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True))
@click.option("--max-bytes", metavar="SIZE",
              help="Size of the new ring; older samples are left out if they do not fit"
                   " [default: ring.max_bytes].")  # fmt: skip
def ring_import(
    path: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
    shard: str,
    file: Path,
    max_bytes: str | None,
) -> None:
    """Make the ring of a data folder that has none of FILE (- for standard input), which `ring export` wrote.

    With several ingest processes each has a ring: export and import every one, each as its own --shard.
    Everything is checked before the ring appears. Where the registry is new too, all windows that the
    ring holds are due again: at most trigger.max_due of them wait, older ones are merged.
    """
    from pipeline.ring_verbs import import_into
    from pipeline.units import Size

    config = Context(path, overrides).load()
    try:
        size = int(Size.parse(max_bytes)) if max_bytes else int(config.ring.max_bytes)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--max-bytes") from None
    say_both(import_into(config, sys.stdin.buffer if str(file) == "-" else file, size, shard), as_json)
