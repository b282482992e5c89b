"""From tokenised conversations to the packed rows of an optimizer step, and from a row to tensors.

In: TokenisedData (`data[i]` -> the `Encoded` sequences of conversation i). Out: for the Trainer's DataLoader
a batch sampler (WindowSampler), a dataset (RowDataset) and a collator (Collator). A packed row is a micro-batch.
One optimizer step is a window of batch size x accumulation x ranks conversations; how a window is laid out in
rows never changes its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from qwen_chat import place
from qwen_chat.data.blocks import Ints
from qwen_chat.data.mixture import seed_of
from qwen_chat.errors import DataError, OptionError
from qwen_chat.flags.run_options import Run
from qwen_chat.training.packing import LAYOUTS, TOKEN_BYTES, PackedRow, plan_rows


class TrainingSequence(Protocol):
    """One training sequence: token ids [T], and its supervised tokens as `[start, end)` pairs."""

    @property
    def input_ids(self) -> Sequence[int] | Ints: ...

    @property
    def spans(self) -> Sequence[tuple[int, int]] | Ints: ...


class Conversations(Protocol):
    """What token_cache.tokenise returns."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sequence[TrainingSequence]: ...


class WindowSampler:
    """Batch sampler: yields `[PackedRow]`, accumulation x ranks of them a window, micro-step first, rank second.

    Deterministic in (seed, epoch), so every rank makes the same plan, and a resumed run skips to the same
    place. accelerate then deals row i to rank i % ranks. `set_epoch` must be called before each epoch.
    """

    batch_size = 1  # a batch is one row
    drop_last = False

    def __init__(
        self,
        data: Conversations,
        *,
        batch_size: int,
        accumulation: int = 1,
        ranks: int = 1,
        max_length: int,
        layout: str = "shared_prefix",
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if layout not in LAYOUTS:
            raise OptionError(f"--layout: '{layout}' is not one of {', '.join(LAYOUTS)}")
        if len(data) == 0:
            raise DataError(f"no conversation is left to learn from; see `{place.invocation('check')}`")
        self.data = data
        self.conversations_per_row = batch_size
        self.accumulation = accumulation
        self.ranks = ranks
        self.max_length = max_length
        self.layout = layout
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    @property
    def sampler(self) -> WindowSampler:
        """accelerate looks for `set_epoch` here."""
        return self

    @property
    def window(self) -> int:
        """Conversations in an optimizer step."""
        return self.conversations_per_row * self.accumulation * self.ranks

    @property
    def windows(self) -> int:
        """Optimizer steps in an epoch; the last one may have fewer conversations."""
        return -(-len(self.data) // self.window)

    def __len__(self) -> int:
        return self.windows * self.accumulation * self.ranks

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The conversations in the order in which an epoch sees them."""
        if not self.shuffle:
            return np.arange(len(self.data))
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.data))

    def conversations(self, step: int) -> list[int]:
        """The conversations of optimizer step `step`, counted from 0 over the whole run."""
        epoch, window = divmod(step, self.windows)
        return [int(i) for i in self.order(epoch)[window * self.window : (window + 1) * self.window]]

    def __iter__(self) -> Iterator[list[PackedRow]]:
        order = self.order(self.epoch)
        for start in range(0, len(order), self.window):
            for row in self.plan([int(i) for i in order[start : start + self.window]]):
                yield [row]

    def plan(self, conversations: Sequence[int]) -> list[PackedRow]:
        """Lay out one window."""
        keys: list[bytes] = []
        names: list[tuple[int, int]] = []
        for conversation in conversations:
            for number, encoded in enumerate(self.data[conversation]):
                key = np.asarray(encoded.input_ids, dtype=np.int32).tobytes()
                if len(key) > TOKEN_BYTES * self.max_length:
                    raise DataError(
                        f"{self.where(conversation)}: {len(key) // TOKEN_BYTES} tokens; expected at most"
                        f" {self.max_length}; raise --model_max_length, or let --too_long drop or truncate it"
                    )
                keys.append(key)
                names.append((conversation, number))
        plans = plan_rows(
            keys,
            [conversation for conversation, _ in names],
            layout=self.layout,
            batch_size=self.conversations_per_row,
            accumulation=self.accumulation,
            ranks=self.ranks,
            budget=self.conversations_per_row * self.max_length,
        )
        rows = []
        for members, shared in plans:
            lengths = tuple(len(keys[member]) // TOKEN_BYTES for member in members)
            pad_to = max(lengths, default=0) if self.layout == "padded" else 0
            sequences = tuple(names[member] for member in members)
            rows.append(PackedRow(sequences, lengths, shared, pad_to, len(keys)))
        return rows

    def where(self, conversation: int) -> str:
        """Where a conversation stands in the data, for an error."""
        where = getattr(self.data, "where", None)
        return str(where(conversation)) if where else f"conversation {conversation}"

    def longest_row(self, windows: int | None = None) -> tuple[int, int]:
        """Of all rows of epoch 0's first `windows` windows the most tokens, and the most that one in passes holds at
        once; None reads all of the data.
        """
        order = self.order(0)
        starts = range(0, len(order), self.window)[:windows]
        rows = [
            (row.tokens, row.held)
            for start in starts
            for row in self.plan([int(i) for i in order[start : start + self.window]])
        ]
        return max(tokens for tokens, _ in rows), max(held for _, held in rows)


def training_windows(run: Run, data: Conversations, ranks: int) -> WindowSampler:
    """Optimizer steps over training data, in the order of the run's seed."""
    train = run.train
    return WindowSampler(
        data,
        batch_size=train.per_device_train_batch_size,
        accumulation=train.gradient_accumulation_steps,
        ranks=ranks,
        max_length=run.data.model_max_length,
        layout=train.layout,
        seed=seed_of(run),
    )


def held_out_windows(run: Run, data: Conversations, ranks: int) -> WindowSampler:
    """One row a rank over held-out data, in its own order."""
    return WindowSampler(
        data,
        batch_size=run.train.per_device_eval_batch_size,
        ranks=ranks,
        max_length=run.data.model_max_length,
        layout=run.train.layout,
        shuffle=False,
    )


class RowDataset(Dataset[tuple[PackedRow, list[TrainingSequence]]]):
    """The dataset behind a WindowSampler. It is indexed by a PackedRow, not by a number: its sequences come with it."""

    def __init__(self, data: Conversations) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: PackedRow) -> tuple[PackedRow, list[TrainingSequence]]:
        return row, [self.data[conversation][number] for conversation, number in row.sequences]


class Collator:
    """One row to tensors.

    input_ids, position_ids [1, T] · segments [S, 3] the attention layout (packing.py), a keyword of
    model.forward · logits_to_keep [K] the positions whose logits are needed (one that several sequences
    continue from may repeat) · shift_labels [1, K] what each of them should predict · labels: the same tensor
    (the Trainer wants to see the name) · owners [K] the conversation whose token that is.

    For a router's loss (`balanced`) also: last_tokens [S] where in the row each sequence ends · step_sequences [1]
    how many sequences the optimizer step has.
    """

    def __init__(self, *, balanced: bool = False) -> None:
        self.balanced = balanced

    def __call__(
        self, items: Sequence[tuple[PackedRow, Sequence[TrainingSequence]]]
    ) -> dict[str, torch.Tensor]:
        if len(items) != 1:
            raise ValueError(
                f"a batch is one row; found {len(items)}: use WindowSampler as the batch sampler"
            )
        row, sequences = items[0]
        ids = np.zeros(row.tokens, dtype=np.int64)
        positions = np.zeros(row.tokens, dtype=np.int64)
        # Where the last sequence's tokens lie in the row.
        path = np.zeros(max(row.lengths, default=0), dtype=np.int64)
        keep, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        owners: list[int] = []
        last: list[int] = []
        at = 0
        for named, encoded, length, shared in zip(
            row.sequences, sequences, row.lengths, row.shared, strict=True
        ):
            own = length - shared
            ids[at : at + own] = encoded.input_ids[shared:]
            path[shared:length] = np.arange(at, at + own)
            stored = row.pad_to or own
            positions[at : at + stored] = np.arange(shared, shared + stored)
            for start, end in encoded.spans:
                first = max(start, 1)  # the first token is predicted by none
                keep.append(path[first - 1 : end - 1].copy())
                targets.append(np.asarray(encoded.input_ids[first:end], dtype=np.int64))
                owners += [named[0]] * max(0, end - first)
            at += stored
            last.append(int(path[length - 1]))
        labels_kept = torch.from_numpy(np.concatenate(targets))[None]
        tensors = {
            "input_ids": torch.from_numpy(ids)[None],
            "position_ids": torch.from_numpy(positions)[None],
            "segments": torch.tensor(row.segments(), dtype=torch.int64),
            "logits_to_keep": torch.from_numpy(np.concatenate(keep)),
            "labels": labels_kept,
            "shift_labels": labels_kept,
            "owners": torch.tensor(owners, dtype=torch.int64),
        }
        if self.balanced:
            tensors["last_tokens"] = torch.tensor(last, dtype=torch.int64)
            tensors["step_sequences"] = torch.tensor([row.step_sequences])
        return tensors
