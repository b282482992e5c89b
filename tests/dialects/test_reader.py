"""What a model's reply says: exact values for every shape seen in the wild, however the text is cut."""

import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_chat.conversation import ToolCall
from qwen_chat.dialects.dialect import normalise_arguments
from qwen_chat.dialects.hermes import Hermes
from qwen_chat.dialects.known import parse, stream_parser
from qwen_chat.dialects.qwen_agent import QwenAgent
from qwen_chat.dialects.reader import Delta, Reply, fold
from qwen_chat.errors import FormatError
from tests.support.damaged import check_damaged

HERMES = Hermes()
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("f", "g", "天气")
]
F, G = ToolCall("f", '{"a": 1}'), ToolCall("g", "{}")
ONE = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
TWO = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'


def tag(json_text: str) -> str:
    return f"<tool_call>\n{json_text}\n</tool_call>"


def cut(text: str, at: list[int], **options: Any) -> Reply:
    """The reply, fed in pieces that end at `at`."""
    parser = stream_parser(options.pop("tools", None), **options)
    deltas: list[Delta] = []
    for start, end in zip([0, *at], [*at, len(text)], strict=True):
        deltas += parser.feed(text[start:end])
    return fold([*deltas, *parser.finish()])


# name: text, content, calls. Read with the tools f, g and 天气.
SHAPES: dict[str, tuple[str, str, list[ToolCall]]] = {
    "no call": ("Hello <b>你好</b> 🙂\n", "Hello <b>你好</b> 🙂\n", []),
    "nothing": ("", "", []),
    "white space only": (" \n\n", " \n\n", []),
    "one call": (ONE, "", [F]),
    "text before": (f"Let me see.\n{ONE}", "Let me see.", [F]),
    "text on the same line": (f"Let me see. {ONE}", "Let me see. ", [F]),
    "only one newline is layout": (f"Let me see.\n\n{ONE}", "Let me see.\n", [F]),
    "white space before": (f" \n\n{ONE}", "", [F]),
    "text after": (f"{ONE}\nDone. 好", "\nDone. 好", [F]),
    "text around and between": (f"A\n{ONE}\nB\n{TWO}\nC", "A\nB\nC", [F, G]),
    "several calls": (f"{ONE}\n{TWO}\n{ONE}", "", [F, G, F]),
    "several calls, odd space": (f"{ONE}\n\n  {TWO}{ONE}\n \n", "", [F, G, F]),
    "no newline after the tag": ('<tool_call>{"name": "g", "arguments": {}}</tool_call>', "", [G]),
    "end tag missing": ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}', "", [F]),
    "end tag missing, newline": ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n', "", [F]),
    "end tag missing, next call": (
        f'<tool_call>\n{{"name": "f", "arguments": {{"a": 1}}}}\n{TWO}',
        "",
        [F, G],
    ),
    "end tag missing, text": ('<tool_call>{"name": "g"} and so on', " and so on", [G]),
    "end tag cut": ('<tool_call>\n{"name": "g", "arguments": {}}\n</tool_c', "", [G]),
    "JSON cut in a string": (
        f'{ONE}\n<tool_call>\n{{"name": "g", "argu',
        '\n<tool_call>\n{"name": "g", "argu',
        [F],
    ),
    "JSON cut before the last brace": (
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}',
        [],
    ),
    "tag cut": ("Hello\n<tool_ca", "Hello\n<tool_ca", []),
    "a bad call among good ones": (
        f'{ONE}\n<tool_call>\n{{"name": oops, "arguments": {{}}}}\n</tool_call>\n{TWO}',
        '\n<tool_call>\n{"name": oops, "arguments": {}}\n</tool_call>',
        [F, G],
    ),
    "a brace too few": (
        f'<tool_call>\n{{"name": "f", "arguments": {{"a": 1}}\n</tool_call>\n{TWO}',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>',
        [G],
    ),
    "a quote too few": (
        f'<tool_call>\n{{"name": "f", "arguments": {{"a": "x}}}}\n</tool_call>\n{TWO}',
        '<tool_call>\n{"name": "f", "arguments": {"a": "x}}\n</tool_call>',
        [G],
    ),
    "arguments as a string": (tag(r'{"name": "f", "arguments": "{\"a\": 1}"}'), "", [F]),
    "arguments as an empty string": (tag('{"name": "g", "arguments": ""}'), "", [G]),
    "arguments null": (tag('{"name": "g", "arguments": null}'), "", [G]),
    "arguments None": (tag("{'name': 'g', 'arguments': None}"), "", [G]),
    "arguments absent": (tag('{"name": "g"}'), "", [G]),
    "arguments called parameters": (tag('{"name": "f", "parameters": {"a": 1}}'), "", [F]),
    "arguments before name": (tag('{"arguments": {"a": 1}, "name": "f"}'), "", [F]),
    "arguments a list": (tag('{"name": "f", "arguments": [1]}'), tag('{"name": "f", "arguments": [1]}'), []),
    "arguments prose": (
        tag('{"name": "f", "arguments": "Paris"}'),
        tag('{"name": "f", "arguments": "Paris"}'),
        [],
    ),
    "no name": (tag('{"arguments": {"a": 1}}'), tag('{"arguments": {"a": 1}}'), []),
    "a name that is no text": (tag('{"name": 1}'), tag('{"name": 1}'), []),
    "an empty name": (tag('{"name": ""}'), tag('{"name": ""}'), []),
    "two names": (tag('{"name": "f", "name": "g"}'), tag('{"name": "f", "name": "g"}'), []),
    "a key that calls do not have": (
        tag('{"name": "f", "city": "x"}'),
        tag('{"name": "f", "city": "x"}'),
        [],
    ),
    "id and type": (tag('{"id": "call_0", "type": "function", "name": "g"}'), "", [G]),
    "an inner key called name": (
        tag('{"arguments": {"name": "x", "arguments": {"name": "y"}}, "name": "f"}'),
        "",
        [ToolCall("f", '{"name": "x", "arguments": {"name": "y"}}')],
    ),
    "tags inside a string": (
        tag('{"name": "f", "arguments": {"a": "</tool_call> <tool_call>\\n{}"}}') + "\nok",
        "\nok",
        [ToolCall("f", '{"a": "</tool_call> <tool_call>\\n{}"}')],
    ),
    "the tag in prose": (
        "Use <tool_call> and </tool_call> around it.",
        "Use <tool_call> and </tool_call> around it.",
        [],
    ),
    "the tag in prose, then a call": (f"A <tool_call> is:\n{ONE}", "A <tool_call> is:", [F]),
    "an extra brace": (tag('{"name": "f", "arguments": {"a": 1}}}'), "", [F]),
    "an extra brace, no end tag": ('<tool_call>{"name": "f", "arguments": {"a": 1}}}', "", [F]),
    "doubled braces": (tag('{{"name": "f", "arguments": {"a": 1}}}'), "", [F]),
    "a brace that belongs to text": ('<tool_call>{"name": "g"} } is a brace', " } is a brace", [G]),
    "trailing commas": (
        tag('{"name": "f", "arguments": {"a": [1, 2, ], },}'),
        "",
        [ToolCall("f", '{"a": [1, 2 ] }')],
    ),
    "Python quotes": (
        tag(
            "{'name': 'f', 'arguments': "
            "{'a': True, 'b': 'say \"hi\"', 'c': None, 'd': \"it's\", 'e': 'it\\'s'}}"
        ),
        "",
        [ToolCall("f", '{"a": true, "b": "say \\"hi\\"", "c": null, "d": "it\'s", "e": "it\'s"}')],
    ),
    "NaN": (tag('{"name": "f", "arguments": {"a": NaN}}'), "", [ToolCall("f", '{"a": null}')]),
    "a raw newline in a string": (
        tag('{"name": "f", "arguments": {"a": "x\ny\tz"}}'),
        "",
        [ToolCall("f", '{"a": "x\\ny\\tz"}')],
    ),
    "unknown escapes": (
        tag(r'{"name": "f", "arguments": {"a": "C:\Data \d\u12"}}'),
        "",
        [ToolCall("f", r'{"a": "C:\\Data \\d\\u12"}')],
    ),
    "numbers as written": (
        tag('{"name": "f", "arguments": {"a":-1.50e+3,"b":12345678901234567890}}'),
        "",
        [ToolCall("f", '{"a":-1.50e+3,"b":12345678901234567890}')],
    ),
    "no number": (
        tag('{"name": "f", "arguments": {"a": 01}}'),
        tag('{"name": "f", "arguments": {"a": 01}}'),
        [],
    ),
    "a list of calls in one tag": (
        tag('[{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]') + "\nok",
        "\nok",
        [F, G],
    ),
    "a list with a bad call": (
        tag('[{"name": "f", "arguments": {"a": 1}}, {"nam": "g"}]'),
        ', {"nam": "g"}]\n</tool_call>',
        [F],
    ),
    "two objects in one tag": (tag('{"name": "f", "arguments": {"a": 1}}\n{"name": "g"}'), "", [F, G]),
    "a fence inside the tag": (tag('```json\n{"name": "g"}\n```'), "", [G]),
    "a fence inside the tag, closed by another": (
        '<tool_call>```{"name": "g"}```json\n</tool_call>',
        "json\n</tool_call>",
        [G],
    ),
    "fenced": ('Sure:\n```json\n{"name": "f", "arguments": {"a": 1}}\n```\nok', "Sure:\nok", [F]),
    "fenced, not closed": ('```\n{"name": "f", "arguments": {"a": 1}}', "", [F]),
    "fenced list": (
        '```json\n[{"name": "g", "arguments": {}},\n {"name": "g", "arguments": {}}]\n```',
        "",
        [G, G],
    ),
    "fenced as another language": (
        '```ruby\n{"name": "g", "arguments": {}}\n```',
        "```ruby\n```",
        [G],
    ),
    "fenced code": ('```json\n{"city": "x"}\n```', '```json\n{"city": "x"}\n```', []),
    "bare": ('{"name": "f", "arguments": {"a": 1}}', "", [F]),
    "bare on its own line": ('Sure:\n  {"name": "f", "parameters": {"a": 1}}\nok', "Sure:\nok", [F]),
    "bare lines": ('{"name": "g", "arguments": {}}\n{"name": "g", "arguments": {}}', "", [G, G]),
    "bare list": ('[{"name": "g", "arguments": {}}]', "", [G]),
    "bare with an end tag": ('{"name": "g", "arguments": {}}\n</tool_call>', "", [G]),
    "bare with a name that is no tool": (
        '{"name": "Ann", "arguments": {}}',
        '{"name": "Ann", "arguments": {}}',
        [],
    ),
    "bare without arguments": ('{"name": "f"}', '{"name": "f"}', []),
    "bare in the middle of a line": (
        'It is {"name": "g", "arguments": {}}',
        'It is {"name": "g", "arguments": {}}',
        [],
    ),
    "a tool's description is no call": (
        '{"name": "f", "description": "x", "parameters": {}}',
        '{"name": "f", "description": "x", "parameters": {}}',
        [],
    ),
    "a tagged name that is no tool": (tag('{"name": "h"}'), "", [ToolCall("h", "{}")]),
    "flower marks": ('✿FUNCTION✿: f\n✿ARGS✿: {"a": 1}', "", [F]),
    "flower marks, two calls": (
        'Both:\n✿FUNCTION✿: f\n✿ARGS✿: {"a": 1}\n✿FUNCTION✿: 天气\n✿ARGS✿: {"城市": "✿ARGS✿"}\n',
        "Both:",
        [F, ToolCall("天气", '{"城市": "✿ARGS✿"}')],
    ),
    "flower marks and the stop mark": ("✿FUNCTION✿：g\n✿ARGS✿：{}\n✿RESULT✿", "", [G]),
    "flower marks and an invented result": (
        "✿FUNCTION✿: g\n✿ARGS✿: {}\n✿RESULT✿: 5",
        "\n✿RESULT✿: 5",
        [G],
    ),
    "flower arguments cut": (
        'A\n✿FUNCTION✿: f\n✿ARGS✿: {"a": ',
        'A\n✿FUNCTION✿: f\n✿ARGS✿: {"a": ',
        [],
    ),
    "flower arguments that are no JSON": (
        "✿FUNCTION✿: f\n✿ARGS✿: Paris\n✿FUNCTION✿: g\n✿ARGS✿: {}",
        "✿FUNCTION✿: f\n✿ARGS✿: Paris",
        [G],
    ),
    "the flower mark in prose": ("The mark ✿FUNCTION✿ names it.", "The mark ✿FUNCTION✿ names it.", []),
    "an answer after results": ("✿RETURN✿: 晴，31 度。", "晴，31 度。", []),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shape_whole_and_cut_anywhere(name: str) -> None:
    text, content, calls = SHAPES[name]
    expected = Reply(content, "", calls)
    assert parse(text, TOOLS) == expected
    assert cut(text, list(range(1, len(text))), tools=TOOLS) == expected
    for at in range(1, len(text)):
        assert cut(text, [at], tools=TOOLS) == expected, at
    for call in calls:
        assert isinstance(json.loads(call.arguments), dict)


