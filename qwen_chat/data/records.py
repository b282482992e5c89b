"""Data files -> conversations: every line checked at once, then read again one at a time.

In: paths of `.json`, `.jsonl` or `.jsonl.gz` files (UTF-8, with or without BOM, blank lines allowed).
Out: `Records`, a sequence of Conversation behind a byte-offset index (28 bytes a line, whatever it holds),
and a `DataReport`: what kinds of record were found, every problem as `file:line: message`, and counts of what
is suspicious but usable (duplicates, contradictions, control tokens typed in text).

Four kinds of record are told apart by their keys, all other keys (`type`, `source`, ...) are ignored:

    openai             {"messages": [...], "tools": [...], "parallel_tool_calls": true}
    sharegpt           {"conversations": [{"from": "human", "value": ...}, ...], "system": ..., "tools": ...}
    alpaca             {"instruction": ..., "input": ..., "output": ..., "history": [[q, a], ...]}
    prompt_completion  {"prompt": ..., "completion": ...}, each text or a list of messages

No tokenizer and no torch. Nothing here writes to a data file; any bytes give problems, never a traceback.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import stat
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal, NoReturn, cast, overload

import numpy as np

from qwen_chat.conversation import Conversation, Json, Message, ToolCall
from qwen_chat.errors import DataError, FormatError, Problem
from qwen_chat.tools.validate import call_problem

OnError = Literal["stop", "skip"]
LONGEST_LINE = 256 * 2**20  # bytes; a longer one is a damaged file, and would not fit in memory as objects
_SAID = ("system", "user", "tool")  # a message of these is nothing without its content
DEEPEST = 64  # levels of nesting in tools and arguments: beyond it, templates and schemas run out of stack
_TOO_DEEP = f"nested too deeply to be read; expected at most {DEEPEST} levels"
_CONTROL = re.compile(r"<\|(?:im_start|im_end|endoftext)\|>")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MASK = 2**64 - 1
_CHUNK = 1 << 12  # hashes that are compared at once

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


# ---------------------------------------------------------------- what is found


@dataclass(frozen=True, slots=True)
class DataReport:
    """What one pass over the files found. `lines` are those that are not blank; `skipped` those left out."""

    files: tuple[str, ...]
    lines: int
    conversations: int
    kinds: Mapping[str, int]
    skipped: int
    problems: tuple[Problem, ...]  # at most `limit`; `problem_total` counts all
    problem_total: int
    duplicates: int  # conversations that say exactly what an earlier one says
    contradictions: int  # same prompt as an earlier one, another last reply
    control_tokens: int  # conversations with <|im_start|>, <|im_end|> or <|endoftext|> typed in their text
    notes: tuple[Problem, ...] = ()  # examples of the last three

    def describe(self) -> str:
        """A few lines for a person."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items())
        lines = [f"{_count(self.conversations, 'conversation')} in {', '.join(self.files)} ({kinds})"]
        if self.skipped:
            problems = _count(self.problem_total, "problem")
            lines.append(f"left out {self.skipped:,} of {_count(self.lines, 'line')} ({problems}):")
            lines.extend(f"  {problem}" for problem in self.problems)
            if self.problem_total > len(self.problems):
                lines.append(f"  ... and {self.problem_total - len(self.problems):,} more")
        for count, what in (
            (self.duplicates, "saying exactly what an earlier one says"),
            (self.contradictions, "with the prompt of an earlier one and another reply"),
            (self.control_tokens, "with a control token typed in the text; it stays text"),
        ):
            if count:
                lines.append(f"note: {_count(count, 'conversation')} {what}")
        lines.extend(f"  {note}" for note in self.notes)
        return "\n".join(lines)

    def to_json(self) -> Json:
        """Plain values for `--json`."""
        plain: Json = {name: getattr(self, name) for name in self.__slots__}
        plain["files"], plain["kinds"] = list(self.files), dict(self.kinds)
        plain["problems"] = [str(problem) for problem in self.problems]
        plain["notes"] = [str(note) for note in self.notes]
        return plain


