"""A power cut at any point of a real run leaves a data folder that opens, with all that was acknowledged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.explore import Exploration, explore, record_workload, scratch_folder
from tests.crash.recorder import strace_problem
from tests.crash.torture import POWER_CUTS

_PROBLEM = strace_problem()
pytestmark = pytest.mark.skipif(bool(_PROBLEM), reason=_PROBLEM or "strace works")

SEED = 20_251_123
# So many in a run of the tests, 380 in all; `make torture` does 20,000.
STATES = {
    "workload_ring": 80,
    "workload_upkeep": 60,
    "workload_creation": 70,
    "workload_publish": 50,
    "workload_migration": 40,
    "workload_rebuild": 40,
    "workload_replace": 40,
}

_NO_SYNC_OF = """
import os, stat
real = os.fsync
os.fsync = lambda fd: None if stat.{kind}(os.fstat(fd).st_mode) else real(fd)
"""
NO_FILE_SYNC = _NO_SYNC_OF.format(kind="S_ISREG")
NO_FOLDER_SYNC = _NO_SYNC_OF.format(kind="S_ISDIR")
_LMDB_WITH = """
import lmdb, functools
lmdb.open = functools.partial(lmdb.open, {option}=False)
"""
NO_LMDB_SYNC = _LMDB_WITH.format(option="sync")
NO_META_SYNC = _LMDB_WITH.format(option="metasync")


def cut_power(workload: str, states: int, first: str = "") -> Exploration:
    with scratch_folder() as scratch:
        work = scratch / "recording"
        work.mkdir()
        recording = record_workload(workload, SEED, work, first=first)
        return explore(workload, recording, range(states), SEED, scratch)


def test_every_workload_is_explored():
    """A workload that nobody runs would be a hole in the suite."""
    modules = {path.stem for path in Path(__file__).parent.glob("workload_*.py")}
    assert set(POWER_CUTS) == set(STATES) == modules


@pytest.mark.parametrize("workload", list(STATES))
def test_nothing_acknowledged_is_lost_in_any_state_that_a_power_cut_leaves(workload: str):
    """Recorded once, cut anywhere, any subset of what was not synced: the auditor finds nothing wrong."""
    found = cut_power(workload, STATES[workload])
    assert found.states == STATES[workload]
    assert [str(failure) for failure in found.failures] == []


@pytest.mark.parametrize(
    ("workload", "first", "broken"),
    [
        pytest.param("workload_replace", NO_FILE_SYNC, "atomic: ", id="replace-file"),
        pytest.param("workload_replace", NO_FOLDER_SYNC, "I1: ", id="replace-folder"),
        pytest.param("workload_publish", NO_FILE_SYNC, "I5: ", id="publish-file"),
        pytest.param("workload_publish", NO_FOLDER_SYNC, "I5: ", id="publish-folder"),
        pytest.param("workload_creation", NO_FILE_SYNC, "opens: ", id="creation-file"),
        pytest.param("workload_creation", NO_FOLDER_SYNC, "I1: ", id="creation-folder"),
        pytest.param("workload_upkeep", NO_FILE_SYNC, "I3: ", id="upkeep-file"),
        pytest.param("workload_ring", NO_LMDB_SYNC, "undamaged: ", id="ring-both"),
        pytest.param("workload_ring", NO_META_SYNC, "I1: ", id="ring-meta"),
    ],
)
def test_leaving_out_a_single_kind_of_sync_is_found_out(workload: str, first: str, broken: str):
    """The explorer finds faults: the same programs without one kind of sync break just what it guards."""
    found = cut_power(workload, 60, first)
    assert any(failure.violation.startswith(broken) for failure in found.failures)
