"""The options of a training run: their dataclasses, and the defaults that follow from other options and from the data.

In: the values that the parser read. Out: a `Run`, complete; `run_problems` says whether it can work. It also takes
any field of transformers' TrainingArguments by name. What --preset chooses has the most that it may choose until
`settled` is told what the data are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from qwen_chat.flags import preset, training_fields
from qwen_chat.flags.parser import Values, option

BY_PRESET = "by --preset"

# Words of --lora_target_modules: every linear layer but the head; the experts of a mixture, which are no linear layers.
ALL_LINEAR, EXPERTS = "all-linear", "experts"


def target_words(given: tuple[str, ...]) -> tuple[str, ...]:
    """The words of --lora_target_modules, given apart or in one with commas (so may a regular expression be cut)."""
    return tuple(given[0].split(",")) if len(given) == 1 else given


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
        "conversations or documents: .jsonl, .json, .csv, .parquet, or a folder of these; several: -d A -d B or -d A B",
        "-d",
        old="data_paths",
        elsewhere="dataset train_file",
        appends=True,
    )
    data_weights: tuple[float, ...] = option(
        (),
        "one number for each -d: times that an epoch sees its conversations (0.5: half of them)",
    )
    eval_data_path: tuple[str, ...] = option(
        (), "held-out conversations", elsewhere="validation_file", appends=True
    )
    eval_share: float | None = option(
        None, "hold out this share of the conversations (0.05), chosen by the hash of their prompts"
    )
    general_data: str | None = option(
        None, "conversations of everyday use: their loss before and after tells what the run makes it forget"
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
    redact: bool = option(
        False, "put a word such as [EMAIL] in the place of keys, mail addresses, phone, ID and card numbers"
    )
    tool_style: Literal["auto", "hermes", "qwen_agent", "xml"] = option(
        "auto", "how tools and calls are written"
    )
    tool_language: Literal["auto", "en", "zh"] = option("auto", "wording of the qwen_agent style")
    system: str | None = option(
        None,
        "a text, or a file with it: the system message of conversations without one; saved with the result, and served",
        elsewhere="default_system system_prompt",
        or_file=True,
    )
    template_kwargs: Mapping[str, Any] | None = option(
        None,
        "variables of the chat template, as JSON: '{\"enable_thinking\": true}'; saved with the result, a record's win",
        elsewhere="chat_template_kwargs enable_thinking",
        hint="'{\"enable_thinking\": true}'",
    )
    empty_think: Literal["learn", "ignore"] | None = option(
        None, "an empty think block before a reply; ignored where the template thinks by default"
    )
    lazy_preprocess: bool = option(False, "tokenise on first use instead of all before training")

    @property
    def holds_out(self) -> bool:
        return bool(self.eval_data_path) or self.eval_share is not None


@dataclass(frozen=True)
class LoraArguments:
    """Adapter (LoRA, Q-LoRA)"""

    use_lora: bool = option(False, "train an adapter, the model stays as it is")
    q_lora: bool = option(False, "the same over a model in 4 bits (NF4); implies --use_lora")
    lora_r: int = option(64, "rank", shown_as=BY_PRESET)
    lora_alpha: int = option(128, "scale: the adapter counts lora_alpha / lora_r times", shown_as=BY_PRESET)
    lora_dropout: float = option(0.0, "dropout in front of the adapter", shown_as=BY_PRESET)
    lora_target_modules: tuple[str, ...] = option(
        (ALL_LINEAR,),
        "layers to adapt: names, one regular expression, or all-linear; experts: those of a mixture too",
        splits=False,
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
    preset: Literal["auto", "qwen2"] = option(
        "auto",
        "what chooses the flags marked so that are not given: auto by the data and the model, qwen2 as the old example",
    )
    num_train_epochs: float = option(
        3.0, "times that the data is seen", elsewhere="epochs", shown_as=BY_PRESET
    )
    per_device_train_batch_size: int = option(
        4, "conversations a row of a step holds, per process", elsewhere="batch_size", shown_as=BY_PRESET
    )
    gradient_accumulation_steps: int = option(2, "rows a step has, per process", shown_as=BY_PRESET)
    per_device_eval_batch_size: int = option(4, "the same for evaluation")
    learning_rate: float | None = option(
        None, "the highest rate of the schedule", elsewhere="lr", shown_as=BY_PRESET
    )
    lr_scheduler_type: str = option("cosine", "how the rate changes: cosine, linear, constant ...")
    warmup_ratio: float | None = option(None, "share of the steps in which the rate rises (0.03)")
    warmup_steps: float | None = option(None, "the same in steps; below 1 a share")
    weight_decay: float = option(0.01, "weight decay of AdamW")
    adam_beta2: float = option(0.95, "second moment's decay of AdamW, from 0 up to 1")
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = option(
        "auto", "where it computes; auto: an accelerator where one is (never mps)"
    )
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
    deepspeed: str | None = option(None, "DeepSpeed's JSON file, or zero2, zero3: the toolkit's own")
    eval_strategy: Literal["no", "steps", "epoch"] | None = option(
        None,
        "when to evaluate; epoch where something is held out",
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
        elsewhere="early_stopping_threshold",
        hint="True: the best checkpoint stays, the run goes to its end",
    )
    patience: int | None = option(
        None,
        "stop after so many evaluations in a row that were no better than the best, and save the best",
        elsewhere="early_stopping_patience",
        hint="N",
    )
    resume: str = option(
        "auto",
        "auto: go on from the newest sound checkpoint; never; or a checkpoint's folder",
        old="resume_from_checkpoint",
    )
    resume_anyway: bool = option(False, "go on from a checkpoint though data, model or options have changed")
    plan_anyway: bool = option(False, "start though the plan says that memory will not do")
    config: str | None = option(
        None,
        "flags from this YAML file, or from the run.json of a run, which is repeated; flags beside it win",
    )
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
    repeats: Mapping[str, Any] = field(default_factory=dict)  # the run.json of --config
    kept: frozenset[str] = frozenset()  # flags that --preset leaves as they are
    chosen: tuple[preset.Chosen, ...] = ()  # by --preset

    @classmethod
    def of(cls, values: Values, kept: frozenset[str] | None = None) -> Run:
        """The groups of a run among the values read, with what depends on the method filled in. kept: flags that
        --preset leaves as they are; those that were given where it is None."""
        groups = (
            values[ModelArguments],
            values[DataArguments],
            values[LoraArguments],
            values[TrainArguments],
        )
        asked = {k: value for k, value in values.extra.items() if not training_fields.harmless(k, value)}
        if values[TrainArguments].patience is not None:
            asked = {"load_best_model_at_end": True, **asked}
        kept = values.given if kept is None else kept
        if values[TrainArguments].learning_rate is None:
            kept -= {"learning_rate"}  # `none` asks for a choice
        run = cls(*groups, asked, values.given, values.notes, kept=kept)
        if run.lora.q_lora:
            run = replace(run, lora=replace(run.lora, use_lora=True))
        return settled(replace(run, train=_with_defaults(run)), preset.Facts(run.method))

    @property
    def method(self) -> Literal["full", "lora", "qlora"]:
        return "qlora" if self.lora.q_lora else "lora" if self.lora.use_lora else "full"

    def as_dict(self) -> dict[str, Any]:
        """Every option by its flag's name, resolved."""
        flat: dict[str, Any] = {}
        for group in (self.model, self.data, self.lora, self.train):
            flat.update({f.name: getattr(group, f.name) for f in fields(group)})
        return {**flat, **self.extra}


