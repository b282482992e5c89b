"""The service: OpenAI's endpoints over one engine.

In: an engine and what surrounds it (keys, log, limits). Out: `create_app(...)`, an ASGI app; nothing is
bound or started until a server runs it. The path of a request: gate.py (who, how much) -> protocol.py (what)
-> here (a place in the queue) -> intake.py (prompt, grammar) -> engine -> chunks.py, delivery.py (answer).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from qwen_chat.conversation import Json
from qwen_chat.errors import ChatError, ModelError, ToolError
from qwen_chat.inference.engine import Engine, EngineStopped, PromptTooLong
from qwen_chat.inference.events import Generation
from qwen_chat.inference.grammar import GrammarLate
from qwen_chat.inference.sampling import GenerationRequest
from qwen_chat.service import protocol
from qwen_chat.service.errors import APIError, bad_value, from_validation, too_long, unknown_model
from qwen_chat.service.metrics import CONTENT_TYPE, Metrics
from qwen_chat.service.middleware import Gate, Journal, Record, read_json, refusal_response
from qwen_chat.service.prepare import Job, SamplingDefaults, Served, chat_job, chat_prompt_ids, completion_job
from qwen_chat.service.request_log import RequestLog
from qwen_chat.service.respond import Delivery, Work
from qwen_chat.service.workers import Workers

BodyT = TypeVar("BodyT", bound=BaseModel)
ResultT = TypeVar("ResultT")

ANY_MODEL = "default"  # the base model whatever its name is
MOST_TOKENIZING = 8  # requests for /tokenize and /detokenize at once
FIRST_RESTART, LAST_RESTART = 0.5, 30.0  # seconds from an engine's failure to its next start
FAILURE_WINDOW = 120.0  # seconds in which failures count as following each other
PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/tokenize",
    "/detokenize",
    "/health",
    "/ready",
    "/metrics",
)


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """What a service allows. Times in seconds."""

    model_name: str = ANY_MODEL
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    max_queue: int = 64  # choices that may wait; the batch's places come on top
    max_body_bytes: int = 4 * 2**20
    body_seconds: float = 20.0
    request_seconds: float = 600.0
    write_seconds: float = 60.0  # that a reader may leave one piece of its answer unread
    quiet_seconds: float = 10.0  # without a byte, after which a stream carries a comment; balancers cut at 60
    prepare_seconds: float = 20.0  # to tokenise a prompt and read its schemas
    log_prompts: bool = False


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
    service = Service(engine, settings or ServiceSettings(), log, manage_adapters=bool(api_keys))
    app = FastAPI(title="qwen_chat", version="1", docs_url=None, redoc_url=None, lifespan=service.lifespan)
    _add_routes(app, service)
    app.add_exception_handler(APIError, _on_refusal)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_middleware(Gate, api_keys=api_keys, hosts=hosts, origins=cors_origins)
    app.add_middleware(Journal, write=service.write_log, count=service.count_request, paths=PATHS)
    if cors_origins:  # outermost: a page may read refusals too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST", "HEAD"],
            allow_headers=["*"],  # OpenAI's client in a browser sends a dozen of its own
            expose_headers=["Retry-After", "x-request-id", "x-ignored"],
        )
    return app


class Admission:
    """Places for choices: those in the batch and those that may wait. Beyond them nobody is let in."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.taken = 0
        self._seconds = 1.0  # that a request lately took, smoothed

    def take(self, count: int) -> Callable[[bool], None]:
        """Take `count` places; returns what gives them back, told whether the request was served. Raise
        APIError 429 where there are too few."""
        if count > self.places:
            raise bad_value("n", f"Invalid 'n': {count} choices never fit the queue of {self.places}.")
        if self.taken + count > self.places:
            raise APIError(
                429,
                f"Too many requests: {self.taken} of {self.places} places are taken. Try again later.",
                code="rate_limit_exceeded",
                retry_after=max(1, min(60, math.ceil(self._seconds))),
            )
        self.taken += count
        began = time.monotonic()

        def give_back(served: bool) -> None:
            self.taken -= count
            if served:  # one that was refused took no time: it says nothing of how long a place stays taken
                self._seconds += 0.2 * (time.monotonic() - began - self._seconds)

        return give_back


