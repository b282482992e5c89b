"""The rules that a conversation must keep to be learnt.

In: a Conversation. Out: everything that is wrong with it, each as `field: found; expected`. Messages are
counted from 0.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

from qwen_chat.conversation import Conversation, Json, Message, ToolCall
from qwen_chat.data.source import DEEPEST, counted, strict_json
from qwen_chat.tools.validate import call_problem

_FOLLOWS: dict[str, tuple[str, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_BESIDE = ("system", "tools", "chat_template_kwargs")  # what a plain record has not


def check(conversation: Conversation) -> list[str]:
    """Everything that keeps a conversation from being learnt."""
    if conversation.document is not None:
        return [] if conversation.document.strip() else ["text is empty; expected a document"]
    messages = conversation.messages
    order = order_problem(tuple(message.role for message in messages))
    found = [order] if order else list(result_problems(messages))
    for k, message in enumerate(messages):
        supervised = message.role == "assistant" and message.train is not False
        if supervised and not message.tool_calls and not message.content.strip():
            found.append(f"message {k} is an empty reply; expected text or tool_calls")
    found.extend(tool_problems(conversation))
    return found


def plain_turns(record: object) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Roles and texts of a record that is good at a glance, or None where `check` must look.

    The commonest record is a list of roles and texts, no text blank, no tools and no results: of the rules,
    only that of their order applies to it. It is read three times as fast as by way of a Conversation.
    """
    if type(record) is not dict or any(map(record.get, _BESIDE)):
        return None
    try:
        messages = record["messages"]
        roles = tuple([message["role"] for message in messages])
        texts = tuple([message["content"] for message in messages])
        # Each has both keys, so that twice as many keys as messages are these two alone.
        plain = sum(map(len, messages)) == 2 * len(roles) and not any(map(str.isspace, texts))
        good = plain and "" not in texts and "tool" not in roles and order_problem(roles) is None
    except (KeyError, TypeError):
        return None
    return (roles, texts) if good else None


@lru_cache(1024)
def order_problem(roles: tuple[str, ...]) -> str | None:
    """The first message that cannot stand where it stands; the rest would only repeat it."""
    previous = ""
    for k, role in enumerate(roles):
        allowed = _FOLLOWS[previous]
        if role not in allowed:
            after = f" after '{previous}'" if previous else ", the first one"
            return f"message {k} is '{role}'{after}; expected {' or '.join(map(repr, allowed))}"
        previous = role
    if previous != "assistant":
        return (
            f"message {len(roles) - 1}, the last one, is '{previous}'; expected 'assistant', a reply to learn"
        )
    return None


def result_problems(messages: Sequence[Message]) -> Iterator[str]:
    """Results answer calls one to one, in the calls' order: order alone links them in the rendered text."""
    for k, message in enumerate(messages):
        if message.role != "assistant" or k + 1 == len(messages):
            continue
        end = k + 1
        while end < len(messages) and messages[end].role == "tool":
            end += 1
        if end - k - 1 == len(message.tool_calls):
            yield from _link_problems(k, message.tool_calls, messages[k + 1 : end])
        else:
            yield (
                f"message {k} has {counted(len(message.tool_calls), 'tool call')} and "
                f"{counted(end - k - 1, 'result')} after it; "
                "expected one 'tool' message for each call, in order"
            )


def _link_problems(k: int, calls: Sequence[ToolCall], results: Sequence[Message]) -> Iterator[str]:
    """The ids and names of message `k`'s calls and of the results after it, where they are given."""
    identities = [call.id for call in calls if call.id is not None]
    if len(set(identities)) < len(identities):
        yield f"message {k}: two tool_calls have the same id; expected an id of its own for each"
    for i, (call, result) in enumerate(zip(calls, results, strict=True)):
        where = f"message {k + 1 + i}"
        if call.id is not None and result.tool_call_id is not None and call.id != result.tool_call_id:
            known = result.tool_call_id in identities
            cure = "put the results in the calls' order" if known else "correct the id"
            yield f"{where}: tool_call_id {result.tool_call_id!r}; expected {call.id!r}; {cure}"
        elif result.name is not None and result.name != call.name:
            yield f"{where}: result of {result.name!r}; expected that of call {i}, {call.name!r}"


def tool_problems(conversation: Conversation) -> Iterator[str]:
    """Calls of tools that were offered, with arguments that are valid under the tool's JSON Schema."""
    tools = conversation.tools
    if is_deeper(tools, DEEPEST):
        yield f"tools: nested more than {DEEPEST} levels deep; expected a flatter schema"
        return
    for name, count in Counter(tool["function"]["name"] for tool in tools).items():
        if count > 1:
            yield f"tools: {count} tools are called {name!r}; expected one"
    for k, message in enumerate(conversation.messages):
        for i, call in enumerate(message.tool_calls):
            problem = _call_problem(call, tools)
            if problem is not None:
                yield f"message {k}: tool_calls[{i}]: {problem}"


def _call_problem(call: ToolCall, tools: Sequence[Json]) -> str | None:
    try:
        arguments = strict_json(call.arguments)
    except ValueError as error:
        return f"arguments: {error}"
    if is_deeper(arguments, DEEPEST):
        return f"arguments nested more than {DEEPEST} levels deep; expected a flatter object"
    try:
        return call_problem(call, tools)
    except Exception as error:
        # A schema is a program: a broken pattern or "multipleOf": 0 raises anything.
        return f"the schema of {call.name!r} cannot be used ({type(error).__name__}: {error}); correct it"


def is_deeper(value: object, levels: int) -> bool:
    """Whether lists and objects are nested more than `levels` deep: level after level, without recursion."""
    level = [value] if isinstance(value, (list, tuple, dict)) else []
    for _ in range(levels):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (list, tuple, dict))
        ]
    return bool(level)


def is_encodable(conversation: Conversation) -> bool:
    """Whether every text is valid Unicode, arguments included (JSON text that is decoded later)."""
    plain = conversation.to_openai()
    plain["arguments"] = [
        json.loads(call.arguments) for message in conversation.messages for call in message.tool_calls
    ]
    try:
        json.dumps(plain, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
