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
import math
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from qwen_chat import hardware
from qwen_chat.cli import training_fields
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
    adam_beta2: float = option(0.95, "second moment's decay of AdamW, from 0 up to 1")
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
    save_steps: float = option(500, "steps between checkpoints; given alone it means --save_strategy steps")
    save_total_limit: int | None = option(2, "checkpoints that are kept; None, or below 1: all of them")
    logging_steps: float = option(1, "steps between two points of the reporters; train_log.jsonl has all")
    report_to: tuple[str, ...] = option(("none",), "tensorboard, wandb ...")
    keep_best: bool = option(
        False, "the best checkpoint is never removed: lowest held-out loss, or --metric_for_best_model"
    )
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
GONE = {  # what earlier versions of transformers had
    "push_to_hub_token": "every user of the machine sees a command line; set HF_TOKEN instead",
    "group_by_length": "rows are always balanced by length; leave it out",
    "overwrite_output_dir": "nothing is ever overwritten; give a new folder with -o",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR instead",
    "jit_mode_eval": "held-out losses are computed as training computes them; leave it out",
}
MEANT = {  # what other trainers call it, where no spelling comes near
    "packing": "--layout packed (shared_prefix, the default, packs too)",
    "padding_free": "--layout packed (shared_prefix, the default, packs too)",
    "early_stopping_patience": "--keep_best True: the best checkpoint stays, the run goes to its end",
    "early_stopping_threshold": "--keep_best True: the best checkpoint stays, the run goes to its end",
    "max_seq_length": "--model_max_length",
    "max_seq_len": "--model_max_length",
    "max_length": "--model_max_length",
    "cutoff_len": "--model_max_length",
    "dataset": "--data_path",
    "train_file": "--data_path",
    "validation_file": "--eval_data_path",
    "batch_size": "--per_device_train_batch_size",
    "epochs": "--num_train_epochs",
    "lr": "--learning_rate",
}


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
        options += [e for e in trainer_options() if e.name not in own]
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
    defaults = {entry.name: entry.default for entry in trainer_options()} if extra else {}
    return {
        name: value
        for name, value in extra.items()
        if not training_fields.harmless(name, value, defaults.get(name))
    }


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
    elif MEANT.get(name, "-").split()[0].lstrip("-") in by_name:
        wrong.append(f"{word}: unknown flag; did you mean {MEANT[name]}?")
    else:
        fields_of = training_fields.FIELDS
        written = [n for n in by_name if n not in fields_of or fields_of[n].state == "works"]
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
        refused = [entry for entry in entries if group is None and training_fields.refusal(entry.name)]
        entries = [entry for entry in entries if entry not in refused]
        if entries:
            title = group.__doc__ if group is not None else "Fields of transformers' TrainingArguments"
            lines += [f"{title}:", *(line for entry in entries for line in _help_lines(entry)), ""]
        if refused:
            lines += ["Fields of transformers' TrainingArguments that are refused:"]
            lines += [f"  --{entry.name}: {training_fields.refusal(entry.name)}" for entry in refused]
            lines += [""]
    if trainer_fields:
        lines += ["Fields of transformers' TrainingArguments are flags too: --help_all lists them."]
    lines += ["A flag that is on or off takes True or False, or nothing (True). The last value given wins."]
    return "\n".join(lines)


def _help_lines(entry: Option) -> list[str]:
    names = ", ".join(sorted([f"--{entry.name}", *entry.names], key=len))
    default = "" if entry.default in (None, ()) else f" [{shown(entry.default)}]"
    kinds = "|".join(
        dict.fromkeys(_describe(get_args(entry.kind)[0] if entry.many else entry.kind).split(" or "))
    )
    head = f"  {names} {kinds}" + (" ..." if entry.many else "")
    return [
        head,
        *textwrap.wrap(entry.help + default, 104, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]


def shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ----------------------------------------------------------------------------- combinations that cannot work


def problems(run: Run) -> list[str]:
    """Every value or combination that cannot work, one line each: the flag, why, the cure."""
    return [
        *_range_problems(run),
        *_field_problems(run),
        *_part_problems(run),
        *_data_problems(run),
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


def _data_problems(run: Run) -> list[str]:
    """What the data files do not allow, held-out ones above all."""
    data, train, extra, found = run.data, run.train, run.extra, []
    if data.data_weights and len(data.data_weights) != len(data.data_path):
        found.append(
            f"--data_weights has {len(data.data_weights)} numbers for {len(data.data_path)} data files; "
            "give one for each -d, in the same order"
        )
    if not all(weight >= 0 and math.isfinite(weight) for weight in data.data_weights):
        found.append("--data_weights: a weight is below 0; expected 0 (not used) or more")
    if not data.data_path:
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
