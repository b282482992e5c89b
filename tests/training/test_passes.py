"""A row in passes: the loss and gradients of the whole row, with a part of its activations."""

import pytest

from qwen_chat.training import loss as loss_module
from qwen_chat.training.packing import passes
from tests.support.tiny_models import engine, mixed_data, reference, relative, tiny_model


@pytest.fixture
def short_passes(monkeypatch):
    """Passes of about 40 tokens, so that tiny rows have several; returns those that were made."""
    made = []

    def cut(layout):
        made.append(passes(layout, 40))
        return made[-1]

    monkeypatch.setattr(loss_module, "passes", cut)
    return made


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_passes_equal_separate(family, lora, checkpointing, short_passes):
    """1e-6 relative in double precision, as whole rows."""
    data = mixed_data()
    model = tiny_model(family, lora=lora, checkpointing=checkpointing)
    expected_loss, expected = reference(model, data)
    for layout, batch_size, accumulation in [
        ("shared_prefix", 9, 1),
        ("shared_prefix", 3, 3),
        ("packed", 9, 1),
        ("padded", 3, 3),
    ]:
        loss, _, found = engine(model, data, layout, batch_size, accumulation, in_passes=True)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert relative(found, expected) < 1e-6
    assert any(part.branches for parts in short_passes for part in parts)
    assert any(len(parts) > 2 for parts in short_passes)
