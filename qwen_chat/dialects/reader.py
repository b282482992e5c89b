"""Tool calls as text: how tools and calls are written for a model, and how a model's reply is read back.

In: tools and calls; or the text of a reply, whole (`parse`) or in pieces cut anywhere (`StreamParser`).
Out: the text a prompt carries; or content, reasoning and calls. Pure text: no tokenizer, no torch.

Two styles: Hermes (`<tool_call>` tags around JSON; Qwen2.5, Qwen3) and Qwen-Agent (flower marks; Qwen2). Both
are always read, whatever the prompt asked for. The JSON decides where a call ends, not the end tag, so a tag
inside a string is only text. docs/tool_calls.md shows what becomes of every damaged shape.

No text is lost. What is not part of a readable call is content, verbatim and in order. Besides the calls
themselves only this layout is left out, which the template writes again:

    reasoning    <think> at the beginning and white space before it, </think>, newlines around the reasoning
    before       one newline before a call that follows text (with the indentation, where no tag opens the
                 call); white space alone before a call
    between      white space, a comma, closing brackets
    after        closing brackets before an end tag, the end tag, the closing fence; and up to the end of the
                 reply white space, half an end tag, a stop mark
    ✿RETURN✿:    at the beginning: the mark under which a Qwen-Agent prompt lets the model answer
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from qwen_chat.conversation import ToolCall
from qwen_chat.dialects.loose_json import BROKEN, DONE, READING, ObjectScanner, object_text
from qwen_chat.errors import FormatError
from qwen_chat.tools.validate import check_arguments, check_call, check_tool

__all__ = [
    "Delta",
    "Reply",
    "StreamParser",
    "check_arguments",
    "check_call",
    "check_tool",
    "flower_block",
    "fold",
    "normalise_arguments",
    "parse",
    "tools_block",
    "write",
    "write_flower",
]

Tools = Sequence[Mapping[str, Any]]
# What makes a call of text: nothing; <tool_call>; also ✿FUNCTION✿; also JSON that stands alone or in a fence.
Marks = Literal["none", "tagged", "marked", "any"]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINK, END_THINK = "<think>", "</think>"
FUNCTION, ARGS, RESULT, RETURN = "✿FUNCTION✿", "✿ARGS✿", "✿RESULT✿", "✿RETURN✿"
FLOWER_STOPS = (RESULT, RETURN)

# ---------------------------------------------------------------------------------------- writing


def tools_block(tools: Tools) -> str:
    """The Hermes text that follows the system text after a blank line, as Qwen2.5's template writes it."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>\n{lines}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        f"{OPEN}{CLOSE} XML tags:\n"
        f'{OPEN}\n{{"name": <function-name>, "arguments": <args-json-object>}}\n{CLOSE}'
    )


def write(calls: Iterable[ToolCall]) -> str:
    """Hermes text of calls, without a newline around it.

    The arguments' text goes in as it is, so that `parse` returns it; pass it through `normalise_arguments`
    first for the very bytes of the templates. (They escape nothing in a name; here a name is JSON.)
    """
    return "\n".join(f"{OPEN}\n{_write_json(call)}\n{CLOSE}" for call in calls)


def _write_json(call: ToolCall) -> str:
    return f'{{"name": {json.dumps(call.name, ensure_ascii=False)}, "arguments": {call.arguments}}}'


def write_flower(calls: Iterable[ToolCall]) -> str:
    """Qwen-Agent's text of calls. A name is one line without a flower: this style has no escapes for it."""
    return "\n".join(f"{FUNCTION}: {call.name}\n{ARGS}: {call.arguments}" for call in calls)


def normalise_arguments(arguments: str | Mapping[str, Any] | None) -> str:
    """Arguments as the templates write them, `json.dumps(object, ensure_ascii=False)`; none at all is `{}`.

    Raises FormatError for what is not a JSON object or its text.
    """
    value: object = arguments or {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"arguments are no JSON ({error}); expected the text of an object") from None
    if not isinstance(value, Mapping):
        raise FormatError(f"arguments hold {type(value).__name__}; expected an object")
    return json.dumps(value, ensure_ascii=False)


