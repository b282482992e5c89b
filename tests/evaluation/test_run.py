"""Scores and figures on hand-made replies; exact values throughout. The part that runs a model is below."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from qwen_chat.chat.format import Prompt
from qwen_chat.conversation import Conversation
from qwen_chat.dialects.hermes import Hermes
from qwen_chat.errors import FormatError, ServiceError
from qwen_chat.evaluation.cases import Case, Wanted, cases_of
from qwen_chat.evaluation.run import Kept, fitting, judge, sequence_losses, write_replies
from qwen_chat.evaluation.scores import (
    NOTHING,
    Judged,
    SequenceLoss,
    call_figures,
    is_right,
    loss_change,
    loss_figures,
    same_json,
    score,
    summary,
    worst,
)
from qwen_chat.evaluation.statistics import estimate, paired, share


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool("weather", city={"type": "string"}, unit={"enum": ["c", "f"]}),
    tool("add", a={"type": "integer"}, b={"type": "integer"}),
]


def called(name: str, **arguments: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
    }


def case(*calls: dict[str, Any], question: str = "天气?", accepted: Any = None) -> Case:
    reply = {"role": "assistant", "content": "" if calls else "Hi.", "tool_calls": list(calls)}
    record = {"messages": [{"role": "user", "content": question}, reply], "tools": TOOLS}
    accepted = {} if accepted is None else {1: accepted}
    return cases_of(Conversation.from_openai(record), "data.jsonl:1", accepted)[0]


def text(*calls: tuple[str, dict[str, Any]]) -> str:
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': n, 'arguments': a}, ensure_ascii=False)}\n</tool_call>"
        for n, a in calls
    )


PARIS = called("weather", city="Paris", unit="c")
RIGHT = text(("weather", {"unit": "c", "city": "Paris"}))


def test_every_assistant_turn_is_a_case() -> None:
    record = {
        "messages": [
            {"role": "user", "content": "How warm?"},
            {"role": "assistant", "content": "", "tool_calls": [PARIS]},
            {"role": "tool", "content": "21"},
            {"role": "assistant", "content": "21 degrees."},
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": "Not learnt.", "train": False},
            {"role": "user", "content": "谢谢"},
            {"role": "assistant", "content": "不客气"},
        ],
        "tools": TOOLS,
    }
    cases = cases_of(Conversation.from_openai(record), "f:3")
    assert [c.key for c in cases] == ["f:3#1", "f:3#3", "f:3#7"]
    assert [len(c.before) for c in cases] == [1, 3, 7]
    assert [len(c.wanted) for c in cases] == [1, 0, 0]
    assert [c.language for c in cases] == ["en", "en", "zh"]
    assert cases[0].wanted[0] == Wanted("weather", {"city": ["Paris"], "unit": ["c"]})
    del record["tools"]
    assert cases_of(Conversation.from_openai(record), "f:3") == []


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (1, 1.0, True),
        (1, True, False),
        (0, False, False),
        (1, "1", False),
        ("Paris", "paris", False),
        ([1, 2], [2, 1], False),
        ({"a": 1, "b": [True]}, {"b": [True], "a": 1}, True),
        ({"a": 1}, {"a": 1, "b": None}, False),
        (None, False, False),
        ([], {}, False),
    ],
)
def test_values_are_compared_as_json(left: Any, right: Any, equal: bool) -> None:
    assert same_json(left, right) is equal
    assert same_json(right, left) is equal


def test_accepted_answers() -> None:
    wanted = Wanted("w", {"city": ["Paris", "Paris, France"], "unit": ["c"]}, frozenset({"unit"}))
    assert is_right("w", {"city": "Paris, France"}, wanted)
    assert is_right("w", {"unit": "c", "city": "Paris"}, wanted)
    assert not is_right("w", {"city": "Rome"}, wanted)
    assert not is_right("w", {"unit": "c"}, wanted)
    assert not is_right("w", {"city": "Paris", "day": 1}, wanted)
    assert not is_right("v", {"city": "Paris"}, wanted)
    one = case(PARIS, accepted=[{"name": "weather", "arguments": {"city": ["Paris", "巴黎"], "unit": ["c"]}}])
    assert score(one, text(("weather", {"city": "巴黎", "unit": "c"}))).exact


@pytest.mark.parametrize(
    ("accepted", "told"),
    [
        ([], "message 1: accepted; expected a list with one entry for each tool call"),
        ([3], "accepted[0]: expected {"),
        ([{"name": "w", "arguments": {"a": 1}}], "accepted[0]: arguments; expected a list"),
        ([{"name": "w", "arguments": {"a": [1]}, "optional": ["b"]}], "accepted[0]: optional"),
    ],
)
def test_accepted_that_does_not_fit_is_named(accepted: Any, told: str) -> None:
    with pytest.raises(FormatError) as error:
        case(PARIS, accepted=accepted)
    assert told in str(error.value)


def flags(one: Case, written: str) -> dict[str, Any]:
    s = score(one, written)
    return {
        name: getattr(s, name)
        for name in ("right", "written", "valid", "name", "exact", "missing", "false_call", "unparsed")
    }


@pytest.mark.parametrize(
    ("wanted", "written", "expected"),
    [
        ([PARIS], RIGHT, "right=1 written=1 valid=1 name exact"),
        ([PARIS], "Let me see.\n" + RIGHT, "right=1 written=1 valid=1 name exact"),
        ([PARIS], text(("weather", {"city": "Rome", "unit": "c"})), "right=0 written=1 valid=1 name"),
        ([PARIS], text(("weather", {"city": 3, "unit": "c"})), "right=0 written=1 valid=0 name"),
        ([PARIS], text(("add", {"a": 1})), "right=0 written=1 valid=1"),
        ([PARIS], text(("wether", {"city": "Paris", "unit": "c"})), "right=0 written=1 valid=0"),
        ([PARIS], RIGHT + "\n" + RIGHT, "right=1 written=2 valid=2"),
        ([PARIS], "It is warm.", "right=0 written=0 valid=0 missing"),
        ([PARIS], '<tool_call>\n{"name": "weather", "argum', "right=0 written=0 valid=0 missing unparsed"),
        ([], "Hello", "right=0 written=0 valid=0 name exact"),
        ([], RIGHT, "right=0 written=1 valid=1 false_call"),
        (
            [PARIS, called("add", a=1, b=2)],
            text(("add", {"a": 1, "b": 2}), ("weather", {"city": "Paris", "unit": "c"})),
            "right=2 written=2 valid=2 name exact",
        ),
        ([PARIS, PARIS], RIGHT, "right=1 written=1 valid=1"),
    ],
)
def test_scores(wanted: list[dict[str, Any]], written: str, expected: str) -> None:
    found = flags(case(*wanted), written)
    told = {part.partition("=")[0]: int(part.partition("=")[2] or True) for part in expected.split()}
    assert found == {name: told.get(name, 0) for name in found}


def test_matching_is_the_largest_one() -> None:
    """A call that fits two wanted ones must leave the narrower one to the call that fits only that."""
    accepted = [
        {"name": "add", "arguments": {"a": [1, 2]}},
        {"name": "add", "arguments": {"a": [1]}},
    ]
    one = case(called("add", a=1), called("add", a=1), accepted=accepted)
    assert score(one, text(("add", {"a": 1}), ("add", {"a": 2}))).exact
    assert score(one, text(("add", {"a": 2}), ("add", {"a": 1}))).exact
    assert not score(one, text(("add", {"a": 2}), ("add", {"a": 2}))).exact


def judged(wanted: list[dict[str, Any]], written: str, question: str = "?") -> Judged:
    one = case(*wanted, question=question)
    return judge([one], [written])[0]


def value(figures: dict[str, Any], name: str) -> Any:
    return figures[name] and (figures[name]["value"], figures[name]["n"])


def test_summary() -> None:
    both = [PARIS, called("add", a=1, b=2)]
    results = [
        judged([PARIS], RIGHT, "天气"),
        judged([PARIS], text(("add", {"a": 1})), "weather"),
        judged([PARIS], "no", "weather"),
        judged(both, RIGHT, "both"),
        judged([], "hello", "hi"),
        judged([], text(("add", {"b": 1})), "hi"),
    ]
    figures = summary(results)
    assert (figures["turns"], figures["wanted"]) == (6, 4)
    assert value(figures, "exact") == (1 / 4, 4)
    assert value(figures, "name") == (1 / 4, 4)
    assert value(figures, "arguments") == (2 / 5, 4)
    assert value(figures, "parallel") == (0.0, 1)
    assert value(figures, "missing") == (1 / 4, 4)
    assert value(figures, "false_calls") == (1 / 2, 2)
    assert value(figures, "valid") == (3 / 4, 6)
    assert value(figures, "unparsed") == (0.0, 6)
    assert value(figures["languages"]["zh"], "exact") == (1.0, 1)
    assert value(figures["languages"]["zh"], "false_calls") is None
    assert figures["tools"] == {
        "weather": {"n": 4, "exact": 1, "name": 1},
        "add": {"n": 1, "exact": 0, "name": 0},
    }
    assert {(c["wanted"], c["written"]): c["count"] for c in figures["confusion"]} == {
        ("weather", "weather"): 2,
        ("weather", "add"): 1,
        ("weather", NOTHING): 1,
        ("add", NOTHING): 1,
        (NOTHING, NOTHING): 1,
        (NOTHING, "add"): 1,
    }
    assert [w["problems"] for w in worst(results)][:2] == [
        ["not called rightly: weather"],
        ["arguments of 'add': 'a' is a required property", "called without need: add"],
    ]
    assert len(worst(results)) == 4
    assert worst(results, 1)[0]["messages"] == [{"role": "user", "content": "weather"}]


def test_the_interval_is_seeded_and_sane() -> None:
    values = [1.0] * 60 + [0.0] * 40
    found = estimate(values)
    assert found == estimate(values)
    assert found is not None
    assert found.value == 0.6
    # normal approximation: 0.6 +- 1.96 * sqrt(0.24 / 100) = 0.504 .. 0.696
    assert abs(found.low - 0.504) < 0.02
    assert abs(found.high - 0.696) < 0.02
    assert estimate([]) is None
    assert estimate([0.0], [0]) is None
    assert estimate([2.0, 4.0], [1, 3]).value == 1.5  # type: ignore[union-attr]


@pytest.mark.parametrize(("hits", "n"), [(0, 60), (60, 60), (18, 60), (48, 100), (1, 1), (0, 1)])
def test_a_share_of_nothing_or_everything_is_not_certain(hits: int, n: int) -> None:
    """Each bound is the share that would be 1.96 of its own deviations away from what was seen."""
    found = share([1] * hits + [0] * (n - hits))
    assert found is not None
    assert (found.value, found.n) == (hits / n, n)
    assert found.low <= found.value <= found.high
    for bound in {found.low, found.high} - {0.0, 1.0}:
        assert abs(bound - hits / n) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / n), rel=1e-9)
    assert found.high - found.low > 1 / (n + 1)
    if (hits, n) == (0, 60):
        assert found.high == pytest.approx(0.0602, abs=1e-4)


def test_a_share_over_calls_counts_turns() -> None:
    """Three turns, one without a call: two of three calls are right, and two turns say so."""
    found, one_by_one = share([2, 0, 0], [2, 0, 1]), share([1, 1, 0])
    assert found is not None
    assert one_by_one is not None
    assert (found.value, found.n) == (2 / 3, 3)
    assert found.low < one_by_one.low < one_by_one.high < found.high
    assert share([]) is None
    assert share([0, 0], [0, 0]) is None


def test_every_share_of_a_report_is_uncertain() -> None:
    """However sure the few turns look."""
    figures = summary(judge([case(called("weather", city="x"))], ["Hello."]))
    for name in ("exact", "name", "arguments", "missing", "unparsed"):
        assert figures[name]["high"] - figures[name]["low"] > 0.7, name


def test_paired() -> None:
    a, b = [0.0] * 10, [1.0] * 8 + [0.0] * 2
    found = paired(a, b)
    assert found is not None
    assert (found.difference, found.n) == (0.8, 10)
    assert found.p == 2 / 2**8  # eight changes, all the same way
    assert paired([1.0, 0.0], [0.0, 1.0]).p == 1.0  # type: ignore[union-attr]
    same = paired(b, b)
    assert same is not None
    assert (same.difference, same.p) == (0.0, 1.0)
    smaller = paired([2.0] * 12, [1.5 + k / 100 for k in range(12)])
    assert smaller is not None
    assert smaller.p < 0.002  # all twelve lower: 2 / 2**12, by sampled sign flips
    assert paired([], []) is None


def test_loss_figures() -> None:
    figures = loss_figures([SequenceLoss("f:1", 2.0, 2, 1), SequenceLoss("f:2", 1.0, 4, 4)])
    assert figures["loss"]["value"] == 0.5
    assert figures["perplexity"]["value"] == math.exp(0.5)
    assert figures["token_accuracy"]["value"] == 5 / 6
    assert (figures["tokens"], figures["conversations"]) == (6, 2)
    assert loss_figures([])["loss"] is None


def test_a_loss_is_held_against_itself() -> None:
    before = [(6.0, 2), (1.0, 2), (9.0, 4)]
    moved = loss_change(before, [(7.0, 2), (2.0, 2), (11.0, 4)])  # half a nat a token worse, each of them
    assert moved == {
        "conversations": 3,
        "tokens": 8,
        "before": 2.0,
        "after": 2.5,
        "difference": {"value": 0.5, "low": 0.5, "high": 0.5, "n": 3},
    }
    uneven = loss_change(before, [(6.0, 2), (1.0, 2), (13.0, 4)])["difference"]
    assert uneven["value"] == 0.5 and uneven["low"] == 0 and 0.5 < uneven["high"] <= 1
    assert (
        uneven == loss_change(before, [(6.0, 2), (1.0, 2), (13.0, 4)])["difference"]
    )  # the draws are seeded
    alone = loss_change([], [(7.0, 2)])
    assert (alone["before"], alone["after"], alone["difference"]) == (None, 3.5, None)


def test_what_was_kept_survives_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "kept.jsonl"
    kept = Kept(path)
    kept.add("a", "你好")
    kept.add("b", [1.5, 2])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"key": "c", "val')
    again = Kept(path)
    assert ("a" in again, "c" in again, again["b"]) == (True, False, [1.5, 2])
    again.add("c", 3)
    assert Kept(path)["c"] == 3
    assert call_figures([])["exact"] is None


# ------------------------------------------------------------------ running a model


class Sequences:
    """TokenisedData of tests: conversations of tiny sequences."""

    def __init__(self, data: list[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        return self.data[i]

    def where(self, i: int) -> str:
        return f"f:{i + 1}"


def test_losses_are_those_of_each_sequence_alone(tmp_path: Path) -> None:
    import torch

    from tests.support.tiny_models import mixed_data, tiny_model

    model = tiny_model("qwen2", lora=True, attention="sdpa").eval()
    data = Sequences(
        [one for one in mixed_data() if any(label != -100 for s in one for label in s.labels[1:])]
    )
    kept = Kept(tmp_path / "kept.jsonl")
    chosen = list(range(0, len(data), 2))
    seen: list[int] = []
    found = sequence_losses(model, data, chosen, kept, seen.append)
    assert [one.where for one in found] == [f"f:{i + 1}" for i in chosen]
    assert seen == list(range(1, len(chosen) + 1))
    assert model.config._attn_implementation == "sdpa"
    for one, i in zip(found, chosen, strict=True):
        total, tokens, right = 0.0, 0, 0
        for sequence in data[i]:
            with torch.no_grad():
                logits = model(torch.tensor([sequence.input_ids])).logits[0, :-1]
            target = torch.tensor(sequence.labels[1:])
            learnt = target != -100
            total += torch.nn.functional.cross_entropy(logits[learnt], target[learnt], reduction="sum").item()
            tokens += int(learnt.sum())
            right += int((logits[learnt].argmax(-1) == target[learnt]).sum())
        assert (one.tokens, one.right) == (tokens, right)
        assert one.loss == pytest.approx(total, rel=1e-6)
    again = sequence_losses(Forbidden(model), data, chosen, Kept(tmp_path / "kept.jsonl"))
    assert again == found


class Forbidden:
    """A model that must not be run."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        raise AssertionError("what was kept is computed again")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Format:
    """What write_replies needs of a ChatFormat."""

    stop_strings = ("✿RESULT✿",)
    stop_token_ids = (7,)
    call_grammar, text_grammar = Hermes().call_grammar, Hermes().text_grammar

    def __init__(self, in_reasoning: bool = False) -> None:
        self.in_reasoning = in_reasoning

    def render(self, messages: list[dict[str, Any]], tools: Any) -> Prompt:
        assert tools == TOOLS
        return Prompt("", [len(messages[-1]["content"])], self.in_reasoning)


