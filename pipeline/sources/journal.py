"""The systemd journal, followed through journalctl; where there is none, it is looked for again and again.

    journalctl                        then
    is missing, or cannot be started  not connected; tried again after a growing wait
    would find no journal             the same: it would wait, and not see one that comes later
    ends                              not connected, with what it said; tried again
    prints an entry                   an event; its cursor is committed with it, in one transaction
    begins behind another entry than  the cursor's was vacuumed meanwhile: counted as a gap
    the committed one
    does not know the cursor          the same, and it begins as at the first start
    has no entry at the first start   the time is committed instead of a cursor
    follows folders that are others   it is started again, after a journal became persistent or was moved
    by now

That is stronger than `--cursor-file`, which is written before anybody has stored the entries.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import selectors
import shutil
import signal
import string
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from pipeline.events import MAX_EVENT_BYTES, Line, Origin
from pipeline.source_settings import JournalSource
from pipeline.sources.formats import RowError, clean, event_json
from pipeline.sources.inbox import Backoff, Chunk, Inbox, ReaderThread, Settled
from pipeline.sources.lines import READ_BYTES, LineSplitter

__all__ = ["JournalConnector", "template_fields"]

MAX_ENTRY_BYTES = 1 << 20  # as JSON, where a byte of a binary message is up to four
MAX_COMPLAINT_BYTES = 4_096
POLL_S = 0.2
LAST_ENTRY_S = 30.0  # to look for the newest entry on a slow disk
CALM_S = 1.0  # without a complaint for so long after the start it is connected
ALWAYS = ("MESSAGE", "_SYSTEMD_UNIT")
FOLDERS = ("/var/log/journal", "/run/log/journal")
Folders = dict[str, tuple[int, int]]  # those that exist, with device and inode
SINCE = "@"  # begins a time in the place of a cursor
_NO_JOURNAL = "No journal files were"
_NO_CURSOR = "Failed to seek to cursor"
_is_field = re.compile(r"[A-Z_][A-Z0-9_]*").fullmatch
_is_time = re.compile(r"[0-9]{1,17}").fullmatch  # microseconds since 1970
_decode = msgspec.json.Decoder(dict[str, Any]).decode
log = logging.getLogger("edgewater.journal")


class JournalConnector:
    """Follows a journal from its committed cursor.

    Args:
        source: Name of the configured source.
        settings: Which entries, and how they read.
        program: journalctl.
    """

    def __init__(self, source: str, settings: JournalSource, program: str = "journalctl") -> None:
        self.name = f"journal:{source}"
        self._source = source
        self._settings = settings
        self._program = program
        self._fields = template_fields(settings.template)
        self._thread = ReaderThread()
        self._stop = self._thread.stopping
        self._cursor = ""  # of the last entry that was handed over
        self._was_connected = False

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None:
        """Begin to read in a thread of its own."""
        self._inbox = inbox
        self._state = inbox.state(self)
        self._cursor = positions.get(self.name, b"").decode()
        self._thread.start(self, inbox, self._run)

    def acknowledge(self, settled: list[Settled]) -> None:
        """The journal needs none: the cursor is in the commit."""

    def stop(self) -> None:
        """Stop reading."""
        self._thread.stop()

    def _run(self) -> None:
        backoff = Backoff()
        while not self._stop.is_set():
            why = self._follow_once(backoff)
            if self._stop.is_set():
                return
            if self._state.detail != why:
                log.warning("%s: %s", self.name, why)
            self._state.connected, self._state.detail = False, why
            self._stop.wait(backoff.next_s())

    def _follow_once(self, backoff: Backoff) -> str:
        """Read entries until journalctl ends, or must. Returns: why there are no more."""
        program = shutil.which(self._program)
        if program is None:
            return f"{self._program} is not installed"
        folders = self.folders()
        if not folders:
            return f"there is no journal in {self._settings.directory or ' or '.join(FOLDERS)}"
        try:
            if not self._cursor and self._settings.since == "now":
                self._mark_now(program)
            with _running([program, *self._arguments()]) as process:
                why = _Following(self, process, folders).run(backoff)
        except (OSError, subprocess.SubprocessError) as error:
            return f"{program} cannot be run: {error}"
        if _NO_CURSOR in why:
            self._lost("the journal does not know the cursor that was committed")
            self._cursor = ""
        return why

    def _mark_now(self, program: str) -> None:
        """Commit the present end, so that nothing after it is lost, also if we are killed before it comes."""
        now = f"{SINCE}{time.time():.6f}"
        deadline = time.monotonic() + LAST_ENTRY_S
        with _running([program, *self._filters(), "--lines=1", "--quiet"]) as process:
            while not self._stop.is_set():
                try:
                    found, _ = process.communicate(timeout=POLL_S)
                except subprocess.TimeoutExpired:
                    if time.monotonic() < deadline:
                        continue
                    found = b""
                entry = _entry(found.strip())
                self._cursor = str(entry["__CURSOR"]) if entry and "__CURSOR" in entry else now
                self.put([], self._cursor)
                return

    def _arguments(self) -> Iterator[str]:
        yield from self._filters()
        yield from ("--follow", "--no-tail")  # not only the last ten of what came meanwhile
        if self._cursor.startswith(SINCE):
            yield f"--since={self._cursor}"
        elif self._cursor:
            # Not --after-cursor: that the entry itself comes first shows that none is missing.
            yield f"--cursor={self._cursor}"
        elif self._settings.since == "boot":
            yield f"_BOOT_ID={_read_id('/proc/sys/kernel/random/boot_id')}"

    def _filters(self) -> Iterator[str]:
        settings = self._settings
        # --follow without --merge would leave out what was written before a reboot.
        yield from ("--output=json", "--all", "--no-pager", "--merge")
        fields = dict.fromkeys((*ALWAYS, *self._fields))
        yield f"--output-fields={','.join(fields)}"
        yield f"--priority={settings.priority}"
        if settings.directory:
            yield f"--directory={settings.directory}"
        else:  # nor that of containers and remote machines, which --merge adds
            yield f"_MACHINE_ID={_read_id('/etc/machine-id')}"
        yield from (f"--unit={unit}" for unit in settings.units)
        yield from (f"--identifier={identifier}" for identifier in settings.identifiers)

    # -- what the reading of one process calls -------------------------------------------------------

    @property
    def stopping(self) -> bool:
        """Whether reading must end."""
        return self._stop.is_set()

    def folders(self) -> Folders:
        """The folders that journalctl looks into, as far as they exist."""
        found: Folders = {}
        for folder in [self._settings.directory] if self._settings.directory else FOLDERS:
            with contextlib.suppress(OSError):
                info = Path(folder).stat()
                found[folder] = (info.st_dev, info.st_ino)
        return found

    def connected(self, hint: str) -> None:
        """Entries come, or would come."""
        if self._was_connected:
            self._state.count("reconnects")
        self._was_connected = True
        where = self._settings.directory or "this machine"
        self._state.connected, self._state.detail = True, f"the journal of {where}{hint}"

    def take(self, raw: list[bytes]) -> None:
        """Hand over printed entries."""
        origin = Origin(self._source, self.name, time.time())
        lines: list[Line] = []
        for data in raw:
            entry = _entry(data)
            if entry is None or not isinstance(cursor := entry.get("__CURSOR"), str):
                lines.append(_refused(data, origin, "no entry of the journal as JSON, or too long"))
                continue
            self._cursor = cursor
            lines.append(self._line(entry, data, origin))
        if lines:
            self.put(lines, self._cursor)

    def resumed(self, raw: list[bytes]) -> list[bytes]:
        """Take the entry of the committed cursor off the first ones; count a gap where it is not there."""
        if not self._cursor or self._cursor.startswith(SINCE) or not raw:
            return raw
        first = _entry(raw[0])
        if first is not None and first.get("__CURSOR") == self._cursor:
            return raw[1:]
        self._lost("entries that were not read yet are gone from the journal")
        return raw

    def put(self, lines: list[Line], cursor: str) -> None:
        """Hand over lines with the cursor of the last."""
        if not self._inbox.put(Chunk(self, lines, {self.name: cursor.encode()} if cursor else {})):
            self._stop.set()

    def _lost(self, why: str) -> None:
        self._state.count("gaps")
        log.warning("%s: %s", self.name, why)

    def _line(self, entry: dict[str, Any], data: bytes, origin: Origin) -> Line:
        if not _text(entry.get("MESSAGE")).strip():
            return _refused(data, origin, "an entry of the journal without a message")
        text = self._settings.template.format_map({name: _text(entry.get(name)) for name in self._fields})
        if not text.strip():
            return _refused(data, origin, "an entry without the fields that the template names")
        event: dict[str, object] = {"kind": "text", "text": text}
        if _is_time(when := str(entry.get("__REALTIME_TIMESTAMP"))):
            event["ts"] = int(when) / 1e6
        if self._settings.unit_as_source and (unit := _name(_text(entry.get("_SYSTEMD_UNIT")))):
            event["source"] = unit
        try:
            # An entry is known by its cursor: the same words in the same microsecond are two.
            return Line(event_json(event), -1, origin, str(entry["__CURSOR"]))
        except RowError as error:
            return _refused(data, origin, str(error))


class _Following:
    """One run of journalctl, read until it ends, complains or must stop."""

    def __init__(
        self, connector: JournalConnector, process: subprocess.Popen[bytes], folders: Folders
    ) -> None:
        self._connector = connector
        self._process = process
        self._folders = folders
        self._splitter = LineSplitter(max_bytes=MAX_ENTRY_BYTES)
        self._said = b""
        self._first = True
        self._calm = False

    def run(self, backoff: Backoff) -> str:
        """Read. Returns: why it ended."""
        started = time.monotonic()
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        out, err = self._process.stdout.fileno(), self._process.stderr.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(out, selectors.EVENT_READ)
            selector.register(err, selectors.EVENT_READ)
            while not self._connector.stopping:
                for key, _ in selector.select(POLL_S):
                    data = os.read(key.fd, READ_BYTES)
                    if not data:
                        selector.unregister(key.fd)
                    elif key.fd == err:
                        self._said = (self._said + data)[:MAX_COMPLAINT_BYTES]
                    else:
                        self._take(data, backoff)
                if _NO_JOURNAL.encode() in self._said:
                    return "there is no journal, or none that may be read here"
                if not selector.get_map():
                    return self._last_words()
                if self._connector.folders() != self._folders:
                    return "the journal is in another place now, or gone"
                if not self._calm and time.monotonic() - started > CALM_S:
                    self._now_calm(backoff)
        return "stopped"

    def _now_calm(self, backoff: Backoff) -> None:
        self._calm = True
        backoff.reset()
        self._connector.connected(self._hint())

    def _take(self, data: bytes, backoff: Backoff) -> None:
        # "-- No entries --" and the like are none.
        entries = [line for _, line in self._splitter.feed(data) if not line.startswith(b"--")]
        if entries and not self._calm:
            self._now_calm(backoff)
        if entries and self._first:
            self._first = False
            entries = self._connector.resumed(entries)
        if entries:
            self._connector.take(entries)

    def _hint(self) -> str:
        """What journalctl says about rights that are missing."""
        hint = "only messages of this user: add the user to the group systemd-journal"
        return f" ({hint})" if b"not seeing messages from other users" in self._said else ""

    def _last_words(self) -> str:
        try:
            status = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "journalctl closed its output"
        said = clean(self._said.decode(errors="replace")).strip().splitlines()
        return f"journalctl ended with {status}" + (f": {said[-1][:200]}" if said else "")


@contextlib.contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which ends with the block. (It ends when its output closes, too.)"""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env=_environment(),
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it holds nothing that could be lost


