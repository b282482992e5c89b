"""Linear layers as the engine computes them: float32 or bfloat16, int8 (int8.py), int4 (int4.py).

In: a weight (out, in) and a bias. Out: a callable on (rows, in) whose rows do not depend on each other: a row
gives the same bits alone and among neighbours. In int8 that is exact by construction (whole numbers are
summed); in float32 it holds for oneDNN's packed weights on the processors it was measured on, where torch's
default multiplication changes its order of summation with the number of rows. A torch without the private operators
behind these layers is found out by a probe, once a process; public ones then do the same, more slowly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass

import torch
from torch.nn import functional

from qwen_chat.errors import OptionError
from qwen_chat.inference import int4, int8
from qwen_chat.inference.int4 import Int4Linear
from qwen_chat.inference.int8 import Int8Linear
from qwen_chat.inference.native.library import Library
from qwen_chat.inference.native.linear import NativeLinear
from qwen_chat.inference.probe import gives

# x (rows, in) -> (rows, out)
Linear = Callable[[torch.Tensor], torch.Tensor]

PRODUCT_ROWS = 16  # rows of every product in public operators: one number of rows has one order of summation


def check_dtype(dtype: torch.dtype) -> None:
    """OptionError for a number type that this processor's packed multiplication does not have."""
    names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    # A torch that does not say it multiplies in public operators.
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{names.get(dtype)}_supported", None)
    if dtype in names and supported is not None and not supported():
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
    """The linear layer for a weight (out, in) in the way `quantize` names; int8 for a shape that int4's kernel does
    not take. The weight is copied into a layout of its own; what is needed beside it while it is: a slice of rows
    for int4, a second copy for int8 (of at most 128 million numbers). library: the native
    step's, where that computes."""
    if library is not None:
        return NativeLinear(library, weight, bias, quantize)
    if quantize is None:
        return FloatLinear(weight, bias)
    if quantize == "int4" and int4.takes(*weight.shape):
        return Int4Linear(weight, bias)
    if quantize in ("int8", "int4"):
        return Int8Linear(weight, bias)
    raise OptionError(f"quantize: {quantize!r}; expected int8, int4 or nothing")


def linear_bytes(
    rows: int, columns: int, quantize: str | None = None, dtype: torch.dtype = torch.float32
) -> int:
    """Bytes that `make_linear` keeps of a weight (rows, columns), its bias left out; dtype: without `quantize`."""
    if quantize is None:
        return rows * columns * dtype.itemsize
    if quantize == "int4" and int4.takes(rows, columns):
        return int4.int4_bytes(rows, columns)
    return int8.int8_bytes(rows, columns)


def ways(
    parts: object, head: Linear, quantize: str | None, dtype: torch.dtype, library: Library | None = None
) -> tuple[str, ...]:
    """What a run should know of how it multiplies: decision lines. parts: a decoder's layers."""
    inner = tuple(_linears(parts))
    whole = [linear for linear in inner if isinstance(linear, Int8Linear)]
    lines = []
    if quantize == "int8":
        lines.append("weights in int8, a scale for each output; activations in int8, a scale for each row")
    if quantize == "int4":
        activations = "bfloat16" if library is None else "int8, a scale for each group"
        lines.append(
            f"weights in int4, groups of {int4.GROUP}; activations in {activations}; the head in int8"
        )
        if whole:
            lines.append(
                f"{len(whole)} of {len(inner)} layers' weights in int8: int4 takes outputs in 16s and inputs in "
                f"{int4.GROUP}s, and a torch whose kernel is right"
            )
    if library is not None:
        return tuple(lines)
    ways_of_int8 = {one.way for one in (*inner, head) if isinstance(one, Int8Linear)} - {int8.FUSED}
    lines += [
        f"int8 by {way}: the same bits; this torch's fbgemm kernel is gone or sums otherwise"
        for way in sorted(ways_of_int8)
    ]
    if quantize is None and not has_packed(dtype):
        lines.append(
            f"products by public operators, {PRODUCT_ROWS} rows each, slower: this torch packs no weights"
        )
    return tuple(lines)


def _linears(part: object) -> Iterator[Int4Linear | Int8Linear]:
    """The linear layers of a part whose weights torch multiplies as whole numbers."""
    if isinstance(part, tuple | list):
        for one in part:
            yield from _linears(one)
    elif is_dataclass(part):
        for field in fields(part):
            yield from _linears(getattr(part, field.name))
    elif isinstance(part, Int8Linear | Int4Linear):
        yield part


@functools.cache
def has_packed(dtype: torch.dtype) -> bool:
    """Whether this torch packs weights for oneDNN and multiplies them rightly: tried on a small one."""
    drawn = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 96, generator=drawn).to(dtype) for rows in (64, 4))
    x[1, 7] = 1000.0

    def product() -> torch.Tensor:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return found

    return gives(product, x.double() @ weight.double().t(), 4 * torch.finfo(dtype).eps)


class FloatLinear:
    """float32 or bfloat16, packed for oneDNN where this torch has it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._bias = None if bias is None else bias.detach().clone()
        weight = weight.detach()
        self._is_host = weight.device.type == "cpu"
        self._packed = self._is_host and has_packed(weight.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._packed else weight.clone()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed and x.shape[0] == 1:
            # A lone row of more than 1,024 inputs is summed in another order than one of many; one of two is not.
            return self(x.expand(2, -1).contiguous())[:1]
        if self._packed:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return y
        if not self._is_host:
            return functional.linear(x, self._weight, self._bias)
        full = functional.pad(x, (0, 0, 0, -len(x) % PRODUCT_ROWS))
        parts = [
            functional.linear(full[begin : begin + PRODUCT_ROWS], self._weight, self._bias)
            for begin in range(0, len(full), PRODUCT_ROWS)
        ]
        return torch.cat(parts)[: len(x)]
