"""Tokenised conversations: on disk, built once by all cores, memory-mapped, keyed by everything that matters.

In: `Records`, a ChatFormat and the length policy. Out: `TokenisedData`: `data[i]` gives the training
sequences of conversation i (`input_ids` and `labels`, int32), `data.summary` the token budget.

A cache is a folder `<cache dir>/tokens/<key>`. The key covers the content of the data files, the format's
fingerprint (template, style, vocabulary), the options, the source of the modules that tokenise, and the
versions of the packages beneath them. It is written aside, flushed, and renamed: a folder of that name is
whole. A file lock lets the ranks of a run share one build.

    ids.i32            all sequences, one after another
    sequences.u64      where each begins in ids, and the end
    spans.i32          pairs (begin, end), positions within a sequence that are learnt
    span_starts.u64    each sequence's first span, and the end
    conversations.u64  each kept conversation's first sequence, and the end
    kept.u64           which record each kept conversation is
    lengths.i32        tokens of every record's longest sequence before the length policy
    meta.json          sizes and summary

`lazy=True` gives the same interface and the same sequences, tokenised on first use.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import threading
import time
from abc import ABC, abstractmethod
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from qwen_chat import hardware
from qwen_chat.chat.encoded import IGNORED, TrainOn
from qwen_chat.conversation import Conversation, Message
from qwen_chat.data.records import Records
from qwen_chat.errors import DataError, FormatError, OutputError, Problem
from qwen_chat.files import build_once
from qwen_chat.files import cache_dir as default_cache_dir

TooLong = Literal["drop", "truncate", "error"]
Ints = npt.NDArray[np.int32]
Progress = Callable[[int, int], None]

CHUNK = 128  # records a worker takes at once
IN_PROCESS = 256  # fewer records than this are tokenised here: starting workers would take longer
REMEMBERED = 4_096  # conversations that lazy data keeps in memory
LISTED = 20  # problems that an error lists
NAMED = 5  # conversations of each sort left out that a summary names
PREFIX_SAMPLE = 2_000  # conversations that the share of common prefixes is estimated from
_FILES: dict[str, type[np.generic]] = {
    "ids.i32": np.int32,
    "sequences.u64": np.uint64,
    "spans.i32": np.int32,
    "span_starts.u64": np.uint64,
    "conversations.u64": np.uint64,
    "kept.u64": np.uint64,
    "lengths.i32": np.int32,
}
# What decides which tokens come out: these files and folders of the package, by content.
_CODE = ("conversation.py", "chat", "data", "dialects", "tools")
AUDITED = 64  # conversations at most on which a format's quick way is compared with its template
_PACKAGES = ("tokenizers", "transformers", "jinja2")


class EncodedLike(Protocol):
    """One training sequence: as many labels as ids; a label is its id, or -100 where it is not learnt."""

    @property
    def input_ids(self) -> Sequence[int]: ...
    @property
    def labels(self) -> Sequence[int]: ...


class Format(Protocol):
    """What is needed of a ChatFormat."""

    @property
    def fingerprint(self) -> str: ...
    def audit(self, conversations: Iterable[Conversation]) -> None: ...
    def encode_many(
        self, conversations: Sequence[Conversation], train_on: TrainOn = "all"
    ) -> Sequence[Sequence[EncodedLike]]: ...


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


@dataclass(frozen=True, slots=True)
class TokenSummary:
    """The token budget of `records` conversations, `dropped` of them too long and left out."""

    records: int
    conversations: int
    sequences: int
    tokens: int
    supervised: int
    dropped: int
    truncated: int
    failed: int  # left out by on_error="skip": the template cannot carry them
    unsupervised: int  # kept, with nothing in them to learn
    max_length: int
    too_long: TooLong
    lossless_max_length: int  # the model_max_length that would lose nothing
    quantiles: Mapping[str, int]  # lengths before the policy: min, p50, p90, p95, p99, max
    common_prefix_share: float  # share of all tokens that lie in a prefix some other sequence has too
    complete: bool = True  # False under lazy: counted so far
    skipped: int = 0  # lines left out by on_error="skip", beside the records
    skipped_at: tuple[str, ...] = ()  # file:line of the first NAMED of them
    dropped_at: tuple[str, ...] = ()
    failed_at: tuple[str, ...] = ()

    def describe(self) -> str:
        """A few lines for a person."""
        share = self.supervised / self.tokens if self.tokens else 0.0
        so_far = "" if self.complete else " (tokenised so far)"
        lines = [
            f"conversations {self.conversations:,} of {self.records:,}, sequences {self.sequences:,}, "
            f"tokens {self.tokens:,}, learnt {self.supervised:,} ({share:.1%}){so_far}",
            "tokens a conversation: " + ", ".join(f"{name} {n:,}" for name, n in self.quantiles.items()),
            f"tokens in a prefix that others have too: {self.common_prefix_share:.1%}",
        ]
        for count, what, where in (
            (self.skipped, f"bad lines left out, of {self.records + self.skipped:,}", self.skipped_at),
            (self.dropped, f"dropped, longer than --model_max_length {self.max_length:,}", self.dropped_at),
            (self.truncated, f"truncated to {self.max_length:,} tokens, their oldest turns left out", ()),
            (self.failed, "left out, the chat template cannot write them", self.failed_at),
            (self.unsupervised, "kept, with nothing in them to learn", ()),
        ):
            if count:
                names = f" ({', '.join(where)}{', ...' if count > len(where) else ''})" if where else ""
                lines.append(f"{what}: {count:,}{names}")
        if self.dropped or self.truncated:
            lines.append(f"--model_max_length {self.lossless_max_length} would lose nothing")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json` and `meta.json`; `TokenSummary(**values)` reads them back."""
        return {**asdict(self), "quantiles": dict(self.quantiles)}


