"""Which messages of an MQTT session are ours already: what makes QoS 1 exactly once where an event has no id.

At QoS 1 a broker sends a message again, with DUP set and its packet id unchanged, until our PUBACK reached
it. We acknowledge after the commit, so between the two a message is in the ring and the broker does not know
it. The commit therefore keeps, beside the events, a row: the packet ids that were handed over and whose
acknowledgement the broker is not known to have, each with a checksum of topic and payload.

| crash or cut | what the broker does | what we do with it |
|---|---|---|
| before the commit | sends it again, DUP set | not in the row: handed over |
| commit done, PUBACK not sent or lost | sends it again, DUP set | in the row: acknowledged, not handed over |
| PUBACK arrived | does not send it again | the entry is idle, until the id is used anew |
| handed over, cut, not committed yet | sends it again, DUP set | known here: acknowledged after its commit |
| the session is lost | counts ids anew, DUP never set for an old one | all entries go |

Why a row of a commit names committed messages only: it is made when a chunk is closed, of what this and
earlier chunks hold, and chunks of one connector are committed in order, each with all its lines.

**Reuse of ids.** A broker uses an id anew only after our PUBACK for it; that message comes with DUP unset,
is handed over whatever the row says, and takes the entry over. If it is lost on the way (a cut, a kill), it
comes with DUP set and meets the old entry: the checksum tells them apart, unless topic and payload are equal.
Then one of two equal messages would be dropped. Entries are therefore forgotten as soon as the broker is
known to have the PUBACK: it answers packets in their order, so a PINGRESP says that it read every PUBACK sent
before the PINGREQ. What is left is a broker that gives an id anew at once (mosquitto and others count up to
65,535 first) and a cut within that round trip, or a kill before the next commit.

**Slots.** Under a flood the PINGRESP waits behind all that is in flight, 65,535 messages: one row of them all
would be 390 KB, written anew by each commit. So the row comes in slots of about SLOT_ENTRIES: a commit writes
the one that is being filled, those before it stay as they are, and a slot goes when nothing in it is held any
more. At a low rate there is one, of what waits for its commit and a round trip. Where slots disagree the
newer is right.

**Bound.** At most MAX_SLOTS of at most 9 KB; beyond, the oldest is let go, which could double what is in it.
Entries of an earlier connection that the broker did not send again within REDELIVERY_S of a new one were
acknowledged, and go.
"""

from __future__ import annotations

import hashlib
import re
import sys
import zlib
from array import array
from collections import deque
from collections.abc import Mapping

from pipeline.sources.mqtt_packets import Publish

__all__ = ["MAX_SLOTS", "REDELIVERY_S", "SLOT_ENTRIES", "Deliveries", "Run"]

REDELIVERY_S = 60.0
SLOT_ENTRIES = 1_024  # a chunk is never cut, so some more
MAX_SLOTS = 256
_IDS = 65_536
_FORMAT = b"\x01"
_IDENTITY_BYTES = 8
_HEAD_BYTES = 1 + _IDENTITY_BYTES
_ENTRY_BYTES = 6
# What is known of a packet id.
_KNOWN = re.compile(rb"[^\0]")
_FREE, _HELD, _ACKED, _ASKED = range(4)  # nothing; handed over; PUBACK sent; and a ping after it


class Run:
    """Messages that one chunk holds: its receipt.

    Attributes:
        acks: Packet ids to acknowledge once it is committed, in the order of receipt; also of messages that
            came after it and need no commit of their own.
        connection: The number of the connection on which it came.
    """

    def __init__(self, connection: int) -> None:
        self.acks: list[int] = []
        self.connection = connection


