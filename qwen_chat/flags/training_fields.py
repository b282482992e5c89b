"""Every field of transformers' TrainingArguments, and what becomes of it here.

In: nothing. Out: FIELDS, from which come the early refusals (run_options.py), `--help_all`, and the table in
docs/finetune.md; `trainer_options`, the fields as flags. A field without an entry is refused: what nobody has
looked at may be ignored, or wrong. Neither torch nor transformers is imported.
"""

import ast
import importlib.util
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from qwen_chat import place
from qwen_chat.flags.parser import Option, OtherFlags

State = Literal["works", "ours", "refused"]


@dataclass(frozen=True)
class Entry:
    """Fields that share a fate. `says`: the test that holds a field that works, else why, with the cure.

    `harmless` are values that a field may have all the same, because they ask for what is done anyway; a
    refused field may always have transformers' own default.
    """

    names: tuple[str, ...]
    state: State
    says: str
    harmless: tuple[object, ...] = ()


def _works(names: str, test: str) -> Entry:
    return Entry(tuple(names.split()), "works", test)


def _ours(names: str, says: str, *harmless: object) -> Entry:
    return Entry(tuple(names.split()), "ours", says, harmless)


def _refused(names: str, says: str, *harmless: object) -> Entry:
    return Entry(tuple(names.split()), "refused", says, harmless)


_SCRIPT = "tests/scripts/test_finetune.py::"
_FIELDS = "tests/flags/test_training_fields.py::"
_TRAINING = "tests/training/test_trainer.py::"

