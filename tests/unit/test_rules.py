"""What holds for a source: dedup, rendering, deadband, and what is taken out before anything is stored."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from pipeline import config
from pipeline.decode import decode
from pipeline.events import Batch, Exchange, Feedback, Line, Origin, Reading, Text
from pipeline.rules import SourceRules

MAIL = "alice@example.com"
REDACT = '[[redact]]\npreset = "email"\n'


def rules(tmp_path: Path, text: str) -> SourceRules:
    path = tmp_path / "edgewater.toml"
    path.write_text(text)
    return SourceRules(config.load(path, require_sources=False))


def batch(*events: dict[str, object] | bytes, source: str = "site") -> Batch:
    data = [event if isinstance(event, bytes) else json.dumps(event).encode() for event in events]
    return decode(Batch([Line(line, 0, Origin(source, "x", 0.0)) for line in data]))


def test_a_source_that_is_not_named_gets_the_defaults_of_its_kind(tmp_path: Path) -> None:
    held = rules(tmp_path, '[[sources]]\nname = "a"\nkind = "stdin"\ndedup = "none"\n')
    kinds = ("reading", "text", "exchange", "feedback")
    assert [held.dedup_mode("other", kind) for kind in kinds] == [
        "delivery",
        "content",
        "content",
        "delivery",
    ]
    assert [held.dedup_mode("a", kind) for kind in kinds] == ["none"] * 4
    assert held.deadband("other") is None
    reading = Reading(values={"p": 3.14159}, units={"p": "bar"})
    assert held.render("other", reading) == "other p=3.14bar"


def test_a_source_that_names_no_dedup_gets_the_defaults_too(tmp_path: Path) -> None:
    held = rules(tmp_path, '[[sources]]\nname = "a"\nkind = "stdin"\n')
    assert (held.dedup_mode("a", "text"), held.dedup_mode("a", "reading")) == ("content", "delivery")


def test_a_horizon_of_nothing_switches_dedup_off(tmp_path: Path) -> None:
    held = rules(
        tmp_path, '[dedup]\nhorizon_events = 0\n[[sources]]\nname = "a"\nkind = "stdin"\ndedup = "content"\n'
    )
    assert (held.dedup_mode("a", "text"), held.dedup_mode("b", "text")) == ("none", "none")


def test_names_that_events_bring_are_not_remembered_without_end(tmp_path: Path) -> None:
    held = rules(tmp_path, "")
    for n in range(10_000):
        held.render(f"s{n}", Reading(values={"a": 1.0}))
    assert len(held._renderers) < 5_000


def test_deadbands_are_those_of_the_configuration(tmp_path: Path) -> None:
    held = rules(
        tmp_path,
        '[[sources]]\nname = "all"\nkind = "stdin"\ndeadband = 0.5\nmax_silence = "1m"\n'
        '[[sources]]\nname = "some"\nkind = "files"\npath = "x"\ndeadband = { p = 0.1 }\n',
    )
    everywhere, some = held.deadband("all"), held.deadband("some")
    assert everywhere is not None
    assert some is not None
    assert (everywhere.bands, everywhere.everywhere, everywhere.max_silence_s) == ({}, 0.5, 60.0)
    assert (some.bands, some.everywhere, some.max_silence_s) == ({"p": 0.1}, None, 0.0)


def test_every_text_of_an_event_is_redacted(tmp_path: Path) -> None:
    """Also a reading's tags and units: they are rendered and stored."""
    held = rules(tmp_path, REDACT)
    clean = held.redact(
        batch(
            {"kind": "text", "text": f"ask {MAIL}"},
            {
                "kind": "exchange",
                "messages": [{"role": "user", "content": MAIL}, {"role": "assistant", "content": "ok"}],
            },
            {"kind": "feedback", "about": "x", "correction": f"{MAIL}!"},
            {"kind": "reading", "values": {MAIL: 1, "p": 2}, "units": {MAIL: "a@b.co"}},
            {"kind": "feedback", "about": "x"},
        )
    )
    one, two, three, four, five = (event for _, event in clean.events)
    assert isinstance(one, Text) and one.text == "ask <email>"
    assert isinstance(two, Exchange) and [m.content for m in two.messages] == ["<email>", "ok"]
    assert isinstance(three, Feedback) and three.correction == "<email>!"
    assert isinstance(four, Reading) and (four.values, four.units) == (
        {"<email>": 1, "p": 2},
        {"<email>": "<email>"},
    )
    assert isinstance(five, Feedback) and five.correction is None


