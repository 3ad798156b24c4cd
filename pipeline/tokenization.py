"""Tokenize: texts and exchanges become token ids and a loss mask, through fastokens.

Text is encoded with special tokens split, so that no data can produce a control token.
"""

from __future__ import annotations

import itertools
import operator
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import msgspec
from fastokens import Tokenizer

from adapters.model_folder import BaseModelError, ChatFormat, ModelManifest, replace_unencodable, verify
from pipeline.events import KIND_OF, Batch, Event, Exchange, Feedback, Message, Reading, Text
from storage.memory import give_back
from storage.samples import Samples

__all__ = ["BatchTokenizer", "TokenizeStep"]

_NO_TEXT = ""
SHORT_CHARS = 32
MAX_KNOWN, KNOWN_CHARS = 4_096, 128  # texts whose ids are remembered, and how long: at most a few MB
CALLS_WITHOUT = 32


class BatchTokenizer:
    """The base model's tokenizer, checked against its golden encodings when it is opened."""

    def __init__(self, model: Path) -> None:
        self.manifest: ModelManifest = verify(model, weights=False)
        self._clean = replace_unencodable(self.manifest)
        self._unclean_ascii = bytes(i for i in range(128) if self._clean(chr(i)) != chr(i))
        self._known: dict[str, bytes] = {}
        self._calls_without = 0  # so often the known texts are not looked at: hardly any was there
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        texts = [golden.text for golden in self.manifest.golden]
        if self.encode(texts) != [golden.ids for golden in self.manifest.golden]:
            raise BaseModelError(
                "its golden encodings no longer come out",
                path=model / "tokenizer.json",
                hint="run 'edgewater model prepare' again with this version",
            )
        give_back()

    def encode_flat(self, texts: list[str]) -> tuple[array[int], array[int]]:
        """Encode texts; a character that the vocabulary cannot express becomes U+FFFD.

        Returns: all ids flat, and len(texts) + 1 offsets into them.
        """
        # A look at the known ones costs a third of encoding a short text, and a tenth of a long one's.
        if self._calls_without or sum(map(len, texts)) > SHORT_CHARS * len(texts):
            self._calls_without = max(0, self._calls_without - 1)
            return self._encode_new(texts)
        return self._encode_known(texts)

    def _encode_new(self, texts: list[str]) -> tuple[array[int], array[int]]:
        raw_ids, raw_offsets = self._tokenizer.encode_batch_flat(self._cleaned(texts), False, True)
        ids: array[int] = array("I")
        ids.frombytes(raw_ids)
        offsets: array[int] = array("Q")
        offsets.frombytes(raw_offsets)
        return ids, offsets

    def _encode_known(self, texts: list[str]) -> tuple[array[int], array[int]]:
        """Encode short texts, most of which came before: with few digits a reading soon repeats itself."""
        parts = [*map(self._known.get, texts)]
        if None in parts:
            new = [*{text: None for text, part in zip(texts, parts, strict=True) if part is None}]
            new_ids, ends = self._encode_new(new)
            raw, width = new_ids.tobytes(), new_ids.itemsize
            found = {text: raw[width * ends[i] : width * ends[i + 1]] for i, text in enumerate(new)}
            parts = [
                part if part is not None else found[text] for text, part in zip(texts, parts, strict=True)
            ]
            if len(self._known) + len(found) > MAX_KNOWN:
                self._known.clear()
            if len(found) <= MAX_KNOWN:  # among many short ones a text may be of any length
                self._known |= {text: part for text, part in found.items() if len(text) <= KNOWN_CHARS}
            if 2 * len(new) > len(texts):
                self._calls_without = CALLS_WITHOUT
        ids: array[int] = array("I")
        ids.frombytes(b"".join(cast("list[bytes]", parts)))
        sizes = (len(part) // ids.itemsize for part in cast("list[bytes]", parts))
        return ids, array("Q", itertools.accumulate(sizes, initial=0))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Encode texts to a list of ids each."""
        ids, offsets = self.encode_flat(texts)
        return [ids[offsets[i] : offsets[i + 1]].tolist() for i in range(len(texts))]

    def clean(self, text: str) -> str:
        """A text as it can be read back from its ids: without characters that have none."""
        return self._clean(text)

    def texts_of(self, samples: Samples, chosen: Sequence[int]) -> list[str]:
        """The texts of some samples, by their indices, as `clean` makes them."""
        if samples.texts is not None:
            return [self._clean(samples.texts[i]) for i in chosen]
        starts = samples.offsets()
        ids = [samples.ids[starts[i] : starts[i + 1]].tolist() for i in chosen]
        return cast("list[str]", self._tokenizer.decode_batch(ids))

    def _cleaned(self, texts: list[str]) -> list[str]:
        """The texts without characters that have no ids: nearly always, and told by one look, as they are."""
        joined = "".join(texts)
        data = joined.encode(errors="replace")  # of a lone surrogate, which the vocabulary lacks as well
        if len(data.translate(None, self._unclean_ascii)) != len(data):
            return [*map(self._clean, texts)]
        if joined.isascii():
            return texts
        return [text if text.isascii() else self._clean(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens written out."""
        return str(self._tokenizer.decode(ids))

    def refusal(self, event: Event) -> str:
        """Why this base model cannot learn from an event, "" if it can."""
        if isinstance(event, Feedback) and event.correction is not None:
            return f"no answer {event.about!r} is known here to correct"
        if not isinstance(event, Exchange):
            return ""
        chat = self.manifest.chat
        if chat is None:
            return "the base model has no chat template that can be learned from"
        unknown = sorted({m.role for m in event.messages} - chat.roles.keys())
        return f"the base model's chat template knows no role {unknown[0]!r}" if unknown else ""

    def encode_exchange(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Encode a dialogue in the model's chat form.

        Returns: token ids, and a mask that is 1 on the assistant's words and their end-of-turn token.
        Raises: KeyError or ValueError where `refusal` has a reason.
        """
        chat = self.manifest.chat
        if chat is None:
            raise ValueError("no chat template")
        contents = self.encode([message.content for message in messages])
        ids, mask = self._opening(chat, messages)
        for message, content in zip(messages, contents, strict=True):
            role = chat.roles[message.role]
            learned = message.role == "assistant"
            ids += [*role.prefix, *content, *role.suffix]
            mask += [0] * len(role.prefix) + [int(learned)] * len(content)
            mask += [int(learned and i < role.learned) for i in range(len(role.suffix))]
        return ids, mask

    def _opening(self, chat: ChatFormat, messages: list[Message]) -> tuple[list[int], list[int]]:
        implied = [] if messages[0].role == "system" else chat.default_system
        ids = [*chat.start, *implied]
        return ids, [0] * len(ids)


class TokenizeStep:
    """Renders and tokenizes the events of a Batch; a pure function of it.

    Args:
        tokenizer: Of the base model.
        render: (source, reading) -> text.
    """

    def __init__(self, tokenizer: BatchTokenizer, render: Callable[[str, Reading], str]) -> None:
        self._tokenizer = tokenizer
        self._render = render

    def __call__(self, batch: Batch) -> Batch:
        """Turn events into samples, in order."""
        if not batch.events:
            return batch
        render, plain = self._render, True
        texts: list[str] = []
        for (_, event), source in zip(batch.events, batch.sources, strict=True):
            if type(event) is Reading:
                texts.append(render(source, event))
            elif type(event) is Text:
                texts.append(event.text)
            else:
                texts.append(_NO_TEXT)  # encoded on its own below, or nothing to learn
                plain = False
        flat, offsets = self._tokenizer.encode_flat(texts)
        if plain:
            lengths = array("I", map(operator.sub, offsets[1:], offsets))
            return self._finish(batch, texts, lengths, flat, bytearray(b"\x01") * len(flat))
        return self._mixed(batch, texts, flat, offsets)

    def _mixed(self, batch: Batch, texts: list[str], flat: array[int], offsets: array[int]) -> Batch:
        lengths, ids, mask = array("I"), array("I"), bytearray()
        for i, (_, event) in enumerate(batch.events):
            part, part_mask = self._one(event, flat[offsets[i] : offsets[i + 1]].tolist())
            lengths.append(len(part))
            ids.extend(part)
            mask.extend(part_mask)
        return self._finish(batch, texts, lengths, ids, mask)

    def _one(self, event: Event, plain: list[int]) -> tuple[list[int], list[int]]:
        match event:
            case Exchange():
                return self._tokenizer.encode_exchange(event.messages)
            case Feedback():
                return [], []  # a bare rating is stored and trains nothing
            case _:
                return plain, [1] * len(plain)

    def _finish(
        self, batch: Batch, texts: list[str], lengths: array[int], ids: array[int], mask: bytearray
    ) -> Batch:
        samples = Samples(
            0,
            batch.sources,
            [KIND_OF[type(event)] for _, event in batch.events],
            [event.subject or "" for _, event in batch.events],
            array("d", batch.times),
            lengths,
            ids,
            mask,
            b"".join(batch.hashes),
            None if self._tokenizer.manifest.lossless else texts,
        )
        outcome = msgspec.structs.replace(batch.outcome, samples=len(samples))
        return msgspec.structs.replace(batch, samples=samples, outcome=outcome)