REASONING: dict[str, tuple[str, bool, Reply]] = {
    "thought and answer": ("<think>\nHm.\n\nYes\n</think>\n\nGood", False, Reply("Good", "Hm.\n\nYes")),
    "thought and call": (f"<think>\nHm.\n</think>\n\n{ONE}", False, Reply("", "Hm.", [F])),
    "empty thought": ("<think>\n\n</think>\n\n 好", False, Reply(" 好")),
    "prompt ended inside": (f"Hm.\n</think>\n\nGood\n{ONE}", True, Reply("Good", "Hm.", [F])),
    "said again though the prompt had it": ("<think>\nHm.</think>Good", True, Reply("Good", "Hm.")),
    "cut": ("<think>\nHm, <tool_call> or </thin", False, Reply("", "Hm, <tool_call> or </thin")),
    "cut, prompt ended inside": ("Hm", True, Reply("", "Hm")),
    "a call inside a thought is thought": (f"<think>{ONE}</think>x", False, Reply("x", ONE)),
    "not at the beginning": ("I <think> so</think>", False, Reply("I <think> so</think>")),
    "end without beginning": ("so</think> it", False, Reply("so</think> it")),
}


@pytest.mark.parametrize("name", REASONING)
def test_reasoning_whole_and_cut_anywhere(name: str) -> None:
    text, inside, expected = REASONING[name]
    assert parse(text, TOOLS, in_reasoning=inside) == expected
    for at in range(1, len(text)):
        assert cut(text, [at], tools=TOOLS, in_reasoning=inside) == expected, at
    assert cut(text, list(range(1, len(text))), tools=TOOLS, in_reasoning=inside) == expected


