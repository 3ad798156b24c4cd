"""From TOML's plain values to settings, collecting every fault on the way instead of stopping at the first.

msgspec's own conversion ends at its first error and knows no lines, so the walk over tables is ours; each
single value is still judged by msgspec, by the field's type and limits.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union

import msgspec

from pipeline.toml_lines import KeyPath, dotted
from pipeline.units import Duration, Size

__all__ = ["Decoder", "Fault", "Secret", "default_of", "describe", "fields_of"]

_REFERENCE: Final = re.compile(r"\$(\$?)\{([^}]*)\}")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_CREDENTIAL: Final = re.compile(r"[A-Za-z0-9_.@-]{1,255}", re.ASCII)
_SECRET_NAME: Final = re.compile(r"PASS|SECRET|TOKEN|KEY|CRED|PRIVATE|AUTH", re.IGNORECASE)
_MAX_REFERENCED_BYTES: Final = 64 * 1024


class Fault(msgspec.Struct, frozen=True):
    """One thing wrong with the configuration, and what to do about it."""

    path: str
    """The file, or "--set"."""
    line: int | None
    """Line in the file, from 1; None where there is none."""
    dotted: str
    """The key, as in "sources[0].path"; empty when the whole file is meant."""
    message: str
    suggestion: str = ""

    def __str__(self) -> str:
        """Give the line that a terminal shows; editors jump to what precedes the first blank."""
        place = self.path if self.line is None else f"{self.path}:{self.line}"
        key = f"{self.dotted}: " if self.dotted else ""
        return f"{place}: {key}{self.message}" + (f" ({self.suggestion})" if self.suggestion else "")


class Secret(str):
    """A text with a credential, a file or a secret-sounding variable in it; shown only as its reference."""

    __slots__ = ("shown",)
    shown: str

    def __new__(cls, value: str, shown: str) -> Secret:
        """Hold `value`; print as `shown`, which is what the configuration says, as in "${cred:broker}"."""
        made = super().__new__(cls, value)
        made.shown = shown
        return made

    def __repr__(self) -> str:
        """Keep the value out of tracebacks and logs."""
        return f"Secret({self.shown!r})"


class _ReferenceError(ValueError):
    """A ${...} that cannot be resolved."""

    def __init__(self, message: str, suggestion: str) -> None:
        super().__init__(message)
        self.suggestion = suggestion


class Decoder:
    """Decodes one document; `faults` fills up while it does.

    Args:
        path: The file as the user named it, for messages.
        folder: Where relative paths start.
        lines: Line of each key of the file.
        overridden: Keys that came from --set and so have no line.
    """

    def __init__(
        self, path: str, folder: Path, lines: dict[KeyPath, int], overridden: dict[KeyPath, str]
    ) -> None:
        self.path = path
        self.folder = folder
        self.lines = lines
        self.overridden = overridden
        self.faults: list[Fault] = []
        self.faulty: set[KeyPath] = set()
        self.kept: dict[KeyPath, list[int]] = {}  # for each array, the elements that decoded

    def fault(self, key: KeyPath, message: str, suggestion: str = "") -> None:
        """Note a fault of a key."""
        self.faulty.add(key)
        for overridden in self.overridden:
            below = key[: len(overridden)] == overridden
            # --set a.b=1 where `a` is no table: the file does not mention `a` at all.
            if below or (overridden[: len(key)] == key and key not in self.lines):
                self.faults.append(Fault("--set", None, dotted(key), message, suggestion))
                return
        line = next((self.lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.lines), None)
        self.faults.append(Fault(self.path, line, dotted(key), message, suggestion))

    def is_sound(self, *keys: KeyPath) -> bool:
        """Tell whether neither the keys nor what they stand in were faulted, so that they can be compared."""
        return not any(key[:n] in self.faulty for key in keys for n in range(len(key) + 1))

    def table(self, kind: type[msgspec.Struct], raw: object, at: KeyPath, root: type[msgspec.Struct]) -> Any:
        """Decode a table into a Struct; a faulty key has its default in the result.

        Returns: The Struct, or None when a required key is missing or faulty.
        """
        if not isinstance(raw, dict):
            self.fault(at, f"expected a table, got {_show(raw)}")
            return None
        fields = fields_of(kind)
        for name in raw:
            if name not in fields:
                self.fault((*at, name), "unknown key", _near(name, at, list(fields), root))
        values: dict[str, Any] = {}
        complete = True
        for name, field in fields.items():
            value = msgspec.UNSET
            if name in raw:
                value = self.value(field.type, raw[name], (*at, name), root)
            elif field.required:
                self.fault((*at, name), f"missing; expected {describe(field.type)}")
            if value is not msgspec.UNSET:
                values[name] = value
            elif field.required:
                complete = False
        return kind(**values) if complete else None

    def value(self, kind: Any, raw: object, at: KeyPath, root: type[msgspec.Struct]) -> Any:
        """Decode one value of any type that a setting may have; UNSET after a fault."""
        origin = typing.get_origin(kind)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            made = self.table(kind, raw, at, root)
            return msgspec.UNSET if made is None else made
        if origin is tuple:
            return self._array(typing.get_args(kind)[0], raw, at, root)
        if origin is dict:
            return self._map(typing.get_args(kind)[1], raw, at, root)
        if origin in (Union, types.UnionType):
            options = [option for option in typing.get_args(kind) if option is not type(None)]
            # A table can only be meant as the option that is one.
            tables = [option for option in options if typing.get_origin(option) is dict]
            others = [option for option in options if typing.get_origin(option) is not dict]
            return self.value(tables[0] if tables and isinstance(raw, dict) else others[0], raw, at, root)
        return self._scalar(kind, raw, at)

    def _array(self, kind: Any, raw: object, at: KeyPath, root: type[msgspec.Struct]) -> Any:
        if not isinstance(raw, list):
            table = isinstance(kind, type) and issubclass(kind, msgspec.Struct)
            hint = f"write [[{dotted(at)}]], in double brackets" if table and isinstance(raw, dict) else ""
            self.fault(at, f"expected a list, got {_show(raw)}", hint)
            return msgspec.UNSET
        decoded = [self.value(kind, element, (*at, index), root) for index, element in enumerate(raw)]
        self.kept[at] = [index for index, element in enumerate(decoded) if element is not msgspec.UNSET]
        return tuple(decoded[index] for index in self.kept[at])

    def _map(self, kind: Any, raw: object, at: KeyPath, root: type[msgspec.Struct]) -> Any:
        if not isinstance(raw, dict):
            self.fault(at, f"expected a table, got {_show(raw)}")
            return msgspec.UNSET
        decoded = {name: self.value(kind, element, (*at, name), root) for name, element in raw.items()}
        return {name: element for name, element in decoded.items() if element is not msgspec.UNSET}

    def _scalar(self, kind: Any, raw: object, at: KeyPath) -> Any:
        value = raw
        try:
            if isinstance(raw, str):
                value = self._resolve(raw)
            if kind is Path:
                return self.folder / _text(value)
            if kind is Duration:
                return Duration.parse(_text(value))
            if kind is Size:
                return Size.parse(_text(value))
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError("not finite")
            msgspec.convert(str(value) if isinstance(value, Secret) else value, kind)
            return float(value) if _bare(kind) is float and isinstance(value, int) else value
        except _ReferenceError as error:
            self.fault(at, str(error), error.suggestion)
        except (msgspec.ValidationError, ValueError, TypeError):
            # Never the message of the error: it may quote a secret.
            self.fault(at, f"expected {describe(kind)}, got {_show(value)}", _choice(kind, value))
        return msgspec.UNSET

    def _resolve(self, text: str) -> str:
        """Put in what ${...} refers to; a text with a secret in it becomes a Secret."""
        secret = False

        def put(match: re.Match[str]) -> str:
            nonlocal secret
            if match[1]:
                return match[0][1:]  # $${ is a plain ${
            value, is_secret = self._refer(match[2])
            secret = secret or is_secret
            return value

        resolved = _REFERENCE.sub(put, text)
        return Secret(resolved, text) if secret else resolved

    def _refer(self, reference: str) -> tuple[str, bool]:
        """Look up one reference; the flag tells whether its value is a secret."""
        scheme, colon, name = reference.partition(":")
        if colon and scheme == "file":
            return _read_reference(reference, self.folder / name), True
        if colon and scheme == "cred" and _CREDENTIAL.fullmatch(name) and name not in (".", ".."):
            folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
            if not folder:
                hint = (
                    "systemd sets it for LoadCredential=; elsewhere name a folder with one file a credential"
                )
                raise _ReferenceError(f"${{{reference}}}: $CREDENTIALS_DIRECTORY is not set", hint)
            return _read_reference(reference, Path(folder) / name), True
        if not colon and _VARIABLE.fullmatch(reference):
            if reference not in os.environ:
                raise _ReferenceError(
                    f"${{{reference}}}: no such environment variable", "set it, or write $${ for a plain ${"
                )
            return os.environ[reference], bool(_SECRET_NAME.search(reference))
        hint = "write ${NAME} for the environment, ${file:PATH}, ${cred:NAME}, or $${ for a plain ${"
        raise _ReferenceError(f"${{{reference}}}: unknown reference", hint)


@functools.cache
def fields_of(kind: type[msgspec.Struct]) -> dict[str, msgspec.structs.FieldInfo]:
    """Give a Struct's fields by name, with types resolved and limits kept."""
    return {field.name: field for field in msgspec.structs.fields(kind)}


