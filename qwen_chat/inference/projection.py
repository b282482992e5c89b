"""One linear layer for several that read the same input, and each adapter's share of it.

In: the joined layer, and what an adapter calls it. Out: a callable on a step's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen_chat.inference.lora import Place
from qwen_chat.inference.quantize import Linear
from qwen_chat.inference.step import Step


@dataclass(frozen=True, slots=True)
class Projection:
    """x (tokens, in) -> (tokens, out of all parts)."""

    linear: Linear
    layer: int
    place: Place

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        y = self.linear(x)
        for rows, lora in step.groups:
            lora.add(y[rows], x[rows], self.layer, self.place.name)
        return y