ENTRIES = (
    # What a step is
    _works("output_dir", _SCRIPT + "test_each_method_trains_saves_loads_and_answers"),
    _works(
        "per_device_train_batch_size gradient_accumulation_steps gradient_checkpointing",
        _SCRIPT + "test_the_curve_does_not_depend_on_accumulation_layout_or_laziness",
    ),
    _works("max_steps num_train_epochs", _FIELDS + "test_steps_and_epochs"),
    _refused(
        "auto_find_batch_size",
        "would change what an optimizer step is; choose --per_device_train_batch_size",
    ),
    _refused("average_tokens_across_devices", "is what a step's loss is divided by here; leave it on"),
    _refused("label_smoothing_factor", "the loss here is plain cross-entropy; leave it out"),
    _refused(
        "neftune_noise_alpha",
        "its noise would depend on the row that a conversation lies in; leave it out",
    ),
    # Optimizer and schedule
    _works(
        "learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon",
        _FIELDS + "test_the_optimizer_gets_its_numbers",
    ),
    _works("optim optim_args", _FIELDS + "test_each_optimizer_takes_a_step"),
    _refused("optim_target_modules", "belongs to GaLore and APOLLO, which --optim refuses; leave it out"),
    _works(
        "lr_scheduler_type lr_scheduler_kwargs warmup_steps",
        _FIELDS + "test_each_schedule_gives_its_rates",
    ),
    _works("max_grad_norm", _FIELDS + "test_the_gradient_is_clipped"),
    # Numbers and devices
    _works("bf16", "tests/training/test_memory_plan.py::test_the_number_type_on_a_cpu"),
    _works("fp16", "tests/training/test_memory_plan.py::test_the_number_type_on_a_gpu_is_the_plan_s"),
    _works("tf32", "tests/training/test_rehearsal.py::test_a_bad_value_is_one_line_that_names_its_flag"),
    _works("use_cpu seed data_seed", _TRAINING + "test_training_arguments_are_ours_and_the_users"),
    _refused(
        "bf16_full_eval fp16_full_eval",
        "held-out losses are computed as training computes them; leave it out",
    ),
    _refused("activation_checkpointing", "is called --gradient_checkpointing here (auto, True or False)"),
    _refused(
        "activation_checkpointing_kwargs gradient_checkpointing_kwargs",
        "checkpointing is always the kind that every adapter and ZeRO stage takes; leave it out",
        {"use_reentrant": False},
    ),
    _refused(
        "torch_compile torch_compile_backend torch_compile_mode",
        "the attention over shared prefixes cannot be compiled; leave it out",
    ),
    _refused(
        "use_liger_kernel liger_kernel_config",
        "the loss and the layers are replaced by the toolkit's own; leave it out",
    ),
    _refused("use_cache", "a training step keeps no cache of keys; leave it out"),
    # The log
    _works(
        "report_to logging_steps logging_first_step logging_strategy", _FIELDS + "test_what_reporters_get"
    ),
    _works(
        "run_name project log_level log_level_replica log_on_each_node disable_tqdm skip_memory_metrics"
        " include_num_input_tokens_seen torch_empty_cache_steps debug full_determinism dataloader_num_workers"
        " dataloader_persistent_workers dataloader_prefetch_factor dataloader_pin_memory",
        _FIELDS + "test_what_does_not_touch_the_weights",
    ),
    _ours("logging_nan_inf_filter", "a loss that is not a number stops the run", False),
    _refused(
        "trackio_space_id trackio_bucket_id trackio_static_space_id",
        "nothing is uploaded; leave it out, or set trackio's own environment variables",
    ),
    # Evaluation
    _works(
        "eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size",
        _FIELDS + "test_evaluations_come_when_they_are_asked_for",
    ),
    _refused(
        "eval_accumulation_steps eval_do_concat_batches eval_use_gather_object include_for_metrics"
        " batch_eval_metrics",
        "held-out losses are added up row by row, no outputs are kept; leave it out",
    ),
    _ours("prediction_loss_only", "no outputs are kept", True),
    # Checkpoints
    _works("save_strategy save_steps save_total_limit", _FIELDS + "test_checkpoints_come_and_go"),
    _works(
        "load_best_model_at_end metric_for_best_model greater_is_better",
        _FIELDS + "test_the_best_by_any_metric_is_kept",
    ),
    _works("resume_from_checkpoint", "tests/distributed/test_kill_resume.py"),
    _refused(
        "save_only_model",
        "a run could not go on from such a checkpoint: optimizer and schedule would begin anew; leave it out",
    ),
    _refused(
        "save_on_each_node", "every machine would clear the others' checkpoint; -o must be a shared disk"
    ),
    _refused("enable_jit_checkpoint", "SIGTERM already writes a checkpoint here; leave it out"),
    _refused(
        "ignore_data_skip", "a run that goes on sees exactly the data that it has not seen; leave it out"
    ),
    _refused("restore_callback_states_from_checkpoint", "no callback here has a state; leave it out"),
    _refused(
        "hub_token",
        "every user of the machine sees a command line; set the environment variable HF_TOKEN instead",
    ),
    _refused(
        "push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision",
        "nothing is uploaded while a run writes; afterwards: hf upload NAME OUTPUT_DIR",
    ),
    # Data
    _ours(
        "train_sampling_strategy length_column_name",
        "the seed orders the data; rows are balanced by length",
        "random",
    ),
    _ours("dataloader_drop_last", "every conversation is seen", False),
    _ours("remove_unused_columns label_names", "the loss needs every key of a row", False),
    _refused(
        "dataloader_multiprocessing_context dataloader_in_order",
        "rows come in the order of the seed, from forked workers; leave it out",
    ),
    # Processes
    _works("deepspeed", "tests/distributed/test_same_curve.py::test_same_curve"),
    _works(
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend"
        " ddp_timeout",
        "tests/distributed/test_same_curve.py::test_same_curve",
    ),
    _refused(
        "fsdp fsdp_config",
        f"its shards would not be gathered when the result is saved; use --deepspeed {place.deepspeed_file('zero3')}",
        "",
        {},
    ),
    _refused("parallelism_config", "cannot be given on the command line; use --deepspeed"),
    _refused(
        "accelerator_config",
        "rows are dealt to the processes by the toolkit; leave it out",
        {"split_batches": False},
        {"even_batches": True},
    ),
    _ours("local_rank", "the launcher says it in the environment"),
    # Words of scripts around transformers' Trainer
    _ours("do_train", "finetune.py trains", True),
    _ours("do_eval", "--eval_strategy decides"),
    _ours("do_predict", "finetune/evaluate.py does that", False),
)

FIELDS: Mapping[str, Entry] = {name: entry for entry in ENTRIES for name in entry.names}


def harmless(name: str, value: object) -> bool:
    """Whether a field that may not be given has a value that asks for what is done anyway."""
    entry = FIELDS.get(name)
    if entry is None or entry.state == "works":
        return False
    if any(value == known and type(value) is type(known) for known in entry.harmless):
        return True
    if entry.state == "ours":
        return False
    default = next(option.default for option in trainer_options() if option.name == name)
    off = (None, False, "False", "false", "none")
    return bool(value == default or (default in (None, False, "") and value in off))


def refusal(name: str) -> str | None:
    """Why a field may not be given, with the cure; None for one that works."""
    entry = FIELDS.get(name)
    if entry is None:
        return "is new in transformers and has not been tried here; leave it out"
    if entry.state == "ours":
        return "is set by the toolkit itself; leave it out"
    return entry.says if entry.state == "refused" else None


