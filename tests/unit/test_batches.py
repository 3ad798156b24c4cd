"""Rows, the held-out split, the token budget and the order of steps."""

from __future__ import annotations

from array import array

import pytest

from adapters.batches import (
    SCORED,
    TRAINED,
    RowRef,
    choose_within,
    deal_steps,
    held_out_indices,
    normal_form,
    pack_rows,
    sample_keys,
    split_window,
    take_tokens,
)
from adapters.recipe import Recipe, adapted_blocks
from storage.samples import Samples

BOS, NL = 1, 9
BOTH = SCORED | TRAINED


def samples_of(*parts: tuple[str, str, list[int], list[int] | None]) -> Samples:
    """Samples from (source, kind, ids, mask); no mask means all ones."""
    out = Samples()
    for source, kind, ids, mask in parts:
        out.sources.append(source)
        out.kinds.append(kind)
        out.subjects.append("")
        out.ts.append(0.0)
        out.lengths.append(len(ids))
        out.ids += array("I", ids)
        out.mask += bytes(mask if mask is not None else [1] * len(ids))
    out.hashes = bytes(16 * len(parts))
    return out


def texts(*ids: list[int], source: str = "a") -> Samples:
    return samples_of(*((source, "text", one, None) for one in ids))


def pack(samples: Samples, row_tokens: int = 8) -> list[tuple[list[int], list[int]]]:
    rows = pack_rows(samples, range(len(samples)), row_tokens=row_tokens, bos_id=BOS, separator_id=NL)
    return [(row.ids.tolist(), list(row.weights)) for row in rows]


def test_a_row_is_bos_then_samples_with_a_separator_after_each():
    """The separator is trained on and not scored, BOS is neither."""
    assert pack(texts([10, 11], [12])) == [
        ([BOS, 10, 11, NL, 12, NL], [0, BOTH, BOTH, TRAINED, BOTH, TRAINED])
    ]


def test_a_sample_that_does_not_fit_starts_the_next_row():
    """Samples are not cut while a row can hold them whole."""
    assert [ids for ids, _ in pack(texts([10, 11, 12], [13, 14, 15, 16]))] == [
        [BOS, 10, 11, 12, NL],
        [BOS, 13, 14, 15, 16, NL],
    ]


def test_a_sample_longer_than_a_row_is_cut_and_nothing_is_lost():
    """Each part starts with BOS; the last one shares its row with what follows."""
    rows = pack(texts(list(range(20, 32)), [40]), row_tokens=8)
    assert [ids for ids, _ in rows] == [
        [BOS, *range(20, 27)],
        [BOS, *range(27, 32), NL, 40],
    ]


def test_sources_never_share_a_row():
    """A source's row shows what that source said before, and nothing else."""
    mixed = samples_of(("a", "text", [10], None), ("b", "text", [20], None), ("a", "text", [11], None))
    assert [ids for ids, _ in pack(mixed)] == [[BOS, 10, NL, 11, NL], [BOS, 20, NL]]


def test_an_exchange_has_a_row_of_its_own_and_only_the_learned_turn_counts():
    """It is a whole chat form, so no BOS is put before it; what follows its cut starts with one."""
    chat = samples_of(
        ("a", "text", [10], None),
        ("a", "exchange", [BOS, 30, 31, 32], [0, 0, 1, 1]),
        ("a", "text", [11], None),
    )
    assert pack(chat) == [
        ([BOS, 10, NL, 11, NL], [0, BOTH, TRAINED, BOTH, TRAINED]),
        ([BOS, 30, 31, 32], [0, 0, BOTH, BOTH]),
    ]
    long = samples_of(("a", "exchange", list(range(30, 42)), [0] * 4 + [1] * 8))
    assert pack(long) == [
        (list(range(30, 38)), [0] * 4 + [BOTH] * 4),
        ([BOS, *range(38, 42)], [0, BOTH, BOTH, BOTH, BOTH]),
    ]


def test_rows_without_a_token_that_counts_are_left_away():
    """An exchange cut before its answer, and an empty sample, would only cost time."""
    assert pack(samples_of(("a", "exchange", [BOS, 30], [0, 0]), ("a", "text", [], None))) == []


def test_the_last_fifth_of_each_source_is_held_out():
    """By source, so that a rare one is examined too; with fewer than five samples there is no fifth."""
    window = samples_of(
        *(("a", "text", [i], None) for i in range(10)),
        *(("b", "text", [i], None) for i in range(5)),
        *(("c", "text", [i], None) for i in range(4)),
    )
    assert held_out_indices(window) == [8, 9, 14]


def decode(many: list[list[int]]) -> list[str]:
    return ["".join(map(chr, ids)) for ids in many]


def words(*lines: str, kind: str = "text", source: str = "a") -> Samples:
    return samples_of(*((source, kind, list(map(ord, line)), None) for line in lines))


def test_what_equals_a_held_out_text_but_for_case_and_punctuation_is_not_trained_on():
    """Near duplicates would show the model what it is examined on."""
    window = words("Replace  PUMP-chip.", "check oil", "grease pin", "swap hose", "replace pump chip")
    keys = sample_keys(window, decode)
    split = split_window(window, keys, set())
    assert (split.train, split.left_out, split.held_out) == ([1, 2, 3], [0], [4])
    assert normal_form("Replace  PUMP-chip.") == "replace pump chip"


