"""What tokenised data are, stored or lazy: training sequences by number, and their token budget.

In: the blocks of blocks.py. Out: `Counts`, what they add up to; `TokenSummary`, the same for a person; the
interface `TokenisedData`: `data[i]` gives the training sequences of conversation i.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_chat.data.blocks import Block, Ints, Personal, Sequence32, TokenOptions, TooLong
from qwen_chat.data.privacy import KINDS_OF_SECRET
from qwen_chat.data.records import Records
from qwen_chat.data.source import counted
from qwen_chat.errors import DataError, Problem

LISTED = 20  # problems that an error lists
BARS = 12  # of a histogram, at most
NAMED = 5  # conversations of each sort left out that a summary names


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
    cut: int = 0  # documents longer than max_length
    pieces: int = 0  # what they are kept in; each counts as a conversation
    # The kinds of secrets and personal data, each with its conversations, and the first as "file:line (abc...)".
    personal: Mapping[str, int] = field(default_factory=dict)
    personal_at: Mapping[str, Sequence[str]] = field(default_factory=dict)
    redacted: bool = False  # whether a word stands in the place of each
    complete: bool = True  # False under lazy: counted so far
    skipped: int = 0  # lines left out by on_error="skip", beside the records
    skipped_at: tuple[str, ...] = ()  # file:line of the first NAMED of them
    dropped_at: tuple[str, ...] = ()
    failed_at: tuple[str, ...] = ()
    # How many conversations have at most so many tokens, and more than the bar before.
    histogram: Mapping[str, int] = field(default_factory=dict)
    # How often each function is called, commonest first.
    calls: Mapping[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """A few lines for a person."""
        share = self.supervised / self.tokens if self.tokens else 0.0
        so_far = "" if self.complete else " (tokenised so far)"
        whole = self.conversations - self.pieces + self.cut
        lines = [
            f"conversations {whole:,} of {self.records:,}, sequences {self.sequences:,}, "
            f"tokens {self.tokens:,}, learnt {self.supervised:,} ({share:.1%}){so_far}",
            "tokens a conversation: " + ", ".join(f"{name} {n:,}" for name, n in self.quantiles.items()),
            f"tokens in a prefix that others have too: {self.common_prefix_share:.1%}",
        ]
        for count, what, where in (
            (self.skipped, f"bad lines left out, of {self.records + self.skipped:,}", self.skipped_at),
            (self.dropped, f"dropped, longer than --model_max_length {self.max_length:,}", self.dropped_at),
            (self.truncated, f"truncated to {self.max_length:,} tokens, their oldest turns left out", ()),
            (self.cut, f"documents longer than {self.max_length:,} tokens, in {self.pieces:,} pieces", ()),
            (self.failed, "left out, the chat template cannot write them", self.failed_at),
            (self.unsupervised, "kept, with nothing in them to learn", ()),
        ):
            if count:
                names = f" ({', '.join(where)}{', ...' if count > len(where) else ''})" if where else ""
                lines.append(f"{what}: {count:,}{names}")
        lines += self._personal()
        if self.dropped or self.truncated:
            lines.append(f"--model_max_length {self.lossless_max_length} would lose nothing")
        return "\n".join(lines)

    def _personal(self) -> Iterator[str]:
        for name, count in self.personal.items():
            where = ", ".join(self.personal_at.get(name, ()))
            more = ", ..." if count > len(self.personal_at.get(name, ())) else ""
            word = f", replaced by {KINDS_OF_SECRET[name].placeholder}" if self.redacted else ""
            yield f"{name} in {counted(count, 'conversation')}{word}: {where}{more}"
        if self.personal and not self.redacted:
            yield "  --redact True puts a word such as [EMAIL] in the place of each"

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json` and `meta.json`; `TokenSummary(**values)` reads them back."""
        return asdict(self)


