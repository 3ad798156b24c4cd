"""Damage anywhere in a data folder: nothing that is read changes unnoticed, and everything goes on."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

import pytest

from storage.block import decode_blocks, encode_blocks
from storage.errors import StorageError
from storage.samples import Samples
from tests.crash.flips import sweep

TOKENIZER = "00112233aabbccdd"


def test_no_bit_of_a_ring_or_registry_changes_unnoticed() -> None:
    """Flips, pieces zeroed or from elsewhere, cuts and appended noise; `make torture` tries many more."""
    counts = sweep(300, seed=1)
    assert counts.failures == []
    assert counts.tried == 300
    outcomes = {key.partition(" ")[2] for key in counts.outcomes}
    # The sweep reached each way out, so none of them is untested.
    assert outcomes >= {"unused", "blanked", "rebuilt whole", "rebuilt with losses"}


def window_file() -> tuple[bytes, Samples]:
    rng = random.Random(4)
    lengths = [rng.randrange(1, 9) for _ in range(120)]
    samples = Samples(
        7,
        rng.choices(["pump-1", "cmms"], k=120),
        rng.choices(["reading", "text"], k=120),
        [""] * 120,
        array("d", [float(i) for i in range(120)]),
        array("I", lengths),
        array("I", [rng.randrange(60_000) for _ in range(sum(lengths))]),
        bytearray(b"\x01" * sum(lengths)),
        rng.randbytes(16 * 120),
    )
    return encode_blocks(samples, TOKENIZER, samples_a_block=50), samples


def test_every_bit_of_a_window_file_is_watched() -> None:
    """A claimed or accepted window: each single flip is refused; there is no byte that nothing reads."""
    data, samples = window_file()
    assert decode_blocks(data) == samples
    rng, unseen = random.Random(5), 0
    places = [*range(3 * 72), *(rng.randrange(len(data)) for _ in range(600))]
    for at in places:
        for bit in range(8) if at < 72 else (rng.randrange(8),):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            try:
                assert decode_blocks(bytes(damaged)) == samples
                unseen += 1
            except StorageError:
                pass
    assert unseen == 0


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_window_file_that_was_cut_is_refused(keep: float) -> None:
    data, _ = window_file()
    with pytest.raises(StorageError):
        decode_blocks(data[: int(len(data) * keep)])


def test_a_window_file_with_something_at_its_end_is_refused() -> None:
    data, _ = window_file()
    with pytest.raises(StorageError):
        decode_blocks(data + bytes(100))


def test_a_damaged_window_file_is_named_by_the_check(tmp_path: Path) -> None:
    from storage.check import check_folder
    from storage.folder import DataFolder

    folder = DataFolder.open(tmp_path / "data", create=True)
    data, _ = window_file()
    path = folder.accepted_file("main", 3)
    path.write_bytes(data)
    path.chmod(0o600)
    assert check_folder(folder, live=False) == []
    path.write_bytes(data[:100] + b"\xff" + data[101:])
    assert [problem.where for problem in check_folder(folder, live=False)] == [str(path)]
    folder.close()
