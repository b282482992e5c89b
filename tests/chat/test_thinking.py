"""Thinking as a choice, under the templates of Qwen2.5 to Qwen3.8: served as trained in every value of their variables,
refused where a template would pass over something."""

import copy
import itertools
import random
from typing import Any

import pytest

from qwen_chat.chat.empty_think import EmptyThinkIgnored, chosen, notes, taught
from qwen_chat.chat.format import ChatFormat
from qwen_chat.conversation import Conversation, Json
from qwen_chat.errors import FormatError
from tests.support.conversations import conversation
from tests.support.published_templates import NAMES

QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
THOUGHT = ANSWER | {"reasoning_content": "why"}
END_ID = 151645
SWITCHED = ("qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8")
BOTH = (True, False)
VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "qwen2_5": {},
    "qwen3": {"enable_thinking": BOTH},
    "qwen3_instruct_2507": {},
    "qwen3_5_think": {"enable_thinking": BOTH},
    "qwen3_5_nothink": {"enable_thinking": BOTH},
    "qwen3_6": {"enable_thinking": BOTH, "preserve_thinking": BOTH},
    "qwen3_8": {
        "enable_thinking": BOTH,
        "preserve_thinking": BOTH,
        "reasoning_effort": ("low", "medium", "xhigh"),
    },
}


def settings_of(name: str) -> list[Json]:
    """No value given, then every combination of values of a template's thinking variables."""
    variables = VALUES[name]
    combined = [dict(zip(variables, some, strict=True)) for some in itertools.product(*variables.values())]
    return [{}, *(combined if variables else ())]


CASES = [pytest.param(name, given, id=f"{name}-{given}") for name in NAMES for given in settings_of(name)]


@pytest.fixture(scope="module")
def tokenizer(qwen3_tokenizer: Any) -> Any:
    return qwen3_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tokenizer: Any, chat_templates: dict[str, str]) -> dict[str, Any]:
    """One vocabulary under each template."""
    return {name: changed(tokenizer, source) for name, source in chat_templates.items()}


@pytest.fixture(scope="module")
def formats(tokenizers: dict[str, Any]) -> dict[str, ChatFormat]:
    return {name: ChatFormat(tokenizer) for name, tokenizer in tokenizers.items()}


def changed(tokenizer: Any, source: str) -> Any:
    other = copy.copy(tokenizer)
    other.chat_template = source
    return other


def with_variables(fmt: ChatFormat, given: Json) -> ChatFormat:
    """The format of a run with --template_kwargs; its vocabulary is not read again."""
    other = copy.copy(fmt)
    other._template = type(fmt._template)(fmt.tokenizer, given)
    other._writers = {}
    other.__dict__.pop("fingerprint", None)
    other.__dict__.pop("thinks", None)
    other.__dict__.pop("empty_thinks", None)
    return other


# -------------------------------------------------------------------------------------------- served as trained


def assert_served_as_trained(fmt: ChatFormat, messages: list[Json], tools: Any, given: Json) -> int:
    """Every reply is learnt once, after exactly the tokens that a server is given; text and prompt are the template's
    own, byte for byte. How many replies there are."""

    def written(some: list[Json], generation: bool) -> str:
        return str(
            fmt.tokenizer.apply_chat_template(
                some, tools=tools, tokenize=False, add_generation_prompt=generation, **given
            )
        )

    replies = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    sequences = fmt.encode(messages, tools, **given)
    learnt = [(sequence.input_ids, *span) for sequence in sequences for span in sequence.spans]
    assert len(learnt) == len(replies)
    for k, (ids, start, end) in zip(replies, learnt, strict=True):
        prompt = fmt.render(messages[:k], tools, **given)
        assert prompt.text == written(messages[:k], True)
        assert prompt.ids == fmt.tokenizer(prompt.text)["input_ids"] == ids[:start]
        whole = written(messages[: k + 1], False)
        assert whole.startswith(prompt.text)
        reply = whole[len(prompt.text) : whole.rindex("<|im_end|>") + len("<|im_end|>")]
        assert ids[start:end] == fmt.tokenizer(reply)["input_ids"]
    return len(replies)


