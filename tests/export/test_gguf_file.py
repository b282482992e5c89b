"""GGUF files hold the model: every tensor that llama.cpp reads, the template, the tokens, the pre-tokenizer's name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from benchmarks import bench_export
from qwen_chat.errors import ModelError
from qwen_chat.export.gguf_file import arranged, packed, pre_tokenizer, read_shape, write_gguf
from qwen_chat.weights import stored_tensors

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def contents(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(file)
    return {key: field.contents() for key, field in reader.fields.items()}, {
        t.name: t for t in reader.tensors
    }


def test_a_file_holds_the_model(tiny_model_path: Path, tmp_path: Path) -> None:
    found = write_gguf(tiny_model_path, tmp_path / "m.gguf", "f32")
    assert found == {"type": "f32", "tensors": 26, "left_out": []}
    fields, tensors = contents(tmp_path / "m.gguf")
    assert fields["general.architecture"] == "qwen2" and fields["qwen2.block_count"] == 2
    assert fields["tokenizer.ggml.pre"] == "smollm"
    own = (tiny_model_path / "chat_template.jinja").read_text()
    template = fields["tokenizer.chat_template"]
    assert template.endswith(own) and "<tool_call>" in template.removesuffix(own), "completed as it is served"
    assert fields["tokenizer.ggml.tokens"][2] == "<|im_end|>" and fields["tokenizer.ggml.token_type"][2] == 3
    stored = stored_tensors(tiny_model_path)
    wanted = stored["model.layers.1.self_attn.k_proj.bias"].read().numpy()
    assert np.array_equal(tensors["blk.1.attn_k.bias"].data, wanted)
    assert "output.weight" not in tensors, "a shared head is stored once"


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        pytest.param("f16", 1e-3, marks=pytest.mark.slow),
        pytest.param("bf16", 5e-3, marks=pytest.mark.slow),
        ("q8_0", 5e-3),
        ("q4_0", 0.13),
    ],
)
def test_smaller_types_are_near(kind: str, most: float, tiny_model_path: Path, tmp_path: Path) -> None:
    """The largest error of an embedding, divided by its largest value."""
    write_gguf(tiny_model_path, tmp_path / "m.gguf", kind)
    _, tensors = contents(tmp_path / "m.gguf")
    stored = tensors["token_embd.weight"]
    assert stored.tensor_type.name == kind.upper()
    back = gguf.quants.dequantize(stored.data, stored.tensor_type)
    wanted = stored_tensors(tiny_model_path)["model.embed_tokens.weight"].read().numpy()
    assert 0 < np.abs(back - wanted).max() / np.abs(wanted).max() <= most


def test_where_text_is_cut_is_found_by_the_pattern() -> None:
    def described(pattern: str) -> dict[str, Any]:
        return {"model": {"type": "BPE"}, "pre_tokenizer": {"pattern": {"Regex": pattern}}}

    assert pre_tokenizer(described(QWEN), Path("m")) == "qwen2"
    marks = QWEN.replace(r"\p{L}+", r"[\p{L}\p{M}]+")
    assert pre_tokenizer(described(marks), Path("m")) == "qwen35"
    with pytest.raises(ModelError, match="cuts text in a way that is not known here"):
        pre_tokenizer(described(r"\w+"), Path("m"))


def test_an_architecture_that_is_not_written_is_named(tiny_model_path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_path, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gemma"}))
    with pytest.raises(ModelError, match="model_type 'gemma' is not written as GGUF here"):
        write_gguf(folder, tmp_path / "m.gguf", "f32")
    for kind, wrong in (("qwen3_moe", False), ("qwen2_moe", True)):
        mixture = {**config, "model_type": kind, "norm_topk_prob": wrong}
        (folder / "config.json").write_text(json.dumps(mixture))
        with pytest.raises(ModelError, match=f"computes {kind} as if it were {not wrong}"):
            write_gguf(folder, tmp_path / "m.gguf", "f32")
    assert not (tmp_path / "m.gguf").exists()


# What llama.cpp's converter derives from the folder's name and from counting parameters; and our template has tools.
DERIVED = {f"general.{part}" for part in ("name", "basename", "finetune", "version", "size_label")}
EXCEPTIONS = {*DERIVED, "GGUF.kv_count", "tokenizer.chat_template"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [("demo", "f32"), ("demo", "bf16"), ("demo", "q8_0"), *((name, "f32") for name in bench_export.TINY)],
)
def test_as_llama_cpps_own_converter_writes_it(
    name: str, kind: str, demo_model_path: Path, tmp_path: Path, their_converter: Callable[..., None]
) -> None:
    model = demo_model_path if name == "demo" else bench_export.tiny(name, tmp_path / name)
    write_gguf(model, tmp_path / "ours.gguf", kind)
    flags = ["--no-mtp"] if name.startswith("qwen3_5") else []  # it has no layer that predicts a token more
    their_converter(model, tmp_path / "theirs.gguf", kind, *flags)
    (ours, tensors), (theirs, wanted) = contents(tmp_path / "ours.gguf"), contents(tmp_path / "theirs.gguf")
    differing = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
    assert differing <= EXCEPTIONS
    assert set(tensors) == set(wanted)
    for tensor, other in ((tensors[place], wanted[place]) for place in tensors):
        assert tensor.tensor_type == other.tensor_type and np.array_equal(tensor.data, other.data), (
            tensor.name
        )


def saved(
    folder: Path, tiny_model_path: Path, change: Callable[[dict[str, Any]], object] = bool, **shape: Any
) -> Path:
    """A tiny Llama (or another, by `model_type`) with the demo model's tokenizer; change: of its config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    usual = {"vocab_size": 49152, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    usual |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = AutoConfig.for_model(shape.pop("model_type", "llama"), **{**usual, **shape})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model_path / name, folder / name)
    written = json.loads((folder / "config.json").read_text())
    change(written)
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def test_a_llamas_biases_lie_as_its_rows_do() -> None:
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for name, heads in (("q_proj", 4), ("k_proj", 2)):
        weight = torch.arange(8.0 * heads)
        rows = arranged(f"model.layers.0.self_attn.{name}.weight", weight[:, None], shape, "LLAMA")[:, 0]
        bias = arranged(f"model.layers.0.self_attn.{name}.bias", weight, shape, "LLAMA")
        assert bias.tolist() == rows.tolist() and bias[:4].tolist() == [0, 4, 1, 5]


