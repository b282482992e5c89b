"""A model's chat format as Ollama reads it: a Modelfile whose Go template gives the same bytes.

In: a `ChatFormat`. Out: a `Wording`, found by probes, which writes prompts, and the Go template that writes the same
ones; the Modelfile. What a template is given: https://github.com/ollama/ollama/blob/main/docs/template.mdx.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qwen_chat.chat.format import ChatFormat
from qwen_chat.chat.template import END, START, Switch
from qwen_chat.conversation import Json, ToolCall
from qwen_chat.dialects.dialect import Dialect
from qwen_chat.dialects.hermes import CLOSE, OPEN, Hermes
from qwen_chat.dialects.shapes import END_THINK, THINK
from qwen_chat.dialects.xml import CLOSE_FUNCTION, CLOSE_PARAMETER, OPEN_FUNCTION, OPEN_PARAMETER, Xml
from qwen_chat.errors import FormatError, ModelError
from qwen_chat.service.prepare import SamplingDefaults

# ThinkRule a think block stands before a reply: never, where there is a thought, an empty one too.
ThinkRule = Literal["never", "given", "always"]
_SYSTEM_HERE, _ASKED, _SAID, _THINKING, _TOOLS_HERE = (
    "probe system",
    "probe user",
    "probe reply",
    "probe thought",
    "probe",
)
_OFFERED: Json = {
    "type": "function",
    "function": {"name": _TOOLS_HERE, "parameters": {"type": "object", "properties": {}}},
}
_SHOWN_CALL: Json = {
    "type": "function",
    "function": {"name": _TOOLS_HERE, "arguments": '{"a": "值", "b": [1, null], "c": true}'},
}
_ASK: Json = {"role": "user", "content": _ASKED}
_RESULT: Json = {"role": "tool", "content": "probe result", "tool_call_id": "1"}
_CONTEXT = 8192  # tokens of a conversation, where the model allows as many


@dataclass(frozen=True)
class Wording:
    """What a chat template writes around texts.

    openings: by (a system text, tools), literals, `_SYSTEM_HERE` and `_TOOLS_HERE` where those two stand. thinks:
    before replies up to the last question, and after it. unled: a newline that begins a reply is left out there.
    between: after a reply's text, before its calls. begins: with what a reply begins by default, thinking off, on.
    """

    openings: Mapping[tuple[bool, bool], tuple[str, ...]]
    dialect: Dialect
    thinks: tuple[ThinkRule, ThinkRule]
    unled: tuple[bool, bool]
    between: str
    begins: Mapping[bool | None, str]

    def prompt(self, messages: Sequence[Json], tools: Sequence[Json] = (), think: bool | None = None) -> str:
        """What the Go template writes for OpenAI-shaped messages."""
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        holes = {_SYSTEM_HERE: system or "", _TOOLS_HERE: listed}
        found = "".join(holes.get(part, part) for part in self.openings[system is not None, bool(tools)])
        question = max((k for k, m in enumerate(messages) if m["role"] == "user"), default=len(messages))
        last = ""
        for k, message in enumerate(messages):
            role, content = message["role"], message["content"]
            found += f"{END}\n" if last == "tool" != role else ""
            if role == "tool":
                found += (f"{START}user" if last != "tool" else "") + "\n" + content.join(Hermes.RESULT)
            elif role == "assistant":
                found += self._reply(message, k > question)
            elif k or role != "system":
                found += f"{START}{role}\n{content}{END}\n"
            last = role
        return found + (f"{END}\n" if last == "tool" else "") + f"{START}assistant\n{self.begins[think]}"

    def _reply(self, message: Json, late: bool) -> str:
        content, thought = message["content"], message.get("reasoning_content") or ""
        calls = [ToolCall(**call["function"]) for call in message.get("tool_calls", ())]
        content = content.lstrip("\n") if self.unled[late] else content
        thinks = self.thinks[late] == "always" or (thought and self.thinks[late] == "given")
        block = f"{THINK}\n{thought}\n{END_THINK}\n\n" if thinks else ""
        called = (self.between if content and calls else "") + self.dialect.write(calls)
        return f"{START}assistant\n{block}{content}{called}{END}\n"


def find_wording(fmt: ChatFormat) -> tuple[Wording, list[str]]:
    """The wording of a format, and what Ollama cannot carry of it, a phrase each.

    Raises ModelError, with the construct, where an ordinary conversation would get other bytes.
    """
    switch, calls = fmt.thinking_switch, fmt.tool_style != "qwen_agent"

    def begun(think: bool | None) -> str:
        return fmt.prompt([_ASK], **_switched(switch, think)).rpartition(f"{START}assistant\n")[2]

    def reply(text: str, late: bool, **fields: object) -> str:
        """As it is written before the last question; or after it, where its call waits for an answer."""
        message = {"role": "assistant", "content": text, **fields} | (
            {"tool_calls": [_SHOWN_CALL]} if late else {}
        )
        rest = [_RESULT] if late else [_ASK]
        return fmt.prompt([_ASK, message, *rest]).split(f"{START}assistant\n")[1].partition(END)[0]

    def when(late: bool) -> ThinkRule:
        if THINK in reply(_SAID, late):
            return "always"
        return "given" if _THINKING in reply(_SAID, late, reasoning_content=_THINKING) else "never"

    def unled(late: bool) -> bool:
        return reply(f"\n{_SAID}", late) == reply(_SAID, late)

    places = (False, calls)  # of a reply: without calls there is none after the last question
    wording = Wording(
        openings={
            (system, tools): _reply_opening(fmt, system, tools)
            for system in (False, True)
            for tools in places
        },
        dialect=fmt.dialect,
        thinks=(when(False), when(calls)),
        unled=(unled(False), unled(calls)),
        between=reply(_SAID, calls).partition(_SAID)[2].partition(OPEN)[0],
        begins={think: begun(think) for think in (None, False, True)},
    )
    return wording, _lost(fmt, wording, calls)


def _switched(switch: Switch | None, think: bool | None) -> dict[str, Any]:
    return {} if think is None or switch is None else {switch.name: think == switch.on}


def _reply_opening(fmt: ChatFormat, system: bool, tools: bool) -> tuple[str, ...]:
    """All before the first question, in parts: see `Wording.openings`."""
    messages = [{"role": "system", "content": _SYSTEM_HERE}, _ASK] if system else [_ASK]
    text = fmt.prompt(messages, [_OFFERED] if tools else None).partition(f"{START}user\n{_ASKED}")[0]
    text = text.replace(json.dumps(_OFFERED, ensure_ascii=False), "\0t\0").replace(_SYSTEM_HERE, "\0s\0")
    return tuple({"s": _SYSTEM_HERE, "t": _TOOLS_HERE}.get(part, part) for part in text.split("\0") if part)


# ------------------------------------------------------------------------------------------------ what is lost


def _shapes(calls: bool) -> Iterator[tuple[str, list[Json], list[Json]]]:
    """Constructs of conversations by name, each with messages and tools that have it."""
    system, later = {"role": "system", "content": "S 系统"}, {"role": "system", "content": "later"}
    answer, thought = {"role": "assistant", "content": "答"}, {"reasoning_content": "why"}
    call = {"role": "assistant", "content": "", "tool_calls": [_SHOWN_CALL]}
    yield "a question", [_ASK], []
    yield "a system text", [system, _ASK], []
    yield "an empty system text", [{"role": "system", "content": ""}, _ASK], []
    yield "several turns", [system, _ASK, answer, _ASK, answer, _ASK], []
    yield "a reply without text", [_ASK, answer | {"content": ""}, _ASK], []
    yield "a thought in an earlier turn", [_ASK, answer | thought, _ASK], []
    yield "a later system message", [_ASK, answer, later, _ASK], []
    if calls:
        yield "tools", [_ASK], [_OFFERED]
        yield "tools beside a system text", [system, _ASK], [_OFFERED, _OFFERED]
        yield "a call", [_ASK, call, _RESULT], [_OFFERED]
        yield "several calls", [_ASK, call | {"tool_calls": [_SHOWN_CALL] * 2}, _RESULT, _RESULT], [_OFFERED]
        yield "text before a call", [_ASK, call | {"content": "x"}, _RESULT, answer, _ASK], [_OFFERED]
        yield "calls one after the other", [_ASK, call, _RESULT, call, _RESULT], [_OFFERED]
        yield "a thought before a call", [_ASK, call | thought, _RESULT], [_OFFERED]
        yield (
            "a thought before a call of an earlier turn",
            [_ASK, call | thought, _RESULT, answer, _ASK],
            [_OFFERED],
        )
    yield _WHITE_SPACE, [{"role": "system", "content": " s\n"}, _ASK | {"content": "\n u "}, answer, _ASK], []
    yield _WHITE_SPACE, [_ASK, answer | {"content": "\n\n a \n"}, _ASK], []
    yield _INLINE, [_ASK, answer | {"content": f"{THINK}\nwhy\n{END_THINK}\n\nso"}, _ASK], []


# What a Go template cannot do to a text, so that it stays as the client gives it.
_WHITE_SPACE = "white space at the ends of a text, which the chat template takes off"
_INLINE = f"a thought that stands in a reply's text ({THINK}), which the chat template takes out"


_THINKS = {None: "", False: " with thinking off", True: " with thinking on"}


def _lost(fmt: ChatFormat, wording: Wording, calls: bool) -> list[str]:
    lost = [] if calls else ["tools: Qwen-Agent's prompt for them depends on the language of the question"]
    for name, messages, tools in _shapes(calls):
        for think in (None, False, True) if fmt.thinking_switch else (None,):
            try:
                wanted = fmt.prompt(messages, tools or None, **_switched(fmt.thinking_switch, think))
            except FormatError:
                continue
            if wording.prompt(messages, tools, think) == wanted:
                continue
            if name not in (_WHITE_SPACE, _INLINE):
                raise ModelError(
                    f"--to ollama: the chat template writes {name}{_THINKS[think]} as no Go template made here does;"
                    " serve it with llama-server (--to gguf), which runs the chat template itself"
                )
            lost.append(name)
    return list(dict.fromkeys(lost))


# -------------------------------------------------------------------------------------------- the Go template

# JSON with the spaces of Python's json.dumps, and without Go's escapes of <, > and &: byte by byte, as Go's templates
# have neither regular expressions nor a way to add functions.
_JSON = r"""
{{- define "json" }}{{ template "outside" json . }}{{ end }}
{{- define "outside" }}{{ if . }}{{ $c := slice . 0 1 }}{{ $c }}
{{- if eq $c "\"" }}{{ template "inside" slice . 1 }}{{ else }}
{{- if or (eq $c ",") (eq $c ":") }}{{ " " }}{{ end }}{{ template "outside" slice . 1 }}{{ end }}{{ end }}{{ end }}
{{- define "inside" }}{{ $c := slice . 0 1 }}{{ if eq $c "\\" }}{{ $e := slice . 0 2 }}{{ if eq $e "\\u" }}
{{- $u := slice . 0 6 }}{{ if eq $u "\\u003c" }}<{{ else if eq $u "\\u003e" }}>{{ else if eq $u "\\u0026" }}&
{{- else if eq $u "\\u2028" }}{{ "\u2028" }}{{ else if eq $u "\\u2029" }}{{ "\u2029" }}
{{- else if eq $u "\\u0008" }}\b{{ else if eq $u "\\u000c" }}\f{{ else }}{{ $u }}{{ end }}
{{- template "inside" slice . 6 }}{{ else }}{{ $e }}{{ template "inside" slice . 2 }}{{ end }}
{{- else }}{{ $c }}{{ if eq $c "\"" }}{{ template "outside" slice . 1 }}
{{- else }}{{ template "inside" slice . 1 }}{{ end }}{{ end }}{{ end }}
"""
_TOOLS = r"""
{{- define "tool" }}{"type": {{ template "json" .Type }}, "function": {"name": {{ template "json" .Function.Name }}
{{- with .Function.Description }}, "description": {{ template "json" . }}{{ end }}
{{- with .Function.Parameters }}{{ if .Type }}, "parameters": {"type": {{ template "json" .Type }}
{{- with .Defs }}, "$defs": {{ template "json" . }}{{ end }}, "properties": {{ "{" }}{{ $comma := "" }}
{{- range $name, $property := .Properties }}{{ $comma }}{{ template "json" $name }}: {{ template "json" $property }}
{{- $comma = ", " }}{{ end }}{{ "}" }}{{ with .Required }}, "required": {{ template "json" . }}{{ end }}{{ "}" }}
{{- end }}{{ end }}{{ "}}" }}{{ end }}
"""


def go_template(wording: Wording) -> str:
    """Go's text/template of a wording, for the variables that Ollama hands over."""
    tools = (True, True) in wording.openings
    begins = wording.begins
    lines = [
        _JSON + _TOOLS if tools else "",
        _UNLED if any(wording.unled) else "",
        '{{- $question := len .Messages }}{{ $system := "" }}{{ $begins := false }}{{ $last := "" }}',
        '{{- range $i, $m := .Messages }}{{ if eq .Role "user" }}{{ $question = $i }}{{ end }}',
        '{{- if and (eq .Role "system") (not $i) }}{{ $system = .Content }}{{ $begins = true }}{{ end }}{{ end }}',
        "{{- if $begins }}" + _go_opening(wording, True, tools),
        "{{- else }}" + _go_opening(wording, False, tools) + "{{ end }}",
        "{{- range $i, $m := .Messages }}",
        '{{- if eq .Role "tool" }}{{ if ne $last "tool" }}' + _go(f"{START}user") + "{{ end }}",
        _line(f"\n{Hermes.RESULT[0]}") + "{{ .Content }}" + _go(Hermes.RESULT[1]),
        '{{- else }}{{ if eq $last "tool" }}' + _go(f"{END}\n") + "{{ end }}",
        '{{- if eq .Role "assistant" }}' + _go(f"{START}assistant\n"),
        *_go_reply(wording, tools),
        '{{- else if or $i (ne .Role "system") }}' + _go(START) + "{{ .Role }}" + _go("\n"),
        "{{- .Content }}" + _go(f"{END}\n") + "{{ end }}",
        "{{- end }}{{ $last = .Role }}{{ end }}",
        '{{- if eq $last "tool" }}' + _go(f"{END}\n") + "{{ end }}" + _go(f"{START}assistant\n"),
    ]
    if len(set(begins.values())) > 1:
        lines += [
            "{{- if not .IsThinkSet }}" + _go(begins[None]),
            "{{- else if .Think }}" + _go(begins[True]) + "{{ else }}" + _go(begins[False]) + "{{ end }}",
        ]
    else:
        lines[-1] += _go(begins[None])
    return "\n".join(line.strip("\n") for line in lines if line)


def _go_opening(wording: Wording, system: bool, tools: bool) -> str:
    several = '{{ range $i, $t := .Tools }}{{ if $i }}{{ "\\n" }}{{ end }}{{ template "tool" . }}{{ end }}'
    holes = {_SYSTEM_HERE: "{{ $system }}", _TOOLS_HERE: several}
    with_tools, without = (
        "".join(holes.get(part) or _go(part) for part in wording.openings[system, offered])
        for offered in (tools, False)
    )
    return "{{ if .Tools }}" + with_tools + "{{ else }}" + without + "{{ end }}" if tools else without


def _go_reply(wording: Wording, tools: bool) -> list[str]:
    """From after the role to the end of the turn. Ollama finds the tags of thoughts and calls in bare text around
    `.Thinking` and in the first below `.ToolCalls`."""
    lines = []
    for late in (False, True):
        place = "gt $i $question" if late else "not (gt $i $question)"
        block = f"{THINK}\n{{{{ .Thinking }}}}\n{END_THINK}\n\n{{{{ end }}}}"
        if wording.thinks[late] == "always":
            lines.append("{{- if " + place + " }}" + block)
        elif wording.thinks[late] == "given":
            lines.append("{{- if and .Thinking (" + place + ") }}" + block)
    if any(wording.unled):
        places = [
            f"({'' if late else 'not '}(gt $i $question))" for late in (False, True) if wording.unled[late]
        ]
        lines.append("{{- if or " + " ".join(places) + ' }}{{ template "unled" .Content }}')
        lines.append("{{- else }}{{ .Content }}{{ end }}")
    else:
        lines.append("{{- .Content }}")
    if tools:
        lines += [
            "{{- if and $m.Content $m.ToolCalls }}" + _go(wording.between) + "{{ end }}",
            *_go_calls(wording),
        ]
    return [*lines, _line(f"{END}\n")]


_UNLED = r"""
{{- define "unled" }}{{ if and (ge (len .) 1) (eq (printf "%.1s" .) "\n") }}{{ template "unled" slice . 1 }}
{{- else }}{{ . }}{{ end }}{{ end }}
"""


def _go_calls(wording: Wording) -> list[str]:
    between = '{{ if ne (len (slice $m.ToolCalls $j)) 1 }}{{ "\\n" }}{{ end }}{{ end }}{{ end }}'
    each = "{{- if .ToolCalls }}{{ range $j, $call := .ToolCalls }}"
    if not isinstance(wording.dialect, Xml):
        arguments = '{{ if .Function.Arguments }}{{ template "json" .Function.Arguments }}{{ else }}{{ "{}" }}{{ end }}'
        begin, middle, end = Hermes.CALL
        return [each + begin + "{{ .Function.Name }}" + middle + arguments + end + between]
    words = (
        {"bool": "{{ if $v }}True{{ else }}False{{ end }}", "<nil>": "None"}
        if wording.dialect.python_words
        else {}
    )
    kinds = "".join('{{ else if eq $kind "' + kind + '" }}' + word for kind, word in words.items())
    return [
        each + f"{OPEN}\n{OPEN_FUNCTION}{{{{ .Function.Name }}}}>" + _go("\n"),
        '{{- range $k, $v := .Function.Arguments }}{{ $kind := printf "%T" $v }}'
        + OPEN_PARAMETER
        + "{{ $k }}>"
        + _go("\n"),
        '{{- if eq $kind "string" }}{{ $v }}' + kinds + '{{ else }}{{ template "json" $v }}{{ end }}',
        "{{- "
        + _go(f"\n{CLOSE_PARAMETER}\n")[3:]
        + "{{ end }}"
        + _go(f"{CLOSE_FUNCTION}\n{CLOSE}")
        + between,
    ]


def _line(text: str) -> str:
    """The same at the beginning of a line."""
    return "{{-" + _go(text)[2:]


def _go(text: str) -> str:
    """A Go action that writes a text: in it nothing is trimmed, and Ollama drops no character that does not print."""
    if not text:
        return ""
    shown = {'"': '\\"', "\\": "\\\\", "\n": "\\n"}
    written = "".join(
        shown.get(c)
        or (c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 65536 else f"\\U{ord(c):08x}")
        for c in text
    )
    return '{{ "' + written + '" }}'


# ------------------------------------------------------------------------------------------------ the Modelfile


def modelfile(
    wording: Wording, gguf: str, sampling: SamplingDefaults, stops: Sequence[str], longest: int
) -> str:
    """FROM, TEMPLATE, PARAMETERs; `longest`: positions that the model has."""
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{go_template(wording)}"""']
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    values = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": int(sampling.top_k),
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "num_ctx": min(longest, _CONTEXT),
    }
    lines += [f"PARAMETER {name} {value}" for name, value in values.items()]
    if isinstance(wording.dialect, Xml):
        lines.append(f"PARSER {'qwen3.5' if THINK in ''.join(wording.begins.values()) else 'qwen3-coder'}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text else f'"{text}"'


def model_name(text: str) -> str:
    """A name that Ollama takes for a model, near to `text`."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-")[:80] or "model"
