"""A decoder's layers as the native step reads them, and its call.

In: the decoder's parts; each step, its segments and embeddings. Out: keys and values written, what the head was given
and its logits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from qwen_chat.inference import int4
from qwen_chat.inference.attention import Attention
from qwen_chat.inference.feed_forward import Dense
from qwen_chat.inference.layer import Layer
from qwen_chat.inference.lora import Lora
from qwen_chat.inference.native.library import (
    BatchPart,
    GroupPart,
    LayerPart,
    Library,
    LinearPart,
    ModelPart,
    SegmentPart,
    ThinPart,
    native_library,
)
from qwen_chat.inference.native.linear import NativeLinear
from qwen_chat.inference.norm import Norm
from qwen_chat.inference.projection import Projection
from qwen_chat.inference.quantize import Linear
from qwen_chat.inference.step import Segment

_STEPPED = ("llama", "mistral", "qwen2", "qwen3")
_LANES = 16  # numbers of the widest vector: sizes are multiples of it
_HEAD_LIMIT = 256  # of step.cpp


def why_not_native(body: Any, quantize: str | None, device: str) -> str | None:
    """Why the native step does not know a model's layers; None: it does."""
    config = body.config
    if config.model_type not in _STEPPED:
        return f"it does not know {config.model_type}"
    dtype = body.embed_tokens.weight.dtype
    if device != "cpu" or dtype is not torch.float32:
        return f"it computes in float32 on a CPU, and this model is {dtype} on {device}"
    if config.hidden_act not in ("silu", "swish"):
        return f"it does not know the activation {config.hidden_act}"
    attention = body.layers[0].self_attn
    sizes = (config.hidden_size, config.intermediate_size, attention.head_dim)
    lanes = int4.GROUP if quantize == "int4" else _LANES
    if any(size % lanes for size in sizes) or attention.head_dim > _HEAD_LIMIT:
        return f"its sizes are multiples of {lanes}, a head's at most {_HEAD_LIMIT}"
    return None


def choose_path(body: Any, quantize: str | None, device: str) -> tuple[Library | None, str]:
    """The library that computes a model's steps, None for torch, and the line that tells it."""
    reason = why_not_native(body, quantize, device)
    found = native_library() if reason is None else reason
    if isinstance(found, str):
        return None, f"steps in torch; the native step is off: {found}"
    return found, f"steps in native code ({found.name})"