def test_without_tools_only_marks_make_a_call() -> None:
    for text in ('{"name": "f", "arguments": {}}', '```json\n{"name": "f", "arguments": {}}\n```'):
        assert parse(text) == Reply(text)
        assert parse(text, []) == Reply(text)
    assert parse(ONE) == Reply("", "", [F])
    assert parse('✿FUNCTION✿: f\n✿ARGS✿: {"a": 1}') == Reply("", "", [F])


# ----------------------------------------------------------------------------------------- streaming


def test_stream_speaks_as_early_as_it_can() -> None:
    parser = stream_parser(TOOLS)
    assert parser.feed("Hel") == [Delta("Hel")]
    assert parser.feed("lo <") == [Delta("lo ")]
    assert parser.feed("tool") == []
    assert parser.feed("box>") == [Delta("<toolbox>")]
    assert parser.feed('\n<tool_call>\n{"name": "f", "argum') == []
    assert parser.feed('ents": {"a": 1}') == []
    assert parser.feed("}") == [Delta(name="f", arguments='{"a": 1}', index=0)]  # before the end tag
    assert parser.feed("\n</tool_call>") == []
    assert parser.feed("\n<tool_call>{") == []
    assert parser.feed('"name": "g", "city') == []
    assert parser.feed('"') == [
        Delta("\n<tool_call>"),
        Delta('{"name": "g", "city"'),
    ]  # it cannot be a call any more
    assert parser.finish() == []
    assert parser.calls == 1


