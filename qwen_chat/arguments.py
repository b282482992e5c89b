"""The dataclasses behind every flag, and their parser.

In: a list of words from the command line. Out: frozen dataclasses, with the defaults that fit the method
filled in, or one OptionError that names every flag that cannot work, with its cure. Neither torch nor
transformers is imported: `--help` and every refusal come at once.

A script names the groups that it needs, its own small group among them:

    values = read(argv, [ModelArguments, DataArguments, ShowArguments], about="...")
    values[DataArguments].data_path

`read_run` is the whole of `finetune.py`: it also takes any field of transformers' TrainingArguments by name.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from qwen_chat import hardware
from qwen_chat.errors import OptionError

T = TypeVar("T")

LEARNING_RATES = {
    # A full fine-tune moves every weight, so in small steps; an adapter starts from zero and has few weights.
    "full": 1e-5,
    "lora": 2e-4,
    "qlora": 2e-4,
}


def option(default: Any, help: str, *names: str) -> Any:
    """A dataclass field that is a flag. `names` are further spellings: `-m`, `--model_name_or_path`."""
    return field(default=default, metadata={"help": help, "names": names})


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
        (), "conversations, one JSON object a line; several: -d A -d B or -d A B", "-d"
    )
    data_weights: tuple[float, ...] = option(
        (),
        "one number for each data file: times that an epoch sees its conversations (0.5: half of them)",
    )
    eval_data_path: tuple[str, ...] = option((), "held-out conversations")
    model_max_length: int = option(2048, "longest sequence in tokens")
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
        ("all-linear",), "layers to adapt: names, one regular expression, or all-linear"
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
    )


@dataclass(frozen=True)
class TrainArguments:
    """Training"""

    output_dir: str | None = option(None, "where the result goes; a new folder without it", "-o")
    num_train_epochs: float = option(3.0, "times that the data is seen")
    per_device_train_batch_size: int = option(4, "conversations a row of a step holds, per process")
    gradient_accumulation_steps: int = option(2, "rows a step has, per process")
    per_device_eval_batch_size: int = option(4, "the same for evaluation")
    learning_rate: float | None = option(None, "2e-4 for an adapter, 1e-5 for a full fine-tune")
    lr_scheduler_type: str = option("cosine", "how the rate changes: cosine, linear, constant ...")
    warmup_ratio: float | None = option(None, "share of the steps in which the rate rises (0.03)")
    warmup_steps: float | None = option(None, "the same in steps; below 1 a share")
    weight_decay: float = option(0.01, "weight decay of AdamW")
    adam_beta2: float = option(0.95, "second moment's decay of AdamW")
    bf16: bool | None = option(None, "bfloat16; without it where an accelerator has it")
    fp16: bool = option(False, "half precision with loss scaling (accelerators only)")
    gradient_checkpointing: bool | Literal["auto"] = option(
        "auto", "compute activations again instead of keeping them; auto: when memory asks for it"
    )
    layout: Literal["shared_prefix", "packed", "padded"] = option(
        "shared_prefix", "how conversations lie in rows; the result is the same, the time is not"
    )
    deepspeed: str | None = option(None, "DeepSpeed's JSON file: ds_config_zero2.json, ds_config_zero3.json")
    eval_strategy: Literal["no", "steps", "epoch"] | None = option(
        None, "when to evaluate; epoch where there is --eval_data_path", "--evaluation_strategy"
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] = option("epoch", "when to write a checkpoint")
    save_steps: float = option(500, "steps between checkpoints, with --save_strategy steps")
    save_total_limit: int | None = option(2, "checkpoints that are kept")
    logging_steps: float = option(1, "steps between two points of the reporters; train_log.jsonl has all")
    report_to: tuple[str, ...] = option(("none",), "tensorboard, wandb ...")
    keep_best: bool = option(False, "the checkpoint with the lowest held-out loss is never removed")
    resume: str = option(
        "auto", "auto: go on from the newest sound checkpoint; never; or a checkpoint's folder"
    )
    resume_anyway: bool = option(False, "go on from a checkpoint though data, model or options have changed")
    plan_anyway: bool = option(False, "start though the plan says that memory will not do")
    check: bool = option(False, "look at everything short of loading a model, then stop")


OLD_NAMES = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "data_paths": "data_path",
    "resume_from_checkpoint": "resume",
}
GONE = {
    "hub_token": "every user of the machine sees a command line; set the environment variable HF_TOKEN instead",
    "push_to_hub_token": "every user of the machine sees a command line; set HF_TOKEN instead",
    "group_by_length": "rows are always balanced by length; leave it out",
    "overwrite_output_dir": "nothing is ever overwritten; give a new folder with -o",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR instead",
}
UNSUPPORTED = {  # fields of TrainingArguments that would be ignored in silence, or break what is promised
    "label_smoothing_factor": "the loss here is plain cross-entropy; leave it out",
    "auto_find_batch_size": "would change what an optimizer step is; choose --per_device_train_batch_size",
    "activation_checkpointing": "is called --gradient_checkpointing here (auto, True or False)",
    "average_tokens_across_devices": "is what a step's loss is divided by here; leave it on",
    "bf16_full_eval": "held-out losses are computed as training computes them; leave it out",
    "fp16_full_eval": "held-out losses are computed as training computes them; leave it out",
    "parallelism_config": "cannot be given on the command line; use --deepspeed",
}
HARMLESS = {"average_tokens_across_devices": True}  # of UNSUPPORTED: what does nothing; of the others False
OURS = frozenset(  # fields of TrainingArguments that the toolkit sets itself
    {"remove_unused_columns", "label_names", "do_train", "do_eval", "do_predict", "train_sampling_strategy"}
    | {"length_column_name", "prediction_loss_only", "dataloader_drop_last", "logging_nan_inf_filter"}
)


@dataclass(frozen=True)
class Option:
    """One flag: its name (no dashes), its type, and what --help says."""

    name: str
    kind: Any
    default: Any
    help: str
    names: tuple[str, ...] = ()
    group: type | None = None

    @property
    def many(self) -> bool:
        return get_origin(self.kind) is tuple


@dataclass(frozen=True)
class Values:
    """What was read: one value of each group, and the fields of TrainingArguments that were given."""

    groups: Mapping[type, Any]
    extra: Mapping[str, Any]
    given: frozenset[str]
    notes: tuple[str, ...]

    def __getitem__(self, group: type[T]) -> T:
        return typing.cast(T, self.groups[group])


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
    """Read finetune.py's words; fill in what fits the method; raise OptionError with all problems at once."""
    groups = [ModelArguments, DataArguments, LoraArguments, TrainArguments]
    values = read(argv, groups, about=about, trainer_fields=True)
    run = Run.of(values)
    found = problems(run)
    if found:
        raise OptionError("\n".join(found))
    return run


