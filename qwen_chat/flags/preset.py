"""The flags that decide how well a run learns: what each of them is where nobody gave it, and why.

In: the name of a preset, what is known of the run (`Facts`), the values that were given. Out: a `Chosen` for each other
flag of `LEARNS_BY`. Pure: no file, no clock, no torch.

`auto` follows the data and the model; benchmarks/bench_defaults.py measures it. `qwen2` are the numbers of the Qwen2
repository's examples/sft (finetune.py and finetune.sh), which they are for every method.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

ADAPTER = ("lora_r", "lora_alpha", "lora_dropout")
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
LEARNS_BY = (*ADAPTER, "learning_rate", "num_train_epochs", *BATCH)

QWEN2: Mapping[str, float] = {
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "learning_rate": 3e-4,
    "num_train_epochs": 5.0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
}

# The ranks of auto, with the most learnt tokens of an epoch that each is for; the last one is for all above.
RANK_FOR = ((16, 3_000_000), (32, 10_000_000), (64, math.inf))
ALPHA_OF_RANK = 2  # what an adapter is multiplied by
# The rate of an adapter over a model of MEASURED_WIDTH; a wider one gets less, as (MEASURED_WIDTH / width) ** EXPONENT.
# The rate was found on the demo model: twice as much learns a little more and forgets far more. The exponent is
# Schulman et al.'s for Llama, and so is a full fine-tune's tenth (LoRA Without Regret, 2025).
RATE, MEASURED_WIDTH, EXPONENT = 5e-4, 576, 0.78
FULL = 1 / 10  # a full fine-tune's rate is this part of an adapter's: every weight moves
UNKNOWN_WIDTH = 3584  # where config.json does not tell: a 7B's, whose rate is safe for smaller ones
EPOCHS = (30, 1, 10)  # 30 / sqrt(conversations), from 1 to 10
EPOCH_STEPS, STEP = 200, (2, 16)  # a step's conversations: such that an epoch has 200 steps, but from 2 to 16
UNKNOWN_STEP = 8  # while the data are not read
ROW = 4  # conversations of a row at most: what a row holds is what takes memory


@dataclass(frozen=True)
class Facts:
    """What is known of a run. None: not read yet, or not counted."""

    method: Literal["full", "lora", "qlora"]
    width: int | None = None  # the model's hidden size
    conversations: int | None = None  # of an epoch
    learnt: int | None = None  # supervised tokens of an epoch
    processes: int = 1
    rank_stabilised: bool = False  # --use_rslora: the scale is alpha / sqrt(rank)


@dataclass(frozen=True)
class Chosen:
    """One flag's value and its reason, without the flags that it follows from."""

    flag: str
    value: float
    reason: str

    def __str__(self) -> str:
        return f"--{self.flag} {self.value:g} ({self.reason})"


def choices(preset: Literal["auto", "qwen2"], facts: Facts, given: Mapping[str, float]) -> tuple[Chosen, ...]:
    """A choice for each flag of LEARNS_BY that has no value in `given`; for a full fine-tune none of ADAPTER."""
    if preset == "qwen2":
        every: list[Chosen] = [Chosen(flag, QWEN2[flag], "the Qwen2 example's") for flag in LEARNS_BY]
    else:
        every = [*_adapter_choices(facts, given), _rate(facts), _epochs(facts), *_batch(facts, given)]
    left = [
        flag for flag in LEARNS_BY if flag not in given and (facts.method != "full" or flag not in ADAPTER)
    ]
    return tuple(choice for choice in every if choice.flag in left)


def explained(preset: str, chosen: Sequence[Chosen]) -> str:
    """What was chosen, for a person: a line each."""
    if not chosen:
        return f"--preset {preset} chose nothing: every flag that it would was given"
    return "\n".join([f"chosen by --preset {preset}:", *(f"  {choice}" for choice in chosen)])


def _adapter_choices(facts: Facts, given: Mapping[str, float]) -> Iterator[Chosen]:
    rank, why = RANK_FOR[-1][0], "the most that is chosen; the data decide"
    if facts.conversations is not None:
        rank = next(rank for rank, most in RANK_FOR if (facts.learnt or 0) <= most)
        why = "the tokens that are learnt are not counted yet"  # where data are tokenised on first use
        if facts.learnt is not None:
            why = f"{facts.learnt:,} tokens are learnt"
    yield Chosen("lora_r", rank, why)
    root = "the square root of " if facts.rank_stabilised else ""
    divisor = given.get("lora_r", rank)
    alpha = ALPHA_OF_RANK * (math.sqrt(max(0, divisor)) if facts.rank_stabilised else divisor)
    yield Chosen("lora_alpha", max(1, round(alpha)), f"{ALPHA_OF_RANK} times {root}the rank")
    yield Chosen("lora_dropout", 0.0, "it gained nothing where it was measured, and takes memory and time")


def _rate(facts: Facts) -> Chosen:
    width = facts.width or UNKNOWN_WIDTH
    rate = RATE * (MEASURED_WIDTH / width) ** EXPONENT * (FULL if facts.method == "full" else 1)
    known = f"the model is {width:,} wide" if facts.width else "the model's width is not known"
    method = "every weight moves" if facts.method == "full" else "an adapter"
    return Chosen("learning_rate", float(f"{rate:.0e}"), f"{method}, {known}")


def _epochs(facts: Facts) -> Chosen:
    if facts.conversations is None:
        return Chosen("num_train_epochs", 3.0, "the data decide")
    factor, least, most = EPOCHS
    epochs = min(most, max(least, round(factor / math.sqrt(max(1, facts.conversations)))))
    return Chosen("num_train_epochs", float(epochs), f"{facts.conversations:,} conversations")


def _batch(facts: Facts, given: Mapping[str, float]) -> Iterator[Chosen]:
    """Rows and accumulation that make the step of conversations, over all processes. Nothing given is checked yet."""
    step = UNKNOWN_STEP
    if facts.conversations is not None:
        least, most = STEP
        step = min(most, max(least, 2 ** int(math.log2(max(1, facts.conversations / EPOCH_STEPS)))))
    wanted = max(1, step // facts.processes)
    row = min(ROW, max(1, round(wanted / max(1, given.get("gradient_accumulation_steps", 1)))))
    row = int(given.get("per_device_train_batch_size", row))
    rows = int(given.get("gradient_accumulation_steps", max(1, round(wanted / max(1, row)))))
    why = "the data decide"
    if facts.conversations is not None:
        # What it comes to: not every step can be dealt to these processes in rows of one length.
        why = f"a step of {row * rows * facts.processes} of {facts.conversations:,} conversations"
    yield Chosen("per_device_train_batch_size", row, why)
    yield Chosen("gradient_accumulation_steps", rows, why)
