"""Functions of single numbers, over the rows of a step.

In: a function that torch computes with vectors, rows. Out: its values, the same for a row whatever rows are beside.

torch takes the last numbers of a range, those that fill no vector, through another routine, whose last bits differ.
A part of wider rows is a range a row; but from GRAIN numbers on torch cuts the whole for its threads, anywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

GRAIN = 32_768  # numbers a thread gets at least (ATen's GRAIN_SIZE)


def by_rows(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """function(x) of x (rows, width), a part of wider rows, in calls that torch cuts between rows."""
    if x.numel() < GRAIN or x.device.type != "cpu":
        return function(x)
    width, threads, begin, found = x.shape[1], torch.get_num_threads(), 0, []
    while begin < len(x):
        count = len(x) - begin
        while count % min(threads, -(-count * width // GRAIN)):
            count -= 1
        found.append(function(x[begin : begin + count]))
        begin += count
    return found[0] if len(found) == 1 else torch.cat(found)
