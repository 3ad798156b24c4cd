"""Blocks: what goes in comes out, and a damaged one is refused."""

from __future__ import annotations

from array import array

import pytest

from storage.block import decode_block, decode_blocks, encode_block, encode_blocks
from storage.errors import CorruptBlockError
from storage.samples import Samples

TOKENIZER = "00112233aabbccdd"


def make(n: int, first_seq: int = 0, *, big_ids: bool = False, masked: bool = False) -> Samples:
    lengths = array("I", [(i * 7) % 5 for i in range(n)])
    total = sum(lengths)
    return Samples(
        first_seq,
        [f"source-{i % 3}" for i in range(n)],
        ["text" if i % 2 else "reading" for i in range(n)],
        ["" if i % 4 else "crew-b" for i in range(n)],
        array("d", [1.5 * i for i in range(n)]),
        lengths,
        array("I", [(70_000 if big_ids else 0) + i for i in range(total)]),
        bytearray((i % 3 != 0 if masked else 1) for i in range(total)),
        b"".join(i.to_bytes(16, "big") for i in range(n)),
    )


@pytest.mark.parametrize("big_ids", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [1, 2, 777])
def test_a_block_decodes_to_the_samples_it_was_made_of(n: int, masked: bool, big_ids: bool) -> None:
    samples = make(n, 41, big_ids=big_ids, masked=masked)
    assert decode_block(encode_block(samples, TOKENIZER)) == samples


def test_every_flipped_bit_is_noticed() -> None:
    """No bit of a block is outside the checksum: each single flip is refused, none crashes."""
    block = bytearray(encode_block(make(9), TOKENIZER))
    for bit in range(len(block) * 8):
        block[bit // 8] ^= 1 << bit % 8
        with pytest.raises((CorruptBlockError, Exception)) as caught:
            decode_block(bytes(block))
        assert caught.type.__name__ in ("CorruptBlockError", "FormatTooNewError")
        block[bit // 8] ^= 1 << bit % 8


def test_every_truncation_is_noticed() -> None:
    block = encode_block(make(9), TOKENIZER)
    for length in range(len(block)):
        with pytest.raises(CorruptBlockError):
            decode_block(block[:length])


def test_the_digest_does_not_depend_on_how_samples_are_cut() -> None:
    samples = make(50, masked=True)
    whole = samples.extend_digest(bytes(32))
    for cut in range(51):
        assert samples[cut:].extend_digest(samples[:cut].extend_digest(bytes(32))) == whole


def test_the_digest_sees_source_time_ids_and_mask() -> None:
    """Each column that the ring digest promises to cover changes it."""
    plain = make(5).extend_digest(bytes(32))
    for change in ("sources", "ts", "ids", "mask"):
        other = make(5)
        column = getattr(other, change)
        column[2] = "x" if change == "sources" else column[2] + 1 if change != "mask" else 0
        assert other.extend_digest(bytes(32)) != plain


def test_window_files_hold_many_blocks() -> None:
    samples = make(2_500)
    assert decode_blocks(encode_blocks(samples, TOKENIZER, 1_000)) == samples


def test_runs_with_a_gap_are_not_joined() -> None:
    with pytest.raises(ValueError, match="do not follow"):
        Samples.concat([make(3), make(3, 4)])


def test_texts_survive_being_joined_behind_samples_without_any() -> None:
    told = Samples(
        2, ["a"], ["text"], [""], array("d", [1.0]), array("I", [0]), hashes=bytes(16), texts=["as it was"]
    )
    assert Samples.concat([Samples.blank(0, 2), told]).texts == ["", "", "as it was"]
