"""A step of the engine on a stand-in: nothing of the host in its layers, one transfer, its bytes counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qwen_chat.inference.decoder import Decoder
from qwen_chat.inference.kv_cache import KVStore
from qwen_chat.inference.lora import Lora
from qwen_chat.inference.sampling import GenerationRequest, Sampler, choose
from qwen_chat.inference.step import Segment
from qwen_chat.training.memory_plan import GIB, Shape
from tests.support.shapes import QWEN2_5_SEVEN_BILLION
from tests.support.stand_in import counted, fetching
from tests.training.test_memory_plan import small

SHAPES = {
    "Qwen2-7B": QWEN2_5_SEVEN_BILLION,
    "hybrid": small("qwen3_5_text"),
    "mixture": small("qwen3_moe"),
}


def on_meta(config: dict[str, Any]) -> Decoder:
    fields = {k: v for k, v in config.items() if k not in ("model_type", "torch_dtype")}
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **fields), dtype=torch.bfloat16
        )
    return Decoder(model)


def adapter(folder: Path, config: dict[str, Any]) -> Path:
    """A folder with an adapter over the queries and keys of the layers that attend."""
    shape, rank = Shape.of(config), 4
    tensors = {}
    for layer in range(shape.layers):
        for name, (width_in, width_out) in shape.linears(layer).items():
            if name in ("self_attn.q_proj", "self_attn.k_proj"):
                at = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{at}.lora_A.weight"] = torch.zeros(rank, width_in)
                tensors[f"{at}.lora_B.weight"] = torch.zeros(width_out, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(
        r=rank, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM", base_model_name_or_path="base"
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_a_step_leaves_nothing_on_the_host_and_fetches_once(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = SHAPES[name]
    folder = adapter(tmp_path, config)
    with counted("meta") as seen, fetching(monkeypatch) as fetched:
        decoder = on_meta(config)
        lora = Lora(folder, decoder.places)
        store = KVStore(decoder.kv_shape)
        rows = [store.row() for _ in range(8)]
        for row in rows:
            row.reserve(128)
        request = GenerationRequest(range(64), max_tokens=2, temperature=0.0)
        samplers = [Sampler(request) for _ in rows]
        seen.reset_peak()
        stays = seen.live
        who = [lora if number % 2 else None for number in range(8)]
        prompts = [Segment(range(64), 0, row, own) for row, own in zip(rows, who, strict=True)]
        tokens = [Segment([1], 64, row, own) for row, own in zip(rows, who, strict=True)]
        for segments in (prompts, tokens):
            logits = decoder.step(segments)
            assert (logits.shape, logits.device.type) == ((8, decoder.vocabulary), "meta")
            before = len(fetched)
            choose(samplers, logits)
            assert len(fetched) - before <= 1
        assert seen.transfers == 0  # the layers ask for nothing
    assert seen.peak - stays < GIB
    assert seen.peak > 2 * Shape.of(config).parameters
