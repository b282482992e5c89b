"""Linear layers as the engine computes them: float32 or bfloat16, int8 (int8.py), int4 (int4.py).

In: a weight (out, in) and a bias. Out: a callable on (rows, in) whose rows do not depend on each other: a row
gives the same bits alone and among neighbours. In int8 that is exact by construction (whole numbers are
summed); in float32 it holds for oneDNN's packed weights on the processors it was measured on, where torch's
default multiplication changes its order of summation with the number of rows. A torch without the private operators
behind these layers is found out by a probe, once a process; public ones then do the same, more slowly.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, is_dataclass

import torch
from torch.nn import functional

from qwen_chat.errors import OptionError
from qwen_chat.inference import int4, int8
from qwen_chat.inference.int4 import Int4Linear
from qwen_chat.inference.int8 import Int8Linear
from qwen_chat.inference.native.library import Library
from qwen_chat.inference.native.linear import NativeLinear

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
    parts: object, quantize: str | None, dtype: torch.dtype, library: Library | None = None
) -> tuple[str, ...]:
    """What a run should know of how it multiplies: decision lines. parts: a decoder's layers."""
    found = _kinds(parts)
    lines = []
    if quantize == "int8":
        lines.append("weights in int8, a scale for each output; activations in int8, a scale for each row")
    if quantize == "int4":
        activations = "bfloat16" if library is None else "int8, a scale for each group"
        lines.append(
            f"weights in int4, groups of {int4.GROUP}; activations in {activations}; the head in int8"
        )
        if found[Int8Linear]:
            lines.append(
                f"{found[Int8Linear]} of {found[Int8Linear] + found[Int4Linear]} layers' weights in int8: "
                f"int4 takes outputs in 16s and inputs in {int4.GROUP}s, and a torch with its kernel"
            )
    if library is not None:
        return tuple(lines)
    if quantize is not None and not int8.fused_levels():
        lines.append("int8 by public operators, the same bits but slower: this torch has no fbgemm kernel")
    if quantize is None and not has_packed(dtype):
        lines.append(
            f"products by public operators, {PRODUCT_ROWS} rows each, slower: this torch packs no weights"
        )
    return tuple(lines)


def _kinds(part: object) -> Counter[type]:
    """How many linear layers of each kind a part has."""
    if isinstance(part, tuple | list):
        return sum((_kinds(one) for one in part), Counter())
    if is_dataclass(part):
        return sum((_kinds(getattr(part, field.name)) for field in fields(part)), Counter())
    return Counter([type(part)] if isinstance(part, Int8Linear | Int4Linear) else [])


@functools.cache
def has_packed(dtype: torch.dtype) -> bool:
    """Whether this torch packs weights for oneDNN: tried on a small one."""
    weight = torch.linspace(-1, 1, 64 * 32).view(32, 64).to(dtype)
    x = torch.linspace(-2, 3, 4 * 64).view(4, 64).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        found = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(found.float(), x.float() @ weight.float().t(), rtol=2e-2, atol=0.5)


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
