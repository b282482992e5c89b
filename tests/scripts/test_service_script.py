"""The service as a person starts it: a process of its own, the real demo model, real clients on loopback."""

# ruff: noqa: E501  a row of a table is one line

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from openai import AuthenticationError, OpenAI

from qwen_chat.errors import ChatError, OptionError
from tests.support.scripts import Started, starts

ROOT = Path(__file__).resolve().parents[2]
CREATE = ROOT / "fast_start" / "simple_try_create_service.py"
CALL = ROOT / "fast_start" / "try_call_service.py"
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["c", "f"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


class Process:
    """A running service: its address, what it printed, its log."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.log = folder / "requests.log"
        self.output = folder / "output.txt"
        command = [sys.executable, str(CREATE), "--port", "0", "--log_file", str(self.log), *words]
        environment = {key: value for key, value in os.environ.items() if key != "API_KEY"}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder
            )
        self.url = self._wait()

    def _wait(self) -> str:
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            found = re.search(r"listening on (http://\S+)", self.output.read_text())
            if found and self._answers(found[1]):
                return found[1]
            time.sleep(0.05)
        raise AssertionError(f"the service did not start: {self.output.read_text()}")

    def _answers(self, url: str) -> bool:
        try:
            return requests.get(url + "/ready", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(40)

    def close(self) -> None:
        self.process.kill()  # where a test failed before it stopped
        self.process.wait()


def run(script: Path, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "API_KEY"} | (env or {})
    command = [sys.executable, str(script), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path) -> Iterator[Process]:
    process = Process(tmp_path_factory.mktemp("service"))
    yield process
    assert process.stop() == 0


@pytest.fixture(scope="module")
def openai(service: Process) -> OpenAI:
    return OpenAI(
        base_url=f"{service.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    )


@pytest.mark.alone
def test_it_says_what_it_decided(service: Process) -> None:
    said = service.output.read_text()
    assert "model SmolLM2-135M-Instruct (" in said
    assert re.search(r"^dtype float32 \(", said, re.MULTILINE)
    (curl,) = re.findall(r"^  (curl .*)$", said, re.MULTILINE)
    short = curl.replace('"messages"', '"max_tokens": 4, "messages"')
    answer = subprocess.run(
        ["bash", "-c", f"{short} --silent --max-time 60"], capture_output=True, text=True, check=True
    )
    assert json.loads(answer.stdout)["object"] == "chat.completion"


@pytest.mark.alone
def test_openai_client(openai: OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "messages": CAPITAL,
        "temperature": 0,
        "max_tokens": 40,
    }
    plain = openai.chat.completions.create(**request)
    assert plain.choices[0].message.content == "The capital of France is Paris."
    assert plain.choices[0].finish_reason == "stop"
    pieces = list(
        openai.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    assert (
        "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
        == "The capital of France is Paris."
    )
    assert pieces[-1].usage is not None
    assert plain.usage is not None
    assert pieces[-1].usage.completion_tokens == plain.usage.completion_tokens


@pytest.mark.alone
def test_required_call_of_a_model_that_knows_no_tools(openai: OpenAI) -> None:
    for choice, reason in (
        ("required", "tool_calls"),
        ({"type": "function", "function": {"name": "get_weather"}}, "stop"),
    ):
        answer = openai.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "How is the weather in Paris?"}],
            tools=[WEATHER],  # type: ignore[list-item]
            tool_choice=choice,  # type: ignore[arg-type]
            parallel_tool_calls=False,
            temperature=0,
            max_tokens=100,
        ).choices[0]
        assert answer.finish_reason == reason
        (call,) = answer.message.tool_calls or ()
        arguments = json.loads(call.function.arguments)  # type: ignore[union-attr]
        assert set(arguments) == {"city", "unit"}
        assert arguments["unit"] in ("c", "f")


@pytest.mark.alone
def test_call_script(service: Process) -> None:
    words = ("--url", service.url, "--prompt", "What is the capital of France?")
    for more in ((), ("--stream",)):
        done = run(CALL, *words, *more)
        assert (done.returncode, done.stdout) == (0, "The capital of France is Paris.\n")
        assert re.fullmatch(r"\d+ tokens in, 8 out\n", done.stderr)


def test_call_script_when_nobody_is_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        done = run(CALL, "--url", f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"error: http://\S+ cannot be reached .* start the service with .*\n", done.stderr)
    assert run(CALL, "--urll", "x").returncode == 2


@pytest.mark.alone
def test_health_while_prefilling(service: Process) -> None:
    prompt = " ".join(f"Fact {k}: the number {k} comes before {k + 1}." for k in range(90))
    body = {"model": "default", "messages": [{"role": "user", "content": prompt}], "max_tokens": 2}
    worker = threading.Thread(
        target=lambda: requests.post(f"{service.url}/v1/chat/completions", json=body, timeout=120)
    )
    worker.start()
    times = []
    while worker.is_alive() and len(times) < 200:
        began = time.monotonic()
        assert requests.get(f"{service.url}/health", timeout=10).status_code == 200
        times.append(time.monotonic() - began)
        time.sleep(0.01)
    worker.join()
    assert len(times) >= 5, "the prompt was too short to look while it is computed"
    assert sorted(times)[len(times) // 2] < 0.05
    assert max(times) < 0.5


@pytest.mark.alone
def test_many_at_once_answer_as_alone(service: Process) -> None:
    countries = ("France", "Italy", "Japan", "Spain", "Norway", "Egypt")

    def ask(country: str) -> str:
        body = {
            "model": "default",
            "messages": [{"role": "user", "content": f"What is the capital of {country}?"}],
            "temperature": 0,
            "max_tokens": 12,
        }
        answer = requests.post(f"{service.url}/v1/chat/completions", json=body, timeout=120).json()
        return str(answer["choices"][0]["message"]["content"])

    alone = [ask(country) for country in countries]
    with ThreadPoolExecutor(len(countries)) as pool:
        together = list(pool.map(ask, countries))
    assert together == alone
    assert len(set(alone)) == len(countries)


@pytest.mark.alone
def test_log_lines(service: Process) -> None:
    lines = [json.loads(line) for line in service.log.read_text().splitlines()]
    chats = [line for line in lines if line["path"] == "/v1/chat/completions"]
    assert chats
    assert all(line["status"] == 200 and line["completion_tokens"] > 0 for line in chats)
    assert "capital" not in service.log.read_text()


@pytest.mark.alone
def test_port_in_use(service: Process) -> None:
    port = service.url.rpartition(":")[2]
    began = time.monotonic()
    done = run(CREATE, "--port", port)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: --host 127.0.0.1 --port {port}: the port is in use; stop what listens there, or choose another with --port\n"
    )
    assert time.monotonic() - began < 20  # before a model is loaded


BAD = [
    (["--prot", "1"], r"--prot: unknown flag; did you mean --port\?"),
    (["--port", "99999"], r"--port 99999: expected 0 to 65535"),
    (["--host", "0.0.0.0"], r"--host 0\.0\.0\.0: everybody who reaches it .* --api_key .* --allow_without_key"),
    (["--host", "no.such.host.invalid", "--allow_without_key"], r"--host no\.such\.host\.invalid: no such address"),
    (["-m", "/no/such/folder"], r"/no/such/folder: no such folder"),
    (["--adapter", "x"], r"--adapter x: expected NAME=DIR"),
    (["--adapter", "x=/none"], r"/none: no adapter_config\.json in it"),
    (["--api_key_file", "/none"], r"--api_key_file /none: cannot be read"),
    (["--api_key", "a b"], r"--api_key: a key may hold printable ASCII without spaces"),
    (["--log_file", "/proc/none/log"], r"/proc/none/log: cannot write the service log .* --log_file"),
    (["--quantize", "int3"], r"--quantize: 'int3'; expected int8"),
    (["--dry_run"], r"--dry_run: has no effect with --engine transformers"),
    (["--tensor_parallel_size", "2"], r"--tensor_parallel_size: has no effect with --engine transformers"),
    (["--engine", "vllm", "--max_body_mb", "1"], r"--max_body_mb: has no effect with --engine vllm"),
    (["--engine", "vllm", "--quantize", "int8"], r"--quantize int8 is for --engine transformers"),
]  # fmt: skip


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path) -> list[Started]:
    """What became of each of BAD."""
    folder = tmp_path_factory.mktemp("refused")
    words = [["--port", "0", *words] for words, _ in BAD]
    return starts("fast_start/simple_try_create_service.py", words, folder)


@pytest.mark.parametrize("number", range(len(BAD)), ids=[" ".join(words) for words, _ in BAD])
def test_bad_input(number: int, started: list[Started]) -> None:
    done = started[number]
    assert done.status == 2, done.said
    *_, last = done.said.splitlines()
    assert re.match(f"error: {BAD[number][1]}", last), done.said
    assert "Traceback" not in done.said


@pytest.mark.parametrize("script", [CREATE, CALL])
def test_help_needs_no_torch(script: Path) -> None:
    code = (
        "import runpy, sys\nsys.argv = [sys.argv[1], '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    status = end.code or 0\n"
        "print('heavy:', sorted({'torch', 'transformers', 'gradio', 'fastapi'} & set(sys.modules)), status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(script)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.endswith("heavy: [] 0\n")
    assert "--url" in done.stdout or "--adapter" in done.stdout


# --- keys and adapters ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path) -> Path:
    """An adapter that changes every answer: random matrices, no training."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("adapters") / "mine"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(demo_model_path)
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=256, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model_path).save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        demo_model_path
    )
    return folder