class Service:
    """The endpoints. One instance serves one engine."""

    def __init__(
        self,
        engine: Engine,
        settings: ServiceSettings,
        log: RequestLog | None,
        *,
        manage_adapters: bool,
    ) -> None:
        """`manage_adapters`: adapters may be loaded through the API (only where a key protects it)."""
        self.engine = engine
        self.settings = settings
        self.log = log
        self.manage_adapters = manage_adapters
        self.created = int(time.time())
        self.admission = Admission(settings.max_queue + engine.max_batch)
        self.metrics = Metrics(self._figures)
        self.restarts = 0
        # Each kind of work has threads of its own: what one stranger's schema, text or adapter costs delays the
        # like of it, and no chat. Two: prompts do not take all cores.
        self._intake = Workers("intake", 2)
        self._grammars = Workers("grammars", 2)
        self._tokens = Workers("tokens", 1)
        self._adapters = Workers("adapters", 1)
        self._loading: set[str] = set()  # adapters that are being loaded
        self._tokenizing = Admission(MOST_TOKENIZING)
        self._context = min(engine.context_length, engine.kv_tokens)
        self._failures: list[float] = []
        engine.on_failure = self._restart

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Start the engine before the first request, stop it after the last."""
        await asyncio.to_thread(lambda: self.engine.fmt)  # a third of a second, which no request should pay
        self.engine.start()
        yield
        await asyncio.to_thread(self.engine.stop)

    # --- generation ---

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body, wanted = await self._read(request, protocol.ChatRequest)
        _record(request).ignored = wanted.ignored
        return await self._answer(
            request,
            wanted,
            lambda model, deadline: chat_job(wanted, body, model, deadline),
            prompt=body["messages"],
            places=wanted.choices,
        )

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        body, wanted = await self._read(request, protocol.CompletionRequest)
        return await self._answer(
            request,
            wanted,
            lambda model, deadline: completion_job(wanted, model, deadline),
            prompt=body["prompt"],
            places=wanted.choices * len(wanted.prompts),
        )

    async def _answer(
        self,
        request: Request,
        wanted: protocol.SamplingRequest,
        prepare: Callable[[Served, float], Job],
        *,
        prompt: object,
        places: int,
    ) -> Response:
        record = _record(request)
        model = self._model(wanted.model)
        record.model, record.stream, record.user = model.name, bool(wanted.stream), wanted.user
        if self.settings.log_prompts:
            record.prompt = prompt
        self._check_ready()
        deadline = record.began + self.settings.request_seconds
        release = self.admission.take(places)  # before anything is done: what is turned away costs nothing
        try:
            job = await self._in_thread(self._intake, lambda: prepare(model, deadline))
            bound = any(one.grammar is not None for one in job.requests)
            generations = await self._in_thread(
                self._grammars if bound else self._intake, lambda: self._submit(job.requests), undo=_cancel
            )
        except BaseException:
            release(False)
            raise
        work = Work(
            job,
            generations,
            record=record,
            metrics=self.metrics,
            release=functools.partial(release, True),
            log_reply=self.settings.log_prompts,
        )
        return Delivery(
            work, write_seconds=self.settings.write_seconds, quiet_seconds=self.settings.quiet_seconds
        )

    def _submit(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Hand all to the engine, or none."""
        generations: list[Generation] = []
        try:
            for one in requests:
                generations.append(self.engine.submit(one))  # noqa: PERF401  the list is needed where one fails
        except BaseException as error:
            _cancel(generations)
            raise _engine_refusal(error) from error
        return generations

    # --- models and adapters ---

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return _json(protocol.ModelList(object="list", data=[self._card(name) for name in self._names()]))

    async def model(self, model: str) -> Response:
        """GET /v1/models/{model}."""
        return _json(self._card(self._model(model).name))

    async def load_adapter(self, request: Request) -> Response:
        """POST /v1/load_lora_adapter."""
        self._check_manager()
        _, wanted = await self._read(request, protocol.LoadAdapterRequest)
        name = wanted.lora_name
        if name in (self.settings.model_name, ANY_MODEL, *self.engine.adapters):
            raise bad_value("lora_name", f"Invalid 'lora_name': '{name}' is loaded already; unload it first.")
        if name in self._loading:
            raise APIError(
                409,
                f"The adapter '{name}' is being loaded by another request; GET /v1/models shows when it is there.",
                param="lora_name",
                code="adapter_loading",
                retry_after=1,
            )
        self._loading.add(name)
        running = self._adapters.submit(lambda: self.engine.load_adapter(name, Path(wanted.lora_path)))
        running.add_done_callback(lambda _: self._loading.discard(name))
        try:
            # For as long as it takes: it ends loaded or refused, never in between.
            await asyncio.wrap_future(running)
        except (ChatError, OSError) as error:
            print(
                f"{_record(request).id}: {error}", file=sys.stderr, flush=True
            )  # it names paths: only for us
            raise bad_value(
                "lora_path", "Invalid 'lora_path': no adapter that fits this model can be read there."
            ) from None
        return _json(protocol.AdapterChange(lora_name=name, status="loaded"))

    async def unload_adapter(self, request: Request) -> Response:
        """POST /v1/unload_lora_adapter."""
        self._check_manager()
        _, wanted = await self._read(request, protocol.UnloadAdapterRequest)
        if wanted.lora_name not in self.engine.adapters:
            raise unknown_model(wanted.lora_name, self.engine.adapters, param="lora_name")
        try:
            self.engine.unload_adapter(wanted.lora_name)
        except ModelError:
            text = f"Invalid 'lora_name': '{wanted.lora_name}' is part of the model; it cannot be unloaded."
            raise bad_value("lora_name", text) from None
        return _json(protocol.AdapterChange(lora_name=wanted.lora_name, status="unloaded"))

    def _check_manager(self) -> None:
        if not self.manage_adapters:
            raise APIError(
                403,
                "Adapters are loaded through the API only where it has a key.",
                code="adapters_not_managed",
            )

    def _names(self) -> list[str]:
        """What may be asked for: the base, where it is served, and the adapters."""
        return [*([self.settings.model_name] if self.engine.serves_base else []), *self.engine.adapters]

    def _card(self, name: str) -> protocol.ModelCard:
        """An adapter's parent is the base beside which it runs; one that is merged into it has none here."""
        is_child = name != self.settings.model_name and self.engine.serves_base
        parent = {"parent": self.settings.model_name} if is_child else {}
        return protocol.ModelCard(
            id=name,
            object="model",
            created=self.created,
            owned_by="qwen_chat",
            max_model_len=self._context,
            **parent,
        )

    def _model(self, name: str | None) -> Served:
        """The model that a request names; none named is the base, or the only one that there is."""
        names = self._names()
        if name in (None, ANY_MODEL) and (self.engine.serves_base or len(names) == 1):
            name = names[0]
        if name not in names:
            raise unknown_model(name or ANY_MODEL, names)
        adapter = None if name == self.settings.model_name else name
        fmt = self.engine.format_of(adapter)
        return Served(
            name=adapter or self.settings.model_name,
            adapter=adapter,
            fmt=fmt,
            context=self._context,
            vocabulary=self.engine.decoder.vocabulary,
            end_tokens=frozenset((*self.engine.stop_token_ids, *fmt.stop_token_ids)),
            defaults=self.settings.sampling,
        )

    # --- tokens ---

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        body, wanted = await self._read(request, protocol.TokenizeRequest)
        model = self._model(wanted.model)

        def answer() -> str:
            if wanted.messages is not None:
                ids = chat_prompt_ids(body["messages"], body.get("tools"), model.fmt)
            else:
                ids = model.fmt.text_ids(wanted.prompt or "")
            words: Json = {}
            if wanted.return_token_strs:
                words["token_strs"] = model.fmt.tokenizer.convert_ids_to_tokens(ids)
            found = protocol.Tokenized(count=len(ids), max_model_len=model.context, tokens=ids, **words)
            return found.json_text()  # a million numbers take a while to write, too

        return Response(await self._in_token_thread(answer), media_type="application/json")

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        _, wanted = await self._read(request, protocol.DetokenizeRequest)
        model = self._model(wanted.model)
        if wanted.tokens and max(wanted.tokens) >= model.vocabulary:
            text = (
                f"Invalid 'tokens': token {max(wanted.tokens)} is beyond the vocabulary ({model.vocabulary})."
            )
            raise bad_value("tokens", text)
        text = await self._in_token_thread(lambda: model.fmt.tokenizer.decode(wanted.tokens))
        return _json(protocol.Detokenized(prompt=text))

    async def _in_token_thread(self, work: Callable[[], ResultT]) -> ResultT:
        """`work` in the one thread for tokens, for which few may wait."""
        release = self._tokenizing.take(1)
        try:
            found = await self._in_thread(self._tokens, work)
        except BaseException:
            release(False)
            raise
        release(True)
        return found

    # --- state ---

    async def health(self, request: Request) -> Response:
        """GET /health: the process lives."""
        return _json(protocol.Health(status="ok"))

    async def ready(self, request: Request) -> Response:
        """GET /ready: the engine takes requests, and prompts are read."""
        self._check_ready()
        if self._intake.stuck_seconds() > self.settings.prepare_seconds:
            text = "Requests have not been prepared for too long; try again."
            raise APIError(503, text, code="intake_stuck", retry_after=10)
        return _json(protocol.Health(status="ok"))

    async def scrape(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    def write_log(self, line: Mapping[str, object], admitted: bool) -> None:
        """One line of the service log."""
        if self.log is not None:
            self.log.write(line, stranger=not admitted)

    def count_request(self, endpoint: str, status: int) -> None:
        """One request that was answered."""
        self.metrics.requests.labels(endpoint, str(status)).inc()

    def _check_ready(self) -> None:
        if not self.engine.is_running:
            raise APIError(
                503, "The engine is not running; try again.", code="engine_unavailable", retry_after=1
            )

    def _restart(self, error: BaseException) -> None:
        """The engine failed: start it again, each time later while failures follow each other closely."""
        print("engine failed:", "".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
        self.restarts += 1
        now = time.monotonic()
        self._failures = [when for when in self._failures if now - when < FAILURE_WINDOW] + [now]
        delay = min(FIRST_RESTART * 2 ** (len(self._failures) - 1), LAST_RESTART)
        timer = threading.Timer(delay, self.engine.start)
        timer.daemon = True
        timer.start()

    def _figures(self) -> Mapping[str, float]:
        stats = self.engine.stats()
        return {
            "num_requests_running": stats.running,
            "num_requests_waiting": stats.waiting,
            "batch_size": stats.batch,
            "cache_usage_ratio": min(stats.kv_tokens / self.engine.kv_tokens, 1.0),
            "prefix_cache_queries": stats.prompt_tokens,
            "prefix_cache_hits": stats.cached_tokens,
            "engine_steps": stats.steps,
            "engine_restarts": self.restarts,
            "engine_ready": float(self.engine.is_running),
            "log_lines_lost": self.log.lost if self.log else 0,
            "log_lines_withheld": self.log.withheld if self.log else 0,
        }

    # --- reading ---

    async def _read(self, request: Request, kind: type[BodyT]) -> tuple[Json, BodyT]:
        """The body as it came, and as a valid request."""
        body = await read_json(
            request, most_bytes=self.settings.max_body_bytes, seconds=self.settings.body_seconds
        )
        try:
            return cast(Json, body), kind.model_validate(body)
        except ValidationError as error:
            raise from_validation(error, body) from None

    async def _in_thread(
        self,
        workers: Workers,
        work: Callable[[], ResultT],
        *,
        undo: Callable[[ResultT], None] | None = None,
    ) -> ResultT:
        """Run `work` beside the event loop, in one of the threads for its kind.

        `undo` gets what `work` comes to when nobody waits for it any more.
        """
        running = workers.submit(work)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(running), self.settings.prepare_seconds)
        except BaseException as error:
            if undo is not None:
                running.add_done_callback(lambda done: _undo(done, undo))
            if isinstance(error, TimeoutError):
                raise APIError(
                    503, "Preparing the request took too long; try again.", code="overloaded", retry_after=10
                ) from None
            raise


def _undo(done: Future[ResultT], undo: Callable[[ResultT], None]) -> None:
    if not done.cancelled() and done.exception() is None:
        undo(done.result())


def _cancel(generations: Sequence[Generation]) -> None:
    for generation in generations:
        generation.cancel()


def _engine_refusal(error: BaseException) -> BaseException:
    if isinstance(error, ToolError):
        return APIError(400, f"Invalid schema: {error}.", code="invalid_value")
    if isinstance(error, PromptTooLong):
        return too_long(error.context, error.prompt_tokens, None)
    if isinstance(error, ModelError):  # unloaded a moment ago
        return APIError(404, "The model does not exist any more.", param="model", code="model_not_found")
    if isinstance(error, EngineStopped):
        return APIError(
            503, "The engine is not running; try again.", code="engine_unavailable", retry_after=1
        )
    if isinstance(error, GrammarLate):
        return APIError(503, f"The request was not prepared: {error}.", code="overloaded", retry_after=10)
    return error


def _record(request: Request) -> Record:
    return cast(Record, request.scope["state"]["record"])


def _json(answer: protocol.Answer) -> Response:
    return Response(answer.json_text(), media_type="application/json")


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    _record(request).error = error.code or error.type
    return refusal_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such path, no such method."""
    assert isinstance(error, HTTPException)
    texts = {
        404: ("Invalid URL: there is no such endpoint.", "unknown_url"),
        405: ("Not allowed to use this method on this endpoint.", "method_not_supported"),
    }
    text, code = texts.get(error.status_code, (str(error.detail), None))
    _record(request).error = code
    response = refusal_response(APIError(error.status_code, text, code=code))
    response.headers.update(error.headers or {})
    return response


# --- routes --------------------------------------------------------------------------------------

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


def _add_routes(app: FastAPI, service: Service) -> None:
    bodies: dict[str, type[BaseModel]] = {}

    def add(
        method: str,
        path: str,
        endpoint: Callable[..., Awaitable[Response]],
        answer: type[BaseModel] | None,
        *,
        body: type[BaseModel] | None = None,
        statuses: Sequence[int] = _READING,
        content: Json | None = None,
    ) -> None:
        ok: Json = {"description": "OK", **({"content": content} if content else {})}
        if answer is not None:
            ok["model"] = answer
        extra = None
        if body is not None:
            bodies[body.__name__] = body
            schema = {"$ref": f"#/components/schemas/{body.__name__}"}
            extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
        errors: dict[int | str, Json] = {
            status: {"model": protocol.ErrorAnswer, "description": _STATUSES[status]} for status in statuses
        }
        app.add_api_route(
            path,
            endpoint,
            methods=[method],
            response_model=None,
            response_class=Response,
            responses={200: ok, **errors},
            openapi_extra=extra,
            operation_id=endpoint.__name__,
        )

    event = {
        "type": "object",
        "description": "One event: a chunk as JSON, at last [DONE].",
        "properties": {"data": {"type": "string"}},
        "required": ["data"],
    }
    stream = {"text/event-stream": {"schema": event}}
    busy = (*_WRITING, 429)
    add(
        "POST",
        "/v1/chat/completions",
        service.chat,
        protocol.ChatCompletion,
        body=protocol.ChatRequest,
        statuses=busy,
        content=stream,
    )
    add(
        "POST",
        "/v1/completions",
        service.complete,
        protocol.TextCompletion,
        body=protocol.CompletionRequest,
        statuses=busy,
        content=stream,
    )
    add("GET", "/v1/models", service.models, protocol.ModelList)
    add("GET", "/v1/models/{model:path}", service.model, protocol.ModelCard, statuses=(*_READING, 404))
    add(
        "POST",
        "/v1/load_lora_adapter",
        service.load_adapter,
        protocol.AdapterChange,
        body=protocol.LoadAdapterRequest,
        statuses=(*_WRITING, 409),
    )
    add(
        "POST",
        "/v1/unload_lora_adapter",
        service.unload_adapter,
        protocol.AdapterChange,
        body=protocol.UnloadAdapterRequest,
        statuses=_WRITING,
    )
    add(
        "POST",
        "/tokenize",
        service.tokenize,
        protocol.Tokenized,
        body=protocol.TokenizeRequest,
        statuses=_WRITING,
    )
    add(
        "POST",
        "/detokenize",
        service.detokenize,
        protocol.Detokenized,
        body=protocol.DetokenizeRequest,
        statuses=_WRITING,
    )
    add("GET", "/health", service.health, protocol.Health)
    add("GET", "/ready", service.ready, protocol.Health, statuses=(*_READING, 503))
    add("GET", "/metrics", service.scrape, None, content={"text/plain": {"schema": {"type": "string"}}})
    _describe_bodies(app, list(bodies.values()))


def _describe_bodies(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> None:
    """Put the request types into the OpenAPI document: we read bodies, so FastAPI does not know them."""
    plain = app.openapi

    def described() -> Json:
        if app.openapi_schema is None:
            document = plain()
            _, definitions = models_json_schema(
                [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
            )
            document["components"]["schemas"].update(definitions["$defs"])
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]
