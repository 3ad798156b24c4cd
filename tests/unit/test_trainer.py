"""The trainer's loop: order, claims, merging, failures, and what it does when the world changed meanwhile."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from adapters import versions
from adapters.model_folder import load_manifest
from adapters.recipe import GateLimits, Recipe
from adapters.trainer import MAX_FAILURES, Trainer, TrainerSettings, seed_of
from storage.block import encode_block
from storage.errors import StorageError
from storage.folder import DataFolder
from storage.registry import Registry, UpdateRow, UpdateState
from storage.ring import Commit, Ring
from storage.ring_writer import STATE, block_key
from storage.rows import seal
from storage.samples import Samples
from storage.windows import ClosedWindow, OpenWindow

RECIPE = Recipe(max_steps=2, row_tokens=64)
LIMITS = GateLimits(min_gain=-1.0, max_anchor_delta_bits=10.0, max_retention_loss=10.0, max_recited=20)
WINDOW = 40


class Site:
    """A data folder with a ring that has closed windows, and the trainer on it."""

    def __init__(self, path: Path, model: Path) -> None:
        self.model, self.manifest = model, load_manifest(model)
        self.folder = DataFolder.open(path, create=True)
        self.registry = Registry.open_or_create(self.folder.registry)
        self.ring = Ring.open_or_create(
            self.folder.ring / "main",
            shard="main",
            tokenizer_id=self.manifest.tokenizer_id,
            max_bytes=1 << 20,
        )
        self.stop = threading.Event()

    def close_window(self, *, learned: bool = True, at: float = 0.0) -> ClosedWindow:
        """Commit a window's samples and close it."""
        state = self.ring.state
        lengths = array("I", [6 + i % 5 for i in range(WINDOW)])
        total, first = sum(lengths), state.next_seq
        samples = Samples(
            first, ["s"] * WINDOW, ["text"] * WINDOW, [""] * WINDOW,
            array("d", range(first, first + WINDOW)), lengths,
            array("I", [3 + (i * i + first) % 200 for i in range(total)]),
            bytearray(bytes([learned])) * total,
            b"".join((first + i).to_bytes(16, "big") for i in range(WINDOW)),
        )  # fmt: skip
        number = state.window.window
        closed = ClosedWindow(number, first, first + WINDOW - 1, WINDOW, total, at, "samples")
        window = OpenWindow(number + 1, first + WINDOW)
        self.ring.commit(Commit(samples=samples, stream_time=at, window=window, counters={}, closed=[closed]))
        return closed

    def trainer(self, **settings: object) -> Trainer:
        """A trainer as a new process would make it, recovered."""
        made = TrainerSettings("test", RECIPE, LIMITS, threads=1, retry_s=0.0)
        made = msgspec.structs.replace(made, **settings)
        trainer = Trainer(self.folder, self.registry, self.model, self.manifest, made)
        trainer._rings["main"] = self.ring  # LMDB allows one handle a process: ingest is in ours here
        trainer.recover()
        return trainer

    @property
    def rows(self) -> list[UpdateRow]:
        return self.registry.updates()

    def run(self, **settings: object) -> None:
        """Decide everything that is due."""
        trainer = self.trainer(**settings)
        while trainer.step(self.stop):
            pass


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path) -> Iterator[Site]:
    site = Site(tmp_path / "data", tiny_model)
    yield site
    site.ring.close()
    site.registry.close()


def test_nothing_due_is_nothing_to_do(site: Site) -> None:
    assert not site.trainer().step(site.stop)


def test_shards_take_turns_and_one_update_ends_before_another_begins(
    site: Site, tmp_path: Path, tiny_model: Path
) -> None:
    """Otherwise a busy shard would starve the others, and a parent would not be the outcome before it."""
    with Ring.create(
        site.folder.ring / "shard-2", shard="shard-2", tokenizer_id=site.manifest.tokenizer_id,
        max_bytes=1 << 20,
    ) as second:  # fmt: skip
        main = site.ring
        for ring in (main, main, second):
            site.ring = ring
            site.close_window()
        site.ring = main
        trainer = site.trainer()
        trainer._rings["shard-2"] = second
        served: list[tuple[str, int]] = []
        while trainer.step(site.stop):
            under_way = [row for row in site.rows if not row.decided]
            assert len(under_way) <= 1
            decided = [(row.shard, row.window) for row in site.rows if row.decided]
            served += (row for row in decided if row not in served)
        trainer._rings.pop("shard-2")
    assert served == [("main", 1), ("shard-2", 1), ("main", 2)]
    versions = {(row.shard, row.window): (row.parent, row.version) for row in site.rows}
    assert [versions[row] for row in served] == [(0, 1), (1, 2), (2, 3)]


