"""The prepared folder: what it promises, and what is said when it was changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from array import array
from pathlib import Path

import fastokens
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.model_folder import (
    ANCHORS_FILE,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    BaseModelError,
    default_model_dir,
    load_manifest,
    replace_unencodable,
    token_byte_lengths,
    token_bytes,
    verify,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A prepared folder that the test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture(scope="module")
def fast(tiny_model: Path) -> fastokens.Tokenizer:
    return fastokens.Tokenizer.from_file(str(tiny_model / TOKENIZER))


def encode(fast: fastokens.Tokenizer, text: str) -> list[int]:
    return array("I", fast.encode_batch_flat([text], split_special_tokens=True)[0]).tolist()


def test_an_unchanged_folder_passes(tiny_model: Path) -> None:
    """Verification of what `prepare` wrote returns its manifest."""
    assert load_manifest(tiny_model) == verify(tiny_model, weights=True)


def test_the_manifest_names_every_file_beside_it_and_nothing_of_this_machine(tiny_model: Path) -> None:
    """No file escapes verification, and the manifest can be read out to anybody."""
    manifest = load_manifest(tiny_model)
    assert {path.name for path in tiny_model.iterdir()} - {MANIFEST} == set(manifest.files)
    assert "/" not in manifest.source
    assert str(Path.home()) not in (tiny_model / MANIFEST).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [ANCHORS_FILE, "config.json", TOKENIZER, "tokenizer_config.json", WEIGHTS])
def test_one_flipped_bit_is_found_and_the_file_named(copy: Path, name: str) -> None:
    """Each file is hashed, so any change is refused with its path and what to do."""
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BaseModelError, match=r"was changed.*restore.*model prepare") as caught:
        verify(copy, weights=True)
    assert path == caught.value.path


def test_without_weights_only_the_size_of_the_weights_is_checked(copy: Path) -> None:
    """The quick check reads no gigabytes, and still sees a weights file that was cut short."""
    path = copy / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    verify(copy, weights=False)
    path.write_bytes(data[:-1])
    with pytest.raises(BaseModelError, match="was changed"):
        verify(copy, weights=False)


def test_a_missing_file_is_named(copy: Path) -> None:
    """Deletion is a change too."""
    (copy / ANCHORS_FILE).unlink()
    with pytest.raises(BaseModelError, match=f"{ANCHORS_FILE}.*No such file.*model prepare"):
        verify(copy, weights=False)


def test_a_manifest_cannot_point_out_of_the_folder(copy: Path) -> None:
    """A changed manifest must not make the verifier read other files."""
    manifest = load_manifest(copy)
    files = manifest.files | {"../outside": manifest.files["config.json"]}
    changed = msgspec.json.encode(msgspec.structs.replace(manifest, files=files))
    (copy / MANIFEST).write_bytes(changed)
    with pytest.raises(BaseModelError, match="outside the folder"):
        verify(copy, weights=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "manifest is damaged"),
        (b"\xff\xfe", "manifest is damaged"),
        (b'{"format": 1}', "manifest is damaged"),
        (b'{"format": 2, "anything": "else"}', "format 2 is newer than 1.*upgrade"),
        (b'{"format": 0}', "format 0 is older than 1.*model prepare"),
        (b'{"format": "' + b"[" * 100_000, "manifest is damaged"),
    ],
)
def test_a_manifest_that_cannot_be_read_says_what_to_do(tmp_path: Path, content: bytes, message: str) -> None:
    """Damage and newer formats are told apart."""
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(BaseModelError, match=message):
        load_manifest(tmp_path)


def test_a_missing_folder_says_how_to_get_one(tmp_path: Path) -> None:
    """The first thing a new user may see."""
    with pytest.raises(BaseModelError, match=r"no prepared model here.*edgewater model prepare"):
        load_manifest(tmp_path / "nothing")


def test_the_default_folder_follows_the_cache_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """$EDGEWATER_CACHE moves everything that can be made again."""
    monkeypatch.setenv("EDGEWATER_CACHE", str(tmp_path))
    assert tmp_path / "models" / "smollm2-135m-instruct" == default_model_dir()
    monkeypatch.delenv("EDGEWATER_CACHE")
    assert Path.home() / ".cache/edgewater/models/x" == default_model_dir("x")


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_the_bytes_of_the_ids_are_the_bytes_of_the_text(
    tiny_model: Path, fast: fastokens.Tokenizer, text: str
) -> None:
    """Ids alone give the text back, so the ring need not keep it, and bits per byte count true bytes."""
    table, lengths = _tables(tiny_model)
    ids = encode(fast, text)
    assert text.encode() == b"".join(table[i] for i in ids)
    assert len(text.encode()) == sum(lengths[i] for i in ids)


_CACHE: dict[Path, tuple[list[bytes], list[int]]] = {}


def _tables(folder: Path) -> tuple[list[bytes], list[int]]:
    if folder not in _CACHE:
        _CACHE[folder] = token_bytes(folder), token_byte_lengths(folder)
    return _CACHE[folder]


def test_control_tokens_have_no_bytes_and_all_others_some(tiny_model: Path) -> None:
    """One entry an id of the vocabulary; the three control tokens stand for no text."""
    manifest = load_manifest(tiny_model)
    lengths = token_byte_lengths(tiny_model)
    assert manifest.vocab_size == len(lengths)
    assert lengths[:3] == [0, 0, 0]
    assert min(lengths[3:]) == 1


def test_sentence_piece_tokens_have_their_bytes(tmp_path: Path) -> None:
    """Byte fallback spells spaces as U+2581 and bytes as <0x..>; ids that only the model has are empty."""
    vocab = {"<s>": 0, "\u2581pump": 1, "<0x0A>": 2, "\u00e9": 3}
    content = {
        "model": {"type": "BPE", "vocab": vocab},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]},
        "added_tokens": [{"id": 0, "content": "<s>"}, {"id": 5, "content": "<pad>"}],
    }
    (tmp_path / TOKENIZER).write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"vocab_size": 8}', encoding="utf-8")
    assert [b"", b" pump", b"\n", "\u00e9".encode(), b"", b"", b"", b""] == token_bytes(tmp_path)


def test_characters_without_ids_are_replaced_and_nothing_else_is(tiny_model: Path) -> None:
    """The tokenizer would raise on them, and with it the whole batch."""
    manifest = load_manifest(tiny_model)
    lacking = msgspec.structs.replace(
        manifest, unencodable="[\\U0000001d-\\U0000001d\\U00040000-\\U000bffff]"
    )
    clean = replace_unencodable(lacking)
    assert clean("A\x1dB\U00050000\U0001f600 \x1c\x1e") == "A\ufffdB\ufffd\U0001f600 \x1c\x1e"
    assert replace_unencodable(manifest)("\ud800") == "\ufffd"
    text = "pump \u6f22 \x00\x1d"
    assert text is replace_unencodable(msgspec.structs.replace(manifest, unencodable=""))(text)


def test_reading_a_manifest_loads_no_torch() -> None:
    """The ingest process imports this module and must stay light."""
    code = "import sys, adapters.model_folder; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
