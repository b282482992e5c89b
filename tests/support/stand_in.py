"""The stand-in for a GPU as tests use it: a counter around some work, and an engine's steps held against it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from qwen_chat.inference import transfer
from qwen_chat.training.stand_in import StandIn


@contextmanager
def counted(device: str) -> Iterator[StandIn]:
    """Count the tensors of "meta" or "cpu" that are made inside."""
    with StandIn(device) as seen:
        yield seen


@contextmanager
def fetching(patch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    """The engine's one transfer to the host replaced: it gives zeros, and the list its shapes."""
    fetched: list[torch.Size] = []

    def stand_in(found: torch.Tensor) -> torch.Tensor:
        fetched.append(found.shape)
        return torch.zeros(found.shape, dtype=found.dtype)

    with patch.context() as inner:
        inner.setattr(transfer, "to_host", stand_in)
        yield fetched
