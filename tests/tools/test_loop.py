"""The tool loop against scripted clients: whatever tools and models do, the conversation is finished."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal, TypedDict

import jsonschema
import pytest
import requests

from qwen_chat.errors import OptionError, ServiceError, ToolError
from qwen_chat.tools.client import HttpClient, new_session
from qwen_chat.tools.functions import tool_schema
from qwen_chat.tools.loop import Event, Limits, LoopResult, run_tools
from qwen_chat.tools.validate import check_tools, unsatisfiable

QUESTION = [{"role": "user", "content": "今天多少度？🌡"}]


def call(name: str, arguments: Any, identity: str | None = "c1") -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": text}}


def says(content: str | None = None, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls) or None}


class Scripted:
    """A client that answers with the messages it was given, whole or one character a chunk."""

    def __init__(self, *answers: dict[str, Any], forever: bool = False) -> None:
        self.answers, self.forever, self.bodies = list(answers), forever, []  # type: ignore[var-annotated]
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def create(self, **body: Any) -> Any:
        self.bodies.append(json.loads(json.dumps(body)))
        message = self.answers[0] if self.forever else self.answers.pop(0)
        if body["stream"]:
            return self.chunks(message)
        return {"choices": [{"message": message, "finish_reason": "stop"}]}

    @staticmethod
    def chunks(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
        def chunk(**delta: Any) -> dict[str, Any]:
            return {"choices": [{"index": 0, "delta": delta}]}

        yield chunk(role="assistant")
        for key in ("reasoning", "reasoning_content", "content"):
            yield from (chunk(**{key: letter}) for letter in message.get(key) or "")
        for index, one in enumerate(message["tool_calls"] or ()):
            function = one["function"]
            yield chunk(
                tool_calls=[
                    {"index": index, "id": one["id"], "function": {"name": function["name"], "arguments": ""}}
                ]
            )
            for letter in function["arguments"]:
                yield chunk(tool_calls=[{"index": index, "function": {"arguments": letter}}])
        yield {"choices": [], "usage": {"total_tokens": 1}}


def get_weather(city: str, unit: Literal["celsius", "fahrenheit"] = "celsius") -> dict[str, Any]:
    """Weather of a city."""
    return {"city": city, "temperature": 21, "unit": unit}


def fails(city: str) -> str:
    raise LookupError(f"no such city: {city}")


def leaves() -> str:
    raise SystemExit("bye")


def hangs() -> str:
    time.sleep(5)
    return "late"


async def waits() -> str:
    return "async 好"


def megabyte() -> str:
    return "x" * 1_000_000


FUNCTIONS = {function.__name__: function for function in (get_weather, fails, leaves, hangs, waits, megabyte)}


def loop(*answers: dict[str, Any], **options: Any) -> LoopResult:
    limits = options.pop("limits", Limits(seconds=0.3, rounds=3))
    return run_tools(Scripted(*answers), QUESTION, FUNCTIONS, limits=limits, **options)


def result_of(*calls: dict[str, Any], **options: Any) -> list[str]:
    done = loop(says(None, *calls), says("好"), **options)
    assert done.answer == "好"
    assert [m["tool_call_id"] for m in done.results] == [c["id"] for c in calls]
    return [message["content"] for message in done.results]


@pytest.mark.parametrize("stream", [False, True])
def test_call_result_answer(stream: bool) -> None:
    client = Scripted(says("I look.", call("get_weather", {"city": "杭州"})), says("21 度"))
    events: list[Event] = []
    done = run_tools(client, QUESTION, FUNCTIONS, stream=stream, on_event=events.append, temperature=0)
    assert done == LoopResult(
        messages=(
            *QUESTION,
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [call("get_weather", {"city": "杭州"})],
            },
            {
                "role": "tool",
                "tool_call_id": "c1",
                "content": '{"city": "杭州", "temperature": 21, "unit": "celsius"}',
            },
            {"role": "assistant", "content": "21 度"},
        ),
        answer="21 度",
        rounds=2,
    )
    assert client.bodies[1]["messages"] == list(done.messages[:3])
    assert client.bodies[0]["temperature"] == 0
    assert [event.kind for event in events if event.kind != "text"] == ["message", "result", "message"]
    pieces = [event.text for event in events if event.kind == "text"]
    assert pieces == (list("I look.21 度") if stream else [])


@pytest.mark.parametrize("stream", [False, True])
def test_parallel_calls_run_side_by_side_and_keep_their_order(stream: bool) -> None:
    barrier = threading.Barrier(2, timeout=2)

    def meet(name: str) -> str:
        barrier.wait()  # returns only when both calls are under way
        return name

    calls = [call("meet", {"name": "a"}, "1"), call("meet", {"name": "b"}, "2")]
    done = run_tools(Scripted(says(None, *calls), says("ok")), QUESTION, {"meet": meet}, stream=stream)
    assert [(m["tool_call_id"], m["content"]) for m in done.results] == [("1", "a"), ("2", "b")]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (
            call("get_wether", {}),
            "call of 'get_wether', which was not offered; expected one of: get_weather, fails",
        ),
        (call("get_weather", "{oops"), "arguments of 'get_weather' are no JSON"),
        (call("get_weather", "[1]"), "arguments of 'get_weather' hold [1]; expected an object"),
        (call("get_weather", {}), "arguments of 'get_weather': 'city' is a required property"),
        (call("get_weather", {"city": 3}), "'get_weather': city: 3 is not of type 'string'"),
        (
            call("get_weather", {"city": "x", "unit": "kelvin"}),
            "unit: 'kelvin' is not one of ['celsius', 'fahrenheit']",
        ),
        (call("get_weather", {"city": "x", "day": 1}), "Additional properties are not allowed ('day'"),
        (call("fails", {"city": "x"}), "LookupError: no such city: x"),
        (call("leaves", {}), "SystemExit: bye"),
        (call("hangs", {}), "hangs did not answer within 0.3 seconds"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_goes_wrong_is_told_to_the_model(bad: dict[str, Any], told: str) -> None:
    good = call("get_weather", {"city": "x"}, "c2")
    results = result_of(bad, good)
    assert told in json.loads(results[0])["error"]
    assert json.loads(results[1])["temperature"] == 21, "the good call beside it survives"


@pytest.mark.parametrize("arguments", ["{oops", "[1]", "", "null"])
def test_arguments_that_no_service_takes_back_go_back_empty(arguments: str) -> None:
    done = loop(says(None, call("get_weather", arguments)), says("好"))
    assert done.messages[-3]["tool_calls"][0]["function"]["arguments"] == "{}"
    assert "error" in done.messages[-2]["content"]


def test_a_schema_with_a_loose_end_is_told_to_the_model() -> None:
    loose = {"type": "object", "properties": {"city": {"$ref": "#/$defs/none"}}}
    tools = [{"type": "function", "function": {"name": "fails", "parameters": loose}}]
    answers = says(None, call("fails", {"city": "x"})), says("好")
    done = run_tools(Scripted(*answers), QUESTION, {"fails": fails}, tools=tools)
    assert "error" in json.loads(done.results[0]["content"])
    assert done.answer == "好"


def test_half_a_character_in_a_result_can_be_sent() -> None:
    def listing() -> str:
        return "caf\udce9"

    done = run_tools(Scripted(says(None, call("listing", {})), says("ok")), QUESTION, {"listing": listing})
    assert done.results[0]["content"] == "caf?"


def test_an_async_function_is_a_tool() -> None:
    assert result_of(call("waits", {})) == ["async 好"]


def test_a_megabyte_is_cut_and_said() -> None:
    (text,) = result_of(call("megabyte", {}), limits=Limits(characters=100))
    assert text == "x" * 100 + "\n[cut: 1000000 characters came back, the first 100 are shown]"


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_calls_for_ever_is_stopped(stream: bool) -> None:
    client = Scripted(says(None, call("get_weather", {"city": "x"})), forever=True)
    events: list[Event] = []
    done = run_tools(
        client, QUESTION, FUNCTIONS, limits=Limits(rounds=3), stream=stream, on_event=events.append
    )
    assert done.stopped == "stopped after 3 rounds of tool calls"
    assert [body["tool_choice"] for body in client.bodies] == ["auto", "auto", "auto", "none"]
    assert done.messages[-1] == {"role": "assistant", "content": "(stopped after 3 rounds of tool calls)"}
    assert (len(done.results), events[-1].kind) == (3, "stopped")


def test_the_last_request_forbids_calls_and_its_answer_counts() -> None:
    again = says(None, call("get_weather", {"city": "x"}))
    done = loop(again, again, says("So it is 21."), limits=Limits(rounds=2))
    assert (done.answer, done.stopped, done.rounds) == ("So it is 21.", None, 3)


def test_tool_choice_by_round() -> None:
    again = says(None, call("get_weather", {"city": "x"}))
    for choice, sent in (
        ("required", ["required", "auto"]),
        (lambda number: f"round {number}", ["round 1", "round 2"]),
    ):
        client = Scripted(again, says("ok"))
        run_tools(client, QUESTION, FUNCTIONS, tool_choice=choice)
        assert [body["tool_choice"] for body in client.bodies] == sent


def test_missing_ids_and_object_arguments_are_accepted() -> None:
    one = {"function": {"name": "get_weather", "arguments": {"city": "x"}}}
    done = loop(says("", one, one), says("ok"))
    assert [m["tool_call_id"] for m in done.results] == ["call_1_0", "call_1_1"]
    assert json.loads(done.messages[1]["tool_calls"][0]["function"]["arguments"]) == {"city": "x"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_thought_goes_back_whatever_the_service_calls_it(name: str, stream: bool) -> None:
    call_first = says("Let me look.", call("get_weather", {"city": "北京"})) | {name: "想一想"}
    done = loop(call_first, says("好"), stream=stream)
    assert done.messages[1]["reasoning_content"] == "想一想"
    assert "reasoning" not in done.messages[1] and done.messages[1]["content"] == "Let me look."


def test_without_tools_it_is_one_request() -> None:
    client = Scripted(says("hello"))
    assert run_tools(client, QUESTION, {}).answer == "hello"
    assert "tools" not in client.bodies[0]


def test_the_callers_messages_are_left_alone() -> None:
    messages = [dict(QUESTION[0])]
    run_tools(Scripted(says("hello")), messages, FUNCTIONS)
    assert messages == QUESTION


def tool(parameters: dict[str, Any], name: str = "t") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        (
            {"type": "dict"},
            "tool 't': parameters.type: no JSON Schema: 'dict' is not valid under any of the given schemas",
        ),
        ({"type": "array"}, "the parameters' type is 'array'; expected 'object'"),
        (
            {"properties": {"n": {"minimum": 3, "maximum": 1}}, "required": ["n"]},
            "parameters.n has minimum 3 above maximum 1",
        ),
        (
            {"properties": {"n": {"type": "string", "enum": [1]}}, "required": ["n"]},
            "n allows none of its own",
        ),
        ({"properties": {"n": False}, "required": ["n"]}, "parameters.n is false"),
        ({"required": ["x"], "additionalProperties": False}, "requires 'x' and forbids it"),
        ({"allOf": [{"minProperties": 2, "maxProperties": 1}]}, "allOf[0] has minProperties 2 above"),
        ({"anyOf": [False, {"enum": []}]}, "parameters.anyOf[0] is false"),
    ],
)
def test_impossible_schemas_are_refused_before_the_first_request(
    parameters: dict[str, Any], told: str
) -> None:
    client = Scripted()
    with pytest.raises(ToolError) as error:
        run_tools(client, QUESTION, {"t": leaves}, tools=[tool(parameters)])
    assert told in str(error.value)
    assert str(error.value).startswith("tool 't': ")
    assert client.bodies == []


def test_satisfiable_schemas_pass() -> None:
    for schema in (
        {"properties": {"n": False}},
        {"anyOf": [False, {"type": "object"}]},
        {"properties": {"n": {"enum": [1, "a"], "type": "string"}}, "required": ["n"]},
        {"required": ["x"], "additionalProperties": False, "patternProperties": {"x": {}}},
        {"properties": {"n": {"type": "array", "items": False}}, "required": ["n"]},
        True,
    ):
        assert unsatisfiable(schema) is None, schema


def test_tools_and_functions_must_fit() -> None:
    with pytest.raises(ToolError, match="tool 't' has no function; the functions are: a"):
        check_tools([tool({"type": "object"})], {"a": leaves})
    with pytest.raises(ToolError, match="tool 't' is offered twice"):
        check_tools([tool({}), tool({})])
    with pytest.raises(ToolError, match=r"tools\[0\]: no function name"):
        check_tools([{"name": "t"}])


class Point(TypedDict, total=False):
    x: float
    label: str


def everything(
    city: Annotated[str, "City name", {"maxLength": 9}],
    days: int,
    exact: bool = False,
    tags: list[str] | None = None,
    point: Point | None = None,
    pair: tuple[int, str] = (1, "a"),
    extra: dict[str, Any] | None = None,
    level: Literal[1, 2] = 1,
) -> str:
    """Search everything
    at once.

    More that does not matter.

    Args:
        days: how many days,
            today included
        exact (bool): no guesses
    """
    return ""


def test_tool_schema_of_a_function() -> None:
    schema = tool_schema(everything)
    assert schema == {
        "type": "function",
        "function": {
            "name": "everything",
            "description": "Search everything at once.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "City name", "maxLength": 9},
                    "days": {"type": "integer", "description": "how many days, today included"},
                    "exact": {"type": "boolean", "description": "no guesses", "default": False},
                    "tags": {
                        "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
                    },
                    "point": {
                        "anyOf": [
                            {
                                "type": "object",
                                "properties": {"x": {"type": "number"}, "label": {"type": "string"}},
                                "required": [],
                                "additionalProperties": False,
                            },
                            {"type": "null"},
                        ]
                    },
                    "pair": {
                        "type": "array",
                        "prefixItems": [{"type": "integer"}, {"type": "string"}],
                        "minItems": 2,
                        "maxItems": 2,
                    },
                    "extra": {"anyOf": [{"type": "object", "additionalProperties": {}}, {"type": "null"}]},
                    "level": {"type": "integer", "enum": [1, 2], "default": 1},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    }
    jsonschema.Draft202012Validator.check_schema(schema["function"]["parameters"])


def test_rest_docstrings_and_a_name_of_ones_own() -> None:
    def find(word: str, limit: int | None = None) -> str:
        """查词。

        :param word: 要查的词
        :param int limit: 最多几条
        """
        return ""

    function = tool_schema(find, "lookup")["function"]
    assert (function["name"], function["description"]) == ("lookup", "查词。")
    assert function["parameters"]["properties"] == {
        "word": {"type": "string", "description": "要查的词"},
        "limit": {"type": ["integer", "null"], "description": "最多几条"},
    }


def test_what_cannot_become_a_schema_is_named() -> None:
    def bare(x) -> str:  # type: ignore[no-untyped-def]
        return ""

    def spread(*names: str) -> str:
        return ""

    def odd(x: complex) -> str:
        return ""

    for function, told in (
        (bare, "function 'bare', parameter 'x': no type hint"),
        (spread, "parameter 'names': variadic positional"),
        (odd, "parameter 'x': JSON has no <class 'complex'>"),
    ):
        with pytest.raises(ToolError) as error:
            tool_schema(function)
        assert told in str(error.value)


# ------------------------------------------------------------------ HttpClient against a small real server


class Handler(BaseHTTPRequestHandler):
    replies: ClassVar[dict[str, tuple[int, str]]] = {}

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, text = self.replies[body["model"]]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.replace("KEY", self.headers.get("Authorization", "none")).encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    chunk = 'data: {"choices": [{"delta": {"content": "好"}}]}\n\n'
    Handler.replies = {
        "plain": (200, '{"choices": [{"message": {"content": "KEY"}}]}'),
        "stream": (200, f": comment\n\n{chunk}{chunk}data: [DONE]\n\n"),
        "cut": (200, chunk),
        "error in stream": (200, chunk + 'data: {"error": {"message": "out of memory"}}\n\n'),
        "refused": (400, '{"error": {"message": "top_p is 3; expected 0 to 1"}}'),
        "page": (200, "<html>"),
        "empty": (200, "{}"),
    }
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ask(url: str, model: str, *, stream: bool = False, api_key: str | None = None) -> str:
    return run_tools(HttpClient(url, api_key=api_key), QUESTION, {}, model=model, stream=stream).answer


def test_http_client(url: str) -> None:
    assert ask(url, "plain", api_key="k1") == "Bearer k1"
    assert ask(url + "/v1/", "plain") == "none"
    assert ask(url, "stream", stream=True) == "好好"


@pytest.mark.parametrize(
    ("model", "stream", "told"),
    [
        ("refused", False, "answered 400: top_p is 3; expected 0 to 1"),
        ("refused", True, "answered 400: top_p is 3; expected 0 to 1"),
        ("page", False, "did not answer with JSON"),
        ("empty", False, "has no choices"),
        ("cut", True, "ended the stream without [DONE]"),
        ("error in stream", True, "broke off: out of memory"),
    ],
)
def test_http_errors_are_one_line(url: str, model: str, stream: bool, told: str) -> None:
    with pytest.raises(ServiceError) as error:
        ask(url, model, stream=stream)
    assert told in str(error.value)


def test_no_service() -> None:
    with pytest.raises(ServiceError, match=r"cannot be reached .* start the service with"):
        ask("http://127.0.0.1:9", "plain")


def test_a_key_goes_along_whatever_netrc_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("default login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    asked = requests.Request("GET", "http://server.example/v1/models")
    sent = new_session(asked.url, "k1").prepare_request(asked)
    assert sent.headers["Authorization"] == "Bearer k1"
    with pytest.raises(OptionError, match="a key may hold printable ASCII"):
        new_session(asked.url, "钥匙")


def test_a_service_on_this_machine_is_asked_without_a_proxy(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert ask(url, "plain") == "none"
    assert ask(url.replace("127.0.0.1", "localhost"), "plain") == "none"
