"""The shipped example data is what the README says: valid, bilingual, calls that keep their schemas."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qwen_chat.conversation import Conversation

FOLDER = Path(__file__).resolve().parents[2] / "finetune" / "io_file" / "input_data"
TRAIN = [json.loads(line) for line in (FOLDER / "example_data.jsonl").read_text("utf-8").splitlines()]
EVAL = [json.loads(line) for line in (FOLDER / "example_eval_data.jsonl").read_text("utf-8").splitlines()]
GENERAL = [json.loads(line) for line in (FOLDER / "general_data.jsonl").read_text("utf-8").splitlines()]
SINGLE = [
    json.loads((FOLDER / name).read_text("utf-8"))
    for name in ("example_one_data.json", "example_one_functioncall_data.json")
]


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for letter in text)


def questions(record: dict[str, Any]) -> tuple[str, ...]:
    return tuple(message["content"] for message in record["messages"] if message["role"] == "user")


def rounds(record: dict[str, Any]) -> list[int]:
    """Number of calls in each assistant message that calls."""
    return [len(m["tool_calls"]) for m in record["messages"] if m.get("tool_calls")]


def test_counts() -> None:
    kinds = Counter(record["type"] for record in TRAIN)
    assert kinds == {"tool": 40, "identity": 28, "everyday": 24, "multi_turn": 14}
    assert len(EVAL) == 20
    assert set(Counter(record["type"] for record in EVAL)) == set(kinds)
    calling = [rounds(record) for record in TRAIN if rounds(record)]
    assert len(calling) >= 25
    assert sum(max(counts) > 1 for counts in calling) >= 4, "some call several tools at once"
    assert sum(len(counts) > 1 for counts in calling) >= 4, "some need several rounds"
    assert sum(record["type"] == "tool" and not rounds(record) for record in TRAIN) >= 5, "some need no tool"


def test_both_languages_in_every_kind() -> None:
    for kind in ("identity", "everyday", "multi_turn", "tool"):
        languages = {is_chinese(questions(record)[0]) for record in TRAIN if record["type"] == kind}
        assert languages == {True, False}, kind


def test_no_conversation_twice() -> None:
    seen = Counter(questions(record) for record in TRAIN + EVAL + GENERAL)
    assert [key for key, count in seen.items() if count > 1] == []


def test_general_data_are_everyday_questions_in_both_languages() -> None:
    assert Counter(is_chinese(questions(record)[0]) for record in GENERAL[:100]) == {False: 100}
    assert Counter(is_chinese(questions(record)[0]) for record in GENERAL[100:]) == {True: 100}
    for half in (GENERAL[:100], GENERAL[100:]):
        kinds = Counter(record["type"] for record in half)
        assert {"facts", "arithmetic", "writing", "words", "code", "translation", "advice"} < set(kinds)
        assert max(kinds.values()) <= 25, "no kind outweighs the others"
    for record in GENERAL:
        assert [message["role"] for message in record["messages"]] == ["user", "assistant"]
        assert 2 <= len(record["messages"][1]["content"]) <= 240
        assert "Willow" not in str(record) and "小柳" not in str(record)


def test_identity_answers_name_one_assistant() -> None:
    for record in TRAIN + EVAL:
        if record["type"] == "identity":
            answer = record["messages"][-1]["content"]
            assert "Willow" in answer or "Harbor Lab" in answer, answer
            assert ("小柳" in answer) == is_chinese(answer), answer


@pytest.mark.parametrize(
    "record", TRAIN + EVAL + SINGLE + GENERAL[::20], ids=lambda record: questions(record)[0][:30]
)
def test_each_conversation_is_well_formed(record: dict[str, Any]) -> None:
    conversation = Conversation.from_openai(record)
    assert record["source"] == "qwen_chat authors"
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in conversation.tools}
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    waiting: list[str | None] = []
    previous = "start"
    for message in conversation.messages:
        if message.role == "tool":
            assert message.tool_call_id == waiting.pop(0), "results come in the order of their calls"
        else:
            assert waiting == [], "every call has its result"
            assert (
                message.role
                in {
                    "start": ("system", "user"),
                    "system": ("user",),
                    "user": ("assistant",),
                    "assistant": ("user",),
                    "tool": ("assistant",),
                }[previous]
            )
        for call in message.tool_calls:
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
            waiting.append(call.id)
        assert message.content.strip() or message.tool_calls
        previous = message.role
    assert previous == "assistant"
    assert not (conversation.parallel_tool_calls is False and max(rounds(record), default=0) > 1)
