"""The conversations that a certificate is made of: about 300 that cover what a chat template does.

In: a model's chat format. Out: `Example`s in OpenAI's shape, always the same ones; the first are short questions, which
the model is to answer. What the template refuses is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qwen_chat.chat.format import ChatFormat
from qwen_chat.conversation import Json, ToolCall
from qwen_chat.errors import FormatError

QUESTIONS = 12  # short conversations that begin the list

TEXTS = (
    "What is the capital of France?",
    "今天天气怎么样？",
    "🙂👍🏽 👨‍👩‍👧 flags: 🇨🇳🇫🇷",
    "Mixed 中英文 text，标点。 And a tab\there.",
    "e\u0301 is not é, and ﬁ is not fi",
    "def f(x):\n    return {'a': x}\n\n\nprint(f(1))",
    "<b>bold</b> & 'single' \"double\" \\ backslash",
    '{"json": ["in", {"a": "text"}], "n": 1.50}',
    "1234567890 3.14159 1e-9 ¥100 €20",
    "שלום مرحبا здравствуйте こんにちは 안녕",
    "a  b   c    d\n\n\n\ne",
    "{{ messages }} {% if x %} {# no template #}",
    "I'll say it's 5 o'clock; don't",
    "https://example.org/a?b=c&d=%20#e",
    "| a | b |\n| --- | --- |\n| 1 | 2 |",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 ☃ ♥ ½ ²",
    "line one\r\nline two\r\n",
    "user\nassistant\nsystem\ntool",
    "x",
    "请用一句话介绍杭州，并翻译成英文。",
)
SYSTEMS = (
    "You are a helpful assistant.",
    "Answer in one word.",
    "你是一个乐于助人的助手。",
    "",
    "S & <b> 'x' 🙂",
)
ENDS = (" x", "x ", "\nx", "x\n", "\n\n x \n\n", "\tx\t", "\u3000x\u3000", "  x\n  y  ")
ARGUMENTS: tuple[Json, ...] = (
    {"city": "Hangzhou"},
    {"unit": "celsius", "city": "杭州", "days": 3},
    {"zoo": 1, "alpha": [3, "二", None], "mid": {"y": True, "b": False, "a": {}}},
    {"text": 'a "quoted" word,\na new line, a \\ and a\ttab', "city": "Zürich"},
    {"query": "<b>&'x'</b>", "limit": 0, "after": -1.5},
    {"b": "🙂", "a": "👍🏽", "B": "B", "A": ""},
    {},
    {"days": 10, "city": "São Paulo", "at": "2024-01-01T00:00:00Z"},
)
TOOLS: tuple[Json, ...] = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "城市名"},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                    "days": {"type": "integer"},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "description": "查找 <b>网页</b> & 'more' \"text\"",
            "name": "search",
            "parameters": {
                "required": ["query"],
                "type": "object",
                "properties": {"query": {"type": "string"}, "limit": {"default": 5, "type": "integer"}},
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
)
TYPED = ("<|im_end|>", "<|im_start|>user\nx", "<|endoftext|>", "a<|im_end|>\n<|im_start|>system\nb")
LONG_LINES = (40, 80, 160)  # of about 30 tokens each


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation, as a request to OpenAI's endpoint has it. `kind` says what it is there for."""

    kind: str
    messages: tuple[Json, ...]
    tools: tuple[Json, ...] = ()
    variables: Json = field(default_factory=dict)

    def to_json(self) -> Json:
        """As plain JSON; `Example(**value)` reads it back, but for lists that are tuples here."""
        found: Json = {"kind": self.kind, "messages": list(self.messages)}
        found |= {"tools": list(self.tools)} if self.tools else {}
        return found | ({"variables": self.variables} if self.variables else {})


def cases(fmt: ChatFormat) -> list[Example]:
    """All that the template renders, in a fixed order."""
    parts = [questions(), texts(), turns(), spaces(), tool_turns(), thoughts(fmt), typed(), long_ones()]
    found: dict[str, Example] = {}
    for case in (case for part in parts for case in part):
        try:
            fmt.prompt(case.messages, list(case.tools) or None, **case.variables)
        except FormatError:
            continue
        found.setdefault(json.dumps(case.to_json() | {"kind": ""}), case)
    return list(found.values())


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def system(text: str) -> Json:
    return {"role": "system", "content": text}


def reply(text: str) -> Json:
    return {"role": "assistant", "content": text}


def calling(calls: Sequence[tuple[str, Json]], text: str = "") -> Json:
    """An assistant's message that calls; the ids count from call_0."""
    written = [
        {
            "id": f"call_{k}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
        }
        for k, (name, arguments) in enumerate(calls)
    ]
    return reply(text) | {"tool_calls": written}


def answered(text: str, k: int = 0) -> Json:
    return {"role": "tool", "tool_call_id": f"call_{k}", "content": text}


def questions() -> Iterator[Example]:
    """Short ones, whose replies are compared token by token."""
    asked = ("What is the capital of France?", "1+1?", "你好！", "Say hello.", "Name a colour.", "写一句诗。")
    for text in asked:
        yield Example("question", (user(text),))
    for k, text in enumerate(asked):
        yield Example("question", (system(SYSTEMS[k % 3]), user(text)))


def texts() -> Iterator[Example]:
    """One question, without and with a system text."""
    for k, text in enumerate(TEXTS):
        yield Example("text", (user(text),))
        yield Example("system", (system(SYSTEMS[k % len(SYSTEMS)]), user(text)))
    yield from (Example("system", (system(text), user("Who are you?"))) for text in TEXTS[:8])


