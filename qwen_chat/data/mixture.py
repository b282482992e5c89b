"""The data of a run: files checked and tokenised, mixed by weight, the first example shown.

In: a Run and a chat format. Out: `Data`, which the training reads conversation by conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from qwen_chat.chat.empty_think import notes, taught
from qwen_chat.chat.encoded import Encoded
from qwen_chat.chat.format import ChatFormat
from qwen_chat.chat.show import show
from qwen_chat.data.blocks import Sequence32
from qwen_chat.data.records import open_records
from qwen_chat.data.token_cache import tokenise
from qwen_chat.data.tokenised import TokenisedData, TokenSummary
from qwen_chat.errors import DataError
from qwen_chat.flags.run_options import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 1_000  # tokens of an example for a person: enough to see a prompt's head and the reply at the end


def seed_of(run: Run) -> int:
    """The seed that orders the data: TrainingArguments' data_seed, else seed, else its default 42."""
    given = run.extra.get("data_seed")
    return int(run.extra.get("seed", 42) if given is None else given)


@dataclass(frozen=True)
class Data:
    """Tokenised training and held-out data, a hash of the first, and its token budget."""

    train: TokenisedData | Mixture
    held_out: TokenisedData | None
    fingerprint: str
    summary: TokenSummary
    notes: tuple[str, ...] = ()  # on thinking

    def describe(self) -> str:
        """Both budgets for a person, with what was left out, counted and named."""
        lines = [self.summary.describe(), *self.notes]
        if self.held_out is not None:
            lines.append(f"held out: {self.held_out.summary.describe()}")
        return "\n".join(lines)

    def budget(self) -> tuple[int, int]:
        """(tokens, supervised tokens) of an epoch, in which --data_weights count."""
        mixed = self.train.budget() if isinstance(self.train, Mixture) else None
        return mixed or (self.summary.tokens, self.summary.supervised)


class Mixture:
    """Tokenised data in which an epoch sees each file's conversations `weight` times.

    The whole part of a weight repeats them; the rest is a share of them, drawn once by the seed.
    """

    def __init__(self, data: TokenisedData, weights: Sequence[float], *, seed: int) -> None:
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

    def __getitem__(self, i: int) -> tuple[Sequence32, ...]:
        return self.data[int(self.index[i])]

    def where(self, i: int) -> str:
        return self.data.where(int(self.index[i]))

    def budget(self) -> tuple[int, int]:
        """(tokens, supervised tokens) of an epoch; each conversation is looked at once."""
        found, times = np.unique(self.index, return_counts=True)
        tokens = supervised = 0
        for i, count in zip(found.tolist(), times.tolist(), strict=True):
            for sequence in self.data[i]:
                tokens += count * len(sequence.input_ids)
                supervised += count * sequence.supervised
        return tokens, supervised


def first_example(tokenizer: PreTrainedTokenizerBase, data: Data, *, colour: bool) -> str:
    """The first training sequence as it is learnt; of a long one the two ends."""
    stored = data.train[0][0]
    first = Encoded(stored.input_ids.tolist(), stored.spans.tolist())
    count = len(first.input_ids)
    left_out = count - SHOWN
    if left_out <= 0:
        return show(tokenizer, first, colour=colour)
    parts = first.part(0, SHOWN // 2), first.part(count - SHOWN // 2, count)
    head, tail = (show(tokenizer, part, colour=colour) for part in parts)
    return f"{head}\n... {left_out:,} tokens are not shown ...\n{tail}"


def read_data(run: Run, fmt: ChatFormat) -> Data:
    """Check and tokenise all files of a run; DataError with every bad line at once."""
    learnt = taught(fmt, run.data.empty_think)

    def read(paths: Sequence[str]) -> TokenisedData:
        return tokenise(
            open_records(paths, on_error=run.data.on_error),
            learnt,
            max_length=run.data.model_max_length,
            too_long=run.data.too_long,
            train_on=run.data.train_on,
            lazy=run.data.lazy_preprocess,
        )

    train = read(run.data.data_path)
    held_out = read(run.data.eval_data_path) if run.data.eval_data_path else None
    report = train.records.report
    told = notes(fmt, run.data.empty_think, thoughts=report.reasoning, conversations=report.conversations)
    data = Data(train, held_out, train.fingerprint, train.summary, told)
    if not run.data.data_weights:
        return data
    mixture = Mixture(train, run.data.data_weights, seed=seed_of(run))
    if len(mixture) == 0:
        raise DataError("--data_weights leave no conversation; give at least one file more weight")
    return replace(data, train=mixture)