# ------------------------------------------------------------------------------------- Qwen-Agent

_FLOWER_ENGLISH = {
    "title": "# Tools\n\n## You have access to the following tools:",
    "tool": "### {name}\n\n{name}: {description} Parameters: {parameters} "
    "Format the arguments as a JSON object.",
    "single": "## When you need to call a tool, please insert the following command in your reply, "
    "which can be called zero or multiple times according to your needs:\n\n"
    "✿FUNCTION✿: The tool to use, should be one of [{names}]\n✿ARGS✿: The input of the tool\n"
    "✿RESULT✿: Tool results\n",
    "parallel": "## Insert the following command in your reply when you need to call N tools in parallel:\n\n"
    "✿FUNCTION✿: The name of tool 1, should be one of [{names}]\n✿ARGS✿: The input of tool 1\n"
    "✿FUNCTION✿: The name of tool 2\n✿ARGS✿: The input of tool 2\n...\n"
    "✿FUNCTION✿: The name of tool N\n✿ARGS✿: The input of tool N\n"
    "✿RESULT✿: The result of tool 1\n✿RESULT✿: The result of tool 2\n...\n✿RESULT✿: The result of tool N\n",
    "return": "✿RETURN✿: Reply based on tool results. Images need to be rendered as ![](url)",
}
_FLOWER_CHINESE = {
    "title": "# 工具\n\n## 你拥有如下工具：",
    "tool": "### {name}\n\n{name}: {description} 输入参数：{parameters} 此工具的输入应为JSON对象。",
    "single": "## 你可以在回复中插入零次、一次或多次以下命令以调用工具：\n\n"
    "✿FUNCTION✿: 工具名称，必须是[{names}]之一。\n✿ARGS✿: 工具输入\n✿RESULT✿: 工具结果\n",
    "parallel": "## 你可以在回复中插入以下命令以并行调用N个工具：\n\n"
    "✿FUNCTION✿: 工具1的名称，必须是[{names}]之一\n✿ARGS✿: 工具1的输入\n"
    "✿FUNCTION✿: 工具2的名称\n✿ARGS✿: 工具2的输入\n...\n✿FUNCTION✿: 工具N的名称\n✿ARGS✿: 工具N的输入\n"
    "✿RESULT✿: 工具1的结果\n✿RESULT✿: 工具2的结果\n...\n✿RESULT✿: 工具N的结果\n",
    "return": "✿RETURN✿: 根据工具结果进行回复，需将图片用![](url)渲染出来",
}


def flower_block(tools: Tools, language: Literal["en", "zh"] = "en", parallel: bool = True) -> str:
    """Qwen-Agent's text that follows the system text after a blank line, in one of its four wordings."""
    wording = _FLOWER_CHINESE if language == "zh" else _FLOWER_ENGLISH
    functions = [_function(tool) for tool in tools]
    described = [
        wording["tool"].format(
            name=function["name"],
            description=function.get("description", ""),
            parameters=json.dumps(function.get("parameters", {}), ensure_ascii=False),
        )
        for function in functions
    ]
    command = wording["parallel" if parallel else "single"]
    names = ",".join(function["name"] for function in functions)
    return "\n\n".join([wording["title"], *described, command.format(names=names) + wording["return"]])


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function")
    return function if isinstance(function, Mapping) else tool


# ---------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model's reply says. Calls carry no id: who answers for the model gives them one."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Delta:
    """One step of a reply: more content, or more reasoning, or a call (`index` counts them from 0)."""

    content: str | None = None
    reasoning: str | None = None
    name: str | None = None
    arguments: str | None = None
    index: int | None = None


