"""The prepared model folder: what is in it, and the proof that it still is what `model prepare` wrote.

Light on purpose (msgspec and hashlib): the ingest process reads it too. A prepared folder is a plain
Hugging Face folder (config.json, model.safetensors, tokenizer.json, tokenizer_config.json, LICENSE)
with anchors.safetensors and edgewater-model.json, the manifest, which names and hashes all the others.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

__all__ = [
    "ANCHORS_FILE",
    "EMBEDDED",
    "EMBEDDED_NAME",
    "MANIFEST",
    "MODEL_FORMAT",
    "TOKENIZER",
    "WEIGHTS",
    "AnchorsInfo",
    "BaseModelError",
    "ChatFormat",
    "FileHash",
    "Golden",
    "ModelManifest",
    "RoleFormat",
    "byte_letters",
    "cache_dir",
    "default_model_dir",
    "file_sha256",
    "hash_files",
    "load_manifest",
    "replace_unencodable",
    "token_byte_lengths",
    "token_bytes",
    "verify",
]

MODEL_FORMAT: Final = 1
MANIFEST: Final = "edgewater-model.json"
WEIGHTS: Final = "model.safetensors"
TOKENIZER: Final = "tokenizer.json"
ANCHORS_FILE: Final = "anchors.safetensors"
EMBEDDED: Final = "embedded"
EMBEDDED_NAME: Final = "smollm2-135m-instruct"

REPLACEMENT: Final = "\ufffd"
_CHUNK = 1 << 20


class BaseModelError(Exception):
    """A base model that is missing, changed or unfit; the message ends in what to do."""

    def __init__(self, message: str, *, path: Path | None = None, hint: str = "") -> None:
        self.path = path
        self.hint = hint
        place = f"{path}: " if path is not None else ""
        super().__init__(f"{place}{message}" + (f" ({hint})" if hint else ""))


class FileHash(msgspec.Struct, frozen=True):
    """One file of the folder."""

    sha256: str
    size: int
    """Bytes."""


class Golden(msgspec.Struct, frozen=True):
    """A text and the ids it must encode to, special tokens split; checked when ingest starts."""

    text: str
    ids: list[int]


class RoleFormat(msgspec.Struct, frozen=True):
    """Control ids around one message of a role."""

    prefix: list[int]
    suffix: list[int]
    learned: int
    """So many leading suffix ids are trained on in an assistant's turn: up to its end-of-turn token."""


class ChatFormat(msgspec.Struct, frozen=True):
    """A chat template as ids: start, then for each message prefix, content, suffix."""

    start: list[int]
    default_system: list[int]
    """The implied system turn, behind `start` when the first message is no system message; may be empty."""
    roles: dict[str, RoleFormat]


class AnchorsInfo(msgspec.Struct, frozen=True):
    """What anchors.safetensors holds."""

    file: str
    sha256: str
    train: int
    measured: int
    tokens: int
    top_k: int


class ModelManifest(msgspec.Struct, frozen=True, kw_only=True):
    """edgewater-model.json: identity, tokenizer facts and the hash of every file beside it."""

    format: int = MODEL_FORMAT
    name: str
    source: str
    """What it was made from: a file or folder name or hub id, with its hash; never a path of a machine."""
    license: str = ""
    base_sha256: str
    """Over the sorted names and hashes of config.json and the weights."""
    tokenizer_sha256: str
    tokenizer_id: str
    """First 16 hex digits of `tokenizer_sha256`; ring blocks carry it."""
    files: dict[str, FileHash]
    vocab_size: int
    bos_id: int
    eos_id: int
    separator_id: int
    """The newline that stands between samples packed into one row."""
    lossless: bool
    """Ids decode to the exact text, characters in `unencodable` aside."""
    unencodable: str
    """A regular expression class of the characters that no ids spell; see `replace_unencodable`."""
    pre_tokenizer: str
    """How the tokenizer was proved: "fast", "reference" or "own"."""
    dtype: str
    golden: list[Golden]
    chat: ChatFormat | None
    chat_refusal: str = ""
    """Why `chat` is None."""
    anchors: AnchorsInfo


def cache_dir() -> Path:
    """Folder for what can be made again: $EDGEWATER_CACHE, else ~/.cache/edgewater."""
    return Path(os.environ.get("EDGEWATER_CACHE") or Path.home() / ".cache" / "edgewater")


def default_model_dir(name: str = EMBEDDED_NAME) -> Path:
    """Folder that a model of this name is prepared into unless another is given."""
    return cache_dir() / "models" / name