def test_a_claim_copies_the_window_out_of_the_ring(site: Site) -> None:
    """After the claim the ring may evict it: the samples lie in the update's folder."""
    site.close_window()
    site.stop.set()  # ends the child as soon as it starts
    trainer = site.trainer()
    trainer.step(site.stop)
    (row,) = site.rows
    assert (row.state, row.first_seq, row.last_seq) == (UpdateState.CLAIMED, 0, WINDOW - 1)
    assert (site.folder.update_folder("main", 1) / "samples.blocks").is_file()
    assert row.seed == seed_of(0, "main", 1)


def test_an_evicted_window_expires_and_the_next_one_is_claimed(site: Site) -> None:
    site.close_window(at=1.0)
    site.close_window(at=9.0)
    site.ring.evict_older_than(5.0)
    site.stop.set()
    trainer = site.trainer()
    trainer.step(site.stop)
    trainer.step(site.stop)
    assert [row.state for row in site.rows] == [UpdateState.EXPIRED, UpdateState.CLAIMED]


def test_only_the_evicted_windows_of_a_merged_run_expire(site: Site) -> None:
    """What is still in the ring is learned, however much was due."""
    site.ring.merge_span_s = 1.0
    for at in (1.0, 9.0, 9.0):
        site.close_window(at=at)
    site.ring.evict_older_than(5.0)
    site.stop.set()
    trainer = site.trainer(max_due=1)
    trainer.step(site.stop)
    trainer.step(site.stop)
    assert [(row.window, row.last_window, row.state) for row in site.rows] == [
        (1, 1, UpdateState.EXPIRED), (2, 3, UpdateState.CLAIMED),
    ]  # fmt: skip


