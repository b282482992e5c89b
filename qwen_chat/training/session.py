"""A run on its way to its first step: prepared by each process alone, then joined with the others.

In: a Run, its output folder, its model's folder. Out: `Prepared` (data read, an earlier start agreed with, memory
planned), then a `Session`, which the rest of finetune.py works on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from qwen_chat import families, models
from qwen_chat.chat.format import ChatFormat
from qwen_chat.console import unless_checked
from qwen_chat.data import mixture
from qwen_chat.data.mixture import Data, read_data
from qwen_chat.errors import OptionError
from qwen_chat.flags import deepspeed_file, preset
from qwen_chat.flags.run_options import Run, settled
from qwen_chat.training import memory_plan, run_folder
from qwen_chat.training.batches import held_out_windows, training_windows
from qwen_chat.training.options import training_arguments
from qwen_chat.training.ranks import any_rank, from_rank_zero
from qwen_chat.training.step_log import StepLog
from qwen_chat.training.trainer import ChatTrainer


@dataclass(frozen=True)
class Prepared:
    """A run that may begin."""

    run: Run
    folder: Path  # what it writes into
    model_path: Path
    fmt: ChatFormat
    data: Data
    shaped_by: Mapping[str, Any]  # see run_folder.shaped_by
    before: run_folder.Resume
    verdict: memory_plan.Verdict
    warnings: tuple[str, ...]  # of the flags, the data and their lengths


@dataclass(frozen=True)
class Session(Prepared):
    """A prepared run whose ranks are joined; they write into the same folder."""

    args: TrainingArguments
    decisions: tuple[str, ...]
    choices: Mapping[str, Any]  # what was measured or chosen by itself: a resumed run chooses the same

    def trainer(
        self,
        model: PreTrainedModel,
        record: Mapping[str, Any],
        log: StepLog,
        on_ready: Callable[[ChatTrainer], None] = lambda trainer: None,
    ) -> ChatTrainer:
        """The trainer of this run. record: what run.json says, stored in each checkpoint too."""
        run, data, world_size = self.run, self.data, self.args.world_size
        held_out = None if data.held_out is None else held_out_windows(run, data.held_out, world_size)
        return ChatTrainer(
            model=model,
            args=self.args,
            processing_class=self.fmt.tokenizer,
            windows=training_windows(run, data.train, world_size),
            held_out=held_out,
            loraplus_ratio=run.lora.loraplus_lr_ratio,
            in_passes=self.choices.get("in_passes", False),
            patience=run.train.patience,
            run_record=record,
            on_ready=on_ready,
            on_step=log.step,
            on_place=log.place,
            callbacks=[log],
        )


def prepare(run: Run, folder: Path, model_path: Path) -> Prepared:
    """Read the data, choose by --preset, agree with what an earlier start left in the folder, plan the memory.

    Raises DataError (every bad line at once), CheckpointError (every changed setting), OptionError (no room).
    """
    fmt = format_of(run, model_path)
    data = read_data(run, fmt)
    run = settle(run, model_path, data, run_folder.begun(run, folder))
    shaped_by = run_folder.shaped_by(run, data.fingerprint, model_path)
    before = run_folder.resume(run, folder, shaped_by)
    unless_checked(data.describe())
    unless_checked(preset.explained(run.train.preset, run.chosen))
    verdict, notes = plan(run, model_path, data)
    warnings = (*run.notes, *data.notes, *notes)
    return Prepared(run, folder, model_path, fmt, data, shaped_by, before, verdict, warnings)


def settle(
    run: Run,
    model_path: Path,
    data: Data,
    begun: Mapping[str, Any] | None = None,
    *,
    ranks: int | None = None,
) -> Run:
    """The run with what --preset chooses for these data. begun: run.json of the one that it goes on from. ranks: of
    the run; those that were launched without it.

    Raises OptionError where DeepSpeed's file has other numbers than were chosen.
    """
    ranks = ranks or memory_plan.ranks()
    facts = preset.Facts(
        method=run.method,
        width=memory_plan.Shape.of(models.read_config(model_path)).hidden or None,
        conversations=len(data.train),
        learnt=data.budget()[1] if data.summary.complete else None,
        processes=ranks,
    )
    run = settled(run, facts, (begun or {}).get("options"))
    if run.train.deepspeed is not None:
        config, _ = deepspeed_file.read_deepspeed(run.train.deepspeed)
        if found := deepspeed_file.deepspeed_contradictions(run, config, numbers=None, ranks=ranks):
            raise OptionError("\n".join(found))
    return run


def format_of(run: Run, model_path: Path) -> ChatFormat:
    """The format that a run learns, of the model in a folder."""
    tokenizer = models.load_tokenizer(model_path, trust_remote_code=run.model.trust_remote_code)
    return mixture.chat_format(tokenizer, run.data)


def plan(run: Run, model_path: Path, data: Data) -> tuple[memory_plan.Verdict, tuple[str, ...]]:
    """Hold the largest row (of the first 64 steps, and the longest conversation) against the memory, and the longest
    conversation against the model's positions, of which the notes tell; OptionError if it cannot fit."""
    row, held, longest = longest_row(run, data)
    config = models.read_config(model_path)
    shape = memory_plan.Shape.of(config)
    notes = families.positions_note(config, longest)
    for note in notes:
        unless_checked(f"note: {note}")
    verdict = memory_plan.decide(run, shape, row=row, held=held, supervised=row, longest=longest)
    if verdict.refusal is not None and not run.train.plan_anyway:
        raise OptionError(verdict.refusal)
    return verdict, notes


def longest_row(run: Run, data: Data, *, ranks: int | None = None) -> tuple[int, int, int]:
    """(tokens of the largest row that the run is known to meet, the most that one in passes holds at once, tokens of
    the longest conversation).
    """
    windows = training_windows(run, data.train, ranks or memory_plan.ranks())
    row, held = windows.longest_row(windows=64)
    longest = min(int(data.summary.quantiles.get("max", row)), run.data.model_max_length)
    return max(row, longest), max(held, longest), longest


def join(prepared: Prepared) -> Session:
    """Join the ranks; agree on the folder and on gradient checkpointing."""
    run, verdict = prepared.run, prepared.verdict
    chosen = dict(prepared.before.choices)
    on = bool(chosen.get("gradient_checkpointing", verdict.checkpointing))
    if run.train.gradient_checkpointing != "auto":
        on = verdict.checkpointing
    if not memory_plan.on_accelerator(run) and int(chosen.get("threads", 0)) > 0:
        torch.set_num_threads(int(chosen["threads"]))  # the order of sums depends on it
    args, decisions = training_arguments(run, prepared.folder, checkpointing=on)
    agreed = any_rank(on)  # memory is free on one machine and not on another: all compute again, or none
    if agreed and not on:
        args.activation_checkpointing = args.gradient_checkpointing = True
        args.activation_checkpointing_kwargs = {"use_reentrant": False}
    args.output_dir = from_rank_zero(lambda: str(prepared.folder))
    chosen |= {
        "gradient_checkpointing": agreed,
        # A run that began before there were passes goes on without.
        "in_passes": bool(chosen.get("in_passes", verdict.in_passes and not chosen)),
        "threads": torch.get_num_threads(),
        "layout": run.train.layout,
    }
    joined = {**vars(prepared), "folder": Path(args.output_dir)}
    return Session(**joined, args=args, decisions=(*decisions, verdict.line), choices=chosen)
