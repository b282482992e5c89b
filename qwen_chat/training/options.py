"""transformers' TrainingArguments from a Run, with what the device decides.

In: a Run (flags/run_options.py). Out: the arguments of a joined rank, and each decision with its reason.
"""

import os
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from qwen_chat import hardware, place
from qwen_chat.errors import TrainingError
from qwen_chat.flags import deepspeed_file, training_fields
from qwen_chat.flags.run_options import Run
from qwen_chat.training import memory_plan
from qwen_chat.training.ranks import start_deepspeed

# Flags of ours that are fields of TrainingArguments under the same name.
SAME_NAME = (
    *("num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size", "learning_rate"),
    *("gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta2"),
    *("eval_strategy", "save_strategy", "save_steps", "save_total_limit", "logging_steps"),
)


def training_arguments(run: Run, output: Path, *, checkpointing: bool) -> tuple[Any, list[str]]:
    """transformers' arguments from ours, with the ranks joined; and what was decided, with reasons.

    Must be called before the model is loaded: under ZeRO-3 `from_pretrained` shares the weights out at once.
    """
    accelerator = memory_plan.on_accelerator(run)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    device = hardware.training_device(run.train.device, use_cpu=bool(run.extra.get("use_cpu")))
    numbers, decisions = memory_plan.number_type(run)
    decisions = [str(device), *decisions]
    options = field_values(run, checkpointing=checkpointing) | {"output_dir": str(output)}
    options |= {"bf16": numbers == "bfloat16", "fp16": numbers == "float16"}
    if run.train.deepspeed is not None:
        options["deepspeed"] = deepspeed_file.read_deepspeed(run.train.deepspeed)[0]
        start_deepspeed(accelerator)
        options["use_cpu"] = False  # accelerate leaves DeepSpeed out where it is True
        if not accelerator:
            options["accelerator_config"] = {"use_configured_state": True}  # the one of start_deepspeed
    elif not accelerator:
        options["use_cpu"] = True  # accelerate starts no process group on a CPU where it is False
        if processes > 1:
            options["ddp_backend"] = "gloo"
    if not accelerator:
        options["dataloader_pin_memory"] = False
    args = TrainingArguments(**(options | dict(run.extra)))
    args._n_gpu = min(args.n_gpu, 1)  # a process trains on one; finetune.sh starts one for each
    if args.world_size != processes:  # else every rank would train alone, without a word
        raise TrainingError(
            f"{processes} processes were started but {args.world_size} are joined; start them with {place.LAUNCHER}"
        )
    if args.device.type != device.kind:
        raise TrainingError(f"{device} was decided, but transformers trains on {args.device}; give --device")
    return args, decisions


def field_values(run: Run, *, checkpointing: bool) -> dict[str, Any]:
    """Fields of TrainingArguments from our flags, less what the device decides; the user's own come on top."""
    train = run.train
    options = {name: getattr(train, name) for name in SAME_NAME} | {
        "report_to": list(train.report_to),
        "activation_checkpointing": checkpointing,  # transformers' new word for gradient checkpointing
        "activation_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "ddp_find_unused_parameters": False,  # every row, a filler too, reaches every weight that is trained
        "remove_unused_columns": False,  # the loss needs every key of the batch
        "label_names": ["labels"],
        "logging_nan_inf_filter": False,  # a loss that is not a number stops the run here
        "disable_tqdm": False,  # True hides our bar; transformers' own is never shown
    }
    if train.eval_strategy == "steps":
        options["eval_steps"] = train.save_steps  # transformers would take logging_steps: every step
    metric = str(run.extra.get("metric_for_best_model", "loss"))
    compares = train.keep_best or train.save_strategy == "best" or run.extra.get("load_best_model_at_end")
    if (
        compares
        or "metric_for_best_model" in run.extra
        or train.lr_scheduler_type in training_fields.BY_METRIC
    ):
        # transformers takes every metric that does not end with "loss" for better when it grows.
        options |= {
            "metric_for_best_model": metric,
            "greater_is_better": training_fields.more_is_better(metric),
        }
    return options