class Records(Sequence[Conversation]):
    """The good conversations of the files, in order; each is read from disk when it is asked for."""

    def __init__(
        self, sources: Sequence[_Source], index: _Index, report: DataReport, on_error: OnError
    ) -> None:
        self._sources = tuple(sources)
        self._index = index
        self.report = report
        self.on_error = on_error

    def __len__(self) -> int:
        return len(self._index.offsets)

    @overload
    def __getitem__(self, i: int) -> Conversation: ...
    @overload
    def __getitem__(self, i: slice) -> list[Conversation]: ...
    def __getitem__(self, i: int | slice) -> Conversation | list[Conversation]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return self._read(range(len(self))[i])

    def _read(self, i: int) -> Conversation:
        source = self._sources[self.file_of(i)]
        try:
            text = source.record_at(self._index.offsets[i], self.size_of(i))
            return read_record(source.parse(text))[1]
        except (FormatError, ValueError, RecursionError):
            raise DataError(f"{self.where(i)}: the file changed after it was checked; start again") from None

    def file_of(self, i: int) -> int:
        """Which of the files, in the order they were given, conversation `i` comes from."""
        return bisect_right(self._index.starts, i) - 1

    def where(self, i: int) -> str:
        """`file:line` of conversation `i`."""
        return f"{self._sources[self.file_of(i)].name}:{self._index.lines[i]}"

    def size_of(self, i: int) -> int:
        """At most so many bytes does conversation `i` take in its file (uncompressed)."""
        file = self.file_of(i)
        last = i + 1 == self._index.starts[file + 1]
        end = self._sources[file].size if last else self._index.offsets[i + 1]
        return end - self._index.offsets[i]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the files' content, whatever their names (hex)."""
        together = hashlib.sha256()
        for source in self._sources:
            together.update(source.digest())
        return together.hexdigest()

    def ensure_unchanged(self) -> None:
        """Raise DataError where a file was written to after it was checked."""
        for source in self._sources:
            source.ensure_unchanged()


def open_records(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    on_error: OnError = "stop",
    limit: int = 20,
) -> Records:
    """Check every line of the files; raise DataError with all problems (`limit` are listed), or skip them.

    A file that is missing, unreadable or holds nothing is a DataError under either `on_error`.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not given:
        raise DataError("no data file was given; name at least one .jsonl, .json or .jsonl.gz file")
    sources = [_Source(Path(path), name) for path, name in zip(given, _names(given), strict=True)]
    scan = _Scan(limit=limit)
    empty = [source.name for source in sources if not scan.file(source)]
    report = scan.report([source.name for source in sources])
    if report.problem_total and (on_error == "stop" or not report.conversations):
        found = _count(report.problem_total, "problem")
        raise DataError(
            f"{found} in {report.skipped:,} of {_count(report.lines, 'line')}; "
            "correct them, or leave these lines out with --on_error skip",
            report.problems,
            report.problem_total,
        )
    if empty:
        raise DataError(f"{', '.join(empty)}: empty; expected at least one conversation")
    return Records(sources, scan.index, report, on_error)


# ---------------------------------------------------------------- one record


def read_record(record: object) -> tuple[str, Conversation]:
    """The kind of a parsed record and its conversation; FormatError says what is wrong with it."""
    if not isinstance(record, Mapping):
        raise FormatError(f"{_shape(record)}; expected one JSON object, a conversation")
    if "messages" in record:
        return "openai", _conversation(record, record["messages"])
    if "conversations" in record:
        return "sharegpt", _conversation(record, _from_sharegpt(record))
    if "instruction" in record:
        return "alpaca", _conversation(record, _from_alpaca(record))
    if "prompt" in record and "completion" in record:
        return "prompt_completion", _conversation(record, _from_prompt(record))
    keys = ", ".join(repr(key) for key in list(record)[:8]) or "no keys"
    raise FormatError(
        f"no conversation among {keys}; "
        "expected 'messages', 'conversations', 'instruction', or 'prompt' and 'completion'"
    )


def check(conversation: Conversation) -> list[str]:
    """Everything that keeps a conversation from being learnt: `field: found; expected`."""
    found = _check_order(conversation.messages)
    if not found:
        found = _check_results(conversation.messages)
    for k, message in enumerate(conversation.messages):
        learnt = message.role == "assistant" and message.train is not False
        if learnt and not message.tool_calls and not message.content.strip():
            found.append(f"message {k} is an empty reply; expected text or tool_calls")
    found.extend(_check_calls(conversation))
    return found


def _conversation(record: Mapping[str, Any], messages: object) -> Conversation:
    for k, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, Mapping) and "content" not in message and message.get("role") in _SAID:
            keys = ", ".join(repr(key) for key in list(message)[:8]) or "no keys"
            raise FormatError(f"message {k}: no 'content' among {keys}; expected text")
    tools = record.get("tools")
    return Conversation.from_openai(
        {
            "messages": messages,
            "tools": _tools(tools) if tools else None,
            "parallel_tool_calls": record.get("parallel_tool_calls"),
        }
    )


def _tools(tools: object) -> object:
    """OpenAI's list; also its JSON text (ShareGPT files), and functions without their wrapper."""
    if isinstance(tools, str):
        try:
            tools = _strict(tools)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"tools: text that is no JSON ({error}); expected a list of tools") from None
    if not isinstance(tools, list):
        return tools
    return [
        {"type": "function", "function": tool} if isinstance(tool, dict) and "function" not in tool else tool
        for tool in tools
    ]


