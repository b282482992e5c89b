"""What a model takes while it is served, counted from its files' headers."""

from pathlib import Path
from typing import Any

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


def refusal(monkeypatch: pytest.MonkeyPatch, free: int, card: int | None = None, **more: Any) -> str:
    monkeypatch.setattr(hardware, "free_memory", lambda: free)
    monkeypatch.setattr(hardware, "device_free", lambda kind: free if kind == "cpu" else card)
    with pytest.raises(ModelError) as error:
        check_fits(Path("there"), TENSORS, **{"width": 4, "quantize": None} | more)
    return str(error.value)


def test_what_does_not_fit_is_told_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    enough = serving_bytes(TENSORS, 4, "int8")
    monkeypatch.setattr(hardware, "free_memory", lambda: enough)
    check_fits(Path("there"), TENSORS, 4, "int8")
    told = refusal(monkeypatch, enough)
    assert told.startswith(
        "there: served it takes about 0.7 GiB of memory and 0.7 can be had; give --quantize int8 ("
    )
    assert "or --quantize int4 (" in told and told.endswith("or a GPU of 1 GiB")
    assert "nothing here makes it fit" in refusal(monkeypatch, 1)


def test_a_card_that_is_too_small_is_told_what_main_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    told = refusal(monkeypatch, 2**40, card=1, width=2, device="cuda")
    assert "GiB on the cuda device and 0.0 can be had; give --device cpu --quantize int8 (0.7 GiB) or" in told
    assert "nothing here makes it fit" in refusal(monkeypatch, 1, card=1, width=2, device="cuda")


def test_a_merge_counts_the_whole_model_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    served, whole = serving_bytes(TENSORS, 4, "int8"), 4 * sum(tensor.numbers for tensor in TENSORS.values())
    told = refusal(monkeypatch, served + whole - 1, quantize="int8", merged=True)
    assert (
        "merged and served it takes about" in told
        and "merge it with `python finetune/merge_adapter.py`" in told
    )
    monkeypatch.setattr(hardware, "free_memory", lambda: served + whole)
    monkeypatch.setattr(hardware, "device_free", lambda kind: served + whole)
    check_fits(Path("there"), TENSORS, 4, "int8", merged=True)