def read(
    argv: Sequence[str], groups: Sequence[type], *, about: str = "", trainer_fields: bool = False
) -> Values:
    """Read words into one value of each group. `-h` prints the help and ends. The last value given wins."""
    options = [entry for group in groups for entry in _options(group)]
    own = {entry.name: entry for entry in options}
    if trainer_fields:
        options += [e for e in trainer_options() if e.name not in {*own, *OURS, *GONE}]
    by_name = {name: entry for entry in options for name in (entry.name, *_plain(entry.names))}
    if any(word in ("-h", "--help", "--help_all", "--help-all") for word in argv):
        print(
            _help(options if "all" in " ".join(argv) else list(own.values()), groups, about, trainer_fields)
        )
        raise SystemExit(0)
    given, notes, wrong = _scan(argv, by_name)
    if wrong:
        raise OptionError("\n".join(wrong))
    made = {g: g(**{f.name: given[f.name] for f in fields(g) if f.name in given}) for g in groups}
    extra = {name: value for name, value in given.items() if name not in own}
    return Values(made, extra, frozenset(given), tuple(notes))


def with_defaults(run: Run) -> Run:
    """Fill in what depends on the method and on other flags."""
    lora, train = run.lora, run.train
    if lora.q_lora and not lora.use_lora:
        lora = replace(lora, use_lora=True)
    run = replace(run, lora=lora)
    return replace(
        run,
        train=replace(
            train,
            learning_rate=LEARNING_RATES[run.method] if train.learning_rate is None else train.learning_rate,
            eval_strategy=train.eval_strategy or ("epoch" if run.data.eval_data_path else "no"),
            warmup_steps=_warmup(train),
        ),
    )