def _from_sharegpt(record: Mapping[str, Any]) -> object:
    turns = record["conversations"]
    if not isinstance(turns, list):
        return turns
    if turns and isinstance(turns[0], dict) and "role" in turns[0]:
        return turns  # OpenAI's messages under ShareGPT's name
    messages: list[Json] = _system(record)
    for k, turn in enumerate(turns):
        message = _sharegpt_message(turn, k)
        if "tool_calls" in message and messages and messages[-1].get("tool_calls"):
            messages[-1]["tool_calls"] += message["tool_calls"]  # one call a turn there, one reply here
        else:
            messages.append(message)
    return messages


def _sharegpt_message(turn: object, k: int) -> Json:
    where = f"conversations[{k}]"
    if not isinstance(turn, Mapping) or "value" not in turn:
        raise FormatError(f"{where}: {_shape(turn)}; expected an object with 'from' and 'value'")
    origin = turn.get("from")
    role = SHAREGPT_ROLES.get(origin) if isinstance(origin, str) else None
    if role is None:
        raise FormatError(f"{where}: from {origin!r}; expected one of {', '.join(SHAREGPT_ROLES)}")
    message: Json = {"role": role, "content": turn["value"]}
    if origin == "function_call":
        message = {"role": role, "content": "", "tool_calls": _sharegpt_calls(turn["value"], where)}
    return message | {key: turn[key] for key in ("train", "weight") if key in turn}


def _sharegpt_calls(value: object, where: str) -> list[Json]:
    if isinstance(value, str):
        try:
            value = _strict(value)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{where}: function_call is no JSON ({error}); expected a call") from None
    calls = value if isinstance(value, list) else [value]
    return [{"type": "function", "function": call} for call in calls]


def _from_alpaca(record: Mapping[str, Any]) -> list[Json]:
    messages = _system(record)
    history = record.get("history") or []
    if not isinstance(history, list) or any(not isinstance(p, list) or len(p) != 2 for p in history):
        raise FormatError("history: no list of pairs; expected [[question, answer], ...]")
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question, extra = record["instruction"], record.get("input") or ""
    if not isinstance(question, str) or not isinstance(extra, str):
        raise FormatError("instruction and input: expected text")
    if "output" not in record:
        raise FormatError("no 'output' beside 'instruction'; expected the reply")
    messages.append({"role": "user", "content": f"{question}\n{extra}" if extra else question})
    messages.append({"role": "assistant", "content": record["output"]})
    return messages


def _from_prompt(record: Mapping[str, Any]) -> list[Any]:
    prompt, completion = record["prompt"], record["completion"]
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    after = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    return [*_system(record), *before, *after]


def _system(record: Mapping[str, Any]) -> list[Json]:
    system = record.get("system")
    return [{"role": "system", "content": system}] if system else []


# ---------------------------------------------------------------- checks of one conversation