class Echo:
    """An engine that answers with the first prompt token; it dies after a number of batches."""

    def __init__(self, batches: int = 99) -> None:
        self.batches, self.requests = batches, []  # type: ignore[var-annotated]

    def generate(self, requests: list[Any]) -> list[Any]:
        self.batches -= 1
        if self.batches < 0:
            raise KeyboardInterrupt
        self.requests += requests
        return [
            SimpleNamespace(text=str(request.prompt_ids[0]), finish_reason="stop", error=None)
            for request in requests
        ]


def many() -> list[Case]:
    return [replace(case(question="q" * n), key=f"f:{n}#1") for n in range(1, 11)]


@pytest.mark.parametrize("calls", ["free", "strict", "required"])
def test_requests_are_greedy_and_constrained_as_asked(calls: Any) -> None:
    strict = [{**one, "function": {**one["function"], "strict": True}} for one in TOOLS]
    engine = Echo()
    texts = write_replies(engine, Format(), many(), Kept(None), calls=calls, max_tokens=9)
    assert texts == [str(n) for n in range(1, 11)]
    expected = {
        "free": None,
        "strict": Hermes().text_grammar(strict),
        "required": Hermes().call_grammar(TOOLS, parallel=True),
    }
    for request in engine.requests:
        assert (request.temperature, request.max_tokens) == (0.0, 9)
        assert (request.stop, request.stop_token_ids) == (("✿RESULT✿",), (7,))
        assert request.grammar == expected[calls]


