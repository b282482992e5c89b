"""Is this a JSON Schema, can anything satisfy it, and is a call one that its tool can take?

In: tools, and calls of them. Out: None, or what is wrong: one line, or a ToolError where the schema itself is. A
schema is compiled once and kept. The everyday part of JSON Schema is checked without the library, which is asked
where that check cannot say yes.
"""

import json
import marshal
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jsonschema
import referencing
import referencing.exceptions
from jsonschema.exceptions import SchemaError, best_match
from jsonschema.protocols import Validator

from qwen_chat.conversation import Json, ToolCall, read_tools
from qwen_chat.errors import FormatError, ToolError

Check = Callable[[Any], bool]

_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}
# Bytes of a schema that is remembered: thousands of large ones are no use and cost memory.
_LARGEST_KEPT = 32_768
_ANNOTATIONS = frozenset({"title", "description", "default", "examples"})
_TYPES: dict[str, Check] = {
    # A value that passes is valid for certain; 1.0 as an integer is left to the library.
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: type(value) is int,
    "number": lambda value: type(value) in (int, float),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not in JSON")


_STRICT = json.JSONDecoder(parse_constant=_refuse)


def check_call(call: ToolCall, tools: Sequence[Mapping[str, Any]]) -> str | None:
    """One line on what is wrong with the call, or None.

    Raises ToolError, naming the tool, where the tool's own schema is invalid.
    """
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == call.name:
            break
    else:
        offered = ", ".join(str(tool.get("function", tool).get("name")) for tool in tools) or "none"
        return f"call of '{call.name}', which was not offered; expected one of: {offered}"
    try:
        arguments = _STRICT.decode(call.arguments)
    except (ValueError, RecursionError) as error:
        return f"arguments of '{call.name}' are no JSON ({error}); expected the text of an object"
    if not isinstance(arguments, dict):
        return f"arguments of '{call.name}' hold {_one_line(repr(arguments))}; expected an object"
    return check_arguments(arguments, function)


def call_problem(call: ToolCall, tools: Sequence[Mapping[str, Any]]) -> str | None:
    """check_call for those who only tell what is wrong: a schema that cannot be used is told too."""
    try:
        return check_call(call, tools)
    except ToolError as error:
        return str(error)


def check_arguments(arguments: Mapping[str, Any], tool: Mapping[str, Any]) -> str | None:
    """One line on what is wrong with the arguments under the tool's `parameters`, or None.

    Raises ToolError, naming the tool, where the schema is invalid or cannot be used.
    """
    function = tool.get("function", tool)
    name = str(function.get("name"))
    key = _key(function.get("parameters"), name)
    certain = _quick(key)
    if certain is not None and certain(arguments):
        return None
    validator = _library(key, name)
    try:
        error = best_match(validator.iter_errors(arguments))
    except RecursionError:
        return f"arguments of '{name}' are nested too deeply to be checked"
    except referencing.exceptions.Unresolvable as unknown:
        raise ToolError(f"tool '{name}': parameters refer to {unknown.ref!r}, which is not in them") from None
    except Exception as error:  # a schema is a program
        text = f"tool '{name}': parameters: {type(error).__name__}: {_one_line(str(error))}"
        raise ToolError(text) from None
    if error is None:
        return None
    place = ".".join(str(step) for step in error.absolute_path)
    return f"arguments of '{name}': {place + ': ' if place else ''}{_one_line(error.message)}"


def check_tool(tool: Mapping[str, Any]) -> None:
    """Raise ToolError, naming the tool, where its `parameters` are no valid JSON Schema."""
    function = tool.get("function", tool)
    name = str(function.get("name"))
    key = _key(function.get("parameters"), name)
    if _quick(key) is None:
        _library(key, name)


def schema_error(schema: Any, draft: type[Validator] = jsonschema.Draft202012Validator) -> SchemaError | None:
    """Why this is no JSON Schema, its regular expressions included; None where it is one.

    The library raises what it likes where a schema is nested without end.
    """
    if _certainly(schema, depth=8) is not None:
        return None
    try:
        draft.check_schema(schema)
    except SchemaError as error:
        return error
    return None


def _key(schema: object, name: str) -> bytes:
    """The schema's content: equal schemas of different lines share one validator."""
    if schema is None or schema == {}:
        schema = _NO_ARGUMENTS
    if not isinstance(schema, Mapping):
        raise ToolError(
            f"tool '{name}': parameters hold {_one_line(repr(schema))}; expected a JSON Schema object"
        )
    try:
        return marshal.dumps(dict(schema), 2)  # version 2: equal values give equal bytes
    except ValueError:
        text = f"tool '{name}': parameters are nested too deeply, or hold what is not JSON"
        raise ToolError(text) from None


def _quick(key: bytes) -> Check | None:
    return _kept_quick(key) if len(key) <= _LARGEST_KEPT else _kept_quick.__wrapped__(key)


def _library(key: bytes, name: str) -> Validator:
    return _kept_library(key, name) if len(key) <= _LARGEST_KEPT else _kept_library.__wrapped__(key, name)


@lru_cache(maxsize=4096)
def _kept_quick(key: bytes) -> Check | None:
    return _certainly(marshal.loads(key), depth=8)


@lru_cache(maxsize=1024)
def _kept_library(key: bytes, name: str) -> Validator:
    schema = marshal.loads(key)
    try:
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        wrong = schema_error(schema, kind)
        # An empty registry of our own: a reference to another place is an error, never a download.
        validator = kind(schema, registry=referencing.Registry())
    # A schema is a program: "$schema": [] or endless depth raise what they like.
    except Exception as error:
        text = f"tool '{name}': parameters: {type(error).__name__}: {_one_line(str(error))}"
        raise ToolError(text) from None
    if wrong is not None:
        place = ".".join(["parameters", *(str(step) for step in wrong.absolute_path)])
        raise ToolError(f"tool '{name}': {place}: no JSON Schema: {_one_line(wrong.message)}")
    return validator


def _certainly(schema: object, depth: int) -> Check | None:
    """A check whose yes means valid and whose no means nothing.

    It knows objects, arrays, plain types and enums of texts; None where the schema has more, or is not sound.
    """
    if not isinstance(schema, dict) or depth == 0:
        return None
    keys = schema.keys() - _ANNOTATIONS
    annotated = all(isinstance(schema.get(text, ""), str) for text in ("title", "description"))
    if not annotated or not isinstance(schema.get("examples", []), list):
        return None
    kind = schema.get("type")
    if kind == "object" and keys <= {"type", "properties", "required", "additionalProperties"}:
        return _certain_object(schema, depth)
    if kind == "array" and keys <= {"type", "items"}:
        item = _certainly(schema.get("items", {"type": "string"}), depth - 1)
        return item and (lambda value: isinstance(value, list) and all(map(item, value)))
    if not isinstance(kind, str) or kind not in _TYPES or not keys <= {"type", "enum"}:
        return None
    if "enum" not in schema:
        return _TYPES[kind]
    values = schema["enum"]
    texts = isinstance(values, list) and all(isinstance(value, str) for value in values)
    if kind != "string" or not values or not texts:
        return None
    allowed = frozenset(values)
    return lambda value: isinstance(value, str) and value in allowed


def _certain_object(schema: Mapping[str, Any], depth: int) -> Check | None:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    more = schema.get("additionalProperties", True)
    if not isinstance(properties, dict) or not isinstance(required, list) or not isinstance(more, bool):
        return None
    if not all(isinstance(name, str) for name in required) or len(set(required)) < len(required):
        return None
    checks = {name: _certainly(part, depth - 1) for name, part in properties.items()}
    if not all(checks.values()):
        return None

    def certain(value: object) -> bool:
        if not isinstance(value, dict):
            return False
        for name in required:
            if name not in value:
                return False
        for name, part in value.items():
            check = checks.get(name)
            if check is None:
                if not more:
                    return False
            elif not check(part):
                return False
        return True

    return certain


def _one_line(message: str, limit: int = 200) -> str:
    line = " ".join(message[: 4 * limit].split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def check_tools(tools: Sequence[Json], functions: Collection[str] | None = None) -> None:
    """Raise ToolError, naming the tool, the place and the cure, where no call of a tool could ever succeed.

    functions: given, each tool must have one of its name.
    """
    try:
        read_tools(tools)
    except FormatError as error:
        raise ToolError(str(error)) from None
    names: set[str] = set()
    for tool in tools:
        name, schema = tool["function"]["name"], tool["function"].get("parameters") or {}
        if name in names:
            raise ToolError(f"tool '{name}' is offered twice; give each tool a name of its own")
        if functions is not None and name not in functions:
            known = ", ".join(functions) or "none"
            raise ToolError(f"tool '{name}' has no function; the functions are: {known}")
        check_tool(tool)
        if schema.get("type", "object") != "object":
            raise ToolError(f"tool '{name}': the parameters' type is {schema['type']!r}; expected 'object'")
        reason = unsatisfiable(schema)
        if reason is not None:
            raise ToolError(f"tool '{name}': {reason}; no arguments can satisfy this schema")
        names.add(name)


def unsatisfiable(schema: Any, path: str = "parameters") -> str | None:
    """Why no value can satisfy the schema (None: nothing plain stands in the way).

    Finds the contradictions that people write: crossed bounds, empty or mistyped enums, a required property that is
    false or impossible or that `additionalProperties: false` forbids. (Deciding it for every schema is not feasible.)
    """
    if schema is False:
        return f"{path} is false"
    if not isinstance(schema, dict):
        return None
    for low, high in (
        ("minimum", "maximum"),
        ("minLength", "maxLength"),
        ("minItems", "maxItems"),
        ("minProperties", "maxProperties"),
    ):
        if low in schema and high in schema and schema[low] > schema[high]:
            return f"{path} has {low} {schema[low]} above {high} {schema[high]}"
    if "enum" in schema or "const" in schema:
        return _no_choice(schema, path)
    if schema.get("minItems", 0) > 0 and (reason := unsatisfiable(schema.get("items"), f"{path}.items")):
        return reason
    for key in ("anyOf", "oneOf"):
        branches = schema.get(key) or []
        reasons = [unsatisfiable(branch, f"{path}.{key}[{i}]") for i, branch in enumerate(branches)]
        if reasons and all(reasons):
            return reasons[0]
    for i, branch in enumerate(schema.get("allOf") or ()):
        if reason := unsatisfiable(branch, f"{path}.allOf[{i}]"):
            return reason
    properties = schema.get("properties") or {}
    for name in schema.get("required") or ():
        if name in properties:
            if reason := unsatisfiable(properties[name], f"{path}.{name}"):
                return reason
        elif schema.get("additionalProperties") is False and not schema.get("patternProperties"):
            return f"{path} requires '{name}' and forbids it (additionalProperties is false)"
    return None


def _no_choice(schema: Json, path: str) -> str | None:
    """An enum or const must leave a value that the rest of the schema takes."""
    values = schema["enum"] if "enum" in schema else [schema["const"]]
    try:
        # An empty registry of our own: a reference to another place is never downloaded.
        validator = jsonschema.Draft202012Validator(schema, registry=referencing.Registry())
        if any(validator.is_valid(value) for value in values):
            return None
    except Exception:  # a $ref that does not resolve: not decided here
        return None
    return f"{path} allows none of its own values {json.dumps(values, ensure_ascii=False)[:100]}"
