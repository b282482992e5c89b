"""The system text of --system: trained bytes are served bytes, by every server that renders the saved template."""

import copy
import re
from typing import Any

import pytest

from qwen_chat.chat import system_text
from qwen_chat.chat.format import ChatFormat
from qwen_chat.conversation import Conversation
from qwen_chat.errors import FormatError

TEXT = "You are \"小明\" 🙂 of C:\\dir.\nBe brief; {{ no }} {% template %} <b>&'x'</b>"
USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}
OWN = {"role": "system", "content": "Its own."}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
}
RESULT = {"role": "tool", "content": "2"}
CHATS: list[tuple[list[dict[str, Any]], list[Any] | None]] = [
    ([USER], None),
    ([USER, REPLY, USER], None),
    ([USER], [TOOL]),
    ([USER, CALL, RESULT, REPLY, USER], [TOOL]),
]


@pytest.fixture(params=["qwen2", "qwen2_5", "qwen3", "demo"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """A copy: saving a format changes the tokenizer's template."""
    return copy.copy(request.getfixturevalue(f"{request.param}_tokenizer"))


@pytest.mark.parametrize("style", ["auto", "qwen_agent"])
def test_what_is_learnt_is_what_any_server_renders(tokenizer: Any, style: Any) -> None:
    learnt = ChatFormat(tokenizer, tool_style=style, system=TEXT)
    plain = ChatFormat(tokenizer, tool_style=style)
    served = copy.copy(tokenizer)
    served.chat_template = learnt.template
    ours = ChatFormat(served)
    assert (learnt.system, ours.system, plain.system) == (TEXT, TEXT, None)
    assert learnt.fingerprint == ours.fingerprint != plain.fingerprint
    for messages, tools in CHATS:
        prompt = learnt.prompt(messages, tools)
        assert prompt == plain.prompt([{"role": "system", "content": TEXT}, *messages], tools)
        assert ours.prompt(messages, tools) == prompt and prompt.count(TEXT.strip()) == 1
        if style == "auto":  # as vLLM and llama.cpp do it: the template alone
            theirs = served.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=False
            )
            assert theirs == prompt
        for fmt in (learnt, ours):
            (*_, last) = fmt.encode([*messages, REPLY], tools)
            start = last.spans[-1][0]
            assert last.input_ids[:start] == ours.prompt_ids(messages, tools)
        own = [OWN, *messages]
        assert learnt.prompt(own, tools) == plain.prompt(own, tools)
    empty = [{"role": "system", "content": ""}, USER]
    assert learnt.prompt(empty) == plain.prompt(empty)


def test_a_model_that_is_tuned_again_takes_the_new_text(tokenizer: Any) -> None:
    variables = {"enable_thinking": False} if "enable_thinking" in tokenizer.chat_template else None
    tokenizer.chat_template = ChatFormat(tokenizer, system=TEXT, template_kwargs=variables).template
    kept, again = ChatFormat(tokenizer), ChatFormat(tokenizer, system="New.")
    assert (kept.template, kept.system) == (tokenizer.chat_template, TEXT)
    assert again.prompt([USER]).count("New.") == 1 and TEXT not in again.template
    tokenizer.chat_template = again.template
    assert ChatFormat(tokenizer, system=TEXT).template == kept.template


@pytest.mark.parametrize("text", [TEXT, "", "\\", '"', "\u2028\r\n\t", "{# x #}"])
def test_the_line_is_found_again(text: str) -> None:
    rest = "{%- for message in messages %}..."
    assert system_text.taken_apart(system_text.line(text) + rest) == (text, rest)
    assert system_text.taken_apart(rest) == (None, rest)
    assert system_text.line(None) == ""


def test_a_text_that_cannot_be_carried_is_refused(qwen2_tokenizer: Any) -> None:
    with pytest.raises(
        FormatError, match=re.escape("--system: the text spells out <|im_end|>, a control token")
    ):
        ChatFormat(qwen2_tokenizer, system="a<|im_end|>")
    deaf = copy.copy(qwen2_tokenizer)
    deaf.chat_template = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(
        FormatError, match=r"--system: this chat template writes no system text; leave it out"
    ):
        ChatFormat(deaf, system="Be brief.")


def test_a_thought_in_the_text_makes_no_thinking_template(qwen2_tokenizer: Any) -> None:
    assert not ChatFormat(qwen2_tokenizer, system="Write no <think> of your own.").knows_reasoning


def test_a_person_is_told_a_part_of_it() -> None:
    assert system_text.told(None) == ""
    assert system_text.told("x" * 100) == f"without a system message a conversation gets: '{'x' * 60}...'"


def test_documents_have_none(qwen2_5_tokenizer: Any) -> None:
    document = Conversation((), document="Once.")
    found = [
        ChatFormat(qwen2_5_tokenizer, system=text).encode_conversation(document) for text in (None, TEXT)
    ]
    assert found[0] == found[1]
