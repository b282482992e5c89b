"""Means, shares and differences with their 95 % intervals.

In: plain numbers, one a case. Out: an `Estimate`, or of two sides a `Paired`; None where nothing was counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval: of a mean by bootstrap, of a share Wilson's. n: what it was counted over."""

    value: float
    low: float
    high: float
    n: int


def estimate(values: Sequence[float], weights: Sequence[float] | None = None) -> Estimate | None:
    """The mean of values, or sum(values) / sum(weights); None where there is nothing to average.

    The interval is a bootstrap's (percentile method, 1,000 resamples, seeded). Resampling is over the entries, so
    a ratio's interval allows for entries of different weight.
    """
    import numpy as np

    top = np.asarray(values, dtype=np.float64)
    bottom = np.ones_like(top) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(top) or not bottom.sum():
        return None
    draws = np.random.default_rng(0)
    means = []
    for _ in range(1000):
        chosen = draws.integers(0, len(top), len(top))
        if bottom[chosen].sum():
            means.append(top[chosen].sum() / bottom[chosen].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high), len(top))


def share(counts: Sequence[int], of: Sequence[int] | None = None) -> Estimate | None:
    """sum(counts) / sum(of), each turn's count of its `of` (1 by default), with Wilson's interval; None of nothing.

    Where nothing or everything hits, resampling would find no doubt at all; 0 of 60 is 0 to 6 %. What one turn
    holds belongs together, so the interval is that of as many trials as turns have any, not calls: cautious.
    E. B. Wilson, Probable inference, JASA 22 (1927), without continuity correction.
    """
    of = [1] * len(counts) if of is None else of
    turns = sum(whole > 0 for whole in of)
    if not turns:
        return None
    p, z2 = sum(counts) / sum(of), 1.959964**2
    middle = p + z2 / (2 * turns)
    reach = math.sqrt(z2 * (p * (1 - p) + z2 / (4 * turns)) / turns)
    low, high = ((middle + side * reach) / (1 + z2 / turns) for side in (-1, 1))
    return Estimate(p, 0.0 if p == 0 else low, 1.0 if p == 1 else high, len(counts))


@dataclass(frozen=True, slots=True)
class Paired:
    """How much b is above a on the same cases, and how likely so large a difference is by chance alone."""

    difference: float
    low: float
    high: float
    p: float
    n: int


def paired(a: Sequence[float], b: Sequence[float]) -> Paired | None:
    """b - a, case by case: bootstrap interval, and a two-sided p.

    Right-or-wrong scores: McNemar's exact test (binomial over the cases that differ). Others: sign flips,
    10,000 seeded.
    """
    import numpy as np

    differences = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    middle = estimate(differences.tolist())
    if middle is None:
        return None
    changed = differences[differences != 0]
    if set(np.unique(changed)) <= {-1.0, 1.0}:
        n, successes = len(changed), int((changed > 0).sum())
        tail = sum(math.comb(n, k) for k in range(min(successes, n - successes) + 1))
        p = float(min(1.0, 2 * tail / 2**n))
    else:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(10_000, len(changed)))
        extreme = np.abs(signs @ changed) >= abs(changed.sum()) - 1e-12
        p = float((extreme.sum() + 1) / 10_001)
    return Paired(middle.value, middle.low, middle.high, p, middle.n)
