"""RMSNorm, as the models of every family write it.

In: a norm's weight. Out: a callable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Norm:
    """Over the last dimension. weight (size,), or (heads, size) for x (tokens, heads, size); float32 where the model
    keeps it so."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x if x.dtype is self.weight.dtype else x.float()
        if self.weight.dim() == 1:
            y = functional.rms_norm(wide, x.shape[-1:], self.weight, self.eps)
        else:
            y = functional.rms_norm(wide, x.shape[-1:], None, self.eps) * self.weight
        return y if wide is x else y.to(x.dtype)