def parse(text: str, tools: Tools | None = None, *, in_reasoning: bool = False) -> Reply:
    """Read a whole reply: `fold` of all that a StreamParser says about it. Never raises on any text."""
    parser = StreamParser(tools, in_reasoning=in_reasoning)
    return fold([*parser.feed(text), *parser.finish()])


def fold(deltas: Iterable[Delta]) -> Reply:
    """The reply that the deltas add up to."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, list[str]] = {}
    for delta in deltas:
        content.append(delta.content or "")
        reasoning.append(delta.reasoning or "")
        if delta.index is not None:
            call = calls.setdefault(delta.index, ["", ""])
            call[0] += delta.name or ""
            call[1] += delta.arguments or ""
    return Reply(
        content="".join(content),
        reasoning="".join(reasoning),
        tool_calls=[ToolCall(name, arguments) for _, (name, arguments) in sorted(calls.items())],
    )


_SLOTS = {"name": "name", "arguments": "arguments", "parameters": "arguments", "id": "id", "type": "type"}


class _CallScanner(ObjectScanner):
    """Reads `{"name": ..., "arguments": ...}` and refuses, as early as it can, an object that is no call.

    With `names` (JSON that no tag announces) the name must be among them and the arguments must be there. A
    key that a call does not have would be lost in one, so it refuses the object; only the labels `id` and
    `type` are passed over.
    """

    def __init__(self, names: frozenset[str] | None) -> None:
        super().__init__()
        self.name = ""
        self.arguments = "{}"
        self._names = names
        self._slot = ""
        self._seen: set[str] = set()
        self._arguments_at = 0  # where in _parts the arguments began, and ended
        self._arguments_end: int | None = None
        self._told = 0  # how many of the parts `more` gave out

    @property
    def begun(self) -> bool:
        """Whether the name is known, and an object of arguments has begun."""
        return self.name != "" and (self._arguments_end is not None or self._is_inside)

    @property
    def _is_inside(self) -> bool:
        return self._slot == "arguments" and self._kind == "{" and len(self._closers) > 1

    def more(self, *, ended: bool) -> str:
        """The arguments since it was last asked. What may still be repaired comes later, unless the text has
        `ended`."""
        if self._arguments_end is not None:
            start, end, rest = self._arguments_at, self._arguments_end, ""
        elif ended:
            start, end, rest = self._value_at, len(self._parts), self._unread()
        else:
            start, end, rest = self._value_at, len(self._parts) if self._comma < 0 else self._comma, ""
        start = max(start, self._told)
        self._told = max(end, self._told)
        return "".join(self._parts[start:end]) + rest

    def top_key(self, key: str) -> bool:
        self._slot = _SLOTS.get(key, "")
        fresh = self._slot != "" and self._slot not in self._seen
        self._seen.add(self._slot)
        return fresh

    def top_value(self, kind: str, text: str) -> bool:
        if self._slot == "name":
            return kind in "\"'" and self._read_name(json.loads(text))
        if self._slot == "arguments":
            if kind == "{":
                self._arguments_at, self._arguments_end = self._value_at, len(self._parts)
            return self._read_arguments(kind, text)
        return kind not in "{["

    def complete(self) -> bool:
        return self.name != "" and (self._names is None or "arguments" in self._seen)

    def _read_name(self, name: str) -> bool:
        encodable = name.isascii() or not _SURROGATE.search(name)
        fits = name.strip() != "" and encodable and (self._names is None or name in self._names)
        self.name = name if fits else ""
        return fits

    def _read_arguments(self, kind: str, text: str) -> bool:
        if kind == "{":
            self.arguments = text.strip()
        elif kind in "\"'":
            inner = json.loads(text)
            strict = object_text(inner) if inner.strip() else "{}"
            if strict is None or _SURROGATE.search(strict):
                return False
            self.arguments = strict
        else:
            return text.strip() == "null"
        return True


class _ArgumentsScanner(ObjectScanner):
    """Reads the object after ✿ARGS✿; the name came before it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @property
    def arguments(self) -> str:
        return self.text


