"""Packing and dealing, for any samples."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from adapters.batches import SCORED, Row, deal_steps, held_out_indices, pack_rows, split_window
from adapters.recipe import Recipe
from storage.samples import Samples

BOS, NL = 1, 2
token = st.integers(3, 500)
sample = st.tuples(
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from(["text", "reading", "exchange", "feedback"]),
    st.lists(st.tuples(token, st.booleans()), max_size=40),
)


def build(parts: list[tuple[str, str, list[tuple[int, bool]]]]) -> Samples:
    out = Samples()
    for source, kind, tokens in parts:
        out.sources.append(source)
        out.kinds.append(kind)
        out.subjects.append("")
        out.ts.append(0.0)
        out.lengths.append(len(tokens))
        out.ids += array("I", [one for one, _ in tokens])
        out.mask += bytes(int(bit) for _, bit in tokens)
    out.hashes = bytes(16 * len(parts))
    return out


def pack(parts: list[tuple[str, str, list[tuple[int, bool]]]], row_tokens: int) -> list[Row]:
    samples = build(parts)
    return pack_rows(samples, range(len(samples)), row_tokens=row_tokens, bos_id=BOS, separator_id=NL)


def scored(rows: list[Row], source: str) -> list[int]:
    mine = [row for row in rows if row.source == source]
    return [one for row in mine for one, w in zip(row.ids, row.weights, strict=True) if w & SCORED]


@given(st.lists(sample, max_size=30), st.integers(2, 32))
def test_packing_keeps_every_counted_token_in_order(parts, row_tokens):
    """Rows keep to their length; what counts in them is what counts in the samples, source by source."""
    plain = [(source, "text", tokens) for source, _, tokens in parts]
    rows = pack(plain, row_tokens)
    assert all(2 <= len(row) == len(row.weights) <= row_tokens for row in rows)
    assert all(row.ids[0] == BOS and row.weights[0] == 0 for row in rows)
    for source in "abc":
        assert scored(rows, source) == [
            one for s, _, tokens in plain if s == source for one, bit in tokens if bit
        ]


@given(st.lists(sample, max_size=30), st.integers(2, 32))
def test_an_exchange_shares_its_rows_with_nothing(parts, row_tokens):
    """A row holds tokens of one exchange, or of none."""
    # Each sample gets an id of its own, so that a row tells whose tokens it holds.
    marked = [(s, kind, [(3 + i, bit) for _, bit in tokens]) for i, (s, kind, tokens) in enumerate(parts)]
    alone = {3 + i for i, (_, kind, _) in enumerate(parts) if kind in ("exchange", "feedback")}
    for row in pack(marked, row_tokens):
        owners = set(row.ids) - {BOS, NL}
        assert owners.isdisjoint(alone) or len(owners) == 1


@given(st.lists(sample, max_size=40), st.sets(st.integers(0, 9)))
def test_a_split_covers_the_window_and_trains_on_nothing_held_out(parts, elsewhere):
    """Train, held out and left out are disjoint and complete, and no key is on both sides."""
    samples = build(parts)
    keys = [sum(one for one, _ in tokens) % 10 for _, _, tokens in parts]
    split = split_window(samples, keys, set(elsewhere))
    assert sorted(split.train + split.held_out + split.left_out) == list(range(len(parts)))
    assert split.held_out == held_out_indices(samples)
    forbidden = {keys[i] for i in split.held_out} | elsewhere
    assert forbidden.isdisjoint(keys[i] for i in split.train)


lengths = st.lists(st.integers(2, 256), min_size=1, max_size=30)


@given(lengths, st.one_of(st.just([]), lengths), st.one_of(st.just([]), lengths), st.integers(0, 5))
def test_dealing_covers_the_passes_and_wastes_no_step(new, rehearsal, anchor, seed):
    """New rows come `passes` times, to within one row; every step has a row and hardly too many tokens."""
    recipe = Recipe()
    kinds = {"new": new, "rehearsal": rehearsal, "anchor": anchor}
    steps = deal_steps(kinds, recipe, seed)
    assert 1 <= len(steps) <= recipe.max_steps
    assert all(steps)
    for step in steps:
        assert sum(kinds[ref.kind][ref.row] for ref in step) <= recipe.step_tokens + 3 * 256
    dealt = sum(new[ref.row] for step in steps for ref in step if ref.kind == "new")
    assert abs(dealt - recipe.passes * sum(new)) <= max(new)
    seen = [sum(ref == ("new", row) for step in steps for ref in step) for row in range(len(new))]
    assert max(seen) - min(seen) <= 1