def _read_id(path: str) -> str:
    """An id of systemd: 32 hex digits. Raises: OSError."""
    return Path(path).read_text("ascii").strip().replace("-", "")


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"}


def template_fields(template: str) -> list[str]:
    """The journal's fields in a template.

    Raises: ValueError with what to do if it is none.
    """
    fields: list[str] = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if spec or conversion or not _is_field(name):
            raise ValueError("between braces stands the name of a field, as in {MESSAGE}")
        fields.append(name)
    if not fields:
        raise ValueError("name a field, as in {MESSAGE}")
    return fields


def _refused(data: bytes, origin: Origin, why: str) -> Line:
    return Line(data[: MAX_EVENT_BYTES + 1], -1, origin, "", why)


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        return _decode(line)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


def _text(value: Any) -> str:
    """A field as text: journalctl writes binary ones as numbers, and one that comes twice as a list."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list) and all(isinstance(part, int) and 0 <= part < 256 for part in value):
        return clean(bytes(value).decode(errors="replace"))
    if isinstance(value, list):
        return " ".join(filter(None, map(_text, value)))
    return ""


def _name(unit: str) -> str:
    """The name of a source for a unit: what names may not hold becomes a dash; "" for none.

    >>> _name("getty@tty1.service")
    'getty-tty1.service'
    """
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in unit.lower())
    return name.lstrip("._-")[:64]
