"""The training loop: transformers' Trainer over windows of conversations, with our loss and each step's checks.

In: a model, TrainingArguments, the windows of the data (batches.py). Out: the trained model, checkpoints that
are whole (checkpoints.py), each step's figures.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from qwen_chat import hardware
from qwen_chat.console import rank_zero
from qwen_chat.errors import TrainingError
from qwen_chat.training import adapters, checkpoints, memory_plan, ranks
from qwen_chat.training.batches import Collator, RowDataset, WindowSampler
from qwen_chat.training.loss import ModelLoss
from qwen_chat.training.pulse import Pulse, StepPlace
from qwen_chat.training.router_loss import RouterLoss
from qwen_chat.training.stop_signal import StopSignal

# peft asks for transformers' old word for gradient checkpointing; nobody here can act on the warning.
warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing.*")
# DeepSpeed calls collectives by names that torch has renamed: two lines of warning each time.
warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed")


# Of each conversation the summed loss of its learnt tokens (nats), and how many they are.
Losses = list[tuple[float, int]]

BY_HEART = 0.1  # a loss from which single precision may reach exactly 0; damage falls to 0 from any height


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one optimizer step was, over all ranks: a line of train_log.jsonl."""

    step: int  # counted from 1
    epoch: float
    loss: float  # mean of its supervised tokens
    learning_rate: float
    tokens: int  # that the model computed
    supervised_tokens: int
    seconds: float
    tokens_per_s: float
    grad_norm: float | None
    memory_gib: float  # peak of this process so far
    # Mean of its sequences, before the coefficient; None where none is learnt.
    router_loss: float | None = None


@dataclass
class StepTotals:
    """What the rows of the running optimizer step add up to, on this rank."""

    loss: torch.Tensor | None = None
    router: torch.Tensor | None = None
    tokens: int = 0
    supervised: int = 0

    def add(self, loss: torch.Tensor, router: torch.Tensor | None, batch: Mapping[str, torch.Tensor]) -> None:
        self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()
        if router is not None:
            self.router = router.detach() if self.router is None else self.router + router.detach()
        self.tokens += batch["input_ids"].numel()
        self.supervised += batch["labels"].numel()


