"""A request that is turned down: one exception, told the way OpenAI tells it.

In: what was wrong (a status and a sentence, or pydantic's list of errors).
Out: `APIError`, whose `body()` is `{"error": {"message", "type", "param", "code"}}`.
Wording and codes follow the answers of api.openai.com, which clients match on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import JSONResponse

from qwen_chat.conversation import Json

# Characters of a client's own value that an error repeats.
LONGEST_ECHO = 80


class APIError(Exception):
    """An answer other than 200. `retry_after`: whole seconds for the Retry-After header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def type(self) -> str:
        """OpenAI's error type for the status."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    @property
    def name(self) -> str:
        """What the log calls it: the code, or where it has none the type."""
        return self.code or self.type

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, self.headers())

    def body(self) -> Json:
        """The JSON body."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """The headers that belong to the status."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        # Where the body was not read the server says so itself.
        if self.status == 431:
            headers["Connection"] = "close"
        return headers


def bad_value(param: str | None, message: str, code: str | None = "invalid_value") -> APIError:
    """400: a parameter whose value cannot be."""
    return APIError(400, message, param=param, code=code)


def not_json(reason: str) -> APIError:
    """400: a body that is no JSON. `reason` may hold a position, never the body itself."""
    return APIError(400, f"We could not parse the JSON body of your request: {reason}.", code="invalid_json")


def shutting_down() -> APIError:
    """503: what runs is cut off, for the service ends."""
    return APIError(503, "The service is shutting down.", code="shutting_down", retry_after=10)


def engine_unavailable() -> APIError:
    """503: the engine does not run; it is started again after a failure."""
    return APIError(503, "The engine is not running; try again.", code="engine_unavailable", retry_after=1)


def unknown_model(name: str, known: Sequence[str], *, param: str = "model") -> APIError:
    """404: neither the model nor one of the adapters, which are `known`."""
    names = ", ".join(f"`{echo(one)}`" for one in known[:8]) or "none"
    more = f" and {len(known) - 8} more (GET /v1/models)" if len(known) > 8 else ""
    text = f"The model `{echo(name)}` does not exist; there are {names}{more}."
    return APIError(404, text, param=param, code="model_not_found")


def too_long(
    limit: int, prompt: int, completion: int | None, *, param: str = "messages", at_least: bool = False
) -> APIError:
    """400: more tokens than the model can see. All numbers are tokens; `param` holds the prompt, which was not
    counted to its end where it has `at_least` so many."""
    if completion is None:
        found = f"your {param} resulted in {'at least ' if at_least else ''}{prompt} tokens"
    else:
        both = prompt + completion
        found = f"you requested {both} tokens ({prompt} in the {param}, {completion} in the completion)"
    text = (
        f"This model's maximum context length is {limit} tokens. However, {found}. Please reduce the length "
        f"of the {param} or of the completion."
    )
    return bad_value(param if completion is None else "max_tokens", text, "context_length_exceeded")


def echo(value: object) -> str:
    """A client's value, short and on one line, fit to be repeated in an answer."""
    text = "".join(c if c.isprintable() else " " for c in str(value)[: LONGEST_ECHO + 1])
    return text if len(text) <= LONGEST_ECHO else f"{text[:LONGEST_ECHO]}..."


def param_name(location: Sequence[int | str], body: object, *, absent: bool = False) -> str | None:
    """`("messages", 0, "user", "content")` -> `messages[0].content`.

    pydantic puts the branch of a union into a location; what `body` does not hold is such a branch and is
    left out, except for the last part where the error is that it is `absent`.
    """
    name, here = "", body
    for k, part in enumerate(location):
        if isinstance(part, int):
            name += f"[{part}]"
            here = here[part] if isinstance(here, list) and part < len(here) else None
        elif isinstance(here, Mapping) and (part in here or (absent and k == len(location) - 1)):
            name += f".{echo(part)}" if name else echo(part)
            here = here.get(part)
    return name or None


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "a boolean"),
    (int, "an integer"),
    (float, "a decimal"),
    (str, "a string"),
    (Mapping, "an object"),
    ((list, tuple), "an array"),
    (type(None), "null"),
)

# pydantic's name of a wrong type -> what was expected.
_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a decimal",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
}

