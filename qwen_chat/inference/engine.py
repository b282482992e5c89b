"""Many requests, one model, one thread: continuous batching over a decoder with its own keys and values.

In: `GenerationRequest`s from any thread. Out: for each a `Generation`: events as they come, a `Completion`.

    with load_engine(path) as engine:
        done = engine.generate([GenerationRequest(engine.fmt.prompt_ids(messages), max_tokens=64)])

Every step computes the last token of every running request, what it will probably say next (draft.py) and, within a
budget, pieces of the prompts that wait; requests join and leave between any two steps. A request's result depends
neither on who else is served (decoder.py, sampling.py) nor on drafts. A step that raises fails the requests in flight,
and nothing else: `on_failure` is called and `start()` works again.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwen_chat import hardware
from qwen_chat.dialects.grammar import Grammar
from qwen_chat.errors import ModelError, OptionError, ServiceError
from qwen_chat.inference.decoder import Decoder
from qwen_chat.inference.draft import JUMP, MOST, Drafter, StepCost
from qwen_chat.inference.events import (
    Completion,
    Generation,
    TokenEvent,
    put_all,
)
from qwen_chat.inference.grammar import GrammarTokenizer, Matcher
from qwen_chat.inference.kv_cache import KVShape, KVStore
from qwen_chat.inference.lora import Lora
from qwen_chat.inference.prefix_cache import BLOCK, PrefixCache
from qwen_chat.inference.row import Row, failed_choice, failure
from qwen_chat.inference.sampling import Choice, GenerationRequest, Sampler, choose
from qwen_chat.inference.step import Segment
from qwen_chat.inference.text import StopText, TokenText

if TYPE_CHECKING:
    from qwen_chat.chat.format import ChatFormat

_COUNTED = (
    "steps",
    "requests",
    "prompt_tokens",
    "cached_tokens",
    "generated_tokens",
    "forced_tokens",
    "drafted_tokens",
    "accepted_tokens",
)
_SNAPSHOT_EVERY = 128  # tokens: how often one is expected in the prefix cache, for which it gets room


class PromptTooLong(ServiceError):
    """A prompt (with at least one token of reply) that the context does not hold."""

    def __init__(self, prompt_tokens: int, context: int) -> None:
        self.prompt_tokens, self.context = prompt_tokens, context
        super().__init__(
            f"the prompt has {prompt_tokens} tokens; the context holds {context}, reply included; shorten it"
        )


class EngineStopped(ServiceError):
    """The engine is not running, or failed under this request."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start, and what is there now; for metrics."""

    running: int = 0
    waiting: int = 0
    steps: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    forced_tokens: int = 0  # of these, appended without a step as the grammar allowed nothing else
    drafted_tokens: int = 0  # computed as drafts
    accepted_tokens: int = 0  # of these, said
    kv_tokens: int = 0  # tokens held by running requests
    batch: int = 0  # requests that the last forward pass advanced; 0 where none runs


@dataclass(frozen=True, slots=True)
class _Adapter:
    """What answers under an adapter's name, and its own way between text and tokens (None: the base's)."""

    lora: Lora | None  # None: merged into the base
    fmt: ChatFormat | None = None
    token_text: TokenText | None = None

    @staticmethod
    def read(folder: Path, lora: Lora | None) -> _Adapter:
        """With the format that it was saved with. Raises ModelError, FormatError where that cannot be used."""
        if not (folder / "tokenizer_config.json").is_file():
            return _Adapter(lora)
        from qwen_chat.chat.format import ChatFormat
        from qwen_chat.models import load_tokenizer

        tokenizer = load_tokenizer(folder)
        return _Adapter(lora, ChatFormat(tokenizer), TokenText(tokenizer))