# What the parser looks for is a list of atoms, one regular expression each, such that every beginning of what
# an atom matches is matched by it too. From one list come the expression for the whole and the one for "may
# become this, if more text comes". Every repetition is bounded, so what is held back is short and matching
# costs constant time.
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SPACE = r"[ \t\r\n]{0,64}"
_STRAY = rf"{_SPACE}(?:[}}\]]{{1,4}}{_SPACE})?"  # closing brackets too many
_INDENT = r"[ \t]{0,16}"
_LIST = rf"(?:\[{_SPACE})?"
# A fence's word; any other word would be lost with the fence. (Their beginnings match too: see above.)
_INFO = "(?:j(?:s(?:o(?:n)?)?)?|t(?:o(?:o(?:l(?:_(?:c(?:a(?:l(?:l(?:s)?)?)?)?)?)?)?)?)?)?"
_TICKS = rf"(?:`{{1,3}}{_INFO}{_SPACE})?"
_END_TICKS = rf"(?:`{{1,3}}{_SPACE})?"
_PAYLOAD = r"(?=\{)"
_NEVER = r"(?!)"
_LONGEST = 640  # characters; more than any of the shapes can be


def _letters(literal: str) -> list[str]:
    return [re.escape(character) for character in literal]


class _Shapes:
    """Alternatives by name: `full` (its group is the name) and `partial` (what is left may become one)."""

    def __init__(self, shapes: Mapping[str, Sequence[str]]) -> None:
        whole = [f"(?P<{name}>{''.join(atoms)})" for name, atoms in shapes.items()]
        self.full = re.compile("|".join(whole) or _NEVER)
        begun = [rf"(?:{self._beginning(atoms)}\Z)" for atoms in shapes.values()]
        self.partial = re.compile("|".join(begun) or _NEVER)

    @staticmethod
    def _beginning(atoms: Sequence[str]) -> str:
        pattern = ""
        for atom in reversed([atom for atom in atoms if not atom.startswith("(?=") and atom != _NEVER]):
            pattern = f"(?:{atom}{pattern})?"
        return pattern


def _openings(before: str, own_line: str, marks: Marks) -> dict[str, list[str]]:
    """The shapes that open a call, from the layout before them up to the first brace of its JSON."""
    if marks == "none":
        return {}
    shapes = {"tag": [before, *_letters(OPEN), _SPACE, _TICKS, _LIST, _PAYLOAD]}
    if marks != "tagged":
        shapes["flower"] = [
            *[
                before,
                *_letters(FUNCTION),
                r"[ \t]{0,8}",
                "[:：]?",
                r"[ \t]{0,8}",
                r"[^\s✿:：]",
                r"[^\n✿]{0,127}",
            ],
            *[rf"(?:\n{_SPACE})?", *_letters(ARGS), r"[ \t]{0,8}", "[:：]?", _SPACE, _PAYLOAD],
        ]
    if marks == "any":
        shapes["fence"] = [
            own_line,
            *_letters("```"),
            _INFO,
            r"[ \t]{0,8}",
            r"\r?",
            r"\n",
            _SPACE,
            _LIST,
            _PAYLOAD,
        ]
        shapes["bare"] = [own_line, _LIST, _PAYLOAD]
    return shapes


@cache
def _text_shapes(marks: Marks) -> _Shapes:
    """In running text: searched."""
    return _Shapes(_openings(r"\n?", rf"\n{_INDENT}", marks))


@cache
def _first_shapes(marks: Marks) -> _Shapes:
    """Where the content begins: matched at the spot."""
    return _Shapes(_openings(_SPACE, _SPACE, marks))


