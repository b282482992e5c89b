"""What web pages may do with a service on their reader's machine, and what they get to read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from qwen_chat.inference.engine import Engine
from qwen_chat.service.app import create_app
from qwen_chat.service.middleware import LOOPBACK_HOSTS
from tests.support.chats import CHAT
from tests.support.scripted import make_engine

BODY = {"model": "default", "messages": [{"role": "user", "content": "say hi"}]}
HERE = "http://127.0.0.1:8000"
PAGE = "https://a.example"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    """As a service without a key is: on loopback, one origin let in."""
    app = create_app(engine, hosts=LOOPBACK_HOSTS, cors_origins=[PAGE])
    with TestClient(app, base_url=HERE) as client:
        yield client


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # curl, the openai package: no browser
        ({"origin": HERE}, 200),  # a page of the service's own
        (
            {"origin": "https://proxy.example", "sec-fetch-site": "same-origin"},
            200,
        ),  # the same behind a proxy
        ({"origin": PAGE, "sec-fetch-site": "cross-site"}, 200),  # --cors_origin
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "https://evil.example", "sec-fetch-site": "cross-site"}, 403),
        (
            {"origin": "http://127.0.0.1:9000", "sec-fetch-site": "same-site"},
            403,
        ),  # another port, another page
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
    ],
)
def test_pages_of_other_origins_reach_nothing(
    client: TestClient, engine: Engine, headers: dict[str, str], status: int
) -> None:
    before = engine.stats().requests
    answer = client.post(CHAT, json=BODY, headers=headers)
    assert answer.status_code == status
    assert engine.stats().requests - before == (status == 200)
    if status == 403:
        assert answer.json()["error"]["code"] == "origin_not_allowed"
    assert client.get("/v1/models", headers=headers).status_code == status
    assert client.get("/health", headers=headers).status_code == 200


def test_any_origin_where_that_is_said(engine: Engine) -> None:
    with TestClient(create_app(make_engine(), cors_origins=["*"])) as client:
        answer = client.post(CHAT, json=BODY, headers={"origin": "https://evil.example"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", ""])
def test_only_what_says_that_it_is_json_is_read(client: TestClient, kind: str | None) -> None:
    """A page can send these three (and none at all) without asking first."""
    headers = {} if kind is None else {"content-type": kind}
    answer = client.post(CHAT, content=b"{}", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.fixture(scope="module")
def keyed() -> Iterator[TestClient]:
    app = create_app(make_engine(), api_keys=["secret"], hosts={"localhost"}, cors_origins=[PAGE])
    with TestClient(app, base_url="http://localhost") as client:
        yield client


KEY = {"authorization": "Bearer secret"}


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({**KEY, "host": "elsewhere"}, 403),
        ({**KEY, **{f"x-{k}": "y" for k in range(120)}}, 431),
        ({**KEY, "content-type": "text/plain"}, 415),
        ({**KEY}, 200),
    ],
    ids=["no key", "wrong key", "host", "headers", "media type", "answered"],
)
def test_an_allowed_page_can_read_every_answer(keyed: TestClient, more: dict[str, Any], status: int) -> None:
    answer = keyed.post(CHAT, json=BODY, headers={"origin": PAGE, **more})
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == PAGE
    exposed = answer.headers["access-control-expose-headers"].lower().split(", ")
    assert exposed == ["retry-after", "x-request-id", "x-ignored"]
    assert answer.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/v1/models", "/v1/models/default", "/metrics", "/openapi.json"]
)
def test_head_is_get_without_a_body(client: TestClient, path: str) -> None:
    got, headed = client.get(path), client.head(path)
    assert (headed.status_code, headed.content) == (200, b"")
    assert {**headed.headers, "x-request-id": "", "content-length": ""} == {
        **got.headers,
        "x-request-id": "",
        "content-length": "",
    }
    assert path == "/metrics" or headed.headers["content-length"] == str(len(got.content))
    assert client.head(CHAT).status_code == 405


def test_a_slash_at_the_end_changes_nothing(client: TestClient, keyed: TestClient) -> None:
    assert client.get("/v1/models/").json() == client.get("/v1/models").json()
    assert client.get("/health/").status_code == 200
    answer = client.post(CHAT + "/", json=BODY, follow_redirects=False)
    assert (answer.status_code, answer.json()["choices"][0]["message"]["content"]) == (200, "hi")
    assert keyed.get("/v1/models/").status_code == 401
