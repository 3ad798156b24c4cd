"""The page reader against LMDB itself, and against files that LMDB would crash on."""

from __future__ import annotations

import os
import random
import struct
import tempfile
from pathlib import Path

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.pages import (
    Item,
    Meta,
    PageFile,
    PageProblem,
    check_pages,
    items,
    newest_meta,
    raw_items,
    read_metas,
    root_candidates,
)

PAGE = os.sysconf("SC_PAGE_SIZE")


def make(folder: Path, rows: int, size: int, seed: int = 1) -> list[tuple[bytes, bytes]]:
    """Write rows in many transactions, delete and rewrite some. Returns: what LMDB holds."""
    rng = random.Random(seed)
    with lmdb.open(str(folder), map_size=64 << 20, lib_version=0, sync=False) as env:
        for _ in range(4):
            for start in range(0, rows, 50):
                with env.begin(write=True) as txn:
                    for i in range(start, min(rows, start + 50)):
                        if rng.random() < 0.3:
                            txn.delete(b"k%06d" % i)
                        else:
                            txn.put(b"k%06d" % i, rng.randbytes(rng.randint(0, size)))
        with env.begin() as txn:
            return list(txn.cursor())


def look(path: Path) -> tuple[Meta, list[PageProblem], list[Item]]:
    with PageFile(path) as file:
        metas, problems = read_metas(file)
        meta = newest_meta(metas)
        problems += check_pages(file, meta)
        found = list(items(file, meta.main.root, last_page=meta.last_page, depth=meta.main.depth))
    return meta, problems, found


@pytest.mark.parametrize(("rows", "size"), [(0, 1), (1, 1), (60, 40), (3000, 60), (400, 6000), (40, 300_000)])
def test_a_healthy_file_has_no_problem_and_the_rows_that_lmdb_reads(
    tmp_path: Path, rows: int, size: int
) -> None:
    expected = make(tmp_path, rows, size)
    _, problems, found = look(tmp_path / "data.mdb")
    assert problems == []
    assert [(item.key, item.value) for item in found] == expected


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.binary(min_size=1, max_size=40), st.none() | st.integers(0, 9000), min_size=1, max_size=60
        ),
        max_size=12,
    )
)
def test_random_transactions_read_as_lmdb_reads_them(transactions: list[dict[bytes, int | None]]) -> None:
    rng = random.Random(7)
    with tempfile.TemporaryDirectory() as folder:
        with lmdb.open(folder, map_size=16 << 20, lib_version=0, sync=False) as env:
            for rows in transactions:
                with env.begin(write=True) as txn:
                    for key, size in rows.items():
                        if size is None:
                            txn.delete(key)
                        else:
                            txn.put(key, rng.randbytes(size))
            with env.begin() as txn:
                expected = list(txn.cursor())
        meta, problems, found = look(Path(folder, "data.mdb"))
        assert problems == [] or meta.txn == 0
        assert [(item.key, item.value) for item in found] == expected
        with PageFile(Path(folder, "data.mdb")) as file:
            read_metas(file)
            raw = {(item.key, item.value) for item in raw_items(file)}
        assert set(expected) <= raw


def test_values_are_read_only_where_they_are_wanted(tmp_path: Path) -> None:
    expected = dict(make(tmp_path, 30, 20_000))
    with PageFile(tmp_path / "data.mdb") as file:
        meta = newest_meta(read_metas(file)[0])
        wanted = max(expected)
        found = list(items(file, meta.main.root, last_page=meta.last_page, wanted=lambda key: key == wanted))
    assert {item.key: item.value for item in found if item.value is not None} == {wanted: expected[wanted]}
    assert {item.key: item.size for item in found} == {key: len(value) for key, value in expected.items()}


def flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def problems_of(path: Path) -> list[PageProblem]:
    """What is found, however damaged the file is."""
    with PageFile(path) as file:
        metas, problems = read_metas(file)
        for meta in metas:
            problems += check_pages(file, meta)
            list(items(file, meta.main.root, last_page=meta.last_page, depth=meta.main.depth))
        list(raw_items(file))
    return problems


def test_every_bit_of_both_meta_pages_is_watched(tmp_path: Path) -> None:
    make(tmp_path, 200, 100)
    path = tmp_path / "data.mdb"
    unseen = set()
    for page in (0, 1):
        for at in range(152):
            for bit in range(8):
                flip(path, page * PAGE + at, bit)
                if not problems_of(path):
                    unseen.add(at)
                flip(path, page * PAGE + at, bit)
    # A meta page has no size of its own: the words that other pages keep there are not used.
    assert unseen == {8, 9, 12, 13, 14, 15}


def test_every_bit_of_page_headers_offsets_and_nodes_is_watched_or_unused(tmp_path: Path) -> None:
    """What a flip leaves unseen in the structure changes a key or a value in place; those have seals."""
    expected = make(tmp_path, 400, 40)
    path = tmp_path / "data.mdb"
    meta, _, _ = look(path)
    for page in {meta.main.root, *(item.page for item in look(path)[2][::150])}:
        for at in range(16):
            for bit in range(8):
                flip(path, page * PAGE + at, bit)
                if not problems_of(path):
                    assert [(i.key, i.value) for i in look(path)[2]] == expected, (page, at, bit)
                flip(path, page * PAGE + at, bit)


