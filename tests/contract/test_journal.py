"""The journal through the real journalctl and real journal files; and where there is none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.config import ConfigError, load
from pipeline.decode import decode_event
from pipeline.events import Text
from pipeline.source_settings import JournalSource
from pipeline.sources import inbox as inbox_module
from pipeline.sources.inbox import SourceState
from pipeline.sources.journal import MAX_COMPLAINT_BYTES, JournalConnector, _Following
from tests.contract.world_journal import REMOTE, Journal
from tests.sources import Reader, reading

MISSING = [program for program in ("journalctl", REMOTE) if shutil.which(program) is None]
real = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow each other quickly."""
    monkeypatch.setattr("pipeline.sources.journal.Backoff", lambda: inbox_module.Backoff(0.05, 0.1))


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal(tmp_path)
    yield made
    made.close()


def follow(
    journal: Journal, positions: dict[str, bytes] | None = None, **settings: object
) -> JournalConnector:
    changed = msgspec.structs.replace(journal.settings, **settings)
    return JournalConnector("site", changed)


def texts(reader: Reader) -> list[str]:
    events = [decode_event(line.data) for line in reader.lines if not line.refused]
    return [event.text for event in events if isinstance(event, Text)]


def state_of(reader: Reader) -> SourceState:
    return reader.inbox.state(reader.connector)


