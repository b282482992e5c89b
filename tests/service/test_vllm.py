"""What is handed over to vLLM: its command line, and the gate that is loaded into it."""

import asyncio
import copy
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_chat.chat.format import ChatFormat
from qwen_chat.service import vllm
from qwen_chat.service.queue_bound import KEYLESS, SERVED, QueueBound

ROOT = Path(__file__).resolve().parents[2]
INFERENCE = [
    *(
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
    ),
    *("/tokenize", "/detokenize"),
]
# from vLLM's security guide and its routes: what needs no key there, or does what nobody outside should
CLOSED = [
    *(
        "/invocations",
        "/pause",
        "/resume",
        "/update_weights",
        "/init_weight_transfer_engine",
        "/collective_rpc",
    ),
    *(
        "/scale_elastic_ep",
        "/is_scaling_elastic_ep",
        "/sleep",
        "/wake_up",
        "/reset_prefix_cache",
        "/start_profile",
    ),
    *(
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/chat/completions/batch",
        "/inference/v1/generate",
    ),
    *("/docs", "/openapi.json", "/server_info", "/ping", "/pooling", "/rerank", "/", ""),
    *("//v1/models", "/v1/models/", "/v1/../pause", "/v1/chat/completions/", "/V1/models", "/v1/models%2f"),
]


