"""From a valid request to what the engine is asked: prompt, limits, grammar, and the answer's shape.

In: protocol requests, and the model's format. Out: `Job`. Everything here is pure computation; it runs on a
worker thread, for a long prompt takes a while to tokenise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qwen_chat.chat.control_tokens import TooManyTokens
from qwen_chat.chat.format import ChatFormat
from qwen_chat.chat.template import NONE
from qwen_chat.conversation import Json
from qwen_chat.dialects.grammar import Grammar
from qwen_chat.dialects.known import Calls
from qwen_chat.dialects.reader import StreamParser
from qwen_chat.errors import FormatError, ToolError
from qwen_chat.inference.sampling import GenerationRequest
from qwen_chat.service.chunks import Assembly, ChatAssembly, TextAssembly
from qwen_chat.service.client_schema import check_schemas, held
from qwen_chat.service.errors import APIError, bad_value, too_long
from qwen_chat.service.protocol import (
    ChatRequest,
    CompletionRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedChoice,
    RenderedRequest,
    SamplingRequest,
    TextFormat,
    WireFinish,
)


@dataclass(frozen=True, slots=True)
class Job:
    """What the engine is to do for one request: the choices of the first prompt, of the second, and so on.
    `prompt_tokens` counts each prompt once, as OpenAI does."""

    requests: tuple[GenerationRequest, ...]
    assembly: Assembly
    prompt_tokens: int
    stream: bool
    include_usage: bool
    prompts: int = 1


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """How to sample where a request does not say: OpenAI's defaults, or those that a model recommends."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def recommended_sampling(folder: Path) -> SamplingDefaults:
    """What a model's generation_config.json recommends (Qwen2.5: temperature 0.7, top_p 0.8, top_k 20)."""
    file = folder / "generation_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return SamplingDefaults()
    known = {field.name for field in fields(SamplingDefaults)}
    given = config.items() if isinstance(config, dict) else ()
    return SamplingDefaults(**{name: value for name, value in given if name in known and _is_number(value)})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


@dataclass(frozen=True, slots=True)
class Served:
    """The model that a request named: its format, its adapter, and how many tokens it sees."""

    name: str
    adapter: str | None
    fmt: ChatFormat
    context: int
    vocabulary: int
    end_tokens: frozenset[int]
    defaults: SamplingDefaults


@dataclass(frozen=True, slots=True)
class CallPolicy:
    """What a chat's reply may be: `grammar` holds it (None: nothing does), `marks` says what in it is a call,
    `finish_reason` how a reply with calls ends. `may_think`: the grammar, if any, lets a thought come first."""

    grammar: Grammar | None = None
    marks: Calls = "any"
    finish_reason: WireFinish = "tool_calls"
    may_think: bool = True

    @classmethod
    def of(cls, request: ChatRequest, tools: list[Json] | None, fmt: ChatFormat) -> CallPolicy:
        """`tools`: those that the model is shown, None without any. Without tools nothing in a reply is a call,
        whatever it looks like; under a grammar only those that it holds are. Raises APIError."""
        choice = request.tool_choice
        forced = choice == "required" or isinstance(choice, NamedChoice)
        _check_tools(tools or (), forced=forced)
        form = _format_grammar(request)
        if form is not None and tools is not None:
            raise APIError(
                400,
                "Unsupported parameter: 'response_format' is not supported together with 'tools' here.",
                param="response_format",
                code="unsupported_parameter",
            )
        if tools is None:
            return cls(form, marks="none", may_think=form is None)
        try:
            if isinstance(choice, NamedChoice):
                name = choice.function.name
                named = [_held(tool) for tool in tools if tool["function"]["name"] == name]
                return cls(fmt.call_grammar(named, name=name), "bound", "stop", may_think=False)
            if choice == "required":
                several = request.parallel_tool_calls is not False
                grammar = fmt.call_grammar([_held(tool) for tool in tools], parallel=several)
                return cls(grammar, "bound", may_think=False)
            if any(tool["function"].get("strict") for tool in tools):
                return cls(fmt.text_grammar(tools), "bound")
        except ToolError as error:
            raise bad_value("tools", f"Invalid 'tools': {error}.") from None
        return cls()


