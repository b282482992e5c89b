"""A linear layer in whole numbers of 8 bits: weights with a scale for each output, activations with one for each row.

In: a weight (out, in) and a bias. Out: a callable on (rows, in). A row gives the same bits alone and among
neighbours, in every kernel: whole numbers are summed, so the order does not matter.
"""

from __future__ import annotations

import functools
import warnings

import torch

from qwen_chat import hardware
from qwen_chat.inference.probe import gives

_EXACT = 1040  # so many products of 127 x 127 stay below 2**24: float32 sums them without rounding
_ROUNDED = 4096  # rows rounded at a time
_PACKED = 2**27  # numbers that are packed at a time
FUSED, INT_MM, IN_FLOAT = "fbgemm's kernel", "torch._int_mm", "products in float32, slowly"


@functools.cache
def fused_levels(inputs: int) -> int:
    """How many steps a side an activation of so many numbers may have in fbgemm's kernel; 0 where this torch has no
    such kernel, or one that gives other sums.

    127 where the processor sums bytes without overflow (VNNI), else 63: two products of 7 and 8 bits fit the 16
    bits that AVX2 sums them in.
    """
    weight, scale, x = _sample(inputs)

    def fits(levels: int) -> bool:
        whole, _ = _rounded_steps(x, levels)

        def products() -> torch.Tensor:
            packed = _packed(weight, scale)
            return torch.cat([_fused(part, levels, packed) for part in (whole[:1], whole[1:4], whole[4:])])

        return gives(products, exact_sums(whole, weight) * scale)

    return next(filter(fits, (127, 63)), 0)


@functools.cache
def has_int_mm(inputs: int) -> bool:
    """Whether `torch._int_mm` is fast on this processor, and sums so many products exactly."""
    if not hardware.cpu_sums_bytes():
        return False
    weight, _, x = _sample(inputs)
    whole, _ = _rounded_steps(x, 127)
    return gives(lambda: torch._int_mm(whole.to(torch.int8), weight.t()), exact_sums(whole, weight))


@functools.cache
def holds_both(inputs: int) -> bool:
    """Whether few rows and many have a kernel each, and the weight lies in memory twice: on AMX's tiles."""
    return fused_levels(inputs) > 0 and hardware.cpu_has_tiles() and has_int_mm(inputs)


def exact_sums(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (rows, in), whole numbers of at most 127 each side, by an int8 weight (out, in): sums (rows, out), int32.

    In public operators only: pieces of the inputs, each so short that float32 holds its sums exactly.
    """
    total = torch.zeros(len(x), len(weight), dtype=torch.int32, device=x.device)
    for begin in range(0, weight.shape[1], _EXACT):
        piece = slice(begin, begin + _EXACT)
        total += torch.matmul(x[:, piece], weight[:, piece].t().float()).int()
    return total


def rounded_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (out, in) in int8, and the scale of each of its rows, (out,) float32."""
    weight = weight.float()
    scale = (weight.abs().amax(1) / 127).clamp_min(1e-12)
    return weight.div(scale[:, None]).round_().to(torch.int8).contiguous(), scale


def int8_bytes(rows: int, columns: int) -> int:
    """Bytes of a weight (rows, columns) with its scales."""
    return rows * columns * (2 if holds_both(columns) else 1) + 16 * rows


class Int8Linear:
    """int8 weights, one scale an output; activations rounded to whole numbers, one scale a row (its largest magnitude).

    Three ways with the same bits: fbgemm's kernel; `_int_mm` for more than 16 rows on AMX tiles, and for all where
    fbgemm's kernel is not right; `exact_sums` where `_int_mm` is not either. `way` names it for people. All are given
    whole numbers: left to round by itself, fbgemm rounds otherwise since torch 2.14.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        weight = weight.detach()
        inputs = weight.shape[1]
        self._scale = torch.empty(len(weight))
        whole = torch.empty(weight.shape, dtype=torch.int8)
        for begin in range(0, len(weight), _ROUNDED):
            part = slice(begin, begin + _ROUNDED)
            whole[part], self._scale[part] = rounded_rows(weight[part])
        self._bias = None if bias is None else bias.detach().float().clone()
        fused, self._has_int_mm = fused_levels(inputs), has_int_mm(inputs)
        self.way = FUSED if fused else INT_MM if self._has_int_mm else IN_FLOAT
        self._levels = fused or 127
        self._whole = whole if not fused or holds_both(inputs) else None
        each = max(1, _PACKED // inputs)  # a head's second copy, while it is packed, need not be as large
        self._few = [
            _packed(whole[begin : begin + each], self._scale[begin : begin + each])
            for begin in range(0, len(whole) if fused else 0, each)
        ]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        kind, x = x.dtype, x.float()
        whole, scale = _rounded_steps(x, self._levels)
        if self._whole is None or (self._few and len(x) <= 16):
            parts = [_fused(whole, self._levels, few) for few in self._few]
            y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        elif self._has_int_mm:
            y = torch._int_mm(whole.to(torch.int8), self._whole.t()) * self._scale
        else:
            y = exact_sums(whole, self._whole) * self._scale
        y.mul_(scale)
        return (y if self._bias is None else y.add_(self._bias)).to(kind)


def _rounded_steps(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (rows, in) in whole steps, and the step of each row, (rows, 1): its largest magnitude is `levels` of them.

    Rounded with the zero point of bytes added, as the native step does: what lies next to a half falls the same way.
    """
    tiny, zero = _constants(levels + 1)
    scale = torch.add(tiny, x.abs().amax(-1, keepdim=True), alpha=1 / levels)
    return torch.addcdiv(zero, x, scale).round_().sub_(zero), scale


@functools.cache
def _constants(zero: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a row of zeros is divided by, and the zero point."""
    return torch.tensor(1e-12), torch.tensor(float(zero))


def _sample(inputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A small weight in int8, its scales, and rows for it, (rows, inputs): as a model's are, and the hardest."""
    drawn = torch.Generator().manual_seed(inputs)
    weight, scale = rounded_rows(torch.randn(97, inputs, generator=drawn) * 0.05)
    weight[0], weight[1] = 127, -127
    x = torch.randn(24, inputs, generator=drawn) * torch.logspace(-3, 3, 24)[:, None]
    x[:4] = 1.0  # sums as large as there are
    x[1:4, ::3] = -1.0
    x[4:8, inputs // 2] = 1000 * x[4:8].abs().amax()  # beside which the others are nearly nothing
    x[8] = 0.0
    return weight, scale, x


def _packed(whole: torch.Tensor, scale: torch.Tensor) -> object:
    """An int8 weight (out, in) in fbgemm's own layout. The operators are marked as leaving torch one day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zeros = torch.zeros(len(whole), dtype=torch.long)
        tensor = torch._make_per_channel_quantized_tensor(whole, scale.double(), zeros, 0)
        packed: object = torch.ops.quantized.linear_prepack(tensor, None)
        return packed


def _fused(steps: torch.Tensor, levels: int, packed: object) -> torch.Tensor:
    y: torch.Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        steps, 1.0, levels + 1, packed
    )
    return y
