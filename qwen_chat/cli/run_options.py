"""The options of a training run: their dataclasses, the defaults by method, and what cannot work together.

In: a list of words from the command line. Out: a `Run`, with the defaults that fit the method filled in, or one
OptionError that names every flag that cannot work, with its cure. Neither torch nor transformers is imported:
`--help` and every refusal come at once.

`read_run` is the whole of `finetune.py`: it also takes any field of transformers' TrainingArguments by name.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from qwen_chat import hardware
from qwen_chat.cli import training_fields
from qwen_chat.cli.parser import Values, option, read
from qwen_chat.errors import OptionError

LEARNING_RATES = {
    # A full fine-tune moves every weight, so in small steps; an adapter starts from zero and has few weights.
    "full": 1e-5,
    "lora": 2e-4,
    "qlora": 2e-4,
}


@dataclass(frozen=True)
class ModelArguments:
    """Model"""

    model: str | None = option(
        None, "local folder or hub name; without it the small demo model", "-m", "--model_name_or_path"
    )
    trust_remote_code: bool = option(False, "run Python code that comes with the model")
    attn_implementation: str | None = option(None, "attention of transformers by its name; chosen without it")


@dataclass(frozen=True)
class DataArguments:
    """Data"""

    data_path: tuple[str, ...] = option(
        (),
        "conversations, one JSON object a line; several: -d A -d B or -d A B",
        "-d",
        old="data_paths",
        elsewhere="dataset train_file",
        appends=True,
    )
    data_weights: tuple[float, ...] = option(
        (),
        "one number for each data file: times that an epoch sees its conversations (0.5: half of them)",
    )
    eval_data_path: tuple[str, ...] = option(
        (), "held-out conversations", elsewhere="validation_file", appends=True
    )
    model_max_length: int = option(
        2048, "longest sequence in tokens", elsewhere="max_seq_length max_seq_len max_length cutoff_len"
    )
    too_long: Literal["drop", "truncate", "error"] = option(
        "drop", "a longer conversation is left out, loses its oldest turns, or stops the run"
    )
    train_on: Literal["all", "last", "everything"] = option(
        "all", "learn all replies, the last one only, or every token (the user's too)"
    )
    on_error: Literal["stop", "skip"] = option("stop", "bad lines stop the run, or are counted and left out")
    tool_style: Literal["auto", "hermes", "qwen_agent"] = option("auto", "how tools and calls are written")
    tool_language: Literal["auto", "en", "zh"] = option("auto", "wording of the qwen_agent style")
    lazy_preprocess: bool = option(False, "tokenise on first use instead of all before training")


@dataclass(frozen=True)
class LoraArguments:
    """Adapter (LoRA, Q-LoRA)"""

    use_lora: bool = option(False, "train an adapter, the model stays as it is")
    q_lora: bool = option(False, "the same over a model in 4 bits (NF4); implies --use_lora")
    lora_r: int = option(64, "rank")
    lora_alpha: int = option(16, "scale: the adapter counts lora_alpha / lora_r times")
    lora_dropout: float = option(0.05, "dropout in front of the adapter")
    lora_target_modules: tuple[str, ...] = option(
        ("all-linear",), "layers to adapt: names, one regular expression, or all-linear", splits=False
    )
    lora_weight_path: str | None = option(None, "continue from this adapter")
    lora_bias: Literal["none", "all", "lora_only"] = option("none", "which biases are trained")
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(lora_r): high ranks keep learning")
    use_dora: bool = option(False, "direction and magnitude apart (DoRA)")
    lora_init: str = option(
        "default", "default, or pissa, pissa_niter_N: start from the largest singular vectors"
    )
    loraplus_lr_ratio: float | None = option(
        None, "LoRA+: B learns this many times faster than A (16 is usual)"
    )
    trainable_tokens: tuple[str, ...] = option(
        ("auto",),
        "tokens whose embedding row is trained too; auto: the chat marks of a model that never saw them",
        splits=False,
    )


@dataclass(frozen=True)
class TrainArguments:
    """Training"""

    output_dir: str | None = option(None, "where the result goes; a new folder without it", "-o")
    num_train_epochs: float = option(3.0, "times that the data is seen", elsewhere="epochs")
    per_device_train_batch_size: int = option(
        4, "conversations a row of a step holds, per process", elsewhere="batch_size"
    )
    gradient_accumulation_steps: int = option(2, "rows a step has, per process")
    per_device_eval_batch_size: int = option(4, "the same for evaluation")
    learning_rate: float | None = option(
        None, "2e-4 for an adapter, 1e-5 for a full fine-tune", elsewhere="lr"
    )
    lr_scheduler_type: str = option("cosine", "how the rate changes: cosine, linear, constant ...")
    warmup_ratio: float | None = option(None, "share of the steps in which the rate rises (0.03)")
    warmup_steps: float | None = option(None, "the same in steps; below 1 a share")
    weight_decay: float = option(0.01, "weight decay of AdamW")
    adam_beta2: float = option(0.95, "second moment's decay of AdamW, from 0 up to 1")
    bf16: bool | None = option(None, "bfloat16; without it where an accelerator has it")
    fp16: bool = option(False, "half precision with loss scaling (accelerators only)")
    gradient_checkpointing: bool | Literal["auto"] = option(
        "auto", "compute activations again instead of keeping them; auto: when memory asks for it"
    )
    layout: Literal["shared_prefix", "packed", "padded"] = option(
        "shared_prefix",
        "how conversations lie in rows; the result is the same, the time is not",
        elsewhere="packing padding_free",
        hint="packed (shared_prefix, the default, packs too)",
    )
    deepspeed: str | None = option(None, "DeepSpeed's JSON file: ds_config_zero2.json, ds_config_zero3.json")
    eval_strategy: Literal["no", "steps", "epoch"] | None = option(
        None,
        "when to evaluate; epoch where there is --eval_data_path",
        "--evaluation_strategy",
        old="evaluation_strategy",
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] = option("epoch", "when to write a checkpoint")
    save_steps: float = option(500, "steps between checkpoints; given alone it means --save_strategy steps")
    save_total_limit: int | None = option(2, "checkpoints that are kept; None, or below 1: all of them")
    logging_steps: float = option(1, "steps between two points of the reporters; train_log.jsonl has all")
    report_to: tuple[str, ...] = option(("none",), "tensorboard, wandb ...")
    keep_best: bool = option(
        False,
        "the best checkpoint is never removed: lowest held-out loss, or --metric_for_best_model",
        elsewhere="early_stopping_patience early_stopping_threshold",
        hint="True: the best checkpoint stays, the run goes to its end",
    )
    resume: str = option(
        "auto",
        "auto: go on from the newest sound checkpoint; never; or a checkpoint's folder",
        old="resume_from_checkpoint",
    )
    resume_anyway: bool = option(False, "go on from a checkpoint though data, model or options have changed")
    plan_anyway: bool = option(False, "start though the plan says that memory will not do")
    check: bool = option(False, "look at everything short of loading a model, then stop")


@dataclass(frozen=True)
class Run:
    """Everything that a training run was asked for. `extra` holds fields of TrainingArguments by name."""

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    train: TrainArguments
    extra: Mapping[str, Any]
    given: frozenset[str]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, values: Values) -> Run:
        """The groups of a run among the values read, with what depends on the method filled in."""
        run = cls(
            values[ModelArguments],
            values[DataArguments],
            values[LoraArguments],
            values[TrainArguments],
            values.extra,
            values.given,
            values.notes,
        )
        return with_defaults(run)

    @property
    def method(self) -> Literal["full", "lora", "qlora"]:
        return "qlora" if self.lora.q_lora else "lora" if self.lora.use_lora else "full"

    def as_dict(self) -> dict[str, Any]:
        """Every option by its flag's name, resolved."""
        flat: dict[str, Any] = {}
        for group in (self.model, self.data, self.lora, self.train):
            flat.update({f.name: getattr(group, f.name) for f in fields(group)})
        return {**flat, **self.extra}


