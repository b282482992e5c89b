"""What a layer does to each token by itself: a dense network, or some of many experts.

In: a step's tokens. Out: what is added to each. Which experts a token gets, and what they add, depends on that token
alone: an expert's products give a row the same bits among any others, and its experts add up in their own order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from qwen_chat.inference.activation import by_rows
from qwen_chat.inference.layer_source import LayerSource
from qwen_chat.inference.lora import Place
from qwen_chat.inference.projection import Projection
from qwen_chat.inference.quantize import FloatLinear, Linear, make_linear
from qwen_chat.inference.step import Step


@dataclass(frozen=True, slots=True)
class Dense:
    """down(activation(gate(x)) * up(x)). `has_switch`: one more output of the first layer, whose sigmoid scales the
    result (a shared expert's)."""

    gate_up: Projection
    down: Projection
    activation: Callable[[torch.Tensor], torch.Tensor]
    has_switch: bool = False

    @staticmethod
    def of(source: LayerSource, path: str, *switch: str) -> Dense:
        """Of the network at `path` in a layer; switch: the path of what scales its result."""
        return Dense(
            gate_up=source.join(f"{path}.gate_proj", f"{path}.up_proj", *switch),
            down=source.join(f"{path}.down_proj"),
            activation=source.layer.get_submodule(path).act_fn,
            has_switch=bool(switch),
        )

    @property
    def places(self) -> tuple[Place, ...]:
        """What an adapter may change."""
        return (self.gate_up.place, self.down.place)

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x (tokens, hidden) -> (tokens, hidden)"""
        y = self.gate_up(x, step)
        if not self.has_switch:
            gate, up = y.chunk(2, -1)
            return self.down(by_rows(self.activation, gate) * up, step)
        gate, up = y[:, :-1].chunk(2, -1)
        switch = by_rows(torch.sigmoid, y[:, -1:])
        return self.down(by_rows(self.activation, gate) * up, step).mul_(switch)


@dataclass(frozen=True, slots=True)
class ExpertByExpert:
    """Experts one after the other, each over its own tokens: which there are, the host must know."""

    gate_up: tuple[Linear, ...]
    down: tuple[Linear, ...]
    activation: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, x: torch.Tensor, experts: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """x (tokens, hidden), experts and scores (tokens, chosen) -> (tokens, hidden)"""
        y = torch.zeros_like(x)
        for expert in sorted(set(experts.flatten().tolist())):
            tokens, place = (experts == expert).nonzero(as_tuple=True)
            gate, up = self.gate_up[expert](x[tokens]).chunk(2, -1)
            found = self.down[expert](by_rows(self.activation, gate) * up)
            y.index_add_(0, tokens, found * scores[tokens, place, None])
        return y


@dataclass(frozen=True, slots=True)
class GroupedExperts:
    """All experts in two products of torch's, over the pairs of token and expert in the experts' order. Shapes depend
    on no choice, so an accelerator's host waits for nothing. gate_up (experts, 2 x inner, hidden); down (experts,
    hidden, inner)."""

    gate_up: torch.Tensor
    down: torch.Tensor
    activation: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, x: torch.Tensor, experts: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """As ExpertByExpert."""
        pairs, order = experts.flatten().sort(stable=True)
        every = torch.arange(len(self.gate_up), device=x.device)
        ends = torch.searchsorted(pairs, every, right=True).int()
        inputs = x[order // experts.shape[1]]
        gate, up = functional.grouped_mm(inputs, self.gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        found = functional.grouped_mm(self.activation(gate) * up, self.down.transpose(1, 2), offs=ends)
        by_token = torch.empty_like(found)
        by_token[order] = found
        return (by_token.view(*experts.shape, -1) * scores[..., None]).sum(1)


@dataclass(frozen=True, slots=True)
class Experts:
    """The `chosen` best of a router, weighted by its probabilities (scaled to 1 where `is_normed`), and the expert
    that every token has, if there is one."""

    router: Linear
    routed: ExpertByExpert | GroupedExperts
    shared: Dense | None
    chosen: int
    is_normed: bool

    @staticmethod
    def of(source: LayerSource) -> Experts:
        """Of a layer's `mlp`. The router stays in float: rounding would choose other experts."""
        mlp, shared = source.layer.mlp, None
        if hasattr(mlp, "shared_expert"):
            shared = Dense.of(source, "mlp.shared_expert", "mlp.shared_expert_gate")
        weights = [one.detach() for one in (mlp.experts.gate_up_proj, mlp.experts.down_proj)]
        routed: ExpertByExpert | GroupedExperts
        if weights[0].device.type == "cpu":
            linears = [tuple(make_linear(one, None, source.quantize) for one in some) for some in weights]
            routed = ExpertByExpert(linears[0], linears[1], mlp.experts.act_fn)
        else:
            routed = GroupedExperts(weights[0], weights[1], mlp.experts.act_fn)
        return Experts(
            router=FloatLinear(mlp.gate.weight),
            routed=routed,
            shared=shared,
            chosen=mlp.gate.top_k,
            is_normed=getattr(mlp.gate, "norm_topk_prob", True),
        )

    @property
    def places(self) -> tuple[Place, ...]:
        """What an adapter may change: not the experts that share a weight."""
        return () if self.shared is None else self.shared.places

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x (tokens, hidden) -> (tokens, hidden)"""
        scores, experts = self.router(x).float().softmax(-1).topk(self.chosen, -1)
        if self.is_normed:
            scores /= scores.sum(-1, keepdim=True)
        y = self.routed(x, experts, scores.to(x.dtype))
        return y if self.shared is None else y + self.shared(x, step)
