"""From a valid request to what the engine is asked: prompt, limits, grammar, and the answer's shape.

In: protocol requests, and the model's format. Out: `Job`. Everything here is pure computation; it runs on a
worker thread, for a long prompt takes a while to tokenise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from qwen_chat.chatml import ChatFormat
from qwen_chat.chunks import Assembly, CallMode, ChatAssembly, TextAssembly
from qwen_chat.control_tokens import TooManyTokens
from qwen_chat.errors import FormatError, ToolError
from qwen_chat.grammar import Grammar
from qwen_chat.protocol import (
    ChatRequest,
    CompletionRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedChoice,
    SamplingRequest,
    TextFormat,
)
from qwen_chat.refusal import Refusal, bad_value, too_long
from qwen_chat.sampling import GenerationRequest
from qwen_chat.tool_calls import Marks, StreamParser

Json = dict[str, Any]

SCHEMA_DEPTH = 24  # nesting of a JSON Schema
SCHEMA_NODES = 4000  # objects, lists and values in one
PATTERN_LENGTH = 500  # characters of a regular expression in one
LARGEST_REPEAT = 2000  # of minItems, maxLength and the like: a grammar unrolls them
_REPEATS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")


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
    tools = cast(list[Json], body["tools"]) if _offers_tools(request) else None
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
    """The tokens that a chat's prompt has; raises Refusal where the messages cannot be rendered."""
    try:
        return list(fmt.prompt_ids(_messages(messages), tools))
    except FormatError as error:
        raise _bad_messages(error) from None


def _offers_tools(request: ChatRequest) -> bool:
    """With tool_choice none the model is not shown the tools: what it cannot see it does not call."""
    return request.tools is not None and request.tool_choice != "none"


def _messages(messages: Sequence[Json]) -> list[Json]:
    """The messages as the template reads them: `developer` is `system`, results in the calls' order."""
    plain = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
    order: dict[str, int] = {}
    rank: list[tuple[int, int]] = []  # the turn that a message belongs to, then its place in it
    turn = 0
    for message in plain:
        if message["role"] != "tool":
            turn += 1
            order = {call["id"]: k for k, call in enumerate(message.get("tool_calls") or (), start=1)}
        rank.append((turn, order.get(message.get("tool_call_id", ""), 0) if message["role"] == "tool" else 0))
    return [plain[k] for k in sorted(range(len(plain)), key=rank.__getitem__)]


def _bad_messages(error: FormatError) -> Refusal:
    found = re.match(r"message (\d+)", str(error))
    return bad_value(f"messages[{found[1]}]" if found else "messages", f"Invalid 'messages': {error}.")


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
    for k, tool in enumerate(tools or ()):
        function = tool["function"]
        bound = forced or bool(function.get("strict"))
        _check_schema(function.get("parameters") or {}, f"tools[{k}].function.parameters", bound=bound)
    form = _format_grammar(request)
    if form is not None:
        if tools is not None:
            raise Refusal(
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
        return Grammar.tool_call(tools, name=choice.function.name), "named"
    if choice == "required":
        return Grammar.tool_call(tools, parallel=request.parallel_tool_calls is not False), "free"
    if any(tool["function"].get("strict") for tool in tools):
        return Grammar.tools_in_text([_loosened(tool) for tool in tools]), "strict"
    return None, "free"


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
    _check_schema(form.json_schema.schema_, "response_format.json_schema.schema")
    try:
        return Grammar.json_schema(form.json_schema.schema_)
    except ToolError as error:
        raise bad_value("response_format", f"Invalid schema for 'response_format': {error}.") from None


def _check_schema(schema: Json, param: str, *, bound: bool = True) -> None:
    """Refuse schemas that are none, and (where decoding is `bound` to them) those whose grammar would grow
    beyond reason."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    _check_size(schema, param, bound)
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        place = "/".join(str(part) for part in error.absolute_path)
        raise bad_value(
            param, f"Invalid schema for '{param}': {error.message[:200]} (at '{place}')."
        ) from None


def _check_size(schema: Json, param: str, bound: bool) -> None:
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    nodes = 0
    while waiting:
        value, depth = waiting.pop()
        nodes += 1
        if depth > SCHEMA_DEPTH or nodes > SCHEMA_NODES:
            size = (
                f"nested more than {SCHEMA_DEPTH} deep"
                if depth > SCHEMA_DEPTH
                else f"of {SCHEMA_NODES} parts"
            )
            raise bad_value(
                param, f"Invalid schema for '{param}': a schema {size} is too large.", "schema_too_large"
            )
        if isinstance(value, dict):
            if bound:
                _check_keywords(value, param)
            waiting += [(child, depth + 1) for child in value.values()]
        elif isinstance(value, list):
            waiting += [(child, depth + 1) for child in value]


def _check_keywords(node: Json, param: str) -> None:
    pattern = node.get("pattern")
    if isinstance(pattern, str):
        repeats = [int(number) for number in re.findall(r"\d+", " ".join(re.findall(r"\{[\d,]+\}", pattern)))]
        if len(pattern) > PATTERN_LENGTH or _product(repeats) > LARGEST_REPEAT:
            text = f"Invalid schema for '{param}': its regular expression is too large."
            raise bad_value(param, text, "schema_too_large")
    for key in _REPEATS:
        value = node.get(key)
        if isinstance(value, int | float) and value > LARGEST_REPEAT:
            text = f"Invalid schema for '{param}': '{key}' is {value}; at most {LARGEST_REPEAT}."
            raise bad_value(param, text, "schema_too_large")


def _product(numbers: Sequence[int]) -> int:
    product = 1
    for number in numbers:
        product *= max(number, 1)
        if product > LARGEST_REPEAT:
            break
    return product
