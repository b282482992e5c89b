"""An adapter as a GGUF file of its own, which llama.cpp adds to a base's GGUF when it starts.

In: an adapter's folder, its base's. Out: the file: both factors of every layer, in llama.cpp's order of rows. llama.cpp
multiplies by alpha / rank, the same alpha for all layers: another scaling (rsLoRA, patterns) is multiplied into the
second factor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qwen_chat import models
from qwen_chat.errors import MissingDependency, ModelError
from qwen_chat.export.gguf_file import FILE_TYPES, announce, arranged, packed, read_shape
from qwen_chat.export.source import shown_name

# What a GGUF adapter has no place for, by the key of adapter_config.json.
_NO_PLACE = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias")
_FACTOR = re.compile(r"^base_model\.model\.(.+)\.lora_([AB])\.weight$")


def write_adapter(adapter: Path, base: Path, file: Path, kind: str) -> dict[str, Any]:
    """Write `file`; returns its facts. Raises ModelError for an adapter that has more than pairs of factors."""
    try:
        import gguf
    except ImportError:
        raise MissingDependency("gguf", "--to gguf") from None
    config, (shape, arch) = models.read_adapter_config(adapter), read_shape(base)
    _check(adapter, config)
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ModelError(f"{adapter}: lora_alpha is {alpha!r} in its config; expected a number above 0")
    models.load_adapter(models.on_meta(base), adapter, on_meta=True)  # it is whole, and the base's
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[arch]])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    writer.add_name(shown_name(adapter))
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], shape["num_hidden_layers"])
    found = []
    for name, first, second in _factors(adapter, config):
        place = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
        if place is None:
            raise ModelError(
                f"{adapter}: {name} has no place in a GGUF of this model; merge the adapter instead"
            )
        if ".linear_attn.out_proj" in name:  # its columns are moved
            first = arranged(f"{name}.weight", first, shape, arch)
        else:
            second = arranged(f"{name}.weight", second, shape, arch)
        for suffix, factor in (("lora_a", first), ("lora_b", second)):
            wanted = gguf.GGMLQuantizationType[kind.upper()]
            stored = announce(writer, f"{place}.{suffix}", tuple(factor.shape), wanted)
            found.append((f"{name}.{suffix}", factor, stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, factor, stored in found:
        writer.write_tensor_data(packed(f"{adapter}: {name}", factor, stored))
    writer.close()
    return {"type": kind, "tensors": len(found), "left_out": []}


def _check(adapter: Path, config: Mapping[str, Any]) -> None:
    start = str(config.get("init_lora_weights")).lower()
    odd = [key for key in _NO_PLACE if config.get(key)]
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    odd += (
        ["init_lora_weights"]
        if start not in ("true", "none", "false", "gaussian", "orthogonal", "eva")
        else []
    )
    if odd:
        raise ModelError(
            f"{adapter}: {', '.join(odd)} in its config, which a GGUF adapter has no place for; leave --adapter_only"
            " out, so that it is merged"
        )


def _factors(adapter: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """A layer's name in the base, and both factors in float32, under llama.cpp's scaling."""
    from safetensors.torch import load_file

    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        part = _FACTOR.match(name)
        if part is None:
            raise ModelError(f"{adapter}: {name} is no factor of a linear layer; leave --adapter_only out")
        pairs.setdefault(part[1].replace("model.language_model.", "model."), {})[part[2]] = tensor.float()
    for name, pair in pairs.items():
        rank = pair["A"].shape[0]
        alpha = _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        theirs = config["lora_alpha"] / rank
        yield name, pair["A"], pair["B"] if scaling == theirs else pair["B"] * (scaling / theirs)


def _by_pattern(patterns: Mapping[str, float] | None, name: str, usual: float) -> float:
    """peft's rule: the first pattern that the name is, or ends with after a dot."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return float(next(found, usual))
