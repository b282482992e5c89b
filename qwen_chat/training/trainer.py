"""The trainer put together: arguments, ranks, loss, log, checkpoints, result.

In: a Run (arguments.py), tokenised data, a model. Out: a folder with the adapter or model, its tokenizer and
template, a generation config that ends, `run.json` and `train_log.jsonl`. The loop is transformers' Trainer;
ours are its batch sampler and collator (dataset.py), the loss (loss.py), each step's checks and the log.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import socket
import statistics
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, set_seed

from qwen_chat import hardware, models
from qwen_chat.cli import run_options, training_fields
from qwen_chat.cli.run_options import Run
from qwen_chat.console import is_rank_zero, rank_zero
from qwen_chat.errors import DataError, OptionError, TrainingError
from qwen_chat.training import adapters, checkpoints, fused, matmul, memory_plan, run_folder
from qwen_chat.training.batches import Collator, Rows, WindowSampler
from qwen_chat.training.loss import ModelLoss

# peft asks for transformers' old word for gradient checkpointing; nobody here can act on the warning.
warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing.*")
# DeepSpeed calls collectives by names that torch has renamed: two lines of warning each time.
warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed")

BY_HEART = 0.1  # a loss from which single precision may reach exactly 0; damage falls to 0 from any height
VERSIONS = ("torch", "transformers", "peft", "deepspeed", "accelerate", "bitsandbytes", "tokenizers")


# ---------------------------------------------------------------------------- ranks and TrainingArguments


def training_arguments(run: Run, output: Path, *, checkpointing: bool) -> tuple[Any, list[str]]:
    """transformers' arguments from ours, with the ranks joined; and what was decided, with reasons.

    Must be called before the model is loaded: under ZeRO-3 `from_pretrained` shares the weights out at once.
    """
    device, decisions = _device_arguments(run)
    options = field_values(run, checkpointing=checkpointing) | device | {"output_dir": str(output)}
    args = TrainingArguments(**(options | dict(run.extra)))
    args._n_gpu = min(args.n_gpu, 1)  # a process trains on one; finetune.sh starts one for each
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if args.world_size != wanted:  # else every rank would train alone, without a word
        raise TrainingError(
            f"{wanted} processes were started but {args.world_size} are joined; use finetune.sh"
        )
    return args, decisions


def field_values(run: Run, *, checkpointing: bool) -> dict[str, Any]:
    """Fields of TrainingArguments from our flags, less what the device decides; the user's own come on top."""
    train = run.train
    options = {
        "num_train_epochs": train.num_train_epochs,
        "per_device_train_batch_size": train.per_device_train_batch_size,
        "per_device_eval_batch_size": train.per_device_eval_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler_type,
        "warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "adam_beta2": train.adam_beta2,
        "eval_strategy": train.eval_strategy,
        "save_strategy": train.save_strategy,
        "save_steps": train.save_steps,
        "save_total_limit": train.save_total_limit,
        "logging_steps": train.logging_steps,
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


def _device_arguments(run: Run) -> tuple[dict[str, Any], list[str]]:
    """What depends on the device: number type, process group, DeepSpeed."""
    train = run.train
    accelerator = memory_plan.on_accelerator(run)
    numbers, decisions = memory_plan.number_type(run)
    chosen: dict[str, Any] = {"bf16": numbers == "bfloat16", "fp16": numbers == "float16"}
    if train.deepspeed is not None:
        chosen["deepspeed"] = run_options.read_deepspeed(train.deepspeed)[0]
        _start_deepspeed(accelerator)
        chosen["use_cpu"] = False  # accelerate leaves DeepSpeed out where it is True
        if not accelerator:
            chosen["accelerator_config"] = {"use_configured_state": True}  # the one of _start_deepspeed
    elif not accelerator:
        chosen["use_cpu"] = True  # accelerate starts no process group on a CPU where it is False
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            chosen["ddp_backend"] = "gloo"
    if not accelerator:
        chosen["dataloader_pin_memory"] = False
    return chosen, decisions


def _start_deepspeed(accelerator: bool) -> None:
    """Join the ranks. On a CPU gloo does the work: DeepSpeed's own shared-memory op compiles for minutes."""
    import deepspeed
    import deepspeed.ops

    if not accelerator:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "WORLD_SIZE" not in os.environ:  # started without a launcher: a group of one
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    deepspeed.init_distributed(dist_backend=None if accelerator else "gloo")
    if not accelerator:
        # Left to itself, accelerate finds no backend for DeepSpeed on a CPU: every rank would see all data.
        from accelerate import PartialState

        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
    _trust_no_pickles()


def _trust_no_pickles() -> None:
    """DeepSpeed loads its shards as pickles, which may run code; torch is told to load plain values only."""
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    plain = [ZeroStageEnum, fragment_address, loss_scaler.LossScaler, loss_scaler.DynamicLossScaler]
    torch.serialization.add_safe_globals(plain)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Session:
    """Where the joined ranks write, and what was decided before the model is loaded."""

    folder: Path
    decisions: tuple[str, ...]
    choices: dict[str, Any]  # what was measured or chosen by itself: a resumed run chooses the same


def start(
    run: Run, folder: Path, data: Data, verdict: memory_plan.Verdict, before: Any
) -> tuple[Any, Session]:
    """Join the ranks, agree on the folder; transformers' arguments come back. `before`: run_folder.Resume."""
    chosen = dict(before.choices)
    on = bool(chosen.get("gradient_checkpointing", verdict.checkpointing))
    if run.train.gradient_checkpointing != "auto":
        on = verdict.checkpointing
    if not memory_plan.on_accelerator(run) and int(chosen.get("threads", 0)) > 0:
        torch.set_num_threads(int(chosen["threads"]))  # the order of sums depends on it
    args, decisions = training_arguments(run, folder, checkpointing=on)
    agreed = any_rank(on)  # memory is free on one machine and not on another: all compute again, or none
    if agreed and not on:
        args.activation_checkpointing = args.gradient_checkpointing = True
        args.activation_checkpointing_kwargs = {"use_reentrant": False}
    folder = Path(share(str(folder)))
    args.output_dir = str(folder)
    chosen |= {
        "gradient_checkpointing": agreed,
        "threads": torch.get_num_threads(),
        "layout": run.train.layout,
    }
    return args, Session(folder, (*decisions, verdict.line), chosen)


def plan(run: Run, model: Path, data: Data) -> memory_plan.Verdict:
    """Hold the largest row (of the first 64 steps, and the longest conversation) against the memory;
    OptionError if it cannot fit."""
    row, longest = longest_row(run, data)
    config = models.read_config(model)
    shape = memory_plan.Shape.of(config)
    for note in models.positions_note(config, longest):
        rank_zero(f"note: {note}")
    verdict = memory_plan.decide(run, shape, row=row, supervised=row, longest=longest)
    if verdict.refusal is not None and not run.train.plan_anyway:
        raise OptionError(verdict.refusal)
    return verdict


def longest_row(run: Run, data: Data) -> tuple[int, int]:
    """(tokens of the largest row that the run is known to meet, tokens of the longest conversation)."""
    windows = sampler(run, data.train, ranks=memory_plan.ranks(), seed=seed_of(run))
    row = windows.longest_row(windows=64)
    longest = min(int(data.summary.quantiles.get("max", row)), run.data.model_max_length)
    return max(row, longest), longest


def seed_of(run: Run) -> int:
    """The seed that orders the data: TrainingArguments' data_seed, else seed, else its default 42."""
    given = run.extra.get("data_seed")
    return int(run.extra.get("seed", 42) if given is None else given)


def share(value: Any) -> Any:
    """Rank 0's value on every rank (the output folder's name holds a time)."""
    if not _is_joined():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(value: bool) -> bool:
    """Whether it is so on any rank."""
    if not _is_joined():
        return value
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return any(values)


def _is_joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leave() -> None:
    """Leave the process group once every rank is done, before the interpreter is torn down.

    A group that is left standing until then can abort a rank after its work: "terminate called without an active
    exception" (gloo's threads; pytorch/pytorch issue 190489), and a saved run would end as a failed one.
    """
    if _is_joined():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


# -------------------------------------------------------------------------------------------------- data

SHOWN = 1_000  # tokens of an example for a person: enough to see a prompt's head and the reply at the end


@dataclass(frozen=True)
class Data:
    """Tokenised training and held-out data, a hash of the first, and its token budget."""

    train: Any
    held_out: Any | None
    fingerprint: str
    summary: Any  # token_cache.TokenSummary

    def describe(self) -> str:
        """Both budgets for a person, with what was left out, counted and named."""
        lines = [self.summary.describe()]
        if self.held_out is not None:
            lines.append(f"held out: {self.held_out.summary.describe()}")
        return "\n".join(lines)

    def budget(self) -> tuple[int, int]:
        """(tokens, learnt tokens) of an epoch, in which --data_weights count."""
        mixed = self.train.budget() if isinstance(self.train, Mixture) else None
        return mixed or (self.summary.tokens, self.summary.supervised)


class Mixture:
    """Tokenised data in which an epoch sees each file's conversations `weight` times.

    The whole part of a weight repeats them; the rest is a share of them, drawn once by the seed.
    """

    def __init__(self, data: Any, weights: Sequence[float], *, seed: int) -> None:
        self.data = data
        random = np.random.default_rng((seed, 7))  # not the stream that orders the windows
        owners = np.array([data.file_of(i) for i in range(len(data))], dtype=np.int64)
        parts = []
        for number, weight in enumerate(weights):
            own = np.flatnonzero(owners == number)
            whole = int(weight)
            rest = random.permutation(own)[: round((weight - whole) * len(own))]
            parts += [own] * whole + [np.sort(rest)]
        self.index = np.concatenate(parts)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Any:
        return self.data[int(self.index[i])]

    def where(self, i: int) -> str:
        return str(self.data.where(int(self.index[i])))

    def budget(self) -> tuple[int, int]:
        """(tokens, learnt tokens) of an epoch; each conversation is looked at once."""
        found, times = np.unique(self.index, return_counts=True)
        each = np.array(
            [
                [
                    sum(len(s.input_ids) for s in self.data[int(i)]),
                    sum(s.supervised for s in self.data[int(i)]),
                ]
                for i in found
            ]
        )
        tokens, supervised = (times[:, None] * each).sum(axis=0).tolist()
        return tokens, supervised


def first_example(tokenizer: Any, data: Data, *, colour: bool) -> str:
    """The first training sequence as it is learnt; of a long one the two ends."""
    from qwen_chat.chat.encoded import Encoded
    from qwen_chat.chat.show import show

    stored = data.train[0][0]
    first = Encoded(stored.input_ids.tolist(), stored.spans.tolist())
    count = len(first.input_ids)
    left_out = count - SHOWN
    if left_out <= 0:
        return show(tokenizer, first, colour=colour)
    parts = first.part(0, SHOWN // 2), first.part(count - SHOWN // 2, count)
    head, tail = (show(tokenizer, part, colour=colour) for part in parts)
    return f"{head}\n... {left_out:,} tokens are not shown ...\n{tail}"


def read_data(run: Run, fmt: Any) -> Data:
    """Check and tokenise all files of a run; DataError with every bad line at once."""
    from qwen_chat.data.records import open_records
    from qwen_chat.data.token_cache import tokenise

    def read(paths: Sequence[str]) -> Any:
        return tokenise(
            open_records(paths, on_error=run.data.on_error),
            fmt,
            max_length=run.data.model_max_length,
            too_long=run.data.too_long,
            train_on=run.data.train_on,
            lazy=run.data.lazy_preprocess,
        )

    train = read(run.data.data_path)
    held_out = read(run.data.eval_data_path) if run.data.eval_data_path else None
    summary, fingerprint = train.summary, str(train.fingerprint)
    if run.data.data_weights:
        train = Mixture(train, run.data.data_weights, seed=seed_of(run))
        if len(train) == 0:
            raise DataError("--data_weights leave no conversation; give at least one file more weight")
    return Data(train, held_out, fingerprint, summary)


def sampler(run: Run, data: Any, *, ranks: int, seed: int, training: bool = True) -> WindowSampler:
    """Windows of an optimizer step over training data, or of one row a rank over held-out data."""
    train = run.train
    return WindowSampler(
        data,
        batch_size=train.per_device_train_batch_size if training else train.per_device_eval_batch_size,
        accumulation=train.gradient_accumulation_steps if training else 1,
        ranks=ranks,
        max_length=run.data.model_max_length,
        layout=train.layout,
        seed=seed,
        shuffle=training,
    )


# ------------------------------------------------------------------------------------------------- model


def load(run: Run, path: Path, args: Any) -> models.Loaded:
    """The model to train, with our attention over rows."""
    from qwen_chat.training import attention

    dtype = _weight_dtype(run, args)
    name, why = run.model.attn_implementation, "as asked"
    if name in (None, attention.NAME):
        name = attention.register()
        kind = "float32" if dtype == "auto" else str(dtype).removeprefix("torch.")
        head = attention.head_size(models.read_config(path))
        kernel, reason = attention.choose_here(args.device.type, run.train.layout, kind, head)
        why = f"{kernel}; {reason}"
    loaded = models.load_model(
        path,
        dtype=dtype,
        attention=name,
        quantize="nf4" if run.lora.q_lora else None,
        for_training=True,
        device="cpu" if args.device.type == "cpu" else "auto",  # --use_cpu True on a machine with a GPU
        trust_remote_code=run.model.trust_remote_code,
    )
    loaded.model.config.use_cache = False
    if run.model.trust_remote_code:
        rank_zero(f"runs Python code that lies in {path} (--trust_remote_code)")
    return models.Loaded(loaded.model, loaded.tokenizer, (*loaded.decisions, f"attention {name} ({why})"))


def _weight_dtype(run: Run, args: Any) -> Any:
    """A full fine-tune keeps float32 weights (bfloat16 loses small updates), unless DeepSpeed keeps them."""
    if args.device.type == "cpu":
        return "auto"
    if run.method == "full" and run.train.deepspeed is None:
        return torch.float32
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def wrap(run: Run, model: Any, tokenizer: Any, args: Any) -> tuple[Any, tuple[str, ...], Mapping[str, Any]]:
    """The model as it is trained, what was decided, and (PiSSA) the adapter's first values."""
    if not run.lora.use_lora:
        learnt = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        return model, (f"full fine-tune: all {learnt:,} parameters are trained",), {}
    set_seed(args.seed)
    wrapped = adapters.wrap(model, run.lora, tokenizer, checkpointing=args.gradient_checkpointing)
    return wrapped.model, wrapped.decisions, wrapped.initial


def fuse(model: Any, args: Any, choices: dict[str, Any]) -> tuple[str, ...]:
    """On a CPU: leaner layers, over the matrix product that is the faster one here. `choices` keeps which."""
    if args.device.type != "cpu" or args.bf16 or args.fp16:
        return ()
    stored = choices.get("matmul")
    choice = matmul.Choice.from_json(stored) if stored else share(matmul.choose() if is_rank_zero() else None)
    choices["matmul"] = choice.to_json()
    fused.keep_memory()
    counts = fused.install(model, choice.product)
    layers = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return (f"matrix products by {choice.route} ({choice.reason}); fused layers: {layers or 'none'}",)


# ----------------------------------------------------------------------------------------------- trainer


@dataclass
class StepTotals:
    """What the rows of the running optimizer step add up to, on this rank."""

    loss: torch.Tensor | None = None
    tokens: int = 0
    supervised: int = 0

    def add(self, loss: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> None:
        self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()
        self.tokens += batch["input_ids"].numel()
        self.supervised += batch["labels"].numel()


class ChatTrainer(Trainer):
    """transformers' Trainer over windows of conversations, with our loss."""

    def __init__(
        self,
        *,
        windows: WindowSampler,
        held_out: WindowSampler | None = None,
        loraplus_ratio: float | None = None,
        **options: Any,
    ) -> None:
        self.windows, self.held_out, self.loraplus_ratio = windows, held_out, loraplus_ratio
        self.totals = StepTotals()
        self.record: dict[str, Any] = {}  # what run.json says, stored in each checkpoint
        self.line: Mapping[str, Any] = {}  # the last of train_log.jsonl
        self.grad_norm: float | None = None
        self._aside: Path | None = None
        self.model_loss = ModelLoss(options["model"])  # before DeepSpeed or DDP wraps the model
        super().__init__(
            data_collator=Collator(),
            train_dataset=Rows(windows.data),
            eval_dataset=None if held_out is None else Rows(held_out.data),
            **options,
        )
        # The loss is divided by the supervised tokens of the whole step, not by the number of rows.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)  # the bar is ours (StepLog)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer writes into a folder aside; it takes its place when it is whole."""
        folder, step = Path(self.args.output_dir), self.state.global_step
        name = f"checkpoint-{step}"
        best = self.state.best_global_step
        first = self.args.should_save
        writing = checkpoints.written_aside(
            folder, name, first=first, barrier=self.accelerator.wait_for_everyone, record=self.record
        )
        with writing as self._aside:
            try:
                super()._save_checkpoint(model, trial)
                if first:  # a pickle that nothing reads, and an empty model card
                    for extra in ("training_args.bin", "README.md"):
                        (self._aside / name / extra).unlink(missing_ok=True)
                if best:
                    self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
                if first:
                    self.state.save_to_json(str(self._aside / name / "trainer_state.json"))
            finally:
                self._aside = None
        if first:
            keep = folder / f"checkpoint-{best}" if best else None
            checkpoints.prune(folder, step, self.args.save_total_limit, keep)

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """TensorBoard and the others get the names of train_log.jsonl."""
        names = ("learning_rate", "tokens", "supervised_tokens", "tokens_per_s", "memory_gib")
        if "loss" in logs:
            logs = logs | {name: self.line[name] for name in names if name in self.line}
        super().log(logs, *args, **kwargs)

    def _run_epoch(self, **options: Any) -> None:
        """transformers looks at max_steps only after a step: a checkpoint of the last one would get one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**options)

    def get_train_dataloader(self) -> Any:
        return self._rows(self.train_dataset, self.windows)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self._rows(self.eval_dataset, self.held_out)

    def _rows(self, dataset: Any, windows: WindowSampler | None) -> Any:
        loader: Any = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=windows,
            # Each start of a loader draws a number: from a stream of its own, or held-out data would move dropout's.
            generator=torch.Generator(),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=self.args.dataloader_persistent_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This row's loss / supervised tokens of the global step, times ranks (DDP averages gradients)."""
        count = max(1, int(num_items_in_batch or 0))  # 0: a step in which no message is learnt
        loss = self.model_loss(model, inputs).loss_sum * (self.accelerator.num_processes / count)
        self.totals.add(loss, inputs)
        return (loss, {}) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> Any:
        """LoRA+ has its own groups; everything else is the Trainer's."""
        self.optimizer: Any
        if self.loraplus_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        groups = adapters.optimizer_groups(
            self.model, self.args.learning_rate, self.loraplus_ratio, self.args.weight_decay
        )
        self.optimizer = kind(groups, **options)
        return self.optimizer

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """A gradient that is not a number stops the run before it reaches the weights (fp16 skips it)."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not self.args.fp16 and not math.isfinite(float(norm)):
            raise self.failure(f"the gradient is {float(norm)}")
        self.grad_norm = None if norm is None else float(norm)
        return norm

    def failure(self, what: str) -> TrainingError:
        """The error that names this step, its conversations and the likely cause."""
        step = self.state.global_step
        shown = self.conversations(step)
        rate = self._get_learning_rate() if self.lr_scheduler is not None else self.args.learning_rate
        cause = f"the learning rate ({rate:.1e} now) is too high, or the base's weights are damaged"
        return TrainingError(f"step {step + 1}: {what}; likely {cause}; conversations of this step: {shown}")

    def conversations(self, step: int) -> str:
        """Where the conversations of a step (counted from 0) stand in the data."""
        data: Any = self.windows.data
        where = [str(data.where(i)) for i in self.windows.conversations(step)]
        return ", ".join(where[:8]) + (f" and {len(where) - 8} more" if len(where) > 8 else "")

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean loss a supervised token, perplexity, token accuracy: over all ranks, logits never whole."""
        model = self._wrap_model(self.model, training=False)
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        with torch.no_grad():
            for batch in dataloader:
                row = self.model_loss(model, batch)
                sums += torch.tensor([float(row.loss_sum), row.correct, row.tokens], dtype=torch.float64)
        total, right, tokens = self.accelerator.reduce(sums.to(self.args.device), reduction="sum").tolist()
        loss, accuracy = total / max(1, tokens), right / max(1, tokens)
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "token_accuracy": accuracy}
        metrics["tokens"] = int(tokens)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=int(tokens))


class StepLog(TrainerCallback):
    """Every step: the ranks' loss, whether it can be right, a flushed line in train_log.jsonl, the bar."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / run_folder.LOG_FILE
        self.trainer: Any = None  # set by train(), before the first callback
        self.bar: Any = None
        self.now = (0.0, 0, 0)  # loss, tokens, supervised tokens of the running step, over all ranks
        self.rate = self.highest_rate = 0.0
        self.stop: Any = None  # StopSignal: whether this rank was asked to end
        self.stopping = False  # whether any rank was
        self.recent: deque[float] = deque(maxlen=50)
        self.losses: list[float] = []
        self.tokens = self.supervised = 0
        self.started = self.step_started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = self.step_started = time.perf_counter()
        if is_rank_zero():
            self._forget_after(state.global_step)
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                disable=args.disable_tqdm,
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resume in the middle of an epoch wraps the sampler: accelerate's set_epoch does not reach it.
        windows = self.trainer.windows
        windows.set_epoch(state.global_step // windows.windows)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # When a step ends the schedule has moved on to the next one's rate (under DeepSpeed, inside backward).
        self.rate = self.trainer._get_learning_rate()
        self.highest_rate = max(self.highest_rate, self.rate)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, totals = self.trainer, self.trainer.totals
        trainer.totals = StepTotals()
        loss = 0.0 if totals.loss is None else float(totals.loss)
        asked = self.stop is not None and self.stop.requested
        parts = [loss / args.world_size, totals.tokens, totals.supervised, asked]
        sums = torch.tensor(parts, dtype=torch.float64).to(args.device)
        loss, tokens, supervised, stops = trainer.accelerator.reduce(sums, reduction="sum").tolist()
        self.stopping = self.stopping or stops > 0  # every rank knows at the same step
        if not math.isfinite(loss):
            raise trainer.failure(f"the loss is {loss}")
        if loss == 0 and supervised and not self._learnt_by_heart(state.global_step):
            raise trainer.failure("the loss is exactly 0")
        self.now = (loss, int(tokens), int(supervised))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss, tokens, supervised = self.now
        self.losses.append(loss)
        self.tokens += tokens
        self.supervised += supervised
        now = time.perf_counter()
        seconds, self.step_started = now - self.step_started, now
        line = {
            "step": state.global_step,
            "epoch": round(state.epoch, 4),
            "loss": loss,
            "learning_rate": self.rate,
            "tokens": tokens,
            "supervised_tokens": supervised,
            "seconds": round(seconds, 4),
            "tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
            "grad_norm": self.trainer.grad_norm,
            "memory_gib": round(hardware.peak_memory() / memory_plan.GIB, 3),
        }
        self._note_spike(state.global_step, loss)
        self.trainer.line = line
        self._write(line)
        if self.stopping:
            control.should_save = control.should_training_stop = True
        if self.bar is not None:
            rate = self.tokens / max(now - self.started, 1e-9)
            self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tokens/s", refresh=False)
            self.bar.update(1)

    def _learnt_by_heart(self, step: int) -> bool:
        """Whether a loss of 0 is the end of a descent: after a small one, or (nothing is known) a resume."""
        return self.losses[-1] < BY_HEART if self.losses else step > 0

    def _note_spike(self, step: int, loss: float) -> None:
        """Name the conversations of a step whose loss stands out from the last fifty."""
        if len(self.recent) >= 10:
            usual, spread = statistics.mean(self.recent), statistics.stdev(self.recent)
            if loss > max(1.5 * usual, usual + 6 * spread):
                rank_zero(
                    f"step {step}: loss {loss:.3f} against {usual:.3f} before; conversations of this step:"
                    f" {self.trainer.conversations(step - 1)}"
                )
        self.recent.append(loss)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        kept = {name: value for name, value in (metrics or {}).items() if name.startswith("eval_")}
        self._write({"step": state.global_step, **kept})
        self.step_started = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        if is_rank_zero():
            with self.path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")

    def _forget_after(self, step: int) -> None:
        """A resumed run goes back to its checkpoint: the lines after it are written again."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def trainer(run: Run, args: Any, model: Any, tokenizer: Any, data: Data, log: StepLog) -> ChatTrainer:
    """The trainer of a run, its parts in place."""
    held_out = None
    if data.held_out is not None:
        held_out = sampler(run, data.held_out, ranks=args.world_size, seed=0, training=False)
    return ChatTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        windows=sampler(run, data.train, ranks=args.world_size, seed=seed_of(run)),
        held_out=held_out,
        loraplus_ratio=run.lora.loraplus_lr_ratio,
        callbacks=[log],
    )


