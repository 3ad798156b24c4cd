"""An ext4 file system on a loop device, and the bytes that reached it by its own sector counter."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["SECTOR_BYTES", "Device", "device", "scratch_folder", "syncfs", "why_not"]

SECTOR_BYTES = 512  # of /sys/block/*/stat, whatever the device's own sectors are
_WRITTEN = 6  # field of /sys/block/*/stat: sectors written
_NEEDED_FREE = 4 << 30
_libc = ctypes.CDLL(None, use_errno=True)


class Device:
    """A mounted image; `written()` is what its file system sent to it so far."""

    def __init__(self, folder: Path, loop: str) -> None:
        self.folder = folder
        self._stat = Path("/sys/block") / loop / "stat"

    def written(self) -> int:
        """Bytes written to the device since it was made, delayed ones included (it syncs first)."""
        syncfs(self.folder)  # this one alone: a sync of all would end the journal transactions of others
        return int(self._stat.read_text().split()[_WRITTEN]) * SECTOR_BYTES


def syncfs(folder: Path) -> None:
    """Write back all that one file system holds: data, journal, inodes."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        if _libc.syncfs(fd):
            raise OSError(ctypes.get_errno(), "syncfs failed", str(folder))
    finally:
        os.close(fd)


def why_not() -> str:
    """Why loop devices cannot be used here, "" if they can."""
    if os.geteuid() != 0:
        return "needs root, to mount an ext4 image on a loop device"
    missing = [tool for tool in ("losetup", "mkfs.ext4", "mount", "umount") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)} (util-linux, e2fsprogs)"
    return "" if Path("/dev/loop-control").exists() else "needs loop devices (/dev/loop-control is missing)"


def scratch_folder() -> Path:
    """Where images lie by default: memory if there is plenty, which counts the same and wears nothing."""
    shm = Path("/dev/shm")
    if shm.is_dir() and shutil.disk_usage(shm).free >= _NEEDED_FREE:
        return shm
    return Path(tempfile.gettempdir())


@contextlib.contextmanager
def device(scratch: Path, size_bytes: int, options: str = "") -> Iterator[Device]:
    """Make, mount and at last remove an ext4 image with 4 KiB blocks, a journal and default features.

    Args:
        scratch: Folder for the image.
        size_bytes: Of the image; sparse.
        options: For mount -o, beside the loop device.
    """
    signal.signal(signal.SIGTERM, _stop)  # the default would leave mounts behind
    with tempfile.TemporaryDirectory(dir=scratch, prefix="edgewater-bench-") as work:
        image, folder = Path(work) / "image", Path(work) / "mounted"
        folder.mkdir()
        with image.open("wb") as file:
            file.truncate(size_bytes)
        # Inode tables and journal are zeroed now, not by a kernel thread that would be counted later.
        lazy = "lazy_itable_init=0,lazy_journal_init=0"
        _run("mkfs.ext4", "-q", "-F", "-b", "4096", "-E", lazy, str(image))
        loop = _run("losetup", "--find", "--show", str(image))
        try:
            _run("mount", *(("-o", options) if options else ()), loop, str(folder))
            try:
                yield Device(folder, Path(loop).name)
            finally:
                # Lazily: what failed above may still hold files open, and must not leave a mount behind.
                _run("umount", "--lazy", str(folder))
        finally:
            _run("losetup", "--detach", loop)


def _stop(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()
