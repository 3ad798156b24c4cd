"""What a files source may open: the path that the configuration names, and regular files beneath its folder.

Whoever may write into a watched folder must not decide what is read elsewhere: below the part of a pattern
that was written out no symbolic link is followed, neither a file nor a folder on the way to it. A path that
is written out whole may be a link: the operator named it.
"""

from __future__ import annotations

import fnmatch
import glob
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Identity", "Reach"]

Identity = tuple[int, int]  # device, inode
_FLAGS = os.O_RDONLY | os.O_CLOEXEC


class Reach:
    """Finds and opens the files of one source.

    Args:
        pattern: A file, a folder (all files in it but hidden ones), or a glob with ** for any depth.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._literal = not glob.has_magic(pattern)
        self._prefix = _written_out(pattern)

    def paths(self) -> list[str]:
        """Whatever matches at present, sorted; also what is no regular file."""
        if os.path.isdir(self._pattern):  # noqa: PTH112 - of a text, four times a second
            return sorted(_beneath(self._pattern, ["*"]))
        if self._literal:
            return [self._pattern] if self._stat(self._pattern) else []
        steps = [step for step in self._pattern.removeprefix(self._prefix).split("/") if step]
        return sorted(set(_beneath(self._prefix, steps)))  # a file can match ** in two ways

    def files(self) -> tuple[dict[Identity, str], dict[str, str]]:
        """What can be read at present. Returns: (file -> its first path, path left alone -> why)."""
        found: dict[Identity, str] = {}
        odd: dict[str, str] = {}
        for path in self.paths():
            info = self._stat(path)
            if info is None:
                continue
            if stat.S_ISLNK(info.st_mode):
                odd[path] = "is a symbolic link: name what it leads to, or it alone, as path"
            elif stat.S_ISREG(info.st_mode):
                found.setdefault((info.st_dev, info.st_ino), path)
            elif not stat.S_ISDIR(info.st_mode):
                odd[path] = "is no regular file"
        return found, odd

    def identity_of(self, path: str) -> Identity | None:
        """Which file a path leads to, None if to none."""
        info = self._stat(path)
        return None if info is None else (info.st_dev, info.st_ino)

    def open(self, path: str) -> io.FileIO:
        """Open a file for reading.

        Raises: OSError, also if it is a folder, a pipe or a device, or a link on its way leads elsewhere.
        """
        if self._is_named(path):
            return _regular(os.open(path, _FLAGS | os.O_NONBLOCK))  # a pipe would wait for its writer
        steps = Path(os.path.relpath(path, self._prefix)).parts
        if ".." in steps:
            raise OSError(f"is not beneath {self._prefix}")
        folder = os.open(self._prefix, _FLAGS | os.O_DIRECTORY)
        try:
            for step in steps[:-1]:
                inner = os.open(step, _FLAGS | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = inner
            return _regular(os.open(steps[-1], _FLAGS | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=folder))
        finally:
            os.close(folder)

    def _is_named(self, path: str) -> bool:
        return self._literal and path == self._pattern

    def _stat(self, path: str) -> os.stat_result | None:
        try:
            return os.stat(path, follow_symlinks=self._is_named(path))  # noqa: PTH116 - of a text
        except OSError:
            return None


def _written_out(pattern: str) -> str:
    """The folder that a pattern names before its first wildcard; the pattern itself where it is a folder."""
    if os.path.isdir(pattern):  # noqa: PTH112 - as above
        return pattern
    head = os.path.dirname(pattern)  # noqa: PTH120 - as above
    while glob.has_magic(head):
        head = os.path.dirname(head)  # noqa: PTH120 - as above
    return head or "."


def _beneath(folder: str, steps: list[str]) -> Iterator[str]:
    """What matches a pattern's steps beneath a folder; hidden names only where a step is, links not entered.

    As glob.glob finds it, but that enters links: one to "/" would have us list the whole disk.
    """
    waiting = [(folder, [*steps, "*"] if steps[-1] == "**" else steps)]
    while waiting:  # no recursion: whoever may write there decides how deep it is
        folder, steps = waiting.pop()
        step, rest = steps[0], steps[1:]
        if step == "**":
            waiting.append((folder, rest))
            step, rest = "*", steps
        try:
            with os.scandir(folder) as entries:
                found = [(entry.name, entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries]
        except OSError:
            continue
        for name, path, is_folder in found:
            if not fnmatch.fnmatchcase(name, step) or (name[0] == "." and step[0] != "."):
                continue
            if not rest:
                yield path
            elif is_folder:
                waiting.append((path, rest))


def _regular(fd: int) -> io.FileIO:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError("is no regular file")
    return io.FileIO(fd)