def read_run(argv: Sequence[str], about: str = "") -> Run:
    """finetune.py's words as a run; OptionError with all problems at once."""
    return read_run_and(argv, about=about)[0]


def read_run_and(
    argv: Sequence[str], *more: type, about: str = "", needs_data: bool = True
) -> tuple[Run, Values]:
    """The same with a script's own groups beside it, which stand in the Values; a plan needs no data."""
    groups = [ModelArguments, DataArguments, LoraArguments, TrainArguments, *more]
    values = read(argv, groups, about=about, others=training_fields.FLAGS)
    run = Run.of(values)
    if found := problems(run, needs_data=needs_data):
        raise OptionError("\n".join(found))
    return run, values


def with_defaults(run: Run) -> Run:
    """Fill in what depends on the method and on other flags."""
    lora, train = run.lora, run.train
    if lora.q_lora and not lora.use_lora:
        lora = replace(lora, use_lora=True)
    run = replace(run, lora=lora, extra=_without_harmless(run.extra))
    limit, strategy = train.save_total_limit, train.save_strategy
    if "save_steps" in run.given and "save_strategy" not in run.given:
        strategy = "steps"
    when: Literal["steps", "epoch"] = "steps" if "eval_steps" in run.given else "epoch"
    if strategy == "steps" and (train.keep_best or run.extra.get("load_best_model_at_end")):
        when = "steps"  # the best checkpoint is measured where it is written
    return replace(
        run,
        train=replace(
            train,
            learning_rate=LEARNING_RATES[run.method] if train.learning_rate is None else train.learning_rate,
            eval_strategy=train.eval_strategy or (when if run.data.eval_data_path else "no"),
            warmup_steps=_warmup(train),
            save_strategy=strategy,
            save_total_limit=None if limit is not None and limit < 1 else limit,
        ),
    )


