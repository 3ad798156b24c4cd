"""The settings of the kinds of sources that have a table of their own, as in [sources.mqtt].

As in settings.py the text below a field is what users read. `faults` of a table names what single values
cannot show: (key within the table, what is wrong, what to do).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Final, Literal
from urllib.parse import SplitResult, urlsplit

import msgspec
from msgspec import Meta

from pipeline.config_decode import Secret
from pipeline.units import Duration, Size

__all__ = [
    "WORDS", "HttpSource", "JournalSource", "ModbusRegister", "ModbusSource", "MqttSource", "MqttTopic",
    "OpcuaNode", "OpcuaSource", "RegisterType", "SourceFault",
]  # fmt: skip

SourceFault = tuple[str, str, str]
_EVENT_SOURCE: Final = r"[a-z0-9][a-z0-9._-]{0,63}"

EventSource = Annotated[
    str,
    Meta(
        pattern=r"^(?:[a-z0-9][a-z0-9._-]{0,63})?$(?!\n)",
        title="a name of a-z, 0-9, dot, underscore and dash, at most 64, in quotes",
    ),
]
ValueTag = Annotated[str, Meta(min_length=1, max_length=64)]
ValueUnit = Annotated[str, Meta(max_length=16)]
RegisterType = Literal[
    "bool", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"
]  # fmt: skip
WORDS: Final[dict[str, int]] = {
    "bool": 1, "int16": 1, "uint16": 1, "int32": 2, "uint32": 2, "float32": 2, "int64": 4, "uint64": 4,
    "float64": 4,
}  # fmt: skip
"""How many registers each type takes."""
_NODE_ID: Final = re.compile(
    r"(?:ns=\d{1,5};|nsu=[^;]+;)?(?:i=\d{1,10}|s=.+|g=[0-9A-Fa-f-]{36}|b=[A-Za-z0-9+/=]+)", re.DOTALL
)


class MqttTopic(msgspec.Struct, frozen=True, kw_only=True):
    """What the messages under a topic filter are, and which source they speak for."""

    payload: Literal["event", "lines", "number", "json", "sparkplug"] = "event"
    """What a message holds: "event" one JSON event, "lines" at most 1,000 of them, one a line, "number" a
    plain number as in 21.5, "json" a flat object of numbers, "sparkplug" Sparkplug B."""
    source: str = ""
    """Source of the events, by default that of the [[sources]] entry. {1} is what stands at the filter's
    first wildcard, {2} at the second, made a name; Sparkplug has {group}, {edge} and {device} as well, and
    "{group}.{edge}.{device}" as its default."""
    sources: tuple[str, ...] = ()
    """Other sources that an event may name as its own; one that names any other is refused. ["*"] lets
    whoever may publish here speak for every source."""
    tag: str = ""
    """For payload "number": name of the value, "value" by default; {1} as above."""
    unit: Annotated[str, Meta(max_length=16)] = ""
    """For payload "number": unit of the value."""
    time: str = ""
    """For payload "json": the key that holds the time, in seconds or milliseconds since 1970 or RFC 3339;
    empty takes the time of arrival."""


class MqttSource(msgspec.Struct, frozen=True, kw_only=True):
    """An MQTT broker that is subscribed to, at QoS 1, with a session that the broker keeps."""

    url: str
    """The broker, as in "mqtts://broker.local:8883"; "mqtt://" goes without encryption. Without a port 8883,
    or 1883."""
    topics: dict[str, MqttTopic]
    """Topic filter to what its messages are, as in "plant/+/pressure" = { payload = "number", source = "{1}",
    tag = "pressure" }. What no filter lists is dropped and counted, and so is everything under $SYS."""
    version: Literal["5", "3.1.1"] = "5"
    """Version of MQTT. With 3.1.1 the broker sends no more than its own limit ahead of our acknowledgements:
    see in_flight."""
    client_id: str = ""
    """Name of the session at the broker; no other client may use it. By default "edgewater-", the source's
    name and a hash of this machine's id; set it where that changes, as in a container."""
    username: str = ""
    """User at the broker."""
    password: str = ""
    """Password at the broker, as in "${cred:mqtt}" or "${file:PATH}"."""
    ca_file: str = ""
    """Certificates that the broker's must be signed by; empty trusts those of the system."""
    cert_file: str = ""
    """Certificate that we show to the broker."""
    key_file: str = ""
    """Private key of cert_file, if it is not in the same file."""
    session_expiry: Duration = Duration(604_800)
    """The broker keeps what we miss for so long after a disconnect (MQTT 5; with 3.1.1 the broker's own
    setting decides)."""
    keepalive: Duration = Duration(20)
    """A broker that is silent for so long is given up and connected to again."""
    retained: Literal["ignore", "take"] = "ignore"
    """Retained messages, which a broker sends again to each new subscriber: "take" makes events of them."""
    in_flight: Annotated[int, Meta(ge=1, le=65_535)] = 20
    """So many messages the broker surely sends ahead of our acknowledgements (mosquitto:
    max_inflight_messages). From here on a commit is hurried when the broker may be waiting for it."""
    rebirth: bool = False
    """For Sparkplug: ask a node for a new birth certificate when messages were lost or an alias is unknown.
    This publishes a command (NCMD) to the node, at most once a minute."""
    probe_topic: str = ""
    """Lets `edgewater doctor` measure the broker's limits by publishing 2,000 short messages to itself under
    this topic; empty publishes nothing."""

    def faults(self) -> Iterator[SourceFault]:
        """What does not fit."""
        from pipeline.sources.mqtt_settings import faults

        return faults(self)


