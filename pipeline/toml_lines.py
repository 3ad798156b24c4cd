"""Where each key of a TOML file stands, because tomllib forgets it and an error message needs the line.

Works on text that tomllib has accepted, so it never judges: it walks keys and skips values. A path is the
tuple that leads to a value in tomllib's result, names for tables and numbers for array elements: ("sources",
0, "path").
"""

from __future__ import annotations

import bisect
import re
import tomllib
from typing import Final

__all__ = ["KeyPath", "dotted", "key_lines"]

KeyPath = tuple[str | int, ...]

_SPACE: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BLANK: Final = re.compile(r"[ \t]*")
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
_QUOTED: Final = re.compile(r'"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'')
# A multi-line string may end in one or two quotes of its own kind before the closing three.
_STRING: Final = re.compile(
    r'"""(?:[^\\]|\\.)*?"""(?:""?)?|\'\'\'.*?\'\'\'(?:\'\'?)?|' + _QUOTED.pattern, re.DOTALL
)
_SCALAR: Final = re.compile(r"[^,\]}#\n]*")


def dotted(path: KeyPath) -> str:
    """Write a path as people do: ("sources", 0, "path") is "sources[0].path"."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def key_lines(text: str) -> dict[KeyPath, int]:
    """Find the line, from 1, of every table, key and array element of a valid TOML document.

    A table that only dotted names imply (`a.b = 1`) has the line of the first that does.
    """
    walker = _Walker(text)
    walker.document()
    return walker.lines


class _Walker:
    """One pass over the text; `at` is the offset of the next character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[KeyPath, int] = {}
        self._lengths: dict[KeyPath, int] = {}  # elements seen so far of each array of tables
        self._newlines = [match.start() for match in re.finditer("\n", text)]

    def document(self) -> None:
        """Walk headers and key-value lines to the end."""
        table: KeyPath = ()
        while True:
            self._skip(_SPACE)
            if self.at >= len(self.text):
                return
            if self.text.startswith("[[", self.at):
                table = self._header(2, is_array=True)
            elif self.text[self.at] == "[":
                table = self._header(1, is_array=False)
            else:
                self._pair(table)

    def _header(self, brackets: int, *, is_array: bool) -> KeyPath:
        """Walk `[a.b]` or `[[a.b]]`; give the path that its keys stand under."""
        line = self._line()
        self.at += brackets
        *parents, last = self._key()
        self.at += brackets
        path: KeyPath = ()
        for name in parents:
            path = self._newest((*path, name))
            self.lines.setdefault(path, line)
        path = (*path, last)
        self.lines.setdefault(path, line)
        if is_array:
            index = self._lengths.get(path, 0)
            self._lengths[path] = index + 1
            path = (*path, index)
            self.lines[path] = line
        return path

    def _newest(self, path: KeyPath) -> KeyPath:
        """A name that is an array of tables means its last element."""
        return (*path, self._lengths[path] - 1) if path in self._lengths else path

    def _pair(self, table: KeyPath) -> None:
        """Walk `key = value`, recording the key, the tables it implies, and what the value holds."""
        line = self._line()
        path = table
        for name in self._key():
            path = (*path, name)
            self.lines.setdefault(path, line)
        self.at += 1  # the equals sign
        self._skip(_BLANK)
        self._value(path)

    def _value(self, path: KeyPath) -> None:
        opening = self.text[self.at]
        if opening == "[":
            self._array(path)
        elif opening == "{":
            self._inline_table(path)
        elif opening in "\"'":
            self._skip(_STRING)
        else:
            self._skip(_SCALAR)

    def _array(self, path: KeyPath) -> None:
        self.at += 1
        index = 0
        while self._more("]"):
            self.lines[(*path, index)] = self._line()
            self._value((*path, index))
            index += 1

    def _inline_table(self, path: KeyPath) -> None:
        self.at += 1
        while self._more("}"):
            self._pair(path)

    def _more(self, closing: str) -> bool:
        """Skip what stands between elements; False once past the closing bracket."""
        self._skip(_SPACE)
        while self.text[self.at] == ",":
            self.at += 1
            self._skip(_SPACE)
        if self.text[self.at] == closing:
            self.at += 1
            return False
        return True

    def _key(self) -> list[str]:
        """Walk `a."b c".d` up to what ends it; give the names."""
        names: list[str] = []
        while True:
            self._skip(_BLANK)
            match = _BARE.match(self.text, self.at) or _QUOTED.match(self.text, self.at)
            assert match is not None, "tomllib accepted this text"
            name = match[0]
            # tomllib itself undoes the escapes.
            names.append(tomllib.loads(f"k = {name}")["k"] if name[0] in "\"'" else name)
            self.at = match.end()
            self._skip(_BLANK)
            if self.text[self.at] != ".":
                return names
            self.at += 1

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self.text, self.at)
        assert match is not None, "tomllib accepted this text"
        self.at = match.end()

    def _line(self) -> int:
        """The line of the next character, counted from 1."""
        return bisect.bisect_left(self._newlines, self.at) + 1
