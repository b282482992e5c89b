"""Held-out conversations: a share of the data, chosen by the hash of the prompt, and what of the rest gives them away.

In: conversations with their places. Out: which are held out; each training line that asks what a held-out one asks.

A conversation's prompt is what stands before its first reply. The hash decides alone: conversations with one prompt
stay together, no seed and no other line changes the side of one, and data that grow keep their held-out part.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import re
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwen_chat.conversation import Conversation, Json, Message
from qwen_chat.data.tokenised import LISTED
from qwen_chat.errors import DataError, Problem

Placed = tuple[str, Conversation]  # file:line, and what stands there

ALIKE = 0.8  # share of their word triples that two questions have in common
FEWEST = 4  # triples; of shorter questions only equal ones are told
COMMON = 0.05  # share of the lines above which a triple says nothing about one of them
COMPARED = 4_000  # words of a question that are compared
# A number, a word, one character of a script that is written without blanks, or a sign that is no punctuation.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD_OR_SIGN = re.compile(
    rf"\d+(?:[.,:]\d+)*|[{_UNSPACED}]|[^\W\d{_UNSPACED}]+|[^\w\s.,!?;:。、…\"'“”‘’「」]"
)


def compared_words(text: str) -> tuple[str, ...]:
    """A text as it is compared: without case, width, punctuation and white space; `1+1` and `1-1` differ."""
    return tuple(_WORD_OR_SIGN.findall(unicodedata.normalize("NFKC", text).casefold()))


def prompt_of(conversation: Conversation) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Roles and words of what stands before the first reply."""
    return tuple(
        (message.role, compared_words(message.content) or (message.content.strip(),))
        for message in _opening(conversation)
    )


def _opening(conversation: Conversation) -> Iterator[Message]:
    for message in conversation.messages:
        if message.role == "assistant":
            return
        yield message


def place_of(conversation: Conversation) -> float:
    """Where the prompt's hash lies between 0 and 1; below the share it is held out."""
    digest = hashlib.sha256(repr(prompt_of(conversation)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / 2**48


def parted(
    conversations: Iterable[Conversation], share: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(numbers of those that are learnt from, of those that are held out). DataError where either is empty."""
    places = np.fromiter(map(place_of, conversations), dtype=np.float64)
    held_out = places < share
    if not held_out.any() or held_out.all():
        least, most = float(places.min()), float(places.max())
        if least == most:
            cure = "all have one prompt; give held-out conversations with --eval_data_path"
        elif held_out.all():
            cure = f"a share of {math.floor(most * 1000) / 1000:g} leaves one"
        else:
            cure = (
                f"a share of {math.floor(least * 1000 + 1) / 1000:g} does, or give some with --eval_data_path"
            )
        what = "leaves none" if held_out.all() else "holds out none"
        raise DataError(f"--eval_share {share:g}: {what} of {len(places):,} conversations; {cure}")
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


@dataclass(frozen=True)
class Leaks:
    """Training lines that ask what a held-out one asks: `total`, and the first LISTED of them."""

    total: int = 0
    problems: tuple[Problem, ...] = ()

    def describe(self) -> list[str]:
        """Lines for a person; none where nothing was found."""
        if not self.total:
            return []
        lines = [
            f"note: {self.total:,} training lines give away what is held out; its loss says less than it seems"
        ]
        lines += [f"  {problem}" for problem in self.problems]
        more = self.total - len(self.problems)
        return lines + ([f"  ... and {more:,} more"] if more else [])

    def to_json(self) -> Json:
        """Plain values for `--json`."""
        return {"given_away": self.total, "given_away_by": [str(problem) for problem in self.problems]}


def leaks(training: Iterable[Placed], held_out: Sequence[Placed]) -> Leaks:
    """Every training line that has a held-out line's prompt, or asks nearly what one asks, in any turn.

    Questions are compared by the word triples that both have of those that either has. Triples that many lines have (a
    frame around all questions) do not count: they say nothing about one of them.
    """
    prompts = {prompt_of(conversation): where for where, conversation in held_out}
    asked = [_triples(_question(conversation)) for _, conversation in held_out]
    often = Counter(triple for triples in asked for triple in triples)
    number_of = {triple: number for number, triple in enumerate(often)}
    turns: list[_Turn] = []
    line, exact = 0, {}
    for line, (where, conversation) in enumerate(training, 1):
        if (equal := prompts.get(prompt_of(conversation))) is not None:
            exact[line] = Problem(where, f"has the prompt of the held-out {equal}")
        for triples in _turns(conversation):
            shared = array("I", (number_of[triple] for triple in triples if triple in number_of))
            if len(shared) >= FEWEST:
                turns.append(_Turn(line, where, shared, len(triples)))
    near = _near(turns, [{number_of[triple] for triple in triples} for triples in asked], line)
    told = {
        turn.line: Problem(
            turn.where, f"asks nearly what the held-out {held_out[k][0]} asks ({alike:.0%} alike)"
        )
        for turn, k, alike in near
    }
    told |= exact
    return Leaks(len(told), tuple(told[number] for number in sorted(told)[:LISTED]))


@dataclass(frozen=True, slots=True)
class _Turn:
    """A training line's question: its triples that held-out ones have too, by number; how many it has in all."""

    line: int  # of all training lines
    where: str
    shared: array[int]
    size: int


def _near(
    turns: Sequence[_Turn], asked: Sequence[set[int]], lines: int
) -> Iterator[tuple[_Turn, int, float]]:
    """(a training line, the held-out question that it nearly asks, how alike the two are)."""
    limits = (
        (Counter(n for triples in asked for n in triples), max(2, COMMON * len(asked))),
        (Counter(n for turn in turns for n in turn.shared), max(10, COMMON * lines)),
    )
    common = {n for often, most in limits for n, count in often.items() if count > most}
    telling = [triples - common for triples in asked]
    rarity = limits[0][0]
    holders = defaultdict(list)
    for k, triples in enumerate(telling):
        # Who shares ALIKE of them has one of the rarest others and one: nobody else need be looked at.
        fewest = len(triples) - math.ceil(ALIKE * len(triples)) + 1
        for n in heapq.nsmallest(fewest, triples, key=rarity.__getitem__) if len(triples) >= FEWEST else ():
            holders[n].append(k)
    for turn in turns:
        own = set(turn.shared) - common
        size = turn.size - len(turn.shared) + len(own)
        both = {k: len(own & telling[k]) for n in own for k in holders.get(n, ())}
        alike = ((count / (size + len(telling[k]) - count), k) for k, count in both.items())
        most, k = max(alike, default=(0.0, 0))
        if most >= ALIKE:
            yield turn, k, most


def _turns(conversation: Conversation) -> Iterator[frozenset[int]]:
    """The question that opens a conversation, and each later one."""
    yield _triples(_question(conversation))
    later = conversation.messages[sum(1 for _ in _opening(conversation)) :]
    yield from (_triples(message.content) for message in later if message.role == "user")


def _question(conversation: Conversation) -> str:
    return "\n".join(message.content for message in _opening(conversation) if message.role == "user")


def _triples(text: str) -> frozenset[int]:
    words = compared_words(text)[:COMPARED]
    return frozenset(map(hash, zip(words, words[1:], words[2:], strict=False)))
