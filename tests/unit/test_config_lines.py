"""The line of every key of a TOML file, for messages that say where."""

from __future__ import annotations

import json
import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipeline.toml_lines import KeyPath, dotted, key_lines

DOCUMENT = """\
# a comment with = and [brackets]
top = 1
"quoted key" = 'x' # = [ {
text = \"\"\"
[not.a.table]
fake = 1 \\\"\"\" still inside
\"\"\"\"\"
raw = '''
[[neither]]'''
a.b.c = { d = 1, "e" = [ 2,
  3 ] }

[table . inner]
when = 1979-05-27 07:32:00
list = [ # comment ]
  "]", # }
  { x = 1 },
]

[[sources]]
name = "first"
  [sources.render]
  digits = 3
[[sources]]
  [[sources.deep]]
  [[sources.deep]]
  key = "=#"
[sources.render.units]
p = "bar"
"""


def test_every_kind_of_key_is_found_on_its_line() -> None:
    """Strings over many lines, comments, inline tables and nested arrays do not mislead."""
    lines = key_lines(DOCUMENT)
    expected: dict[KeyPath, int] = {
        ("top",): 2,
        ("quoted key",): 3,
        ("text",): 4,
        ("raw",): 8,
        ("a", "b", "c"): 10,
        ("a", "b", "c", "d"): 10,
        ("a", "b", "c", "e", 1): 11,
        ("table", "inner"): 13,
        ("table", "inner", "when"): 14,
        ("table", "inner", "list"): 15,
        ("table", "inner", "list", 0): 16,
        ("table", "inner", "list", 1, "x"): 17,
        ("sources", 0): 20,
        ("sources", 0, "name"): 21,
        ("sources", 0, "render"): 22,
        ("sources", 0, "render", "digits"): 23,
        ("sources", 1): 24,
        ("sources", 1, "deep", 0): 25,
        ("sources", 1, "deep", 1, "key"): 27,
        ("sources", 1, "render", "units", "p"): 29,
    }
    assert {path: lines.get(path) for path in expected} == expected


def _paths(value: Any, at: KeyPath = ()) -> set[KeyPath]:
    """List every path of a parsed document."""
    entries: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list):
        entries = list(enumerate(value))
    return {path for key, inner in entries for path in {(*at, key)} | _paths(inner, (*at, key))}


def test_exactly_the_paths_that_tomllib_sees_are_found() -> None:
    """Nothing inside a string or comment passes for a key."""
    assert set(key_lines(DOCUMENT)) == _paths(tomllib.loads(DOCUMENT))


_text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
_values = st.recursive(
    st.integers() | st.booleans() | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=8,
)


def _quote(text: str) -> str:
    """Write a basic string."""
    return json.dumps(text, ensure_ascii=False)


def _inline(value: Any, gap: str) -> str:
    """Write a value as TOML; `gap` goes between array elements, where lines may break."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + gap + ("," + gap).join(_inline(element, gap) for element in value) + gap + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quote(key)} = {_inline(entry, gap)}" for key, entry in value.items()) + "}"
    return _quote(value) if isinstance(value, str) else str(value)


@given(st.lists(st.tuples(_text, st.dictionaries(_text, _values, max_size=3)), max_size=4), st.data())
def test_random_documents_are_walked_like_tomllib(
    tables: list[tuple[str, dict[str, Any]]], data: st.DataObject
) -> None:
    """Whatever stands in keys, strings and arrays, the same paths come out, and each line holds its key."""
    lines: list[str] = []
    seen: set[str] = set()
    for name, entries in tables:
        if name in seen:
            continue
        seen.add(name)
        lines.append(f"[{_quote(name)}]" if data.draw(st.booleans()) else f"[[{_quote(name)}]]")
        gap = data.draw(st.sampled_from(["", " ", "\n", " # ] \" '\n"]))
        lines += [f"{_quote(key)} = {_inline(value, gap)}" for key, value in entries.items()]
    text = "\n".join(lines) + "\n"
    found = key_lines(text)
    assert set(found) == _paths(tomllib.loads(text))
    split = text.split("\n")
    for path, line in found.items():
        if len(path) == 2 and isinstance(path[1], str):
            assert split[line - 1].startswith(_quote(path[1]))


def test_paths_are_written_as_people_do() -> None:
    """Indices in brackets, names with dots."""
    assert dotted(("sources", 0, "render", "units")) == "sources[0].render.units"
    assert dotted(()) == ""
