"""The table of families, and what a config.json tells: refusals, and positions that a model never saw."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from qwen_chat import families, models
from qwen_chat.errors import ModelError

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = "qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text llama mistral"


def test_the_table_has_each_type_once() -> None:
    types = [family.model_type for family in families.TABLE]
    assert len(types) == len(set(types))
    assert set(REQUIRED.split()) <= set(families.ENGINE_SERVES) <= set(families.TRAINABLE) == set(types)
    assert set(families.HYBRIDS) < set(types)


@pytest.mark.parametrize("family", families.TABLE, ids=lambda family: family.model_type)
def test_what_the_table_names_exists(family: families.ModelFamily) -> None:
    """Its tests are there, its layouts are the run's, its dialects are among those that are spoken."""
    from transformers import CONFIG_MAPPING

    from qwen_chat.training.packing import LAYOUTS

    assert family.model_type in CONFIG_MAPPING
    assert set(family.trains) <= set(LAYOUTS)
    words = family.dialect.replace("(", "").replace(")", "").replace(",", "").split()
    spoken = {"hermes", "qwen_agent", "xml"}
    assert family.dialect == families.PROBED or set(words) - {"Qwen2:", "Coder:"} <= spoken
    assert family.proven
    for test in family.proven:
        file, name = test.split("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_the_table_is_shown_as_it_is() -> None:
    listing, page = families.listing().splitlines(), families.families_table().splitlines()
    assert len(listing) == len(page) - 1 == len(families.TABLE) + 1
    for family, line, row in zip(families.TABLE, listing[1:], page[2:], strict=True):
        assert line.split()[0] == family.model_type and row.startswith(f"| `{family.model_type}` |")
        for cell in (family.models, "all layouts", family.engine, family.dialect, family.thinking):
            assert f"  {cell}" in line and f"| {cell} |" in row
        assert all(f"`{test}`" in row for test in family.proven)


@pytest.mark.parametrize("kind", ["phi3", "gemma", "gpt_oss", "qwen4_exp", None])
def test_what_the_engine_does_not_serve_is_told(kind: str | None) -> None:
    with pytest.raises(ModelError) as caught:
        families.check_served({"model_type": kind}, "x/config.json")
    assert str(caught.value) == (
        f"x/config.json: a model of type '{kind}' is not served by the engine; model types that it serves:"
        f" {', '.join(families.ENGINE_SERVES)}; for others use --engine vllm of simple_try_create_service.py"
    )
    families.check_served({"model_type": "qwen3_moe"}, "x/config.json")


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
        (
            {"model_type": "qwen4_exp", "text_config": {"layer_types": ["linear_attention"]}},
            "linear_attention",
        ),
        (
            {"model_type": "mixtral", "output_router_logits": True},
            "output_router_logits is true: .* set it to",
        ),
        (
            # transformers reads it from the text's part alone
            {"model_type": "qwen3_5_moe", "output_router_logits": True, "text_config": {}},
            "output_router_logits is true",
        ),
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
        {"model_type": "qwen3_5_moe", "text_config": {"linear_conv_kernel_dim": 4}},
        {"output_router_logits": False, "router_aux_loss_coef": 0.001},
        {"output_router_logits": True, "router_aux_loss_coef": 0},
        {"model_type": "qwen3_moe", "output_router_logits": True},
        {
            "model_type": "qwen3_5_moe",
            "text_config": {"output_router_logits": True, "router_aux_loss_coef": 0.01},
        },
    ],
)
def test_what_is_harmless_in_a_config_passes(more: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text"} | more))
    (tmp_path / "model.safetensors").touch()
    assert models.resolve(str(tmp_path), for_training=True) == tmp_path
