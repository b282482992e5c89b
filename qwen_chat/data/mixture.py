"""The data of a run: files checked and tokenised, mixed by weight, the first example shown.

In: a Run and a chat format. Out: `Data`, which the training reads conversation by conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qwen_chat.chat import empty_think, system_text
from qwen_chat.chat.empty_think import taught
from qwen_chat.chat.encoded import Encoded
from qwen_chat.chat.format import ChatFormat
from qwen_chat.chat.show import show
from qwen_chat.data.blocks import Sequence32
from qwen_chat.data.held_out import Leaks, division
from qwen_chat.data.records import DataReport, open_records
from qwen_chat.data.token_cache import tokenise
from qwen_chat.data.tokenised import TokenisedData, TokenSummary
from qwen_chat.errors import DataError, first_line
from qwen_chat.flags.run_options import DataArguments, Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEED = 42  # as transformers has it
SHOWN = 1_000  # tokens of an example for a person: enough to see a prompt's head and the reply at the end


def seed_of(run: Run) -> int:
    """The seed that orders the data: TrainingArguments' data_seed, else seed, else its default."""
    given = run.extra.get("data_seed")
    return int(run.extra.get("seed", SEED) if given is None else given)


def chat_format(tokenizer: Any, asked: DataArguments) -> ChatFormat:
    """The format that a run learns."""
    return ChatFormat(
        tokenizer,
        tool_style=asked.tool_style,
        language=asked.tool_language,
        template_kwargs=asked.template_kwargs,
        system=asked.system,
    )


@dataclass(frozen=True)
class Data:
    """Tokenised training and held-out data, a hash of the first, and its token budget."""

    train: TokenisedData | Selection
    held_out: TokenisedData | Selection | None
    fingerprint: str
    summary: TokenSummary  # of the training files, those that --eval_share holds out of them too
    notes: tuple[str, ...] = ()  # on the system text and thinking, and on lines that give held-out ones away
    leaks: Leaks = field(default_factory=Leaks)
    general: TokenisedData | None = None  # of everyday use: what should not be forgotten

    def describe(self) -> str:
        """The budgets for a person, with what was left out, counted and named."""
        lines = [self.summary.describe(), *self.notes]
        if isinstance(self.train, Mixture):
            tokens, learnt = self.train.budget()
            count = f"{len(self.train):,} conversations"
            lines.append(f"an epoch, by --data_weights: {count}, tokens {tokens:,}, learnt {learnt:,}")
        if isinstance(self.held_out, Selection):
            tokens, learnt = self.held_out.budget()
            count = f"{len(self.held_out):,} of these {len(self.held_out.data):,} conversations"
            lines.append(
                f"held out: {count}, by the hash of their prompts; tokens {tokens:,}, replies {learnt:,}"
            )
        elif self.held_out is not None:
            lines.append(f"held out: {self.held_out.summary.describe()}")
        if self.general is not None:
            lines.append(f"general: {self.general.summary.describe()}")
        return "\n".join(lines)

    def held_out_json(self) -> dict[str, Any]:
        """The held-out budget as plain values; empty where there is none."""
        if isinstance(self.held_out, Selection):
            tokens, supervised = self.held_out.budget()
            return {"conversations": len(self.held_out), "tokens": tokens, "supervised": supervised}
        return {} if self.held_out is None else self.held_out.summary.to_json()

    def budget(self) -> tuple[int, int]:
        """(tokens, supervised tokens) of an epoch, in which --data_weights and --eval_share count."""
        mixed = self.train.budget() if isinstance(self.train, Selection) else None
        return mixed or (self.summary.tokens, self.summary.supervised)


class Selection:
    """Some of tokenised data, by their numbers; a number may come several times."""

    def __init__(self, data: TokenisedData | Selection, index: npt.NDArray[np.int64]) -> None:
        self.data, self.index = data, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[Sequence32, ...]:
        return self.data[int(self.index[i])]

    def where(self, i: int) -> str:
        return self.data.where(int(self.index[i]))

    def given_of(self, i: int) -> int:
        return self.data.given_of(int(self.index[i]))

    def budget(self) -> tuple[int, int]:
        """(tokens, supervised tokens) of an epoch; each conversation is looked at once."""
        found, times = np.unique(self.index, return_counts=True)
        tokens = supervised = 0
        for i, count in zip(found.tolist(), times.tolist(), strict=True):
            for sequence in self.data[i]:
                tokens += count * len(sequence.input_ids)
                supervised += count * sequence.supervised
        return tokens, supervised


