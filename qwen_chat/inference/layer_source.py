"""One layer of a transformers model, as the parts of a decoder are made of it.

In: the layer, the body that it belongs to. Out: joined projections and norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qwen_chat.errors import ModelError
from qwen_chat.inference.lora import Part, Place
from qwen_chat.inference.native.library import Library
from qwen_chat.inference.norm import Norm
from qwen_chat.inference.projection import Projection
from qwen_chat.inference.quantize import make_linear

_ZERO_CENTRED = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")  # their norms scale by 1 + weight


@dataclass(frozen=True, slots=True)
class LayerSource:
    """`layer`, the `index`th of `body`; quantize, library: as for `make_linear`."""

    layer: Any
    index: int
    body: Any
    quantize: str | None
    library: Library | None = None

    @property
    def config(self) -> Any:
        """The text model's config."""
        return self.body.config

    def join(self, *paths: str, order: torch.Tensor | None = None) -> Projection:
        """Of the layer's modules at `paths`; `order`: which of their outputs, one after the other, comes where.

        Raises ModelError for a module that is no plain linear layer.
        """
        weights, biases = [], []
        for path in paths:
            module = self.layer.get_submodule(path)
            if not isinstance(module, torch.nn.Linear) or not module.weight.is_floating_point():
                raise ModelError(
                    f"a layer of kind {type(module).__name__}; the engine needs a plain float model "
                    "(merge the adapter first)"
                )
            weights.append(module.weight.detach())
            biases.append(None if module.bias is None else module.bias.detach())
        weight, bias = torch.cat(weights), None
        if any(one is not None for one in biases):
            bias = torch.cat(
                [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
            )
        parts = tuple(Part(path, w.shape[1], w.shape[0]) for path, w in zip(paths, weights, strict=True))
        place = Place(parts, None if any(one is None for one in biases) else bias, order)
        linear = make_linear(
            place.ordered(weight), None if bias is None else place.ordered(bias), self.quantize, self.library
        )
        return Projection(linear, self.index, place)

    def norm(self, *modules: torch.nn.Module, heads: Sequence[int] = ()) -> Norm:
        """One norm; or one of several kinds of heads, `heads` of each."""
        weights = [module.get_parameter("weight").detach() for module in modules]
        if self.config.model_type in _ZERO_CENTRED:
            weights = [1 + weight.float() for weight in weights]
        rows = [weight.expand(count, -1) for weight, count in zip(weights, heads, strict=bool(heads))]
        return Norm(torch.cat(rows) if rows else weights[0], float(self.config.rms_norm_eps))
