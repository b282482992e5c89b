"""A client's JSON Schema: is it one, is it small enough, and what of it decoding can be bound to.

In: schemas of tools and of `response_format`, as they came. Out: nothing, or an APIError that names the parameter;
and for a tool that is not strict, the part of its schema that a grammar holds. What a schema comes to is
remembered by its content: an agent sends the same tools with each request.
"""

from __future__ import annotations

import hashlib
import marshal
import math
import re
import threading
from collections.abc import Sequence
from typing import Any

from qwen_chat.conversation import Json
from qwen_chat.service.errors import bad_value
from qwen_chat.tools.validate import schema_error

# A sentence with {param} in it, and OpenAI's code.
SchemaFault = tuple[str, str]

# Nesting of a JSON Schema.
SCHEMA_DEPTH = 24
# Objects, lists and values in one schema.
SCHEMA_NODES = 4000
# Objects, lists and values in all schemas of a request.
MOST_SCHEMA_NODES = 40_000
# Characters of a regular expression in a schema.
PATTERN_LENGTH = 500
# The most of minItems, maxLength and the like: a grammar unrolls them.
LARGEST_REPEAT = 2000
_REPEATS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
# Schemas whose verdict is kept.
_MOST_VERDICTS = 4096

# What llguidance has no rules for, and what says nothing of a value.
_UNHELD = {
    *("uniqueItems", "not", "if", "then", "else", "contains", "minContains", "maxContains", "propertyNames"),
    *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties"),
    *("$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$schema"),
}
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
# Keywords whose value is name -> schema.
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_NESTED = ("items", "additionalProperties", "additionalItems", "anyOf", "allOf", "oneOf", "prefixItems")
# What looks around, or back.
_UNHELD_PATTERN = re.compile(r"\(\?(?:[=!]|<[=!])|\\[bB1-9]")


# What was found of the schemas that came lately, by the hash of their content.
_VERDICTS: dict[bytes, tuple[int, SchemaFault | None]] = {}
_LOCK = threading.Lock()


def check_schemas(schemas: Sequence[tuple[str, Json, bool]]) -> None:
    """Refuse the first of (parameter, schema, whether decoding is bound to it) that is no schema, is too large,
    or has a keyword that a grammar would unroll without end."""
    total = 0
    for param, schema, bound in schemas:
        nodes, problem = _verdict(schema, bound)
        total += nodes
        if total > MOST_SCHEMA_NODES:
            problem = f"the schemas have over {MOST_SCHEMA_NODES} parts together", "schema_too_large"
        if problem is not None:
            text, code = problem
            raise bad_value(param, f"Invalid schema for '{param}': {text}.", code)


def held(schema: Any) -> Any:
    """The part of a schema that a grammar holds: all that `schema` allows is allowed, and perhaps more."""
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if key == "pattern":
            loose = isinstance(value, str) and (_UNHELD_PATTERN.search(value) or _is_large(value))
        elif key == "format":
            loose = value not in _FORMATS
        else:
            loose = key in _UNHELD or (key in _REPEATS and _is_much(value))
        if not loose:
            kept[key] = value
    # One of several, where a grammar knows only any of them.
    if "oneOf" in kept:
        choices = kept.pop("oneOf")
        if "anyOf" not in kept:
            kept["anyOf"] = choices
    for key in _NAMED:
        if isinstance(kept.get(key), dict):
            kept[key] = {name: held(child) for name, child in kept[key].items()}
    for key in _NESTED:
        if key in kept:
            child = kept[key]
            kept[key] = [held(one) for one in child] if isinstance(child, list) else held(child)
    return kept


def _verdict(schema: Json, bound: bool) -> tuple[int, SchemaFault | None]:
    """Nodes of a schema, and what is wrong with it."""
    try:
        # In version 2 equal values give equal bytes.
        content = marshal.dumps(schema, 2)
    except ValueError:
        return 0, (f"a schema nested more than {SCHEMA_DEPTH} deep is too large", "schema_too_large")
    key = hashlib.sha256(content).digest() + bytes([bound])
    with _LOCK:
        found = _VERDICTS.get(key)
    if found is None:
        nodes, problem = _measure(schema, bound)
        if problem is None and (error := schema_error(schema)) is not None:
            place = "/".join(str(part) for part in error.absolute_path)
            problem = f"{error.message[:200]} (at '{place[:200]}')", "invalid_value"
        found = nodes, problem
    with _LOCK:
        _VERDICTS.pop(key, None)
        _VERDICTS[key] = found
        while len(_VERDICTS) > _MOST_VERDICTS:
            _VERDICTS.pop(next(iter(_VERDICTS)))
    return found


def _measure(schema: Json, bound: bool) -> tuple[int, SchemaFault | None]:
    """The nodes of a schema, and where it is too large."""
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    nodes = 0
    while waiting:
        value, depth = waiting.pop()
        nodes += 1
        if depth > SCHEMA_DEPTH:
            return nodes, (f"a schema nested more than {SCHEMA_DEPTH} deep is too large", "schema_too_large")
        if nodes > SCHEMA_NODES:
            return nodes, (f"a schema of {SCHEMA_NODES} parts is too large", "schema_too_large")
        if isinstance(value, dict):
            if bound and _is_large(value.get("pattern")):
                return nodes, ("its regular expression is too large", "schema_too_large")
            for key in _REPEATS:
                if bound and _is_much(value.get(key)):
                    text = f"'{key}' is {value[key]}; at most {LARGEST_REPEAT}"
                    return nodes, (text, "schema_too_large")
            waiting += [(child, depth + 1) for child in value.values()]
        elif isinstance(value, list):
            waiting += [(child, depth + 1) for child in value]
    return nodes, None


def _is_much(repeat: object) -> bool:
    return isinstance(repeat, int | float) and repeat > LARGEST_REPEAT


def _is_large(pattern: object) -> bool:
    """Whether a regular expression is long, or repeats inside repeats too often."""
    if not isinstance(pattern, str):
        return False
    if len(pattern) > PATTERN_LENGTH:
        return True
    counts = re.findall(r"\d+", " ".join(re.findall(r"\{[\d,]+\}", pattern)))
    return math.prod(max(int(count), 1) for count in counts) > LARGEST_REPEAT