@cache
def _after_shapes(marks: Marks, owed: frozenset[str]) -> _Shapes:
    """Directly after a call, with what it left open: matched at the spot."""
    before = _STRAY if "brackets" in owed else _SPACE
    shapes: dict[str, list[str]] = {}
    if "close" in owed:
        shapes["close"] = [before, _END_TICKS, *_letters(CLOSE)]
    if "list" in owed:
        shapes["end_list"] = [_SPACE, r"\]"]
    if "fence" in owed:
        shapes["end_fence"] = [before, *_letters("```")]
    if owed & {"more", "list"}:
        shapes["more"] = [rf"{_SPACE}(?:,{_SPACE})?", _PAYLOAD]
    stops = {
        f"stop{i}": [before, *_letters(mark), "[:：]?", _SPACE, _NEVER] for i, mark in enumerate(FLOWER_STOPS)
    }
    return _Shapes(shapes | _openings(before, before, marks) | stops)


@cache
def _end_shapes(owed: frozenset[str]) -> _Shapes:
    """What may stand between a call and the end of the reply without being content."""
    before = _STRAY if "brackets" in owed else _SPACE
    shapes = {f"stop{i}": [before, re.escape(mark), "[:：]?", _SPACE] for i, mark in enumerate(FLOWER_STOPS)}
    shapes["close"] = [before]
    if "fence" in owed:
        shapes["close"].append(_END_TICKS)
    if "close" in owed:
        shapes["close"] += ["</", *_letters(CLOSE[2:])]
    return _Shapes(shapes)


_BEGINNING = _Shapes(
    {
        "think": [_SPACE, *_letters(THINK)],
        "answer": [_SPACE, *_letters(RETURN), "[:：]", " {0,8}", "(?=[^ ])"],
    }
)
_END_OF_THINK = _Shapes({"end": _letters(END_THINK)})
_NO_TRIGGER = re.compile(r"[^\n<✿]*\Z")

_Mode = Literal["beginning", "reasoning", "newlines", "first", "text", "call", "after"]


