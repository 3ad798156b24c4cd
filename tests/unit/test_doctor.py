"""`doctor` on a data folder: what it finds offline and live, and what `--repair` makes of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import doctor
from pipeline.doctor import Finding
from pipeline.settings import Config, IngestSettings, RingSettings, Source
from pipeline.units import Size
from storage.errors import LockHeldError
from storage.folder import DataFolder
from storage.opening import opened_ring
from storage.pages import PageFile, items, newest_meta, read_metas
from storage.registry import Registry
from storage.ring import Ring
from storage.ring_writer import BLOCKS, seq_of
from tests.crash.plan import MAP_BYTES, SHARD, TOKENIZER, Plan

PLAN = Plan(3, 12)


@pytest.fixture
def data(tmp_path: Path) -> Iterator[DataFolder]:
    folder = DataFolder.open(tmp_path / "data", create=True)
    with opened_ring(folder, shard=SHARD, tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES) as ring:
        for number in range(1, 13):
            ring.commit(PLAN.commit(number))
    Registry.open_or_create(folder.registry).close()
    yield folder
    folder.close()


def config(data: DataFolder, processes: int = 1) -> Config:
    """A configuration of that data folder, with a source for each ingest process."""
    sources = tuple(Source(name=f"s{number}", kind="stdin") for number in range(processes))
    return Config(
        data_dir=data.path, ring=RingSettings(max_bytes=Size(MAP_BYTES)), sources=sources,
        ingest=IngestSettings(processes=processes),
    )  # fmt: skip


def look(data: DataFolder) -> list[Finding]:
    return list(doctor._folder(config(data)))


def break_block(data: DataFolder) -> int:
    """Flip a bit in the largest block. Returns: its first seq."""
    path = data.ring / SHARD / "data.mdb"
    with PageFile(path) as file:
        meta = newest_meta(read_metas(file)[0])
        rows = list(items(file, meta.main.root, last_page=meta.last_page))
    block = max((item for item in rows if item.key[:1] == BLOCKS), key=lambda item: item.size)
    flip(path, block.at + block.size // 2)
    return seq_of(block.key)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def wrong(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "wrong"]


def test_a_healthy_folder_at_rest_and_in_use_is_right(data: DataFolder) -> None:
    assert {finding.level for finding in look(data)} == {"right"}
    assert any("at rest" in finding.words for finding in look(data))
    with data.lock(f"ingest-{SHARD}"):
        findings = look(data)
    assert {finding.level for finding in findings} == {"right"}
    assert any("while Edgewater runs" in finding.words for finding in findings)


def test_a_damaged_block_is_named_with_what_to_do(data: DataFolder) -> None:
    seq = break_block(data)
    (finding,) = wrong(look(data))
    assert (finding.what, str(seq) in finding.words) == ("block", True)
    assert "--repair" in finding.words


def test_a_file_that_would_crash_lmdb_is_only_looked_at(data: DataFolder) -> None:
    """The root page's first child is a page far outside of the file."""
    path = data.ring / SHARD / "data.mdb"
    with PageFile(path) as file:
        meta = newest_meta(read_metas(file)[0])
    with path.open("r+b") as file_:
        file_.seek(meta.main.root * 4096 + 4096 - 60)
        file_.write(b"\xff" * 60)
    findings = wrong(look(data))
    assert findings
    assert all("--repair" in finding.words for finding in findings)


def test_repair_puts_blanks_in_and_says_so(data: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    break_block(data)
    context: Any = SimpleNamespace(load=lambda *more, **options: config(data))
    monkeypatch.setattr(doctor, "examine", lambda context: look(data))
    data.close()
    findings = doctor.repair(context)
    assert findings[0].what == "repaired"
    assert "are lost" in findings[0].words
    assert wrong(findings) == []
    assert any("were lost to damage" in finding.words for finding in findings)


def test_repair_is_refused_while_ingest_runs(data: DataFolder) -> None:
    context: Any = SimpleNamespace(load=lambda *more, **options: config(data))
    with data.lock(f"ingest-{SHARD}"), pytest.raises(LockHeldError, match="stop it first"):
        doctor.repair(context)


def test_nothing_to_mend_is_said(data: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    context: Any = SimpleNamespace(load=lambda *more, **options: config(data))
    monkeypatch.setattr(doctor, "examine", lambda context: [])
    assert [finding.words for finding in doctor.repair(context)] == ["there was nothing to mend"]


def test_a_stray_file_is_a_warning(data: DataFolder) -> None:
    (data.path / "notes.txt").write_text("mine")
    findings = [finding for finding in look(data) if finding.level != "right"]
    assert [(finding.level, finding.what) for finding in findings] == [("warning", "stray")]


def test_every_ring_is_looked_at_and_one_that_nobody_writes_is_named(data: DataFolder) -> None:
    """After ingest.processes was lowered the other ring stays: it is nobody's error."""
    with Ring.open_reader(data.ring / SHARD) as ring:
        key = ring.header.dedup_key
    with opened_ring(data, shard="shard-2", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES, dedup_key=key):
        pass

    def told(processes: int) -> list[Finding]:
        return [found for found in doctor._folder(config(data, processes)) if "ring" in found.what]

    assert [(found.level, found.what) for found in told(2)] == [
        ("right", "ring main"),
        ("right", "ring shard-2"),
    ]
    one = told(1)
    assert {found.level for found in one} == {"right"}
    assert "no ingest process of this configuration writes it" in one[-1].words
    (data.ring / "shard-2" / "data.mdb").chmod(0o666)
    assert [found.what for found in doctor._folder(config(data, 2)) if found.level == "wrong"]


def test_rings_that_cannot_recognize_each_others_samples_are_a_warning(data: DataFolder) -> None:
    with opened_ring(data, shard="shard-2", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES):
        pass
    (found,) = (found for found in doctor._folder(config(data, 2)) if found.what == "rings")
    assert (found.level, "secrets of their own" in found.words) == ("warning", True)


def test_a_process_without_a_source_is_a_warning() -> None:
    sources = (Source(name="a", kind="stdin"),)
    three = Config(sources=sources, ingest=IngestSettings(processes=2))
    found = {finding.what: finding for finding in doctor._sources(three)}
    assert (found["ingest process 1"].level, found["ingest process 1"].words) == ("right", "reads a")
    assert found["ingest process 2"].level == "warning"


@pytest.mark.parametrize("role", ["ingest-shard-2", "source-a.b", "trainer"])
def test_whoever_holds_a_role_is_seen_without_taking_it(data: DataFolder, role: str) -> None:
    """Taking it for a moment would refuse a process that starts just then."""
    assert not doctor._running(data)
    with data.lock(role):
        assert data.holder(role) == os.getpid()
        assert doctor._running(data)
    assert data.holder(role) is None
    assert not doctor._running(data)
