"""Gated delta net (Yang, Kautz, Hatamizadeh 2025): a convolution over the last few tokens, then a state that each
token reads, corrects and lets fade.

In: a step's tokens, each row's state. Out: what the layer adds to each token; states moved on.

A token's bits must depend neither on its company nor on how its row was cut into steps. So the delta rule works on
chunks of CHUNK tokens at fixed positions and always computes a whole one, from the state before it: the inputs of the
chunk that is open are kept with the row, and its tokens that are not there yet take no part, as every sum over a chunk
multiplies what comes later by 0. Each product has one shape for ever. The rest works on each token by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from qwen_chat.inference.activation import by_rows
from qwen_chat.inference.layer_source import LayerSource
from qwen_chat.inference.lora import Place
from qwen_chat.inference.norm import Norm
from qwen_chat.inference.projection import Projection
from qwen_chat.inference.row_state import CHUNK, RowState, StateShape
from qwen_chat.inference.step import Segment, Step

_EPS = 1e-6  # in the length that queries and keys are divided by


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """`slot` is the layer's place in a row's state.

    The joined outputs are queries and keys (key_heads x key_dim each), values (heads x value_dim), which go through
    the convolution; then the output's gate (heads x value_dim), strength and decay (heads each).
    """

    inputs: Projection
    output: Projection
    filters: torch.Tensor  # (inputs of the convolution, channels), oldest first
    decay: torch.Tensor  # (heads,), negative
    decay_bias: torch.Tensor  # (heads,)
    norm: Norm
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    slot: int
    scale: torch.Tensor  # (2, 1, 1), of queries and keys
    later: torch.Tensor  # (CHUNK, CHUNK): whether a key comes after a query

    @staticmethod
    def of(source: LayerSource, slot: int) -> DeltaNet:
        """Of a layer's `linear_attn`."""
        net = source.layer.linear_attn
        names, order = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"], None
        if hasattr(net, "in_proj_qkvz"):  # Qwen3-Next's outputs lie key head by key head
            names = ["in_proj_qkvz", "in_proj_ba"]
            group = net.num_v_heads // net.num_k_heads
            sizes = [net.head_k_dim, net.head_k_dim, group * net.head_v_dim, group * net.head_v_dim]
            inner, gates = net.num_k_heads * sum(sizes), [group, group]
            rows = torch.arange(inner).view(net.num_k_heads, -1)
            rows_of_gates = torch.arange(inner, inner + 2 * net.num_v_heads).view(net.num_k_heads, -1)
            kinds = (*torch.split(rows, sizes, 1), *torch.split(rows_of_gates, gates, 1))
            order = torch.cat([kind.flatten() for kind in kinds])
        device = net.dt_bias.device
        return DeltaNet(
            inputs=source.join(*[f"linear_attn.{name}" for name in names], order=order),
            output=source.join("linear_attn.out_proj"),
            filters=net.conv1d.weight.detach().float()[:, 0].t().contiguous(),
            decay=-net.A_log.detach().float().exp(),
            decay_bias=net.dt_bias.detach().float(),
            norm=Norm(net.norm.weight.detach().float(), float(net.norm.variance_epsilon)),
            key_heads=net.num_k_heads,
            heads=net.num_v_heads,
            key_dim=net.head_k_dim,
            value_dim=net.head_v_dim,
            slot=slot,
            # x / sqrt(sum(x^2) + eps) by way of the mean; queries are scaled by 1 / sqrt(key_dim) beside.
            scale=torch.tensor([[[1 / net.head_k_dim]], [[1 / math.sqrt(net.head_k_dim)]]], device=device),
            later=torch.tensor(
                [[key > query for key in range(CHUNK)] for query in range(CHUNK)], device=device
            ),
        )

    @property
    def places(self) -> tuple[Place, ...]:
        """What an adapter may change."""
        return (self.inputs.place, self.output.place)

    def state_shape(self, layers: int) -> StateShape:
        """What a row keeps of so many layers like this one."""
        history, channels = self.filters.shape
        sizes = (self.heads, self.key_dim, self.value_dim, channels, history - 1)
        return StateShape(layers, *sizes, self.filters.device)

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x (tokens, hidden) -> (tokens, hidden)"""
        y = self.inputs(x, step).float()
        channels, values = self.filters.shape[1], self.heads * self.value_dim
        gate = by_rows(functional.silu, y[:, channels : channels + values])
        strength = by_rows(torch.sigmoid, y[:, channels + values : -self.heads])
        decay = by_rows(functional.softplus, y[:, -self.heads :].add_(self.decay_bias)) * self.decay
        mixed, inputs = self._convolve(y[:, :channels], step)
        qk, v = mixed[:, :-values].reshape(len(x), 2, self.key_heads, self.key_dim), mixed[:, -values:]
        qk = functional.rms_norm(qk, (self.key_dim,), None, _EPS / self.key_dim)
        qk = (qk * self.scale).repeat_interleave(self.heads // self.key_heads, 2)
        v = v.reshape(len(x), self.heads, self.value_dim)
        gates = torch.stack((decay, strength), 1)
        found = []
        for segment, tokens, own in zip(step.segments, step.tokens, inputs, strict=True):
            found.append(self._advance(segment, qk[tokens], v[tokens], gates[tokens], own))
        a = self.norm(found[0] if len(found) == 1 else torch.cat(found))
        return self.output((a.view(len(x), values) * gate).to(x.dtype), step)

    def _convolve(self, mixed: torch.Tensor, step: Step) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Convolution (into `mixed`) and SiLU, (tokens, channels); and for each segment the inputs of its tokens
        after those before them, (history + tokens, channels)."""
        history = len(self.filters) - 1
        inputs, places = [], []
        begin = 0
        for segment, tokens in zip(step.segments, step.tokens, strict=True):
            state, count = _state(segment), len(segment.ids)
            inputs.append(torch.cat((state.history[self.slot], mixed[tokens])))
            state.history[self.slot] = inputs[-1][count:]
            if segment.drafts:
                state.inputs[self.slot] = inputs[-1]
            places.append(torch.arange(begin, begin + count, device=mixed.device))
            begin += history + count
        whole, place = torch.cat(inputs), torch.cat(places)
        torch.mul(whole[place], self.filters[0], out=mixed)
        for tap in range(1, history + 1):
            mixed += whole[place + tap] * self.filters[tap]
        return by_rows(functional.silu, mixed), inputs

    def _advance(
        self, segment: Segment, qk: torch.Tensor, v: torch.Tensor, gates: torch.Tensor, inputs: torch.Tensor
    ) -> torch.Tensor:
        """One row's tokens through its chunks: (tokens, heads, value_dim)."""
        state, slot = _state(segment), self.slot
        keys_queries, values = state.keys_queries[slot], state.values[slot]
        history = len(self.filters) - 1
        found, first, stop = [], segment.start, segment.start + len(segment.ids)
        while first < stop:
            chunk = first // CHUNK * CHUNK
            last = min(stop, chunk + CHUNK)
            new, places = (
                slice(first - segment.start, last - segment.start),
                slice(first - chunk, last - chunk),
            )
            keys_queries[:, places] = qk[new, 1].transpose(0, 1)
            keys_queries[:, CHUNK + places.start : CHUNK + places.stop] = qk[new, 0].transpose(0, 1)
            values[:, places] = v[new].transpose(0, 1)
            state.gates[slot, :, :, places] = gates[new].permute(1, 2, 0)
            out = delta_chunk(
                state.recurrent[slot],
                keys_queries,
                values,
                state.gates[slot],
                self.later,
                ends=last == chunk + CHUNK,
            )
            found.append(out[:, places].transpose(0, 1))
            if last in segment.keep:
                state.keep(last, slot, inputs[new.stop : new.stop + history])
            first = last
        return found[0] if len(found) == 1 else torch.cat(found)


