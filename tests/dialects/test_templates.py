"""Published templates: each speaks one dialect, which writes its calls byte for byte, reads them and forces them."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import numpy as np
import pytest
from llguidance import LLTokenizer, TokenizerWrapper

from qwen_chat.chat.format import ChatFormat
from qwen_chat.chat.template import ChatTemplate
from qwen_chat.conversation import Conversation, ToolCall
from qwen_chat.dialects.dialect import Dialect
from qwen_chat.dialects.hermes import Hermes
from qwen_chat.dialects.known import KNOWN, parse
from qwen_chat.dialects.reader import Reply
from qwen_chat.dialects.xml import Xml
from qwen_chat.errors import FormatError, OptionError
from qwen_chat.inference.grammar import GrammarTokenizer
from tests.support.byte_grammars import Bytes, accepts

SPOKEN: dict[str, Dialect] = {
    "qwen2_5": Hermes(),
    "qwen3": Hermes(),
    "qwen3_instruct_2507": Hermes(),
    "qwen3_5_think": Xml(python_words=True),
    "qwen3_5_nothink": Xml(python_words=True),
    "qwen3_6": Xml(),
    "qwen3_8": Xml(),
}
PROPERTIES = {
    "city": (
        {"type": "string"},
        ["杭州", "", "New York", "a\n\n<b>x</b>\n", " x ", "True", "12", '{"k": 1}'],
    ),
    "unit": ({"enum": ["C", "F"]}, ["C", "F"]),
    "days": ({"type": "integer"}, [0, -3, 12]),
    "share": ({"type": "number"}, [0.5, 1e-05, 2]),
    "all": ({"type": "boolean"}, [True, False]),
    "until": ({"type": ["integer", "null"]}, [None, 5]),
    "tags": ({"type": "array", "items": {"type": "string"}}, [[], ["a", "值"], ["it's", "</b>"]]),
    "more": ({"type": "object"}, [{}, {"k": [1, None, True, {"l": "x\n"}]}]),
}
PARAMETERS = {"type": "object", "properties": {key: schema for key, (schema, _) in PROPERTIES.items()}}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]


def random_calls(rng: random.Random) -> list[ToolCall]:
    calls = []
    for _ in range(rng.randint(1, 3)):
        chosen = {key: rng.choice(values) for key, (_, values) in PROPERTIES.items() if rng.random() < 0.5}
        name = rng.choice(["get_weather", "get_weather", "now"])
        calls.append(ToolCall(name, json.dumps(chosen if name != "now" else {}, ensure_ascii=False)))
    return calls


@pytest.mark.parametrize("name", SPOKEN)
def test_a_templates_calls_are_its_dialects(
    name: str, chat_templates: dict[str, str], qwen3_tokenizer: Any
) -> None:
    assert SPOKEN.keys() == chat_templates.keys()
    template, dialect = ChatTemplate(with_template(qwen3_tokenizer, chat_templates[name])), SPOKEN[name]
    assert [one for one in KNOWN if template.speaks(one)] == [dialect]
    vocabulary = LLTokenizer(TokenizerWrapper(Bytes()), eos_token=256)  # type: ignore[arg-type]
    forced, free = dialect.call_grammar(TOOLS, parallel=True), dialect.text_grammar(TOOLS)
    rng = random.Random(name)
    for k in range(20):
        calls, content = random_calls(rng), ["", "Let me see.", "好。\n\nA <b>"][k % 3]
        asked = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls]
        reply = {"role": "assistant", "content": content, "tool_calls": asked}
        conversation = Conversation.from_openai(
            {"messages": [{"role": "user", "content": "?"}, reply], "tools": TOOLS}
        )
        carried = dialect.carry(conversation)
        written = template.render(carried.messages, carried.tools).rpartition("<|im_start|>assistant\n")[2]
        written = written.removesuffix("<|im_end|>\n")
        text = written.removeprefix("<think>\n\n</think>\n\n")
        between = ("\n\n" if dialect.name == "xml" else "\n") if content else ""
        assert text == content + between + dialect.write(calls)
        assert parse(written, TOOLS) == Reply(content, "", calls)
        assert accepts(vocabulary, free, text)
        assert accepts(vocabulary, forced, dialect.write(calls))
        other = Hermes() if dialect.name == "xml" else Xml()
        assert not accepts(vocabulary, forced, other.write(calls))


def with_template(tokenizer: Any, template: str) -> Any:
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def test_a_format_reads_and_forces_what_its_template_writes(
    chat_templates: dict[str, str], qwen3_tokenizer: Any
) -> None:
    tokenizer = with_template(qwen3_tokenizer, chat_templates["qwen3_5_nothink"])
    fmt = ChatFormat(tokenizer, tool_style="xml")
    assert (fmt.tool_style, fmt.dialect) == ("xml", Xml(python_words=True))
    assert fmt.template == chat_templates["qwen3_5_nothink"]
    text = fmt.dialect.write([ToolCall("get_weather", '{"all": true, "days": 3}')])
    assert "\nTrue\n" in text
    assert fmt.parse(text, TOOLS).tool_calls == [ToolCall("get_weather", '{"all": true, "days": 3}')]
    assert fmt.call_grammar(TOOLS) == Xml(python_words=True).call_grammar(TOOLS)
    assert fmt.text_grammar(TOOLS) == Xml(python_words=True).text_grammar(TOOLS)
    function = {"name": "get_weather", "arguments": {"city": "a\n</parameter>"}}
    calling = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    with pytest.raises(FormatError, match=r"message 1: tool_calls\[0\]: argument 'city' holds </parameter>"):
        fmt.encode([{"role": "user", "content": "?"}, calling], TOOLS)


@pytest.mark.parametrize(
    ("template", "asked", "spoken"), [("qwen3_6", "hermes", "xml"), ("qwen3", "xml", "hermes")]
)
def test_another_style_than_the_templates_is_refused(
    chat_templates: dict[str, str], qwen3_tokenizer: Any, template: str, asked: Any, spoken: str
) -> None:
    tokenizer = with_template(qwen3_tokenizer, chat_templates[template])
    says = (
        f"tool_style is '{asked}', but the chat template writes calls as {spoken}; expected auto or {spoken}"
    )
    with pytest.raises(OptionError, match=says):
        ChatFormat(tokenizer, tool_style=asked)


def test_where_the_outer_tags_are_tokens_the_grammar_writes_the_tokens(qwen3_tokenizer: Any) -> None:
    grammars = GrammarTokenizer(qwen3_tokenizer, len(qwen3_tokenizer), [qwen3_tokenizer.eos_token_id])
    strict = [{"function": {**tool["function"], "strict": True}} for tool in TOOLS]
    rng = random.Random(0)
    for _ in range(5):
        calls = random_calls(rng)
        text = f"Let me see.\n\n{Xml().write(calls)}"
        ids = qwen3_tokenizer.encode(text, add_special_tokens=False)
        assert ids.count(qwen3_tokenizer.convert_tokens_to_ids("<tool_call>")) == len(calls)
        matcher = grammars.matcher(Xml().text_grammar(strict))
        for token in ids:
            assert matcher.mask(np.zeros(len(qwen3_tokenizer), np.float32))[token] == 0
            matcher.consume(token)
        assert matcher.mask(np.zeros(len(qwen3_tokenizer), np.float32))[qwen3_tokenizer.eos_token_id] == 0
