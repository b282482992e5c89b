"""A linear layer as the native step has it; a callable on its own too, for what goes through torch.

In: a weight (out, in), a bias. Out: (rows, in) -> (rows, out), and its place in step.cpp's structures. A row's bits
depend on that row alone: in int8 the same as `Int8Linear`'s; in float32 one chain of sums an output, from the first
input to the last; in int4 one from the first group to the last, whose sums are whole numbers: a row is rounded to int8
with a scale for each group.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn import functional

from qwen_chat.inference import int4
from qwen_chat.inference.native.library import Library, LinearPart

_AT_A_TIME = 1024  # rows packed at a time; whole panels
_FITTED = 128  # the same in int4, which takes a dozen times their size


class NativeLinear:
    """float32, int8 with a scale for each output, or int4 as int4.py rounds. `part`: what step.cpp reads; it lives as
    long as this."""

    def __init__(
        self, library: Library, weight: torch.Tensor, bias: torch.Tensor | None, quantize: str | None
    ) -> None:
        outputs, inputs = weight.shape
        self._library = library
        room = -outputs % library.panel
        self._bias = None if bias is None else functional.pad(bias.detach().float(), (0, room))
        self._scale = self._sums = None
        if quantize is None:
            self._weight = library.room(outputs + room, inputs, torch.float32)
        elif quantize == "int4":
            self._weight = library.room(outputs + room, int4.int4_bytes(1, inputs), torch.uint8)
        else:
            self._scale = torch.empty(outputs + room)
            self._sums = torch.empty(outputs + room, dtype=torch.int32)
            self._weight = library.room(outputs + room, -(-inputs // 4) * 4, torch.int8)
        self._pack(weight.detach(), quantize)
        self.part = LinearPart(
            outputs,
            inputs,
            *(
                None if one is None else one.data_ptr()
                for one in (self._weight, self._scale, self._sums, self._bias)
            ),
            int4.GROUP if quantize == "int4" else 0,
        )

    def _pack(self, weight: torch.Tensor, quantize: str | None) -> None:
        """By several threads, each a few rows at a time; bfloat16 is widened number by number there."""
        is_half = weight.dtype is torch.bfloat16
        weight = (weight if is_half else weight.float()).contiguous()
        panel, threads = self._library.panel, self._library.threads[0]
        most = _FITTED if quantize == "int4" else _AT_A_TIME
        each = min(most, -(-len(weight) // threads // panel) * panel)
        kept = [one for one in (self._weight, self._scale, self._sums) if one is not None]

        def pack(first: int) -> None:
            rows = weight[first : first + each]
            to = [one[first:].data_ptr() for one in kept]
            if quantize == "int4":
                whole, scales = int4.rounded(rows)
                given = (whole.data_ptr(), scales.data_ptr(), *rows.shape, int4.GROUP)
                self._library.call("native_pack_int4", *given, *to)
            else:
                name = f"native_pack_{quantize or 'float'}"
                self._library.call(name, rows.data_ptr(), int(is_half), *rows.shape, *to)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(pack, range(0, len(weight), each)))

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