def _check_order(messages: Sequence[Message]) -> list[str]:
    """The first message that cannot stand where it stands; the rest would only repeat it."""
    previous = ""
    for k, message in enumerate(messages):
        allowed = _FOLLOWS[previous]
        if message.role not in allowed:
            after = f" after '{previous}'" if previous else ", the first one"
            return [f"message {k} is '{message.role}'{after}; expected {' or '.join(map(repr, allowed))}"]
        previous = message.role
    if previous != "assistant":
        last = len(messages) - 1
        return [f"message {last}, the last one, is '{previous}'; expected 'assistant', a reply to learn"]
    return []


_FOLLOWS: dict[str, tuple[str, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _check_results(messages: Sequence[Message]) -> list[str]:
    """Results answer calls one to one, in the calls' order: order alone links them in the rendered text."""
    found = []
    for k, message in enumerate(messages):
        if message.role != "assistant" or k + 1 == len(messages):
            continue
        results: list[Message] = []
        while k + 1 + len(results) < len(messages) and messages[k + 1 + len(results)].role == "tool":
            results.append(messages[k + 1 + len(results)])
        if len(results) != len(message.tool_calls):
            found.append(
                f"message {k} has {_count(len(message.tool_calls), 'tool call')} and "
                f"{_count(len(results), 'result')} after it; "
                "expected one 'tool' message for each call, in order"
            )
            continue
        found.extend(_check_links(k, message.tool_calls, results))
    return found


def _check_links(k: int, calls: Sequence[ToolCall], results: Sequence[Message]) -> list[str]:
    found = []
    identities = [call.id for call in calls if call.id is not None]
    if len(set(identities)) < len(identities):
        found.append(f"message {k}: two tool_calls have the same id; expected an id of its own for each")
    for i, (call, result) in enumerate(zip(calls, results, strict=True)):
        where = f"message {k + 1 + i}"
        if call.id is not None and result.tool_call_id is not None and call.id != result.tool_call_id:
            known = result.tool_call_id in identities
            cure = "put the results in the calls' order" if known else "correct the id"
            found.append(f"{where}: tool_call_id {result.tool_call_id!r}; expected {call.id!r}; {cure}")
        elif result.name is not None and result.name != call.name:
            found.append(f"{where}: result of {result.name!r}; expected that of call {i}, {call.name!r}")
    return found


def _check_calls(conversation: Conversation) -> list[str]:
    """Calls of tools that were offered, with arguments that are valid under the tool's JSON Schema."""
    tools = conversation.tools
    if _depth_beyond(tools, DEEPEST):
        return [f"tools: nested more than {DEEPEST} levels deep; expected a flatter schema"]
    names = Counter(tool["function"]["name"] for tool in tools)
    found = [
        f"tools: {count} tools are called {n!r}; expected one" for n, count in names.items() if count > 1
    ]
    for k, message in enumerate(conversation.messages):
        for i, call in enumerate(message.tool_calls):
            problem = _check_call(call, tools)
            if problem is not None:
                found.append(f"message {k}: tool_calls[{i}]: {problem}")
    return found


def _check_call(call: ToolCall, tools: Sequence[Json]) -> str | None:
    try:
        arguments = _strict(call.arguments)
    except ValueError as error:
        return f"arguments: {error}"
    if _depth_beyond(arguments, DEEPEST):
        return f"arguments nested more than {DEEPEST} levels deep; expected a flatter object"
    try:
        return call_problem(call, tools)
    except Exception as error:  # a schema is a program: a broken pattern or "multipleOf": 0 raises anything
        return f"the schema of {call.name!r} cannot be used ({type(error).__name__}: {error}); correct it"


def _depth_beyond(value: object, levels: int) -> bool:
    """Whether lists and objects are nested more than `levels` deep: level after level, without recursion."""
    level = [value] if isinstance(value, (list, tuple, dict)) else []
    for _ in range(levels):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (list, tuple, dict))
        ]
    return bool(level)


# ---------------------------------------------------------------- one pass over the files


@dataclass(slots=True)
class _Index:
    """Where each good conversation is: 12 bytes a line (and 16 more for two hashes during the pass)."""

    offsets: array[int] = field(default_factory=lambda: array("Q"))
    lines: array[int] = field(default_factory=lambda: array("I"))
    starts: list[int] = field(default_factory=lambda: [0])  # first conversation of each file, and the end