def children() -> list[int]:
    """Processes that we started and that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "comm").read_text().strip()
            except OSError:
                continue
            if int(stat[1]) == os.getpid() and stat[0] != "Z" and command == "journalctl":
                found.append(int(entry.name))
    return found


# -- entries ----------------------------------------------------------------------------------------


@real
def test_an_entry_becomes_a_text_at_its_own_time(journal: Journal) -> None:
    journal.write(b"pump started")
    with reading(journal.connector()) as reader:
        reader.until_lines(1)
    (line,) = reader.lines
    event = decode_event(line.data)
    assert isinstance(event, Text)
    assert (event.text, event.source) == ("app: pump started", None)
    assert isinstance(event.ts, float)
    assert abs(event.ts - time.time()) < 60
    assert (line.origin.input, line.offset) == ("journal:site", -1)
    assert line.key == reader.positions["journal:site"].decode(), "an entry is known by its cursor"


@real
def test_messages_of_any_bytes_are_read(journal: Journal) -> None:
    journal.write(b"\xff\x00 \x1b[31mred\x1b[0m \xc3\xa9\nsecond line")
    journal.write(b"x" * 70_000)  # above the size to which journalctl shortens by default
    with reading(journal.connector()) as reader:
        reader.until_lines(2)
    assert texts(reader) == ["app: \ufffd red \u00e9\nsecond line", "app: " + "x" * 70_000]


@real
def test_a_message_that_no_event_can_hold_is_refused_and_stops_nothing(journal: Journal) -> None:
    journal.write(b"\xff" * 600_000)
    journal.write(b" ")
    journal.write(b"next")
    with reading(journal.connector()) as reader:
        reader.until(lambda: texts(reader) == ["app: next"])
    assert [bool(line.refused) for line in reader.lines] == [True, True, False]


@real
def test_units_identifiers_and_priority_choose(journal: Journal) -> None:
    journal.write(b"1", _SYSTEMD_UNIT="a.service")
    journal.write(b"2", _SYSTEMD_UNIT="b.service")
    journal.write(b"3", _SYSTEMD_UNIT="a.service", PRIORITY="7")
    journal.write(b"4", _SYSTEMD_UNIT="a.service", PRIORITY="3", SYSLOG_IDENTIFIER="other")
    with reading(follow(journal, units=("a.service",))) as reader:
        reader.until_lines(2)
        reader.settle(0.2)
        assert texts(reader) == ["app: 1", "other: 4"]
    with reading(follow(journal, identifiers=("other",), template="{MESSAGE} {PRIORITY} {NONE}")) as reader:
        reader.until_lines(1)
        reader.settle(0.2)
        assert texts(reader) == ["4 3 "]
    with reading(follow(journal, priority="debug")) as reader:
        reader.until_lines(4)


@real
def test_a_unit_can_be_the_source(journal: Journal) -> None:
    for unit in ("getty@tty1.service", "..", "../../etc/passwd.service", "Ünit.service"):
        journal.write(b"x", _SYSTEMD_UNIT=unit)
    with reading(follow(journal, unit_as_source=True)) as reader:
        reader.until_lines(4)
    sources = [decode_event(line.data).source for line in reader.lines]
    assert sources == ["getty-tty1.service", None, "etc-passwd.service", "nit.service"]


# -- where reading goes on --------------------------------------------------------------------------


@real
def test_the_first_start_begins_now_and_remembers_that_at_once(journal: Journal) -> None:
    """Killed before anything new came, the next start still begins there."""
    journal.write(b"old")
    journal.flush()
    first = follow(journal, since="now")
    with reading(first) as reader:
        reader.until(lambda: "journal:site" in reader.positions)
        assert reader.lines == []
    journal.write(b"new")
    with reading(follow(journal, since="now"), reader.positions) as again:
        again.until_lines(1)
        assert texts(again) == ["app: new"]
        assert "gaps" not in state_of(again).counts


@real
def test_the_first_start_is_remembered_where_nothing_fits_as_yet(journal: Journal) -> None:
    """A service that never logged has no cursor; its first message may come while we are killed."""
    journal.write(b"of another")
    journal.flush()
    with reading(follow(journal, since="now", units=("b.service",))) as reader:
        reader.until(lambda: "journal:site" in reader.positions)
    journal.write(b"new", _SYSTEMD_UNIT="b.service")
    with reading(follow(journal, since="now", units=("b.service",)), reader.positions) as again:
        again.until_lines(1)
        assert texts(again) == ["app: new"]
        assert "gaps" not in state_of(again).counts


@real
def test_what_was_written_before_a_reboot_is_not_left_out(journal: Journal) -> None:
    journal.write(b"1")
    with reading(journal.connector()) as reader:
        reader.until_lines(1)
    journal.write(b"2")
    journal.reboot()
    journal.write(b"3")
    with reading(journal.connector(), reader.positions) as again:
        again.until_lines(2)
    assert texts(again) == ["app: 2", "app: 3"]


@real
def test_a_cursor_that_was_vacuumed_is_a_gap(journal: Journal) -> None:
    journal.write(b"1")
    with reading(journal.connector()) as reader:
        reader.until_lines(1)
    journal.write(b"2")
    journal.vacuum()
    journal.write(b"3")
    with reading(journal.connector(), reader.positions) as again:
        again.until_lines(1)
    assert texts(again) == ["app: 3"]
    assert state_of(again).counts["gaps"] == 1


@real
def test_a_cursor_that_is_none_is_a_gap_too(journal: Journal) -> None:
    journal.write(b"1")
    with reading(journal.connector(), {"journal:site": b"junk"}) as reader:
        reader.until_lines(1)
        assert texts(reader) == ["app: 1"]
        assert state_of(reader).counts["gaps"] == 1


@real
def test_journalctl_that_is_killed_is_started_again_where_it_was(journal: Journal) -> None:
    with reading(journal.connector()) as reader:
        journal.write(b"1")
        reader.until_lines(1)
        reader.until(lambda: state_of(reader).connected is True)
        (process,) = children()
        os.kill(process, signal.SIGKILL)
        journal.write(b"2")
        reader.until_lines(2)
        reader.settle(0.3)
        assert texts(reader) == ["app: 1", "app: 2"]
        assert state_of(reader).counts == {"reconnects": 1}


# -- where there is none ----------------------------------------------------------------------------


def test_a_journalctl_that_is_missing_ends_nothing(tmp_path: Path) -> None:
    with reading(JournalConnector("site", JournalSource(), str(tmp_path / "journalctl"))) as reader:
        reader.until(lambda: state_of(reader).connected is False)
        assert "is not installed" in state_of(reader).detail
        reader.settle(0.3)
        assert not reader.inbox.drained
        assert reader.inbox.fault is None
        assert "reconnects" not in state_of(reader).counts, "it never was connected"


@real
def test_a_journal_that_comes_later_is_followed(tmp_path: Path) -> None:
    """Its folder is missing, then empty, then gone; then there are entries."""
    (tmp_path / "later").mkdir()
    wanted = tmp_path / "later" / "journal"
    with reading(JournalConnector("site", JournalSource(directory=str(wanted)))) as reader:
        reader.until(lambda: state_of(reader).connected is False)
        assert state_of(reader).detail
        wanted.mkdir()
        reader.until(lambda: state_of(reader).connected is True)
        wanted.rmdir()
        reader.until(lambda: state_of(reader).connected is False)
        journal = Journal(tmp_path / "later")
        journal.write(b"1")
        reader.until(lambda: state_of(reader).connected is True)
        journal.write(b"2")
        reader.until(lambda: "app: 2" in texts(reader))
        journal.close()


def scripted(tmp_path: Path, program: str, **settings: Any) -> JournalConnector:
    """A connector with another journalctl."""
    return JournalConnector(
        "site", JournalSource(directory=str(tmp_path), **{"since": "all", **settings}), program
    )


def script(tmp_path: Path, body: str) -> str:
    path = tmp_path / "journalctl"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_what_it_complains_is_shown_and_bounded(tmp_path: Path) -> None:
    program = script(tmp_path, "head -c 3000000 /dev/zero | tr '\\0' x >&2; echo >&2; exit 3")
    kept: list[int] = []
    watched = _Following._last_words

    def last_words(self: _Following) -> str:
        kept.append(len(self._said))
        return watched(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Following, "_last_words", last_words)
        with reading(scripted(tmp_path, program)) as reader:
            reader.until(lambda: "ended with 3" in state_of(reader).detail)
            assert len(state_of(reader).detail) < 300
    assert max(kept) <= MAX_COMPLAINT_BYTES


def test_stopping_ends_all_that_journalctl_started(tmp_path: Path) -> None:
    """Also where it does not listen to SIGTERM."""
    program = script(tmp_path, f"trap '' TERM; sleep 321 & echo $! > {tmp_path}/child; wait")
    reader = Reader(scripted(tmp_path, program))
    reader.until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text() != "")
    child = int((tmp_path / "child").read_text())
    started = time.monotonic()
    reader.stop()
    assert time.monotonic() - started < 1.0
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        if (Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split())[0] == "Z":
            break
        time.sleep(0.01)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_it_stops_within_a_second_while_the_newest_entry_is_looked_for(tmp_path: Path) -> None:
    """On a slow disk that may take long; nothing is committed then, and the next start looks again."""
    reader = Reader(scripted(tmp_path, script(tmp_path, f"touch {tmp_path}/began; sleep 321"), since="now"))
    reader.until((tmp_path / "began").exists)
    started = time.monotonic()
    reader.stop()
    assert time.monotonic() - started < 1.0
    reader.settle(0.1)
    assert reader.positions == {}
    assert reader.inbox.drained
    assert reader.inbox.fault is None


def test_output_that_is_no_entry_is_refused(tmp_path: Path) -> None:
    entry = json.dumps({"__CURSOR": "c", "MESSAGE": "x", "SYSLOG_IDENTIFIER": ["a", "b"]})
    program = script(
        tmp_path, f"echo 'not json'; echo '-- No entries --'; echo '[]'; echo '{entry}'; sleep 9"
    )
    with reading(scripted(tmp_path, program)) as reader:
        reader.until(lambda: bool(texts(reader)))
    assert texts(reader) == ["a b: x"]
    assert [line.data for line in reader.lines if line.refused] == [b"not json", b"[]"]


def test_an_entry_without_what_the_template_names_is_refused_as_it_came(tmp_path: Path) -> None:
    entry = json.dumps({"__CURSOR": "c", "MESSAGE": "x"})
    program = script(tmp_path, f"echo '{entry}'; sleep 9")
    with reading(scripted(tmp_path, program, template="{UNIT} ")) as reader:
        reader.until_lines(1)
    (line,) = reader.lines
    assert line.data == entry.encode()
    assert "fields" in line.refused


def test_a_boot_is_known_of_this_machine_only(tmp_path: Path) -> None:
    path = tmp_path / "edgewater.toml"
    journal = '{ directory = "remote", since = "boot" }'
    path.write_text(f'[[sources]]\nname = "j"\nkind = "journal"\njournal = {journal}\n')
    with pytest.raises(ConfigError, match=r"sources\[0\].journal.since"):
        load(path)


def test_its_template_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "edgewater.toml"
    for template in ("", "no field", "{message}", "{MESSAGE.__class__}", "{MESSAGE!r}", "{", "{0}", "{}"):
        path.write_text(
            '[[sources]]\nname = "j"\nkind = "journal"\n'
            f'[sources.journal]\ntemplate = "{template}"\nunits = [""]\n'
        )
        with pytest.raises(ConfigError) as error:
            load(path)
        assert [fault.dotted for fault in error.value.faults] == [
            "sources[0].journal.template",
            "sources[0].journal.units",
        ]


def test_its_folder_is_beside_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "edgewater.toml"
    path.write_text('[[sources]]\nname = "j"\nkind = "journal"\njournal = { directory = "remote" }\n')
    (source,) = load(path).sources
    assert source.journal is not None
    assert source.journal.directory == str(tmp_path / "remote")