def _with_defaults(run: Run) -> TrainArguments:
    """The training's options, with what depends on the method and on other flags filled in."""
    train = run.train
    limit, strategy = train.save_total_limit, train.save_strategy
    if "save_steps" in run.given and "save_strategy" not in run.given:
        strategy = "steps"
    when: Literal["steps", "epoch"] = "steps" if "eval_steps" in run.given else "epoch"
    evaluates = train.eval_strategy or (when if run.data.holds_out else "no")
    save_steps = train.save_steps
    if train.patience is not None and not run.given & {"save_strategy", "save_steps"}:
        strategy, save_steps = evaluates, run.extra.get("eval_steps", save_steps)  # any may be the best one
    if strategy == "steps" and (train.keep_best or run.extra.get("load_best_model_at_end")):
        when = "steps"  # the best checkpoint is measured where it is written
    return replace(
        train,
        eval_strategy=train.eval_strategy or (when if run.data.holds_out else "no"),
        warmup_steps=_warmup(train),
        save_strategy=strategy,
        save_steps=save_steps,
        save_total_limit=None if limit is not None and limit < 1 else limit,
    )


def settled(run: Run, facts: preset.Facts, begun: Mapping[str, Any] | None = None) -> Run:
    """The run with a value for each flag that --preset chooses; one that was given stays.

    begun: the options of the run that this one goes on from, which keeps what was chosen for it.
    """
    options, kept = run.as_dict(), set(run.kept)
    if run.lora.lora_weight_path is not None:
        kept.update(preset.ADAPTER)  # the adapter brings its own
    given = {flag: options[flag] for flag in preset.LEARNS_BY if flag in kept}
    if int(run.extra.get("max_steps", -1)) > 0:
        given["num_train_epochs"] = run.train.num_train_epochs  # nothing follows from it
    facts = replace(facts, rank_stabilised=run.lora.use_rslora)
    chosen = preset.choices(run.train.preset, facts, given)
    if begun:
        before = ((choice, begun.get(choice.flag, choice.value)) for choice in chosen)
        chosen = tuple(
            c if value == c.value else replace(c, value=value, reason="as the run began")
            for c, value in before
        )
    values: dict[str, Any] = {choice.flag: choice.value for choice in chosen}
    lora = replace(run.lora, **{flag: values.pop(flag) for flag in preset.ADAPTER if flag in values})
    return replace(run, lora=lora, train=replace(run.train, **values), chosen=chosen)


def _warmup(train: TrainArguments) -> float:
    """transformers' word: 1 and more are steps, so a share of the whole is the largest number below 1."""
    if train.warmup_steps is not None:
        return train.warmup_steps
    return 0.03 if train.warmup_ratio is None else min(train.warmup_ratio, math.nextafter(1, 0))