class _Scan:
    """Collects the index, the problems and the counts, line after line."""

    def __init__(self, limit: int) -> None:
        self.index = _Index()
        self._limit = limit
        self._prompts, self._wholes = array("Q"), array("Q")
        self._kinds: Counter[str] = Counter()
        self._problems: list[Problem] = []
        self._notes: list[Problem] = []
        self._names: list[str] = []
        self._problem_total = self._lines = self._skipped = self._control = 0

    def file(self, source: _Source) -> int:
        """Read one file; how many records it has, good or bad."""
        before = self._lines
        self._names.append(source.name)
        for offset, line, raw in source.records():
            self._lines += 1
            self._record(source, offset, line, raw)
        self.index.starts.append(len(self.index.offsets))
        return self._lines - before

    def _record(self, source: _Source, offset: int, line: int, raw: bytes | _Defect) -> None:
        try:
            if isinstance(raw, _Defect):
                raise raw
            text = source.decode(raw)
            record = source.parse(text)
            kind, identity, found = _judge(record, text)
        except FormatError as error:
            found = [str(error)]
        except RecursionError:
            found = [_TOO_DEEP]
        if found:
            self._skipped += 1
            self._problem_total += len(found)
            room = max(self._limit - len(self._problems), 0)
            where = f"{source.name}:{line}"
            self._problems.extend(Problem(where, _one_line(message)) for message in found[:room])
            return
        self._kinds[kind] += 1
        self.index.offsets.append(offset)
        self.index.lines.append(line)
        self._prompts.append(hash(identity[:-1]) & _MASK)
        self._wholes.append(hash(identity) & _MASK)
        if ("<|" in text or "\\u00" in text) and _has_control(identity):
            self._control += 1
            if self._control <= 3:
                self._notes.append(Problem(f"{source.name}:{line}", "control token typed in the text"))

    def report(self, files: Sequence[str]) -> DataReport:
        same, twins = _repeats(self._wholes)
        prompts, rivals = _repeats(self._prompts, self._wholes)
        notes = [self._pair(pair, "says exactly what {} says") for pair in twins]
        notes += [self._pair(pair, "has the prompt of {} and another reply") for pair in rivals]
        return DataReport(
            files=tuple(files),
            lines=self._lines,
            conversations=len(self.index.offsets),
            kinds=dict(self._kinds),
            skipped=self._skipped,
            problems=tuple(self._problems),
            problem_total=self._problem_total,
            duplicates=same,
            contradictions=prompts - same,
            control_tokens=self._control,
            notes=(*notes, *self._notes),
        )

    def _pair(self, pair: tuple[int, int], what: str) -> Problem:
        first, later = (
            f"{self._names[bisect_right(self.index.starts, i) - 1]}:{self.index.lines[i]}" for i in pair
        )
        return Problem(later, what.format(first))


def _judge(record: object, text: str) -> tuple[str, tuple[Any, ...], list[str]]:
    """Kind, identity and problems of one parsed line."""
    surrogates = "\\u" in text and _ESCAPED_SURROGATE.search(text) is not None
    identity = _plain_identity(record)
    if identity is not None and not surrogates:
        return "openai", identity, []
    kind, conversation = read_record(record)
    found = check(conversation)
    if surrogates and not _encodable(conversation):
        found.append("half of a surrogate pair (\\ud800 to \\udfff); expected whole characters; remove it")
    return kind, _identity(conversation), found


def _plain_identity(record: object) -> tuple[Any, ...] | None:
    """The identity of the commonest record (no tools, role and content only) if it is good, else None.

    Three times as fast as building the Conversation and checking that; `_identity` gives the same value.
    """
    if type(record) is not dict or record.get("tools"):
        return None
    messages = record.get("messages")
    if type(messages) is not list:
        return None
    identity: list[Any] = [""]
    expected = "user"
    for message in messages:
        if type(message) is not dict or len(message) != 2:
            return None
        role, content = message.get("role"), message.get("content")
        if type(content) is not str:
            return None
        if role == expected:
            if role == "assistant" and (not content or content.isspace()):
                return None
            expected = "assistant" if role == "user" else "user"
        elif role != "system" or len(identity) > 1:
            return None
        identity += (role, content)
    return tuple(identity) if expected == "user" and identity[-2:-1] == ["assistant"] else None


