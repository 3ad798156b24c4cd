"""What of an MQTT session is committed: against a broker in memory that forgets nothing, killed anywhere."""

from __future__ import annotations

from collections import Counter, deque
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.sources import mqtt_session
from pipeline.sources.mqtt_packets import Publish
from pipeline.sources.mqtt_session import MAX_SLOTS, SLOT_ENTRIES, Deliveries, Run

IDS = 8  # a broker with few packet ids, so that they come round soon
ROW_BYTES = 9  # before its entries of 6


def commit_rows(kept: dict[str, bytes], rows: dict[str, bytes]) -> None:
    """What a commit does with positions."""
    for name, row in rows.items():
        kept.pop(name, None)
        kept |= {name: row} if row else {}


class Session(RuleBasedStateMachine):
    """A broker that keeps the rules of QoS 1, a wire, our side, and a ring.

    Payloads are all different: that of two equal ones under one reused id one may be dropped is documented.
    """

    @initialize()
    def begin(self) -> None:
        self.published = 0
        self.queued: deque[bytes] = deque()  # at the broker, without an id yet
        self.flying: dict[int, bytes] = {}  # sent, not acknowledged, in their order
        self.next_id = 0
        self.wire: deque[Publish] = deque()
        self.back: deque[int | None] = deque()  # PUBACKs, None for a ping
        self.pongs = 0
        self.kept: dict[str, bytes] = {}
        self.stored: list[bytes] = []
        self.chunks: deque[tuple[Run, list[bytes], dict[str, bytes]]] = deque()
        self.small = patch.object(mqtt_session, "SLOT_ENTRIES", 3)
        self.small.start()
        self.ours = Deliveries("broker/client", "mqtt:a", self.kept)
        self.connect(present=False)
        commit_rows(self.kept, self.ours.session_row())

    def connect(self, *, present: bool) -> None:
        self.wire.clear()
        self.back.clear()
        self.pongs = 0
        self.ours.connected(present)
        for packet_id, payload in self.flying.items():
            self.wire.append(Publish(b"t", payload, packet_id, dup=True))

    @rule()
    def publish(self) -> None:
        self.queued.append(b"%d" % self.published)
        self.published += 1

    @precondition(lambda self: self.queued and len(self.flying) < IDS)
    @rule()
    def send(self) -> None:
        packet_id = next(i for n in range(IDS) if (i := (self.next_id + n) % IDS + 1) not in self.flying)
        self.next_id = packet_id
        payload = self.queued.popleft()
        self.flying[packet_id] = payload
        self.wire.append(Publish(b"t", payload, packet_id))

    @precondition(lambda self: self.wire)
    @rule(count=st.integers(1, 6))
    def receive(self, count: int) -> None:
        run, lines = self.ours.begin(), []
        for _ in range(min(count, len(self.wire))):
            message = self.wire.popleft()
            if self.ours.take(message, run):
                lines.append(message.payload)
        if not lines:
            self.ours.release(run)
            return
        self.chunks.append((run, lines, self.ours.close(run)))

    @precondition(lambda self: self.chunks)
    @rule(count=st.integers(1, 3))
    def commit(self, count: int) -> None:
        for _ in range(min(count, len(self.chunks))):
            run, lines, rows = self.chunks.popleft()
            commit_rows(self.kept, rows)
            self.stored += lines
            self.ours.settled(run)

    @rule()
    def acknowledge(self) -> None:
        self.back.extend(self.ours.acknowledge())
        if not self.pongs and None not in self.back and self.ours.ask():
            self.back.append(None)

    @precondition(lambda self: self.back)
    @rule(count=st.integers(1, 6))
    def broker_reads(self, count: int) -> None:
        for _ in range(min(count, len(self.back))):
            packet_id = self.back.popleft()
            if packet_id is None:
                self.pongs += 1
            else:
                # Of what it sent on this connection only, and in the order in which it sent it.
                assert packet_id in self.flying
                assert packet_id not in [message.packet_id for message in self.wire]
                del self.flying[packet_id]

    @precondition(lambda self: self.pongs)
    @rule()
    def pong(self) -> None:
        self.pongs -= 1
        self.ours.answered()

    @rule()
    def cut(self) -> None:
        self.connect(present=True)

    @rule()
    def kill(self) -> None:
        """What was not committed is gone, with all that was known of the connection."""
        self.chunks.clear()
        self.ours = Deliveries("broker/client", "mqtt:a", self.kept)
        self.connect(present=True)

    @precondition(lambda self: not any(message.dup for message in self.wire))
    @rule()
    def stand_long(self) -> None:
        self.ours.forget_old()

    @invariant()
    def nothing_is_doubled(self) -> None:
        doubled = [payload for payload, count in Counter(self.stored).items() if count > 1]
        assert not doubled

    @invariant()
    def rows_are_bounded(self) -> None:
        assert self.ours.held <= IDS
        assert all(len(row) <= ROW_BYTES + 6 * (3 + IDS) for row in self.kept.values())
        assert len(self.kept) <= 2 * IDS + 3

    def teardown(self) -> None:
        """Let everything through: nothing is lost."""
        if not hasattr(self, "ours"):
            return
        self.small.stop()
        for _ in range(2 * self.published + 10):
            if self.queued and len(self.flying) < IDS:
                self.send()
            if self.wire:
                self.receive(6)
            if self.chunks:
                self.commit(3)
            self.acknowledge()
            if self.back:
                self.broker_reads(6)
            if self.pongs:
                self.pong()
        assert sorted(self.stored, key=int) == [b"%d" % number for number in range(self.published)]


