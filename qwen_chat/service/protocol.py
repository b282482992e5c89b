"""The service's language: OpenAI's requests, answers and chunks as strict types.

In: JSON bodies. Out: frozen request values whose limits are OpenAI's, and answers that serialise as theirs.
A parameter that is not named here is refused by name. What changes no answer is taken (`HINTS`), and the answer's
header `x-ignored` names it; what would change the answer and cannot be honoured is refused.
Source of names and limits: OpenAI's API reference (chat, completions, models) and, for `top_k`, `min_p`,
`repetition_penalty`, `/tokenize` and adapters, the names that vLLM's server made common.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qwen_chat.conversation import Json

# The largest `n`; each choice takes a place in the batch.
MOST_CHOICES = 16
MOST_MESSAGES = 4096
MOST_CONTENT_PARTS = 4096
# OpenAI's limits.
MOST_TOOLS = 128
MOST_STOPS = 4
MOST_BIASES = 1024
MOST_TOKENS = 2**31 - 1
MOST_PROMPT_TOKENS = 2**20
MOST_PROMPTS = 64
# Values of a chat template's variables.
MOST_VARIABLES = 16


# What clients send that changes no answer here: its place in a request -> what it would have been for.
HINTS: dict[str, str] = {
    "metadata": "the caller's own notes",
    "prediction": "a likely answer, to save time",
    "prompt_cache_key": "which requests begin alike; the prefix cache finds that out by itself",
    "prompt_cache_retention": "how long a prefix is kept",
    "safety_identifier": "who asks, for OpenAI's abuse reports; `user` goes into the log",
    "service_tier": "another price or speed",
    "store": "keeping the answer with OpenAI",
    "verbosity": "how long OpenAI's own models answer; say it in the prompt, or set `max_tokens`",
    "messages.cache_control": "Anthropic's marks of what to cache, on a message",
    "messages.content.cache_control": "the same, on a part of a message's content",
    "messages.name": "a participant's name, which the chat formats have no place for",
    "tools.cache_control": "the same, on a tool",
}
# Values of them that ask for nothing.
_USUAL: dict[str, tuple[object, ...]] = {"store": (False,), "service_tier": ("auto", "default")}


class Request(BaseModel):
    """A request body: types are not converted, unknown names are refused, numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Answer(BaseModel):
    """A part of an answer. What is not set is not sent."""

    model_config = ConfigDict(frozen=True)

    def json_text(self) -> str:
        """OpenAI's JSON: set fields alone, nulls kept where they were set."""
        return self.model_dump_json(exclude_unset=True)


def _unless_null(value: object) -> object:
    if value is not None:
        raise PydanticCustomError(
            "unsupported_parameter", "Unsupported parameter: {param} is not supported here."
        )
    return value


def _only(*allowed: object) -> BeforeValidator:
    def check(value: object) -> object:
        if value is None or any(
            value is one or (type(value) is type(one) and value == one) for one in allowed
        ):
            return value
        raise PydanticCustomError(
            "unsupported_value",  # type: ignore[arg-type]
            "Unsupported value: {param} does not support this value here; leave it out.",
        )

    return BeforeValidator(check)


# OpenAI parameters that this service does not have: null is what leaving them out means, all else is refused.
Unsupported = Annotated[None, BeforeValidator(_unless_null)]

Temperature = Annotated[float, Field(ge=0, le=2)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Count = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MOST_PROMPT_TOKENS, fail_fast=True)]
BiasKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]
ModelName = Annotated[str, Field(min_length=1, max_length=512)]
User = Annotated[str, Field(max_length=512)]
# OpenAI's limits of metadata.
HintKey = Annotated[str, Field(max_length=64)]
HintText = Annotated[str, Field(max_length=512)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,64}$")]
SchemaName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
AdapterName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


def _text_or_list(value: object) -> str:
    return "list" if isinstance(value, list) else "text"


def _prompt_kind(value: object) -> str:
    """The four shapes of a prompt: text, tokens, several texts, several lists of tokens."""
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else None
    if isinstance(first, list):
        return "token_lists"
    return "tokens" if isinstance(first, int) and not isinstance(first, bool) else "texts"


def _word_or_object(value: object) -> str:
    return "object" if isinstance(value, dict) else "word"


# --- messages -------------------------------------------------------------------------------------


