"""`run`, `replay` and `demo`: both processes under one supervisor, with progress, to an end or for ever."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from adapters.model_folder import MANIFEST, verify
from pipeline.config import EMBEDDED_MODEL, Config
from pipeline.progress import Progress, describe
from pipeline.report import Report, build_report, write_report
from pipeline.roles import model_folder, refuse_foreign_packages, stop_on_signals
from pipeline.shards import MAIN, numbers, shard_name, sources_of
from pipeline.sources.files import unmatched_sources
from pipeline.sources.lines import LineSplitter, is_cut_short, open_stream
from pipeline.supervise import Child, Supervisor
from storage.durable import write_file_durably
from storage.errors import StorageError
from storage.folder import DataFolder
from storage.migrate import migrate_folder
from storage.registry import Registry
from storage.ring import Ring

__all__ = ["ReplayRecord", "ensure_model", "run_gateway", "run_replay"]

_RECORD = "replay.json"


class ReplayRecord(msgspec.Struct, frozen=True):
    """What a replayed data folder was fed, so that --resume feeds the same.

    Attributes:
        file, sha256: The file's name and content.
        lines: How many it holds, the header not counted.
        finished: Whether it was fed to its end.
    """

    file: str
    sha256: str
    lines: int
    finished: bool = False


def ensure_model(config: Config, progress: Progress) -> Path:
    """The prepared base model; the embedded one is prepared when it is missing.

    Raises: BaseModelError if another one is missing or changed.
    """
    folder = model_folder(config)
    if config.model.path != EMBEDDED_MODEL or (folder / MANIFEST).exists():
        verify(folder, weights=False)  # the trainer hashes the weights too
        return folder
    from adapters.base_model import prepare

    progress.say("preparing the embedded base model SmolLM2-135M-Instruct (once, about a minute)")
    prepare("embedded", folder, progress=lambda phase, done: progress.show(f"model: {phase}", done))
    progress.clear()
    return folder


def run_gateway(
    config: Config,
    arguments: Sequence[str],
    *,
    once: bool,
    updates: bool,
    max_events: int,
    capture: Path | None = None,
) -> int:
    """Run ingest and trainer until a signal, or with `once` until the sources are drained and decided.

    Args:
        config: The configuration.
        arguments: --config and --set as given, for the children.
        capture: Folder to record what is ingested in.
    Returns: The exit code.
    """
    refuse_foreign_packages()
    progress = Progress()
    with stop_on_signals() as stop:
        folder = DataFolder.open(config.data_dir, create=True)
        with folder.lock("supervisor"):
            migrate_folder(folder)
            ensure_model(config, progress)
            lockstep = ["--lockstep"] if once else []
            flags = [*(["--finite"] if once else []), *(lockstep if updates else [])]
            flags += ["--max-events", str(max_events)] if max_events else []
            patient = not once
            ingests = [
                _ingest_child(config, number, [*arguments, *flags], capture, patient=patient)
                for number in numbers(config)
            ]
            trainer = Child("trainer", ["train", *arguments, *lockstep], patient=patient, ends=False)
            children = [*ingests, trainer] if updates else ingests
            for source in unmatched_sources(config):
                progress.say(f"source {source.name}: no file matches {source.path} yet")
            # A window that cools down when its stream has ended would cool for ever: it stays due.
            wait = updates and (once or not config.trigger.cooldown)
            code = Supervisor(children, stop).run(
                lambda: all(child.done for child in ingests) and (not wait or _decided(folder))
            )
        report = build_report(folder)
        write_report(folder, report)
        if once and not code and not stop.is_set():
            progress.say(
                f"{report.events:,} events, {report.samples:,} samples, {len(report.windows)} windows so far"
            )
        return code


def _ingest_child(
    config: Config, number: int, arguments: Sequence[str], capture: Path | None, *, patient: bool
) -> Child:
    """One ingest process; where there are several, each is called and records its captures by its shard."""
    shard, processes = shard_name(number), config.ingest.processes
    # Their number is that of this run, also when one starts again after the file was changed.
    flags = [*arguments, "--set", f"ingest.processes={processes}", "--shard", shard]
    name = f"ingest {shard}" if processes > 1 else "ingest"
    if capture:
        flags += ["--capture", str(capture / shard if processes > 1 else capture)]
    has_stdin = any(source.kind == "stdin" for source in sources_of(config, number))
    return Child(name, ["ingest", *flags], stdin=has_stdin, patient=patient)


def run_replay(
    config: Config,
    arguments: Sequence[str],
    file: Path,
    *,
    resume: bool,
    speed: float = 0.0,
    updates: bool = True,
    progress: Progress,
) -> Report:
    """Feed a capture or plain lines into a data folder of its own, in lockstep with the updates.

    Args:
        config: With data_dir set to that folder and no health server.
        arguments: --config and --set for the children.
        resume: Go on in a folder that already holds a part of the same file.
    Returns: The learning report, also written to the data folder.
    Raises: StorageError where the folder holds something else; SystemExit with a child's code.
    """
    refuse_foreign_packages()
    record = _record(file)
    with stop_on_signals() as stop:
        folder = DataFolder.open(config.data_dir, create=True)
        with folder.lock("supervisor"):
            migrate_folder(folder)
            before = _check_record(folder, record, resume)
            if before is not None and before.finished and (not updates or _decided(folder)):
                return build_report(folder)
            ensure_model(config, progress)
            if is_cut_short(file):
                progress.say(f"{file.name} is cut short: only the {record.lines:,} lines that unpack are fed")
            write_file_durably(folder.path / _RECORD, msgspec.json.encode(record))
            code = _feed(folder, arguments, file, record, speed, updates, stop, progress)
            progress.clear()
            report = build_report(folder)
            if code == 0 and not stop.is_set():
                finished = msgspec.structs.replace(record, finished=True)
                write_file_durably(folder.path / _RECORD, msgspec.json.encode(finished))
            write_report(folder, report)
    if stop.is_set():
        progress.say("stopped; the same command with --resume goes on")
    if code or stop.is_set():
        raise SystemExit(code or 1)
    return report


def _feed(
    folder: DataFolder,
    arguments: Sequence[str],
    file: Path,
    record: ReplayRecord,
    speed: float,
    updates: bool,
    stop: threading.Event,
    progress: Progress,
) -> int:
    watcher = _Watcher(folder, record.lines, progress)
    flags = ["--replay", str(file), "--speed", str(speed), "--finite", *(["--lockstep"] if updates else [])]
    ingest = Child("ingest", ["ingest", *arguments, *flags], patient=False)
    train = ["train", *arguments, "--lockstep", "--reports"]
    trainer = Child("trainer", train, watcher.told, patient=False, ends=False)
    supervisor = Supervisor([ingest, trainer] if updates else [ingest], stop)
    return supervisor.run(lambda: ingest.done and (not updates or _decided(folder)), watcher.look)


class _Watcher:
    """Turns what the processes wrote and told into progress."""

    def __init__(self, folder: DataFolder, lines: int, progress: Progress) -> None:
        self._folder, self._lines, self._progress = folder, lines, progress
        self._training: dict[str, Any] = {}
        self._seen, self._again = (-1, -1), math.inf
        self._decided = {window.window for window in build_report(folder).windows if window.reason}

    def told(self, report: dict[str, Any]) -> None:
        """A running update reports."""
        self._training = report
        done, words = describe(report)
        self._progress.show(f"window {report['window']}", done, words)

    def look(self) -> None:
        """Show how far the stream is, when something changed."""
        marks = (_transaction(self._folder.ring / MAIN), _transaction(self._folder.registry))
        now = time.monotonic()
        if marks != self._seen:
            self._seen, self._again = marks, now + 1.0
        elif now < self._again:
            return
        else:
            # Once more after a change: a commit shows in the file before readers get what it holds.
            self._again = math.inf
        report = build_report(self._folder)
        for window in report.windows:
            final = window.decision in ("promoted", "rejected", "quarantined", "skipped", "expired")
            if final and window.window not in self._decided:
                self._decided.add(window.window)
                self._progress.say(_sentence(window))
        if self._lines:
            words = f"{report.events:,} of {self._lines:,} events, {report.samples:,} samples"
            self._progress.show("stream", report.events / self._lines, words)


def _sentence(window: Any) -> str:
    scores = ""
    if window.base_bits_per_byte and window.active_bits_per_byte is not None:
        ratio = window.active_bits_per_byte / window.base_bits_per_byte
        scores = (
            f": before training {window.active_bits_per_byte:.2f} bits per byte, {ratio:.0%} of the base's"
        )
    what = f"promoted as version {window.version}" if window.decision == "promoted" else window.decision
    why = f" ({window.reason})" if window.reason else ""
    return f"window {window.window} {what} in {window.seconds:.0f} s{scores}{why}"


def _transaction(path: Path) -> int:
    """A cheap mark that changes with every commit: LMDB writes one of its two meta pages each time."""
    try:
        with (path / "data.mdb").open("rb") as file:
            return hash(file.read(8_192))
    except OSError:
        return -1


def _decided(folder: DataFolder) -> bool:
    """Whether every closed window is decided."""
    try:
        shards = folder.shards()
        with Registry.open_reader(folder.registry) as registry:
            for shard in shards:
                with Ring.open_reader(folder.ring / shard) as ring:
                    if ring.windows(after=registry.cursor(shard)):
                        return False
        return bool(shards)
    except StorageError:
        return False


def _record(file: Path) -> ReplayRecord:
    digest = hashlib.sha256()
    with file.open("rb") as raw:
        while data := raw.read(1 << 20):
            digest.update(data)
    try:
        return ReplayRecord(file.name, digest.hexdigest(), _count_lines(file))
    except zstandard.ZstdError as error:
        raise OSError(f"{file} cannot be unpacked: {error}") from error


def _count_lines(file: Path) -> int:
    """Lines of a replay's file, a capture's header not counted."""
    splitter, lines, first = LineSplitter(), 0, True
    with open_stream(file) as stream:
        while data := stream.read(1 << 20):
            found = splitter.feed(data)
            lines += len(found)
            if first and found:
                lines -= b'"edgewater_capture"' in found[0][1]
                first = False
    return lines + len(splitter.finish())


def _check_record(folder: DataFolder, record: ReplayRecord, resume: bool) -> ReplayRecord | None:
    """What the folder holds already. Raises: StorageError if that is not a part of this replay."""
    path = folder.path / _RECORD
    if not path.exists():
        if folder.shards():
            hint = "choose an empty folder: a replay has one of its own"
            raise StorageError("holds a live stream, not a replay", path=folder.path, hint=hint)
        return None
    before = msgspec.json.decode(path.read_bytes(), type=ReplayRecord)
    if before.sha256 != record.sha256:
        hint = "replay that file, or choose another folder"
        raise StorageError(f"holds a replay of {before.file} with other content", path=folder.path, hint=hint)
    if not resume and not before.finished:
        hint = "add --resume to go on, or choose another folder"
        raise StorageError("holds an unfinished replay of this file", path=folder.path, hint=hint)
    return before
