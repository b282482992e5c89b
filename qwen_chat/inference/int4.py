"""A linear layer whose weights are whole numbers of 4 bits, in groups of 32 along the input.

In: a weight (out, in) and a bias. Out: a callable on (rows, in) whose rows do not depend on each other: torch's
packed kernel sums every row's products in one order, whatever the number of rows or threads.

The kernel computes in bfloat16 (in float32 it has no vector code): activations are rounded to 8 bits of precision,
products are summed in float32. Source of the layout: `_weight_int4pack_mm_for_cpu`, weight = (q - 8) * scale + zero.
"""

from __future__ import annotations

import functools

import torch

from qwen_chat.inference.probe import gives

GROUP = 32
_SLICE = 256  # rows packed at a time; the kernel's blocks are of 64
FITS = 3  # times that a group's scale and zero are fitted to its steps
_LEAST = 1e-12  # a step of a group whose numbers are all the same


def takes(rows: int, columns: int) -> bool:
    """Whether torch's kernel takes a weight (rows, columns), and this torch's is there and right."""
    return not rows % 16 and not columns % GROUP and _has_kernel()


@functools.cache
def _has_kernel() -> bool:
    """Tried on a small weight, with a loud number in one row."""
    drawn = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 3 * GROUP, generator=drawn) for rows in (80, 6))
    x[1, 7] = 1000.0
    exact = x.bfloat16().float() @ dequantised(*rounded(weight)).t()
    return gives(lambda: Int4Linear(weight)(x), exact, torch.finfo(torch.bfloat16).eps)


def int4_bytes(rows: int, columns: int) -> int:
    """Bytes of a weight (rows, columns): half of one a number, a scale and a zero of 2 each a group."""
    return rows * columns // 2 + rows * columns // GROUP * 4


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (out, in) as whole numbers of 0 to 15, int32, and each group's scale and zero (in / GROUP, out, 2),
    bfloat16.

    At first from a group's smallest number to its largest in 15 steps; then, a few times, the line through the group's
    numbers over their steps that leaves the least squares, and the nearest steps on it.
    """
    groups = weight.detach().float().view(len(weight), -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min_(_LEAST).bfloat16().float()
    zero = (low + 8 * scale).bfloat16().float()
    mean = groups.mean(-1, keepdim=True)
    steps = _nearest(groups, scale, zero)
    for _ in range(FITS):
        about = steps.mean(-1, keepdim=True)
        apart = steps - about
        spread = apart.square().sum(-1, keepdim=True)
        slope = torch.linalg.vecdot(apart, groups)[..., None] / spread
        scale = torch.where(spread > 0, slope, scale).clamp_min_(_LEAST).bfloat16().float()
        zero = (mean - about * scale).bfloat16().float()
        steps = _nearest(groups, scale, zero)
    scales = torch.stack((scale[..., 0].t(), zero[..., 0].t()), -1).bfloat16().contiguous()
    return steps.add_(8).to(torch.int32).view(weight.shape), scales


def _nearest(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The steps next to each number, -8 to 7."""
    return groups.sub(zero).div_(scale).round_().clamp_(-8, 7)


def dequantised(whole: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What `rounded` made of a weight, as the weight (out, in), float32."""
    scale, zero = (part.float().t().repeat_interleave(GROUP, 1) for part in scales.unbind(-1))
    return (whole - 8) * scale + zero


class Int4Linear:
    """4-bit weights with a scale and a zero for each group; activations in bfloat16."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        rows, columns = weight.shape
        self._bias = None if bias is None else bias.detach().float().clone()
        self._weight = torch.empty(rows, columns // 2, dtype=torch.uint8)
        self._scales = torch.empty(columns // GROUP, rows, 2, dtype=torch.bfloat16)
        for begin in range(0, rows, _SLICE):
            part = slice(begin, begin + _SLICE)
            whole, self._scales[:, part] = rounded(weight[part])
            self._weight[part] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.bfloat16().contiguous(), self._weight, GROUP, self._scales
        )
        return y.to(x.dtype) if self._bias is None else y.float().add_(self._bias).to(x.dtype)