def default_of(field: msgspec.structs.FieldInfo) -> Any:
    """Give the default of a field that is not required."""
    return field.default if field.default is not msgspec.NODEFAULT else field.default_factory()


def describe(kind: Any) -> str:
    """Say in words what a type accepts, with its limits: "a whole number from 1 to 256"."""
    origin = typing.get_origin(kind)
    if origin is Annotated:
        bare, *metas = typing.get_args(kind)
        titles = [meta.title for meta in metas if isinstance(meta, msgspec.Meta) and meta.title]
        return (
            titles[0]
            if titles
            else describe(bare) + "".join(_limits(meta) for meta in metas if isinstance(meta, msgspec.Meta))
        )
    if origin is Literal:
        return _either([f'"{choice}"' for choice in typing.get_args(kind)])
    if origin in (Union, types.UnionType):
        return _either([describe(option) for option in typing.get_args(kind) if option is not type(None)])
    if origin is tuple:
        return f"a list, each {describe(typing.get_args(kind)[0])}"
    if origin is dict:
        return f"a table, each value {describe(typing.get_args(kind)[1])}"
    words: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text in quotes",
        Path: "a path in quotes",
        Duration: 'a duration in quotes with its unit, as in "10s" or "1h30m"',
        Size: 'a size in quotes with its unit, as in "256MiB"',
    }
    return words.get(kind, "a table")


