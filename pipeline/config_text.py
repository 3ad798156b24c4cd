"""The configuration as text: what is in effect, its JSON Schema, and the commented example."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import textwrap
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union

import msgspec

from pipeline.config_decode import Secret, default_of, fields_of
from pipeline.settings import Config, Redact, Source
from pipeline.units import Duration, Size

__all__ = ["example", "plain", "schema", "show"]

_SHELL_WIDTH: Final = 100

_HEAD: Final = """\
Edgewater's configuration. A line that begins with "#" and a key shows the key's default: take the "#" away to
change it. `edgewater config check` finds every mistake at once, `edgewater config show` prints what is in
effect, `--set key=value` overrides a key on the command line.

Durations and sizes carry their unit ("10s", "256MiB"). "${NAME}" is an environment variable, "${file:PATH}"
the content of a file, "${cred:NAME}" a systemd credential; "$${" is a plain "${".
"""

_SOURCES: Final = """\
[[sources]]
name = "inbox"
kind = "files"
path = {path}
# Where a sensor repeats itself within its noise:
#deadband = {{ pressure = 0.05, flow = 2.0 }}
#max_silence = "1h"
#render = {{ tags = ["pressure", "flow"], units = {{ pressure = "bar" }}, digits = 3 }}
"""

_REDACT: Final = """\
#[[redact]]
#preset = "email"

#[[redact]]
#pattern = 'badge \\d{6}'
#replacement = "badge #"
"""


def show(config: Config, as_json: bool = False) -> str:
    """Write the configuration that is in effect, defaults filled in, secrets as their references.

    Args:
        config: What `load` gave.
        as_json: JSON for programs; otherwise TOML that loads to the same configuration.
    """
    values = plain(config)
    if as_json:
        return json.dumps(values, indent=2, ensure_ascii=False)
    lines: list[str] = [f"{key} = {_toml(value)}" for key, value in values.items() if _is_leaf(value)]
    for name, value in values.items():
        for table in value if _is_tables(value) else [value] if isinstance(value, dict) else []:
            lines += ["", f"[[{name}]]" if _is_tables(value) else f"[{name}]"]
            lines += [f"{key} = {_toml(entry)}" for key, entry in table.items()]
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """Reduce settings to what JSON and TOML can hold; keys that are unset are left out, secrets masked."""
    if isinstance(value, msgspec.Struct):
        named = {name: getattr(value, name) for name in fields_of(type(value))}
        return {name: plain(entry) for name, entry in named.items() if entry is not None}
    if isinstance(value, tuple):
        return [plain(element) for element in value]
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, Secret):
        return value.shown
    # What was resolved stays resolved when the text is loaded again.
    if isinstance(value, (str, Path)):
        return str(value).replace("${", "$${")
    return str(value) if isinstance(value, (Duration, Size)) else value


def schema() -> dict[str, Any]:
    """Make the JSON Schema of edgewater.toml, with the description and default of each key, for editors."""
    made = _schema_of(Config)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "edgewater.toml", **made}


def example(data_dir: str = "/var/lib/edgewater", source_path: str = "/var/spool/edgewater/*.jsonl") -> str:
    """Write the commented example: every key with what it does and its default, and one source.

    Args:
        data_dir: Value of the key data_dir.
        source_path: What the one source reads.
    Returns: TOML that `load` accepts as it is.
    """
    parts = [_comment(_HEAD)]
    for name, field in fields_of(Config).items():
        if name == "sources":
            parts.append(_records(Source) + _SOURCES.format(path=_toml(source_path)))
        elif name == "redact":
            parts.append(_records(Redact) + _REDACT)
        elif name == "data_dir":
            parts.append(_comment(_field_docs(Config)[name]) + f"data_dir = {_toml(data_dir)}\n")
        else:
            parts.append(_section(name, field.type))
    return "\n".join(parts)


def _section(name: str, kind: type[msgspec.Struct]) -> str:
    """Write one table of the example, each key commented out with its default."""
    text = _comment(_class_doc(kind)) + f"[{name}]\n"
    for key, field in fields_of(kind).items():
        text += _comment(_field_docs(kind)[key]) + f"#{key} = {_toml(plain(default_of(field)))}\n"
    return text


def _records(kind: type[msgspec.Struct]) -> str:
    """Describe the keys of an array of tables, with defaults where they are plain values."""
    text = _comment(_class_doc(kind)) + "#\n"
    for key, field in fields_of(kind).items():
        default = "" if field.required else plain(default_of(field))
        shown = (
            f" [{_toml(default)}]" if not field.required and _is_leaf(default) and default is not None else ""
        )
        text += textwrap.indent(_wrap(f"{key}{shown}: {_field_docs(kind)[key]}", "   "), "#   ")
        nested = _table_of(field.type)
        for inner, inner_field in fields_of(nested).items() if nested else ():
            shown = "" if inner_field.required else f" [{_toml(plain(default_of(inner_field)))}]"
            line = f"{inner}{shown}: {_field_docs(nested)[inner]}"
            text += textwrap.indent(_wrap(line, "   "), "#      ")
    return text


def _table_of(kind: Any) -> type[msgspec.Struct] | None:
    """The Struct that a field of a record takes, also where it may be left out."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)
    tables = (option for option in options if isinstance(option, type) and issubclass(option, msgspec.Struct))
    return next(tables, None)


