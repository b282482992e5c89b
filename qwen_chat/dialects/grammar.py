"""What a reply must match, as text: JSON, a schema, or what a dialect makes of them.

In: a schema. Out: a `Grammar` (hashable, no tokenizer, no torch). JSON is written as the model was taught to
write it (", " and ": ", one line): an untuned model cannot run away in white space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_chat.dialects.shapes import END_THINK
from qwen_chat.errors import ToolError

Schema = Mapping[str, Any]

_LAYOUT = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
_LIMIT_SCHEMA = 65_536  # characters of one schema


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar in llguidance's Lark dialect.

    `tags`: (rule, text) of what is one token in some vocabularies and ordinary text in others. For each, `complete`
    adds the rule, and a rule `until_RULE` for any text up to and with it.
    """

    source: str
    tags: tuple[tuple[str, str], ...] = ()

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def json_schema(cls, schema: Schema | bool) -> Grammar:
        """JSON that is valid under `schema`. Raises ToolError where the schema is no schema or too large."""
        return cls(f"start: {json_rule(schema, 'response_format')}\n")

    def after_thought(self) -> Grammar:
        """The same after the rest of a thought, its end and an empty line, as thinking models are taught to answer."""
        source = self.source.replace("start:", "answer:", 1)
        return Grammar(
            f'start: until_end_thought "\\n\\n" answer\n{source}', (*self.tags, ("end_thought", END_THINK))
        )

    def complete(self, tokens: Mapping[str, int]) -> str:
        """The whole text for a vocabulary in which `tokens` are tokens of their own."""
        rules = ["TEXT: /(.|\\n)*/\n"]
        for rule, text in self.tags:
            written, lazy = (f"<[{tokens[text]}]>", "") if text in tokens else (json.dumps(text), "[lazy]")
            rules.append(f"{rule}: {written}\nuntil_{rule}{lazy}: TEXT {written}\n")
        return self.source + "".join(rules)


def arguments_rule(function: Schema) -> str:
    """The arguments of a tool's function, as a part of a rule. Without a schema: any object. They are an object
    whatever the schema leaves open. Raises ToolError."""
    where, schema = f"tool {function.get('name')!r}", function.get("parameters") or {}
    if not isinstance(schema, Mapping):
        raise ToolError(f"{where}: parameters are no JSON schema; expected an object")
    if not any(key in schema for key in ("$ref", "anyOf", "oneOf", "allOf")):
        # Arguments that the tool does not name help nobody, and a weak model invents them without end.
        closed = {"additionalProperties": False} if schema.get("properties") else {}
        schema = {"type": "object", **closed, **schema}
    return json_rule(schema, where)


def json_rule(schema: Schema | bool, where: str) -> str:
    """JSON under a schema, as a part of a rule; `where` begins a ToolError."""
    if not isinstance(schema, (Mapping, bool)):
        raise ToolError(f"{where}: the schema is {type(schema).__name__}; expected an object")
    plain: Any = {**schema, "x-guidance": _LAYOUT} if isinstance(schema, Mapping) else {"x-guidance": _LAYOUT}
    try:
        text = json.dumps(plain, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolError(f"{where}: the schema cannot be written as JSON ({error})") from None
    if len(text) > _LIMIT_SCHEMA:
        raise ToolError(f"{where}: the schema has {len(text):,} characters; the limit is {_LIMIT_SCHEMA:,}")
    return f"%json {text}"
