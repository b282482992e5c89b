"""Calls in XML: written, read at every cut, typed by the schema, refused where nothing could read them back, forced."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from qwen_chat.conversation import Conversation, ToolCall
from qwen_chat.dialects.known import parse, stream_parser
from qwen_chat.dialects.reader import Delta, Reply, fold
from qwen_chat.dialects.xml import TAGS, Xml
from qwen_chat.errors import FormatError, ToolError
from qwen_chat.tools.validate import check_call
from tests.support.byte_grammars import Bytes, accepts, matcher_of
from tests.support.damaged import check_damaged, in_pieces

BOTH = [Xml(), Xml(python_words=True)]


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    described = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, **described, **more}}


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


TOOLS = [tool("f", of(a={"type": "integer"}, b={"type": "string"})), tool("g"), tool("天气", of(城市={}))]
F, G = ToolCall("f", '{"a": 1}'), ToolCall("g", "{}")
ONE = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
TWO = "<tool_call>\n<function=g>\n</function>\n</tool_call>"


def call(*parameters: str, name: str = "f") -> str:
    """A call of f with parameters as they are."""
    return f"<tool_call>\n<function={name}>\n{''.join(parameters)}</function>\n</tool_call>"


def parameter(key: str, text: str) -> str:
    return f"<parameter={key}>\n{text}\n</parameter>\n"


def cut(text: str, at: Sequence[int], tools: Any = TOOLS) -> Reply:
    return in_pieces(text, at, tools=tools)


# ----------------------------------------------------------------------------------------- writing


def test_write() -> None:
    arguments = {
        "s": "a\n<b>",
        "n": 1.5,
        "t": True,
        "f": False,
        "z": None,
        "l": ["值", True],
        "o": {},
        "e": "",
    }
    written = Xml().write([ToolCall("f", json.dumps(arguments)), G])
    assert written == (
        "<tool_call>\n<function=f>\n<parameter=s>\na\n<b>\n</parameter>\n<parameter=n>\n1.5\n</parameter>\n"
        "<parameter=t>\ntrue\n</parameter>\n<parameter=f>\nfalse\n</parameter>\n<parameter=z>\nnull\n</parameter>\n"
        '<parameter=l>\n["值", true]\n</parameter>\n<parameter=o>\n{}\n</parameter>\n<parameter=e>\n\n</parameter>\n'
        "</function>\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>"
    )
    words = Xml(python_words=True).write([ToolCall("f", json.dumps(arguments)), G])
    # Words alone differ, and not those inside a list.
    assert words == (
        written.replace("\ntrue\n", "\nTrue\n")
        .replace("\nfalse\n", "\nFalse\n")
        .replace("\nnull\n", "\nNone\n")
    )
    assert Xml().write([]) == ""


def conversation(name: str, arguments: dict[str, Any]) -> Conversation:
    function = {"name": name, "arguments": json.dumps(arguments)}
    reply = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    return Conversation.from_openai({"messages": [{"role": "user", "content": "?"}, reply], "tools": TOOLS})


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a value's end": (
        "f",
        {"b": "x</parameter>y"},
        "argument 'b' holds </parameter>, which this model's calls",
    ),
    "after a newline": ("f", {"b": "x\n</parameter>"}, "holds </parameter>"),
    "the function's end": ("f", {"b": "</function>"}, "holds </function>"),
    "the call's end": ("f", {"b": "</tool_call>"}, "holds </tool_call>"),
    "a parameter's beginning": ("f", {"b": "<parameter=b>"}, "holds <parameter="),
    "inside a list": ("f", {"b": [{"k": "</parameter>"}]}, "holds </parameter>"),
    "as a key of an object": ("f", {"b": {"</parameter>": 1}}, "holds </parameter>"),
    "a key that ends its tag": ("f", {"a>b": 1}, "the argument 'a>b'; expected one line without >"),
    "a key of two lines": ("f", {"a\nb": 1}, "expected one line without >"),
    "a name that ends its tag": ("f>", {}, "the name 'f>'; expected one line of at most 128 characters"),
    "a name that is blank": (" ", {}, "the name ' '"),
    "a long name": ("f" * 129, {}, "expected one line of at most 128"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_nothing_could_read_back_is_refused(name: str) -> None:
    function, arguments, says = REFUSED[name]
    with pytest.raises(FormatError) as error:
        Xml().carry(conversation(function, arguments))
    assert str(error.value).startswith("message 1: tool_calls[0]: ")
    assert says in str(error.value)
    assert error.value.message == 1


def test_what_only_looks_like_a_tag_is_carried() -> None:
    values = [
        "</ parameter>",
        "</parameters>",
        "<parameter>",
        "<function=f>",
        "<tool_call>",
        "<",
        "</p",
        "\n",
        "",
        " \n ",
    ]
    carried = Xml().carry(conversation("f", {str(k): value for k, value in enumerate(values)}))
    function = carried.messages[1]["tool_calls"][0]["function"]
    assert list(function["arguments"].values()) == values
    text = Xml().write([ToolCall("f", json.dumps(function["arguments"], ensure_ascii=False))])
    assert parse(text) == Reply(
        "", "", [ToolCall("f", json.dumps(function["arguments"], ensure_ascii=False))]
    )


# ----------------------------------------------------------------------------------------- reading

# name: text, content, calls.
SHAPES: dict[str, tuple[str, str, list[ToolCall]]] = {
    "one call": (ONE, "", [F]),
    "text before": (f"Let me see.\n\n{ONE}", "Let me see.", [F]),
    "only two newlines are layout": (f"Let me see.\n\n\n{ONE}", "Let me see.\n", [F]),
    "text before, one newline": (f"Let me see.\n{ONE}", "Let me see.", [F]),
    "text on the same line": (f"Let me see. {ONE}", "Let me see. ", [F]),
    "white space before": (f" \n\n{ONE}", "", [F]),
    "text after": (f"{ONE}\nDone. 好", "\nDone. 好", [F]),
    "text around and between": (f"A\n\n{ONE}\nB\n\n{TWO}\nC", "A\nB\nC", [F, G]),
    "several calls": (f"{ONE}\n{TWO}\n{ONE}", "", [F, G, F]),
    "several calls, odd space": (f"{ONE}\n\n  {TWO}{ONE}\n \n", "", [F, G, F]),
    "both dialects": (
        f'{ONE}\n<tool_call>\n{{"name": "g", "arguments": {{}}}}\n</tool_call>\n{TWO}',
        "",
        [F, G, G],
    ),
    "no newlines": (
        "<tool_call><function=f><parameter=a>1</parameter><parameter=b>x</parameter></function></tool_call>",
        "",
        [ToolCall("f", '{"a": 1, "b": "x"}')],
    ),
    "odd space between the tags": (
        "<tool_call> <function=f>\n\n\t<parameter=a>\n1\n</parameter> \n </function>  </tool_call>",
        "",
        [F],
    ),
    "newlines of a value": (
        call(parameter("b", "\n\nx\n\n")),
        "",
        [ToolCall("f", '{"b": "\\n\\nx\\n\\n"}')],
    ),
    "an empty value": (call(parameter("b", "")), "", [ToolCall("f", '{"b": ""}')]),
    "an empty value, one newline": (call("<parameter=b>\n</parameter>\n"), "", [ToolCall("f", '{"b": ""}')]),
    "an empty value, none": (call("<parameter=b></parameter>\n"), "", [ToolCall("f", '{"b": ""}')]),
    "a newline as a value": (call(parameter("b", "\n")), "", [ToolCall("f", '{"b": "\\n"}')]),
    "spaces of a value": (call(parameter("b", "  x\t")), "", [ToolCall("f", '{"b": "  x\\t"}')]),
    "quotes, backslashes, controls": (
        call(parameter("b", 'a "b" \\n \x01\r\n')),
        "",
        [ToolCall("f", '{"b": "a \\"b\\" \\\\n \\u0001\\r\\n"}')],
    ),
    "other tags in a value": (
        call(parameter("b", "<b>x</b> <function=g> <tool_call> </param <")),
        "",
        [ToolCall("f", '{"b": "<b>x</b> <function=g> <tool_call> </param <"}')],
    ),
    "JSON in a value that is text": (
        call(parameter("b", '{"k": 1}')),
        "",
        [ToolCall("f", '{"b": "{\\"k\\": 1}"}')],
    ),
    "a parameter that the schema does not name": (
        call(parameter("c", "1")),
        "",
        [ToolCall("f", '{"c": "1"}')],
    ),
    "a name that is no tool": (call(parameter("a", "1"), name="h"), "", [ToolCall("h", '{"a": "1"}')]),
    "names in Chinese": (
        call(parameter("城市", "杭州"), name="天气"),
        "",
        [ToolCall("天气", '{"城市": "杭州"}')],
    ),
    "names with spaces and dots": (
        call(parameter("a b.c", "1"), name="my f.g"),
        "",
        [ToolCall("my f.g", '{"a b.c": "1"}')],
    ),
    "end tag missing": (ONE.removesuffix("</tool_call>"), "", [F]),
    "end tag cut": (ONE.removesuffix("_call>"), "", [F]),
    "end tag missing, next call": (f"{ONE.removesuffix('</tool_call>')}{TWO}", "", [F, G]),
    "end tag missing, text": (f"{TWO.removesuffix('</tool_call>')}and so on", "\nand so on", [G]),
    "two functions in one tag": (
        "<tool_call>\n<function=g>\n</function>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
        "",
        [G, F],
    ),
    "outer tag missing": (ONE.removeprefix("<tool_call>\n"), "", [F]),
    "outer tags missing": ("Sure:\n<function=g>\n</function>\nok", "Sure:\nok", [G]),
    "outer tag missing, in a line": (
        "Write <function=g>\n</function>",
        "Write <function=g>\n</function>",
        [],
    ),
    "outer tag missing, a name that is no tool": (
        "<function=h>\n</function>",
        "<function=h>\n</function>",
        [],
    ),
    "a parameter twice": (
        call(parameter("b", "x"), parameter("b", "y")),
        call(parameter("b", "x"), parameter("b", "y")),
        [],
    ),
    "text between parameters": (call(parameter("b", "x"), "and\n"), call(parameter("b", "x"), "and\n"), []),
    "a value's end missing": (
        call("<parameter=b>\nx\n", parameter("a", "1")),
        call("<parameter=b>\nx\n", parameter("a", "1")),
        [],
    ),
    "the last value's end missing": (call("<parameter=b>\nx\n"), call("<parameter=b>\nx\n"), []),
    "the last value's end missing, next call": (
        f"{call('<parameter=b>x')}\n{ONE}",
        call("<parameter=b>x"),
        [F],
    ),
    "the function's end missing": (
        "<tool_call>\n<function=g>\n</tool_call>\n" + ONE,
        "<tool_call>\n<function=g>\n</tool_call>",
        [F],
    ),
    "a key of two lines": (call("<parameter=a\nb>1</parameter>"), call("<parameter=a\nb>1</parameter>"), []),
    "no name": (call(name=""), call(name=""), []),
    "a long name": (call(name="f" * 129), call(name="f" * 129), []),
    "cut in the tag": ("Hello\n\n<tool_ca", "Hello\n\n<tool_ca", []),
    "cut in the name": ("A\n\n<tool_call>\n<function=f", "A\n\n<tool_call>\n<function=f", []),
    "cut in a value": (f"{TWO}\n{ONE[:50]}", f"\n{ONE[:50]}", [G]),
    "cut before the function's end": (ONE.partition("</function>")[0], ONE.partition("</function>")[0], []),
    "the tags in prose": (
        "Write <tool_call>, then <function=f> and <parameter=a>.",
        "Write <tool_call>, then <function=f> and <parameter=a>.",
        [],
    ),
    "the tag in prose, then a call": (f"A <tool_call> is:\n\n{ONE}", "A <tool_call> is:", [F]),
    "a thought before": (f"<think>\nHm.\n</think>\n\n{ONE}", "", [F]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shape_whole_and_cut_anywhere(name: str) -> None:
    text, content, calls = SHAPES[name]
    expected = Reply(content, "Hm." if "<think>" in text else "", calls)
    assert parse(text, TOOLS) == expected
    assert cut(text, range(1, len(text))) == expected
    for at in range(1, len(text)):
        assert cut(text, [at]) == expected, at


def test_without_tools_only_the_outer_tag_makes_a_call() -> None:
    bare = TWO.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    assert parse(bare) == Reply(bare)
    assert parse(ONE) == Reply("", "", [ToolCall("f", '{"a": "1"}')])


# ----------------------------------------------------------------------------------------- types

# schema of the argument: texts, and the JSON that each is.
TYPED: list[tuple[Any, dict[str, str]]] = [
    ({"type": "string"}, {"1": '"1"', "true": '"true"', "null": '"null"', "[1]": '"[1]"', "": '""'}),
    (True, {"1": '"1"'}),
    ({}, {"1": '"1"'}),
    ({"description": "any"}, {"true": '"true"'}),
    (
        {"type": "integer"},
        {"5": "5", " 5 ": "5", "-1": "-1", "5.0": "5.0", "five": '"five"', "05": '"05"', "": '""'},
    ),
    (
        {"type": "number"},
        {"1.50": "1.50", "1e-3": "1e-3", "1,": '"1,"', '1, "": 2': '"1, \\"\\": 2"', "1}": '"1}"'},
    ),
    (
        {"type": "number"},
        {"1" * 5000: f'"{"1" * 5000}"', '"a"': '"\\"a\\""', "'a'": "\"'a'\"", "NaN": "null"},
    ),
    (
        {"type": "boolean"},
        {"true": "true", "True": "true", "False": "false", "false": "false", "TRUE": '"TRUE"'},
    ),
    ({"type": "null"}, {"null": "null", "None": "null", "nil": '"nil"'}),
    ({"type": ["boolean", "null"]}, {"None": "null", "true": "true"}),
    (
        {"type": "array"},
        {"[1, 'a', True]": '[1, "a", true]', "[1, 2,]": "[1, 2]", "[1": '"[1"', "1, 2": '"1, 2"'},
    ),
    ({"type": "object"}, {'{"k": [1]}': '{"k": [1]}', "{'k': None}": '{"k": null}', "{}": "{}", "{": '"{"'}),
    ({"type": ["string", "integer"]}, {"5": '"5"', "x": '"x"'}),
    ({"type": ["string", "null"]}, {"null": '"null"'}),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"None": '"None"'}),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, {"None": "null", "3": "3"}),
    ({"oneOf": [{"type": "array"}, {"type": "object"}]}, {"[]": "[]"}),
    ({"allOf": [{"type": ["string", "integer"]}, {"minimum": 3}]}, {"5": '"5"'}),
    ({"allOf": [{"type": ["string", "integer"]}, {"type": "integer"}]}, {"5": "5"}),
    ({"enum": ["1", "2"]}, {"1": '"1"'}),
    ({"enum": [1, 2]}, {"1": "1"}),
    ({"enum": [1, "1"]}, {"1": '"1"'}),
    ({"const": True}, {"True": "true"}),
    ({"const": "True"}, {"True": '"True"'}),
    ({"$ref": "#/$defs/Count"}, {"5": "5"}),
    ({"$ref": "#/$defs/Name"}, {"5": '"5"'}),
    ({"$ref": "#/$defs/Loop"}, {"5": '"5"'}),
    ({"$ref": "#/nowhere"}, {"5": '"5"'}),
    ({"$ref": "http://elsewhere"}, {"5": '"5"'}),
    ({"type": "any"}, {"5": '"5"'}),
    ({"type": {"odd": 1}}, {"5": '"5"'}),
    ({"anyOf": []}, {"5": '"5"'}),
]
DEFINITIONS = {
    "Count": {"type": "integer"},
    "Name": {"anyOf": [{"$ref": "#/$defs/Count"}, {"type": "string"}]},
    "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, {"$ref": "#/$defs/Loop"}]},
}


@pytest.mark.parametrize("k", range(len(TYPED)))
def test_a_value_has_the_type_that_its_schema_says(k: int) -> None:
    schema, values = TYPED[k]
    tools = [tool("f", {**of(a=schema), "$defs": DEFINITIONS})]
    for text, value in values.items():
        whole = call(parameter("a", text))
        expected = Reply("", "", [ToolCall("f", f'{{"a": {value}}}')])
        assert parse(whole, tools) == expected, text
        assert len(whole) > 1000 or cut(whole, range(1, len(whole)), tools) == expected, text


@pytest.mark.parametrize(
    ("parameters", "value"),
    [
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "5"),
        ({"type": "object", "additionalProperties": True}, '"5"'),
        ({"$ref": "#/$defs/P", "$defs": {"P": of(a={"type": "integer"})}}, "5"),
        ({"allOf": [of(b={}), of(a={"type": "integer"})]}, "5"),
        ({"anyOf": [of(b={}), of(a={"type": "integer"})]}, "5"),
        ({"oneOf": [of(a={"type": "string"}), of(a={"type": "integer"})]}, '"5"'),
        ({"properties": {"a": {"type": "integer"}}}, "5"),
        ({"properties": "odd"}, '"5"'),
        ("odd", '"5"'),
        (None, '"5"'),
        ([], '"5"'),
    ],
)
def test_where_an_arguments_schema_is_found(parameters: Any, value: str) -> None:
    tools = [tool("f", parameters)]
    assert parse(call(parameter("a", "5")), tools) == Reply("", "", [ToolCall("f", f'{{"a": {value}}}')])


def test_a_schema_that_refers_to_itself_costs_little() -> None:
    names = [f"S{k}" for k in range(12)]
    everyone = {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in names]}
    schema = {**everyone, **of(a={"$ref": "#/$defs/S0"}), "$defs": dict.fromkeys(names, everyone)}
    assert parse(call(parameter("a", "5")), [tool("f", schema)]).tool_calls == [ToolCall("f", '{"a": "5"}')]
    del schema["anyOf"]
    with pytest.raises(ToolError, match="its references lead on and on"):
        Xml().call_grammar([tool("f", schema)])


# ----------------------------------------------------------------------------------------- properties

nasty = st.text() | st.sampled_from(
    [
        "<parameter",
        "</parameter",
        "<function=f>",
        "<tool_call>",
        "\n",
        "\n\n",
        "</",
        "<",
        ">",
        "True",
        "null",
        "1",
        "🙂",
    ]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | nasty,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(nasty, inner, max_size=3),
    max_leaves=8,
)
names = st.from_regex(r"[^<>\s\ud800-\udfff][^<>\n\ud800-\udfff]{0,20}", fullmatch=True)
keys = st.from_regex(r"[^>\n\ud800-\udfff]{0,20}", fullmatch=True)
arguments = st.dictionaries(keys, values, max_size=4)
JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


def schema_of(value: Any) -> dict[str, Any]:
    return {"type": "null" if value is None else JSON_TYPES[type(value)]}


@given(st.lists(st.tuples(names, arguments), max_size=3, unique_by=lambda one: one[0]), st.data())
@settings(max_examples=100, deadline=None)
def test_parse_reads_what_write_writes(
    written: list[tuple[str, dict[str, Any]]], data: st.DataObject
) -> None:
    calls = [ToolCall(name, json.dumps(some, ensure_ascii=False)) for name, some in written]
    tools = [tool(name, of()) for name, _ in written]
    for described, (_, some) in zip(tools, written, strict=True):
        described["function"]["parameters"]["properties"] = {
            key: schema_of(value) for key, value in some.items()
        }
    for dialect in BOTH:
        text = dialect.write(calls)
        if any(tag in json.dumps(some, ensure_ascii=False) for _, some in written for tag in TAGS):
            continue
        assert parse(text, tools) == Reply("", "", calls)
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
        assert cut(text, cuts, tools) == Reply("", "", calls)


FRAGMENTS = [
    *[
        ONE,
        TWO,
        "<tool_call>",
        "</tool_call>",
        "<tool_call>\n<function=f>\n",
        "<function=f>",
        "<function=g>\n",
    ],
    *[
        "</function>",
        "\n</function>\n</tool_call>",
        "<function=",
        "<parameter=",
        "<parameter=a>",
        "<parameter=b>\n",
    ],
    *[
        "</parameter>",
        "\n</parameter>\n",
        "</parameter",
        "</",
        "<",
        ">",
        "f",
        "=",
        "\n",
        "\n\n",
        " ",
        "\t" * 20,
    ],
    *[parameter("a", "1"), parameter("b", "x"), parameter("c", "[1, {}]"), "<parameter=b>x</parameter>"],
    *[
        "<think>",
        "</think>",
        '{"name": "f", "arguments": {"a": 1}}',
        "```",
        "✿FUNCTION✿: g\n✿ARGS✿: {}",
        " " * 70,
    ],
    *["1", "[1,", "{", "}", '"', "'", "True", "null", "\\", "\r\n", "<function=天气>\n<parameter=城市>\n"],
]


@pytest.mark.parametrize("seed", range(20))
def test_damage_never_raises_and_never_loses_text(seed: int) -> None:
    found = check_damaged(FRAGMENTS, seed, 300, TOOLS)
    assert found["texts with calls"] > 50  # else it would show little


# name: a text that would take time that grows with its square, if anything were looked at again and again.
LONG = {
    "a long value": f"{call(parameter('b', 'x' * 120_000))}",
    "a long list": f"{call(parameter('a', '[' + '1, ' * 40_000 + '1]'))}",
    "angles in a value": f"{call(parameter('b', '</p' * 40_000))}",
    "newlines in a value": f"{call(parameter('b', chr(10) * 120_000))}",
    "many parameters": call(*(parameter(f"p{k}", "x") for k in range(3_500))),
    "many calls": f"{TWO}\n" * 2_500,
    "half calls": "<tool_call>\n<function=f>\n<parameter=b>\n" * 3_000,
    "half calls without tags": "\n<function=f>\n<parameter=b>x" * 4_000,
    "half values": "<tool_call>\n<function=f>\n<parameter=b>\nx\n" + "<function=f> " * 9_000,
    "open tags": "<tool_call><function=" * 5_500,
    "newlines before a call": "\n" * 120_000 + ONE,
}


@pytest.mark.parametrize("name", LONG)
def test_long_replies_take_linear_time(name: str) -> None:
    """120,000 characters, a character at a time: under a second or two; quadratic work would take minutes."""
    text = LONG[name]
    start = time.process_time()
    reply = parse(text, TOOLS)
    whole = time.process_time() - start
    assert cut(text, range(1, len(text))) == reply
    assert whole < 2 and time.process_time() - start < 6
    if not reply.tool_calls:
        assert reply.content == text


# ----------------------------------------------------------------------------------------- under a grammar


def told(text: str, cuts: Sequence[int], tools: Any = TOOLS) -> tuple[list[Delta], bool]:
    """The deltas of a text that a grammar wrote, and whether its last call was cut."""
    parser = stream_parser(tools, calls="bound")
    deltas = [d for a, b in pairwise([0, *cuts, len(text)]) for d in parser.feed(text[a:b])]
    return [*deltas, *parser.finish()], parser.cut


def test_arguments_come_as_they_are_written() -> None:
    text = call(parameter("a", "12"), parameter("b", "x\n\ny</p"))
    deltas, was_cut = told(text, range(1, len(text)))
    assert not was_cut
    assert deltas[0] == Delta(name="f", index=0)
    assert [delta.arguments for delta in deltas[1:]] == [
        "{", '"a": ', "12", ', "b": "', "x", "\\n", "\\ny", "</p", '"', "}"
    ]  # fmt: skip
    assert fold(deltas) == parse(text, TOOLS)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("\n", "{"),
        ("<parameter=ci", '{"ci'),
        ("<parameter=b>\n", '{"b": "'),
        ("<parameter=b>\nx\n", '{"b": "x\\n'),
        ("<parameter=b>\nx\n</par", '{"b": "x\\n</par'),
        ("<parameter=a>\n1", '{"a": 1'),
        (parameter("b", "x"), '{"b": "x"'),
        (parameter("b", "x") + "<parameter=a", '{"b": "x", "a'),
    ],
)
def test_a_cut_call_keeps_every_character(text: str, arguments: str) -> None:
    text = f"A\n\n<tool_call>\n<function=f>\n{text}"
    for cuts in ([], range(1, len(text))):
        deltas, was_cut = told(text, cuts)
        assert fold(deltas) == Reply("A", "", [ToolCall("f", arguments)])
        assert was_cut


def test_under_a_grammar_a_parameter_may_come_twice() -> None:
    text = call(parameter("b", "x"), parameter("b", "y"))
    deltas, was_cut = told(text, [])
    assert (fold(deltas).tool_calls, was_cut) == ([ToolCall("f", '{"b": "x", "b": "y"}')], False)


@pytest.fixture(scope="module")
def vocabulary() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(Bytes()), eos_token=256)  # type: ignore[arg-type]


# Schemas of an argument, values that a forced call may have and values that it may not. They are written by the
# dialect: JSON Schema says what is valid, and what would be read as another value is not to be written.
FORCED: list[tuple[Any, list[Any], list[Any]]] = [
    ({"type": "string"}, ["杭州", "", "\n", "a\n<b>\n", "True", "</param", "<<</"], []),
    (
        {"type": "string"},
        [],
        ["</parameter>", "x</function>y", "</tool_call>", "<<parameter=", "\n</parameter>"],
    ),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "值\n\n"], ["a", "abcd"]),
    ({"type": "string", "pattern": "^a+/b$"}, ["aa/b"], ["aa/bc", "xa/b", "ab"]),
    ({"type": "string", "pattern": "a/b"}, ["xa/b\n"], ["ab"]),
    ({"type": "string", "pattern": r"^\$[0-9]$", "maxLength": 2}, ["$1"], ["1", "$"]),
    ({"type": "string", "pattern": r"\$"}, ["a$b"], ["ab"]),
    ({"type": "string", "format": "date"}, ["2026-02-28"], ["2026-13-01", "today"]),
    ({"type": "string", "format": "date-time"}, ["2026-02-28T10:00:00Z"], ["2026-02-28"]),
    ({"type": "string", "format": "time"}, ["10:00:00.5+02:00"], ["25:00:00Z"]),
    ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123"]),
    ({"type": "string", "format": "email"}, ["a.b@c.org"], ["a.b"]),
    ({"type": "string", "format": "ipv4"}, ["192.168.0.1"], ["192.168.0.256", "1.1.1"]),
    ({"type": "string", "format": "hostname"}, ["a-b.org"], ["-a"]),
    ({"type": "string", "format": "uri"}, ["https://a.org/b?c=%20#d"], ["a.org b"]),
    ({"enum": ["C", "CC", "", "a</parameter>"]}, ["C", "CC", ""], ["F", "a</parameter>"]),
    ({"enum": ["1", 1]}, ["1"], ["2"]),
    ({"const": "x"}, ["x"], ["y"]),
    ({"type": ["string", "null"], "maxLength": 3}, ["abc"], ["abcd"]),
    (
        {"anyOf": [{"type": "string", "maxLength": 2}, {"const": "long"}, {"type": "null"}]},
        ["ab", "long"],
        ["abc"],
    ),
    ({"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 3}]}, ["ab"], ["a", "abcd"]),
    ({"anyOf": [{"type": "string"}, {"type": "string", "maxLength": 2}]}, ["abcdef"], []),
    ({"$ref": "#/$defs/Unit"}, ["C"], ["K"]),
    ({"type": "integer"}, [5, -12], [1.5, "five", True, None]),
    ({"type": "integer", "minimum": 3, "maximum": 12}, [3, 12], [2, 13]),
    ({"type": "number"}, [1.5, -2, 1e-05], ["x"]),
    ({"type": "boolean"}, [True, False], [None, 1, "yes"]),
    ({"type": "null"}, [None], [True]),
    ({"type": ["boolean", "null", "integer"]}, [True, None, 5], [1.5]),
    ({"enum": [1, True]}, [1, True], [False, 2]),
    ({"const": False}, [False], [True]),
    ({"type": "array", "items": {"type": "string"}}, [[], ["值", "</param"]], [["</parameter>"], [1]]),
    ({"type": "array", "items": {"type": "string", "pattern": "^a"}}, [["a<"]], [["b"], ["a</function>"]]),
    ({"type": "array"}, [[1, {"k": [None, True]}, "x"]], [[{"k": "</parameter>"}], [{"</parameter>": 1}]]),
    ({"type": "object"}, [{}, {"k": {"l": [1.5]}}], [{"k": "<parameter="}, {"</function>": 1}]),
    (
        {"type": "object", "additionalProperties": {"type": "integer"}},
        [{"k": 1}],
        [{"k": "x"}, {"</function>": 1}],
    ),
    (
        {**of(k={"type": "string"}), "required": ["k"]},
        [{"k": "x"}],
        [{}, {"k": "</parameter>"}, {"k": "x", "l": 1}],
    ),
    (
        {**of(k={"type": "integer"}), "additionalProperties": True},
        [{"k": 1, "l": [2]}],
        [{"l": "</parameter>"}],
    ),
    (
        {"$ref": "#/$defs/Tree"},
        [{"name": "a", "children": [{"name": "b", "children": []}]}],
        [{"name": "</function>"}],
    ),
    (
        {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"$ref": "#/$defs/Unit"}}]},
        [5, ["C"]],
        [["K"]],
    ),
]
FORCED_DEFINITIONS = {
    "Unit": {"enum": ["C", "F"]},
    "Tree": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "children": {"type": "array", "items": {"$ref": "#/$defs/Tree"}},
        },
        "required": ["name", "children"],
    },
}


@pytest.mark.parametrize("k", range(len(FORCED)))
@pytest.mark.parametrize("dialect", BOTH, ids=["json", "python"])
def test_a_forced_value_is_valid_as_it_is_read(vocabulary: LLTokenizer, dialect: Xml, k: int) -> None:
    schema, allowed, forbidden = FORCED[k]
    tools = [tool("f", {**of(a=schema), "required": ["a"], "$defs": FORCED_DEFINITIONS})]
    grammar = dialect.call_grammar(tools)
    for value in allowed:
        text = dialect.write([ToolCall("f", json.dumps({"a": value}))])
        assert accepts(vocabulary, grammar, text), value
        (read,) = parse(text, tools).tool_calls
        assert json.loads(read.arguments) == {"a": value}
        assert check_call(read, tools) is None
    for value in forbidden:
        assert not accepts(vocabulary, grammar, dialect.write([ToolCall("f", json.dumps({"a": value}))])), (
            value
        )


def test_a_forced_call_is_one_of_the_tools_under_its_schema(vocabulary: LLTokenizer) -> None:
    tools = [
        tool("f", {**of(a={"type": "integer"}, b={"type": "string"}), "required": ["b"]}),
        tool("g", of()),
        tool("天气"),
    ]
    grammar = Xml().call_grammar(tools)
    assert accepts(vocabulary, grammar, call(parameter("a", "1"), parameter("b", "x")))
    assert accepts(vocabulary, grammar, call(parameter("b", "x")))
    assert accepts(vocabulary, grammar, call(parameter("任何", "x"), parameter("b", "1"), name="天气"))
    assert accepts(vocabulary, grammar, call(name="天气"))
    assert not accepts(vocabulary, grammar, call(parameter("a", "1")))  # b is required
    assert not accepts(
        vocabulary, grammar, call(parameter("b", "x"), parameter("a", "1"))
    )  # not in the schema's order
    assert not accepts(vocabulary, grammar, call(parameter("b", "x"), parameter("b", "x")))
    assert not accepts(vocabulary, grammar, call(parameter("b", "x"), parameter("c", "x")))
    assert not accepts(vocabulary, grammar, call(parameter("b", "x"), name="h"))
    assert not accepts(vocabulary, grammar, "I would rather not.")
    assert not accepts(vocabulary, grammar, f"{TWO}\n{TWO}")
    assert accepts(vocabulary, Xml().call_grammar(tools, parallel=True), f"{TWO}\n{call(name='天气')}\n{TWO}")
    assert accepts(vocabulary, Xml().call_grammar(tools, name="g"), TWO)
    assert not accepts(vocabulary, Xml().call_grammar(tools, name="g"), call(name="天气"))


def test_text_is_free_and_every_call_in_it_is_held(vocabulary: LLTokenizer) -> None:
    tools = [
        tool("f", {**of(a={"type": "integer"}), "required": ["a"]}, strict=True),
        tool("g", of(a={"type": "integer"})),
    ]
    grammar = Xml().text_grammar(tools)
    assert accepts(vocabulary, grammar, "It is < warm, I think.")
    assert accepts(vocabulary, grammar, f"I look.\n\n{ONE}\n{call(parameter('c', 'x'), name='g')}")
    assert accepts(vocabulary, grammar, call(parameter("b", "x"), parameter("a", "y"), name="g"))
    for held in (
        call(),
        call(parameter("a", "x")),
        call(parameter("b", "x")),
        call(name="h"),
        "<tool_call>\n<function=g>\nx",
    ):
        assert not accepts(vocabulary, grammar, f"I look.\n\n{held}"), held
    assert not accepts(vocabulary, grammar, call(parameter("b", "x</function>y"), name="g"))


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"anyOf": [of()]}, "tool 'f': 'anyOf' at the top of its parameters: no call in this model's format"),
        ({**of(), "minProperties": 1}, "'minProperties' at the top"),
        (of(**{"a>": {}}), "the parameter 'a>'"),
        ({"type": "array"}, "parameters are no JSON schema of an object"),
        ("odd", "parameters are no JSON schema of an object"),
        ({**of(a={"type": []}), "required": ["a"]}, None),
        ({**of(a=False), "required": ["a"]}, "tool 'f': 'a': its schema allows no value"),
        (of(a={"allOf": [{"type": "integer"}, {"type": "array"}]}), "its schema allows no value"),
        ({**of(), "additionalProperties": False, "required": ["a"]}, "its schema allows no value"),
        (of(a={"type": "string", "format": "idn-email"}), "format 'idn-email' cannot be held to in bare text"),
        (of(a={"oneOf": [{"type": "string"}, {"const": "x"}]}), "'oneOf' with several kinds of text"),
    ],
)  # fmt: skip
def test_what_cannot_be_forced_is_one_line(parameters: Any, says: str | None) -> None:
    if says is None:
        Xml().call_grammar([tool("f", parameters)])
        return
    with pytest.raises(ToolError) as error:
        Xml().call_grammar([tool("f", parameters)])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_values_of_one_kind_share_a_rule() -> None:
    """128 tools of 20 parameters: about what the same schemas take as JSON, not a text's automaton for each."""
    described = [
        {"type": "array", "items": {"type": "string"}, "description": f"the {k}th"} for k in range(20)
    ]
    tools = [tool(f"tool_{i}", of(**{f"p{k}": one for k, one in enumerate(described)})) for i in range(128)]
    assert Xml().call_grammar(tools).source.count("%json") == 1
    assert len(Xml().call_grammar(tools).source) < 150_000