class HttpSource(msgspec.Struct, frozen=True, kw_only=True):
    """An HTTP server that takes events: POST /v1/events, one event or JSON lines."""

    listen: str = "127.0.0.1:8086"
    """Address and port, or "unix:PATH" for a socket that this user and group may open. An address that others
    can reach needs a token, and TLS or allow_plaintext."""
    token: str = ""
    """What clients must send as "Authorization: Bearer TOKEN", at least 16 characters, as in
    "${cred:edgewater-http}". Empty lets everybody in who can reach a loopback address or the socket."""
    sources: tuple[str, ...] = ()
    """Other sources that an event may name as its own; one that names any other is refused. ["*"] lets
    whoever may post here speak for every source."""
    max_body: Size = Size.parse("8MiB")
    """A request's body may have so many bytes, packed and unpacked; a larger one gets 413. At most 64 MiB."""
    gather: Duration = Duration(0.005)
    """Requests that come within this time share a commit, and wait for it as long. Each commit writes about
    24 KB to flash: with many single events a second "100ms" or more spares it. At most 10 s."""
    timeout: Duration = Duration(10)
    """A request's head must have come within this time, its body within as much and a second for each KiB; a
    slower one gets 408."""
    cert_file: str = ""
    """Certificate, with those between it and its authority, in PEM: switches TLS on. Relative to this
    configuration file; read at the start."""
    key_file: str = ""
    """Private key of cert_file, if it is not in the same file."""
    allow_plaintext: bool = False
    """Take events and the token unencrypted from other machines: only in a network that you trust, or behind
    a proxy that encrypts."""

    def faults(self) -> Iterator[SourceFault]:
        """What does not fit."""
        yield from _http_faults(self)


def _http_faults(http: HttpSource) -> Iterator[SourceFault]:
    if not (local := http.listen.startswith("unix:") and len(http.listen) > len("unix:")):
        host, colon, port = http.listen.rpartition(":")
        try:
            local = host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
            if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
                raise ValueError("no port")
        except ValueError:
            hint = 'write it as in "127.0.0.1:8086", "[::1]:8086" or "unix:/run/edgewater/http.sock"'
            yield "listen", "expected an IP address and a port, or unix: and a path", hint
            local = True  # what does not parse needs no second fault
    if not local and not http.token:
        yield "token", "missing; other machines can reach this address", 'as in token = "${cred:http}"'
    if not local and not http.cert_file and not http.allow_plaintext:
        hint = "set cert_file and key_file, or allow_plaintext = true in a network that you trust"
        yield "listen", "other machines would send events and token unencrypted", hint
    if http.token and not re.fullmatch(r"[!-~]{16,512}", http.token):
        hint = "make one with: openssl rand -hex 32"
        yield "token", "expected 16 to 512 ASCII characters without spaces", hint
    elif http.token and not isinstance(http.token, Secret):
        yield "token", "stands in the configuration", 'write "${cred:NAME}" or "${file:PATH}"'
    if http.key_file and not http.cert_file:
        yield "key_file", "has no effect without cert_file", "set both, or remove it"
    for name in http.sources:
        if name != "*" and not re.fullmatch(_EVENT_SOURCE, name):
            yield (
                "sources",
                f'"{name}" is no name of a source',
                'as in ["pump-1", "pump-2"], or ["*"] for any',
            )
    if len(http.sources) > 64:
        yield "sources", "more than 64 names", 'use ["*"], or several ports'
    if not 1024 <= http.max_body <= 64 << 20:
        yield "max_body", "expected 1KiB to 64MiB", "send large files in several requests"
    if http.gather > 10:
        yield "gather", "more than 10s: clients would give up", 'as in "100ms"'
    if not 1 <= http.timeout <= 600:
        yield "timeout", 'expected "1s" to "10m"', 'as in "10s"'