class StreamParser:
    """Reads a reply piece by piece. However it is cut, `fold` of the deltas is `parse` of the whole.

    Content and reasoning come out as soon as they cannot be the beginning of a tag any more (a few characters
    are held back in ordinary text). A call comes out in one delta, when its JSON is complete, without waiting
    for the end tag. Not before: a call whose JSON turns out to be cut or broken is content, and a name that
    has been shown could not be taken back. A tagged call that is `bound` to a grammar cannot break: its name comes
    when its arguments begin, they come as they are written, and a cut one is a call with cut arguments (`cut`).

    `tools` only says which names make a call of JSON that stands alone or in a code fence. A tagged call of
    an unknown name is a call too: who runs it answers with an error, from which a model recovers.
    """

    def __init__(
        self,
        tools: Tools | None = None,
        *,
        in_reasoning: bool = False,
        marks: Marks | None = None,
        bound: bool = False,
    ) -> None:
        """`marks`: what counts as a call; by default anything that may be one, JSON without a mark only where
        it names one of `tools`. `bound`: what follows <tool_call> is written under a grammar."""
        self.calls = 0  # how many have come out
        self.cut = False  # the last one's arguments are not whole
        self._bound = bound
        self._is_open = False  # the name of the call that is being read has come out
        self._names = frozenset(str(_function(tool).get("name")) for tool in tools or ())
        self._marks: Marks = marks or ("any" if self._names else "marked")
        self._mode: _Mode = "beginning"
        self._in_reasoning = in_reasoning
        self._out: list[Delta] = []
        self._held = ""  # the beginning of a tag, perhaps; short
        self._fed = 0  # characters fed so far
        self._newlines = 0  # at the end of the reasoning so far: layout if it ends here
        self._reasoned = False  # some reasoning came out
        self._owed: frozenset[str] = frozenset()  # what the last call left open
        # The attempt to read a call: it began at _start in the text at hand, or in _raw, kept from earlier.
        self._scanner: _CallScanner | _ArgumentsScanner = _ArgumentsScanner("")
        self._raw: list[str] = []
        self._start = 0
        self._skip = 0  # how much of it is content for certain if it fails
        self._opens: frozenset[str] = frozenset()
        self._streams = False  # its arguments come as they are written
        self._only_known = False  # the call must name one of the tools
        self._wasted = 0  # characters read by attempts that failed

    def feed(self, piece: str) -> list[Delta]:
        """Read the next piece of the reply; return what is certain now."""
        self._fed += len(piece)
        if self._mode == "text" and not self._held and _NO_TRIGGER.match(piece):
            return [Delta(piece)] if piece else []
        return self._run(piece, final=False)

    def finish(self) -> list[Delta]:
        """The reply has ended; return what was held back."""
        return self._run("", final=True)

    def _run(self, piece: str, final: bool) -> list[Delta]:
        text, at = self._held + piece, 0
        self._held = ""
        self._out = []
        while at < len(text) or (final and self._mode == "call"):
            if self._mode == "call":
                text, at = self._read_call(text, at, final)
            else:
                at = _READERS[self._mode](self, text, at, final)
        return self._out

    # Each reader returns where it stopped; what it held back (then it stopped at the end) is in _held.

    def _hold(self, text: str, at: int) -> int:
        self._held = text[at:]
        return len(text)

    def _say(self, content: str) -> None:
        if content:
            self._out.append(Delta(content))

    def _read_beginning(self, text: str, at: int, final: bool) -> int:
        match = _BEGINNING.full.match(text, at)
        if not match and not final and _BEGINNING.partial.match(text, at):
            return self._hold(text, at)
        if match and match.lastgroup == "think":
            self._mode = "reasoning"
            return match.end()
        self._mode = "reasoning" if self._in_reasoning else "first"
        return match.end() if match and not self._in_reasoning else at

    def _read_reasoning(self, text: str, at: int, final: bool) -> int:
        end = text.find(END_THINK, at)
        if end >= 0:
            self._reason(text[at:end])
            self._mode = "newlines"
            return end + len(END_THINK)
        kept = len(text)
        if not final:
            partial = _END_OF_THINK.partial.search(text, max(at, kept - len(END_THINK)))
            kept = partial.start() if partial else kept
        self._reason(text[at:kept])
        return self._hold(text, kept)

    def _reason(self, text: str) -> None:
        """Say reasoning without the newlines at its two ends, as the template strips them."""
        bare = text.rstrip("\n") if self._reasoned else text.strip("\n")
        trailing = len(text) - len(text.rstrip("\n"))
        if not bare:
            self._newlines += trailing
            return
        self._out.append(Delta(reasoning="\n" * self._newlines * self._reasoned + bare))
        self._reasoned = True
        self._newlines = trailing

    def _read_newlines(self, text: str, at: int, final: bool) -> int:
        while at < len(text) and text[at] == "\n":
            at += 1
        if at < len(text):
            self._mode = "first"
        return at

    def _read_first(self, text: str, at: int, final: bool) -> int:
        return self._read_spot(_first_shapes(self._marks), text, at, final)

    def _read_after(self, text: str, at: int, final: bool) -> int:
        shapes = _after_shapes(self._marks, self._owed)
        match = shapes.full.match(text, at)
        closes = match.lastgroup if match else None
        if match and closes == "close":
            self._owed = (
                self._owed
                - {"close", "more", "list", "brackets"}
                - ({"fence"} if "`" in match.group() else set())
            )
        elif closes == "end_list":
            self._owed = self._owed - {"list"}
        elif closes == "end_fence":
            self._owed = self._owed - {"fence", "list", "brackets"}
        elif final and _end_shapes(self._owed).partial.match(text, at):
            return len(text)
        else:
            return self._read_spot(shapes, text, at, final)
        return match.end() if match else at

    def _read_spot(self, shapes: _Shapes, text: str, at: int, final: bool) -> int:
        """A call begins exactly here, or may begin here, or running text does."""
        match = shapes.full.match(text, at)
        if match:
            return self._open_call(match)
        if not final and shapes.partial.match(text, at):
            return self._hold(text, at)
        self._mode = "text"
        return at

    def _read_text(self, text: str, at: int, final: bool) -> int:
        shapes = _text_shapes(self._marks)
        match = shapes.full.search(text, at)
        until = match.start() if match else len(text)
        window = max(at, len(text) - _LONGEST)
        if not final and until >= window:
            partial = shapes.partial.search(text, window)
            if partial and partial.start() < until:  # it may become a call that begins earlier
                self._say(text[at : partial.start()])
                return self._hold(text, partial.start())
        self._say(text[at:until])
        return self._open_call(match) if match else until

    def _open_call(self, match: re.Match[str]) -> int:
        """Begin to read the JSON of a call after its opening shape; return where the JSON begins."""
        kind, shape, text = match.lastgroup, match.group(), match.string
        marks = {"tag": OPEN, "flower": FUNCTION, "fence": "```"}
        mark = marks.get(kind or "")
        self._skip = shape.index(mark) + len(mark) if mark else len(shape) + 1
        if self._wasted > 8 * (self._fed - len(text) + match.start()) + 65536:
            # Attempts that overlap again and again would cost quadratic time: the next ones are text.
            self._say(text[match.start() : match.start() + self._skip])
            self._mode = "text"
            return match.start() + self._skip
        if kind == "flower":
            name = shape[shape.index(FUNCTION) + len(FUNCTION) : shape.index(ARGS)]
            self._scanner = _ArgumentsScanner(name.strip(" \t\r\n:："))
            self._opens = frozenset({"brackets"})
        else:
            self._opens = self._leaves_open(kind or "", shape)
            self._only_known = kind in ("bare", "fence") or (kind == "more" and self._only_known)
            self._scanner = _CallScanner(self._names if self._only_known else None)
        self._mode = "call"
        self._streams = self._bound and kind == "tag"
        self._start = match.start()
        return match.end()

    def _leaves_open(self, kind: str, shape: str) -> frozenset[str]:
        if kind == "more":
            return self._owed
        owed = {"close", "brackets"}
        owed |= {"more"} if kind == "tag" else set()
        owed |= {"list"} if shape.rstrip().endswith("[") else set()
        owed |= {"fence"} if "`" in shape else set()
        return frozenset(owed)

    def _read_call(self, text: str, at: int, final: bool) -> tuple[str, int]:
        scanner = self._scanner
        at = scanner.scan(text, at)
        if isinstance(scanner, _CallScanner) and self._streams and scanner.begun:
            return text, self._read_bound(scanner, at, final)
        if scanner.status == DONE:
            self._out.append(Delta(name=scanner.name, arguments=scanner.arguments, index=self.calls))
            self.calls += 1
            self._owed = self._opens
            self._raw = []
            self._mode = "after"
        elif scanner.status == BROKEN or final:
            self._wasted += scanner.read
            if self._raw:
                text, self._start, self._raw = "".join([*self._raw, text]), 0, []
            at = self._start + self._skip
            self._say(text[self._start : at])
            self._mode = "text"
        else:
            self._raw.append(text[self._start :])
            self._start = 0
        return text, at

    def _read_bound(self, scanner: _CallScanner, at: int, final: bool) -> int:
        """Say what the arguments have grown by; the name before the first of them."""
        if not self._is_open:
            self._out.append(Delta(name=scanner.name, index=self.calls))
            self.calls += 1
            self._is_open = True
        ended = final or scanner.status != READING
        grown = scanner.more(ended=ended)
        if grown:
            self._out.append(Delta(arguments=grown, index=self.calls - 1))
        if ended:
            self._is_open = False
            self.cut = scanner.status != DONE
            self._owed = self._opens
            self._raw = []
            self._mode = "after" if scanner.status == DONE else "text"
        else:
            self._start = at
        return at


_READERS = {
    "beginning": StreamParser._read_beginning,
    "reasoning": StreamParser._read_reasoning,
    "newlines": StreamParser._read_newlines,
    "first": StreamParser._read_first,
    "text": StreamParser._read_text,
    "after": StreamParser._read_after,
}
