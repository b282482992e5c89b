"""The log of a run: a flushed line of train_log.jsonl and a move of the bar for each optimizer step.

In: each step's StepRecord, each evaluation's figures. Out: the file, the bar, and what this start adds up to.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwen_chat.console import is_rank_zero
from qwen_chat.training.run_folder import LOG_FILE
from qwen_chat.training.trainer import StepRecord


class StepLog(TrainerCallback):
    """The trainer's `on_step` and one of its callbacks; as a context it closes the bar.

    So an error's line begins on a line of its own. Only rank 0 writes.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG_FILE
        self.bar: tqdm[Any] | None = None
        self.losses: list[float] = []
        self.tokens = self.supervised = 0
        self.highest_rate = 0.0
        self.started = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.started = time.perf_counter()
        if is_rank_zero():
            self.forget_after(state.global_step)
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                disable=args.disable_tqdm,
            )

    def step(self, record: StepRecord) -> None:
        """Count a step, write its line, move the bar."""
        self.losses.append(record.loss)
        self.tokens += record.tokens
        self.supervised += record.supervised_tokens
        self.highest_rate = max(self.highest_rate, record.learning_rate)
        line = asdict(record)
        if record.router_loss is None:
            del line["router_loss"]
        self._write(line)
        if self.bar is not None:
            rate = self.tokens / max(time.perf_counter() - self.started, 1e-9)
            self.bar.set_postfix_str(f"loss {record.loss:.4f}, {rate:,.0f} tokens/s", refresh=False)
            self.bar.update(1)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        kept = {name: value for name, value in (metrics or {}).items() if name.startswith("eval_")}
        self._write({"step": state.global_step, **kept})

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def forget_after(self, step: int) -> None:
        """A resumed run goes back to its checkpoint: the lines after it are written again."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def _write(self, line: Mapping[str, Any]) -> None:
        if is_rank_zero():
            with self.path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