def _identity(conversation: Conversation) -> tuple[Any, ...]:
    """What a conversation says: tools, then role and text in turn, the last item being the last reply.

    Ids of calls and `train` marks are left out: they are not rendered.
    """
    tools = json.dumps(conversation.tools, ensure_ascii=False) if conversation.tools else ""
    identity: list[Any] = [tools]
    for message in conversation.messages:
        said: Any = message.content
        if message.tool_calls or message.reasoning:
            calls = tuple((call.name, call.arguments) for call in message.tool_calls)
            said = (message.content, message.reasoning, calls)
        identity += (message.role, said)
    return tuple(identity)


def _has_control(identity: tuple[Any, ...]) -> bool:
    return any(_CONTROL.search(item if isinstance(item, str) else repr(item)) for item in identity)


def _encodable(conversation: Conversation) -> bool:
    """Whether every text is valid Unicode, arguments included (JSON text that is decoded later)."""
    plain = conversation.to_openai()
    plain["arguments"] = [
        json.loads(call.arguments) for message in conversation.messages for call in message.tool_calls
    ]
    try:
        json.dumps(plain, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _repeats(
    hashes: array[int], different: array[int] | None = None, examples: int = 3
) -> tuple[int, list[tuple[int, int]]]:
    """How many hashes repeat an earlier one, and some pairs (where `different` differs, if it is given)."""
    values = np.frombuffer(hashes, dtype=np.uint64)
    others = None if different is None else np.frombuffer(different, dtype=np.uint64)
    order = np.argsort(values)
    count = 0
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(order) - 1, _CHUNK):
        window = order[start : start + _CHUNK + 1]
        same = values[window[1:]] == values[window[:-1]]
        count += int(same.sum())
        if others is not None:
            same &= others[window[1:]] != others[window[:-1]]
        found = np.flatnonzero(same)[: examples - len(pairs)]
        pairs += [(int(min(window[k : k + 2])), int(max(window[k : k + 2]))) for k in found]
    return count, sorted(pairs)


# ---------------------------------------------------------------- one file


class _Defect(FormatError):
    """Bytes that are no JSON object of ours."""


def _no_repeats(pairs: list[tuple[str, Any]]) -> Json:
    plain = dict(pairs)
    if len(plain) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _Defect(f"key {twice!r} appears twice in one object; expected once")
    return plain


def _no_constant(name: str) -> NoReturn:
    raise _Defect(f"{name} is no JSON number; expected a number, text or null")


def _finite(digits: str) -> float:
    value = float(digits)
    return _no_constant(digits[:20]) if value in (float("inf"), float("-inf")) else value


_DECODER = json.JSONDecoder(object_pairs_hook=_no_repeats, parse_constant=_no_constant, parse_float=_finite)
_SHAPE = json.JSONDecoder(parse_int=len, parse_float=len)  # where a value ends; any number will do
_SPACE = re.compile(r"[ \t\n\r]*")


def _after_space(text: str, at: int) -> int:
    """Where the white space of JSON that begins at `at` ends."""
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _strict(text: str) -> Any:
    """JSON that stands as text inside a record, under the rules of the record itself: ValueError says why not."""
    try:
        return _DECODER.decode(text)
    except _Defect as defect:
        raise ValueError(str(defect)) from None


