"""Random and mutated input through the real steps: nothing raises, every line ends in one outcome.

A long run: EDGEWATER_HOSTILE_INPUTS=1000000, EDGEWATER_HOSTILE_SEED=7.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from pipeline.config import load
from pipeline.decode import decode
from pipeline.dedup import Dedup, SeenHashes
from pipeline.demo import demo_lines
from pipeline.events import MAX_EVENT_BYTES, Batch, Line, Origin, Outcome
from pipeline.rules import SourceRules
from pipeline.tokenization import BatchTokenizer, TokenizeStep

INPUTS = int(os.environ.get("EDGEWATER_HOSTILE_INPUTS", "20000"))
SEED = int(os.environ.get("EDGEWATER_HOSTILE_SEED", "1"))
BATCH = 500
CONFIG = r"""
[[sources]]
name = "site"
kind = "files"
path = "x"
deadband = 500.0
max_silence = "1h"
near_duplicates = 0.8
[[redact]]
pattern = '[\w.]{1,64}@[\w.]+'
replacement = "<mail>"
[[redact]]
pattern = '\d{3,}'
replacement = "<number>"
"""
SNIPPETS = [
    b'"', b"\\", b"{", b"}", b"[", b"]", b":", b",", b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\\ud800",
    b"\\u0000", b"\\u202e", b"NaN", b"Infinity", b"1e999", b"-0", b"9" * 400, b"1e-400", b"null", b"true",
    b'"ts":', b'"values":{}', b'"id":""', b'"source":"../../x"', b'"source":"' + b"a" * 65 + b'"', b"\n",
    b'"ts":"9999-12-31T23:59:59-23:59"', b'"ts":"0001-01-01T00:00:00+23:59"', b'"ts":1e15', b"\xef\xbb\xbf",
    b"<|endoftext|>", b"<|im_start|>", b"a@b.c", "é\u0301\U0001f9ff\u2028".encode(), b"[" * 70, b'{"a":' * 70,
    b'"kind":"feedback","about":"r1","rating":1', b'"messages":[{"role":"assistant","content":""}]',
]  # fmt: skip
FIELDS = (
    "kind", "source", "ts", "id", "subject", "text", "values", "units", "messages", "about", "rating", "x",
)  # fmt: skip


def _value(chance: random.Random, depth: int = 0) -> object:
    """Anything that JSON, as Python writes it, can say."""
    kind = chance.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return chance.choice(
            (None, True, False, 0, -1, 1 << 63, 1 << 64, 10**300, float("nan"), float("inf"))
        )
    if kind == 1:
        return chance.uniform(-1e12, 1e12)
    if kind <= 3:
        return "".join(map(chr, chance.choices(range(1, 0xD800), k=chance.randrange(12))))
    if kind == 4:
        return chance.choice(("reading", "text", "exchange", "feedback", "user", "assistant", "system", "r1"))
    if kind == 5:
        return chance.choice(("2025-11-24T12:00:00Z", "2025-11-24", "site", "\ud800", "", "../x", "a" * 200))
    if kind == 6:
        return [_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    keys = (*FIELDS, "role", "content", "pressure")
    return {chance.choice(keys): _value(chance, depth + 1) for _ in range(chance.randrange(4))}


def _mutated(chance: random.Random, line: bytes) -> bytes:
    """A good event, damaged in one to three places."""
    data = bytearray(line)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0:
                data[at:at] = chance.choice(SNIPPETS)
            case 1:
                del data[at : at + chance.randrange(1, 20)]
            case 2:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 3:
                data[at:at] = data[chance.randrange(len(data) + 1) :]
            case _:
                data[at : at + chance.randrange(8)] = chance.choice(SNIPPETS)
    return bytes(data)


def _random_event(chance: random.Random) -> bytes:
    fields = {chance.choice(FIELDS): _value(chance) for _ in range(chance.randrange(7))}
    kind = chance.choice(("reading", "text", "exchange", "feedback", ""))
    return json.dumps({**fields, **({"kind": kind} if kind else {})}).encode()


def _huge(chance: random.Random) -> bytes:
    """Rarely, what is near the bounds of size and nesting."""
    size = chance.choice((MAX_EVENT_BYTES - 30, MAX_EVENT_BYTES + 1, 5_000))
    return chance.choice(
        (
            b'{"kind":"text","text":"'
            + chance.choice((b"x", b"\xf0\x9f\xa7\xbf", b"\\n", b"1")) * (size // 4)
            + b'"}',
            b"[" * size,
            b'{"kind":"text","text":' + b'{"a":' * (size // 5),
            b'{"kind":"reading","values":{'
            + b",".join(b'"t%d":%d' % (n, n) for n in range(size // 14))
            + b"}}",
        )
    )


def hostile(chance: random.Random, good: list[bytes]) -> bytes:
    """One input."""
    kind = chance.random()
    if kind < 0.3:
        return _mutated(chance, chance.choice(good))
    if kind < 0.5:
        return _random_event(chance)
    if kind < 0.6:
        return b"".join(chance.choices(SNIPPETS, k=chance.randrange(1, 12)))
    if kind < 0.65:
        return chance.randbytes(chance.randrange(1, 200))
    return chance.choice(good) if kind < 0.999 else _huge(chance)


def _of_site(line: bytes) -> bytes:
    """An event of the configured source, without a time of its own."""
    event = json.loads(line)
    return json.dumps({key: event[key] for key in event if key not in ("source", "ts")}).encode()


@pytest.fixture(scope="module")
def steps(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Callable[[Batch], Batch]]:
    """What ingest runs before the commit, with redaction, a deadband and near duplicates."""
    path = tmp_path_factory.mktemp("hostile") / "edgewater.toml"
    path.write_text(CONFIG)
    rules, tokenizer = SourceRules(load(path)), BatchTokenizer(tiny_model)
    dedup = Dedup(
        b"k" * 16,
        SeenHashes(1_000),
        lambda: 0,
        {},
        rules.dedup_mode,
        rules.deadband,
        None,
        1_000,
        rules.near_duplicates(),
        tokenizer.clean,
    )
    tokenize = TokenizeStep(tokenizer, rules.render)
    return [lambda batch: decode(batch, tokenizer.refusal), rules.redact, dedup, tokenize]


def test_every_hostile_input_ends_in_one_outcome(steps: list[Callable[[Batch], Batch]]) -> None:
    chance = random.Random(SEED)
    good = [_of_site(line) for line in demo_lines(everything=False)][:2_000]
    total = Outcome()
    for first in range(0, INPUTS, BATCH):
        origin = Origin("site", "files:site:x", 1.7e9 + first)
        lines = [
            Line(
                hostile(chance, good),
                chance.choice((-1, n)),
                origin,
                chance.choice(("", "", f"key {n % 50}")),
            )
            for n in range(BATCH)
        ]
        batch = Batch(lines)
        for step in steps:
            batch = step(batch)
        outcome = msgspec.structs.astuple(batch.outcome)
        assert sum(outcome) == BATCH, "every line ended in exactly one outcome"
        assert batch.samples is not None
        assert len(batch.samples) == len(batch.events) == batch.outcome.samples
        assert len(batch.dead) == batch.outcome.dead_letters
        kept = [number for number, _ in batch.events]
        assert kept == sorted({*kept} - {*batch.dead_lines}), "each once, in order, and not refused too"
        assert all(letter.reason and len(letter.data) <= MAX_EVENT_BYTES for letter in batch.dead)
        total = Outcome(*map(sum, zip(msgspec.structs.astuple(total), outcome, strict=True)))
    wanted = (total.samples, total.duplicates, total.suppressed, total.dead_letters, total.near_duplicates)
    assert min(wanted) > INPUTS // 200, f"the inputs are worth little: {total}"
