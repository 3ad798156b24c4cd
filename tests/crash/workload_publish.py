"""Publishing versions as the trainer does: key, files, folder, rename, then one transaction that promotes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from adapters import versions
from adapters.versions import Manifest, SigningKey
from storage.folder import DataFolder
from storage.registry import Registry, UpdateRow, UpdateState
from tests.crash.audit import Violation, acknowledged_numbers, check_undamaged, opened
from tests.crash.plan import say

__all__ = ["audit", "prepare", "run"]

VERSIONS = 4
BASE = "b" * 64
ADAPTER_BYTES = 23_000


def _candidate(folder: DataFolder, version: int) -> Path:
    return folder.update_folder("main", version) / "candidate"


def _row(version: int, state: UpdateState) -> UpdateRow:
    made = version if state is UpdateState.PROMOTED else 0
    return UpdateRow("main", version, version, version * 10, version * 10 + 9, 10, state, version=made)


def prepare(root: Path, seed: int) -> None:
    """A data folder whose updates are evaluated: what is left is to publish their candidates."""
    with opened(root / "data") as data:
        for version in range(1, VERSIONS + 2):
            candidate = _candidate(data.folder, version)
            candidate.mkdir(parents=True)
            (candidate / "adapter_config.json").write_bytes(b"{}" * version)
            weights = hashlib.shake_128(f"adapter {seed} {version}".encode()).digest(ADAPTER_BYTES)
            (candidate / "adapter_model.safetensors").write_bytes(weights)
            for state in (UpdateState.CLAIMED, UpdateState.STAGED, UpdateState.EVALUATED):
                with data.registry.write() as writer:
                    writer.put_update(_row(version, state))


def _promote(folder: DataFolder, registry: Registry, version: int) -> None:
    candidate = _candidate(folder, version)
    manifest = Manifest(
        version=version, parent=version - 1, shard="main", window=version, last_window=version,
        samples_sha256="", base_sha256=BASE, tokenizer_sha256="", seed=0, recipe={}, limits={}, result={},
        files=versions.describe_files(candidate), gateway="g", host_class="h", created=0.0, key="",
    )  # fmt: skip
    row = versions.publish(folder, candidate, manifest, SigningKey.open_or_create(folder.keys))
    with registry.write() as writer:
        writer.put_version(row)
        writer.set_active(version)
        writer.put_update(_row(version, UpdateState.PROMOTED))


def run(root: Path, seed: int) -> None:
    """The part that is recorded; the device's key is made in it."""
    folder = DataFolder.open(root / "data", create=False)
    with Registry.open_or_create(folder.registry) as registry:
        for version in range(1, VERSIONS + 1):
            say(f"try version {version}")
            _promote(folder, registry, version)
            say(f"ack version {version}")


def audit(root: Path, seed: int, book: Sequence[str], heard: int) -> None:
    """I5: the active pointer names a complete, signed version that fits the base, or the base itself."""
    acknowledged, tried = acknowledged_numbers(book[:heard], "version")
    check_undamaged(root / "data")
    with opened(root / "data") as data:
        active = _check(data.folder, data.registry)
        if not acknowledged <= active <= tried:
            raise Violation("I5", f"version {active} is active, {acknowledged} was acknowledged")
        _promote(data.folder, data.registry, active + 1)
        if _check(data.folder, data.registry) != active + 1:
            raise Violation("goes on", f"version {active + 1} was promoted and is not active")


def _check(folder: DataFolder, registry: Registry) -> int:
    versions.remove_unreferenced(folder, registry)
    if again := versions.remove_unreferenced(folder, registry):
        raise Violation("I5", f"a second recovery still removed {again}")
    rows, active = registry.versions(), registry.active().version
    for row in rows:
        try:
            versions.verify(folder, row, BASE)
        except versions.VersionError as error:
            raise Violation("I5", str(error)) from error
    if [row.version for row in rows] != list(range(1, active + 1)):
        raise Violation("I5", f"version {active} is active, rows are {[row.version for row in rows]}")
    if {path.name for path in folder.versions.iterdir()} != {row.folder for row in rows}:
        raise Violation("I5", "folders and rows of versions differ after recovery")
    for update in registry.updates("main"):
        if (update.state is UpdateState.PROMOTED) != (update.window <= active):
            raise Violation("I5", f"window {update.window} is {update.state} with version {active} active")
    return active