class ChatTrainer(Trainer, TrainerCallback):
    """transformers' Trainer over windows of conversations, with our loss.

    It is one of its own callbacks: what has to happen between backward and the update can happen nowhere else.
    in_passes: long rows are computed in passes (ModelLoss). run_record: what run.json says, stored in each checkpoint
    too. on_ready: is called before the clock of the first step starts, when the model can compute. on_step: is handed
    each step's StepRecord. on_place: where the running step is, on a CPU.
    """

    def __init__(
        self,
        *,
        windows: WindowSampler,
        held_out: WindowSampler | None = None,
        loraplus_ratio: float | None = None,
        in_passes: bool = False,
        patience: int | None = None,
        run_record: Mapping[str, Any] | None = None,
        on_ready: Callable[[ChatTrainer], None] = lambda trainer: None,
        on_step: Callable[[StepRecord], None] = lambda record: None,
        on_place: Callable[[StepPlace], None] = lambda place: None,
        **options: Any,
    ) -> None:
        self.windows, self.held_out, self.loraplus_ratio = windows, held_out, loraplus_ratio
        self.patience = patience
        self.run_record, self.on_ready, self.on_step = run_record or {}, on_ready, on_step
        self.told: list[str] = []  # what stood out while it ran
        self.evaluated: Losses = []  # the held-out conversations, when they were measured last
        self.totals = StepTotals()
        # Loss, router's loss, tokens, supervised tokens of the running step, over all ranks.
        self.sums = (0.0, 0.0, 0, 0)
        self.rate = 0.0
        self.grad_norm: float | None = None
        self.last: StepRecord | None = None
        self.recent: deque[float] = deque(maxlen=50)  # losses
        self.step_started = 0.0
        self.stop: StopSignal | None = None  # whether this rank was asked to end
        self.stopping = False  # whether any rank was
        self._aside: Path | None = None
        self.router = RouterLoss.of(options["model"].config)
        self.unlogged: list[float] = []  # router's losses of the steps that no reporter has seen yet
        args: TrainingArguments = options["args"]
        self.pulse: Pulse | None = None
        if args.device.type == "cpu":
            self.pulse = Pulse(options["model"], args.gradient_accumulation_steps, on_place)
        # Before DeepSpeed or DDP wraps the model.
        self.model_loss = ModelLoss(
            options["model"],
            router=self.router,
            in_passes=in_passes,
            on_pass=self.pulse.begin_pass if self.pulse else None,
        )
        super().__init__(
            data_collator=Collator(balanced=self.router is not None),
            train_dataset=RowDataset(windows.data),
            eval_dataset=None if held_out is None else RowDataset(held_out.data),
            **options,
        )
        # The loss is divided by the supervised tokens of the whole step, not by the number of rows.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)  # the bar is ours (StepLog)
        self.add_callback(self)

    def run(self, checkpoint: Path | None) -> bool:
        """Run the loop, from a checkpoint where there is one. False: it was asked to stop, and has saved."""
        with StopSignal(ranks.process_ids_here()) as self.stop:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return not self.stopping

    def _prepare_for_training(self, *args: object) -> Any:
        """Model, optimizer and checkpoint are in place; nothing has started to count seconds."""
        prepared = super()._prepare_for_training(*args)
        self.on_ready(self)
        return prepared

    def _get_output_dir(self, trial: object) -> str:
        return str(self._aside or self.args.output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        """The Trainer writes into a folder aside; it takes its place when it is whole."""
        folder, step = Path(self.args.output_dir), self.state.global_step
        name = f"checkpoint-{step}"
        best = self.state.best_global_step
        first = self.args.should_save
        writing = checkpoints.written_aside(
            folder, name, first=first, barrier=self.accelerator.wait_for_everyone, record=self.run_record
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

    def log(self, logs: dict[str, Any], *args: object, **kwargs: object) -> None:
        """TensorBoard and the others get the names of train_log.jsonl."""
        names = ("learning_rate", "tokens", "supervised_tokens", "tokens_per_s", "memory_gib")
        if "loss" in logs and self.last is not None:
            logs = logs | {name: getattr(self.last, name) for name in names}
            if self.router is not None and self.unlogged:
                # The Trainer adds up what compute_loss returned: the reporters get its two parts as well.
                mean, self.unlogged = statistics.mean(self.unlogged), []
                logs |= {"loss": logs["loss"] - self.router.coefficient * mean, "router_loss": mean}
        super().log(logs, *args, **kwargs)

    def _run_epoch(self, **options: object) -> None:
        """transformers looks at max_steps, and at its own wish to stop, only after a step: a checkpoint of the last
        one would get one more."""
        if self.state.global_step >= self.state.max_steps or self.is_out_of_patience():
            self.control.should_training_stop = True
            return
        super()._run_epoch(**options)

    def get_train_dataloader(self) -> Any:
        return self._rows(self.train_dataset, self.windows)

    def get_eval_dataloader(self, eval_dataset: object = None) -> Any:
        return self._rows(self.eval_dataset, self.held_out)

    def _rows(self, dataset: RowDataset, windows: WindowSampler | None) -> Any:
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
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This row's loss / supervised tokens of the global step, times ranks (DDP averages gradients).

        A router's loss is added: its sum over the row / sequences of the global step, times its coefficient.
        """
        if self.pulse is not None:
            self.pulse.begin_row()
        count = max(1, int(num_items_in_batch or 0))  # 0: a step in which no token is supervised
        row = self.model_loss(model, inputs)
        loss, router = row.loss_sum * (self.accelerator.num_processes / count), None
        if row.router_sum is not None:
            router = row.router_sum * self.accelerator.num_processes / inputs["step_sequences"][0]
        self.totals.add(loss, router, inputs)
        if self.router is not None and router is not None:
            loss = loss + self.router.coefficient * router
        return (loss, {}) if return_outputs else loss

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """LoRA+ has its own groups; everything else is the Trainer's."""
        self.optimizer: torch.optim.Optimizer
        if self.loraplus_ratio is None or self.optimizer is not None:
            self.optimizer = super().create_optimizer(model)
            return self.optimizer
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        groups = adapters.optimizer_groups(
            self.model, self.args.learning_rate, self.loraplus_ratio, self.args.weight_decay
        )
        self.optimizer = kind(groups, **options)
        return self.optimizer

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        """A gradient that is not a number stops the run before it reaches the weights (fp16 skips it)."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not self.args.fp16 and not math.isfinite(float(norm)):
            raise self.failure(f"the gradient is {float(norm)}")
        self.grad_norm = None if norm is None else float(norm)
        return norm

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self.step_started = time.perf_counter()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # A resume in the middle of an epoch wraps the sampler: accelerate's set_epoch does not reach it.
        self.windows.set_epoch(state.global_step // self.windows.windows)

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        # When a step ends the schedule has moved on to the next one's rate (under DeepSpeed, inside backward).
        self.rate = self._get_learning_rate()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Add up the ranks' parts of the step; TrainingError where its loss cannot be right."""
        totals, self.totals = self.totals, StepTotals()
        loss = 0.0 if totals.loss is None else float(totals.loss)
        asked = self.stop is not None and self.stop.requested
        router = 0.0 if totals.router is None else float(totals.router)
        parts = [loss / args.world_size, router / args.world_size, totals.tokens, totals.supervised, asked]
        sums = torch.tensor(parts, dtype=torch.float64).to(args.device)
        loss, router, tokens, supervised, stops = self.accelerator.reduce(sums, reduction="sum").tolist()
        self.stopping = self.stopping or stops > 0  # every rank knows at the same step
        if not math.isfinite(loss):
            raise self.failure(f"the loss is {loss}")
        before = None if self.last is None else self.last.loss
        if loss == 0 and supervised and not is_learnt_by_heart(before, state.global_step):
            raise self.failure("the loss is exactly 0")
        self.sums = (loss, router, int(tokens), int(supervised))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        loss, router, tokens, supervised = self.sums
        if self.router is not None:
            self.unlogged.append(router)
        now = time.perf_counter()
        seconds, self.step_started = now - self.step_started, now
        self.last = StepRecord(
            step=state.global_step,
            epoch=round(state.epoch, 4),
            loss=loss,
            learning_rate=self.rate,
            tokens=tokens,
            supervised_tokens=supervised,
            seconds=round(seconds, 4),
            tokens_per_s=round(tokens / max(seconds, 1e-9), 1),
            grad_norm=self.grad_norm,
            memory_gib=round(hardware.peak_memory() / memory_plan.GIB, 3),
            router_loss=None if self.router is None else router,
        )
        # Name the conversations of a step whose loss stands out from the last fifty.
        if len(self.recent) >= 10:
            usual, spread = statistics.mean(self.recent), statistics.stdev(self.recent)
            if loss > max(1.5 * usual, usual + 6 * spread):
                self._tell(
                    f"step {state.global_step}: loss {loss:.3f} against {usual:.3f} before; conversations of this"
                    f" step: {self.conversations(state.global_step - 1)}"
                )
        self.recent.append(loss)
        self.on_step(self.last)
        if self.stopping:
            control.should_save = control.should_training_stop = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.step_started = time.perf_counter()
        if self.is_in_train and self.is_out_of_patience():
            self._tell(
                f"stops at step {state.global_step}: {args.metric_for_best_model} was no better than its best"
                f" {self.patience} times in a row (--patience)"
            )
            control.should_training_stop = True

    def _tell(self, line: str) -> None:
        self.told.append(line)
        rank_zero(line)

    def is_out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations were no better than the best. Read from the log, which each
        checkpoint holds: a run that goes on from one stops where it would have stopped."""
        if self.patience is None:
            return False
        metric = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        measured = [entry[metric] for entry in self.state.log_history if metric in entry]
        sign = 1 if self.args.greater_is_better else -1
        best = max(range(len(measured)), key=lambda i: sign * measured[i], default=0)
        return len(measured) - 1 - best >= self.patience

    def failure(self, what: str) -> TrainingError:
        """The error that names this step, its conversations and the likely cause."""
        step = self.state.global_step
        shown = self.conversations(step)
        rate = self._get_learning_rate() if self.lr_scheduler is not None else self.args.learning_rate
        cause = f"the learning rate ({rate:.1e} now) is too high, or the base's weights are damaged"
        return TrainingError(f"step {step + 1}: {what}; likely {cause}; conversations of this step: {shown}")

    def conversations(self, step: int) -> str:
        """Where the conversations of a step (counted from 0) stand in the data."""
        where = [self.windows.where(i) for i in self.windows.conversations(step)]
        return ", ".join(where[:8]) + (f" and {len(where) - 8} more" if len(where) > 8 else "")

    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean loss a supervised token, perplexity, token accuracy of the held-out data."""
        assert self.held_out is not None
        self.evaluated, right = self._measured(dataloader, len(self.held_out.data))
        tokens = sum(count for _, count in self.evaluated)
        loss = sum(total for total, _ in self.evaluated) / max(1, tokens)
        accuracy = right / max(1, tokens)
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "token_accuracy": accuracy}
        metrics["tokens"] = tokens
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=tokens)

    def losses(self, windows: WindowSampler) -> Losses:
        """Of each conversation behind `windows`, by the model as it is now; the same on every rank."""
        return self._measured(self._rows(RowDataset(windows.data), windows), len(windows.data))[0]

    def _measured(self, rows: Any, conversations: int) -> tuple[Losses, int]:
        """Each conversation's loss, and how many tokens were the likeliest: over all ranks, logits never whole."""
        model = self._wrap_model(self.model, training=False)
        model.eval()
        sums = torch.zeros(2 * conversations + 1, dtype=torch.float64)
        with torch.no_grad():
            for batch in rows:
                row = self.model_loss(model, batch)
                assert row.losses is not None
                each, owners = row.losses.cpu().double(), batch["owners"].cpu()
                sums.index_add_(0, owners, each).index_add_(0, owners + conversations, torch.ones_like(each))
                sums[-1] += row.correct.cpu()
        found = self.accelerator.reduce(sums.to(self.args.device), reduction="sum").tolist()
        tokens = map(int, found[conversations:-1])
        return list(zip(found[:conversations], tokens, strict=True)), int(found[-1])


def is_learnt_by_heart(before: float | None, step: int) -> bool:
    """Whether a loss of 0 is the end of a descent: after a small one, or (nothing is known) a resume."""
    return step > 0 if before is None else before < BY_HEART
