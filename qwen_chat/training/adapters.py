"""LoRA and Q-LoRA: wrap a model, save what was trained. (Loading and merging: models.py.)

In: a loaded model and the adapter's flags. Out: the same model, in which only the adapter learns; a folder
that peft, vLLM and llama.cpp read over the untouched base. Loading one is `models.load_adapter`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from qwen_chat import models, place
from qwen_chat.errors import OptionError
from qwen_chat.flags.run_options import ALL_LINEAR, EXPERTS, LoraArguments, target_words
from qwen_chat.models import merge
from qwen_chat.training import frozen

__all__ = [
    "CHAT_MARKS",
    "Wrapped",
    "lora_config",
    "merge",
    "optimizer_groups",
    "save_adapter",
    "trainable_rows",
    "wrap",
]

CHAT_MARKS = ("<|im_start|>", "<|im_end|>")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Wrapped:
    """A model with an adapter, what was decided, and for PiSSA the adapter's first values (else empty)."""

    model: PreTrainedModel
    decisions: tuple[str, ...]
    initial: Mapping[str, torch.Tensor]


def wrap(
    model: PreTrainedModel,
    lora: LoraArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    checkpointing: bool = False,
) -> Wrapped:
    """Put an adapter over `model`; nothing but it (and what the flags add) is trainable afterwards.

    `checkpointing`: activations will be computed again, so the frozen embedding must pass gradients on.
    """
    from peft import get_peft_model, get_peft_model_state_dict, prepare_model_for_kbit_training

    kept = any(map(frozen.is_narrow, model.parameters()))
    if lora.q_lora and not kept:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if checkpointing:
        model.enable_input_require_grads()
    if lora.lora_weight_path is not None:
        if kept and models.trains_rows(Path(lora.lora_weight_path)):
            frozen.widen_words(model)
        wrapped = models.load_adapter(model, Path(lora.lora_weight_path), trainable=True)
        _learn_in_float32(wrapped)
        return Wrapped(wrapped, (f"continues {lora.lora_weight_path}", _share(wrapped)), {})
    rows, reason = trainable_rows(model, tokenizer, lora.trainable_tokens)
    if rows and is_deepspeed_zero3_enabled() and not torch.cuda.is_available():
        raise OptionError(
            "--trainable_tokens with ZeRO-3 on a CPU: peft gathers the rows on a GPU only; give "
            f"--deepspeed {place.deepspeed_file('zero2')}, or --trainable_tokens none"
        )
    if rows and kept:
        frozen.widen_words(model)
    try:
        wrapped = get_peft_model(model, lora_config(model, lora, rows))
    except (ValueError, AttributeError) as error:
        if "lora_dropout" in str(error):  # a layer's experts are one tensor here
            raise OptionError(
                f"--lora_dropout {lora.lora_dropout}: peft has no dropout before an adapter over experts; give"
                " --lora_dropout 0"
            ) from None
        if isinstance(error, AttributeError):
            raise OptionError(
                f"--lora_init {lora.lora_init}: peft cannot take apart one of this model's layers ({error});"
                " leave --lora_init out, or name plain layers with --lora_target_modules"
            ) from None
        raise OptionError(f"--lora_target_modules {' '.join(lora.lora_target_modules)}: {error}") from None
    _learn_in_float32(wrapped)
    initial: Tensors = {}
    if lora.lora_init.startswith("pissa"):
        tensors = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        initial = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    ranks = [tensor.shape[0] for name, tensor in initial.items() if ".lora_A." in name]
    if ranks and min(ranks) < lora.lora_r:
        raise OptionError(
            f"--lora_r {lora.lora_r} with --lora_init {lora.lora_init}: a layer here has only {min(ranks)} singular "
            f"vectors; give --lora_r {min(ranks)} or less"
        )
    notes = [*([reason] if reason else []), *_left_out(wrapped, target_words(lora.lora_target_modules))]
    return Wrapped(wrapped, (*notes, _share(wrapped)), initial)