class CacheControl(Request):
    """Anthropic's mark of what to cache."""

    type: Annotated[str, Field(max_length=64)]
    ttl: Annotated[str, Field(max_length=64)] | None = None


class TextPart(Request):
    """A piece of a message's content. Images and sound are not understood by these models."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


Content = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[
        list[TextPart], Field(min_length=1, max_length=MOST_CONTENT_PARTS, fail_fast=True), Tag("list")
    ],
    Discriminator(_text_or_list),
]


class CalledFunction(Request):
    """A tool's name and its arguments, as the text of a JSON object."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class CallParam(Request):
    """A call that the assistant made earlier in the conversation."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"]
    function: CalledFunction
    # Left over where a client folds a stream by hand.
    index: int | None = None


class SystemMessage(Request):
    """Instructions; `developer` is OpenAI's newer word for the same."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None
    cache_control: CacheControl | None = None


class UserMessage(Request):
    """What the user says. The families' formats do not render names."""

    role: Literal["user"]
    content: Content
    name: str | None = None
    cache_control: CacheControl | None = None


class AssistantMessage(Request):
    """What the model said earlier: text, calls or both, and its thinking where the format keeps it."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    # Another name of it.
    reasoning: str | None = None
    tool_calls: Annotated[list[CallParam], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    name: str | None = None
    cache_control: CacheControl | None = None
    refusal: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    annotations: Annotated[list[Any] | None, _only([])] = None

    @model_validator(mode="after")
    def _one_thought(self) -> Self:
        if None not in (self.reasoning, self.reasoning_content) and self.reasoning != self.reasoning_content:
            raise PydanticCustomError(
                "invalid_value", "Invalid value for {param}: 'reasoning' and 'reasoning_content' differ."
            )
        return self


class ToolMessage(Request):
    """The result of the call with the id `tool_call_id`."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)]
    name: str | None = None
    cache_control: CacheControl | None = None


MessageParam = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]
MessageParams = Annotated[list[MessageParam], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]


# --- tools and formats ----------------------------------------------------------------------------


class FunctionParam(Request):
    """A function that the model may call; `parameters` is a JSON Schema of an object."""

    name: FunctionName
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class ToolParam(Request):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionParam
    cache_control: CacheControl | None = None


class ChosenFunction(Request):
    """The name of the function that must be called."""

    name: Annotated[str, Field(min_length=1, max_length=256)]


class NamedChoice(Request):
    """Call this function."""

    type: Literal["function"]
    function: ChosenFunction


ToolChoiceParam = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")] | Annotated[NamedChoice, Tag("object")],
    Discriminator(_word_or_object),
]
ToolParams = Annotated[list[ToolParam], Field(max_length=MOST_TOOLS, fail_fast=True)]


class TextFormat(Request):
    """Answer in free text."""

    type: Literal["text"]


class JsonObjectFormat(Request):
    """Answer with some JSON object."""

    type: Literal["json_object"]


class JsonSchema(Request):
    """A schema with a name; the answer follows it whether `strict` is set or not."""

    name: SchemaName
    description: str | None = None
    schema_: Annotated[Json, Field(alias="schema")]
    strict: bool | None = None


class JsonSchemaFormat(Request):
    """Answer with JSON that the schema allows."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
Stop = Annotated[
    Annotated[StopString, Tag("text")]
    | Annotated[list[StopString], Field(max_length=MOST_STOPS), Tag("list")],
    Discriminator(_text_or_list),
]


class Prediction(Request):
    """Text that the answer is likely to repeat."""

    type: Literal["content"]
    content: Content


class StreamOptions(Request):
    """`include_usage`: one more chunk, without choices, that counts the tokens."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, _only(False)] = None


# --- requests -------------------------------------------------------------------------------------


