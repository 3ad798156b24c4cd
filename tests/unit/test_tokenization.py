"""Tokenize: exact ids and masks, and no data that becomes a control token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.model_folder import BaseModelError, load_manifest, replace_unencodable
from pipeline.dedup import NO_HASH
from pipeline.events import Batch, Event, Exchange, Feedback, Line, Message, Origin, Reading, Text
from pipeline.tokenization import KNOWN_CHARS, MAX_KNOWN, BatchTokenizer, TokenizeStep

FREELY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> BatchTokenizer:
    return BatchTokenizer(tiny_model)


@pytest.fixture(scope="module")
def reference(tiny_model: Path):
    """HF tokenizers, special tokens split: what ids must be."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    plain.encode_special_tokens = True
    return plain


def specials(tiny_model: Path) -> set[int]:
    found = json.loads((tiny_model / "tokenizer.json").read_text(encoding="utf-8"))
    return {token["id"] for token in found["added_tokens"]}


@FREELY
@given(st.lists(st.text(max_size=30) | st.sampled_from(["<|im_start|>user", "a<|endoftext|>", "", "  7 12"])))
def test_ids_are_those_of_the_reference_and_never_control_tokens(
    tokenizer: BatchTokenizer, reference, tiny_model: Path, texts: list[str]
) -> None:
    """A text decodes to itself, so that nothing needs to be stored twice."""
    encoded = tokenizer.encode(texts)
    assert encoded == [reference.encode(text, add_special_tokens=False).ids for text in texts]
    assert not specials(tiny_model) & {i for ids in encoded for i in ids}
    assert [reference.decode(ids) for ids in encoded] == texts


@FREELY
@given(st.lists(st.lists(st.sampled_from("abcdefgh").map(lambda c: f"pump {c}=1"), max_size=8), max_size=8))
def test_a_text_that_came_before_has_the_same_ids(
    tokenizer: BatchTokenizer, batches: list[list[str]]
) -> None:
    """Ids of short texts are remembered, within a bound, and not looked up while none comes again."""
    for texts in batches:
        whole = [ids.tolist() for ids in tokenizer._encode_new(texts)]
        assert [ids.tolist() for ids in tokenizer.encode_flat(texts)] == whole
        assert [ids.tolist() for ids in tokenizer._encode_known(texts)] == whole


def test_remembered_texts_are_bounded(tokenizer: BatchTokenizer) -> None:
    for n in range(40):
        tokenizer._encode_known([f"{n} {i}" for i in range(300)])
        assert len(tokenizer._known) <= MAX_KNOWN
    tokenizer._encode_known([f"many {i}" for i in range(MAX_KNOWN + 1)])
    assert len(tokenizer._known) <= MAX_KNOWN


def test_a_long_text_among_short_ones_is_not_remembered(tokenizer: BatchTokenizer) -> None:
    tokenizer._encode_known(["pump"] * 10_000 + ["a long one " * 10_000])
    assert max(map(len, tokenizer._known)) <= KNOWN_CHARS


def test_an_exchange_is_in_the_models_chat_form_and_learns_the_assistants_turns(
    tokenizer: BatchTokenizer, tiny_model: Path
) -> None:
    """Ids of the template itself; the mask covers the assistant's words and their end-of-turn token."""
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(tiny_model)
    chat = load_manifest(tiny_model).chat
    assert chat is not None
    turns = [("user", "E42?"), ("assistant", "Coolant low."), ("user", "And now?"), ("assistant", "Reset.")]
    messages = [Message(role, content) for role, content in turns]  # type: ignore[arg-type]
    ids, mask = tokenizer.encode_exchange(messages)
    whole = hf.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
    assert hf.decode(ids) == whole
    learned = hf.decode([i for i, on in zip(ids, mask, strict=True) if on])
    assert learned == "Coolant low.<|im_end|>Reset.<|im_end|>"
    assert len(ids) == len(mask)


def test_an_exchange_with_a_system_message_has_no_implied_one(tokenizer: BatchTokenizer) -> None:
    own = tokenizer.encode_exchange([Message("system", "Be brief."), Message("user", "E42?")])
    implied = tokenizer.encode_exchange([Message("user", "E42?")])
    assert sum(own[1]) == sum(implied[1]) == 0
    assert own[0] != implied[0]


def batch(*events: Event) -> Batch:
    lines = [Line(b"x", n, Origin("site", "in", 5.0)) for n in range(len(events))]
    return Batch(
        lines, events=list(enumerate(events)), sources=[event.source or "site" for event in events],
        times=[float(n) for n in range(len(events))],
        arrivals=[5.0] * len(events), hashes=[NO_HASH] * len(events),
    )  # fmt: skip


