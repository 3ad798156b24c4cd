"""What one value of the configuration cannot show: keys that do not fit, texts of a certain form."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from typing import Any, Final

from pipeline.config_decode import Decoder
from pipeline.render import TemplateError, compile_template
from pipeline.settings import MAX_UNIT, Config, Source
from pipeline.toml_lines import KeyPath
from pipeline.units import Size

__all__ = ["address", "check"]

_MIN_RING_BYTES: Final = 16 * 1024 * 1024
_STORED_BYTES_PER_TOKEN: Final = 4
"""Id, mask and share of the other columns, before compression; an upper bound for 16-bit ids."""


MAX_VALUE_BYTES: Final = 26 + 4 * MAX_UNIT
"""A number with 17 digits, sign and exponent, and its unit."""
TABLES: Final = ("mqtt", "http", "opcua", "modbus", "journal")
MAX_TEMPLATE_BYTES: Final = 4_096
"""Of 1,900 short readings in one commit, 31 MiB of tokens: a block that large can be read back."""


def address(listen: str) -> tuple[str, int] | None:
    """Split "127.0.0.1:9464" or "[::1]:9464"; None for an empty text.

    Raises: ValueError unless it is a loopback address and a port from 1 to 65535.
    """
    if not listen:
        return None
    host, colon, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError('expected an address and a port, as in "127.0.0.1:9464"')
    if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
        raise ValueError("expected a loopback address")
    return host, int(port)


def check(config: Config, raw: dict[str, Any], decoder: Decoder, require_sources: bool) -> None:
    """Note what single values cannot show: keys that do not fit each other."""
    if require_sources and not config.sources and decoder.is_sound(("sources",)) and not raw.get("sources"):
        hint = 'begin with [[sources]], name = "inbox", kind = "files", path = "inbox/*.jsonl"'
        decoder.fault(("sources",), "no source: there is nothing to read", hint)
    _check_sources(config, raw, decoder)
    _check_redact(config, decoder)
    _check_sizes(config, decoder)
    _check_shards(config, decoder)
    _check_alone(config, decoder)
    for table, listen in (("health", config.health.listen), ("serve", config.serve.listen)):
        try:
            address(listen)
        except ValueError:
            hint = 'write it as in "127.0.0.1:9464"; a reverse proxy with a password may publish it'
            decoder.fault((table, "listen"), "expected a loopback address and a port", hint)


def _check_sources(config: Config, raw: dict[str, Any], decoder: Decoder) -> None:
    """Check names, and that each kind has what it needs.

    Walks the raw list, because only there the indices are those of the file.
    """
    for index, source in zip(decoder.kept.get(("sources",), ()), config.sources, strict=True):
        _check_render(source, ("sources", index, "render"), decoder)
        _check_table(source, ("sources", index), decoder)
        _check_format(source, ("sources", index), decoder)
        if source.burst and not source.rate and decoder.is_sound(("sources", index, "rate")):
            decoder.fault(("sources", index, "burst"), "has no effect without rate", "remove it, or set rate")
    names: dict[str, int] = {}
    stdin: int | None = None
    listed = raw.get("sources")
    for index, entry in enumerate(listed if isinstance(listed, list) else []):
        if not isinstance(entry, dict):
            continue
        at: KeyPath = ("sources", index)
        name, kind = entry.get("name"), entry.get("kind")
        if isinstance(name, str) and names.setdefault(name, index) != index:
            hint = "give each source a name of its own"
            decoder.fault((*at, "name"), f'"{name}" is also the name of sources[{names[name]}]', hint)
        if kind == "files" and not entry.get("path") and decoder.is_sound((*at, "path")):
            decoder.fault((*at, "path"), 'missing; kind "files" needs it', 'write it as in "inbox/*.jsonl"')
        if kind != "files" and entry.get("path"):
            decoder.fault((*at, "path"), f'kind "{kind}" has no path', 'remove it, or use kind = "files"')
        if kind == "stdin":
            if stdin is not None:
                decoder.fault((*at, "kind"), f"sources[{stdin}] already reads standard input", "remove one")
            stdin = index if stdin is None else stdin


def _check_table(source: Source, at: KeyPath, decoder: Decoder) -> None:
    """Check that a source has the table of its kind, nobody else's, and that this one fits together."""
    for kind in TABLES:
        table = getattr(source, kind)
        if table is not None and kind != source.kind:
            decoder.fault((*at, kind), f'has no effect for kind "{source.kind}"', "remove it, or change kind")
        elif kind == source.kind and table is None and decoder.is_sound((*at, kind)):
            decoder.fault(
                (*at, kind), f'missing; kind "{kind}" needs it', f"add [sources.{kind}] below the source"
            )
        elif table is not None and decoder.is_sound((*at, kind)):
            for key, message, hint in table.faults():
                decoder.fault((*at, kind, key), message, hint)


def _check_format(source: Source, at: KeyPath, decoder: Decoder) -> None:
    """Check that a source has no settings of another format, and that those of its own fit together."""
    if source.kind != "files" and source.format != "jsonl" and decoder.is_sound((*at, "format")):
        decoder.fault((*at, "format"), f'kind "{source.kind}" has no format', "remove it")
    for key, form, table in (("csv", "csv", source.csv), ("pattern", "lines", source.pattern)):
        if table is None or not decoder.is_sound((*at, key)):
            continue
        if source.format != form:
            message = f'has no effect for format "{source.format}"'
            decoder.fault((*at, key), message, f'remove it, or set format = "{form}"')
        for name, message, hint in table.faults():
            if decoder.is_sound((*at, key, name)):
                decoder.fault((*at, key, name), message, hint)


