"""What a model takes while it is served, counted from its files' headers."""

from pathlib import Path

import pytest

from qwen_chat import hardware
from qwen_chat.errors import ModelError
from qwen_chat.inference.quantize import linear_bytes
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
    ("width", "quantize", "layer", "head"),
    [
        (4, None, 640 * 64 * 4, 1000 * 64 * 4),
        (2, None, 640 * 64 * 2, 1000 * 64 * 2),
        (4, "int8", linear_bytes(640, 64, "int8"), linear_bytes(1000, 64, "int8")),
        (4, "int4", linear_bytes(640, 64, "int4"), linear_bytes(1000, 64, "int8")),
    ],
)
def test_each_part_counts_in_its_final_form(width: int, quantize: str | None, layer: int, head: int) -> None:
    beside = 640 * 64 * (width + width // 2)
    ready = 64_000 * 2 + layer + 64 * width + head  # the embedding stays in bfloat16
    assert serving_bytes(TENSORS, width, quantize) == PROGRAM + ready + beside


def test_what_does_not_fit_is_told_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_memory", lambda: serving_bytes(TENSORS, 4, "int8"))
    check_fits(Path("there"), TENSORS, 4, "int8")
    with pytest.raises(ModelError, match=r"there: served it takes about .* give --quantize int8 .*a GPU of"):
        check_fits(Path("there"), TENSORS, 4, None)
    monkeypatch.setattr(hardware, "free_memory", lambda: 1)
    with pytest.raises(ModelError, match="nothing here makes it fit"):
        check_fits(Path("there"), TENSORS, 4, None)
