"""The ring against a plain list: commits, evictions, crashes and reopenings in any order."""

from __future__ import annotations

import random
import tempfile
from array import array
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from storage.block import Samples
from storage.errors import RingFullError
from storage.ring import Commit, Ring
from storage.windows import ClosedWindow, DeadLetter, OpenWindow, RingState

MAP_BYTES = 1 << 20
TOKENIZER = "00112233aabbccdd"


def make(first: int, lengths: list[int], seed: int) -> Samples:
    rng, n, total = random.Random(seed), len(lengths), sum(lengths)
    return Samples(
        first,
        rng.choices(["pump-1", "cmms", "hmi"], k=n),
        rng.choices(["reading", "text", "exchange", "feedback"], k=n),
        rng.choices(["", "crew-b"], k=n),
        array("d", [rng.uniform(0, 2e9) for _ in range(n)]),
        array("I", lengths),
        array("I", rng.choices(range(70_000), k=total)),
        bytearray(rng.choices((0, 1), k=total)),
        rng.randbytes(16 * n),
    )


class RingModel(RuleBasedStateMachine):
    """Commits go to the ring and to the model; after each rule both must tell the same."""

    @initialize()
    def begin(self) -> None:
        self._home = tempfile.TemporaryDirectory()
        self.folder = Path(self._home.name) / "ring"
        self.open()
        self.commits: list[tuple[float, Samples]] = []
        self.state = RingState()
        self.positions: dict[str, bytes] = {}
        self.references: dict[str, bytes] = {}
        self.windows: list[ClosedWindow] = []
        self.dead: list[tuple[int, DeadLetter]] = []

    def open(self) -> None:
        self.ring = Ring.open_or_create(
            self.folder, shard="main", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES
        )

    def teardown(self) -> None:
        if hasattr(self, "ring"):
            self.ring.close()
            self._home.cleanup()

    @rule(
        lengths=st.lists(st.integers(0, 60), max_size=40),
        seed=st.integers(0, 2**32),
        later=st.floats(0, 100),
        inputs=st.dictionaries(st.sampled_from("abc"), st.binary(max_size=8), max_size=3),
        closes=st.booleans(),
        letters=st.integers(0, 3),
    )
    def commit(
        self,
        lengths: list[int],
        seed: int,
        later: float,
        inputs: dict[str, bytes],
        closes: bool,
        letters: int,
    ) -> None:
        """One commit of everything at once; an empty position forgets its input."""
        samples = make(self.state.next_seq, lengths, seed)
        now = self.state.stream_time + later
        number = len(self.windows) + 1
        closed = [ClosedWindow(number, 0, samples.first_seq, 1, 2, now, "samples")] if closes else []
        dead = [DeadLetter("s", str(i), now, "not JSON", bytes(50)) for i in range(letters)]
        commit = Commit(
            samples=samples, stream_time=now, window=OpenWindow(number, 3, 4, 5, now),
            counters={"events": len(samples)}, closed=closed, positions=inputs,
            references={k: v + b"!" for k, v in inputs.items()}, dead_letters=dead, request=number,
        )  # fmt: skip
        state = self.ring.commit(commit)
        assert state == self.ring.state
        self.dead += enumerate(dead, self.state.dead_next)
        self.expect(commit, state)

    def expect(self, commit: Commit, state: RingState) -> None:
        samples = commit.samples
        assert state.next_seq == self.state.next_seq + len(samples)
        assert state.digest == samples.extend_digest(self.state.digest)
        assert state.tail_seq >= self.state.tail_seq
        assert (state.commits, state.stream_time) == (self.state.commits + 1, commit.stream_time)
        assert (state.window, state.request) == (commit.window, commit.request)
        if len(samples):
            self.commits.append((commit.stream_time, samples))
        while self.commits and self.commits[0][1].first_seq < state.tail_seq:
            del self.commits[0]  # eviction takes whole blocks, the oldest first
        for name, position in commit.positions.items():
            self.positions.pop(name, None)
            self.positions |= {name: position} if position else {}
        self.references |= commit.references
        self.windows += commit.closed
        self.state = state

    @rule(seed=st.integers(0, 2**32), length=st.integers(20, 60))
    def fill(self, seed: int, length: int) -> None:
        """About a quarter of the file: a few of these evict."""
        samples = make(self.state.next_seq, [length] * 1_000, seed)
        commit = Commit(
            samples=samples, stream_time=self.state.stream_time + 1, window=OpenWindow(), counters={}
        )
        self.expect(commit, self.ring.commit(commit))

    @rule(age=st.floats(0, 300))
    def evict_by_age(self, age: float) -> None:
        """Exactly the commits before a stream time go, from the oldest on."""
        before = self.state.stream_time - age
        gone = 0
        while self.commits and self.commits[0][0] < before:
            gone += len(self.commits.pop(0)[1])
        assert self.ring.evict_older_than(before) == gone
        assert self.ring.state.tail_seq == self.state.tail_seq + gone
        self.state = self.ring.state

    @rule()
    def refuse_what_cannot_fit(self) -> None:
        """More than the file can take: an error, and nothing of it happened, not even the eviction."""
        samples = make(self.state.next_seq, [100] * 4_000, 7)
        with pytest.raises(RingFullError):
            self.ring.commit(Commit(samples=samples, stream_time=9e9, window=OpenWindow(), counters={}))

    @rule(off=st.sampled_from([-1, 1]))
    def refuse_a_gap(self, off: int) -> None:
        samples = make(max(0, self.state.next_seq + off), [1], 1)
        if samples.first_seq != self.state.next_seq:
            with pytest.raises(ValueError, match="goes on at"):
                self.ring.commit(Commit(samples=samples, stream_time=0.0, window=OpenWindow(), counters={}))

    @rule()
    def close_and_open(self) -> None:
        self.ring.close()
        self.open()

    @rule()
    def drop_and_open(self) -> None:
        """A crash: the handle is lost without a close."""
        del self.ring
        self.open()

    @precondition(lambda self: self.commits)
    @rule(data=st.data())
    def read_any_range(self, data: st.DataObject) -> None:
        held = Samples.concat(samples for _, samples in self.commits)
        first = data.draw(st.integers(0, len(held) - 1))
        last = data.draw(st.integers(first, len(held) - 1))
        base = held.first_seq
        assert self.ring.read(base + first, base + last) == held[first : last + 1]

    @rule(count=st.integers(0, 2_000))
    def newest_hashes(self, count: int) -> None:
        joined = b"".join(samples.hashes for _, samples in self.commits)
        hashes = [joined[i : i + 16] for i in range(0, len(joined), 16)]
        assert self.ring.newest_hashes(count) == hashes[max(0, len(hashes) - count) :]

    @invariant()
    def rows_are_those_of_the_model(self) -> None:
        if not hasattr(self, "ring"):
            return
        assert self.ring.state == self.ring.read_state() == self.state
        assert self.ring.named("p") == self.positions
        assert self.ring.named("r") == self.references
        assert self.ring.windows() == self.windows
        assert self.ring.windows(after=2) == self.windows[2:]
        assert self.ring.dead_letters(10_000) == [row for row in self.dead if row[0] >= self.state.dead_first]

    @invariant()
    def the_ring_is_whole_and_bounded(self) -> None:
        if not hasattr(self, "ring"):
            return
        assert [problem for _, problem in self.ring.check_blocks() if problem] == []
        assert (self.folder / "data.mdb").stat().st_size == MAP_BYTES
        assert sum(len(samples) for _, samples in self.commits) == self.state.next_seq - self.state.tail_seq
        for outside in {self.state.next_seq, self.state.tail_seq - 1} - {-1}:
            with pytest.raises(LookupError):
                self.ring.read(outside, outside)


TestRingModel = RingModel.TestCase
TestRingModel.settings = settings(max_examples=12, stateful_step_count=40, deadline=None)