class _Source:
    """One data file, opened once: its records in order, or one at an offset (safe in threads and forks)."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._stream = _open(path, name)
        self._state = _state(self._stream)
        self._document = path.name.removesuffix(".gz").endswith(".json") and not self._is_lines()

    def __reduce__(self) -> tuple[type[_Source], tuple[Path, str]]:
        return _Source, (self.path, self.name)

    def records(self) -> Iterator[tuple[int, int, bytes | _Defect]]:
        """Byte offset, line number and bytes of every record that is not blank, or what is wrong there."""
        yield from self._elements() if self._document else self._lines()

    @property
    def size(self) -> int:
        """Bytes of the content (uncompressed)."""
        return self._state[0]

    def record_at(self, offset: int, size: int) -> str:
        """The text of the record that begins at `offset` and is at most `size` bytes long."""
        blocks = _blocks_at(self._stream.fileno(), offset, size)
        if self._document:
            return b"".join(blocks).decode("utf-8", "replace")
        pieces = []
        for block in blocks:  # up to the end of the line: bad lines that were left out may follow
            head, newline, _ = block.partition(b"\n")
            pieces.append(head)
            if newline:
                break
        return self.decode(b"".join(pieces))

    @staticmethod
    def decode(raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            found = f"byte 0x{raw[error.start]:02x} at position {error.start} is no UTF-8"
            utf16 = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
            cure = "the file looks like UTF-16; save it as UTF-8" if utf16 else "expected UTF-8"
            raise _Defect(f"{found}; {cure}") from None

    def parse(self, text: str) -> Any:
        """The one JSON value in `text`; anything else than JSON's own rules allow is a FormatError."""
        try:
            value, end = _DECODER.raw_decode(text, _after_space(text, 0))
        except json.JSONDecodeError as error:
            raise _Defect(_no_json(text, error)) from None
        except ValueError as error:  # an integer of more than 4,300 digits
            raise _Defect(f"no JSON that can be read ({error}); expected ordinary numbers") from None
        if not self._document and (extra := text[_after_space(text, end) :]):
            raise _Defect(f"{extra[:20]!r} after the end of the object; expected one JSON object a line")
        return value

    def digest(self) -> bytes:
        """SHA-256 of the content (uncompressed)."""
        digest, offset = hashlib.sha256(b"document" if self._document else b"lines"), 0
        while block := os.pread(self._stream.fileno(), 1 << 20, offset):
            digest.update(block)
            offset += len(block)
        return digest.digest()

    def ensure_unchanged(self) -> None:
        if _state(self._stream) != self._state:
            raise DataError(f"{self.name}: was written to while it was being read; start again")

    def _is_lines(self) -> bool:
        """A `.json` file whose first line is a whole object, with more after it, is really JSON lines."""
        self._stream.seek(0)
        first = self._stream.readline(LONGEST_LINE).removeprefix(b"\xef\xbb\xbf").strip()
        if not first.startswith(b"{") or not first.endswith(b"}") or not self._stream.read(1 << 16).strip():
            return False
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            return False
        return True

    def _lines(self) -> Iterator[tuple[int, int, bytes | _Defect]]:
        self._stream.seek(0)
        offset = 3 if self._stream.read(3) == b"\xef\xbb\xbf" else 0
        self._stream.seek(offset)
        number = 0
        while raw := self._stream.readline(LONGEST_LINE):
            number += 1
            start, offset = offset, offset + len(raw)
            if len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
                offset += _skip_line(self._stream)
                too_long = f"a line of more than {LONGEST_LINE:,} bytes; expected one conversation"
                yield start, number, _Defect(too_long)
            elif not raw.isspace():
                yield start, number, raw.rstrip(b"\r\n")

    def _elements(self) -> Iterator[tuple[int, int, bytes | _Defect]]:
        """The objects of a JSON document: one object, a list of them, or several one after another.

        Where the document itself is broken nobody can tell where the next object begins: reading ends there,
        and the defect says that the rest is left out.
        """
        self._stream.seek(0)
        raw = self._stream.read()
        try:
            text = self.decode(raw)
        except _Defect as defect:
            line = raw.count(b"\n", 0, _bad_byte(raw)) + 1
            yield 0, line, _Defect(f"{defect}; the whole file is left out")
            return
        at = _after_space(text, int(text.startswith("\ufeff")))
        is_list = text.startswith("[", at)
        at = _after_space(text, at + is_list)
        offset, line, done = 0, 1, 0
        more = at < len(text) and not (is_list and text[at] == "]")
        while more:
            offset += len(text[done:at].encode())
            line += text.count("\n", done, at)
            done = at
            try:
                end = _SHAPE.raw_decode(text, at)[1]
            except (json.JSONDecodeError, RecursionError) as error:
                stop = getattr(error, "pos", at)
                reason = _no_json(text, error) if isinstance(error, json.JSONDecodeError) else _TOO_DEEP
                yield offset, line + text.count("\n", at, stop), _Defect(reason + _rest(text, stop))
                return
            yield offset, line, text[at:end].encode()
            at = _after_space(text, end)
            more = at < len(text) if not is_list else text.startswith(",", at)
            at = _after_space(text, at + (is_list and more))
        if not is_list:
            return
        closed = text.startswith("]", at)
        at = _after_space(text, at + closed)
        cut = at == len(text)
        found = "the end" if cut else repr(text[at : at + 20])
        cure = "; the file was cut short, copy it again" if cut else ""
        reason = f"{found} within the list; expected ',' or ']'{cure}"
        if closed:
            reason = (
                f"{found} after the end of the list; expected one list a file; name each file by its own -d"
            )
        if not closed or not cut:
            where = line + text.count("\n", done, at)
            yield offset + len(text[done:at].encode()), where, _Defect(reason + _rest(text, at))


