"""What a stranger's request may cost the others: schemas, prompts, tokens; and an end in time."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from openai import OpenAI
from pydantic import ValidationError
from starlette.testclient import TestClient

from qwen_chat.chat import control_tokens
from qwen_chat.chat.control_tokens import TooManyTokens
from qwen_chat.chat.format import ChatFormat
from qwen_chat.dialects.grammar import Grammar
from qwen_chat.dialects.hermes import Hermes
from qwen_chat.errors import ToolError
from qwen_chat.inference.grammar import GrammarLate
from qwen_chat.inference.grammar_trial import LATE, TOO_LARGE, GrammarTrial
from qwen_chat.service import client_schema, prepare
from qwen_chat.service.app import MOST_TOKENIZING, create_app
from qwen_chat.service.protocol import HINTS, ChatRequest
from qwen_chat.service.settings import ServiceSettings
from qwen_chat.service.workers import Workers
from tests.support.chats import CHAT, ask, wait_until
from tests.support.scripted import CONTEXT, LiveService, make_engine

STEP = 100_000_007


def schema(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def multiple(step: float) -> dict[str, Any]:
    return {"type": "integer", "multipleOf": step}


def tool(parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **more}}


ONE = schema(a=multiple(STEP))
PRODUCT = schema(a={"anyOf": [multiple(100_003), multiple(100_019)]})
LEAST = schema(a={"allOf": [multiple(9973), multiple(9967)]})
REFERRED = {**schema(a={"allOf": [{"$ref": "#/$defs/x"}, multiple(9973)]}), "$defs": {"x": multiple(9967)}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": ONE}}
BOMBS: list[dict[str, Any]] = [
    {"response_format": FORMAT},
    *({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": one}}}
      for one in (PRODUCT, LEAST, REFERRED)),
    {"tools": [tool(ONE, strict=True)]},
    {"tools": [tool(ONE)], "tool_choice": "required"},
    {"tools": [tool(PRODUCT)], "tool_choice": {"type": "function", "function": {"name": "f"}}},
]  # fmt: skip


@pytest.fixture(scope="module")
def live() -> Iterator[LiveService]:
    with LiveService(create_app(make_engine(), settings=ServiceSettings(model_name="scripted"))) as service:
        assert requests.post(f"{service.url}{CHAT}", json=ask("say {}", response_format={"type": "json_object"}),
                             timeout=30).status_code == 200  # fmt: skip
        yield service


@pytest.mark.alone
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_schema_that_explodes_is_refused_while_others_are_served(
    live: LiveService, bomb: dict[str, Any]
) -> None:
    before = psutil.Process().memory_info().rss
    seconds: list[float] = []
    heard: list[float] = []  # when each line of the stream came
    with requests.post(
        f"{live.url}{CHAT}", json=ask("slow 5 " + "x" * 3000, stream=True), stream=True, timeout=30
    ) as stream:

        def listen() -> None:
            with contextlib.suppress(Exception):  # it is closed under it
                heard.extend(time.monotonic() for line in stream.iter_lines(chunk_size=1) if line)

        threading.Thread(target=listen, daemon=True).start()
        wait_until(lambda: len(heard) > 2)
        for _ in range(2):
            began = time.monotonic()
            answer = requests.post(f"{live.url}{CHAT}", json=ask("say hi", **bomb), timeout=30)
            seconds.append(time.monotonic() - began)
            assert answer.status_code == 400
            message = answer.json()["error"]["message"]
            assert "too complex" in message and "start:" not in message and len(message) < 300
        assert requests.get(f"{live.url}/ready", timeout=5).status_code == 200
        ended = time.monotonic()
        wait_until(lambda: heard[-1] > ended)  # it goes on
    assert max(seconds) < 2  # the second is remembered
    assert max(after - before for before, after in itertools.pairwise(heard)) < 1
    assert psutil.Process().memory_info().rss - before < 50 * 2**20


def test_refused_grammars_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    grammar = Grammar.json_schema(schema(b=multiple(STEP)))
    for expected in (1, 1):
        with pytest.raises(ToolError, match="too complex"):
            engine.check_grammar(grammar)
        grammars = engine._grammars
        assert grammars is not None and len(grammars._refused) == expected
        monkeypatch.setattr(grammars._trial, "problem", lambda source: pytest.fail("tried again"))
    engine.stop()


def test_a_small_step_is_honoured() -> None:
    engine = make_engine()
    for step in (1, 7, 0.01, 1000, 10**6):
        engine.check_grammar(Grammar.json_schema(schema(a={"type": "number", "multipleOf": step})))
    engine.stop()


def test_trial_has_limits_and_lives_on() -> None:
    trial = GrammarTrial()
    try:
        good = f"start: %json {json.dumps(schema(a={'type': 'string'}))}\n"
        assert trial.problem(good) is None
        process = trial._process
        assert process is not None
        assert trial.problem(f"start: %json {json.dumps(ONE)}\n") == TOO_LARGE
        assert trial.problem(good) is None
        assert trial._process is process  # only the fork was ended
        process.kill()
        assert trial.problem(good) is None  # and it is started again
        assert "not" in (trial.problem('start: %json {"not": {}}\n') or "")
        assert "torch" not in Path(f"/proc/{trial._process.pid}/maps").read_text(encoding="utf-8")
    finally:
        trial.close()
    assert trial._process is None


def test_many_honest_tools_stand_the_trial() -> None:
    properties = {f"p{k}": {"type": "string", "description": "x" * 50} for k in range(20)}
    tools = [tool(schema(**properties), name=f"f{k}") for k in range(128)]
    engine = make_engine()
    engine.check_grammar(Hermes().call_grammar(tools, parallel=True))
    engine.stop()


def test_memory_is_bounded_without_time() -> None:
    trial = GrammarTrial(cpu_seconds=60, memory_bytes=8 * 2**20)
    try:
        assert trial.problem(f"start: %json {json.dumps(schema(a=multiple(300_007)))}\n") == TOO_LARGE
    finally:
        trial.close()


def test_a_busy_machine_is_no_fault_of_the_schema() -> None:
    engine = make_engine()
    engine.check_grammar(Grammar.json_object())
    grammars = engine._grammars
    assert grammars is not None
    grammars._trial.problem = lambda source: LATE  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(GrammarLate):
            engine.check_grammar(Grammar.json_schema(schema(late={"type": "string"})))
    assert grammars._refused == {}
    engine.stop()


# --- threads -------------------------------------------------------------------------------------


def test_workers() -> None:
    workers, gate = Workers("test", 2), threading.Event()
    first = workers.submit(gate.wait)
    assert workers.stuck_seconds() == 0
    second, third = workers.submit(gate.wait), workers.submit(lambda: 3)
    while not second.running():
        time.sleep(0.001)
    time.sleep(0.02)
    assert 0 < workers.stuck_seconds() < 10
    assert not third.done()
    cancelled = workers.submit(lambda: pytest.fail("cancelled work ran"))
    assert cancelled.cancel()
    gate.set()
    assert (first.result(5), third.result(5)) == (True, 3)
    assert workers.stuck_seconds() == 0
    with pytest.raises(ZeroDivisionError):
        workers.submit(lambda: 1 // 0).result(5)
    assert all(t.daemon for t in threading.enumerate() if t.name.startswith("test-"))


@pytest.mark.alone
def test_a_stuck_intake_turns_ready_red_and_nothing_else_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr("qwen_chat.service.app.chat_job", lambda *_: gate.wait())
    app = create_app(make_engine(), settings=ServiceSettings(model_name="scripted", prepare_seconds=0.2))
    with LiveService(app) as live:
        answers = [requests.post(f"{live.url}{CHAT}", json=ask("say hi"), timeout=10) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [503, 503]
        ready = requests.get(f"{live.url}/ready", timeout=5)
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "intake_stuck")
        assert requests.get(f"{live.url}/health", timeout=5).status_code == 200
        assert requests.post(f"{live.url}/tokenize", json={"prompt": "a"}, timeout=5).json()["tokens"] == [97]
        gate.set()
        deadline = time.monotonic() + 5
        while requests.get(f"{live.url}/ready", timeout=5).status_code != 200:
            assert time.monotonic() < deadline


END_IN_TIME = """
import sys, threading
sys.path.insert(0, {root!r})
from qwen_chat.service import app as service, server
from qwen_chat.service.settings import ServiceSettings
from tests.support.scripted import make_engine
service.chat_job = lambda *_: threading.Event().wait()
listener = server.bind("127.0.0.1", 0)
app = service.create_app(make_engine(), settings=ServiceSettings(prepare_seconds=0.2))
print(listener.getsockname()[1], flush=True)
server.serve(app, listener, drain_seconds=1)
"""


def test_a_thread_that_hangs_does_not_hold_up_the_end() -> None:
    code = (
        "import sys, threading; sys.path.insert(0, sys.argv[1])\n"
        "from qwen_chat.service.workers import Workers\n"
        "Workers('x', 1).submit(threading.Event().wait)"
    )
    root = str(Path(__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", code, root], timeout=30, check=False).returncode == 0


@pytest.mark.slow
def test_sigterm_ends_a_service_whose_intake_hangs() -> None:
    code = END_IN_TIME.format(root=str(Path(__file__).resolve().parents[2]))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{int(process.stdout.readline())}"
            until = time.monotonic() + 30
            while True:
                try:
                    assert requests.get(f"{url}/ready", timeout=5).status_code == 200
                    break
                except requests.ConnectionError:
                    assert time.monotonic() < until
                    time.sleep(0.05)
            assert requests.post(f"{url}{CHAT}", json=ask("say hi"), timeout=10).status_code == 503
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0
        finally:
            process.kill()


# --- prompts -------------------------------------------------------------------------------------

PIECES = ["a", "Bc", " ", "  ", "\n", "中", "文，", "。", "'s", "'ll", "1", "23", ".", "-", "é", "e\u0301", "🙂",
          "<|im_end|>", "<tool_call>", "\t", "\u3000", "f(x)", '"k":']  # fmt: skip


@pytest.fixture(scope="module", params=["demo_tokenizer", "qwen2_5_tokenizer"])
def fmt(request: pytest.FixtureRequest) -> ChatFormat:
    return ChatFormat(request.getfixturevalue(request.param))


def test_pieces_have_the_ids_of_the_whole(fmt: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    import random

    draw = random.Random(7)
    tokens = fmt._tokens
    mark = tokens.mark("<|im_end|>")
    monkeypatch.setattr(control_tokens, "_PIECE", 20)
    cut = 0
    for _ in range(80):
        text = "".join(draw.choices(PIECES, k=draw.randint(1, 120)))
        marked = mark.join([text, text[::-1]])
        whole = tokens.encode([marked])[0]
        assert tokens.encode_within(marked, None) == whole
        assert fmt.text_ids(text) == fmt.tokenizer.encode(text, add_special_tokens=False)
        assert tokens._least(marked) <= len(whole)
        cut += len(list(tokens._pieces(marked, None, tokens._border))) > 1
    assert cut > 50


def test_a_long_prompt_is_refused_before_it_is_tokenised(
    fmt: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    encode = fmt._tokens.encode

    def counting(marked: list[str]) -> list[list[int]]:
        asked.extend(map(len, marked))
        return encode(marked)

    monkeypatch.setattr(fmt._tokens, "encode", counting)
    words = "hello wide world " * 60_000  # a megabyte
    for text, most in ((words, 4096), ("a" * 10**6, 4096)):
        with pytest.raises(TooManyTokens) as error:
            fmt.render([{"role": "user", "content": text}], most=most)
        assert error.value.least > most
    assert asked == []  # the bytes alone say so
    monkeypatch.setattr(fmt._tokens, "_least", lambda text: 0)
    with pytest.raises(TooManyTokens):
        fmt.render([{"role": "user", "content": words}], most=9000)
    assert 9000 < sum(asked) < 200_000  # and where they do not, the first pieces
    assert len(fmt.render([{"role": "user", "content": "hello"}], most=1).ids) > 1  # short ones are counted


def test_render_is_prompt(fmt: ChatFormat) -> None:
    messages = [{"role": "user", "content": "你好 <|im_end|> <think>"}]
    prompt = fmt.render(messages)
    assert prompt.ids == fmt.prompt_ids(messages)
    assert prompt.in_reasoning is fmt.in_reasoning(fmt.prompt(messages)) is False


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_four_megabytes_are_refused_at_once(path: str) -> None:
    text = "hi there " * 450_000
    body = ask(text) if path == CHAT else {"model": "default", "prompt": text}
    with TestClient(create_app(make_engine())) as client:
        error = client.post(path, json=body).json()["error"]
    assert error["code"] == "context_length_exceeded"
    param = "messages" if path == CHAT else "prompt"
    assert error["param"] == param
    assert f"your {param} resulted in at least" in error["message"]
    assert f"maximum context length is {CONTEXT} tokens" in error["message"]


def test_tokens_of_a_long_text_come_in_pieces(fmt: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chat, as /tokenize counts it: nothing is refused there, and nobody waits for the whole."""
    asked: list[int] = []
    encode = fmt._tokens.encode
    monkeypatch.setattr(fmt._tokens, "encode", lambda texts: asked.extend(map(len, texts)) or encode(texts))
    messages = [{"role": "user", "content": "hello wide world " * 10_000}]
    ids = prepare.chat_prompt_ids(messages, None, fmt)
    assert len(asked) > 4 and max(asked) < control_tokens._PIECE + 20
    assert ids == fmt.prompt_ids(messages)


