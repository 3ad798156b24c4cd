"""A disk that is really full: an ext4 file system of its own in a file, as small as the case needs."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.report import Report, write_report
from storage.errors import StorageError
from storage.folder import DataFolder
from storage.ring import Ring
from tests.crash import ingest_chain, publish_chain
from tests.crash.errors import check_end, check_said
from tests.crash.ingest_chain import Chain, Shape
from tests.crash.lives import Lives, Point, cannot_trace
from tests.crash.publish_chain import PublishChain, make_site

SEED = 20_261_123
BLOCK_BYTES = 4_096
DISK_BYTES = 80 << 20  # the registry alone takes 32 MiB, preallocated


class Disk:
    """A mounted file system that can be filled to its last block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    @property
    def free_bytes(self) -> int:
        """What a file can still get."""
        info = os.statvfs(self.path)
        return info.f_bavail * info.f_bsize

    def fill(self, leave: int = 0) -> None:
        """Leave no more free than this."""
        os.sync()  # what is freed or delayed is known only after the journal's commit
        fd = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with contextlib.closing(os.fdopen(fd, "wb", buffering=0)) as file:
            step = 1 << 20
            while step >= BLOCK_BYTES:
                if self.free_bytes - step < leave:
                    step //= 2
                    continue
                try:
                    file.write(bytes(step))
                    os.fsync(file.fileno())
                except OSError:
                    step //= 2
        os.sync()

    def free(self) -> None:
        """Give the space back."""
        self._filler.unlink()
        os.sync()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """An ext4 of 80 MiB with 4 KiB blocks and nothing reserved for root."""
    missing = [tool for tool in ("mkfs.ext4", "mount", "umount") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root, and {', '.join(missing) or 'no other tool'}")
    image, place = tmp_path / "disk.img", tmp_path / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-b", str(BLOCK_BYTES), "-m", "0", str(image)],
        check=True,
        capture_output=True,
    )
    mounted = subprocess.run(["mount", "-o", "loop", str(image), str(place)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no loop device can be mounted: {mounted.stderr.strip()}")
    try:
        yield Disk(place)
    finally:
        for _ in range(50):
            if subprocess.run(["umount", str(place)], capture_output=True).returncode == 0:
                break
            time.sleep(0.1)  # a process that was killed may still be on its way out
        else:
            subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Where lifetimes print: not on the full disk."""
    if reason := cannot_trace():
        pytest.skip(reason)
    folder = tmp_path / "lives"
    folder.mkdir()
    return folder


def test_a_ring_that_does_not_fit_is_refused_and_leaves_nothing_behind(disk: Disk) -> None:
    rings = disk.path / "ring"
    rings.mkdir()
    for leave in (4 << 20, 64 << 10, 8 << 10, 0):
        disk.fill(leave)
        before = disk.free_bytes
        with pytest.raises(StorageError, match="cannot set aside 67108864 bytes"):
            Ring.open_or_create(rings / "main", shard="main", tokenizer_id="0" * 16, max_bytes=64 << 20)
        os.sync()
        assert list(rings.iterdir()) == []
        assert disk.free_bytes == before


def test_a_full_disk_at_the_first_start_is_said_in_one_line(
    disk: Disk, scratch: Path, tiny_model: Path
) -> None:
    """And once there is space, the same command does its work."""
    work = disk.path / "work"
    work.mkdir()
    with (
        Lives(ingest_chain.PROGRAM, scratch) as lives,
        Chain(lives, tiny_model, work, Shape(seed=9, lines=40), quiet=scratch / "quiet") as chain,
    ):
        for leave in (20 << 20, 1 << 20, 40 << 10, 0):
            disk.fill(leave)
            life = chain.live(None)
            assert life.code not in (0, None)
            check_said(life)
            chain.audit()
        disk.free()
        check_end(chain.live(None))
        chain.audit(ended=True)


def test_a_ring_takes_events_and_evicts_with_no_byte_free_and_loses_nothing(
    disk: Disk, scratch: Path, tiny_model: Path
) -> None:
    """It was set aside whole when it was made: also a kill and a restart need no space."""
    work = disk.path / "work"
    work.mkdir()
    shape = Shape(seed=8, lines=1_100, bulk=4_000, ring_bytes=1 << 20, chunk=7, window=2)
    with (
        Lives(ingest_chain.PROGRAM, scratch) as lives,
        Chain(lives, tiny_model, work, shape, quiet=scratch / "quiet") as chain,
    ):
        chain.live(Point("fdatasync", 20))
        chain.audit()
        begun = chain.acked
        disk.fill()
        assert disk.free_bytes == 0
        for number in (12, 14):
            assert chain.live(Point("fdatasync", number), again=10).killed
            chain.audit()
        assert begun < chain.acked < shape.lines
        check_end(chain.live(None))
        assert disk.free_bytes == 0
        assert chain.audit(ended=True).tail_seq > 0


def test_publishing_on_a_full_disk_leaves_the_active_version_and_no_staging(
    disk: Disk, scratch: Path, tiny_model: Path
) -> None:
    """Whatever step runs out of space, a start removes what it left, and the next with space finishes."""
    site = scratch / "site"
    site.mkdir()
    with Lives(ingest_chain.PROGRAM, scratch) as ingests:
        make_site(ingests, tiny_model, site, SEED)
    with Lives(publish_chain.PROGRAM, scratch) as trainers:
        calls = PublishChain(trainers, tiny_model, site, scratch / "quiet").live(None, traced=True).calls
        chain = PublishChain(trainers, tiny_model, site, disk.path / "work")
        assert chain.live(calls[len(calls) // 2].point()).killed  # a version is active by then
        assert chain.audit(recover=False) > 0
        ended = []
        for leave in (0, 16 << 10, 64 << 10, 96 << 10, 128 << 10, 192 << 10):
            disk.fill(leave)
            life = chain.live(None)
            check_said(life)
            ended.append(life.code == 0 and not life.out)
            chain.audit(recover=True)
            disk.free()
        assert not any(ended[:3])
        check_end(chain.live(None))
        chain.audit(recover=True, ended=True)


def test_a_report_that_cannot_be_written_leaves_the_old_one(disk: Disk) -> None:
    folder = DataFolder.open(disk.path / "data", create=True)
    with contextlib.closing(folder):
        write_report(folder, _report(1))
        before = folder.report.read_bytes()
        disk.fill()
        with pytest.raises(OSError, match="No space left"):
            write_report(folder, _report(20_000))
        assert folder.report.read_bytes() == before
        disk.free()
        write_report(folder, _report(20_000))
        assert len(folder.report.read_bytes()) > len(before)


def _report(digits: int) -> Report:
    return Report(ring_digest=random.Random(digits).randbytes(digits).hex())
