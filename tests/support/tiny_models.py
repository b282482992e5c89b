"""Tiny models and data on which the training engine's exactness is tested."""

import importlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from qwen_chat import demo_model
from qwen_chat.chat.encoded import Encoded
from qwen_chat.training.batches import Collator, RowDataset, WindowSampler
from qwen_chat.training.loss import ModelLoss

VOCABULARY = 97
# Bytes: chunks of seven tokens, so that every row has several and a short last one.
SEVEN_TOKENS = 4 * VOCABULARY * 7
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
# Three layers of delta nets and one of attention. transformers multiplies experts in float64 one by one alone.
HYBRIDS = {
    "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM),
    "qwen3_5_text": (Qwen3_5TextConfig, Qwen3_5ForCausalLM),
    "qwen3_5_moe_text": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM),
}
DELTA_NETS: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "experts_implementation": "eager",
}
# The other part of a model that sees.
VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}


def tiny_model(
    family: str,
    *,
    lora: bool = False,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float64,
    attention: str = "qwen_chat",
    tied: bool = True,
) -> Any:
    """Two layers (a hybrid: four), grouped queries, seeded; the same weights for the same arguments."""
    from qwen_chat.training.attention import register

    register()
    torch.manual_seed(7)
    config_class, model_class = (FAMILIES | HYBRIDS)[family]
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "attn_implementation": attention,
    }
    model = model_class(config_class(**shape | (DELTA_NETS if family in HYBRIDS else {}))).to(dtype)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first: then A would have no gradient to compare
                torch.nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora:
            model.enable_input_require_grads()
    return model.train()


def modeling(family: str) -> Any:
    name = family.removesuffix("_text")
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own float32 passages (delta rule, decays, norms) in float64, so that nothing is rounded away."""

    class Torch:
        float32 = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    for family in HYBRIDS:
        monkeypatch.setattr(modeling(family), "torch", Torch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def conversation(rng: random.Random, prefix: list[int], own: int, supervised: int | None = None) -> Encoded:
    """`prefix`, then `own` random tokens, the last `supervised` of which are supervised (default: half)."""
    tokens = [rng.randrange(VOCABULARY) for _ in range(own)]
    supervised = own // 2 if supervised is None else supervised
    ids = prefix + tokens
    return Encoded(ids, [(len(ids) - supervised, len(ids))] if supervised else [])


def mixed_data(seed: int = 0) -> list[tuple[Encoded, ...]]:
    """Prefixes of every kind: a shared system prompt, turns of one conversation, duplicates, loners."""
    rng = random.Random(seed)
    system = [rng.randrange(VOCABULARY) for _ in range(40)]
    data: list[tuple[Encoded, ...]] = [(conversation(rng, system, 20 + i),) for i in range(4)]
    turns = system + [rng.randrange(VOCABULARY) for _ in range(60)]
    data.append(
        (
            conversation(rng, turns[:60], 9),
            conversation(rng, turns[:80], 9),
            conversation(rng, turns, 30),
        )
    )
    data.append(data[0])  # the same conversation twice counts twice
    data.append((conversation(rng, [], 33),))
    data.append((conversation(rng, [], 5, supervised=0),))  # nothing to learn
    data.append((Encoded(system, [(30, 40)]),))  # its labels lie inside the shared prefix
    return data


def reference(model: Any, data: list[tuple[Encoded, ...]]) -> tuple[float, torch.Tensor]:
    """Every sequence alone, transformers' own loss over all logits: (sum of losses, all gradients)."""
    model.zero_grad()
    total = 0.0
    for sequence in (sequence for sequences in data for sequence in sequences):
        if all(label == -100 for label in sequence.labels):
            continue
        ids, labels = torch.tensor([sequence.input_ids]), torch.tensor([sequence.labels])
        logits = model(input_ids=ids).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def gradients(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def engine(model, data, layout, batch_size, accumulation, chunk_bytes=SEVEN_TOKENS, in_passes=False):
    """One optimizer step's rows through the engine: (sum of losses, supervised tokens, gradients)."""
    loss = ModelLoss(model, chunk_bytes=chunk_bytes, in_passes=in_passes)
    sampler = WindowSampler(
        data, batch_size=batch_size, accumulation=accumulation, max_length=200, layout=layout
    )
    model.zero_grad()
    total, tokens, rows = 0.0, 0, RowDataset(data)
    for batch in sampler:
        result = loss(model, Collator()([rows[row] for row in batch]))
        result.loss_sum.backward()
        total += result.loss_sum.item()
        tokens += result.tokens
    loss.remove()
    return total, tokens, gradients(model)


def hybrid_folder(name: str, folder: Path) -> Path:
    """A tiny hybrid as save_pretrained writes it, with Qwen's vocabulary; qwen3_5 and qwen3_5_moe see, too."""
    tokenizer = demo_model.qwen_tokenizer()
    text = {key: value for key, value in DELTA_NETS.items() if key != "experts_implementation"}
    text |= {"vocab_size": 151_936, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048}
    text |= {"tie_word_embeddings": True, "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>")}
    torch.manual_seed(7)
    if name in ("qwen3_5", "qwen3_5_moe"):
        whole = {"text_config": text, "vision_config": VISION, "tie_word_embeddings": True}
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **whole))
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **text))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}\n")
    return folder
