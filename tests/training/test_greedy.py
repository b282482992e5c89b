"""The trained model's own replies, for its certificate: within their time, or none."""

import time
from types import SimpleNamespace
from typing import Any

import torch

from qwen_chat.training.greedy import replies


class Slow:
    """A model that takes a fiftieth of a second for any number of tokens, and counts them."""

    device, training = torch.device("cpu"), True

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        self.tokens.append(input_ids.numel())
        time.sleep(0.02)
        return SimpleNamespace(logits=torch.eye(7)[3].expand(len(input_ids), 1, 7), past_key_values=None)

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool) -> None:
        self.training = mode


def test_a_slow_model_is_given_up_after_one_token() -> None:
    model = Slow()
    found = replies(model, [[1, 2, 3], [4]], [], seconds=0.25)  # type: ignore[arg-type]
    assert (found.replies, found.note[:9]) == ((), "none: the")
    assert model.tokens == [1]
    assert model.training


def test_else_all_prompts_are_answered_together() -> None:
    model = Slow()
    found = replies(model, [[1, 2, 3], [4]], [], seconds=30)  # type: ignore[arg-type]
    assert [reply.ids for reply in found.replies] == [(3,) * 16] * 2
    assert model.tokens == [1, 6, *[2] * 15]
