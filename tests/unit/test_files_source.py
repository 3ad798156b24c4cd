"""Files: followed through every way that logs are rotated, resumed where they were committed."""

from __future__ import annotations

import os
import shutil
import threading
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from pipeline.events import MAX_EVENT_BYTES
from pipeline.sources import files as files_module
from pipeline.sources.files import FilesConnector
from pipeline.sources.reach import Reach
from tests.sources import Reader, reading


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "POLL_S", 0.02)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "app.log"


def numbered(first: int, last: int) -> list[bytes]:
    """Lines that tell where they were written."""
    return [b'{"line":%d}' % n for n in range(first, last + 1)]


def append(path: Path, lines: list[bytes], end: bytes = b"\n") -> None:
    with path.open("ab") as file:
        file.write(b"".join(line + end for line in lines))


def follow(pattern: Path | str, positions: dict[str, bytes] | None = None, *, finite: bool = False):
    return reading(FilesConnector("site", str(pattern), finite=finite), positions or {})


def row(reader: Reader, path: Path) -> bytes:
    return reader.positions[f"files:site:{path}"]


# -- reading ----------------------------------------------------------------------------------------


def test_lines_are_followed_as_they_are_written(log: Path) -> None:
    """Also into a file that was not there at first, and one line in two halves."""
    with follow(log) as reader:
        reader.settle(0.1)
        append(log, numbered(1, 3))
        assert reader.until_lines(3) == numbered(1, 3)
        append(log, [b'{"li'], b"")
        assert reader.settle(0.2) == numbered(1, 3)
        append(log, [b'ne":4}'])
        assert reader.until_lines(4) == numbered(1, 4)
        assert [line.offset for line in reader.lines] == [0, 11, 22, 33]