def test_a_setting_that_config_json_leaves_out_is_transformers_own(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    left_out = ("rms_norm_eps", "max_position_embeddings")
    folder = saved(tmp_path / "m", tiny_model_path, lambda config: [config.pop(key) for key in left_out])
    shape, _ = read_shape(folder)
    assert [shape[key] for key in left_out] == [1e-6, 2048]
    with pytest.raises(ModelError, match="says no such_a_thing; save the model anew"):
        shape["such_a_thing"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_hidden_layers": 3}, "do not agree on model.layers.2."),
        ({"num_hidden_layers": 1}, "do not agree on model.layers.1."),
        ({"intermediate_size": 32}, "do not agree on model.layers.0.mlp."),
        ({"tie_word_embeddings": False}, "do not agree on lm_head.weight"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "its weights are quantised; give the model as it was",
        ),
        ({"hidden_size": "wide"}, "cannot be loaded"),
        ({"architectures": 7, "num_hidden_layers": 3}, "do not agree on model.layers.2."),
        ({"text_config": 7}, "cannot be loaded"),
    ],
)
def test_files_and_config_that_are_not_of_one_model_are_refused(
    change: dict[str, Any], told: str, tiny_model_path: Path, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "m", tiny_model_path, lambda config: config.update(change))
    with pytest.raises(ModelError, match=told):
        write_gguf(folder, tmp_path / "m.gguf", "q8_0")
    assert not (tmp_path / "m.gguf").exists()


def test_a_tensor_of_a_layer_that_the_model_has_not_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    """Left out, it would be another model."""
    folder = saved(
        tmp_path / "m", tiny_model_path, lambda c: c.update(model_type="llama"), model_type="qwen3"
    )
    with pytest.raises(ModelError, match=r"do not agree on model\.layers\.0\.self_attn\.k_norm"):
        write_gguf(folder, tmp_path / "m.gguf", "q8_0")


def test_a_window_and_dense_layers_among_experts_are_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    folder = saved(tmp_path / "a", tiny_model_path, model_type="qwen2", **window)
    with pytest.raises(ModelError, match=r"a window of 64 tokens, which llama\.cpp does not"):
        write_gguf(folder, tmp_path / "m.gguf", "f32")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    folder = saved(
        tmp_path / "b",
        tiny_model_path,
        model_type="qwen3_moe",
        norm_topk_prob=True,
        mlp_only_layers=[1],
        **experts,
    )
    with pytest.raises(ModelError, match="has layers without experts between those with experts"):
        write_gguf(folder, tmp_path / "m.gguf", "f32")


@pytest.mark.parametrize(
    ("value", "kind", "told"),
    [
        (float("nan"), "q8_0", "not finite"),
        (float("-inf"), "f32", "not finite"),
        (-1e5, "f16", "too large for f16"),
    ],
)
def test_a_number_that_the_type_has_not_is_refused(value: float, kind: str, told: str) -> None:
    wanted = gguf.GGMLQuantizationType[kind.upper()]
    with pytest.raises(ModelError, match=f"^m: w holds a number that is {told}"):
        packed("m: w", torch.tensor([[1.0] * 31 + [value]]), wanted)