def _warmup(train: TrainArguments) -> float:
    if train.warmup_steps is not None:
        return train.warmup_steps
    return 0.03 if train.warmup_ratio is None else train.warmup_ratio


# ------------------------------------------------------------------------------------------- words to values


def _scan(argv: Sequence[str], by_name: Mapping[str, Option]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Walk over the words; return values by name, notes, and what is wrong."""
    given: dict[str, Any] = {}
    notes: list[str] = []
    wrong: list[str] = []
    at = 0
    while at < len(argv):
        word, equals, rest = argv[at].partition("=")
        at += 1
        if not _is_flag(word):
            wrong.append(f"{word!r}: no flag stands before this value; flags begin with --")
            continue
        end = at
        while end < len(argv) and not _is_flag(argv[end]):
            end += 1
        entry = _lookup(word, by_name, notes, wrong)
        words = [rest] if equals else list(argv[at:end])
        at = at if equals else end
        if entry is None:
            continue
        try:
            value = _value(entry, words)
        except ValueError as error:
            wrong.append(f"{word}: {error}")
            continue
        adds = entry.name in ("data_path", "eval_data_path", "adapter", "api_key") and entry.many
        given[entry.name] = (*given.get(entry.name, ()), *value) if adds else value
    return given, notes, wrong


def _lookup(word: str, by_name: Mapping[str, Option], notes: list[str], wrong: list[str]) -> Option | None:
    name = word.lstrip("-").replace("-", "_")
    if name in ("local_rank", "local-rank"):  # the deepspeed launcher adds it; the environment says the same
        return None
    if name in OLD_NAMES:
        notes.append(f"--{name} is called --{OLD_NAMES[name]} today; read as that")
        name = OLD_NAMES[name]
    if name in by_name:
        return by_name[name]
    if name in GONE:
        wrong.append(f"--{name} is gone: {GONE[name]}")
    elif name in OURS:
        wrong.append(f"--{name} is set by the toolkit itself; leave it out")
    else:
        written = [known for known in by_name if known != "local_rank"]  # that one is the launchers' own
        near = difflib.get_close_matches(name, written, n=1, cutoff=0.5)
        meant = f"; did you mean --{near[0]}?" if near and len(near[0]) > 1 else ""
        wrong.append(f"{word}: unknown flag{meant or '; --help lists them'}")
    return None


def _is_flag(word: str) -> bool:
    """`--name` or `-d`; `-1`, `-1e-5` and `-` are values."""
    if not word.startswith("-") or len(word) < 2:
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


def _value(entry: Option, words: list[str]) -> Any:
    """The words after a flag as its type; ValueError says what was expected."""
    if entry.many:
        if not words:
            raise ValueError("no value; expected at least one")
        kind = get_args(entry.kind)[0]
        return tuple(_convert(kind, part) for word in words for part in _parts(entry.name, word))
    if not words:
        if bool in _choices(entry.kind):
            return True
        raise ValueError(f"no value; expected {_describe(entry.kind)}")
    if len(words) > 1:
        raise ValueError(f"{len(words)} values ({' '.join(words)}); expected one; quote a value with spaces")
    return _convert(entry.kind, words[0])


def _parts(name: str, word: str) -> list[str]:
    """Lists may be written a,b,c; paths and regular expressions hold commas of their own."""
    if name in (
        "data_path",
        "eval_data_path",
        "lora_target_modules",
        "trainable_tokens",
        "adapter",
        "api_key",
    ):
        return [word]
    return [part for part in word.split(",") if part]


def _choices(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a type: `int | None` -> (int, NoneType); Literal's values stay one entry."""
    if get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(part for alternative in get_args(kind) for part in _choices(alternative))
    return (kind,)


def _convert(kind: Any, word: str) -> Any:
    """One word as a type; the strictest alternative first, so that `bool | str` reads True as a bool."""
    alternatives = _choices(kind)
    if type(None) in alternatives and word.lower() in ("none", "null"):
        return None
    for alternative in alternatives:
        if get_origin(alternative) is Literal and word in get_args(alternative):
            return word
    for plain in (bool, int, float, dict, list, str):
        if plain in alternatives:
            try:
                return _plain_value(plain, word)
            except ValueError:
                continue
    raise ValueError(f"{word!r}; expected {_describe(kind)}")


def _plain_value(kind: type, word: str) -> Any:
    if kind is bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if word.lower() not in known:
            raise ValueError
        return known[word.lower()]
    if kind in (dict, list):
        value = json.loads(word)  # JSONDecodeError is a ValueError
        if not isinstance(value, kind):
            raise ValueError
        return value
    return kind(word)


def _describe(kind: Any) -> str:
    names = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "text",
        dict: "a JSON object",
    }
    names |= {list: "a JSON list", type(None): "None"}
    parts = []
    for alternative in _choices(kind):
        literal = get_origin(alternative) is Literal
        parts += list(get_args(alternative)) if literal else [names.get(alternative, str(alternative))]
    return " or ".join(parts)


