"""More lessons from the same questions: rewritten copies of function-calling conversations.

In: training lines as bench_function_calling.py writes them (a question, functions, one call or a refusal).
Out: further lines that differ in what a model must read off and not remember: values that the question names
are exchanged for others of the same property, in question and call alike; properties and functions change
their order; some questions get a function of another question beside theirs; and some lose theirs to it, so
that the right reply is a refusal. Only the lines given are drawn on. Seeded: the same lines give the same
copies.
"""

import copy
import json
import random
import re
from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]

BESIDE = 0.25  # share of questions that get one more function
WITHOUT = 0.2  # share of questions that are asked again without a function that fits


def passes(records: Sequence[Json], count: int, refusals: Sequence[str], seed: int = 0) -> list[Json]:
    """`count` passes over the records, the first as they are; each with its share of refusals."""
    found = []
    for number in range(count):
        writer = Writer(records, refusals, random.Random(f"{seed} {number}"))
        lines = list(records) if number == 0 else [writer.rewritten(record) for record in records]
        lines += writer.refused()
        writer.rng.shuffle(lines)
        found += lines
    return found


class Writer:
    """Rewrites records with values and functions of others among them."""

    def __init__(self, records: Sequence[Json], refusals: Sequence[str], rng: random.Random) -> None:
        self.records = records
        self.refusals = refusals
        self.rng = rng
        self.functions = [tool for record in records for tool in record["tools"]]
        self.values: dict[str, list[str]] = {}  # of a property, as questions name them
        for record in records:
            for name, value in arguments_of(record).items():
                if isinstance(value, str) and value in question_of(record):
                    self.values.setdefault(name, []).append(value)

    def rewritten(self, record: Json) -> Json:
        made = copy.deepcopy(record)
        self._exchange(made)
        for tool in made["tools"]:
            self._reorder(tool["function"]["parameters"])
        if made["messages"][-1].get("tool_calls"):
            arguments = arguments_of(made)
            order = list(called(made)["parameters"]["properties"])
            write_arguments(made, {name: arguments[name] for name in sorted(arguments, key=order.index)})
            if self.rng.random() < BESIDE:
                made["tools"].append(self._other(made))
        self.rng.shuffle(made["tools"])
        return made

    def refused(self) -> list[Json]:
        """Questions with a function of another in place of their own, and a refusal."""
        found = []
        for record in self.records:
            if record["messages"][-1].get("tool_calls") and self.rng.random() < WITHOUT:
                reply = {"role": "assistant", "content": self.rng.choice(self.refusals)}
                found.append(
                    {
                        "type": "no_call",
                        "source": record["source"],
                        "messages": [*record["messages"][:-1], reply],
                        "tools": [self._other(record)],
                    }
                )
        return found

    def _other(self, record: Json) -> Json:
        """A function that none of the record's resembles by name."""
        known = {word for tool in record["tools"] for word in words(tool["function"]["name"])}
        strangers = [tool for tool in self.functions if not known & words(tool["function"]["name"])]
        return copy.deepcopy(self.rng.choice(strangers))

    def _reorder(self, parameters: Json) -> None:
        names = list(parameters.get("properties", ()))
        self.rng.shuffle(names)
        if names:
            parameters["properties"] = {name: parameters["properties"][name] for name in names}

    def _exchange(self, made: Json) -> None:
        """Other values for the arguments that the question names once."""
        arguments = arguments_of(made)
        for name, value in arguments.items():
            told = "enum" not in called(made)["parameters"]["properties"][name]
            alone = sum(other == value for other in arguments.values()) == 1
            if told and alone and not isinstance(value, bool):
                new = self._other_value(name, value)
                if new is not None and replace_once(made, str(value), str(new)):
                    arguments[name] = new
        if arguments:
            write_arguments(made, arguments)

    def _other_value(self, name: str, value: Any) -> Any:
        if isinstance(value, int):
            return self._other_number(value)
        if isinstance(value, str) and len(value) > 2:
            others = [other for other in self.values.get(name, ()) if other != value]
            return self.rng.choice(others) if others else None
        return None

    def _other_number(self, value: int) -> int | None:
        if 1900 <= value <= 2100:
            return value + self.rng.choice((-3, -2, -1, 1, 2))
        if value < 2:
            return None  # one and none are words, counts and switches
        digits = len(str(value))
        return self.rng.randint(max(2, 10 ** (digits - 1)), 10**digits - 1)


def words(name: str) -> set[str]:
    return {word for word in re.split(r"[._]", name.lower()) if len(word) > 3}


def question_of(record: Json) -> str:
    return str(record["messages"][-2]["content"])


def called(record: Json) -> Json:
    """The function that the record calls."""
    name = record["messages"][-1]["tool_calls"][0]["function"]["name"]
    found: Json = next(t["function"] for t in record["tools"] if t["function"]["name"] == name)
    return found


def arguments_of(record: Json) -> Json:
    calls = record["messages"][-1].get("tool_calls") or [{"function": {"arguments": "{}"}}]
    found: Json = json.loads(calls[0]["function"]["arguments"])
    return found


def write_arguments(record: Json, arguments: Json) -> None:
    text = json.dumps(arguments, ensure_ascii=False)
    record["messages"][-1]["tool_calls"][0]["function"]["arguments"] = text


def replace_once(record: Json, old: str, new: str) -> bool:
    """Exchange a value in the question where it stands there exactly once, as a word of its own."""
    place = re.compile(rf"(?<![\w.,/^-]){re.escape(old)}(?![\w/^%-]|[.,]\d)")
    question = question_of(record)
    if len(place.findall(question)) != 1 or question.count(old) != 1:
        return False
    record["messages"][-2]["content"] = place.sub(lambda _: new, question)
    return True
