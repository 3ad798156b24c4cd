"""Prove a tokenizer before any event is encoded with it.

Ingest encodes with fastokens, which is several times as fast as HF tokenizers, and the base was trained
with the latter. So `model prepare` compares the two on every Unicode character, random text and real text,
and checks that no text can produce a control token. What is not proved is not written.

GGUF files name their pre-tokenizer but do not hold it, and converted ones have lost it. SmolLM2's is
restored here; without it system logs cost 2 % more tokens and 1.52 instead of 1.47 bits per byte.
"""

from __future__ import annotations

import copy
import importlib.util
import random
import re
from array import array
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import msgspec

from adapters.model_folder import BaseModelError, byte_letters

__all__ = [
    "FAST_SPLIT",
    "ProofError",
    "choose_tokenizer",
    "encode_split",
    "proof_texts",
    "prove_same_ids",
    "restore_pre_tokenizer",
    "tidy",
    "unencodable_class",
]

_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
FAST_SPLIT: Final = (
    r"'(?:[stmd]|re|ve|ll)| ?\p{L}+|\p{N}"
    rf"| ?[^{_SPACE}\p{{L}}\p{{N}}]+|[{_SPACE}]+(?![^{_SPACE}\p{{N}}])|[{_SPACE}]+"
)
"""One pattern that cuts like Digits(individual) then ByteLevel's own, 4 to 6 times as fast (measured).

White space is listed instead of written backslash-s: U+180E is a space for the engine of fastokens only.
"""

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS_FIRST = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
}
_FAST_DIGITS_FIRST = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": FAST_SPLIT}, "behavior": "Isolated", "invert": False},
        {**_BYTE_LEVEL, "use_regex": False},
    ],
}
_BY_GGUF_NAME: Final = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": _DIGITS_FIRST,
    "starcoder": _DIGITS_FIRST,
}
"""Pre-tokenizers that a GGUF names and transformers does not restore. Source: llama.cpp, llama-vocab.cpp."""

_SEED = 20_251_123
_RANDOM_TEXTS = 20_000
_REAL_TEXT_MODULES = ("argparse", "datetime", "decimal", "ipaddress", "json.decoder", "tarfile", "textwrap")
_SPACES = "_,__,___,\n,\n\n,\t,\r\n,\r,\v,\f,\x1c,\x1f,\x85,\xa0,\u180e,\u2003,\u2028,\u3000,\u200b,\ufeff"
_LETTERS = (
    "a,I,The,_pump,Pressure=,bar,REPLACE,_R/H_,'s,'t,'re,'ve,'m,'ll,'d,','S,\u2019s,\u00e9,e\u0301,\u0130"
)
_SCRIPTS = "\u6f22\u5b57,\ud55c\uad6d,\u0939\u093f,\u0e44\u0e17\u0e22,\u20ac,\u00b0C,\u2026,\U0001f600"
_NUMBERS = "0,7,12,3.42,-0.5,1e-3,0x1F,E42,\u0661\u0662,\u00bd,\u2167,\u00b2,\U0001d7d8"
_OTHERS = '\x00,\x07,\x1b,\x7f,.,...,-,--,/,\\,#,%,&,(,),[,],{,},<,>,<<,>>,=,+,*,",`,~,^,$,@,!,?,;,:,|'
_PIECES = [
    piece.replace("_", " ") for piece in ",".join((_SPACES, _LETTERS, _SCRIPTS, _NUMBERS, _OTHERS)).split(",")
]


class ProofError(Exception):
    """Two tokenizers that should agree do not; the message shows a text and both encodings."""


