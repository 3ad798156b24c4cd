"""Versions: list, show, verify, promote, rollback."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pipeline.commands.common import DONE, FAILED, Context, configured, say, say_both, with_json

__all__ = ["versions"]


@click.group()
def versions() -> None:
    """The registry of versions."""


@versions.command("list")
@configured
@with_json
def versions_list(path: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """All versions, the active one marked."""
    from pipeline.registry_verbs import list_versions

    say_both(list_versions(Context(path, overrides).load()), as_json)


@versions.command("show")
@configured
@with_json
@click.argument("version")
def versions_show(path: Path | None, overrides: tuple[str, ...], as_json: bool, version: str) -> None:
    """A version's manifest: lineage, scores, criteria. VERSION is a number, "active" or "previous"."""
    from pipeline.registry_verbs import show_version

    say_both(show_version(Context(path, overrides).load(), version), as_json)


@versions.command("verify")
@configured
@with_json
@click.argument("version", required=False)
def versions_verify(
    path: Path | None, overrides: tuple[str, ...], as_json: bool, version: str | None
) -> None:
    """Check signature, hashes and base of a version, or of all; exit 1 if one is bad."""
    from pipeline.registry_verbs import verify_versions

    rows, text = verify_versions(Context(path, overrides).load(), version)
    say(rows, text, as_json)
    sys.exit(FAILED if any(row["problem"] for row in rows) else DONE)


@versions.command("promote")
@configured
@with_json
@click.argument("version")
def versions_promote(path: Path | None, overrides: tuple[str, ...], as_json: bool, version: str) -> None:
    """Make a version active again ("base" for none), after checking it."""
    from pipeline.registry_verbs import promote

    say_both(promote(Context(path, overrides).load(), version), as_json)


@versions.command("rollback")
@configured
@with_json
def versions_rollback(path: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Go back to the version that the active one was trained from, at last to the base."""
    from pipeline.registry_verbs import rollback

    say_both(rollback(Context(path, overrides).load()), as_json)
