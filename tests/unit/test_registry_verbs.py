"""`edgewater versions`: listed, shown, checked, promoted and rolled back by hand."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from adapters import versions
from adapters.model_folder import load_manifest
from adapters.versions import Manifest, SigningKey, VersionError
from pipeline import registry_verbs
from pipeline.config import Config, load
from storage.errors import LockHeldError
from storage.folder import DataFolder
from storage.registry import Registry


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Config:
    """A data folder with versions 1, 2 and 3, each made from the one before; 3 is active."""
    config = load(None, [f"data_dir={tmp_path / 'data'}", f"model.path={tiny_model}"], require_sources=False)
    folder, base = DataFolder.open(config.data_dir, create=True), load_manifest(tiny_model).base_sha256
    key = SigningKey.open_or_create(folder.keys)
    with Registry.open_or_create(folder.registry) as registry:
        for number in (1, 2, 3):
            candidate = tmp_path / f"candidate-{number}"
            candidate.mkdir()
            (candidate / "adapter_config.json").write_bytes(b"{}")
            (candidate / "adapter_model.safetensors").write_bytes(b"weights %d" % number)
            criterion = {"name": "gain", "value": 0.1, "limit": 0.01, "verdict": "passed", "rule": "why"}
            manifest = Manifest(
                version=number, parent=number - 1, shard="main", window=number, last_window=number, seed=0,
                samples_sha256="", base_sha256=base, tokenizer_sha256="", recipe={}, limits={}, gateway="g",
                result={"criteria": [criterion], "samples": 300}, host_class="h", created=0.0, key="k",
                files=versions.describe_files(candidate),
            )  # fmt: skip
            row = versions.publish(folder, candidate, manifest, key)
            with registry.write() as writer:
                writer.put_version(row)
                writer.set_active(number)
    folder.close()
    return config


def active(config: Config) -> int:
    with Registry.open_reader(config.data_dir / "registry") as registry:
        return registry.active().version


def damage(config: Config, number: int) -> None:
    (folder,) = (config.data_dir / "versions").glob(f"v{number:06d}-*")
    (folder / "adapter_model.safetensors").write_bytes(b"other")


def test_the_list_marks_the_active_version(config: Config) -> None:
    rows, text = registry_verbs.list_versions(config)
    assert [(row["version"], row["active"], row["previous"]) for row in rows] == [
        (1, False, False), (2, False, True), (3, True, False),
    ]  # fmt: skip
    assert text.count("*") == 1


def test_a_version_is_shown_with_each_criterion(config: Config) -> None:
    manifest, text = registry_verbs.show_version(config, "active")
    assert manifest.version == 3
    assert "gain" in text
    assert "passed" in text


def test_rolling_back_walks_down_the_lineage_to_the_base(config: Config) -> None:
    """It never goes forward again: a second rollback is no return to what was rolled back."""
    assert [registry_verbs.rollback(config)[0]["active"] for _ in range(3)] == [2, 1, 0]
    with pytest.raises(VersionError, match="the base model is active"):
        registry_verbs.rollback(config)
    assert active(config) == 0


def test_a_damaged_version_is_found_and_never_made_active(config: Config) -> None:
    damage(config, 2)
    rows, _ = registry_verbs.verify_versions(config, None)
    assert [bool(row["problem"]) for row in rows] == [False, True, False]
    with pytest.raises(VersionError, match="missing or changed"):
        registry_verbs.promote(config, "2")
    with pytest.raises(VersionError, match="missing or changed"):
        registry_verbs.rollback(config)
    assert active(config) == 3


@pytest.mark.parametrize(("name", "number"), [("1", 1), ("v2", 2), ("previous", 2), ("base", 0)])
def test_versions_are_promoted_by_number_or_name(config: Config, name: str, number: int) -> None:
    answer, _ = registry_verbs.promote(config, name)
    assert (answer["active"], active(config)) == (number, number)


def test_an_unknown_version_is_refused_with_those_there_are(config: Config) -> None:
    with pytest.raises(click.UsageError, match="there are: 1, 2, 3"):
        registry_verbs.promote(config, "9")


def test_two_hands_do_not_move_the_pointer_at_once(config: Config) -> None:
    folder = DataFolder.open(config.data_dir, create=False)
    with folder.lock("admin"), pytest.raises(LockHeldError):
        registry_verbs.promote(config, "1")
    folder.close()
