"""The service: OpenAI's endpoints over one engine.

In: an engine and what surrounds it (keys, log, limits). Out: `create_app(...)`, an ASGI app; nothing is bound or
started until a server runs it. The path of a request: middleware.py (who may ask) -> body.py, protocol.py (what) ->
here -> answering.py (a place in the queue) -> prepare.py (prompt, grammar) -> engine -> chunks.py, respond.py (answer).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from qwen_chat.conversation import Json
from qwen_chat.inference.engine import Engine
from qwen_chat.service import protocol
from qwen_chat.service.admission import Admission
from qwen_chat.service.answering import Answering
from qwen_chat.service.body import read_request
from qwen_chat.service.catalog import Catalog
from qwen_chat.service.engine_watch import EngineWatch
from qwen_chat.service.errors import APIError, bad_value
from qwen_chat.service.metrics import CONTENT_TYPE, Metrics
from qwen_chat.service.middleware import Gate, Journal
from qwen_chat.service.prepare import (
    Job,
    Served,
    chat_job,
    chat_prompt_ids,
    completion_job,
    template_kwargs,
)
from qwen_chat.service.request_log import RequestLog, RequestRecord
from qwen_chat.service.routes import PATHS, add_routes
from qwen_chat.service.settings import ServiceSettings
from qwen_chat.service.workers import Workers
from qwen_chat.threads import ResultT

# Requests for /tokenize and /detokenize at once.
MOST_TOKENIZING = 8


def create_app(
    engine: Engine,
    *,
    settings: ServiceSettings | None = None,
    api_keys: Sequence[str] = (),
    log: RequestLog | None = None,
    hosts: Collection[str] | None = None,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """The service as an ASGI app. Its lifespan starts and stops the engine.

    Args:
        api_keys: one of these must be given by whoever asks; empty lets everybody in.
        log: takes one line a request; None writes none.
        hosts: names that the Host header may give; None allows all.
        cors_origins: web pages of these origins may ask from a browser.
    """
    service = Service(engine, settings or ServiceSettings(), log, manages_adapters=bool(api_keys))
    app = FastAPI(title="qwen_chat", version="1", docs_url=None, redoc_url=None, lifespan=service.lifespan)
    add_routes(app, service)
    app.add_exception_handler(APIError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_middleware(Gate, api_keys=api_keys, hosts=hosts, origins=cors_origins)
    app.add_middleware(Journal, write=service.write_log, count=service.metrics.count_request, paths=PATHS)
    # Outermost: a page may read refusals too.
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST", "HEAD"],
            # OpenAI's client in a browser sends a dozen of its own.
            allow_headers=["*"],
            expose_headers=["Retry-After", "x-request-id", "x-ignored"],
        )
    return app


class Service:
    """The endpoints of routes.ENDPOINTS over one engine."""

    def __init__(
        self, engine: Engine, settings: ServiceSettings, log: RequestLog | None, *, manages_adapters: bool
    ) -> None:
        """`manages_adapters`: adapters may be loaded through the API (only where a key protects it)."""
        self.metrics = Metrics(self._figures)
        self._engine = engine
        self._settings = settings
        self._log = log
        self._manages_adapters = manages_adapters
        self._watch = EngineWatch(engine)
        self._catalog = Catalog(engine, settings)
        self._answering = Answering(engine, settings, self.metrics)
        # Threads and places of their own: no chat waits for a long text.
        self._tokens = Workers("tokens", 1)
        self._tokenizing = Admission(MOST_TOKENIZING)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Start the engine before the first request, stop it after the last."""
        # A third of a second, which no request should pay.
        await asyncio.to_thread(lambda: self._engine.fmt)
        self._engine.start()
        yield
        await asyncio.to_thread(self._engine.stop)

    # --- generation ---

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body, wanted = await read_request(request, protocol.ChatRequest, self._settings)
        _record(request).ignored = wanted.ignored
        prepare = partial(chat_job, wanted, body)
        return await self._answer(request, wanted, prepare, prompt=body["messages"], choices=wanted.choices)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        body, wanted = await read_request(request, protocol.CompletionRequest, self._settings)
        prepare, choices = partial(completion_job, wanted), wanted.choices * len(wanted.prompts)
        return await self._answer(request, wanted, prepare, prompt=body["prompt"], choices=choices)

    async def _answer(
        self,
        request: Request,
        wanted: protocol.SamplingRequest,
        prepare: Callable[[Served, float], Job],
        *,
        prompt: object,
        choices: int,
    ) -> Response:
        record = _record(request)
        model = self._catalog.served(wanted.model)
        record.model, record.stream, record.user = model.name, bool(wanted.stream), wanted.user
        if self._settings.log_prompts:
            record.prompt = prompt
        self._watch.check()
        return await self._answering.answer(record, partial(prepare, model), choices=choices)

    # --- models and adapters ---

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        cards = [self._catalog.card(name) for name in self._catalog.names()]
        return _ok(protocol.ModelList(object="list", data=cards))

    async def model(self, model: str) -> Response:
        """GET /v1/models/{model}."""
        return _ok(self._catalog.card(self._catalog.served(model).name))

    async def load_adapter(self, request: Request) -> Response:
        """POST /v1/load_lora_adapter."""
        self._check_manages_adapters()
        _, wanted = await read_request(request, protocol.LoadAdapterRequest, self._settings)
        folder = Path(wanted.lora_path)
        await self._catalog.load_adapter(wanted.lora_name, folder, request_id=_record(request).id)
        return _ok(protocol.AdapterChange(lora_name=wanted.lora_name, status="loaded"))

    async def unload_adapter(self, request: Request) -> Response:
        """POST /v1/unload_lora_adapter."""
        self._check_manages_adapters()
        _, wanted = await read_request(request, protocol.UnloadAdapterRequest, self._settings)
        self._catalog.unload_adapter(wanted.lora_name)
        return _ok(protocol.AdapterChange(lora_name=wanted.lora_name, status="unloaded"))

    def _check_manages_adapters(self) -> None:
        if not self._manages_adapters:
            text = "Adapters are loaded through the API only where it has a key."
            raise APIError(403, text, code="adapters_not_managed")

    # --- tokens ---

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        body, wanted = await read_request(request, protocol.TokenizeRequest, self._settings)
        model = self._catalog.served(wanted.model)

        def answer() -> str:
            if wanted.messages is not None:
                variables = template_kwargs(wanted, model.fmt)
                ids = chat_prompt_ids(body["messages"], body.get("tools"), model.fmt, variables)
            else:
                ids = model.fmt.text_ids(wanted.prompt or "")
            words: Json = {}
            if wanted.return_token_strs:
                words["token_strs"] = model.fmt.tokenizer.convert_ids_to_tokens(ids)
            found = protocol.Tokenized(count=len(ids), max_model_len=model.context, tokens=ids, **words)
            # A million numbers take a while to write, too.
            return found.json_text()

        return Response(await self._beside_chats(answer), media_type="application/json")

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        _, wanted = await read_request(request, protocol.DetokenizeRequest, self._settings)
        model = self._catalog.served(wanted.model)
        worst = max(wanted.tokens, default=0)
        if worst >= model.vocabulary:
            text = f"Invalid 'tokens': token {worst} is beyond the vocabulary ({model.vocabulary})."
            raise bad_value("tokens", text)
        text = await self._beside_chats(lambda: model.fmt.tokenizer.decode(wanted.tokens))
        return _ok(protocol.Detokenized(prompt=text))

    async def _beside_chats(self, work: Callable[[], ResultT]) -> ResultT:
        """`work` in the one thread for tokens, for which few may wait."""
        release = self._tokenizing.take(1)
        try:
            found = await self._tokens.run(work, seconds=self._settings.prepare_seconds)
        except BaseException:
            release(False)
            raise
        release(True)
        return found

    # --- state ---

    async def health(self, request: Request) -> Response:
        """GET /health: the process lives."""
        return _ok(protocol.Health(status="ok"))

    async def ready(self, request: Request) -> Response:
        """GET /ready: the engine takes requests, and prompts are read."""
        self._watch.check()
        self._answering.check()
        return _ok(protocol.Health(status="ok"))

    async def scrape(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    def write_log(self, line: Mapping[str, object], admitted: bool) -> None:
        """One line of the service log."""
        if self._log is not None:
            self._log.write(line, stranger=not admitted)

    def _figures(self) -> Mapping[str, float]:
        stats = self._engine.stats()
        return {
            "num_requests_running": stats.running,
            "num_requests_waiting": stats.waiting,
            "batch_size": stats.batch,
            "cache_usage_ratio": min(stats.kv_tokens / self._engine.kv_tokens, 1.0),
            "prefix_cache_queries": stats.prompt_tokens,
            "prefix_cache_hits": stats.cached_tokens,
            "engine_steps": stats.steps,
            "forced_tokens": stats.forced_tokens,
            "draft_tokens": stats.drafted_tokens,
            "accepted_draft_tokens": stats.accepted_tokens,
            "engine_restarts": self._watch.restarts,
            "engine_ready": float(self._engine.is_running),
            "log_lines_lost": self._log.lost if self._log else 0,
            "log_lines_withheld": self._log.withheld if self._log else 0,
        }


def _record(request: Request) -> RequestRecord:
    return cast(RequestRecord, request.scope["state"]["record"])


def _ok(answer: protocol.Answer) -> Response:
    return Response(answer.json_text(), media_type="application/json")


async def _on_error(request: Request, error: Exception) -> Response:
    """An APIError, or one of Starlette's own: no such path, no such method."""
    headers: Mapping[str, str] = {}
    if isinstance(error, HTTPException):
        headers = error.headers or {}
        texts = {
            404: ("Invalid URL: there is no such endpoint.", "unknown_url"),
            405: ("Not allowed to use this method on this endpoint.", "method_not_supported"),
        }
        text, code = texts.get(error.status_code, (str(error.detail), None))
        error = APIError(error.status_code, text, code=code)
    assert isinstance(error, APIError)
    _record(request).error = error.name
    response = error.response()
    response.headers.update(headers)
    return response
