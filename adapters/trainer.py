"""The trainer's loop: takes due windows in order, has each trained in a child, and decides.

Light: torch lives in the child only. The states of an update and what a crash leaves at each are the table
in storage/registry.py; `Trainer.step` does one arrow's work and may be repeated at any of them.
"""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_never

import msgspec

from adapters import versions
from adapters.child import Ending, run_child
from adapters.model_folder import ModelManifest
from adapters.recipe import GateLimits, Recipe
from adapters.update import RESULT_FILE, PastWindow, UpdateResult, UpdateTask, read_result
from storage.block import encode_blocks
from storage.durable import fsync_folder, make_private_folder, remove_folder, write_file_durably
from storage.errors import StorageError
from storage.folder import DataFolder
from storage.opening import open_ring_reader
from storage.registry import AuditRow, Registry, UpdateRow, UpdateState, VersionRow
from storage.ring import Ring
from storage.samples import BLANK
from storage.windows import ClosedWindow

__all__ = ["MAX_FAILURES", "Trainer", "TrainerSettings", "seed_of"]

MAX_FAILURES = 5
DISK_RETRIES = 30  # times retry_s, between two attempts on a disk that is full or fails
FREE_KILLS = 2  # kills from outside without progress that do not count
MERGED_SHARES = 4  # a merged update takes at most so many token budgets; older windows are skipped
MAX_ACCEPTED = 64  # windows kept for rehearsal and retention
PAST_WINDOWS = 8
_SAMPLES, _TASK, _ERRORS = "samples.blocks", "task.json", "errors.log"
log = logging.getLogger("edgewater.trainer")
Progress = Callable[[UpdateRow, dict[str, Any]], None]


class TrainerSettings(msgspec.Struct, frozen=True):
    """How updates are made.

    Attributes:
        gateway: Name of the gateway, for manifests.
        seed: update.seed.
        threads: CPU threads of the child, 0 for all.
        max_due: Windows that may wait; more are merged. 0 never merges (lockstep).
        cooldown_s: Stream time between two claims; 0 none (lockstep: a held stream has no time).
        retry_s: Wait after a failed attempt, doubled each time up to a minute.
    """

    gateway: str
    recipe: Recipe
    limits: GateLimits
    seed: int = 0
    threads: int = 0
    max_due: int = 4
    cooldown_s: float = 0.0
    retry_s: float = 1.0


