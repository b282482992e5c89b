"""A linear layer as the native step has it; a callable on its own too, for what goes through torch.

In: a weight (out, in), a bias. Out: (rows, in) -> (rows, out), and its place in step.cpp's structures. A row's bits
depend on that row alone: in int8 the same as `Int8Linear`'s; in float32 one chain of sums an output, from the first
input to the last; in int4 one from the first group to the last, whose sums are whole numbers: a row is rounded to int8
with a scale for each group.
"""

from __future__ import annotations

import ctypes

import torch
from torch.nn import functional

from qwen_chat.inference import int4
from qwen_chat.inference.int8 import rounded_rows
from qwen_chat.inference.native.library import Library, LinearPart

_AT_A_TIME = 1024  # rows converted at a time


class NativeLinear:
    """float32, int8 with a scale for each output, or int4 as int4.py rounds. `part`: what step.cpp reads; it lives as
    long as this."""

    def __init__(
        self, library: Library, weight: torch.Tensor, bias: torch.Tensor | None, quantize: str | None
    ) -> None:
        outputs, inputs = weight.shape
        self._library = library
        weight, room = weight.detach(), -outputs % library.panel
        # A part of the rows at a time: what is widened and rounded on the way stays small.
        parts = range(0, outputs, _AT_A_TIME // library.panel * library.panel)
        self._bias = None if bias is None else functional.pad(bias.detach().float(), (0, room))
        self._scale = self._sums = None
        if quantize is None:
            self._weight = torch.empty(outputs + room, inputs)
            for first in parts:
                rows = weight[first : first + parts.step].float().contiguous()
                packed = self._weight[first:].data_ptr()
                library.call("native_pack_float", rows.data_ptr(), len(rows), inputs, packed)
        elif quantize == "int4":
            self._weight = torch.empty(outputs + room, int4.int4_bytes(1, inputs), dtype=torch.uint8)
            for first in parts:
                whole, scales = int4.rounded(weight[first : first + parts.step])
                packed = self._weight[first:].data_ptr()
                count, group = len(whole), int4.GROUP
                library.call(
                    "native_pack_int4", whole.data_ptr(), scales.data_ptr(), count, inputs, group, packed
                )
        else:
            self._scale = torch.zeros(outputs + room)
            self._sums = torch.empty(outputs + room, dtype=torch.int32)
            self._weight = torch.empty(outputs + room, -(-inputs // 4) * 4, dtype=torch.int8)
            for first in parts:
                whole, scale = rounded_rows(weight[first : first + parts.step])
                self._scale[first : first + len(whole)] = scale
                packed, sums = self._weight[first:].data_ptr(), self._sums[first:].data_ptr()
                library.call("native_pack_int8", whole.data_ptr(), len(whole), inputs, packed, sums)
        self.part = LinearPart(
            outputs,
            inputs,
            *(
                None if one is None else one.data_ptr()
                for one in (self._weight, self._scale, self._sums, self._bias)
            ),
            int4.GROUP if quantize == "int4" else 0,
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        rows = len(x)
        y = x.new_empty(rows, self.part.outputs)
        # Room for the whole numbers and scales of int8 and int4.
        whole, scale = (
            torch.empty(rows, -(-self.part.inputs // 64) * 64, dtype=torch.uint8),
            torch.empty(rows, self.part.inputs // 32 + 1, 3),
        )
        levels = self._library.levels
        self._library.call(
            "native_linear",
            *(ctypes.byref(self.part), levels, levels + 1, x.data_ptr(), rows, y.data_ptr()),
            *(whole.data_ptr(), scale.data_ptr(), *self._library.threads),
        )
        return y
