"""Files of lines (JSON, CSV, logs), followed like `tail -F` through rotation; `.zst` files too.

    at the end of a file    its path now names         then
    plain, following        the same file              wait
    plain, following        another file, not empty    it was rotated: read on to its end, begin the new one
    plain, following        another file, empty        wait: the writer still has the old one
    plain, following        nothing                    wait; once it is deleted, it is done and forgotten
    plain, finite           the same file, or nothing  take the last line if it is whole; done
    plain, finite           another file               take the last line, begin the new one
    zst                     anything                   done until it grows: then unpacked again from its start

Files are known by (device, inode) and the hash of their head, not by name. One that is renamed and still
matches the pattern goes on under its new name, and takes its committed position along; one that no longer
matches is drained first, also after a restart, then its successor is begun. When a file was truncated, what
was not read of it is looked for in a copy beside it (logrotate's copytruncate), then it is read anew.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from pipeline.events import Line, Origin
from pipeline.settings import Config, Source
from pipeline.sources.formats import JsonLines, Shaper
from pipeline.sources.inbox import Chunk, Inbox, ReaderThread, Settled
from pipeline.sources.lines import READ_BYTES
from pipeline.sources.reach import Identity, Reach
from pipeline.sources.tail import FilePosition, Tail, has_content_of, names, str_of

__all__ = ["FilePosition", "FilesConnector", "unmatched_sources"]

POLL_S = 0.25
PIECES = 32  # of a file in a row, 1 MiB: between them the names of all files are looked at
MAX_OPEN = 200  # files at a time; beyond it those that wait are closed until they grow
MAX_NAME_BYTES = 400  # an LMDB key has 511
MAX_COMPLAINTS = 1_000  # names in a folder that others may fill
log = logging.getLogger("edgewater.files")


class FilesConnector:
    """Reads every file that matches a pattern, each from its committed position.

    Args:
        source: Name of the configured source.
        pattern: A path, a folder (all files in it but hidden ones), or a glob with ** for any depth.
        shaper: Makes what makes events of the lines of one file.
        finite: End when every file is read to its end, instead of following.
        timed: Take stream time from the events' own `ts` (plain lines of a replay).
    """

    def __init__(
        self,
        source: str,
        pattern: str,
        shaper: Callable[[], Shaper] = JsonLines,
        *,
        finite: bool = False,
        timed: bool = False,
    ) -> None:
        self.name = f"files:{source}"
        self._source = source
        self._reach = Reach(pattern)
        self._make_shaper = shaper
        self._finite = finite
        self._timed = timed
        self._thread = ReaderThread()
        self._stop = self._thread.stopping
        self._here: dict[Identity, str] = {}  # files that match, and where
        self._settled = False  # whether the look before saw the same: else a rotation may be under way
        self._tails: dict[Identity, Tail] = {}  # files that are open
        self._rows: dict[str, FilePosition] = {}  # by input, as the ring holds them or soon will
        self._done: dict[Identity, int] = {}  # files left alone, until their size is another
        self._complaints: dict[str, str] = {}

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None:
        """Begin to read in a thread of its own."""
        self._inbox = inbox
        decode = msgspec.msgpack.Decoder(FilePosition).decode
        mine = f"{self.name}:"
        self._rows = {name: decode(data) for name, data in positions.items() if name.startswith(mine)}
        self._thread.start(self, inbox, self._run)

    def acknowledge(self, settled: list[Settled]) -> None:
        """Files need none: the position is in the commit."""

    def stop(self) -> None:
        """Stop reading."""
        self._thread.stop()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                moved = self._sweep()
                if self._finite and not moved:
                    break
                if not moved:
                    self._stop.wait(POLL_S)
        except Exception:
            log.exception("%s stopped", self.name)
            raise
        finally:
            for tail in self._tails.values():
                tail.close()

    def _sweep(self) -> bool:
        """Read some of every file. Returns: whether anything was read, opened or closed."""
        self._look()
        moved = not self._settled
        for identity, tail in list(self._tails.items()):
            for _ in range(PIECES):
                if self._stop.is_set() or self._tails.get(identity) is not tail or not self._advance(tail):
                    break
                moved = True
        for identity, path in self._here.items() if self._settled else ():
            if identity not in self._tails and not self._stop.is_set():
                moved |= self._begin(path, identity)
        return moved

    def _look(self) -> None:
        """See which files match, and let those that were renamed go on under their new names."""
        here, odd = self._reach.files()
        for path, why in odd.items():
            self._complain(path, OSError(why))
        self._settled, self._here = here == self._here, here
        if not self._settled:
            return
        self._done = {identity: size for identity, size in self._done.items() if identity in self._here}
        strange = {i: path for i, path in self._here.items() if self._row_of(self._input(path)) != i}
        if strange:
            self._follow_renamed(strange)

    def _follow_renamed(self, strange: Mapping[Identity, str]) -> None:
        newest = {row.identity: row for row in sorted(self._rows.values(), key=lambda row: row.offset)}
        renamed: dict[str, FilePosition] = {}
        for identity, path in strange.items():
            row, tail = newest.get(identity), self._tails.get(identity)
            if tail is not None:
                tail.path = path
            if row is not None and (tail is not None or names(row, path, self._reach)):
                renamed[self._input(path)] = row
        if renamed:  # in one commit: a row of theirs may be where another must go
            self._move(renamed)

    def _advance(self, tail: Tail) -> bool:
        """Read one piece of a file. Returns: whether anything was read or opened."""
        if tail.rewritten():
            self._leave_truncated(tail)
            return True
        if data := tail.read():
            tail.waiting = False
            self._send(tail, tail.splitter.feed(data))
            return True
        return self._at_end(tail)

    # -- the end of a file --------------------------------------------------------------------------

    def _at_end(self, tail: Tail) -> bool:
        """Decide what an end of file means (the table above). Returns: whether reading goes on elsewhere."""
        present = self._reach.identity_of(tail.path)
        rotated = present not in (tail.identity, None)
        if tail.packed or (self._finite and not rotated):
            self._leave_done(tail)
            return True
        if not rotated and not tail.deleted():
            tail.waiting, tail.leaving = True, False
            return False
        if rotated and (not self._settled or tail.identity in self._here):
            return True  # the next look knows its new name
        if not self._finite and not tail.leaving:
            # Once more: its last lines may have come between our last read and this look.
            tail.leaving = not rotated or _size(tail.path) > 0
            return tail.leaving
        self._send(tail, tail.splitter.finish())
        self._forget(tail, durably=not rotated)
        return True

    def _leave_done(self, tail: Tail) -> None:
        """Leave a file alone until it grows; a last line that is not whole may yet be completed."""
        last = tail.splitter.finish()
        if not tail.broken and all(tail.shaper.is_whole(data) for _, data in last):
            self._send(tail, last)
        self._done[tail.identity] = tail.size
        self._close(tail)

    def _leave_truncated(self, tail: Tail) -> None:
        """Begin the new content, after the rest of the old one if somebody copied it."""
        log.info("%s was truncated: reading it from its start", tail.path)
        known = self._rows.get(self._input(tail.path))
        copy = next(
            (p for p in _siblings(tail.path) if known and has_content_of(p, known, self._reach)), None
        )
        if copy is not None and known is not None:
            self._close(tail)
            self._open(tail.path, copy, known)
            return
        self._send(tail, tail.splitter.finish())
        self._forget(tail, durably=True)

    def _close(self, tail: Tail) -> None:
        self._tails.pop(tail.identity).close()

    def _forget(self, tail: Tail, *, durably: bool) -> None:
        name = self._input(tail.path)
        self._close(tail)
        if self._row_of(name) == tail.identity:
            del self._rows[name]
            if durably:
                self._move({name: None})

    # -- the beginning of a file --------------------------------------------------------------------

    def _begin(self, path: str, identity: Identity) -> bool:
        """Open a file that matches. Returns: whether it, or what must be read before it, was opened."""
        if identity in self._done and (self._finite or self._done[identity] == _size(path)):
            return False
        row = self._rows.get(self._input(path))
        if row is None or names(row, path, self._reach):
            return self._open(path, path, row, identity)
        if not self._readable(path):
            return False  # and so it is not known what it holds
        # What was followed under this name before is another file, or other content: that comes first.
        before = self._tails.get(row.identity)
        if any(tail.path == path for tail in self._tails.values()) or (before and not before.waiting):
            return False
        if before is None and row.identity != identity and row.identity in self._here:
            if row.identity not in self._done:
                return False
        elif before is None:
            places = [*_siblings(path), *self._here.values()]
            renamed = next((place for place in places if names(row, place, self._reach)), None)
            copies = (p for p in (path, *places) if row.offset and has_content_of(p, row, self._reach))
            if rest := renamed or next(copies, None):
                return self._open(path, rest, row, row.identity if renamed else None)
            log.warning("%s: the file read so far is gone; reading the present one from its start", path)
        del self._rows[self._input(path)]
        return self._open(path, path, None, identity)

    def _open(
        self, path: str, target: str, known: FilePosition | None, expected: Identity | None = None
    ) -> bool:
        """Open a file to be followed under a path; say it once if that cannot be."""
        if len(self._tails) >= MAX_OPEN:
            idle = next((tail for tail in self._tails.values() if tail.waiting), None)
            if idle is None:
                return False
            self._done[idle.identity] = idle.reached  # not its size now: it may just have grown
            self._close(idle)
        try:
            tail = Tail(target, known, self._reach, self._make_shaper(), finite=self._finite)
        except OSError as error:
            return self._complain(target, error)
        if tail.identity in self._tails or expected not in (tail.identity, None):
            tail.close()  # names changed since the look
            return False
        tail.path = path
        self._tails[tail.identity] = tail
        if known is not None:  # a copy's identity is its own
            device, inode = tail.identity
            self._rows[self._input(path)] = msgspec.structs.replace(known, device=device, inode=inode)
        return True

    def _readable(self, path: str) -> bool:
        try:
            self._reach.open(path).close()
        except OSError as error:
            return self._complain(path, error)
        return True

    def _complain(self, path: str, error: OSError) -> bool:
        known = self._complaints.get(path)
        if isinstance(error, FileNotFoundError) or known == str(error):
            return False
        if known is not None or len(self._complaints) < MAX_COMPLAINTS:
            self._complaints[path] = str(error)
            log.warning("%s cannot be read: %s", path, error)
        return False

    # -- handing over -------------------------------------------------------------------------------

    def _input(self, path: str) -> str:
        clean = str_of(path)
        if len(clean.encode()) > MAX_NAME_BYTES - len(self.name):
            digest = hashlib.blake2b(os.fsencode(path), digest_size=16).hexdigest()
            clean = f"{digest}:{clean.encode()[-200:].decode(errors='ignore')}"
        return f"{self.name}:{clean}"

    def _row_of(self, name: str) -> Identity | None:
        row = self._rows.get(name)
        return row.identity if row else None

    def _send(self, tail: Tail, lines: list[tuple[int, bytes]]) -> None:
        if not lines:
            return
        name = self._input(tail.path)
        origin = Origin(self._source, name, 0.0 if self._timed else time.time(), self._timed, tail.began)
        shaped, skipped = tail.shaper.shape(lines, origin, tail.first_line)
        if skipped:
            self._inbox.state(self).count("skipped", skipped)
        for group, end in _groups(shaped, tail.splitter.offset):
            position = self._rows[name] = tail.position(end)
            self._put(Chunk(self, group, {name: msgspec.msgpack.encode(position)}))

    def _move(self, rows: Mapping[str, FilePosition | None]) -> None:
        """Commit positions without lines; None forgets an input."""
        self._rows |= {name: row for name, row in rows.items() if row}
        packed = {name: msgspec.msgpack.encode(row) if row else b"" for name, row in rows.items()}
        self._put(Chunk(self, [], packed))

    def _put(self, chunk: Chunk) -> None:
        if not self._inbox.put(chunk):
            self._stop.set()  # nothing after it may be handed over either


def unmatched_sources(config: Config) -> list[Source]:
    """Sources whose pattern matches no file at present."""
    sources = (source for source in config.sources if source.kind == "files")
    return [source for source in sources if not Reach(source.path).files()[0]]


def _groups(lines: list[Line], end: int) -> Iterator[tuple[list[Line], int]]:
    """Cut lines into chunks: an event may be many times as long as the line that it was made of.

    Yields: (lines, where reading goes on after them); a position alone where no line is left.
    """
    group: list[Line] = []
    size = 0
    for line in lines:
        if size >= READ_BYTES:
            yield group, line.offset
            group, size = [], 0
        group.append(line)
        size += len(line.data)
    yield group, end


def _siblings(path: str) -> list[str]:
    return sorted(glob.glob(glob.escape(path) + "?*"))  # noqa: PTH207 - of a text


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0