def _plain(names: Sequence[str]) -> list[str]:
    return [name.lstrip("-") for name in names]


def _options(group: type) -> list[Option]:
    kinds = typing.get_type_hints(group)
    return [
        Option(
            f.name, kinds[f.name], f.default, f.metadata.get("help", ""), f.metadata.get("names", ()), group
        )
        for f in fields(group)
    ]


# ------------------------------------------------------------- transformers' TrainingArguments, not imported


@lru_cache(maxsize=1)
def trainer_options() -> tuple[Option, ...]:
    """Every field of TrainingArguments, read from its source: importing it costs seconds and torch."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return ()
    tree = ast.parse(Path(spec.origin).with_name("training_args.py").read_text(encoding="utf-8"))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments")
    entries = [n for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    return tuple(
        Option(typing.cast(ast.Name, n.target).id, _kind(n.annotation), *_described(n.value)) for n in entries
    )


def _kind(annotation: ast.expr) -> Any:
    """`float | None` -> float | None; names that are not plain types (SchedulerType) are written as text."""
    plain: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str, "dict": dict, "list": list}
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    if "dict" in names or "list" in names:  # what stands inside the brackets is JSON's business
        names -= {"bool", "Any"}
    kinds: list[Any] = [plain[name] for name in sorted(names) if name in plain] or [str]
    if any(isinstance(node, ast.Constant) and node.value is None for node in ast.walk(annotation)):
        kinds.append(type(None))
    return typing.Union[tuple(kinds)]  # noqa: UP007  a union of a list that is only known here


def _described(value: ast.expr | None) -> tuple[Any, str]:
    """The default and the help text of `field(default=..., metadata={"help": ...})`."""
    default: Any = None
    text = ""
    for keyword in value.keywords if isinstance(value, ast.Call) else ():
        try:
            literal = ast.literal_eval(keyword.value)
        except ValueError:
            continue
        if keyword.arg == "default":
            default = literal
        elif keyword.arg == "metadata":
            text = " ".join(str(literal.get("help", "")).split())
    return default, text


# ---------------------------------------------------------------------------------------------------- --help


def _help(options: Sequence[Option], groups: Sequence[type], about: str, trainer_fields: bool) -> str:
    lines = [about.strip(), ""]
    for group in (*groups, None):
        entries = [entry for entry in options if entry.group is group]
        if entries:
            title = group.__doc__ if group is not None else "Fields of transformers' TrainingArguments"
            lines += [f"{title}:", *(line for entry in entries for line in _help_lines(entry)), ""]
    if trainer_fields:
        lines += ["Every field of transformers' TrainingArguments is a flag too: --help_all lists them."]
    lines += ["A flag that is on or off takes True or False, or nothing (True). The last value given wins."]
    return "\n".join(lines)


def _help_lines(entry: Option) -> list[str]:
    names = ", ".join(sorted([f"--{entry.name}", *entry.names], key=len))
    default = "" if entry.default in (None, ()) else f" [{_shown(entry.default)}]"
    kinds = "|".join(
        dict.fromkeys(_describe(get_args(entry.kind)[0] if entry.many else entry.kind).split(" or "))
    )
    head = f"  {names} {kinds}" + (" ..." if entry.many else "")
    return [
        head,
        *textwrap.wrap(entry.help + default, 104, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ----------------------------------------------------------------------------- combinations that cannot work


def problems(run: Run) -> list[str]:
    """Every combination that cannot work, one line each: the flag, why, the cure."""
    return [*_range_problems(run), *_lora_problems(run), *_device_problems(run), *_deepspeed_problems(run)]


def _range_problems(run: Run) -> list[str]:
    data, train, found = run.data, run.train, []
    for name, value in (
        ("per_device_train_batch_size", train.per_device_train_batch_size),
        ("per_device_eval_batch_size", train.per_device_eval_batch_size),
        ("gradient_accumulation_steps", train.gradient_accumulation_steps),
        ("model_max_length", data.model_max_length),
        ("lora_r", run.lora.lora_r),
        ("lora_alpha", run.lora.lora_alpha),
        ("num_train_epochs", train.num_train_epochs),
        ("save_steps", train.save_steps),
        ("logging_steps", train.logging_steps),
    ):
        if not value > 0:
            found.append(f"--{name} {value}: expected a number above 0")
    if train.learning_rate is not None and not 0 < train.learning_rate < 1:
        found.append(
            f"--learning_rate {train.learning_rate}: expected a number between 0 and 1, such as 2e-4"
        )
    if not 0 <= run.lora.lora_dropout < 1:
        found.append(f"--lora_dropout {run.lora.lora_dropout}: expected a share from 0 up to 1")
    if train.warmup_ratio is not None and not 0 <= train.warmup_ratio <= 1:
        found.append(f"--warmup_ratio {train.warmup_ratio}: expected a share between 0 and 1")
    if {"warmup_ratio", "warmup_steps"} <= run.given:
        found.append("--warmup_ratio and --warmup_steps: give one of them")
    if data.data_weights and len(data.data_weights) != len(data.data_path):
        found.append(
            f"--data_weights has {len(data.data_weights)} numbers for {len(data.data_path)} data files; "
            "give one for each -d, in the same order"
        )
    found += [
        f"--{name}: {reason}"
        for name, reason in UNSUPPORTED.items()
        if run.extra.get(name) not in (None, HARMLESS.get(name, False))
    ]
    if run.model.attn_implementation not in (None, "qwen_chat") and train.layout == "shared_prefix":
        found.append(
            f"--attn_implementation {run.model.attn_implementation}: knows nothing of prefixes that conversations "
            "share; add --layout packed, or leave it out"
        )
    if any(weight < 0 for weight in data.data_weights):
        found.append("--data_weights: a weight is below 0; expected 0 (not used) or more")
    if not data.data_path:
        found.append("no data: give the conversations with -d FILE")
    if (train.keep_best or train.save_strategy == "best") and not data.eval_data_path:
        flag = "--keep_best" if train.keep_best else "--save_strategy best"
        found.append(
            f"{flag} without --eval_data_path: the best is found on held-out conversations; give some"
        )
    if train.resume not in ("auto", "never") and not Path(train.resume).is_dir():
        found.append(
            f"--resume {train.resume}: no such folder; expected auto, never or a checkpoint's folder"
        )
    if train.eval_strategy not in (None, "no") and not data.eval_data_path:
        found.append(
            f"--eval_strategy {train.eval_strategy} without --eval_data_path: give held-out conversations"
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
    if run.extra.get("fsdp"):
        found.append(
            "--fsdp without an accelerator would silently be plain DDP; leave it out or use --deepspeed"
        )
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
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if run.lora.q_lora and stage == 3:
        found.append(
            f"--q_lora with ZeRO-3 ({path}): 4-bit weights cannot be split over processes; "
            "use --deepspeed finetune/ds_config_zero2.json"
        )
    found += [
        f"--deepspeed {path}: has a {block!r} block, which overrides the flags; remove it"
        for block in ("scheduler", "optimizer")
        if block in config
    ]
    if run.extra.get("fsdp"):
        found.append("--deepspeed with --fsdp: both split the model; give one of them")
    return found


def read_deepspeed(path: str) -> tuple[dict[str, Any], str | None]:
    """The config as a dict, or the one line that says why it cannot be read."""
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
    return config, None