class Deliveries:
    """The messages of a session that are handed over and not known to be acknowledged.

    Args:
        identity: Whose session it is: broker and client id. Rows of another session are not taken.
        name: Begins the names of the rows.
        positions: What the last commit kept.
    """

    def __init__(self, identity: str, name: str, positions: Mapping[str, bytes]) -> None:
        self._head = _FORMAT + hashlib.blake2b(identity.encode(), digest_size=_IDENTITY_BYTES).digest()
        self._name = name
        self.known = positions.get(name) == self._head  # whether we had this session before
        self._states = bytearray(_IDS)
        self._checks = array("I", bytes(4 * _IDS))
        self._slots = array("I", bytes(4 * _IDS))
        self._live: dict[int, int] = {}  # slot -> ids in it that are held
        self._gone: list[int] = []  # slots for the next commit to forget
        self._slot = 0
        self._filling: list[int] = []  # ids of the slot that is being filled
        self._filled: list[int] = []  # their checksums
        self._old: set[int] = set()  # held, of an earlier connection, not sent again on this one
        self._acked = array("H")  # acknowledged after the last ping
        self._asked = array("H")  # acknowledged before the ping that is not answered yet
        self._runs: deque[Run] = deque()
        self._free: list[int] = []  # to acknowledge at once
        self._connection = 0
        self.unacknowledged = 0  # messages of this connection whose PUBACK was not sent
        self._read(positions)

    def connected(self, session_present: bool) -> bool:
        """A connection was accepted. Returns: whether the broker lost a session that we had."""
        lost = self.known and not session_present
        self.known = True
        held = [found.start() for found in _KNOWN.finditer(self._states)]
        for packet_id in held:
            if session_present:
                self._states[packet_id] = _HELD
            else:
                self._forget(packet_id)
        self._connection += 1
        self._old = {*held} if session_present else set()
        self._acked, self._asked = array("H"), array("H")
        self._free.clear()
        self.unacknowledged = 0
        for run in self._runs:  # packet ids of a connection that is gone: the broker sends them again
            run.acks.clear()
        return lost

    def begin(self) -> Run:
        """Begin a chunk; `close` or `release` it before the next."""
        if not self._live.get(self._slot):  # none of it is held any more: its row is written over
            self._filling, self._filled = [], []
        elif len(self._filling) >= SLOT_ENTRIES:
            self._slot += 1
            self._filling, self._filled = [], []
        self._begun = len(self._filling)
        return Run(self._connection)

    def take(self, message: Publish, run: Run) -> bool:
        """Take a message. Returns: whether it is to be handed over; if not, it came before."""
        packet_id = message.packet_id
        if not packet_id:
            return True
        self.unacknowledged += 1
        check = zlib.crc32(message.payload, zlib.crc32(message.topic)) ^ message.oversize
        if self._old:
            self._old.discard(packet_id)
        state = self._states[packet_id]
        if message.dup and state and self._checks[packet_id] == check:
            self._later(run).append(packet_id)
            return False
        if state:
            self._forget(packet_id)
        self._hold(packet_id, check, self._slot)
        self._filling.append(packet_id)
        self._filled.append(check)
        run.acks.append(packet_id)
        return True

    def pass_over(self, message: Publish, run: Run) -> None:
        """Take a message that is not wanted: it is acknowledged in its turn and not remembered."""
        if message.packet_id:
            self.unacknowledged += 1
            self._forget(message.packet_id)  # of a message before it: the id is used anew
            self._later(run).append(message.packet_id)

    def close(self, run: Run) -> dict[str, bytes]:
        """The chunk goes to its commit. Returns: the rows that this must keep; b"" forgets one."""
        self._runs.append(run)
        rows: dict[str, bytes] = {}
        if len(self._filling) > self._begun:
            rows[self._row_name(self._slot)] = self._row()
        while len(self._live) > MAX_SLOTS:
            self._let_go(min(self._live))
        gone = [slot for slot in self._gone if slot != self._slot and not self._live.get(slot)]
        self._gone = []
        return {self._row_name(slot): b"" for slot in gone} | rows

    def release(self, run: Run) -> None:
        """The messages of a chunk made nothing that a commit would have to keep."""
        for packet_id in self._filling[self._begun :]:
            self._forget(packet_id)
        del self._filling[self._begun :], self._filled[self._begun :]
        (self._runs[-1].acks if self._runs else self._free).extend(run.acks)

    def settled(self, run: Run) -> None:
        """The commit of a chunk is on stable storage; chunks come in their order."""
        while run in self._runs:
            first = self._runs.popleft()
            self._free += first.acks
            first.acks = []

    def acknowledge(self) -> list[int]:
        """The packet ids to acknowledge now, in the order of receipt; they count as sent."""
        free, self._free = self._free, []
        for packet_id in free:
            if self._states[packet_id]:
                self._states[packet_id] = _ACKED
                self._acked.append(packet_id)
        self.unacknowledged -= len(free)
        return free

    def ask(self) -> bool:
        """Whether a ping would tell something; if so, the caller sends it now."""
        if self._asked or not self._acked:
            return False
        self._asked, self._acked = self._acked, array("H")
        for packet_id in self._asked:
            if self._states[packet_id] == _ACKED:
                self._states[packet_id] = _ASKED
        return True

    def answered(self) -> None:
        """The broker answered the ping: it has the acknowledgements that were sent before."""
        for packet_id in self._asked:
            if self._states[packet_id] == _ASKED:  # not if the id was used anew meanwhile
                self._forget(packet_id)
        self._asked = array("H")

    def forget_old(self) -> None:
        """The connection stands for REDELIVERY_S: what was not sent again was acknowledged."""
        if self._runs and self._runs[0].connection != self._connection:
            return
        for packet_id in self._old:
            self._forget(packet_id)
        self._old = set()

    def session_row(self) -> dict[str, bytes]:
        """What a commit keeps of a session that begins."""
        gone, self._gone = self._gone, []
        return {self._row_name(slot): b"" for slot in gone} | {self._name: self._head}

    @property
    def held(self) -> int:
        """How many packet ids are remembered."""
        return sum(self._live.values())

    def _later(self, run: Run) -> list[int]:
        """Where the acknowledgement of what needs no commit belongs: behind all that came before it."""
        if run.acks:
            return run.acks
        return self._runs[-1].acks if self._runs else self._free

    def _hold(self, packet_id: int, check: int, slot: int) -> None:
        self._states[packet_id] = _HELD
        self._checks[packet_id] = check
        self._slots[packet_id] = slot
        self._live[slot] = self._live.get(slot, 0) + 1

    def _forget(self, packet_id: int) -> None:
        if self._states[packet_id]:
            self._states[packet_id] = _FREE
            slot = self._slots[packet_id]
            self._live[slot] -= 1
            if not self._live[slot]:
                del self._live[slot]
                self._gone.append(slot)

    def _let_go(self, slot: int) -> None:
        for found in _KNOWN.finditer(bytes(self._states)):
            if self._slots[found.start()] == slot:
                self._forget(found.start())

    def _row_name(self, slot: int) -> str:
        return f"{self._name}:held:{slot:08x}"

    def _row(self) -> bytes:
        ids, checks = array("H", self._filling), array("I", self._filled)
        if sys.byteorder == "big":
            ids.byteswap()
            checks.byteswap()
        return self._head + ids.tobytes() + checks.tobytes()

    def _read(self, positions: Mapping[str, bytes]) -> None:
        """Take back what the last commit kept, oldest slot first."""
        prefix = f"{self._name}:held:"
        for name in sorted(name for name in positions if name.startswith(prefix)):
            try:
                slot = int(name.removeprefix(prefix), 16)
            except ValueError:
                continue
            if not 0 <= slot < 2**31:
                continue
            row = positions[name]
            entries = _entries(row[_HEAD_BYTES:]) if self.known and row[:_HEAD_BYTES] == self._head else {}
            for packet_id, check in entries.items():
                self._forget(packet_id)
                self._hold(packet_id, check, slot)
            if not self._live.get(slot):
                self._gone.append(slot)
            self._slot = max(self._slot, slot + 1)


def _entries(data: bytes) -> dict[int, int]:
    """Packet id -> checksum; of two entries of an id the later is right."""
    count, rest = divmod(len(data), _ENTRY_BYTES)
    if rest:
        return {}
    ids, checks = array("H", data[: 2 * count]), array("I", data[2 * count :])
    if sys.byteorder == "big":
        ids.byteswap()
        checks.byteswap()
    return dict(zip(ids, checks, strict=True))
