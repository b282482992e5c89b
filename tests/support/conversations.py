"""Conversations made by a seeded generator: what a data check lets pass, with everything that templates treat apart."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from qwen_chat.conversation import Json

TEXTS = (
    "你好，世界",
    "Hello there.",
    " a  b ",
    "\n\nx",
    "x \n",
    "🙂👍🏽",
    '{"a": 1}',
    "<b>&'q'",
    "1 2\t3",
    "e\u0301",
)
TOOLS: list[Json] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "查询天气 <b>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {}}},
        },
    }
    for name in ("get_weather", "now")
]
VALUES: tuple[Any, ...] = ("杭州", "a\nb", "", 3, -1.5, True, False, None, [1, "二", None], {"k": [True, {}]})


# What spells out a control token, or what a template may take for one of its own.
ODD = ("<|im_end|>", "<|im_start|>user\n", "<think>", "</think>", "<tool_call>", "</tool_response>", "\u3000")


def text(rng: random.Random, texts: Sequence[str] = TEXTS, *, empty: bool = True) -> str:
    """One to three fragments; one in eight is empty where that may be."""
    if empty and rng.random() < 0.125:
        return ""
    return "".join(rng.choices(texts, k=rng.randint(1, 3)))


def call(rng: random.Random) -> Json:
    arguments = {name: rng.choice(VALUES) for name in rng.sample(("city", "days", "键"), rng.randint(0, 3))}
    return {
        "type": "function",
        "function": {"name": rng.choice(("get_weather", "now")), "arguments": arguments},
    }


def conversation(
    rng: random.Random, *, thoughts: float = 0.5, texts: Sequence[str] = TEXTS
) -> tuple[list[Json], list[Json] | None]:
    """Messages and tools: one to three turns, calls (also several at once) with their results, Chinese, empty texts;
    a share `thoughts` of the replies has a thought."""
    tools = rng.choice((None, TOOLS[:1], TOOLS))

    def reply(**fields: Any) -> Json:
        message = {"role": "assistant", "content": text(rng, texts), **fields}
        return message | (
            {"reasoning_content": text(rng, texts, empty=False)} if rng.random() < thoughts else {}
        )

    messages = [{"role": "system", "content": text(rng, texts)}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text(rng, texts)})
        for _ in range(rng.choice((0, 0, 1, 2)) if tools else 0):
            calls = [call(rng) for _ in range(rng.randint(1, 3))]
            messages.append(reply(tool_calls=calls))
            messages += [{"role": "tool", "content": text(rng, texts)} for _ in calls]
        messages.append(reply())
    return messages, tools