class OpcuaNode(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of one node's values."""

    tag: ValueTag
    """Name of the value in its reading."""
    source: EventSource = ""
    """Source of the events; empty is the source that this table belongs to. Values of one source with the
    same time, in the same message from the server, become one reading."""
    unit: ValueUnit = ""
    """Unit of the value, as in "bar"."""
    text: bool = False
    """Make text events of the values: for nodes that hold messages. Without it a value that is no number is
    refused."""
    deadband: Annotated[float, Meta(ge=0)] = 0.0
    """The server reports a change only when it is larger than this; 0 reports every change. Not all servers
    and nodes can."""


class OpcuaSource(msgspec.Struct, frozen=True, kw_only=True):
    """An OPC UA server whose nodes are subscribed to."""

    url: Annotated[str, Meta(min_length=1)]
    """The server, as in "opc.tcp://10.0.0.5:4840"; 4840 is also the port where none is named."""
    nodes: dict[str, OpcuaNode]
    """Node id -> what its values become, as in { "ns=2;s=Pump1.Pressure" = { tag = "pressure", source =
    "pump-1", unit = "bar" } }. "nsu=URI;s=NAME" finds the namespace by its URI."""
    security: Literal["none", "sign", "sign_and_encrypt"] = "sign_and_encrypt"
    """"sign" and "sign_and_encrypt" use Basic256Sha256 and need cert_file and key_file; "none" sends and
    believes everything in clear: only in a network that you trust."""
    cert_file: str = ""
    """This client's certificate, PEM or DER; the server must be told to trust it. Relative to this
    configuration file."""
    key_file: str = ""
    """Its private key, PEM or DER."""
    server_cert_file: str = ""
    """The server's certificate, PEM or DER: no other is accepted. Empty takes whatever certificate the server
    shows, which keeps listeners out, but not somebody who stands between."""
    username: str = ""
    """User to log in as; empty is anonymous."""
    password: str = ""
    """Their password, as in "${cred:opcua}"."""
    plain_password: bool = False
    """Allow the password to be sent in clear text, to a server that offers nothing else."""
    publishing_interval: Duration = Duration(1)
    """The server sends what changed so often."""
    sampling_interval: Duration = Duration(0)
    """The server looks at each node so often; "0s" is once a publishing interval."""
    queue_size: Annotated[int, Meta(ge=1, le=10_000)] = 100
    """The server keeps so many values of a node while they cannot be sent, or while ingest's queue is full;
    what it drops beyond that is counted as gaps, where the server says so."""
    timeout: Duration = Duration(4)
    """A server that does not answer for so long is taken for gone."""
    bad_values: Literal["count", "refuse"] = "count"
    """A value that the server itself calls bad, or that is no finite number, is never stored: "count" counts
    it, "refuse" makes it a dead letter with the reason as well. One that it calls uncertain is stored."""

    def faults(self) -> Iterator[SourceFault]:
        """What does not fit."""
        yield from self._faults_of_the_server()
        if not self.nodes:
            yield (
                "nodes",
                "no node: there is nothing to subscribe to",
                'as in "ns=2;s=Name" = { tag = "name" }',
            )
        for node, table in self.nodes.items():
            if table.text and table.deadband:
                yield "nodes", f'"{node}": a text has no deadband', "remove deadband"
            if not _NODE_ID.fullmatch(node):
                yield (
                    "nodes",
                    f'"{node}" is no node id',
                    'write it as in "ns=2;s=Pump1.Pressure" or "ns=2;i=7"',
                )
        yield from _repeated(
            "nodes", ((node.source, node.tag) for node in self.nodes.values() if not node.text)
        )
        for key in ("publishing_interval", "timeout"):
            if getattr(self, key) <= 0:
                yield key, "expected more than 0", 'as in "1s"'

    def _faults_of_the_server(self) -> Iterator[SourceFault]:
        parts = urlsplit(self.url)
        if parts.scheme != "opc.tcp" or not parts.hostname or not _is_port(parts):
            yield "url", "no address of an OPC UA server", 'write it as in "opc.tcp://10.0.0.5:4840"'
        elif "@" in parts.netloc:
            yield "url", "holds a user or a password", "move them to username and password"
        for key in ("cert_file", "key_file"):
            if self.security != "none" and not getattr(self, key):
                hint = 'name it, or set security = "none" in a network that you trust'
                yield key, f'missing; security "{self.security}" needs it', hint
        for key in ("cert_file", "key_file", "server_cert_file"):
            if self.security == "none" and getattr(self, key):
                yield key, 'has no effect with security "none"', "remove it, or set security"
        if self.password and not self.username:
            yield "password", "has no effect without username", "add username"
        if self.password and not isinstance(self.password, Secret):
            yield "password", "stands in the configuration", 'write "${cred:NAME}" or "${file:PATH}"'


class ModbusRegister(msgspec.Struct, frozen=True, kw_only=True):
    """One value in a device's memory."""

    tag: ValueTag
    """Name of the value in its reading."""
    address: Annotated[int, Meta(ge=0, le=65_535)]
    """Address as it goes over the wire, from 0: what manuals call 40001 is address 0 of table "holding"."""
    table: Literal["holding", "input", "coil", "discrete"] = "holding"
    """Holding registers, input registers, coils or discrete inputs."""
    type: RegisterType | None = None
    """What the registers hold; by default "uint16", and "bool" of coils and discrete inputs. 32 bits take two
    registers, 64 bits four; "bool" of a register is one of its bits."""
    bit: Annotated[int, Meta(ge=0, le=15)] = 0
    """For "bool" of a register: which bit, 0 is the lowest."""
    word_order: Literal["big", "little"] = "big"
    """Which register of several comes first: "big" that with the highest bits."""
    byte_order: Literal["big", "little"] = "big"
    """Which byte of a register comes first; "big" is the standard."""
    scale: float = 1.0
    """The value is register * scale + offset."""
    offset: float = 0.0
    """Added after scaling."""
    unit: ValueUnit = ""
    """Unit of the value, as in "bar"."""
    source: EventSource = ""
    """Source of the events; empty is the source that this table belongs to. All values of one source that a
    poll reads become one reading."""
    device: Annotated[int, Meta(ge=0, le=255)] | None = None
    """Unit id of the device; by default that of the table."""

    @property
    def holds(self) -> RegisterType:
        """The type, filled in."""
        return self.type or ("bool" if self.is_bit else "uint16")

    @property
    def is_bit(self) -> bool:
        """Whether its table is one of bits."""
        return self.table in ("coil", "discrete")


class ModbusSource(msgspec.Struct, frozen=True, kw_only=True):
    """Modbus devices that are polled, over TCP or a serial line. What changes between two polls is not seen:
    each value is read at most once."""

    registers: tuple[ModbusRegister, ...]
    """What to read, as in [[sources.modbus.registers]] with tag, address, type, scale, unit. Neighbours are
    read in one request."""
    host: str = ""
    """Name or address of the device or gateway, for Modbus TCP."""
    port: Annotated[int, Meta(ge=1, le=65_535)] = 502
    """Its TCP port."""
    rtu_over_tcp: bool = False
    """The TCP port speaks RTU frames: for simple serial converters."""
    serial: str = ""
    """Serial port instead of a host, as in "/dev/ttyUSB0": Modbus RTU."""
    baud: Annotated[int, Meta(ge=300, le=4_000_000)] = 19_200
    """Bits a second of the serial line."""
    parity: Literal["even", "odd", "none"] = "even"
    """Parity of the serial line."""
    stop_bits: Annotated[int, Meta(ge=1, le=2)] = 1
    """Stop bits of the serial line; without parity devices often want 2."""
    device: Annotated[int, Meta(ge=0, le=255)] = 1
    """Unit id of the device."""
    interval: Duration = Duration(1)
    """Poll so often, at a fixed rate. A poll that takes longer leaves out those it overruns, counted as
    skipped."""
    timeout: Duration = Duration(1)
    """A request that is not answered for so long has failed."""
    retries: Annotated[int, Meta(ge=0, le=10)] = 1
    """Ask a device that did not answer so many times more, at each poll."""
    max_gap: Annotated[int, Meta(ge=0, le=124)] = 8
    """Read over at most so many registers that are not asked for to save a request. A device that refuses
    such a request gets two instead, from then on."""
    max_registers: Annotated[int, Meta(ge=4, le=125)] = 125
    """At most so many registers a request; 125 is the limit of the protocol, some devices want fewer."""

    def faults(self) -> Iterator[SourceFault]:
        """What does not fit."""
        if bool(self.host) == bool(self.serial):
            yield "host", "expected either host or serial", 'as in host = "10.0.0.7"'
        if self.serial and self.rtu_over_tcp:
            yield "rtu_over_tcp", "has no effect with serial", "remove it"
        if not self.registers:
            yield "registers", "no register: there is nothing to poll", 'as in { tag = "flow", address = 0 }'
        for register in self.registers:
            yield from self._faults_of(register)
        yield from _repeated("registers", ((register.source, register.tag) for register in self.registers))
        for key in ("interval", "timeout"):
            if getattr(self, key) <= 0:
                yield key, "expected more than 0", 'as in "1s"'

    @staticmethod
    def _faults_of(register: ModbusRegister) -> Iterator[SourceFault]:
        at = f"{register.tag}: "
        if register.is_bit and register.holds != "bool":
            hint = 'leave type out, or use table = "holding"'
            yield "registers", f'{at}table "{register.table}" holds bits, no {register.holds}', hint
        if register.address + WORDS[register.holds] > 65_536:
            yield "registers", f"{at}{register.holds} reaches beyond address 65535", "correct the address"
        if register.scale == 0:
            yield "registers", f"{at}scale 0 makes every value the same", "leave it out, or correct it"


def _is_port(parts: SplitResult) -> bool:
    """Whether the port is one, or none is named."""
    try:
        return parts.port != 0
    except ValueError:
        return False


def _repeated(key: str, tags: Iterable[tuple[str, str]]) -> Iterator[SourceFault]:
    """A tag that would stand in the same reading twice."""
    seen: set[tuple[str, str]] = set()
    for source, tag in tags:
        if (source, tag) in seen:
            where = f'of source "{source}" ' if source else ""
            yield key, f'tag "{tag}" {where}is there twice', "give each a tag of its own"
        seen.add((source, tag))


class JournalSource(msgspec.Struct, frozen=True, kw_only=True):
    """The systemd journal, through journalctl; it may be missing, and is then looked for again."""

    directory: str = ""
    """Folder of journal files, relative to this configuration file, such as those of other machines that
    systemd-journal-remote receives; empty is the journal of this machine."""
    units: tuple[str, ...] = ()
    """Only these units, as in "nginx.service" or "app-*"; empty is all."""
    identifiers: tuple[str, ...] = ()
    """Only messages with these syslog identifiers; empty is all."""
    priority: Literal["emerg", "alert", "crit", "err", "warning", "notice", "info", "debug"] = "info"
    """Only messages as important as this or more."""
    since: Literal["now", "boot", "all"] = "now"
    """Where the first start begins: with what comes from now on, with this boot, or with all that is kept.
    Later starts go on where the last commit was."""
    template: str = "{SYSLOG_IDENTIFIER}: {MESSAGE}"
    """Text of a message, with {FIELD} where a field of the journal goes; one that a message lacks is left
    empty."""
    unit_as_source: bool = False
    """Whether a message's source is its unit, as in "nginx.service", instead of this source's name."""

    def faults(self) -> Iterator[SourceFault]:
        """What does not fit."""
        from pipeline.sources.journal import template_fields

        try:
            template_fields(self.template)
        except ValueError as error:
            yield "template", "not a template", str(error)
        if self.directory and self.since == "boot":
            yield "since", "the boot of another machine is not known here", 'set it to "now" or "all"'
        for key, words in (("units", self.units), ("identifiers", self.identifiers)):
            if any(not word or "\0" in word for word in words):
                yield key, "holds an empty text", "take it out, or name one"
