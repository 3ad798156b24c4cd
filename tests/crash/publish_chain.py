"""One data folder whose windows become versions, through trainers that are killed or hurt, and the audit.

After any fault the active pointer names a complete version, hashed and signed, or the base; recovery run
twice changes nothing; and an undisturbed trainer ends with one version a window, the same that a quiet run
makes.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from functools import cached_property
from pathlib import Path

from adapters import versions
from adapters.model_folder import load_manifest
from adapters.recipe import GateLimits, Recipe
from adapters.trainer import Trainer, TrainerSettings, seed_of
from storage.block import decode_blocks
from storage.folder import DataFolder
from storage.registry import Registry, UpdateState, VersionRow
from storage.ring import Ring
from tests.crash.audit import Violation
from tests.crash.life_ingest import IngestLife, write_config
from tests.crash.life_publish import PublishLife, adapter_of
from tests.crash.lives import Life, Lives, Point

__all__ = ["PROGRAM", "PublishChain", "make_site"]

PROGRAM = "tests.crash.life_publish"
WINDOWS, WINDOW_SAMPLES = 3, 34
REJECTED = 2  # this one of them: a rejection is an end, too
RING_BYTES = 1 << 20
SHARD = "main"


def make_site(lives: Lives, model: Path, work: Path, seed: int, ring_bytes: int = RING_BYTES) -> None:
    """Ingest traffic that closes three windows into `work/data`.

    Args:
        lives: Of ingest.
        work: Folder; must exist.
    """
    config = work / "edgewater.toml"
    write_config(config, model, ring_bytes=ring_bytes, min_samples=WINDOW_SAMPLES)
    life = lives.run(IngestLife(str(config), seed=seed, end=160, chunk=20))
    if life.code != 0:
        raise Violation("undisturbed", f"ingest ended with {life.code}: {life.err[-300:]}")
    with Ring.open_reader(work / "data" / "ring" / SHARD) as ring:
        if len(ring.windows()) < WINDOWS:
            raise Violation("undisturbed", f"only {len(ring.windows())} windows closed")


class PublishChain:
    """Lifetimes of trainers on one data folder.

    Args:
        lives: Of trainers.
        model: The prepared base.
        site: Folder that `make_site` filled; it is copied.
        work: Where the copy lives; must not exist.
    """

    def __init__(self, lives: Lives, model: Path, site: Path, work: Path) -> None:
        self._lives, self._model = lives, model
        self._manifest = load_manifest(model)
        self.data = work / "data"
        self._config = work / "edgewater.toml"
        _copy(site, work)
        write_config(self._config, model, ring_bytes=RING_BYTES, min_samples=WINDOW_SAMPLES)
        self._settled: dict[int, str] = {}  # version -> folder, as any audit saw them

    def live(self, point: Point | None, *, traced: bool = False) -> Life:
        """Be the trainer once."""
        return self._lives.run(PublishLife(str(self._config), [REJECTED]), point, traced=traced)

    # -- the audit -----------------------------------------------------------------------------------

    def audit(self, *, recover: bool, ended: bool = False) -> int:
        """Check what must hold after any fault.

        Args:
            recover: Also do what a start does first, twice. Else the next lifetime has it to do.
            ended: The last lifetime ended by itself: every window is decided.
        Returns: Updates that are decided.
        """
        folder = DataFolder(self.data)
        if not folder.registry.is_dir():
            return 0
        with Registry.open_or_create(folder.registry) as registry:
            self._check_active(folder, registry)
            if recover:
                self._check_recovery(folder, registry)
            if ended:
                self._check_end(folder, registry)
            return sum(row.decided for row in registry.updates())

    def _check_active(self, folder: DataFolder, registry: Registry) -> None:
        """I5, and that no version that was once active ever changes or goes."""
        rows = {row.version: row for row in registry.versions()}
        active = registry.active().version
        if active and active not in rows:
            raise Violation("I5", f"version {active} is active and has no row")
        for row in rows.values():
            try:
                versions.verify(folder, row, self._manifest.base_sha256)
            except versions.VersionError as error:
                raise Violation("I5", str(error)) from error
        seen = {number: row.folder for number, row in rows.items()}
        if not self._settled.items() <= seen.items():
            raise Violation("I5", f"versions were {self._settled}, now {seen}")
        self._settled = seen
        made = [row for row in registry.updates() if row.version]
        if sorted(row.version for row in made) != sorted(rows):
            raise Violation("I5", f"versions {sorted(rows)} of updates {[row.version for row in made]}")
        if active != max(rows, default=0):
            raise Violation("I5", f"version {active} is active, the newest is {max(rows, default=0)}")

    def _check_recovery(self, folder: DataFolder, registry: Registry) -> None:
        self._trainer(folder, registry).recover()
        once, active = _tree(self.data), registry.active()
        again = self._trainer(folder, registry).recover()
        if again or _tree(self.data) != once or registry.active() != active:
            raise Violation("recovery", f"a second one changed something: {again}")
        strays = {path.name for path in folder.versions.iterdir()} - set(self._settled.values())
        if strays:
            raise Violation("recovery", f"left {sorted(strays)} in versions")
        self._check_active(folder, registry)

    def _trainer(self, folder: DataFolder, registry: Registry) -> Trainer:
        settings = TrainerSettings("gateway", Recipe(), GateLimits())
        return Trainer(folder, registry, self._model, self._manifest, settings)

    def _check_end(self, folder: DataFolder, registry: Registry) -> None:
        """One version a window, each the one that its samples, seed and parent give; nothing left over."""
        rows = registry.updates()
        states = {row.window: row.state for row in rows}
        good, bad = UpdateState.ACKNOWLEDGED, UpdateState.REJECTED
        expected = {window: bad if window == REJECTED else good for window in self.windows}
        if states != expected:
            raise Violation("end", f"updates ended as {states}, expected {expected}")
        found = registry.versions()
        parent: VersionRow | None = None
        learned = sorted(expected.keys() - {REJECTED})
        for number, (window, row) in enumerate(zip(learned, found, strict=True), 1):
            adapter = adapter_of(seed_of(0, SHARD, window), parent.folder if parent else "")
            wanted = (number, window, parent.version if parent else 0, hashlib.sha256(adapter).hexdigest())
            if (row.version, row.window, row.parent, row.sha256) != wanted:
                raise Violation("end", f"version {row.version} of window {row.window} is not {wanted}")
            self._check_accepted(folder, window)
            parent = row
        # What could not be deleted when it was done with goes at the next start.
        self._trainer(folder, registry).recover()
        names = {path.name for path in folder.versions.iterdir()}
        if names != {row.folder for row in found} or list(folder.updates.iterdir()):
            raise Violation("end", f"left over: {sorted(names)}, {list(folder.updates.iterdir())}")

    def _check_accepted(self, folder: DataFolder, window: int) -> None:
        first, last = self.windows[window]
        with Ring.open_reader(folder.ring / SHARD) as ring:
            held = ring.read(first, last)
        kept = decode_blocks(folder.accepted_file(SHARD, window).read_bytes())
        if kept != held:
            raise Violation("end", f"the samples kept of window {window} are not those of the ring")

    @cached_property
    def windows(self) -> dict[int, tuple[int, int]]:
        """Windows of the ring with their first and last seqs."""
        with Ring.open_reader(self.data / "ring" / SHARD) as ring:
            return {row.window: (row.first_seq, row.last_seq) for row in ring.windows()}


def _copy(site: Path, work: Path) -> None:
    """Copy a site; its LMDB files stay allocated whole, though what nobody wrote to is not copied."""
    work.parent.mkdir(exist_ok=True)
    subprocess.run(["cp", "-a", "--sparse=always", str(site), str(work)], check=True)
    for path in work.rglob("data.mdb"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _tree(path: Path) -> dict[str, bytes]:
    """Every file with its content, but for LMDB's and the locks."""
    files = (p for p in sorted(path.rglob("*")) if p.suffix not in (".mdb", ".lock") and p.name != "pidns")
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else b"" for p in files}
