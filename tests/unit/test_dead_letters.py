"""Dead letters in the ring: deleted in any order, with nothing else that changes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from storage.check import check_ring
from storage.export import export_ring, import_ring
from storage.ring import Ring
from storage.salvage import rebuild
from storage.windows import DeadLetter
from tests.unit.test_ring import TOKENIZER, commit, new_ring


def letter(number: int) -> DeadLetter:
    return DeadLetter("site", f"byte {number}", 1.0, "not JSON", b"x" * (number % 50))


def filled(tmp_path: Path, count: int = 10) -> Ring:
    ring = new_ring(tmp_path)
    commit(ring, 1, dead_letters=[letter(number) for number in range(count)])
    return ring


def numbers(ring: Ring) -> list[int]:
    return [number for number, _ in ring.dead_letters(1_000)]


def damage(folder: Path) -> list[str]:
    """What is wrong with rows; the helper's rings have another name and no counters."""
    return [problem.words for problem in check_ring(folder, live=False) if problem.kind == "row"]


def check(ring: Ring) -> None:
    ring.close()
    assert damage(ring.folder) == []


def test_a_letter_deleted_before_older_ones_is_gone_for_every_reader(tmp_path: Path) -> None:
    ring = filled(tmp_path)
    commit(ring, 0, deleted_letters=[4, 7])
    assert numbers(ring) == [0, 1, 2, 3, 5, 6, 8, 9]
    assert ring.dead_letter(4) is None
    assert ring.dead_letter(5) == letter(5)
    check(ring)
    with new_ring(tmp_path) as again:
        assert numbers(again) == [0, 1, 2, 3, 5, 6, 8, 9]


def test_what_deleted_letters_leave_goes_with_the_older_ones(tmp_path: Path) -> None:
    ring = filled(tmp_path)
    commit(ring, 0, deleted_letters=[1, 2])
    assert ring.state.dead_first == 0
    commit(ring, 0, deleted_letters=[0])
    assert ring.state.dead_first == 3
    commit(ring, 0, deleted_letters=range(3, 10))
    assert (ring.state.dead_first, ring.state.dead_next, ring.state.dead_bytes) == (10, 10, 0)
    check(ring)


def test_numbers_that_are_not_there_are_passed_over(tmp_path: Path) -> None:
    ring = filled(tmp_path)
    commit(ring, 0, deleted_letters=[0, 1])
    before = ring.state
    commit(ring, 0, deleted_letters=[0, 1, 10, 1_000, 2**63])
    assert (ring.state.dead_first, ring.state.dead_next) == (before.dead_first, before.dead_next)
    assert numbers(ring) == list(range(2, 10))
    check(ring)


def test_a_number_is_never_used_again(tmp_path: Path) -> None:
    """In one commit the old letter goes and the new one comes, also where it was the last."""
    ring = filled(tmp_path, 1)
    commit(ring, 0, deleted_letters=[0], dead_letters=[letter(7)])
    assert ring.dead_letters() == [(1, letter(7))]
    check(ring)


@pytest.mark.parametrize("seed", range(5))
def test_the_ring_is_whole_however_letters_come_and_go(tmp_path: Path, seed: int) -> None:
    """Against a dict: seeded, with the bound on their bytes at work."""
    chance = random.Random(seed)
    ring = new_ring(tmp_path, 1 << 20)
    held: dict[int, DeadLetter] = {}
    for _ in range(60):
        gone = [n for n in range(ring.state.dead_first, ring.state.dead_next) if chance.random() < 0.2]
        fresh = [
            DeadLetter("s", "p", 1.0, "r", bytes(chance.randrange(4_000)))
            for _ in range(chance.randrange(6))
        ]  # fmt: skip
        first = ring.state.dead_next
        commit(ring, 1, deleted_letters=gone, dead_letters=fresh)
        held = {n: one for n, one in held.items() if n not in gone} | dict(enumerate(fresh, first))
        held = {n: one for n, one in held.items() if n >= ring.state.dead_first}
        assert dict(ring.dead_letters(10_000)) == held
        assert ring.state.dead_bytes <= (1 << 20) // 16
    check(ring)


def test_an_export_and_a_rebuild_keep_deleted_letters_deleted(tmp_path: Path) -> None:
    ring = filled(tmp_path)
    commit(ring, 5, deleted_letters=[3])
    copy = tmp_path / "copy.ring"
    with copy.open("wb") as file:
        export_ring(ring, file)
    ring.close()
    with copy.open("rb") as file:
        import_ring(file, tmp_path / "imported", max_bytes=4 << 20)
    rebuild(ring.folder, tmp_path / "quarantine", tokenizer_id=TOKENIZER, max_bytes=4 << 20)
    for folder in (tmp_path / "imported", ring.folder):
        assert damage(folder) == []
        with Ring.open_reader(folder) as reader:
            assert numbers(reader) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
