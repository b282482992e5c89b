"""The words of a training run, read: a run, or every value and combination that cannot work.

In: a list of words from the command line. Out: a `Run`, or one OptionError with a line for each problem: the flag,
why, the cure. Neither torch nor transformers is imported: `--help` and every refusal come at once.
"""

import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from qwen_chat import hardware
from qwen_chat.errors import MissingDependency, OptionError
from qwen_chat.flags import config_file, training_fields
from qwen_chat.flags.deepspeed_file import deepspeed_problems
from qwen_chat.flags.parser import Values, read
from qwen_chat.flags.run_options import (
    EXPERTS,
    DataArguments,
    LoraArguments,
    ModelArguments,
    Run,
    TrainArguments,
    target_words,
)


def read_run(argv: Sequence[str], about: str = "") -> Run:
    """finetune.py's words as a run; OptionError with all problems at once."""
    return read_run_and(argv, about=about)[0]


def read_run_and(
    argv: Sequence[str], *more: type, about: str = "", needs_data: bool = True
) -> tuple[Run, Values]:
    """The same with a script's own groups beside it, which stand in the Values; a plan needs no data."""
    groups = [ModelArguments, DataArguments, LoraArguments, TrainArguments, *more]
    path = config_file.named(argv)
    config = config_file.ConfigFile(()) if path is None else config_file.read_config_file(path)
    values = read(argv, groups, about=about, others=training_fields.FLAGS, before=config.flags)
    kept = values.given
    if config.record:  # it has every option, those that nobody gave too
        own = values.given - values.places.keys()
        values = replace(values, given=own | frozenset(config.record.get("given", ())) - config_file.OWN)
        kept = values.given if "preset" in own else kept  # asked for beside the record, it chooses anew
    run = replace(Run.of(values, kept), repeats=config.record)
    if found := problems(run, needs_data=needs_data):
        raise OptionError("\n".join(_placed(line, values.places) for line in found))
    return run, values


def _placed(problem: str, places: Mapping[str, str]) -> str:
    """The problem of a flag that a file gave, with its place there."""
    flag = re.match(r"--(\w+)", problem)
    place = places.get(flag[1]) if flag else None
    return problem if place is None else f"{place}: {problem}"


def problems(run: Run, *, needs_data: bool = True) -> list[str]:
    """Every value or combination that cannot work, one line each: the flag, why, the cure."""
    options = run.as_dict()
    if "warmup_steps" not in run.given:
        del options["warmup_steps"]  # --warmup_ratio's
    found = range_problems(options)
    found += [
        f"--{name}: an empty value; give one, or leave the flag out"
        for name in sorted(run.given)
        if (value := options.get(name)) == "" or (isinstance(value, tuple) and "" in value)
    ]
    if {"warmup_ratio", "warmup_steps"} <= run.given:
        found.append("--warmup_ratio and --warmup_steps: give one of them")
    found += [
        f"--{name} {reason}" if reason.startswith("is ") else f"--{name}: {reason}"
        for name in run.extra
        if (reason := training_fields.refusal(name)) is not None
    ]
    found += [*_part_problems(run), *_data_problems(run, needs_data), *_lora_problems(run)]
    if needs_data:  # a plan may be for another machine
        found += missing_packages(run)
    if run.train.bf16 and run.train.fp16:
        found.append("--bf16 and --fp16: give one of them")
    device, use_cpu = run.train.device, bool(run.extra.get("use_cpu"))
    if "use_cpu" in run.given and device != "auto" and use_cpu != (device == "cpu"):
        found.append(
            f"--device {device} and --use_cpu {use_cpu}: they contradict each other; give one of them"
        )
    else:
        try:
            hardware.training_device(device, use_cpu=use_cpu)
        except OptionError as error:
            found.append(str(error))
    if not hardware.has_accelerator():
        if run.extra.get("ddp_backend") not in (None, "gloo", "mpi"):
            found.append(f"--ddp_backend {run.extra['ddp_backend']} needs an accelerator; leave it out here")
        if run.train.fp16:
            found.append("--fp16 needs an accelerator; leave it out here")
    return [*found, *deepspeed_problems(run)]


