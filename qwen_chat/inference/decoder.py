"""A loaded model of a family that the engine serves, laid out for decoding: many rows of different length in one step.

In: a transformers model; each step, `Segment`s: the next tokens of some rows, prompts' pieces and single
tokens side by side.
Out: the logits of the rows that asked for them, (rows, vocabulary) float32; of a row with drafts, one more for each.

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
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch.nn import functional

from qwen_chat.errors import ModelError, first_line
from qwen_chat.families import check_served
from qwen_chat.inference.attention import Attention
from qwen_chat.inference.delta_net import DeltaNet
from qwen_chat.inference.feed_forward import Dense, Experts
from qwen_chat.inference.kv_cache import KVShape, KVStore
from qwen_chat.inference.layer import Layer
from qwen_chat.inference.layer_source import LayerSource
from qwen_chat.inference.lora import Lora, Places
from qwen_chat.inference.native.program import Program, choose_path
from qwen_chat.inference.quantize import make_linear, ways
from qwen_chat.inference.skeleton import Skeleton
from qwen_chat.inference.step import (
    Segment,
    Step,
    adapter_groups,
    attention_spans,
    lie_order,
    token_slices,
)
from qwen_chat.inference.transfer import to_device


class Decoder:
    """The model's layers with projections of the same input in one matrix."""

    def __init__(self, model: Any, *, quantize: str | None = None) -> None:
        """model: a transformers model, or the Skeleton of one, which is then read part by part."""
        skeleton = model if isinstance(model, Skeleton) else None
        model = model if skeleton is None else skeleton.model
        filled = (lambda *modules: nullcontext()) if skeleton is None else skeleton.filled
        check_served({"model_type": model.config.model_type}, "this model")
        body = getattr(model.model, "language_model", model.model)  # a multimodal model's text part
        if body.rotary_emb.rope_type in ("dynamic", "longrope"):
            raise ModelError(
                f"rope_type {body.rotary_emb.rope_type!r}: a position would turn by the longest row of a step; "
                "the engine serves fixed ones (default, linear, yarn, llama3); for others use --engine vllm"
            )
        self.vocabulary: int = model.lm_head.weight.shape[0]
        self.dtype: torch.dtype = body.embed_tokens.weight.dtype
        self.device: torch.device = (skeleton or body.embed_tokens.weight).device
        self.context = int(body.config.max_position_embeddings)
        self._rotary = body.rotary_emb
        tied = model.lm_head.weight is body.embed_tokens.weight
        library, decision = choose_path(body, quantize, self.device.type)
        with torch.inference_mode():
            # The head first: nothing needs more room while it is made, and now there is most.
            with filled(model.lm_head, body.layers[0]):
                # It stays in int8 where the layers are in int4. No name for its weight, which would keep it.
                self._head = make_linear(
                    model.lm_head.weight, model.lm_head.bias, quantize and "int8", library
                )
            embedding = body.embed_tokens.weight if skeleton is None else skeleton.embedding()
            self._embedding = embedding.detach()
            slots: Counter[str] = Counter()
            layers = []
            for index, layer in enumerate(body.layers):
                source = LayerSource(layer, index, body, quantize, library)
                with filled(layer, *body.layers[index + 1 : index + 2]):
                    layers.append(_layer(source, slots))
            self._layers = tuple(layers)
            with filled(body.norm):
                self._norm = source.norm(body.norm)
            self._program = None
            if library is not None:
                self._program = Program(library, self._layers, self._norm, self._head, self._rotary)
            self.ways = (*ways(self._layers, self._head, quantize, self.dtype, library), decision)
        attentions = [layer.mixer for layer in self._layers if isinstance(layer.mixer, Attention)]
        deltas = [layer.mixer for layer in self._layers if isinstance(layer.mixer, DeltaNet)]
        self._windows = {attention.window for attention in attentions}
        self._group = attentions[0].heads // attentions[0].kv_heads if attentions else 1
        heads, size = (attentions[0].kv_heads, attentions[0].head_dim) if attentions else (1, 1)
        state = deltas[0].state_shape(len(deltas)) if deltas else None
        self.kv_shape = KVShape(len(attentions), heads, size, self.dtype, state, self.device)
        self.places = Places(
            layers=tuple((*layer.mixer.places, *layer.feed.places) for layer in self._layers),
            vocabulary=self._embedding.shape[0],
            width=self._embedding.shape[1],
            dtype=self.dtype,
            tied=tied,
            device=self.device,
            library=library,
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
        wanted = {
            place: range(own.stop - 1 - segments[place].drafts, own.stop)
            for place, own in zip(order, tokens, strict=True)
            if segments[place].wants_logits
        }
        places = sorted(wanted)
        ids, positions, rows = to_device(
            (
                [token for segment in laid for token in segment.ids],
                [place for s in laid for place in range(s.start, s.start + len(s.ids))],
                [token for place in places for token in wanted[place]],
            ),
            self.device,
        )
        x = functional.embedding(ids, self._embedding).to(self.dtype)
        groups = adapter_groups(laid, tokens)
        for own, adapter in groups:
            adapter.embed(x[own], ids[own])
        if self._program is not None:
            x, logits = self._program.step(laid, groups, x, rows)
        else:
            x = self._norm(self._hidden(laid, tokens, x, positions, groups)[rows])
            logits = self._head(x).float() if wanted else x.new_empty(0, self.vocabulary)
        begin = 0
        for place in places:
            lora, end = segments[place].lora, begin + len(wanted[place])
            if lora is not None:
                lora.correct(logits[begin:end], x[begin:end])
            begin = end
        return logits

    def compile(self) -> str:
        """Join what each layer's feed-forward part does into fewer kernels (torch.compile) and try it on three tokens.

        Returns the line that says what came of it; where it fails, all stays plain.
        """
        plain = self._layers
        try:
            self._layers = tuple(
                replace(layer, feed=cast("Dense | Experts", torch.compile(layer.feed, dynamic=True)))
                for layer in plain
            )
            row = KVStore(self.kv_shape).row()
            row.reserve(3)
            self.step([Segment([0, 0], 0, row)])
            self.step([Segment([0], 2, row)])
        except Exception as error:  # a compiler, its tools and its cache: a dozen kinds
            self._layers = plain
            return f"compile: not possible here ({first_line(error)}); everything runs as without it"
        torch._dynamo.config.suppress_errors = True  # a shape that cannot be compiled later runs plain
        return "compile: the feed-forward parts (as asked)"

    def _hidden(
        self,
        segments: Sequence[Segment],
        tokens: Sequence[slice],
        x: torch.Tensor,
        positions: torch.Tensor,
        groups: Sequence[tuple[slice, Lora]],
    ) -> torch.Tensor:
        """The hidden states (tokens, hidden) after the last layer; x: the tokens' embeddings, positions (tokens,)."""
        cos, sin = self._rotary(x[None], positions[None])
        cos, sin = cos[0, :, None], sin[0, :, None]
        half = sin.shape[-1] // 2
        step = Step(
            segments=segments,
            tokens=tokens,
            groups=groups,
            spans={
                window: attention_spans(segments, positions, self._group, window, x.dtype)
                for window in self._windows
            },
            cos=cos,
            sin=torch.cat((-sin[..., :half], sin[..., half:]), -1),
        )
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
