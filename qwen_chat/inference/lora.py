"""LoRA adapters beside one base model, several at once: each adds its share to its own rows.

In: a folder that PEFT saved (adapter_config.json, adapter_model.safetensors). Out: a `Lora` whose matrices
are laid out for the decoder's joined layers. Adapters stay in float beside an int8 base.

What is applied here must be what PEFT applies. So every key of the config is in one of the lists below: read,
without effect on a saved adapter, or harmless at the values given. All else (DoRA, whole modules that were
trained, an initialisation that changed the base, a key that nobody knows) is NotBeside: such an adapter can
only be merged into its base, by PEFT itself.
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
from safetensors import safe_open
from safetensors.torch import load_file

from qwen_chat.errors import ModelError
from qwen_chat.inference.quantize import FloatLinear

JOINED = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
# The keys of adapter_config.json. Those that are read:
_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "trainable_token_indices",
}
# Those that only the training looked at, or that belong to a switch which must be off:
_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules", "lora_dropout"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # of other init_lora_weights
    *("megatron_core", "qalora_group_size"),  # of megatron_config, use_qalora
}
_INITS = (True, False, "gaussian", "orthogonal")  # the others change the base's weights, or may
_OFF: tuple[object, ...] = (None, False, {}, [])  # where any other key, known or not, does nothing
_MERGE = "serve it alone: a lone adapter is merged into its base as it is loaded"
_HALF = re.compile(
    r"^base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj)\.(lora_A|lora_B)\.weight$"
)
_MODULES = {"qkv": "self_attn", "o": "self_attn", "gate_up": "mlp", "down": "mlp"}
_BIAS = re.compile(r"^base_model\.model\.model\.layers\.(\d+)\.self_attn\.([qkv]_proj)\.base_layer\.bias$")
_ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
_WEIGHTS = "adapter_model.safetensors"
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Places:
    """What an adapter must fit: layers, inputs and outputs of each projection, rows and width of the embedding,
    dtype, the joined bias of query, key and value by layer (or None), and whether the head shares the
    embedding's rows."""

    layers: int
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    vocabulary: int
    width: int
    dtype: torch.dtype
    biases: tuple[torch.Tensor | None, ...]
    tied: bool


class NotBeside(ModelError):
    """An adapter that can be merged into its base but not served beside it."""


def why_merged(folder: Path) -> str | None:
    """Why an adapter cannot run beside its base, by its config and the names of its tensors; None: it can.

    Raises ModelError where it can be used in no way.
    """
    try:
        _read_config(folder)
        names = _tensor_names(folder)
        for name in names:
            if name != _ROWS and not _BIAS.search(name) and not _HALF.search(name):
                raise _no_place(folder, name)
    except NotBeside as error:
        return str(error)
    return None