def histogram(lengths: Ints) -> dict[str, int]:
    """Conversations by their tokens in at most BARS bars of one width, each named by its upper end; 0: not known."""
    longest = int(lengths.max(initial=0))
    width = -(-longest // BARS)
    ends = range(width, longest + width, width) if longest else range(0)
    counts = np.bincount((lengths[lengths > 0] - 1) // max(1, width), minlength=len(ends))
    return {str(min(end, longest)): int(count) for end, count in zip(ends, counts, strict=True)}


class TokenisedData(ABC):
    """The kept conversations as training sequences, in the records' order."""

    fingerprint: str  # the key: the same data, format, options and code give the same
    kept: npt.NDArray[np.uint64]  # which record each kept conversation is
    full_lengths: Ints  # of every record's longest sequence before the length policy; 0: not known, or failed

    def __init__(self, records: Records) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.kept)

    @abstractmethod
    def __getitem__(self, i: int) -> tuple[Sequence32, ...]:
        """The sequences of kept conversation `i`: one, or one a turn."""

    @abstractmethod
    def lengths(self, i: int) -> tuple[int, ...]:
        """How many tokens each of them has."""

    @property
    @abstractmethod
    def summary(self) -> TokenSummary:
        """The token budget, and everything of the files that is not in it."""

    def with_places(
        self, budget: TokenSummary, personal: Mapping[str, Sequence[tuple[int, str]]]
    ) -> TokenSummary:
        """The budget with the lines and records that are not in it, and the places of personal data."""
        report, lengths = self.records.report, self.full_lengths
        gone = np.ones(len(self.records), dtype=bool)
        gone[self.kept.astype(np.int64)] = False

        def named(which: npt.NDArray[np.bool_]) -> tuple[str, ...]:
            return tuple(self.records.where(int(i)) for i in np.flatnonzero(which)[:NAMED])

        return replace(
            budget,
            skipped=report.skipped,
            skipped_at=tuple(dict.fromkeys(problem.where for problem in report.problems))[:NAMED],
            dropped_at=named(gone & (lengths > 0)),
            failed_at=named(gone & (lengths == 0)),
            histogram=histogram(lengths),
            calls=dict(report.calls),
            personal_at={
                name: tuple(f"{self.records.where(record)} ({shown}...)" for record, shown in some)
                for name, some in personal.items()
            },
            redacted=self.records.redact,
        )

    def __iter__(self) -> Iterator[tuple[Sequence32, ...]]:
        return (self[i] for i in range(len(self)))

    def record_of(self, i: int) -> int:
        """Which record kept conversation `i` is."""
        return int(self.kept[i])

    def piece_of(self, i: int) -> int:
        """Which part of a document that was cut kept conversation `i` is; 0 for one that was not."""
        i = range(len(self))[i]
        return i - int(np.searchsorted(self.kept, self.kept[i]))

    def where(self, i: int) -> str:
        """`file:line` of kept conversation `i`."""
        piece, place = self.piece_of(i), self.records.where(self.record_of(i))
        return f"{place} (part {piece + 1})" if piece else place

    def given_of(self, i: int) -> int:
        """Which of the files and folders, in the order they were given, kept conversation `i` comes from."""
        return self.records.given_of(self.record_of(i))


@dataclass(slots=True)
class Counts:
    """What the blocks add up to so far, and the first of what must be told."""

    sequences: int = 0
    tokens: int = 0
    spans: int = 0
    supervised: int = 0
    kept: int = 0
    truncated: int = 0
    cut: int = 0
    pieces: int = 0
    personal: Personal = field(default_factory=Personal)
    unsupervised: int = 0
    too_long: int = 0
    failed: int = 0
    examples_too_long: list[int] = field(default_factory=list)
    examples_failed: list[tuple[int, str]] = field(default_factory=list)

    def add(self, block: Block) -> None:
        learnt = block.supervised()
        self.sequences += len(block.sequence_lengths)
        self.tokens += len(block.ids)
        self.spans += len(block.spans)
        self.supervised += int(learnt.sum())
        self.kept += len(block.kept)
        self.truncated += block.truncated
        self.cut += block.cut
        self.pieces += block.pieces
        self.personal.add(block.personal)
        self.unsupervised += int((learnt == 0).sum())
        self.too_long += len(block.too_long)
        self.failed += len(block.failures)
        self.examples_too_long += block.too_long[: LISTED - len(self.examples_too_long)]
        self.examples_failed += block.failures[: LISTED - len(self.examples_failed)]

    def ensure_usable(self, lengths: Ints, records: Records, options: TokenOptions) -> None:
        """Raise DataError where the outcome must not be trained on. `lengths`: see TokenisedData.full_lengths."""
        if self.failed and (records.on_error == "stop" or self.failed == len(records)):
            raise DataError(
                f"conversations that the chat template cannot write: {self.failed:,} of {len(records):,}; "
                "correct them, or leave them out with --on_error skip",
                [Problem(records.where(i), message) for i, message in self.examples_failed],
                self.failed,
            )
        lossless = f"--model_max_length {lengths.max(initial=0)} would lose nothing"
        if self.too_long and options.too_long == "error":
            raise DataError(
                f"conversations longer than --model_max_length {options.max_length}: "
                f"{self.too_long:,} of {len(records):,}; {lossless}, or choose --too_long drop or truncate",
                [Problem(records.where(i), f"{lengths[i]:,} tokens") for i in self.examples_too_long],
                self.too_long,
            )
        if not self.kept:
            raise DataError(f"no conversation fits into --model_max_length {options.max_length}; {lossless}")
        if not self.supervised:
            raise DataError(
                "no token is learnt: 'train' or 'weight' excludes every reply; allow at least one, "
                "or choose another --train_on"
            )

    def budget(self, lengths: Ints, options: TokenOptions) -> TokenSummary:
        """The summary, as far as the tokens tell it; common prefixes are not counted here."""
        rendered = np.sort(lengths[lengths > 0])
        at = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}
        last = len(rendered) - 1
        return TokenSummary(
            records=len(lengths),
            conversations=self.kept,
            sequences=self.sequences,
            tokens=self.tokens,
            supervised=self.supervised,
            dropped=self.too_long - self.truncated,
            truncated=self.truncated,
            cut=self.cut,
            pieces=self.pieces,
            personal={
                name: self.personal.counts[name] for name in KINDS_OF_SECRET if self.personal.counts[name]
            },
            failed=self.failed,
            unsupervised=self.unsupervised,
            max_length=options.max_length,
            too_long=options.too_long,
            lossless_max_length=int(rendered.max(initial=0)),
            quantiles={name: int(rendered[round(q * last)]) for name, q in at.items()} if last >= 0 else {},
            common_prefix_share=0.0,
        )
