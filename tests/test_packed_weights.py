"""A folder in 4 bits is served as the model that transformers loads from it; GPTQ's groups are what they stand for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qwen_chat import models
from qwen_chat.errors import ModelError
from qwen_chat.inference.decoder import Decoder
from qwen_chat.inference.skeleton import Skeleton
from qwen_chat.weights import stored_tensors
from tests.inference.test_skeleton import logits
from tests.support.tiny_families import tiny_family


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("kind", "dtype"), [("nf4", torch.bfloat16), ("fp4", torch.float32)])
def test_four_bits_are_what_transformers_computes_with(
    kind: str, dtype: torch.dtype, double: bool, tmp_path: Path
) -> None:
    """Its own weights, unpacked by itself, to the bit; so is what is served."""
    tiny_family("qwen2_slide").to(dtype).save_pretrained(tmp_path / "whole")
    way = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=way, dtype=dtype)
    packed.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=dtype)
    wanted = loaded.dequantize().state_dict()
    found = models.float_tensors(tmp_path / "packed")
    assert set(found) == set(stored_tensors(tmp_path / "whole"))
    for name, tensor in found.items():
        assert tensor.shape == wanted[name].shape
        assert torch.equal(tensor.read().to(dtype), wanted[name]), name
    assert torch.equal(
        found["model.layers.1.mlp.up_proj.weight"].read(2, 5),
        wanted["model.layers.1.mlp.up_proj.weight"][2:5],
    )
    for quantize in (None, "int8"):
        skeleton = Skeleton(tmp_path / "packed", torch.float32, narrow=quantize is not None)
        got = logits(Decoder(skeleton, quantize=quantize))
        assert torch.equal(got, logits(Decoder(loaded.float(), quantize=quantize)))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("order", ["in order", "by activation"])
def test_groups_are_what_they_stand_for(bits: int, order: str, tmp_path: Path) -> None:
    """Packed here number by number, as AutoGPTQ's QuantLinear.pack lays them: whole numbers, zero points less one."""
    chance = torch.Generator().manual_seed(0)
    rows, columns, size, each = 64, 96, 32, 32 // bits
    whole = torch.randint(0, 2**bits, (columns, rows), generator=chance)
    zeros = torch.randint(1, 2**bits, (columns // size, rows), generator=chance)
    scales = torch.rand(columns // size, rows, generator=chance).half()
    group = torch.arange(columns) // size
    if order == "by activation":
        group = group[torch.randperm(columns, generator=chance)]
    qweight, qzeros = torch.zeros(columns // each, rows), torch.zeros(columns // size, rows // each)
    qweight, qzeros = qweight.long(), qzeros.long()
    for i in range(columns):
        qweight[i // each] |= whole[i] << (bits * (i % each))
    for j in range(rows):
        qzeros[:, j // each] |= (zeros[:, j] - 1) << (bits * (j % each))
    wanted = torch.tensor(
        [
            [
                float(scales[group[i], j]) * (int(whole[i, j]) - int(zeros[group[i], j]))
                for i in range(columns)
            ]
            for j in range(rows)
        ]
    )
    tiny_family("mistral").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": bits, "group_size": size}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj"
    del tensors[f"{name}.weight"]
    parts = {"qweight": qweight, "qzeros": qzeros, "g_idx": group}
    signed = {f"{name}.{part}": (t - (t >= 2**31).long() * 2**32).int() for part, t in parts.items()}
    save_file(
        {**tensors, **signed, f"{name}.scales": scales}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    found = models.float_tensors(tmp_path)[f"{name}.weight"]
    assert found.shape == (rows, columns)
    assert torch.equal(found.read(), wanted)
    del signed[f"{name}.g_idx"]
    save_file(
        {**tensors, **signed, f"{name}.scales": scales}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"gate_proj\.g_idx is missing; fetch the model again"):
        models.float_tensors(tmp_path)


@pytest.mark.parametrize(
    "way",
    [
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "gptq", "bits": 3},
        {"quant_method": "bitsandbytes"},
    ],
)
def test_other_ways_are_named(way: dict[str, object], tmp_path: Path) -> None:
    tiny_family("mistral").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": way}))
    with pytest.raises(
        ModelError, match=f"weights quantised by {way['quant_method']}, which are not unpacked here"
    ):
        models.float_tensors(tmp_path)
