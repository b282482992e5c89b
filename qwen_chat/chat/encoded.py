"""One training sequence: its token ids, and which of them are supervised.

In: what a format wrote and tokenised. Out: the same as spans (how it is stored everywhere) or as labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from qwen_chat.conversation import Conversation

# The label of a token that is not supervised, as torch's cross entropy has it.
IGNORED = -100
# Which replies of a conversation are supervised; everything: the prompts too.
TrainOn = Literal["last", "all", "everything"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One training sequence. `spans`: the supervised tokens, as `[start, end)` pairs in order, none empty and no
    two that touch."""

    input_ids: list[int]
    spans: list[tuple[int, int]]

    @property
    def labels(self) -> list[int]:
        """`input_ids[i]` where token i is supervised, else -100."""
        labels = [IGNORED] * len(self.input_ids)
        for start, end in self.spans:
            labels[start:end] = self.input_ids[start:end]
        return labels

    def part(self, start: int, end: int) -> Encoded:
        """The tokens `[start, end)` as a sequence of their own; within it spans are counted from its start."""
        clipped = ((max(a, start) - start, min(b, end) - start) for a, b in self.spans)
        return Encoded(self.input_ids[start:end], [(a, b) for a, b in clipped if a < b])


class Encoder(Protocol):
    """What makes training sequences of conversations: a ChatFormat, or one that leaves empty thoughts unlearnt."""

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides ids and labels."""

    def audit(self, conversations: Iterable[Conversation]) -> None:
        """What has to be decided on real data, before any of it is encoded."""

    def encode_many(
        self, conversations: Sequence[Conversation], train_on: TrainOn = "all"
    ) -> list[list[Encoded]]:
        """The sequences of each conversation; FormatError as soon as one is refused."""