class Lora:
    """One adapter. `number` is never used twice: a prefix cache keyed by it cannot serve an unloaded one's
    keys."""

    def __init__(self, folder: Path, places: Places) -> None:
        self.number = next(_numbers)
        self.folder = folder
        config = _read_config(folder)
        try:
            tensors = load_file(str(folder / _WEIGHTS))
        except Exception as error:  # safetensors raises its own kind, and OSError
            raise _unreadable(folder, error) from None
        self._biases = _bias_changes(tensors, places)
        self._token_ids, self._token_rows = _trained_rows(folder, tensors, config, places)
        self._token_head = FloatLinear(self._token_rows) if places.tied and len(self._token_ids) else None
        halves = _halves(folder, tensors, places)
        self._pairs: dict[tuple[int, str], tuple[FloatLinear, FloatLinear]] = {}
        for layer in range(places.layers):
            for place, names in JOINED.items():
                block = f"model.layers.{layer}.{_MODULES[place]}"
                scales = {
                    name: _scale(folder, config, f"{block}.{name}", halves.get((layer, name, "lora_A")))
                    for name in names
                }
                pair = _join(halves, layer, names, places, scales)
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
    """The config, of which every key is understood. ModelError: damaged; NotBeside: to be merged."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path}: no adapter there ({error}); expected a folder that finetune.sh --use_lora wrote"
        ) from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds {type(config).__name__}; expected an object as PEFT writes it")
    _check_alone(folder, config)
    if config.get("peft_type") != "LORA":
        raise _not_beside(folder, f"peft_type {config.get('peft_type')}")
    _check_values(path, config)
    wrong = [key for key, value in config.items() if not _is_harmless(key, value)]
    rows = config.get("trainable_token_indices")
    if isinstance(rows, dict) and list(rows) != ["embed_tokens"]:
        wrong.append("trainable_token_indices of " + ", ".join(rows))
    if wrong:
        raise _not_beside(folder, ", ".join(wrong))
    return config


def _check_alone(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("alora_invocation_tokens"):
        raise ModelError(
            f"{folder}: alora_invocation_tokens: an adapter that begins to work in the middle of a prompt; "
            "the engine neither runs it beside its base nor can it be merged: train a plain LoRA"
        )


def _check_values(path: Path, config: Mapping[str, Any]) -> None:
    """ModelError where a value that is read is not of its kind."""

    def is_number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and value > 0

    for key in ("r", "lora_alpha"):
        if not is_number(config.get(key)):
            raise _damaged(path, key, config.get(key), "a number above 0")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(is_number(value) for value in patterns.values()):
            raise _damaged(path, key, patterns, "an object of names and numbers")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise _damaged(path, key, pattern, f"regular expressions ({error})") from None
    if not _is_one_of(config.get("use_rslora"), (True, False, None)):
        raise _damaged(path, "use_rslora", config["use_rslora"], "true or false")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise _damaged(path, "bias", config["bias"], "none, all or lora_only")
    rows = config.get("trainable_token_indices") or []
    listed = list(rows.values()) if isinstance(rows, dict) else [rows]
    if not all(isinstance(ids, list) and all(type(token) is int for token in ids) for ids in listed):
        raise _damaged(path, "trainable_token_indices", rows, "lists of token ids")


def _damaged(path: Path, key: str, value: object, expected: str) -> ModelError:
    return ModelError(f"{path}: {key} is {str(value)[:80]!r}; expected {expected}; the file is damaged")


def _is_harmless(key: str, value: object) -> bool:
    if key in _READ or key in _WITHOUT_EFFECT:
        return True
    return _is_one_of(value, _INITS if key == "init_lora_weights" else _OFF)


def _is_one_of(value: object, known: tuple[object, ...]) -> bool:
    return any(type(value) is type(one) and value == one for one in known)  # 0 is not False


def _not_beside(folder: Path, what: str) -> NotBeside:
    return NotBeside(f"{folder}: an adapter with {what} cannot run beside a shared base; {_MERGE}")


def _no_place(folder: Path, name: str) -> NotBeside:
    return NotBeside(f"{folder}: tensor {name} has no place beside this base; {_MERGE}")


def _tensor_names(folder: Path) -> list[str]:
    try:
        with safe_open(folder / _WEIGHTS, "pt") as file:
            return list(file.keys())
    except Exception as error:  # safetensors raises its own kind, and OSError
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: Exception) -> ModelError:
    return ModelError(f"{folder}: {_WEIGHTS} cannot be read ({error})")


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
        ids = ids["embed_tokens"]
    beyond = [token for token in ids if not 0 <= token < places.vocabulary]
    if beyond:
        raise _misfit(folder, f"trained token {beyond[0]}", "no row", places.vocabulary)
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
            raise _no_place(folder, name)
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
    scales: Mapping[str, float],
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
        ups.append(halves[layer, name, "lora_B"].float() * scales[name])
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


def _scale(folder: Path, config: Mapping[str, Any], module: str, down: torch.Tensor | None) -> float:
    """lora_alpha / r, or / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023), of the module of that name.

    ModelError where the matrix has another rank than the config gives it.
    """
    if down is None:
        return 0.0
    rank = _pattern(config, "rank_pattern", module, config["r"])
    alpha = _pattern(config, "alpha_pattern", module, config["lora_alpha"])
    if down.shape[0] != rank:
        raise ModelError(
            f"{folder}: {module} has rank {down.shape[0]}; adapter_config.json gives it {rank:g}; the files do not "
            "belong together"
        )
    return alpha / float(rank**0.5 if config.get("use_rslora") else rank)


def _pattern(config: Mapping[str, Any], key: str, module: str, default: float) -> float:
    """A pattern's value for a module, found as PEFT finds it: by the whole name, not by its last part."""
    patterns: Mapping[str, float] = config.get(key) or {}
    if not patterns:
        return default
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(list(patterns), module), default)