class TokenisedData(ABC):
    """The kept conversations as training sequences, in the records' order."""

    fingerprint: str  # the key: the same data, format, options and code give the same
    _kept: npt.NDArray[np.uint64]  # which record each kept conversation is

    def __init__(self, records: Records) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self._kept)

    @abstractmethod
    def __getitem__(self, i: int) -> tuple[Sequence32, ...]:
        """The sequences of kept conversation `i`: one, or one a turn."""

    @abstractmethod
    def lengths(self, i: int) -> tuple[int, ...]:
        """How many tokens each of them has."""

    def record_of(self, i: int) -> int:
        """Which record kept conversation `i` is."""
        return int(self._kept[i])

    @property
    def summary(self) -> TokenSummary:
        """The token budget, and everything of the files that is not in it."""
        report, lengths = self.records.report, self.full_lengths
        gone = np.ones(len(self.records), dtype=bool)
        gone[self._kept.astype(np.int64)] = False
        return replace(
            self._budget(),
            skipped=report.skipped,
            skipped_at=tuple(dict.fromkeys(problem.where for problem in report.problems))[:NAMED],
            dropped_at=self._named(gone & (lengths > 0)),
            failed_at=self._named(gone & (lengths == 0)),
        )

    def _named(self, which: npt.NDArray[np.bool_]) -> tuple[str, ...]:
        return tuple(self.records.where(int(i)) for i in np.flatnonzero(which)[:NAMED])

    @abstractmethod
    def _budget(self) -> TokenSummary:
        """The summary, as far as the tokens tell it."""

    @property
    @abstractmethod
    def full_lengths(self) -> Ints:
        """Tokens of every record's longest sequence before the length policy, (records,)."""

    def __iter__(self) -> Iterator[tuple[Sequence32, ...]]:
        return (self[i] for i in range(len(self)))

    def where(self, i: int) -> str:
        """`file:line` of kept conversation `i`."""
        return self.records.where(self.record_of(i))

    def file_of(self, i: int) -> int:
        """Which of the data files, in the order they were given, kept conversation `i` comes from."""
        return self.records.file_of(self.record_of(i))


