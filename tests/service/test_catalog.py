"""The models by name: the base, merged ones, adapters loaded and refused."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import requests
from starlette.testclient import TestClient

from qwen_chat.inference.engine import _Adapter
from qwen_chat.inference.loading import load_engine
from qwen_chat.service.app import create_app
from qwen_chat.service.settings import ServiceSettings
from tests.support.chats import CHAT, ask
from tests.support.scripted import CONTEXT, LiveService, make_engine


def test_models(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert {key: card[key] for key in ("id", "object", "owned_by", "max_model_len")} == {
        "id": "scripted",
        "object": "model",
        "owned_by": "qwen_chat",
        "max_model_len": CONTEXT,
    }
    assert client.get("/v1/models/scripted").json() == card


KEY = {"Authorization": "Bearer key"}


def test_a_merged_model_is_listed_once_and_its_base_is_not_there() -> None:
    engine = make_engine()
    engine.name_merged("mine")
    with TestClient(create_app(engine, settings=ServiceSettings(model_name="scripted"))) as client:
        card = client.get("/v1/models").json()["data"]
        assert [(one["id"], one.get("parent")) for one in card] == [("mine", None)]
        for name in ("mine", "default"):
            answer = client.post(CHAT, json=ask("say ab") | {"model": name}).json()
            assert (answer["model"], answer["choices"][0]["message"]["content"]) == ("mine", "ab")
        gone = client.post(CHAT, json=ask("say ab") | {"model": "scripted"})
        error = gone.json()["error"]
        assert (gone.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert error["message"] == "The model `scripted` does not exist; there are `mine`."
        assert client.get("/v1/models/scripted").status_code == 404


def test_an_adapter_beside_the_base_names_it_as_its_parent() -> None:
    engine = make_engine()
    engine._adapters["mine"] = _Adapter(None)
    with TestClient(create_app(engine, settings=ServiceSettings(model_name="scripted"))) as client:
        card = client.get("/v1/models").json()["data"]
        assert [(one["id"], one.get("parent")) for one in card] == [("scripted", None), ("mine", "scripted")]
        unknown = client.post(CHAT, json=ask("say ab") | {"model": "other"}).json()["error"]
        assert unknown["message"] == "The model `other` does not exist; there are `scripted`, `mine`."


def test_of_several_loads_of_one_name_one_wins_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    begun, go_on = threading.Event(), threading.Event()
    loads: list[str] = []

    def load(name: str, folder: Path) -> None:
        loads.append(name)
        begun.set()
        assert go_on.wait(20)
        engine._adapters[name] = _Adapter(None)

    monkeypatch.setattr(engine, "load_adapter", load)
    settings = ServiceSettings(model_name="scripted", prepare_seconds=0.05)  # which a load may exceed
    body = {"lora_name": "mine", "lora_path": "/x"}
    with LiveService(create_app(engine, settings=settings, api_keys=["key"])) as live:
        url = f"{live.url}/v1/load_lora_adapter"
        first: list[requests.Response] = []
        thread = threading.Thread(
            target=lambda: first.append(requests.post(url, json=body, headers=KEY, timeout=30))
        )
        thread.start()
        assert begun.wait(20)
        for _ in range(3):
            other = requests.post(url, json=body, headers=KEY, timeout=30)
            assert (other.status_code, other.json()["error"]["code"]) == (409, "adapter_loading")
            assert other.headers["Retry-After"] == "1"
        time.sleep(0.1)
        go_on.set()
        thread.join(20)
        assert first[0].json() == {"lora_name": "mine", "status": "loaded"}
        assert (
            requests.post(url, json=body, headers=KEY, timeout=30).status_code == 400
        )  # it is there already
    assert loads == ["mine"]


def test_a_damaged_adapter_is_the_clients_fault(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = load_engine(tiny_model_path)
    good = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "x"}
    texts = [
        "[1]",
        "{",
        "3",
        "[" * 10**5,
        json.dumps(good | {"lora_alpha": None}),
        json.dumps(good | {"r": "four"}),
    ]
    texts += [
        json.dumps(good | {"alpha_pattern": {"(": 3}}),
        json.dumps(good | {"alora_invocation_tokens": [3]}),
    ]
    texts += [json.dumps(good), json.dumps(good | {"use_dora": True})]
    with TestClient(create_app(engine, api_keys=["key"])) as client:
        for text in texts:
            (tmp_path / "adapter_config.json").write_text(text)
            body = {"lora_name": "mine", "lora_path": str(tmp_path)}
            answer = client.post("/v1/load_lora_adapter", json=body, headers=KEY)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_path"), text[:80]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(texts)
    assert all(str(tmp_path) in line for line in lines)