def test_readings_are_equal_only_when_every_digit_is():
    """3.4 and 34 differ, though without punctuation they would not."""
    window = words("p=34", "p=3.4 ", "p=3.4", "p=3.5", "p=3.4", kind="reading")
    split = split_window(window, sample_keys(window, decode), set())
    assert (split.train, split.left_out, split.held_out) == ([0, 1, 3], [2], [4])


def test_what_another_window_holds_out_is_not_trained_on_either():
    """Held out is for ever."""
    window = words("one", "two", "three", "four", "five")
    split = split_window(window, sample_keys(window, decode), {normal_form("TWO")})
    assert split.train == [0, 2, 3]
    assert split.left_out == [1]


def test_a_budget_takes_from_each_source_in_proportion_and_follows_from_the_seed():
    """A flood from one source does not push the others out."""
    window = samples_of(*(("ab"[i % 10 == 0], "text", [i] * 4, None) for i in range(100)))
    every = list(range(100))
    chosen = choose_within(window, every, 200, "seed")
    assert chosen == sorted(chosen) == choose_within(window, every, 200, "seed")
    assert chosen != choose_within(window, every, 200, "other")
    by_source = [window.sources[i] for i in chosen]
    assert (by_source.count("a"), by_source.count("b")) == (45, 5)
    assert choose_within(window, every, 400, "seed") == every


def test_a_step_holds_the_recipes_shares():
    """55 % new, 25 % rehearsal, 20 % anchors, over the whole update and nearly so in any stretch of it."""
    lengths = {"new": [250] * 40, "rehearsal": [240] * 30, "anchor": [256] * 64}
    steps = deal_steps(lengths, Recipe(), seed=3)
    assert len(steps) == 36  # two passes over 10,000 tokens at 563 a step
    dealt = {
        kind: sum(lengths[kind][ref.row] for step in steps for ref in step if ref.kind == kind)
        for kind in lengths
    }
    assert dealt["new"] == pytest.approx(20_000, rel=0.02)
    total = sum(dealt.values())
    assert dealt["rehearsal"] / total == pytest.approx(0.25, abs=0.01)
    assert dealt["anchor"] / total == pytest.approx(0.20, abs=0.01)
    assert total / len(steps) == pytest.approx(1024, rel=0.02)


def test_new_data_takes_the_place_of_what_is_missing():
    """The first window has nothing to rehearse."""
    steps = deal_steps({"new": [200] * 10, "rehearsal": [], "anchor": [200] * 5}, Recipe(), seed=0)
    kinds = {ref.kind for step in steps for ref in step}
    assert kinds == {"new", "anchor"}
    assert len(steps) == 5  # 4,000 tokens at 819 a step


def test_each_pass_visits_every_new_row_once_in_another_order():
    """Two passes are two permutations."""
    order = [ref.row for step in deal_steps({"new": [100] * 40}, Recipe(), 5) for ref in step]
    assert sorted(order[:40]) == sorted(order[40:80]) == list(range(40))
    assert order[:40] != order[40:80]


def test_steps_follow_from_the_seed_and_stop_at_the_limit():
    """A resumed update deals the same rows; max_steps bounds its time."""
    lengths = {"new": [250] * 400}
    assert deal_steps(lengths, Recipe(), 1) == deal_steps(lengths, Recipe(), 1)
    assert deal_steps(lengths, Recipe(), 1) != deal_steps(lengths, Recipe(), 2)
    assert len(deal_steps(lengths, Recipe(), 1)) == Recipe().max_steps


def test_a_small_window_is_not_swept_more_often_to_fill_a_step():
    """One short row makes one step, which sees it twice, as the recipe says, and not 140 times."""
    assert deal_steps({"new": [7]}, Recipe(), 0) == [[RowRef("new", 0)] * 2]


def test_no_new_row_is_an_error():
    """The caller rejects such a window before it comes here."""
    with pytest.raises(ValueError, match="no new row"):
        deal_steps({"new": []}, Recipe(), 0)


def test_a_choice_of_rows_keeps_their_order_and_the_limit():
    """Retention and rehearsal take whole rows."""
    rows = pack_rows(
        texts(*([i] * 6 for i in range(10, 30))), range(20), row_tokens=8, bos_id=BOS, separator_id=NL
    )
    taken = take_tokens(rows, 50, "s")
    assert taken == take_tokens(rows, 50, "s")
    assert sum(map(len, taken)) <= 50 < sum(map(len, taken)) + 8
    places = [rows.index(row) for row in taken]
    assert places == sorted(places)
    assert len(take_tokens(rows, 1, "s")) == 1


@pytest.mark.parametrize(("profile", "first"), [("fast", 22), ("full", 0), ("tiny", 26)])
def test_profiles_adapt_the_uppermost_blocks(profile, first):
    """A quarter rounded up, all, an eighth rounded up, of SmolLM2's 30."""
    assert adapted_blocks(30, profile) == range(first, 30)
    assert len(adapted_blocks(1, profile)) == 1
