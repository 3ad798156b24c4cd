"""What the ring does about damage: blanks in the place of what is lost, and everything else goes on."""

from __future__ import annotations

import contextlib
import errno
import itertools
import random
from array import array
from pathlib import Path

import msgspec
import pytest

from storage.block import BlockHeader, decode_block, read_header
from storage.dictionary import dictionary_file
from storage.env import MAX_READERS
from storage.errors import CorruptRingError, FormatTooNewError, StorageError
from storage.ring import Commit, Ring
from storage.ring_writer import MERGES, STATE, U32, block_key, encode_runs, newest_blocks
from storage.rows import seal, seal_header
from storage.samples import BLANK, HASH_BYTES, Samples
from storage.windows import OpenWindow, RingHeader

TOKENIZER = "00112233aabbccdd"
WORDS = [random.Random(i).choices(range(49_152), k=12) for i in range(30)]


def samples(first: int, n: int, subjects: str = "") -> Samples:
    """Text that repeats itself, so that a dictionary pays."""
    rng = random.Random(first)
    texts = [rng.choice(WORDS) + rng.choice(WORDS) for _ in range(n)]
    return Samples(
        first, ["cmms"] * n, ["text"] * n, [subjects] * n,
        array("d", [1.7e9 + i for i in range(first, first + n)]), array("I", map(len, texts)),
        array("I", [token for text in texts for token in text]), bytearray(b"\x01" * sum(map(len, texts))),
        b"".join((first + i + 1).to_bytes(HASH_BYTES, "big") for i in range(n)),
    )  # fmt: skip


def commit(ring: Ring, n: int, subjects: str = "") -> Samples:
    made = samples(ring.state.next_seq, n, subjects)
    ring.commit(Commit(samples=made, stream_time=float(ring.state.commits), window=OpenWindow(), counters={}))
    return made


def open_ring(tmp_path: Path) -> Ring:
    return Ring.open_or_create(tmp_path / "ring", shard="main", tokenizer_id=TOKENIZER, max_bytes=4 << 20)


def damage(ring: Ring, key: bytes, change: int = -1) -> None:
    """Flip a bit of a value behind the ring's back, in a transaction whose state row is in order."""
    with ring._env.begin(write=True) as txn:
        value = bytearray(txn.get(key) or b"")
        value[change] ^= 4
        txn.put(key, bytes(value))
        ring.state = msgspec.structs.replace(ring.state, txn=txn.id())
        txn.put(STATE, seal(STATE, msgspec.msgpack.encode(ring.state)))


@pytest.fixture
def ring(tmp_path: Path) -> Ring:
    return open_ring(tmp_path)


def test_a_damaged_block_is_read_as_blanks_and_the_others_as_they_were(ring: Ring) -> None:
    parts = [commit(ring, 10) for _ in range(3)]
    damage(ring, block_key(10))
    found = ring.read(5, 24)
    assert found[:5] == parts[0][5:]
    assert found[5:15] == Samples.blank(10, 10)
    assert found[15:] == parts[2][:5]
    assert [(seq, "checksum" in words) for seq, words in ring.check_blocks()] == [(10, True)]


@pytest.mark.parametrize("at", [0, 8, 16, 24, 60, 70, -1])
def test_quarantine_makes_the_ring_whole_again(tmp_path: Path, ring: Ring, at: int) -> None:
    """Whichever field is hit: the samples of that block are lost, counted and kept for whoever wants them."""
    parts = [commit(ring, 10) for _ in range(3)]
    damage(ring, block_key(10), at)
    (row,) = ring.quarantine(tmp_path / "quarantine")
    assert (row.first_seq, row.samples) == (10, 10)
    assert len((tmp_path / "quarantine" / row.file).read_bytes()) > 64
    assert list(ring.check_blocks()) == []
    assert ring.quarantine(tmp_path / "quarantine") == []
    assert ring.quarantined() == [row]
    assert ring.state.lost == 10
    ring.close()
    with open_ring(tmp_path) as again:
        later = commit(again, 10)
        assert again.read(0, 39) == Samples.concat([parts[0], Samples.blank(10, 10), parts[2], later])


