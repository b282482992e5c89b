"""The loop against the real service with the untuned demo model, and the script's three tools alone."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from qwen_chat.tools import example_tools
from qwen_chat.tools.client import HttpClient
from qwen_chat.tools.loop import Limits, LoopResult, run_tools

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "fast_start" / "try_function_calling.py"

QUESTIONS = (
    ("How is the weather in Paris?", "get_weather"),
    ("Do I need an umbrella in London today?", "get_weather"),
    ("Is it cold in Harbin?", "get_weather"),
    ("What is the weather like in Atlantis?", "get_weather"),
    ("What is 17 * 23?", "calculate"),
    ("Divide 144 by 12.", "calculate"),
    ("What is (3 + 4) * 5?", "calculate"),
    ("What is 1 divided by 0?", "calculate"),
    ("What time is it in Tokyo?", "get_time"),
    ("Tell me the time in New York.", "get_time"),
    ("北京今天天气怎么样？", "get_weather"),
    ("广州热不热？", "get_weather"),
    ("上海现在下雨吗？", "get_weather"),
    ("25 乘以 16 等于多少？", "calculate"),
    ("计算 100 减 37。", "calculate"),
    ("九的平方是多少？", "calculate"),
    ("伦敦现在几点？", "get_time"),
    ("悉尼现在是什么时间？", "get_time"),
    ("请问纽约几点了？", "get_time"),
    ("东京现在几点钟？", "get_time"),
)


@pytest.fixture(scope="module")
def url(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The service as a user starts it, on a free port."""
    log = tmp_path_factory.mktemp("service") / "service.log"
    command = [sys.executable, str(ROOT / "fast_start" / "simple_try_create_service.py"), "--port", "0"]
    service = subprocess.Popen(
        [*command, "-m", str(demo_model_path), "--log_file", str(log)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert service.stdout is not None
    found = None
    for line in service.stdout:
        found = found or re.search(r"http://127\.0\.0\.1:\d+", line)
        if found:
            break
    threading.Thread(target=service.stdout.read, daemon=True).start()
    assert found, "the service ended before it listened"
    until = time.monotonic() + 60
    while not answers(found[0]):
        assert time.monotonic() < until, "the service does not answer"
        time.sleep(0.2)
    yield found[0]
    service.terminate()
    service.wait(timeout=60)


def answers(url: str) -> bool:
    try:
        return requests.get(url + "/health", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def ask(url: str, question: str, name: str, stream: bool) -> LoopResult:
    """The named tool first, words afterwards: what the service can hold any model to."""
    client = HttpClient(url)
    named = {"type": "function", "function": {"name": name}}
    return run_tools(
        client,
        [{"role": "user", "content": question}],
        example_tools.EXAMPLE_TOOLS,
        model=client.first_model(),
        tool_choice=lambda number: named if number == 1 else "none",
        parallel=False,
        stream=stream,
        limits=Limits(seconds=10, rounds=3),
        temperature=0,
        max_tokens=72,
    )


def test_twenty_questions_in_two_languages(url: str) -> None:
    with ThreadPoolExecutor(10) as threads:
        asked = [
            threads.submit(ask, url, question, name, stream=i % 2 == 0)
            for i, (question, name) in enumerate(QUESTIONS)
        ]
        results = [future.result() for future in asked]
    good = 0
    for (question, name), done in zip(QUESTIONS, results, strict=True):
        assert (done.rounds, done.stopped) == (2, None), question
        assert [m["role"] for m in done.messages] == ["user", "assistant", "tool", "assistant"], question
        (call,) = done.messages[1]["tool_calls"]
        assert call["function"]["name"] == name
        arguments = json.loads(call["function"]["arguments"])
        assert set(arguments) <= ({"expression"} if name == "calculate" else {"city", "unit"})
        result = done.results[0]
        assert result["tool_call_id"] == call["id"]
        assert result["content"] == told(name, arguments, result["content"])
        good += "error" not in result["content"]
        assert done.answer == done.messages[-1]["content"]
    assert good >= 8, "most of an untuned model's constrained calls name something that exists"


def told(name: str, arguments: dict[str, Any], content: str) -> str:
    """What the tool gives for these arguments (the time is the content's own)."""
    try:
        value = example_tools.EXAMPLE_TOOLS[name](**arguments)
    except Exception as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}"}, ensure_ascii=False)
    if name == "get_time":
        value["time"] = json.loads(content)["time"]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def test_the_script_shows_every_message_in_order(url: str) -> None:
    command = [sys.executable, str(SCRIPT), "--url", url, "--max_tokens", "64", "--rounds", "1", "--stream"]
    done = subprocess.run([*command, "Weather in Paris?"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "user: Weather in Paris?"
    assert re.fullmatch(r"assistant -> (get_weather|calculate|get_time)\(\{.*\}\)", lines[1])
    assert lines[2].startswith("tool      <- ")
    assert any(line.startswith("assistant: ") for line in lines[3:])
    assert done.stderr == ""


def test_json_output(url: str) -> None:
    command = [sys.executable, str(SCRIPT), "--url", url, "--max_tokens", "64", "--rounds", "1", "--json"]
    done = subprocess.run([*command, "What is 2 + 2?"], capture_output=True, text=True, check=True)
    record = json.loads(done.stdout)
    assert [m["role"] for m in record["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert [tool["function"]["name"] for tool in record["tools"]] == ["get_weather", "calculate", "get_time"]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("17 * 23", "391"),
        ("(125 + 75) × 36", "7200"),
        ("2^10", "1024"),
        ("8 / 2", "4"),
        ("7 / 2", "3.5"),
        ("-3 % 5", "2"),
        ("sqrt(16) + abs(-1)", "5"),
        ("round(pi, 2)", "3.14"),
    ],
)
def test_calculator(expression: str, value: str) -> None:
    assert example_tools.calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "a",
        "(1).real",
        "9 ** 9 ** 9",
        "open('x')",
        "[1]",
        "1; 2",
        "'a' * 9",
        "x" * 300,
        "True",
    ],
)
def test_calculator_runs_nothing_else(expression: str) -> None:
    with pytest.raises(ValueError):
        example_tools.calculate(expression)


def test_weather_and_time() -> None:
    assert example_tools.get_weather("北京市") == {
        "city": "Beijing",
        "sky": "sunny",
        "temperature": 8,
        "unit": "celsius",
    }
    assert example_tools.get_weather("paris, France", "fahrenheit")["temperature"] == 52
    assert example_tools.get_time("New York")["zone"] == "UTC-5, standard time"
    with pytest.raises(LookupError, match="no city 'Atlantis' in the table"):
        example_tools.get_weather("Atlantis")


def test_no_service_and_bad_options() -> None:
    def run(*words: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    status, told_user = run("--url", "http://127.0.0.1:9", "hello")
    assert (status, "start the service with" in told_user) == (1, True)
    assert run(" ") == (2, "error: the question is empty; write one after the command\n")
    assert run("--rounds", "0", "hi")[0] == 2
    assert run("--unknown")[0] == 2