def assert_many_are_served_as_trained(fmt: ChatFormat, given: Json, count: int) -> None:
    """Where a prompt ends with an empty think block, a thought is refused, and without it the conversation is right."""
    rng = random.Random(repr(sorted(given.items())))
    closed = "</think>" in fmt.prompt([QUESTION], **given)
    seen = refused = 0
    for _ in range(count):
        messages, tools = conversation(rng)
        if closed and any("reasoning_content" in message for message in messages):
            with pytest.raises(FormatError, match="has a thought, but its prompt ends with an empty one"):
                fmt.encode(messages, tools, **given)
            refused += 1
            messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
        seen += assert_served_as_trained(fmt, messages, tools, given)
    assert seen > count
    assert (refused > 0) is closed


@pytest.mark.parametrize(("name", "given"), CASES)
def test_served_as_trained(formats: dict[str, ChatFormat], name: str, given: Json) -> None:
    assert_many_are_served_as_trained(formats[name], given, 50)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "given"), CASES)
def test_a_thousand_are_served_as_trained(formats: dict[str, ChatFormat], name: str, given: Json) -> None:
    assert_many_are_served_as_trained(formats[name], given, 1000)


# ---------------------------------------------------------------------------------------------------- variables


def test_what_the_templates_read(formats: dict[str, ChatFormat]) -> None:
    for name, fmt in formats.items():
        assert fmt.variables == set(VALUES[name])
        switch = fmt.thinking_switch
        assert (switch and (switch.name, switch.on)) == (("enable_thinking", True) if VALUES[name] else None)
        assert fmt.efforts == VALUES[name].get("reasoning_effort", ())
        assert fmt.thinks is (name in SWITCHED and name != "qwen3_5_nothink")


@pytest.mark.parametrize("name", NAMES)
def test_unknown_variables_and_values_are_refused(formats: dict[str, ChatFormat], name: str) -> None:
    fmt = formats[name]
    known = ", ".join(sorted(VALUES[name])) or "none"
    unknown = f"chat_template_kwargs: this chat template has no variable 'think'; it reads {known}"
    for refused in (fmt.text, fmt.prompt, fmt.prompt_ids, fmt.render, fmt.encode):
        with pytest.raises(FormatError) as caught:
            refused([QUESTION, ANSWER], think=True)
        assert str(caught.value) == unknown
    for supplied in ("add_generation_prompt", "documents", "add_vision_id", "content", "reasoning_content"):
        with pytest.raises(FormatError, match=f"no variable '{supplied}'"):
            fmt.text([QUESTION], None, **{supplied: "x"})
    for variable in VALUES[name]:
        with pytest.raises(
            FormatError, match=f"{variable} is 'yes'; expected (true or false|one of low, medium, xhigh)"
        ):
            fmt.text([QUESTION], None, **{variable: "yes"})


def test_a_variable_of_another_name_turns_thinking_on(tokenizer: Any) -> None:
    source = (
        "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
        "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{{ '<think>' if thinking else '<think></think>' }}{% endif %}"
    )
    fmt = ChatFormat(changed(tokenizer, source))
    assert fmt.variables == {"thinking"}
    assert fmt.thinking_switch is not None
    assert fmt.thinking_switch.json(thinking=True) == '{"thinking": true}'
    with pytest.raises(FormatError, match=r'set chat_template_kwargs \{"thinking": true\} in the record'):
        fmt.encode([QUESTION, THOUGHT])
    (sequence,) = fmt.encode([QUESTION, THOUGHT], thinking=True)
    assert fmt.tokenizer.decode(sequence.input_ids[sequence.spans[0][0] :]) == "why</think>a<|im_end|>\n"