def delta_chunk(
    state: torch.Tensor,
    keys_queries: torch.Tensor,
    values: torch.Tensor,
    gates: torch.Tensor,
    later: torch.Tensor,
    *,
    ends: bool,
) -> torch.Tensor:
    """The gated delta rule over one chunk: S <- exp(g) S, then S <- S + beta k (v - S k), then the output S q.

    With G the sum of g since the chunk's begin, each token's correction u solves
    u_i = beta_i (v_i - exp(G_i) S k_i - sum over j < i of exp(G_i - G_j) (k_i k_j) u_j), a triangular system.

    Args:
        state: (heads, key_dim, value_dim) before the chunk; moved on in place where the chunk `ends`.
        keys_queries: (heads, 2 CHUNK, key_dim), keys first. values: (heads, CHUNK, value_dim).
        gates: (2, heads, CHUNK), g (at most 0) and beta. later: (CHUNK, CHUNK), see DeltaNet.

    Returns (heads, CHUNK, value_dim).
    """
    heads = len(keys_queries)
    total, strength = gates[0].cumsum(-1), gates[1, :, :, None]
    fade = (total[:, :, None] - total[:, None, :]).masked_fill_(later, float("-inf")).exp_()
    keys = keys_queries[:, :CHUNK]
    scores = torch.bmm(keys_queries, keys.transpose(1, 2)).view(heads, 2, CHUNK, CHUNK) * fade[:, None]
    held = torch.bmm(keys_queries, state).view(heads, 2, CHUNK, -1) * total.exp()[:, None, :, None]
    corrections = torch.linalg.solve_triangular(
        scores[:, 0] * strength, (values - held[:, 0]) * strength, upper=False, unitriangular=True
    )
    out = torch.baddbmm(held[:, 1], scores[:, 1], corrections)
    if ends:
        whole = total[:, -1:]
        state.mul_(whole.exp()[:, :, None])
        state.baddbmm_(keys.transpose(1, 2), corrections * (whole - total).exp()[:, :, None])
    return out


def _state(segment: Segment) -> RowState:
    state = segment.row.state
    assert state is not None, "no room was reserved for the segment"
    return state