def _learn_in_float32(model: PreTrainedModel) -> None:
    """peft keeps what it adds in float32, but biases and whole layers that are trained as the base has them.

    In bfloat16 an update below 1/256 of a value is lost, and fp16's scaler refuses such gradients. ZeRO keeps
    float32 masters of its own.
    """
    for parameter in model.parameters():
        half = parameter.dtype in (torch.bfloat16, torch.float16)
        if parameter.requires_grad and half and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.float()


def _experts(model: PreTrainedModel) -> dict[str, int]:
    """A mixture's experts that no adapter reaches: the name of each fused tensor in its layer, how many weights."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        _, inside, leaf = name.rpartition(".experts.")
        if inside and "." not in leaf and len(getattr(parameter, "ds_shape", parameter.shape)) == 3:
            size = int(getattr(parameter, "ds_numel", parameter.numel()))
            found[f"experts.{leaf}"] = found.get(f"experts.{leaf}", 0) + size
    return found


def _left_out(model: PreTrainedModel, words: tuple[str, ...]) -> list[str]:
    """A line for the experts where no adapter reaches them, and one for what `all-linear` cannot reach."""
    notes, experts = [], sum(_experts(model).values())
    if experts:
        notes.append(
            f"no adapter over the experts ({experts:,} parameters stay as they are);"
            f" --lora_target_modules {ALL_LINEAR} {EXPERTS} --lora_dropout 0 trains them too"
        )
    plain = {
        name.rpartition("mlp.")[2]
        for name, module in model.get_decoder().named_modules()
        if isinstance(module, torch.nn.Linear) and ".mlp." in name
        if ".base_layer" not in name and ".lora_" not in name
    }
    if plain and ALL_LINEAR in words:
        notes.append(f"no adapter over {', '.join(sorted(plain))} (peft takes these names for the experts')")
    return notes


def lora_config(model: PreTrainedModel, lora: LoraArguments, rows: Sequence[int] = ()) -> Any:
    """peft's LoraConfig from the flags. A lone target that is no layer's name is a regular expression.

    Raises OptionError where experts are asked for and the model has none.
    """
    from peft import LoraConfig

    words = target_words(lora.lora_target_modules)
    experts = list(_experts(model)) if EXPERTS in words else None
    if experts == []:
        raise OptionError(
            f"--lora_target_modules {' '.join(lora.lora_target_modules)}: this model has no experts in one tensor;"
            f" leave {EXPERTS} out"
        )
    indices: list[int] | dict[str, list[int]] | None = list(rows) or None
    if rows and not model.config.tie_word_embeddings:
        # A head of its own has rows of its own: without them a new token would never be said.
        indices = {"embed_tokens": list(rows), "lm_head": list(rows)}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=_targets(model, lora.lora_target_modules),
        exclude_modules="|".join(rf"{re.escape(part)}\..*" for part in models.beside_text(model)) or None,
        target_parameters=experts,
        bias=lora.lora_bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=True if lora.lora_init == "default" else lora.lora_init,
        trainable_token_indices=indices,
    )


def _targets(model: PreTrainedModel, given: tuple[str, ...]) -> str | list[str]:
    """peft's target_modules: a list of names, a regular expression, or its own word for all linear layers."""
    words = target_words(given)
    names = [word for word in words if word not in (ALL_LINEAR, EXPERTS)]
    if ALL_LINEAR in words:
        inside = model.get_decoder().named_modules()
        linear = {name.rpartition(".")[2] for name, module in inside if isinstance(module, torch.nn.Linear)}
        plain = words == (ALL_LINEAR,) and _as_peft_reads(model, ALL_LINEAR) == ALL_LINEAR
        return ALL_LINEAR if plain else [*sorted(_as_peft_reads(model, sorted(linear))), *names]
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return names if len(given) > 1 or EXPERTS in words or set(names) <= leaves else given[0]


