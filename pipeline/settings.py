"""The settings of `edgewater.toml`, one frozen Struct a table; the text below a field is what users read.

`edgewater config schema` and the commented example are made from these docstrings, so each says what the key
does, in which unit, and when to change it. Every field here has an effect in this version.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from pipeline.format_settings import CsvFormat, PatternFormat
from pipeline.source_settings import HttpSource, JournalSource, ModbusSource, MqttSource, OpcuaSource
from pipeline.units import Duration, Size

__all__ = [
    "ECO_FLUSH_MS",
    "MAX_UNIT",
    "EMBEDDED_MODEL",
    "NAME_PATTERN",
    "REDACT_PRESETS",
    "Config",
    "Dedup",
    "DedupSettings",
    "GateSettings",
    "GatewaySettings",
    "HealthSettings",
    "IngestSettings",
    "ModelSettings",
    "Redact",
    "Render",
    "RingSettings",
    "ServeSettings",
    "Source",
    "TriggerSettings",
    "UpdateSettings",
]

NAME_PATTERN: Final = r"[a-z0-9][a-z0-9._-]{0,63}"
"""Names of gateways and sources: safe in file names, metrics and topics alike."""
MAX_UNIT: Final = 16
"""Characters of a unit, as in an event."""
ECO_FLUSH_MS: Final = 10_000
"""Default of ring.flush_ms under ring.profile = "eco"."""
EMBEDDED_MODEL: Final = "embedded"
"""The value of model.path that means the model the project comes with."""

REDACT_PRESETS: Final[dict[str, tuple[str, str]]] = {
    # Each scans in linear time: no nested repetition, every repetition bounded.
    "email": (r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}", "<email>"),
    "ipv4": (
        r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.]*\d)",
        "<ipv4>",
    ),
    "token": (
        r"(?i:\b(bearer|token|api[_-]?key|password|passwd|secret)\b(\s{0,3}[:=]\s{0,3}|\s{1,3})\S{6,256})",
        r"\1\2<token>",
    ),
}
"""Ready-made redactions: name to (pattern, replacement)."""

Name = Annotated[
    str,
    # Python's $ would also match before a final newline.
    Meta(
        pattern=rf"^{NAME_PATTERN}$(?!\n)",
        title="a name of a-z, 0-9, dot, underscore and dash, at most 64, in quotes",
    ),
]
Band = Annotated[float, Meta(ge=0)]
Dedup = Literal["delivery", "content", "none"]


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """Who this box is."""

    name: Name = "gateway"
    """Name of this gateway, in captures and in the manifests of the versions it makes."""


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The base model that is adapted; it is never changed itself."""

    path: Annotated[str, Meta(min_length=1)] = EMBEDDED_MODEL
    """Folder that `edgewater model prepare` wrote, or "embedded" for SmolLM2-135M-Instruct, which the project
    comes with and prepares when it is first needed. Fixed for the life of a data folder."""


class RingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The crash-safe buffer of samples."""

    max_bytes: Size = Size.parse("256MiB")
    """Size of the ring on disk, of each ingest process's own: with ingest.processes = 2 twice as much in all.
    It is allocated whole when it is made and never changes, so it never fills the disk; the oldest samples
    are evicted when it is three quarters full."""
    max_age: Duration = Duration(0)
    """Evict samples older than this, in stream time; "0s" keeps them until space is needed."""
    profile: Literal["standard", "eco"] = "standard"
    """How gently the flash is treated: "eco" commits every 10 seconds where flush_ms is not set, and writes
    the time of a silent stream every 5 minutes instead of every minute."""
    flush_ms: Annotated[int, Meta(ge=10, le=60_000)] = 2000
    """An event waits at most this many milliseconds for its commit; at 4,000 events or 512 KiB (a 64th of a
    ring below 32 MiB) it comes at once. Each commit writes about 24 KB to flash: at 2000 that is 1 GB a day
    at most, at 10000, the default of profile "eco", a third, at 100 it is 20."""


class DedupSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How far back a repeated event is recognized."""

    horizon_events: Annotated[int, Meta(ge=0, le=10_000_000)] = 200_000
    """So many events back are remembered by each ingest process, 24 bytes of memory each, taken at the start,
    and at most twice that where other processes stored events before it began; 0 switches all deduplication
    off."""


