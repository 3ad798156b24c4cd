"""Dead letters: what was refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import click

from pipeline.commands.common import DONE, FAILED, Context, configured, fail, say, say_both, with_json

__all__ = ["dlq"]


@click.group()
def dlq() -> None:
    """Dead letters: inputs that were refused, with the reason."""


@dlq.command("list")
@configured
@with_json
@click.option("--source", default="", metavar="NAME", help="Only of this source.")
@click.option("--newest", type=click.IntRange(min=0), default=50, show_default=True,
              help="At most so many; 0 all.")  # fmt: skip
def dlq_list(path: Path | None, overrides: tuple[str, ...], as_json: bool, source: str, newest: int) -> None:
    """List the newest, oldest first."""
    from pipeline.dead_letter_verbs import list_letters

    say_both(list_letters(Context(path, overrides).load(), source, newest), as_json)


@dlq.command("show")
@configured
@with_json
@click.argument("letter")
def dlq_show(path: Path | None, overrides: tuple[str, ...], as_json: bool, letter: str) -> None:
    """Show one with its data, as it was stored: redacted."""
    from pipeline.dead_letter_verbs import show_letter

    say_both(show_letter(Context(path, overrides).load(), letter), as_json)


@dlq.command("retry")
@configured
@with_json
@click.argument("letters", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All that are there.")
def dlq_retry(
    path: Path | None, overrides: tuple[str, ...], as_json: bool, letters: tuple[str, ...], every: bool
) -> None:
    """Feed LETTERS again as they are, after the configuration changed; exit 1 unless all were taken.

    A running ingest does it with the configuration that it was started with. What is refused again is a new
    letter; the old one goes in the same commit.
    """
    _change(path, overrides, as_json, "retry", letters, every)


@dlq.command("purge")
@configured
@with_json
@click.argument("letters", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All that are there; needs --yes.")
@click.option("--yes", is_flag=True, help="Really.")
def dlq_purge(
    path: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
    letters: tuple[str, ...],
    every: bool,
    yes: bool,
) -> None:
    """Delete LETTERS."""
    if every and not yes:
        raise click.UsageError("--all deletes every dead letter: say --yes as well")
    _change(path, overrides, as_json, "purge", letters, every)


def _change(
    path: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
    do: Literal["retry", "purge"],
    letters: tuple[str, ...],
    every: bool,
) -> None:
    from pipeline.control import ControlError
    from pipeline.dead_letter_verbs import change_letters

    if bool(letters) == every:
        raise click.UsageError("name letters as `edgewater dlq list` does, or say --all")
    try:
        data, text, done = change_letters(Context(path, overrides).load(), do, letters, every=every)
    except ControlError as error:
        fail(FAILED, str(error))
    say(data, text, as_json)
    sys.exit(DONE if done else FAILED)