class Trainer:
    """Decides windows strictly in order, shard by shard.

    Args:
        folder: The data folder; the caller holds its "trainer" lock.
        registry: Open for writing.
        model: The prepared base model's folder.
        manifest: Its manifest, verified.
        settings: How updates are made.
        progress: Called with what a running update reports.
    """

    def __init__(
        self,
        folder: DataFolder,
        registry: Registry,
        model: Path,
        manifest: ModelManifest,
        settings: TrainerSettings,
        progress: Progress = lambda row, report: None,
    ) -> None:
        self._folder = folder
        self._registry = registry
        self._model = model
        self._manifest = manifest
        self._settings = settings
        self._progress = progress
        self._key = versions.SigningKey.open_or_create(folder.keys)
        self._served = ""
        self._rings: dict[str, Ring] = {}
        self._files: dict[str, int] = {}  # shard -> inode of its data file
        self._digest = _settings_digest(manifest, settings)

    def recover(self) -> list[str]:
        """Finish or undo what a crash left between two arrows. A second call changes nothing.

        Returns: what was removed.
        """
        removed = versions.remove_unreferenced(self._folder, self._registry)
        kept = {
            self._folder.update_folder(row.shard, row.window)
            for row in self._registry.updates()
            if not row.decided
        }
        for path in self._folder.updates.iterdir():
            if path not in kept:
                remove_folder(path)
                removed.append(path.name)
        return removed

    def check_parent(self) -> None:
        """Refuse settings that the active version cannot be continued with.

        Raises: StorageError.
        """
        parent = self._version(self._registry.active().version)
        if parent is None:
            return
        manifest = versions.verify(self._folder, parent, self._manifest.base_sha256)
        fixed = ("profile", "rank", "alpha")
        now = msgspec.to_builtins(self._settings.recipe)
        for name in fixed:
            before = manifest.recipe.get(name)
            if before != now[name]:
                raise StorageError(
                    f"update.{name} is {now[name]!r}, the active version was made with {before!r}",
                    path=self._folder.path,
                    hint="it is fixed for the life of a data folder: set it back, or start a new data_dir",
                )

    def close(self) -> None:
        """Close the rings that were read."""
        for ring in self._rings.values():
            ring.close()

    def step(self, stop: threading.Event) -> bool:
        """Move one update by one arrow. Returns: whether there was anything to do."""
        for shard in self._in_turn():
            row = self._current(shard)
            if row is not None:
                self._advance(row, stop)
                self._served = shard
                return True
        return False

    def _in_turn(self) -> list[str]:
        """Shards: the one whose update is under way, then those after the one that was served last.

        An update is decided before another begins, because that one's parent is its outcome; and a shard
        where windows never cease to be due does not keep the others from their turn.
        """
        shards = self._folder.shards()
        newest = {row.shard: row for row in self._registry.updates()}
        under_way = [shard for shard in shards if shard in newest and not newest[shard].decided]
        after = shards.index(self._served) + 1 if self._served in shards else 0
        return [*under_way, *shards[after:], *shards[:after]]

    def _ring(self, shard: str) -> Ring:
        """The ring, opened again when a start of ingest put a rebuilt or migrated one into its place."""
        folder = self._folder.ring / shard
        try:
            number = (folder / "data.mdb").stat().st_ino
        except OSError as error:
            raise StorageError("no data file here", path=folder, hint="ingest makes it") from error
        if shard in self._rings and self._files.get(shard, number) != number:
            self._rings.pop(shard).close()
        if shard not in self._rings:
            self._rings[shard], self._files[shard] = open_ring_reader(folder), number
        return self._rings[shard]

    def _current(self, shard: str) -> UpdateRow | None:
        """The update of this shard that is under way, or a new one of its next due window."""
        rows = self._registry.updates(shard)
        if rows and not rows[-1].decided:
            return rows[-1]
        try:
            ring = self._ring(shard)
        except StorageError:
            return None  # ingest is just making it
        due = ring.windows(after=self._registry.cursor(shard))
        if not due or self._cooling(ring, rows):
            return None
        surplus = len(due) - self._settings.max_due if self._settings.max_due else 0
        run = due[: max(surplus, 0) + 1]
        tail = ring.read_state().tail_seq
        if gone := [window for window in run if window.first_seq < tail]:
            # Only these: what came after them can still be learned.
            reason = "evicted from the ring before its claim"
            return self._put(self._row(shard, gone), state=UpdateState.EXPIRED, reason=reason)
        taken = self._within_budget(run)
        if older := run[: len(run) - len(taken)]:
            reason = "more was due than an update can take"
            return self._put(self._row(shard, older), state=UpdateState.SKIPPED, reason=reason)
        return self._claim(shard, ring, taken)

    def _within_budget(self, run: list[ClosedWindow]) -> list[ClosedWindow]:
        """The newest windows of a run that one update may own: memory and time are bounded by its tokens."""
        limit, count, tokens = MERGED_SHARES * self._settings.recipe.max_tokens, 0, 0
        for window in reversed(run):
            tokens += window.tokens
            if count and tokens > limit:
                break
            count += 1
        return run[len(run) - count :]

    def _cooling(self, ring: Ring, rows: list[UpdateRow]) -> bool:
        if not self._settings.cooldown_s or not rows:
            return False
        return ring.read_state().stream_time < rows[-1].claimed_at + self._settings.cooldown_s

    def _claim(self, shard: str, ring: Ring, due: list[ClosedWindow]) -> UpdateRow:
        """due -> claimed: copy the window out of the ring, then say so."""
        row = msgspec.structs.replace(self._row(shard, due), claimed_at=ring.read_state().stream_time)
        try:
            samples = ring.read(row.first_seq, row.last_seq)
        except LookupError as error:
            # Evicted just now: no reason to stop at it for ever.
            return self._put(row, state=UpdateState.EXPIRED, reason=str(error))
        if not any(samples.mask):
            blank = all(kind == BLANK for kind in samples.kinds)
            reason = "all of it is lost or forgotten" if blank else "no token in it is to be learned"
            return self._put(row, state=UpdateState.SKIPPED, reason=reason)
        work = self._folder.update_folder(shard, row.window)
        remove_folder(work)
        make_private_folder(work)
        data = encode_blocks(samples, self._manifest.tokenizer_id)
        # 1. Window file durable.   Crash: no row names the folder; recover() deletes it.
        write_file_durably(work / _SAMPLES, data)
        # 2. The row.               From here the window is claimed; the ring may evict it.
        return self._put(row, samples_sha256=hashlib.sha256(data).hexdigest())

    def _row(self, shard: str, due: list[ClosedWindow]) -> UpdateRow:
        """A new update's row: it owns these windows and starts from the active version."""
        first, last = due[0], due[-1]
        return UpdateRow(
            shard=shard,
            window=first.window,
            last_window=last.window,
            first_seq=first.first_seq,
            last_seq=last.last_seq,
            samples=last.last_seq - first.first_seq + 1,
            state=UpdateState.CLAIMED,
            parent=self._registry.active().version,
            seed=seed_of(self._settings.seed, shard, first.window),
            settings=self._digest,
        )

    def _advance(self, row: UpdateRow, stop: threading.Event) -> None:
        if row.state in (UpdateState.STAGED, UpdateState.EVALUATED) and row.settings != self._digest:
            self._start_over(row)  # its manifest would state settings that it was not made with
            return
        match row.state:
            case UpdateState.CLAIMED:
                self._train(row, stop)
            case UpdateState.STAGED:
                self._evaluate(row)
            case UpdateState.EVALUATED:
                self._promote(row)
            case UpdateState.PROMOTED:
                self._acknowledge(row)
            case (
                UpdateState.ACKNOWLEDGED
                | UpdateState.REJECTED
                | UpdateState.QUARANTINED
                | UpdateState.SKIPPED
                | UpdateState.EXPIRED
            ):
                pass
            case _:
                assert_never(row.state)

    def _train(self, row: UpdateRow, stop: threading.Event) -> None:
        """claimed -> staged: one attempt in the child; what it wrote is durable before the row says so."""
        work = self._folder.update_folder(row.shard, row.window)
        if row.settings != self._digest or row.parent != self._registry.active().version:
            row = self._claim_again(row, work)
        write_file_durably(work / _TASK, msgspec.json.encode(self._task(row, work)))
        ending = run_child(work / _TASK, stop, lambda report: self._progress(row, report), work / _ERRORS)
        match ending:
            case Ending.DONE:
                result = (work / RESULT_FILE).read_bytes()
                self._put(row, state=UpdateState.STAGED, result=result)
            case Ending.STOPPED:
                pass
            case Ending.NO_DISK:
                # Not the samples' fault: five such attempts must not quarantine them. It goes on by itself.
                stop.wait(DISK_RETRIES * self._settings.retry_s)
            case Ending.FAILED | Ending.KILLED:
                self._count_failure(row, ending, work, stop)
            case _:
                assert_never(ending)

    def _start_over(self, row: UpdateRow) -> None:
        """staged or evaluated -> claimed: this candidate may not be published."""
        work = self._folder.update_folder(row.shard, row.window)
        self._claim_again(msgspec.structs.replace(row, state=UpdateState.CLAIMED, result=b""), work)

    def _claim_again(self, row: UpdateRow, work: Path) -> UpdateRow:
        """The settings or the active version changed since the claim: start over from the present ones."""
        for path in work.iterdir():
            if path.name == _SAMPLES:
                continue
            if path.is_dir():
                remove_folder(path)
            else:
                path.unlink()
        fsync_folder(work)
        active = self._registry.active().version
        return self._put(row, parent=active, settings=self._digest, failures=0, outside_kills=0, progress=0)

    def _task(self, row: UpdateRow, work: Path) -> UpdateTask:
        accepted = [
            other for other in self._registry.updates() if other.version and self._accepted(other).is_file()
        ]
        past = accepted
        if len(accepted) > PAST_WINDOWS:
            past = sorted(random.Random(row.seed).sample(accepted, PAST_WINDOWS), key=lambda r: r.version)
        parent = self._version(row.parent)
        return UpdateTask(
            shard=row.shard,
            window=row.window,
            model_dir=str(self._model),
            window_file=str(work / _SAMPLES),
            rehearsal_files=[str(self._accepted(other)) for other in accepted],
            past_files=[PastWindow(other.window, str(self._accepted(other))) for other in past],
            parent_dir=str(versions.folder_of(self._folder, parent)) if parent else "",
            out_dir=str(work),
            cache_dir=str(self._folder.cache),
            seed=row.seed,
            recipe=self._settings.recipe,
            gate=self._settings.limits,
            threads=self._settings.threads,
        )

    def _count_failure(self, row: UpdateRow, ending: Ending, work: Path, stop: threading.Event) -> None:
        """Count an attempt that ended without a result; too many quarantine the window."""
        reached = _progress_of(work)
        progressed = reached > row.progress
        kills = 0 if progressed else row.outside_kills + (ending is Ending.KILLED)
        counts = ending is Ending.FAILED or kills > FREE_KILLS
        failures = 0 if progressed else row.failures + counts
        changes: dict[str, Any] = {"progress": reached, "outside_kills": kills, "failures": failures}
        if failures >= MAX_FAILURES:
            errors = (work / _ERRORS).read_bytes()[-300:].decode(errors="replace").strip()
            reason = (
                f"{failures} attempts failed; the last: {errors.splitlines()[-1] if errors else ending.value}"
            )
            self._put(row, state=UpdateState.QUARANTINED, reason=reason, **changes)
            remove_folder(work)
            return
        self._put(row, **changes)
        stop.wait(min(self._settings.retry_s * 2.0**failures, 60.0))

    def _evaluate(self, row: UpdateRow) -> None:
        """staged -> evaluated or rejected: the verdicts are read again here, not taken from a word."""
        work = self._folder.update_folder(row.shard, row.window)
        result = read_result(work)
        reason = _objection(result, work)
        if result is None or reason:
            self._put(row, state=UpdateState.REJECTED, reason=reason)
            self._audit("reject", f"window {row.window}: {reason}")
            remove_folder(work)
        else:
            self._put(row, state=UpdateState.EVALUATED)

    def _promote(self, row: UpdateRow) -> None:
        """evaluated -> promoted: publish a signed folder, then make it active in the same transaction."""
        work = self._folder.update_folder(row.shard, row.window)
        number = max((version.version for version in self._registry.versions()), default=0) + 1
        manifest = self._manifest_of(row, number, work)
        try:
            version = versions.publish(self._folder, work, manifest, self._key)
            versions.verify(self._folder, version, self._manifest.base_sha256)
        except versions.VersionError as error:
            log.error("%s", error)  # the files changed since the gate: train them again
            self._start_over(row)
            return
        with self._registry.write() as writer:
            promoted = writer.active() == row.parent
            if promoted:
                writer.put_version(version)
                writer.set_active(number)
                writer.put_update(msgspec.structs.replace(row, state=UpdateState.PROMOTED, version=number))
                writer.add_audit(AuditRow(time.time(), "trainer", "promote", f"version {number}"))
        if promoted:
            log.info("version %d is active", number)
            return
        # Somebody rolled back or promoted meanwhile: this candidate continues what is no longer active.
        remove_folder(versions.folder_of(self._folder, version))
        self._start_over(row)

    def _acknowledge(self, row: UpdateRow) -> None:
        """promoted -> acknowledged: keep the window for rehearsal, then forget the work folder."""
        work, kept = self._folder.update_folder(row.shard, row.window), self._accepted(row)
        if not kept.exists():
            write_file_durably(kept, (work / _SAMPLES).read_bytes())
        self._put(row, state=UpdateState.ACKNOWLEDGED)
        remove_folder(work)
        for old in sorted(self._folder.accepted.glob("*.blocks"))[:-MAX_ACCEPTED]:
            old.unlink()

    def _manifest_of(self, row: UpdateRow, number: int, work: Path) -> versions.Manifest:
        result = msgspec.json.decode(row.result)
        return versions.Manifest(
            version=number,
            parent=row.parent,
            shard=row.shard,
            window=row.window,
            last_window=row.last_window,
            samples_sha256=row.samples_sha256,
            base_sha256=self._manifest.base_sha256,
            tokenizer_sha256=self._manifest.tokenizer_sha256,
            seed=row.seed,
            recipe=msgspec.to_builtins(self._settings.recipe),
            limits=msgspec.to_builtins(self._settings.limits),
            result=result,
            files=versions.describe_files(work),
            gateway=self._settings.gateway,
            host_class=result["host_class"],
            created=time.time(),
            key=hashlib.sha256(self._key.public).hexdigest()[:16],
        )

    def _accepted(self, row: UpdateRow) -> Path:
        return self._folder.accepted_file(row.shard, row.window)

    def _version(self, number: int) -> VersionRow | None:
        return next((row for row in self._registry.versions() if row.version == number), None)

    def _put(self, row: UpdateRow, **changes: Any) -> UpdateRow:
        row = msgspec.structs.replace(row, **changes)
        with self._registry.write() as writer:
            writer.put_update(row)
        return row

    def _audit(self, action: str, detail: str) -> None:
        with self._registry.write() as writer:
            writer.add_audit(AuditRow(time.time(), "trainer", action, detail))


