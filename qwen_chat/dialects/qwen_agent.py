"""Qwen-Agent's function-calling prompt (the flower marks), as plain messages that any ChatML template writes.

In: a conversation with tools, calls and results. Out: system, user and assistant messages without any: the
tools stand in the system text, and one assistant message holds a call, its results and the answer.

So a result stands among the model's own words, and marks in it would be read as them: the end of the result and
a new call. Each is broken by a space after its flower, here, where training and serving both come by.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from qwen_chat.conversation import Conversation, Json, Message
from qwen_chat.dialects.reader import (
    ARGS,
    FUNCTION,
    RESULT,
    RETURN,
    flower_block,
    normalise_arguments,
    write_flower,
)
from qwen_chat.errors import FormatError

_ANSWER = f"\n{RETURN}: "  # after the last result; the model goes on from here
_FLOWER = FUNCTION[0]
_MARK = re.compile("|".join(f"{_FLOWER}(?={mark[1:]})" for mark in (FUNCTION, ARGS, RESULT, RETURN)))
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


def language_of(messages: Sequence[Message]) -> Literal["en", "zh"]:
    """Chinese where the system text or the first question has Chinese characters.

    Only these two are looked at, so that the tools do not change their language in the middle of a
    conversation.
    """
    first = [m for m in messages if m.role == "system"][:1] + [m for m in messages if m.role == "user"][:1]
    return "zh" if any(_CHINESE.search(message.content) for message in first) else "en"


def plain_messages(conversation: Conversation, language: Literal["en", "zh"], parallel: bool) -> list[Json]:
    """The plain messages; FormatError where a tool result follows no call."""
    plain: list[Json] = []
    for k, message in enumerate(conversation.messages):
        if message.role == "tool":
            _add_result(plain, message, k)
        elif message.role == "assistant":
            _add_reply(plain, message)
        else:
            plain.append({"role": message.role, "content": message.content})
    if conversation.tools:
        block = flower_block(conversation.tools, language, parallel)
        if plain[0]["role"] == "system":
            plain[0]["content"] += f"\n\n{block}"
        else:
            plain.insert(0, {"role": "system", "content": block})
    return plain


def is_open(plain: Sequence[Json]) -> bool:
    """Whether the last message is an assistant's that waits for its answer."""
    return bool(plain[-1]["role"] == "assistant" and plain[-1]["content"].endswith(_ANSWER))


def _add_result(plain: list[Json], message: Message, k: int) -> None:
    if not plain or plain[-1]["role"] != "assistant":
        raise FormatError(
            f"message {k} is a tool result with no call before it; expected an assistant's call first", k
        )
    before = plain[-1]["content"].removesuffix(_ANSWER)
    result = _MARK.sub(f"{_FLOWER} ", message.content)
    plain[-1]["content"] = f"{before}\n{RESULT}: {result}{_ANSWER}"


def _add_reply(plain: list[Json], message: Message) -> None:
    goes_on = bool(plain) and is_open(plain)
    text = message.content
    if message.tool_calls:
        calls = write_flower([type(c)(c.name, normalise_arguments(c.arguments)) for c in message.tool_calls])
        text += ("\n" if text or goes_on else "") + calls
    if goes_on:
        plain[-1]["content"] += text
    else:
        plain.append({"role": "assistant", "content": text})