def restore_pre_tokenizer(
    tokenizer: dict[str, Any], name: str, known_to_transformers: bool
) -> dict[str, Any]:
    """Put back the pre-tokenizer that a byte-level GGUF only names.

    Args:
        tokenizer: Parsed tokenizer.json as converted from the GGUF.
        name: The file's tokenizer.ggml.pre.
        known_to_transformers: transformers has restored it already.
    Returns: A copy with the reference pre-tokenizer.
    Raises: BaseModelError for a name that nobody here knows.
    """
    restored = copy.deepcopy(tokenizer)
    if known_to_transformers:
        return restored
    if name not in _BY_GGUF_NAME:
        known = ", ".join(sorted(_BY_GGUF_NAME))
        raise BaseModelError(
            f"unknown pre-tokenizer {name!r} in the GGUF (known here: {known}, and those of transformers)",
            hint="prepare the original Hugging Face folder of this model instead, its tokenizer.json has it",
        )
    restored["pre_tokenizer"] = copy.deepcopy(_BY_GGUF_NAME[name])
    return restored


def tidy(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Return a copy without truncation and padding in which every added token is special.

    Plain text is encoded with special tokens split, and only a token marked special is split.
    """
    tidied = copy.deepcopy(tokenizer)
    tidied["truncation"] = tidied["padding"] = None
    for token in tidied.get("added_tokens") or []:
        token["special"] = True
    return tidied


def choose_tokenizer(reference: dict[str, Any], texts: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Pick the fastest form of a tokenizer that provably gives the reference's ids.

    Args:
        reference: Tidied tokenizer as HF tokenizers reads it.
        texts: What to prove it on; see `proof_texts`.
    Returns: The tokenizer to write, and "fast" or "reference" for the form that it has.
    Raises: BaseModelError when fastokens disagrees with HF tokenizers on each form.
    """
    forms: list[tuple[dict[str, Any], str]] = [(reference, "reference")]
    if reference.get("pre_tokenizer") == _DIGITS_FIRST:
        forms.insert(0, ({**reference, "pre_tokenizer": _FAST_DIGITS_FIRST}, "fast"))
    failures = []
    for form, label in forms:
        try:
            prove_same_ids(form, reference, texts)
            return form, label
        except ProofError as error:
            failures.append(f"{label} form: {error}")
    raise BaseModelError(
        "fastokens does not encode like HF tokenizers with this tokenizer: " + "; ".join(failures),
        hint="this model cannot be used; choose another base, or report it with its tokenizer.json",
    )


def prove_same_ids(written: dict[str, Any], reference: dict[str, Any], texts: Sequence[str]) -> None:
    """Check fastokens on `written` against HF tokenizers on `reference`, with special tokens split and kept.

    Raises: ProofError with the first text that differs, or that yields a control token although split.
    """
    import fastokens
    import tokenizers

    text = msgspec.json.encode(reference).decode()
    special = [token["content"] for token in written.get("added_tokens") or []]
    # A text without any of them encodes alike whether they are split or kept.
    marked = [line for line in texts if any(content in line for content in special)]
    try:
        split, kept = tokenizers.Tokenizer.from_str(text), tokenizers.Tokenizer.from_str(text)
        fast = fastokens.Tokenizer.from_json_str(msgspec.json.encode(written).decode())
        split.encode_special_tokens = True
        got = encode_split(fast, texts)
        got_kept = [list(encoding.ids) for encoding in fast.encode_batch(marked)]
    except Exception as error:  # both libraries raise bare Exception or ValueError on what they cannot read
        raise ProofError(f"it cannot be loaded or fails: {error}") from error
    _no_control_ids(written, texts, got)
    _compare(texts, [e.ids for e in split.encode_batch_fast(list(texts), add_special_tokens=False)], got)
    _compare(marked, [e.ids for e in kept.encode_batch_fast(marked, add_special_tokens=False)], got_kept)


def _compare(texts: Sequence[str], expected: list[list[int]], actual: list[list[int]]) -> None:
    for text, want, have in zip(texts, expected, actual, strict=True):
        if want != have:
            raise ProofError(f"{text[:80]!r} gives {have[:20]} instead of {want[:20]}")


def _no_control_ids(tokenizer: dict[str, Any], texts: Sequence[str], encoded: list[list[int]]) -> None:
    unknown = tokenizer["model"].get("unk_token")
    control = {t["id"]: t["content"] for t in tokenizer.get("added_tokens") or [] if t["content"] != unknown}
    for text, ids in zip(texts, encoded, strict=True):
        if found := control.keys() & ids:
            raise ProofError(f"plain text {text[:80]!r} yields the control token {control[found.pop()]!r}")


def encode_split(fast: Any, texts: Sequence[str]) -> list[list[int]]:
    """Encode plain text with a fastokens tokenizer, so that no data can produce a control token.

    Args:
        fast: A `fastokens.Tokenizer`.
        texts: Encodable texts, see `model_folder.replace_unencodable`.
    """
    flat = fast.encode_batch_flat(list(texts), add_special_tokens=False, split_special_tokens=True)
    ids, offsets = array("I", flat[0]), array("Q", flat[1])
    return [ids[a:b].tolist() for a, b in pairwise(offsets)]


def unencodable_class(tokenizer: dict[str, Any]) -> str:
    """Find the characters that a tokenizer has no ids for, as the source of a regular expression class.

    A byte-level vocabulary trained without the full alphabet lacks some bytes (SmolLM2's lacks 0x1D, the
    group separator of barcodes): HF tokenizers loses them silently, fastokens may raise. Lone surrogates are
    always in the class, for they have no UTF-8.
    """
    ranges = [(0xD800, 0xDFFF)]
    if "ByteLevel" in str(tokenizer.get("decoder")):
        vocab = tokenizer["model"]["vocab"]
        missing = bytes(byte for byte, letter in byte_letters().items() if letter not in vocab)
        lost = (c for c in range(0x110000) if not 0xD800 <= c < 0xE000 and _has_any(chr(c), missing))
        ranges = _ranges(sorted([*lost, *range(0xD800, 0xE000)]))
    return "[" + "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges) + "]"


