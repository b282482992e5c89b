"""The families of models: what each can do here, and what a config.json tells before anything is loaded.

In: a config.json as a dict. Out: a ModelError, a note, or nothing; the table of families, for people and for programs.
Nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qwen_chat.errors import ModelError

ALL_LAYOUTS = ("shared_prefix", "packed", "padded")
PROBED = "found by probing"  # whatever the table says: what a template speaks is read from what it renders


@dataclass(frozen=True)
class ModelFamily:
    """What models of one type can do here, and the tests that show it."""

    model_type: str  # as config.json has it
    models: str
    engine: Literal["ours", "vLLM"]  # what serves it; vLLM serves the others too
    dialect: str  # of calls, under the models' own templates
    thinking: str
    proven: tuple[str, ...]  # tests, as pytest names them
    trains: tuple[str, ...] = ALL_LAYOUTS  # the layouts of rows


_IN_ROWS = "tests/training/test_probe.py::test_what_works_passes_by_far"
_LOGITS = "tests/inference/test_decoder.py::test_logits_are_the_models_own_and_depend_on_the_row_alone"
_SEEING = "tests/inference/test_decoder.py::test_a_multimodal_folder_is_loaded"
_LLAMA = "tests/inference/test_engine.py::test_logits_are_the_models_own"
_EXPERTS = "tests/training/test_adapters.py::test_an_adapter_over_experts_is_saved_loaded_and_merged"
_DENSE, _MIXED, _WHOLE = (_IN_ROWS, _LOGITS), (_IN_ROWS, _LOGITS, _EXPERTS), (_IN_ROWS, _SEEING)
_SWITCH = "enable_thinking; -Thinking always, -Instruct never"
_BY_TEMPLATE = "enable_thinking, reasoning_effort (3.8); the template has the default"
TABLE = (
    ModelFamily("qwen2", "Qwen2, Qwen2.5", "ours", "hermes (Qwen2: qwen_agent)", "none", _DENSE),
    ModelFamily("qwen2_moe", "Qwen1.5-MoE, Qwen2-57B-A14B", "ours", "qwen_agent", "none", _MIXED),
    ModelFamily("qwen3", "Qwen3", "ours", "hermes", _SWITCH, _DENSE),
    ModelFamily("qwen3_moe", "Qwen3-MoE, Qwen3-Coder", "ours", "hermes (Coder: xml)", _SWITCH, _MIXED),
    ModelFamily("qwen3_next", "Qwen3-Next", "ours", "hermes", "-Thinking always, -Instruct never", _MIXED),
    ModelFamily("qwen3_5", "Qwen3.5, 3.6, 3.8 as published", "ours", "xml", _BY_TEMPLATE, _WHOLE),
    ModelFamily("qwen3_5_text", "their text part alone", "ours", "xml", _BY_TEMPLATE, _DENSE),
    ModelFamily("qwen3_5_moe", "the same with experts", "ours", "xml", _BY_TEMPLATE, _WHOLE),
    ModelFamily("qwen3_5_moe_text", "their text part alone", "ours", "xml", _BY_TEMPLATE, _MIXED),
    ModelFamily("llama", "Llama 2 and 3, SmolLM2", "ours", PROBED, PROBED, (_IN_ROWS, _LLAMA)),
    ModelFamily("mistral", "Mistral 7B and its like", "ours", PROBED, PROBED, _DENSE),
    ModelFamily("phi3", "Phi-3, Phi-4", "vLLM", PROBED, PROBED, (_IN_ROWS,)),
    ModelFamily("gemma", "Gemma", "vLLM", PROBED, PROBED, (_IN_ROWS,)),
    ModelFamily("olmo2", "OLMo 2", "vLLM", PROBED, PROBED, (_IN_ROWS,)),
    ModelFamily("smollm3", "SmolLM3", "vLLM", PROBED, PROBED, (_IN_ROWS,)),
)
# Model types whose rows are shown to be right; any other is proven before its first step or refused.
TRAINABLE = tuple(family.model_type for family in TABLE if family.trains)
# Those that our own engine serves.
ENGINE_SERVES = tuple(family.model_type for family in TABLE if family.engine == "ours")
# Types whose recurrent layers keep the conversations of a row apart (their layers of kind linear_attention).
HYBRIDS = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
# Types whose router's loss is computed, where their config.json turns it on.
BALANCED = ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text")

_TITLES = ("type", "models", "trains in rows", "engine", "calls", "thinking", "proven by")


def _cells(family: ModelFamily) -> tuple[str, ...]:
    rows = "all layouts" if family.trains == ALL_LAYOUTS else ", ".join(family.trains) or "no"
    said = (family.models, rows, family.engine, family.dialect, family.thinking)
    return (family.model_type, *said, ", ".join(test.rpartition("::")[2] for test in family.proven))


def families_table() -> str:
    """The table of families, for docs/models.md."""
    lines = [_TITLES, ("---",) * len(_TITLES)]
    for family in TABLE:
        kind, *said, _ = _cells(family)
        tests = "<br>".join(f"`{test}`" for test in family.proven)
        lines.append((f"`{kind}`", *said, tests))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def listing() -> str:
    """The same in columns, for a terminal."""
    rows = [_TITLES, *map(_cells, TABLE)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
    return "\n".join(lines)


# What in a config.json tells for certain that rows of several conversations would be learnt wrong, and why.
# Kinds of layers that keep conversations apart.
_ATTENDS = {"full_attention", "attention", "sliding_attention", "chunked_attention"}
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
_ROUTER = "output_router_logits is true: the router's own loss is not computed for it; set it to false in config.json"


def check_trainable(config: Mapping[str, Any], file: object) -> None:
    """Raise ModelError where rows of several conversations would certainly be learnt wrong. `file`: its name."""
    if why := _why_not_trained(config):
        raise ModelError(
            f"{file}: a model of type '{config.get('model_type')}' cannot be trained here: {why};"
            f" model types that work: {', '.join(TRAINABLE)}"
        )


def check_served(config: Mapping[str, Any], file: object) -> None:
    """Raise ModelError where our engine does not serve the model's type. `file`: the config's name."""
    if (kind := config.get("model_type")) not in ENGINE_SERVES:
        raise ModelError(
            f"{file}: a model of type '{kind}' is not served by the engine; model types that it serves:"
            f" {', '.join(ENGINE_SERVES)}; for others use --engine vllm of simple_try_create_service.py"
        )


def _why_not_trained(config: Mapping[str, Any]) -> str:
    """What in a config.json (or its text_config) tells for certain that training would be wrong; else ""."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        kind = part.get("model_type", config.get("model_type"))
        hybrid = kind in HYBRIDS
        apart = _ATTENDS | {"linear_attention"} if hybrid else _ATTENDS
        types = part.get("layer_types")
        others = {str(one) for one in types} - apart if isinstance(types, list) else set()
        if others:
            return f"layer_types has {', '.join(sorted(others))}: {_STATE}"
        states = [name for name in _STATES if not (hybrid and name == "linear_conv_kernel_dim")]
        if state := [name for name in states if part.get(name) is not None]:
            return f"it has {state[0]}: {_STATE}"
        for name, why in _CHANGES.items():
            if part.get(name) not in (None, 1, 1.0):
                return f"{name} is {part[name]}: {why}"
        if part.get("model_type") in _SINKS:
            return _SINKS[part["model_type"]]
        # Of a model built of parts transformers reads the text's own setting.
        balanced = kind in BALANCED and not (part is config and isinstance(text, dict))
        if part.get("output_router_logits") and part.get("router_aux_loss_coef") != 0 and not balanced:
            return _ROUTER
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