def _check_render(source: Source, at: KeyPath, decoder: Decoder) -> None:
    """Check that a template is one, and does not stand beside the list that it replaces."""
    template = source.render.template
    if template and source.render.on_change and decoder.is_sound((*at, "on_change")):
        hint = "remove the template, or on_change"
        decoder.fault((*at, "on_change"), "has no effect beside a template, which writes all its tags", hint)
    if not template or not decoder.is_sound(at):
        return
    if source.render.tags:
        decoder.fault((*at, "tags"), "has no effect beside a template", "remove one of the two")
    try:
        places = compile_template(template)
    except TemplateError as error:
        decoder.fault((*at, "template"), "not a template", str(error))
        return
    tags = [tag for _, tag in places if tag]
    # A value that is written once has cost its place in the reading; text and repeats come from nothing.
    written = sum(len(literal.encode()) for literal, _ in places)
    written += len(tags) + MAX_VALUE_BYTES * (len(tags) - len(set(tags)))
    if written > MAX_TEMPLATE_BYTES:
        hint = "write less around the values: what is the same in each reading teaches nothing"
        message = f"adds up to {written} bytes to each reading; at most {MAX_TEMPLATE_BYTES} are taken"
        decoder.fault((*at, "template"), message, hint)
    if not any(tag for _, tag in places):
        decoder.fault((*at, "template"), "holds no {tag}: every reading would be the same text", "name a tag")


def _check_redact(config: Config, decoder: Decoder) -> None:
    """Check that each rule is a preset or a pattern, and that a pattern compiles."""
    for index, rule in zip(decoder.kept.get(("redact",), ()), config.redact, strict=True):
        at: KeyPath = ("redact", index)
        if any(key[:2] == at for key in decoder.faulty):
            continue
        if bool(rule.preset) == bool(rule.pattern):
            decoder.fault(at, "expected either preset or pattern", 'as in preset = "email"')
            continue
        try:
            rule.compiled()
        except (re.error, RecursionError, OverflowError) as error:
            hint = "write it in single quotes, in the syntax of Python's re module"
            decoder.fault((*at, "pattern"), f"not a regular expression: {error}", hint)


def _check_sizes(config: Config, decoder: Decoder) -> None:
    """Check what must be large enough for something else."""
    trigger, update = config.trigger, config.update
    # A quarter is kept free; the waiting windows and the open one should not be evicted before their turn.
    waiting = (trigger.max_due + 1) * trigger.min_tokens * _STORED_BYTES_PER_TOKEN * 4 // 3
    needed = Size(-(-max(_MIN_RING_BYTES, waiting) // 2**20) * 2**20)
    keys: list[KeyPath] = [("ring", "max_bytes"), ("trigger", "max_due"), ("trigger", "min_tokens")]
    if decoder.is_sound(*keys) and config.ring.max_bytes < needed:
        message = f"too small for {trigger.max_due} waiting windows of {trigger.min_tokens} tokens"
        decoder.fault(keys[0], message, f'at least "{needed}"')
    row: KeyPath = ("update", "row_tokens")
    for key, tokens in ((keys[2], trigger.min_tokens), (("update", "max_tokens"), update.max_tokens)):
        if decoder.is_sound(key, row) and tokens < update.row_tokens:
            decoder.fault(key, "less than one row", f"at least update.row_tokens, {update.row_tokens}")


def _check_shards(config: Config, decoder: Decoder) -> None:
    """Check that the ingest processes that are named exist, and that each finds a port."""
    processes = config.ingest.processes
    if not decoder.is_sound(("ingest", "processes")):
        return
    for index, source in zip(decoder.kept.get(("sources",), ()), config.sources, strict=True):
        if source.shard > processes and decoder.is_sound(("sources", index, "shard")):
            message = f"there is no ingest process {source.shard}"
            decoder.fault(("sources", index, "shard"), message, f"at most ingest.processes, {processes}")
    with contextlib.suppress(ValueError):
        found = address(config.health.listen)
        if found and found[1] + processes - 1 > 65535:
            message = f"leaves no port for each of {processes} ingest processes"
            decoder.fault(("health", "listen"), message, f"at most port {65536 - processes}")


def _check_alone(config: Config, decoder: Decoder) -> None:
    """Check that no two sources want what only one can have: an address, a session at a broker."""
    owners = {("http", "listen", config.health.listen): "health.listen"}
    for index, source in zip(decoder.kept.get(("sources",), ()), config.sources, strict=True):
        wanted = None
        if source.http is not None:
            wanted = ("http", "listen", source.http.listen)
        elif source.mqtt is not None and source.mqtt.client_id:
            wanted = ("mqtt", "client_id", f"{source.mqtt.url} {source.mqtt.client_id}")
        if wanted is None:
            continue
        kind, key, _ = wanted
        owner = owners.setdefault(wanted, f"sources[{index}].{kind}.{key}")
        at: KeyPath = ("sources", index, kind, key)
        if owner != f"sources[{index}].{kind}.{key}" and decoder.is_sound(at):
            decoder.fault(at, f"is that of {owner} as well", "give each its own")
