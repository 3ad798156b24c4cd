"""The syntax of strace's output: one call a line, strings and paths in hexadecimal, fds with their paths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from tests.crash.recording import RecordingError

__all__ = [
    "FD",
    "Call",
    "data_of",
    "fd_number",
    "gathered",
    "hex_of",
    "read_calls",
    "text_of",
    "with_folders",
]

_LINE = re.compile(r"^(\d+) +(.*)$", re.DOTALL)
FD = re.compile(r"^(-?\d+|AT_FDCWD)(?:<([^>]*)>(?:\(deleted\))?)?$")
_IOV = re.compile(r'iov_base=(NULL|"((?:\\x..)*)"(\.\.\.)?), iov_len=')


@dataclass
class Call:
    """One system call: its arguments as printed, result, error ("EIO …" or ""), and its two ticks."""

    name: str
    arguments: str
    result: int
    error: str
    began: int
    ended: int


def read_calls(lines: Iterable[str]) -> list[Call]:
    """Every call of a trace in the order in which they ended.

    A call that another thread interrupted is put together again: it began at the tick of its first line.
    Raises: RecordingError on what cannot be read, or on a process that was started.
    """
    begun: dict[str, tuple[str, int]] = {}
    calls: list[Call] = []
    for number, line in enumerate(lines):
        match = _LINE.match(line.rstrip("\n"))
        if not match:
            raise RecordingError(f"a line that is no call: {line[:200]}")
        pid, text = match.groups()
        if text.startswith(("+++", "---")):
            continue
        began = 2 * number
        if text.endswith("<unfinished ...>"):
            begun[pid] = (text.removesuffix("<unfinished ...>").rstrip(" "), began)
            continue
        if text.startswith("<... "):
            start, began = begun.pop(pid)
            text = start + text.partition(" resumed>")[2]
        call = _read_call(text, began, 2 * number + 1)
        if call is not None:
            calls.append(call)
    return calls


def _read_call(text: str, began: int, ended: int) -> Call | None:
    """A line as a call; None for one that cannot matter (a thread was made, the first exec)."""
    name, _, rest = text.partition("(")
    before, _, result = rest.rpartition("= ")
    before = before.rstrip()
    if not before.endswith(")") or name.startswith("<"):
        raise RecordingError(f"a call that cannot be read: {text[:200]}")
    if name in {"clone", "clone3"}:
        if "CLONE_THREAD" not in rest:
            raise RecordingError("the program starts another process")
        return None
    value, _, error = result.strip().partition(" ")
    if value == "?":
        raise RecordingError(f"the program ended inside {name}")
    number = int(value.partition("<")[0], 0)
    return Call(name, before[:-1], number, error if number == -1 else "", began, ended)


def with_folders(call: Call, paths: int) -> Call:
    """The same call in the form that takes a folder's fd before each path."""
    parts = call.arguments.split(", ")
    for i in range(paths):
        parts.insert(2 * i, "AT_FDCWD")
    return Call(call.name, ", ".join(parts), call.result, call.error, call.began, call.ended)


def fd_number(fd: str) -> int:
    """The number of an fd argument."""
    match = FD.match(fd)
    if not match or match[1] == "AT_FDCWD":
        raise RecordingError(f"not an fd: {fd[:100]}")
    return int(match[1])


def data_of(text: str) -> bytes:
    """The bytes of a string argument. Raises: RecordingError if strace cut them."""
    if not text.startswith('"') or not text.endswith('"'):
        raise RecordingError(f"data that strace did not print whole: {text[-100:]}")
    return bytes.fromhex(text[1:-1].replace("\\x", ""))


def gathered(vector: str) -> bytes:
    """The bytes of a vector argument, joined. Raises: RecordingError if strace cut them."""
    parts = []
    for _, text, cut in _IOV.findall(vector):
        if cut:
            raise RecordingError("data that strace did not print whole")
        parts.append(bytes.fromhex(text.replace("\\x", "")))
    if len(parts) != vector.count("iov_len="):
        raise RecordingError(f"a vector that cannot be read: {vector[:200]}")
    return b"".join(parts)


def text_of(path: str) -> str:
    """A path argument as text."""
    if path.startswith(("\\x", '"')):
        return os.fsdecode(bytes.fromhex(path.strip('"').replace("\\x", "")))
    return path


def hex_of(data: bytes) -> str:
    """Bytes as strace prints them."""
    return "".join(f"\\x{byte:02x}" for byte in data)
