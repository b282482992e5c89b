"""Function calling against a running service: a question, three real tools, every message shown in order.

    python fast_start/simple_try_create_service.py &
    python fast_start/try_function_calling.py "How is the weather in Beijing?"
    python fast_start/try_function_calling.py --stream --parallel "杭州现在几点？天气怎么样？"

In: a question, in English or Chinese. Out: the model's calls, what the tools gave back, its answer. The first
round is sent with tool_choice "required": the service lets the model write nothing but valid calls, so even a
small model that was never tuned for tools makes one. From the second round on the model is free, and what it
says is shown as it is (`--first auto`: free at once). `--parallel` allows several calls at once; a
model that was not tuned for that repeats itself.
"""

import argparse
import ast
import json
import math
import operator
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from qwen_chat import errors
from qwen_chat.errors import OptionError
from qwen_chat.tools.client import HttpClient
from qwen_chat.tools.functions import tool_schema
from qwen_chat.tools.loop import Event, Limits, LoopResult, run_tools

# In place of a weather service. Name, Chinese name, hours from UTC (standard time), sky, degrees Celsius.
CITIES = (
    ("Beijing", "北京", 8, "sunny", 8),
    ("Shanghai", "上海", 8, "cloudy", 14),
    ("Hangzhou", "杭州", 8, "light rain", 13),
    ("Guangzhou", "广州", 8, "cloudy", 22),
    ("Shenzhen", "深圳", 8, "sunny", 24),
    ("Chengdu", "成都", 8, "overcast", 12),
    ("Harbin", "哈尔滨", 8, "snow", -12),
    ("Tokyo", "东京", 9, "sunny", 12),
    ("Singapore", "新加坡", 8, "thunderstorm", 29),
    ("Sydney", "悉尼", 10, "sunny", 23),
    ("London", "伦敦", 0, "rain", 9),
    ("Paris", "巴黎", 1, "cloudy", 11),
    ("Berlin", "柏林", 1, "sleet", 3),
    ("Cairo", "开罗", 2, "sunny", 21),
    ("New York", "纽约", -5, "windy", 6),
    ("San Francisco", "旧金山", -8, "fog", 15),
)

OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sqrt": math.sqrt,
    "abs": abs,
    "round": round,
    "sin": math.sin,
    "cos": math.cos,
    "log": math.log,
}
CONSTANTS = {"pi": math.pi, "e": math.e}


# What the service lets a model write: a small model that was never tuned for tools would ramble on otherwise.
ARITHMETIC = {"pattern": r"^ ?[0-9a-z(-][0-9a-z+*/%.,()^×÷ -]{0,30}$"}
CITY = {"pattern": r"^ ?[A-Za-z一-龥][A-Za-z一-龥 ,.'-]{0,18}$"}


def find_city(name: str) -> tuple[str, str, int, str, int]:
    wanted = name.split(",")[0].strip().casefold().removesuffix("市")
    for city in CITIES:
        if wanted in (city[0].casefold(), city[1]):
            return city
    known = ", ".join(city[0] for city in CITIES)
    raise LookupError(f"no city {name!r} in the table; it has {known}")


def get_weather(
    city: Annotated[str, "City name, for example Beijing or 北京", CITY],
    unit: Literal["celsius", "fahrenheit"] = "celsius",
) -> dict[str, Any]:
    """Get the current weather of a city. 查询城市现在的天气。"""
    name, _, _, sky, celsius = find_city(city)
    degrees = celsius if unit == "celsius" else round(celsius * 9 / 5 + 32)
    return {"city": name, "sky": sky, "temperature": degrees, "unit": unit}


def get_time(city: Annotated[str, "City name, for example London or 伦敦", CITY]) -> dict[str, str]:
    """Get the current local time of a city. 查询城市现在的当地时间。"""
    name, _, hours, _, _ = find_city(city)
    now = datetime.now(UTC).astimezone(timezone(timedelta(hours=hours)))
    return {"city": name, "time": now.strftime("%Y-%m-%d %H:%M"), "zone": f"UTC{hours:+d}, standard time"}