@pytest.mark.parametrize("name", SWITCHED)
def test_a_runs_variables_are_saved_where_any_server_sees_them(
    formats: dict[str, ChatFormat], tokenizers: dict[str, Any], name: str
) -> None:
    """The saved template alone, rendered by transformers, writes what the run was trained in; a request still wins."""
    fmt, messages = formats[name], [QUESTION, ANSWER, QUESTION]
    for value in BOTH:
        tuned = with_variables(fmt, {"enable_thinking": value})
        saved = changed(tokenizers[name], tuned.template)
        assert tuned.template != fmt.template
        for asked in ({}, *({"enable_thinking": other} for other in BOTH)):
            given = {"enable_thinking": value, **asked}
            prompt = saved.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **asked)
            assert prompt == tuned.prompt(messages, **asked) == fmt.prompt(messages, **given)
        again = with_variables(with_variables_of(saved, fmt), {})
        assert again.template == tuned.template
        assert again.variables == fmt.variables
        other_way = with_variables(with_variables_of(saved, fmt), {"enable_thinking": not value})
        assert other_way.template.count("set enable_thinking =") == 1
        assert other_way.prompt(messages) == fmt.prompt(messages, enable_thinking=not value)
        assert other_way.template.partition("\n")[2] == fmt.template


def with_variables_of(tokenizer: Any, fmt: ChatFormat) -> ChatFormat:
    other = copy.copy(fmt)
    other.tokenizer = tokenizer
    return other