Range = tuple[Callable[[float], bool], str]
_ABOVE_0: Range = (lambda value: value > 0, "a number above 0")
_FROM_0: Range = (lambda value: value >= 0, "0 or more")
_SHARE: Range = (lambda value: 0 <= value < 1, "a share from 0 up to 1")
_SEED: Range = (lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295")
RANGES: Mapping[str, Range] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _ABOVE_0),
    **dict.fromkeys(("gradient_accumulation_steps", "model_max_length", "lora_r", "lora_alpha"), _ABOVE_0),
    **dict.fromkeys(("save_steps", "logging_steps", "eval_steps"), _ABOVE_0),
    "num_train_epochs": (lambda value: 0 < value <= 1e6, "a number above 0, and at most 1,000,000"),
    **dict.fromkeys(("torch_empty_cache_steps", "ddp_timeout", "ddp_bucket_cap_mb"), _ABOVE_0),
    **dict.fromkeys(("dataloader_prefetch_factor", "patience"), _ABOVE_0),
    "eval_share": (lambda value: 0 < value < 1, "a share between 0 and 1, such as 0.05"),
    "learning_rate": (lambda value: 0 < value < 1, "a number between 0 and 1, such as 2e-4"),
    "warmup_ratio": (lambda value: 0 <= value <= 1, "a share between 0 and 1"),
    "loraplus_lr_ratio": (lambda value: value >= 1, "1 or more; 16 is usual"),
    "max_steps": (
        lambda value: 0 < value <= 1e9 or value == -1,
        "a number from 1 to 1,000,000,000, or -1: --num_train_epochs says",
    ),
    **dict.fromkeys(("lora_dropout", "adam_beta1", "adam_beta2"), _SHARE),
    **dict.fromkeys(("weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"), _FROM_0),
    **dict.fromkeys(("eval_delay", "dataloader_num_workers"), _FROM_0),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
}


def range_problems(options: Mapping[str, Any]) -> list[str]:
    """The options that are not in their range, one line each."""
    values = {name: options[name] for name in RANGES if options.get(name) is not None}
    return [
        f"--{name} {value}: expected {RANGES[name][1]}"
        for name, value in values.items()
        if not (math.isfinite(value) and RANGES[name][0](value))
    ]


# What may not be installed, and the wheel's extra that brings it.
EXTRAS = {"bitsandbytes": "qlora", "deepspeed": "deepspeed", "tensorboard": "track"}


def missing_packages(run: Run) -> list[str]:
    """Packages that a flag needs and that are not installed, one line each."""
    optimizer = str(run.extra.get("optim", "adamw_torch"))
    needs = {
        f"--optim {optimizer}": training_fields.OPTIMIZERS.get(optimizer),
        "--q_lora": "bitsandbytes" if run.lora.q_lora else None,
        f"--deepspeed {run.train.deepspeed}": "deepspeed" if run.train.deepspeed is not None else None,
        "--report_to tensorboard": "tensorboard" if "tensorboard" in run.train.report_to else None,
    }
    return [
        str(MissingDependency(package, flag, extra=EXTRAS[package]))
        for flag, package in needs.items()
        if package is not None and importlib.util.find_spec(package) is None
    ]