def train(trainer: ChatTrainer, log: StepLog, checkpoint: Path | None) -> bool:
    """Run the loop, from a checkpoint where there is one. False: it was asked to stop, and has saved."""
    log.trainer = trainer
    with checkpoints.StopSignal(_ranks_here()) as log.stop:
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            if log.bar is not None:  # an error's line begins on a line of its own
                log.bar.close()
    return not log.stopping


def _ranks_here() -> list[int]:
    """Process ids of the ranks on this machine."""
    if not _is_joined():
        return []
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (socket.gethostname(), os.getpid()))
    return [pid for host, pid in found if host == socket.gethostname()]


# ------------------------------------------------------------------------------------------------ result


def save(
    trainer: ChatTrainer, run: Run, fmt: Any, folder: Path, base: str, initial: Mapping[str, Any]
) -> None:
    """Adapter or model, tokenizer with its template, generation config: complete, on rank 0."""
    trainer.model_loss.remove()
    fused.remove(trainer.accelerator.unwrap_model(trainer.model))
    weights = _gathered(trainer)
    if not is_rank_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = True
    end_tokens(model, fmt)
    aside = folder / checkpoints.ASIDE
    aside.mkdir(exist_ok=True)
    if run.lora.use_lora:
        adapters.save(model, aside, base=base, initial=initial, state_dict=weights)
        model.generation_config.save_pretrained(aside)
    else:
        model.save_pretrained(aside, state_dict=weights)
    fmt.complete_tokenizer()
    fmt.tokenizer.save_pretrained(aside)
    checkpoints.move_into(aside, folder)


