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
_BODY = (
    r"^base_model\.model\.(model\.(?:language_model\.)?)"  # a multimodal model's text part lies one deeper
)
_HALF = re.compile(
    _BODY + r"layers\.(\d+)\.((?:self_attn|linear_attn|mlp|mlp\.shared_expert)\.(?:in_proj_\w+|\w+_proj)"
    r"|mlp\.shared_expert_gate)\.(lora_A|lora_B)\.weight$"
)
_BIAS = re.compile(_BODY + r"layers\.(\d+)\.(self_attn\.[qkv]_proj)\.base_layer\.bias$")
_ROWS = re.compile(_BODY + r"embed_tokens\.token_adapter\.trainable_tokens_delta$")
_WEIGHTS = "adapter_model.safetensors"
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Part:
    """A linear module by its path in its layer (`self_attn.q_proj`), its numbers of inputs and outputs."""

    path: str
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Place:
    """Modules that the decoder joined: their outputs lie one after the other, or in `order`. bias: theirs, not
    ordered; None where one has none."""

    parts: tuple[Part, ...]
    bias: torch.Tensor | None = None
    order: torch.Tensor | None = None

    @property
    def name(self) -> str:
        """Its name in a layer."""
        return self.parts[0].path

    def ordered(self, outputs: torch.Tensor) -> torch.Tensor:
        """Along the first dimension, as the joined layer has them."""
        return outputs if self.order is None else outputs[self.order.to(outputs.device)]


@dataclass(frozen=True, slots=True)
class Places:
    """What an adapter must fit: the places of each layer, rows and width of the embedding, dtype, whether the head
    shares the embedding's rows, and the device."""

    layers: tuple[tuple[Place, ...], ...]
    vocabulary: int
    width: int
    dtype: torch.dtype
    tied: bool
    device: torch.device | str = "cpu"


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
            if not any(known.search(name) for known in (_ROWS, _BIAS, _HALF)):
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
        body = next((found[1] for name in tensors if (found := _HALF.search(name))), "")
        self._pairs: dict[tuple[int, str], tuple[FloatLinear, FloatLinear]] = {}
        for layer, known in enumerate(places.layers):
            for place in known:
                scales = {
                    part.path: _scale(
                        folder,
                        config,
                        f"{body}layers.{layer}.{part.path}",
                        halves.get((layer, part.path, "lora_A")),
                    )
                    for part in place.parts
                }
                pair = _join(halves, layer, place, places, scales)
                if pair is not None:
                    self._pairs[layer, place.name] = pair

    def add(self, y: torch.Tensor, x: torch.Tensor, layer: int, place: str) -> None:
        """Add this adapter's share for inputs x (tokens, in) to y (tokens, out), in place."""
        pair = self._pairs.get((layer, place))
        if pair is not None:
            y += pair[1](pair[0](x))
        change = self._biases.get((layer, place))
        if change is not None:
            y += change

    def embed(self, x: torch.Tensor, ids: torch.Tensor) -> None:
        """Put the embedding rows that were trained (`trainable_token_indices`) in place; x (tokens,
        hidden)."""
        if len(self._token_ids):
            same = ids[:, None] == self._token_ids
            rows = self._token_rows[same.int().argmax(1)]
            x.copy_(torch.where(same.any(1)[:, None], rows, x))

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


def _bias_changes(tensors: dict[str, torch.Tensor], places: Places) -> dict[tuple[int, str], torch.Tensor]:
    """`bias="all"` and `"lora_only"` save whole biases; the base's are subtracted. Taken out of `tensors`."""
    found: dict[tuple[int, str], torch.Tensor] = {}
    for layer, known in enumerate(places.layers):
        for place in known:
            begin, change = 0, None
            for part in place.parts:
                end = begin + part.outputs
                for name in [name for name in tensors if place.bias is not None]:
                    match = _BIAS.search(name)
                    if match and place.bias is not None and (int(match[2]), match[3]) == (layer, part.path):
                        change = torch.zeros_like(place.bias) if change is None else change
                        change[begin:end] = tensors.pop(name).to(change) - place.bias[begin:end]
                begin = end
            if change is not None:
                found[layer, place.name] = place.ordered(change)
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
    name = next((name for name in tensors if _ROWS.search(name)), "")
    rows = tensors.pop(name, torch.empty(0, places.width))
    if rows.shape != (len(ids), places.width):
        raise _misfit(folder, "trained rows", f"the shape {tuple(rows.shape)}", places.width)
    return torch.tensor(ids, dtype=torch.long, device=places.device), rows.to(places.device, places.dtype)


def _halves(
    folder: Path, tensors: Mapping[str, torch.Tensor], places: Places
) -> dict[tuple[int, str, str], torch.Tensor]:
    """(layer, path, lora_A or lora_B) -> matrix; every tensor of the file is used or the adapter is
    refused."""
    halves = {}
    for name, tensor in tensors.items():
        found = _HALF.search(name)
        known = places.layers[int(found[2])] if found and int(found[2]) < len(places.layers) else ()
        part = next(
            (part for place in known for part in place.parts if found and part.path == found[3]), None
        )
        if found is None or part is None:
            raise _no_place(folder, name)
        if found[4] == "lora_B" and tensor.shape[0] != part.outputs:
            raise _misfit(folder, name, f"{tensor.shape[0]} outputs", part.outputs)
        if found[4] == "lora_A" and tensor.shape[1] != part.inputs:
            raise _misfit(folder, name, f"{tensor.shape[1]} inputs", part.inputs)
        halves[int(found[2]), part.path, found[4]] = tensor
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
    place: Place,
    places: Places,
    scales: Mapping[str, float],
) -> tuple[FloatLinear, FloatLinear] | None:
    """A of all projections stacked, B as blocks on the diagonal and scaled: two multiplications for the
    joined layer."""
    ups, downs = [], []
    for part in place.parts:
        down = halves.get((layer, part.path, "lora_A"))
        if down is None:  # neither half: this projection is not adapted
            ups.append(torch.zeros(part.outputs, 0))
            continue
        downs.append(down.float())
        ups.append(halves[layer, part.path, "lora_B"].float() * scales[part.path])
    if not downs:
        return None
    up, down = place.ordered(_block_diagonal(ups)), torch.cat(downs)
    return FloatLinear(down.to(places.device, places.dtype)), FloatLinear(up.to(places.device, places.dtype))


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