TestSession = Session.TestCase
TestSession.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


def message(payload: bytes = b"a", packet_id: int = 1, *, dup: bool = False) -> Publish:
    return Publish(b"t", payload, packet_id, dup=dup)


def committed(*messages: Publish) -> tuple[Deliveries, dict[str, bytes]]:
    """A session that holds messages whose commit is durable, and the rows that are kept."""
    kept: dict[str, bytes] = {}
    session = Deliveries("one", "mqtt:a", kept)
    session.connected(False)
    commit_rows(kept, session.session_row())
    run = session.begin()
    assert all(session.take(one, run) for one in messages)
    commit_rows(kept, session.close(run))
    session.settled(run)
    return session, kept


def test_the_rows_of_another_session_or_source_are_not_taken() -> None:
    _, kept = committed(message())
    for identity, name, taken in (("one", "mqtt:a", False), ("two", "mqtt:a", True), ("one", "mqtt:b", True)):
        session = Deliveries(identity, name, kept)
        session.connected(True)
        assert session.take(message(dup=True), session.begin()) is taken


def test_another_message_under_the_same_id_is_handed_over_although_dup_is_set() -> None:
    _, kept = committed(message(b"a"))
    session = Deliveries("one", "mqtt:a", kept)
    session.connected(True)
    assert session.take(message(b"b", dup=True), session.begin())


def test_an_equal_message_without_dup_is_a_new_one() -> None:
    session, _ = committed(message())
    assert session.take(message(), session.begin())


def test_after_the_session_was_lost_nothing_is_taken_for_a_redelivery() -> None:
    _, kept = committed(message())
    session = Deliveries("one", "mqtt:a", kept)
    assert session.connected(False), "it had one before"
    commit_rows(kept, session.session_row())
    assert [*kept] == ["mqtt:a"], "what was kept of it is gone"
    assert session.take(message(dup=True), session.begin())
    assert not Deliveries("one", "mqtt:a", {}).connected(False), "the first time there was nothing to lose"


def test_what_the_broker_is_known_to_have_is_forgotten() -> None:
    session, _ = committed(message())
    assert session.acknowledge() == [1]
    assert session.ask()
    assert session.held == 1
    session.answered()
    assert session.held == 0
    assert session.unacknowledged == 0