def _open(path: Path, name: str) -> IO[bytes]:
    """The file, or an unnamed temporary copy of what a .gz file holds; DataError where it cannot be read."""
    try:
        if path.is_dir():
            raise DataError(f"{name}: a folder; expected a .jsonl, .json or .jsonl.gz file")
        stream = path.open("rb")
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise DataError(f"{name}: no regular file; save the data in a file first")
        packed = stream.read(2) == b"\x1f\x8b"
        if path.suffix == ".gz" and not packed and os.fstat(stream.fileno()).st_size:
            raise DataError(f"{name}: no gzip data in it; expected what gzip writes, or a name without .gz")
        stream.seek(0)
        return _unpack(stream, name) if packed else stream
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DataError(f"{path}: cannot be read ({error})") from None


def _unpack(packed: IO[bytes], name: str) -> IO[bytes]:
    """Unpacked once: a record can then be read at its offset without reading all that stands before it."""
    plain = tempfile.TemporaryFile(prefix="qwen_chat-")  # noqa: SIM115 - it lives as long as its Source
    try:
        with packed, gzip.open(packed) as stream:
            while block := stream.read(1 << 20):
                plain.write(block)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name}: damaged gzip data ({error}); copy or pack the file again") from None
    plain.flush()
    return cast(IO[bytes], plain)


def _state(stream: IO[bytes]) -> tuple[int, int]:
    found = os.fstat(stream.fileno())
    return found.st_size, found.st_mtime_ns


def _skip_line(stream: IO[bytes]) -> int:
    """Read to the end of an endless line; the count of bytes passed over."""
    passed = 0
    while piece := stream.readline(1 << 20):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed


def _bad_byte(raw: bytes) -> int:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(raw)


def _rest(text: str, at: int) -> str:
    """What a defect of a document adds where a conversation may stand after it."""
    return "; what stands after it is left out" if "{" in text[at:] else ""


def _no_json(text: str, error: json.JSONDecodeError) -> str:
    """Where JSON stops being JSON, and what the file may be instead."""
    head = text.lstrip("\x00")
    if len(head) < len(text):
        count = _count(len(text) - len(head), "NUL byte")
        return f"{count} at the start; the file was damaged when it was written or copied; copy it again"
    found = repr(text[error.pos : error.pos + 20]) if error.pos < len(text.rstrip()) else "the end"
    hint = "; a list over several lines belongs in a .json file" if text.strip() == "[" else ""
    return f"no JSON: {error.msg} at column {error.colno}, found {found}; expected one JSON object{hint}"


def _names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """What the messages call each file: its name, or its path where two have the same name."""
    names = [Path(path).name for path in paths]
    return [
        _one_line(os.fspath(path) if names.count(name) > 1 else name)
        for path, name in zip(paths, names, strict=True)
    ]


def _one_line(message: str, longest: int = 500) -> str:
    """A message for a terminal: one line, no control characters or lone surrogates, not endless."""
    if len(message) > longest:
        message = f"{message[: longest - 100]} ... {message[-90:]}"
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


def _shape(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _blocks_at(descriptor: int, offset: int, size: int) -> Iterator[bytes]:
    """`size` bytes from `offset`, without moving the file's own position (threads and forks share that)."""
    while size and (block := os.pread(descriptor, min(size, 1 << 20), offset)):
        yield block
        offset, size = offset + len(block), size - len(block)