def test_a_block_that_vanished_is_found_and_replaced(tmp_path: Path, ring: Ring) -> None:
    for _ in range(3):
        commit(ring, 10)
    with ring._env.begin(write=True) as txn:
        txn.delete(block_key(10))
        ring.state = msgspec.structs.replace(ring.state, txn=txn.id())
        txn.put(STATE, seal(STATE, msgspec.msgpack.encode(ring.state)))
    assert ring.read(0, 29).kinds[10:20] == [BLANK] * 10
    assert [row.first_seq for row in ring.quarantine(tmp_path / "quarantine")] == [10]
    assert list(ring.check_blocks()) == []


def test_an_older_block_in_the_place_of_a_newer_one_is_noticed(ring: Ring) -> None:
    """A write that the medium dropped brings back what was forgotten, with a good checksum."""
    commit(ring, 10, subjects="crew-b")
    with ring._env.begin() as txn:
        before = txn.get(block_key(0))
    assert ring.forget("crew-b") == 10
    with ring._env.begin(write=True) as txn:
        assert before
        txn.put(block_key(0), before)
        ring.state = msgspec.structs.replace(ring.state, txn=txn.id())
        txn.put(STATE, seal(STATE, msgspec.msgpack.encode(ring.state)))
    assert [words for _, words in ring.check_blocks()] == ["a block is not the one that was written last"]


@pytest.mark.parametrize("key", [b"p" + b"work.jsonl", STATE])
def test_a_damaged_row_is_refused_at_the_next_start(tmp_path: Path, ring: Ring, key: bytes) -> None:
    made = samples(0, 3)
    ring.commit(
        Commit(
            samples=made, stream_time=1.0, window=OpenWindow(), counters={}, positions={"work.jsonl": b"12"}
        )
    )
    with ring._env.begin(write=True) as txn:
        value = bytearray(txn.get(key) or b"")
        state = msgspec.structs.replace(ring.state, txn=txn.id())
        txn.put(STATE, seal(STATE, msgspec.msgpack.encode(state)))
        value[1] ^= 1
        txn.put(key, bytes(value))
    ring.close()
    with pytest.raises(CorruptRingError, match="doctor"):
        open_ring(tmp_path)


def test_a_row_that_vanished_is_noticed(tmp_path: Path, ring: Ring) -> None:
    empty = Samples()
    ring.commit(
        Commit(samples=empty, stream_time=1.0, window=OpenWindow(), counters={}, positions={"a": b"1"})
    )
    with ring._env.begin(write=True) as txn:
        txn.delete(b"pa")
        state = msgspec.structs.replace(ring.state, txn=txn.id())
        txn.put(STATE, seal(STATE, msgspec.msgpack.encode(state)))
    ring.close()
    with pytest.raises(CorruptRingError, match="rows are lost"):
        open_ring(tmp_path)


def test_a_snapshot_that_is_not_the_one_its_meta_page_claims_is_refused(ring: Ring) -> None:
    """The state row names the transaction that wrote it; a flipped id in a meta page shows."""
    commit(ring, 3)
    with ring._env.begin(write=True) as txn:
        txn.put(b"pa", seal(b"pa", b"1"))
    with pytest.raises(CorruptRingError, match="meta page"):
        ring.read_state()


# -- merging, dictionary, forgetting ----------------------------------------------------------------


def block_sizes(ring: Ring) -> list[int]:
    with ring._env.begin() as txn:
        return [len(block) for _, block in newest_blocks(txn)]


def test_small_blocks_are_merged_and_nothing_else_changes(ring: Ring) -> None:
    """Those inside the leaf page before it splits, then what became of them, whatever lies between."""
    parts = []
    for number in range(600):
        parts.append(commit(ring, 100 if number % 7 == 0 else 3))
        sizes = block_sizes(ring)
        for small, enough in MERGES:
            assert sum(itertools.takewhile(small.__gt__, sizes)) < enough
    assert max(sizes) < 2 * MERGES[-1][1]
    whole = Samples.concat(parts)
    assert ring.read(0, len(whole) - 1) == whole
    assert ring.state.digest == whole.extend_digest(bytes(32))
    assert ring.newest_hashes(len(whole)) == whole.hashes
    assert list(ring.check_blocks()) == []


