"""The learning report: the names that others rely on, and a table for people."""

from __future__ import annotations

import hashlib
import json
from array import array
from pathlib import Path

import msgspec
import pytest

from pipeline.report import build_report, format_report, write_report
from storage.folder import DataFolder
from storage.registry import Registry, UpdateRow, UpdateState, VersionRow
from storage.ring import Commit, Ring
from storage.samples import Samples
from storage.windows import OpenWindow

RESULT = {
    "base_bits_per_byte": 2.0, "active_bits_per_byte": 1.5, "held_out_before_bits_per_byte": 1.4,
    "held_out_after_bits_per_byte": 1.2, "anchor_delta_bits_per_token": 0.031, "scale": 1.0, "skipped": 3,
    "steps": 7, "trained_tokens": 20_480, "seconds": 17.2, "peak_rss_bytes": 910_000_000,
    "criteria": [{"name": "gain", "verdict": "passed"}], "kl_new_bits": 0.5,
    "by_source": {
        "cmms": {"samples": 200, "base": 2.0, "active": 1.4},
        "weather-1": {"samples": 100, "base": 1.0, "active": None},
    },
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path):
    opened = DataFolder.open(tmp_path / "data", create=True)
    yield opened
    opened.close()


def add_shard(folder: DataFolder, shard: str, count: int) -> bytes:
    """A ring of another shard that stored so many events. Returns: its digest."""
    samples = Samples(
        0, ["s"] * count, ["text"] * count, [""] * count, array("d", range(count)), array("I", [1] * count),
        array("I", range(count)), bytearray(b"\1") * count, bytes(16 * count),
    )  # fmt: skip
    with Ring.open_or_create(
        folder.ring / shard, shard=shard, tokenizer_id="00" * 8, max_bytes=1 << 20
    ) as ring:
        counters = {"events": count + 1, "samples": count, "duplicates": 1}
        window = OpenWindow(1, 0, count)
        ring.commit(Commit(samples=samples, stream_time=1.0, window=window, counters=counters))
        return ring.state.digest


def fill(folder: DataFolder, *rows: UpdateRow, active: int = 1) -> None:
    counters = {"events": 400, "samples": 350, "duplicates": 30, "suppressed": 15, "dead_letters": 5}
    window = OpenWindow(2, 300, 50, 500, 1.0)
    with Ring.open_or_create(
        folder.ring / "main", shard="main", tokenizer_id="00" * 8, max_bytes=1 << 20
    ) as ring:
        ring.commit(Commit(samples=Samples(), stream_time=1.0, window=window, counters=counters))
    with Registry.open_or_create(folder.registry) as registry, registry.write() as writer:
        for row in rows:
            for state in ("claimed", "staged", "evaluated", "promoted", "acknowledged"):
                writer.put_update(msgspec.structs.replace(row, state=UpdateState(state)))
                if state == row.state:
                    break
        for number in (1, 2):
            writer.put_version(
                VersionRow(number, f"v{number}-ab", number - 1, "main", number, "ab" * 32, "cd", 1.0)
            )
        writer.set_active(active)


def update(state: str = "acknowledged", **more: object) -> UpdateRow:
    row = UpdateRow(
        "main", 1, 1, 0, 299, 300, UpdateState(state), version=1, result=json.dumps(RESULT).encode()
    )
    return msgspec.structs.replace(row, **more)


def test_a_folder_without_anything_gives_an_empty_report(folder: DataFolder) -> None:
    report = build_report(folder)
    assert (report.events, report.windows, report.versions, report.ring_digest) == (0, [], [], "00" * 32)
    assert "0 events" in format_report(report)


def test_the_report_has_the_names_of_the_design(folder: DataFolder) -> None:
    """Written to the data folder as well; more names are welcome, these stay."""
    fill(folder, update())
    report = build_report(folder)
    write_report(folder, report)
    told = json.loads(folder.report.read_bytes())
    assert told == json.loads(msgspec.json.encode(report))
    counts = {"events": 400, "samples": 350, "duplicates": 30, "suppressed": 15, "dead_letters": 5}
    assert {name: told[name] for name in counts} == counts
    assert told["ring_digest"] == "00" * 32
    assert told["open_window_samples"] == 50
    (window,) = told["windows"]
    expected = {name: value for name, value in RESULT.items() if name != "kl_new_bits"}
    expected |= {
        "window": 1,
        "first_seq": 0,
        "last_seq": 299,
        "decision": "promoted",
        "reason": "",
        "version": 1,
    }
    assert {name: window[name] for name in expected} == expected
    assert [(v["version"], v["active"], v["sha256"]) for v in told["versions"]] == [
        (1, True, "ab" * 32), (2, False, "ab" * 32),
    ]  # fmt: skip