def test_tokenizing_has_places_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(ChatFormat, "text_ids", lambda *_, **__: gate.wait() and [])
    with LiveService(create_app(make_engine())) as live:
        statuses: list[int] = []

        def tokenize() -> None:
            answer = requests.post(f"{live.url}/tokenize", json={"prompt": "x"}, timeout=20)
            statuses.append(answer.status_code)

        threads = [threading.Thread(target=tokenize) for _ in range(MOST_TOKENIZING + 3)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 10
        while len(statuses) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        answer = requests.post(f"{live.url}{CHAT}", json=ask("say hi"), timeout=10)
        assert answer.json()["choices"][0]["message"]["content"] == "hi"  # no chat waits for them
        gate.set()
        for thread in threads:
            thread.join(10)
    assert sorted(statuses) == [200] * MOST_TOKENIZING + [429] * 3


# --- schemas -------------------------------------------------------------------------------------

SET = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
HTTP_URL = {"type": "string", "format": "uri", "minLength": 1, "maxLength": 2083}
PYDANTIC: list[dict[str, Any]] = [
    SET,
    HTTP_URL,
    {"type": "string", "format": "binary"},  # bytes
    {"type": "string", "contentEncoding": "base64"},
    {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\\d*\\.?\\d*$"},  # Decimal
    {"oneOf": [{"type": "integer"}, {"type": "string"}]},  # a discriminated union
    {"type": "object", "propertyNames": {"maxLength": 3}, "additionalProperties": {"type": "integer"}},
]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(make_engine(), settings=ServiceSettings(model_name="scripted"))) as client:
        yield client


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
@pytest.mark.parametrize("part", PYDANTIC)
def test_a_tool_that_is_not_strict_is_called_under_what_a_grammar_holds(
    client: TestClient, part: dict[str, Any], choice: Any
) -> None:
    body = ask(
        "say x", tools=[tool(schema(a=part, b={"type": "boolean"}))], tool_choice=choice, max_tokens=3000
    )
    answer = client.post(CHAT, json=body).json()
    function = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    arguments = json.loads(function["arguments"])
    assert set(arguments) == {"a", "b"} and isinstance(arguments["b"], bool)  # bound to all the rest


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (SET, 'Unimplemented keys: ["uniqueItems"]'),
        (HTTP_URL, "'maxLength' is 2083; at most 2000"),
        (PYDANTIC[2], "Unknown format: binary"),
    ],
)
@pytest.mark.parametrize("how", ["strict", "response_format"])
def test_what_must_hold_and_cannot_is_refused_clearly(
    client: TestClient, part: dict[str, Any], says: str, how: str
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema(a=part)}}
    more = {"response_format": form} if how != "strict" else {"tools": [tool(schema(a=part), strict=True)]}
    answer = client.post(CHAT, json=ask("say x", **more))
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and says in message
    assert "start:" not in message and "x-guidance" not in message and "1 |" not in message