def test_stream_of_reasoning() -> None:
    parser = stream_parser()
    assert parser.feed("<think>\nA\n") == [Delta(reasoning="A")]
    assert parser.feed("B\n\n</th") == [Delta(reasoning="\nB")]
    assert parser.feed("ink>\n") == []
    assert parser.feed("\nC") == [Delta("C")]
    assert parser.finish() == []


def test_index_counts_calls() -> None:
    parser = stream_parser()
    deltas = [*parser.feed(f"{ONE}\n{TWO}\n{ONE}"), *parser.finish()]
    assert [(d.index, d.name) for d in deltas] == [(0, "f"), (1, "g"), (2, "f")]


# ----------------------------------------------------------------------------------------- golden vectors


def vectors(family: str) -> list[dict[str, Any]]:
    lines = (GOLDEN / f"{family}.jsonl").read_text(encoding="utf-8").splitlines()
    return [vector for vector in map(json.loads, lines) if vector["tools"]]


def expected_reply(message: dict[str, Any]) -> Reply:
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return Reply(
        message["content"] or "",
        "",
        [ToolCall(c["name"], normalise_arguments(c["arguments"])) for c in calls],
    )


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3"])
def test_golden_hermes(family: str) -> None:
    read = 0
    for vector in vectors(family):
        assert HERMES.describe(vector["tools"]) in vector["text"].split("<|im_end|>")[0]
        for prompt in vector["generation_prompts"]:
            k = prompt["before_message"]
            if k == len(vector["messages"]) or not vector["text"].startswith(prompt["prompt"]):
                continue
            text = vector["text"][len(prompt["prompt"]) :].split("<|im_end|>")[0]
            expected = expected_reply(vector["messages"][k])
            assert parse(text, vector["tools"]) == expected
            assert text.endswith(HERMES.write(expected.tool_calls))
            read += 1
    assert read == 14


