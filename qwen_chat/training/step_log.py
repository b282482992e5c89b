"""The log of a run: for each optimizer step a flushed line of train_log.jsonl, and what a person sees of it.

In: each step's StepRecord, each evaluation's figures, where a running step is. Out: the file; on a terminal a bar that
moves, else plain lines, with the time at which the run will end; and what this start adds up to.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwen_chat.console import is_rank_zero, rank_zero
from qwen_chat.training.pulse import StepPlace
from qwen_chat.training.run_folder import LOG_FILE
from qwen_chat.training.trainer import StepRecord

# Seconds between two lines of a file: after a step, within one. A bar is drawn again at most once a second.
A_STEP, A_PLACE, DRAWN = 10.0, 30.0, 1.0
FORETOLD = 0.1  # steps after which an end is foretold


def ending(seconds: float, now: float) -> str:
    """When something ends that takes so many seconds more from `now` (of the epoch)."""
    minutes = round(seconds / 60)
    then, today = time.localtime(now + seconds), time.localtime(now)
    clock = time.strftime("%H:%M" if then[:3] == today[:3] else "%Y-%m-%d %H:%M", then)
    if minutes < 2:
        return f"ends about {clock}, in {seconds:.0f} s"
    hours, days = minutes // 60, minutes // 1440
    left = f"{minutes} min" if not hours else f"{hours} h {minutes % 60} min"
    return f"ends about {clock}, in " + (left if days < 2 else f"{days} days {hours % 24} h")


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
        self.started = self.seconds = 0.0  # when the first step began; how long the steps took
        self.first = self.steps = 0  # this start's first step, the run's last
        self.lines = False
        self.told = 0.0  # when a person last saw something

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.started = time.perf_counter()
        self.told = self.started
        self.first, self.steps = state.global_step, state.max_steps
        if is_rank_zero():
            self.forget_after(state.global_step)
            self.lines = not args.disable_tqdm and not sys.stderr.isatty()
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                disable=args.disable_tqdm or self.lines,
                bar_format="{percentage:3.0f}%|{bar}| step {n_fmt} of {total_fmt}, {elapsed} gone{postfix}",
            )

    def step(self, record: StepRecord) -> None:
        """Count a step, write its line, move the bar."""
        self.losses.append(record.loss)
        self.tokens += record.tokens
        self.supervised += record.supervised_tokens
        self.highest_rate = max(self.highest_rate, record.learning_rate)
        left = self._left(record.step)
        line = asdict(record) | {"remaining_s": round(left, 1)}
        if record.router_loss is None:
            del line["router_loss"]
        self._write(line)
        if self.bar is not None:
            now = time.perf_counter()
            rate = self.tokens / max(now - self.started, 1e-9)
            parts = [f"loss {record.loss:.4f}", f"{rate:,.0f} tokens/s"]
            ends = [] if record.step == self.steps else [ending(left, time.time())]
            self.bar.set_postfix_str(", ".join(parts + ends), refresh=False)
            self.bar.update(1)
            if self.lines and (record.step == self.steps or now - self.told >= A_STEP):
                self.told = now
                parts.append(f"{self.bar.format_interval(now - self.started)} gone")
                rank_zero(f"step {record.step} of {self.steps}: {', '.join(parts + ends)}")

    def place(self, place: StepPlace) -> None:
        """Tell where a step is that takes long."""
        now = time.perf_counter()
        if self.bar is None or (self.bar.disable and not self.lines):
            return
        if now - self.told < (A_PLACE if self.lines else DRAWN):
            return
        self.told = now
        done = self.first + len(self.losses) + place.share
        end = f", {ending(self._left(done), time.time())}" if done - self.first >= FORETOLD else ""
        if self.lines:
            rank_zero(f"step {int(done) + 1} of {self.steps}: {place}{end}")
        else:
            self.bar.set_postfix_str(f"{place}{end}", refresh=True)

    def _left(self, done: float) -> float:
        """Seconds until the last step, where so many are done, at this start's pace."""
        pace = (time.perf_counter() - self.started) / max(done - self.first, 1e-9)
        return pace * max(0.0, self.steps - done)

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
        self.seconds = time.perf_counter() - self.started
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
