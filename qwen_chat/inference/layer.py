"""One layer of a decoder.

In: its mixer, its feed-forward part, their norms. Out: a frozen record of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_chat.inference.attention import Attention
from qwen_chat.inference.delta_net import DeltaNet
from qwen_chat.inference.feed_forward import Dense, Experts
from qwen_chat.inference.norm import Norm


@dataclass(frozen=True, slots=True)
class Layer:
    """Two parts, each with a norm before it, added to what came in."""

    mixer_norm: Norm
    mixer: Attention | DeltaNet
    feed_norm: Norm
    feed: Dense | Experts