class Mixture(Selection):
    """Tokenised data in which an epoch sees the conversations of each file or folder given `weight` times.

    The whole part of a weight repeats them; the rest is a share of them, drawn once by the seed.
    """

    def __init__(self, data: TokenisedData | Selection, weights: Sequence[float], *, seed: int) -> None:
        random = np.random.default_rng((seed, 7))  # not the stream that orders the windows
        owners = np.array([data.given_of(i) for i in range(len(data))], dtype=np.int64)
        parts = []
        for number, weight in enumerate(weights):
            own = np.flatnonzero(owners == number)
            whole = int(weight)
            rest = random.permutation(own)[: round((weight - whole) * len(own))]
            parts += [own] * whole + [np.sort(rest)]
        super().__init__(data, np.concatenate(parts))


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
            open_records(paths, on_error=run.data.on_error, redact=run.data.redact),
            learnt,
            max_length=run.data.model_max_length,
            too_long=run.data.too_long,
            train_on=run.data.train_on,
            lazy=run.data.lazy_preprocess,
        )

    whole = read(run.data.data_path)
    told = notes_of(fmt, run.data, whole.records.report)
    return divided(whole, run.data, read, told, seed=seed_of(run))


def divided(
    whole: TokenisedData,
    asked: DataArguments,
    read: Callable[[Sequence[str]], TokenisedData],
    notes: Sequence[str] = (),
    *,
    seed: int,
) -> Data:
    """What is held out (a share of the data, or files of their own), and the rest, mixed by weight."""
    train: TokenisedData | Selection = whole
    held_out: TokenisedData | Selection | None = None
    found = Leaks()
    if asked.eval_share is not None:
        parts = division(whole, asked.eval_share)
        apart = np.isin(whole.kept, np.array(parts.apart, dtype=np.uint64))
        train, held_out = Selection(whole, np.flatnonzero(~apart)), Selection(whole, np.flatnonzero(apart))
        found = parts.told(whole.records, whole.records)
    elif asked.eval_data_path:
        held_out = others = _read_as("--eval_data_path", asked.eval_data_path, read)
        found = division(whole, others).told(whole.records, others.records)
    if asked.data_weights:
        train = Mixture(train, asked.data_weights, seed=seed)
        if len(train) == 0:
            raise DataError("--data_weights leave no conversation; give at least one file more weight")
    _ensure_supervised(train, "what is left to train on has no token to learn: its replies are all context")
    if held_out is not None:
        _ensure_supervised(held_out, "what is held out has no token to measure: its replies are all context")
    general = None
    if asked.general_data is not None:
        general = _read_as("--general_data", [asked.general_data], read)
    told = (*notes, *found.describe())
    return Data(train, held_out, whole.fingerprint, whole.summary, told, found, general)


def _read_as(
    flag: str, paths: Sequence[str], read: Callable[[Sequence[str]], TokenisedData]
) -> TokenisedData:
    """Other data than the training's; DataError says which."""
    try:
        return read(paths)
    except DataError as error:
        raise DataError(f"{flag}: {first_line(error, 1_000)}", error.problems, error.total) from None


def _ensure_supervised(data: TokenisedData | Selection, told: str) -> None:
    """DataError where a part of the data has no supervised token; the first conversation usually has one."""
    if not any(sequence.supervised for i in range(len(data)) for sequence in data[i]):
        raise DataError(f"{told}; give another --eval_share, --data_weights or --eval_data_path")


def notes_of(fmt: ChatFormat, asked: DataArguments, report: DataReport) -> tuple[str, ...]:
    """What a person should know of the format in this data: the system text, and thinking."""
    system = system_text.told(fmt.system)
    thinking = empty_think.notes(
        fmt, asked.empty_think, thoughts=report.reasoning, conversations=report.chats
    )
    return (*([system] if system else []), *thinking)