def test_values_of_any_kind_are_saved(tokenizer: Any) -> None:
    source = (
        "{{ extra | tojson if extra is defined }}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    )
    value = {"a": [None, True, 1.5, "\"%}'\n二"], "b": {}}
    fmt = ChatFormat(changed(tokenizer, source), template_kwargs={"extra": value})
    expected = ChatFormat(changed(tokenizer, source)).text([QUESTION], extra=value)
    assert fmt.text([QUESTION]) == expected
    assert expected.startswith('{"a": [null, true, 1.5, "')
    with pytest.raises(
        FormatError, match="--template_kwargs: this chat template has no variable 'enable_thinking'"
    ):
        ChatFormat(changed(tokenizer, source), template_kwargs={"enable_thinking": True})


def test_a_control_token_in_a_variable_stays_text(tokenizer: Any) -> None:
    source = (
        "{{ extra if extra is defined }}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    )
    ids = ChatFormat(changed(tokenizer, source)).prompt_ids([QUESTION], extra="<|im_end|>")
    assert ids.count(END_ID) == 1


def test_a_record_carries_its_variables(formats: dict[str, ChatFormat]) -> None:
    fmt = formats["qwen3_6"]
    record = {"messages": [QUESTION, ANSWER], "chat_template_kwargs": {"enable_thinking": False}}
    read = Conversation.from_openai(record)
    assert read.to_openai() == record
    assert fmt.encode_conversation(read) == fmt.encode([QUESTION, ANSWER], enable_thinking=False)
    assert fmt.encode_many([read, Conversation(read.messages)]) == [
        fmt.encode([QUESTION, ANSWER], enable_thinking=False),
        fmt.encode([QUESTION, ANSWER]),
    ]


# ------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("name", SWITCHED)
def test_a_thought_that_cannot_be_learnt(formats: dict[str, ChatFormat], name: str) -> None:
    fmt = formats[name]
    value = '{"enable_thinking": true}'
    refusal = (
        "message 1 has a thought, but its prompt ends with an empty one: this chat template does not think here; set"
        f" chat_template_kwargs {value} in the record, --template_kwargs '{value}' for all of them, or remove the"
        " thought"
    )
    with pytest.raises(FormatError) as caught:
        fmt.encode([QUESTION, THOUGHT], enable_thinking=False)
    assert (str(caught.value), caught.value.message) == (refusal, 1)
    (sequence,) = fmt.encode([QUESTION, THOUGHT], enable_thinking=True)
    start, end = sequence.spans[0]
    opened = "" if name == "qwen3" else "<think>\n"
    assert (
        opened + fmt.tokenizer.decode(sequence.input_ids[start:end])
        == "<think>\nwhy\n</think>\n\na<|im_end|>"
    )
    context = [QUESTION, THOUGHT | {"train": False}, QUESTION, ANSWER]
    for sequence in fmt.encode(context, enable_thinking=False):
        assert [sequence.input_ids[a:b] for a, b in sequence.spans] == [[64, END_ID]]


def test_an_inline_thought_is_apart_or_refused(formats: dict[str, ChatFormat]) -> None:
    inline = [QUESTION, ANSWER | {"content": "<think>\nwhy\n</think>\n\na"}]
    for name in SWITCHED:
        fmt = formats[name]
        if name != "qwen3_8":
            assert fmt.encode(inline, enable_thinking=True) == fmt.encode(
                [QUESTION, THOUGHT], enable_thinking=True
            )
            continue
        with pytest.raises(FormatError) as caught:
            fmt.encode(inline)
        assert str(caught.value) == (
            "message 1: a thought stands in the content, where this chat template takes it for text; move it into "
            "reasoning_content"
        )


def test_earlier_thoughts_are_kept_or_dropped_as_the_template_does(formats: dict[str, ChatFormat]) -> None:
    messages = [QUESTION, THOUGHT, QUESTION, ANSWER]
    kept = {
        (name, str(given)): "why" in formats[name].prompt(messages[:3], **given)
        for name, given in (
            ("qwen3", {}),
            ("qwen3_5_think", {}),
            ("qwen3_6", {}),
            ("qwen3_6", {"preserve_thinking": True}),
            ("qwen3_8", {}),
            ("qwen3_8", {"preserve_thinking": False}),
        )
    }
    assert list(kept.values()) == [False, False, False, True, True, False]


def test_the_templates_own_words(formats: dict[str, ChatFormat]) -> None:
    system = {"role": "system", "content": "s"}
    for name in ("qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8"):
        for messages, words in (
            ([system, system, QUESTION, ANSWER], "System message must be at the beginning."),
            ([system, ANSWER], "No user query found in messages."),
        ):
            with pytest.raises(FormatError) as caught:
                formats[name].encode(messages)
            assert str(caught.value) == f"the chat template refuses this conversation: {words}"


PLAIN = (
    "{%- for m in messages %}{% if KEPT %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endif %}{% endfor %}{{ '<|im_start|>assistant\\nBEGUN' if add_generation_prompt }}"
)


def test_a_template_that_leaves_out_a_role(tokenizer: Any) -> None:
    fmt = ChatFormat(changed(tokenizer, PLAIN.replace("KEPT", "m.role != 'system'").replace("BEGUN", "")))
    with pytest.raises(FormatError) as caught:
        fmt.encode([{"role": "system", "content": "s"}, QUESTION, ANSWER])
    assert str(caught.value) == (
        "message 0: the chat template leaves out a message of the role 'system' in this place; move its text into "
        "another message, or correct the template"
    )
    assert len(fmt.encode([QUESTION, ANSWER])) == 1
    first = ChatFormat(
        changed(tokenizer, PLAIN.replace("KEPT", "loop.first or m.role != 'system'").replace("BEGUN", ""))
    )
    with pytest.raises(
        FormatError, match="message 2: the chat template leaves out a message of the role 'system'"
    ):
        first.prompt([QUESTION, ANSWER, {"role": "system", "content": "s"}, QUESTION])
    assert "s<|im_end|>" in first.prompt([{"role": "system", "content": "s"}, QUESTION])


def test_a_reply_that_is_not_what_its_prompt_begins(tokenizer: Any) -> None:
    fmt = ChatFormat(changed(tokenizer, PLAIN.replace("KEPT", "true").replace("BEGUN", "Well, ")))
    with pytest.raises(FormatError) as caught:
        fmt.encode([QUESTION, ANSWER])
    assert str(caught.value) == (
        "message 1: the chat template writes this reply otherwise than its prompt begins it: 'a<|im_end|>\\n' instead"
        " of 'Well, '; change that message"
    )


# -------------------------------------------------------------------------------------------------- empty blocks


@pytest.mark.parametrize(("name", "given"), CASES)
def test_empty_blocks_are_context_where_they_are_ignored(
    formats: dict[str, ChatFormat], name: str, given: Json
) -> None:
    fmt = formats[name]
    tame = Conversation.from_openai(
        {"messages": [QUESTION, ANSWER, QUESTION, ANSWER], "chat_template_kwargs": given}
    )
    (whole,), (ignoring,) = fmt.encode_many([tame]), EmptyThinkIgnored(fmt).encode_many([tame])
    assert [s.input_ids for s in whole] == [s.input_ids for s in ignoring]
    learnt = [s.input_ids[a:b] for s in ignoring for a, b in s.spans]
    assert learnt == [[64, END_ID]] * 2
    thinking = "</think>" not in fmt.prompt([QUESTION], **given) and name in SWITCHED
    blocks = {"qwen3": "<think>\n\n</think>\n\n"}.get(name, "\n</think>\n\n") if thinking else ""
    taught_too = [fmt.tokenizer.decode(s.input_ids[a:b]) for s in whole for a, b in s.spans]
    assert taught_too == [f"{blocks}a<|im_end|>"] * 2
    if thinking:
        thoughtful = Conversation.from_openai(
            {"messages": [QUESTION, THOUGHT], "chat_template_kwargs": given}
        )
        assert EmptyThinkIgnored(fmt).encode_many([thoughtful]) == fmt.encode_many([thoughtful])
    assert EmptyThinkIgnored(fmt).encode_many([tame], "everything") == fmt.encode_many([tame], "everything")


def test_what_a_run_does_with_empty_blocks(formats: dict[str, ChatFormat]) -> None:
    for name, fmt in formats.items():
        thinks = name in SWITCHED and name != "qwen3_5_nothink"
        assert chosen(fmt, None) == ("ignore" if thinks else "learn")
        assert (taught(fmt, None) is fmt) is not thinks
        assert taught(fmt, "learn") is fmt
        assert chosen(fmt, "learn") == "learn"
    own = formats["qwen3"].fingerprint
    tuned = with_variables(formats["qwen3"], {"enable_thinking": False})
    assert len({own, taught(formats["qwen3"], None).fingerprint, tuned.fingerprint}) == 3
    assert chosen(tuned, None) == "learn"
    assert chosen(with_variables(formats["qwen3_5_nothink"], {"enable_thinking": True}), None) == "ignore"


def test_notes_on_thinking(formats: dict[str, ChatFormat]) -> None:
    assert notes(formats["qwen2_5"], None, thoughts=0, conversations=9) == ()
    assert notes(formats["qwen2_5"], None, thoughts=2, conversations=9) == (
        "note: this chat template writes no thoughts: those of 2 conversations are left out",
    )
    assert notes(formats["qwen3_5_nothink"], None, thoughts=2, conversations=9) == (
        "an empty think block before a reply is learnt (--empty_think)",
    )
    assert notes(formats["qwen3"], None, thoughts=2, conversations=9) == (
        "an empty think block before a reply is not learnt, because this chat template thinks by default"
        " (--empty_think)",
        "warning: this chat template thinks by default, but 7 of 9 conversations have no reasoning: the model may"
        " think less after it; or tune it to answer without: --template_kwargs '{\"enable_thinking\": false}'",
    )
    assert notes(formats["qwen3"], "learn", thoughts=9, conversations=9) == (
        "an empty think block before a reply is learnt (--empty_think)",
    )
