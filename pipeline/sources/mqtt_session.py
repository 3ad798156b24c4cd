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

**Bound.** There are 65,535 ids, so at most 390 KB; in use it is what waits for its commit and about one round
trip more: 6 KB for 1,000 messages. Entries of an earlier connection that the broker did not send again within
`REDELIVERY_S` of a new one were acknowledged, and go.
"""

from __future__ import annotations

import hashlib
import sys
import zlib
from array import array
from collections import deque

from pipeline.sources.mqtt_packets import Publish

__all__ = ["REDELIVERY_S", "Deliveries", "Run"]

REDELIVERY_S = 60.0
_FORMAT = b"\x01"
_IDENTITY_BYTES = 8
_HEAD_BYTES = 1 + _IDENTITY_BYTES
_ENTRY_BYTES = 6


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
        identity: Whose session it is: broker and client id. A row of another session is not taken.
        row: What the last commit kept, b"" for nothing.
    """

    def __init__(self, identity: str, row: bytes = b"") -> None:
        self._head = _FORMAT + hashlib.blake2b(identity.encode(), digest_size=_IDENTITY_BYTES).digest()
        self.known = row[:_HEAD_BYTES] == self._head  # whether we had this session before
        self._held = _entries(row[_HEAD_BYTES:]) if self.known else {}
        self._old: set[int] = set()  # held, of an earlier connection, not sent again on this one
        self._acked: set[int] = set()  # acknowledged after the last ping
        self._asked: set[int] = set()  # acknowledged before the ping that is not answered yet
        self._runs: deque[Run] = deque()
        self._free: list[int] = []  # to acknowledge at once
        self._connection = 0
        self.unacknowledged = 0  # messages of this connection whose PUBACK was not sent

    def connected(self, session_present: bool) -> bool:
        """A connection was accepted. Returns: whether the broker lost a session that we had."""
        lost = self.known and not session_present
        self.known = True
        if not session_present:
            self._held.clear()
        self._connection += 1
        self._old = set(self._held)
        self._acked.clear()
        self._asked.clear()
        self._free.clear()
        self.unacknowledged = 0
        for run in self._runs:  # packet ids of a connection that is gone: the broker sends them again
            run.acks.clear()
        return lost

    def begin(self) -> Run:
        """Begin a chunk; `close` it before anything else is handed over."""
        return Run(self._connection)

    def take(self, message: Publish, run: Run) -> bool:
        """Take a message. Returns: whether it is to be handed over; if not, it came before."""
        packet_id = message.packet_id
        if not packet_id:
            return True
        self.unacknowledged += 1
        check = zlib.crc32(message.payload, zlib.crc32(message.topic)) ^ message.oversize
        self._old.discard(packet_id)
        if message.dup and self._held.get(packet_id) == check:
            self._later(run).append(packet_id)
            return False
        self._held[packet_id] = check
        self._acked.discard(packet_id)
        self._asked.discard(packet_id)
        run.acks.append(packet_id)
        return True

    def pass_over(self, message: Publish, run: Run) -> None:
        """Take a message that is not wanted: it is acknowledged in its turn and not remembered."""
        if message.packet_id:
            self.unacknowledged += 1
            self._held.pop(message.packet_id, None)  # of a message before it: the id is used anew
            self._later(run).append(message.packet_id)

    def close(self, run: Run) -> None:
        """The chunk goes to its commit."""
        self._runs.append(run)

    def release(self, run: Run) -> None:
        """The messages of a chunk made nothing that a commit would have to keep."""
        for packet_id in run.acks:
            self._held.pop(packet_id, None)
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
        self._acked.update(free)
        self.unacknowledged -= len(free)
        return free

    def ask(self) -> bool:
        """Whether a ping would tell something; if so, the caller sends it now."""
        if self._asked or not self._acked:
            return False
        self._asked, self._acked = self._acked, set()
        return True

    def answered(self) -> None:
        """The broker answered the ping."""
        for packet_id in self._asked:
            self._held.pop(packet_id, None)
        self._asked = set()

    def forget_old(self) -> None:
        """The connection stands for REDELIVERY_S: what was not sent again was acknowledged."""
        if self._runs and self._runs[0].connection != self._connection:
            return
        for packet_id in self._old:
            self._held.pop(packet_id, None)
        self._old = set()

    def row(self) -> bytes:
        """What a commit keeps: of the chunks that were closed, and of the one that is being closed."""
        ids, checks = array("H", self._held.keys()), array("I", self._held.values())
        if sys.byteorder == "big":
            ids.byteswap()
            checks.byteswap()
        return self._head + ids.tobytes() + checks.tobytes()

    def _later(self, run: Run) -> list[int]:
        """Where the acknowledgement of what needs no commit belongs: behind all that came before it."""
        if run.acks:
            return run.acks
        return self._runs[-1].acks if self._runs else self._free


def _entries(data: bytes) -> dict[int, int]:
    count, rest = divmod(len(data), _ENTRY_BYTES)
    if rest:
        return {}
    ids, checks = array("H", data[: 2 * count]), array("I", data[2 * count :])
    if sys.byteorder == "big":
        ids.byteswap()
        checks.byteswap()
    return dict(zip(ids, checks, strict=True))
