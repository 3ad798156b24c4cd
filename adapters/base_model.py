"""Prepare a base model once, and load it: everything is written, proved and hashed before it has its name.

1. INTO.tmp written: weights, tokenizer, anchors, manifest last.   Crash: INTO.tmp is deleted and redone.
2. Every file and folder below INTO.tmp synced.                    Crash: as before.
3. A damaged INTO moved aside, INTO.tmp renamed, parent synced.    Crash: INTO is missing or whole.
4. What was moved aside is deleted.                                Crash: the next prepare deletes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from adapters.chat_probe import ChatTemplateError, probe_chat
from adapters.golden import GOLDEN_TEXTS
from adapters.model_folder import (
    ANCHORS_FILE,
    EMBEDDED,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    AnchorsInfo,
    BaseModelError,
    ChatFormat,
    FileHash,
    Golden,
    ModelManifest,
    default_model_dir,
    file_sha256,
    hash_files,
    replace_unencodable,
    token_bytes,
    verify,
)
from storage.durable import fsync_folder, fsync_tree, remove_folder, rename_durably, write_file_durably

__all__ = ["default_model_dir", "load_model", "prepare"]

log = logging.getLogger("edgewater.base_model")

Progress = Callable[[str, float], None]

_NOT_IDENTITY: Final = {
    "_from_model_config",
    "_model_name_or_path",
    "_name_or_path",
    "auto_map",
    "quantization_config",
    "transformers_version",
}
"""Keys of config.json that say how a file was made, or name code to run, but nothing about the base."""

_SMALL_PARAMETERS: Final = 400_000_000
"""Up to here anchors are sampled in float32; above, memory of a gateway counts more than the last digits."""


def prepare(
    source: str,
    into: Path,
    *,
    name: str | None = None,
    anchors: int = 256,
    anchor_tokens: int = 256,
    top_k: int = 20,
    seed: int = 0,
    progress: Progress = lambda phase, done: None,
) -> ModelManifest:
    """Make a prepared model folder; a second call with the same source finds it whole and does nothing.

    Args:
        source: "embedded", a GGUF file, a local Hugging Face folder or a hub id.
        into: Folder to write; it must be missing, empty or written by `prepare`.
        name: Name in the manifest; by default that of the folder `into`.
        anchors: Sequences that the base writes, both halves together, at least 2. The embedded model's ship.
        anchor_tokens: Tokens of each.
        top_k: Cached log-probabilities a position.
        seed: Of the sampling of anchors.
        progress: Told the phase and the share of it that is done, 0 to 1.
    Returns: The manifest as written.
    Raises: BaseModelError when the source cannot be had, proved or used, or `into` is something else.
    """
    if anchors < 2 or anchor_tokens < 2 or top_k < 1:
        raise ValueError("anchors and anchor_tokens must be at least 2, and top_k 1")
    from adapters import base_source

    if not base_source.is_hub_id(source):
        _stay_offline()
    into = into.expanduser().absolute()
    with _only_one(into):
        remove_folder(_beside(into, ".old"))
        remove_folder(_beside(into, ".tmp"))
        work = _beside(into, ".work")
        remove_folder(work)
        try:
            work.mkdir()
            if (kept := _still_valid(source, into, work)) is not None:
                return kept
            plan = _AnchorPlan(anchors, anchor_tokens, top_k, seed)
            manifest = _build(source, into, work, name or into.name, plan, progress)
        except OSError as error:
            reason = error.strerror or str(error)
            hint = "free disk space and make the folder writable for this user"
            raise BaseModelError(f"cannot be written: {reason}", path=into, hint=hint) from error
        finally:
            remove_folder(work)
            remove_folder(_beside(into, ".tmp"))
    return manifest


def load_model(folder: Path, dtype: Any = "bfloat16") -> Any:
    """Load a prepared base for scoring or training on top of it: frozen, in eval mode, from this folder only.

    Args:
        folder: Prepared model; verify it first.
        dtype: torch dtype or its name.
    Returns: A transformers causal language model whose parameters need no gradient.
    Raises: BaseModelError when it cannot be loaded.
    """
    _stay_offline()
    import torch
    from transformers import AutoModelForCausalLM

    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=wanted,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError) as error:
        hint = "run `edgewater model prepare`"
        raise BaseModelError(f"cannot be loaded: {error}", path=folder, hint=hint) from error
    model.requires_grad_(False)
    return model.eval()


class _AnchorPlan(msgspec.Struct, frozen=True):
    count: int
    tokens: int
    top_k: int
    seed: int


def _stay_offline() -> None:
    """Keep the hub's client from the network; it reads this when it is first imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def _beside(into: Path, ending: str) -> Path:
    return into.with_name(into.name + ending)