class SamplingRequest(Request):
    """What chat and plain completions share."""

    model: ModelName
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    # No limit: 0 and -1.
    top_k: Annotated[int, Field(ge=-1, le=MOST_TOKENS)] | None = None
    min_p: Share | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=2)] | None = None
    logit_bias: Annotated[dict[BiasKey, Bias], Field(max_length=MOST_BIASES)] | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: User | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _not_alone("stream_options", "'stream' is enabled")
        return self

    @property
    def choices(self) -> int:
        """How many answers are asked for."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk that counts the tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class RenderedRequest(Request):
    """What a conversation is rendered in, beside its messages. Which names and words there are, the model's chat
    template says."""

    chat_template_kwargs: Annotated[Json, Field(max_length=MOST_VARIABLES)] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Annotated[str, Field(min_length=1, max_length=32)] | None = None


class ChatRequest(SamplingRequest, RenderedRequest):
    """POST /v1/chat/completions."""

    messages: MessageParams
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: ToolParams | None = None
    tool_choice: ToolChoiceParam | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[HintKey, HintText], Field(max_length=16)] | None = None
    prediction: Prediction | None = None
    prompt_cache_key: HintText | None = None
    prompt_cache_retention: HintText | None = None
    safety_identifier: HintText | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    store: bool | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    modalities: Annotated[list[str] | None, _only(["text"])] = None
    audio: Unsupported = None
    function_call: Unsupported = None
    functions: Unsupported = None
    web_search_options: Unsupported = None

    @model_validator(mode="after")
    def _parameters_agree(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError(
                "invalid_value",
                "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
                {"param": "max_tokens"},
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise _not_alone("top_logprobs", "'logprobs' is enabled")
        # Beside an empty list.
        harmless = (None, "none") if self.tools is None else (None, "none", "auto")
        if not self.tools and self.tool_choice not in harmless:
            raise _not_alone("tool_choice", "'tools' are specified")
        if self.tools is None and self.parallel_tool_calls is not None:
            raise _not_alone("parallel_tool_calls", "'tools' are specified")
        return self

    @model_validator(mode="after")
    def _tools_are_told_apart(self) -> Self:
        names = [tool.function.name for tool in self.tools or ()]
        for k, name in enumerate(names):
            if name in names[:k]:
                message = f"Invalid value for 'tools': two functions are named '{name}'; names must differ."
                raise _invalid(f"tools[{k}].function.name", message)
        if isinstance(self.tool_choice, NamedChoice) and self.tool_choice.function.name not in names:
            raise _invalid(
                "tool_choice",
                "Invalid value for 'tool_choice': the function that it names is not among 'tools'.",
            )
        return self

    @model_validator(mode="after")
    def _results_answer_calls(self) -> Self:
        waiting: set[str] = set()
        for k, message in enumerate(self.messages):
            if isinstance(message, ToolMessage):
                if message.tool_call_id not in waiting:
                    raise _invalid(
                        f"messages[{k}].tool_call_id",
                        f"Invalid parameter: 'messages[{k}]' with role 'tool' must be a response to a "
                        "preceding message with 'tool_calls' that has this 'tool_call_id'.",
                    )
                waiting.discard(message.tool_call_id)
                continue
            if waiting:
                raise _unanswered(k, waiting)
            if isinstance(message, AssistantMessage):
                waiting = {call.id for call in message.tool_calls or ()}
        if waiting:
            raise _unanswered(len(self.messages), waiting)
        return self

    @property
    def ignored(self) -> tuple[str, ...]:
        """The HINTS that this request has, in order; those that ask for nothing are left out."""
        found = {
            name
            for name in HINTS
            if "." not in name
            and (value := getattr(self, name)) is not None
            and value not in _USUAL.get(name, ())
        }
        for message in self.messages:
            if message.cache_control is not None:
                found.add("messages.cache_control")
            if message.name is not None:
                found.add("messages.name")
            if isinstance(message.content, list) and any(part.cache_control for part in message.content):
                found.add("messages.content.cache_control")
        if any(tool.cache_control for tool in self.tools or ()):
            found.add("tools.cache_control")
        return tuple(name for name in HINTS if name in found)

    @property
    def token_limit(self) -> int | None:
        """The most tokens that the answer may have, thinking included."""
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """None: no log probabilities; else how many alternatives come with each token."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingRequest):
    """POST /v1/completions: a prompt as it is, no chat format."""

    prompt: Annotated[
        Annotated[str, Field(min_length=1), Tag("text")]
        | Annotated[TokenIds, Tag("tokens")]
        | Annotated[
            list[Annotated[str, Field(min_length=1)]],
            Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True),
            Tag("texts"),
        ]
        | Annotated[
            list[TokenIds],
            Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True),
            Tag("token_lists"),
        ],
        Discriminator(_prompt_kind),
    ]
    # OpenAI's default.
    max_tokens: Count | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Annotated[bool | None, _only(False)] = None
    best_of: Annotated[int | None, _only(1)] = None
    suffix: Unsupported = None

    @property
    def prompts(self) -> tuple[str | list[int], ...]:
        """Each prompt, as text or as tokens."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if isinstance(self.prompt[0], int):
            return (self.prompt,)  # type: ignore[return-value]
        return tuple(self.prompt)  # type: ignore[arg-type]

    @property
    def token_limit(self) -> int | None:
        """The most tokens that the answer may have."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """None: no log probabilities; else how many alternatives come with each token."""
        return self.logprobs


class TokenizeRequest(RenderedRequest):
    """POST /tokenize: a text, or a conversation in the model's format."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: MessageParams | None = None
    tools: ToolParams | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise _invalid("prompt", "Give exactly one of 'prompt' and 'messages'.")
        if self.tools is not None and self.messages is None:
            raise _not_alone("tools", "'messages' are specified")
        for name in RenderedRequest.model_fields:
            if getattr(self, name) is not None and self.messages is None:
                raise _not_alone(name, "'messages' are specified")
        return self


