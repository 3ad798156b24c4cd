"""Versions: published whole, signed, and refused when anything about them changed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from adapters import versions
from adapters.versions import Manifest, SigningKey, VersionError
from storage.folder import DataFolder
from storage.registry import Registry, VersionRow

BASE = "b" * 64


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    return DataFolder.open(tmp_path / "data", create=True)


def candidate(tmp_path: Path, weights: bytes = b"weights") -> Path:
    path = tmp_path / "candidate"
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_bytes(b"{}")
    (path / "adapter_model.safetensors").write_bytes(weights)
    return path


def manifest_for(path: Path, version: int = 1) -> Manifest:
    return Manifest(
        version=version, parent=0, shard="main", window=1, last_window=1, samples_sha256="s",
        base_sha256=BASE, tokenizer_sha256="t", seed=1, recipe={}, limits={}, result={},
        files=versions.describe_files(path), gateway="g", host_class="h", created=0.0, key="k",
    )  # fmt: skip


def publish(folder: DataFolder, tmp_path: Path) -> VersionRow:
    path = candidate(tmp_path)
    return versions.publish(folder, path, manifest_for(path), SigningKey.open_or_create(folder.keys))


def test_a_published_version_verifies(folder: DataFolder, tmp_path: Path) -> None:
    row = publish(folder, tmp_path)
    assert versions.verify(folder, row, BASE).version == 1
    assert row.folder.startswith("v000001-")


def test_publishing_twice_gives_the_same_version(folder: DataFolder, tmp_path: Path) -> None:
    """A crash before the transaction repeats the publication: the same folder, and nothing else."""
    first, second = publish(folder, tmp_path), publish(folder, tmp_path)
    assert first == second
    assert [path.name for path in folder.versions.iterdir()] == [first.folder]


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "manifest.json", "manifest.sig"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_changed_file_is_refused(folder: DataFolder, tmp_path: Path, name: str, damage: str) -> None:
    row = publish(folder, tmp_path)
    file = versions.folder_of(folder, row) / name
    data = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(data[:-1] if name != "manifest.sig" else data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.raises(VersionError):
        versions.verify(folder, row, BASE)


def test_a_pickle_beside_the_weights_is_refused(folder: DataFolder, tmp_path: Path) -> None:
    """peft would fall back to it."""
    row = publish(folder, tmp_path)
    (versions.folder_of(folder, row) / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(VersionError, match=r"adapter_model\.bin"):
        versions.verify(folder, row, BASE)


def test_a_version_signed_by_another_key_is_refused(folder: DataFolder, tmp_path: Path) -> None:
    path = candidate(tmp_path)
    stranger = SigningKey.open_or_create(candidate(tmp_path) / "..")
    SigningKey.open_or_create(folder.keys)
    row = versions.publish(folder, path, manifest_for(path), stranger)
    with pytest.raises(VersionError, match="signature"):
        versions.verify(folder, row, BASE)


def test_an_older_signed_manifest_does_not_pass_for_a_newer_version(
    folder: DataFolder, tmp_path: Path
) -> None:
    """A replayed folder has a good signature; the registry knows the manifest it promoted."""
    row = publish(folder, tmp_path)
    other = msgspec.structs.replace(row, manifest_sha256="0" * 64)
    with pytest.raises(VersionError, match="another version"):
        versions.verify(folder, other, BASE)


def test_another_base_is_refused(folder: DataFolder, tmp_path: Path) -> None:
    with pytest.raises(VersionError, match="another base"):
        versions.verify(folder, publish(folder, tmp_path), "c" * 64)


def test_weights_that_changed_after_the_gate_are_not_published(folder: DataFolder, tmp_path: Path) -> None:
    path = candidate(tmp_path)
    manifest = manifest_for(path)
    (path / "adapter_model.safetensors").write_bytes(b"other weights")
    with pytest.raises(VersionError, match="changed after"):
        versions.publish(folder, path, manifest, SigningKey.open_or_create(folder.keys))


def test_unreferenced_folders_are_removed_and_a_second_look_finds_none(
    folder: DataFolder, tmp_path: Path
) -> None:
    row = publish(folder, tmp_path)
    (folder.versions / "v000002-abc.tmp").mkdir()
    with Registry.open_or_create(folder.registry) as registry:
        with registry.write() as writer:
            writer.put_version(row)
        assert versions.remove_unreferenced(folder, registry) == ["v000002-abc.tmp"]
        assert versions.remove_unreferenced(folder, registry) == []
    assert versions.verify(folder, row, BASE).version == 1


def test_the_signing_key_is_private_and_stays_the_same(folder: DataFolder) -> None:
    first = SigningKey.open_or_create(folder.keys)
    assert first.public == SigningKey.open_or_create(folder.keys).public
    assert (folder.keys / "signing.key").stat().st_mode & 0o077 == 0
