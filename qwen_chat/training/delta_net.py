"""Gated DeltaNet layers (Qwen3-Next, Qwen3.5) in rows of many conversations with shared prefixes.

In: a loaded model. Out: the same model, whose layers of this kind keep the conversations of a row apart. With
`segments` (packing.py), the keyword of model.forward that the attention gets too, a layer goes one of two ways:

    our own      each segment goes on from the state of the one that it descends from, as runs of `delta_rule`
    kernels      where fla and causal-conv1d are installed and nothing is shared: the layer's own forward, which
                 hands them the row's boundaries

Without `segments` (generation, evaluation by others) a layer is transformers' own.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from qwen_chat.delta_rule import Runs, convolve, gated_delta_rule
from qwen_chat.errors import ModelError

# The layers of which it is known how they project: three arrange the same arithmetic in two ways.
LAYERS = ("Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")
PACKAGES = ("fla", "causal_conv1d")


def keep_apart(model: torch.nn.Module) -> int:
    """Give every such layer the forward that knows rows; returns how many there are. Twice is as once.

    ModelError where an adapter lies over a layer's convolution.
    """
    found = [(parent, child) for parent in model.modules() for child in parent.children()]
    pairs = [(parent, cast(Any, child)) for parent, child in found if type(child).__name__ in LAYERS]
    for parent, layer in pairs:
        convolution: Any = layer.conv1d
        if type(convolution) is not torch.nn.Conv1d:
            raise ModelError(
                f"{type(layer).__name__}: an adapter over conv1d is never run, the layer reads its weight alone; leave"
                " it out of --lora_target_modules"
            )
        if "_without_rows" not in vars(layer):
            vars(convolution)["forward"] = MethodType(_convolution, convolution)
            layer._without_rows = layer.forward
            layer._inside = (parent,)  # in a tuple it is no module of this one
            layer.forward = MethodType(_forward, layer)
    return len(pairs)


def decision(layers: int, device: str, layout: str) -> str:
    """The line that says which way rows take. device: "cpu", "cuda", ...; layout: packing.LAYOUTS."""
    own = "our own chunks keep a row's conversations apart"
    state = ", a shared prefix hands its state on" if layout == "shared_prefix" else ""
    if not _has_kernels(device):
        missing = "" if device == "cuda" else f" on '{device}'"
        return f"{layers} gated delta-net layers: {own}{state} (no kernels of fla and causal-conv1d{missing})"
    kernels = "fla and causal-conv1d, which are given the row's boundaries"
    if layout == "shared_prefix":
        return (
            f"{layers} gated delta-net layers: {kernels}, where nothing is shared; else {own}{state}"
            " (--layout packed: the kernels alone)"
        )
    return f"{layers} gated delta-net layers: {kernels}"


def takes_kernels(model: PreTrainedModel) -> bool:
    """Whether some rows of this model go through kernels of others."""
    return _has_kernels(model.device.type) and any("_without_rows" in vars(m) for m in model.modules())


def _has_kernels(device: str) -> bool:
    """Whether transformers finds both kernels, which run on CUDA alone."""
    return device == "cuda" and all(find_spec(name) is not None for name in PACKAGES)


def _forward(
    self: Any,
    hidden_states: Tensor,
    cache_params: object | None = None,
    attention_mask: Tensor | None = None,
    segments: Tensor | None = None,
    **kwargs: object,
) -> Tensor:
    """The layer's forward. hidden_states [1, T, D] of a row -> [1, T, D]."""
    if segments is None:
        own = self._without_rows(
            hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs
        )
        return cast(Tensor, own)
    if cache_params is not None or attention_mask is not None or hidden_states.shape[0] != 1:
        raise ModelError(f"{type(self).__name__}: a row is a batch of 1 without a cache or an attention mask")
    row = _runs(segments)
    if _has_kernels(hidden_states.device.type) and max(row.parents) < 0:
        stops = torch.tensor([0, *(start + n for start, n in zip(row.starts, row.lengths, strict=True))])
        lengths = torch.tensor(row.lengths)
        numbers = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
        where: dict[str, Any] = {"device": hidden_states.device, "dtype": torch.int32}
        bounds = {"cu_seq_lens_q": stops.to(**where), "seq_idx": numbers.to(**where)}
        return cast(Tensor, self._without_rows(hidden_states, **bounds, **kwargs))
    mixed, z, b, a = _projected(self, hidden_states)
    inputs = (mixed, b, a, self.A_log, self.dt_bias)
    if torch.is_grad_enabled() and not getattr(self._inside[0], "gradient_checkpointing", False):
        # What the chunks keep for backward is more than all the rest of the layer, and soon computed again.
        core = checkpoint(_core, self, row, *inputs, use_reentrant=False, preserve_rng_state=False)
    else:
        core = _core(self, row, *inputs)
    normed = self.norm(cast(Tensor, core).flatten(0, 1), z.reshape(-1, self.head_v_dim))
    return cast(Tensor, self.out_proj(normed.view(1, -1, self.value_dim)))


def _projected(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a row [1, T, D]: queries, keys, values in one [T, 2 Dk + Dv]; the gate z, and b and a [T, H]."""
    if hasattr(layer, "in_proj_qkvz"):
        parts = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(x), layer.in_proj_ba(x))
        q, k, v, z, b, a = (part[0] for part in parts)
        return torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], -1), z, b, a
    projected = (layer.in_proj_qkv(x), layer.in_proj_z(x), layer.in_proj_b(x), layer.in_proj_a(x))
    mixed, z, b, a = (part[0] for part in projected)
    return mixed, z, b, a


def _core(
    layer: Any, row: Runs, mixed: Tensor, b: Tensor, a: Tensor, log_rate: Tensor, bias: Tensor
) -> Tensor:
    """Convolution and delta rule: [T, H, V]. Its sums are exact under autocast too."""
    exact = torch.float64 if mixed.dtype == torch.float64 else torch.float32
    with torch.autocast(mixed.device.type, enabled=False):
        mixed = ACT2FN[layer.activation](layer.conv1d(mixed, row))
        q, k, v = torch.split(mixed, [layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
        decay = -log_rate.to(exact).exp() * torch.nn.functional.softplus(a.to(exact) + bias.to(exact))
        out, _ = gated_delta_rule(
            q.reshape(len(q), -1, layer.head_k_dim),
            k.reshape(len(k), -1, layer.head_k_dim),
            v.reshape(len(v), -1, layer.head_v_dim),
            decay,
            b.to(exact).sigmoid(),
            row,
        )
    return out


def _convolution(self: torch.nn.Conv1d, x: Tensor, row: Runs) -> Tensor:
    """The forward of a layer's convolution, which transformers never calls: x [T, D] -> [T, D].

    Called as a module, so that ZeRO-3 and offloading have its weight there in time.
    """
    return convolve(x.to(self.weight.dtype), self.weight.squeeze(1), row)[0]


_last: tuple[Tensor, Runs] | None = None


def _runs(segments: Tensor) -> Runs:
    """The row's segments as runs, read once a row: all layers of a step are given the same tensor."""
    global _last
    if _last is None or _last[0] is not segments:
        lengths, parents = [], []
        path: list[tuple[int, int]] = []  # the segments that the next one may descend from: (number, end)
        for number, (start, stop, end) in enumerate(segments.tolist()):
            while path and path[-1][1] <= start:
                path.pop()
            lengths.append(stop - start)
            parents.append(path[-1][0] if path else -1)
            path.append((number, end))
        _last = segments, Runs(tuple(lengths), tuple(parents))
    return _last[1]
