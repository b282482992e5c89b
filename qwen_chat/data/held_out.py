"""Held-out conversations: a share of the data, chosen by the hash of the prompt, and what of the rest gives them away.

In: tokenised data, and a share of it or held-out data. Out: a `Division`: which conversations are held out, and each
training line that asks what a held-out one asks. It is found once and kept in the cache, for all ranks and later runs.

A conversation's prompt is what stands before its first reply. The hash decides alone: conversations with one prompt
stay together, no seed and no other line changes the side of one, and data that grow keep their held-out part.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import re
import tempfile
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qwen_chat import files
from qwen_chat.conversation import Conversation, Json
from qwen_chat.data.records import Records
from qwen_chat.data.tokenised import LISTED, TokenisedData
from qwen_chat.errors import DataError, Problem

ALIKE = 0.8  # share of their word triples that two questions have in common
FEWEST = 4  # triples; of shorter questions only equal ones are told
COMMON = 0.05  # share of the lines above which a triple says nothing about one of them
_DIVISION = "division.json"
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
    """Roles and words of what stands before the first reply; a document's whole text."""
    return _wording(conversation)[0]


def _wording(
    conversation: Conversation,
) -> tuple[tuple[tuple[str, tuple[str, ...]], ...], list[tuple[str, ...]]]:
    """The prompt, and the words of each question: the one that opens the conversation, and each later one."""
    if (text := conversation.document) is not None:
        words = compared_words(text)
        return (("document", words or (text.strip(),)),), [words]
    prompt: list[tuple[str, tuple[str, ...]]] = []
    opening: tuple[str, ...] = ()
    later: list[tuple[str, ...]] = []
    answered = False
    for message in conversation.messages:
        answered = answered or message.role == "assistant"
        if answered and message.role != "user":
            continue
        words = compared_words(message.content)
        if answered:
            later.append(words)
            continue
        prompt.append((message.role, words or (message.content.strip(),)))
        if message.role == "user":
            opening += words
    return tuple(prompt), [opening, *later]


class Wordings:
    """Conversations as they are compared, each read once: the hash of its prompt, and its questions as word triples.

    Triples are Python's hashes, which are the same within one process only. They lie in a file that goes with this.
    """

    def __init__(self, conversations: Iterable[Conversation]) -> None:
        self.prompts = array("Q")
        self._turns, self._ends = array("Q", [0]), array("Q", [0])  # of each conversation; of each question
        with tempfile.TemporaryFile(prefix="qwen_chat-") as file:
            for conversation in conversations:
                prompt, questions = _wording(conversation)
                digest = hashlib.sha256(repr(prompt).encode("utf-8", "surrogatepass")).digest()
                self.prompts.append(int.from_bytes(digest[:8]))
                for words in questions:
                    few = words[:COMPARED]
                    triples = array("q", set(map(hash, zip(few, few[1:], few[2:], strict=False))))
                    file.write(triples.tobytes())
                    self._ends.append(self._ends[-1] + len(triples))
                self._turns.append(len(self._ends) - 1)
            file.flush()
            empty = np.empty(0, dtype=np.int64)
            self._triples = np.memmap(file, dtype=np.int64, mode="r") if self._ends[-1] else empty

    def places(self) -> npt.NDArray[np.float64]:
        """Where each prompt's hash lies between 0 and 1; below the share it is held out."""
        return (np.frombuffer(self.prompts, dtype=np.uint64) >> np.uint64(16)) / 2.0**48

    def questions(self, k: int) -> list[list[int]]:
        """The triples of each question of conversation `k`."""
        turns = range(self._turns[k], self._turns[k + 1])
        return [self._triples[self._ends[turn] : self._ends[turn + 1]].tolist() for turn in turns]


def parted(wordings: Wordings, share: float) -> tuple[list[int], list[int]]:
    """(numbers of those that are learnt from, of those that are held out). DataError where either is empty."""
    places = wordings.places()
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
    return np.flatnonzero(~held_out).tolist(), np.flatnonzero(held_out).tolist()


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


# A training line that gives a held-out one away: their numbers, and how alike the two are (None: the same prompt).
Leak = tuple[int, int, float | None]


@dataclass(frozen=True)
class Division:
    """Which records are held out of the data (none where they are other data), and the leaks by record, the first
    LISTED of `total`."""

    apart: Sequence[int]
    leaks: Sequence[Leak]
    total: int

    def told(self, training: Records, held_out: Records) -> Leaks:
        """The leaks with their places."""
        problems = tuple(
            Problem(
                training.where(line),
                f"has the prompt of the held-out {held_out.where(k)}"
                if alike is None
                else f"asks nearly what the held-out {held_out.where(k)} asks ({alike:.0%} alike)",
            )
            for line, k, alike in self.leaks
        )
        return Leaks(self.total, problems)


def division(whole: TokenisedData, held_out: TokenisedData | float) -> Division:
    """What other data, or a share of `whole`, hold out. DataError as of `parted`."""
    named = [whole.fingerprint, held_out if isinstance(held_out, float) else held_out.fingerprint]
    key = hashlib.sha256(json.dumps(named).encode()).hexdigest()[:32]

    def build(aside: Path) -> None:
        own = np.unique(whole.kept).tolist()
        wordings = Wordings(whole.records[i] for i in own)
        if isinstance(held_out, float):
            learnt, apart = parted(wordings, held_out)
            others, there = own, wordings
        else:
            others = np.unique(held_out.kept).tolist()
            there = Wordings(held_out.records[i] for i in others)
            learnt, apart = list(range(len(own))), list(range(len(others)))
        found = [(own[line], others[k], alike) for line, k, alike in leaks(wordings, learnt, there, apart)]
        taken = [own[k] for k in apart] if isinstance(held_out, float) else []
        result = {"apart": taken, "leaks": found[:LISTED], "total": len(found)}
        (aside / _DIVISION).write_text(json.dumps(result), encoding="utf-8")

    folder = files.build_once(files.cache_dir() / "held_out" / key, build)
    return Division(**json.loads((folder / _DIVISION).read_text(encoding="utf-8")))


def leaks(training: Wordings, learnt: Sequence[int], held_out: Wordings, apart: Sequence[int]) -> list[Leak]:
    """Every training line that has a held-out line's prompt, or asks nearly what one asks, in any turn.

    Questions are compared by the word triples that both have of those that either has. Triples that many lines have (a
    frame around all questions) do not count: they say nothing about one of them.
    """
    prompts = {held_out.prompts[k]: k for k in apart}
    asked = [held_out.questions(k)[0] for k in apart]
    number_of = {triple: number for number, triple in enumerate({t for triples in asked for t in triples})}
    turns: list[_Turn] = []
    found: dict[int, Leak] = {}
    for line in learnt:
        if (equal := prompts.get(training.prompts[line])) is not None:
            found[line] = (line, equal, None)
        for triples in training.questions(line):
            shared = array("I", (number_of[triple] for triple in triples if triple in number_of))
            if len(shared) >= FEWEST:
                turns.append(_Turn(line, shared, len(triples)))
    for turn, k, alike in _near(
        turns, [{number_of[triple] for triple in triples} for triples in asked], len(learnt)
    ):
        if found.get(turn.line, (0, 0, 0.0))[2] is not None:  # the last turn that is near counts
            found[turn.line] = (turn.line, apart[k], alike)
    return [found[line] for line in sorted(found)]


@dataclass(frozen=True, slots=True)
class _Turn:
    """A training line's question: its triples that held-out ones have too, by number; how many it has in all."""

    line: int
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