def _gathered(trainer: ChatTrainer) -> Any:
    """Whole weights where ZeRO-3 has cut them up (an adapter's alone), else None: the model has them."""
    if not trainer.is_deepspeed_enabled or trainer.accelerator.state.deepspeed_plugin.zero_stage != 3:
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "peft_config"):
        return trainer.accelerator.get_state_dict(trainer.deepspeed)
    import deepspeed

    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(learnt.values())):
        return {name: p.detach().cpu().clone() for name, p in learnt.items()}


def end_tokens(model: Any, fmt: Any) -> None:
    """A generation config that stops where the trained replies stop, whatever the base's said."""
    config = model.generation_config
    old = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = list(dict.fromkeys([*fmt.stop_token_ids, *(t for t in old if t is not None)]))
    config.pad_token_id = fmt.tokenizer.pad_token_id


def record(
    run: Run,
    shaped_by: Mapping[str, Any],
    data: Data,
    decisions: Sequence[str],
    model: Path,
    choices: Mapping[str, Any],
    verdict: memory_plan.Verdict,
) -> dict[str, Any]:
    """What run.json holds from the start on: every option, the versions, the data."""
    budget = {"fingerprint": data.fingerprint, "epoch_conversations": len(data.train)}
    held_out = {} if data.held_out is None else {"held_out": data.held_out.summary.to_json()}
    return {
        "state": "running",
        "shaped_by": dict(shaped_by),
        "choices": dict(choices),
        "plan": {"row": verdict.row, **verdict.need.to_json()},
        "method": run.method,
        "model": str(model),
        "options": run.as_dict(),
        "given": sorted(run.given),
        "decisions": list(decisions),
        "data": {**budget, **data.summary.to_json()},
        **held_out,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": {"python": platform.python_version(), **_versions()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def outcome(trainer: ChatTrainer, log: StepLog, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json gets at the end: losses, token counts, times (of this start, where it was resumed)."""
    seconds = time.perf_counter() - log.started
    whole = len(log.losses) == trainer.state.global_step  # else this start saw the end of it alone
    return {
        "state": "finished",
        "steps": trainer.state.global_step,
        "losses": {"first": log.losses[0], "last": log.losses[-1]} if log.losses else {},
        "tokens": log.tokens,
        "supervised_tokens": log.supervised,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(log.tokens / max(seconds, 1e-9), 1),
        "peak_memory_gib": round(hardware.peak_memory() / memory_plan.GIB, 3),
        "highest_learning_rate": log.highest_rate if whole else None,
        "evaluation": dict(evaluation),
        **_best(trainer),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _best(trainer: ChatTrainer) -> dict[str, Any]:
    """The checkpoint that was best on held-out data, by what and how good, and the step of what is saved."""
    args, state = trainer.args, trainer.state
    if state.best_model_checkpoint is None:
        return {"best_checkpoint": None}
    saved = state.best_global_step if args.load_best_model_at_end else state.global_step
    best = {"step": state.best_global_step, "metric": args.metric_for_best_model, "value": state.best_metric}
    return {"best_checkpoint": state.best_model_checkpoint, "best": {**best, "saved_step": saved}}


def report(run: Run, folder: Path, outcome: Mapping[str, Any]) -> str:
    """A few lines for a person: what came of it, and what to type next."""
    losses, evaluation = outcome["losses"], outcome["evaluation"]
    lines = [
        f"{outcome['steps']} steps, {outcome['tokens']:,} tokens in {outcome['seconds']:.0f} s"
        f" ({outcome['tokens_per_s']:,.0f} tokens/s)"
        + (f"; loss {losses['first']:.4f} -> {losses['last']:.4f}" if losses else "")
    ]
    if evaluation:
        lines.append(
            f"held out: loss {evaluation['eval_loss']:.4f}, perplexity {evaluation['eval_perplexity']:.2f}, "
            f"token accuracy {evaluation['eval_token_accuracy']:.1%}"
        )
    if outcome["steps"] and outcome.get("highest_learning_rate") == 0:
        lines.append("nothing was learnt: every step ran at a rate of 0 (warming up); give --warmup_steps 0")
    best = outcome.get("best")
    if best is not None:
        name, metric = Path(outcome["best_checkpoint"]).name, str(best["metric"]).removeprefix("eval_")
        same = best["step"] == best["saved_step"]
        lines.append(
            f"best on held-out data: {name} ({metric} {best['value']:.4f}); "
            + ("that is what is saved" if same else f"what is saved is step {best['saved_step']}")
        )
    flag = "--adapter" if run.lora.use_lora else "-m"
    lines += [
        f"saved in {folder}; now talk to it:",
        f"  python fast_start/simple_try_0.py {flag} {shlex.quote(str(folder))}",
    ]
    return "\n".join(lines)
