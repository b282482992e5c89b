"""The loss that keeps the experts of a mixture in use alike, of each sequence as if it were alone.

In: a row's router logits, a tensor [T, experts] a layer, and the row's layout. Out: the sum over its sequences of
Switch Transformer's auxiliary loss (arXiv:2101.03961, equations 4 to 6) over all layers at once, as transformers
defines it: experts x sum over experts of (share of tokens that chose it x mean probability that the router gave it).

It is no sum over tokens: of a row as one text it would depend on what shares the row. So both means are taken over
the tokens of one sequence. A shared prefix counts in each that begins with it, and padding in none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qwen_chat.families import BALANCED


@dataclass(frozen=True, slots=True)
class RouterLoss:
    """What config.json says of it."""

    experts: int
    chosen: int  # for a token
    coefficient: float

    @classmethod
    def of(cls, config: Any) -> RouterLoss | None:
        """Of a model's config; None where it is off, as in transformers' defaults."""
        text = config.get_text_config()
        if text.model_type not in BALANCED or not text.output_router_logits or not text.router_aux_loss_coef:
            return None
        return cls(text.num_experts, text.num_experts_per_tok, float(text.router_aux_loss_coef))

    def __call__(self, logits: Sequence[torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum over the sequences of a collated row, without the coefficient; a scalar with gradient.

        logits: [T, experts] of each layer that has experts.
        """
        segments, last = batch["segments"], batch["last_tokens"]
        tokens, device = logits[0].shape[0], logits[0].device
        exact = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
        if not len(last):  # a filler row
            return torch.zeros((), dtype=exact, device=device)
        # Token by token over all layers. Who is chosen is read from float32 shares, as the router itself does.
        shares, choices = (torch.zeros(tokens, self.experts, dtype=exact, device=device) for _ in range(2))
        for layer in logits:
            share = layer.to(device, exact).softmax(-1)
            chosen = share.detach().topk(self.chosen, -1).indices
            choices.scatter_add_(-1, chosen, choices.new_ones(()).expand_as(chosen))
            shares = shares + share
        # A sequence holds the segments that its last token sees, up to that token: in a padded row the rest is padding.
        starts, stops, ends = segments.unbind(1)
        holds = (starts <= last[:, None]) & (last[:, None] < ends)
        reach = torch.where(holds, last[:, None], -1).amax(0)
        own = torch.repeat_interleave(
            torch.arange(len(segments), device=device), stops - starts, output_size=tokens
        )
        real = (torch.arange(tokens, device=device) <= reach[own])[:, None]
        # Sums by adding rows, no matmul: autocast or TF32 would round it.
        sequence, segment = holds.nonzero(as_tuple=True)
        summed = []
        for each in (choices, shares):
            in_segments = each.new_zeros(len(segments), self.experts).index_add(0, own, each * real)
            in_sequences = each.new_zeros(len(last), self.experts)
            summed.append(in_sequences.index_add(0, sequence, in_segments[segment]))
        counted = (batch["position_ids"][0, last] + 1).to(exact) * len(logits)
        return self.experts * ((summed[0] * summed[1]).sum(-1) / counted**2).sum()
