"""A program that is killed: `edgewater ingest --finite` in full, fed by a sender that delivers at least once.

The traffic is a pure function of a seed, so the auditor outside can compute what was sent. The sender takes
the place of the configured connector and behaves like an MQTT client at QoS 1: it has a receive window, and
sends again after a restart what was not acknowledged, and some that was. Each acknowledged chunk is one line
on standard output, written past every buffer: the number of traffic lines acknowledged so far.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import random
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

import pipeline.cli
import pipeline.commit
import pipeline.config_check
import pipeline.connectors
import pipeline.health  # verbs import late what they need; here it is paid for once, not in each lifetime
import pipeline.ingest
import pipeline.roles
from pipeline.commit import CommitStep, Committed
from pipeline.events import Batch, Line, Origin
from pipeline.settings import Source
from pipeline.sources.inbox import Chunk, Connector, Inbox, ReaderThread, Settled
from storage.errors import WriteFailedError
from storage.ring import Commit, Ring
from storage.windows import RingState
from tests.crash.lives import serve

__all__ = ["SOURCE", "IngestLife", "Sent", "Traffic", "write_config"]

SOURCE = "plant"
T0 = 1_763_900_000.0
REDELIVERED_WITHIN = 30  # lines: closer than any eviction, so that a repeat is always known as one


class Sent(msgspec.Struct, frozen=True):
    """One line of traffic and what must become of it.

    Attributes:
        number: Which line.
        data: The bytes.
        sample: Whether it becomes a sample (it is neither broken nor a repeat).
        broken: Whether it becomes a dead letter.
        identity: What its dedup hash is taken of.
    """

    number: int
    data: bytes
    sample: bool = False
    broken: bool = False
    identity: object = None

    @property
    def arrival(self) -> float:
        """When it arrives, seconds: also its event time."""
        return T0 + self.number / 100


class Traffic:
    """Lines 0, 1, 2, … of a seed: readings, texts, dialogues, broken ones and exact repeats.

    Args:
        seed: Decides all of them.
        bulk: Characters that a text brings along that do not compress; they fill a ring.
    """

    def __init__(self, seed: int, bulk: int = 0) -> None:
        self._seed, self._bulk = seed, bulk
        self.line = functools.cache(self._make)

    def _make(self, number: int) -> Sent:
        rng = random.Random(f"{self._seed} {number}")
        dice = rng.random()
        if dice < 0.06:
            broken = rng.choice((b'{"kind":"reading","values":{},"n":%d}', b'{"half":"of %d', b"\xff\xfe %d"))
            return Sent(number, broken % number, broken=True)
        if dice < 0.12 and number >= REDELIVERED_WITHIN:
            first = self.line(number - rng.randint(1, REDELIVERED_WITHIN))
            if first.sample:
                return Sent(number, first.data)
        source = rng.choice((None, SOURCE, "cmms"))
        event: dict[str, Any] = {"ts": T0 + number / 100, "id": f"e{number}"}
        event |= {"source": source} if source else {}
        event |= rng.choice((self._reading, self._text, self._exchange))(rng, number)
        event |= {"subject": "crew-b"} if rng.random() < 0.1 else {}
        return Sent(number, json.dumps(event).encode(), sample=True, identity=_identity(event))

    def _reading(self, rng: random.Random, number: int) -> dict[str, Any]:
        values = {"pressure": round(rng.uniform(2, 5), 2), "count": number}
        return {"kind": "reading", "values": values, "units": {"pressure": "bar"}}

    def _text(self, rng: random.Random, number: int) -> dict[str, Any]:
        return {"kind": "text", "text": f"work order {number} {_noise(rng, self._bulk)}"}

    def _exchange(self, rng: random.Random, number: int) -> dict[str, Any]:
        said = (("user", f"E{number}?"), ("assistant", f"Reset {rng.randint(1, 9)} times."))
        return {"kind": "exchange", "messages": [{"role": role, "content": text} for role, text in said]}


def _noise(rng: random.Random, characters: int) -> str:
    return base64.b85encode(rng.randbytes(characters * 4 // 5)).decode()


def _identity(event: dict[str, Any]) -> object:
    """What identifies an event, by DESIGN.md: its id, or its content in a text of a source not configured."""
    source = event.get("source", SOURCE)
    if source == SOURCE or event["kind"] == "reading":
        return ("i", source, event["id"])
    if event["kind"] == "text":
        return ("c", source, event["text"])
    return ("c", source, [(said["role"], said["content"]) for said in event["messages"]])


def hash_of(sent: Sent, key: bytes) -> bytes:
    """The dedup hash that a sample of this line must carry in a ring with this secret."""
    return hashlib.blake2b(msgspec.msgpack.encode(sent.identity), digest_size=16, key=key).digest()


class IngestLife(msgspec.Struct, frozen=True):
    """What a lifetime is told.

    Attributes:
        config: Its configuration file.
        seed, bulk: Of the traffic.
        first, end: Lines to send, the end not included.
        chunk: Lines a chunk.
        window: Chunks that may wait for their acknowledgement.
        files: Read the configured files instead, as `edgewater ingest --finite` does.
        cheat: A promise to break, to see that the auditor notices: "early" acknowledges before the commit,
            "stubborn" goes on after a failed one, "forgetful" starts without its dedup memory.
    """

    config: str
    seed: int = 0
    bulk: int = 0
    first: int = 0
    end: int = 0
    chunk: int = 5
    window: int = 1
    files: bool = False
    cheat: Literal["", "early", "stubborn", "forgetful"] = ""


class Sender:
    """A connector without positions: what is not acknowledged is sent again."""

    name = "sender"

    def __init__(self, life: IngestLife) -> None:
        self._life = life
        self._traffic = Traffic(life.seed, life.bulk)
        self._credit = threading.Semaphore(life.window)
        self._thread = ReaderThread()

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None:
        """Begin to send."""
        self._inbox = inbox
        self._thread.start(self, inbox, self._send)

    def acknowledge(self, settled: list[Settled]) -> None:
        """Tell the world what may be forgotten."""
        for one in settled:
            os.write(1, f"{one.receipt}\n".encode())
            self._credit.release()

    def stop(self) -> None:
        """Stop sending."""
        self._credit.release()
        self._thread.stop()

    def _send(self) -> None:
        life = self._life
        for number, first in enumerate(range(life.first, life.end, life.chunk), 1):
            self._credit.acquire()
            end = min(first + life.chunk, life.end)
            lines = [self._line(self._traffic.line(n)) for n in range(first, end)]
            # The receive window is full with this one: nothing more comes before a commit.
            full = number % life.window == 0
            if self._thread.stopping.is_set() or not self._inbox.put(
                Chunk(self, lines, receipt=end, urgent=full)
            ):
                return

    def _line(self, sent: Sent) -> Line:
        return Line(sent.data, -1, Origin(SOURCE, "sender", sent.arrival))


def write_config(
    path: Path, model: Path, *, ring_bytes: int, min_samples: int = 40, pattern: str = ""
) -> None:
    """Write the configuration of a data folder beside it.

    Args:
        path: The configuration file; the data folder is `data` beside it.
        model: The prepared base.
        ring_bytes: Size of the ring.
        min_samples: Where windows close.
        pattern: Files to read; "" takes standard input's place for the sender.
    """
    source = f'kind = "files"\npath = "{pattern}"' if pattern else 'kind = "stdin"'
    path.write_text(
        f"""
