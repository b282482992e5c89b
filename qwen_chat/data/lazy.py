"""Tokenised conversations without a cache: each is tokenised when it is asked for.

In: as for the cache. Out: `LazyData`, the same interface and the same sequences.
"""

from collections import OrderedDict
from dataclasses import replace

import numpy as np

from qwen_chat.chat.encoded import Encoder
from qwen_chat.conversation import Conversation, Message
from qwen_chat.data.blocks import Personal, Sequence32, TokenOptions, encode_block, encode_blocks, longest
from qwen_chat.data.records import Records
from qwen_chat.data.tokenised import Counts, TokenisedData, TokenSummary
from qwen_chat.errors import DataError

REMEMBERED = 4_096  # conversations that are kept in memory
SMALLEST = Conversation(
    messages=(Message("user", "?"), Message("assistant", "!")),
    tools=({"type": "function", "function": {"name": "f", "description": "", "parameters": {}}},),
)


class LazyData(TokenisedData):
    """The conversations of the cache, each tokenised on first use; the last few thousand are remembered.

    Which conversations are kept must be known at once. A token is at least one byte, so most are known to fit
    without tokenising them; only those that may be too long are tokenised at the start.
    """

    def __init__(
        self, records: Records, fmt: Encoder, options: TokenOptions, key: str, workers: int | None = None
    ) -> None:
        super().__init__(records)
        self.fingerprint = key
        self._fmt, self._options = fmt, options
        self._remembered: OrderedDict[int, list[tuple[Sequence32, ...]]] = OrderedDict()
        self._seen = np.zeros(len(records), dtype=bool)
        self.full_lengths = np.zeros(len(records), dtype=np.int32)
        constant = longest(fmt.encode_many([SMALLEST])[0]) + 256
        room = (options.max_length - constant) // 2  # a template adds less than the JSON around a text
        sizes = np.fromiter(map(records.size_of, range(len(records))), dtype=np.int64)
        doubtful = np.flatnonzero(sizes > room)
        self._doubtful = frozenset(doubtful.tolist())  # counted at the start
        # How often each record is kept: a document as often as it has pieces.
        times = (sizes <= room).astype(np.int64)
        counts, done = Counts(), 0
        for block in encode_blocks(records, fmt, options, doubtful.tolist(), workers):
            np.add.at(times, block.kept.astype(np.int64), 1)
            self.full_lengths[doubtful[done : done + len(block.full_lengths)]] = block.full_lengths
            done += len(block.full_lengths)
            counts.add(block)
        counts.kept, counts.supervised = int(times.sum()), 1  # supervision is looked for later
        counts.ensure_usable(self.full_lengths, records, options)
        self._counts = Counts(
            truncated=counts.truncated,
            cut=counts.cut,
            pieces=counts.pieces,
            too_long=counts.too_long,
            failed=counts.failed,
            personal=counts.personal,
        )
        self.kept = np.repeat(np.arange(len(records), dtype=np.uint64), times)
        # Zero learnt tokens is an error: look until the first is found, usually at once.
        if not any(sequence.supervised for sequences in self for sequence in sequences):
            replace(self._counts, kept=len(self)).ensure_usable(self.full_lengths, records, options)

    def __getitem__(self, i: int) -> tuple[Sequence32, ...]:
        record, piece = self.record_of(i), self.piece_of(i)
        if record in self._remembered:
            return self._remembered[record][piece]
        block = encode_block(self.records, self._fmt, self._options, [record])
        for _, message in block.failures:
            raise DataError(f"{self.records.where(record)}: {message}")
        if not len(block.kept):
            raise DataError(
                f"{self.records.where(record)}: {block.full_lengths[0]:,} tokens, more than its "
                f"{self.records.size_of(record):,} bytes let expect; do without --lazy_preprocess"
            )
        if not self._seen[record]:
            self._seen[record] = True
            self.full_lengths[record] = block.full_lengths[0]
            again = block.personal if record not in self._doubtful else Personal()
            self._counts.add(replace(block, truncated=0, cut=0, pieces=0, too_long=[], personal=again))
        self._remembered[record] = block.conversations()
        if len(self._remembered) > REMEMBERED:
            self._remembered.popitem(last=False)
        return self._remembered[record][piece]

    def lengths(self, i: int) -> tuple[int, ...]:
        return tuple(len(sequence.input_ids) for sequence in self[i])

    @property
    def summary(self) -> TokenSummary:
        """Counted over what was tokenised so far."""
        budget = replace(self._counts, kept=len(self)).budget(self.full_lengths, self._options)
        complete = bool(self._seen[self.kept.astype(np.int64)].all())
        return self.with_places(replace(budget, complete=complete), self._counts.personal.first)
