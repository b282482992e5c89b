"""What a model's config.json tells: whether it can be trained here, how many positions it knows.

In: a config.json as a dict. Out: a ModelError, a note, or nothing. Nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_chat.errors import ModelError

# Model types whose rows are shown to be right (tests/training/test_probe.py); any other is proven or refused
# (training/probe.py).
TRAINABLE = (
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_text",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "llama",
    "mistral",
    "phi3",
    "gemma",
    "olmo2",
    "smollm3",
)
# What in a config.json tells for certain that rows of several conversations would be learnt wrong, and why.
# Kinds of layers that keep conversations apart.
_ATTENDS = {"full_attention", "attention", "sliding_attention", "chunked_attention"}
# Types whose recurrent layers keep them apart too (training/delta_net.py), and the kind of these layers.
_HYBRIDS = {"qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"}
_DELTA = {"linear_attention"}
_STATE = "layers carry a state from one conversation of a row into the next"
# Settings of convolutions, recurrences and their places, from transformers' hybrid models.
_STATES = (
    "linear_conv_kernel_dim",
    "mamba_d_conv",
    "mamba_d_state",
    "conv_L_cache",
    "conv_kernel",
    "ssm_state_size",
    "linear_attn_config",
    "lru_width",
)
_LOGITS = "the logits are changed after the head, inside which the loss is formed"
_SCORES = "the attention over rows knows no cap on its scores"
_CHANGES = {
    "final_logit_softcapping": _LOGITS,
    "logit_scale": _LOGITS,
    "logits_scaling": _LOGITS,
    "lm_head_multiplier": _LOGITS,
    "attn_logit_softcapping": _SCORES,
}
_SINKS = {"gpt_oss": "the attention over rows has no sinks"}


def check_trainable(config: Mapping[str, Any], file: object) -> None:
    """Raise ModelError where rows of several conversations would certainly be learnt wrong. `file`: its name."""
    if why := _why_not_trained(config):
        raise ModelError(
            f"{file}: a model of type '{config.get('model_type')}' cannot be trained here: {why};"
            f" model types that work: {', '.join(TRAINABLE)}"
        )


def _why_not_trained(config: Mapping[str, Any]) -> str:
    """What in a config.json (or its text_config) tells for certain that training would be wrong; else ""."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        types = part.get("layer_types")
        apart = _ATTENDS | _DELTA if config.get("model_type") in _HYBRIDS else _ATTENDS
        others = {str(kind) for kind in types} - apart if isinstance(types, list) else set()
        if others:
            return f"layer_types has {', '.join(sorted(others))}: {_STATE}"
        known = {"linear_conv_kernel_dim"} if apart is not _ATTENDS else set()
        if state := [name for name in _STATES if part.get(name) is not None and name not in known]:
            return f"it has {state[0]}: {_STATE}"
        for name, why in _CHANGES.items():
            if part.get(name) not in (None, 1, 1.0):
                return f"{name} is {part[name]}: {why}"
        if (kind := part.get("model_type")) in _SINKS:
            return _SINKS[kind]
    return ""


def positions_note(config: Mapping[str, Any], longest: int) -> tuple[str, ...]:
    """A line where conversations have more tokens (`longest`) than a config.json has positions, else nothing."""
    text = config.get("text_config") or config
    known = int(text.get("max_position_embeddings") or 0)
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if "original_max_position_embeddings" in rope:  # YaRN: what was trained, times the factor
        known = max(known, int(rope["original_max_position_embeddings"] * float(rope.get("factor") or 1)))
    if not 0 < known < longest:
        return ()
    return (
        f"conversations of up to {longest:,} tokens for a model of {known:,} positions (max_position_embeddings):"
        f" it never saw the ones beyond, and no prompt that long is served; --model_max_length {known} leaves them out",
    )
