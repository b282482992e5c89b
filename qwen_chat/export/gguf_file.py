"""A model's folder as one GGUF file, which llama.cpp and what is built on it load.

In: a folder, a type of number. Out: the file, written a tensor at a time: weights, the chat template of the folder, its
special tokens, and the name of the pre-tokenizer by which llama.cpp cuts text. Format: ggml's docs/gguf.md; names of
tensors and fields by the `gguf` package.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen_chat import models
from qwen_chat.chat.format import ChatFormat
from qwen_chat.errors import MissingDependency, ModelError, first_line
from qwen_chat.export.source import shown_name
from qwen_chat.gguf_model import pre_tokenizer
from qwen_chat.weights import model_tensors

# model_type -> llama.cpp's architecture.
ARCHITECTURES = {
    "llama": "LLAMA",
    "qwen2": "QWEN2",
    "qwen2_moe": "QWEN2MOE",
    "qwen3": "QWEN3",
    "qwen3_moe": "QWEN3MOE",
    "qwen3_5": "QWEN35",
    "qwen3_5_text": "QWEN35",
}
# Whether llama.cpp makes the weights of the chosen experts add up to 1, whatever the config says.
NORMS_EXPERTS = {"QWEN2MOE": False, "QWEN3MOE": True}
FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}
_EXPERT = re.compile(r"^(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(\w+)\.weight$")
_LAYER = re.compile(r"^model\.(?:language_model\.)?layers\.(\d+)\.")
_SMALL = ("ffn_gate_inp", "ssm_conv1d")  # always in float32
_LARGEST_F16, _LARGEST_INT = 65504.0, 2**32 - 1  # that a tensor and a field of a GGUF hold


def write_gguf(model: Path, file: Path, kind: str) -> dict[str, Any]:
    """Write `file`; returns what is in it and what is not. Raises ModelError where llama.cpp has no such model."""
    try:
        import gguf
    except ImportError:
        raise MissingDependency("gguf", "--to gguf") from None
    models.check_unquantised(model)
    text, arch = read_shape(model)
    architecture = gguf.MODEL_ARCH[arch]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    tensors = _Tensors(model, text, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(shown_name(model))
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    try:
        _write_shape(writer, text, arch)
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{model}: config.json cannot be written as GGUF ({first_line(error)}); fetch the model again"
        ) from None
    _vocabulary(writer, model, text, arch)
    names = gguf.get_tensor_name_map(architecture, text["num_hidden_layers"])
    wanted = gguf.GGMLQuantizationType[kind.upper()]
    places, lost = {}, []
    for name, shape in tensors.shapes():
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            lost.append(name)
            continue
        small = len(shape) <= 1 or any(word in place for word in _SMALL) or not place.endswith(".weight")
        stored = gguf.GGMLQuantizationType.F32 if small or place.endswith("_norm.weight") else wanted
        places[name] = announce(writer, place, shape, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, stored in places.items():
        writer.write_tensor_data(packed(f"{model}: {name}", tensors.read(name), stored))
    writer.close()
    return {"type": kind, "tensors": len(places), "left_out": lost}


def packed(name: str, tensor: torch.Tensor, kind: Any) -> Any:
    """A tensor's numbers as they are written. ModelError where one is not finite, or is too large for the type."""
    import gguf

    numbers = tensor.contiguous().numpy()
    largest = max(float(numbers.max()), -float(numbers.min())) if numbers.size else 0.0
    if not math.isfinite(largest):
        raise ModelError(f"{name} holds a number that is not finite; it is damaged: copy it again")
    if kind == gguf.GGMLQuantizationType.F16 and largest > _LARGEST_F16:
        raise ModelError(f"{name} holds a number that is too large for f16; give --type bf16 or f32")
    return gguf.quants.quantize(numbers, kind)


class _Shape(dict[str, Any]):
    """What a config.json says, and where it says nothing what transformers takes. plain: the model on torch's meta
    device."""

    def __init__(self, said: Mapping[str, Any], folder: Path, plain: Any) -> None:
        super().__init__(said)
        self.folder, self.plain = folder, plain

    def __missing__(self, key: str) -> Any:
        value = getattr(models.text_config(self.plain), key, None)
        if value is None:
            raise ModelError(
                f"{self.folder}: config.json says no {key}; save the model anew with save_pretrained"
            )
        return value