def _part_problems(run: Run) -> list[str]:
    """Optimizer, schedule and workers: names, and options that the named one would ignore."""
    train, extra, found = run.train, run.extra, []
    optimizer, schedule = str(extra.get("optim", "adamw_torch")), train.lr_scheduler_type
    if optimizer not in training_fields.OPTIMIZERS:
        reason = training_fields.REFUSED_OPTIMIZERS.get(optimizer, "no such optimizer")
        known = ", ".join(training_fields.OPTIMIZERS)
        found.append(f"--optim {optimizer}: {reason}; expected one of {known}")
    elif extra.get("optim_args") and optimizer not in training_fields.WITH_ARGUMENTS:
        found.append(
            f"--optim_args with --optim {optimizer}, which takes none; leave it out, or choose one of"
            f" {', '.join(sorted(training_fields.WITH_ARGUMENTS))}"
        )
    if schedule not in training_fields.SCHEDULES:
        known = ", ".join(training_fields.SCHEDULES)
        found.append(f"--lr_scheduler_type {schedule}: no such schedule; expected one of {known}")
    if extra.get("lr_scheduler_kwargs") and schedule in training_fields.WITHOUT_KWARGS:
        found.append(
            f"--lr_scheduler_kwargs with --lr_scheduler_type {schedule}, which takes none; leave it out"
        )
    warming = {"warmup_ratio", "warmup_steps"} & run.given
    if warming and train.warmup_steps and schedule in training_fields.WITHOUT_WARMUP:
        found.append(
            f"--{min(warming)} with --lr_scheduler_type {schedule}, which does not warm up; leave it out"
            + (", or use constant_with_warmup" if schedule == "constant" else "")
        )
    if not extra.get("dataloader_num_workers"):
        found += [
            f"--{name} without --dataloader_num_workers: there is no worker; give a number of them"
            for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers")
            if extra.get(name)
        ]
    if run.model.attn_implementation not in (None, "qwen_chat") and train.layout == "shared_prefix":
        found.append(
            f"--attn_implementation {run.model.attn_implementation}: knows nothing of prefixes that conversations "
            "share; add --layout packed, or leave it out"
        )
    if train.resume not in ("auto", "never") and not Path(train.resume).is_dir():
        found.append(
            f"--resume {train.resume}: no such folder; expected auto, never or a checkpoint's folder"
        )
    return found


MOST_TIMES = 1_000  # that an epoch sees a conversation; each time takes a place in memory


def weight_problems(data: DataArguments) -> list[str]:
    """What is wrong with --data_weights."""
    found = []
    if data.data_weights and len(data.data_weights) != len(data.data_path):
        found.append(
            f"--data_weights has {len(data.data_weights)} numbers for {len(data.data_path)} data files; "
            "give one for each -d, in the same order"
        )
    found += [
        f"--data_weights: {weight:g}; expected a number from 0 (not used) to {MOST_TIMES:,}"
        for weight in data.data_weights
        if not 0 <= weight <= MOST_TIMES
    ]
    return found


def held_out_problems(data: DataArguments) -> list[str]:
    """What is wrong with --eval_share and --eval_data_path."""
    if data.eval_share is not None and data.eval_data_path:
        return ["--eval_share and --eval_data_path: give one of them"]
    return []


def _data_problems(run: Run, needs_data: bool) -> list[str]:
    """What the data files do not allow, held-out ones above all."""
    data, train, extra, found = run.data, run.train, run.extra, weight_problems(run.data)
    if needs_data and not data.data_path:
        found.append("no data: give the conversations with -d FILE")
    found += held_out_problems(data)
    best = {
        "--patience": train.patience,
        "--keep_best": train.keep_best,
        "--save_strategy best": train.save_strategy == "best",
        "--load_best_model_at_end": train.patience is None and extra.get("load_best_model_at_end"),
        "--metric_for_best_model": extra.get("metric_for_best_model"),
    }
    asked = [flag for flag, on in best.items() if on]
    needing = {
        f"--lr_scheduler_type {train.lr_scheduler_type}": train.lr_scheduler_type
        in training_fields.BY_METRIC,
        f"--eval_strategy {train.eval_strategy}": train.eval_strategy not in (None, "no"),
        **{f"--{name}": extra.get(name) for name in ("eval_steps", "eval_delay", "eval_on_start")},
    }
    if not data.holds_out:
        found += [
            f"{flag} without --eval_data_path: the best is found on held-out conversations; give some"
            for flag in asked
        ]
        found += [
            f"{flag} without --eval_data_path: give held-out conversations"
            for flag, on in needing.items()
            if on
        ]
    elif asked and train.eval_strategy == "no":
        found.append(f"{asked[0]} with --eval_strategy no: nothing would be compared; leave that out")
    return [*found, *_best_problems(run)]


