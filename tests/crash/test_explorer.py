"""The tools that simulate power cuts: what the recorder refuses, and which states come out of what it saw."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.crash.audit import Violation
from tests.crash.explore import REPOSITORY, explore
from tests.crash.recorder import load, record, strace_problem
from tests.crash.recording import Recording, RecordingError, Write
from tests.crash.states import CrashStates

_PROBLEM = strace_problem()
pytestmark = pytest.mark.skipif(bool(_PROBLEM), reason=_PROBLEM or "strace works")


def run(tmp_path: Path, code: str, before: bytes | None = None) -> Recording:
    """Record a program; FILE names a file in the folder, ROOT the folder, both in its own words."""
    root = tmp_path / "root"
    root.mkdir()
    if before is not None:
        (root / "file").write_bytes(before)
    code = f"import os\nROOT, FILE = {str(root)!r}, {str(root / 'file')!r}\n{code}"
    return record([sys.executable, "-c", code], tmp_path, cwd=REPOSITORY)


def outcomes(recording: Recording, tmp_path: Path, states: int = 400) -> set[tuple[str, bytes | None]]:
    """Every (last line said, content of the file) that the explorer makes of a recording."""
    explorer, said, found = CrashStates(recording, 1), ["", *recording.said()], set()
    for state in explorer.build(list(range(states))):
        folder = tmp_path / f"state-{state.index}"
        explorer.write(state, folder)
        file = folder / "file"
        found.add((said[state.heard], file.read_bytes() if file.exists() else None))
    return found


OVERWRITE = """
fd = os.open(FILE, os.O_WRONLY{flags})
os.pwrite(fd, b"A" * 512 + b"B" * 512, 0)
os.write(1, b"written\\n")
{sync}
os.write(1, b"synced\\n")
"""
OLD = b"-" * 1_024
PIECES = {OLD, b"A" * 512 + b"-" * 512, b"-" * 512 + b"B" * 512, b"A" * 512 + b"B" * 512}
NEW = b"A" * 512 + b"B" * 512


def test_an_unsynced_write_leaves_any_subset_of_its_sectors_and_a_synced_one_all(tmp_path: Path):
    """Before the fsync returns every mixture of sectors is there, after it only the new bytes."""
    recording = run(tmp_path, OVERWRITE.format(flags="", sync="os.fsync(fd)"), OLD)
    found = outcomes(recording, tmp_path)
    assert {content for said, content in found if said == "written"} == PIECES
    assert {content for said, content in found if said == "synced"} == {NEW}


def test_a_write_through_o_dsync_may_be_torn_while_it_runs_and_is_durable_when_it_returns(tmp_path: Path):
    """LMDB writes its meta pages so."""
    recording = run(tmp_path, OVERWRITE.format(flags=" | os.O_DSYNC", sync=""), OLD)
    found = outcomes(recording, tmp_path)
    assert {content for said, content in found if said == ""} == PIECES
    assert {content for said, content in found if said == "written"} == {NEW}


def test_a_name_may_be_lost_until_its_folder_is_synced_however_durable_the_file_is(tmp_path: Path):
    """And a durable name may name a file without content where only the folder was synced."""
    code = """