@pytest.mark.parametrize(
    "refused",
    [
        b'{"kind":"text","text":"alice@example.com"',
        b'{"kind":"alice@example.com"}',
        b'{"kind":"text","text":"x","alice@example.com":1}',
        b'{"kind":"text","text":"alice\\u0040example.com","x":1}',
        b'{"kind":"text","text":"x","ts":"alice@example.com"}',
        b"\xff\xfe alice@example.com \xff",
    ],
)
def test_dead_letters_are_redacted_with_their_reasons(tmp_path: Path, refused: bytes) -> None:
    """A refused line is stored as well; it may be escaped, or no text at all."""
    (letter,) = rules(tmp_path, REDACT).redact(batch(refused)).dead
    assert b"<email>" in letter.data
    assert b"alice" not in letter.data
    assert "alice" not in letter.reason


def test_the_rest_of_a_dead_letter_stays_as_it_was(tmp_path: Path) -> None:
    raw = b'\xff \xed\xa0\x80 {"a":"\\u0022 \\u005c \\n \\u000a \\ud83d\\ude00 C:\\\\u0041"'
    (letter,) = rules(tmp_path, REDACT).redact(batch(raw)).dead
    assert letter.data == raw


def test_a_rule_sees_letters_that_json_escaped(tmp_path: Path) -> None:
    held = rules(tmp_path, '[[redact]]\npattern = "M\u00fcller|\u5c71"\nreplacement = "-"\n')
    (letter,) = held.redact(batch(b'{"a":"M\\u00fcller, \\u5C71, caf\\u00e9"')).dead
    assert letter.data == '{"a":"-, -, caf\u00e9"'.encode()


@pytest.mark.parametrize(
    "refused",
    [
        rb'{"a":"see https:\/\/intra\/alice"}',
        rb'{"a":"see https:\/\/intra\/alice',
        rb'{"a":[{"b":"user\talice"}]}',
        rb'{"user\nalice":1}',
        rb'{"a":"\ud83d\ude00alice"}',
    ],
)
def test_a_rule_sees_what_json_can_only_write_escaped(tmp_path: Path, refused: bytes) -> None:
    patterns = (r"https?://\S+", r"user\s+\w+", "\U0001f600\\w+")
    held = rules(tmp_path, "".join(f"[[redact]]\npattern = '{pattern}'\n" for pattern in patterns))
    (letter,) = held.redact(batch(refused)).dead
    assert b"alice" not in letter.data
    assert b"<redacted>" in letter.data


def test_a_dead_letter_whose_reason_is_redacted_whole_is_still_one(tmp_path: Path) -> None:
    held = rules(tmp_path, "[[redact]]\npattern = '.+'\nreplacement = ''\n")
    (letter,) = held.redact(batch(b"no event")).dead
    assert not letter.deleted


def test_a_rule_for_some_sources_leaves_the_others_alone(tmp_path: Path) -> None:
    """By the source that the event names; what was refused gets every rule, as nobody knows whose it is."""
    held = rules(tmp_path, REDACT + 'sources = ["hmi"]\n')
    clean = held.redact(
        batch(
            {"kind": "text", "text": MAIL}, {"kind": "text", "text": MAIL, "source": "hmi"}, MAIL.encode(),
            source="site",
        )
    )  # fmt: skip
    assert [event.text for _, event in clean.events if isinstance(event, Text)] == [MAIL, "<email>"]
    assert [letter.data for letter in clean.dead] == [b"<email>"]


def test_rules_apply_in_their_order(tmp_path: Path) -> None:
    held = rules(
        tmp_path,
        REDACT + "[[redact]]\npattern = '<(e)mail>'\nreplacement = '\\1'\n",
    )
    (event,) = (event for _, event in held.redact(batch({"kind": "text", "text": MAIL})).events)
    assert event == Text(text="e")


def test_tags_on_change_are_a_deadband_that_every_other_value_has_left(tmp_path: Path) -> None:
    held = rules(
        tmp_path,
        '[[sources]]\nname = "a"\nkind = "stdin"\nmax_silence = "1m"\nrender = { on_change = ["mode"] }\n'
        '[[sources]]\nname = "b"\nkind = "files"\npath = "x"\ndeadband = 0.5\nrender.on_change = ["mode"]\n',
    )
    plain, banded = held.deadband("a"), held.deadband("b")
    assert plain is not None
    assert banded is not None
    assert (plain.on_change, plain.max_silence_s) == (frozenset({"mode"}), 60.0)
    assert not plain.silent({"p": 1.0}, {"p": 1.0}, 0.0)
    assert (banded.on_change, banded.everywhere) == (frozenset({"mode"}), 0.5)


def test_sources_that_invent_thousands_of_tags_each_do_not_fill_the_memory(tmp_path: Path) -> None:
    held = rules(tmp_path, "")
    tracemalloc.start()
    for source in range(90):
        values = {f"{source}-{tag}": 1.0 for tag in range(4_000)}
        assert held.render(f"s{source}", Reading(values=values)).startswith(f"s{source} {source}-0=1 ")
    memory, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert memory < 26 << 20  # of all 90 it would be 40 MB
