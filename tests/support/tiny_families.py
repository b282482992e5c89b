"""A tiny random model of each family that the engine serves, with weights large enough that every token matters."""

from typing import Any

import torch

VOCABULARY = 512
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 32,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
_SHARED = {**_EXPERTS, "shared_expert_intermediate_size": 64}
# What sets each apart; "slide" ones have a window that is no multiple of anything.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_slide": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 37, "max_window_layers": 1, "num_key_value_heads": 2},
    ),
    "qwen2_moe": ("qwen2_moe", {**_SHARED, "decoder_sparse_step": 2}),
    "qwen3_slide": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 2, "head_dim": 32},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {**_EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [1], "head_dim": 32},
    ),
    "qwen3_moe_slide": ("qwen3_moe", {**_EXPERTS, "use_sliding_window": True, "sliding_window": 64}),
    "qwen3_next": ("qwen3_next", {**_DELTA, **_SHARED, "mlp_only_layers": [0]}),
    "qwen3_5_text": ("qwen3_5_text", _DELTA),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**_DELTA, **_SHARED}),
    "mistral": ("mistral", {"sliding_window": 45, "head_dim": 16}),
    "mistral_full": ("mistral", {"sliding_window": None, "head_dim": 32}),
}


def family_config(name: str, **more: Any) -> Any:
    """A config of three layers and 512 positions."""
    from transformers import AutoConfig

    model_type, own = FAMILIES[name]
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(model_type, **{**common, **own, **more})


def shake(model: Any, seed: int = 0) -> Any:
    """Every weight that an initialisation leaves at one value becomes random: norms, biases, decays, filters."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight", "layernorm.weight")):
                parameter += 0.3 * torch.randn_like(parameter)
            elif name.endswith("A_log"):
                parameter.copy_(torch.randn_like(parameter) - 1)
            elif name.endswith("conv1d.weight"):
                parameter.normal_(std=0.5)
    return model.eval()


def tiny_family(name: str, seed: int = 0, **more: Any) -> Any:
    """The same weights for the same arguments."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return shake(AutoModelForCausalLM.from_config(family_config(name, **more)), seed)


def tiny_conditional(name: str = "qwen3_5", seed: int = 0) -> Any:
    """A whole Qwen3.5: the text model of its family, and a vision part that text never meets."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
    }
    text = family_config(f"{name}_text").to_dict()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, text_config=text, vision_config=vision, tie_word_embeddings=True)
    return shake(AutoModelForImageTextToText.from_config(config), seed)


def byte_tokenizer() -> Any:
    """Byte-level, 256 bytes and a few special tokens; id n < 256 is a byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from qwen_chat.inference.text import _BYTE_OF

    raw = Tokenizer(models.BPE(vocab=dict(_BYTE_OF), merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>")