def chat_job(request: ChatRequest, body: Mapping[str, Any], model: Served, deadline: float) -> Job:
    """A chat completion. `body` is the request as it came: tools are rendered in the client's key order."""
    # With tool_choice none the model is not shown the tools: what it cannot see it does not call.
    tools = plain_tools(body["tools"]) if request.tools and request.tool_choice != "none" else None
    messages = _messages(body["messages"])
    policy = CallPolicy.of(request, tools, model.fmt)
    variables = template_kwargs(request, model.fmt)
    try:
        prompt = model.fmt.render(messages, tools, most=model.context, **variables)
    except TooManyTokens as error:
        raise too_long(model.context, error.least, None, at_least=True) from None
    except FormatError as error:
        raise _bad_messages(error) from None
    grammar = policy.grammar
    if grammar is not None and prompt.in_reasoning and not policy.may_think:
        grammar = grammar.after_thought()
    first = _generation(request, model, tuple(prompt.ids), deadline)
    first = replace(
        first,
        stop=(*first.stop, *model.fmt.stop_strings),
        stop_token_ids=tuple(model.fmt.stop_token_ids),
        grammar=grammar,
    )
    thoughts = prompt.in_reasoning or (policy.may_think and model.fmt.knows_reasoning)
    plain = policy.marks == "none" and not thoughts

    def parser() -> StreamParser | None:
        return (
            None
            if plain
            else model.fmt.stream_parser(tools, in_reasoning=prompt.in_reasoning, calls=policy.marks)
        )

    assembly = ChatAssembly(
        model=model.name,
        choices=request.choices,
        parser=parser,
        calls_finish=policy.finish_reason,
        parallel=request.parallel_tool_calls is not False,
        with_logprobs=bool(request.logprobs),
        end_tokens=model.end_tokens,
        counts_usage=request.include_usage,
    )
    requests = tuple(_numbered(first, k) for k in range(request.choices))
    return Job(requests, assembly, len(prompt.ids), bool(request.stream), request.include_usage)


def completion_job(request: CompletionRequest, model: Served, deadline: float) -> Job:
    """A plain completion: each prompt as it is, control tokens in it included."""
    prompts = [_text_ids(prompt, model) for prompt in request.prompts]
    grammar = _format_grammar(request)
    requests = []
    for prompt_ids in prompts:
        first = replace(
            _generation(request, model, prompt_ids, deadline),
            grammar=grammar,
            stop_token_ids=tuple(model.fmt.stop_token_ids),
        )
        requests += [_numbered(first, k) for k in range(request.choices)]
    assembly = TextAssembly(
        model=model.name,
        choices=len(requests),
        with_logprobs=request.logprobs is not None,
        end_tokens=model.end_tokens,
        counts_usage=request.include_usage,
    )
    tokens = sum(len(ids) for ids in prompts)
    return Job(tuple(requests), assembly, tokens, bool(request.stream), request.include_usage, len(prompts))


def chat_prompt_ids(
    messages: Sequence[Json], tools: list[Json] | None, fmt: ChatFormat, variables: Mapping[str, Any] = NONE
) -> list[int]:
    """The tokens that a chat's prompt has; raises APIError where the messages cannot be rendered."""
    try:
        return fmt.render(_messages(messages), plain_tools(tools) if tools else None, **variables).ids
    except FormatError as error:
        raise _bad_messages(error) from None


def template_kwargs(request: RenderedRequest, fmt: ChatFormat) -> Json:
    """The template's variables as a request sets them, by their names or by what OpenAI's and other servers' clients
    call them. Raises APIError where the template has none of that kind, or two places differ."""
    values = dict(request.chat_template_kwargs or {})
    try:
        fmt.check_variables(values, "Invalid 'chat_template_kwargs'")
    except FormatError as error:
        raise bad_value("chat_template_kwargs", f"{error}.") from None
    switch, effort = fmt.thinking_switch, request.reasoning_effort
    asked: dict[str, tuple[str, object]] = {}
    if request.enable_thinking is not None:
        if switch is None:
            raise _no_variable("enable_thinking", "turns thinking on or off")
        asked["enable_thinking"] = switch.name, request.enable_thinking == switch.on
    if effort == "none" and switch is not None and "none" not in fmt.efforts:
        asked["reasoning_effort"] = switch.name, not switch.on
    elif effort is not None:
        words = (*(("none",) if switch else ()), *fmt.efforts)
        if not words:
            raise _no_variable("reasoning_effort", "says how much to think")
        if effort not in words:
            expected = " or ".join(repr(word) for word in words)
            raise bad_value("reasoning_effort", f"Invalid value for 'reasoning_effort': expected {expected}.")
        asked["reasoning_effort"] = "reasoning_effort", effort
    for param, (name, value) in asked.items():
        if values.setdefault(name, value) != value:
            text = f"Invalid value for '{param}': another value of '{name}' stands elsewhere in the request."
            raise bad_value(param, text)
    thinks = switch is None or values.get(switch.name, fmt.thinks == switch.on) == switch.on
    if "reasoning_effort" in values and not thinks:
        text = "Invalid value for 'reasoning_effort': it says how much to think, but thinking is off."
        raise bad_value("reasoning_effort", text)
    return values


def _no_variable(param: str, what: str) -> APIError:
    why = f"its chat template has no variable that {what}"
    text = f"Unsupported parameter: '{param}' is not supported by this model: {why}."
    return bad_value(param, text, "unsupported_parameter")