def file_sha256(path: Path) -> str:
    """Hash a file in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hash_files(files: dict[str, FileHash]) -> str:
    """Hash the sorted names and hashes of some files into one identity."""
    lines = "".join(f"{name} {files[name].sha256}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def load_manifest(folder: Path) -> ModelManifest:
    """Read the manifest of a prepared model, without looking at the other files.

    Raises: BaseModelError when the folder is missing, not prepared, damaged or of another format.
    """
    path = folder / MANIFEST
    again = "run `edgewater model prepare`, or set model.path to a prepared folder"
    try:
        raw = path.read_bytes()
    except OSError as error:
        missing = "no prepared model here" if not path.exists() else f"cannot be read: {error.strerror}"
        raise BaseModelError(missing, path=folder, hint=again) from error
    try:
        found = msgspec.json.decode(raw, type=_FormatOnly).format
        if found > MODEL_FORMAT:
            hint = "upgrade Edgewater, or prepare the model again into another folder"
            raise BaseModelError(f"model format {found} is newer than {MODEL_FORMAT}", path=path, hint=hint)
        if found < MODEL_FORMAT:
            raise BaseModelError(f"model format {found} is older than {MODEL_FORMAT}", path=path, hint=again)
        return msgspec.json.decode(raw, type=ModelManifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        hint = "delete the folder and run `edgewater model prepare`"
        raise BaseModelError(f"manifest is damaged: {error}", path=path, hint=hint) from error


class _FormatOnly(msgspec.Struct):
    format: int


def verify(folder: Path, *, weights: bool) -> ModelManifest:
    """Check that every file of a prepared model is there and unchanged.

    Args:
        folder: Prepared model.
        weights: Hash the weights as well (about a second for each gigabyte); else only their size is checked.
    Raises: BaseModelError naming the first file that is missing or differs, and what to do.
    """
    manifest = load_manifest(folder)
    for name, known in manifest.files.items():
        path = folder / name
        if Path(name).name != name:
            raise BaseModelError(
                f"manifest names a file outside the folder: {name!r}", path=folder, hint=_AGAIN
            )
        try:
            size = path.stat().st_size
            changed = size != known.size
            if not changed and (weights or name != WEIGHTS):
                changed = file_sha256(path) != known.sha256
        except OSError as error:
            raise BaseModelError(f"cannot be read: {error.strerror}", path=path, hint=_AGAIN) from error
        if changed:
            raise BaseModelError("was changed after `model prepare`", path=path, hint=_AGAIN)
    return manifest


_AGAIN = "restore the folder, or delete it and run `edgewater model prepare`"


def replace_unencodable(manifest: ModelManifest) -> Callable[[str], str]:
    """Return the function that makes any text encodable: characters without ids become U+FFFD.

    On such a character the tokenizer loses it or raises, and with it the whole batch that the text stands in.
    """
    if not manifest.unencodable:
        return lambda text: text
    substitute = re.compile(manifest.unencodable).sub
    return lambda text: substitute(REPLACEMENT, text)


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _Config(msgspec.Struct):
    vocab_size: int


class _Model(msgspec.Struct):
    vocab: dict[str, int]


class _Tokenizer(msgspec.Struct):
    model: _Model
    decoder: msgspec.Raw = msgspec.Raw(b"null")
    added_tokens: list[_AddedToken] = []


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(folder: Path) -> list[bytes]:
    """Read the bytes that each token id decodes to from tokenizer.json; control tokens have none.

    Returns: One entry for each id of the model; ids that the tokenizer does not use are empty.
    Raises: BaseModelError when tokenizer.json or config.json is missing or damaged.
    """
    try:
        parsed = msgspec.json.decode((folder / TOKENIZER).read_bytes(), type=_Tokenizer)
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=_Config)
    except (OSError, msgspec.MsgspecError) as error:
        raise BaseModelError(f"cannot be read: {error}", path=folder, hint=_AGAIN) from error
    vocab = parsed.model.vocab
    used = max([*vocab.values(), *(token.id for token in parsed.added_tokens)], default=-1) + 1
    table = [b""] * max(used, config.vocab_size)
    spell = _byte_level if b"ByteLevel" in bytes(parsed.decoder) else _sentence_piece
    for token, index in vocab.items():
        table[index] = spell(token)
    for added in parsed.added_tokens:
        table[added.id] = b""
    return table


def token_byte_lengths(folder: Path) -> list[int]:
    """Return the length in UTF-8 bytes that each token id decodes to; control tokens have 0."""
    return [len(piece) for piece in token_bytes(folder)]


def byte_letters() -> dict[int, str]:
    """Map each byte to the letter that byte-level vocabularies write it as.

    Source: GPT-2's bytes_to_unicode: printable Latin-1 stands for itself, the rest is moved up past U+00FF.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return {byte: chr(byte) if byte in printable else chr(next(moved)) for byte in range(256)}


_LETTER_BYTES = {letter: byte for byte, letter in byte_letters().items()}


def _byte_level(token: str) -> bytes:
    return b"".join(
        bytes((_LETTER_BYTES[letter],)) if letter in _LETTER_BYTES else letter.encode() for letter in token
    )


def _sentence_piece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes((int(byte[1], 16),)) if byte else token.replace("\u2581", " ").encode()
