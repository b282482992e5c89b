"""LoRA adapters beside one base model, several at once: each adds its share to its own rows.

In: a folder that PEFT saved (adapter_config.json, adapter_model.safetensors). Out: a `Lora` whose matrices
are laid out for the decoder's joined layers. Adapters stay in float beside an int8 base. What cannot be
applied beside a shared base (DoRA, whole modules that were trained) is a ModelError that says to merge.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qwen_chat.errors import ModelError
from qwen_chat.quantize import FloatLinear

JOINED = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
_MERGE_FIRST = ("use_dora", "modules_to_save", "layer_replication", "lora_bias")
_MERGE = "serve it alone: a lone adapter is merged into its base as it is loaded"
_HALF = re.compile(r"\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj)\.(lora_A|lora_B)\.weight$")
_BIAS = re.compile(r"\.layers\.(\d+)\.self_attn\.([qkv]_proj)\.base_layer\.bias$")
_ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Places:
    """What an adapter must fit: layers, inputs and outputs of each projection, width of the embedding, dtype,
    the joined bias of query, key and value by layer (or None), and whether the head shares the embedding's
    rows."""

    layers: int
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    width: int
    dtype: torch.dtype
    biases: tuple[torch.Tensor | None, ...]
    tied: bool


class NotBeside(ModelError):
    """An adapter that can be merged into its base but not served beside it."""


class Lora:
    """One adapter. `number` is never used twice: a prefix cache keyed by it cannot serve an unloaded one's
    keys."""

    def __init__(self, folder: Path, places: Places) -> None:
        self.number = next(_numbers)
        self.folder = folder
        config = _read_config(folder)
        try:
            tensors = load_file(str(folder / "adapter_model.safetensors"))
        except Exception as error:  # safetensors raises its own kind, and OSError
            raise ModelError(f"{folder}: adapter_model.safetensors cannot be read ({error})") from None
        self._biases = _bias_changes(tensors, places)
        self._token_ids, self._token_rows = _trained_rows(folder, tensors, config, places)
        self._token_head = FloatLinear(self._token_rows) if places.tied and len(self._token_ids) else None
        halves = _halves(folder, tensors, places)
        self._pairs: dict[tuple[int, str], tuple[FloatLinear, FloatLinear]] = {}
        for layer in range(places.layers):
            for place, names in JOINED.items():
                pair = _join(halves, layer, names, places, config)
                if pair is not None:
                    self._pairs[layer, place] = pair

    def add(self, y: torch.Tensor, x: torch.Tensor, layer: int, place: str) -> None:
        """Add this adapter's share for inputs x (tokens, in) to y (tokens, out), in place."""
        pair = self._pairs.get((layer, place))
        if pair is not None:
            y += pair[1](pair[0](x))
        if place == "qkv" and layer in self._biases:
            y += self._biases[layer]

    def embed(self, x: torch.Tensor, ids: torch.Tensor) -> None:
        """Put the embedding rows that were trained (`trainable_token_indices`) in place; x (tokens,
        hidden)."""
        if len(self._token_ids):
            where, which = (ids[:, None] == self._token_ids).nonzero(as_tuple=True)
            x[where] = self._token_rows[which]

    def correct(self, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """The trained rows are the head's too where it shares them; logits (rows, vocabulary), in place."""
        if self._token_head is not None:
            logits[:, self._token_ids] = self._token_head(hidden).float()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: no adapter there ({error}); expected a folder that finetune.sh --use_lora wrote"
        ) from None
    wrong = [key for key in _MERGE_FIRST if config.get(key)]
    if config.get("peft_type") != "LORA" or wrong:
        what = ", ".join(wrong) or f"peft_type {config.get('peft_type')}"
        raise NotBeside(f"{folder}: an adapter with {what} cannot run beside a shared base; {_MERGE}")
    return config


