"""make_tool_data.py as a user runs it: shipped example, Python functions, csv, and every kind of bad row."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qwen_chat.data import records
from qwen_chat.tools.validate import check_call
from tests.support.scripts import run_here

ROOT = Path(__file__).resolve().parents[2]
INPUT = ROOT / "finetune" / "io_file" / "input_data"
EXAMPLE = [
    "--tools",
    str(INPUT / "example_tools.json"),
    "--table",
    str(INPUT / "example_tool_questions.jsonl"),
]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return run_here("finetune/make_tool_data.py", *words)


def make(path: Path, *words: str) -> list[dict[str, Any]]:
    done = run(*words, "-o", str(path))
    assert done.returncode == 0, done.stderr
    return made(path)


def made(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").strip().split("\n")]


def names(line: dict[str, Any]) -> list[str]:
    return [tool["function"]["name"] for tool in line["tools"]]


def called(line: dict[str, Any]) -> list[str]:
    return [call["function"]["name"] for m in line["messages"] for call in m.get("tool_calls", ())]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Made by a process of its own."""
    path = tmp_path_factory.mktemp("made") / "made.jsonl"
    script = str(ROOT / "finetune" / "make_tool_data.py")
    subprocess.run([sys.executable, script, *EXAMPLE, "-o", str(path)], check=True)
    return made(path)


def test_the_shipped_example_gives_every_kind(lines: list[dict[str, Any]]) -> None:
    assert Counter(line["type"] for line in lines) == {
        "call": 20,
        "no_tool": 4,
        "refusal": 6,
        "parallel": 4,
        "missing": 4,
    }


def test_every_conversation_is_good_data(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "again.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    opened = records.open_records(path)
    assert (len(opened), opened.report.duplicates) == (38, 0)
    for conversation in opened:
        calls = [call for message in conversation.messages for call in message.tool_calls]
        assert [check_call(call, conversation.tools) for call in calls] == [None] * len(calls)


def test_what_each_kind_offers(lines: list[dict[str, Any]]) -> None:
    question_of = {}
    for row in (INPUT / "example_tool_questions.jsonl").read_text("utf-8").splitlines():
        entry = json.loads(row)
        question_of[entry["question"]] = [call["name"] for call in entry["calls"]]
    for line in lines:
        offered, question = names(line), line["messages"][0]["content"]
        assert len(offered) == len(set(offered))
        if line["type"] == "refusal":
            assert not set(question_of[question]) & set(offered), "nothing that fits is offered"
            assert called(line) == []
            assert offered
        else:
            assert set(called(line)) <= set(offered)
        if line["type"] == "parallel":
            assert len(called(line)) == 2
        if line["type"] == "missing":
            assert [m["role"] for m in line["messages"]][:4] == ["user", "assistant", "user", "assistant"]
            assert line["messages"][2]["content"] not in question, "the value is asked for, not given"
            arguments = json.loads(line["messages"][3]["tool_calls"][0]["function"]["arguments"])
            assert line["messages"][2]["content"] in arguments.values()
    assert len({tuple(names(line)) for line in lines}) > 15, "the tools are shuffled"


def test_the_seed_decides(tmp_path: Path) -> None:
    first = make(tmp_path / "a.jsonl", *EXAMPLE, "--seed", "5", "--repeat", "2")
    assert first == make(tmp_path / "b.jsonl", *EXAMPLE, "--seed", "5", "--repeat", "2")
    assert first != make(tmp_path / "c.jsonl", *EXAMPLE, "--seed", "6", "--repeat", "2")
    assert len(first) > 60


def test_python_functions_and_csv(tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(
        "from typing import Literal\n\n"
        'def weather(city: str, unit: Literal["c", "f"] = "c") -> str:\n    "Weather of a city."\n\n'
        'def clock(city: str) -> str:\n    "Time in a city."\n    return ""\n\n'
        "def _private(x): ...\n",
        "utf-8",
    )
    (tmp_path / "table.csv").write_text(
        "question,call,arguments,result,answer\n"
        'Rome and Oslo?,weather,"{""city"": ""Rome""}",warm,Warm and cold.\n'
        ',weather,"{""unit"": ""f"", ""city"": ""Oslo""}",cold,\n'
        "Hello,,,,Hi.\n",
        "utf-8",
    )
    arguments = ["--tools", str(tmp_path / "tools.py"), "--table", str(tmp_path / "table.csv")]
    lines = make(tmp_path / "o.jsonl", *arguments, "--system", "Be brief.", "--refusals", "0")
    call, hello = sorted(lines, key=lambda line: line["type"])
    assert call["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [c["function"]["arguments"] for c in call["messages"][2]["tool_calls"]] == [
        '{"city": "Rome"}',
        '{"city": "Oslo", "unit": "f"}',  # in the schema's order
    ]
    assert [m["content"] for m in call["messages"][3:]] == ["warm", "cold", "Warm and cold."]
    assert set(names(call)) <= {"weather", "clock"}
    assert (hello["type"], hello["messages"][-1]["content"]) == ("no_tool", "Hi.")


def make_few(tmp_path: Path, rows: list[dict[str, Any]], *words: str) -> list[dict[str, Any]]:
    (tmp_path / "tools.json").write_text(TRANSLATE, "utf-8")
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "table.jsonl").write_text(text, "utf-8")
    named = ["--tools", str(tmp_path / "tools.json"), "--table", str(tmp_path / "table.jsonl")]
    return make(tmp_path / "o.jsonl", *named, *words)


TRANSLATE = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "translate",
                "parameters": {
                    "type": "object",
                    "properties": {"text": {"type": "string"}, "target": {"type": "string"}},
                    "required": ["text", "target"],
                },
            },
        }
    ]
)