def shape(rows: list[Item]) -> list[tuple[int, int]]:
    return [(len(row.key), row.size) for row in rows]


def test_a_flip_anywhere_is_found_or_changes_one_key_or_value_in_place(tmp_path: Path) -> None:
    make(tmp_path, 300, 3000)
    path = tmp_path / "data.mdb"
    meta, _, before = look(path)
    rng = random.Random(3)
    for _ in range(400):
        at, bit = rng.randrange((meta.last_page + 1) * PAGE), rng.randrange(8)
        flip(path, at, bit)
        if not problems_of(path):
            after = look(path)[2]
            assert shape(after) == shape(before)
            assert sum(a != b for a, b in zip(after, before, strict=True)) <= 1
        flip(path, at, bit)


def test_a_branch_that_names_itself_does_not_hang_the_walk(tmp_path: Path) -> None:
    make(tmp_path, 3000, 60)
    path = tmp_path / "data.mdb"
    meta, _, _ = look(path)
    data = bytearray(path.read_bytes())
    at = meta.main.root * PAGE
    for n in range(2):
        (offset,) = struct.unpack_from("<H", data, at + 16 + 2 * n)
        struct.pack_into("<HHH", data, at + offset, meta.main.root & 0xFFFF, meta.main.root >> 16, 0)
    path.write_bytes(data)
    assert any("used twice" in problem.words for problem in problems_of(path))


@pytest.mark.parametrize("keep", [0, 10, PAGE, PAGE + 20, 2 * PAGE, 3 * PAGE + 7])
def test_a_truncated_file_is_read_as_far_as_it_goes(tmp_path: Path, keep: int) -> None:
    make(tmp_path, 300, 300)
    path = tmp_path / "data.mdb"
    path.write_bytes(path.read_bytes()[:keep])
    assert problems_of(path)


def test_noise_is_no_data_file(tmp_path: Path) -> None:
    path = tmp_path / "data.mdb"
    path.write_bytes(random.Random(1).randbytes(40 * PAGE))
    with PageFile(path) as file:
        metas, problems = read_metas(file)
    assert metas == []
    assert [problem.kind for problem in problems] == ["meta", "meta"]


def test_shuffled_pages_are_noticed(tmp_path: Path) -> None:
    make(tmp_path, 600, 60)
    path = tmp_path / "data.mdb"
    rng, data = random.Random(5), path.read_bytes()
    pages = [data[i : i + PAGE] for i in range(2 * PAGE, len(data), PAGE)]
    rng.shuffle(pages)
    path.write_bytes(data[: 2 * PAGE] + b"".join(pages))
    assert problems_of(path)


def test_a_free_list_that_gives_back_a_page_in_use_is_noticed(tmp_path: Path) -> None:
    make(tmp_path, 600, 60)
    path = tmp_path / "data.mdb"
    with PageFile(path) as file:
        meta = newest_meta(read_metas(file)[0])
    data = bytearray(path.read_bytes())
    at = meta.free.root * PAGE
    upper = struct.unpack_from("<H", data, at + 14)[0]
    # The last word of the lowest node: the lowest page of its list. The tree's root takes its place.
    count_at = at + upper + 16
    (count,) = struct.unpack_from("<Q", data, count_at)
    assert count
    struct.pack_into("<Q", data, count_at + 8 * count, meta.main.root)
    path.write_bytes(data)
    assert {problem.kind for problem in problems_of(path)} >= {"free list"}


def test_a_symlink_is_not_followed(tmp_path: Path) -> None:
    make(tmp_path, 10, 10)
    (tmp_path / "link").symlink_to(tmp_path / "data.mdb")
    with pytest.raises(OSError, match="symbolic"):
        PageFile(tmp_path / "link")


def test_a_root_is_found_again_from_its_last_leaf(tmp_path: Path) -> None:
    make(tmp_path, 3000, 60)
    with PageFile(tmp_path / "data.mdb") as file:
        meta = newest_meta(read_metas(file)[0])
        last = list(items(file, meta.main.root, last_page=meta.last_page))[-1].page
        assert meta.main.root in root_candidates(file, last)


def test_a_walk_from_a_key_on_leaves_out_what_comes_before(tmp_path: Path) -> None:
    expected = make(tmp_path, 2000, 60)
    start = expected[len(expected) // 2][0]
    with PageFile(tmp_path / "data.mdb") as file:
        meta = newest_meta(read_metas(file)[0])
        found = list(items(file, meta.main.root, last_page=meta.last_page, start=start))
        values = [file.read(item.at, item.size) for item in found]
    assert [(item.key, item.value) for item in found] == expected[len(expected) // 2 :]
    assert values == [item.value for item in found]
