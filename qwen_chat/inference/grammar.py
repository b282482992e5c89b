"""What a reply must match, for one vocabulary. Built on llguidance.

In: a tokenizer, and grammars (`dialects.grammar`). Out: a `Matcher` for each reply, which masks logits.

llguidance rather than xgrammar: it walks the grammar lazily, mixes text, tokens and JSON schemas in one
grammar, and brings no dependency of its own. Its limits do not cover all that a schema can cost, so each new
grammar is compiled in another process first (grammar_trial.py).
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer

from qwen_chat.dialects.grammar import Grammar
from qwen_chat.errors import ServiceError, ToolError
from qwen_chat.inference.grammar_trial import LATE, LIMITS, GrammarTrial

_KEPT = 32  # grammars; the trial lets none have more than some 30 MB
_REFUSED = 1024  # grammars whose problem is remembered


class GrammarLate(ServiceError):
    """The machine was too busy to try a grammar."""


class GrammarTokenizer:
    """A vocabulary prepared for grammars (about a second for 150,000 tokens: made once, for the first grammar
    that may be used)."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_tokens: Sequence[int]) -> None:
        self._source, self._end_tokens = tokenizer, tuple(end_tokens)
        self._vocabulary = vocabulary
        self._tokenizer: LLTokenizer | None = None
        self._tokens: dict[str, int] = tokenizer.get_added_vocab()  # a tag may be one
        self._lock, self._preparing = threading.Lock(), threading.Lock()
        self._known: dict[Grammar, LLMatcher] = {}
        self._refused: dict[bytes, str] = {}  # by the hash of the grammar: a text of megabytes is not kept
        self._trial = GrammarTrial()

    def matcher(self, grammar: Grammar) -> Matcher:
        """A grammar that was met lately is copied, with all that its automaton has learnt.

        Raises ToolError where the schema cannot be satisfied, is not understood, or is too complex; GrammarLate
        where the machine is too busy to find out.
        """
        with self._lock:
            known = self._known.get(grammar)
        if known is None:
            known = self._compiled(grammar)
        with self._lock:
            self._known.pop(grammar, None)
            self._known[grammar] = known
            while len(self._known) > _KEPT:
                self._known.pop(next(iter(self._known)))
            return Matcher(known.deep_copy(), self._vocabulary)

    def close(self) -> None:
        """End the process that tries grammars; the next new grammar starts it again."""
        self._trial.close()

    def _compiled(self, grammar: Grammar) -> LLMatcher:
        """Tried in the other process before, unless that has refused it once."""
        source = grammar.complete({})
        key = hashlib.sha256(source.encode(errors="surrogatepass")).digest()
        # The trial's vocabulary has no tags; what they are there makes no difference to what a schema costs.
        problem = self._refused.get(key) or self._trial.problem(source)
        if problem == LATE:
            raise GrammarLate(f"the schema is not known to be usable: {LATE}")
        if problem is not None:
            with self._lock:
                self._refused[key] = problem
                while len(self._refused) > _REFUSED:
                    self._refused.pop(next(iter(self._refused)))
            raise ToolError(_problem(problem))
        with self._preparing:
            if self._tokenizer is None:
                ends = list(self._end_tokens)
                self._tokenizer = from_tokenizer(self._source, n_vocab=self._vocabulary, eos_token=ends)
        limits = LLParserLimits(**LIMITS)
        compiled = LLMatcher(self._tokenizer, grammar.complete(self._tokens), log_level=0, limits=limits)
        compiled.compute_bitmask()  # the first is slow (tens of ms): here it holds up no other request
        if compiled.is_error():
            raise ToolError(_problem(compiled.get_error()))
        return compiled


def _problem(error: str) -> str:
    return f"the schema cannot be used: {_reason(error)}"


def _reason(error: str) -> str:
    """What llguidance says is wrong, without the place in our grammar and the listing that follows."""
    said = re.split(r"\n *\d+ \||\n<state>", error, maxsplit=1)[0]
    return " ".join(re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", said).split())[:300]


class Matcher:
    """Where one reply stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros((vocabulary + 31) // 32, np.int32)
        self._vocabulary = vocabulary

    def mask(self, scores: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Scores, minus infinity where the grammar forbids. Raises ToolError where nothing is left."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise ToolError(f"the schema led nowhere: {_reason(self._matcher.get_error())}")
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: scores.shape[0]]
        masked = np.full_like(scores, -np.inf)
        np.copyto(masked, scores, where=bits.view(np.bool_))
        return masked

    def forced(self) -> list[int]:
        """The next tokens as far as the grammar leaves no choice; none where it does."""
        return list(self._matcher.compute_ff_tokens())

    def allows_only(self, token: int) -> bool:
        """Whether the mask has a token alone."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        return int.from_bytes(self._bits.tobytes(), "little") == 1 << token

    def allowed(self, tokens: list[int]) -> list[int]:
        """As many of them as may come next, one after the other."""
        return tokens[: self._matcher.validate_tokens(tokens)]

    def consume(self, token: int) -> None:
        """Move on by one token."""
        self._matcher.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """True where the grammar is satisfied and allows nothing more."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()
