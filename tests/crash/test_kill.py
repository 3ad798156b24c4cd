"""SIGKILL at write-like system calls of ingest and of the trainer; the long sweep is `make torture`.

A failure names the seed and the chain; `python -m tests.crash.kills --seed S --chain C` repeats it.
"""

from __future__ import annotations

import random
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

from storage.ring import Commit, Ring
from storage.samples import Samples
from storage.windows import OpenWindow
from tests.crash.audit import Violation
from tests.crash.ingest_chain import Chain, Shape
from tests.crash.kills import kill_ingest, kill_publish, sweep
from tests.crash.lives import Call, Life, Lives, Point
from tests.crash.publish_chain import PublishChain, make_site

SEED = 20_261_123


def test_killed_anywhere_ingest_and_trainer_lose_and_double_nothing(tiny_model: Path, scratch: Path) -> None:
    """Chains of every shape, each with its own data folder, as a seed chooses them."""
    counts = sweep(40, SEED, model=tiny_model)
    assert counts.violations == [], f"seed {SEED}"
    assert counts.kills >= 40


@pytest.mark.parametrize(
    "shape",
    [
        Shape(seed=1, lines=900, bulk=4_000, ring_bytes=1 << 20, chunk=3, window=2, witness=True),
        Shape(seed=2, lines=12_000, files=True),
        Shape(seed=3, lines=300, chunk=1, window=4),
    ],
    ids=["evicting, with a reader that stays", "files with positions", "a window of unacknowledged chunks"],
)
def test_killed_again_and_again_on_one_data_folder_the_ring_ends_as_an_undisturbed_one(
    ingests: Lives, tiny_model: Path, tmp_path: Path, shape: Shape
) -> None:
    counts = kill_ingest(ingests, tiny_model, tmp_path, shape, random.Random(SEED), 12)
    assert counts.kills >= (2 if shape.files else 8), f"seed {SEED}: {counts}"


def test_a_ring_that_filled_up_has_evicted_its_oldest_and_nothing_else(
    ingests: Lives, tiny_model: Path, tmp_path: Path
) -> None:
    """The shape above that is said to evict does: else its audit would prove less than it says."""
    shape = Shape(seed=1, lines=1_000, bulk=4_000, ring_bytes=1 << 20, chunk=7, window=2)
    with Chain(ingests, tiny_model, tmp_path, shape) as chain:
        chain.live(Point("fdatasync", 60))
        assert chain.live(None).code == 0
        assert chain.audit(ended=True).tail_seq > 0


def test_a_kill_at_any_step_of_the_first_creation_leaves_a_folder_that_the_next_start_completes(
    ingests: Lives, tiny_model: Path, tmp_path: Path
) -> None:
    """A seeded choice of the steps, each from an empty folder."""
    shape = Shape(seed=4, lines=30)
    (tmp_path / "quiet").mkdir()
    with Chain(ingests, tiny_model, tmp_path / "quiet", shape) as quiet:
        steps = quiet.steps().creating
    assert len(steps) > 40
    for step in random.Random(SEED).sample(steps, 10):
        work = tmp_path / f"{step.name}-{step.number}"
        work.mkdir()
        with Chain(ingests, tiny_model, work, shape, quiet) as chain:
            assert chain.live(step.point()).killed, step
            chain.audit()
            assert chain.live(None).code == 0
            chain.audit(ended=True)


def test_a_trainer_killed_anywhere_ends_with_one_version_a_window(
    ingests: Lives, trainers: Lives, tiny_model: Path, tmp_path: Path
) -> None:
    """After each kill the active version is whole and signed, and recovery twice is recovery once."""
    site = tmp_path / "site"
    site.mkdir()
    make_site(ingests, tiny_model, site, SEED)
    counts = kill_publish(trainers, tiny_model, site, tmp_path / "work", random.Random(SEED))
    assert counts.kills >= 10, f"seed {SEED}: {counts}"


def test_kills_at_the_promotion_itself_leave_the_old_version_or_the_new_one(
    ingests: Lives, trainers: Lives, tiny_model: Path, tmp_path: Path
) -> None:
    """Every call from the version's first file to the end of the promoting transaction."""
    site = tmp_path / "site"
    site.mkdir()
    make_site(ingests, tiny_model, site, SEED)
    life = PublishChain(trainers, tiny_model, site, tmp_path / "quiet").live(None, traced=True)
    for step in _promotion(life)[::3]:
        chain = PublishChain(trainers, tiny_model, site, tmp_path / f"{step.name}-{step.number}")
        assert chain.live(step.point()).killed, step
        chain.audit(recover=True)
        assert chain.live(None).code == 0
        chain.audit(recover=True, ended=True)


def _promotion(life: Life) -> list[Call]:
    """Calls from the making of the first version's folder to the meta page of the transaction after it."""
    first = next(i for i, call in enumerate(life.calls) if "versions/v000001" in call.text)
    renamed = next(i for i, call in enumerate(life.calls) if call.name.startswith("rename") and i > first)
    flushed = next(i for i, call in enumerate(life.calls) if call.name == "fdatasync" and i > renamed)
    return life.calls[first : flushed + 3]


def test_an_acknowledgement_before_the_commit_is_noticed(
    ingests: Lives, tiny_model: Path, tmp_path: Path
) -> None:
    """The auditor is audited: a ring that promises too early loses what it promised."""
    with Chain(ingests, tiny_model, tmp_path, Shape(seed=5, lines=100)) as chain:
        flushes = [call for call in chain.quiet.life.calls if call.name == "fdatasync"]
        assert chain.live(flushes[-1].point(), cheat="early").killed
        with pytest.raises(Violation, match=r"I1: \d+ samples were acknowledged"):
            chain.audit()


def test_a_lost_dedup_memory_is_noticed(ingests: Lives, tiny_model: Path, tmp_path: Path) -> None:
    """What is sent again is then stored again."""
    with Chain(ingests, tiny_model, tmp_path, Shape(seed=5, lines=200)) as chain:
        assert chain.live(Point("fdatasync", 12)).killed
        chain.audit()
        chain.live(None, again=20, cheat="forgetful")
        with pytest.raises(Violation):
            chain.audit()


def test_a_reader_that_stays_open_checks_what_was_written_since(tmp_path: Path) -> None:
    """The auditor's own tool: it once judged new blocks by the state that it had read when it was opened."""
    folder, program = tmp_path / "main", "from tests.crash.test_kill import grow; grow({!r})"
    command = [sys.executable, "-c", program.format(str(folder))]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    with Ring.open_reader(folder) as ring:
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
        assert (ring.state.next_seq, ring.read_state().next_seq) == (10, 20)
        assert list(ring.check_blocks()) == []


def grow(folder: str) -> None:
    """Add ten samples to a ring, as a process of its own."""
    with Ring.open_or_create(Path(folder), shard="main", tokenizer_id="0" * 16, max_bytes=1 << 20) as ring:
        first = ring.state.next_seq
        hashes = b"".join((first + i + 1).to_bytes(16, "big") for i in range(10))
        samples = Samples(
            first, ["s"] * 10, ["text"] * 10, [""] * 10, array("d", range(10)), array("I", [1] * 10),
            array("I", range(10)), bytearray(b"\x01" * 10), hashes,
        )  # fmt: skip
        ring.commit(Commit(samples=samples, stream_time=1.0, window=OpenWindow(), counters={}))
