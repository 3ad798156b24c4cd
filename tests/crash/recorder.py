"""Record every write, sync and name change that a program makes below a folder, with the data.

The program runs under strace, unchanged; `replay_trace` turns the trace into operations.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.crash.recording import Recording, RecordingError
from tests.crash.replay_trace import Replay

__all__ = ["load", "record", "strace_problem"]

RUN_LIMIT_S = 120
LONGEST_DATA_BYTES = 1 << 24  # of one call; longer data would be cut, which is refused

_CALLS = (
    "open,openat,openat2,creat,close,close_range,dup,dup2,dup3,fcntl,lseek,read,readv,write,writev,pwrite64,"
    "pwritev,pwritev2,sendfile,copy_file_range,splice,vmsplice,tee,fsync,fdatasync,sync,syncfs,"
    "sync_file_range,msync,mmap,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,link,linkat,"
    "symlink,symlinkat,mknod,mknodat,truncate,ftruncate,fallocate,chmod,fchmod,fchmodat,chdir,fchdir,"
    "clone,clone3,fork,vfork,io_uring_setup,io_setup,process_vm_writev"
)


def strace_problem() -> str:
    """Why nothing can be recorded here, or ""."""
    if sys.platform != "linux" or shutil.which("strace") is None:
        return "strace is not installed"
    try:
        done = subprocess.run(
            ["strace", "-y", "-xx", "-o", "/dev/null", "true"], capture_output=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"strace does not run: {error}"
    return (
        "" if done.returncode == 0 else f"strace may not trace: {done.stderr.decode(errors='replace')[:200]}"
    )


def record(command: Sequence[str], work: Path, *, cwd: Path) -> Recording:
    """Run a program that changes `work`/root (which exists) and record it.

    Everything is taken for durable that lies in the folder before. `work` then also holds `before` (a copy)
    and `trace`, from which `load` makes the same recording again.
    Raises: RecordingError if the program fails or does what cannot be followed.
    """
    root = work / "root"
    shutil.copytree(root, work / "before", symlinks=True)
    tracer = ["strace", "-f", "-y", "-xx", "-s", str(LONGEST_DATA_BYTES), "-o", str(work / "trace")]
    tracer += ["-e", f"trace={_CALLS}", "-e", "raw=read,readv", "-e", "signal=none", "--"]
    done = subprocess.run([*tracer, *command], cwd=cwd, capture_output=True, timeout=RUN_LIMIT_S)
    if done.returncode:
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit {done.returncode}"
        raise RecordingError(f"the program ended with {how}: {done.stderr.decode(errors='replace')[-2_000:]}")
    return load(work)


def load(work: Path) -> Recording:
    """Read what `record` left in its work folder. Raises: RecordingError."""
    replay = Replay(str((work / "root").resolve()), work / "before")
    with (work / "trace").open(encoding="ascii") as lines:
        replay.read(lines)
    replay.compare(work / "root")
    return replay.recording