def test_a_part_of_a_word_is_not_left_out(tmp_path: Path) -> None:
    call = {"name": "translate", "arguments": {"text": "wooden door", "target": "de"}}
    rows = [{"question": "Please\u2028translate 'wooden door' into German.", "calls": [call]}]
    lines = make_few(tmp_path, rows, "--missing", "1", "--refusals", "0")
    missing = next(line for line in lines if line["type"] == "missing")
    assert missing["messages"][0]["content"] == "Please\u2028translate into German."
    assert missing["messages"][2]["content"] == "wooden door"


def test_two_wordings_of_one_call_are_not_asked_at_once(tmp_path: Path) -> None:
    call = {"name": "translate", "arguments": {"text": "Tür", "target": "en"}}
    rows = [{"question": f"{word} Tür in English?", "calls": [call]} for word in ("What is", "How is")]
    lines = make_few(tmp_path, rows, "--parallel", "1", "--missing", "0", "--refusals", "0")
    assert {line["type"] for line in lines} == {"call"}


def test_a_module_with_postponed_annotations(tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Place:\n    name: str\n\n"
        'def clock(city: str) -> str:\n    "Time in a city."\n    return Place(city).name\n',
        "utf-8",
    )
    (tmp_path / "table.csv").write_text("question,answer\nHello,Hi.\n", "utf-8")
    named = ["--tools", str(tmp_path / "tools.py"), "--table", str(tmp_path / "table.csv")]
    assert [line["type"] for line in make(tmp_path / "o.jsonl", *named)] == ["no_tool"]


def test_a_table_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(TRANSLATE, "utf-8")
    (tmp_path / "table.csv").write_bytes("question,answer\n你好,好\n".encode("gbk"))
    named = ["--tools", str(tmp_path / "tools.json"), "--table", str(tmp_path / "table.csv")]
    done = run(*named, "-o", str(tmp_path / "o.jsonl"))
    assert done.returncode == 2
    assert "is not UTF-8; save the table as UTF-8" in done.stderr
    assert "Traceback" not in done.stderr


TOOL = '[{"type": "function", "function": {"name": "w", "parameters": {"type": "object", "properties": {"c": {"type": "string"}}, "required": ["c"]}}}]'  # noqa: E501


@pytest.mark.parametrize(
    ("tools", "table", "told"),
    [
        (TOOL, "", "table.jsonl: empty"),
        (TOOL, "{oops", "table.jsonl:1: no JSON"),
        (TOOL, "[]", "table.jsonl:1: no object; expected question, calls, answer"),
        (TOOL, '{"question": " "}', "question: empty"),
        (TOOL, '{"question": "q"}', "answer: expected without calls"),
        (TOOL, '{"question": "q", "calls": [{"name": "x"}]}', "calls[0]: call of 'x', which was not offered"),
        (
            TOOL,
            '{"question": "q", "calls": [{"name": "w"}]}',
            "calls[0]: arguments of 'w': 'c' is a required",
        ),
        (
            TOOL,
            '{"question": "q", "calls": [{"name": "w", "arguments": {"c": "x"}}], "results": ["r", "s"]}',
            "results: 2 for 1 calls",
        ),
        ("[]", '{"question": "q", "answer": "a"}', "no tool in it"),
        ("{", "", "is no JSON"),
        (TOOL.replace('"string"', '"dict"'), "", "no JSON Schema: 'dict' is not valid"),
        (TOOL.replace('"type": "string"', '"enum": []'), "", "no arguments can satisfy this schema"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path: Path, tools: str, table: str, told: str) -> None:
    (tmp_path / "tools.json").write_text(tools, "utf-8")
    (tmp_path / "table.jsonl").write_text(table, "utf-8")
    out = tmp_path / "o.jsonl"
    done = run(
        "--tools", str(tmp_path / "tools.json"), "--table", str(tmp_path / "table.jsonl"), "-o", str(out)
    )
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "mine.jsonl"
    out.write_text("precious", "utf-8")
    done = run(*EXAMPLE, "-o", str(out))
    assert (done.returncode, out.read_text("utf-8")) == (2, "precious")
    assert "exists and is not overwritten" in done.stderr
    assert run(*EXAMPLE, "-o", str(tmp_path / "no" / "o.jsonl")).returncode == 2
    assert "--tools: not given" in run().stderr
