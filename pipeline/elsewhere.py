"""What the rings of the host's other shards hold for the sources of this one, and how a source moves.

A source is read by one ingest process at a time (each takes the role `source-<name>`), but after
`ingest.processes` or the order of the sources changed, by another one than before. What it needs then lies in
another shard's ring, which nobody but that shard's process may write:

    what                             taken as
    positions of its inputs          one commit into the own ring before anything is read, see below
    hashes of the newest samples     a second, read-only memory of dedup; redelivered events are recognized
    reference values of deadbands    the one with the newest stream time

Positions. Each source has a revision, absent for 0, in the ring of every shard that ever took it over
(`p@<connector>` beside its positions `p<connector>:...`). All positions of a source move together: else an
input that its last owner forgot would come back from an older ring. The highest revision on the host wins;
with none, the ring that holds positions: only one can, because a shard that finds some elsewhere takes them
over before it reads.

    begin                            commit                                     then
    own ring wins                    nothing                                    read from there
    another shard's ring wins        its positions, in place of the own ones,   read from there
                                     and its revision + 1
    crash before the commit          none                                       the other ring still wins
    crash after the commit           whole                                      the own ring wins

What the other ring holds stays, outvoted for ever. A ring without the newest revision, restored from an old
backup say, is outvoted as well.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from pipeline.dedup import Reference, SeenHashes
from storage.check import quick_check
from storage.errors import LockHeldError, StorageError
from storage.folder import DataFolder, RoleLock
from storage.opening import mend_ring, open_ring_reader
from storage.ring import Commit, Ring
from storage.samples import HASH_BYTES, Samples

__all__ = ["Elsewhere", "OtherRing", "newest_positions", "starting", "take_over"]

REVISION = "@"
POLL_S = 0.1
SAY_S = 10.0
log = logging.getLogger("edgewater.shards")


class OtherRing(msgspec.Struct, frozen=True):
    """What the ring of another shard holds, as it was when it was looked at.

    Attributes:
        shard: Its name.
        dedup_key: Secret of its hashes.
        positions, references: Its rows.
        hashes: Dedup hashes of its newest samples, HASH_BYTES each, oldest first.
    """

    shard: str
    dedup_key: bytes
    positions: dict[str, bytes]
    references: dict[str, bytes]
    hashes: bytes = b""


class Elsewhere(msgspec.Struct, frozen=True):
    """What all other shards of the host hold.

    Attributes:
        rings: Their rings, "main" first.
    """

    rings: tuple[OtherRing, ...] = ()

    @classmethod
    def read(
        cls, folder: DataFolder, shard: str, *, horizon: int, tokenizer_id: str = "", max_bytes: int = 0
    ) -> Elsewhere:
        """Read the rings of all other shards, as the holder of the role "starting".

        A ring that nobody works on is mended first where that is needed, as its own process would.

        Args:
            horizon: So many hashes are read in all, the same share of each ring.
            tokenizer_id, max_bytes: Of a ring that must be made anew without its header.
        Raises: StorageError if one cannot be read: what it says of the positions is not known then.
        """
        others = [name for name in folder.shards(unfinished=True) if name != shard]
        key = _key_of(folder.ring / shard) if others else b""
        rings: list[OtherRing] = []
        for name in others:
            with _at_rest(folder, name) as rests:
                if rests:
                    mend_ring(
                        folder, name, tokenizer_id=tokenizer_id, max_bytes=max_bytes, dedup_key=key
                    )  # fmt: skip
                if (folder.ring / name).is_dir():
                    rings.append(_read(folder.ring / name, name, horizon // len(others)))
                    key = key or rings[-1].dedup_key
        return cls(tuple(rings))

    @property
    def dedup_key(self) -> bytes:
        """The secret that the host's rings share, b"" where there is no other ring."""
        return self.rings[0].dedup_key if self.rings else b""

    def seen(self, dedup_key: bytes) -> SeenHashes | None:
        """What the other shards have stored, for a dedup that uses this secret; None if that is nothing."""
        foreign = [ring.shard for ring in self.rings if ring.dedup_key != dedup_key]
        for shard in foreign:
            log.warning("ring %s has another dedup secret: what it stored is not recognized here", shard)
        hashes = b"".join(ring.hashes for ring in self.rings if ring.shard not in foreign)
        count = len(hashes) // HASH_BYTES
        return SeenHashes(count, count, hashes) if count else None

    def references(self, own: Mapping[str, bytes]) -> dict[str, bytes]:
        """Reference values by source, of each the newest on the host.

        Args:
            own: Those of the own ring.
        """
        at = msgspec.msgpack.Decoder(Reference).decode
        newest = dict(own)
        for ring in self.rings:
            for source, data in ring.references.items():
                if source not in newest or at(newest[source]).at < at(data).at:
                    newest[source] = data
        return newest


