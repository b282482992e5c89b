"""Rows of a step: exactly as many as asked, within the budget, nothing lost, shared prefixes stored once."""

import random
import time
from array import array
from itertools import pairwise
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_chat.training import packing
from qwen_chat.training.packing import (
    MIN_SHARED,
    PackedRow,
    Pass,
    branches,
    common_prefix,
    plan_rows,
    segments,
)


def key(tokens):
    return array("i", tokens).tobytes()


def rows_of(keys, plans):
    """Each row as the list of its tokens, put together from what every member stores."""
    rows = []
    for members, shared in plans:
        row = []
        for member, common in zip(members, shared, strict=True):
            row += array("i", keys[member]).tolist()[common:]
        rows.append(row)
    return rows


def test_the_example_of_the_module_s_head():
    assert segments([5, 6, 4], [0, 3, 3]) == [(0, 3, 9), (3, 5, 5), (5, 8, 8), (8, 9, 9)]


def test_a_branch_may_leave_its_trunk_anywhere():
    # trunk of 10, a branch at 8, one at 4; a duplicate of the last; an unrelated sequence
    lengths, shared = [10, 11, 9, 9, 3], [0, 8, 4, 9, 0]
    assert segments(lengths, shared) == [
        (0, 4, 18),
        (4, 8, 13),
        (8, 10, 10),
        (10, 13, 13),
        (13, 18, 18),
        (18, 21, 21),
    ]


def test_filler_row_is_one_token():
    row = PackedRow((), (), ())
    assert (row.tokens, row.segments(), row.conversations) == (1, [(0, 1, 1)], ())


def test_short_common_prefixes_do_not_branch():
    head = list(range(MIN_SHARED - 1))
    assert branches([key([*head, 50]), key([*head, 51])]) == [0, 0]
    head = list(range(MIN_SHARED))
    assert branches([key([*head, 50]), key([*head, 51]), key([*head, 52])]) == [0, MIN_SHARED, MIN_SHARED]