def test_a_forbidden_parameter_is_left_out(vocabulary: LLTokenizer) -> None:
    grammar = Xml().call_grammar([tool("g", of(a=False))])
    assert accepts(vocabulary, grammar, TWO)
    assert not accepts(vocabulary, grammar, call(parameter("a", "1"), name="g"))


@pytest.mark.parametrize("k", range(len(FORCED)))
def test_whatever_a_grammar_lets_be_written_is_a_valid_call(vocabulary: LLTokenizer, k: int) -> None:
    """Written at random under the grammar, a byte at a time, with a leaning towards tags and ends."""
    dialect = BOTH[k % 2]
    tools = [
        tool("f", {**of(a=FORCED[k][0], b=FORCED[k - 1][0]), "required": ["a"], "$defs": FORCED_DEFINITIONS})
    ]
    grammar = dialect.call_grammar(tools, parallel=True)
    rng, whole = random.Random(k), 0
    for _ in range(6):
        text = written_at_random(matcher_of(vocabulary, grammar), rng)
        if text is None:
            continue
        whole += 1
        reply = parse(text, tools)
        assert reply.content == "" and len(reply.tool_calls) == text.count("<function="), text
        assert [check_call(one, tools) for one in reply.tool_calls] == [None] * len(reply.tool_calls), text
        assert fold(told(text, range(1, len(text)), tools)[0]) == reply
    assert whole


ENDS = ("", '"', '"]', '"}', "]", "}", '"}]', "a/b")
ENDINGS = [f"{end}\n</parameter>\n</function>\n</tool_call>".encode() for end in ENDS]


def written_at_random(matcher: LLMatcher, rng: random.Random) -> str | None:
    """A text of the grammar, a byte at a time, mostly such as belong to tags; brought to an end where it can be. None
    where it cannot."""
    written = bytearray()
    least = rng.randrange(200)
    while len(written) < 600:
        mask = matcher.compute_bitmask()
        choices = [byte for byte in range(256) if mask[byte // 8] >> byte % 8 & 1]
        if len(written) > least or not choices:
            for ending in [b"", *ENDINGS]:
                end = matcher.deep_copy()
                if end.try_consume_tokens(list(ending)) == len(ending) and end.is_accepting():
                    return (written + ending).decode()
        some = [byte for byte in choices if byte in b'</parameter>\n"}],function=']
        written.append(rng.choice(some if some and rng.random() < 0.8 else choices))
        matcher.consume_token(written[-1])
    return None