def test_acknowledgements_keep_the_order_of_receipt_also_for_what_is_dropped() -> None:
    session = Deliveries("one", "mqtt:a", {})
    session.connected(False)
    run = session.begin()
    session.take(message(packet_id=1), run)
    session.pass_over(message(packet_id=2), run)
    session.take(message(packet_id=3), run)
    session.close(run)
    late = session.begin()
    session.pass_over(message(packet_id=4), late)
    assert session.acknowledge() == [], "nothing before its turn"
    session.settled(run)
    assert session.acknowledge() == [1, 2, 3, 4]
    session.pass_over(message(packet_id=5), late)
    assert session.acknowledge() == [5], "nothing is before it"


@given(data=st.binary(max_size=200), name=st.text(max_size=10))
def test_rows_of_any_bytes_are_read_or_left(data: bytes, name: str) -> None:
    _, kept = committed(message())
    (slot,) = [name for name in kept if name != "mqtt:a"]
    for row in (data, kept[slot][:ROW_BYTES] + data):
        session = Deliveries("one", "mqtt:a", kept | {slot: row, f"mqtt:a:held:{name}": row})
        session.connected(True)
        session.close(session.begin())


def test_an_answered_ping_says_nothing_of_a_message_that_took_the_id_over() -> None:
    for asked_before in (True, False):
        session, _ = committed(message(b"a"))
        assert session.acknowledge() == [1]
        if asked_before:
            assert session.ask()
        run = session.begin()
        assert session.take(message(b"b"), run), "the broker has the PUBACK: the id is free"
        session.close(run)
        session.ask()
        session.answered()
        session.settled(run)
        session.connected(True)
        assert not session.take(message(b"b", dup=True), session.begin())


def test_what_waits_for_its_commit_since_an_earlier_connection_is_not_forgotten() -> None:
    session = Deliveries("one", "mqtt:a", {})
    session.connected(False)
    run = session.begin()
    session.take(message(), run)
    session.close(run)
    session.connected(True)
    session.forget_old()
    assert not session.take(message(dup=True), session.begin())
    session.settled(run)
    assert session.acknowledge() == [1]


def test_what_the_broker_does_not_send_again_is_forgotten_in_the_end() -> None:
    session, _ = committed(message(packet_id=1), message(packet_id=2))
    session.connected(True)
    assert not session.take(message(packet_id=2, dup=True), session.begin())
    session.forget_old()
    assert session.held == 1, "it had the acknowledgement of 1"


def test_under_a_flood_a_commit_writes_a_little_and_rows_go_when_they_are_not_needed() -> None:
    """65,535 in flight, and the ping is answered behind them all."""
    kept: dict[str, bytes] = {}
    session = Deliveries("one", "mqtt:a", kept)
    session.connected(False)
    commit_rows(kept, session.session_row())
    for first in range(1, 65_536, 500):
        run = session.begin()
        for packet_id in range(first, min(first + 500, 65_536)):
            assert session.take(message(packet_id=packet_id), run)
        rows = session.close(run)
        assert sum(map(len, rows.values())) <= ROW_BYTES + 6 * (SLOT_ENTRIES + 500)
        commit_rows(kept, rows)
        session.settled(run)
        session.acknowledge()
    again = Deliveries("one", "mqtt:a", kept)
    again.connected(True)
    assert again.held == 65_535
    run = again.begin()
    assert not any(again.take(message(packet_id=i, dup=True), run) for i in range(1, 65_536))
    assert again.acknowledge() == [*range(1, 65_536)]
    again.ask()
    again.answered()
    run = again.begin()
    again.take(message(packet_id=1), run)
    commit_rows(kept, again.close(run))
    assert len(kept) == 2, "the session and the slot that is being filled"


def test_slots_that_a_broker_never_lets_go_are_bounded() -> None:
    session = Deliveries("one", "mqtt:a", {})
    session.connected(False)
    kept: dict[str, bytes] = {}
    for turn in range(MAX_SLOTS + 20):
        run = session.begin()
        session.take(message(packet_id=1_000 + turn), run)  # never acknowledged
        for packet_id in range(1, 3):
            for _ in range(SLOT_ENTRIES // 2):
                session.take(message(packet_id=packet_id), run)
        commit_rows(kept, session.close(run))
    assert len(kept) <= MAX_SLOTS + 1