def _best_problems(run: Run) -> list[str]:
    """The metric by which a checkpoint is the best one, and whether there is a checkpoint where it is measured."""
    train, extra, found = run.train, run.extra, []
    metric = str(extra.get("metric_for_best_model", "loss"))
    if metric.removeprefix("eval_") not in training_fields.METRICS:
        found.append(
            f"--metric_for_best_model {metric}: not measured; expected one of {', '.join(training_fields.METRICS)}"
        )
        return found
    more = training_fields.more_is_better(metric)
    if extra.get("greater_is_better") not in (None, more):
        found.append(
            f"--greater_is_better {not more}: of {metric} {'more' if more else 'less'} is better; leave it out"
        )
    mode = (extra.get("lr_scheduler_kwargs") or {"mode": "min"}) if more else None
    if (
        train.lr_scheduler_type in training_fields.BY_METRIC
        and isinstance(mode, dict)
        and mode.get("mode") != "max"
    ):
        found.append(
            f"--lr_scheduler_type {train.lr_scheduler_type} with --metric_for_best_model {metric}: it looks for a"
            ' minimum; add --lr_scheduler_kwargs \'{"mode": "max"}\''
        )
    keeps = "--patience" if train.patience is not None else "--keep_best"
    if (
        (train.keep_best or train.patience is not None)
        and run.data.holds_out
        and train.save_strategy != "best"
    ):
        apart = train.save_strategy != train.eval_strategy
        if train.save_strategy == "steps" and extra.get("eval_steps") not in (None, train.save_steps):
            apart = True
        if apart and train.eval_strategy != "no":
            found.append(
                f"{keeps} where evaluation and checkpoint are not at the same step: give --save_strategy and"
                " --eval_strategy (and --save_steps and --eval_steps) the same values, or --save_strategy best"
            )
    return found


def _lora_problems(run: Run) -> list[str]:
    lora, found = run.lora, []
    adapter_flags = {f.name for f in fields(LoraArguments)} - {"use_lora", "q_lora"}
    stray = sorted(adapter_flags & run.given)
    if stray and not lora.use_lora:
        names = ", ".join(f"--{name}" for name in stray)
        found.append(f"{names} without --use_lora: a full fine-tune has no adapter; add --use_lora True")
    if lora.q_lora and lora.lora_init.startswith("pissa"):
        found.append(
            "--q_lora with --lora_init pissa: PiSSA changes the base, 4 bits cannot; use --use_lora alone"
        )
    if lora.use_lora and not lora.lora_weight_path and EXPERTS in target_words(lora.lora_target_modules):
        told = f"--lora_target_modules {' '.join(lora.lora_target_modules)}"
        if lora.lora_dropout:
            found.append(
                f"--lora_dropout {lora.lora_dropout} with {told}: peft has no dropout before an adapter over experts;"
                " give --lora_dropout 0"
            )
        found += [
            f"{flag} with {told}: peft has none for experts; leave one of them out"
            for flag, on in (("--use_dora", lora.use_dora), ("--lora_init", lora.lora_init != "default"))
            if on
        ]
    if not re.fullmatch(r"default|pissa(_niter_\d+)?", lora.lora_init):
        found.append(f"--lora_init {lora.lora_init}: expected default, pissa or pissa_niter_N")
    if lora.lora_weight_path and lora.lora_init != "default":
        found.append(
            "--lora_weight_path with --lora_init: an adapter that is continued is not initialised anew"
        )
    shape = {"lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_bias"}
    shape |= {"use_dora", "use_rslora", "trainable_tokens"}
    if lora.lora_weight_path and shape & run.given:
        names = ", ".join(f"--{name}" for name in sorted(shape & run.given))
        found.append(f"{names} with --lora_weight_path: the adapter brings its own; leave them out")
    if lora.lora_weight_path and not (Path(lora.lora_weight_path) / "adapter_config.json").is_file():
        found.append(
            f"--lora_weight_path {lora.lora_weight_path}: no adapter_config.json there; expected an adapter"
        )
    return found
