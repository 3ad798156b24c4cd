"""What the verbs share: options, the configuration they make, exit codes, and how an answer is said."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from pipeline.config import Config

__all__ = [
    "DONE",
    "FAILED",
    "REFUSED",
    "SHARD",
    "USAGE",
    "Context",
    "configured",
    "fail",
    "recording",
    "say",
    "say_both",
    "with_json",
]

DONE, FAILED, USAGE, REFUSED = 0, 1, 2, 3
F = TypeVar("F", bound=Callable[..., Any])


class _Shard(click.ParamType[str]):
    """A shard by its name or the number of its process."""

    name = "shard"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Read it; the error names what was expected."""
        from pipeline.shards import parse_shard

        try:
            return parse_shard(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


SHARD = _Shard()


class Context:
    """--config and --set as given, and the configuration they make."""

    def __init__(self, config: Path | None, overrides: tuple[str, ...]) -> None:
        self.path, self.overrides = config, overrides

    def load(self, *more: str, require_sources: bool = False) -> Config:
        """Read it. Raises: ConfigError with all faults."""
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


def fail(code: int | None, message: str, error: Exception | None = None) -> NoReturn:
    """End with a message and an exit code; without a code the error is ours, and is raised."""
    if code is None and error is not None:
        raise error
    click.echo(f"edgewater: {message}", err=True)
    sys.exit(code)


def say(data: Any, text: str, as_json: bool, *, err: bool = False) -> None:
    """Print an answer: the text for people, or the data as JSON; to standard error where output is data."""
    if not as_json:
        click.echo(text, err=err)
        return
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(data)).decode(), err=err)


def say_both(answer: tuple[Any, str], as_json: bool) -> None:
    """Print an answer that comes as data and text."""
    say(answer[0], answer[1], as_json)
