"""Rows of a step: exactly as many as asked, within the budget, nothing lost, shared prefixes stored once."""

import random
import time
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_chat.packing import MIN_SHARED, Row, branches, plan_rows, segments


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
    row = Row((), (), ())
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
    """Ten times the conversations in a window: at most twice the time for each."""
    rng = random.Random(0)

    def seconds(count):
        keys = [key([1] * 30 + [rng.randrange(1000) for _ in range(100)]) for _ in range(count)]
        begin = time.perf_counter()
        plan_rows(keys, range(count), batch_size=8, accumulation=count // 8, budget=8 * 200)
        return (time.perf_counter() - begin) / count

    assert min(seconds(1600) for _ in range(3)) < 2 * min(seconds(160) for _ in range(5)) + 5e-5
