"""The registry: arrows, cursor, active pointer, requests, audit; all or nothing in a transaction."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from storage.errors import ForeignFolderError, FormatTooNewError
from storage.registry import (
    MAX_AUDIT_ROWS,
    MAX_RESULTS,
    MAX_UPDATE_ROWS,
    AuditRow,
    Registry,
    UpdateRow,
    UpdateState,
    VersionRow,
)

S = UpdateState
# The table at the top of storage/registry.py, written down a second time on purpose.
ALLOWED = {
    (None, S.CLAIMED), (None, S.EXPIRED), (None, S.SKIPPED),
    (S.CLAIMED, S.CLAIMED), (S.CLAIMED, S.STAGED), (S.CLAIMED, S.QUARANTINED),
    (S.STAGED, S.EVALUATED), (S.STAGED, S.REJECTED), (S.STAGED, S.CLAIMED),
    (S.EVALUATED, S.PROMOTED), (S.EVALUATED, S.CLAIMED),
    (S.PROMOTED, S.ACKNOWLEDGED),
}  # fmt: skip
PATHS: dict[UpdateState | None, tuple[UpdateState, ...]] = {
    None: (),
    S.CLAIMED: (S.CLAIMED,),
    S.STAGED: (S.CLAIMED, S.STAGED),
    S.EVALUATED: (S.CLAIMED, S.STAGED, S.EVALUATED),
    S.PROMOTED: (S.CLAIMED, S.STAGED, S.EVALUATED, S.PROMOTED),
    S.ACKNOWLEDGED: (S.CLAIMED, S.STAGED, S.EVALUATED, S.PROMOTED, S.ACKNOWLEDGED),
    S.REJECTED: (S.CLAIMED, S.STAGED, S.REJECTED),
    S.QUARANTINED: (S.CLAIMED, S.QUARANTINED),
    S.SKIPPED: (S.SKIPPED,),
    S.EXPIRED: (S.EXPIRED,),
}
DECIDED = {S.ACKNOWLEDGED, S.REJECTED, S.QUARANTINED, S.SKIPPED, S.EXPIRED}


def update(
    window: int, state: UpdateState, *, last: int = 0, shard: str = "main", reason: str = ""
) -> UpdateRow:
    return UpdateRow(shard, window, last or window, 0, 9, 10, state, reason=reason)


def version(number: int) -> VersionRow:
    return VersionRow(number, f"v{number:06d}", number - 1, "main", number, "ab", "cd", 1.0)


def put(registry: Registry, *rows: UpdateRow) -> None:
    for row in rows:
        with registry.write() as writer:
            writer.put_update(row)


@pytest.fixture
def registry(tmp_path: Path):
    (tmp_path / "run").mkdir()
    with Registry.open_or_create(tmp_path / "registry") as opened:
        yield opened


@pytest.mark.parametrize(("before", "after"), list(itertools.product(PATHS, UpdateState)))
def test_only_the_arrows_of_the_table_can_be_taken(
    registry: Registry, before: UpdateState | None, after: UpdateState
) -> None:
    """Every pair of states: allowed ones are written, all others refused and leave the row as it was."""
    put(registry, *(update(1, state) for state in PATHS[before]))
    rows = registry.updates()
    new = update(1, after, reason="another row")
    if (before, after) in ALLOWED:
        put(registry, new)
        assert registry.updates() == [new]
    else:
        with pytest.raises(ValueError, match="window 1"):
            put(registry, new)
        assert registry.updates() == rows


@pytest.mark.parametrize("state", UpdateState)
def test_an_arrow_may_be_repeated_after_a_crash(registry: Registry, state: UpdateState) -> None:
    rows = [update(1, passed) for passed in PATHS[state]]
    put(registry, *rows, rows[-1])
    assert registry.updates() == [rows[-1]]


@pytest.mark.parametrize("state", UpdateState)
def test_the_cursor_moves_when_a_window_is_decided_and_only_then(
    registry: Registry, state: UpdateState
) -> None:
    put(registry, *(update(1, passed) for passed in PATHS[state]))
    assert registry.cursor("main") == (1 if state in DECIDED else 0)
    assert update(1, state).decided == (state in DECIDED)


def test_the_cursor_passes_all_windows_of_a_merged_update(registry: Registry) -> None:
    put(registry, update(1, S.CLAIMED, last=3), update(1, S.QUARANTINED, last=3))
    assert registry.cursor("main") == 3


def test_the_cursor_never_goes_back(registry: Registry) -> None:
    """A crash may repeat an old decision after newer ones; those windows are not due again."""
    put(registry, *(update(window, S.EXPIRED) for window in (1, 2, 3)), update(1, S.EXPIRED))
    assert registry.cursor("main") == 3


def test_shards_have_updates_and_cursors_of_their_own(registry: Registry) -> None:
    """Also where one shard's name begins with the other's."""
    put(registry, update(5, S.SKIPPED, shard="a"), update(2, S.SKIPPED, shard="ab"))
    assert [row.window for row in registry.updates("a")] == [5]
    assert (registry.cursor("a"), registry.cursor("ab"), registry.cursor("b")) == (5, 2, 0)
    assert [(row.shard, row.window) for row in registry.updates()] == [("a", 5), ("ab", 2)]


def test_updates_come_in_order_of_their_windows(registry: Registry) -> None:
    put(registry, *(update(window, S.SKIPPED) for window in (256, 2, 255)))
    assert [row.window for row in registry.updates()] == [2, 255, 256]


def test_a_transaction_happens_whole_or_not_at_all(registry: Registry) -> None:
    """A refused arrow takes the version, the pointer and the audit of its transaction with it."""
    before = registry.last_transaction()
    with pytest.raises(ValueError, match="due -> promoted"), registry.write() as writer:
        writer.put_version(version(1))
        writer.set_active(1)
        writer.add_request()
        writer.add_audit(AuditRow(0.0, "test", "promote", ""))
        writer.put_update(update(1, S.PROMOTED))
    assert registry.versions() == registry.updates() == registry.audit() == []
    assert registry.active().version == registry.requests() == 0
    assert registry.last_transaction() == before


def test_the_active_pointer_remembers_what_was_active_before(registry: Registry) -> None:
    """Rollback goes there; naming the active version again changes nothing, or rollback would be a no-op."""
    seen = []
    for number in (1, 2, 2, 0):
        with registry.write() as writer:
            writer.set_active(number)
        seen.append((registry.active().version, registry.active().previous))
    assert seen == [(1, 0), (2, 1), (2, 1), (0, 2)]


def test_requests_are_numbered(registry: Registry) -> None:
    with registry.write() as writer:
        assert [writer.add_request(), writer.add_request()] == [1, 2]
    assert registry.requests() == 2


def test_the_audit_keeps_the_newest_rows(registry: Registry) -> None:
    total = MAX_AUDIT_ROWS + 5
    with registry.write() as writer:
        for number in range(total):
            writer.add_audit(AuditRow(float(number), "test", "promote", ""))
    kept = registry.audit(2 * MAX_AUDIT_ROWS)
    assert [row.at for row in kept] == [float(n) for n in range(5, total)]
    assert [row.at for row in registry.audit(2)] == [total - 2, total - 1]
    assert registry.audit(0) == []


def test_everything_is_there_after_reopening(registry: Registry) -> None:
    with registry.write() as writer:
        writer.put_update(update(1, S.CLAIMED))
        writer.put_version(version(2))
        writer.put_version(version(1))
        writer.set_active(2)
    before = registry.last_transaction()
    registry.close()
    with Registry.open_or_create(registry.folder) as again:
        assert again.updates() == [update(1, S.CLAIMED)]
        assert again.versions() == [version(1), version(2)]
        assert again.active().version == 2
        assert again.last_transaction() == before, "opening writes nothing"


def test_what_is_no_registry_or_too_new_is_refused(tmp_path: Path) -> None:
    from storage.env import create_environment
    from storage.registry import _Header
    from storage.rows import seal_header

    (tmp_path / "run").mkdir()
    create_environment(tmp_path / "ring", 1 << 20, {})
    with pytest.raises(ForeignFolderError, match="not a registry"):
        Registry.open_reader(tmp_path / "ring")
    create_environment(tmp_path / "new", 1 << 20, {b"H": seal_header(_Header(3))})
    with pytest.raises(FormatTooNewError, match="upgrade"):
        Registry.open_or_create(tmp_path / "new")


def test_decided_updates_do_not_fill_the_registry(registry: Registry) -> None:
    """Ten thousand updates with results of 3 KiB: the newest keep theirs, old rows go, it never fills."""
    for window in range(1, 10_001):
        row = UpdateRow("main", window, window, 0, 9, 10, UpdateState.SKIPPED, result=bytes(3_000))
        with registry.write() as writer:
            writer.put_update(row)
    rows = registry.updates()
    assert (rows[0].window, rows[-1].window) == (10_001 - MAX_UPDATE_ROWS, 10_000)
    assert [bool(row.result) for row in rows[-MAX_RESULTS:]] == [True] * MAX_RESULTS
    assert not any(row.result for row in rows[: -MAX_RESULTS - 1])


def test_whoever_saw_a_transaction_sees_what_it_wrote(registry: Registry) -> None:
    """Waiters look only when the number changed; one ahead of the rows would make them wait for ever.

    LMDB shows a commit's meta page before its readers get it."""
    code = (
        "import sys; from pathlib import Path; from storage.registry import Registry\n"
        "registry = Registry.open_or_create(Path(sys.argv[1]))\n"
        "for _ in range(400):\n"
        "    with registry.write() as writer: writer.add_request()\n"
    )
    start = registry.last_transaction()
    writer = subprocess.Popen([sys.executable, "-c", code, str(registry.folder)])
    ahead = 0
    while writer.poll() is None:
        number = registry.last_transaction() - start
        ahead += number > registry.requests()
    assert writer.returncode == 0
    assert (ahead, registry.last_transaction() - start) == (0, 400)
