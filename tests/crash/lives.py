"""Lifetimes: one real process each, killed or hurt at a chosen system call by strace, and what it left.

A program that is killed thousands of times must start fast. Its modules are imported once, by a server that
does nothing else (no thread, no environment, no file), and each lifetime is a fork of it that waits until
strace is attached. `strace --seccomp-bpf` would be faster still, but swallows the signals that it should
inject (measured with 6.1: every run ended by itself), so we attach and pay for each system call.

strace counts `when=N` for each system call and each thread on its own. Hence a point is a name and a number
within the thread that makes the calls, and `Life.hit` says from strace's own log whether it was struck there.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import msgspec

__all__ = ["WRITES", "Call", "Life", "Lives", "Point", "cannot_trace", "serve"]

ROOT = Path(__file__).resolve().parent.parent.parent
WRITES = (
    "pwrite64", "pwritev", "pwritev2", "write", "writev", "fdatasync", "fsync", "msync", "sync_file_range",
    "rename", "renameat", "renameat2", "ftruncate", "truncate", "fallocate", "unlink", "unlinkat", "rmdir",
    "mkdir", "mkdirat", "link", "linkat", "symlink", "symlinkat", "sendfile", "copy_file_range", "splice",
)  # fmt: skip
"""Every system call that changes what a file system holds. Killing before each of them leaves every state
that a SIGKILL can leave: between two of them nothing changes."""
PATIENCE_S = 60.0  # a lifetime takes 0.1 to 3 s; more is a hang
_LINE = re.compile(r"^(\d+) +(\w+)\((.*)$")
_FD = re.compile(r"^(\d+)<([^>]*)>")


class Point(msgspec.Struct, frozen=True):
    """Where a lifetime is hurt.

    Attributes:
        call: Name of the system call.
        number: Which of these calls of one thread, from 1.
        what: "SIGKILL", or the name of an error number ("EIO", "ENOSPC") that the call returns instead of
            being made.
    """

    call: str
    number: int
    what: str = "SIGKILL"

    def __str__(self) -> str:
        return f"{self.what} at {self.call} {self.number}"


class Call(msgspec.Struct, frozen=True):
    """One system call as strace wrote it down.

    Attributes:
        thread: Thread id.
        name, number: Its name, and which of these calls of its thread it is, from 1.
        path: What its first argument refers to, "" where that is no file descriptor.
        text: The whole line.
    """

    thread: int
    name: str
    number: int
    path: str
    text: str

    def point(self, what: str = "SIGKILL") -> Point:
        """The point at which a life like this one is hurt by this call."""
        return Point(self.name, self.number, what)


class Life(msgspec.Struct, frozen=True):
    """What a lifetime left.

    Attributes:
        pid: Process id, and the id of its main thread.
        code: Exit code, negative a signal; None when it hung and was killed for that.
        out, err: What it wrote to standard output and error.
        calls: Its write-like calls in order, where it was traced.
        point: Where it was to be hurt.
        seconds: How long it lived, wall clock.
    """

    pid: int
    code: int | None
    out: bytes
    err: str
    calls: list[Call]
    point: Point | None
    seconds: float

    @property
    def hit(self) -> int:
        """Index of the call that was struck, -1 where none was."""
        if self.point is None:
            return -1
        for i, call in enumerate(self.calls):
            if (call.name, call.number) != (self.point.call, self.point.number):
                continue
            if self.point.what != "SIGKILL":
                if "(INJECTED)" in call.text:
                    return i
            elif self.code == -signal.SIGKILL and call.text.endswith(("= ?", "<unfinished ...>")):
                return i
        return -1

    @property
    def killed(self) -> bool:
        """Whether it died by SIGKILL, where it was meant to."""
        return self.code == -signal.SIGKILL and self.hit >= 0


def cannot_trace() -> str:
    """Why processes cannot be traced here, "" if they can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    sleeper = subprocess.Popen(["sleep", "5"])
    try:
        command = ["strace", "-qq", "-o", "/dev/null", "-e", "trace=none", "-p", str(sleeper.pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as tracer:
            attached = _attached(sleeper.pid, time.monotonic() + 5)
            tracer.kill()
            return "" if attached else "attaching with ptrace is not permitted"
    finally:
        sleeper.kill()
        sleeper.wait()


class Lives:
    """Starts lifetimes of one program, one after the other. Not for use by two threads.

    Args:
        program: Module that calls `serve` when it is run.
        work: Folder for what lifetimes print; must exist.
    """

    def __init__(self, program: str, work: Path) -> None:
        self._work = work
        self._program = program
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Lives:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stop()

    def run(self, argument: object, point: Point | None = None, *, traced: bool = False) -> Life:
        """Live once.

        Args:
            argument: Handed to the program, as JSON.
            point: Where to hurt it; None lets it end by itself.
            traced: Write its calls down although nothing is injected.
        """
        started = time.monotonic()
        out, err, log = (self._work / name for name in ("out", "err", "calls"))
        log.unlink(missing_ok=True)
        trace = traced or point is not None
        server = self._started()
        assert server.stdin is not None
        order = {"argument": argument, "out": str(out), "err": str(err), "wait": trace}
        server.stdin.write(msgspec.json.encode(order) + b"\n")
        server.stdin.flush()
        pid = int(self._heard(started) or 0)
        tracer = self._trace(pid, point, log) if trace else None
        status = self._heard(started)
        if status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self._heard(time.monotonic())
        if tracer is not None:
            tracer.communicate(timeout=PATIENCE_S)
        return Life(
            pid=pid,
            code=None if status is None else os.waitstatus_to_exitcode(int(status)),
            out=out.read_bytes(),
            err=err.read_text(errors="replace"),
            calls=_parse(log) if trace else [],
            point=point,
            seconds=time.monotonic() - started,
        )

    def _trace(self, pid: int, point: Point | None, log: Path) -> subprocess.Popen[bytes]:
        names = ",".join(f"?{name}" for name in WRITES)  # ? : not every machine has every one of them
        inject: list[str] = []
        if point is not None:
            what = "signal=SIGKILL" if point.what == "SIGKILL" else f"error={point.what}"
            inject = ["-e", f"inject={point.call}:{what}:when={point.number}"]
        command = ["strace", "-f", "-qq", "-y", "-s", "64", "-o", str(log), "-e", f"trace={names}", *inject]
        return subprocess.Popen([*command, "-p", str(pid)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", self._program],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )  # fmt: skip
        return self._server

    def _heard(self, started: float) -> bytes | None:
        """The server's next line, None if it did not come in time."""
        assert self._server is not None and self._server.stdout is not None
        left = started + PATIENCE_S - time.monotonic()
        # It writes a line at a time and we read it whole, so nothing is ever left in Python's buffer.
        if not select.select([self._server.stdout], [], [], max(left, 1.0))[0]:
            return None
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of {self._program} ended")
        return line

    def _stop(self) -> None:
        if self._server is not None:
            self._server.communicate()  # closes its standard input, which ends it
            self._server = None


def _attached(pid: int, deadline: float) -> bool:
    status = Path(f"/proc/{pid}/status")
    while time.monotonic() < deadline:
        if "\nTracerPid:\t0\n" not in status.read_text():
            return True
        time.sleep(0.001)
    return False


def _parse(log: Path) -> list[Call]:
    """Read strace's log: one call a line, in the order in which they began."""
    calls: list[Call] = []
    counts: dict[tuple[int, str], int] = {}
    began: dict[int, int] = {}  # thread -> its call that is not finished yet
    for line in log.read_text(errors="replace").splitlines():
        found = _LINE.match(line)
        if found is None:
            resumed = re.match(r"^(\d+) +<\.\.\. (\w+) resumed>(.*)$", line)
            if resumed and (at := began.pop(int(resumed.group(1)), -1)) >= 0:
                text = calls[at].text.removesuffix("<unfinished ...>") + resumed.group(3)
                calls[at] = msgspec.structs.replace(calls[at], text=text)
            continue
        thread, name, rest = int(found.group(1)), found.group(2), found.group(3)
        number = counts[thread, name] = counts.get((thread, name), 0) + 1
        path = _FD.match(rest)
        if line.endswith("<unfinished ...>"):
            began[thread] = len(calls)
        calls.append(Call(thread, name, number, path.group(2) if path else "", line.rstrip()))
    return calls


# -- inside the server ----------------------------------------------------------------------------


def serve(live: Callable[[bytes], None]) -> None:
    """Be the server: fork a lifetime for each line of standard input, say its pid, then how it ended.

    Args:
        live: The program; gets the argument as JSON.
    """
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        raise RuntimeError("a library started a thread at its import: a fork would not have it")
    for line in sys.stdin.buffer:
        order = msgspec.json.decode(line, type=_Order)
        pid = os.fork()
        if pid == 0:
            _be_born(order)
            _live(live, bytes(order.argument))
        for said in _ended(pid):
            os.write(1, b"%d\n" % said)


class _Order(msgspec.Struct):
    argument: msgspec.Raw
    out: str
    err: str
    wait: bool


def _ended(pid: int) -> Iterator[int]:
    yield pid
    yield os.waitpid(pid, 0)[1]


def _be_born(order: _Order) -> None:
    for number, path in ((1, order.out), (2, order.err)):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        os.dup2(fd, number)
        os.close(fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if order.wait:
        if not _attached(os.getpid(), time.monotonic() + 20):
            os._exit(99)
        time.sleep(0.002)  # seized is not yet stopped: strace's interrupt comes right after it


def _live(live: Callable[[bytes], None], argument: bytes) -> None:
    code: object = 0
    try:
        live(argument)
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