trees = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=60), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(trees, st.integers(1, 4), st.integers(1, 3), st.sampled_from(["shared_prefix", "packed"]))
def test_every_token_sees_exactly_its_own_prefix(sequences, accumulation, ranks, layout):
    """Rebuild every sequence from what the row's segments let its last token see."""
    sequences = [[9] * 20 + sequence for sequence in sequences]  # a system prompt in common
    keys = [key(sequence) for sequence in sequences]
    batch_size = -(-len(keys) // (accumulation * ranks))
    budget = batch_size * 80
    plans = plan_rows(
        keys,
        range(len(keys)),
        layout=layout,
        batch_size=batch_size,
        accumulation=accumulation,
        ranks=ranks,
        budget=budget,
    )
    assert len(plans) == accumulation * ranks
    assert sorted(member for members, _ in plans for member in members) == list(range(len(keys)))
    for row, (members, shared) in zip(rows_of(keys, plans), plans, strict=True):
        assert len(row) <= budget
        lengths = [len(sequences[member]) for member in members]
        layout_of_row = segments(lengths, shared)
        if not members:
            continue
        end_of = [end for start, stop, end in layout_of_row for _ in range(start, stop)]
        assert len(end_of) == len(row)
        path = []
        at = 0
        for member, length, common in zip(members, lengths, shared, strict=True):
            path = path[:common] + list(range(at, at + length - common))
            at += length - common
            assert [row[i] for i in path] == sequences[member]
            for depth, query in enumerate(path):
                seen = [k for k in range(query + 1) if query < end_of[k]]
                assert seen == path[: depth + 1]


def test_budget_and_balance_without_anything_shared():
    rng = random.Random(0)
    keys = [key([rng.randrange(10**6) for _ in range(rng.randint(10, 100))]) for _ in range(64)]
    plans = plan_rows(keys, range(64), layout="packed", batch_size=4, accumulation=4, ranks=4, budget=400)
    tokens = [len(row) for row in rows_of(keys, plans)]
    assert sum(tokens) == sum(len(k) // 4 for k in keys)
    assert max(tokens) <= 400 and max(tokens) - min(tokens) <= 30
    ranks = [sum(tokens[rank::4]) for rank in range(4)]
    assert max(ranks) - min(ranks) <= 30


def test_one_system_prompt_is_stored_in_few_rows_and_shared_between_ranks():
    rng = random.Random(0)
    system = [rng.randrange(10**6) for _ in range(900)]
    keys = [key(system + [rng.randrange(10**6) for _ in range(150)]) for _ in range(64)]
    one = plan_rows(keys, range(64), batch_size=4, accumulation=16, budget=4 * 1280)
    tokens = [len(row) for row in rows_of(keys, one)]
    assert len(tokens) == 16 and max(tokens) <= 5120
    assert sum(tokens) == 64 * 150 + 3 * 900
    two = plan_rows(keys, range(64), batch_size=4, accumulation=8, ranks=2, budget=4 * 1280)
    ranks = [sum(len(row) for row in rows_of(keys, two)[rank::2]) for rank in range(2)]
    assert ranks[0] == ranks[1] == 32 * 150 + 2 * 900


@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
def test_worst_case_still_fits_the_budget(layout):
    """Every conversation as long as may be: only batch_size a row fit."""
    keys = [key([i] * 50) for i in range(12)]
    plans = plan_rows(keys, range(12), layout=layout, batch_size=2, accumulation=3, ranks=2, budget=100)
    assert [len(members) for members, _ in plans] == [2] * 6


def test_fewer_conversations_than_rows_and_none():
    plans = plan_rows([key([1, 2, 3])], [0], batch_size=1, accumulation=2, ranks=4, budget=10)
    assert sorted(len(members) for members, _ in plans) == [0] * 7 + [1]
    assert plan_rows([], [], batch_size=1, accumulation=2, budget=10) == [((), ()), ((), ())]


def test_plan_is_linear():
    """Ten times the conversations in a window: at most twice the processor's time for each."""
    rng = random.Random(0)

    def seconds(count):
        keys = [key([1] * 30 + [rng.randrange(1000) for _ in range(100)]) for _ in range(count)]
        begin = time.process_time()
        plan_rows(keys, range(count), batch_size=8, accumulation=count // 8, budget=8 * 200)
        return (time.process_time() - begin) / count

    assert min(seconds(1600) for _ in range(3)) < 2 * min(seconds(160) for _ in range(5)) + 5e-5


def one_count_more_at_a_time(piece, keys, row_share, rank_share, ranks, budget):
    """How a group is cut, as it was first written: every count of runs laid out whole. Right, and quadratic."""
    members = piece.members
    if len(members) == 1:
        return [piece]
    prefix = sum(common_prefix(keys[a], keys[b]) for a, b in pairwise(members)) // (len(members) - 1)
    target = min(budget, rank_share, max(row_share, ceil(prefix * (1 + 1 / packing.REPEAT_SHARE))))
    count = ceil((piece.tokens - prefix) / max(1, target - prefix))
    if count <= 1:
        return [piece]
    shared = branches([keys[member] for member in members])
    new = [len(keys[m]) // 4 - common for m, common in zip(members, shared, strict=True)]
    new[0] -= prefix
    while True:
        count = min(len(members), ceil(count / ranks) * ranks)
        runs, stored = [[]], 0
        for member, tokens in zip(members, new, strict=True):
            if runs[-1] and len(runs) < count and stored + tokens / 2 > sum(new) * len(runs) / count:
                runs.append([])
            runs[-1].append(member)
            stored += tokens
        pieces = [packing._bundle(run, keys, "shared_prefix") for run in runs]
        if count == len(members) or all(run.tokens <= budget for run in pieces):
            return pieces
        count += 1


@settings(max_examples=80, deadline=None)
@given(trees, st.sampled_from([0, 20, 60]), st.integers(1, 4), st.integers(1, 3))
def test_a_group_is_cut_as_if_every_count_were_laid_out(sequences, common, batch_size, ranks):
    keys = [key([9] * common + sequence) for sequence in sequences]
    rows = -(-len(keys) // batch_size)
    plan = {"batch_size": batch_size, "accumulation": -(-rows // ranks), "ranks": ranks}
    plan["budget"] = batch_size * max(len(k) // 4 for k in keys)
    found = plan_rows(keys, range(len(keys)), **plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_cut_bundle", one_count_more_at_a_time)
        assert found == plan_rows(keys, range(len(keys)), **plan)


def under_one_prompt(count):
    """Keys of `count` sequences, 900 tokens of each in common, up to 1,000 of its own."""
    rng = np.random.default_rng(0)
    system = np.full(900, 7, np.int32)
    own = [rng.integers(10**6, size=rng.integers(50, 1000), dtype=np.int32) for _ in range(count)]
    return [np.concatenate([system, tokens]).tobytes() for tokens in own]


@pytest.mark.parametrize("count", [512, 4096])
def test_batch_1_under_a_long_prompt_is_not_quadratic(count, monkeypatch):
    """A row holds few conversations, so many counts are tried; looked at are a few sequences of each, not all."""
    looked, keys = [], under_one_prompt(count)
    slow = packing._branches
    monkeypatch.setattr(
        packing, "_branches", lambda lengths, commons: looked.append(len(lengths)) or slow(lengths, commons)
    )
    plans = plan_rows(keys, range(count), batch_size=1, accumulation=count, budget=2048)
    assert max(sum(len(keys[m]) // 4 for m in row) - sum(shared) for row, shared in plans) <= 2048
    assert sum(looked) < 80 * count  # with each count laid out whole it is over 0.2 x count x count


@pytest.mark.slow
def test_a_step_of_8192_rows_is_planned_in_seconds():
    """1.5 s on one core of a quiet machine; laid out count by count it would be minutes."""
    keys = under_one_prompt(8192)
    begin = time.process_time()
    assert len(plan_rows(keys, range(8192), batch_size=1, accumulation=8192, budget=2048)) == 8192
    assert time.process_time() - begin < 10


def sees(layout, tokens):
    """For each token of a row those that it sees."""
    ends = [0] * tokens
    for start, stop, end in layout:
        ends[start:stop] = [end] * (stop - start)
    return [{k for k in range(q + 1) if q < ends[k]} for q in range(tokens)]


@settings(max_examples=200, deadline=None)
@given(trees, st.integers(1, 200), st.booleans())
def test_passes_cut_a_row_where_nothing_is_lost(sequences, limit, together):
    """Every token is in one pass; what it sees lies in its own pass and in the trunk, which all of a branch sees."""
    keys = sorted(key([9] * 20 * together + sequence) for sequence in sequences)
    shared = branches(keys)
    layout = segments([len(k) // 4 for k in keys], shared)
    tokens = layout[-1][1]
    seen = sees(layout, tokens)
    parts = packing.passes(layout, limit)
    at = 0
    for part in parts:
        assert part.start == at
        trunk = range(part.start, part.stop)
        assert all(seen[q] <= set(trunk) for q in trunk)
        at = part.stop
        for start, stop in part.branches:
            assert start == at
            for q in range(start, stop):
                assert set(trunk) <= seen[q] <= {*trunk, *range(start, stop)}
            at = stop
        assert part.held <= max(limit, packing.HELD_SHARE * (at - part.start)) or not part.branches
    assert at == tokens


def test_a_row_is_cut_into_a_trunk_and_runs_of_branches():
    group = [(0, 900, 4200), *((at, at + 330, at + 330) for at in range(900, 4200, 330))]
    loners = [(4200, 4700, 4700), (4700, 5300, 5300), (5300, 5400, 5400)]
    assert packing.passes(group + loners) == [
        Pass(0, 900, ((900, 1890), (1890, 2880), (2880, 3870), (3870, 4200))),
        Pass(4200, 4700),
        Pass(4700, 5400),
    ]
    # A branch that is most of the group: its trunk stays with it.
    assert packing.passes([(0, 900, 4200), (900, 1000, 1000), (1000, 4200, 4200)]) == [Pass(0, 4200)]
    assert packing.passes([(0, 1, 1)]) == [Pass(0, 1)]