def test_a_required_call_comes_after_the_thought_that_its_prompt_begins() -> None:
    engine = Echo()
    write_replies(engine, Format(in_reasoning=True), many(), Kept(None), calls="required")
    after = Hermes().call_grammar(TOOLS, parallel=True).after_thought()
    assert [request.grammar for request in engine.requests] == [after] * 10


def test_replies_go_on_where_they_were_killed(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_replies(Echo(batches=1), Format(), many(), Kept(path), batch=1)
    engine, seen = Echo(), []  # type: ignore[var-annotated]
    texts = write_replies(engine, Format(), many(), Kept(path), batch=1, tick=seen.append)
    assert texts == [str(n) for n in range(1, 11)]
    assert [request.prompt_ids[0] for request in engine.requests] == [5, 6, 7, 8, 9, 10]
    assert seen == [8, 10]


class Failing(Echo):
    """The third reply of each batch fails."""

    def __init__(self, error: str, fault: Literal["request", "engine"]) -> None:
        super().__init__()
        self.error, self.fault = error, fault

    def generate(self, requests: list[Any]) -> list[Any]:
        replies = super().generate(requests)
        if len(replies) > 2:
            replies[2] = SimpleNamespace(text="", finish_reason="error", error=self.error, fault=self.fault)
        return replies


def test_a_reply_that_the_engine_could_not_write_is_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    with pytest.raises(ServiceError, match=r"f:3#1: no reply \(the engine failed: MemoryError\)"):
        write_replies(Failing("the engine failed: MemoryError", "engine"), Format(), many(), Kept(path))
    assert write_replies(Echo(), Format(), many(), Kept(path)) == [str(n) for n in range(1, 11)]


def test_a_grammar_that_leads_nowhere_is_the_replys_own_fault() -> None:
    texts = write_replies(
        Failing("the grammar allows no token here", "request"), Format(), many(), Kept(None)
    )
    assert (texts[1], texts[2]) == ("2", "")


def test_prompts_that_fill_the_context_are_told_apart() -> None:
    class Long(Format):
        def render(self, messages: list[dict[str, Any]], tools: Any) -> Prompt:
            return Prompt("", [0] * len(messages[-1]["content"]), in_reasoning=False)

    assert [one.key for one in fitting(many(), Long(), 6)] == [f"f:{n}#1" for n in range(1, 6)]


def test_a_schema_with_a_loose_end_fits_nothing() -> None:
    tool = {"type": "function", "function": {"name": "w", "parameters": {"$ref": "#/$defs/none"}}}
    judged = score(
        replace(case(), tools=(tool,)), '<tool_call>\n{"name": "w", "arguments": {"a": 1}}\n</tool_call>'
    )
    assert (judged.written, judged.valid) == (1, 0)