def seed_of(seed: int, shard: str, window: int) -> int:
    """Seed of an update, below 2^63: a hash of update.seed, shard and window, and of nothing else."""
    digest = hashlib.blake2b(f"{seed}/{shard}/{window}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _settings_digest(manifest: ModelManifest, settings: TrainerSettings) -> str:
    parts = (manifest.base_sha256, manifest.tokenizer_sha256, settings.recipe, settings.limits, settings.seed)
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:32]


def _progress_of(work: Path) -> int:
    """Steps of the newest checkpoint, 0 without one."""
    numbers = [p.name.partition("-")[2] for p in work.glob("checkpoint-*") if p.suffix != ".tmp"]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def _objection(result: UpdateResult | None, work: Path) -> str:
    """Why a candidate may not become active, "" if it may. Whatever is missing counts as failed."""
    if result is None:
        return "its result cannot be read"
    failed = [c.name for c in result.criteria if c.verdict not in ("passed", "not_applicable")]
    if result.decision != "promoted" or failed:
        return result.reason or f"failed: {', '.join(failed)}"
    if not any(c.verdict == "passed" for c in result.criteria):
        return "nothing was measured"
    try:
        files = versions.describe_files(work)
    except OSError as error:
        return f"its files cannot be read: {error}"
    if files["adapter_model.safetensors"][0] != result.adapter_sha256:
        return "its weights changed after they were measured"
    return ""