def test_an_adapter_is_named_by_its_folder_or_as_told(tmp_path: Path) -> None:
    from qwen_chat.cli.serve import read_adapters

    for name in ("one", "a=b", "default"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    one = tmp_path / "one"
    assert read_adapters([str(one), f"two={one}", str(tmp_path / "a=b"), f"x={tmp_path / 'a=b'}"]) == {
        "one": one,
        "two": one,
        "a=b": tmp_path / "a=b",
        "x": tmp_path / "a=b",
    }
    for words, said in (
        ([str(one), f"one={one}"], "--adapter one: the name is taken"),
        ([str(tmp_path / "default")], "--adapter default: the name is taken"),
        ([str(tmp_path / "none")], "expected NAME=DIR or a folder that is there"),
        ([str(tmp_path)], "no adapter_config.json in it"),
    ):
        with pytest.raises(ChatError, match=said):
            read_adapters(words)


def test_adapters_and_keys(tmp_path: Path, adapter: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# who: the team\nfile-key\n")
    process = Process(
        tmp_path, "--adapter", f"mine={adapter}", "--api_key", "flag-key", "--api_key_file", str(keys)
    )
    try:
        with pytest.raises(AuthenticationError):
            OpenAI(base_url=f"{process.url}/v1", api_key="guess", max_retries=0).models.list()
        client = OpenAI(base_url=f"{process.url}/v1", api_key="file-key", max_retries=0)
        assert [model.id for model in client.models.list()] == ["SmolLM2-135M-Instruct", "mine"]

        def answer(model: str) -> str | None:
            request: dict[str, Any] = {"messages": CAPITAL, "temperature": 0, "max_tokens": 12}
            return client.chat.completions.create(model=model, **request).choices[0].message.content

        assert answer("default") == "The capital of France is Paris."
        tuned = answer("mine")
        assert tuned != answer("default")

        def manage(action: str, **body: str) -> tuple[int, Any]:
            found = requests.post(
                f"{process.url}/v1/{action}_lora_adapter",
                json=body,
                headers={"Authorization": "Bearer flag-key"},
                timeout=60,
            )
            return found.status_code, found.json()

        assert manage("load", lora_name="second", lora_path=str(adapter)) == (
            200,
            {"lora_name": "second", "status": "loaded"},
        )
        assert answer("second") == tuned
        status, error = manage("load", lora_name="third", lora_path=str(tmp_path))
        assert (status, error["error"]["param"]) == (400, "lora_path")
        assert str(tmp_path) not in json.dumps(error)
        assert manage("load", lora_name="second", lora_path=str(adapter))[0] == 400
        assert manage("unload", lora_name="second")[0] == 200
        assert manage("unload", lora_name="second")[0] == 404
        status = requests.post(
            f"{process.url}/v1/chat/completions",
            json={"model": "second", "messages": CAPITAL},
            headers={"Authorization": "Bearer flag-key"},
            timeout=60,
        ).status_code
        assert status == 404
        assert not any(
            key in process.log.read_text() + process.output.read_text() for key in ("flag-key", "file-key")
        )
        _drains(process, client)
    finally:
        if process.process.poll() is None:
            process.process.kill()


def _drains(process: Process, client: OpenAI) -> None:
    """SIGTERM: what runs is answered to its end, nobody new is let in, the status is 0."""
    request: dict[str, Any] = {
        "messages": CAPITAL,
        "temperature": 0,
        "max_tokens": 30,
        "logit_bias": {"2": -100},
    }
    stream = client.chat.completions.create(model="default", stream=True, **request)
    pieces = [next(stream)]
    process.process.send_signal(signal.SIGTERM)
    pieces += list(stream)
    assert pieces[-1].choices[0].finish_reason in ("length", "stop")
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{process.url}/health", timeout=5)
    assert process.process.wait(20) == 0


# --- vLLM ----------------------------------------------------------------------------------------


def fake_python(folder: Path, has_vllm: bool) -> Path:
    """Stands where vLLM's Python stands: says how it was called."""
    file = folder / "python with vllm"
    file.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then exit {0 if has_vllm else 1}; fi\n'
        'echo "key=$VLLM_API_KEY bound=$QWEN_CHAT_MAX_REQUESTS path=$PYTHONPATH"\n'
        'for word in "$@"; do echo "<$word>"; done\n'
    )
    file.chmod(0o755)
    return file


def words_after(output: str, flag: str, count: int = 1) -> Sequence[str]:
    words = re.findall(r"<(.*)>", output)
    place = words.index(flag)
    return words[place + 1 : place + 1 + count]


def test_hand_over_to_vllm(tmp_path: Path, adapter: Path) -> None:
    python = fake_python(tmp_path, True)
    done = run(
        CREATE, "--engine", "vllm", "--vllm_python", str(python), "--adapter", f"mine={adapter}", "--api_key", "secret",
        "--host", "0.0.0.0", "--port", "9000", "--tensor_parallel_size", "4", "--pipeline_parallel_size", "2",
        "--max_batch", "8", "--max_queue", "5", "--vllm_args=--enforce-eager --seed 3",
        env={"QWEN_CHAT_CACHE": os.environ.get("QWEN_CHAT_CACHE", "")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"key=secret bound=13 path={ROOT}" in done.stdout
    assert words_after(done.stdout, "-m") == ["vllm.entrypoints.openai.api_server"]
    expected = {
        "--served-model-name": ["SmolLM2-135M-Instruct", "default"],
        "--host": ["0.0.0.0"],
        "--port": ["9000"],
        "--tool-call-parser": ["hermes"],
        "--tensor-parallel-size": ["4"],
        "--pipeline-parallel-size": ["2"],
        "--max-num-seqs": ["8"],
        "--middleware": ["qwen_chat.service.queue_bound.QueueBound"],
        "--lora-modules": [f"mine={adapter}"],
        "--max-lora-rank": ["8"],
        "--seed": ["3"],
    }
    assert {flag: words_after(done.stdout, flag, len(value)) for flag, value in expected.items()} == expected
    template = Path(words_after(done.stdout, "--chat-template")[0]).read_text(encoding="utf-8")
    assert "<tools>" in template  # ours, tools included: the demo model's own has none
    assert "--enable-auto-tool-choice" in done.stdout
    assert "secret" not in "".join(line for line in done.stdout.splitlines() if line.startswith("<"))


def test_vllm_renders_base_and_adapters_with_one_template_or_not_at_all(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_chat.service.vllm import _one_template, write_template

    monkeypatch.setenv("QWEN_CHAT_CACHE", str(tmp_path / "cache"))
    same, other = (shutil.copytree(tiny_model_path, tmp_path / name) for name in ("same", "other"))
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(template.replace("helpful", "rhyming"))
    base = write_template(tiny_model_path)
    assert _one_template(tiny_model_path, {"same": same, "bare": tmp_path}) == base
    for adapters in ({"other": other}, {"same": same, "other": other}):
        with pytest.raises(OptionError, match=f"{other}: trained under another template than the model"):
            _one_template(tiny_model_path, adapters)


def test_without_vllm(tmp_path: Path, demo_model_path: Path) -> None:
    done = run(CREATE, "--engine", "vllm", "--vllm_python", str(fake_python(tmp_path, False)))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --engine vllm (with ")
    assert "pip install vllm" in done.stderr


WORDS = [
    "sea",
    "town",
    "bread",
    "clock",
    "wind",
    "market",
    "winter",
    "bridge",
    "train",
    "river",
    "lamp",
    "paper",
]


def visit(url: str, chance: random.Random) -> None:
    """One request of a kind that chance picks: answered as that kind is, whole or left in the middle."""
    words = " ".join(chance.choices(WORDS, k=chance.choice((5, 30, 300))))
    said = [{"role": "user", "content": f"Tell me about {words}"}]
    body: dict[str, Any] = {"model": "default", "messages": said, "max_tokens": 32}
    status, kind = 200, chance.choice(("greedy", "sampled", "called", "left", "wrong"))
    if kind == "called":
        choice = {"type": "function", "function": {"name": "get_weather"}}
        body |= {"tools": [WEATHER], "tool_choice": choice, "temperature": 0}
    elif kind == "left":
        body |= {"stream": True, "max_tokens": 400}
    elif kind == "wrong":
        status, body["temperature"] = 400, "warm"
    else:
        body |= {"temperature": 0 if kind == "greedy" else 1, "logprobs": True, "n": chance.choice((1, 2))}
    with requests.post(f"{url}/v1/chat/completions", json=body, stream=True, timeout=120) as answer:
        assert answer.status_code == status, answer.text
        if kind == "left":
            next(answer.iter_content(64))
        else:
            assert answer.json()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_minutes_of_load_leave_its_memory_as_it_was(demo_model_path: Path, tmp_path: Path) -> None:
    """Eight clients without a pause. Memory grows until the caches are full, in the first quarter; then no more."""
    process = Process(tmp_path, "--quantize", "int8")
    end, sizes = time.monotonic() + 1200, []

    def client(number: int) -> int:
        chance, done = random.Random(number), 0
        while time.monotonic() < end:
            visit(process.url, chance)
            done += 1
        return done

    with contextlib.closing(process), ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, number) for number in range(8)]
        while time.monotonic() < end and not any(one.done() for one in clients):
            sizes.append(psutil.Process(process.process.pid).memory_info().rss)
            time.sleep(1)
        answered = sum(one.result() for one in clients)
        assert process.stop() == 0
    quarter = len(sizes) // 4
    second, last = max(sizes[quarter : 2 * quarter]), max(sizes[-quarter:])
    print(
        f"{answered:,} requests; {second / 2**20:.0f} MiB in the second quarter, {last / 2**20:.0f} in the last"
    )
    assert answered > 1000
    assert last < 1.03 * second