def test_golden_flower() -> None:
    for vector in vectors("qwen_agent"):
        block = QwenAgent(vector["lang"], vector["parallel"]).describe(vector["tools"])
        system = vector["rendered"][0]["content"]
        assert system == block or system.endswith("\n\n" + block)
        text = next(m["content"] for m in vector["rendered"] if m["role"] == "assistant")
        turns = re.split(r"(?:\n✿RESULT✿: .*)+\n(?=✿RETURN✿: )", text)
        expected = [expected_reply(m) for m in vector["messages"] if m["role"] == "assistant"]
        assert [parse(turn, vector["tools"]) for turn in turns] == expected
        assert all(
            turn.endswith(QwenAgent().write(reply.tool_calls))
            for turn, reply in zip(turns, expected, strict=True)
        )


def test_golden_flower_reads_all_wordings() -> None:
    assert Counter((v["lang"], v["parallel"]) for v in vectors("qwen_agent")) == {
        (language, parallel): 7 for language in ("en", "zh") for parallel in (True, False)
    }


# ----------------------------------------------------------------------------------------- properties

nasty = st.text() | st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        '"}}',
        "\\",
        "\\u12",
        "✿FUNCTION✿: f",
        "<think>",
        "```",
        "\n{",
        "'",
        "名",
        "🙂",
    ]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | nasty,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(nasty, inner, max_size=3),
    max_leaves=8,
)
arguments = st.builds(
    lambda value, ascii_only, indent: json.dumps(value, ensure_ascii=ascii_only, indent=indent),
    st.dictionaries(nasty, values, max_size=3),
    st.booleans(),
    st.sampled_from([None, 2]),
)
names = (st.text(min_size=1) | st.sampled_from(["f", "get weather", 'a"b', "</tool_call>"])).filter(
    lambda name: bool(name.strip())
)
calls = st.lists(st.builds(ToolCall, names, arguments), max_size=4)


@given(calls, st.data())
@settings(max_examples=300, deadline=None)
def test_parse_reads_what_write_writes(written: list[ToolCall], data: st.DataObject) -> None:
    text = HERMES.write(written)
    assert parse(text) == Reply("", "", written)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    assert cut(text, cuts, tools=TOOLS) == Reply("", "", written)


@given(
    st.lists(st.builds(ToolCall, st.from_regex(r"\w[\w. -]{0,20}\w", fullmatch=True), arguments), max_size=4)
)
@settings(max_examples=100, deadline=None)
def test_parse_reads_what_write_flower_writes(written: list[ToolCall]) -> None:
    assert parse(QwenAgent().write(written)) == Reply("", "", written)


@given(st.text().filter(lambda text: text.strip() and not re.search("[<✿]", text)), calls.filter(bool))
@settings(max_examples=200, deadline=None)
def test_content_before_calls_comes_back_exactly(content: str, written: list[ToolCall]) -> None:
    assert parse(f"{content}\n{HERMES.write(written)}") == Reply(content, "", written)


FRAGMENTS = [
    *[
        ONE,
        TWO,
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        "```",
        "```json\n",
        "\n",
        " ",
        "\n\n",
        "✿",
    ],
    *[
        '{"name": "f", "arguments": {"a": 1}}',
        '{"name": "g", "arguments": ',
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        '"',
        "'",
    ],
    *[
        "✿FUNCTION✿",
        "✿ARGS✿",
        "✿RESULT✿",
        "✿RETURN✿",
        ": f\n",
        "✿FUNCTION✿: g\n✿ARGS✿: {}",
        "\\",
        "\\u00",
        "1e",
        "-",
    ],
    *[
        '"name"',
        '"arguments"',
        "'name': 'f'",
        "True",
        "null",
        "<",
        "</",
        "`",
        "\t" * 20,
        " " * 70,
        "}}",
        "</tool",
        "json",
    ],
]