class Engine:
    """Serves requests over one model.

    Args:
        model: a transformers causal model (of `decoder.FAMILIES`), or a Decoder that was made of one.
        max_batch: requests that run at once; further ones wait.
        kv_tokens: tokens that running requests may hold together, their states counted as so many; None = what
            fits the free memory.
        cache_tokens: tokens that the prefix cache may hold, at most an eighth of the free memory; 0 = off.
        prefill_tokens: prompt tokens in a step while others decode (what a long prompt may delay them by).
        adapters: name -> folder of a LoRA adapter.
        serves_base: False: only adapters may be asked for (the base has no chat format of its own).
        fmt: the base's chat format; None = made of `tokenizer` when it is asked for.
        stop_token_ids, stop_strings: end every reply, beside a request's own and its format's; None = the model's.
        drafts: False: every token costs a step of its own (benchmarks).
        on_failure: called in the engine's thread, after a step raised; it may call `start()`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        fmt: ChatFormat | None = None,
        quantize: str | None = None,
        max_batch: int = 32,
        kv_tokens: int | None = None,
        cache_tokens: int = 16_384,
        prefill_tokens: int = 128,
        adapters: Mapping[str, Path] | None = None,
        serves_base: bool = True,
        stop_token_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        drafts: bool = True,
        on_failure: Callable[[BaseException], None] | None = None,
        decisions: Sequence[str] = (),
    ) -> None:
        self.decoder = model if isinstance(model, Decoder) else Decoder(model, quantize=quantize)
        self.tokenizer = tokenizer
        self.decisions = (*decisions, *self.decoder.ways)
        self.max_batch = max_batch
        self.prefill_tokens = prefill_tokens
        self.on_failure = on_failure
        self._saves_steps = drafts
        # On an accelerator bits depend on how many tokens a step has.
        self._drafts_tokens = drafts and self.decoder.device.type == "cpu"
        self._step_cost = StepCost()
        self.failure: BaseException | None = None
        self.stop_token_ids = frozenset(
            end_tokens(model, tokenizer) if stop_token_ids is None else stop_token_ids
        )
        self.stop_strings = tuple(stop_strings)
        self._fmt = fmt
        self._base_stops = () if fmt is None else fmt.stop_strings
        shape = self.decoder.kv_shape
        fits, cache_tokens = _memory_tokens(shape, cache_tokens)
        self.kv_tokens = kv_tokens or fits
        if (held := self.kv_tokens) < (whole := self.context_length):
            self.decisions += (f"context {held:,} of {whole:,} tokens, as many as memory holds at once",)
        self._token_text = TokenText(tokenizer)
        self._cache = PrefixCache(cache_tokens, shape.snapshot_tokens)
        self._kv = KVStore(shape)
        self._grammars: GrammarTokenizer | None = None
        self._grammar_lock = threading.Lock()
        self._adapters: dict[str, _Adapter] = {}
        self._merged: str | None = None  # the adapter that is part of the model
        self._serves_base = serves_base
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
        self._wakeup = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._batch = 0
        self._counts = dict.fromkeys(_COUNTED, 0)
        for name, folder in (adapters or {}).items():
            self.load_adapter(name, folder)

    def start(self) -> Engine:
        """Start the worker thread; nothing happens where it runs already. Works again after a failure."""
        with self._wakeup:
            if self.is_running:
                return self
            self._stopping, self.failure = False, None
            self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """Stop the thread after the step it is in; what is in flight or waits is "cancelled"."""
        with self._wakeup:
            self._stopping = True
            self._wakeup.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        if self._grammars is not None:
            self._grammars.close()
        with self._wakeup:
            for row in (*self._running, *self._waiting):
                row.generation.put(TokenEvent(finish_reason="cancelled"))
            self._running.clear()
            self._waiting.clear()
            self._kv.clear()
            self._thread = None

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        """True while requests are served."""
        thread = self._thread
        return thread is not None and thread.is_alive() and self.failure is None and not self._stopping

    @property
    def fmt(self) -> ChatFormat:
        """The base's chat format, whatever adapters there are. Raises FormatError where it has none."""
        if self._fmt is None:
            from qwen_chat.chat.format import ChatFormat

            self._fmt = ChatFormat(self.tokenizer)
        return self._fmt

    def format_of(self, adapter: str | None) -> ChatFormat:
        """The chat format under which an adapter was trained; the base's for one saved without, and for None."""
        known = None if adapter is None else self._adapters.get(adapter)
        return self.fmt if known is None or known.fmt is None else known.fmt

    @property
    def serves_base(self) -> bool:
        """Whether the base answers beside the adapters; False where one is merged into it."""
        return self._serves_base and self._merged is None

    @property
    def context_length(self) -> int:
        """Tokens of prompt and reply together."""
        return self.decoder.context

    def stats(self) -> EngineStats:
        """What is there now and was done since the start."""
        with self._wakeup:
            held = sum(row.computed for row in self._running)
            return EngineStats(
                running=len(self._running),
                waiting=len(self._waiting),
                kv_tokens=held,
                batch=self._batch if self._running else 0,
                **self._counts,
            )

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(self._adapters)

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load (or replace) an adapter, with its format, while others are served. Raises ModelError where it does
        not fit."""
        if self._merged is not None:
            raise ModelError(
                f"{folder}: {self._merged} is merged into this engine's base, which serves no other"
            )
        folder = Path(folder)
        self._adapters[name] = _Adapter.read(folder, Lora(folder, self.decoder.places))

    def name_merged(self, name: str, folder: Path | None = None) -> None:
        """The model is the base with this adapter merged in: it answers under `name` alone, in the format that
        lies in `folder`."""
        self._adapters[name] = _Adapter(None) if folder is None else _Adapter.read(folder, None)
        self._merged = name

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that run with it finish with it."""
        if name == self._merged:
            raise ModelError(f"adapter {name!r} is merged into the base and cannot be unloaded")
        if self._adapters.pop(name, None) is None:
            raise self._no_adapter(name)

    def _no_adapter(self, name: str) -> ModelError:
        return ModelError(f"no adapter is called {name!r}; loaded: {', '.join(self._adapters) or 'none'}")

    def submit(self, request: GenerationRequest) -> Generation:
        """Queue a request; returns at once. Raises PromptTooLong, EngineStopped, ToolError (its
        grammar) or ModelError (its adapter)."""
        generation = Generation(request, self._notify)
        row = self._row(generation)
        with self._wakeup:
            if not self.is_running:
                raise EngineStopped(
                    "the engine is not running" + (f" ({self.failure})" if self.failure else "")
                )
            self._waiting.append(row)
            self._counts["requests"] += 1
            self._wakeup.notify_all()
        return generation

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Serve all of them, batched; their completions in order. Starts the engine where it does not run."""
        self.start()
        return [generation.result() for generation in [self.submit(request) for request in requests]]

    def check_grammar(self, grammar: Grammar) -> None:
        """Raises ToolError where a grammar cannot be used with this vocabulary."""
        self._matcher(grammar)

    def _row(self, generation: Generation) -> Row:
        request = generation.request
        count = len(request.prompt_ids)
        room = min(self.context_length, self.kv_tokens)
        if not count or count >= room:
            raise (
                PromptTooLong(count, room)
                if count
                else ServiceError("the prompt is empty; expected at least one token")
            )
        adapter = _Adapter(None)
        if request.adapter is not None:
            found = self._adapters.get(request.adapter)
            if found is None:
                raise self._no_adapter(request.adapter)
            adapter = found
        elif not self.serves_base:
            raise ModelError(
                f"the base is not served here; ask for {' or '.join(self._adapters) or 'an adapter'}"
            )
        if not all(
            0 <= token < self.decoder.vocabulary for token in (*request.prompt_ids, *request.logit_bias)
        ):
            raise ServiceError(f"a token id is outside the vocabulary of {self.decoder.vocabulary}")
        if request.max_tokens is not None and request.max_tokens < 1:
            raise OptionError(f"max_tokens is {request.max_tokens}; expected at least 1")
        matcher = None if request.grammar is None else self._matcher(request.grammar)
        own = () if adapter.fmt is None else adapter.fmt.stop_token_ids
        ends = frozenset() if request.ignore_eos else self.stop_token_ids.union(own)
        stops = self._base_stops if adapter.fmt is None else adapter.fmt.stop_strings
        tokens = list(request.prompt_ids)
        return Row(
            generation=generation,
            sampler=Sampler(request, matcher),
            text=StopText((*request.stop, *stops, *self.stop_strings)),
            token_text=adapter.token_text or self._token_text,
            tokens=tokens,
            end=min(room, count + request.max_tokens) if request.max_tokens else room,
            stop_ids=ends | frozenset(request.stop_token_ids),
            lora=adapter.lora,
            kv=self._kv.row(),
            drafter=Drafter(tokens) if self._drafts_tokens else None,
        )

    def _matcher(self, grammar: Grammar) -> Matcher:
        with self._grammar_lock:
            if self._grammars is None:
                self._grammars = GrammarTokenizer(
                    self.tokenizer, self.decoder.vocabulary, sorted(self.stop_token_ids)
                )
            grammars = self._grammars
        return grammars.matcher(grammar)  # outside the lock: a large schema holds up no other

    def _notify(self) -> None:
        with self._wakeup:
            self._wakeup.notify_all()

    def _work(self) -> None:
        try:
            while True:
                with self._wakeup:
                    while not (self._running or self._waiting or self._stopping):
                        self._wakeup.wait()
                    if self._stopping:
                        return
                self._step()
        except Exception as error:  # whatever it was, the requests in flight must hear of it
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        with self._wakeup:
            self.failure = error
            rows, self._running = self._running, []
            if self.on_failure is None:  # nobody will start the engine again: who waits would wait for ever
                rows += self._waiting
                self._waiting.clear()
            self._cache.clear()
            self._kv.clear()
        for row in rows:
            row.generation.put(failure(f"the engine failed: {type(error).__name__}"))
        if self.on_failure is not None:
            self.on_failure(error)

    def _step(self) -> None:
        self._leave()
        self._join()
        segments, rows = self._plan()
        if not segments:
            return
        begin = time.perf_counter()
        logits = self.decoder.step(segments)
        self._step_cost.observe(sum(len(segment.ids) for segment in segments), time.perf_counter() - begin)
        self._counts["steps"] += 1
        self._batch = len(segments)
        ready = []
        for row, segment in zip(rows, segments, strict=True):
            row.computed += len(segment.ids) - segment.drafts
            if segment.wants_logits:
                ready.append((row, segment.ids[len(segment.ids) - segment.drafts :]))
            if not row.generated and (segment.wants_logits or len(segment.ids) > 1):
                self._cache.store(row.kv, row.number, row.tokens[: row.computed])
        if not ready:
            return
        lines = torch.split(logits, [1 + len(drafts) for _, drafts in ready])
        first = logits if len(logits) == len(ready) else torch.stack([own[0] for own in lines])
        events = []
        for (row, drafts), own, choice in zip(
            ready, lines, choose([row.sampler for row, _ in ready], first), strict=True
        ):
            for event in self._said(row, choice, drafts, own):
                if event.finish_reason is not None:
                    self._end(row, event)
                events.append((row.generation, event))
        put_all(events)

    def _leave(self) -> None:
        """Requests whose client left or whose time is over."""
        now = time.monotonic()
        for row in (*self._running, *self._waiting):
            deadline = row.request.deadline
            if row.generation.is_cancelled:
                self._finish(row, row.cut_off("cancelled"))
            elif deadline is not None and now >= deadline:
                self._finish(row, row.cut_off("deadline"))

    def _join(self) -> None:
        """Waiting requests start while there is a place and memory for their prompt and a little more; when
        the running ones outgrow the memory, the youngest waits again (its tokens are kept, its keys and
        values computed anew)."""
        with self._wakeup:
            state = self.decoder.kv_shape.state_tokens
            held = sum(max(len(row.tokens) + 1, row.computed) + state for row in self._running)
            while held > self.kv_tokens and len(self._running) > 1:
                row = self._running.pop()
                held -= len(row.tokens) + 1 + state
                row.kv.release()
                row.computed, row.started = 0, False
                self._waiting.appendleft(row)
            while self._waiting and len(self._running) < self.max_batch:
                need = min(len(self._waiting[0].tokens) + BLOCK, self._waiting[0].end) + state
                if self._running and held + need > self.kv_tokens:
                    break
                held += need
                self._running.append(self._waiting.popleft())

    def _plan(self) -> tuple[list[Segment], list[Row]]:
        """This step's tokens: one of every row that decodes, then pieces of prompts (or of what a grammar forced)
        within the budget: those with the least left first, so that a long prompt holds nobody up, but a quarter for
        the oldest. Behind a row's newest token, its drafts."""
        decoding = [row for row in self._running if len(row.tokens) - row.computed == 1]
        filling = [row for row in self._running if len(row.tokens) - row.computed > 1]
        budget = self.prefill_tokens if decoding else 4 * self.prefill_tokens
        rows, segments = [], []
        pays = self._step_cost.bet(len(decoding) or 1)
        for row in decoding:
            rows.append(row)
            segments.append(self._segment(row, 1, pays))
        beginnings = set()
        kept = budget // 4  # for the oldest
        for row in sorted(filling, key=lambda row: len(row.tokens) - row.computed):
            is_oldest = row is filling[0]
            room = budget if is_oldest else budget - kept
            beginning = (row.number, tuple(row.tokens[:BLOCK]))
            if room <= 0 or (not row.started and beginning in beginnings):
                continue  # no room; or another computes the same beginning now: in the next step it is cached
            if not row.started:
                self._start(row)
            if not row.generated:
                beginnings.add(beginning)
            count = min(len(row.tokens) - row.computed, room)
            budget -= count
            kept = 0 if is_oldest else kept
            rows.append(row)
            segments.append(self._segment(row, count, pays))
        return segments, rows

    def _start(self, row: Row) -> None:
        row.started = True
        row.computed = self._cache.fill(row.kv, row.number, row.tokens)
        if not row.generated:
            row.generation.cached_tokens = row.computed
            self._counts["cached_tokens"] += row.computed
            self._counts["prompt_tokens"] += row.generation.prompt_tokens

    def _segment(self, row: Row, count: int, pays: Callable[[float], bool]) -> Segment:
        stop = row.computed + count
        row.kv.reserve(stop)
        keep: tuple[int, ...] = ()
        if row.kv.state is not None and self._cache.is_on:
            # The last block end; of a prompt's last piece, one that the same prompt could go on from.
            last = stop - (stop == len(row.tokens) and not row.generated)
            ends = {last // BLOCK * BLOCK, row.kv.state.branch}
            keep = tuple(sorted(end for end in ends if row.computed < end <= stop))
        is_last = stop == len(row.tokens)
        drafts = self._drafts(row, pays) if is_last else []
        ids = row.tokens[row.computed : stop] + drafts
        return Segment(ids, row.computed, row.kv, row.lora, is_last, keep, len(drafts))

    def _drafts(self, row: Row, pays: Callable[[float], bool]) -> list[int]:
        """What the row will probably say next."""
        count = len(row.tokens)
        room = min(row.kv.draft_room(count), row.end - count - 1)
        if room <= 0 or row.drafter is None:
            return []
        matcher = row.sampler.matcher
        drafts = [] if matcher is None else matcher.forced()[: min(room, MOST)]
        if not drafts:
            drafts = row.drafter.guess(room, pays)
            if matcher is not None and drafts:
                drafts = matcher.allowed(drafts)
        drafts = list(itertools.takewhile(lambda token: token not in row.stop_ids, drafts))
        self._counts["drafted_tokens"] += len(drafts)
        return drafts

    def _said(
        self, row: Row, choice: Choice | Exception, drafts: Sequence[int], logits: torch.Tensor
    ) -> Iterator[TokenEvent]:
        """What a step adds to a row: the token chosen after its last one, then after each draft that was chosen itself,
        then what the grammar forces. logits (1 + drafts, vocabulary)."""
        taken = 0
        while True:
            if isinstance(choice, Exception):
                yield failed_choice(choice)
                return
            event = row.advance(choice)
            self._counts["generated_tokens"] += 1
            yield event
            if event.finish_reason is not None:
                return
            if taken == len(drafts) or choice.token_id != drafts[taken] or row.generation.is_cancelled:
                break
            taken += 1
            row.computed += 1
            self._counts["accepted_tokens"] += 1
            (choice,) = choose([row.sampler], logits[taken : taken + 1])
        row.kv.take_back(len(drafts) - taken)
        for forced in itertools.islice(row.sampler.forced(), JUMP if self._saves_steps else 0):
            self._counts["forced_tokens"] += 1
            event = row.advance(forced)
            self._counts["generated_tokens"] += 1
            yield event
            if event.finish_reason is not None:
                return

    def _finish(self, row: Row, event: TokenEvent) -> None:
        self._end(row, event)
        row.generation.put(event)

    def _end(self, row: Row, event: TokenEvent) -> None:
        """Give back what a row holds."""
        if row.computed and event.finish_reason in ("stop", "length"):
            self._cache.store(row.kv, row.number, row.tokens[: row.computed])
        row.kv.release()
        with self._wakeup:
            if row in self._running:
                self._running.remove(row)
            elif row in self._waiting:
                self._waiting.remove(row)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokenizer's end token and those of the model's generation config."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    found = set(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])
    return found | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())


def _memory_tokens(shape: KVShape, cache_tokens: int) -> tuple[int, int]:
    """Tokens for running requests and for the prefix cache: half of the memory that is free where the model computes,
    a container's limit included. The cache gets at most a quarter of it; a row's capacity may be twice its length.
    Where the model has states, the cache gets room for a snapshot every 128 tokens beside.
    """
    budget = hardware.device_free(str(shape.device).partition(":")[0]) // 2 // max(shape.token_bytes, 1)
    cache = min(cache_tokens + cache_tokens // _SNAPSHOT_EVERY * shape.snapshot_tokens, budget // 4)
    return max((budget - cache) // 2, 1024), cache