def read_shape(model: Path) -> tuple[_Shape, str]:
    """The text model's settings, and llama.cpp's architecture. ModelError where it has none."""
    config = models.read_config(model)
    arch = ARCHITECTURES.get(str(config["model_type"]))
    if arch is None:
        raise ModelError(
            f"{model}: model_type {config['model_type']!r} is not written as GGUF here; expected one of"
            f" {', '.join(ARCHITECTURES)}"
        )
    inner = config.get("text_config")
    text = {**config, **inner} if isinstance(inner, dict) else config
    adds_to_one = bool(text.get("norm_topk_prob"))
    if NORMS_EXPERTS.get(arch, adds_to_one) != adds_to_one:
        raise ModelError(
            f"{model}: config.json: norm_topk_prob is {adds_to_one}, and llama.cpp computes {config['model_type']}"
            f" as if it were {not adds_to_one}; serve it with this service or vLLM"
        )
    plain = models.on_meta(model)
    taken = models.text_config(plain)
    kinds, window = getattr(taken, "layer_types", None) or (), getattr(taken, "sliding_window", None)
    odd = None
    if "sliding_attention" in kinds and window and window < taken.max_position_embeddings:
        odd = f"attends through a window of {window} tokens"
    if arch in NORMS_EXPERTS and (text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1):
        odd = "has layers without experts between those with experts"
    if odd:
        raise ModelError(
            f"{model}: {odd}, which llama.cpp does not compute for {config['model_type']}; serve it with this service"
            " or vLLM"
        )
    return _Shape(text, model, plain), arch