@contextlib.contextmanager
def _only_one(into: Path) -> Iterator[None]:
    """Let one process prepare a folder at a time; others wait and then find it done."""
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(_beside(into, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        hint = "make its parent folder writable for this user, or choose another folder"
        raise BaseModelError(f"cannot be written: {error.strerror}", path=into, hint=hint) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _still_valid(source: str, into: Path, work: Path) -> ModelManifest | None:
    """Return the manifest if `into` holds this source already; None if it is to be (re)built.

    Raises: BaseModelError if `into` holds something that must not be overwritten.
    """
    if not into.exists() or (into.is_dir() and not any(into.iterdir())):
        return None
    if not (into / MANIFEST).is_file():
        hint = "choose an empty folder, or delete this one"
        raise BaseModelError("exists and is no prepared model", path=into, hint=hint)
    try:
        manifest = verify(into, weights=True)
    except BaseModelError as error:
        log.warning("preparing again: %s", error)
        return None
    if not _same_source(source, manifest, work):
        hint = "choose another folder, or delete this one"
        raise BaseModelError(f"already holds {manifest.name} from {manifest.source}", path=into, hint=hint)
    return manifest


def _same_source(source: str, manifest: ModelManifest, work: Path) -> bool:
    from adapters import base_source

    known = manifest.source
    if source == EMBEDDED:
        return known.endswith(base_source.EMBEDDED_SHA256)
    if base_source.is_hub_id(source):
        return known.startswith(f"{source} sha256:")
    return known.rpartition(" ")[2] == base_source.find_source(source, work).described.rpartition(" ")[2]


def _build(
    source: str, into: Path, work: Path, name: str, plan: _AnchorPlan, progress: Progress
) -> ModelManifest:
    from adapters import base_source

    tmp = _beside(into, ".tmp")
    tmp.mkdir()
    progress("finding the model", 0.0)
    found = base_source.find_source(source, work)
    progress("reading the model", 0.0)
    with _quiet():
        parts = base_source.read_source(found)
        _write_model(parts, found.license_file, tmp)
        progress("proving the tokenizer", 0.0)
        facts = _prove_tokenizer(parts, tmp)
        manifest = _write_anchors(parts.model, tmp, facts, plan, progress)
    manifest = msgspec.structs.replace(
        manifest,
        name=name,
        source=found.described,
        license=parts.license,
        files={file.name: _hash(file) for file in sorted(tmp.iterdir())},
    )
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    write_file_durably(tmp / MANIFEST, text + b"\n", mode=0o644)
    _publish(tmp, into)
    progress("done", 1.0)
    return verify(into, weights=False)


def _publish(tmp: Path, into: Path) -> None:
    fsync_tree(tmp)
    if into.exists():
        rename_durably(into, _beside(into, ".old"))
    rename_durably(tmp, into)
    remove_folder(_beside(into, ".old"))
    fsync_folder(into.parent)


def _hash(path: Path) -> FileHash:
    return FileHash(file_sha256(path), path.stat().st_size)


def _write_model(parts: Any, license_file: Path | None, tmp: Path) -> None:
    """Write weights, configurations, tokenizer settings and license; the same base gives the same bytes."""
    parts.model.save_pretrained(tmp, max_shard_size="1000GB", safe_serialization=True)
    (tmp / WEIGHTS).chmod(0o644)
    for file in (tmp / "config.json", tmp / "generation_config.json"):
        if file.is_file():
            settings = msgspec.json.decode(file.read_bytes())
            _write_json(file, {k: v for k, v in settings.items() if k not in _NOT_IDENTITY})
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(parts.model.config.max_position_embeddings),
        **parts.special,
    }
    if parts.chat_template:
        settings["chat_template"] = parts.chat_template
    _write_json(tmp / "tokenizer_config.json", settings)
    if license_file is not None:
        shutil.copyfile(license_file, tmp / "LICENSE")


def _write_json(path: Path, value: Any) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=2) + b"\n")


