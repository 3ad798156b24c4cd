"""EIO and ENOSPC at write-like system calls: the writer stops, says why, and promises nothing any more.

A failure names the seed and the chain; `python -m tests.crash.errors --seed S --chain C` repeats it.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.crash import publish_chain
from tests.crash.audit import Violation
from tests.crash.errors import ERRORS, check_end, fail_publish, sweep
from tests.crash.ingest_chain import Chain, Shape
from tests.crash.lives import Lives, Point
from tests.crash.publish_chain import make_site

SEED = 20_261_123


def test_after_any_error_ingest_and_trainer_end_with_one_line_and_go_on_when_restarted(
    tiny_model: Path, scratch: Path
) -> None:
    counts = sweep(30, SEED, model=tiny_model)
    assert counts.violations == [], f"seed {SEED}"
    assert counts.errors >= 30


@pytest.mark.parametrize("call", ["fdatasync", "writev", "pwrite64"])
@pytest.mark.parametrize("what", ERRORS)
def test_a_commit_that_fails_is_never_tried_again_by_the_same_process(
    ingests: Lives, tiny_model: Path, tmp_path: Path, call: str, what: str
) -> None:
    """A data page, the flush, the meta page (by pwrite64, to a descriptor that flushes)."""
    with Chain(ingests, tiny_model, tmp_path, Shape(seed=6, lines=120)) as chain:
        numbers = [each.number for each in chain.quiet.life.calls if each.name == call]
        life = chain.live(Point(call, numbers[-len(numbers) // 3], what))
        assert life.hit >= 0
        check_end(life)
        assert "a commit failed" in life.err
        assert 0 < chain.acked < chain.shape.lines
        chain.audit()
        check_end(chain.live(None))
        chain.audit(ended=True)


def test_an_error_at_any_step_of_the_first_creation_is_said_and_leaves_nothing_in_the_way(
    ingests: Lives, tiny_model: Path, tmp_path: Path
) -> None:
    """A seeded choice of the steps, each from an empty folder; the next start completes it."""
    rng, shape = random.Random(SEED), Shape(seed=4, lines=30)
    (tmp_path / "quiet").mkdir()
    with Chain(ingests, tiny_model, tmp_path / "quiet", shape) as quiet:
        steps = quiet.steps(own=True).creating
    for step in rng.sample(steps, 10):
        work = tmp_path / f"{step.name}-{step.number}"
        work.mkdir()
        with Chain(ingests, tiny_model, work, shape, quiet) as chain:
            life = chain.live(step.point(rng.choice(ERRORS)))
            assert life.hit >= 0
            check_end(life)
            assert [p.name for p in chain.data.rglob("*.new")] == []
            chain.audit()
            assert chain.live(None).code == 0
            chain.audit(ended=True)


def test_a_trainer_that_meets_errors_never_moves_the_active_version_to_a_broken_one(
    ingests: Lives, scratch: Path, tiny_model: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    make_site(ingests, tiny_model, site, SEED)
    with Lives(publish_chain.PROGRAM, scratch) as trainers:
        counts = fail_publish(trainers, tiny_model, site, tmp_path / "work", random.Random(SEED))
    assert counts.errors >= 3, f"seed {SEED}: {counts}"


def test_a_writer_that_goes_on_after_a_failed_flush_is_noticed(
    ingests: Lives, tiny_model: Path, tmp_path: Path
) -> None:
    """The auditor is audited: a flush that is tried again succeeds, and proves nothing."""
    with Chain(ingests, tiny_model, tmp_path, Shape(seed=6, lines=60)) as chain:
        life = chain.live(Point("fdatasync", 6, "EIO"), cheat="stubborn")
        assert life.hit >= 0
        with pytest.raises(Violation, match="acknowledged"):
            check_end(life)
