"""A stream is never silent for long, never broken off without a word, and what is counted of it is true."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import requests
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from qwen_chat.inference.engine import Engine
from qwen_chat.service.app import create_app
from qwen_chat.service.settings import ServiceSettings
from qwen_chat.tools.client import HttpClient
from qwen_chat.tools.loop import run_tools
from tests.support.chats import CHAT, ask, wait_until
from tests.support.scripted import LiveService, make_engine

pytestmark = pytest.mark.alone

# --- pace ----------------------------------------------------------------------------------------


def test_tokens_that_come_fast_go_together_the_first_and_the_end_at_once() -> None:
    said = "x" * 100  # a token each, in a few milliseconds
    settings = ServiceSettings(pace_seconds=0.5)
    with LiveService(create_app(make_engine(), settings=settings)) as live:
        began = time.monotonic()
        body = ask(f"say {said}", stream=True, logprobs=True)
        with requests.post(live.url + CHAT, json=body, stream=True, timeout=30) as answer:
            lines = [line for line in answer.iter_lines() if line.startswith(b"data: {")]
        assert time.monotonic() - began < 0.5
    choices = [json.loads(line[6:])["choices"][0] for line in lines]
    pieces = [choice["delta"].get("content") or "" for choice in choices]
    assert "".join(pieces) == said
    assert sum(map(bool, pieces)) <= 3
    taken = [one["token"] for choice in choices for one in (choice["logprobs"] or {}).get("content", [])]
    assert "".join(taken) == said
    assert choices[-1]["finish_reason"] == "stop"


# --- silence -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(max_batch=1)


@pytest.fixture(scope="module")
def narrow(engine: Engine) -> Iterator[LiveService]:
    """One at a time, and a comment after each tenth of a second of silence."""
    with LiveService(create_app(engine, settings=ServiceSettings(quiet_seconds=0.1))) as service:
        yield service


@pytest.fixture
def busy(narrow: LiveService, engine: Engine) -> Iterator[None]:
    """Somebody else's answer takes the only place for most of a second."""
    body = ask("slow 20 " + "x" * 40)
    other = threading.Thread(target=lambda: requests.post(narrow.url + CHAT, json=body, timeout=30))
    other.start()
    wait_until(lambda: engine.stats().running == 1)
    yield
    other.join()


def test_a_stream_that_waits_says_that_it_lives(narrow: LiveService, busy: None) -> None:
    began = time.monotonic()
    with requests.post(narrow.url + CHAT, json=ask("say hi", stream=True), stream=True, timeout=30) as answer:
        status_after = time.monotonic() - began
        lines = [line for line in answer.iter_lines() if line]
    whole_after = time.monotonic() - began
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert status_after < whole_after / 2  # not with the first token
    comments = [line for line in lines if line.startswith(b":")]
    assert comments == [b": keep-alive"] * len(comments)
    assert len(comments) >= 2
    assert lines[: len(comments)] == comments
    assert lines[-1] == b"data: [DONE]"


def test_clients_read_over_the_comments(narrow: LiveService, busy: None) -> None:
    client = OpenAI(base_url=f"{narrow.url}/v1", api_key="x", max_retries=0)
    stream = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "slow 250 ab"}], stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "ab"
    done = run_tools(
        HttpClient(narrow.url), [{"role": "user", "content": "slow 250 ab"}], {}, model="default", stream=True
    )
    assert done.messages[-1]["content"] == "ab"


