"""XML: a call as `<function=...>` with its arguments as `<parameter=...>` tags around bare text (Qwen3-Coder, Qwen3.5
and later).

Every byte of it stands here. The templates that speak it describe the tools themselves. A value is text between two
newlines of the form, and its type is in the tool's schema alone (see bare_values). There are no escapes, so a value
that holds a tag which ends one cannot be written: data with one is refused, and no grammar writes one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from qwen_chat.conversation import Conversation, ToolCall
from qwen_chat.dialects.bare_values import WORDS, Parameters, json_of, without
from qwen_chat.dialects.dialect import Carried, Tools, chosen, function_of, loosened, openai_messages
from qwen_chat.dialects.grammar import Grammar
from qwen_chat.dialects.hermes import CLOSE, OPEN
from qwen_chat.dialects.loose_json import BROKEN, DONE, READING
from qwen_chat.dialects.shapes import MORE, SPACE, Form, Left, Marks, Offer, letters
from qwen_chat.errors import FormatError, ToolError

OPEN_FUNCTION, CLOSE_FUNCTION = "<function=", "</function>"
OPEN_PARAMETER, CLOSE_PARAMETER = "<parameter=", "</parameter>"
# Inside a value one of these ends it, or shows that its end is missing.
TAGS = (CLOSE_PARAMETER, CLOSE_FUNCTION, CLOSE, OPEN_PARAMETER)
_BEGINNINGS = frozenset(tag[:end] for tag in TAGS for end in range(1, len(tag)))

# A name, as it stands in its tag.
_NAME_ATOMS = (r"[^<>\s]", r"[^<>\n]{0,127}")
_WRITABLE = re.compile("".join(_NAME_ATOMS))
_IN_KEY = re.compile(r"[^>\n]*")
_BETWEEN_TAGS = re.compile(r"[ \t\r\n]*")
_BEFORE_TAG = re.compile(r"[^<]*")
# What the root of a tool's schema may not say where calls are forced: no order of parameters holds it.
_NOT_FORCED = (
    *("anyOf", "oneOf", "allOf", "not", "if", "enum", "const", "patternProperties", "propertyNames"),
    *("minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "dependencies"),
)
# Every text that can stand as a value, and what follows it.
_UNTAGGED_TEXT = without(TAGS)
_END_VALUE = json.dumps(f"\n{CLOSE_PARAMETER}\n")
_COMMON_RULES = (
    f"KEY: /[^>\\n]*>\\n/\nEND: {_END_VALUE}\nVALUE: PLAIN END\nPLAIN: /"
    + _UNTAGGED_TEXT.replace("/", r"\/")
    + "/\n"
)


class XmlScanner:
    """Reads the parameters after `<function=NAME>`, to `</function>`.

    Broken by a parameter that comes twice (of two values one would be lost), by text between parameters, and by a tag
    in a value that shows that its end is missing. Where a grammar `forced` the call a parameter may come twice.
    """

    def __init__(self, name: str, parameters: Parameters, *, forced: bool) -> None:
        self.status = READING
        self.read = 0
        self.name = name
        self._parameters, self._forced = parameters, forced
        self._step: Callable[[XmlScanner, str, int], int] = XmlScanner._between
        self._parts = ["{"]  # the arguments' JSON so far
        self._told = 0  # how many of them `more` gave out
        self._tag = ""  # the beginning of a tag
        self._key: list[str] = []
        self._seen: set[str] = set()
        self._in_value = False
        self._is_text = True  # else the value is read when it is whole
        self._raw: list[str] = []  # such a value so far
        self._is_fresh = False  # nothing of the value was read: a newline is the form's
        self._newline = ""  # the last one so far: the form's, if the value ends here

    @property
    def arguments(self) -> str:
        return "".join(self._parts)

    @property
    def begun(self) -> bool:
        return True

    def more(self, *, ended: bool) -> str:
        """The arguments since it was last asked; where the text has `ended` in the middle, what was held back too."""
        grown = "".join(self._parts[self._told :])
        self._told = len(self._parts)
        if not ended or self.status != READING:
            return grown
        if self._step == XmlScanner._read_key:
            return grown + self._next_key()
        if not self._in_value:
            return grown
        held = self._newline + self._tag
        return grown + (_escaped(held) if self._is_text else "".join(self._raw) + held)

    def scan(self, text: str, at: int = 0) -> int:
        start, end = at, len(text)
        while at < end and self.status == READING:
            at = self._step(self, text, at)
        self.read += at - start
        return at

    # Each step reads at least one character, or changes the step, and returns where it stopped.

    def _between(self, text: str, at: int) -> int:
        at = _BETWEEN_TAGS.match(text, at).end()  # type: ignore[union-attr]
        if at < len(text):
            self._step = XmlScanner._read_tag
        return at

    def _read_tag(self, text: str, at: int) -> int:
        tag = self._tag + text[at]
        if tag in _BEGINNINGS:
            self._tag = tag
            return at + 1
        if tag in TAGS:
            self._tag = ""
            self._end_tag(tag)
            return at + 1
        if not self._in_value:
            self.status = BROKEN
            return at
        self._grow(self._tag)
        self._tag = ""
        self._step = XmlScanner._value
        return at

    def _end_tag(self, tag: str) -> None:
        if self._in_value and tag == CLOSE_PARAMETER:
            self._end_value()
            self._step = XmlScanner._between
        elif not self._in_value and tag == OPEN_PARAMETER:
            self._key = []
            self._step = XmlScanner._read_key
        elif not self._in_value and tag == CLOSE_FUNCTION:
            self._parts.append("}")
            self.status = DONE
        else:
            self.status = BROKEN

    def _read_key(self, text: str, at: int) -> int:
        end = _IN_KEY.match(text, at).end()  # type: ignore[union-attr]
        self._key.append(text[at:end])
        if end == len(text):
            return end
        key = "".join(self._key)
        if text[end] == "\n" or (key in self._seen and not self._forced):
            self.status = BROKEN
            return end
        self._is_text = "string" in self._parameters.kinds(self._parameters.said_of(key))
        self._parts.append(f'{self._next_key()}": ' + '"' * self._is_text)
        self._seen.add(key)
        self._in_value = self._is_fresh = True
        self._step = XmlScanner._value
        return end + 1

    def _next_key(self) -> str:
        return (", " if self._seen else "") + '"' + _escaped("".join(self._key))

    def _value(self, text: str, at: int) -> int:
        end = _BEFORE_TAG.match(text, at).end()  # type: ignore[union-attr]
        self._grow(text[at:end])
        if end < len(text):
            self._step = XmlScanner._read_tag
        return end

    def _grow(self, text: str) -> None:
        """More of the value, without a newline at its beginning and one at its end."""
        if not text:
            return
        if self._is_fresh:
            self._is_fresh = False
            text = text.removeprefix("\n")
        text = self._newline + text
        self._newline = "\n" if text.endswith("\n") else ""
        text = text[: len(text) - len(self._newline)]
        if self._is_text:
            self._parts.append(_escaped(text))
        else:
            self._raw.append(text)

    def _end_value(self) -> None:
        self._parts.append('"' if self._is_text else json_of("".join(self._raw)))
        self._raw, self._newline, self._in_value = [], "", False


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _scanner(shape: str, offer: Offer) -> XmlScanner:
    name = shape[shape.index(OPEN_FUNCTION) + len(OPEN_FUNCTION) : -1]
    parameters = offer.functions.get(name, {}).get("parameters")
    return XmlScanner(name, Parameters(parameters), forced=offer.forced)


def _offered_scanner(shape: str, offer: Offer) -> XmlScanner:
    scanner = _scanner(shape, offer)
    if scanner.name not in offer.functions:
        scanner.status = BROKEN
    return scanner


def _leaves_tag(shape: str) -> Left:
    return Left(closing=CLOSE)


_OPENING = (*letters(OPEN_FUNCTION), *_NAME_ATOMS, ">", MORE)
_XML = Form(
    "xml", OPEN, (*letters(OPEN), SPACE, *_OPENING), _scanner, _leaves_tag, bound=True, before=r"\n{0,2}"
)
# The outer tag is the one that models forget.
_BARE_FUNCTION = Form("function", OPEN_FUNCTION, _OPENING, _offered_scanner, _leaves_tag, loose=True)


@dataclass(frozen=True, slots=True)
class Xml:
    """The dialect. `python_words`: the template writes True, False and None (Qwen3.5), else true, false and null."""

    python_words: bool = False

    name: ClassVar[str] = "xml"
    note: ClassVar[str] = ""
    stop_strings: ClassVar[tuple[str, ...]] = ()
    marks: ClassVar[Marks] = Marks((_XML, _BARE_FUNCTION))

    def write(self, calls: Iterable[ToolCall]) -> str:
        """The text of calls, as the template writes it. (It escapes nothing: see `carry` for what it cannot write.)"""
        return "\n".join(
            f"{OPEN}\n{OPEN_FUNCTION}{call.name}>\n"
            + "".join(
                f"{OPEN_PARAMETER}{key}>\n{self._value(value)}\n{CLOSE_PARAMETER}\n"
                for key, value in json.loads(call.arguments).items()
            )
            + f"{CLOSE_FUNCTION}\n{CLOSE}"
            for call in calls
        )

    def carry(self, conversation: Conversation) -> Carried:
        """As `openai_messages`. FormatError for a call that could not be read back from what the template writes."""
        messages = openai_messages(conversation)
        for k, message in enumerate(messages):
            for i, call in enumerate(message.get("tool_calls", ())):
                problem = self._problem(**call["function"])
                if problem is not None:
                    raise FormatError(f"message {k}: tool_calls[{i}]: {problem}", k)
        return Carried(messages, conversation.tools)

    def call_grammar(self, tools: Tools, *, name: str | None = None, parallel: bool = False) -> Grammar:
        """One call or more, the parameters in the order of the tools' schemas."""
        more = ' ("\\n" call)*' if parallel else ""
        return self._grammar(f"start: call{more}\ncall: open body\n", chosen(tools, name))

    def text_grammar(self, tools: Tools) -> Grammar:
        """Free text in which every opened tag becomes a call."""
        return self._grammar("start: (until_open body)* rest\nrest: TEXT\n", loosened(tools))

    def _value(self, value: object) -> str:
        if isinstance(value, str):
            return value
        if self.python_words and not isinstance(value, (list, Mapping)):
            return str(value)
        return json.dumps(value, ensure_ascii=False)

    def _problem(self, name: str, arguments: Mapping[str, Any]) -> str | None:
        """Why a call cannot be read back, or None."""
        if not _WRITABLE.fullmatch(name):
            return f"the name {name!r}; expected one line of at most 128 characters without < and >"
        for key, value in arguments.items():
            if not _IN_KEY.fullmatch(key):
                return f"the argument {key!r}; expected one line without >"
            tag = next((tag for tag in TAGS if tag in self._value(value)), None)
            if tag is not None:
                return (
                    f"argument {key!r} holds {tag}, which this model's calls are written with and cannot escape; "
                    "expected a value without it"
                )
        return None

    def _grammar(self, start: str, tools: Tools) -> Grammar:
        """The rules of `start`, and `body`: a call of any of the tools, after its opening tag."""
        names = " | ".join(f"tool_{i}" for i in range(len(tools)))
        # Values of one kind share a rule, whatever parameter they are of.
        values: dict[str, str] = {}
        rules = [self._tool_rules(i, function_of(tool), values) for i, tool in enumerate(tools)]
        rules += [f"{name}: {body}\n" for body, name in values.items()]
        end = json.dumps(f"{CLOSE_FUNCTION}\n")
        return Grammar(
            f"{start}body: ({names}) {end} close\n{''.join(rules)}{_COMMON_RULES}",
            (("open", OPEN), ("close", CLOSE)),
        )

    def _tool_rules(self, i: int, function: Mapping[str, Any], values: dict[str, str]) -> str:
        """The rules of one tool's call, from after the opening tag to before the end of the function. `values`: the
        rules of values by what they say; it is added to."""
        where, parameters = f"tool {function.get('name')!r}", Parameters(function.get("parameters") or {})
        schema = parameters.schema
        if isinstance(schema, Mapping) and "$ref" in schema:
            schema = parameters.referred(schema["$ref"])
        if not isinstance(schema, Mapping) or "object" not in parameters.kinds(schema):
            raise ToolError(f"{where}: parameters are no JSON schema of an object; expected one")
        unheld = [repr(key) + " at the top of its parameters" for key in _NOT_FORCED if key in schema]
        if not _WRITABLE.fullmatch(str(function.get("name"))):
            unheld.append("its name")
        unheld += [
            f"the parameter {key!r}" for key in schema.get("properties") or {} if not _IN_KEY.fullmatch(key)
        ]
        if unheld:
            raise ToolError(f"{where}: {unheld[0]}: no call in this model's format can be held to that")
        properties, more = schema.get("properties") or {}, schema.get("additionalProperties", True)
        required = schema.get("required") or []
        named = {**properties, **{key: more for key in required if key not in properties}}
        head = json.dumps(f"\n{OPEN_FUNCTION}{function['name']}>\n")
        if not named and more is not False:
            value = self._value_rule(more, parameters, where, values)
            return (
                f"tool_{i}: {head} parameter_{i}*\nparameter_{i}: {json.dumps(OPEN_PARAMETER)} KEY {value}\n"
            )
        order = [head]
        for key, said in named.items():
            if said is False and key not in required:
                continue
            opening = json.dumps(f"{OPEN_PARAMETER}{key}>\n")
            value = self._value_rule(said, parameters, f"{where}: {key!r}", values)
            order.append(f"({opening} {value}){'' if key in required else '?'}")
        return f"tool_{i}: {' '.join(order)}\n"

    def _value_rule(self, schema: Any, parameters: Parameters, where: str, values: dict[str, str]) -> str:
        """What stands for a value and its end in a rule."""
        allowed = parameters.kinds(schema)
        if schema is False or not allowed:
            raise ToolError(f"{where}: its schema allows no value")
        if "string" in allowed:
            pattern = parameters.text_pattern(schema, where)
            return (
                values.setdefault(f"({pattern} & PLAIN) END", f"VALUE_{len(values)}") if pattern else "VALUE"
            )
        choices = [json.dumps(self._value(word)) for kind, word in WORDS.items() if kind in allowed]
        if rest := allowed - WORDS.keys():
            body = parameters.json_value(schema, where, rest, f"^{_UNTAGGED_TEXT}$")
            choices.append(values.setdefault(body, f"json_{len(values)}"))
        return f"({' | '.join(choices)}) {_END_VALUE}"
