"""What a reply must match: JSON, a schema, or tool calls. Built on llguidance.

In: a schema or tools. Out: a `Grammar` (text, hashable, no tokenizer); with a tokenizer, a `Matcher` that
masks logits.

llguidance rather than xgrammar: it walks the grammar lazily, mixes text, tokens and JSON schemas in one
grammar, and brings no dependency of its own. Its limits do not cover all that a schema can cost, so each new
grammar is compiled in another process first (grammar_trial.py). JSON is written as the model was taught to
write it (", " and ": ", one line): an untuned model cannot run away in white space.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer

from qwen_chat.errors import ServiceError, ToolError
from qwen_chat.inference.grammar_trial import LATE, LIMITS, GrammarTrial

Json = Mapping[str, Any]

_LAYOUT = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
_LIMIT_SCHEMA = 65_536  # characters of one schema
_KEPT = 32  # grammars; the trial lets none have more than some 30 MB
_REFUSED = 1024  # grammars whose problem is remembered
OPEN, CLOSE = "<tool_call>", "</tool_call>"


class GrammarLate(ServiceError):
    """The machine was too busy to try a grammar."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar in llguidance's Lark dialect. The rules `open`, `close` and `head` (text up to and with an
    opening tag) are
    added for a vocabulary: the tags are tokens in some and ordinary text in others."""

    source: str

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def json_schema(cls, schema: Json | bool) -> Grammar:
        """JSON that is valid under `schema`. Raises ToolError where the schema is no schema or too large."""
        return cls(f"start: %json {_schema_text(schema, 'response_format')}\n")

    @classmethod
    def tool_call(cls, tools: Sequence[Json], *, name: str | None = None, parallel: bool = False) -> Grammar:
        """One call in Hermes form (or more, where `parallel`), of the tool `name` or any of `tools`, valid
        arguments.

        Raises ToolError where `name` is not among the tools or a tool's schema cannot be used.
        """
        chosen = [tool for tool in tools if name is None or _function(tool).get("name") == name]
        if not chosen:
            known = ", ".join(str(_function(tool).get("name")) for tool in tools) or "none"
            raise ToolError(f"tool_choice: no tool is called {name!r}; the tools are: {known}")
        more = ' ("\\n" call)*' if parallel else ""
        return cls(f"start: call{more}\ncall: open body\n{_body(chosen)}")

    @classmethod
    def tools_in_text(cls, tools: Sequence[Json]) -> Grammar:
        """Free text in which every opened <tool_call> becomes a call of one of `tools` (tool_choice auto):
        under its schema where the tool says `strict`, else with any object as arguments."""
        loose = [tool if _function(tool).get("strict") else _without_schema(tool) for tool in tools]
        return cls(f"start: (head body)* rest\nrest: TEXT\n{_body(loose)}")


def _body(tools: Sequence[Json]) -> str:
    """The part of a call after its opening tag, for any of the tools."""
    rules = [
        f"tool_{i}: {json.dumps(_call_head(tool))} %json {_tool_schema(tool)}\n"
        for i, tool in enumerate(tools)
    ]
    names = " | ".join(f"tool_{i}" for i in range(len(tools)))
    return f'body: "\\n" ({names}) "}}\\n" close\n' + "".join(rules)


def _call_head(tool: Json) -> str:
    return f'{{"name": {json.dumps(_function(tool)["name"], ensure_ascii=False)}, "arguments": '


def _function(tool: Json) -> Json:
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else {}


def _without_schema(tool: Json) -> Json:
    return {"function": {"name": _function(tool).get("name"), "parameters": {"type": "object"}}}


def _tool_schema(tool: Json) -> str:
    """The schema of a tool's arguments. Without one: any object. Arguments are an object whatever the
    schema leaves open."""
    schema = _function(tool).get("parameters") or {}
    if not isinstance(schema, Mapping):
        raise ToolError(
            f"tool {_function(tool).get('name')!r}: parameters are no JSON schema; expected an object"
        )
    if not any(key in schema for key in ("$ref", "anyOf", "oneOf", "allOf")):
        # Arguments that the tool does not name help nobody, and a weak model invents them without end.
        closed = {"additionalProperties": False} if schema.get("properties") else {}
        schema = {"type": "object", **closed, **schema}
    return _schema_text(schema, f"tool {_function(tool).get('name')!r}")


def _schema_text(schema: Json | bool, where: str) -> str:
    if not isinstance(schema, (Mapping, bool)):
        raise ToolError(f"{where}: the schema is {type(schema).__name__}; expected an object")
    plain: Any = {**schema, "x-guidance": _LAYOUT} if isinstance(schema, Mapping) else {"x-guidance": _LAYOUT}
    try:
        text = json.dumps(plain, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolError(f"{where}: the schema cannot be written as JSON ({error})") from None
    if len(text) > _LIMIT_SCHEMA:
        raise ToolError(f"{where}: the schema has {len(text):,} characters; the limit is {_LIMIT_SCHEMA:,}")
    return text


class GrammarTokenizer:
    """A vocabulary prepared for grammars (about a second for 150,000 tokens: made once, for the first grammar
    that may be used)."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_tokens: Sequence[int]) -> None:
        self._source, self._end_tokens = tokenizer, tuple(end_tokens)
        self._vocabulary = vocabulary
        self._tokenizer: LLTokenizer | None = None
        self._tags = _tag_rules(tokenizer)
        self._lock, self._preparing = threading.Lock(), threading.Lock()
        self._known: dict[Grammar, LLMatcher] = {}
        self._refused: dict[bytes, str] = {}  # by the hash of the grammar: a text of megabytes is not kept
        self._trial = GrammarTrial()
        self._limits = LLParserLimits(**LIMITS)

    def matcher(self, grammar: Grammar) -> Matcher:
        """Raises ToolError where the schema cannot be satisfied, is not understood, or is too complex;
        GrammarLate where the machine is too busy to find out."""
        matcher = self._copy(grammar)
        if matcher is None:
            self._check(grammar)
            fresh = LLMatcher(self._prepared(), grammar.source + self._tags, log_level=0, limits=self._limits)
            fresh.compute_bitmask()  # the first is slow (tens of ms): here it holds up no other request
            if fresh.is_error():
                raise ToolError(_problem(fresh.get_error()))
            with self._lock:
                self._known[grammar] = fresh
                while len(self._known) > _KEPT:
                    self._known.pop(next(iter(self._known)))
                matcher = fresh.deep_copy()
        return Matcher(matcher, self._vocabulary)

    def close(self) -> None:
        """End the process that tries grammars; the next new grammar starts it again."""
        self._trial.close()

    def _prepared(self) -> LLTokenizer:
        with self._preparing:
            if self._tokenizer is None:
                self._tokenizer = from_tokenizer(
                    self._source, n_vocab=self._vocabulary, eos_token=list(self._end_tokens)
                )
            return self._tokenizer

    def _copy(self, grammar: Grammar) -> LLMatcher | None:
        """A grammar that was met lately is copied, with all that its automaton has learnt."""
        with self._lock:
            known = self._known.pop(grammar, None)
            if known is None:
                return None
            self._known[grammar] = known
            return known.deep_copy()

    def _check(self, grammar: Grammar) -> None:
        """Raise ToolError where the trial refuses the grammar, or has refused it before."""
        key = hashlib.sha256(grammar.source.encode(errors="surrogatepass")).digest()
        problem = self._refused.get(key) or self._trial.problem(grammar.source + _TRIAL_TAGS)
        if problem is None:
            return
        if problem == LATE:
            raise GrammarLate(f"the schema is not known to be usable: {LATE}")
        with self._lock:
            self._refused[key] = problem
            while len(self._refused) > _REFUSED:
                self._refused.pop(next(iter(self._refused)))
        raise ToolError(_problem(problem))


