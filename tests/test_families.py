"""What a config.json tells: refusals for training, and positions that a model never saw."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_chat import families, models
from qwen_chat.errors import ModelError


@pytest.mark.parametrize(
    ("config", "longest", "known"),
    [
        ({"max_position_embeddings": 4096}, 4096, None),
        ({"max_position_embeddings": 4096}, 9718, "4,096"),
        ({"text_config": {"max_position_embeddings": 4096}}, 9718, "4,096"),
        (
            {"max_position_embeddings": 1024, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            1025,
            "1,024",
        ),
        ({}, 9718, None),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131_072,
            None,
        ),
    ],
)
def test_conversations_longer_than_the_model_has_positions(
    config: dict[str, Any], longest: int, known: str | None
) -> None:
    note = families.positions_note(config, longest)
    assert len(note) == (known is not None)
    if known is not None:
        start = f"conversations of up to {longest:,} tokens for a model of {known} positions "
        assert note[0].startswith(start) and note[0].endswith("leaves them out")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            {"model_type": "new_hybrid", "layer_types": ["full_attention", "linear_attention"]},
            "linear_attention",
        ),
        ({"model_type": "olmo_hybrid", "linear_conv_kernel_dim": 4}, "it has linear_conv_kernel_dim"),
        ({"model_type": "qwen3_next", "mamba_d_conv": 4}, "it has mamba_d_conv"),
        ({"model_type": "qwen3_5", "text_config": {"layer_types": ["conv"]}}, "layer_types has conv"),
        ({"model_type": "lfm2", "conv_L_cache": 3}, "it has conv_L_cache"),
        ({"model_type": "falcon_h1", "mamba_d_state": 64}, "it has mamba_d_state"),
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"model_type": "cohere", "logit_scale": 0.0625}, "logit_scale is 0.0625"),
        ({"model_type": "granite", "logits_scaling": 8}, "logits_scaling is 8"),
        ({"model_type": "gpt_oss"}, "no sinks"),
    ],
)
def test_what_a_config_tells_is_refused_for_training_alone(
    config: dict[str, object], why: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    assert models.resolve(str(tmp_path)) == tmp_path  # others can serve it
    with pytest.raises(ModelError, match=why) as caught:
        models.resolve(str(tmp_path), for_training=True)
    text = str(caught.value)
    assert text.startswith(
        f"{tmp_path}/config.json: a model of type '{config['model_type']}' cannot be trained"
    )
    assert text.endswith(f"model types that work: {', '.join(families.TRAINABLE)}") and "\n" not in text


@pytest.mark.parametrize(
    "more",
    [
        {"layer_types": ["full_attention", "sliding_attention"]},
        {
            "final_logit_softcapping": None,
            "logit_scale": 1,
            "logits_scaling": 1.0,
            "attn_logit_softcapping": None,
        },
        {"text_config": None, "layer_types": None},
        {"model_type": "qwen3_next", "layer_types": ["linear_attention"], "linear_conv_kernel_dim": 4},
        {
            "model_type": "qwen3_5",
            "text_config": {"model_type": "qwen3_5_text", "layer_types": ["linear_attention"]},
        },
    ],
)
def test_what_is_harmless_in_a_config_passes(more: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text"} | more))
    (tmp_path / "model.safetensors").touch()
    assert models.resolve(str(tmp_path), for_training=True) == tmp_path
