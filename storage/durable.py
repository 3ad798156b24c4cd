"""Write files so that a power cut leaves the old file or the new one, never a mixture."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

__all__ = [
    "fsync_folder",
    "fsync_tree",
    "make_private_folder",
    "remove_folder",
    "rename_durably",
    "write_file_durably",
]


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable (a rename or a new file is lost otherwise)."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        error.filename = str(folder)  # a descriptor does not know its own
        raise
    finally:
        os.close(fd)


def fsync_tree(folder: Path) -> None:
    """Make every file and folder below `folder`, and the folder itself, durable."""
    for root, _, names in os.walk(folder):
        for name in names:
            fd = os.open(Path(root, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        fsync_folder(Path(root))


def rename_durably(source: Path, target: Path) -> None:
    """Rename a file or folder within one file system and make the new name durable."""
    source.rename(target)
    fsync_folder(target.parent)
    if source.parent != target.parent:
        fsync_folder(source.parent)


def write_file_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` by `data`; after a power cut it holds all of the old or all of the new bytes.

    Args:
        path: File to write; its folder must exist.
        data: Whole content.
        mode: Permission bits of the file.
    Raises: OSError as the system reports it, with the path; the old file is then still in place.
    """
    # 1. path.tmp written and synced.    Crash: a stray .tmp, overwritten by the next write.
    # 2. Renamed over path.              Crash: old or new name, each naming complete bytes.
    # 3. Folder synced.                  From here the new bytes are what a reader finds.
    tmp = path.with_name(path.name + ".tmp")
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        rename_durably(tmp, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)  # a full disk needs what it takes
        error.filename = error.filename or str(path)  # a failed write does not know its own
        raise


def make_private_folder(path: Path) -> None:
    """Create `path` and its missing parents, readable by the owner only, durably."""
    if path.is_dir():
        return
    make_private_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    fsync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder with all it holds; a missing one is no error."""
    shutil.rmtree(path, ignore_errors=True)