def stuttering(first: int, count: int, tokens: int) -> Samples:
    """Texts of one word over and over, which nothing identifies: a block of them is tiny."""
    return Samples(
        first, ["cmms"] * count, ["text"] * count, [""] * count, array("d", [0.0] * count),
        array("I", [tokens] * count), array("I", [7]) * (tokens * count), bytearray(b"\x01" * tokens * count),
        bytes(HASH_BYTES * count),
    )  # fmt: skip


def test_no_merge_decodes_more_tokens_than_a_gateway_has_memory_for(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A producer that repeats itself packs a gigabyte of tokens into 32 KiB of blocks."""
    monkeypatch.setattr("storage.ring_writer.MERGED_TOKENS", 10_000)
    for number in range(60):
        made = stuttering(ring.state.next_seq, 1, 2_000)
        ring.commit(Commit(samples=made, stream_time=float(number), window=OpenWindow(), counters={}))
    for _, block in ring.copied_blocks():
        assert read_header(block).tokens <= 10_000


def test_what_was_merged_is_not_merged_on_beyond_the_span(ring: Ring) -> None:
    """However well it packs: a block is evicted whole, by the age of its newest sample."""
    ring.merge_span_s = 100.0
    for number in range(1_000):
        made = stuttering(ring.state.next_seq, 1, 3)
        made.ts[0] = 2.0 * number
        ring.commit(Commit(samples=made, stream_time=made.ts[0], window=OpenWindow(), counters={}))
    spans = []
    for _, block in ring.copied_blocks():
        times = decode_block(block, ring.dictionaries.find).ts
        spans.append(times[-1] - times[0])
    assert 50.0 < max(spans) <= 100.0
    assert ring.evict_older_than(1_900.0) >= 900


def test_blanks_are_as_old_as_their_neighbours(tmp_path: Path, ring: Ring) -> None:
    """Blanks of the day when the damage was found would keep what is older from being evicted by age."""
    for _ in range(5):
        commit(ring, 60)
    damage(ring, block_key(60), 70)
    ring.quarantine(tmp_path / "quarantine")
    assert ring.evict_older_than(4.0) == 240


def test_a_full_disk_keeps_no_damaged_bytes_and_the_ring_goes_on(
    tmp_path: Path, ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    commit(ring, 10)
    commit(ring, 10)
    damage(ring, block_key(0))
    monkeypatch.setattr("storage.ring_damage.write_file_durably", full)
    (row,) = ring.quarantine(tmp_path / "quarantine")
    assert (row.first_seq, row.samples, row.file) == (0, 10, "")
    assert list(ring.check_blocks()) == []


def newest_header(ring: Ring) -> BlockHeader:
    with ring.reading() as txn:
        return read_header(next(newest_blocks(txn))[1])


def trained(ring: Ring) -> int:
    """Commit until the ring has a dictionary. Returns: its id."""
    for _ in range(120):
        commit(ring, 50)
    (number,) = ring.dictionaries.rows()
    return number


def test_a_dictionary_is_trained_on_the_early_blocks_and_makes_later_ones_smaller(ring: Ring) -> None:
    commit(ring, 20)
    (before,) = block_sizes(ring)
    trained(ring)
    while (short := newest_header(ring)).samples > 20:
        commit(ring, 20)
    assert short.dictionary in ring.dictionaries.rows()
    assert short.block_bytes < 0.8 * before
    assert dictionary_file(ring.folder, short.dictionary).exists()


def test_a_dictionary_survives_the_loss_of_its_row_or_of_its_copy(tmp_path: Path, ring: Ring) -> None:
    number = trained(ring)
    last = commit(ring, 20)
    copy = dictionary_file(ring.folder, number)
    damage(ring, U32.pack(b"Z", number), 100)
    ring.close()
    with open_ring(tmp_path) as again:
        assert again.read(last.first_seq, again.state.next_seq - 1) == last
        copy.unlink()
    with open_ring(tmp_path) as again:
        assert again.read(last.first_seq, again.state.next_seq - 1) == last
        assert copy.exists()


def test_without_its_dictionary_a_block_is_lost_but_its_hashes_are_known(tmp_path: Path, ring: Ring) -> None:
    """Row and copy gone: short blocks become blanks, long ones never needed it, a new one is trained."""
    number = trained(ring)
    long = ring.read(0, 1_999)
    while not (short := newest_header(ring)).dictionary:
        commit(ring, 20)
    damage(ring, U32.pack(b"Z", number), 100)
    hashes = ring.newest_hashes(short.samples)
    ring.close()
    dictionary_file(tmp_path / "ring", number).unlink()
    with open_ring(tmp_path) as again:
        assert again.read(short.first_seq, short.last_seq).kinds == [BLANK] * short.samples
        assert short.first_seq in [row.first_seq for row in again.quarantine(tmp_path / "q")]
        assert again.newest_hashes(short.samples) == hashes
        assert again.read(0, 1_999) == long
        assert list(again.check_blocks()) == []
        assert trained(again) != number


def test_forgetting_blanks_the_samples_of_one_subject_only(tmp_path: Path, ring: Ring) -> None:
    kept, gone = commit(ring, 5, "crew-a"), commit(ring, 5, "crew-b")
    digest, hashes = ring.state.digest, ring.newest_hashes(10)
    assert ring.forget("crew-b") == 5
    assert ring.forget("crew-b") == 0
    found = ring.read(0, 9)
    assert found[:5] == kept
    assert found[5:] == gone.without(range(5))
    assert set(found.subjects) == {"crew-a", ""}
    assert (ring.state.digest, ring.newest_hashes(10), ring.state.forgotten) == (digest, hashes, 5)
    assert list(ring.check_blocks()) == []


def test_readers_are_seen_with_how_far_they_are_behind(tmp_path: Path, ring: Ring) -> None:
    commit(ring, 1)
    assert ring.readers() == []
    with ring._env.begin():
        commit(ring, 1)
        (reader,) = ring.readers()
    assert reader.behind == 1
    assert ring.clear_stale_readers() == 0


def test_a_header_that_only_claims_to_be_newer_is_damage(tmp_path: Path, ring: Ring) -> None:
    with ring._env.begin(write=True) as txn:
        txn.put(b"H", msgspec.msgpack.encode(RingHeader(3, "main", TOKENIZER, b"", b"12345678")))
    ring.close()
    with pytest.raises(CorruptRingError, match="header"):
        open_ring(tmp_path)


def test_a_newer_ring_is_refused_and_left_alone(tmp_path: Path, ring: Ring) -> None:
    with ring._env.begin(write=True) as txn:
        txn.put(b"H", seal_header(RingHeader(3, "main", TOKENIZER, b"")))
    ring.close()
    before = (tmp_path / "ring" / "data.mdb").read_bytes()
    with pytest.raises(FormatTooNewError, match="upgrade"):
        open_ring(tmp_path)
    assert (tmp_path / "ring" / "data.mdb").read_bytes() == before


def test_a_ring_whose_reader_slots_are_all_taken_says_so_and_goes_on_later(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the writer does needs no slot."""
    monkeypatch.setattr("storage.env.SLOT_WAIT_S", 0.0)
    commit(ring, 1)
    with contextlib.ExitStack() as readers:
        for _ in range(MAX_READERS):
            readers.enter_context(ring._env.begin())
        with pytest.raises(StorageError, match="64 reader slots"):
            ring.read_state()
        commit(ring, 1)
    assert ring.read_state().next_seq == 2


def test_a_commit_larger_than_a_block_may_be_becomes_several(monkeypatch: pytest.MonkeyPatch) -> None:
    made = samples(0, 100)
    monkeypatch.setattr("storage.ring_writer.MAX_TOKENS", 1_000)
    runs = encode_runs(made, TOKENIZER, 1.0, None)
    assert [first for first, _ in runs] == sorted(read_header(block).first_seq for _, block in runs)
    assert all(read_header(block).tokens <= 1_000 for _, block in runs)
    assert Samples.concat(decode_block(block) for _, block in runs) == made