# pydantic's name of a bound -> (which side, the sign, the key of the bound in its context).
_BOUNDS = {
    "greater_than_equal": ("below minimum", ">=", "ge", "below_min_value"),
    "greater_than": ("below minimum", ">", "gt", "below_min_value"),
    "less_than_equal": ("above maximum", "<=", "le", "above_max_value"),
    "less_than": ("above maximum", "<", "lt", "above_max_value"),
}
_LENGTHS = ("too_short", "too_long", "string_too_short", "string_too_long")


def kind(value: object) -> str:
    """What a JSON value is, with its article."""
    return next((name for types, name in _KINDS if isinstance(value, types)), "something else")


def _out_of_bounds(name: str | None, detail: ErrorDetails) -> APIError:
    """A number, a text or an array that is too small or too large."""
    problem, found, context = detail["type"], detail["input"], detail["ctx"]
    if problem == "too_short":
        least = context["min_length"]
        text = f"Invalid '{name}': empty array. Expected an array with minimum length {least}."
        return bad_value(name, text, "empty_array")
    if problem == "string_too_short":
        least = context["min_length"]
        text = f"Invalid '{name}': empty string. Expected a string with minimum length {least}."
        return bad_value(name, text, "empty_string")
    if problem == "too_long":
        count, most = context.get("actual_length"), context["max_length"]
        got = "" if count is None else f", but got an array with length {count} instead"
        text = f"Invalid '{name}': array too long. Expected an array with maximum length {most}{got}."
        return bad_value(name, text, "array_above_max_length")
    if problem == "string_too_long":
        length = len(found) if isinstance(found, str) else 0
        text = (
            f"Invalid '{name}': string too long. Expected a string with maximum length {context['max_length']}, "
            f"but got a string with length {length} instead."
        )
        return bad_value(name, text, "string_above_max_length")
    side, sign, key, code = _BOUNDS[problem]
    noun = "integer" if isinstance(found, int) and isinstance(context[key], int) else "decimal"
    text = (
        f"Invalid '{name}': {noun} {side} value. "
        f"Expected a value {sign} {context[key]}, but got {echo(found)} instead."
    )
    return bad_value(name, text, f"{noun}_{code}")


def from_validation(error: ValidationError, body: object) -> APIError:
    """400: the first thing wrong with `body`, by the name that the client gave it.

    Errors of our own validators carry OpenAI's code as their type; those of no kind here cannot be.
    """
    detail = error.errors(include_url=False, include_context=True)[0]
    problem, found, context = detail["type"], detail["input"], detail.get("ctx", {})
    name = param_name(detail["loc"], body, absent=problem == "missing")
    if problem in _BOUNDS or problem in _LENGTHS:
        return _out_of_bounds(name, detail)
    shown = f"'{name}'" if name else "the request body"
    if problem == "literal_error":
        text = f"Invalid value: '{echo(found)}'. Supported values are: {context['expected']}."
        return bad_value(name, text)
    if problem == "union_tag_invalid":
        field = context["discriminator"].strip("'")
        text = f"Invalid value: '{echo(context['tag'])}'. Supported values are: {context['expected_tags']}."
        return bad_value(f"{name}.{field}" if name else field, text)
    if problem == "missing":
        text = f"Missing required parameter: {shown}."
        return bad_value(name, text, "missing_required_parameter")
    if problem == "union_tag_not_found":
        missing = f"{name}.{context['discriminator'].strip(chr(39))}" if name else None
        text = f"Missing required parameter: '{missing}'."
        return bad_value(missing, text, "missing_required_parameter")
    if problem == "extra_forbidden":
        return bad_value(name, f"Unknown parameter: {shown}.", "unknown_parameter")
    if problem in _EXPECTED:
        text = f"Invalid type for {shown}: expected {_EXPECTED[problem]}, but got {kind(found)} instead."
        return bad_value(name, text, "invalid_type")
    if problem == "string_pattern_mismatch":
        pattern = context["pattern"]
        text = f"Invalid {shown}: string does not match pattern. Expected a string that matches '{pattern}'."
        return bad_value(name, text)
    if problem in ("unsupported_parameter", "unsupported_value", "invalid_value"):
        # A check of several parameters names the one to change.
        return bad_value(context.get("param", name), detail["msg"].replace("{param}", shown), problem)
    return bad_value(name, f"Invalid value for {shown}: {detail['msg']}.")
