"""A loaded model of a family that the engine serves, laid out for decoding: many rows of different length in one step.

In: a transformers model; each step, `Segment`s: the next tokens of some rows, prompts' pieces and single
tokens side by side.
Out: the logits of the rows that asked for them, (rows, vocabulary) float32.

The step's tokens lie one after the other, (tokens, hidden), with no padding. Linear layers see them all at
once; attention and delta nets go row by row over what that row holds. What a position computes does not depend
on who else is in the step, nor on how its prompt was cut into pieces: linear layers as quantize.py tells, the
others as attention.py, delta_net.py and feed_forward.py do. So it is on a CPU; an accelerator's kernels choose their
order of summation by the shape of a step, and there the last bits may depend on company.

Everything that a step makes lies on the model's device, from one upload of whole numbers on (transfer.py).

It uses the model's own weights, rotary embedding and activation, but not its `forward`: on one core a step of
a 135M model spent half of its time in the modules' Python. A test holds its logits against the model's own
forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from qwen_chat.errors import ModelError
from qwen_chat.families import check_served
from qwen_chat.inference.attention import Attention
from qwen_chat.inference.delta_net import DeltaNet
from qwen_chat.inference.feed_forward import Dense, Experts
from qwen_chat.inference.kv_cache import KVShape
from qwen_chat.inference.layer_source import LayerSource
from qwen_chat.inference.lora import Places
from qwen_chat.inference.norm import Norm
from qwen_chat.inference.quantize import make_linear
from qwen_chat.inference.step import (
    Segment,
    Step,
    adapter_groups,
    attention_spans,
    lie_order,
    token_slices,
)
from qwen_chat.inference.transfer import to_device


@dataclass(frozen=True, slots=True)
class Layer:
    """Two parts, each with a norm before it, added to what came in."""

    mixer_norm: Norm
    mixer: Attention | DeltaNet
    feed_norm: Norm
    feed: Dense | Experts


class Decoder:
    """The model's layers with projections of the same input in one matrix."""

    def __init__(self, model: Any, *, quantize: str | None = None) -> None:
        check_served({"model_type": model.config.model_type}, "this model")
        body = getattr(model.model, "language_model", model.model)  # a multimodal model's text part
        if body.rotary_emb.rope_type in ("dynamic", "longrope"):
            raise ModelError(
                f"rope_type {body.rotary_emb.rope_type!r}: a position would turn by the longest row of a step; "
                "the engine serves fixed ones (default, linear, yarn, llama3); for others use --engine vllm"
            )
        self.vocabulary: int = model.lm_head.weight.shape[0]
        self.dtype: torch.dtype = body.embed_tokens.weight.dtype
        self.device: torch.device = body.embed_tokens.weight.device
        self.context = int(body.config.max_position_embeddings)
        self._rotary = body.rotary_emb
        with torch.inference_mode():
            self._embedding = body.embed_tokens.weight.detach()
            slots: Counter[str] = Counter()
            sources = [LayerSource(layer, k, body, quantize) for k, layer in enumerate(body.layers)]
            self._layers = tuple(_layer(source, slots) for source in sources)
            self._norm = sources[0].norm(body.norm)
            self._head = make_linear(model.lm_head.weight, model.lm_head.bias, quantize)
        attentions = [layer.mixer for layer in self._layers if isinstance(layer.mixer, Attention)]
        deltas = [layer.mixer for layer in self._layers if isinstance(layer.mixer, DeltaNet)]
        self._windows = {attention.window for attention in attentions}
        self._group = attentions[0].heads // attentions[0].kv_heads if attentions else 1
        self.kv_shape = KVShape(
            len(attentions),
            attentions[0].kv_heads if attentions else 1,
            attentions[0].head_dim if attentions else 1,
            self.dtype,
            deltas[0].state_shape(len(deltas)) if deltas else None,
            self.device,
        )
        self.places = Places(
            layers=tuple((*layer.mixer.places, *layer.feed.places) for layer in self._layers),
            vocabulary=self._embedding.shape[0],
            width=self._embedding.shape[1],
            dtype=self.dtype,
            tied=model.lm_head.weight is body.embed_tokens.weight,
            device=self.device,
        )

    @torch.inference_mode()
    def step(self, segments: Sequence[Segment]) -> torch.Tensor:
        """Compute the segments' tokens and write what their rows keep; logits of those that want them, in
        order."""
        order = lie_order(segments)
        laid = [segments[place] for place in order]
        tokens = token_slices(laid)
        for segment in laid:
            if segment.keep and segment.row.state is not None:
                segment.row.state.kept.clear()
        last = {
            place: own.stop - 1
            for place, own in zip(order, tokens, strict=True)
            if segments[place].wants_logits
        }
        places = sorted(last)
        ids, positions, rows = to_device(
            (
                [token for segment in laid for token in segment.ids],
                [place for s in laid for place in range(s.start, s.start + len(s.ids))],
                [last[place] for place in places],
            ),
            self.device,
        )
        x = self._hidden(laid, tokens, ids, positions)
        if not last:
            return x.new_empty(0, self.vocabulary)
        x = self._norm(x[rows])
        logits = self._head(x).float()
        for row, place in enumerate(places):
            lora = segments[place].lora
            if lora is not None:
                lora.correct(logits[row : row + 1], x[row : row + 1])
        return logits

    def _hidden(
        self, segments: Sequence[Segment], tokens: Sequence[slice], ids: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """The hidden states (tokens, hidden) after the last layer; ids and positions (tokens,)."""
        x = functional.embedding(ids, self._embedding)
        cos, sin = self._rotary(x[None], positions[None])
        cos, sin = cos[0, :, None], sin[0, :, None]
        half = sin.shape[-1] // 2
        step = Step(
            segments=segments,
            tokens=tokens,
            groups=adapter_groups(segments, tokens),
            spans={
                window: attention_spans(segments, positions, self._group, window, x.dtype)
                for window in self._windows
            },
            cos=cos,
            sin=torch.cat((-sin[..., :half], sin[..., half:]), -1),
        )
        for rows, lora in step.groups:
            lora.embed(x[rows], ids[rows])
        for layer in self._layers:
            x = x + layer.mixer(layer.mixer_norm(x), step)
            x = x + layer.feed(layer.feed_norm(x), step)
        return x


def _layer(source: LayerSource, slots: Counter[str]) -> Layer:
    """One layer's parts. slots: how many layers of each kind there were; counted on."""
    kind = "delta" if hasattr(source.layer, "linear_attn") else "attention"
    build = DeltaNet.of if kind == "delta" else Attention.of
    mixer: Attention | DeltaNet = build(source, slots[kind])
    slots[kind] += 1
    return Layer(
        mixer_norm=source.norm(source.layer.input_layernorm),
        mixer=mixer,
        feed_norm=source.norm(source.layer.post_attention_layernorm),
        feed=Experts.of(source) if hasattr(source.layer.mlp, "experts") else Dense.of(source, "mlp"),
    )