def calculate(expression: Annotated[str, "For example 12 * (3 + 4) or sqrt(2)", ARITHMETIC]) -> str:
    """Work out an arithmetic expression. 计算算式。"""
    text = expression.replace("×", "*").replace("÷", "/").replace("^", "**").strip()
    if len(text) > 200:
        raise ValueError(f"the expression has {len(text)} characters; at most 200 are worked out")
    try:
        value = evaluate(ast.parse(text, mode="eval").body)
    except SyntaxError:
        raise ValueError(f"{expression!r} is no arithmetic expression") from None
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return str(int(value) if whole else value)


def evaluate(node: ast.AST) -> Any:
    """Numbers, the operators and functions above, and nothing else."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.UnaryOp(op=sign, operand=inner) if type(sign) in OPERATORS:
            return OPERATORS[type(sign)](evaluate(inner))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in OPERATORS:
            a, b = evaluate(left), evaluate(right)
            if isinstance(sign, ast.Pow) and (abs(b) > 1000 or abs(a) > 1e6):
                raise ValueError("the power is too large to be worked out")
            return OPERATORS[type(sign)](a, b)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*(evaluate(argument) for argument in arguments))
    raise ValueError(
        "only numbers, + - * / // % **, brackets, sqrt, abs, round, sin, cos, log, pi, e are known"
    )


TOOLS: dict[str, Callable[..., Any]] = {
    "get_weather": get_weather,
    "calculate": calculate,
    "get_time": get_time,
}


def ask(options: argparse.Namespace, on_event: Callable[[Event], None]) -> LoopResult:
    """The loop: calls, results, answer."""
    client = HttpClient(options.url, api_key=options.api_key or os.environ.get("API_KEY"))
    messages = [{"role": "user", "content": options.question}]
    if options.system:
        messages.insert(0, {"role": "system", "content": options.system})
    return run_tools(
        client,
        messages,
        TOOLS,
        model=options.model or client.first_model(),
        tool_choice=options.first,
        parallel=options.parallel,
        stream=options.stream,
        limits=Limits(seconds=10, rounds=options.rounds),
        on_event=on_event,
        temperature=0,
        max_tokens=options.max_tokens,
    )


class Display:
    """Every message in order, one line a call and a result; streamed text as it comes."""

    def __init__(self) -> None:
        self._open = False  # a line of streamed text is not ended yet

    def __call__(self, event: Event) -> None:
        if event.kind == "text":
            print("" if self._open else "assistant: ", event.text, sep="", end="", flush=True)
            self._open = True
            return
        if event.kind == "result":
            print(f"tool      <- {event.text}")
        elif event.kind == "stopped":
            print(f"({event.text})")
        else:
            self._message(event.message or {})

    def _message(self, message: dict[str, Any]) -> None:
        calls = message.get("tool_calls", ())
        if self._open:
            print()
        elif message["content"] or not calls:
            print(f"assistant: {message['content'] or '(an empty answer)'}")
        self._open = False
        for call in calls:
            print(f"assistant -> {call['function']['name']}({call['function']['arguments']})")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = "How is the weather in Beijing?"
    parser.add_argument("question", nargs="?", default=default, help=f"default: {default}")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service listens")
    parser.add_argument("-m", "--model", help="model or adapter; the first that the service has without it")
    parser.add_argument("--stream", action="store_true", help="show the answer while it is written")
    parser.add_argument("--parallel", action="store_true", help="allow several calls at once")
    parser.add_argument("--first", choices=("required", "auto"), default="required", help="the first round")
    parser.add_argument("--system", help="a system prompt")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of calls before an answer is asked for")
    parser.add_argument("--max_tokens", type=int, default=200, help="longest message in tokens")
    parser.add_argument("--api_key", help="the service's key; also API_KEY")
    parser.add_argument("--json", action="store_true", help="print the conversation as one JSON object")
    options = parser.parse_args()
    if not options.question.strip():
        raise OptionError("the question is empty; write one after the command")
    if options.rounds < 1 or options.max_tokens < 1:
        raise OptionError("--rounds and --max_tokens: expected a number above 0")
    return options


def main() -> int:
    options = read_options()
    if options.json:
        done = ask(options, lambda event: None)
        print(
            json.dumps(
                {**asdict(done), "tools": [tool_schema(f) for f in TOOLS.values()]}, ensure_ascii=False
            )
        )
        return 0
    print(f"user: {options.question}")
    ask(options, Display())
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