def test_schemas_are_judged_once(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[Any] = []
    judge = client_schema._measure
    monkeypatch.setattr(client_schema, "_VERDICTS", {})
    monkeypatch.setattr(client_schema, "_measure", lambda one, bound: judged.append(one) or judge(one, bound))
    tools = [tool(schema(**{f"p{k}": {"type": "string", "minLength": k}}), name=f"f{k}") for k in range(20)]
    for _ in range(3):
        assert client.post(CHAT, json=ask("say x", tools=tools)).status_code == 200
    assert len(judged) == 20
    bad = ask("say x", tools=[tool({"type": "nonsense"})])
    messages = {client.post(CHAT, json=bad).json()["error"]["message"] for _ in range(2)}
    assert len(judged) == 21 and len(messages) == 1
    monkeypatch.setattr(client_schema, "_MOST_VERDICTS", 5)
    client.post(CHAT, json=ask("say x", tools=[tool(schema(z={"type": "null"}))]))
    assert len(client_schema._VERDICTS) == 5


def test_schemas_together_have_a_ceiling(client: TestClient) -> None:
    wide = schema(**{f"p{k}": {"type": "string"} for k in range(700)})
    tools = [tool({**wide, "title": str(k)}, name=f"f{k}") for k in range(30)]
    error = client.post(CHAT, json=ask("say x", tools=tools)).json()["error"]
    assert error["code"] == "schema_too_large"
    assert "the schemas have over 40000 parts together" in error["message"]


def test_a_prompt_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    rendered: list[int] = []
    render = engine.fmt._marked

    def counting(*arguments: Any, **more: Any) -> str:
        rendered.append(1)
        return render(*arguments, **more)

    monkeypatch.setattr(engine.fmt, "_marked", counting)
    monkeypatch.setattr(engine.fmt, "_render", lambda *_, **__: pytest.fail("rendered a second time"))
    with TestClient(create_app(engine)) as client:
        assert client.post(CHAT, json=ask("say hi")).status_code == 200
    assert rendered == [1]


def test_unknown_keys_of_many_calls_are_not_all_described() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    calls = [{**call, **{f"k{k}": 0 for k in range(2040)}} for _ in range(128)]
    body = {"model": "m", "messages": [{"role": "assistant", "tool_calls": calls}]}
    with pytest.raises(ValidationError) as error:
        ChatRequest.model_validate(body)
    assert error.value.error_count() <= 2040


# --- hints ---------------------------------------------------------------------------------------

CACHE = {"type": "ephemeral", "ttl": "5m"}
ALL_HINTS: dict[str, Any] = {
    "metadata": {"run": "7"},
    "prediction": {"type": "content", "content": "hi"},
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "service_tier": "flex",
    "store": True,
    "verbosity": "low",
    "messages": [
        {"role": "system", "content": "Be brief.", "cache_control": CACHE},
        {"role": "user", "content": "say old", "name": "ada"},
        {"role": "assistant", "content": "old", "tool_calls": [], "reasoning": "hm"},
        {"role": "user", "content": [{"type": "text", "text": "say hi", "cache_control": CACHE}]},
    ],
    "tools": [{**tool(schema(a={"type": "string"})), "cache_control": CACHE}],
}


@pytest.mark.parametrize("stream", [False, True])
def test_hints_are_taken_and_named(live: LiveService, stream: bool) -> None:
    """With the official client; the answer is the one without them."""
    openai = OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    raw = openai.chat.completions.with_raw_response.create(model="default", stream=stream, **ALL_HINTS)
    assert raw.headers["x-ignored"] == ", ".join(HINTS)
    answer = raw.parse()
    pieces = (
        [chunk.choices[0].delta.content or "" for chunk in answer]
        if stream
        else [answer.choices[0].message.content]
    )
    assert "".join(pieces) == "hi"
    plain = openai.chat.completions.with_raw_response.create(
        model="default", messages=[{"role": "user", "content": "say hi"}], store=False, service_tier="auto",
        stream=stream, tools=[],
    )  # fmt: skip
    assert "x-ignored" not in plain.headers
    plain.parse()


def test_hints_change_no_prompt(fmt: ChatFormat) -> None:
    plain = prepare._messages(ALL_HINTS["messages"])
    assert plain[2] == {"role": "assistant", "content": "old", "reasoning": "hm"}
    tools = prepare.plain_tools(ALL_HINTS["tools"])
    text = fmt.prompt(plain, tools)
    assert "cache_control" not in text and "ephemeral" not in text
    bare = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "say old"},
            plain[2], {"role": "user", "content": "say hi"}]  # fmt: skip
    assert text == fmt.prompt(bare, [tool(schema(a={"type": "string"}))])


def test_empty_tools_are_none(client: TestClient) -> None:
    for more in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"parallel_tool_calls": True}):
        answer = client.post(CHAT, json=ask("say hi", tools=[], **more)).json()
        assert answer["choices"][0]["message"]["content"] == "hi"


def test_the_page_tells_every_hint() -> None:
    page = (Path(__file__).parents[2] / "docs" / "service.md").read_text(encoding="utf-8")
    rows = dict(
        re.findall(r"^\| `([\w.]+)` \| (.+) \|$", page.partition("## Hints\n")[2].partition("\n## ")[0], re.M)
    )
    assert rows == HINTS
