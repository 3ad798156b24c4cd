"""`edgewater doctor`: look at everything that can be wrong, and say what to do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

import storage.opening
from pipeline.config import Config, ConfigError
from pipeline.roles import foreign_packages, model_folder
from pipeline.shards import numbers, shard_name, sources_of
from pipeline.source_settings import MqttSource
from storage.check import check_folder
from storage.errors import StorageError
from storage.folder import DataFolder
from storage.registry import Registry
from storage.ring import Ring

__all__ = ["Finding", "examine", "format_findings", "repair"]

MIN_FREE_BYTES = 512 << 20
_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "overlay"}
_UNPROVEN_FILE_SYSTEMS = {"btrfs", "f2fs", "zfs"}


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    level: Literal["right", "warning", "wrong"]
    what: str
    words: str

    def to_dict(self) -> dict[str, str]:
        """For JSON."""
        return {"level": self.level, "what": self.what, "words": self.words}


class Loadable(Protocol):
    """What knows how to load the configuration."""

    def load(self, *more: str, require_sources: bool = False) -> Config:
        """Load it."""


def examine(context: Loadable) -> list[Finding]:
    """Look at the installation, the configuration, the model and the data folder."""
    findings = [*_packages()]
    try:
        config = context.load(require_sources=True)
    except ConfigError as error:
        return [*findings, Finding("wrong", "configuration", str(error))]
    findings.append(Finding("right", "configuration", f"{len(config.sources)} sources"))
    for look in (_sources, _model, _disk, _folder):
        findings += look(config)
    return findings


def repair(context: Loadable) -> list[Finding]:
    """Mend the data folder offline: what `edgewater doctor --repair` does.

    Damaged rings and registries are set aside and made anew of what is good; damaged blocks become blanks.
    Returns: What was done, then what `examine` finds.
    Raises: ConfigError; LockHeldError while ingest, the trainer or the server runs.
    """
    config = context.load()
    folder = DataFolder.open(config.data_dir, create=False)
    try:
        done = storage.opening.repair(folder)
    finally:
        folder.close()
    findings = [Finding("warning", "repaired", words) for words in done]
    return [*(findings or [Finding("right", "repair", "there was nothing to mend")]), *examine(context)]


def format_findings(findings: list[Finding]) -> str:
    """One line a finding, and a verdict."""
    marks = {"right": "ok  ", "warning": "warn", "wrong": "BAD "}
    lines = [f"{marks[f.level]} {f.what}: {f.words}" for f in findings]
    wrong = sum(f.level == "wrong" for f in findings)
    return "\n".join([*lines, "", f"{wrong} things are wrong" if wrong else "nothing is wrong"])


def _packages() -> Iterator[Finding]:
    if strangers := foreign_packages():
        yield Finding(
            "wrong", "packages", f"{', '.join(strangers)} overwrites ours: uninstall it from this environment"
        )
    else:
        yield Finding("right", "packages", "pipeline, adapters and storage are Edgewater's own")


def _sources(config: Config) -> Iterator[Finding]:
    from pipeline.sources.files import unmatched_sources

    unmatched = unmatched_sources(config)
    for source in config.sources:
        if source in unmatched:
            yield Finding("warning", f"source {source.name}", f"no file matches {source.path} yet")
        else:
            yield Finding("right", f"source {source.name}", source.kind)
        if source.mqtt is not None:
            yield from _broker(source.name, source.mqtt)
    if config.ingest.processes > 1:
        for number in range(1, config.ingest.processes + 1):
            names = ", ".join(source.name for source in sources_of(config, number))
            level: Literal["right", "warning"] = "right" if names else "warning"
            words = f"reads {names}" if names else "has no source: it is not started"
            yield Finding(level, f"ingest process {number}", words)


def _broker(source: str, mqtt: MqttSource) -> Iterator[Finding]:
    from pipeline.sources.mqtt_probe import measure_credit

    credit = measure_credit(source, mqtt)
    yield Finding("right" if credit.good else "warning", f"broker of {source}", credit.words)
    if mqtt.url.startswith("mqtt:") and mqtt.password:
        words = "the password goes over the network in the clear: use mqtts://"
        yield Finding("warning", f"broker of {source}", words)


def _model(config: Config) -> Iterator[Finding]:
    from adapters.model_folder import BaseModelError, verify

    try:
        manifest = verify(model_folder(config), weights=True)
    except BaseModelError as error:
        yield Finding("wrong", "base model", str(error))
        return
    yield Finding("right", "base model", f"{manifest.name}, every file's hash is right")
    if manifest.chat is None:
        yield Finding("warning", "base model", "no chat template: exchanges become dead letters")
    if not manifest.lossless:
        yield Finding("warning", "base model", "its tokenizer is not lossless: the ring keeps texts too")


def _disk(config: Config) -> Iterator[Finding]:
    place = config.data_dir
    while not place.exists():
        place = place.parent
    kind = _file_system(place)
    if kind in _NETWORK_FILE_SYSTEMS:
        yield Finding("wrong", "file system", f"{kind} at {place}: LMDB needs a local one; move data_dir")
    elif kind in _UNPROVEN_FILE_SYSTEMS:
        yield Finding(
            "warning", "file system", f"{kind} does not promise that preallocated space stays usable"
        )
    else:
        yield Finding("right", "file system", kind or "unknown")
    free = shutil.disk_usage(place).free
    shards = [shard_name(number) for number in numbers(config)]
    missing = sum(not (config.data_dir / "ring" / shard).exists() for shard in shards)
    needed = MIN_FREE_BYTES + missing * int(config.ring.max_bytes)
    level: Literal["right", "warning"] = "right" if free > needed else "warning"
    yield Finding(level, "disk", f"{free >> 20} MiB free, {needed >> 20} MiB wanted")


def _folder(config: Config) -> Iterator[Finding]:
    if not config.data_dir.exists():
        parent = config.data_dir.parent
        writable = os.access(parent if parent.exists() else "/", os.W_OK)
        level: Literal["right", "warning"] = "right" if writable else "warning"
        yield Finding(level, "data folder", f"{config.data_dir} will be made at the first run")
        return
    try:
        folder = DataFolder.open(config.data_dir, create=False)
    except StorageError as error:
        yield Finding("wrong", "data folder", str(error))
        return
    yield Finding("right", "data folder", str(folder.path))
    live = _running(folder)
    try:
        problems = check_folder(folder, live=live)
    except StorageError as error:  # written by a newer Edgewater
        yield Finding("wrong", "data folder", str(error))
        return
    for problem in problems:
        yield Finding("warning" if problem.kind == "stray" else "wrong", problem.kind, str(problem))
    # LMDB is let near a file only after it was found sound: a damaged one can end this process.
    unsound = any(problem.cure == "rebuild" for problem in problems)
    checks: tuple[Callable[[DataFolder, Config], Iterator[Finding]], ...] = (_rings, _registry)
    for check in () if unsound else checks:
        try:
            yield from check(folder, config)
        except StorageError as error:
            yield Finding("wrong", check.__name__.strip("_"), str(error))
    if not problems:
        how = "while Edgewater runs on it" if live else "at rest"
        yield Finding("right", "data folder", f"every page, seal and checksum is right ({how})")


def _running(folder: DataFolder) -> bool:
    """Whether any process holds a role on the data folder."""
    roles = (path.stem for path in folder.run.glob("*.lock") if path.name != "registry.lock")
    return any(folder.holder(role) is not None for role in roles)


def _rings(folder: DataFolder, config: Config) -> Iterator[Finding]:
    keys, mine = set(), [shard_name(number) for number in numbers(config)]
    for path in (folder.ring / shard for shard in folder.shards()):
        with Ring.open_reader(path) as ring:
            keys.add(ring.header.dedup_key)
            state, rows = ring.read_state(), ring.quarantined()
            words = f"{state.next_seq - state.tail_seq:,} samples"
            if state.lost:
                words += f", {state.lost:,} were lost to damage since it was made"
            yield Finding("warning" if state.lost else "right", f"ring {path.name}", words)
            for row in rows[-3:]:
                words = (
                    f"samples {row.first_seq} to {row.first_seq + row.samples - 1} are blank: {row.reason}"
                )
                yield Finding("warning", f"ring {path.name}", words)
            if ring.map_bytes != int(config.ring.max_bytes):
                words = (
                    f"made with {ring.map_bytes >> 20} MiB; ring.max_bytes takes effect in a new data folder"
                )
                yield Finding("warning", f"ring {path.name}", words)
            if mine and path.name not in mine:
                words = (
                    "no ingest process of this configuration writes it; once its sources are read by "
                    "another and its windows are decided, it may be deleted while Edgewater is stopped"
                )
                yield Finding("right", f"ring {path.name}", words)
    if len(keys) > 1:
        words = "have dedup secrets of their own: what a source sends again after it moved is stored again"
        yield Finding("warning", "rings", words)
    kept = folder.path / "quarantine"
    for path in sorted(kept.iterdir()) if kept.is_dir() else ():
        if path.is_dir():
            words = f"{path} was set aside, damaged; delete it when nobody wants to look at it"
            yield Finding("warning", "quarantine", words)


def _registry(folder: DataFolder, config: Config) -> Iterator[Finding]:
    from adapters import versions

    if not folder.registry.is_dir():
        return
    with Registry.open_reader(folder.registry) as registry:
        rows, active = registry.versions(), registry.active()
        quarantined = [row.window for row in registry.updates() if row.state == "quarantined"]
    bad: list[Any] = []
    for row in rows:
        try:
            versions.verify(folder, row)
        except versions.VersionError as error:
            bad.append(error)
    if bad:
        yield Finding("wrong", "versions", "; ".join(map(str, bad)))
    else:
        yield Finding(
            "right",
            "versions",
            f"{len(rows)}, all signed and whole; active is {active.version or 'the base'}",
        )
    if quarantined:
        yield Finding("warning", "windows", f"quarantined after five failures: {quarantined}")


def _file_system(place: Path) -> str:
    """The type of the file system that holds a path, from the longest mount point above it."""
    best, kind = "", ""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8")
    except OSError:
        return ""
    resolved = str(place.resolve())
    for line in mounts.splitlines():
        point, found = line.split()[1:3]
        below = resolved == point or resolved.startswith(point.rstrip("/") + "/")
        if below and len(point) >= len(best):
            best, kind = point, found
    return kind
