"""Which conversations of an optimizer step share a row, and what they share: integers only, no torch.

In: the token sequences of one step as `bytes` (four bytes a token, any fixed byte order: only equality of
prefixes and a stable order matter). Out: for every row the sequences in it, and how many of each one's first
tokens the row already holds. A row is the depth-first walk of a tree of prefixes: a sequence stores only what
follows the prefix that it shares with the sequence before it, so nothing is computed twice and nothing is
padding.

    tokens of three sequences       one row                         segments (start, stop, end)
    S S S A A                       S S S A A B B B C               (0, 3, 9) (3, 5, 5) (5, 8, 8) (8, 9, 9)
    S S S B B B                     0 1 2 3 4 3 4 5 3  <- positions
    S S S C

A segment is a run of tokens that attend causally to one another; everything in [stop, end) descends from it
and attends to it too. Key k is therefore visible to query q exactly when `k <= q < end[segment of k]`.
"""

import heapq
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from math import ceil
from typing import cast

TOKEN_BYTES = 4
LAYOUTS = ("shared_prefix", "packed", "padded")

# One token's matmuls cost as much as attention to this many keys: per layer 2 x 14.9e6 FLOP against 4 x 896 a
# pair in Qwen2.5-0.5B. Larger models pay relatively less for attention; the balance of rows barely feels the
# difference.
PAIRS_PER_TOKEN = 8192
# A branch must save at least so many tokens: below that, the extra attention calls cost more than sharing saves.
MIN_SHARED = 16
# A group under one prefix is cut into several rows only if repeating the prefix adds at most this share of
# work ...
REPEAT_SHARE = 0.1
# ... and sequences belong to one group if at least this share of the shorter one is common to both.
GROUP_SHARE = 0.25
# Tokens that a pass over a long row computes at once: enough for matrix products at full speed.
PASS_TOKENS = 1024
# Branches are computed apart from their trunk only where at most this share of them and it is then held at once.
HELD_SHARE = 0.75


@dataclass(frozen=True, slots=True)
class PackedRow:
    """A micro-batch: the sequences it stores, in order, and what each shares with the one before."""

    sequences: tuple[tuple[int, int], ...]  # (conversation, its sequence); empty: a filler row of one token
    lengths: tuple[int, ...]  # tokens of each sequence, shared ones included
    shared: tuple[int, ...]  # first tokens of each that the row already holds
    pad_to: int = 0  # tokens that each sequence is padded to (layout "padded" only)
    step_sequences: int = 0  # of all rows of the optimizer step, over all ranks

    @property
    def tokens(self) -> int:
        """How many tokens the model computes for this row."""
        if self.pad_to:
            return self.pad_to * len(self.lengths)
        return max(1, sum(self.lengths) - sum(self.shared))

    @property
    def conversations(self) -> tuple[int, ...]:
        """The conversations that have a sequence in this row, each once."""
        return tuple(dict.fromkeys(conversation for conversation, _ in self.sequences))

    def segments(self) -> list[tuple[int, int, int]]:
        """The row's attention layout: (start, stop, end) for each run of tokens, see the module's head."""
        if self.pad_to:
            return [(at, at + self.pad_to, at + self.pad_to) for at in range(0, self.tokens, self.pad_to)]
        return segments(self.lengths, self.shared)

    @property
    def held(self) -> int:
        """The most tokens whose activations are there at once where the row is computed in passes."""
        return max(part.held for part in passes(self.segments()))


@dataclass(frozen=True, slots=True)
class Pass:
    """Tokens [start, stop) of a row, computed forward and backward by themselves.

    `branches`: runs of tokens that descend from all of these and from nothing else outside of themselves; each is a
    pass of its own, between this one's forward and its backward.
    """

    start: int
    stop: int
    branches: tuple[tuple[int, int], ...] = ()

    @property
    def held(self) -> int:
        """Tokens whose activations are there at once."""
        return self.stop - self.start + max((stop - start for start, stop in self.branches), default=0)


def passes(layout: Sequence[tuple[int, int, int]], limit: int = PASS_TOKENS) -> list[Pass]:
    """Cut a row into passes of about `limit` tokens. layout: its segments, in order.

    What has nothing in common is cut apart. A longer group is cut into its trunk, the segment that all of it begins
    with, and runs of branches. Nothing else is cut: a pass is longer where a sequence or a branch is.
    """
    ends = {start: end for start, _, end in layout}
    found: list[Pass] = []
    at = 0
    for start, stop, end in layout:
        if start < at:
            continue  # within the group before
        at = end
        starts = [stop]
        while starts[-1] < end:
            starts.append(ends[starts[-1]])
        runs = _joined(list(pairwise(starts)), limit)
        trunk = Pass(start, stop, tuple(runs))
        whole = end - start
        found.append(trunk if whole > limit and trunk.held <= HELD_SHARE * whole else Pass(start, end))
    cut: list[Pass] = []
    for apart, group in groupby(found, lambda part: bool(part.branches)):
        members = list(group)
        joined = _joined([(part.start, part.stop) for part in members], limit)
        cut += members if apart else [Pass(start, stop) for start, stop in joined]
    return cut


