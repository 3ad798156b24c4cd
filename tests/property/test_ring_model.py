"""The ring against a plain list: commits, evictions, forgetting, claims, crashes and reopenings."""

from __future__ import annotations

import itertools
import random
import shutil
import tempfile
from array import array
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from storage.block import read_header
from storage.errors import RingFullError
from storage.registry import Registry, UpdateRow, UpdateState
from storage.ring import Commit, Ring
from storage.samples import Samples
from storage.windows import ClosedWindow, DeadLetter, OpenWindow, RingState
from tests.format_1 import write_format_1

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
        (Path(self._home.name) / "run").mkdir()
        self.open()
        self.commits: list[tuple[float, Samples]] = []
        self.state = self.ring.state
        self.claimed = self.decided = 0
        self.positions: dict[str, bytes] = {}
        self.references: dict[str, bytes] = {}
        self.windows: list[ClosedWindow] = []
        self.dead: list[tuple[int, DeadLetter]] = []

    def open(self) -> None:
        self.ring = Ring.open_or_create(
            self.folder, shard="main", tokenizer_id=TOKENIZER, max_bytes=MAP_BYTES
        )
        self.registry = Registry.open_or_create(self.folder.with_name("registry"))

    def teardown(self) -> None:
        if hasattr(self, "ring"):
            self.ring.close()
            self.registry.close()
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
        edge = self.windows[-1].last_seq + 1 if self.windows else 0
        last = samples.first_seq + len(samples) - 1
        closes = closes and last >= edge
        closed = [ClosedWindow(number, edge, last, last - edge + 1, 2, now, "samples")] if closes else []
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
        assert state.txn > self.state.txn
        assert (state.commits, state.stream_time) == (self.state.commits + 1, commit.stream_time)
        assert (state.window, state.request) == (commit.window, commit.request)
        if len(samples):
            self.commits.append((commit.stream_time, samples))
        self.drop_evicted(state)
        for name, position in commit.positions.items():
            self.positions.pop(name, None)
            self.positions |= {name: position} if position else {}
        self.references |= commit.references
        self.windows += commit.closed
        self.state = state

    def drop_evicted(self, state: RingState) -> None:
        """Eviction takes whole blocks, the oldest first; a block is a commit, or several merged ones."""
        while self.commits and self.commits[0][1].first_seq < state.tail_seq:
            assert self.commits.pop(0)[1].seqs.stop <= state.tail_seq

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
        """Nothing younger goes; what is older remains only where it shares a block with what is not."""
        before = self.state.stream_time - age
        held = len(self.commits)
        gone = self.ring.evict_older_than(before)
        state = self.ring.state
        assert state.tail_seq == self.state.tail_seq + gone
        evicted = [commit for commit in self.commits if commit[1].first_seq < state.tail_seq]
        assert all(arrival < before for arrival, _ in evicted)
        self.drop_evicted(state)
        assert held - len(evicted) == len(self.commits)
        for _, block in itertools.islice(self.ring.copied_blocks(), 1):
            oldest = read_header(block)
            assert oldest.arrival >= before
            assert all(s.first_seq <= oldest.last_seq for arrival, s in self.commits if arrival < before)
        self.state = state

    @rule(subject=st.sampled_from(["crew-b", "nobody"]))
    def forget(self, subject: str) -> None:
        """Every sample about the subject is blank from now on; seqs, hashes and the digest stay."""
        gone = 0
        for n, (arrival, samples) in enumerate(self.commits):
            found = [i for i, name in enumerate(samples.subjects) if name == subject]
            self.commits[n] = (arrival, samples.without(found))
            gone += len(found)
        assert self.ring.forget(subject) == gone
        assert self.ring.state.forgotten == self.state.forgotten + gone
        assert self.ring.state.digest == self.state.digest
        self.state = self.ring.state

    @precondition(lambda self: self.claimed < len(self.windows))
    @rule()
    def claim(self) -> None:
        """A claim copies the window out of the ring, or finds that eviction was faster."""
        window = self.windows[self.claimed]
        self.claimed += 1
        row = UpdateRow("main", self.claimed, self.claimed, window.first_seq, window.last_seq, 1,
                        UpdateState.CLAIMED)  # fmt: skip
        if window.first_seq < self.state.tail_seq:
            with pytest.raises(LookupError):
                self.ring.read(window.first_seq, window.last_seq)
            row = msgspec.structs.replace(row, state=UpdateState.EXPIRED)
            self.decided = self.claimed
        else:
            held = Samples.concat(samples for _, samples in self.commits)
            at = window.first_seq - held.first_seq
            copied = self.ring.read(window.first_seq, window.last_seq)
            assert copied == held[at : at + len(copied)]
            assert len(copied) == window.samples
        with self.registry.write() as writer:
            writer.put_update(row)

    @precondition(lambda self: self.decided < self.claimed)
    @rule(outcome=st.sampled_from([UpdateState.QUARANTINED, UpdateState.ACKNOWLEDGED]))
    def acknowledge(self, outcome: UpdateState) -> None:
        """An update is decided; the shard's cursor follows."""
        row = next(row for row in self.registry.updates("main") if not row.decided)
        path = [UpdateState.STAGED, UpdateState.EVALUATED, UpdateState.PROMOTED, UpdateState.ACKNOWLEDGED]
        for state in path if outcome == UpdateState.ACKNOWLEDGED else [outcome]:
            with self.registry.write() as writer:
                writer.put_update(msgspec.structs.replace(row, state=state))
        self.decided = row.window

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
        self.registry.close()
        self.open()

    @rule()
    def drop_and_open(self) -> None:
        """A crash: the handle is lost without a close."""
        del self.ring, self.registry
        self.open()

    @precondition(lambda self: self.ring.usage().live_bytes < MAP_BYTES // 2)
    @rule()
    def begin_as_format_1_and_migrate(self) -> None:
        """A ring of the older format with the same content opens as this one, and keeps all of it."""
        folder = write_format_1(self.ring, self.commits)
        self.registry.close()
        self.open()
        assert folder.with_name("ring.v1").is_dir()
        shutil.rmtree(folder.with_name("ring.v1"))
        # Format 1 had no sums, knew no other clock and did not count what was forgotten.
        new = self.ring.state
        kept = {name: getattr(new, name) for name in ("txn", "rows_sum", "blocks_sum", "clock", "forgotten")}
        self.state = msgspec.structs.replace(self.state, **kept)

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
        assert self.ring.newest_hashes(count) == joined[max(0, len(joined) - 16 * count) :]

    @invariant()
    def rows_are_those_of_the_model(self) -> None:
        if not hasattr(self, "ring"):
            return
        assert self.ring.state == self.ring.read_state() == self.state
        assert self.ring.named("p") == self.positions
        assert self.ring.named("r") == self.references
        assert self.ring.windows() == self.windows
        assert self.ring.windows(after=2) == self.windows[2:]
        assert self.registry.cursor("main") == self.decided
        assert self.ring.dead_letters(10_000) == [row for row in self.dead if row[0] >= self.state.dead_first]

    @invariant()
    def the_ring_is_whole_and_bounded(self) -> None:
        if not hasattr(self, "ring"):
            return
        assert list(self.ring.check_blocks()) == []
        assert (self.folder / "data.mdb").stat().st_size == MAP_BYTES
        assert sum(len(samples) for _, samples in self.commits) == self.state.next_seq - self.state.tail_seq
        for outside in {self.state.next_seq, self.state.tail_seq - 1} - {-1}:
            with pytest.raises(LookupError):
                self.ring.read(outside, outside)


TestRingModel = RingModel.TestCase
TestRingModel.settings = settings(max_examples=12, stateful_step_count=40, deadline=None)
