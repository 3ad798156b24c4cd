"""Replay a trace against a model of a file system: folders are maps of names to inodes, files are pages.

Whatever may change a file in a way that the model does not follow (a writable shared map, an unknown call, a
child process) raises `RecordingError`, and at the end the model must equal the folder byte for byte, so that
nothing can be missed silently.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.crash.recording import (
    PAGE_BYTES,
    ROOT,
    ZEROS,
    Inode,
    Names,
    Operation,
    Recording,
    RecordingError,
    Resize,
    Said,
    Sync,
    Write,
    cut_pages,
    set_page,
)
from tests.crash.strace_output import (
    FD,
    Call,
    data_of,
    fd_number,
    gathered,
    hex_of,
    read_calls,
    text_of,
    with_folders,
)

__all__ = ["Replay"]

# Shared memory between processes, written through a map; its content means nothing after a restart.
SCRATCH_FILES = ("lock.mdb",)

_WRITES = {
    "write",
    "writev",
    "pwrite64",
    "pwritev",
    "sendfile",
    "fsync",
    "fdatasync",
    "ftruncate",
    "fallocate",
}
# Not followed wherever they point: they write without naming a file, or make processes with fds of their own.
_NEVER = {
    "fork",
    "vfork",
    "io_uring_setup",
    "io_setup",
    "process_vm_writev",
    "sync",
    "chdir",
    "fchdir",
    "msync",
}


@dataclass
class _Handle:
    """An open file description: shared by the fds that were duplicated from each other."""

    inode: int
    append: bool
    durable: bool
    position: int = 0


class Replay:
    """The model of the folder that a trace is replayed against; one method a call."""

    def __init__(self, root: str, before: Path) -> None:
        self.root = root
        self.recording = Recording()
        self._names: dict[int, dict[str, int]] = {}
        self._pages: dict[int, dict[int, bytes]] = {}
        self._sizes: dict[int, int] = {}
        self._handles: dict[int, _Handle] = {}
        self._writing: dict[int, int] = {}  # file inode -> tick at which its newest change ended
        self._said = b""
        self._umask = _umask()
        self._load(before, ROOT)
        recording = self.recording
        recording.names_before = {folder: dict(names) for folder, names in self._names.items()}
        recording.pages_before = {file: dict(pages) for file, pages in self._pages.items()}
        recording.sizes_before = dict(self._sizes)

    def _load(self, path: Path, inode: int) -> None:
        self.recording.inodes[inode] = Inode(True, stat.S_IMODE(path.stat().st_mode))
        self._names[inode] = {}
        for entry in sorted(path.iterdir()):
            info = entry.lstat()
            if stat.S_ISDIR(info.st_mode):
                child = len(self.recording.inodes)
                self._load(entry, child)
            elif stat.S_ISREG(info.st_mode):
                child = self._new_file(stat.S_IMODE(info.st_mode), entry.name)
                self._store(child, 0, entry.read_bytes())
            else:
                raise RecordingError(f"{entry} is neither a file nor a folder")
            self._names[inode][entry.name] = child

    def _new_file(self, mode: int, name: str) -> int:
        inode = len(self.recording.inodes)
        self.recording.inodes[inode] = Inode(False, mode, name in SCRATCH_FILES)
        self._pages[inode], self._sizes[inode] = {}, 0
        return inode

    # -- the trace --------------------------------------------------------------------------------

    def read(self, lines: Iterable[str]) -> None:
        """Replay every call of a trace. Raises: RecordingError."""
        for call in read_calls(lines):
            self._replay(call)
        self.recording.operations.sort(key=lambda op: op.began)

    def _replay(self, call: Call) -> None:
        handler: Callable[[Call], None] | None = getattr(self, f"_on_{call.name}", None)
        if handler is not None:
            if call.error and call.name in _WRITES and self._concerns_us(call):
                raise RecordingError(f"{call.name} failed with {call.error}: what it left is unknown")
            if not call.error:
                handler(call)
        elif self._concerns_us(call) and not call.error:
            raise RecordingError(f"does not follow {call.name}({call.arguments[:300]})")

    def _concerns_us(self, call: Call) -> bool:
        if call.name in _NEVER:
            return True
        if hex_of(self.root.encode()) in call.arguments:
            return True
        first = FD.match(call.arguments.split(", ")[0])
        return bool(first and first[1] != "AT_FDCWD" and int(first[1]) in self._handles)

    # -- fds --------------------------------------------------------------------------------------

    def _handle(self, argument: str) -> _Handle | None:
        match = FD.match(argument)
        if not match:
            raise RecordingError(f"not an fd: {argument[:100]}")
        handle = self._handles.get(int(match[1])) if match[1] != "AT_FDCWD" else None
        if handle is None and match[2] and self._inside(text_of(match[2])):
            raise RecordingError(f"fd {match[1]} on {text_of(match[2])} was opened unseen")
        return handle

    def _inside(self, path: str) -> bool:
        return path == self.root or path.startswith(self.root + "/")

    def _on_close(self, call: Call) -> None:
        self._handles.pop(fd_number(call.arguments), None)

    def _on_dup(self, call: Call) -> None:
        handle = self._handle(call.arguments.split(", ")[0])
        self._handles.pop(call.result, None)
        if handle is not None:
            self._handles[call.result] = handle

    _on_dup2 = _on_dup3 = _on_dup

    def _on_fcntl(self, call: Call) -> None:
        what = call.arguments.split(", ")[1]
        if what.startswith("F_DUPFD"):
            self._on_dup(call)
        elif what == "F_SETFL" and self._handle(call.arguments.split(", ")[0]) is not None:
            raise RecordingError("does not follow a change of an open file's flags")

    def _on_lseek(self, call: Call) -> None:
        handle = self._handle(call.arguments.split(", ")[0])
        if handle is not None:
            handle.position = call.result

    def _on_read(self, call: Call) -> None:  # arguments are raw: hexadecimal numbers, no path, no data
        handle = self._handles.get(int(call.arguments.split(", ")[0], 16))
        if handle is not None:
            handle.position += call.result

    _on_readv = _on_read

    # -- data -------------------------------------------------------------------------------------

    def _on_write(self, call: Call) -> None:
        fd, text, _ = call.arguments.split(", ")
        handle = self._handle(fd)
        if handle is not None:
            self._put(call, handle, data_of(text))
        elif fd_number(fd) == 1:
            self._say(call, data_of(text)[: call.result])

    def _on_writev(self, call: Call) -> None:
        fd, _, vector = call.arguments.partition(", ")
        handle = self._handle(fd)
        if handle is not None:
            self._put(call, handle, gathered(vector))
        elif fd_number(fd) == 1:
            raise RecordingError("standard output is written in pieces")

    def _on_pwrite64(self, call: Call) -> None:
        fd, text, _, offset = call.arguments.split(", ")
        handle = self._handle(fd)
        if handle is not None:
            self._put(call, handle, data_of(text), int(offset))

    def _on_pwritev(self, call: Call) -> None:
        fd, _, vector = call.arguments.partition(", ")
        handle = self._handle(fd)
        if handle is not None:
            self._put(call, handle, gathered(vector), int(vector.rsplit(", ", 1)[1]))

    def _on_sendfile(self, call: Call) -> None:
        to_fd, from_fd, offset, _ = call.arguments.split(", ")
        handle, source = self._handle(to_fd), self._handle(from_fd)
        if handle is None:
            return
        if source is None:
            raise RecordingError("a file is copied from outside the folder recorded")
        at = source.position if offset == "NULL" else int(offset[1:].partition("]")[0])
        self._put(call, handle, self._read(source.inode, at, call.result))
        if offset == "NULL":
            source.position += call.result

    def _put(self, call: Call, handle: _Handle, data: bytes, offset: int | None = None) -> None:
        at = offset if offset is not None else handle.position
        if handle.append:
            at = self._sizes[handle.inode]
        data = data[: call.result]
        if offset is None:
            handle.position = at + len(data)
        if not data:
            return
        self._alone(call, handle.inode)
        self._store(handle.inode, at, data)
        self._add(Write(call.began, call.ended, handle.inode, at, data, handle.durable))

    def _alone(self, call: Call, inode: int) -> None:
        if self._writing.get(inode, -1) > call.began:
            raise RecordingError("two threads change one file at once")
        self._writing[inode] = call.ended

    def _store(self, inode: int, at: int, data: bytes) -> None:
        pages, end = self._pages[inode], at + len(data)
        for number in range(at // PAGE_BYTES, -(-end // PAGE_BYTES)):
            page = bytearray(pages.get(number, ZEROS))
            start = number * PAGE_BYTES
            low, high = max(at, start), min(end, start + PAGE_BYTES)
            page[low - start : high - start] = data[low - at : high - at]
            set_page(pages, number, bytes(page))
        self._sizes[inode] = max(self._sizes[inode], end)

    def _read(self, inode: int, at: int, count: int) -> bytes:
        size = self._sizes[inode]
        whole = b"".join(self._pages[inode].get(n, ZEROS) for n in range(-(-size // PAGE_BYTES)))
        return whole[at : min(at + count, size)]

    def _resize(self, call: Call, inode: int, size: int) -> None:
        if size == self._sizes[inode]:
            return
        self._alone(call, inode)
        cut_pages(self._pages[inode], size)
        self._sizes[inode] = size
        self._add(Resize(call.began, call.ended, inode, size))

    def _on_ftruncate(self, call: Call) -> None:
        fd, size = call.arguments.split(", ")
        handle = self._handle(fd)
        if handle is not None:
            self._resize(call, handle.inode, int(size))

    def _on_fallocate(self, call: Call) -> None:
        fd, mode, offset, length = call.arguments.split(", ")
        handle = self._handle(fd)
        if handle is None:
            return
        if mode not in {"0", "FALLOC_FL_KEEP_SIZE"}:
            raise RecordingError(f"does not follow fallocate with {mode}")
        if mode == "0":
            size = max(self._sizes[handle.inode], int(offset) + int(length))
            self._resize(call, handle.inode, size)

    def _on_fsync(self, call: Call) -> None:
        handle = self._handle(call.arguments)
        if handle is not None:
            self._add(Sync(call.began, call.ended, handle.inode))

    _on_fdatasync = _on_fsync

    def _on_mmap(self, call: Call) -> None:
        _, _, protection, flags, fd, _ = call.arguments.split(", ")
        handle = self._handle(fd)
        if handle is None or "MAP_SHARED" not in flags or "PROT_WRITE" not in protection:
            return
        if not self.recording.inodes[handle.inode].scratch:
            raise RecordingError("a file is written through a shared map: it has no order and no record")

    def _say(self, call: Call, data: bytes) -> None:
        *lines, self._said = (self._said + data).split(b"\n")
        for line in lines:
            self._add(Said(call.began, call.ended, line.decode()))

    # -- names ------------------------------------------------------------------------------------

    def _locate(self, folder: str, path: str) -> tuple[int, str] | None:
        """Inode of the folder that a path names something in, and the name; None if it is outside."""
        text = text_of(path.strip('"'))
        base = ROOT
        if text.startswith("/"):
            if not self._inside(text):
                return None
            parts = text[len(self.root) :].strip("/").split("/")
        else:
            match = FD.match(folder)
            handle = self._handle(folder)
            if handle is not None:
                base, parts = handle.inode, text.split("/")
            else:
                place = text_of(match[2]) if match and match[2] else ""
                if not self._inside(os.path.normpath(f"{place}/{text}")):
                    return None
                raise RecordingError(f"{text} is named relative to an unknown folder")
        if ".." in parts or "." in parts:
            raise RecordingError(f"does not follow the path {text}")
        for part in parts[:-1]:
            base = self._names[base][part]
        return base, parts[-1]

    def _change(self, call: Call, *changes: tuple[int, str, int | None]) -> None:
        for folder, name, inode in changes:
            if inode is None:
                del self._names[folder][name]
            else:
                self._names[folder][name] = inode
        self._add(Names(call.began, call.ended, changes))

    def _on_openat(self, call: Call) -> None:
        folder, path, flags, *mode = call.arguments.split(", ")
        place = self._locate(folder, path)
        if place is None:
            return
        flag_set = set(flags.split("|"))
        if flag_set & {"O_TMPFILE", "O_DIRECT"}:
            raise RecordingError(f"does not follow a file opened with {flags}")
        base, name = place
        inode = ROOT if not name else self._names[base].get(name)
        if inode is None:
            inode = self._new_file(int(mode[0], 8) & ~self._umask, name)
            self._change(call, (base, name, inode))
        elif "O_TRUNC" in flag_set:
            self._resize(call, inode, 0)
        durable = bool(flag_set & {"O_DSYNC", "O_SYNC"})
        self._handles[call.result] = _Handle(inode, "O_APPEND" in flag_set, durable)

    def _on_mkdirat(self, call: Call) -> None:
        folder, path, mode = call.arguments.split(", ")
        place = self._locate(folder, path)
        if place is None:
            return
        inode = len(self.recording.inodes)
        self.recording.inodes[inode] = Inode(True, int(mode, 8) & ~self._umask)
        self._names[inode] = {}
        self._change(call, (*place, inode))

    def _on_unlinkat(self, call: Call) -> None:
        folder, path, *_ = call.arguments.split(", ")
        place = self._locate(folder, path)
        if place is not None:
            self._change(call, (*place, None))

    def _on_renameat(self, call: Call) -> None:
        from_folder, from_path, to_folder, to_path, *flags = call.arguments.split(", ")
        source, target = self._locate(from_folder, from_path), self._locate(to_folder, to_path)
        if source is None and target is None:
            return
        if source is None or target is None or flags not in ([], ["0"]):
            raise RecordingError(f"does not follow the rename {text_of(from_path)} to {text_of(to_path)}")
        inode = self._names[source[0]][source[1]]
        self._change(call, (*source, None), (*target, inode))

    _on_renameat2 = _on_renameat

    def _on_linkat(self, call: Call) -> None:
        from_folder, from_path, to_folder, to_path, *_ = call.arguments.split(", ")
        source, target = self._locate(from_folder, from_path), self._locate(to_folder, to_path)
        if source is None or target is None:
            raise RecordingError("a link crosses the edge of the folder recorded")
        self._change(call, (*target, self._names[source[0]][source[1]]))

    def _on_open(self, call: Call) -> None:
        self._on_openat(with_folders(call, 1))

    def _on_mkdir(self, call: Call) -> None:
        self._on_mkdirat(with_folders(call, 1))

    def _on_rmdir(self, call: Call) -> None:
        self._on_unlinkat(with_folders(call, 1))

    _on_unlink = _on_rmdir

    def _on_rename(self, call: Call) -> None:
        self._on_renameat(with_folders(call, 2))

    def _on_link(self, call: Call) -> None:
        self._on_linkat(with_folders(call, 2))

    # -- the end ----------------------------------------------------------------------------------

    def _add(self, operation: Operation) -> None:
        self.recording.operations.append(operation)

    def compare(self, root: Path) -> None:
        """Check that the model ended as the folder did. Raises: RecordingError if anything was missed."""
        self._compare_folder(root, ROOT)

    def _compare_folder(self, path: Path, inode: int) -> None:
        found = {entry.name for entry in path.iterdir()}
        if found != set(self._names[inode]):
            raise RecordingError(f"{path} holds {found}, recorded {set(self._names[inode])}")
        for name, child in self._names[inode].items():
            entry, kind = path / name, self.recording.inodes[child]
            if stat.S_IMODE(entry.stat().st_mode) != kind.mode:
                raise RecordingError(f"the mode of {entry} changed unseen")
            if kind.folder:
                self._compare_folder(entry, child)
            elif kind.scratch:
                self.recording.scratch_after[child] = entry.read_bytes()
            elif entry.read_bytes() != self._read(child, 0, self._sizes[child]):
                raise RecordingError(f"{entry} was written in a way that was not recorded")


def _umask() -> int:
    now = os.umask(0o077)
    os.umask(now)
    return now