def _as_peft_reads(model: PreTrainedModel, targets: str | list[str]) -> Any:
    """The target modules that peft leaves: for files of older transformers it turns gate_proj, up_proj and down_proj
    of some mixtures into the experts' tensors, even those of a dense layer or a shared expert."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=targets)
    convert_peft_config_for_transformers(config, model, None)
    return config.target_modules


def trainable_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: Sequence[str]
) -> tuple[list[int], str]:
    """Ids of the embedding rows that are trained too, and why.

    A base model under LoRA never learns to stop unless the rows of its chat marks are trained. `auto` takes a
    model for a base one where `<|im_end|>` is not among the tokens that end its generation.
    """
    if tuple(wanted) in ((), ("none",)):
        return [], ""
    known = tokenizer.get_vocab()
    if tuple(wanted) != ("auto",):
        unknown = [token for token in wanted if token not in known]
        if unknown:
            raise OptionError(f"--trainable_tokens {' '.join(unknown)}: not in the tokenizer's vocabulary")
        return [known[token] for token in wanted], f"embedding rows of {' '.join(wanted)} are trained"
    marks = [token for token in CHAT_MARKS if token in known]
    if not marks or known.get(CHAT_MARKS[1]) in _ending(model):
        return [], ""
    reason = (
        f"embedding rows of {' '.join(marks)} are trained (a base model: it does not end on <|im_end|> yet)"
    )
    return [known[token] for token in marks], reason


def _ending(model: PreTrainedModel) -> set[int]:
    configs = (getattr(model, "generation_config", None), model.config)
    ends = [getattr(config, "eos_token_id", None) for config in configs]
    return {token for end in ends for token in (end if isinstance(end, list) else [end]) if token is not None}


def _share(model: PreTrainedModel) -> str:
    """How much is trained. ZeRO-3 keeps a parameter's true size in `ds_numel`."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trained, total = sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes)
    return f"adapter: {trained:,} of {total:,} parameters are trained ({trained / total:.2%})"


def optimizer_groups(
    model: PreTrainedModel, rate: float, ratio: float, weight_decay: float
) -> list[dict[str, Any]]:
    """LoRA+ (arXiv 2402.12354): B learns `ratio` times faster than A and everything else."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    fast = [p for name, p in named if "lora_B" in name]
    slow = [p for name, p in named if "lora_B" not in name and p.ndim > 1]
    plain = [p for name, p in named if "lora_B" not in name and p.ndim <= 1]
    groups = [
        {"params": slow, "lr": rate, "weight_decay": weight_decay},
        {"params": fast, "lr": rate * ratio, "weight_decay": weight_decay},
        {"params": plain, "lr": rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


# ---------------------------------------------------------------------------------------------------- save


def save_adapter(
    model: PreTrainedModel,
    folder: Path,
    *,
    base: str,
    initial: Mapping[str, torch.Tensor] | None = None,
    state_dict: Tensors | None = None,
) -> None:
    """Write the adapter. `base` is the name that `--adapter` alone will load; PiSSA becomes a plain LoRA.

    `state_dict`: gathered weights (ZeRO-3), else the model's own.
    """
    # The rows of single tokens are in the adapter; whole embeddings would be 27 % of a 0.5B model.
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    if initial:
        _write_plain_lora(folder, config, initial)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card is an empty form


def _write_plain_lora(folder: Path, config: dict[str, Any], initial: Mapping[str, torch.Tensor]) -> None:
    """PiSSA trains B A over W - s B0 A0; over the untouched W that is a LoRA of rank 2r: s (B A - B0 A0)."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, first in initial.items():
        if ".lora_A." in name or name.endswith(".lora_embedding_A"):
            tensors[name] = torch.cat([tensors[name], first], dim=0)
        elif ".lora_B." in name or name.endswith(".lora_embedding_B"):
            tensors[name] = torch.cat([tensors[name], -first], dim=1)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"}
    )
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank
    config.update(r=2 * rank, lora_alpha=scale * 2 * rank, use_rslora=False, init_lora_weights=True)