data_dir = "{path.parent / "data"}"
[model]
path = "{model}"
[ring]
max_bytes = "{ring_bytes >> 10}KiB"
flush_ms = 10
[trigger]
min_samples = {min_samples}
min_tokens = 3000
max_due = 1
[health]
listen = ""
[[sources]]
name = "{SOURCE}"
{source}
dedup = "delivery"
""",
        encoding="utf-8",
    )


def live(argument: bytes) -> None:
    """Be the ingest process, under a supervisor, until the traffic ends."""
    life = msgspec.json.decode(argument, type=IngestLife)
    # The configuration refuses rings that evict within a test; the ring itself takes any.
    vars(pipeline.config_check)["_MIN_RING_BYTES"] = 1 << 20
    os.environ[pipeline.roles.SUPERVISED] = str(os.getppid())
    if not life.files:

        def sender(sources: Sequence[Source], *, finite: bool) -> list[Connector]:
            return [Sender(life)]

        pipeline.connectors.make_connectors = sender
    _cheat(life.cheat)
    sys.argv = ["edgewater", "ingest", "--finite", "--config", life.config]
    pipeline.cli.main()


def _cheat(how: str) -> None:
    """Break one promise."""
    commit, step = Ring.commit, CommitStep.__call__
    if how == "early":

        def acknowledge_first(self: CommitStep, batch: Batch) -> Committed:
            pipeline.commit._acknowledge(batch)
            batch.receipts = []
            return step(self, batch)

        CommitStep.__call__ = acknowledge_first  # type: ignore[method-assign]
    elif how == "stubborn":

        def try_again(self: Ring, wanted: Commit) -> RingState:
            try:
                return commit(self, wanted)
            except WriteFailedError:
                self._dead = ""
                return commit(self, wanted)

        Ring.commit = try_again  # type: ignore[assignment, method-assign]
    elif how == "forgetful":
        Ring.newest_hashes = lambda self, count: b""  # type: ignore[method-assign]


if __name__ == "__main__":
    serve(live)