def announce(writer: Any, place: str, shape: tuple[int, ...], kind: Any) -> Any:
    """Tell the writer of a tensor that follows; returns the type in which it must be written."""
    import gguf

    if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16  # a row is no multiple of a block
    block, size = gguf.GGML_QUANT_SIZES[kind]
    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    bytes_ = math.prod(shape) // block * size
    if kind in plain:
        writer.add_tensor_info(place, shape, np.dtype(plain[kind]), bytes_)
    else:
        rows = (*shape[:-1], shape[-1] // block * size)
        writer.add_tensor_info(place, rows, np.dtype(np.uint8), bytes_, kind)
    return kind


class _Tensors:
    """The tensors of a folder as llama.cpp wants them, in float32, by their names in the folder."""

    def __init__(self, model: Path, config: _Shape, arch: str) -> None:
        self.stored, self.config, self.arch = model_tensors(model), config, arch
        self._check_whole(model, config.plain)
        self.sources: dict[str, list[str]] = defaultdict(list)
        for name in self.stored:
            plain = name.replace("model.language_model.", "model.")
            found = _EXPERT.match(plain)
            self.sources[f"{found[1]}.{found[3]}.weight" if found else plain].append(name)
        for names in self.sources.values():
            names.sort(key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
        if config.get("tie_word_embeddings"):
            self.sources.pop("lm_head.weight", None)

    def _check_whole(self, model: Path, plain: Any) -> None:
        """ModelError where files and config.json are not of one model."""
        known = {name: tuple(parameter.shape) for name, parameter in plain.named_parameters()}
        if models.text_config(plain).tie_word_embeddings:
            known.pop("lm_head.weight", None)
        found, places = models.parameter_names(plain, self.stored), plain.state_dict().keys()
        odd = sorted(known.keys() - set(found.values()))
        for raw, name in found.items():
            layer = _LAYER.match(raw)
            # Old checkpoints hold frequencies that every program computes.
            beyond = layer is not None and name not in places and not raw.endswith(".inv_freq")
            if beyond or (raw == name and name in known and self.stored[raw].shape != known[name]):
                odd.append(raw)
        if odd:
            raise ModelError(
                f"{model}: its files and config.json do not agree on {odd[0]} ({len(odd)} such); fetch the model again"
            )

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, sources in list(self.sources.items()):
            shape = self.stored[sources[0]].shape
            if name.endswith("experts.gate_up_proj"):
                head = name.removesuffix("gate_up_proj")
                for part in ("gate_proj", "up_proj"):
                    self.sources[f"{head}{part}.weight"] = sources
                    yield f"{head}{part}.weight", (shape[0], shape[1] // 2, shape[2])
                continue
            if name.endswith("experts.down_proj"):
                self.sources[f"{name}.weight"] = sources
                yield f"{name}.weight", shape
                continue
            if name.endswith(".dt_bias"):
                renamed = name.replace(".dt_bias", ".dt_proj.bias")
                self.sources[renamed] = sources
                yield renamed, shape
                continue
            shape = tuple(n for n in shape if n != 1) if "conv1d" in name else shape
            yield name, (len(sources), *shape) if ".experts." in name else shape

    def read(self, name: str) -> torch.Tensor:
        sources = self.sources[name]
        if ".experts." in name and len(sources) > 1:
            return torch.stack([self.stored[source].read().float() for source in sources])
        tensor = self.stored[sources[0]].read().float()
        if sources[0].endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            return gate if "gate_proj" in name else up
        return arranged(name, tensor, self.config, self.arch)


def arranged(name: str, tensor: torch.Tensor, config: Mapping[str, Any], arch: str) -> torch.Tensor:
    """A weight with its rows (of a delta net's last projection: its columns) in llama.cpp's order."""
    heads = config.get("num_attention_heads", 1)
    if arch == "LLAMA" and name.endswith(("q_proj.weight", "q_proj.bias")):
        return _interleaved(tensor, heads)
    if arch == "LLAMA" and name.endswith(("k_proj.weight", "k_proj.bias")):
        return _interleaved(tensor, config.get("num_key_value_heads", heads))
    return _delta_net(name, tensor, config) if arch == "QWEN35" else tensor


def _delta_net(name: str, tensor: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Value heads lie by key head there, and one of each key head after the other here; norms hold 1 + weight."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    wide, many = config["linear_value_head_dim"], values // keys
    before = 2 * keys * config["linear_key_head_dim"]  # queries and keys

    def by_copy(part: torch.Tensor, width: int) -> torch.Tensor:
        rest = part.shape[1:]
        return part.reshape(keys, many, width, *rest).transpose(0, 1).reshape(-1, *rest)

    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return tensor + 1
    if ".in_proj_qkv." in name or "conv1d" in name:
        tensor = tensor.squeeze() if "conv1d" in name else tensor
        return torch.cat([tensor[:before], by_copy(tensor[before:], wide)])
    if ".in_proj_z." in name:
        return by_copy(tensor, wide)
    if ".in_proj_a." in name or ".in_proj_b." in name or ".dt_proj" in name:
        return by_copy(tensor, 1)
    if name.endswith(".A_log"):
        return by_copy(-torch.exp(tensor), 1)
    return by_copy(tensor.T, wide).T if "linear_attn.out_proj." in name else tensor


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary pairs side by side, as llama.cpp turns them in this architecture, instead of half a head apart."""
    size = weight.shape[0] // heads
    return weight.reshape(heads, 2, size // 2, -1).transpose(1, 2).reshape(weight.shape)


def _write_shape(writer: Any, config: Mapping[str, Any], arch: str) -> None:
    """What the architecture needs to know."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(min(config["max_position_embeddings"], _LARGEST_INT))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 1e4))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    if scaling in ("linear", "yarn"):
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType[scaling.upper()])
        writer.add_rope_scaling_factor(rope["factor"])
        if scaling == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif scaling != "default":
        raise ModelError(
            f"config.json: rope_type {scaling!r} is not written as GGUF here; expected default, linear, yarn"
        )
    if config.get("head_dim") is not None:
        writer.add_key_length(head)
        writer.add_value_length(head)
    if arch == "LLAMA":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(head)
    if experts := config.get("num_experts", config.get("num_local_experts")):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        if shared := config.get("shared_expert_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(shared)
    if arch == "QWEN35":
        writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
        writer.add_ssm_state_size(config["linear_key_head_dim"])
        writer.add_ssm_group_count(config["linear_num_key_heads"])
        writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
        writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
        kinds = config.get("layer_types") or []
        writer.add_array("qwen35.attention.recurrent_layers", [kind == "linear_attention" for kind in kinds])
        writer.add_full_attention_interval(config.get("full_attention_interval") or 4)
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 0.25)))
        writer.add_rope_dimension_sections([*rope.get("mrope_section", [11, 11, 10]), 0][:4])


def _vocabulary(writer: Any, model: Path, config: Mapping[str, Any], arch: str) -> None:
    """Tokens with their types, merges, special tokens, the template, and where text is cut."""
    import gguf

    try:
        described = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model}: tokenizer.json cannot be read ({first_line(error)}); save it anew"
        ) from None
    tokenizer = models.load_tokenizer(model)
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    if max(known) >= config["vocab_size"]:
        raise ModelError(
            f"{model}: its tokenizer has token {max(known)}, its model {config['vocab_size']} rows"
        )
    for number in range(config["vocab_size"]):
        token = known.get(number)
        tokens.append(f"[PAD{number}]" if token is None else token)
        kind = gguf.TokenType.UNUSED if token is None else gguf.TokenType.NORMAL
        if token is not None and number in added:
            marked = added[number].special or (token.startswith("<|") and token.endswith("|>"))
            kind = gguf.TokenType.CONTROL if marked else gguf.TokenType.USER_DEFINED
        types.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(described, model))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(model, load_merges=True)
    special.chat_template = ChatFormat(tokenizer).template  # as it is served here: with tools
    special.add_to_gguf(writer, quiet=True)
    if arch == "LLAMA" and config["vocab_size"] == 49152:
        writer.add_add_bos_token(False)
