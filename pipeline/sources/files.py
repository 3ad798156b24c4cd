"""Files of JSON lines, followed like `tail -F` through rotation; `.zst` files too.

    at the end of a file       the path now names      then
    plain, following           the same file           wait; shorter than read: it was truncated, start again
    plain, following           another file            the old one was rotated: finish it, open the new
    plain, following           nothing                 wait
    plain, finite              anything                take the last line, this file is done
    zst                        the same, grown         unpack again, skip what was read
    zst                        the same                done until it changes

A position is (device, inode, offset, hash of the head): after a restart the file that it names is looked
for under its old name and among its siblings, and drained before its successor is begun.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec
import zstandard

from pipeline.events import Line, Origin
from pipeline.sources.inbox import Chunk, Inbox
from pipeline.sources.lines import READ_BYTES, LineSplitter, open_stream

__all__ = ["FilePosition", "FilesConnector"]

POLL_S = 0.25
HEAD_BYTES = 4_096
log = logging.getLogger("edgewater.files")


class FilePosition(msgspec.Struct, frozen=True):
    """Where in which file reading goes on.

    Attributes:
        device, inode: The file.
        offset: Bytes of content (unpacked, for zst) that are committed.
        head: Hash of its first bytes, up to 4 KiB and up to `offset`; an inode can be used again.
        head_bytes: How many bytes `head` covers.
        path: Where it was; for people.
    """

    device: int
    inode: int
    offset: int
    head: bytes
    head_bytes: int
    path: str


class _Tail:
    """One file being read; `strict` makes damage an error instead of a wait."""

    def __init__(self, path: Path, offset: int, *, strict: bool) -> None:
        self.path = path
        self.strict = strict  # nobody will come and complete the file
        self.stream: BinaryIO = open_stream(path)
        info = path.stat()
        self.device, self.inode, self.size = info.st_dev, info.st_ino, info.st_size
        self.packed = isinstance(self.stream, zstandard.ZstdDecompressionReader)
        self.splitter = LineSplitter(offset)
        self._head = b""
        self.broken = False
        self._skip(offset)

    def _skip(self, offset: int) -> None:
        self._head = self.stream.read(min(offset, HEAD_BYTES)) if offset else b""
        left = offset - len(self._head)
        if left > 0 and not self.packed:
            self.stream.seek(offset)
        while left > 0 and self.packed and (data := self.stream.read(min(left, 1 << 20))):
            left -= len(data)

    def read(self) -> bytes:
        try:
            data = self.stream.read(READ_BYTES)
        except zstandard.ZstdError as error:
            if self.strict:
                at = self.splitter.offset
                raise OSError(f"{self.path}: damaged after {at} bytes of content: {error}") from error
            # A frame still being written looks like this too: it is unpacked again when the file grows.
            log.warning("%s: cannot unpack further: %s", self.path, error)
            self.broken = True
            return b""
        if len(self._head) < HEAD_BYTES:
            self._head += data[: HEAD_BYTES - len(self._head)]
        return data

    def position(self) -> bytes:
        offset = self.splitter.offset
        head = self._head[: min(offset, HEAD_BYTES)]
        digest = hashlib.blake2b(head, digest_size=16).digest()
        return msgspec.msgpack.encode(
            FilePosition(self.device, self.inode, offset, digest, len(head), str(self.path))
        )

    def close(self) -> None:
        self.stream.close()


class FilesConnector:
    """Reads every file that matches a pattern, each from its committed position.

    Args:
        source: Name of the configured source.
        pattern: A path, or a glob with ** for any depth.
        finite: End when every file is read to its end, instead of following.
        timed: Take stream time from the events' own `ts` (plain lines of a replay).
    """

    def __init__(self, source: str, pattern: str, *, finite: bool = False, timed: bool = False) -> None:
        self.name = f"files:{source}"
        self._source = source
        self._pattern = pattern
        self._finite = finite
        self._timed = timed
        self._stop = threading.Event()
        self._tails: dict[str, _Tail] = {}  # by the path that is followed
        self._done: dict[str, tuple[int, int]] = {}  # path -> (inode, size) when it was read to its end
        self._thread: threading.Thread | None = None

    def start(self, inbox: Inbox, positions: Mapping[str, bytes]) -> None:
        """Begin to read in a thread of its own."""
        self._inbox = inbox
        self._positions = {
            name: msgspec.msgpack.decode(data, type=FilePosition)
            for name, data in positions.items()
            if name.startswith(f"{self.name}:")
        }
        inbox.opened(self)
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def acknowledge(self, receipts: list[object]) -> None:
        """Files need none: the position is in the commit."""

    def stop(self) -> None:
        """Stop reading."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2)

    def _run(self) -> None:
        fault: BaseException | None = None
        try:
            while not self._stop.is_set():
                moved = [self._advance(path) for path in self._paths()]
                if self._finite and not any(moved):
                    break
                if not any(moved):
                    self._stop.wait(POLL_S)
        except Exception as error:
            log.exception("%s stopped", self.name)
            fault = error
        finally:
            for tail in self._tails.values():
                tail.close()
            self._inbox.ended(self, fault)

    def _paths(self) -> list[str]:
        """Paths to follow: those that match, less a rotated file still read under its old name."""
        found = sorted(glob.glob(self._pattern, recursive=True))  # noqa: PTH207 - absolute patterns
        held = {(tail.device, tail.inode): path for path, tail in self._tails.items()}
        paths = [path for path in found if held.get(_identity(path) or (0, 0), path) == path]
        return paths + [path for path in self._tails if path not in paths]

    def _advance(self, path: str) -> bool:
        """Read one piece of a file. Returns: whether anything was read or opened."""
        tail = self._tails.get(path)
        if tail is None:
            return self._open(path)
        if data := tail.read():
            self._send(tail, path, tail.splitter.feed(data))
            return True
        return self._at_end(path, tail)

    def _at_end(self, path: str, tail: _Tail) -> bool:
        """Decide what an end of file means (the table above). Returns: whether reading goes on elsewhere."""
        identity = _identity(path)
        over = tail.packed or self._finite
        if over:
            self._done[path] = (tail.inode, tail.size)
        elif identity is None:
            return False  # moved away, its successor is not there yet
        elif identity == (tail.device, tail.inode):
            if Path(path).stat().st_size >= tail.splitter.offset:
                return False  # nothing new yet
            log.info("%s was truncated: reading it from its start", path)
        if not tail.broken:
            self._send(tail, path, tail.splitter.finish())
        tail.close()
        del self._tails[path]
        if not over:
            self._positions.pop(self._input(path), None)
        return True

    def _open(self, path: str) -> bool:
        try:
            info = Path(path).stat()
        except OSError:
            return False
        if self._done.get(path) == (info.st_ino, info.st_size):
            return False
        known = self._positions.pop(self._input(path), None)
        target = _find(Path(path), known) if known else None
        if known and target is None:
            log.warning("%s: the file read so far is gone; reading the present one from its start", path)
        try:
            offset = known.offset if known and target else 0
            tail = _Tail(target or Path(path), offset, strict=self._finite)
        except OSError as error:
            log.warning("%s cannot be read: %s", path, error)
            return False
        self._tails[path] = tail
        return True

    def _input(self, path: str) -> str:
        return f"{self.name}:{path}"

    def _send(self, tail: _Tail, path: str, lines: list[tuple[int, bytes]]) -> None:
        name = self._input(path)
        arrival = 0.0 if self._timed else time.time()
        origin = Origin(self._source, name, arrival, self._timed)
        position = tail.position()
        self._positions[name] = msgspec.msgpack.decode(position, type=FilePosition)
        if lines:
            self._inbox.put(Chunk(self, [Line(data, at, origin) for at, data in lines], {name: position}))


def _identity(path: str) -> tuple[int, int] | None:
    try:
        info = Path(path).stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino


def _find(path: Path, known: FilePosition) -> Path | None:
    """The file that a position names: at its path, or renamed beside it (app.log -> app.log.1)."""
    siblings = sorted(path.parent.glob(glob.escape(path.name) + "?*"))
    for candidate in (path, *siblings):
        if _identity(str(candidate)) == (known.device, known.inode) and _same_head(candidate, known):
            return candidate
    # Another inode with the same beginning: a copy, a restored backup, a new container layer.
    return path if _same_head(path, known) and known.offset else None


def _same_head(path: Path, known: FilePosition) -> bool:
    try:
        with open_stream(path) as stream:
            head = stream.read(known.head_bytes)
    except (OSError, zstandard.ZstdError):
        return False
    whole = len(head) == known.head_bytes
    return whole and hashlib.blake2b(head, digest_size=16).digest() == known.head