def _joined(parts: Sequence[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """Neighbours [start, stop) joined as long as they are at most `limit` together."""
    runs: list[tuple[int, int]] = []
    for start, stop in parts:
        if runs and stop - runs[-1][0] <= limit:
            runs[-1] = runs[-1][0], stop
        else:
            runs.append((start, stop))
    return runs


def segments(lengths: Sequence[int], shared: Sequence[int]) -> list[tuple[int, int, int]]:
    """Cut a row into runs of tokens with one parent each. `shared[i]` tokens come from sequence i - 1."""
    closed: list[tuple[int, int, int]] = []
    path: list[list[int]] = []  # open runs of the last sequence: [depth of its first token, start, stop]
    at = 0
    for length, common in zip(lengths, shared, strict=True):
        while path and path[-1][0] >= common:
            _, start, stop = path.pop()
            closed.append((start, stop, at))
        if path and (kept := common - path[-1][0]) < path[-1][2] - path[-1][1]:
            _, start, stop = path[-1]
            closed.append((start + kept, stop, at))  # the run's end goes its own way from here
            path[-1][2] = start + kept
        if length > common:
            path.append([common, at, at + length - common])
        at += length - common
    closed += [(start, stop, at) for _, start, stop in path]
    return sorted(closed) or [(0, 1, 1)]


def common_prefix(left: bytes, right: bytes) -> int:
    """How many first tokens two sequences share: a binary search over slices, compared at memory speed."""
    low, high = 0, min(len(left), len(right)) // TOKEN_BYTES
    if left[: high * TOKEN_BYTES] == right[: high * TOKEN_BYTES]:
        return high
    while low + 1 < high:
        middle = (low + high) // 2
        if left[low * TOKEN_BYTES : middle * TOKEN_BYTES] == right[low * TOKEN_BYTES : middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle
    return low


def branches(keys: Sequence[bytes]) -> list[int]:
    """For sequences in sorted order: how many tokens each takes over from the one before it.

    The whole common prefix, unless a branch of its own there would save fewer than MIN_SHARED tokens over a
    branch point that exists already.
    """
    commons = [common_prefix(left, right) for left, right in pairwise(keys)]
    return _branches([len(key) // TOKEN_BYTES for key in keys], [0, *commons])


def _branches(lengths: Sequence[int], commons: Sequence[int]) -> list[int]:
    """The same from each sequence's length and what it has in common with the one before it."""
    shared: list[int] = []
    points = [0]  # depths at which the path of the last sequence may be left at no cost
    for index, length in enumerate(lengths):
        common = commons[index] if index else 0
        while points[-1] > common:
            points.pop()
        if common - points[-1] >= MIN_SHARED:
            points.append(common)
        shared.append(points[-1])
        if length > points[-1]:
            points.append(length)
    return shared


def cost(length: int, shared: int) -> int:
    """Work of a sequence that stores its tokens after the first `shared`, in attention pairs."""
    own = length - shared
    return own * PAIRS_PER_TOKEN + own * shared + own * (own + 1) // 2


@dataclass(frozen=True, slots=True)
class _Bundle:
    """Sequences that stay together in a row."""

    members: tuple[int, ...]
    tokens: int
    work: int


def _bundle(members: Sequence[int], keys: Sequence[bytes], layout: str) -> _Bundle:
    lengths = [len(keys[member]) // TOKEN_BYTES for member in members]
    shared = (
        branches([keys[member] for member in members]) if layout == "shared_prefix" else [0] * len(members)
    )
    work = sum(cost(length, common) for length, common in zip(lengths, shared, strict=True))
    return _Bundle(tuple(members), sum(lengths) - sum(shared), work)


def _bundles(keys: Sequence[bytes], rows: int, ranks: int, budget: int) -> list[_Bundle]:
    """Groups of sequences with much in common, cut where too long for a row or for an equal share."""
    order = sorted(range(len(keys)), key=lambda index: (keys[index], index))
    groups: list[list[int]] = []
    for index in order:
        if groups:
            last = groups[-1][-1]
            shorter = min(len(keys[last]), len(keys[index])) // TOKEN_BYTES
            if common_prefix(keys[last], keys[index]) >= max(MIN_SHARED, GROUP_SHARE * shorter):
                groups[-1].append(index)
                continue
        groups.append([index])
    whole = [_bundle(group, keys, "shared_prefix") for group in groups]
    total = sum(bundle.tokens for bundle in whole)
    bundles: list[_Bundle] = []
    for bundle in whole:
        bundles += _cut_bundle(
            bundle, keys, max(1, ceil(total / rows)), max(1, ceil(total / ranks)), ranks, budget
        )
    return bundles


def _cut_bundle(
    bundle: _Bundle, keys: Sequence[bytes], row_share: int, rank_share: int, ranks: int, budget: int
) -> list[_Bundle]:
    """Cut one group into runs of its sorted members, about equal in tokens."""
    members = bundle.members
    if len(members) == 1:
        return [bundle]
    lengths = [len(keys[member]) // TOKEN_BYTES for member in members]
    commons = [0, *(common_prefix(keys[a], keys[b]) for a, b in pairwise(members))]
    prefix = sum(commons) // (len(members) - 1)
    target = min(budget, rank_share, max(row_share, ceil(prefix * (1 + 1 / REPEAT_SHARE))))
    count = ceil((bundle.tokens - prefix) / max(1, target - prefix))
    if count <= 1:
        return [bundle]
    new = [length - kept for length, kept in zip(lengths, _branches(lengths, commons), strict=True)]
    new[0] -= prefix
    stored = [0, *accumulate(new)]
    middles = [at + tokens / 2 for at, tokens in zip(stored, new, strict=False)]  # of each member's tokens

    def too_long(run: slice) -> bool:
        return sum(lengths[run]) - sum(_branches(lengths[run], commons[run])) > budget

    while True:
        count = min(len(members), ceil(count / ranks) * ranks)  # every rank gets as many bundles
        # any() ends at the first that is too long: laying all of them out for each count was quadratic.
        if count == len(members) or not any(map(too_long, _even_runs(middles, stored[-1], count))):
            return [
                _bundle(members[run], keys, "shared_prefix") for run in _even_runs(middles, stored[-1], count)
            ]
        count += 1


def _even_runs(middles: Sequence[float], whole: int, count: int) -> Iterator[slice]:
    """At most `count` runs of members that store about as many tokens each, of `whole` in all."""
    start = 0
    for number in range(1, count):
        stop = bisect_right(middles, whole * number / count, lo=start + 1)
        if stop >= len(middles):
            break
        yield slice(start, stop)
        start = stop
    yield slice(start, len(middles))


def _fill(
    bundles: Sequence[_Bundle], rows: int, room: Callable[[_Bundle], int], budget: int
) -> list[list[_Bundle]] | None:
    """Longest bundle first to the row with the least work that has room; None where one fits nowhere.

    room: how much of a row's budget a bundle takes.
    """
    filled: list[list[_Bundle]] = [[] for _ in range(rows)]
    taken = [0] * rows
    queue = [(0, row) for row in range(rows)]  # (work, row), the least first
    for bundle in sorted(bundles, key=lambda bundle: (-bundle.work, bundle.members)):
        full = []
        while queue and taken[queue[0][1]] + room(bundle) > budget:
            full.append(heapq.heappop(queue))
        if not queue:
            return None
        work, row = queue[0]
        heapq.heapreplace(queue, (work + bundle.work, row))
        filled[row].append(bundle)
        taken[row] += room(bundle)
        for entry in full:
            heapq.heappush(queue, entry)
    return filled


def _by_conversation(
    keys: Sequence[bytes], owners: Sequence[int], layout: str, rows: int, batch_size: int
) -> list[list[_Bundle]]:
    """At most `batch_size` conversations a row, balanced: always possible."""
    whole: dict[int, list[int]] = {}
    for index in sorted(range(len(keys)), key=lambda index: (keys[index], index)):
        whole.setdefault(owners[index], []).append(index)
    bundles = [_bundle(members, keys, layout) for members in whole.values()]
    return cast(list[list[_Bundle]], _fill(bundles, rows, lambda bundle: 1, batch_size))


def plan_rows(
    keys: Sequence[bytes],
    owners: Sequence[int],
    *,
    layout: str = "shared_prefix",
    batch_size: int,
    accumulation: int,
    ranks: int = 1,
    budget: int,
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Lay one optimizer step out in exactly `accumulation * ranks` rows, micro-step first, rank second.

    keys: every token sequence of the step as bytes; owners: the conversation each belongs to (at most
    batch_size * accumulation * ranks of them); budget: the most tokens a row should hold.
    Returns for each row (members in storage order, tokens each shares with the one before). A row is longer
    than the budget only where the sequences of single conversations leave no other way.
    """
    rows = accumulation * ranks
    if layout == "padded":  # the step's conversations in their order, `batch_size` a row
        numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
        filled: list[list[int]] = [[] for _ in range(rows)]
        for index in range(len(keys)):
            filled[numbers[owners[index]] // batch_size].append(index)
        return [(tuple(members), (0,) * len(members)) for members in filled]
    if layout == "packed":
        bundles = [_bundle([index], keys, layout) for index in range(len(keys))]
    else:
        bundles = _bundles(keys, rows, ranks, budget)
    packed = _fill(bundles, rows, lambda bundle: bundle.tokens, budget)
    if packed is None:
        packed = _by_conversation(keys, owners, layout, rows, batch_size)
    packed.sort(key=lambda row: -sum(bundle.work for bundle in row))
    dealt: list[list[_Bundle]] = []
    # Rows of like cost meet in a micro-step; ranks take turns to have the longer one.
    for step in range(accumulation):
        dealt += packed[step * ranks : (step + 1) * ranks][:: 1 if step % 2 == 0 else -1]
    plans = []
    for row in dealt:
        members = sorted(member for bundle in row for member in bundle.members)
        shared: Sequence[int] = [0] * len(members)
        if layout == "shared_prefix":
            members.sort(key=lambda index: (keys[index], index))
            shared = branches([keys[member] for member in members])
        plans.append((tuple(members), tuple(shared)))
    return plans
