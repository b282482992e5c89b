"""A Python function as a tool: its schema, from type hints and docstring.

In: a function. Out: the tool as OpenAI writes it, or a ToolError that names the parameter.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from qwen_chat.conversation import Json
from qwen_chat.errors import ToolError

PLAIN_TYPES: dict[Any, Json] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    list: {"type": "array"},
    dict: {"type": "object"},
    type(None): {"type": "null"},
    Any: {},
}


def tool_schema(function: Callable[..., Any], name: str | None = None) -> Json:
    """An OpenAI tool from a function's type hints and docstring.

    The first paragraph of the docstring describes the tool; lines under `Args:` ("city: the city's name") or
    `:param city: ...` describe its parameters, and so does `Annotated[str, "the city"]`; a dict in there
    is taken as JSON Schema (`{"maxLength": 40}`). A parameter without a default is required. Hints: str, int,
    float, bool, Any, None, list[...], tuple[...], dict[str, ...], Literal, unions, TypedDict.
    Raises ToolError for a parameter without a hint, with one that JSON cannot carry, or *args and **kwargs.
    """
    label = name or getattr(function, "__name__", "tool")
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function, include_extras=True)
    except (TypeError, ValueError, NameError) as error:
        text = f"function '{label}' has no readable signature ({error}); write the schema by hand"
        raise ToolError(text) from None
    summary, described = _docstring(inspect.getdoc(function) or "")
    properties: Json = {}
    required = []
    for parameter in signature.parameters.values():
        where = f"function '{label}', parameter '{parameter.name}'"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            text = f"{where}: {parameter.kind.description}; a tool is called with named arguments only"
            raise ToolError(text)
        if parameter.name not in hints:
            raise ToolError(f"{where}: no type hint; write one (city: str)")
        schema = _hint_schema(hints[parameter.name], where)
        if parameter.name in described:
            schema["description"] = described[parameter.name]
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        elif parameter.default is not None and isinstance(parameter.default, (str, int, float, bool)):
            schema["default"] = parameter.default
        properties[parameter.name] = schema
    function_schema = {
        "name": label,
        "description": summary,
        "parameters": _object_schema(properties, required),
    }
    return {"type": "function", "function": function_schema}


def _object_schema(properties: Json, required: Sequence[str]) -> Json:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _hint_schema(hint: Any, where: str) -> Json:
    """JSON Schema of one type hint."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is None and hint in PLAIN_TYPES:
        return dict(PLAIN_TYPES[hint])
    if origin is typing.Annotated:
        schema = _hint_schema(inside[0], where)
        for extra in inside[1:]:
            if isinstance(extra, dict):
                schema |= extra
            elif isinstance(extra, str):
                schema["description"] = extra
        return schema
    if origin is Literal:
        kinds = {json.dumps(PLAIN_TYPES.get(type(value), {})) for value in inside}
        return {**(json.loads(kinds.pop()) if len(kinds) == 1 else {}), "enum": list(inside)}
    if origin in (typing.Union, types.UnionType):
        branches = [_hint_schema(branch, where) for branch in inside]
        plain = all(set(branch) == {"type"} for branch in branches)
        return {"type": [branch["type"] for branch in branches]} if plain else {"anyOf": branches}
    if origin in (list, Sequence, set, Iterable) or (origin is tuple and inside[1:] == (...,)):
        return {"type": "array", "items": _hint_schema(inside[0], where)}
    if origin is tuple:
        items = [_hint_schema(part, where) for part in inside]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin in (dict, Mapping) and inside[0] is str:
        return {"type": "object", "additionalProperties": _hint_schema(inside[1], where)}
    if typing.is_typeddict(hint):
        fields = typing.get_type_hints(hint)
        properties = {key: _hint_schema(value, where) for key, value in fields.items()}
        required = sorted(hint.__required_keys__, key=list(fields).index)
        return _object_schema(properties, required)
    text = f"{where}: JSON has no {hint!r}; use str, int, float, bool, list, dict, Literal or a TypedDict"
    raise ToolError(text)


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """The first paragraph on one line, and parameter -> description (Google's `Args:` or `:param name:`).

    A line under `Args:` that is indented further continues the one above.
    """
    summary = " ".join(re.split(r"\n\s*\n|\n\s*(?:Args:|:param )", text, maxsplit=1)[0].split())
    described = {match[1]: match[2].strip() for match in re.finditer(r":param (?:\w+ )?(\w+):\s*(.+)", text)}
    indent, name = 0, None
    for line in text.partition("\nArgs:\n")[2].splitlines():
        width = len(line) - len(line.lstrip())
        if line.strip() and width == 0:
            break
        entry = re.match(r"\s+(\w+)(?: \([^)]*\))?:\s*(.*)", line)
        if entry and width <= (indent or width):
            indent, name = width, entry[1]
            described[name] = entry[2].strip()
        elif name and line.strip():
            described[name] = f"{described[name]} {line.strip()}".strip()
    return summary, described
