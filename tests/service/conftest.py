"""A service over the scripted model, in this process and on a port."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from qwen_chat.service.app import create_app
from qwen_chat.service.settings import ServiceSettings
from tests.support.scripted import LiveService, make_engine


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """A service without keys; for everything that leaves no trace."""
    app = create_app(
        make_engine(), settings=ServiceSettings(model_name="scripted", max_body_bytes=100_000, pace_seconds=0)
    )
    with TestClient(app) as client:
        yield client


@pytest.fixture(scope="module")
def live() -> Iterator[LiveService]:
    app = create_app(make_engine(), settings=ServiceSettings(model_name="scripted", pace_seconds=0))
    with LiveService(app) as service:
        yield service