def tokenise(
    records: Records,
    fmt: Format,
    *,
    max_length: int,
    too_long: TooLong = "drop",
    train_on: TrainOn = "all",
    cache_dir: str | os.PathLike[str] | None = None,
    lazy: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> TokenisedData:
    """Tokenise every conversation, or open what was tokenised before.

    `workers` defaults to the cores this process may use; `progress(done, all)` is called now and then.
    Raises DataError where nothing is left to learn, where too_long="error" meets a longer conversation, or
    where the template cannot carry one (records opened with on_error="skip": left out and counted).
    """
    options = _Options(max_length, too_long, train_on)
    key = _key(records, fmt, options)
    sample = (records[i] for i in range(0, len(records), len(records) // AUDITED + 1))
    if lazy:
        fmt.audit(sample)
        return LazyData(records, fmt, options, key, workers)
    folder = Path(cache_dir or default_cache_dir()) / "tokens" / key

    def build(aside: Path) -> None:
        fmt.audit(sample)
        blocks = _blocks(records, fmt, options, range(len(records)), workers)
        _build(aside, blocks, records, options, progress)

    build_once(folder, build)
    return CachedData(records, folder)


@dataclass(frozen=True, slots=True)
class _Options:
    max_length: int
    too_long: TooLong
    train_on: TrainOn


def _key(records: Records, fmt: Format, options: _Options) -> str:
    parts = {
        "data": records.fingerprint,
        "format": fmt.fingerprint,
        "options": asdict(options),
        "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in _code()],
        "packages": [importlib.metadata.version(name) for name in _PACKAGES],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _code() -> list[Path]:
    package = Path(__file__).resolve().parents[1]
    return [
        file
        for name in _CODE
        for file in sorted([package / name, *(package / name).glob("*.py")])
        if file.is_file()
    ]


# ---------------------------------------------------------------- opened


class CachedData(TokenisedData):
    """A folder of the cache, memory-mapped: opening it reads nothing but `meta.json`."""

    def __init__(self, records: Records, folder: Path) -> None:
        super().__init__(records)
        self.folder = folder
        self.fingerprint = folder.name
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self._summary = TokenSummary(**meta["summary"])
            files = [_mapped(folder / name, kind, meta["sizes"][name]) for name, kind in _FILES.items()]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{folder}: a damaged token cache ({error}); delete this folder") from None
        (
            self._ids,
            self._sequences,
            spans,
            self._span_starts,
            self._conversations,
            self._kept,
            self._lengths,
        ) = files
        self._spans = spans.reshape(-1, 2)

    def __reduce__(self) -> tuple[type[CachedData], tuple[Records, Path]]:
        return CachedData, (self.records, self.folder)

    def __getitem__(self, i: int) -> tuple[Sequence32, ...]:
        return tuple(self._sequence(s) for s in self._range(i))

    def _range(self, i: int) -> range:
        i = range(len(self))[i]
        return range(int(self._conversations[i]), int(self._conversations[i + 1]))

    def _sequence(self, s: int) -> Sequence32:
        ids = self._ids[int(self._sequences[s]) : int(self._sequences[s + 1])]
        return Sequence32(ids, self._spans[int(self._span_starts[s]) : int(self._span_starts[s + 1])])

    def lengths(self, i: int) -> tuple[int, ...]:
        return tuple(int(self._sequences[s + 1]) - int(self._sequences[s]) for s in self._range(i))

    def _budget(self) -> TokenSummary:
        return self._summary

    @property
    def full_lengths(self) -> Ints:
        return self._lengths


def _mapped(path: Path, kind: type[np.generic], size: int) -> npt.NDArray[Any]:
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes instead of {size:,}")
    if not size:
        return np.empty(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r").view(np.ndarray)  # plain views: memmap's are slow to slice


# ---------------------------------------------------------------- one conversation, one block of them


@dataclass(slots=True)
class _Block:
    """The outcome for some records: what a worker sends back."""

    ids: Ints
    sequence_lengths: Ints
    spans: Ints  # (n, 2), within their sequences
    span_counts: Ints  # of each sequence
    sequence_counts: Ints  # of each kept conversation
    kept: npt.NDArray[np.uint64]
    full_lengths: Ints  # of each record
    truncated: int
    too_long: list[int]
    failures: list[tuple[int, str]]

    def supervised(self) -> npt.NDArray[np.int64]:
        """Learnt tokens of each kept conversation."""
        learnt = np.cumsum(np.append(0, self.spans[:, 1] - self.spans[:, 0]), dtype=np.int64)
        spans = np.append(0, np.cumsum(self.span_counts))
        ends = np.append(0, np.cumsum(self.sequence_counts))
        each: npt.NDArray[np.int64] = np.diff(learnt[spans[ends]])
        return each

    def sequences(self) -> tuple[Sequence32, ...]:
        ids = np.split(self.ids, np.cumsum(self.sequence_lengths)[:-1])
        spans = np.split(self.spans, np.cumsum(self.span_counts)[:-1])
        return tuple(map(Sequence32, ids, spans))


def _encode_block(records: Records, fmt: Format, options: _Options, indices: Sequence[int]) -> _Block:
    encoded: list[EncodedLike] = []
    counts, kept, full = array("i"), array("Q"), array("i")
    block_truncated, too_long, failures = 0, [], []
    conversations = [records[i] for i in indices]
    for i, conversation, whole in zip(
        indices, conversations, _encode(fmt, conversations, options), strict=True
    ):
        if isinstance(whole, FormatError):
            failures.append((i, str(whole)))
            full.append(0)
            continue
        length = _longest(whole)
        full.append(length)
        fitted: Sequence[EncodedLike] | None = whole
        if length > options.max_length:
            too_long.append(i)
            fitted = _fitted(fmt, conversation, options)
        if fitted is None:
            continue
        block_truncated += fitted is not whole
        encoded.extend(fitted)
        counts.append(len(fitted))
        kept.append(i)
    ids, lengths, spans, span_counts = _flatten(encoded)
    return _Block(
        ids,
        lengths,
        spans,
        span_counts,
        np.array(counts, dtype=np.int32),
        np.array(kept, dtype=np.uint64),
        np.array(full, dtype=np.int32),
        block_truncated,
        too_long,
        failures,
    )


def _encode(
    fmt: Format, conversations: Sequence[Conversation], options: _Options
) -> Sequence[Sequence[EncodedLike] | FormatError]:
    """The sequences of each conversation, or why the template cannot carry it."""
    try:
        return fmt.encode_many(conversations, options.train_on)
    except FormatError as error:
        if len(conversations) == 1:
            return [error]
        return [_encode(fmt, [conversation], options)[0] for conversation in conversations]


def _longest(sequences: Sequence[EncodedLike]) -> int:
    return max((len(sequence.input_ids) for sequence in sequences), default=0)


def _fitted(fmt: Format, conversation: Conversation, options: _Options) -> Sequence[EncodedLike] | None:
    """A too long conversation under the policy: its newest turns, or None where it is left out.

    A turn is a user message with everything up to the next one, so no call is cut from its result and the
    final <|im_end|> stays; the system message and the tools stay too. Halving finds the fewest that must go.
    """
    if options.too_long != "truncate":
        return None
    messages = conversation.messages
    turns = [k for k, message in enumerate(messages) if message.role == "user"]
    head = messages[:1] if messages[0].role == "system" else ()
    best: Sequence[EncodedLike] | None = None
    low, high = 1, len(turns)  # turns[:low] must go; turns[:high] would leave nothing
    while low < high:
        middle = (low + high) // 2
        shorter = replace(conversation, messages=(*head, *messages[turns[middle] :]))
        encoded = fmt.encode_many([shorter], options.train_on)[0]
        if _longest(encoded) <= options.max_length:
            best, high = encoded, middle
        else:
            low = middle + 1
    return best


def _flatten(encoded: Sequence[EncodedLike]) -> tuple[Ints, Ints, Ints, Ints]:
    """Sequences laid end to end: ids, lengths, spans (n, 2) within each, and how many spans each has."""
    lengths = np.array([len(sequence.input_ids) for sequence in encoded], dtype=np.int32)
    flat, targets = _joined(one.input_ids for one in encoded), _joined(one.labels for one in encoded)
    learnt = targets != IGNORED
    if not np.array_equal(flat[learnt], targets[learnt]):
        raise AssertionError("a label is neither its token nor -100")
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    opening, closing = np.zeros(len(flat) + 1, dtype=bool), np.zeros(len(flat) + 1, dtype=bool)
    opening[starts] = closing[ends] = True  # a span ends with its sequence
    before, after = np.append(False, learnt), np.append(learnt, False)
    begins = np.flatnonzero(after & (~before | opening))
    stops = np.flatnonzero(before & (~after | closing))
    owners = np.searchsorted(ends, begins, side="right")
    spans = np.stack([begins - starts[owners], stops - starts[owners]], axis=1).astype(np.int32)
    return flat, lengths, spans, np.bincount(owners, minlength=len(encoded)).astype(np.int32)


def _joined(lists: Iterable[Sequence[int]]) -> Ints:
    # array() reads a list several times as fast as numpy does
    return np.frombuffer(b"".join(array("i", one).tobytes() for one in lists), dtype=np.int32)


# ---------------------------------------------------------------- many processes


def _blocks(
    records: Records, fmt: Format, options: _Options, indices: Sequence[int], workers: int | None
) -> Iterator[_Block]:
    """The blocks of these records, in order; at most a few wait in memory."""
    chunks = [indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK)]
    count = workers or (1 if len(indices) < IN_PROCESS else hardware.cores())
    if min(count, len(chunks)) <= 1:
        for chunk in chunks:
            yield _encode_block(records, fmt, options, chunk)
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
        waiting: deque[Future[_Block]] = deque()
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


_job: tuple[Records, Format, _Options] | None = None


def _start_worker(records: Records, fmt: Format, options: _Options, parent: int) -> None:
    global _job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the thread pool does not survive a fork
    _job = records, fmt, options
    gc.freeze()  # a collection would write into every object that is shared with the parent, and so copy it
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """A worker whose parent was killed would wait for work forever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(indices: Sequence[int]) -> _Block:
    assert _job is not None
    return _encode_block(*_job, indices)


# ---------------------------------------------------------------- written


@dataclass(slots=True)
class _Counts:
    """What has been written so far, and the first of what must be told."""

    sequences: int = 0
    tokens: int = 0
    spans: int = 0
    supervised: int = 0
    kept: int = 0
    truncated: int = 0
    unsupervised: int = 0
    too_long: int = 0
    failed: int = 0
    examples_too_long: list[int] = field(default_factory=list)
    examples_failed: list[tuple[int, str]] = field(default_factory=list)

    def add(self, block: _Block) -> None:
        learnt = block.supervised()
        self.sequences += len(block.sequence_lengths)
        self.tokens += len(block.ids)
        self.spans += len(block.spans)
        self.supervised += int(learnt.sum())
        self.kept += len(block.kept)
        self.truncated += block.truncated
        self.unsupervised += int((learnt == 0).sum())
        self.too_long += len(block.too_long)
        self.failed += len(block.failures)
        self.examples_too_long += block.too_long[: LISTED - len(self.examples_too_long)]
        self.examples_failed += block.failures[: LISTED - len(self.examples_failed)]


def _build(
    folder: Path, blocks: Iterable[_Block], records: Records, options: _Options, progress: Progress | None
) -> None:
    """Write all blocks and `meta.json` into `folder`; raise DataError where the outcome must not be used."""
    counts, done = _Counts(), 0
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in _FILES}
        for block in blocks:
            _append(files, block, counts)
            counts.add(block)
            done += len(block.full_lengths)
            if progress is not None:
                progress(done, len(records))
        for name, end in _ends(counts):
            files[name].write(np.uint64(end).tobytes())
    records.ensure_unchanged()
    lengths = np.fromfile(folder / "lengths.i32", dtype=np.int32)
    _judge(counts, lengths, records, options)
    summary = _summarise(counts, lengths, records, options)
    meta = {"sizes": {name: (folder / name).stat().st_size for name in _FILES}, "summary": summary.to_json()}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    meta["summary"]["common_prefix_share"] = _common_prefix_share(CachedData(records, folder))
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _ends(counts: _Counts) -> tuple[tuple[str, int], ...]:
    """The running totals that each file of offsets begins a block with, and ends with."""
    return (
        ("sequences.u64", counts.tokens),
        ("span_starts.u64", counts.spans),
        ("conversations.u64", counts.sequences),
    )


def _append(files: Mapping[str, IO[bytes]], block: _Block, counts: _Counts) -> None:
    steps = (block.sequence_lengths, block.span_counts, block.sequence_counts)
    for (name, total), step in zip(_ends(counts), steps, strict=True):
        files[name].write(
            (np.cumsum(step, dtype=np.uint64) - step.astype(np.uint64) + np.uint64(total)).tobytes()
        )
    for name, values in (
        ("ids.i32", block.ids),
        ("spans.i32", block.spans),
        ("kept.u64", block.kept),
        ("lengths.i32", block.full_lengths),
    ):
        files[name].write(values.tobytes())


def _judge(counts: _Counts, lengths: Ints, records: Records, options: _Options) -> None:
    """Raise DataError where the outcome must not be trained on."""
    if counts.failed and (records.on_error == "stop" or counts.failed == len(records)):
        raise DataError(
            f"conversations that the chat template cannot write: {counts.failed:,} of {len(records):,}; "
            "correct them, or leave them out with --on_error skip",
            [Problem(records.where(i), message) for i, message in counts.examples_failed],
            counts.failed,
        )
    longest = int(lengths.max(initial=0))
    lossless = f"--model_max_length {longest} would lose nothing"
    if counts.too_long and options.too_long == "error":
        raise DataError(
            f"conversations longer than --model_max_length {options.max_length}: "
            f"{counts.too_long:,} of {len(records):,}; {lossless}, or choose --too_long drop or truncate",
            [Problem(records.where(i), f"{lengths[i]:,} tokens") for i in counts.examples_too_long],
            counts.too_long,
        )
    if not counts.kept:
        raise DataError(f"no conversation fits into --model_max_length {options.max_length}; {lossless}")
    if not counts.supervised:
        raise DataError(
            "no token is learnt: 'train' or 'weight' excludes every reply; allow at least one, "
            "or choose another --train_on"
        )


def _summarise(counts: _Counts, lengths: Ints, records: Records, options: _Options) -> TokenSummary:
    rendered = np.sort(lengths[lengths > 0])
    at = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}
    last = len(rendered) - 1
    return TokenSummary(
        records=len(records),
        conversations=counts.kept,
        sequences=counts.sequences,
        tokens=counts.tokens,
        supervised=counts.supervised,
        dropped=counts.too_long - counts.truncated,
        truncated=counts.truncated,
        failed=counts.failed,
        unsupervised=counts.unsupervised,
        max_length=options.max_length,
        too_long=options.too_long,
        lossless_max_length=int(rendered[-1]) if len(rendered) else 0,
        quantiles={name: int(rendered[round(q * last)]) for name, q in at.items()} if len(rendered) else {},
        common_prefix_share=0.0,
    )


def _common_prefix_share(data: CachedData) -> float:
    """Share of the tokens that begin some other sequence too: what storing each prefix once would save.

    Sorted sequences share their longest prefix with a neighbour, so one pass over an evenly spaced sample of
    the conversations finds it.
    """
    step = max(1, len(data) // PREFIX_SAMPLE)
    keys = sorted(
        sequence.input_ids.astype(">i4").tobytes() for i in range(0, len(data), step) for sequence in data[i]
    )
    common = sum(_common(one, other) for one, other in itertools.pairwise(keys))
    return common / max(1, sum(len(key) // 4 for key in keys))


def _common(one: bytes, other: bytes) -> int:
    """How many leading tokens two sequences share."""
    size = min(len(one), len(other))
    left, right = (np.frombuffer(key[:size], dtype=np.int32) for key in (one, other))
    differ = left != right
    return int(differ.argmax()) if differ.any() else size // 4


# ---------------------------------------------------------------- lazy


class LazyData(TokenisedData):
    """The same conversations, each tokenised when it is asked for; the last few thousand are remembered.

    Which conversations are kept must be known at once. A token is at least one byte, so most are known to fit
    without tokenising them; only those that may be too long are tokenised at the start.
    """

    def __init__(
        self, records: Records, fmt: Format, options: _Options, key: str, workers: int | None = None
    ) -> None:
        super().__init__(records)
        self.fingerprint = key
        self._fmt, self._options = fmt, options
        self._remembered: OrderedDict[int, tuple[Sequence32, ...]] = OrderedDict()
        self._full = np.zeros(len(records), dtype=np.int32)
        self._counts = _Counts()
        self._seen = np.zeros(len(records), dtype=bool)
        self._kept = self._choose(workers)
        self._seen_supervision()

    def _choose(self, workers: int | None) -> npt.NDArray[np.uint64]:
        """The records that the length policy keeps."""
        constant = _longest(self._fmt.encode_many([_SMALLEST])[0]) + 256
        room = (self._options.max_length - constant) // 2  # a template adds less than the JSON around a text
        sizes = np.fromiter(map(self.records.size_of, range(len(self.records))), dtype=np.int64)
        doubtful = np.flatnonzero(sizes > room)
        kept = np.ones(len(self.records), dtype=bool)
        kept[doubtful] = False
        counts, done = _Counts(), 0
        for block in _blocks(self.records, self._fmt, self._options, doubtful.tolist(), workers):
            kept[block.kept.astype(np.int64)] = True
            self._full[doubtful[done : done + len(block.full_lengths)]] = block.full_lengths
            done += len(block.full_lengths)
            counts.add(block)
        counts.kept, counts.supervised = int(kept.sum()), 1  # supervision is looked for later
        _judge(counts, self._full, self.records, self._options)
        self._counts = replace(
            _Counts(), truncated=counts.truncated, too_long=counts.too_long, failed=counts.failed
        )
        return np.flatnonzero(kept).astype(np.uint64)

    def _seen_supervision(self) -> None:
        """Zero learnt tokens is an error: look until the first is found, usually at once."""
        if not any(sequence.supervised for sequences in self for sequence in sequences):
            _judge(replace(self._counts, kept=len(self)), self._full, self.records, self._options)

    def __getitem__(self, i: int) -> tuple[Sequence32, ...]:
        record = self.record_of(i)
        if record not in self._remembered:
            self._remembered[record] = self._tokenise(record)
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return self._remembered[record]

    def _tokenise(self, record: int) -> tuple[Sequence32, ...]:
        block = _encode_block(self.records, self._fmt, self._options, [record])
        for _, message in block.failures:
            raise DataError(f"{self.records.where(record)}: {message}")
        if not len(block.kept):
            raise DataError(
                f"{self.records.where(record)}: {block.full_lengths[0]:,} tokens, more than its "
                f"{self.records.size_of(record):,} bytes let expect; do without --lazy_preprocess"
            )
        if not self._seen[record]:
            self._seen[record] = True
            self._full[record] = block.full_lengths[0]
            self._counts.add(replace(block, truncated=0, too_long=[]))
        return block.sequences()

    def lengths(self, i: int) -> tuple[int, ...]:
        return tuple(len(sequence.input_ids) for sequence in self[i])

    def _budget(self) -> TokenSummary:
        """Counted over what was tokenised so far."""
        counts = replace(self._counts, kept=len(self))
        summary = _summarise(counts, self._full, self.records, self._options)
        return replace(summary, complete=bool(self._seen[self._kept.astype(np.int64)].all()))

    @property
    def full_lengths(self) -> Ints:
        """0 where it is not known yet."""
        return self._full


_SMALLEST = Conversation(
    messages=(Message("user", "?"), Message("assistant", "!")),
    tools=({"type": "function", "function": {"name": "f", "description": "", "parameters": {}}},),
)
