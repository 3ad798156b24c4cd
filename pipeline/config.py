"""The configuration: `edgewater.toml` and --set in, one frozen `Config` or all faults at once out.

The settings themselves are in settings.py, one Struct a table. Consumers take what they need from a Config as
plain arguments; nothing keeps it.
"""

from __future__ import annotations

import hashlib
import os
import re
import tomllib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from pipeline.config_check import address, check
from pipeline.config_decode import Decoder, Fault, Secret
from pipeline.settings import (
    ECO_FLUSH_MS,
    EMBEDDED_MODEL,
    NAME_PATTERN,
    REDACT_PRESETS,
    Config,
    Dedup,
    DedupSettings,
    GateSettings,
    GatewaySettings,
    HealthSettings,
    IngestSettings,
    ModelSettings,
    Redact,
    Render,
    RingSettings,
    ServeSettings,
    Source,
    TriggerSettings,
    UpdateSettings,
)
from pipeline.toml_lines import KeyPath, key_lines
from pipeline.units import Duration, Size

if typing.TYPE_CHECKING:
    from adapters.recipe import GateLimits, Recipe

__all__ = [
    "EMBEDDED_MODEL",
    "NAME_PATTERN",
    "REDACT_PRESETS",
    "Config",
    "ConfigError",
    "Dedup",
    "DedupSettings",
    "Duration",
    "Fault",
    "GateSettings",
    "GatewaySettings",
    "HealthSettings",
    "IngestSettings",
    "ModelSettings",
    "Redact",
    "Render",
    "RingSettings",
    "Secret",
    "ServeSettings",
    "Size",
    "Source",
    "TriggerSettings",
    "UpdateSettings",
    "address",
    "digest",
    "example",
    "find",
    "gate_limits",
    "load",
    "recipe",
    "schema",
    "show",
    "source_defaults",
]

_MAX_FILE_BYTES: Final = 1024 * 1024
_INDEXED: Final = re.compile(r"([A-Za-z0-9_-]+)((?:\[\d+\])*)")
_TOML_PLACE: Final = re.compile(r"^(.*) \(at (?:line (\d+), column \d+|end of document)\)$", re.DOTALL)


