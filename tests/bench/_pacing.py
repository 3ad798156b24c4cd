"""The clock of ext4's journal, so that hours of slow commits can be measured in seconds.

ext4 writes a file's changed mtime with the journal's next transaction, which its timer ends 5 s after it
began, and the inode itself about 30 s later. A commit every 2 s costs that beside its own pages; a loop that
commits a thousand times a second hides it. `Journal` does with system calls what the timers would have done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench._device import syncfs

__all__ = ["Journal"]

_COMMIT_S = 5.0  # ext4's default
TICK_S = 0.01
_WRITEBACK_S = 30.0  # vm.dirty_expire_centisecs


class Journal:
    """Ends journal transactions and writes inodes back as the kernel would have by a given time.

    Args:
        folder: Of the file system.
        files: What the commits write.
        mount: Mount options; commit=N is the timer.
    """

    def __init__(self, folder: Path, files: Sequence[Path], mount: str = "") -> None:
        options = mount.split(",")
        named = [option.removeprefix("commit=") for option in options if option.startswith("commit=")]
        self._commit_s = float(named[-1]) if named else _COMMIT_S
        self._folder = folder
        self._files = [os.open(file, os.O_RDONLY) for file in files if file.exists()]
        self._began = -1.0
        self._written = 0.0

    def before_commit(self, now: float) -> None:
        """Do what was due before `now`, seconds."""
        if self._began >= 0 and now - self._began >= self._commit_s:
            for file in self._files:
                os.fsync(file)  # ends the running transaction if it holds this inode, writes no data
            self._began = -1.0
            # A new mtime is one of a new clock tick (4 ms); at full speed the next commit would keep the old.
            time.sleep(TICK_S)
        if now - self._written >= _WRITEBACK_S:
            self._written = now
            syncfs(self._folder)
        if self._began < 0:
            self._began = now

    def close(self) -> None:
        """Let go of the files."""
        for fd in self._files:
            os.close(fd)