class DetokenizeRequest(Request):
    """POST /detokenize."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MOST_PROMPT_TOKENS, fail_fast=True)]


class LoadAdapterRequest(Request):
    """POST /v1/load_lora_adapter."""

    lora_name: AdapterName
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadAdapterRequest(Request):
    """POST /v1/unload_lora_adapter."""

    lora_name: AdapterName


def _invalid(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_value", "{message}", {"param": param, "message": message})


def _not_alone(param: str, condition: str) -> PydanticCustomError:
    return _invalid(param, f"Invalid value for '{param}': '{param}' is only allowed when {condition}.")


def _unanswered(position: int, waiting: set[str]) -> PydanticCustomError:
    return _invalid(
        f"messages[{position}]" if position else "messages",
        "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
        f"'tool_call_id'; {len(waiting)} had no response.",
    )


# --- answers --------------------------------------------------------------------------------------

WireFinish = Literal["stop", "length", "tool_calls"]


class TopLogprob(Answer):
    """One alternative at a position. `bytes`: the token's UTF-8, which may be part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class WireLogprob(TopLogprob, title="TokenLogprob"):
    """The token that was taken, and the likeliest ones."""

    top_logprobs: list[TopLogprob]


class Logprobs(Answer):
    """Log probabilities of the tokens of a choice or chunk."""

    content: list[WireLogprob] | None
    refusal: list[WireLogprob] | None = None


class Function(Answer):
    """In an answer both are there; in a chunk the name comes once and the arguments in pieces."""

    name: str | None = None
    arguments: str | None = None


class Call(Answer):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: Function


class CallDelta(Answer):
    """A piece of a call: id, type and name in the first, then pieces of the arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: Function


class ReplyMessage(Answer):
    """The model's message. `content` is null where there are only calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None


class ChunkDelta(Answer):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChoice(Answer, title="Choice"):
    """One whole answer."""

    index: int
    message: ReplyMessage
    logprobs: Logprobs | None
    finish_reason: WireFinish


class ChunkChoice(Answer):
    """One piece of one answer."""

    index: int
    delta: ChunkDelta
    logprobs: Logprobs | None
    finish_reason: WireFinish | None


class PromptDetails(Answer):
    """`cached_tokens`: the prompt's tokens that were not computed again."""

    cached_tokens: int


class Usage(Answer):
    """Tokens, counted by the model's tokenizer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


class ChatCompletion(Answer):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None


class ChatChunk(Answer):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


class CompletionLogprobs(Answer):
    """The older shape: parallel lists. `text_offset`: characters from the start of the completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(Answer):
    """One completion, or a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: WireFinish | None


class TextCompletion(Answer, title="Completion"):
    """The answer of /v1/completions, and each event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


class ModelCard(Answer):
    """A model or adapter. `parent`: an adapter's base. `max_model_len`: tokens, prompt and answer."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None = None
    max_model_len: int


class ModelList(Answer):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(Answer):
    """The answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Answer):
    """The answer of /detokenize."""

    prompt: str


class Health(Answer):
    """The answer of /health and /ready."""

    status: Literal["ok"]


class AdapterChange(Answer):
    """The answer of the adapter endpoints."""

    lora_name: str
    status: Literal["loaded", "unloaded"]


class Error(Answer):
    """What went wrong, in OpenAI's shape."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """The body of every answer whose status is 400 or more."""

    error: Error