class ConfigError(Exception):
    """Everything that is wrong with a configuration; its text is ready for a terminal."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = list(faults)
        super().__init__("\n".join(str(fault) for fault in faults))


def find() -> Path | None:
    """Look for a configuration where none is named: $EDGEWATER_CONFIG, ./edgewater.toml, /etc/edgewater."""
    named = os.environ.get("EDGEWATER_CONFIG")
    if named:
        return Path(named)
    places = (Path("edgewater.toml"), Path("/etc/edgewater/edgewater.toml"))
    return next((place for place in places if place.exists()), None)


def load(path: Path | None, overrides: Sequence[str] = (), *, require_sources: bool = True) -> Config:
    """Read, check and resolve a configuration.

    Args:
        path: The TOML file; None starts from the defaults alone.
        overrides: "key=value" texts of --set, each by the same rules as the file; the value is TOML, or a
            text where it is none; sources are named by index or name, as in "sources.pump-1.dedup=none".
        require_sources: Whether a configuration without a source is a fault; verbs that do not ingest need
            none.
    Returns: The configuration with absolute paths and resolved references.
    Raises: ConfigError with all faults found.
    """
    text = _read(path) if path is not None else ""
    raw = _parse(text, path)
    folder = (path.parent if path is not None else Path()).absolute()
    overridden: dict[KeyPath, str] = {}
    bad_overrides = [fault for entry in overrides for fault in _override(raw, entry, overridden)]
    decoder = Decoder(str(path or "defaults"), folder, key_lines(text), overridden)
    decoder.faults += bad_overrides
    config = decoder.table(Config, raw, (), Config)
    assert config is not None, "no key of the top level is required"
    config = _profiled(_absolute(config, folder), raw)
    check(config, raw, decoder, require_sources)
    if decoder.faults:
        raise ConfigError(sorted(decoder.faults, key=lambda fault: (fault.line is None, fault.line or 0)))
    return config


def show(config: Config, as_json: bool = False) -> str:
    """Write the configuration in effect, secrets masked; TOML that loads again, or JSON."""
    from pipeline import config_text

    return config_text.show(config, as_json)


def schema() -> dict[str, Any]:
    """Make the JSON Schema of edgewater.toml, with descriptions, for editors."""
    from pipeline import config_text

    return config_text.schema()


def example(data_dir: str = "/var/lib/edgewater", source_path: str = "/var/spool/edgewater/*.jsonl") -> str:
    """Write the commented example configuration; the same text as deploy/edgewater.toml by default."""
    from pipeline import config_text

    return config_text.example(data_dir, source_path)


def digest(config: Config) -> str:
    """Hash what is in effect, secrets masked: SHA-256 in hex, for capture headers and manifests."""
    return hashlib.sha256(show(config, as_json=True).encode()).hexdigest()


def source_defaults(name: str, event_kind: str) -> Source:
    """Give the settings of a source that the configuration does not name.

    Args:
        name: Name of the source, as its events carry it.
        event_kind: "reading", "text", "exchange" or "feedback".
    Returns: Settings with `dedup` filled in: content for texts and exchanges, delivery for the rest; readings
        are written as name=value with 3 significant digits.
    """
    return Source(name=name, kind="stdin", dedup=_default_dedup(event_kind))


def recipe(config: Config) -> Recipe:
    """Map the [update] table onto the recipe that the trainer's child takes."""
    from adapters.recipe import Recipe

    update = config.update
    return Recipe(
        profile=update.profile,
        rank=update.rank,
        alpha=update.alpha or 2 * update.rank,
        learning_rate=update.learning_rate,
        max_steps=update.max_steps,
        max_tokens=update.max_tokens,
        row_tokens=update.row_tokens,
        step_tokens=max(Recipe().step_tokens, update.row_tokens),
    )


def gate_limits(config: Config) -> GateLimits:
    """Map the [gate] table onto the limits that the trainer's child takes."""
    from adapters.recipe import GateLimits

    gate = config.gate
    return GateLimits(
        min_gain=gate.min_gain,
        max_anchor_delta_bits=gate.max_anchor_delta_bits,
        max_retention_loss=gate.max_retention_loss,
        max_recited=gate.max_recited,
    )


def _default_dedup(event_kind: str) -> Dedup:
    return "content" if event_kind in ("text", "exchange") else "delivery"


def _read(path: Path) -> str:
    """Read the file.

    Raises: ConfigError with one fault if that cannot be done.
    """

    def fail(message: str, suggestion: str) -> ConfigError:
        return ConfigError([Fault(str(path), None, "", message, suggestion)])

    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise fail("no such file", "write one with `edgewater init`, or name another with --config") from None
    except OSError as error:
        raise fail(f"cannot be read: {error.strerror}", "check its permissions and name") from None
    if len(content) > _MAX_FILE_BYTES:
        raise fail("larger than 1 MiB", "name the right file")
    try:
        # TOML knows both line ends; positions are counted in one.
        return content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError([Fault(str(path), line, "", "not UTF-8 text", "save the file as UTF-8")]) from None