def test_a_failure_after_a_comment_is_an_event(narrow: LiveService, engine: Engine, busy: None) -> None:
    answer = requests.post(narrow.url + CHAT, json=ask("crash", stream=True), timeout=30)
    events = [line for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert answer.status_code == 200
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "engine_error"
    assert len(events) == 1
    wait_until(lambda: engine.is_running)


def test_a_failure_before_any_byte_is_a_status(narrow: LiveService, engine: Engine) -> None:
    answer = requests.post(narrow.url + CHAT, json=ask("crash", stream=True), timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
    wait_until(lambda: engine.is_running)


# --- the end of the service ----------------------------------------------------------------------


def test_what_the_end_cuts_off_is_told_so(capfd: pytest.CaptureFixture[str]) -> None:
    engine = make_engine()
    streamed: list[str] = []
    plain: list[requests.Response] = []
    live = LiveService(create_app(engine), drain_seconds=1)

    def read_stream() -> None:
        body = ask("slow 50 " + "x" * 400, stream=True)
        with requests.post(live.url + CHAT, json=body, stream=True, timeout=30) as answer:
            streamed.extend(line.decode() for line in answer.iter_lines() if line)

    def read_plain() -> None:
        plain.append(requests.post(live.url + CHAT, json=ask("slow 50 " + "y" * 400), timeout=30))

    readers = [threading.Thread(target=read) for read in (read_stream, read_plain)]
    with live:
        for reader in readers:
            reader.start()
        wait_until(lambda: engine.stats().running == 2)
        wait_until(lambda: len(streamed) > 2)
    for reader in readers:
        reader.join()
    assert json.loads(streamed[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert not any("[DONE]" in line for line in streamed)
    assert (plain[0].status_code, plain[0].json()["error"]["code"]) == (503, "shutting_down")
    assert "Traceback" not in capfd.readouterr().err


# --- bytes ---------------------------------------------------------------------------------------


def test_no_text_breaks_a_line(narrow: LiveService) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x1cf 你好"
    with httpx.stream("POST", narrow.url + CHAT, json=ask(f"say {text}", stream=True)) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == text


# --- figures -------------------------------------------------------------------------------------


def figures(client: TestClient) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        sample.name: sample.value
        for family in families
        for sample in family.samples
        if "le" not in sample.labels
    }


def test_time_per_token_is_of_one_choice() -> None:
    with TestClient(create_app(make_engine(drafts=False))) as client:
        client.post(CHAT, json=ask("slow 20 " + "x" * 20, n=8))
        found = figures(client)
    name = "qwen_chat_time_per_output_token_seconds"
    assert found[f"{name}_count"] == 8 * 20  # 21 tokens each, the end's too
    assert found[f"{name}_sum"] / found[f"{name}_count"] > 0.015


def test_the_cache_is_at_most_full() -> None:
    engine = make_engine(kv_tokens=150, max_batch=4)
    with TestClient(create_app(engine)) as client:
        threads = [
            threading.Thread(target=lambda: client.post(CHAT, json=ask("slow 5 " + "x" * 30)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        seen = []
        while any(thread.is_alive() for thread in threads):
            seen.append(figures(client))
        for thread in threads:
            thread.join()
        idle = figures(client)
    ratios = [found["qwen_chat_cache_usage_ratio"] for found in seen]
    assert 0.3 < max(ratios) <= 1
    assert max(found["qwen_chat_batch_size"] for found in seen) >= 1
    assert all(found["qwen_chat_batch_size"] <= 4 for found in seen)
    assert (idle["qwen_chat_cache_usage_ratio"], idle["qwen_chat_batch_size"]) == (0, 0)


def test_cached_tokens_of_several_prompts_add_up() -> None:
    with TestClient(create_app(make_engine(cache_tokens=4096))) as client:
        prompts = [letter * 100 for letter in "ab"]
        cached = []
        for _ in range(2):
            body = {"model": "default", "prompt": prompts, "max_tokens": 1, "n": 2}
            usage = client.post("/v1/completions", json=body).json()["usage"]
            assert usage["prompt_tokens"] == 200
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        alone = client.post("/v1/completions", json={**body, "prompt": prompts[0]}).json()["usage"]
    assert alone["prompt_tokens_details"]["cached_tokens"] > 60
    assert cached[1] == 2 * alone["prompt_tokens_details"]["cached_tokens"]