def test_a_pattern_reads_all_files_that_match_and_those_that_come(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    append(tmp_path / "a" / "x.jsonl", numbered(1, 1))
    with follow(f"{tmp_path}/**/*.jsonl") as reader:
        reader.until_lines(1)
        (tmp_path / "b" / "c").mkdir(parents=True)
        append(tmp_path / "b" / "c" / "y.jsonl", numbered(2, 2))
        append(tmp_path / "b" / "other.txt", numbered(3, 3))
        assert reader.until_lines(2) == numbered(1, 2)
        assert reader.settle(0.1) == numbered(1, 2)


def test_a_finite_run_takes_the_last_line_without_its_end(log: Path) -> None:
    append(log, numbered(1, 2))
    append(log, numbered(3, 3), b"")
    with follow(log, finite=True) as reader:
        assert reader.to_end() == numbered(1, 3)


def test_following_waits_for_the_end_of_the_last_line(log: Path) -> None:
    append(log, numbered(1, 1))
    append(log, numbered(2, 2), b"")
    with follow(log) as reader:
        reader.until_lines(1)
        assert reader.settle(0.2) == numbered(1, 1)


def test_a_line_that_is_still_being_written_is_left_for_the_next_run(log: Path) -> None:
    """`run --once` from a timer meets half a line: it is neither lost nor cut in two."""
    append(log, numbered(1, 1))
    with log.open("ab") as file:
        file.write(b'{"line":')
    with follow(log, finite=True) as reader:
        assert reader.to_end() == numbered(1, 1)
        positions = dict(reader.positions)
    with log.open("ab") as file:
        file.write(b"2}\n")
    with follow(log, positions, finite=True) as reader:
        assert reader.to_end() == numbered(2, 2)


def test_windows_line_ends_and_invalid_utf8_come_as_they_are(log: Path) -> None:
    log.write_bytes(b"one\r\n\r\n\xff\xfe\x00two\r\nthree\n")
    with follow(log, finite=True) as reader:
        assert reader.to_end() == [b"one", b"\xff\xfe\x00two", b"three"]
        assert [line.offset for line in reader.lines] == [0, 7, 15]


def test_an_overlong_line_costs_no_memory_and_the_next_line_is_read(log: Path) -> None:
    with log.open("wb") as file:
        for _ in range(40):
            file.write(b"a" * (1 << 20))
        file.write(b"\nnext\n")
    tracemalloc.start()
    with follow(log, finite=True) as reader:
        found = reader.to_end()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [len(line) for line in found] == [MAX_EVENT_BYTES + 1, 4]
    assert reader.lines[1].offset == (40 << 20) + 1
    assert peak < 4 << 20


def test_what_is_no_file_is_left_alone(tmp_path: Path, log: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder and a pipe that match: said once, never waited for, and the file beside them is read."""
    (tmp_path / "app.dir").mkdir()
    os.mkfifo(tmp_path / "app.fifo")
    append(log, numbered(1, 1))
    with follow(f"{tmp_path}/app.*") as reader:
        assert reader.until_lines(1) == numbered(1, 1)
        reader.settle(0.3)
    assert sum("app.fifo cannot be read" in record.getMessage() for record in caplog.records) == 1


def test_names_that_are_long_or_not_utf8_become_input_names_that_can_be_stored(tmp_path: Path) -> None:
    """LMDB keys have at most 511 bytes, and a name in the ring must be text."""
    deep = tmp_path
    for part in ("x" * 200, "y" * 200, "z" * 200):
        deep = deep / part
    deep.mkdir(parents=True)
    paths = [deep / "a.log", deep / "b.log", tmp_path / os.fsdecode(b"\xff.log")]
    for n, path in enumerate(paths):
        append(path, numbered(n, n))
    with follow(f"{tmp_path}/**/*.log", finite=True) as reader:
        assert sorted(reader.to_end()) == numbered(0, 2)
    names = list(reader.positions)
    assert len(set(names)) == 3
    assert all(len(name.encode()) < 500 for name in names)
    with follow(f"{tmp_path}/**/*.log", reader.positions, finite=True) as again:
        assert again.to_end() == []


def test_many_files_do_not_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number, files that wait are closed; they are read on when they grow."""
    monkeypatch.setattr(files_module, "MAX_OPEN", 3)
    paths = [tmp_path / f"{n}.log" for n in range(10)]
    for n, path in enumerate(paths):
        append(path, numbered(n, n))
    connector = FilesConnector("site", f"{tmp_path}/*.log")
    with reading(connector) as reader:
        assert sorted(reader.until_lines(10)) == numbered(0, 9)
        for path in paths:
            append(path, [b"more"])
        assert reader.until_lines(20)[10:] == [b"more"] * 10
        assert len(connector._tails) <= 3


# -- rotation, live ---------------------------------------------------------------------------------


def test_a_rename_rotation_is_followed_in_order(log: Path) -> None:
    """Lines that the writer adds to the old file after the rename are read before the new file's."""
    append(log, numbered(1, 3))
    with follow(log) as reader:
        reader.until_lines(3)
        writer = log.open("ab", buffering=0)
        log.rename(log.with_suffix(".log.1"))
        writer.write(b'{"line":4}\n')
        log.touch()
        reader.settle(0.2)
        writer.write(b'{"line":5}\n')  # it still has the old one: the new one is empty
        assert reader.until_lines(5) == numbered(1, 5)
        writer.write(b'{"line":6}')  # without a line end: nobody will complete it
        writer.close()
        append(log, numbered(7, 8))
        assert reader.until_lines(8) == numbered(1, 8)


def test_a_rotated_file_that_still_matches_is_not_read_again(tmp_path: Path, log: Path) -> None:
    """Through two rotations, the pattern matching every generation."""
    append(log, numbered(1, 2))
    with follow(f"{tmp_path}/app.log*") as reader:
        reader.until_lines(2)
        for generation in (1, 2):
            if generation == 2:
                (tmp_path / "app.log.1").rename(tmp_path / "app.log.2")
            log.rename(tmp_path / "app.log.1")
            append(log, numbered(2 * generation + 1, 2 * generation + 2))
            reader.until_lines(2 * generation + 2)
        assert reader.settle(0.2) == numbered(1, 6)
        append(tmp_path / "app.log.2", [b"late"])
        assert reader.until_lines(7)[6:] == [b"late"]
    with follow(f"{tmp_path}/app.log*", reader.positions, finite=True) as again:
        assert again.to_end() == []


def test_a_file_renamed_before_its_first_line_was_whole_is_followed(tmp_path: Path, log: Path) -> None:
    with follow(f"{tmp_path}/app.log*") as reader:
        append(log, [b'{"line":'], b"")
        reader.settle(0.1)
        log.rename(tmp_path / "app.log.1")
        append(log, numbered(2, 2))
        assert reader.until_lines(1) == numbered(2, 2)
        append(tmp_path / "app.log.1", [b"1}"])
        assert reader.until_lines(2)[1:] == numbered(1, 1)


def test_a_truncated_file_is_read_from_its_start(log: Path) -> None:
    append(log, numbered(1, 3))
    with follow(log) as reader:
        reader.until_lines(3)
        log.write_bytes(b'{"line":4}\n')
        assert reader.until_lines(4) == numbered(1, 4)
        assert reader.lines[3].offset == 0


def test_a_truncated_file_that_grew_past_the_position_is_read_from_its_start(log: Path) -> None:
    """Between two looks: its size tells nothing, its head does."""
    append(log, numbered(1, 2))
    with follow(log) as reader:
        reader.until_lines(2)
        log.write_bytes(b"".join(line + b"\n" for line in numbered(3, 9)))
        assert reader.until_lines(9) == numbered(1, 9)


def test_what_copytruncate_took_away_is_read_from_the_copy(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines that came between our last look and the truncation are in the copy alone."""
    append(log, numbered(1, 3))
    with follow(log) as reader:
        reader.until_lines(3)
        looks = threading.Event()
        whole = FilesConnector._sweep
        monkeypatch.setattr(FilesConnector, "_sweep", lambda self: looks.is_set() and whole(self))
        reader.settle(0.1)
        append(log, numbered(4, 5))
        shutil.copy(log, log.with_suffix(".log.1"))
        log.write_bytes(b"")
        append(log, numbered(6, 7))
        looks.set()
        assert reader.until_lines(7) == numbered(1, 7)
        append(log, numbered(8, 8))
        assert reader.until_lines(8) == numbered(1, 8)


def test_the_same_line_at_the_same_offset_of_new_content_is_told_apart(log: Path) -> None:
    """A reading without time or id is known by its position: that must name the content too."""
    same = [b'{"kind":"reading","values":{"p":1}}']
    append(log, same)
    with follow(log) as reader:
        reader.until_lines(1)
        log.rename(log.with_suffix(".log.1"))
        append(log, same)
        reader.until_lines(2)
        log.write_bytes(b"")
        reader.settle(0.1)
        append(log, same)
        assert reader.until_lines(3) == same * 3
    assert {line.offset for line in reader.lines} == {0}
    assert len({line.origin.began for line in reader.lines}) == 3


def test_a_deleted_file_is_read_to_its_end_and_forgotten(log: Path) -> None:
    """Its position is taken out of the ring, or files with names of their own would fill it in the end."""
    append(log, numbered(1, 1))
    connector = FilesConnector("site", str(log))
    with reading(connector) as reader:
        reader.until_lines(1)
        with log.open("ab", buffering=0) as writer:
            writer.write(b'{"line":2}\n')
            log.unlink()
            assert reader.until_lines(2) == numbered(1, 2)
        reader.until(lambda: not reader.positions)
        reader.until(lambda: not connector._tails)
        append(log, numbered(3, 3))
        assert reader.until_lines(3) == numbered(1, 3)


# -- restart ----------------------------------------------------------------------------------------


def committed(pattern: Path | str, count: int) -> dict[str, bytes]:
    with follow(pattern) as reader:
        reader.until_lines(count)
        return dict(reader.positions)


def test_a_restart_goes_on_at_the_committed_position(log: Path) -> None:
    append(log, numbered(1, 3))
    positions = committed(log, 3)
    append(log, numbered(4, 5))
    with follow(log, positions) as reader:
        assert reader.until_lines(2) == numbered(4, 5)
        assert reader.lines[0].offset == 33


@pytest.mark.parametrize("step", ["renamed", "created", "written"])
def test_a_restart_between_the_steps_of_a_rotation_loses_nothing(log: Path, step: str) -> None:
    append(log, numbered(1, 3))
    positions = committed(log, 3)
    append(log, numbered(4, 5))
    log.rename(log.with_suffix(".log.1"))
    if step == "created":
        log.touch()
    if step == "written":
        append(log, numbered(6, 7))
    with follow(log, positions) as reader:
        if step == "renamed":  # nothing is under its name: it waits for the successor
            assert reader.settle(0.1) == []
        if step != "written":
            append(log, numbered(6, 7))
        assert reader.until_lines(4) == numbered(4, 7)
        assert reader.settle(0.1) == numbered(4, 7)


@pytest.mark.parametrize("finite", [False, True])
def test_a_restart_after_two_rotations_reads_each_generation_once(
    tmp_path: Path, log: Path, finite: bool
) -> None:
    """The pattern matches all: what was read is known by the file, not by its name."""
    append(log, numbered(1, 2))
    positions = committed(f"{tmp_path}/app.log*", 2)
    append(log, numbered(3, 3))
    log.rename(tmp_path / "app.log.2")
    append(tmp_path / "app.log.1", numbered(4, 5))
    append(log, numbered(6, 7))
    with follow(f"{tmp_path}/app.log*", positions, finite=finite) as reader:
        found = reader.to_end() if finite else reader.until_lines(5)
        assert sorted(found) == numbered(3, 7)
        assert found.index(b'{"line":3}') < found.index(b'{"line":6}')
        reader.settle(0.1)
    with follow(f"{tmp_path}/app.log*", reader.positions, finite=True) as again:
        assert again.to_end() == []


def test_files_that_changed_their_names_with_each_other_are_known(tmp_path: Path) -> None:
    one, two = tmp_path / "1.log", tmp_path / "2.log"
    append(one, numbered(1, 3))
    append(two, numbered(4, 5))
    positions = committed(f"{tmp_path}/*.log", 5)
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    append(one, [b"in two"])
    with follow(f"{tmp_path}/*.log", positions) as reader:
        assert reader.until_lines(1) == [b"in two"]
        assert reader.settle(0.1) == [b"in two"]


def test_a_file_truncated_while_we_were_away_is_drained_from_its_copy(log: Path) -> None:
    append(log, numbered(1, 3))
    positions = committed(log, 3)
    append(log, numbered(4, 5))
    shutil.copy(log, log.with_suffix(".log.1"))
    log.write_bytes(b"".join(line + b"\n" for line in numbered(6, 9)))
    with follow(log, positions) as reader:
        assert reader.until_lines(6) == numbered(4, 9)
        append(log, numbered(10, 10))
        assert reader.until_lines(7) == numbered(4, 10)
    with follow(log, reader.positions, finite=True) as again:
        assert again.to_end() == []


def test_a_restored_backup_is_not_read_again(log: Path) -> None:
    """Another inode, the same content: also a new container layer does this."""
    append(log, numbered(1, 3))
    positions = committed(log, 3)
    log.rename(log.with_suffix(".old"))
    shutil.copy(log.with_suffix(".old"), log)
    log.with_suffix(".old").unlink()
    append(log, numbered(4, 4))
    with follow(log, positions) as reader:
        assert reader.until_lines(1) == numbered(4, 4)


def test_a_file_replaced_by_another_is_read_from_its_start(
    log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    append(log, numbered(1, 3))
    positions = committed(log, 3)
    log.unlink()
    append(log, numbered(5, 9))
    with follow(log, positions) as reader:
        assert reader.until_lines(5) == numbered(5, 9)
    assert "is gone" in caplog.text


def test_a_file_that_cannot_be_opened_for_a_while_keeps_its_position(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(log, numbered(1, 3))
    positions = committed(log, 3)
    append(log, numbered(4, 4))
    real = os.open

    def refuse(path: object, *rest: int) -> int:
        if str(path) == str(log):
            raise PermissionError(13, "Permission denied")
        return real(path, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, follow(log, positions) as reader:
        patch.setattr(os, "open", refuse)
        reader.settle(0.2)
        patch.undo()
        assert reader.until_lines(1) == numbered(4, 4)


# -- zstd -------------------------------------------------------------------------------------------


def packed(lines: list[bytes], end: bytes = b"\n") -> bytes:
    return zstandard.ZstdCompressor().compress(b"".join(line + end for line in lines))


def test_a_packed_file_is_read_once_and_again_when_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packed(numbered(1, 2)))
    with follow(path) as reader:
        assert reader.until_lines(2) == numbered(1, 2)
        with path.open("ab") as file:
            file.write(packed(numbered(3, 4)))
        assert reader.until_lines(4) == numbered(1, 4)
    with follow(path, reader.positions, finite=True) as again:
        assert again.to_end() == []


def test_a_packed_file_made_empty_first_is_not_taken_for_a_plain_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.touch()
    with follow(path) as reader:
        reader.settle(0.1)
        path.write_bytes(packed(numbered(1, 2)))
        assert reader.until_lines(2) == numbered(1, 2)


def test_a_packed_file_still_being_copied_is_not_cut_in_a_line(tmp_path: Path) -> None:
    """Every prefix of it appears; each line comes once and whole."""
    lines = [b'{"line":%d,"x":"%s"}' % (n, os.urandom(40).hex().encode()) for n in range(60)]
    whole = b"\n".join(lines)
    pack = zstandard.ZstdCompressor().compress
    data = b"".join(pack(whole[start : start + 700]) for start in range(0, len(whole), 700))
    path = tmp_path / "a.jsonl.zst"
    with follow(path) as reader:
        for start in range(0, len(data), 400):
            append(path, [data[start : start + 400]], b"")
            reader.settle(0.05)
        assert reader.until_lines(60) == lines


def test_a_damaged_packed_file_stops_a_finite_run_and_not_a_daemon(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    good = packed(numbered(1, 2))
    path.write_bytes(good + b"\x00 this is no frame \x00\x01\x02\x03")
    append(tmp_path / "b.jsonl", numbered(3, 3))
    with follow(f"{tmp_path}/*.jsonl*") as reader:
        assert reader.until_lines(1) == numbered(3, 3)
        path.write_bytes(good + packed(numbered(4, 4)))
        assert reader.until_lines(4)[1:] == [*numbered(1, 2), *numbered(4, 4)]
    path.write_bytes(good + b"\x00 this is no frame \x00\x01\x02\x03")
    with follow(path, finite=True) as finite:
        for _ in range(500):
            if finite.inbox.drained:
                break
            finite.take()
        assert "damaged after" in str(finite.inbox.fault)


def test_a_pattern_of_any_depth_enters_no_links(tmp_path: Path) -> None:
    """Whoever may write there could else have us list the whole disk."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "x.log").write_bytes(b"1\n")
    (tmp_path / "in" / "sub" / ".x.log").write_bytes(b"hidden\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.log").write_bytes(b"secret\n")
    (tmp_path / "in" / "loop").symlink_to(".")
    (tmp_path / "in" / "out").symlink_to(tmp_path / "out")
    for pattern in ("**/*.log", "**/x.log", "*/x.log", "**"):
        found, _ = Reach(f"{tmp_path}/in/{pattern}").files()
        assert [*found.values()] == [f"{tmp_path}/in/sub/x.log"]
    with follow(f"{tmp_path}/in/**/*.log", finite=True) as reader:
        assert reader.to_end() == [b"1"]
