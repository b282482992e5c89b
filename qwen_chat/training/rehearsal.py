"""Everything of a run short of data and weights, built once, alone, and thrown away.

In: a Run. Out: nothing, or an OptionError whose line names the flag that transformers, torch or DeepSpeed will
not have. It comes before the data are read: a bad value costs seconds, not a tokenised corpus.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.optimization import get_scheduler
from transformers.trainer import Trainer

from qwen_chat import hardware
from qwen_chat.errors import MissingDependency, OptionError
from qwen_chat.flags import deepspeed_file, parser
from qwen_chat.flags.run_options import Run
from qwen_chat.training import attention, memory_plan
from qwen_chat.training import options as training_options

Built = TypeVar("Built")

_REFUSALS = (ValueError, TypeError, ImportError, RuntimeError, KeyError, AttributeError)
STEPS = 1000  # of the rehearsed schedule, where the run does not say --max_steps


class Alone(TrainingArguments):
    """TrainingArguments that join no other process and touch no device."""

    distributed_state = None
    _n_gpu = 0
    _setup_devices = property(lambda self: torch.device("cpu"))


def rehearse(run: Run) -> None:
    """Build TrainingArguments, optimizer, schedule and reporters; read DeepSpeed's file as DeepSpeed does.

    Raises OptionError (one line a problem), or MissingDependency for a package that a flag needs.
    """
    hardware.training_device(run.train.device, use_cpu=bool(run.extra.get("use_cpu")))  # now torch can say
    numbers, _ = memory_plan.number_type(run)
    values = training_options.field_values(run, checkpointing=False) | {"output_dir": "unused"}
    values |= {"bf16": numbers == "bfloat16", "fp16": numbers == "float16"}
    values["use_cpu"] = not memory_plan.on_accelerator(run)
    args = _alone(run, values)
    extra = run.extra

    def optimizer() -> torch.optim.Optimizer:
        group = {"params": [torch.nn.Parameter(torch.zeros(1))], "weight_decay": args.weight_decay}
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, None)
        return cast(torch.optim.Optimizer, kind([group], **options))

    built = _tried(_flags(run, "optim", "optim_args"), optimizer)
    steps = args.max_steps if args.max_steps > 0 else STEPS
    _tried(
        _flags(run, "lr_scheduler_type", "lr_scheduler_kwargs"),
        lambda: get_scheduler(
            args.lr_scheduler_type,
            optimizer=built,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        ),
    )
    _tried(_flags(run, "log_level", "log_level_replica"), args.get_process_log_level)
    _tried(
        _flags(run, "report_to"),
        lambda: [callback() for callback in get_reporting_integration_callbacks(args.report_to)],
    )
    if extra.get("ddp_backend") is not None:
        _tried(_flags(run, "ddp_backend"), lambda: torch.distributed.Backend(extra["ddp_backend"]))
    name = run.model.attn_implementation
    known = sorted({attention.NAME, "eager", *ALL_ATTENTION_FUNCTIONS.keys()})
    if name is not None and name not in known and "/" not in name:  # a slash: a kernel of the hub
        raise OptionError(
            f"--attn_implementation {name}: no such attention; expected one of {', '.join(known)}"
        )
    if run.train.deepspeed is not None:
        _deepspeed(run, run.train.deepspeed, numbers)


def _alone(run: Run, values: Mapping[str, Any]) -> TrainingArguments:
    """TrainingArguments alone; the flag that is to blame is the one without which they can be built."""
    given = dict(values) | dict(run.extra)
    try:
        return Alone(**given)
    except _REFUSALS as error:
        for name in sorted(run.given & {*run.extra, *values}):
            try:
                Alone(**{key: value for key, value in given.items() if key != name})
            except _REFUSALS:
                continue
            raise OptionError(_refused(_flags(run, name), error)) from None
        raise OptionError(_refused("these flags together", error)) from None


def _deepspeed(run: Run, path: str, numbers: str) -> None:
    try:
        from deepspeed.runtime.zero.config import get_zero_config
    except ImportError:
        raise MissingDependency("deepspeed", f"--deepspeed {path}", extra="deepspeed") from None
    config, _ = deepspeed_file.read_deepspeed(path)
    _tried(f"--deepspeed {path}", lambda: get_zero_config(config))
    found = deepspeed_file.deepspeed_contradictions(run, config, numbers=numbers, ranks=memory_plan.ranks())
    if found:
        raise OptionError("\n".join(found))


def _flags(run: Run, *names: str) -> str:
    """`--optim sgd --optim_args momentum=x`: these flags as they were given, the first one in any case."""
    options = run.as_dict()
    shown = [name for name in names if name == names[0] or options.get(name) is not None]
    return " ".join(f"--{name} {parser.shown(options.get(name))}" for name in shown)


def _tried(flags: str, build: Callable[[], Built]) -> Built:
    try:
        return build()
    except _REFUSALS as error:
        raise OptionError(_refused(flags, error)) from None


def _refused(flags: str, error: BaseException) -> str:
    said = " ".join(str(error.args[0] if error.args else error).split())
    return f"{flags}: refused ({said[:300].rstrip('.')}); give another value or leave it out"
