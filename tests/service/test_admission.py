"""The queue is bounded, and says when to come again."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from starlette.testclient import TestClient

from qwen_chat.service.admission import Admission
from qwen_chat.service.app import create_app
from qwen_chat.service.errors import APIError
from qwen_chat.service.prepare import chat_job
from qwen_chat.service.settings import ServiceSettings
from tests.support.chats import CHAT, ask, keep_busy
from tests.support.scripted import LiveService, make_engine

pytestmark = pytest.mark.alone


def test_queue_is_bounded() -> None:
    engine = make_engine(max_batch=1)
    settings = ServiceSettings(max_queue=1)
    with LiveService(create_app(engine, settings=settings)) as live:
        statuses: list[tuple[int, str | None]] = []

        def call() -> None:
            answer = requests.post(live.url + CHAT, json=ask("slow 30 abcdefghij"), timeout=30)
            statuses.append((answer.status_code, answer.headers.get("retry-after")))

        threads = [threading.Thread(target=call) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(status for status, _ in statuses) == [200, 200, 429, 429, 429]
    assert all(after is not None and 1 <= int(after) <= 60 for status, after in statuses if status == 429)


def test_retry_after_follows_what_was_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad requests are over at once; that is no sign that a place becomes free soon."""
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("qwen_chat.service.admission.time", clock)
    admission, now = Admission(1), [0.0]
    for served, seconds in ((True, 100.0), *[(False, 0.0)] * 50):
        give_back = admission.take(1)
        now[0] += seconds
        give_back(served)
    admission.take(1)
    with pytest.raises(APIError) as refused:
        admission.take(1)
    assert refused.value.retry_after == 21  # a fifth of the way from 1 s to 100 s


def test_who_is_turned_away_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []

    def count(*args: Any) -> Any:
        prepared.append(args)
        return chat_job(*args)

    monkeypatch.setattr("qwen_chat.service.app.chat_job", count)
    engine = make_engine(max_batch=1)
    with LiveService(create_app(engine, settings=ServiceSettings(max_queue=0))) as live:
        first = keep_busy(live, engine, 60)
        assert requests.post(live.url + CHAT, json=ask("hi"), timeout=30).status_code == 429
        first.join()
    assert len(prepared) == 1


def test_n_beyond_the_queue_is_bad() -> None:
    with TestClient(create_app(make_engine(max_batch=2), settings=ServiceSettings(max_queue=2))) as client:
        answer = client.post(CHAT, json=ask("say hi", n=5))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
        assert client.post(CHAT, json=ask("say hi", n=4)).status_code == 200