def _messages(messages: Sequence[Json]) -> list[Json]:
    """The messages as the template reads them: `developer` is `system`, results in the calls' order."""
    plain = [_plain_message(message) for message in messages]
    order: dict[str, int] = {}
    rank: list[tuple[int, int]] = []  # the turn that a message belongs to, then its place in it
    turn = 0
    for message in plain:
        if message["role"] != "tool":
            turn += 1
            order = {call["id"]: k for k, call in enumerate(message.get("tool_calls") or (), start=1)}
        rank.append((turn, order.get(message.get("tool_call_id", ""), 0) if message["role"] == "tool" else 0))
    return [plain[k] for k in sorted(range(len(plain)), key=rank.__getitem__)]


def _plain_message(message: Json) -> Json:
    """Without hints, and with one name for each thing."""
    plain = _without_hint(message)
    if plain["role"] == "developer":
        plain["role"] = "system"
    if isinstance(plain.get("content"), list):
        plain["content"] = [_without_hint(part) for part in plain["content"]]
    if plain.get("tool_calls") == []:
        del plain["tool_calls"]
    return plain


def plain_tools(tools: Sequence[Json]) -> list[Json]:
    """The tools as the template is shown them: in the client's order of keys, without hints."""
    return [_without_hint(tool) for tool in tools]


def _without_hint(part: Json) -> Json:
    return {key: value for key, value in part.items() if key != "cache_control"}


def _bad_messages(error: FormatError) -> APIError:
    where = "messages" if error.message is None else f"messages[{error.message}]"
    return bad_value(where, f"Invalid 'messages': {error}.")


def _text_ids(prompt: str | list[int], model: Served) -> tuple[int, ...]:
    if isinstance(prompt, str):
        try:
            return tuple(model.fmt.text_ids(prompt, most=model.context))
        except TooManyTokens as error:
            raise too_long(model.context, error.least, None, param="prompt", at_least=True) from None
    worst = max(prompt)
    if worst >= model.vocabulary:
        raise bad_value(
            "prompt", f"Invalid 'prompt': token {worst} is beyond the vocabulary ({model.vocabulary})."
        )
    return tuple(prompt)


def _generation(
    request: ChatRequest | CompletionRequest, model: Served, prompt_ids: tuple[int, ...], deadline: float
) -> GenerationRequest:
    """What both endpoints share. null means the same as absent: the default."""
    defaults = model.defaults
    wanted, room = request.token_limit, model.context - len(prompt_ids)
    param = "messages" if isinstance(request, ChatRequest) else "prompt"
    if room < 1:
        raise too_long(model.context, len(prompt_ids), None, param=param)
    given = request.model_fields_set & {"max_tokens", "max_completion_tokens"}
    if given and wanted is not None and wanted > room:
        raise too_long(model.context, len(prompt_ids), wanted, param=param)
    bias = {int(key): value for key, value in (request.logit_bias or {}).items()}
    if bias and max(bias) >= model.vocabulary:
        raise bad_value(
            "logit_bias",
            f"Invalid 'logit_bias': token {max(bias)} is beyond the vocabulary ({model.vocabulary}).",
        )
    return GenerationRequest(
        prompt_ids=prompt_ids,
        max_tokens=room if wanted is None else min(wanted, room),
        temperature=_or(request.temperature, defaults.temperature),
        top_p=_or(request.top_p, defaults.top_p),
        top_k=max(defaults.top_k if request.top_k is None else request.top_k, 0),
        min_p=_or(request.min_p, defaults.min_p),
        seed=request.seed,
        stop=request.stops,
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty),
        logit_bias=bias,
        logprobs=request.alternatives,
        adapter=model.adapter,
        deadline=deadline,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _numbered(request: GenerationRequest, k: int) -> GenerationRequest:
    """Choice k of several: with a seed each has its own, else they would all be the same."""
    return request if request.seed is None else replace(request, seed=(request.seed + k) % 2**63)


# --- grammars ------------------------------------------------------------------------------------


def _check_tools(tools: Sequence[Json], *, forced: bool) -> None:
    """Raise APIError where a schema is none, or too much for a grammar that will hold it."""
    schemas = []
    for k, tool in enumerate(tools):
        param, function = f"tools[{k}].function.parameters", tool["function"]
        schemas.append((param, function.get("parameters") or {}, bool(function.get("strict"))))
        if forced and not function.get("strict"):
            schemas.append((param, held(function.get("parameters") or {}), True))
    check_schemas(schemas)


def _held(tool: Json) -> Json:
    """A tool that must be called: where it is not strict, under what of its schema a grammar can hold."""
    function = tool["function"]
    if function.get("strict") or not function.get("parameters"):
        return tool
    return {**tool, "function": {**function, "parameters": held(function["parameters"])}}


def _format_grammar(request: SamplingRequest) -> Grammar | None:
    form = request.response_format
    if form is None or isinstance(form, TextFormat):
        return None
    if isinstance(form, JsonObjectFormat):
        return Grammar.json_object()
    assert isinstance(form, JsonSchemaFormat)
    check_schemas([("response_format.json_schema.schema", form.json_schema.schema_, True)])
    try:
        return Grammar.json_schema(form.json_schema.schema_)
    except ToolError as error:
        raise bad_value("response_format", f"Invalid schema for 'response_format': {error}.") from None