def _prove_tokenizer(parts: Any, tmp: Path) -> ModelManifest:
    """Write tokenizer.json in a proved form and gather what the manifest says about it.

    Raises: BaseModelError when fastokens, HF tokenizers and the written folder do not agree.
    """
    import fastokens
    from transformers import AutoTokenizer

    from adapters import tokenizer_prep

    reference = tokenizer_prep.tidy(parts.tokenizer)
    unencodable = tokenizer_prep.unencodable_class(reference)
    texts = tokenizer_prep.proof_texts(reference, unencodable)
    written, form = tokenizer_prep.choose_tokenizer(reference, texts)
    (tmp / TOKENIZER).write_bytes(msgspec.json.encode(written))
    fast = fastokens.Tokenizer.from_file(str(tmp / TOKENIZER))
    hf = AutoTokenizer.from_pretrained(str(tmp), local_files_only=True, trust_remote_code=False)

    def encode(text: str) -> list[int]:
        return tokenizer_prep.encode_split(fast, [text])[0]

    def encode_kept(text: str) -> list[int]:
        return list(fast.encode(text).ids)

    _check_stock_loading(hf, encode_kept, tmp)
    chat, refusal = _probe(hf, encode_kept, encode)
    config = parts.model.config
    sha256 = file_sha256(tmp / TOKENIZER)
    if fast.vocab_size > config.vocab_size:
        sizes = f"{fast.vocab_size} ids, the model {config.vocab_size}"
        raise BaseModelError(
            f"its tokenizer has {sizes}", hint="get a model whose tokenizer fits its weights"
        )
    eos_id = _one_id(hf.eos_token_id, config.eos_token_id)
    manifest = ModelManifest(
        name="",
        source="",
        base_sha256=hash_files({name: _hash(tmp / name) for name in ("config.json", WEIGHTS)}),
        tokenizer_sha256=sha256,
        tokenizer_id=sha256[:16],
        files={},
        vocab_size=config.vocab_size,
        bos_id=_one_id(hf.bos_token_id, config.bos_token_id, eos_id),
        eos_id=eos_id,
        separator_id=encode("\n")[-1],
        lossless=_is_lossless(tmp, texts, tokenizer_prep.encode_split(fast, texts)),
        unencodable=unencodable,
        pre_tokenizer=form,
        dtype="bfloat16",
        golden=[],
        chat=chat,
        chat_refusal=refusal,
        anchors=AnchorsInfo(ANCHORS_FILE, "", 0, 0, 0, 0),
    )
    clean = replace_unencodable(manifest)
    golden = [Golden(text, encode(text)) for text in map(clean, GOLDEN_TEXTS)]
    return msgspec.structs.replace(manifest, golden=golden)


def _one_id(*candidates: Any) -> int:
    for candidate in candidates:
        if isinstance(candidate, list) and candidate:
            return int(candidate[0])
        if isinstance(candidate, int):
            return candidate
    raise BaseModelError("the model names no end-of-text token", hint="set eos_token_id in its config.json")


def _check_stock_loading(hf: Any, encode_kept: Callable[[str], list[int]], tmp: Path) -> None:
    """Check that plain transformers, which may rebuild a tokenizer by class, reads the folder as we do."""
    for text in GOLDEN_TEXTS:
        with contextlib.suppress(ValueError):  # a character without ids
            if hf.encode(text, add_special_tokens=False) != encode_kept(text):
                raise BaseModelError(
                    f"transformers reads the written tokenizer differently: {text!r}",
                    path=tmp,
                    hint="report this with the versions that `pip list` shows",
                )


def _probe(
    hf: Any, encode_kept: Callable[[str], list[int]], encode: Callable[[str], list[int]]
) -> tuple[ChatFormat | None, str]:
    try:
        return probe_chat(hf, encode_kept, encode), ""
    except ChatTemplateError as error:
        log.warning("exchanges will be refused: %s", error)
        return None, str(error)


def _is_lossless(folder: Path, texts: list[str], encoded: list[list[int]]) -> bool:
    table = token_bytes(folder)
    return all(
        b"".join([table[i] for i in ids]) == text.encode() for text, ids in zip(texts, encoded, strict=True)
    )


def _write_anchors(
    model: Any, tmp: Path, manifest: ModelManifest, plan: _AnchorPlan, progress: Progress
) -> ModelManifest:
    """Write anchors.safetensors: shipped ones for a base that is known, else the base writes them now."""
    import fastokens
    import torch

    from adapters import anchors as anchoring

    progress("anchors", 0.0)
    made = anchoring.shipped_anchors(file_sha256(tmp / WEIGHTS))
    if made is None:
        fast = fastokens.Tokenizer.from_file(str(tmp / TOKENIZER))
        if model.num_parameters() <= _SMALL_PARAMETERS:
            model = model.to(torch.float32)
        made = anchoring.generate_anchors(
            model.eval(),
            anchoring.starts_for(manifest, fast),
            train=plan.count - plan.count // 2,
            measured=plan.count // 2,
            tokens=plan.tokens,
            top_k=min(plan.top_k, manifest.vocab_size),
            seed=plan.seed,
            progress=lambda done: progress("anchors", done),
        )
    anchoring.write_anchors(tmp / ANCHORS_FILE, made)
    train, tokens, top_k = made.train_topk_ids.shape
    sha256 = file_sha256(tmp / ANCHORS_FILE)
    info = AnchorsInfo(ANCHORS_FILE, sha256, train, len(made.measured_ids), tokens, top_k)
    return msgspec.structs.replace(manifest, anchors=info)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' bars and advice for users of transformers, for the time of a call."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