TEXT = Text("cmms", subject="crew-b", text="pump leaks")
READING = Reading(values={"p": 1.5})
EXCHANGE = Exchange(messages=[Message("user", "E42?"), Message("assistant", "Low.")])
FEEDBACK = Feedback(about="x", rating=1)


def step(tokenizer: BatchTokenizer) -> TokenizeStep:
    return TokenizeStep(tokenizer, lambda source, reading: f"{source} {reading.values}")


def test_events_become_samples_in_their_order(tokenizer: BatchTokenizer) -> None:
    """Source, kind, subject and time of each; a reading as it is rendered; a bare rating holds no token."""
    samples = step(tokenizer)(batch(TEXT, READING, EXCHANGE, FEEDBACK)).samples
    assert samples.sources == ["cmms", "site", "site", "site"]
    assert samples.kinds == ["text", "reading", "exchange", "feedback"]
    assert samples.subjects == ["crew-b", "", "", ""]
    assert samples.ts.tolist() == [0.0, 1.0, 2.0, 3.0]
    words, rendered = tokenizer.encode(["pump leaks", "site {'p': 1.5}"])
    chat, mask = tokenizer.encode_exchange(EXCHANGE.messages)
    assert [samples.token_ids(i) for i in range(4)] == [words, rendered, chat, []]
    assert [samples.token_mask(i) for i in range(4)] == [[1] * len(words), [1] * len(rendered), mask, []]
    assert samples.texts is None
    assert len(samples.hashes) == 4 * 16


def test_a_batch_of_texts_alone_gives_the_same_samples_as_a_mixed_one(tokenizer: BatchTokenizer) -> None:
    """There is a faster way for it."""
    plain = step(tokenizer)(batch(TEXT, READING)).samples
    mixed = step(tokenizer)(batch(TEXT, READING, EXCHANGE)).samples
    assert plain == mixed[:2]


def test_a_batch_without_events_passes(tokenizer: BatchTokenizer) -> None:
    tick = Batch([], now=5.0)
    assert step(tokenizer)(tick) == tick


def test_the_count_of_samples_is_told(tokenizer: BatchTokenizer) -> None:
    assert step(tokenizer)(batch(TEXT, FEEDBACK)).outcome.samples == 2


def test_what_cannot_be_learned_from_has_a_reason(tokenizer: BatchTokenizer) -> None:
    assert [tokenizer.refusal(event) for event in (TEXT, READING, EXCHANGE, FEEDBACK)] == [""] * 4
    assert "to correct" in tokenizer.refusal(Feedback(about="9f", correction="Bleed it."))
    assert "no chat template" in refusal_under(tokenizer, chat=None)
    chat = tokenizer.manifest.chat
    assert chat is not None
    users = msgspec.structs.replace(chat, roles={"user": chat.roles["user"]})
    assert "no role 'assistant'" in refusal_under(tokenizer, chat=users)


def refusal_under(tokenizer: BatchTokenizer, **changed: object) -> str:
    other = object.__new__(BatchTokenizer)
    other.manifest = msgspec.structs.replace(tokenizer.manifest, **changed)
    return other.refusal(EXCHANGE)


def copied(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_a_tokenizer_whose_file_changed_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = copied(tiny_model, tmp_path)
    with (model / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(BaseModelError):
        BatchTokenizer(model)


def test_a_tokenizer_that_encodes_otherwise_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Another release of the library could: the golden encodings tell."""
    model = copied(tiny_model, tmp_path)
    path = model / "edgewater-model.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    next(golden for golden in manifest["golden"] if golden["ids"])["ids"][0] += 1
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BaseModelError, match="model prepare"):
        BatchTokenizer(model)


def test_texts_that_are_read_back_are_those_that_near_duplicates_were_told_by(tiny_model: Path) -> None:
    """Also where ids do not give a text back, so that it is stored, and some characters have none."""
    lossy = BatchTokenizer(tiny_model)
    lossy.manifest = msgspec.structs.replace(lossy.manifest, lossless=False, unencodable="[\u0000x]")
    lossy._clean = replace_unencodable(lossy.manifest)
    said = "pump x runs"
    after = TokenizeStep(lossy, lambda source, event: "")(batch(Text(text=said)))
    assert lossy.texts_of(after.samples, [0]) == [lossy.clean(said)] != [said]