@pytest.mark.parametrize("seed", range(20))
def test_damage_never_raises_and_never_loses_text(seed: int) -> None:
    check_damaged(FRAGMENTS, seed, 300, TOOLS)


@given(st.text(alphabet=st.characters(), max_size=60), st.lists(st.integers(0, 60), max_size=4))
@settings(max_examples=200, deadline=None)
def test_text_without_marks_is_content(text: str, cuts: list[int]) -> None:
    if "<think>" not in text and "✿" not in text:
        assert parse(text) == Reply(text)
        assert cut(text, sorted(min(at, len(text)) for at in cuts)) == Reply(text)


# ----------------------------------------------------------------------------------------- limits

LONG = {
    "prose": "The answer is 42. 好的。\n" * 5_000,
    "a long string": tag('{"name": "f", "arguments": {"a": "' + "x" * 120_000 + '"}}'),
    "many calls": f"{ONE}\n" * 2_000,
    "deep objects": '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 24_000,
    "deep lists": '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 120_000 + "]" * 120_000,
    "open tags": "<tool_call>{" * 10_000,
    "open tags in a string": '<tool_call>{"name": "f", "arguments": {"a": "' + "<tool_call>{" * 10_000,
    "half calls": '<tool_call>{"name": "f", "arguments": {"a": "' * 3_000,
    "alternating quotes": "<tool_call>{'arguments':{\":1,'\"':1,\"" * 3_000,
    "bare openings": '\n{"name": "f", "arguments": {"a": "' * 3_500,
    "brackets on lines": "{\n[\n" * 30_000,
    "angles": "<" * 120_000,
    "flowers": "✿FUNCTION✿: " * 10_000,
    "newlines": "\n" * 120_000,
    "thoughts of newlines": "<think>a" + "\n" * 120_000,
    "spaces after a call": ONE + " " * 120_000,
    "braces after a call": '<tool_call>{"name": "g"}' + "}" * 120_000,
}


@pytest.mark.parametrize("name", LONG)
def test_long_replies_take_linear_time(name: str) -> None:
    """120,000 characters, a character at a time: under a second; quadratic work would take minutes."""
    text = LONG[name]
    start = time.process_time()
    reply = parse(text, TOOLS)
    whole = time.process_time() - start
    assert cut(text, list(range(1, len(text))), tools=TOOLS) == reply
    assert whole < 2 and time.process_time() - start < 6
    if not reply.tool_calls and not reply.reasoning:
        assert reply.content == text


def test_nesting_up_to_the_limit_is_a_call() -> None:
    inner = '{"a": ' + "[" * 190 + "]" * 190 + "}"
    assert parse(tag(f'{{"name": "f", "arguments": {inner}}}')) == Reply("", "", [ToolCall("f", inner)])


def test_a_number_that_python_cannot_read_is_no_call() -> None:
    text = tag('{"name": "f", "arguments": {"a": ' + "1" * 5_000 + "}}")
    assert parse(text) == Reply(text)


def test_a_lone_surrogate_in_a_name_is_no_call() -> None:
    text = tag('{"name": "\\ud800"}')
    assert parse(text) == Reply(text)


# ----------------------------------------------------------------------------------------- writing


def test_write() -> None:
    assert HERMES.write([F, G]) == f"{ONE}\n{TWO}"
    assert HERMES.write([]) == ""
    assert HERMES.write([ToolCall('a"b', "{}")]) == tag('{"name": "a\\"b", "arguments": {}}')


def test_write_qwen_agent() -> None:
    assert QwenAgent().write([F, G]) == '✿FUNCTION✿: f\n✿ARGS✿: {"a": 1}\n✿FUNCTION✿: g\n✿ARGS✿: {}'


def test_normalise_arguments() -> None:
    assert normalise_arguments('{"b":1,\n"a":"\\u597d"}') == '{"b": 1, "a": "好"}'
    assert normalise_arguments({"b": 1, "a": "好"}) == '{"b": 1, "a": "好"}'
    assert [normalise_arguments(absent) for absent in (None, "", {})] == ["{}"] * 3
    with pytest.raises(FormatError, match="arguments hold list; expected an object"):
        normalise_arguments("[1]")
    with pytest.raises(FormatError, match="arguments are no JSON"):
        normalise_arguments("{")
