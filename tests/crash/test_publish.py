"""A power cut at every durable step between a candidate and an active version."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from adapters import versions
from adapters.versions import Manifest, SigningKey
from storage.folder import DataFolder
from storage.registry import Registry, UpdateRow, UpdateState

BASE = "b" * 64


class PowerCut(BaseException):
    """The machine is off; nothing after it runs."""


class Steps:
    """Counts durable operations and cuts the power before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
        self.count, self.cut = 0, cut
        names = (
            (os, "fsync"),
            (Path, "rename"),
            (shutil, "copyfile"),
            (Path, "mkdir"),
            (Path, "write_bytes"),
        )
        for owner, name in names:
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, real: Any) -> Any:
        def counted(*args: Any, **more: Any) -> Any:
            self.step()
            return real(*args, **more)

        return counted

    def step(self) -> None:
        self.count += 1
        if self.count == self.cut:
            raise PowerCut


def prepare(tmp_path: Path) -> tuple[DataFolder, Path]:
    folder = DataFolder.open(tmp_path / "data", create=True)
    SigningKey.open_or_create(folder.keys)
    candidate = tmp_path / "candidate"
    candidate.mkdir()
    (candidate / "adapter_config.json").write_bytes(b"{}")
    (candidate / "adapter_model.safetensors").write_bytes(b"weights")
    with Registry.open_or_create(folder.registry) as registry:
        for state in (UpdateState.CLAIMED, UpdateState.STAGED, UpdateState.EVALUATED):
            with registry.write() as writer:
                writer.put_update(UpdateRow("main", 1, 1, 0, 9, 10, state))
    return folder, candidate


def promote(folder: DataFolder, candidate: Path, step: Any = lambda: None) -> None:
    """What the trainer does at evaluated -> promoted."""
    manifest = Manifest(
        version=1, parent=0, shard="main", window=1, last_window=1, samples_sha256="",
        base_sha256=BASE, tokenizer_sha256="", seed=0, recipe={}, limits={}, result={},
        files=versions.describe_files(candidate), gateway="g", host_class="h", created=0.0, key="",
    )  # fmt: skip
    row = versions.publish(folder, candidate, manifest, SigningKey.open_or_create(folder.keys))
    with Registry.open_or_create(folder.registry) as registry:
        step()
        with registry.write() as writer:
            writer.put_version(row)
            step()  # a cut inside the transaction undoes all of it
            writer.set_active(1)
            writer.put_update(UpdateRow("main", 1, 1, 0, 9, 10, UpdateState.PROMOTED, version=1))


def audit(folder: DataFolder) -> int:
    """What any start may rely on: the active pointer names a whole, signed version, or the base."""
    with Registry.open_or_create(folder.registry) as registry:
        versions.remove_unreferenced(folder, registry)
        assert versions.remove_unreferenced(folder, registry) == []
        active, rows = registry.active().version, registry.versions()
        (update,) = registry.updates()
    for row in rows:
        versions.verify(folder, row, BASE)
    assert active in {0, *(row.version for row in rows)}
    assert (update.state == UpdateState.PROMOTED) == (active == 1) == bool(rows)
    assert {path.name for path in folder.versions.iterdir()} == {row.folder for row in rows}
    return active


def test_a_cut_at_any_step_of_publishing_leaves_the_old_version_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run counts the steps; then one run dies at each, is audited, and is finished by the next start."""
    folder, candidate = prepare(tmp_path / "count")
    with monkeypatch.context() as patch:
        steps = Steps(patch, cut=0)
        promote(folder, candidate, steps.step)
    assert audit(folder) == 1
    assert steps.count >= 12
    for cut in range(1, steps.count + 1):
        folder, candidate = prepare(tmp_path / f"cut-{cut}")
        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            promote(folder, candidate, Steps(patch, cut).step)
        assert audit(folder) == 0
        promote(folder, candidate)
        assert audit(folder) == 1