def _limits(meta: msgspec.Meta) -> str:
    if meta.min_length is not None:
        return ", not empty"
    low = f"from {meta.ge}" if meta.ge is not None else f"above {meta.gt}" if meta.gt is not None else ""
    high = f"to {meta.le}" if meta.le is not None else f"below {meta.lt}" if meta.lt is not None else ""
    return "".join(f" {word}" for word in (low, high) if word)


def _either(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def _show(value: object) -> str:
    """Write a wrong value in a message: short, as TOML would, and never a secret."""
    if isinstance(value, Secret):
        return value.shown
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise TypeError("not a text")
    return value


def _bare(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def _choice(kind: Any, value: object) -> str:
    """Suggest the closest of a fixed set of words."""
    if typing.get_origin(kind) is not Literal or not isinstance(value, str) or isinstance(value, Secret):
        return ""
    close = difflib.get_close_matches(value, [str(choice) for choice in typing.get_args(kind)], n=1)
    return f'did you mean "{close[0]}"?' if close else ""


def _near(name: str, at: KeyPath, here: list[str], root: type[msgspec.Struct]) -> str:
    """Suggest the key that was meant: a similar one in this table, else the same word in another."""
    elsewhere = {
        (table, key)
        for table, field in fields_of(root).items()
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct)
        for key in fields_of(field.type)
    }
    moved = [f"{table}.{key}" for table, key in sorted(elsewhere) if key == name]
    top = [key for key in fields_of(root) if at and key == name]
    if moved or top:
        return f'did you mean "{(top + moved)[0]}"? it stands in another table'
    close = difflib.get_close_matches(name, here, n=1)
    if close:
        return f'did you mean "{close[0]}"?'
    return f"known here: {', '.join(here)}"


def _read_reference(reference: str, path: Path) -> str:
    """Read the file of a ${file:...} or ${cred:...}; a final newline is not part of the value."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_REFERENCED_BYTES + 1)
        if len(content) > _MAX_REFERENCED_BYTES:
            raise _ReferenceError(f"${{{reference}}}: the file is larger than 64 KiB", "name the right file")
        return content.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except OSError as error:
        hint = "make it, or correct the reference"
        raise _ReferenceError(f"${{{reference}}}: cannot read {path}: {error.strerror}", hint) from None
    except UnicodeDecodeError:
        raise _ReferenceError(f"${{{reference}}}: {path} is not UTF-8 text", "name the right file") from None