def _parse(text: str, path: Path | None) -> dict[str, Any]:
    """Read TOML.

    Raises: ConfigError with the one fault that tomllib stops at.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = _TOML_PLACE.match(str(error))
        message, line = (match[1], match[2]) if match else (str(error), None)
        at = int(line) if line else text.count("\n") + 1
        raise ConfigError([Fault(str(path), at, "", f"not TOML: {message}", _toml_hint(text, at))]) from None


def _toml_hint(text: str, line: int) -> str:
    """Name the usual slip: a value without its quotes."""
    found = text.splitlines()[line - 1 : line]
    _, equals, value = found[0].partition("=") if found else ("", "", "")
    if equals and re.match(r"\s*[^\s\"'\[{\d+#-]", value):
        return f'put text in quotes: "{value.strip()}"'
    return "see the commented example that `edgewater init` writes"


def _override(raw: dict[str, Any], entry: str, overridden: dict[KeyPath, str]) -> Iterator[Fault]:
    """Put one "key=value" into the raw document, and yield what is wrong with the key."""
    key, equals, text = entry.partition("=")
    parts = _override_path(raw, key.strip())
    if not equals or parts is None:
        message = f"{entry!r} is not key=value" if not equals else f"{key.strip()!r} is not a key"
        yield Fault("--set", None, "", message, "write it as in --set trigger.min_samples=200")
        return
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        value = text.strip()
    at: Any = raw
    for part in parts[:-1]:
        at = at[part] if isinstance(part, int) else at.setdefault(part, {})
        if not isinstance(at, (dict, list)):
            yield Fault("--set", None, key.strip(), "the configuration has a plain value above this key")
            return
    at[parts[-1]] = value
    overridden[parts] = text


def _override_path(raw: dict[str, Any], key: str) -> KeyPath | None:
    """Turn "sources[0].dedup" or "sources.pump-1.dedup" into a path; None if it leads nowhere."""
    indexed = _by_name(raw, key)
    parts: list[str | int] = []
    for part in indexed.split("."):
        match = _INDEXED.fullmatch(part)
        if match is None:
            return None
        parts.append(match[1])
        parts += [int(number) for number in re.findall(r"\d+", match[2])]
    at: Any = raw
    for step in parts:
        if isinstance(at, list) != isinstance(step, int) or (isinstance(step, int) and step >= len(at)):
            # Lists are not lengthened: a source has more than one key, so it belongs into the file.
            return None
        at = at[step] if isinstance(step, int) else at.get(step, {}) if isinstance(at, dict) else {}
    return tuple(parts)


def _by_name(raw: dict[str, Any], key: str) -> str:
    """Write a source's index for its name, which may hold dots itself."""
    sources = raw.get("sources")
    for index, source in enumerate(sources if isinstance(sources, list) else []):
        prefix = f"sources.{source.get('name')}." if isinstance(source, dict) else ""
        if prefix and key.startswith(prefix):
            return f"sources[{index}].{key.removeprefix(prefix)}"
    return key


def _profiled(config: Config, raw: dict[str, Any]) -> Config:
    """Put in the defaults that a profile has of its own; what the file or --set says wins."""
    if config.ring.profile == "eco" and "flush_ms" not in raw["ring"]:
        config = msgspec.structs.replace(
            config, ring=msgspec.structs.replace(config.ring, flush_ms=ECO_FLUSH_MS)
        )
    return config


def _absolute(config: Config, folder: Path) -> Config:
    """Resolve the paths that are texts against the folder of the file."""
    model = config.model
    if model.path != EMBEDDED_MODEL:
        model = msgspec.structs.replace(model, path=str(folder / model.path))
    sources = tuple(
        _absolute_files(
            _absolute_journal(
                msgspec.structs.replace(source, path=str(folder / source.path)) if source.path else source,
                folder,
            ),
            folder,
        )
        for source in config.sources
    )
    return msgspec.structs.replace(config, model=model, sources=sources)


def _absolute_journal(source: Source, folder: Path) -> Source:
    journal = source.journal
    if journal is None or not journal.directory:
        return source
    journal = msgspec.structs.replace(journal, directory=str(folder / journal.directory))
    return msgspec.structs.replace(source, journal=journal)


def _absolute_files(source: Source, folder: Path) -> Source:
    """Resolve keys such as cert_file, and the socket of HTTP."""
    for kind in ("mqtt", "http", "opcua"):
        table: msgspec.Struct | None = getattr(source, kind)
        if table is None:
            continue
        files = [name for name in table.__struct_fields__ if name.endswith("_file") and getattr(table, name)]
        paths = {name: str(folder / getattr(table, name)) for name in files}
        listen = getattr(table, "listen", "")
        if listen.startswith("unix:"):
            paths["listen"] = f"unix:{folder / listen.removeprefix('unix:')}"
        if paths:
            source = msgspec.structs.replace(source, **{kind: msgspec.structs.replace(table, **paths)})
    return source
