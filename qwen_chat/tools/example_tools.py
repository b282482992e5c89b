"""Three tools to try function calling with: the weather and the time of a city, a calculator.

In: what a model calls them with. Out: a value for the model, or a LookupError or ValueError that tells it what is
wrong. Nothing is asked of the network: the weather is a table.
"""

import ast
import math
import operator
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Annotated, Any, Literal

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
CITY_NAME = {"pattern": r"^ ?[A-Za-z一-龥][A-Za-z一-龥 ,.'-]{0,18}$"}


def find_city(name: str) -> tuple[str, str, int, str, int]:
    wanted = name.split(",")[0].strip().casefold().removesuffix("市")
    for city in CITIES:
        if wanted in (city[0].casefold(), city[1]):
            return city
    known = ", ".join(city[0] for city in CITIES)
    raise LookupError(f"no city {name!r} in the table; it has {known}")


def get_weather(
    city: Annotated[str, "City name, for example Beijing or 北京", CITY_NAME],
    unit: Literal["celsius", "fahrenheit"] = "celsius",
) -> dict[str, Any]:
    """Get the current weather of a city. 查询城市现在的天气。"""
    name, _, _, sky, celsius = find_city(city)
    degrees = celsius if unit == "celsius" else round(celsius * 9 / 5 + 32)
    return {"city": name, "sky": sky, "temperature": degrees, "unit": unit}


def get_time(city: Annotated[str, "City name, for example London or 伦敦", CITY_NAME]) -> dict[str, str]:
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
        value = work_out(ast.parse(text, mode="eval").body)
    except SyntaxError:
        raise ValueError(f"{expression!r} is no arithmetic expression") from None
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return str(int(value) if whole else value)


def work_out(node: ast.AST) -> Any:
    """Numbers, the operators and functions above, and nothing else."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.UnaryOp(op=sign, operand=inner) if type(sign) in OPERATORS:
            return OPERATORS[type(sign)](work_out(inner))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in OPERATORS:
            a, b = work_out(left), work_out(right)
            if isinstance(sign, ast.Pow) and (abs(b) > 1000 or abs(a) > 1e6):
                raise ValueError("the power is too large to be worked out")
            return OPERATORS[type(sign)](a, b)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*(work_out(argument) for argument in arguments))
    raise ValueError(
        "only numbers, + - * / // % **, brackets, sqrt, abs, round, sin, cos, log, pi, e are known"
    )


EXAMPLE_TOOLS: dict[str, Callable[..., Any]] = {
    "get_weather": get_weather,
    "calculate": calculate,
    "get_time": get_time,
}
