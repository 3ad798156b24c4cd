"""The command line: gathers the verbs, and turns every known error into a message and an exit code.

Each verb imports what it needs when it is called, so that --help is instant.
"""

from __future__ import annotations

import logging
import os
import sys

import click

from pipeline.commands import dlq, looking, loop, ring, setup, versions
from pipeline.commands.common import DONE, FAILED, REFUSED, USAGE, fail

__all__ = ["cli", "main"]

VERBOSE = "EDGEWATER_VERBOSE"
VERBS: tuple[click.Command, ...] = (
    loop.demo, loop.run, loop.ingest, loop.train, loop.replay, loop.capture, loop.update,
    looking.status, looking.tap, looking.doctor, looking.score, dlq.dlq,
    ring.ring, versions.versions,
    setup.init, setup.config_group, setup.model,
)  # fmt: skip


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


for verb in VERBS:
    cli.add_command(verb)


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
        fail(FAILED, "stopped")
    except BrokenPipeError:
        sys.exit(DONE)
    except Exception as error:
        fail(_code_of(error), str(error), error)


def _code_of(error: Exception) -> int | None:
    """The exit code of an error that a user can act on, None for one of ours."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "ConfigError" in names:
        return USAGE
    if names & {"WriteFailedError", "RingFullError", "CorruptBlockError", "CaptureError", "OSError"}:
        return FAILED
    refused = {"StorageError", "BaseModelError", "VersionError", "AdapterError", "StartupError"}
    return REFUSED if names & refused else None
