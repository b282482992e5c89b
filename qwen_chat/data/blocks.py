"""Conversations to arrays: tokenised under the length policy, a block of records at a time, by all cores.

In: `Records`, an Encoder, `TokenOptions`. Out: a `Block` for each run of records, in their order.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from qwen_chat import hardware
from qwen_chat.chat.encoded import IGNORED, Encoded, Encoder, TrainOn
from qwen_chat.conversation import Conversation
from qwen_chat.data.privacy import Secret
from qwen_chat.data.records import Records
from qwen_chat.errors import FormatError, OutputError

TooLong = Literal["drop", "truncate", "error"]
Ints = npt.NDArray[np.int32]

EXAMPLES = 3  # conversations with secrets of each kind that are named
CHUNK = 128  # records a worker takes at once
IN_PROCESS = 256  # fewer records than this are tokenised here: starting workers would take longer


@dataclass(frozen=True, slots=True)
class TokenOptions:
    """What is learnt, and what becomes of a conversation of more than `max_length` tokens."""

    max_length: int
    too_long: TooLong
    train_on: TrainOn


@dataclass(frozen=True, slots=True)
class Sequence32:
    """One training sequence. `input_ids`: a read-only view of the cache; `spans` (n, 2): what is learnt."""

    input_ids: Ints
    spans: Ints

    @property
    def labels(self) -> Ints:
        """The ids where they are learnt, -100 elsewhere."""
        labels = np.full(len(self.input_ids), IGNORED, dtype=np.int32)
        for begin, end in self.spans:
            labels[begin:end] = self.input_ids[begin:end]
        return labels

    @property
    def supervised(self) -> int:
        """How many tokens are learnt."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


