"""What a model takes while it is served, counted from its files' headers."""

from pathlib import Path

import pytest

from qwen_chat import hardware
from qwen_chat.errors import ModelError
from qwen_chat.inference.size import PROGRAM, check_fits, serving_bytes
from qwen_chat.weights import StoredTensor

NUMBERS = {
    "model.embed_tokens.weight": (1000, 64),
    "model.layers.0.mlp.up_proj.weight": (640, 64),
    "model.norm.weight": (64,),
    "lm_head.weight": (1000, 64),
}
TENSORS = {name: StoredTensor(Path("x"), name, "BF16", shape, 0) for name, shape in NUMBERS.items()}


@pytest.mark.parametrize(
    ("width", "quantize", "layer", "head", "embedding"),
    [(4, None, 4.0, 4.0, 2), (2, None, 2.0, 2.0, 2), (4, "int8", 1.0, 1.0, 2), (4, "int4", 0.625, 1.0, 2)],
)
def test_each_part_counts_in_its_final_form(
    width: int, quantize: str | None, layer: float, head: float, embedding: int
) -> None:
    beside = 640 * 64 * (width + width // 2)
    ready = 64_000 * embedding + 640 * 64 * layer + 64 * width + 64_000 * head
    assert serving_bytes(TENSORS, width, quantize) == PROGRAM + ready + beside


def test_what_does_not_fit_is_told_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_memory", lambda: serving_bytes(TENSORS, 4, "int8"))
    check_fits(Path("there"), TENSORS, 4, "int8")
    with pytest.raises(ModelError, match=r"there: served it takes about .* give --quantize int8 .*a GPU of"):
        check_fits(Path("there"), TENSORS, 4, None)
    monkeypatch.setattr(hardware, "free_memory", lambda: 1)
    with pytest.raises(ModelError, match="nothing here makes it fit"):
        check_fits(Path("there"), TENSORS, 4, None)
