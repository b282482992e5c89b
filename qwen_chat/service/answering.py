"""From a valid request to its running generations: a place in the queue, a prompt, the engine asked.

In: a request, its model, and what prepares it. Out: a response that sends what the engine answers. Nothing is done
for a request before it has its place: what is turned away costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwen_chat.errors import ModelError, ToolError
from qwen_chat.inference.engine import Engine, EngineStopped, PromptTooLong
from qwen_chat.inference.events import Generation
from qwen_chat.inference.grammar import GrammarLate
from qwen_chat.inference.sampling import GenerationRequest
from qwen_chat.service.admission import Admission
from qwen_chat.service.errors import APIError, engine_unavailable, too_long
from qwen_chat.service.metrics import Metrics
from qwen_chat.service.prepare import Job
from qwen_chat.service.request_log import RequestRecord
from qwen_chat.service.respond import Delivery, Work
from qwen_chat.service.settings import ServiceSettings
from qwen_chat.service.workers import Workers

# Replies that share the pieces of one: with five a reader sees ten pieces a second.
_SHARE_PIECES = 5


class Answering:
    """Answers requests that generate, on one engine."""

    def __init__(self, engine: Engine, settings: ServiceSettings, metrics: Metrics) -> None:
        self._engine = engine
        self._settings = settings
        self._metrics = metrics
        self._admission = Admission(settings.max_queue + engine.max_batch)
        # Two threads each: prompts do not take all cores, and a stranger's schema delays schemas, not chats.
        self._prompts = Workers("intake", 2)
        self._grammars = Workers("grammars", 2)

    async def answer(
        self, record: RequestRecord, prepare: Callable[[float], Job], *, choices: int
    ) -> Delivery:
        """The response to one request. `prepare` is given the request's deadline (of time.monotonic) and runs on a
        worker thread; `choices` are the places that it takes in the queue."""
        seconds = self._settings.prepare_seconds
        deadline = record.began + self._settings.request_seconds
        release = self._admission.take(choices)
        try:
            job, generations = await self._prompts.run(
                lambda: self._begin(prepare(deadline)),
                seconds=seconds,
                undo=lambda begun: _cancel(begun[1] or ()),
            )
            if generations is None:
                generations = await self._grammars.run(
                    lambda: self._submit(job.requests), seconds=seconds, undo=_cancel
                )
        except BaseException:
            release(False)
            raise
        work = Work(
            job=job,
            generations=generations,
            record=record,
            metrics=self._metrics,
            release=lambda: release(True),
            log_reply=self._settings.log_prompts,
            pace=self._pace,
        )
        return Delivery(work, self._settings)

    def _pace(self) -> float:
        """Seconds between two pieces of a reply: replies that run together share the pieces of one alone."""
        return self._settings.pace_seconds * min(_SHARE_PIECES, max(1, self._admission.taken))

    def check(self) -> None:
        """Raise APIError 503 where prompts have not been prepared for too long."""
        if self._prompts.stuck_seconds() > self._settings.prepare_seconds:
            text = "Requests have not been prepared for too long; try again."
            raise APIError(503, text, code="intake_stuck", retry_after=10)

    def _begin(self, job: Job) -> tuple[Job, list[Generation] | None]:
        """A job and its generations; None where a grammar holds one: to read its schemas is the other threads'."""
        bound = any(request.grammar is not None for request in job.requests)
        return job, None if bound else self._submit(job.requests)

    def _submit(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Hand all to the engine, or none."""
        generations: list[Generation] = []
        try:
            # One by one: where one fails, those before it are cancelled.
            for request in requests:
                generations.append(self._engine.submit(request))  # noqa: PERF401
        except BaseException as error:
            _cancel(generations)
            if isinstance(error, ToolError):
                raise APIError(400, f"Invalid schema: {error}.", code="invalid_value") from error
            if isinstance(error, PromptTooLong):
                raise too_long(error.context, error.prompt_tokens, None) from error
            # Its adapter was unloaded a moment ago.
            if isinstance(error, ModelError):
                text = "The model does not exist any more."
                raise APIError(404, text, param="model", code="model_not_found") from error
            if isinstance(error, EngineStopped):
                raise engine_unavailable() from error
            if isinstance(error, GrammarLate):
                text = f"The request was not prepared: {error}."
                raise APIError(503, text, code="overloaded", retry_after=10) from error
            raise
        return generations


def _cancel(generations: Sequence[Generation]) -> None:
    for generation in generations:
        generation.cancel()
