"""Calls against their tools' schemas: exact complaints; the quick check never says more than the library."""

import json
import timeit
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_chat.conversation import ToolCall
from qwen_chat.errors import ToolError
from qwen_chat.tools import validate
from qwen_chat.tools.validate import check_call, check_tool

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "城市"},
        "days": {"type": "integer"},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "hours": {"type": "array", "items": {"type": "number"}},
    },
    "required": ["city"],
}


def tool(parameters: Any, name: str = "weather") -> dict[str, Any]:
    function = {"name": name} if parameters is ... else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


def complaint(arguments: str, parameters: Any = WEATHER) -> str | None:
    return check_call(ToolCall("weather", arguments), [tool({}, "other"), tool(parameters)])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"city": "北京"}', None),
        ('{"city": "北京", "days": 2, "unit": "celsius", "hours": [1, 2.5], "more": null}', None),
        ('{"city": "北京", "days": 2.0}', None),
        ("{}", "arguments of 'weather': 'city' is a required property"),
        ('{"city": 5}', "arguments of 'weather': city: 5 is not of type 'string'"),
        ('{"city": "x", "days": true}', "arguments of 'weather': days: True is not of type 'integer'"),
        (
            '{"city": "x", "unit": "k"}',
            "arguments of 'weather': unit: 'k' is not one of ['celsius', 'fahrenheit']",
        ),
        ('{"city": "x", "hours": [1, "2"]}', "arguments of 'weather': hours.1: '2' is not of type 'number'"),
        ("[1]", "arguments of 'weather' hold [1]; expected an object"),
        (
            '{"city": NaN}',
            "arguments of 'weather' are no JSON (NaN is not in JSON); expected the text of an object",
        ),
    ],
)
def test_arguments(arguments: str, expected: str | None) -> None:
    assert complaint(arguments) == expected


def test_arguments_that_are_no_json_or_too_deep() -> None:
    for arguments in ("", "{", '{"city": ' + "[" * 100_000):
        assert "are no JSON" in str(complaint(arguments))


def test_a_complaint_is_one_short_line() -> None:
    found = complaint(json.dumps({"city": ["\n" * 50 + "x" * 100_000]}))
    assert found is not None and "\n" not in found and len(found) < 300


def test_a_tool_that_was_not_offered() -> None:
    call = ToolCall("nope", "{}")
    assert (
        check_call(call, [tool({}, "a"), tool({}, "b")])
        == "call of 'nope', which was not offered; expected one of: a, b"
    )
    assert check_call(call, []) == "call of 'nope', which was not offered; expected one of: none"


@pytest.mark.parametrize("parameters", [..., None, {}, {"type": "object", "properties": {}}])
def test_a_tool_without_parameters_takes_any_object(parameters: Any) -> None:
    assert complaint('{"x": 1}', parameters) is None


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"type": "objekt"}, "parameters.type: no JSON Schema: 'objekt' is not valid"),
        (
            {"properties": {"a": {"pattern": "("}}},
            "parameters.properties.a.pattern: no JSON Schema: '(' is not",
        ),
        ({"properties": {"a": {"multipleOf": 0}}}, "parameters.properties.a.multipleOf: no JSON Schema"),
        (
            {"type": "object", "required": "city"},
            "parameters.required: no JSON Schema: 'city' is not of type",
        ),
        ({"type": "object", "required": ["a", "a"]}, "parameters.required: no JSON Schema"),
        ({"$schema": []}, "parameters: TypeError"),
        ([1], "parameters hold [1]; expected a JSON Schema object"),
        ("city", "parameters hold 'city'; expected a JSON Schema object"),
        ({"default": object()}, "parameters are nested too deeply, or hold what is not JSON"),
    ],
)
def test_an_invalid_schema_names_its_tool(parameters: Any, expected: str) -> None:
    for check in (lambda: check_tool(tool(parameters)), lambda: complaint("{}", parameters)):
        with pytest.raises(ToolError) as found:
            check()
        assert str(found.value).startswith(f"tool 'weather': {expected}")


def test_a_reference_elsewhere_is_never_fetched() -> None:
    with pytest.raises(ToolError, match="tool 'weather': parameters refer to 'http://127"):
        complaint("{}", {"$ref": "http://127.0.0.1:9/x"})


def test_a_schema_that_never_ends() -> None:
    assert complaint("{}", {"$ref": "#"}) == "arguments of 'weather' are nested too deeply to be checked"
    deep: dict[str, Any] = {}
    for _ in range(5_000):
        deep = {"type": "object", "properties": {"a": deep}}
    with pytest.raises(ToolError, match="tool 'weather': parameters are nested too deeply"):
        check_tool(tool(deep))


words = st.sampled_from(["a", "b", "c"])
schemas = st.recursive(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["string", "integer", "number", "boolean", "null", "array"])}
    )
    | st.fixed_dictionaries({"type": st.just("string"), "enum": st.lists(words, min_size=1, unique=True)}),
    lambda inner: (
        st.fixed_dictionaries({"type": st.just("array"), "items": inner})
        | st.fixed_dictionaries(
            {"type": st.just("object")},
            optional={
                "properties": st.dictionaries(words, inner),
                "required": st.lists(words, unique=True),
                "additionalProperties": st.booleans(),
                "description": st.just("x"),
            },
        )
    ),
    max_leaves=6,
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([1.0, 1.5]) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@given(schemas, values)
@settings(max_examples=500, deadline=None)
def test_the_quick_check_agrees_with_the_library(schema: dict[str, Any], value: Any) -> None:
    quick = validate._certainly(schema, depth=8)
    assert quick is not None
    jsonschema.Draft202012Validator.check_schema(schema)
    if quick(value):
        assert jsonschema.Draft202012Validator(schema).is_valid(value)


def test_it_is_quick() -> None:
    """About 5 microseconds a call; at 100 it would slow down the data check (30,000 lines a second)."""
    line = json.dumps([tool(WEATHER)])
    call = ToolCall("weather", '{"city": "北京", "days": 2}')
    copies = [json.loads(line) for _ in range(2_000)]
    seconds = min(timeit.repeat(lambda: [check_call(call, tools) for tools in copies], number=1, repeat=3))
    assert seconds / len(copies) < 1 / 10_000
