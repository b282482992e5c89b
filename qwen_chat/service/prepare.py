"""From a valid request to what the engine is asked: prompt, limits, grammar, and the answer's shape.

In: protocol requests, and the model's format. Out: `Job`. Everything here is pure computation; it runs on a
worker thread, for a long prompt takes a while to tokenise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qwen_chat.chat.control_tokens import TooManyTokens
from qwen_chat.chat.format import ChatFormat
from qwen_chat.conversation import Json
from qwen_chat.dialects.reader import Marks, StreamParser
from qwen_chat.errors import FormatError, ToolError
from qwen_chat.inference.grammar import Grammar
from qwen_chat.inference.sampling import GenerationRequest
from qwen_chat.service.chunks import Assembly, CallMode, ChatAssembly, TextAssembly
from qwen_chat.service.client_schema import check_schemas, held
from qwen_chat.service.errors import APIError, bad_value, too_long
from qwen_chat.service.protocol import (
    ChatRequest,
    CompletionRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedChoice,
    SamplingRequest,
    TextFormat,
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
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


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


def chat_job(request: ChatRequest, body: Mapping[str, Any], model: Served, deadline: float) -> Job:
    """A chat completion. `body` is the request as it came: tools are rendered in the client's key order."""
    tools = plain_tools(body["tools"]) if _offers_tools(request) else None
    messages = _messages(body["messages"])
    grammar, mode = _chat_grammar(request, tools)
    try:
        prompt = model.fmt.prompt_within(messages, tools, most=model.context)
    except TooManyTokens as error:
        raise too_long(model.context, error.least, None, at_least=True) from None
    except FormatError as error:
        raise _bad_messages(error) from None
    thinking = prompt.in_reasoning and (grammar is None or mode == "strict")
    first = _generation(request, model, tuple(prompt.ids), deadline)
    first = replace(
        first,
        stop=(*first.stop, *model.fmt.stop_strings),
        stop_token_ids=tuple(model.fmt.stop_token_ids),
        grammar=grammar,
    )
    plain = mode == "none" or (tools is None and "<think>" not in model.fmt.template)
    # Without tools nothing in a reply is a call, whatever it looks like; only thinking is told apart. Under
    # `strict` the tagged calls alone are: the grammar sees no others.
    marks: Marks | None = "none" if tools is None else "tagged" if mode == "strict" else None
    bound = tools is not None and grammar is not None

    def parser() -> StreamParser | None:
        return None if plain else StreamParser(tools, in_reasoning=thinking, marks=marks, bound=bound)

    assembly = ChatAssembly(
        model=model.name,
        choices=request.choices,
        parser=parser,
        call_mode=mode,
        parallel=request.parallel_tool_calls is not False,
        with_logprobs=bool(request.logprobs),
        end_tokens=model.end_tokens,
        counts_usage=request.include_usage,
    )
    requests = tuple(_numbered(first, k) for k in range(request.choices))
    return Job(requests, assembly, len(prompt.ids), bool(request.stream), request.include_usage)


def completion_job(request: CompletionRequest, model: Served, deadline: float) -> Job:
    """A plain completion: each prompt as it is, control tokens in it included."""
    prompts = [_prompt_ids(prompt, model) for prompt in request.prompts]
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


def chat_prompt_ids(messages: Sequence[Json], tools: list[Json] | None, fmt: ChatFormat) -> list[int]:
    """The tokens that a chat's prompt has; raises APIError where the messages cannot be rendered."""
    try:
        return fmt.prompt_within(_messages(messages), plain_tools(tools) if tools else None).ids
    except FormatError as error:
        raise _bad_messages(error) from None


def _offers_tools(request: ChatRequest) -> bool:
    """With tool_choice none the model is not shown the tools: what it cannot see it does not call."""
    return bool(request.tools) and request.tool_choice != "none"


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
    plain = {key: value for key, value in message.items() if key not in ("cache_control", "reasoning")}
    if plain["role"] == "developer":
        plain["role"] = "system"
    if isinstance(plain.get("content"), list):
        plain["content"] = [_without_hint(part) for part in plain["content"]]
    if message.get("reasoning") is not None:
        plain["reasoning_content"] = message["reasoning"]
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


def _prompt_ids(prompt: str | list[int], model: Served) -> tuple[int, ...]:
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


def _chat_grammar(request: ChatRequest, tools: list[Json] | None) -> tuple[Grammar | None, CallMode]:
    forced = request.tool_choice == "required" or isinstance(request.tool_choice, NamedChoice)
    schemas = []
    for k, tool in enumerate(tools or ()):
        param, function = f"tools[{k}].function.parameters", tool["function"]
        schemas.append((param, function.get("parameters") or {}, bool(function.get("strict"))))
        if forced and not function.get("strict"):
            schemas.append((param, held(function.get("parameters") or {}), True))
    check_schemas(schemas)
    form = _format_grammar(request)
    if form is not None:
        if tools is not None:
            raise APIError(
                400,
                "Unsupported parameter: 'response_format' is not supported together with 'tools' here.",
                param="response_format",
                code="unsupported_parameter",
            )
        return form, "none"
    if tools is None:
        return None, "free"
    try:
        return _tool_grammar(request, tools)
    except ToolError as error:
        raise bad_value("tools", f"Invalid 'tools': {error}.") from None


def _tool_grammar(request: ChatRequest, tools: list[Json]) -> tuple[Grammar | None, CallMode]:
    choice = request.tool_choice
    if isinstance(choice, NamedChoice):
        tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
    if isinstance(choice, NamedChoice) or choice == "required":
        tools = [_held(tool) for tool in tools]
    if isinstance(choice, NamedChoice):
        return Grammar.tool_call(tools, name=choice.function.name), "named"
    if choice == "required":
        return Grammar.tool_call(tools, parallel=request.parallel_tool_calls is not False), "free"
    if any(tool["function"].get("strict") for tool in tools):
        return Grammar.tools_in_text([_loosened(tool) for tool in tools]), "strict"
    return None, "free"


def _held(tool: Json) -> Json:
    """A tool that must be called: where it is not strict, under what of its schema a grammar can hold."""
    function = tool["function"]
    if function.get("strict") or not function.get("parameters"):
        return tool
    return {**tool, "function": {**function, "parameters": held(function["parameters"])}}


def _loosened(tool: Json) -> Json:
    """A tool that is not strict may be called with any object."""
    function = tool["function"]
    return tool if function.get("strict") else {"type": "function", "function": {"name": function["name"]}}


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