def markdown() -> str:
    """The Markdown table of docs/finetune.md."""
    lines = ["| fields | |", "| --- | --- |"]
    for entry in ENTRIES:
        names = ", ".join(f"`{name}`" for name in entry.names)
        says = {
            "works": f"works: `{entry.says}`",
            "ours": f"set by the toolkit: {entry.says}",
            "refused": f"refused: {entry.says}",
        }
        lines.append(f"| {names} | {says[entry.state]} |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------- values that stand for parts

_BITS = """adamw_8bit adamw_bnb_8bit paged_adamw_32bit paged_adamw_8bit ademamix ademamix_8bit
    paged_ademamix_32bit paged_ademamix_8bit lion_32bit lion_8bit paged_lion_32bit paged_lion_8bit
    rmsprop_bnb rmsprop_bnb_8bit rmsprop_bnb_32bit"""
_EARLY = """galore_adamw_layerwise galore_adamw_8bit_layerwise galore_adafactor_layerwise
    apollo_adamw_layerwise lomo adalomo"""
_UNTRIED = """galore_adamw galore_adamw_8bit galore_adafactor apollo_adamw stable_adamw grokadamw
    adamw_torch_4bit adamw_torch_8bit adamw_anyprecision adamw_torch_xla adamw_torch_npu_fused"""

# Optimizers that are tested (test_each_optimizer_takes_a_step), and the package that each needs beside torch.
OPTIMIZERS: Mapping[str, str | None] = {
    **dict.fromkeys(["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]),
    **dict.fromkeys(_BITS.split(), "bitsandbytes"),
}
REFUSED_OPTIMIZERS: Mapping[str, str] = {
    **dict.fromkeys(
        ["schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"],
        "its averaged weights would be neither evaluated nor saved",
    ),
    **dict.fromkeys(_EARLY.split(), "changes the weights during backward, before a step can be checked"),
    **dict.fromkeys(_UNTRIED.split(), "has not been tried here"),
}
# Optimizers that read --optim_args; the others would ignore it.
WITH_ARGUMENTS = frozenset(
    {"sgd", "adagrad", "rmsprop"}
    | {"ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"}
)

SCHEDULES = (
    *("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "cosine_with_min_lr"),
    *("cosine_warmup_with_min_lr", "polynomial", "inverse_sqrt", "warmup_stable_decay"),
    *("reduce_lr_on_plateau", "greedy"),
)
WITHOUT_WARMUP = frozenset({"constant", "reduce_lr_on_plateau", "greedy"})  # they would ignore it
WITHOUT_KWARGS = frozenset({"constant", "constant_with_warmup"})  # likewise --lr_scheduler_kwargs
BY_METRIC = frozenset({"reduce_lr_on_plateau", "greedy"})  # they look at held-out data

# What held-out data are measured by, and whether more is better.
METRICS: Mapping[str, bool] = {"loss": False, "perplexity": False, "token_accuracy": True}


def more_is_better(metric: str) -> bool:
    """`eval_token_accuracy` -> True. KeyError for a metric that there is none of."""
    return METRICS[metric.removeprefix("eval_")]


# ------------------------------------------------------------------------------------- the fields as flags

OLD = {"use_cpu": ("no_cuda",)}
# What earlier versions of transformers had.
GONE = {
    "push_to_hub_token": "every user of the machine sees a command line; set HF_TOKEN instead",
    "group_by_length": "rows are always balanced by length; leave it out",
    "overwrite_output_dir": "nothing is ever overwritten; give a new folder with -o",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR instead",
    "jit_mode_eval": "held-out losses are computed as training computes them; leave it out",
}


@lru_cache(maxsize=1)
def trainer_options() -> tuple[Option, ...]:
    """Every field of TrainingArguments, read from its source: importing it costs seconds and torch."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return ()
    tree = ast.parse(Path(spec.origin).with_name("training_args.py").read_text(encoding="utf-8"))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments")
    found = []
    for node in body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        name, default, text = node.target.id, None, ""
        # The default and the help text of `field(default=..., metadata={"help": ...})`.
        for keyword in node.value.keywords if isinstance(node.value, ast.Call) else ():
            try:
                literal = ast.literal_eval(keyword.value)
            except ValueError:
                continue
            if keyword.arg == "default":
                default = literal
            elif keyword.arg == "metadata":
                text = " ".join(str(literal.get("help", "")).split())
        kind = _type(node.annotation)
        found.append(Option(name, kind, default, text, old=OLD.get(name, ()), refused=refusal(name)))
    return tuple(found)


def _type(annotation: ast.expr) -> object:
    """`float | None` -> float | None; names that are not plain types (SchedulerType) are written as text."""
    plain: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str, "dict": dict, "list": list}
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    if "dict" in names or "list" in names:  # what stands inside the brackets is JSON's business
        names -= {"bool", "Any"}
    kinds: list[Any] = [plain[name] for name in sorted(names) if name in plain] or [str]
    if any(isinstance(node, ast.Constant) and node.value is None for node in ast.walk(annotation)):
        kinds.append(type(None))
    return typing.Union[tuple(kinds)]  # noqa: UP007  a union of a list that is only known here


FLAGS = OtherFlags(
    "Fields of transformers' TrainingArguments",
    trainer_options,
    gone=GONE,
    # The deepspeed launcher adds it; the environment says the same.
    unread=frozenset({"local_rank"}),
)