def _schema_of(kind: Any) -> dict[str, Any]:
    """Make the schema of one type."""
    origin = typing.get_origin(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return _schema_of_table(kind)
    if origin is Annotated:
        bare, *metas = typing.get_args(kind)
        return _schema_of(bare) | _schema_limits([meta for meta in metas if isinstance(meta, msgspec.Meta)])
    if origin is Literal:
        return {"enum": list(typing.get_args(kind))}
    if origin is tuple:
        return {"type": "array", "items": _schema_of(typing.get_args(kind)[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(typing.get_args(kind)[1])}
    if origin in (Union, types.UnionType):
        options = [_schema_of(option) for option in typing.get_args(kind) if option is not type(None)]
        return options[0] if len(options) == 1 else {"anyOf": options}
    simple: dict[Any, dict[str, Any]] = {
        bool: {"type": "boolean"},
        int: {"type": "integer"},
        float: {"type": "number"},
        Duration: {"type": "string", "examples": ["10s", "1h30m"]},
        Size: {"type": "string", "examples": ["256MiB"]},
    }
    return dict(simple.get(kind, {"type": "string"}))


def _schema_of_table(kind: type[msgspec.Struct]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for name, field in fields_of(kind).items():
        entry = _schema_of(field.type)
        if name in _field_docs(kind):
            entry["description"] = " ".join(_field_docs(kind)[name].split())
        if not field.required and _is_leaf(plain(default_of(field))) and default_of(field) is not None:
            entry["default"] = plain(default_of(field))
        properties[name] = entry
    required = [name for name, field in fields_of(kind).items() if field.required]
    table = {
        "type": "object",
        "description": " ".join(_class_doc(kind).split()),
        "properties": properties,
        "additionalProperties": False,
    }
    return table | ({"required": required} if required else {})


def _schema_limits(metas: list[msgspec.Meta]) -> dict[str, Any]:
    names = {
        "ge": "minimum",
        "gt": "exclusiveMinimum",
        "le": "maximum",
        "lt": "exclusiveMaximum",
        "pattern": "pattern",
        "min_length": "minLength",
    }
    found = ((word, getattr(meta, limit)) for meta in metas for limit, word in names.items())
    return {word: value for word, value in found if value is not None}


@functools.cache
def _field_docs(kind: type[msgspec.Struct]) -> dict[str, str]:
    """Read the texts that stand below the fields of a Struct, from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            docs[field.target.id] = inspect.cleandoc(str(text.value.value))
    return docs


def _class_doc(kind: type[msgspec.Struct]) -> str:
    return inspect.cleandoc(kind.__doc__ or "")


def _comment(text: str) -> str:
    paragraphs = [_wrap(paragraph, "") or "\n" for paragraph in inspect.cleandoc(text).split("\n\n")]
    return textwrap.indent("\n".join(paragraphs), "# ", lambda _: True).replace("# \n", "#\n")


def _wrap(text: str, indent: str) -> str:
    wrapped = textwrap.fill(
        " ".join(text.split()),
        _SHELL_WIDTH,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return wrapped + "\n"


def _is_leaf(value: object) -> bool:
    return not isinstance(value, dict) and not _is_tables(value)


def _is_tables(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(element, dict) for element in value)


def _toml(value: Any) -> str:
    """Write a plain value as TOML, tables inline."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml_key(key)} = {_toml(entry)}" for key, entry in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(element) for element in value) + "]"
    # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
    return (
        json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        if isinstance(value, str)
        else repr(value)
    )


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)
