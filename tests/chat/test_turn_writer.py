"""Turns that are written by rules: what the template writes, whatever the texts are, or nothing."""

import copy
import random
from typing import Any

import pytest

from qwen_chat.chat.format import ChatFormat
from qwen_chat.chat.turn_writer import TurnWriter
from qwen_chat.conversation import Conversation
from tests.support.conversations import ODD, TEXTS, conversation

QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CASES = [
    ("qwen3", {}),
    ("qwen3_5_think", {}),
    ("qwen3_6", {"preserve_thinking": True}),
    ("qwen3_8", {}),
    ("qwen3_8", {"preserve_thinking": False, "reasoning_effort": "low"}),
]


def format_of(vocabulary: Any, source: str) -> ChatFormat:
    tokenizer = copy.copy(vocabulary)
    tokenizer.chat_template = source
    return ChatFormat(tokenizer)


def writer_of(fmt: ChatFormat, given: dict[str, Any]) -> TurnWriter:
    writer = fmt._writer(given)
    assert writer is not None
    return writer


@pytest.mark.parametrize(("name", "given"), CASES)
def test_what_is_written_by_rules_is_what_the_template_writes(
    qwen3_tokenizer: Any, chat_templates: dict[str, str], name: str, given: dict[str, Any]
) -> None:
    fmt = format_of(qwen3_tokenizer, chat_templates[name])
    writer, rng, written = writer_of(fmt, given), random.Random(name), 0
    for _ in range(40):
        messages, tools = conversation(rng, texts=(*TEXTS, *ODD))
        whole = Conversation.from_openai(
            {"messages": messages, "tools": tools, "chat_template_kwargs": given}
        )
        assert writer.agrees(whole)
        written += writer.write(whole, generation=False) is not None
    assert written >= 4  # the others spell out <think> or <tool_response>


def test_what_the_rules_do_not_cover_goes_through_the_template(
    qwen3_tokenizer: Any, chat_templates: dict[str, str]
) -> None:
    fmt = format_of(qwen3_tokenizer, chat_templates["qwen3"])
    writer = writer_of(fmt, {})
    system = {"role": "system", "content": "s"}
    inline = ANSWER | {"content": "<think>why</think>so"}
    wrapped = {"role": "user", "content": "<tool_response>\nx\n</tool_response>"}
    for messages in (
        [ANSWER, QUESTION],
        [QUESTION, system],
        [QUESTION, ANSWER, ANSWER],
        [QUESTION, inline],
        [QUESTION, wrapped],
        [system],
    ):
        asked = Conversation.from_openai({"messages": messages})
        assert writer.write(asked, generation=False) is None
        assert fmt.text(messages) == fmt.tokenizer.apply_chat_template(messages, tokenize=False)
    asked = Conversation.from_openai({"messages": [QUESTION, ANSWER]})
    assert writer.write(asked, generation=True) is None
    assert writer.write(asked, generation=False) is not None


def test_a_template_with_a_quirk_is_found_out_by_the_data(
    qwen3_tokenizer: Any, chat_templates: dict[str, str]
) -> None:
    """No probe asks for 42; one conversation of the data does."""
    quirk = "{% if messages[-1].content == '42' %}{{ '<|im_start|>system\\nquirk<|im_end|>\\n' }}{% endif %}"
    fmt = format_of(qwen3_tokenizer, quirk + chat_templates["qwen3"])
    assert fmt._writer({}) is not None
    fmt.audit([Conversation.from_openai({"messages": [QUESTION | {"content": "42"}, ANSWER]})])
    assert fmt._writer({}) is None
    messages = [QUESTION | {"content": "42"}]
    assert fmt.prompt_ids(messages) == fmt.tokenizer(fmt.prompt(messages))["input_ids"]
    assert "quirk" in fmt.prompt(messages)


def test_a_template_that_writes_otherwise_has_no_writer(
    qwen3_tokenizer: Any, chat_templates: dict[str, str]
) -> None:
    loud = chat_templates["qwen3"].replace(
        'message.role == "assistant"', 'message.role == "assistant" and loop.index < 5'
    )
    assert format_of(qwen3_tokenizer, loud)._writer({}) is None
    upper = chat_templates["qwen3"].replace("content.lstrip('\\n')", "content.upper()")
    assert upper != chat_templates["qwen3"]
    assert format_of(qwen3_tokenizer, upper)._writer({}) is None


def test_what_is_remembered_is_bounded(
    qwen3_tokenizer: Any, chat_templates: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt = format_of(qwen3_tokenizer, chat_templates["qwen3"])
    writer = writer_of(fmt, {})
    monkeypatch.setattr("qwen_chat.chat.turn_writer._MOST_REMEMBERED", 5_000)
    for k in range(200):
        system = {"role": "system", "content": f"{k} " * 50}
        assert fmt.prompt([system, QUESTION]) == fmt.prompt([system, QUESTION])
        fmt.prompt_ids([system, QUESTION])
        assert sum(map(len, writer._remembered.values())) <= 5_000
