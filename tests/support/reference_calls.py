"""The reference calls of a public benchmark: the single-turn questions of the Berkeley Function Calling Leaderboard.

They come out of the wheel that the benchmarks take them from (bfcl-eval, Apache-2.0), fetched once and cached.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import bench_function_calling as bench
from qwen_chat import demo_model
from qwen_chat.conversation import Json, ToolCall

SETS = (
    *("simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple"),
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"),
)
# The leaderboard's words for types, of three programming languages; what is not named here is text.
TYPES = {
    **dict.fromkeys(("dict", "object", "HashMap", "Hashtable"), "object"),
    **dict.fromkeys(("tuple", "array", "Array", "ArrayList", "List", "Queue", "Stack", "Set"), "array"),
    **dict.fromkeys(("integer", "long", "Long", "Integer", "short", "byte", "Bigint", "BigInt"), "integer"),
    **dict.fromkeys(("float", "double", "number", "Double", "Float"), "number"),
    **dict.fromkeys(("boolean", "Boolean", "bool"), "boolean"),
}


@dataclass(frozen=True)
class Question:
    """One question's tools and the calls that answer it, each argument the first value that counts as right."""

    name: str
    tools: list[Json]
    calls: list[ToolCall]


def load() -> list[Question]:
    folder = demo_model.unpacked_wheel(*bench.WHEEL) / "bfcl_eval" / "data"
    found = []
    for name in SETS:
        truths = bench.read_lines(folder / "possible_answer" / f"BFCL_v4_{name}.json")
        answers = {row["id"]: row["ground_truth"] for row in truths}
        for row in bench.read_lines(folder / f"BFCL_v4_{name}.json"):
            tools = [
                {"type": "function", "function": {**function, "parameters": schema(function["parameters"])}}
                for function in row["function"]
            ]
            calls = [
                ToolCall(called, json.dumps(arguments(values), ensure_ascii=False))
                for truth in answers[row["id"]]
                for called, values in truth.items()
            ]
            found.append(Question(row["id"], tools, calls))
    return found


def schema(given: Mapping[str, Any]) -> Json:
    """The leaderboard's description of a value as JSON Schema."""
    found: Json = {"type": TYPES.get(str(given.get("type")), "string")}
    if isinstance(given.get("items"), dict):
        found["items"] = schema(given["items"])
    if isinstance(given.get("properties"), dict):
        found["properties"] = {name: schema(value) for name, value in given["properties"].items()}
    return found


def arguments(values: Mapping[str, Any]) -> Json:
    """The first of each argument's values; one that may be left out, and has no other, is left out."""
    chosen = {key: bench.first(value) if isinstance(value, list) else value for key, value in values.items()}
    return {key: plain(value) for key, value in chosen.items() if value != ""}


def plain(value: Any) -> Any:
    """Inside an object every value is again a list of choices, in most sets."""
    if isinstance(value, dict):
        return arguments(value)
    return [plain(entry) for entry in value] if isinstance(value, list) else value