def _key_of(folder: Path) -> bytes:
    """The secret of the own ring, b"" where there is none, or none that can be read yet."""
    with contextlib.suppress(StorageError):
        if folder.is_dir() and all(problem.cure != "rebuild" for problem in quick_check(folder)):
            with Ring.open_reader(folder) as ring:
                return ring.header.dedup_key
    return b""


def _read(folder: Path, shard: str, hashes: int) -> OtherRing:
    with open_ring_reader(folder) as ring:
        return OtherRing(
            shard, ring.header.dedup_key, ring.named("p"), ring.named("r"), ring.newest_hashes(hashes)
        )


@contextlib.contextmanager
def _at_rest(folder: DataFolder, shard: str) -> Iterator[bool]:
    """Whether no process works on a shard; if so none begins to meanwhile."""
    try:
        lock = folder.lock(f"ingest-{shard}")
    except LockHeldError:
        yield False
        return
    with lock:
        yield True


@contextlib.contextmanager
def starting(folder: DataFolder, stop: threading.Event) -> Iterator[RoleLock]:
    """Be the one ingest process of the host that starts: the others wait until its ring is open.

    So no ring is made, mended or migrated while another process looks at it, the first ring's secret is
    there when the second ring is made, and a look at a ring at rest is never in the way of its process.
    Close the lock once the ring is open.

    Raises: LockHeldError if told to stop meanwhile.
    """
    waited = 0.0
    while True:
        try:
            lock = folder.lock("starting")
            break
        except LockHeldError as error:
            if stop.wait(POLL_S):
                raise
            waited += POLL_S
            if waited >= SAY_S:
                waited = 0.0
                log.warning("waiting to start: %s", error)
    try:
        yield lock
    finally:
        lock.close()


def take_over(ring: Ring, elsewhere: Elsewhere, connectors: Sequence[str]) -> list[str]:
    """Make the newest positions on the host those of this ring, for some connectors.

    Returns: those that came from another shard.
    """
    own = ring.named("p")
    moved: dict[str, bytes] = {}
    came = []
    for name in connectors:
        winner, revision = _winner(name, own, elsewhere)
        if winner is None:
            continue
        came.append(name)
        theirs = _of(name, winner.positions)
        moved |= {stale: b"" for stale in _of(name, own) if stale not in theirs} | theirs
        moved[REVISION + name] = msgspec.msgpack.encode(revision + 1)
        log.info("%s goes on where shard %s left it", name, winner.shard)
    if moved:
        state = ring.state
        # The commit point, the table above: from here the sources are this shard's.
        ring.commit(
            Commit(
                samples=Samples(), stream_time=state.stream_time, window=state.window,
                counters=state.counters, positions=moved, request=state.request, clock=state.clock,
            )
        )  # fmt: skip
    return came


def newest_positions(elsewhere: Elsewhere, connectors: Sequence[str]) -> dict[str, bytes]:
    """The newest positions of some connectors, of all rings that were read."""
    newest: dict[str, bytes] = {}
    for name in connectors:
        winner, _ = _winner(name, {}, elsewhere)
        if winner is not None:
            newest |= _of(name, winner.positions)
    return newest


def _winner(name: str, own: Mapping[str, bytes], elsewhere: Elsewhere) -> tuple[OtherRing | None, int]:
    """The other ring whose positions of a connector are newer than the own ones, and its revision."""
    best, highest = None, _revision(name, own)
    held = bool(_of(name, own)) or highest > 0
    for ring in elsewhere.rings:
        revision = _revision(name, ring.positions)
        if revision > highest or (not held and revision == highest and _of(name, ring.positions)):
            best, highest, held = ring, revision, True
    return best, highest


def _revision(name: str, positions: Mapping[str, bytes]) -> int:
    found = positions.get(REVISION + name)
    return msgspec.msgpack.decode(found, type=int) if found else 0


def _of(name: str, positions: Mapping[str, bytes]) -> dict[str, bytes]:
    """The positions of a connector's inputs; a connector's name holds one colon, so none begins another's."""
    return {key: data for key, data in positions.items() if key == name or key.startswith(f"{name}:")}