def _bias_changes(tensors: dict[str, torch.Tensor], places: Places) -> dict[int, torch.Tensor]:
    """`bias="all"` and `"lora_only"` save whole biases; the base's are subtracted. Taken out of `tensors`."""
    found: dict[int, torch.Tensor] = {}
    for name in [name for name in tensors if _BIAS.search(name)]:
        match = _BIAS.search(name)
        layer = int(match[1]) if match else 0
        base = places.biases[layer] if layer < places.layers else None
        if match is None or base is None:
            continue
        begin = 0
        for part in JOINED["qkv"]:
            end = begin + places.outputs[part]
            if part == match[2]:
                change = found.setdefault(layer, torch.zeros_like(base))
                change[begin:end] = tensors.pop(name).to(base.dtype) - base[begin:end]
            begin = end
    return found


def _trained_rows(
    folder: Path, tensors: dict[str, torch.Tensor], config: Mapping[str, Any], places: Places
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and rows of the embedding that were trained; taken out of `tensors`."""
    ids = config.get("trainable_token_indices") or []
    if isinstance(ids, Mapping):
        ids = ids.get("embed_tokens", [])
    rows = tensors.pop(_ROWS, torch.empty(0, places.width))
    if rows.shape != (len(ids), places.width):
        raise _misfit(folder, "trained rows", f"the shape {tuple(rows.shape)}", places.width)
    return torch.tensor(ids, dtype=torch.long), rows.to(places.dtype)


def _halves(
    folder: Path, tensors: Mapping[str, torch.Tensor], places: Places
) -> dict[tuple[int, str, str], torch.Tensor]:
    """(layer, projection, lora_A or lora_B) -> matrix; every tensor of the file is used or the adapter is
    refused."""
    halves = {}
    for name, tensor in tensors.items():
        found = _HALF.search(name)
        if found is None or int(found[1]) >= places.layers or found[2] not in places.outputs:
            raise NotBeside(f"{folder}: tensor {name} has no place beside this base; {_MERGE}")
        half = (int(found[1]), found[2], found[3])
        if found[3] == "lora_B" and tensor.shape[0] != places.outputs[found[2]]:
            raise _misfit(folder, name, f"{tensor.shape[0]} outputs", places.outputs[found[2]])
        if found[3] == "lora_A" and tensor.shape[1] != places.inputs[found[2]]:
            raise _misfit(folder, name, f"{tensor.shape[1]} inputs", places.inputs[found[2]])
        halves[half] = tensor
    for layer, name, half_name in halves:
        down, up = halves.get((layer, name, "lora_A")), halves.get((layer, name, "lora_B"))
        if down is None or up is None or down.shape[0] != up.shape[1]:
            raise ModelError(
                f"{folder}: {half_name} of {name} in layer {layer} has no other half of its rank; "
                "the file is damaged"
            )
    return halves


def _misfit(folder: Path, name: str, found: str, wanted: int) -> ModelError:
    return ModelError(
        f"{folder}: {name} has {found}, this base {wanted}; the adapter belongs to another model"
    )


def _join(
    halves: Mapping[tuple[int, str, str], torch.Tensor],
    layer: int,
    names: tuple[str, ...],
    places: Places,
    config: Mapping[str, Any],
) -> tuple[FloatLinear, FloatLinear] | None:
    """A of all projections stacked, B as blocks on the diagonal and scaled: two multiplications for the
    joined layer."""
    ups, downs = [], []
    for name in names:
        down = halves.get((layer, name, "lora_A"))
        if down is None:  # neither half: this projection is not adapted
            ups.append(torch.zeros(places.outputs[name], 0))
            continue
        downs.append(down.float())
        ups.append(halves[layer, name, "lora_B"].float() * _scale(config, name, down.shape[0]))
    if not downs:
        return None
    return FloatLinear(torch.cat(downs).to(places.dtype)), FloatLinear(_block_diagonal(ups).to(places.dtype))


def _block_diagonal(blocks: list[torch.Tensor]) -> torch.Tensor:
    whole = torch.zeros(sum(block.shape[0] for block in blocks), sum(block.shape[1] for block in blocks))
    row = column = 0
    for block in blocks:
        whole[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return whole


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """lora_alpha / r, or / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023)."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next(
        (value for key, value in patterns.items() if re.search(rf"(^|\.){key}$", name)), config["lora_alpha"]
    )
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