class Server:
    """A server behind the gate: remembers who got through, and answers when it is let."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached.append(
            scope["type"] if scope["type"] != "http" else f"{scope['method']} {scope['path']}"
        )
        await self.go_on.wait()
        if scope["type"] == "http":
            if scope["path"] == "/v1/completions":
                raise RuntimeError("a fault in the server")
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})


class Answer:
    def __init__(self, sent: list[Any]) -> None:
        self.status = sent[0]["status"]
        self.headers = dict(sent[0]["headers"])
        self.error = json.loads(sent[1]["body"]).get("error")


async def ask(gate: QueueBound, path: str, method: str = "POST", **more: Any) -> Answer:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    headers = [(name.encode(), value.encode()) for name, value in more.pop("headers", {}).items()]
    await gate({"type": "http", "method": method, "path": path, "headers": headers, **more}, receive, send)
    return Answer(sent)


def status(gate: QueueBound, path: str, method: str = "POST", **more: Any) -> int:
    return int(asyncio.run(ask(gate, path, method, **more)).status)


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[QueueBound, Server]]:
    """A gate with two keys and two places."""
    keys = " ".join(hashlib.sha256(key).hexdigest() for key in (b"one", b"two"))
    monkeypatch.setenv("QWEN_CHAT_KEYS", keys)
    monkeypatch.setenv("QWEN_CHAT_HOSTS", "")
    monkeypatch.setenv("QWEN_CHAT_MAX_REQUESTS", "2")
    server = Server()
    yield QueueBound(server), server


def with_key(key: str) -> dict[str, dict[str, str]]:
    return {"headers": {"authorization": f"Bearer {key}"}}


def test_every_path_but_health_wants_a_key(gated: tuple[QueueBound, Server]) -> None:
    gate, server = gated
    for path in [*SERVED - KEYLESS, *CLOSED]:
        for method in ("GET", "POST", "PUT", "DELETE", "HEAD"):
            for headers in (
                {},
                {"authorization": "Bearer three"},
                {"authorization": "one"},
                {"authorization": "Basic one"},
            ):
                assert status(gate, path, method, headers=headers) == 401, (method, path)
    assert server.reached == []
    assert status(gate, "/health", "GET") == 200
    for key in ("one", "two"):
        assert status(gate, "/v1/models", "GET", **with_key(key)) == 200
    assert status(gate, "/v1/chat/completions", "OPTIONS") == 200  # a browser's question before the question


def test_only_what_is_named_is_served(gated: tuple[QueueBound, Server]) -> None:
    gate, server = gated
    for path in CLOSED:
        for method in ("GET", "POST", "OPTIONS"):
            assert status(gate, path, method, **with_key("one")) == 404, (method, path)
    assert status(gate, "/x/pause", root_path="/x", **with_key("one")) == 404
    assert server.reached == []
    assert status(gate, "/x/v1/models", "GET", root_path="/x", **with_key("one")) == 200


def test_a_websocket_is_closed(gated: tuple[QueueBound, Server]) -> None:
    gate, server = gated
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(gate({"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send))
    assert (sent, server.reached) == ([{"type": "websocket.close", "code": 1008}], [])
    asyncio.run(gate({"type": "lifespan"}, receive, send))
    assert server.reached == ["lifespan"]


@pytest.mark.parametrize("path", INFERENCE)
def test_every_post_counts(gated: tuple[QueueBound, Server], path: str) -> None:
    gate, server = gated

    async def fifty() -> list[Answer | BaseException]:
        server.go_on = asyncio.Event()
        asked = [asyncio.create_task(ask(gate, path, **with_key("one"))) for _ in range(50)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(server.reached) == 2
        assert (await asyncio.wait_for(ask_freely(), 5)).status == 200  # a GET takes no place
        server.go_on.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    async def ask_freely() -> Answer:
        waiting, server.go_on = server.go_on, asyncio.Event()
        server.go_on.set()
        try:
            return await ask(gate, "/health", "GET")
        finally:
            server.go_on = waiting

    answers = asyncio.run(fifty())
    refused = [answer for answer in answers if isinstance(answer, Answer) and answer.status == 429]
    assert len(refused) == 48
    assert refused[0].headers[b"retry-after"] == b"2"
    assert refused[0].headers[b"connection"] == b"close"  # its body was not read
    assert refused[0].error == {
        "message": "Too many requests: 2 of 2 places are taken. Try again later.",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert gate.inside == 0  # given back after an answer, and after a fault


def test_without_a_key_only_the_machines_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_CHAT_KEYS", "")
    monkeypatch.setenv("QWEN_CHAT_HOSTS", "localhost 127.0.0.1 [::1]")
    gate = QueueBound(Server())
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
        assert status(gate, "/v1/models", "GET", headers={"host": host}) == 200
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "", "127.0.0.1.evil:80"):
        assert status(gate, "/v1/models", "GET", headers={"host": host}) == 403
        assert status(gate, "/health", "GET", headers={"host": host}) == 403
    monkeypatch.setenv("QWEN_CHAT_HOSTS", "")
    assert status(QueueBound(Server()), "/v1/models", "GET", headers={"host": "evil.example"}) == 200


def test_the_gate_needs_nothing_that_is_ours() -> None:
    """It is imported by the Python that has vLLM: no package of this environment, only the standard library."""
    code = (
        "import sys\nsys.path.insert(0, sys.argv[1])\nfrom qwen_chat.service.queue_bound import QueueBound\n"
        "QueueBound(None)\n"
        "print(sorted(name for name in sys.modules if name.partition('.')[0] not in sys.stdlib_module_names))"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['__main__', 'qwen_chat', 'qwen_chat.service', 'qwen_chat.service.queue_bound']\n"


# ---------------------------------------------------------------- the command


class Format:
    """A template that thinks as told, behind the few names that are asked for."""

    tool_style = "hermes"
    template = "T"
    system: str | None = None

    def __init__(self, opens: bool, switch: bool) -> None:
        self.opens, self.switch = opens, switch
        self.tokenizer = self

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        assert options["add_generation_prompt"]
        assert options["chat_template"] == "T"
        closed = "<think>\n\n</think>\n\n" if self.switch and options.get("enable_thinking") is False else ""
        return f"<|im_start|>assistant\n{'<think>' if self.opens else closed}"

    def in_reasoning(self, prompt: str) -> bool:
        return prompt.endswith("<think>")


def command(monkeypatch: pytest.MonkeyPatch, fmt: Format | ChatFormat, **more: Any) -> vllm.Command:
    monkeypatch.setattr(vllm, "_format", lambda folder: fmt)
    plain: dict[str, Any] = {
        "adapters": {},
        "api_keys": [],
        "cors_origins": [],
        "max_batch": 4,
        "max_queue": 2,
    }
    plain |= {"name": "m", "python": "python", "host": "127.0.0.1", "port": 8000, "dtype": "auto"}
    return vllm.command(Path("model"), **plain | more)


def test_several_keys_are_handed_over_as_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    found = command(monkeypatch, Format(False, False), api_keys=["one", "two"])
    digests = " ".join(hashlib.sha256(key).hexdigest() for key in (b"one", b"two"))
    assert found.environment["QWEN_CHAT_KEYS"] == digests
    assert "VLLM_API_KEY" not in found.environment  # vLLM would let in nobody but its holder
    assert not {"one", "two"} & {*found.words, *found.environment.values()}
    assert command(monkeypatch, Format(False, False), api_keys=["one"]).environment["VLLM_API_KEY"] == "one"
    keyless = command(monkeypatch, Format(False, False), hosts={"localhost", "127.0.0.1"}).environment
    assert (keyless["QWEN_CHAT_KEYS"], keyless["QWEN_CHAT_HOSTS"]) == ("", "127.0.0.1 localhost")


@pytest.mark.parametrize("folder", ["plain", "with,comma", "with=equals", "with both, x=y", "a\"quote',="])
def test_an_adapters_folder_may_have_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    adapter = tmp_path / folder
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 8}')
    words = command(monkeypatch, Format(False, False), adapters={"mine": adapter}).words
    word = words[words.index("--lora-modules") + 1]
    # as vLLM reads it
    if "=" in word and "," not in word:
        name, path = word.split("=")
    else:
        read = json.loads(word)
        name, path = read.pop("name"), read.pop("path")
        assert not read
    assert (name, path) == ("mine", str(adapter))


@pytest.mark.parametrize(
    ("opens", "switch", "thinks"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_a_template_that_thinks_gets_the_parser(
    monkeypatch: pytest.MonkeyPatch, opens: bool, switch: bool, thinks: bool
) -> None:
    words = command(monkeypatch, Format(opens, switch)).words
    assert ("--reasoning-parser" in words) is thinks
    if thinks:
        assert words[words.index("--reasoning-parser") + 1] == "qwen3"


def test_the_system_text_of_a_tuned_model_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = Format(False, False)
    assert command(monkeypatch, fmt).told == ""
    fmt.system = "Be brief."
    assert command(monkeypatch, fmt).told == "without a system message a conversation gets: 'Be brief.'"


# The template's name: vLLM's readers of calls and of thoughts, and what it must be told of the template's default.
HANDED_OVER: dict[str, tuple[str, str | None, str | None]] = {
    "qwen2_5": ("hermes", None, None),
    "qwen3": ("hermes", "qwen3", None),
    "qwen3_instruct_2507": ("hermes", None, None),
    "qwen3_5_think": ("qwen3_xml", "qwen3", None),
    "qwen3_5_nothink": ("qwen3_xml", "qwen3", '{"enable_thinking": false}'),
    "qwen3_6": ("qwen3_xml", "qwen3", None),
    "qwen3_8": ("qwen3_xml", "qwen3", None),
}


@pytest.mark.parametrize("name", HANDED_OVER)
def test_the_parsers_follow_from_the_template(
    monkeypatch: pytest.MonkeyPatch, chat_templates: dict[str, str], qwen3_tokenizer: Any, name: str
) -> None:
    assert HANDED_OVER.keys() == chat_templates.keys()
    tokenizer = copy.copy(qwen3_tokenizer)
    tokenizer.chat_template = chat_templates[name]
    words = command(monkeypatch, ChatFormat(tokenizer)).words
    found = [
        words[words.index(flag) + 1] if flag in words else None
        for flag in ("--tool-call-parser", "--reasoning-parser", "--default-chat-template-kwargs")
    ]
    assert tuple(found) == HANDED_OVER[name]


def test_a_template_that_always_thinks_is_told_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    words = command(monkeypatch, Format(True, False)).words
    assert "--default-chat-template-kwargs" not in words