@dataclass(slots=True)
class Personal:
    """Secrets and personal data by the name of their kind: in how many conversations, and the first of them, each with
    the first characters of one (privacy.py)."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def add(self, other: Personal) -> None:
        self.counts.update(other.counts)
        for name, some in other.first.items():
            self._keep(name, some)

    def see(self, record: int, found: Sequence[Secret]) -> None:
        """What was found in one conversation."""
        for name, shown in {one.kind.name: one.shown for one in reversed(found)}.items():
            self.counts[name] += 1
            self._keep(name, [(record, shown)])

    def _keep(self, name: str, some: Sequence[tuple[int, str]]) -> None:
        kept = self.first.setdefault(name, [])
        kept += some[: EXAMPLES - len(kept)]


@dataclass(slots=True)
class Block:
    """The outcome for some records: what a worker sends back."""

    ids: Ints
    sequence_lengths: Ints
    spans: Ints  # (n, 2), within their sequences
    span_counts: Ints  # of each sequence
    sequence_counts: Ints  # of each kept conversation
    kept: npt.NDArray[np.uint64]
    full_lengths: Ints  # of each record
    truncated: int
    cut: int  # documents that are longer than max_length, and the `pieces` that they are kept in
    pieces: int
    too_long: list[int]
    failures: list[tuple[int, str]]
    personal: Personal

    def supervised(self) -> npt.NDArray[np.int64]:
        """Learnt tokens of each kept conversation."""
        learnt = np.cumsum(np.append(0, self.spans[:, 1] - self.spans[:, 0]), dtype=np.int64)
        spans = np.append(0, np.cumsum(self.span_counts))
        ends = np.append(0, np.cumsum(self.sequence_counts))
        each: npt.NDArray[np.int64] = np.diff(learnt[spans[ends]])
        return each

    def conversations(self) -> list[tuple[Sequence32, ...]]:
        """The sequences of each kept conversation."""
        ids = np.split(self.ids, np.cumsum(self.sequence_lengths)[:-1])
        spans = np.split(self.spans, np.cumsum(self.span_counts)[:-1])
        sequences = iter(map(Sequence32, ids, spans))
        return [tuple(itertools.islice(sequences, int(count))) for count in self.sequence_counts]


def encode_block(records: Records, fmt: Encoder, options: TokenOptions, indices: Sequence[int]) -> Block:
    """These records, tokenised here."""
    encoded: list[Encoded] = []
    counts, kept, full = array("i"), array("Q"), array("i")
    truncated, cut, in_pieces, too_long, failures = 0, 0, 0, [], []
    conversations, personal = [], Personal()
    for i in indices:
        conversation, found = records.screened(i)
        conversations.append(conversation)
        personal.see(i, found)
    outcomes = _encode(fmt, conversations, options.train_on)
    for i, conversation, whole in zip(indices, conversations, outcomes, strict=True):
        if isinstance(whole, FormatError):
            failures.append((i, str(whole)))
            full.append(0)
            continue
        if conversation.document is not None:
            pieces = _cut_up(whole[0], options.max_length)
            full.append(longest(pieces))
            cut += len(pieces) > 1
            in_pieces += len(pieces) * (len(pieces) > 1)
            encoded.extend(pieces)
            counts.extend([1] * len(pieces))
            kept.extend([i] * len(pieces))
            continue
        full.append(longest(whole))
        fitted: Sequence[Encoded] | None = whole
        if full[-1] > options.max_length:
            too_long.append(i)
            fitted = _fitted(fmt, conversation, options) if options.too_long == "truncate" else None
        if fitted is None:
            continue
        truncated += fitted is not whole
        encoded.extend(fitted)
        counts.append(len(fitted))
        kept.append(i)
    # array() reads a list several times as fast as numpy does
    ids = b"".join(array("i", one.input_ids).tobytes() for one in encoded)
    spans = [span for one in encoded for span in one.spans]
    return Block(
        ids=np.frombuffer(ids, dtype=np.int32),
        sequence_lengths=np.array([len(one.input_ids) for one in encoded], dtype=np.int32),
        spans=np.array(spans, dtype=np.int32).reshape(-1, 2),
        span_counts=np.array([len(one.spans) for one in encoded], dtype=np.int32),
        sequence_counts=np.array(counts, dtype=np.int32),
        kept=np.array(kept, dtype=np.uint64),
        full_lengths=np.array(full, dtype=np.int32),
        truncated=truncated,
        cut=cut,
        pieces=in_pieces,
        too_long=too_long,
        failures=failures,
        personal=personal,
    )


def _cut_up(document: Encoded, most: int) -> list[Encoded]:
    """A document in the fewest sequences of at most `most` tokens, all about as long."""
    count = len(document.input_ids)
    size = -(-count // -(-count // most))
    return [document.part(start, start + size) for start in range(0, count, size)]


def longest(sequences: Sequence[Encoded]) -> int:
    """Tokens of the longest."""
    return max((len(sequence.input_ids) for sequence in sequences), default=0)


def _encode(
    fmt: Encoder, conversations: Sequence[Conversation], train_on: TrainOn
) -> Sequence[Sequence[Encoded] | FormatError]:
    """The sequences of each conversation, or why the template cannot carry it."""
    try:
        return fmt.encode_many(conversations, train_on)
    except FormatError as error:
        if len(conversations) == 1:
            return [error]
        return [_encode(fmt, [conversation], train_on)[0] for conversation in conversations]


def _fitted(fmt: Encoder, conversation: Conversation, options: TokenOptions) -> Sequence[Encoded] | None:
    """The newest turns of a too long conversation, or None where not even the last one fits.

    A turn is a user message with everything up to the next one, so no call is cut from its result and the
    final <|im_end|> stays; the system message and the tools stay too. Halving finds the fewest that must go.
    """
    messages = conversation.messages
    turns = [k for k, message in enumerate(messages) if message.role == "user"]
    head = messages[:1] if messages[0].role == "system" else ()
    best: Sequence[Encoded] | None = None
    low, high = 1, len(turns)  # turns[:low] must go; turns[:high] would leave nothing
    while low < high:
        middle = (low + high) // 2
        shorter = replace(conversation, messages=(*head, *messages[turns[middle] :]))
        encoded = fmt.encode_many([shorter], options.train_on)[0]
        if longest(encoded) <= options.max_length:
            best, high = encoded, middle
        else:
            low = middle + 1
    return best


# ---------------------------------------------------------------- many processes


def encode_blocks(
    records: Records, fmt: Encoder, options: TokenOptions, indices: Sequence[int], workers: int | None
) -> Iterator[Block]:
    """The blocks of these records, in order; at most a few wait in memory.

    `workers` defaults to the cores this process may use.
    """
    chunks = [indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK)]
    count = workers or (1 if len(indices) < IN_PROCESS else hardware.cores())
    if min(count, len(chunks)) <= 1:
        for chunk in chunks:
            yield encode_block(records, fmt, options, chunk)
        return
    # fork where there is one: a worker then has the tokenizer and the index without importing anything
    fork = "fork" in multiprocessing.get_all_start_methods()
    pool = ProcessPoolExecutor(
        min(count, len(chunks)),
        mp_context=multiprocessing.get_context("fork" if fork else "spawn"),
        initializer=_start_worker,
        initargs=(records, fmt, options, os.getpid()),
    )
    try:
        waiting: deque[Future[Block]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) >= 4 * count:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()
    except BrokenProcessPool:
        raise OutputError(
            "a tokenising process was killed (out of memory?); free some memory or give fewer workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_job: tuple[Records, Encoder, TokenOptions] | None = None


def _start_worker(records: Records, fmt: Encoder, options: TokenOptions, parent: int) -> None:
    global _job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the thread pool does not survive a fork
    _job = records, fmt, options
    gc.freeze()  # a collection would write into every object that is shared with the parent, and so copy it

    def leave_with_parent() -> None:
        """A worker whose parent was killed would wait for work forever."""
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _work(indices: Sequence[int]) -> Block:
    assert _job is not None
    return encode_block(*_job, indices)