def test_a_merged_run_takes_the_newest_windows_that_fit_one_update(site: Site) -> None:
    """A backlog must not grow an update without bound: the oldest windows beyond it are skipped."""
    for _ in range(6):
        site.close_window()
    tokens = site.ring.windows()[0].tokens
    recipe = msgspec.structs.replace(RECIPE, max_tokens=tokens // 2)  # four shares hold two windows
    site.stop.set()
    trainer = site.trainer(max_due=1, recipe=recipe)
    trainer.step(site.stop)
    trainer.step(site.stop)
    assert [(row.window, row.last_window, row.state) for row in site.rows] == [
        (1, 4, UpdateState.SKIPPED), (5, 6, UpdateState.CLAIMED),
    ]  # fmt: skip


def test_a_damaged_window_is_skipped_and_the_next_one_is_learned(site: Site) -> None:
    """A flipped bit in the ring is never trained on, and stops nothing."""
    first, second = site.close_window(), site.close_window()
    block = encode_block(site.ring.read(first.first_seq, first.last_seq), site.manifest.tokenizer_id)
    with site.ring._env.begin(write=True) as txn:
        txn.put(block_key(0), block[:-1] + bytes([block[-1] ^ 1]))
        state = msgspec.structs.replace(site.ring.state, txn=txn.id())
        txn.put(STATE, seal(STATE, msgspec.msgpack.encode(state)))
    assert len(site.ring.newest_hashes(1_000)) == 2 * WINDOW * 16
    assert [seq for seq, _ in site.ring.check_blocks()] == [first.first_seq]
    site.stop.set()
    trainer = site.trainer(max_due=0)
    trainer.step(site.stop)
    trainer.step(site.stop)
    assert [row.state for row in site.rows] == [UpdateState.SKIPPED, UpdateState.CLAIMED]
    assert "lost" in site.rows[0].reason
    assert site.rows[1].first_seq == second.first_seq


def test_a_window_without_a_learned_token_is_skipped(site: Site) -> None:
    site.close_window(learned=False)
    site.run()
    assert [row.state for row in site.rows] == [UpdateState.SKIPPED]
    assert site.registry.cursor("main") == 1


def test_too_many_due_windows_merge_into_the_oldest(site: Site) -> None:
    """Five due, at most three may wait: the oldest three become one update."""
    for _ in range(5):
        site.close_window()
    site.stop.set()
    site.trainer(max_due=3).step(site.stop)
    (row,) = site.rows
    assert (row.window, row.last_window, row.samples) == (1, 3, 3 * WINDOW)


def test_in_lockstep_nothing_merges(site: Site) -> None:
    for _ in range(5):
        site.close_window()
    site.stop.set()
    site.trainer(max_due=0).step(site.stop)
    assert [(row.window, row.last_window) for row in site.rows] == [(1, 1)]


def test_a_cooldown_delays_the_claim_in_stream_time(site: Site) -> None:
    site.close_window(learned=False, at=100.0)
    site.close_window(learned=False, at=105.0)
    trainer = site.trainer(cooldown_s=10.0)
    assert trainer.step(site.stop)  # claimed at 105
    assert not trainer.step(site.stop)
    site.close_window(learned=False, at=114.0)
    assert not trainer.step(site.stop)
    site.close_window(learned=False, at=115.0)
    assert trainer.step(site.stop)


@pytest.mark.slow
def test_a_restart_between_any_two_arrows_ends_in_the_same_version(site: Site) -> None:
    """Each step is done by a trainer of its own, recovered twice first; the update is promoted once."""
    site.close_window()
    states = []
    while True:
        trainer = site.trainer()
        assert trainer.recover() == []
        if not trainer.step(site.stop):
            break
        states.append(site.rows[-1].state)
    assert states[-4:] == [
        UpdateState.STAGED, UpdateState.EVALUATED, UpdateState.PROMOTED, UpdateState.ACKNOWLEDGED,
    ]  # fmt: skip
    (version,) = site.registry.versions()
    assert site.registry.active().version == version.version == 1
    assert versions.verify(site.folder, version, site.manifest.base_sha256).window == 1
    assert site.folder.accepted_file("main", 1).is_file()
    assert list(site.folder.updates.iterdir()) == []


@pytest.mark.slow
def test_a_rollback_meanwhile_makes_the_update_start_again_from_the_present_version(site: Site) -> None:
    """A candidate that continues what is no longer active is never promoted over the rollback."""
    site.close_window()
    site.run()
    site.close_window()
    trainer = site.trainer()
    while site.rows[-1].state != UpdateState.EVALUATED:
        trainer.step(site.stop)
    with site.registry.write() as writer:
        writer.set_active(0)
    trainer.step(site.stop)
    assert (site.rows[-1].state, site.rows[-1].parent) == (UpdateState.CLAIMED, 0)
    assert site.registry.active().version == 0
    while trainer.step(site.stop):
        pass
    assert versions.verify(site.folder, site.registry.versions()[-1]).parent == 0


@pytest.mark.slow
def test_changed_settings_start_a_staged_update_over(site: Site) -> None:
    """A manifest never states settings that its version was not made with."""
    site.close_window()
    trainer = site.trainer()
    while not site.rows or site.rows[-1].state != UpdateState.EVALUATED:
        trainer.step(site.stop)
    changed = msgspec.structs.replace(RECIPE, max_steps=1)
    site.trainer(recipe=changed).step(site.stop)
    assert site.rows[-1].state == UpdateState.CLAIMED
    site.run(recipe=changed)
    (version,) = site.registry.versions()
    assert versions.verify(site.folder, version).recipe["max_steps"] == 1


@pytest.mark.slow
def test_a_window_that_fails_again_and_again_is_quarantined(site: Site) -> None:
    """Its samples are damaged on disk: the child ends by itself each time; the next window goes on."""
    site.close_window()
    site.stop.set()
    site.trainer().step(site.stop)
    site.stop.clear()
    (site.folder.update_folder("main", 1) / "samples.blocks").write_bytes(b"damaged")
    with site.registry.write() as writer:
        writer.put_update(msgspec.structs.replace(site.rows[0], failures=MAX_FAILURES - 1))
    site.run()
    (row,) = site.rows
    assert row.state == UpdateState.QUARANTINED
    assert row.reason.startswith(f"{MAX_FAILURES} attempts failed; the last: ")
    assert site.registry.active().version == 0


@pytest.mark.slow
def test_settings_fixed_for_life_are_refused_when_changed(site: Site) -> None:
    site.close_window()
    site.run()
    trainer = site.trainer(recipe=msgspec.structs.replace(RECIPE, rank=8))
    with pytest.raises(StorageError, match=r"update\.rank is 8"):
        trainer.check_parent()
    site.trainer().check_parent()


def test_seeds_differ_by_seed_shard_and_window() -> None:
    seeds = {seed_of(seed, shard, window) for seed in (0, 1) for shard in ("a", "b") for window in (1, 2)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_ring_that_was_replaced_is_opened_again(site: Site) -> None:
    """Ingest mends a damaged ring by putting another into its place: the old one would never change again."""
    trainer = site.trainer()
    trainer._rings.clear()
    site.ring.close()
    folder = site.folder.ring / "main"
    assert trainer._ring("main") is trainer._ring("main")
    folder.rename(folder.with_name("old.new"))
    site.ring = Ring.create(folder, shard="main", tokenizer_id=site.manifest.tokenizer_id, max_bytes=1 << 20)
    site.close_window()
    site.ring.close()
    assert [row.window for row in trainer._ring("main").windows()] == [1]
    trainer.close()