def _warmup(train: TrainArguments) -> float:
    """transformers' word: 1 and more are steps, so a share of the whole is the largest number below 1."""
    if train.warmup_steps is not None:
        return train.warmup_steps
    return 0.03 if train.warmup_ratio is None else min(train.warmup_ratio, math.nextafter(1, 0))


def _without_harmless(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Less the fields that may not be given but ask for what is done anyway (`--push_to_hub False`)."""
    defaults = {entry.name: entry.default for entry in training_fields.trainer_options()} if extra else {}
    return {
        name: value
        for name, value in extra.items()
        if not training_fields.harmless(name, value, defaults.get(name))
    }


# ----------------------------------------------------------------------------- combinations that cannot work


def problems(run: Run, *, needs_data: bool = True) -> list[str]:
    """Every value or combination that cannot work, one line each: the flag, why, the cure."""
    return [
        *_range_problems(run),
        *_field_problems(run),
        *_part_problems(run),
        *_data_problems(run, needs_data),
        *_lora_problems(run),
        *_device_problems(run),
        *_deepspeed_problems(run),
    ]


_ABOVE_0: tuple[Callable[[float], bool], str] = (lambda value: value > 0, "a number above 0")
_FROM_0: tuple[Callable[[float], bool], str] = (lambda value: value >= 0, "0 or more")
_SHARE: tuple[Callable[[float], bool], str] = (lambda value: 0 <= value < 1, "a share from 0 up to 1")
_SEED: tuple[Callable[[float], bool], str] = (
    lambda value: 0 <= value < 2**32,
    "a whole number from 0 to 4294967295",
)
RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _ABOVE_0),
    **dict.fromkeys(("gradient_accumulation_steps", "model_max_length", "lora_r", "lora_alpha"), _ABOVE_0),
    **dict.fromkeys(("num_train_epochs", "save_steps", "logging_steps", "eval_steps"), _ABOVE_0),
    **dict.fromkeys(("torch_empty_cache_steps", "ddp_timeout", "ddp_bucket_cap_mb"), _ABOVE_0),
    **dict.fromkeys(("dataloader_prefetch_factor",), _ABOVE_0),
    "learning_rate": (lambda value: 0 < value < 1, "a number between 0 and 1, such as 2e-4"),
    "warmup_ratio": (lambda value: 0 <= value <= 1, "a share between 0 and 1"),
    "max_steps": (lambda value: value > 0 or value == -1, "a number above 0, or -1: --num_train_epochs says"),
    **dict.fromkeys(("lora_dropout", "adam_beta1", "adam_beta2"), _SHARE),
    **dict.fromkeys(("weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"), _FROM_0),
    **dict.fromkeys(("eval_delay", "dataloader_num_workers"), _FROM_0),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
}


def _range_problems(run: Run) -> list[str]:
    options, found = run.as_dict(), []
    for name, (holds, expected) in RANGES.items():
        value = options.get(name)
        if name == "warmup_steps" and "warmup_steps" not in run.given:
            continue  # --warmup_ratio's
        if value is not None and not (math.isfinite(value) and holds(value)):
            found.append(f"--{name} {value}: expected {expected}")
    if {"warmup_ratio", "warmup_steps"} <= run.given:
        found.append("--warmup_ratio and --warmup_steps: give one of them")
    return found


def _field_problems(run: Run) -> list[str]:
    """Fields of TrainingArguments that the table refuses, by its reasons."""
    refusals = {name: training_fields.refusal(name) for name in run.extra}
    return [
        f"--{name} {reason}" if reason.startswith("is ") else f"--{name}: {reason}"
        for name, reason in refusals.items()
        if reason is not None
    ]


def _part_problems(run: Run) -> list[str]:
    """Optimizer, schedule and workers: names, and options that the named one would ignore."""
    train, extra, found = run.train, run.extra, []
    optimizer, schedule = str(extra.get("optim", "adamw_torch")), train.lr_scheduler_type
    if optimizer in training_fields.REFUSED_OPTIMIZERS:
        reason = training_fields.REFUSED_OPTIMIZERS[optimizer]
        found.append(f"--optim {optimizer}: {reason}; expected one of {_listed(training_fields.OPTIMIZERS)}")
    elif optimizer not in training_fields.OPTIMIZERS:
        found.append(
            f"--optim {optimizer}: no such optimizer; expected one of {_listed(training_fields.OPTIMIZERS)}"
        )
    else:
        package = training_fields.OPTIMIZERS[optimizer]
        if package is not None and importlib.util.find_spec(package) is None:
            found.append(f"--optim {optimizer} needs the package '{package}'; run: pip install {package}")
        if extra.get("optim_args") and optimizer not in training_fields.WITH_ARGUMENTS:
            found.append(
                f"--optim_args with --optim {optimizer}, which takes none; leave it out, or choose one of"
                f" {_listed(sorted(training_fields.WITH_ARGUMENTS))}"
            )
    if schedule not in training_fields.SCHEDULES:
        known = _listed(training_fields.SCHEDULES)
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


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _data_problems(run: Run, needs_data: bool) -> list[str]:
    """What the data files do not allow, held-out ones above all."""
    data, train, extra, found = run.data, run.train, run.extra, []
    if data.data_weights and len(data.data_weights) != len(data.data_path):
        found.append(
            f"--data_weights has {len(data.data_weights)} numbers for {len(data.data_path)} data files; "
            "give one for each -d, in the same order"
        )
    if not all(weight >= 0 and math.isfinite(weight) for weight in data.data_weights):
        found.append("--data_weights: a weight is below 0; expected 0 (not used) or more")
    if needs_data and not data.data_path:
        found.append("no data: give the conversations with -d FILE")
    best = {
        "--keep_best": train.keep_best,
        "--save_strategy best": train.save_strategy == "best",
        "--load_best_model_at_end": extra.get("load_best_model_at_end"),
        "--metric_for_best_model": extra.get("metric_for_best_model"),
    }
    asked = [flag for flag, on in best.items() if on]
    needing = {
        f"--lr_scheduler_type {train.lr_scheduler_type}": train.lr_scheduler_type
        in training_fields.BY_METRIC,
        f"--eval_strategy {train.eval_strategy}": train.eval_strategy not in (None, "no"),
        **{f"--{name}": extra.get(name) for name in ("eval_steps", "eval_delay", "eval_on_start")},
    }
    if not data.eval_data_path:
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
            f"--metric_for_best_model {metric}: not measured; expected one of {_listed(training_fields.METRICS)}"
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
    if train.keep_best and run.data.eval_data_path and train.save_strategy != "best":
        apart = train.save_strategy != train.eval_strategy
        if train.save_strategy == "steps" and extra.get("eval_steps") not in (None, train.save_steps):
            apart = True
        if apart and train.eval_strategy != "no":
            found.append(
                "--keep_best where evaluation and checkpoint are not at the same step: give --save_strategy and"
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
    if lora.lora_init != "default" and lora.lora_init != "pissa" and not _is_niter(lora.lora_init):
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
    if lora.loraplus_lr_ratio is not None and lora.loraplus_lr_ratio < 1:
        found.append(f"--loraplus_lr_ratio {lora.loraplus_lr_ratio}: expected 1 or more; 16 is usual")
    return found


def _is_niter(name: str) -> bool:
    head, _, count = name.rpartition("_")
    return head == "pissa_niter" and count.isdigit()


def _device_problems(run: Run) -> list[str]:
    train, found = run.train, []
    if train.bf16 and train.fp16:
        found.append("--bf16 and --fp16: give one of them")
    if hardware.has_accelerator():
        return found
    if run.extra.get("ddp_backend") not in (None, "gloo", "mpi"):
        found.append(f"--ddp_backend {run.extra['ddp_backend']} needs an accelerator; leave it out here")
    if train.fp16:
        found.append("--fp16 needs an accelerator; leave it out here")
    return found


def _deepspeed_problems(run: Run) -> list[str]:
    path = run.train.deepspeed
    if path is None:
        return []
    config, problem = read_deepspeed(path)
    if problem:
        return [problem]
    found = []
    zero = config.get("zero_optimization", {})
    if run.lora.q_lora and zero.get("stage", 0) == 3:
        found.append(
            f"--q_lora with ZeRO-3 ({path}): 4-bit weights cannot be split over processes; "
            "use --deepspeed finetune/ds_config_zero2.json"
        )
    whole = "stage3_gather_16bit_weights_on_model_save"
    if run.method == "full" and zero.get("stage", 0) == 3 and zero.get(whole) is not True:
        found.append(
            f"--deepspeed {path}: a full fine-tune could not be saved; add {whole}: true to zero_optimization"
        )
    found += [
        f"--deepspeed {path}: has a {block!r} block, which overrides the flags; remove it"
        for block in ("scheduler", "optimizer")
        if block in config
    ]
    numbers = "float16" if run.train.fp16 else None if hardware.has_accelerator() else "float32"
    return [*found, *deepspeed_contradictions(run, config, numbers=numbers)]


def deepspeed_contradictions(
    run: Run, config: Mapping[str, Any], *, numbers: str | None, ranks: int | None = None
) -> list[str]:
    """Values of a DeepSpeed file that a flag, or its default, contradicts.

    numbers: what the run computes in ("float32", "bfloat16", "float16"); None, and ranks None: not known yet.
    """
    train, found = run.train, []
    batch, rows = train.per_device_train_batch_size, train.gradient_accumulation_steps
    expected: dict[str, tuple[Any, str]] = {
        "gradient_clipping": (run.extra.get("max_grad_norm", 1.0), "--max_grad_norm"),
        "gradient_accumulation_steps": (rows, "--gradient_accumulation_steps"),
        "train_micro_batch_size_per_gpu": (batch, "--per_device_train_batch_size"),
        "train_batch_size": (
            None if ranks is None else batch * rows * ranks,
            "batch size x accumulation x processes",
        ),
        "fp16": (None if numbers is None else numbers == "float16", "--fp16"),
        "bf16": (None if numbers is None else numbers == "bfloat16", "--bf16"),
    }
    for key, (value, flag) in expected.items():
        given = config.get(key)
        if key in ("fp16", "bf16"):
            key, given = f"{key}.enabled", given.get("enabled", "auto") if isinstance(given, dict) else given
        if value is not None and given != "auto" and given != value:
            found.append(
                f'--deepspeed {train.deepspeed}: {key} is {json.dumps(given)}, {flag} is {value}; write "auto" there'
            )
    return found


def read_deepspeed(path: str) -> tuple[dict[str, Any], str | None]:
    """The config as a dict, or the one line that says why it cannot be read.

    What it leaves out is filled with "auto", so that the flag holds: without the key gradient_clipping, for one,
    DeepSpeed would not clip at all.
    """
    shape = "expected a JSON file such as finetune/ds_config_zero2.json"
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, f"--deepspeed {path}: no such file; {shape}"
    except OSError as error:
        return {}, f"--deepspeed {path}: cannot be read ({error.strerror}); {shape}"
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        return {}, f"--deepspeed {path}: no JSON ({error}); {shape}"
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        return {}, f"--deepspeed {path}: not DeepSpeed's shape; {shape}"
    for key in _FOLLOW_FLAGS:
        config.setdefault(key, "auto")
    for key in ("bf16", "fp16"):
        if isinstance(config.setdefault(key, {}), dict):
            config[key].setdefault("enabled", "auto")
    return config, None


_FOLLOW_FLAGS = (
    "gradient_clipping",
    "gradient_accumulation_steps",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
)
