"""`edgewater versions`: look at the registry, check it, and move the active pointer by hand."""

from __future__ import annotations

import getpass
import time
from typing import Any

import click
import msgspec

from adapters import versions
from adapters.model_folder import load_manifest
from adapters.versions import VersionError
from pipeline.config import Config
from pipeline.roles import model_folder
from storage.folder import DataFolder
from storage.registry import AuditRow, Registry, VersionRow

__all__ = ["find_version", "list_versions", "promote", "rollback", "show_version", "verify_versions"]


def list_versions(config: Config) -> tuple[list[dict[str, Any]], str]:
    """All versions, as rows and as a table."""
    rows, active = _read(DataFolder.open(config.data_dir, create=False))
    out = [
        {
            **msgspec.to_builtins(row),
            "active": row.version == active.version,
            "previous": row.version == active.previous,
        }
        for row in rows
    ]
    lines = ["version  parent  window  active  sha256            made"]
    for row in rows:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.created))
        mark = "*" if row.version == active.version else ""
        lines.append(
            f"{row.version:>7}  {row.parent:>6}  {row.window:>6}  {mark:^6}  {row.sha256[:16]}  {made}"
        )
    if not rows:
        lines = ["no versions yet: the base model is active"]
    elif not active.version:
        lines.append("the base model is active")
    return out, "\n".join(lines)


def show_version(config: Config, name: str) -> tuple[Any, str]:
    """One version's manifest."""
    folder = DataFolder.open(config.data_dir, create=False)
    manifest = versions.read_manifest(folder, find_version(folder, name))
    result = manifest.result
    lines = [
        f"version {manifest.version}, from version {manifest.parent or 'base'} and window {manifest.window}"
        f" ({result.get('samples', '?')} samples)",
        f"base {manifest.base_sha256[:16]}  host class {manifest.host_class}  scale {result.get('scale')}",
        "",
        f"{'criterion':<16} {'value':>10} {'limit':>10}  verdict",
    ]
    for criterion in result.get("criteria", []):
        value, limit = criterion.get("value"), criterion.get("limit")
        lines.append(
            f"{criterion['name']:<16} {_number(value):>10} {_number(limit):>10}  {criterion['verdict']}"
            f"  ({criterion.get('rule', '')})"
        )
    return manifest, "\n".join(lines)


def verify_versions(config: Config, name: str | None) -> tuple[list[dict[str, Any]], str]:
    """Check one version or all. Returns: rows with "problem" ("" where all is well), and text."""
    folder = DataFolder.open(config.data_dir, create=False)
    rows = [find_version(folder, name)] if name else _read(folder)[0]
    base = load_manifest(model_folder(config)).base_sha256
    out: list[dict[str, Any]] = []
    for row in rows:
        problem = ""
        try:
            versions.verify(folder, row, base)
        except VersionError as error:
            problem = str(error)
        out.append({"version": row.version, "sha256": row.sha256, "problem": problem})
    text = "\n".join(
        item["problem"] or f"version {item['version']}: signature, hashes and base are right" for item in out
    )
    return out, text or "no versions yet"


def promote(config: Config, name: str) -> tuple[Any, str]:
    """Make a version active after checking it; "base" goes back to the base model.

    Raises: VersionError, LockHeldError.
    """
    folder = DataFolder.open(config.data_dir, create=False)
    number = 0 if name == "base" else find_version(folder, name).version
    return _activate(config, folder, number, "promote")


def rollback(config: Config) -> tuple[Any, str]:
    """Go back to the version that the active one was trained from; again and again, down to the base.

    Raises: VersionError if the base is active.
    """
    folder = DataFolder.open(config.data_dir, create=False)
    rows, active = _read(folder)
    row = next((row for row in rows if row.version == active.version), None)
    if row is None:
        raise VersionError(0, "the base model is active", "nothing is before it to roll back to")
    return _activate(config, folder, row.parent, "rollback")


def _activate(config: Config, folder: DataFolder, number: int, action: str) -> tuple[Any, str]:
    with folder.lock("admin"), Registry.open_or_create(folder.registry) as registry:
        before = registry.active().version
        if number:
            row = next((row for row in registry.versions() if row.version == number), None)
            if row is None:
                raise VersionError(number, "is not in the registry", "see `edgewater versions list`")
            versions.verify(folder, row, load_manifest(model_folder(config)).base_sha256)
        with registry.write() as writer:
            writer.set_active(number)
            writer.add_audit(
                AuditRow(time.time(), getpass.getuser(), action, f"version {before} -> {number}")
            )
    words = f"version {number} is active" if number else "the base model is active"
    return {"active": number, "before": before}, words + (
        f" (was {before or 'base'})" if before != number else ""
    )


def _read(folder: DataFolder) -> tuple[list[VersionRow], Any]:
    from storage.registry import ActivePointer

    if not folder.registry.is_dir():
        return [], ActivePointer()
    with Registry.open_reader(folder.registry) as registry:
        return registry.versions(), registry.active()


def find_version(folder: DataFolder, name: str) -> VersionRow:
    """A version by number, "active" or "previous". Raises: click.UsageError if there is none."""
    rows, active = _read(folder)
    named = {"active": active.version, "previous": active.previous}
    number = named.get(name, int(name.removeprefix("v")) if name.removeprefix("v").isdigit() else -1)
    row = next((row for row in rows if row.version == number), None)
    if row is None:
        known = ", ".join(str(row.version) for row in rows) or "none yet"
        raise click.UsageError(f"{name!r} names no version; there are: {known}")
    return row


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
