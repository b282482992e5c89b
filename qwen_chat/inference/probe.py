"""A private operator of torch, tried on a small example before it is relied on.

In: what it computes there, and what public operators say it should be. Out: whether this torch has it and it does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def gives(compute: Callable[[], torch.Tensor], expected: torch.Tensor, error: float = 0.0) -> bool:
    """Whether `compute` gives the expected numbers: bit for bit, or with a share `error` of their norm between them.

    False where an operator is gone, takes other arguments or refuses what it is given.
    """
    try:
        found = compute()
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    exact = expected.double()
    return bool((found.double() - exact).norm() <= error * exact.norm())
