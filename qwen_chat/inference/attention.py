"""Softmax attention over each row's own keys and values.

In: a step's tokens; its spans. Out: what attention adds to each, and keys and values written to the rows' banks.
A key-value head's queries of a row go through one call, over keys whose number depends on the position alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from qwen_chat.inference.activation import by_rows
from qwen_chat.inference.layer_source import LayerSource
from qwen_chat.inference.lora import Place
from qwen_chat.inference.norm import Norm
from qwen_chat.inference.projection import Projection
from qwen_chat.inference.step import QUERIES, Step

# Model types whose layers have the config's sliding window, if it has one: all of them, or those that it names.
_ALL_LAYERS_SLIDE = ("mistral", "qwen3_moe")
_SOME_LAYERS_SLIDE = ("qwen2", "qwen2_moe", "qwen3")


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped queries, rotated in their first `rotary` numbers; `slot` is the layer's place in a bank.

    The joined outputs are heads of head_dim: queries, keys, values and, where the attention is gated, a gate for
    each query.
    """

    inputs: Projection
    output: Projection
    norm: Norm | None  # of queries and keys, (heads + kv heads, head_dim)
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    window: int | None  # tokens that a token attends to, itself included
    is_gated: bool
    slot: int

    @staticmethod
    def of(source: LayerSource, slot: int) -> Attention:
        """Of a layer's `self_attn`."""
        config, attention = source.config, source.layer.self_attn
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
        is_gated = attention.q_proj.out_features == 2 * heads * size
        order = norm = None
        if is_gated:  # each head's query and gate lie together: all gates go behind the values
            rows = torch.arange(2 * heads * size).view(heads, 2, size)
            behind = torch.arange(2 * heads * size, 2 * (heads + kv_heads) * size)
            order = torch.cat((rows[:, 0].flatten(), behind, rows[:, 1].flatten()))
        if getattr(attention, "q_norm", None) is not None:
            norm = source.norm(attention.q_norm, attention.k_norm, heads=(heads, kv_heads))
        slides = config.model_type in _ALL_LAYERS_SLIDE or (
            config.model_type in _SOME_LAYERS_SLIDE
            and config.layer_types[source.index] == "sliding_attention"
        )
        return Attention(
            inputs=source.join("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", order=order),
            output=source.join("self_attn.o_proj"),
            norm=norm,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=size,
            rotary=2 * len(source.body.rotary_emb.inv_freq),
            window=(config.sliding_window or None) if slides else None,
            is_gated=is_gated,
            slot=slot,
        )

    @property
    def places(self) -> tuple[Place, ...]:
        """What an adapter may change."""
        return (self.inputs.place, self.output.place)

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x (tokens, hidden) -> (tokens, hidden)"""
        keys, rotary = self.heads + self.kv_heads, self.rotary
        heads = self.inputs(x, step).view(len(x), -1, self.head_dim)
        qk = out = heads[:, :keys]
        if self.norm is not None:
            qk = self.norm(qk)
        if rotary < self.head_dim:
            if qk is not out:
                out[..., rotary:] = qk[..., rotary:]
            qk, out = qk[..., :rotary], out[..., :rotary]
        torch.addcmul(qk * step.cos, qk.roll(rotary // 2, -1), step.sin, out=out)
        a = self._attend(heads, step)
        if self.is_gated:
            a = a * by_rows(torch.sigmoid, heads.flatten(1)[:, -a.shape[1] :])
        return self.output(a, step)

    def _attend(self, all_heads: torch.Tensor, step: Step) -> torch.Tensor:
        """Write keys and values, then attend, a span at a time. all_heads (tokens, .., head_dim), rotated; returns
        (tokens, heads x head_dim)."""
        heads, kv_heads, size = self.heads, self.kv_heads, self.head_dim
        group, end = heads // kv_heads, heads + 2 * kv_heads
        found = []
        for span in step.spans[self.window]:
            kv, new = span.bank.layers[self.slot], all_heads[span.tokens]
            if span.is_run:
                kv[span.slot_ids, :, span.positions] = new[:, heads:end]
                queries = new[:, :heads].reshape(-1, kv_heads, group, size)
            else:
                kv[span.slots.start, :, span.places] = new[:, heads:end].transpose(0, 1)
                queries = new[:, :heads].reshape(-1, kv_heads, group, size).transpose(0, 1)
                queries = queries.reshape(1, kv_heads, -1, size)
            held, count = kv[span.slots, :, span.keys], queries.shape[2]
            queries = functional.pad(queries, (0, 0, 0, -count % QUERIES))
            attended = functional.scaled_dot_product_attention(
                queries, held[:, :kv_heads], held[:, kv_heads:], attn_mask=span.mask
            )[:, :, :count]
            if not span.is_run:
                attended = attended.reshape(kv_heads, -1, group, size).transpose(0, 1)
            found.append(attended.reshape(-1, heads * size))
        return found[0] if len(found) == 1 else torch.cat(found)
