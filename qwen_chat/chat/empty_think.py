"""Empty think blocks at the beginning of replies: whether they are learnt, and what is said about it.

In: a ChatFormat and `--empty_think`. Out: what tokenises the data of a run. A template that thinks writes an empty
block before a reply that has no thought; a model that learns it stops thinking.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from qwen_chat.chat.encoded import Encoded, TrainOn
from qwen_chat.chat.format import ChatFormat
from qwen_chat.conversation import Conversation

EmptyThink = Literal["learn", "ignore"]


class EmptyThinkIgnored:
    """The sequences of a ChatFormat, but an empty think block that begins a reply is context."""

    def __init__(self, fmt: ChatFormat) -> None:
        self._fmt = fmt

    @property
    def fingerprint(self) -> str:
        """The format's, told apart from it."""
        return f"{self._fmt.fingerprint} empty_think=ignore"

    def audit(self, conversations: Iterable[Conversation]) -> None:
        """As the format's."""
        self._fmt.audit(conversations)

    def encode_many(
        self, conversations: Sequence[Conversation], train_on: TrainOn = "all"
    ) -> list[list[Encoded]]:
        """As the format's, with fewer supervised tokens."""
        found = self._fmt.encode_many(conversations, train_on)
        if train_on == "everything":
            return found
        return [
            sequences
            if one.document is not None
            else [self._without_blocks(sequence) for sequence in sequences]
            for one, sequences in zip(conversations, found, strict=True)
        ]

    def _without_blocks(self, sequence: Encoded) -> Encoded:
        ids, spans = sequence.input_ids, []
        for start, end in sequence.spans:
            for block in self._fmt.empty_thinks:
                if tuple(ids[start : start + len(block)]) == block:
                    start += len(block)
                    break
            spans.append((start, end))
        return Encoded(ids, spans)


def chosen(fmt: ChatFormat, asked: EmptyThink | None) -> EmptyThink:
    """What was asked for; else `ignore` where the template thinks by default."""
    return asked or ("ignore" if fmt.thinks else "learn")


def taught(fmt: ChatFormat, asked: EmptyThink | None) -> ChatFormat | EmptyThinkIgnored:
    """The format that a run's data is tokenised with."""
    return EmptyThinkIgnored(fmt) if chosen(fmt, asked) == "ignore" and fmt.empty_thinks else fmt


def notes(fmt: ChatFormat, asked: EmptyThink | None, *, thoughts: int, conversations: int) -> tuple[str, ...]:
    """What a person should know about thinking in this data. `thoughts`: so many of the conversations have one."""
    without = conversations - thoughts
    if not fmt.knows_reasoning:
        lost = (
            f"note: this chat template writes no thoughts: those of {thoughts:,} conversations are left out"
        )
        return (lost,) if thoughts else ()
    told = []
    if fmt.empty_thinks:
        ignored = chosen(fmt, asked) == "ignore"
        why = ", because this chat template thinks by default" if ignored and asked is None else ""
        told.append(f"an empty think block before a reply is {'not ' * ignored}learnt{why} (--empty_think)")
    if fmt.thinks and without:
        switch = fmt.thinking_switch
        off = (
            ""
            if switch is None
            else f"; or tune it to answer without: --template_kwargs '{switch.json(thinking=False)}'"
        )
        told.append(
            f"warning: this chat template thinks by default, but {without:,} of {conversations:,} conversations "
            f"have no reasoning: the model may think less after it{off}"
        )
    return tuple(told)