def test_an_update_under_way_shows_its_state_and_no_scores(folder: DataFolder) -> None:
    fill(folder, update("claimed", version=0))
    (window,) = build_report(folder).windows
    assert (window.decision, window.base_bits_per_byte) == ("claimed", None)


def test_a_window_that_was_not_promoted_tells_why(folder: DataFolder) -> None:
    fill(folder)
    with Registry.open_or_create(folder.registry) as registry, registry.write() as writer:
        writer.put_update(update("expired", version=0, result=b"", reason="evicted before its turn"))
    report = build_report(folder)
    assert (report.windows[0].decision, report.windows[0].reason) == ("expired", "evicted before its turn")
    assert "evicted before its turn" in format_report(report)


def test_the_table_has_a_line_a_window_and_one_a_source(folder: DataFolder) -> None:
    fill(folder, update(), active=2)
    lines = format_report(build_report(folder)).splitlines()
    assert lines[0] == "400 events: 350 samples, 30 duplicates, 15 suppressed, 5 dead letters"
    whole = next(line for line in lines if line.split()[:1] == ["1"])
    assert whole.split() == [
        "1", "all", "300", "2.000", "1.500", "0.75", "1.400>1.200", "+0.031", "promoted", "v1", "20480", "17",
    ]  # fmt: skip
    at = lines.index(whole)
    assert lines[at + 1].split() == ["cmms", "200", "2.000", "1.400", "0.70"]
    assert lines[at + 2].split() == ["weather-1", "100", "1.000", "-", "-"]
    assert [line.split()[-1] for line in lines if line.startswith("  v")] == ["ab" * 8, "active"]


def test_a_window_of_one_source_needs_one_line(folder: DataFolder) -> None:
    result = {**RESULT, "by_source": {"cmms": {"samples": 300, "base": 2.0, "active": 1.5}}}
    fill(folder, update(result=json.dumps(result).encode()))
    lines = format_report(build_report(folder)).splitlines()
    assert [line.split()[1] for line in lines if line.split()[:1] == ["1"]] == ["cmms"]
    assert not any(line.split()[:1] == ["cmms"] for line in lines)


def test_totals_are_of_all_shards_and_each_is_told(folder: DataFolder) -> None:
    fill(folder, update())
    second, tenth = add_shard(folder, "shard-2", 7), add_shard(folder, "shard-10", 3)
    report = build_report(folder)
    assert (report.events, report.samples, report.duplicates) == (412, 360, 32)
    assert report.open_window_samples == 60
    assert [(shard.shard, shard.samples) for shard in report.shards] == [
        ("main", 350), ("shard-2", 7), ("shard-10", 3),
    ]  # fmt: skip
    assert report.shards[1].ring_digest == second.hex()
    parts = (b"main", bytes(32)), (b"shard-2", second), (b"shard-10", tenth)
    whole = hashlib.blake2b(b"".join(name + b"\0" + digest for name, digest in parts), digest_size=32)
    assert report.ring_digest == whole.hexdigest()
    text = format_report(report)
    assert "shard-2: 8 events, 7 samples, 7 in the open window" in text


def test_a_window_names_its_shard_where_there_are_several(folder: DataFolder) -> None:
    """Each shard numbers its own."""
    other = update(shard="shard-2")
    fill(folder, update(), other)
    alone = format_report(build_report(folder))
    assert "main/1" not in alone
    add_shard(folder, "shard-2", 7)
    report = build_report(folder)
    assert [(window.shard, window.window) for window in report.windows] == [("main", 1), ("shard-2", 1)]
    lines = format_report(report).splitlines()
    rows = [line for line in lines if "/1 " in line]
    assert [row.split()[0] for row in rows if "cmms" not in row][:2] == ["main/1", "shard-2/1"]
    head = next(line for line in lines if "decision" in line)
    row = next(line for line in lines if line.lstrip().startswith("shard-2/1"))
    assert row.index("promoted") == head.index("decision"), "columns stay below their heads"
