"""The kinds of record that hold a conversation or a document, told apart by their keys; all other keys are ignored.

In: one parsed record. Out: its kind and its Conversation. A list or an object may also be JSON text, as in a table.

    openai             {"messages": [...], "system": ..., "tools": [...], "parallel_tool_calls": true,
                        "chat_template_kwargs": {...}}
    sharegpt           {"conversations": [{"from": "human", "value": ...}, ...], "system": ..., "tools": ...}
    alpaca             {"instruction": ..., "input": ..., "output": ..., "history": [[q, a], ...]}
    prompt_completion  {"prompt": ..., "completion": ...}, each text or a list of messages; also "response"
    text               {"text": ...}: a document, every token of which is learnt
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_chat.conversation import Conversation, Json
from qwen_chat.data.source import strict_json
from qwen_chat.data.tables import EXPECTED
from qwen_chat.errors import FormatError

Record = Mapping[str, Any]

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_VARIABLES = "an object: the template's variables and values"
_NEEDS_CONTENT = ("system", "user", "tool")  # a message of these is nothing without its content


def read_record(record: object) -> tuple[str, Conversation]:
    """The kind of a parsed record and its conversation; FormatError says what is wrong with it."""
    if not isinstance(record, Mapping):
        raise FormatError(f"{shortened(record)}; expected one JSON object, a conversation")
    if "messages" in record:
        return "openai", _conversation(record, _parsed(record, "messages", "a list of messages"))
    if "conversations" in record:
        return "sharegpt", _conversation(record, sharegpt_messages(record))
    if "instruction" in record:
        return "alpaca", _conversation(record, alpaca_messages(record))
    if "prompt" in record and ("completion" in record or "response" in record):
        return "prompt_completion", _conversation(record, prompt_messages(record))
    if "text" in record:
        if not isinstance(record["text"], str):
            raise FormatError(f"text: {shortened(record['text'])}; expected text, a document")
        return "text", Conversation((), document=record["text"])
    raise FormatError(f"no conversation among {_keys(record)}; expected {EXPECTED}")


def sharegpt_messages(record: Record) -> object:
    """OpenAI's messages of a ShareGPT record; what is no list of turns comes back as it is."""
    turns = _parsed(record, "conversations", "a list of turns")
    if not isinstance(turns, list):
        return turns
    if turns and isinstance(turns[0], dict) and "role" in turns[0]:
        return turns  # OpenAI's messages under ShareGPT's name
    messages: list[Json] = []
    for k, turn in enumerate(turns):
        message = _sharegpt_message(turn, f"conversations[{k}]")
        if "tool_calls" in message and messages and messages[-1].get("tool_calls"):
            messages[-1]["tool_calls"] += message["tool_calls"]  # one call a turn there, one reply here
        else:
            messages.append(message)
    return messages


def _sharegpt_message(turn: object, where: str) -> Json:
    if not isinstance(turn, Mapping) or "value" not in turn:
        raise FormatError(f"{where}: {shortened(turn)}; expected an object with 'from' and 'value'")
    origin, value = turn.get("from"), turn["value"]
    role = SHAREGPT_ROLES.get(origin) if isinstance(origin, str) else None
    if role is None:
        raise FormatError(f"{where}: from {origin!r}; expected one of {', '.join(SHAREGPT_ROLES)}")
    message: Json = {"role": role, "content": value}
    if origin == "function_call":
        if isinstance(value, str):
            try:
                value = strict_json(value)
            except (ValueError, RecursionError) as error:
                raise FormatError(f"{where}: function_call is no JSON ({error}); expected a call") from None
        calls = value if isinstance(value, list) else [value]
        message["content"] = ""
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    kept = ("train", "weight", "reasoning_content", "reasoning")
    return message | {key: turn[key] for key in kept if key in turn}


def alpaca_messages(record: Record) -> list[Json]:
    """OpenAI's messages of an Alpaca record."""
    messages: list[Json] = []
    history = _parsed(record, "history", "a list of pairs") or []
    if not isinstance(history, list) or any(not isinstance(p, list) or len(p) != 2 for p in history):
        raise FormatError("history: no list of pairs; expected [[question, answer], ...]")
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question, extra = record["instruction"], record.get("input") or ""
    if not isinstance(question, str) or not isinstance(extra, str):
        raise FormatError("instruction and input: expected text")
    if "output" not in record:
        raise FormatError("no 'output' beside 'instruction'; expected the reply")
    messages.append({"role": "user", "content": "\n".join(filter(None, (question, extra)))})
    messages.append({"role": "assistant", "content": record["output"]})
    return messages


def prompt_messages(record: Record) -> list[Any]:
    """OpenAI's messages of a prompt and its completion, each text or a list of messages."""
    prompt = record["prompt"]
    completion = record["completion"] if "completion" in record else record["response"]
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    after = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    return [*before, *after]


def _with_system(record: Record, messages: object) -> object:
    """The messages behind the record's own system text; FormatError where they begin with another."""
    system = record.get("system")
    if not system or not isinstance(messages, list):
        return messages
    if not isinstance(system, str):
        raise FormatError(f"system: {shortened(system)}; expected text")
    first = messages[0] if messages else None
    if not isinstance(first, Mapping) or first.get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    if first.get("content") != system:
        raise FormatError(
            "system: another text than that of the system message that the messages begin with; leave one of them out"
        )
    return messages


def _conversation(record: Record, messages: object) -> Conversation:
    messages = _with_system(record, messages)
    for k, message in enumerate(messages if isinstance(messages, list) else ()):
        if (
            isinstance(message, Mapping)
            and "content" not in message
            and message.get("role") in _NEEDS_CONTENT
        ):
            raise FormatError(f"message {k}: no 'content' among {_keys(message)}; expected text", k)
    tools = _parsed(record, "tools", "a list of tools")
    return Conversation.from_openai(
        {
            "messages": messages,
            "tools": unwrapped_tools(tools) if tools else None,
            "parallel_tool_calls": _parsed(record, "parallel_tool_calls", "true or false"),
            "chat_template_kwargs": _parsed(record, "chat_template_kwargs", _VARIABLES),
        }
    )


def _parsed(record: Record, key: str, expected: str) -> object:
    """A record's value; where it is text, the JSON in it. None where there is none."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return strict_json(value.lower() if value.isalpha() else value)  # TRUE, as spreadsheets write it
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{key}: text that is no JSON ({error}); expected {expected}") from None


def unwrapped_tools(tools: object) -> object:
    """OpenAI's list, also of functions without their wrapper."""
    if not isinstance(tools, list):
        return tools
    return [
        {"type": "function", "function": tool} if isinstance(tool, dict) and "function" not in tool else tool
        for tool in tools
    ]


def _keys(record: Record) -> str:
    return ", ".join(repr(key) for key in list(record)[:8]) or "no keys"


def shortened(value: object) -> str:
    """A value for a message: at most 40 characters of it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