def _has_any(char: str, missing: bytes) -> bool:
    return any(byte in missing for byte in char.encode())


def _ranges(points: Iterable[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for point in points:
        if found and point == found[-1][1] + 1:
            found[-1] = (found[-1][0], point)
        else:
            found.append((point, point))
    return found


def proof_texts(tokenizer: dict[str, Any], unencodable: str, seed: int = _SEED) -> list[str]:
    """Make the texts that a tokenizer is proved on, without the characters that it cannot encode.

    Every character once among random neighbours, every number, space and control character in each
    context that a pre-tokenizer looks at, random joins of awkward pieces and of the special tokens'
    spellings, and the lines of some standard library modules as real text.
    """
    rng = random.Random(seed)
    bad = re.compile(unencodable)
    chars = [chr(c) for c in range(0x110000) if not bad.match(chr(c))]
    edgy = [c for c in chars if c < "\u0100" or c.isnumeric() or c.isspace() or not c.isprintable()]
    rng.shuffle(chars)
    texts = ["".join(chars[i : i + 64]) for i in range(0, len(chars), 64)]
    texts += [f"a{c}1{c} {c}  {c}{c}b{c}'s{c}." for c in edgy[:8_000]]
    special = [token["content"] for token in tokenizer.get("added_tokens") or []]
    pieces = [piece for piece in [*_PIECES, *special[:64], *special[:8]] if not bad.search(piece)]
    texts += ["".join(rng.choices(pieces, k=rng.randint(1, 24))) for _ in range(_RANDOM_TEXTS)]
    texts += [
        f"{a}{token}{b}" for token in special for a, b in (("", ""), (" ", " "), ("x", "x"), ("\n", "1"))
    ]
    return texts + [line for line in _real_lines() if not bad.search(line)]


def _real_lines() -> list[str]:
    lines: list[str] = []
    for name in _REAL_TEXT_MODULES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin and Path(spec.origin).suffix == ".py":
            text = Path(spec.origin).read_text(encoding="utf-8")
            lines += [*text.splitlines(), text]
    return lines