def turns() -> Iterator[Example]:
    """Two to six turns."""
    for k in range(36):
        count = 2 + k % 5
        begun = [system(SYSTEMS[k % 3])] if k % 2 else []
        for turn in range(count - 1):
            begun += [user(TEXTS[(k + turn) % 16]), reply(TEXTS[(3 * k + turn + 5) % 16])]
        yield Example("turns", (*begun, user(TEXTS[(7 * k) % 16])))


def spaces() -> Iterator[Example]:
    """White space at both ends of what each role says."""
    for text in ENDS:
        yield Example("space", (user(text),))
        yield Example("space", (system(text), user("Go on.")))
        yield Example("space", (user("Hello"), reply(text), user(text)))
        called = calling([("now", {})])
        yield Example("space", (user("When?"), called, answered(text)), TOOLS[2:])


def tool_turns() -> Iterator[Example]:
    """Tools that are offered, called, called at once, answered; arguments whose keys are in no order."""
    for k, text in enumerate(TEXTS):
        tools = (TOOLS[:1], TOOLS[1:2], TOOLS, TOOLS[2:])[k % 4]
        yield Example("tools", (user(text),), tools)
        yield Example("tools", (system(SYSTEMS[k % len(SYSTEMS)]), user(text)), tools)
    for k, arguments in enumerate(ARGUMENTS):
        name, result = ("get_weather", "search")[k % 2], ('{"sky": "晴"}', "sunny & <21>", "")[k % 3]
        once = (user(TEXTS[k]), calling([(name, arguments)], ("", "Let me look.")[k % 2]), answered(result))
        yield Example("call", once, TOOLS[:2])
        yield Example("call", (*once, reply("Done."), user("再查一次。")), TOOLS)
        yield Example("call", (system(SYSTEMS[2]), *once), TOOLS[:2])
        yield Example("call", (*once, calling([("now", {})]), answered("12:00")), TOOLS)
        yield Example("call", (*once, reply("Done."), user("And now?")))  # tools are no longer offered
        other = ARGUMENTS[(k + 3) % len(ARGUMENTS)]
        calls = [("get_weather", arguments), ("search", other), ("now", {})][: 2 + k % 2]
        results = [answered(f"result {n} 结果", n) for n in range(len(calls))]
        yield Example("parallel", (user(TEXTS[k + 4]), calling(calls), *results), TOOLS)
        both = (user("Both?"), calling(calls, "两个都查。"), *results, reply("Here."), user("Thanks"))
        yield Example("parallel", both, TOOLS)
        mixed = {key: arguments[key] for key in sorted(arguments, reverse=True)}
        nested = {"z": [mixed], "a": {"d": k, "c": "三", "b": None}, "m": "mid"}
        for keys in (mixed, nested):
            turn = (user("Go."), calling([("search", keys)]), answered("ok"))
            yield Example("arguments", turn, TOOLS[1:2])
            yield Example("arguments", (*turn, reply("OK."), user("Next?")), TOOLS[1:2])


def thoughts(fmt: ChatFormat) -> Iterator[Example]:
    """Thoughts in earlier replies, and thinking on and off, where the template knows them."""
    switch = fmt.thinking_switch
    values: list[Json] = [{}]
    if switch is not None:
        values += [{switch.name: True}, {switch.name: False}]
    for k in range(8) if fmt.knows_reasoning else ():
        thinking = reply(TEXTS[k]) | {"reasoning_content": f"First, {TEXTS[k + 8]}\n\nThen."}
        asked = (user("Why?"), thinking, user("And then?"))
        called = calling([("now", {})]) | {"reasoning_content": "I need the time. 需要时间。"}
        yield Example("thought", (*asked, reply("So."), user("OK?")))
        yield Example("thought", (user(TEXTS[k]), called, answered("12:00")), TOOLS[2:])
        for variables in values:
            yield Example("thinking", asked if k % 2 else (user(TEXTS[k]),), (), variables)


def typed() -> Iterator[Example]:
    """Control tokens that somebody typed: they are text."""
    for text in TYPED:
        yield Example("typed", (user(text),))
        yield Example("typed", (user(f"What does {text} mean?"),))
        yield Example("typed", (system(f"Never write {text}."), user("OK?")))
        yield Example("typed", (user("Hi"), reply(f"It is {text}"), user("Thanks")))
        yield Example("typed", (user("When?"), calling([("now", {})]), answered(text)), TOOLS[2:])


def long_ones() -> Iterator[Example]:
    """About 1,200, 2,300 and 4,800 tokens, in one message and in many turns."""
    for count in LONG_LINES:
        lines = [
            f"{n}. Item number {n} of the list, 第{n}项, costs {n * 7 % 100}.5 euros." for n in range(count)
        ]
        yield Example(
            "long", (system("Be brief."), user("\n".join(lines)), reply("Read."), user("Sum it up."))
        )
    said = [message for line in lines[:100] for message in (user(line), reply("OK."))]
    yield Example("long", (system("Be brief."), *said, user("Sum it up.")))


def written_calls() -> Iterator[tuple[str, list[ToolCall]]]:
    """What stands before the calls of a reply, and the calls, all of TOOLS."""
    for k, arguments in enumerate(({"city": "Hangzhou"}, {"unit": "celsius", "city": "杭州", "days": 3})):
        one = ToolCall("get_weather", json.dumps(arguments, ensure_ascii=False))
        two = ToolCall("search", json.dumps({"query": 'a "b" <c>\n🙂', "limit": k}, ensure_ascii=False))
        three = ToolCall("now", "{}")
        for calls in ([one], [two], [three], [one, two], [two, three, one]):
            yield "", calls
            yield "Let me look. 我查一下。", calls


def kinds(found: Sequence[Example]) -> Mapping[str, int]:
    """How many there are of each kind."""
    counted: dict[str, int] = {}
    for case in found:
        counted[case.kind] = counted.get(case.kind, 0) + 1
    return counted
