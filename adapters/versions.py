"""Versions: immutable folders that the gate let through, each signed, each checked before it is used.

1. v000007-….tmp/ written, files and folder synced.   Crash: recover() deletes it.
2. Renamed to v000007-…, versions/ synced.            Crash: no row names it: deleted, then made again.
3. One registry transaction: version row, active pointer, update promoted. From here it is active.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
from pathlib import Path
from typing import Any

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from adapters.model_folder import file_sha256
from storage.durable import fsync_tree, remove_folder, rename_durably, write_file_durably
from storage.folder import DataFolder
from storage.registry import Registry, VersionRow

__all__ = [
    "Manifest",
    "SigningKey",
    "VersionError",
    "describe_files",
    "folder_of",
    "publish",
    "read_manifest",
    "remove_unreferenced",
    "verify",
]

MANIFEST_FORMAT = 1
FILES = ("adapter_config.json", "adapter_model.safetensors")
_MANIFEST, _SIGNATURE = "manifest.json", "manifest.sig"


class VersionError(Exception):
    """A version that must not be used; the message ends in what to do."""

    def __init__(self, version: int, what: str, hint: str) -> None:
        self.version = version
        super().__init__(f"version {version}: {what} ({hint})")


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a version is, where it came from and why it was let through; signed as a whole.

    Attributes:
        version, parent: Numbers; parent 0 is the base.
        shard, window, last_window: The update that made it.
        samples_sha256: Of its ordered samples.
        base_sha256, tokenizer_sha256: What it fits.
        recipe, limits: As trained and gated.
        result: The update's result: criteria, scores, tokens, seconds.
        files: Name -> (sha256, bytes).
        gateway, host_class, created, key: Where and when it was made, and by whose key.
    """

    format: int = MANIFEST_FORMAT
    version: int
    parent: int
    shard: str
    window: int
    last_window: int
    samples_sha256: str
    base_sha256: str
    tokenizer_sha256: str
    seed: int
    recipe: dict[str, Any]
    limits: dict[str, Any]
    result: dict[str, Any]
    files: dict[str, tuple[str, int]]
    gateway: str
    host_class: str
    created: float
    key: str


class SigningKey:
    """This device's Ed25519 key, made when it is first needed; only the trainer's parent loop holds it."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = private.public_key().public_bytes_raw()

    @classmethod
    def open_or_create(cls, keys: Path) -> SigningKey:
        """Read keys/signing.key, or make it together with keys/signing.pub."""
        path = keys / "signing.key"
        if not path.exists():
            private = Ed25519PrivateKey.generate()
            # Crash between the two: the public half is written again from the private one.
            write_file_durably(path, base64.b64encode(private.private_bytes_raw()) + b"\n")
        key = cls(Ed25519PrivateKey.from_private_bytes(base64.b64decode(path.read_bytes())))
        public = keys / "signing.pub"
        if not public.exists():
            write_file_durably(public, base64.b64encode(key.public) + b"\n", 0o644)
        return key

    def sign(self, data: bytes) -> bytes:
        """Signature of the bytes, 64 bytes."""
        return self._private.sign(data)


def folder_of(folder: DataFolder, row: VersionRow) -> Path:
    """The version's folder."""
    return folder.versions / row.folder


def publish(folder: DataFolder, candidate: Path, manifest: Manifest, key: SigningKey) -> VersionRow:
    """Make a version's folder complete and durable; it is not active yet.

    Args:
        candidate: Folder with the adapter's files, whose hashes the manifest states.
    Returns: The row to commit. Doing it twice gives a folder with the same adapter.
    Raises: VersionError if the candidate's files are not those of the manifest.
    """
    sha256 = manifest.files["adapter_model.safetensors"][0]
    name = f"v{manifest.version:06d}-{sha256[:12]}"
    target, tmp = folder.versions / name, folder.versions / f"{name}.tmp"
    remove_folder(tmp)
    tmp.mkdir(mode=0o700)
    for file, (expected, _) in manifest.files.items():
        shutil.copyfile(candidate / file, tmp / file)
        if file_sha256(tmp / file) != expected:
            raise VersionError(
                manifest.version, f"{file} changed after the gate saw it", "it is trained again"
            )
    text = msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1)
    (tmp / _MANIFEST).write_bytes(text)
    (tmp / _SIGNATURE).write_bytes(base64.b64encode(key.sign(text)) + b"\n")
    fsync_tree(tmp)
    remove_folder(target)  # of an earlier try that ended before its transaction
    rename_durably(tmp, target)
    return VersionRow(
        version=manifest.version,
        folder=name,
        parent=manifest.parent,
        shard=manifest.shard,
        window=manifest.window,
        sha256=sha256,
        manifest_sha256=hashlib.sha256(text).hexdigest(),
        created=manifest.created,
    )


def read_manifest(folder: DataFolder, row: VersionRow) -> Manifest:
    """Read a version's manifest. Raises: VersionError."""
    try:
        return msgspec.json.decode((folder_of(folder, row) / _MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise VersionError(row.version, f"its manifest cannot be read: {error}", _ROLL_BACK) from None


def verify(folder: DataFolder, row: VersionRow, base_sha256: str = "") -> Manifest:
    """Check a version's signature, every file's hash, and that it fits the base.

    Args:
        base_sha256: Of the base model in use; "" does not ask.
    Raises: VersionError on the first thing that is wrong.
    """
    path = folder_of(folder, row)
    try:
        text = (path / _MANIFEST).read_bytes()
        signature = base64.b64decode((path / _SIGNATURE).read_bytes())
        public = Ed25519PublicKey.from_public_bytes(
            base64.b64decode((folder.keys / "signing.pub").read_bytes())
        )
        public.verify(signature, text)
    except OSError as error:
        raise VersionError(row.version, f"{error.filename} cannot be read", _ROLL_BACK) from None
    except (InvalidSignature, ValueError):
        raise VersionError(row.version, "its signature is not this device's", _ROLL_BACK) from None
    if hashlib.sha256(text).hexdigest() != row.manifest_sha256:
        raise VersionError(row.version, "its manifest is another version's", _ROLL_BACK)
    manifest = read_manifest(folder, row)
    for name, (expected, size) in manifest.files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size or file_sha256(file) != expected:
            raise VersionError(row.version, f"{name} is missing or changed", _ROLL_BACK)
    strangers = {p.name for p in path.iterdir()} - {*FILES, _MANIFEST, _SIGNATURE}
    if strangers:
        raise VersionError(
            row.version, f"holds files of others: {', '.join(sorted(strangers))}", "delete them"
        )
    if base_sha256 and manifest.base_sha256 != base_sha256:
        raise VersionError(row.version, "was trained on another base model", "use the base it was made with")
    return manifest


def remove_unreferenced(folder: DataFolder, registry: Registry) -> list[str]:
    """Delete folders that no version row names (a crash before the promoting transaction).

    Returns: their names. A second call finds none.
    """
    known = {row.folder for row in registry.versions()}
    strays = [path for path in folder.versions.iterdir() if path.name not in known]
    for path in strays:
        remove_folder(path)
    return [path.name for path in strays]


def describe_files(candidate: Path) -> dict[str, tuple[str, int]]:
    """Hash and size of each of a candidate's files."""
    return {name: (file_sha256(candidate / name), (candidate / name).stat().st_size) for name in FILES}


_ROLL_BACK = "run 'edgewater versions rollback', or promote another version"
