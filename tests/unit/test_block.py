"""Blocks: what goes in comes out, and a damaged one is refused."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.block import block_hashes, column_bytes, decode_block, decode_blocks, encode_block, encode_blocks
from storage.errors import CorruptBlockError
from storage.samples import BLANK, Samples
from tests.format_1 import encode_block_1

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
        with pytest.raises(CorruptBlockError):
            decode_block(bytes(block))
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


AWKWARD = [0.0, -0.0, 1e-7, 0.1 + 0.2, 1763912345.123, 1763912345.1234567, -5.5, 1e18, 1e300, 5e-324]


@given(ts=st.lists(st.one_of(st.floats(), st.sampled_from(AWKWARD)), min_size=1, max_size=20))
def test_event_times_come_back_bit_for_bit_however_they_are_written(ts: list[float]) -> None:
    """Whole microseconds are written as differences; whatever is none, NaN and -0.0 too, as it is."""
    samples = make(len(ts))
    samples.ts = array("d", ts)
    assert decode_block(encode_block(samples, TOKENIZER)).ts.tobytes() == samples.ts.tobytes()


def test_steady_times_take_next_to_nothing() -> None:
    steady, ragged = make(1_000), make(1_000)
    steady.ts = array("d", [1763912345.5 + 2 * i for i in range(1_000)])
    ragged.ts = array("d", [1763912345.5 + 2 * i + (i * i % 97) / 1e7 for i in range(1_000)])
    assert len(encode_block(steady, TOKENIZER)) < len(encode_block(ragged, TOKENIZER)) - 500


@pytest.mark.parametrize("names", [1, 256, 257, 900])
@pytest.mark.parametrize("length", [255, 256, 65_536])
def test_wide_names_and_lengths_come_back(names: int, length: int) -> None:
    n = max(names, 2)
    samples = Samples.blank(7, n)
    samples.sources = [f"source-{i % names}" for i in range(n)]
    samples.lengths[1] = length
    samples.ids, samples.mask = array("I", range(length)), bytearray(b"\x01" * length)
    assert decode_block(encode_block(samples, TOKENIZER)) == samples


def test_a_block_of_format_1_is_still_read() -> None:
    samples = make(50, 9, big_ids=True, masked=True)
    assert decode_block(encode_block_1(samples, TOKENIZER, 1.0)) == samples


def test_hashes_are_read_without_unpacking_and_zeros_where_there_are_none() -> None:
    assert block_hashes(encode_block(make(9), TOKENIZER)) == make(9).hashes
    assert block_hashes(encode_block(Samples.blank(0, 9), TOKENIZER)) == bytes(9 * 16)


def test_what_is_blanked_is_gone_and_the_rest_is_as_it_was() -> None:
    """Seqs and hashes stay; what is left afterwards is the others, in order."""
    samples = make(9, masked=True)
    less = samples.without([0, 4, 8])
    assert (less.seqs, less.hashes) == (samples.seqs, samples.hashes)
    assert [less.kinds[i] for i in (0, 4, 8)] == [BLANK] * 3
    assert not any(less.token_ids(i) or less.subjects[i] for i in (0, 4, 8))
    rest = less.present()
    kept = [1, 2, 3, 5, 6, 7]
    assert [rest.token_ids(n) for n in range(6)] == [samples.token_ids(i) for i in kept]
    assert [rest.token_mask(n) for n in range(6)] == [samples.token_mask(i) for i in kept]
    assert rest.sources == [samples.sources[i] for i in kept]
    assert decode_block(encode_block(less, TOKENIZER)) == less


def test_the_digest_of_a_given_stream_never_changes() -> None:
    """Rings and other machines hold them: whoever makes this faster must get the same."""
    samples = Samples(
        0, ["pump-1", "cmms", "pump-1"], ["reading", "text", "reading"], ["", "crew-b", ""],
        array("d", [1.5, -2.0, 1763912345.123]), array("I", [2, 0, 3]), array("I", [7, 70000, 0, 1, 2]),
        bytearray(b"\1\0\1\1\1"), bytes(48),
    )  # fmt: skip
    digest = "318e5954397159dc94c3caa9e5890e816be2c46eb87c87ed47febba9a6c8571b"
    assert samples.extend_digest(bytes(32)).hex() == digest


@pytest.mark.parametrize(("largest", "typecode"), [(0xFFFF, "H"), (0x10000, "I"), (0x1000000, "I")])
def test_ids_take_16_bits_where_all_fit(largest: int, typecode: str) -> None:
    samples = Samples(
        0, ["a"], ["text"], [""], array("d", [1.0]), array("I", [3]), array("I", [0, largest, 258]),
        bytearray(b"\1\1\1"), bytes(16),
    )  # fmt: skip
    assert column_bytes(samples).endswith(array(typecode, [0, largest, 258]).tobytes())
    assert decode_block(encode_block(samples, TOKENIZER)) == samples