fd = os.open(FILE, os.O_WRONLY | os.O_CREAT)
os.write(fd, b"whole")
os.fsync(fd)
os.write(1, b"file\\n")
os.fsync(os.open(ROOT, os.O_RDONLY))
os.write(1, b"folder\\n")
os.write(fd, b" more")
os.write(1, b"more\\n")
"""
    found = outcomes(run(tmp_path, code), tmp_path)
    assert {content for said, content in found if said == ""} == {None, b"", b"\0" * 5, b"whole"}
    assert {content for said, content in found if said == "file"} == {None, b"whole"}
    # A file may have grown over zeros, and its old size hides new bytes that are there.
    grown = {b"whole", b"whole more", b"whole" + b"\0" * 5}
    assert {content for said, content in found if said == "folder"} == grown
    assert {content for said, content in found if said == "more"} == grown


def test_the_same_seed_and_index_is_the_same_state_however_many_are_built(tmp_path: Path):
    """A failure can be looked at again alone."""
    recording = run(tmp_path, OVERWRITE.format(flags="", sync="os.fsync(fd)"), OLD)
    many = {state.index: state for state in CrashStates(recording, 7).build(list(range(50)))}
    for index in (0, 13, 49):
        (alone,) = CrashStates(recording, 7).build([index])
        assert alone == many[index]
    (other,) = CrashStates(load(tmp_path), 7).build([13])
    assert other == many[13]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "import mmap\nfd = os.open(FILE, os.O_RDWR)\nmmap.mmap(fd, 1024)[0] = 1",
            "written through a shared map",
        ),
        ("if os.fork():\n    os.wait()\nelse:\n    open(FILE, 'w')", "starts another process"),
        ("os.truncate(FILE, 3)", "does not follow truncate"),
        ("os.chmod(FILE, 0o640)", "does not follow"),
        ("os.symlink(FILE, ROOT + '/link')", "does not follow"),
        ("os.chdir(ROOT)", "does not follow chdir"),
        ("raise SystemExit('broken')", "broken"),
    ],
)
def test_what_the_recorder_cannot_follow_fails_loudly(tmp_path: Path, code: str, reason: str):
    """A write that is not in the recording would make every state made from it a lie."""
    with pytest.raises(RecordingError, match=reason):
        run(tmp_path, code, OLD)


def test_a_folder_that_is_not_what_was_recorded_is_refused(tmp_path: Path):
    """The last line of defence: the recording must end in just the bytes that lie there."""
    run(tmp_path, OVERWRITE.format(flags="", sync=""), OLD)
    (tmp_path / "root" / "file").write_bytes(b"A" * 512 + b"C" * 512)
    with pytest.raises(RecordingError, match="was written in a way that was not recorded"):
        load(tmp_path)


def test_positions_of_plain_writes_are_followed_through_seeks_reads_and_appends(tmp_path: Path):
    """LMDB seeks, then writes; buffered files write where they stand."""
    code = """
import shutil
with open(FILE, "r+b", buffering=0) as file:
    file.read(10)
    file.write(b"after ten")
    file.seek(-4, 2)
    file.write(b"end!")
with open(FILE, "ab") as file:
    file.write(b"appended")
os.link(FILE, ROOT + "/second")
fd = os.dup(os.open(ROOT + "/second", os.O_WRONLY))
os.lseek(fd, 100, 0)
os.writev(fd, [b"gather", b"ed"])
shutil.copyfile(FILE, ROOT + "/copy")
os.mkdir(ROOT + "/folder")
os.rename(ROOT + "/copy", ROOT + "/folder/copy")
shutil.rmtree(ROOT + "/folder")
"""
    recording = run(tmp_path, code, OLD)
    offsets = [op.offset for op in recording.operations if isinstance(op, Write)]
    assert offsets == [10, 1_020, 1_024, 100, 0]


def test_calls_that_threads_interrupt_are_put_together_again(tmp_path: Path):
    """strace prints them in two lines; what each thread wrote is recorded whole, in its own order."""
    code = """
import threading
def write(name):
    fd = os.open(f"{ROOT}/{name}", os.O_WRONLY | os.O_CREAT)
    for n in range(100):
        os.write(fd, f"{name} {n};".encode() * 100)
        os.fsync(fd)
threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    recording = run(tmp_path, code)
    assert "resumed>" in (tmp_path / "trace").read_text()
    written = [op.data for op in recording.operations if isinstance(op, Write)]
    for name in "abc":
        own = [data for data in written if data.startswith(name.encode())]
        assert own == [f"{name} {n};".encode() * 100 for n in range(100)]


# This module is a workload too: one whose audit dies.


def audit(root: Path, seed: int, book: Sequence[str], heard: int) -> None:
    """Die as LMDB does on a damaged file, complain, hang or be content, by what was said."""
    if book[:heard] == ["written"]:
        os.kill(os.getpid(), signal.SIGBUS)
    if (root / "file").read_bytes() not in PIECES:
        raise Violation("atomic", "neither old nor new")
    if heard == 2 and (root / "file").read_bytes() != NEW:
        raise ValueError("not new")


def test_a_state_that_kills_the_process_that_opens_it_is_a_failure_of_that_state_alone(tmp_path: Path):
    """SIGSEGV and SIGBUS inside LMDB are caught, told with their state, and the next state is audited."""
    recording = run(tmp_path, OVERWRITE.format(flags="", sync="os.fsync(fd)"), OLD)
    heard = {state.index: state.heard for state in CrashStates(recording, 3).build(list(range(40)))}
    found = explore("test_explorer", recording, range(40), 3, tmp_path)
    assert found.states == 40
    assert [failure.index for failure in found.failures] == sorted(i for i, n in heard.items() if n == 1)
    assert 0 < len(found.failures) < 40
    assert {failure.violation.splitlines()[0] for failure in found.failures} == {
        "kills the process that opens it: SIGBUS"
    }
