"""Rewritten copies of function-calling lines: other values in question and call alike, and nothing else."""

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.call_variants import passes
from qwen_chat.conversation import Conversation
from qwen_chat.tool_schema import check_call

Json = dict[str, Any]
REFUSALS = ("No function does that.",)


def record(question: str, name: str, properties: Json, arguments: Json | None) -> Json:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    tool = {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}
    reply: Json = {"role": "assistant", "content": REFUSALS[0]}
    if arguments is not None:
        function = {"name": name, "arguments": json.dumps(arguments)}
        reply = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": function}],
        }
    return {
        "source": question[:8],
        "messages": [{"role": "user", "content": question}, reply],
        "tools": [tool],
    }


CITY = {"city": {"type": "string"}, "days": {"type": "integer"}}
AREA = {"base": {"type": "integer"}, "unit": {"type": "string", "enum": ["cm", "inch"]}}
TEAM = {"city": {"type": "string"}, "year": {"type": "integer"}}
RECORDS = [
    record("How is the weather in Boston for 5 days?", "weather_of", CITY, {"city": "Boston", "days": 5}),
    record("What is the area over a base of 14 cm?", "area_over", AREA, {"base": 14, "unit": "cm"}),
    record("Who led the team of Osaka in 2016?", "leader_of", TEAM, {"city": "Osaka", "year": 2016}),
    record("Sing me a song.", "plan_route", CITY, None),
]


def call_of(made: Json) -> Json | None:
    calls = made["messages"][-1].get("tool_calls")
    return json.loads(calls[0]["function"]["arguments"]) if calls else None


def many() -> Sequence[Json]:
    return passes(RECORDS, 40, REFUSALS)


def test_the_first_pass_is_the_questions_as_they_are() -> None:
    made = passes(RECORDS, 1, REFUSALS)
    kept = [one for one in made if one in RECORDS]
    assert sorted(kept, key=json.dumps) == sorted(RECORDS, key=json.dumps)


def test_the_same_lines_give_the_same_copies_and_stay_as_they_were() -> None:
    before = json.dumps(RECORDS)
    assert many() == many()
    assert json.dumps(RECORDS) == before


def test_values_change_in_question_and_call_alike() -> None:
    seen: set[str] = set()
    for made in many():
        arguments = call_of(made)
        question = made["messages"][0]["content"]
        for value in (arguments or {}).values():
            assert str(value) in question
            seen.add(str(value))
    assert {"Boston", "Osaka", "2016", "14"} < seen  # the first pass; and others beside them
    assert len(seen) > 12
    assert seen & {"2013", "2014", "2015", "2017", "2018", "2019"}


def test_a_value_among_fixed_ones_is_left_alone() -> None:
    units = {arguments["unit"] for made in many() if (arguments := call_of(made)) and "unit" in arguments}
    assert units == {"cm"}


def test_every_call_fits_the_function_it_names_in_the_order_of_its_schema() -> None:
    for made in many():
        arguments = call_of(made)
        call = Conversation.from_openai(made).messages[-1].tool_calls
        if arguments is None:
            assert not call
            continue
        assert check_call(call[0], made["tools"]) is None
        schema = next(t["function"] for t in made["tools"] if t["function"]["name"] == call[0].name)
        order = list(schema["parameters"]["properties"])
        assert list(arguments) == sorted(arguments, key=order.index)


def test_a_refusal_has_no_function_of_its_own_question() -> None:
    own = {one["source"]: one["tools"][0]["function"]["name"] for one in RECORDS if call_of(one)}
    refused = [made for made in many() if made["source"] in own and call_of(made) is None]
    assert refused
    for made in refused:
        assert own[made["source"]] not in {tool["function"]["name"] for tool in made["tools"]}
        assert made["messages"][-1]["content"] in REFUSALS


def test_some_questions_get_company_and_orders_differ() -> None:
    calls = [made for made in many() if call_of(made)]
    assert {len(made["tools"]) for made in calls} == {1, 2}
    orders = {tuple(call_of(made) or ()) for made in calls if "days" in (call_of(made) or ())}
    assert orders == {("city", "days"), ("days", "city")}