_TEXT = "TEXT: /(.|\\n)*/\n"
# The trial's vocabulary has no tags; what they are there makes no difference to what a schema costs.
_TRIAL_TAGS = (
    f"open: {json.dumps(OPEN)}\nclose: {json.dumps(CLOSE)}\nhead[lazy]: TEXT {json.dumps(OPEN)}\n{_TEXT}"
)


def _tag_rules(tokenizer: Any) -> str:
    known = tokenizer.get_vocab()
    is_token = OPEN in known and CLOSE in known
    opening, closing = (f"<[{known[tag]}]>" if is_token else json.dumps(tag) for tag in (OPEN, CLOSE))
    head = "head" if is_token else "head[lazy]"
    return f"open: {opening}\nclose: {closing}\n{head}: TEXT {opening}\n{_TEXT}"


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
        self._bits = torch.zeros((vocabulary + 31) // 32, dtype=torch.int32)
        self._vocabulary = vocabulary

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores, minus infinity where the grammar forbids. Raises ToolError where nothing is left."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.data_ptr(), self._bits.numel() * 4)
        if self._matcher.is_error():
            raise ToolError(f"the schema led nowhere: {_reason(self._matcher.get_error())}")
        bits = np.unpackbits(self._bits.numpy().view(np.uint8), bitorder="little")[: scores.shape[0]]
        return scores.masked_fill(torch.from_numpy(bits) == 0, float("-inf"))

    def consume(self, token: int) -> None:
        """Move on by one token."""
        self._matcher.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """True where the grammar is satisfied and allows nothing more."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()