class Render(msgspec.Struct, frozen=True, kw_only=True):
    """How the readings of a source become the text that the model learns."""

    template: str = ""
    """Text of a reading with {tag} where a value goes, as in "pressure {pressure} bar, flow {flow}"; {{ and
    }} are braces. Empty writes name=value pairs."""
    tags: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    """Which values to write, in this order, when there is no template; empty writes all in the event's
    order."""
    units: dict[str, Annotated[str, Meta(max_length=MAX_UNIT)]] = {}
    """Unit written behind a tag's value, in place of the unit that the event brings, as in { pressure = "bar"
    }."""
    digits: Annotated[int, Meta(ge=1, le=17)] = 3
    """Significant digits of each value. Noise in the last digits costs tokens and cannot be learned."""
    on_change: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    """Tags that are written only when their value differs from the one that was last written, or that was not
    written for max_silence, as in ["mode", "alarm"]. A reading that has nothing but unchanged ones of these
    is dropped. Not beside a template, which writes its tags always."""


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A source of events; its settings hold for every event whose `source` is its name."""

    name: Name
    """Name of the source: a-z, 0-9, dot, underscore and dash. Events that carry no `source` get this one."""
    kind: Literal["files", "stdin", "mqtt", "http", "opcua", "modbus", "journal"]
    """Where it reads: "files" follows files through rotation, .zst too; "stdin" reads standard input to its
    end; "mqtt" subscribes to a broker; "http" takes POST /v1/events; "opcua" subscribes to a server's nodes;
    "modbus" polls registers; "journal" follows the systemd journal. All but the first two have a table of
    their own, as in [sources.mqtt]."""
    path: str = ""
    """For kind "files": a file, a folder (all files in it but hidden ones, also those that come), or a
    pattern with * ? [ ] and ** for many. Relative to this configuration file. Symbolic links are followed
    only where the path names one itself, without wildcards."""
    format: Literal["jsonl", "csv", "lines"] = "jsonl"
    """For kind "files": "jsonl" one JSON event a line, "csv" rows under a header, "lines" log lines."""
    csv: CsvFormat | None = None
    """For format "csv"; may be left out."""
    pattern: PatternFormat | None = None
    """For format "lines"; may be left out: every line is then a text."""
    mqtt: MqttSource | None = None
    """For kind "mqtt"."""
    http: HttpSource | None = None
    """For kind "http"."""
    opcua: OpcuaSource | None = None
    """For kind "opcua"."""
    modbus: ModbusSource | None = None
    """For kind "modbus"."""
    journal: JournalSource | None = None
    """For kind "journal"."""
    rate: Annotated[float, Meta(ge=0)] = 0.0
    """Take at most this many events a second, 0 without limit; what comes faster waits in the source's
    queue."""
    burst: Annotated[float, Meta(ge=0)] = 0.0
    """With rate: so many may come at once after a pause; 0 is a second's worth."""
    shard: Annotated[int, Meta(ge=0, le=64)] = 0
    """With ingest.processes above 1: the ingest process that reads this source, from 1; 0 gives the sources
    to them in turn, in the order of this file. Sources that may bring the same event belong to one process:
    each knows only what it stored itself, and what the others had before it began."""
    queue: Annotated[int, Meta(ge=1, le=1_000_000)] = 8_192
    """So many events of this source may wait for a commit (and at most 2 MiB of them)."""
    when_full: Literal["block", "drop_oldest", "drop_newest"] = "block"
    """What a full queue does: "block" slows the source (files are read later, a broker keeps its messages,
    HTTP answers 429), "drop_oldest" and "drop_newest" let events go, counted as dropped in `status`."""
    dedup: Dedup | None = None
    """What counts as a repeat: "delivery" the same event sent again (same id, or same content and time),
    "content" the same text at any time, "none" nothing. By default content for text and exchanges, delivery
    for the rest."""
    near_duplicates: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Drop a text that says almost the same as one of the source's last texts: from this similarity on, the
    share of runs of 3 characters that two texts have in common. 0.9 drops those that differ in a letter or
    two of a long text, 0.8 also in short ones; 0 drops none. Texts that differ in a number alone are dropped
    too: not for texts in which numbers matter. It takes up to 0.6 ms a text."""
    near_horizon: Annotated[int, Meta(ge=1, le=100_000)] = 1_000
    """With near_duplicates: so many texts of the source are compared with, about 3 KB of memory each."""
    render: Render = Render()
    """How readings become text."""
    deadband: Band | dict[str, Band] = 0.0
    """Drop a reading while no value has moved by more than this from the last one kept: one number for all
    tags, or a table by tag, as in { pressure = 0.05, flow = 2.0 } (a tag that it lacks is not looked at). 0
    keeps all."""
    max_silence: Duration = Duration(0)
    """Keep a reading despite its deadband when the last one kept is older than this, in stream time; "0s"
    never."""


class Redact(msgspec.Struct, frozen=True, kw_only=True):
    """A text that must not reach the ring: replaced in every event before anything is stored or hashed."""

    preset: Literal["", "email", "ipv4", "token"] = ""
    """A ready-made rule: email addresses, IPv4 addresses, or what follows words such as password and
    token."""
    pattern: str = ""
    """A regular expression of Python's re, instead of a preset."""
    replacement: str = "<redacted>"
    r"""What a pattern's match becomes; \1 is its first group."""
    sources: tuple[Name, ...] = ()
    """Only for events of these sources; empty is all."""

    def compiled(self) -> tuple[re.Pattern[str], str]:
        """Give the pattern, compiled, and its replacement.

        Raises: re.error if the pattern is none, or its replacement names a group that it lacks.
        """
        pattern, replacement = (
            REDACT_PRESETS[self.preset] if self.preset else (self.pattern, self.replacement)
        )
        compiled = re.compile(pattern)
        compiled.sub(replacement, "")  # checks the replacement's groups, also without a match
        return compiled, replacement


class IngestSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The process that reads the sources."""

    processes: Annotated[int, Meta(ge=1, le=64)] = 1
    """Independent ingest processes, each with its share of the sources and a ring of its own: one that dies
    or hangs costs the others nothing, and each can use a core. Sources go to them in turn, or where their
    `shard` says. Change it only while Edgewater is stopped; nothing is lost or stored twice then, and what a
    process that is gone has stored stays. Each counts its own windows."""


class TriggerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """When a window closes and an update is due. Whichever limit is reached first closes it."""

    mode: Literal["threshold"] = "threshold"
    """What closes a window: "threshold" is the limits below."""
    min_samples: Annotated[int, Meta(ge=32, le=1_000_000)] = 300
    """Close a window at this many samples."""
    min_tokens: Annotated[int, Meta(ge=1024, le=100_000_000)] = 32_768
    """Close a window at this many tokens."""
    max_age: Duration = Duration(0)
    """Close a window with at least 32 samples when its first is older than this, in stream time; "0s"
    never."""
    max_due: Annotated[int, Meta(ge=1, le=64)] = 4
    """At most so many windows wait for the trainer; when one more closes, the two oldest become one."""
    cooldown: Duration = Duration(0)
    """Let at least this much stream time pass between two updates; windows close all the same."""


class UpdateSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a window is trained on."""

    profile: Literal["fast", "full", "tiny"] = "fast"
    """Which of the base's blocks are adapted: "fast" the upper quarter, "full" all (twice the time), "tiny"
    the upper eighth."""
    rank: Annotated[int, Meta(ge=1, le=256)] = 16
    """LoRA rank. Fixed for the life of a data folder."""
    alpha: Annotated[int, Meta(ge=0, le=1024)] = 0
    """LoRA alpha; 0 is twice the rank. Fixed for the life of a data folder."""
    learning_rate: Annotated[float, Meta(ge=0, le=0.1)] = 0.0
    """Peak learning rate; 0 takes the profile's (0.002, full 0.0005). Models of 7B parameters and more want
    0.00005."""
    max_steps: Annotated[int, Meta(ge=1, le=100_000)] = 100
    """At most so many optimizer steps an update."""
    max_tokens: Annotated[int, Meta(ge=1024, le=100_000_000)] = 32_768
    """At most so many new tokens an update; from a larger window a seeded choice is trained on."""
    row_tokens: Annotated[int, Meta(ge=32, le=8192)] = 256
    """Length of the rows that samples are packed into: a sample sees what stands before it in its row."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    """Seed of every random choice. The same stream, settings, base and kind of processor give the same
    adapter."""
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    """Processor threads that an update uses; 0 is all. Fewer leave more to the rest of the box."""


class GateSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a new version must prove before it becomes active. What cannot be measured counts as failed."""

    min_gain: Annotated[float, Meta(ge=0, lt=1)] = 0.01
    """Bits per byte of the window's held-out part must fall by at least this share."""
    max_anchor_delta_bits: Annotated[float, Meta(gt=0, le=10)] = 0.08
    """General text may become worse by at most this many bits a token than under the base, over all
    updates."""
    max_retention_loss: Annotated[float, Meta(ge=0, le=10)] = 0.03
    """Bits per byte of earlier windows' held-out parts may rise by at most this share."""
    max_recited: Annotated[int, Meta(ge=0, le=20)] = 1
    """Of the 20 rarest spans of the window, at most so many may be recited word by word."""


class HealthSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where /livez, /readyz, /metrics and /version answer."""

    listen: str = "127.0.0.1:9464"
    """Loopback address and port of the first ingest process, each further one has the next port; empty
    switches them off. They are read-only, without a password, and so
    never leave the box: put a reverse proxy with one in front to read them from elsewhere."""


class ServeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The local model server. This version has none: the key is checked, and takes effect with the server."""

    listen: str = "127.0.0.1:8080"
    """Loopback address and port of the OpenAI-compatible server, once there is one."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Edgewater's configuration."""

    data_dir: Path = Path("/var/lib/edgewater")
    """Folder of everything that must survive: the ring, the registry, the versions. A relative path starts at
    the folder of this file. Local disk only; one instance a folder."""
    gateway: GatewaySettings = GatewaySettings()
    model: ModelSettings = ModelSettings()
    ring: RingSettings = RingSettings()
    dedup: DedupSettings = DedupSettings()
    ingest: IngestSettings = IngestSettings()
    trigger: TriggerSettings = TriggerSettings()
    update: UpdateSettings = UpdateSettings()
    gate: GateSettings = GateSettings()
    health: HealthSettings = HealthSettings()
    serve: ServeSettings = ServeSettings()
    sources: tuple[Source, ...] = ()
    """What to read. At least one is needed to ingest."""
    redact: tuple[Redact, ...] = ()
    """What to take out of every event before it is stored, in this order."""