class Program:
    """`layers` and `head` with NativeLinear in them, as step.cpp's structures. rotary: the model's own embedding of
    positions, computed once for each."""

    def __init__(
        self, library: Library, layers: Sequence[Layer], norm: Norm, head: Linear, rotary: Any
    ) -> None:
        assert isinstance(head, NativeLinear)
        self._library, self._layers, self._norm, self._head = library, tuple(layers), norm, head
        self._rotary = rotary
        self._cos = self._sin = torch.empty(0, 0)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._adapters: WeakKeyDictionary[Lora, tuple[Any, int]] = WeakKeyDictionary()
        self._parts = (LayerPart * len(layers))(*map(_layer_part, layers))
        mixer, feed = layers[0].mixer, layers[0].feed
        assert isinstance(mixer, Attention) and isinstance(feed, Dense)
        self._model = ModelPart(
            hidden=head.part.inputs,
            heads=mixer.heads,
            kv_heads=mixer.kv_heads,
            head_dim=mixer.head_dim,
            rotary=mixer.rotary,
            inner=_part(feed.down).inputs,
            layer_count=len(layers),
            vocabulary=head.part.outputs,
            eps=norm.eps,
            levels=library.levels,
            zero=library.levels + 1,
            layers=self._parts,
            norm=norm.weight.data_ptr(),
            head=head.part,
        )

    def step(
        self,
        segments: Sequence[Segment],
        groups: Sequence[tuple[slice, Lora]],
        x: torch.Tensor,
        wanted: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (tokens, hidden): the embeddings of the segments' tokens, changed; wanted: the tokens whose logits are
        asked for. Returns (wanted, hidden) after the last norm, and their logits."""
        last, logits = x.new_empty(len(wanted), x.shape[1]), x.new_empty(len(wanted), self._head.part.outputs)
        rank, own = 0, (GroupPart * len(groups))()
        for place, (rows, lora) in enumerate(groups):
            thin, most = self._adapter(lora)
            own[place] = GroupPart(rows.start, rows.stop, thin)
            rank = max(rank, most)
        reach = max(segment.start + len(segment.ids) for segment in segments)
        self._turn(reach)
        model = ctypes.byref(self._model)
        need = self._library.call("native_scratch", model, len(x), rank, reach)
        if need > len(self._scratch):
            self._scratch = torch.empty(need, dtype=torch.uint8)
        batch = BatchPart(
            tokens=len(x),
            segment_count=len(segments),
            group_count=len(groups),
            wanted_count=len(wanted),
            x=x.data_ptr(),
            wanted=wanted.data_ptr(),
            segments=(SegmentPart * len(segments))(*map(_segment_part, segments)),
            groups=own,
            cos=self._cos.data_ptr(),
            sin=self._sin.data_ptr(),
            last=last.data_ptr(),
            logits=logits.data_ptr(),
            scratch=self._scratch.data_ptr(),
        )
        self._library.call("native_step", model, ctypes.byref(batch), rank, reach, *self._library.threads)
        return last, logits

    def _turn(self, positions: int) -> None:
        """Have the angles of so many positions."""
        if positions > len(self._cos):
            count = 1 << (max(positions, 256) - 1).bit_length()
            cos, sin = self._rotary(torch.empty(1, 1), torch.arange(count)[None])
            half = self._model.rotary // 2
            self._cos, self._sin = (one[0, :, :half].contiguous() for one in (cos, sin))

    def _adapter(self, lora: Lora) -> tuple[Any, int]:
        """An adapter's shares, a layer's four after the other, and its largest rank."""
        if lora not in self._adapters:
            found, rank = (ThinPart * (4 * len(self._layers)))(), 0
            for number, layer in enumerate(self._layers):
                for place, one in enumerate((*layer.mixer.places, *layer.feed.places)):
                    pair, bias = lora.share(number, one.name)
                    thin = found[4 * number + place]
                    if pair is not None:
                        down, up = pair
                        assert isinstance(down, NativeLinear) and isinstance(up, NativeLinear)
                        thin.down, thin.up = down.part, up.part
                        rank = max(rank, down.part.outputs)
                    thin.bias = None if bias is None else bias.data_ptr()
            self._adapters[lora] = found, rank
        return self._adapters[lora]


def _part(projection: Projection) -> LinearPart:
    assert isinstance(projection.linear, NativeLinear)
    return projection.linear.part


def _layer_part(layer: Layer) -> LayerPart:
    mixer, feed = layer.mixer, layer.feed
    assert isinstance(mixer, Attention) and isinstance(feed, Dense)
    return LayerPart(
        mixer_norm=layer.mixer_norm.weight.data_ptr(),
        heads_norm=None if mixer.norm is None else mixer.norm.weight.data_ptr(),
        feed_norm=layer.feed_norm.weight.data_ptr(),
        window=mixer.window or 0,
        inputs=_part(mixer.inputs),
        output=_part(mixer.output),
        gate_up=_part(feed.gate_up),
        down=_part(feed.down),
    )


def _segment_part(segment: Segment) -> SegmentPart:
    bank = segment.row.bank
    assert bank is not None, "no room was reserved for the segment"
    kv = bank.tensor
    return SegmentPart(
        start=segment.start,
        count=len(segment.ids),
        kv=kv.data_ptr() + segment.row.slot * kv.stride(1) * kv.itemsize,
        stride=kv.stride(0),
        capacity=bank.capacity,
    )
