"""Linear layers as the engine computes them: float32, bfloat16, or int8 weights with a scale for each row of
activations.

In: a weight (out, in) and a bias. Out: a callable on (rows, in) whose rows do not depend on each other: a row
gives the same bits alone and among neighbours. In int8 that is exact by construction (whole numbers are
summed); in float32 it holds for oneDNN's packed weights on the processors it was measured on, where torch's
default multiplication changes its order of summation with the number of rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch.nn import functional

from qwen_chat.errors import OptionError
from qwen_chat.inference.native.library import Library
from qwen_chat.inference.native.linear import NativeLinear

# x (rows, in) -> (rows, out)
Linear = Callable[[torch.Tensor], torch.Tensor]


def check_dtype(dtype: torch.dtype) -> None:
    """OptionError for a number type that this processor's packed multiplication does not have."""
    names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    if dtype in names and not getattr(torch.ops.mkldnn, f"_is_mkldnn_{names[dtype]}_supported")():
        raise OptionError(
            f"--dtype {str(dtype).removeprefix('torch.')}: this CPU does not multiply in it; give float32 (on a GPU: "
            "--engine vllm)"
        )


def make_linear(
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    quantize: str | None = None,
    library: Library | None = None,
) -> Linear:
    """The linear layer for a weight (out, in) in the way `quantize` names; of the native step's `library`, where one
    is given. The weight is copied into a layout of its own."""
    if library is not None:
        return NativeLinear(library, weight, bias, quantize)
    if quantize is None:
        return FloatLinear(weight, bias)
    if quantize == "int8":
        return Int8Linear(weight, bias)
    raise OptionError(f"quantize: {quantize!r}; expected int8 or nothing")


class FloatLinear:
    """float32 or bfloat16, packed for oneDNN where this torch has it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._bias = None if bias is None else bias.detach().clone()
        self._packed = weight.device.type == "cpu" and torch._C._has_mkldnn
        weight = weight.detach()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._packed else weight.clone()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed and x.shape[0] == 1:
            # A lone row of more than 1,024 inputs is summed in another order than one of many; one of two is not.
            return self(x.expand(2, -1).contiguous())[:1]
        if self._packed:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return y
        return functional.linear(x, self._weight, self._bias)


class Int8Linear:
    """int8 weights, one scale an output; activations rounded to whole numbers, one scale a row (its largest magnitude).

    Where the processor sums bytes without overflow (VNNI) a row uses 127 steps each side, else 63: two products of 7
    and 8 bits fit the 16 bits that AVX2 sums them in. Both kernels below see the same whole numbers and give the same
    bits: fbgemm's is the fast one for few rows, `_int_mm` on AMX tiles for many (it wants more than 16).
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        weight = weight.detach().float()
        self._scale = (weight.abs().amax(1) / 127).clamp_min(1e-12)
        whole = (weight / self._scale[:, None]).round_().to(torch.int8)
        self._bias = None if bias is None else bias.detach().float().clone()
        wide = torch.cpu._is_vnni_supported()
        self._levels, self._zero = (127, 128) if wide else (63, 64)
        self._many = whole.t() if torch.cpu._is_amx_tile_supported() else None
        self._tiny = torch.tensor(1e-12)  # a row of zeros is divided by something
        # fbgemm's own layout. The ops that take it are marked as leaving torch one day; requirements pin torch.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zeros = torch.zeros(len(whole), dtype=torch.long)
            packed = torch._make_per_channel_quantized_tensor(whole, self._scale.double(), zeros, 0)
            self._few: object = torch.ops.quantized.linear_prepack(packed, None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        kind, x = x.dtype, x.float()
        scale = torch.add(self._tiny, x.abs().amax(-1, keepdim=True), alpha=1 / self._levels)
        steps = x / scale
        if self._many is not None and x.shape[0] > 16:
            # Rounded with the zero point added, as the other kernel rounds: halves fall the same way.
            whole = steps.add_(self._zero).round_().sub_(self._zero)
            y = torch._int_mm(whole.to(torch.int8), self._many) * self._scale
        else:
            y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
                steps, 1.0, self._zero, self._few
            )
        y.mul_(scale)
        return (y if self._bias is None else y.add_(self._bias)).to(kind)
