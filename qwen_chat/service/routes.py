"""The endpoints as a table, and their description in /openapi.json.

In: whatever has a handler for each `Endpoint`, under its name. Out: routes of the app.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fastapi import FastAPI
from fastapi.responses import Response
from pydantic.json_schema import models_json_schema

from qwen_chat.conversation import Json
from qwen_chat.service import protocol

_STATUSES = {
    400: "The request cannot be: which parameter and why.",
    401: "No API key, or a wrong one.",
    403: "Not allowed here.",
    404: "No such model.",
    405: "No such method.",
    409: "The adapter is being loaded already.",
    408: "The request did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The queue is full; Retry-After says when to try again.",
    431: "Too many headers.",
    500: "The server failed.",
    503: "The engine is not running, or no place became free in time.",
}
_READING = (401, 403, 405, 431, 500)
_WRITING = (400, 401, 403, 404, 405, 408, 413, 415, 431, 500, 503)
_EVENT = {
    "type": "object",
    "description": "One event: a chunk as JSON, at last [DONE].",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
_STREAM = {"text/event-stream": {"schema": _EVENT}}
_PLAIN_TEXT = {"text/plain": {"schema": {"type": "string"}}}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint. `name` is its handler and its operation; `content`: other media types that it answers with."""

    method: Literal["GET", "POST"]
    path: str
    name: str
    body: type[protocol.Request] | None = None
    answer: type[protocol.Answer] | None = None
    statuses: tuple[int, ...] = _READING
    content: Mapping[str, Json] = field(default_factory=dict)

    def responses(self) -> dict[int | str, Json]:
        """Each status that it answers with, and the body of it."""
        ok: Json = {"description": "OK"}
        if self.content:
            ok["content"] = self.content
        if self.answer is not None:
            ok["model"] = self.answer
        found: dict[int | str, Json] = {200: ok}
        for status in self.statuses:
            found[status] = {"model": protocol.ErrorAnswer, "description": _STATUSES[status]}
        return found


ENDPOINTS = (
    Endpoint("POST", "/v1/chat/completions", "chat",
             protocol.ChatRequest, protocol.ChatCompletion, (*_WRITING, 429), _STREAM),
    Endpoint("POST", "/v1/completions", "complete",
             protocol.CompletionRequest, protocol.TextCompletion, (*_WRITING, 429), _STREAM),
    Endpoint("GET", "/v1/models", "models", None, protocol.ModelList),
    Endpoint("GET", "/v1/models/{model:path}", "model", None, protocol.ModelCard, (*_READING, 404)),
    Endpoint("POST", "/v1/load_lora_adapter", "load_adapter",
             protocol.LoadAdapterRequest, protocol.AdapterChange, (*_WRITING, 409)),
    Endpoint("POST", "/v1/unload_lora_adapter", "unload_adapter",
             protocol.UnloadAdapterRequest, protocol.AdapterChange, _WRITING),
    Endpoint("POST", "/tokenize", "tokenize", protocol.TokenizeRequest, protocol.Tokenized, _WRITING),
    Endpoint("POST", "/detokenize", "detokenize", protocol.DetokenizeRequest, protocol.Detokenized, _WRITING),
    Endpoint("GET", "/health", "health", None, protocol.Health),
    Endpoint("GET", "/ready", "ready", None, protocol.Health, (*_READING, 503)),
    Endpoint("GET", "/metrics", "scrape", content=_PLAIN_TEXT),
)  # fmt: skip

# Those that are counted by their path; all others count as one.
PATHS = frozenset(endpoint.path for endpoint in ENDPOINTS if "{" not in endpoint.path)


def add_routes(app: FastAPI, handlers: object) -> None:
    """Route each endpoint to the method of `handlers` that has its name."""
    for endpoint in ENDPOINTS:
        extra = None
        if endpoint.body is not None:
            schema = {"$ref": f"#/components/schemas/{endpoint.body.__name__}"}
            extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
        app.add_api_route(
            endpoint.path,
            getattr(handlers, endpoint.name),
            methods=[endpoint.method],
            response_model=None,
            response_class=Response,
            responses=endpoint.responses(),
            openapi_extra=extra,
            operation_id=endpoint.name,
        )
    plain = app.openapi

    def described() -> Json:
        """The OpenAPI document with the request types: we read bodies, so FastAPI does not know them."""
        if app.openapi_schema is None:
            document = plain()
            _, definitions = models_json_schema(
                [(endpoint.body, "validation") for endpoint in ENDPOINTS if endpoint.body is not None],
                ref_template="#/components/schemas/{model}",
            )
            document["components"]["schemas"].update(definitions["$defs"])
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]
