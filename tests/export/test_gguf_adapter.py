"""A GGUF adapter holds both factors of every layer, under llama.cpp's one scaling."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen_chat.errors import ModelError
from qwen_chat.export.gguf_adapter import write_adapter
from tests.export.test_gguf_file import contents


def adapter_over(base: Path, folder: Path, **more: Any) -> tuple[Path, Any]:
    """Saved and in memory; every value matters."""
    wanted = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **more}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**wanted)
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize(
    "more", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}]
)
def test_the_factors_give_the_change(more: dict[str, Any], tiny_model_path: Path, tmp_path: Path) -> None:
    folder, model = adapter_over(tiny_model_path, tmp_path / "a", **more)
    assert write_adapter(folder, tiny_model_path, tmp_path / "a.gguf", "f32")["tensors"] == 28
    fields, tensors = contents(tmp_path / "a.gguf")
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] == "qwen2"
    for name, place in (
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.v_proj", "attn_v"),
        ("mlp.down_proj", "ffn_down"),
    ):
        first, second = (tensors[f"blk.1.{place}.weight.lora_{half}"].data for half in "ab")
        found = second @ first * (fields["adapter.lora.alpha"] / len(first))
        layer = model.get_submodule(f"base_model.model.model.layers.1.{name}")
        assert np.allclose(found, layer.get_delta_weight("default").detach().numpy(), atol=1e-6)


def test_what_has_no_place_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    folder, _ = adapter_over(tiny_model_path, tmp_path / "a", use_dora=True)
    with pytest.raises(ModelError, match="use_dora in its config, which a GGUF adapter has no place for"):
        write_adapter(folder, tiny_model_path, tmp_path / "a.gguf", "f32")


@pytest.mark.slow
def test_as_llama_cpps_own_converter_writes_it(
    demo_model_path: Path, tmp_path: Path, their_converter: Callable[..., None]
) -> None:
    folder, _ = adapter_over(demo_model_path, tmp_path / "a")
    write_adapter(folder, demo_model_path, tmp_path / "ours.gguf", "f32")
    their_converter(folder, tmp_path / "theirs.gguf", "f32", base=demo_model_path)
    (ours, tensors), (theirs, wanted) = contents(tmp_path / "ours.gguf"), contents(tmp_path / "theirs.gguf")
    named = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
    assert {key for key in named if not key.startswith(("general.", "GGUF."))} == set()
    assert set(tensors) == set(wanted)
    for name, tensor in tensors.items():
        assert np.array_equal(tensor.data, wanted[name].data), name


def test_it_is_read_as_an_adapter(tiny_model_path: Path, tmp_path: Path) -> None:
    folder, _ = adapter_over(tiny_model_path, tmp_path / "a", target_modules=["q_proj"])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert write_adapter(folder, tiny_model_path, tmp_path / "a.gguf", "f16")["type"] == "f16"
    _, tensors = contents(tmp_path / "a.gguf")
    assert {tensor.tensor_type for tensor in tensors.values()} == {gguf.GGMLQuantizationType.F16}
    assert len(tensors) == 4 and config["r"] == 4


def test_an_adapter_that_is_not_whole_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    folder, _ = adapter_over(tiny_model_path, tmp_path / "a", target_modules=["q_proj"])
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, told = load_file(file), config.read_text()

    def refused() -> str:
        with pytest.raises(ModelError) as raised:
            write_adapter(folder, tiny_model_path, tmp_path / "a.gguf", "f32")
        assert not (tmp_path / "a.gguf").exists() or (tmp_path / "a.gguf").unlink() is None
        return str(raised.value)

    save_file(dict(list(whole.items())[1:]), file)
    assert "is missing (1 such)" in refused()
    save_file({name: tensor[:, :-1].contiguous() for name, tensor in whole.items()}, file)
    assert "does not fit this model" in refused()
    save_file({name: tensor * float("nan") for name, tensor in whole.items()}, file)
    assert "holds a number that is not finite" in refused()
    save_file(whole, file)
    file.write_bytes(file.read_bytes()[:-100])
    assert "it has not come down whole" in refused()
    save_file(whole, file)
    for alpha in (float("nan"), 0, "2"):
        config.write_text(json.dumps(json.loads(told) | {"lora_alpha": alpha}))
        assert "lora_alpha is" in refused()
