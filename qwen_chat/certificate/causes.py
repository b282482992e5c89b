"""Why a server's prompt is another one than the model was trained with: faults tried on our own side until one fits.

In: the locked prompts, what was seen of the server's, the chat format. Out: `Finding`s. Each known fault is a way to
write all prompts; the one that explains most of the prompts that differ, and says nothing of those that agree, is the
likely cause. Where only the number of tokens is seen, it is the numbers that must fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

from qwen_chat.certificate.conversations import Example, user
from qwen_chat.certificate.lock import LockedPrompt
from qwen_chat.certificate.server import Seen
from qwen_chat.chat.format import ChatFormat
from qwen_chat.chat.template import END, START
from qwen_chat.conversation import Json
from qwen_chat.errors import FormatError

SYSTEM = f"{START}system\n"
OPENING = f"{START}assistant\n"
UNKNOWN = "no known cause"


@dataclass(frozen=True, slots=True)
class FirstDifference:
    """Where a prompt differs: the number of the conversation, the first byte, and both texts around it. `seen` is what
    the cause would write, where the server tells the number of tokens alone."""

    number: int
    byte: int
    before: str
    expected: str
    found: str
    seen: bool = True


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it was trained. `level`: "differs", or "warning" where only what somebody types can
    bring it about."""

    level: Literal["differs", "warning"]
    cause: str
    cure: str
    numbers: tuple[int, ...] = ()
    first: FirstDifference | None = None


def first_difference(
    number: int, expected: str, found: str, *, seen: bool = True, around: int = 40
) -> FirstDifference:
    """The first byte (of UTF-8) at which two texts differ, with what stands around it."""
    same = next((k for k, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    at = min(len(expected), len(found)) if same is None else same
    byte = len(expected[:at].encode())
    if same is not None:  # within a character the first bytes may be equal
        pair = zip(expected[at].encode(), found[at].encode(), strict=False)
        byte += next((k for k, (a, b) in enumerate(pair) if a != b), 0)
    return FirstDifference(
        number,
        byte,
        expected[max(0, at - around) : at],
        expected[at : at + around],
        found[at : at + around],
        seen,
    )


# ------------------------------------------------------------------------------------------------- known faults
# Each is a conversation changed, as a server changes it that has the fault.


def each_message(change: Callable[[Json], Json | None], example: Example) -> Example:
    changed = [change(dict(message)) for message in example.messages]
    return replace(example, messages=tuple(message for message in changed if message is not None))


def _stripped(strip: Callable[[str], str], message: Json) -> Json:
    return message | {"content": strip(message["content"])}


def without_key(key: str, message: Json) -> Json:
    return {name: value for name, value in message.items() if name != key}


def first_call_alone(message: Json) -> Json:
    return message | ({"tool_calls": message["tool_calls"][:1]} if message.get("tool_calls") else {})


def last_turns(count: int, example: Example) -> Example:
    """The system text and the last `count` turns, each from a user's message on."""
    asked = [k for k, message in enumerate(example.messages) if message["role"] == "user"]
    start = asked[-count] if len(asked) > count else 0
    head = example.messages[:1] if start and example.messages[0]["role"] == "system" else ()
    return replace(example, messages=(*head, *example.messages[start:]))


def system_to_user(example: Example) -> Example:
    head, *rest = example.messages
    if head["role"] != "system" or not rest or rest[0]["role"] != "user":
        return example
    merged = user(f"{head['content']}\n\n{rest[0]['content']}")
    return replace(example, messages=(merged, *rest[1:]))


def without_role(role: str, message: Json) -> Json | None:
    return None if message["role"] == role else message


def without_tool_turns(message: Json) -> Json | None:
    return None if message["role"] == "tool" or message.get("tool_calls") else message


Change = Callable[[Example], Example]
CHANGES: tuple[tuple[str, str, Change], ...] = (
    ("tools dropped", "the server renders without tools; turn its tool calling on (vLLM: --enable-auto-tool-choice)",
     lambda example: replace(example, tools=())),
    ("calls of earlier turns dropped", "its template does not write tool_calls; give it the trained one",
     partial(each_message, partial(without_key, "tool_calls"))),
    ("calls of earlier turns dropped", "its template does not write tool_calls; give it the trained one",
     partial(each_message, lambda m: None if m.get("tool_calls") else m)),
    ("text beside calls dropped", "it keeps the calls of an earlier turn and drops what was said with them",
     partial(each_message, lambda m: m | {"content": ""} if m.get("tool_calls") else m)),
    ("only the first of several calls kept", "its template writes one call a turn; give it the trained one",
     partial(each_message, first_call_alone)),
    ("results of tools dropped", "its template does not know the role 'tool'; give it the trained one",
     partial(each_message, partial(without_role, "tool"))),
    ("calls and results dropped", "its template knows no tools; give it the trained one",
     partial(each_message, without_tool_turns)),
    ("white space stripped", "it trims what people say; its template or its front does that",
     partial(each_message, partial(_stripped, str.strip))),
    ("white space stripped", "it trims what people say; its template or its front does that",
     partial(each_message, lambda m: m if m["role"] == "tool" else _stripped(str.strip, m))),
    ("white space stripped", "it trims what people say; its template or its front does that",
     partial(each_message, lambda m: _stripped(str.strip, m) if m["role"] == "user" else m)),
    ("white space stripped", "it trims what people say; its template or its front does that",
     partial(each_message, lambda m: _stripped(str.strip, m) if m["role"] == "assistant" else m)),
    ("white space stripped", "it trims what people say; its template or its front does that",
     partial(each_message, lambda m: _stripped(str.strip, m) if m["role"] == "tool" else m)),
    ("white space stripped", "it trims what people say; its template or its front does that",
     partial(each_message, partial(_stripped, str.rstrip))),
    ("white space stripped", "it trims what people say; its template or its front does that",
     partial(each_message, partial(_stripped, str.lstrip))),
    ("earlier turns dropped", "it keeps the last turns alone; look for a limit of its history",
     partial(last_turns, 1)),
    ("earlier turns dropped", "it keeps the last turns alone; look for a limit of its history",
     partial(last_turns, 2)),
    ("earlier turns dropped", "it keeps the last turns alone; look for a limit of its history",
     partial(last_turns, 3)),
    ("earlier thoughts dropped", "it does not pass reasoning_content on; look for the name that it knows",
     partial(each_message, partial(without_key, "reasoning_content"))),
    ("system text dropped", "its template knows no system role; give it the trained one",
     partial(each_message, partial(without_role, "system"))),
    ("system text moved into the question", "its template knows no system role; give it the trained one",
     system_to_user),
)  # fmt: skip


def for_web_pages(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False)
    for sign in "<>&'":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


Written = Callable[[Json], str]
# What is written otherwise: the arguments of calls, the tools, or both; as which text.
JSON_FAULTS: tuple[tuple[str, str, tuple[str, ...], Written], ...] = (
    ("arguments encoded twice", "it hands its template the arguments as text; newer versions parse them",
     ("arguments",), lambda value: json.dumps(json.dumps(value, ensure_ascii=False), ensure_ascii=False)),
    ("arguments encoded twice", "it hands its template the arguments as text; newer versions parse them",
     ("arguments",), lambda value: json.dumps(json.dumps(value))),
    ("keys of arguments reordered", "it sorts the keys of arguments; nothing can be set, train with sorted ones",
     ("arguments",), lambda value: json.dumps(value, ensure_ascii=False, sort_keys=True)),
    ("keys of arguments reordered", "it sorts the keys of arguments; nothing can be set, train with sorted ones",
     ("arguments",), lambda value: json.dumps({key: value[key] for key in sorted(value)}, ensure_ascii=False)),
    ("keys of tools reordered", "it sorts or normalises what tools say; send them as they arrive there",
     ("tools",), lambda value: json.dumps(value, ensure_ascii=False, sort_keys=True)),
    ("tools normalised", "send tools as it writes them: name, description, parameters, and a description in each",
     ("tools",), lambda value: json.dumps(_usual_order({"description": ""}, value), ensure_ascii=False)),
    ("tools normalised", "send tools as it writes them: name, description, parameters, and a description in each",
     ("tools",), lambda value: json.dumps(_usual_order({"description": None}, value), ensure_ascii=False)),
    ("keys of tools reordered", "it sorts or normalises what tools say; send them as they arrive there", ("tools",),
     lambda value: json.dumps(_usual_order({}, value), ensure_ascii=False)),
    ("keys of arguments and tools reordered", "it sorts the keys of all JSON; nothing can be set",
     ("arguments", "tools"), lambda value: json.dumps(value, ensure_ascii=False, sort_keys=True)),
    ("other characters than ASCII escaped", "its tojson writes \\u....; give it a template whose tojson does not",
     ("arguments", "tools"), json.dumps),
    ("other characters than ASCII escaped", "its tojson writes \\u....; give it a template whose tojson does not",
     ("arguments",), json.dumps),
    ("other characters than ASCII escaped", "its tojson writes \\u....; give it a template whose tojson does not",
     ("tools",), json.dumps),
    ("< > & ' escaped in JSON", "its tojson is made for web pages", ("arguments", "tools"), for_web_pages),
    ("JSON without spaces", "its tojson writes no space after : and ,; give it the trained template",
     ("arguments", "tools"), lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":"))),
    ("JSON without spaces", "its tojson writes no space after : and ,; give it the trained template",
     ("tools",), lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":"))),
    ("JSON without spaces", "its tojson writes no space after : and ,; give it the trained template",
     ("arguments",), lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":"))),
)  # fmt: skip


def _usual_order(filled: Json, tool: Json) -> Json:
    """A tool as a server writes it that reads it into a type of its own: name, description (where there is none,
    llama-server adds an empty one, vLLM null: `filled`), parameters."""
    function = filled | tool.get("function", {})
    known = [key for key in ("name", "description", "parameters", "strict") if key in function]
    ordered = {key: function[key] for key in (*known, *(key for key in function if key not in known))}
    return {**tool, "function": ordered}


def json_rewritten(where: tuple[str, ...], written: Written, entry: LockedPrompt) -> str:
    """A prompt with the JSON in it written otherwise."""
    values = list(entry.case.tools) if "tools" in where else []
    for message in entry.case.messages if "arguments" in where else ():
        values += [json.loads(call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    text = entry.prompt
    for value in values:
        plain = json.dumps(value, ensure_ascii=False)
        other = written(value)
        if value and plain != other and other not in text:
            text = text.replace(plain, other)
    return text


# What a fault makes of a locked prompt: its text, or the number of its tokens; None: the same.
Predict = Callable[[int], str | int | None]


class Suspects:
    """The known faults over the prompts of one certificate, and what was seen of a server's."""

    def __init__(self, entries: Sequence[LockedPrompt], seen: Sequence[Seen], fmt: ChatFormat | None) -> None:
        self.entries, self.seen, self.fmt = entries, seen, fmt
        self._counts: dict[str, tuple[int, ...]] = {}

    def state(self, k: int) -> Literal["same", "typed", "tokens", "other", "unseen"]:
        """How prompt k was seen. typed: but for control tokens that somebody typed; tokens: the text in others."""
        entry, seen = self.entries[k], self.seen[k]
        if seen.text is not None and seen.text != entry.prompt:
            return "other"
        if seen.ids is not None:
            if seen.ids == entry.ids:
                return "same"
            if seen.ids == entry.as_control:
                return "typed"
            return "tokens" if self.text(k) == entry.prompt else "other"
        if seen.text is not None:
            return "same"
        if seen.count is None:
            return "unseen"
        if seen.count == len(entry.ids):
            return "same"
        return "typed" if seen.count == len(entry.as_control) else "other"

    def text(self, k: int) -> str | None:
        """The server's prompt, as far as it is known."""
        seen = self.seen[k]
        if seen.text is None and seen.ids is not None and self.fmt is not None:
            try:
                return str(self.fmt.tokenizer.decode(list(seen.ids), clean_up_tokenization_spaces=False))
            except (OverflowError, TypeError, ValueError):
                return None
        return seen.text

    def fits(self, k: int, predicted: str | int) -> bool:
        """Whether what was seen of prompt k is this text, or this many tokens."""
        seen = self.seen[k]
        if isinstance(predicted, int):
            return seen.count == predicted
        if seen.text is not None:
            return seen.text == predicted
        ids = self.ids(predicted)
        if (
            seen.ids is not None
        ):  # what was typed may be text there: then the tokens are others, and the text is not
            return ids == seen.ids or (bool(self.entries[k].as_control) and self.text(k) == predicted)
        return len(ids) == seen.count

    def ids(self, text: str) -> tuple[int, ...]:
        assert self.fmt is not None
        if text not in self._counts:
            self._counts[text] = tuple(self.fmt.text_ids(text))
        return self._counts[text]

    @cached_property
    def faults(self) -> list[tuple[str, str, Predict]]:
        """All that are known, the special ones first: of two that fit equally the first is told."""
        fmt = self.fmt
        if fmt is None:
            return []
        made: list[tuple[str, str, Predict]] = [*self._learnt()]
        made += [(name, cure, partial(self._changed, change)) for name, cure, change in CHANGES]
        for name, cure, where, written in JSON_FAULTS:
            made.append((name, cure, partial(self._rewritten, where, written)))
        switch = fmt.thinking_switch
        cure = "it sets the template's variable otherwise, or passes chat_template_kwargs over"
        values: list[Json] = [] if switch is None else [{}, {switch.name: True}, {switch.name: False}]
        for value in values:
            change = partial(lambda to, example: replace(example, variables=to), value)
            made.append(("thinking switched", cure, partial(self._changed, change)))
        twice = "it puts the finished prompt into the template again; send chats to the chat endpoint"
        made += [("template applied twice", twice, partial(self._twice, fmt))]
        made += [("template applied twice", twice, lambda k: self.entries[k].prompt + OPENING)]
        ends = "it leaves add_generation_prompt out"
        opened = "no opening of the reply"
        made.append((opened, ends, lambda k: self.entries[k].prompt.removesuffix(OPENING)))
        return made

    def _twice(self, fmt: ChatFormat, k: int) -> str | None:
        try:
            return fmt.prompt([user(self.entries[k].prompt)])
        except FormatError:
            return None

    def _changed(self, change: Change, k: int) -> str | None:
        assert self.fmt is not None
        example = change(self.entries[k].case)
        try:
            return self.fmt.prompt(list(example.messages), list(example.tools) or None, **example.variables)
        except FormatError:
            return None

    def _rewritten(self, where: tuple[str, ...], written: Written, k: int) -> str:
        return json_rewritten(where, written, self.entries[k])

    def _learnt(self) -> Iterator[tuple[str, str, Predict]]:
        """Faults of which a part is read off what was seen: another system text, a limit, a token before all."""
        others = [k for k in range(len(self.entries)) if self.state(k) in ("other", "tokens")]
        bare = next((k for k in others if self._is_bare(k) and not self.entries[k].case.tools), None)
        if bare is not None:
            cure = "give it the trained template, or the trained system text with each request"
            text = self.text(bare)
            found = len(self.entries[bare].ids) - (self.seen[bare].count or 0)
            system = text[len(SYSTEM) :].partition(END)[0] if text and text.startswith(SYSTEM) else None
            to = -found if text is None else system
            yield "another default system prompt", cure, partial(self._other_system, to)
        cuts = [k for k in others if (self.seen[k].count or 0) < len(self.entries[k].ids)]
        most = max((self.seen[k].count or 0 for k in cuts), default=0)
        if most:
            cure = "it holds fewer tokens than the prompt has and says nothing; raise its context"
            yield "context truncated", cure, partial(self._truncated, most)
        plain = [k for k in others if not self.entries[k].as_control]
        extra = {(self.seen[k].count or 0) - len(self.entries[k].ids) for k in plain}
        if len(extra) == 1 and 0 < (more := extra.pop()) < 4:
            cure = "it begins each prompt with a token of its own (BOS); turn that off"
            yield "a token before the prompt", cure, partial(self._begun, more)

    def _is_bare(self, k: int) -> bool:
        return bool(self.entries[k].case.messages[0]["role"] != "system")

    def _other_system(self, system: str | int | None, k: int) -> str | int | None:
        """Under another default system text; an int: so many more tokens; None: under none."""
        if not self._is_bare(k):
            return None
        if isinstance(system, int):
            entry, count = self.entries[k], self.seen[k].count
            typed = bool(entry.as_control) and count == len(entry.as_control) + system
            return len(entry.as_control if typed else entry.ids) + system
        if system is None:
            head, _, rest = self.entries[k].prompt.partition(f"{END}\n")
            return rest if head.startswith(SYSTEM) else None
        case = self.entries[k].case
        return self._changed(
            lambda example: replace(
                example, messages=({"role": "system", "content": system}, *case.messages)
            ),
            k,
        )

    def _truncated(self, most: int, k: int) -> str | int | None:
        """Itself, where a part of the prompt's tokens was left out to keep within `most`."""
        ids, seen = self.entries[k].ids, self.seen[k]
        if len(ids) <= most:
            return None
        if seen.ids is None:
            return seen.count if seen.count is not None and seen.count <= most else -1
        same = next((n for n, (a, b) in enumerate(zip(ids, seen.ids, strict=False)) if a != b), len(seen.ids))
        pairs = zip(reversed(ids), reversed(seen.ids), strict=False)
        tail = next((n for n, (a, b) in enumerate(pairs) if a != b), len(seen.ids))
        return len(seen.ids) if same + tail >= len(seen.ids) else -1

    def _begun(self, more: int, k: int) -> int:
        entry, seen = self.entries[k], self.seen[k]
        same = seen.ids is None or seen.ids[more:] in (entry.ids, entry.as_control)
        typed = entry.as_control and seen.count == len(entry.as_control) + more
        return (len(entry.as_control if typed else entry.ids) + more) if same else -1

    # ------------------------------------------------------------------------------------------------ explained

    def findings(self) -> list[Finding]:
        """What differs, by cause, the most prompts first; then what was typed."""
        states = [self.state(k) for k in range(len(self.entries))]
        left = {k for k, state in enumerate(states) if state == "other"}
        tokens = [k for k, state in enumerate(states) if state == "tokens"]
        agreed = [k for k, state in enumerate(states) if state == "same"]
        found: list[Finding] = []
        while (best := self._best(left | set(tokens), agreed)) is not None:
            name, cure, hits, predict = best
            found.append(
                Finding("differs", name, cure, tuple(sorted(hits)), self._shown(sorted(hits), predict))
            )
            left -= hits
            tokens = [k for k in tokens if k not in hits]
        if tokens:
            cure = "its tokenizer or pre-tokenizer is another one; convert or copy the trained one again"
            found.append(Finding("differs", "the same text in other tokens", cure, tuple(tokens)))
        if left:
            cure = "compare the two texts; give the server the trained template"
            shown = self._shown(sorted(left), None)
            found.append(Finding("differs", UNKNOWN, cure, tuple(sorted(left)), shown))
        typed = tuple(k for k, state in enumerate(states) if state == "typed")
        if typed:
            cure = "whoever types <|im_end|> there ends a turn; strip control tokens from what people say before it"
            found.append(Finding("warning", "typed control tokens are read as control tokens", cure, typed))
        return found

    def _best(self, left: set[int], agreed: list[int]) -> tuple[str, str, set[int], Predict] | None:
        """The fault that explains most of what is left, and how it writes; None where none explains any."""
        best: tuple[str, str, set[int], Predict] | None = None
        score = 0
        for name, cure, predict in self.faults:
            hits = {k for k in left if (text := self._other(predict, k)) is not None and self.fits(k, text)}
            if len(hits) > score:
                wrong = sum(
                    (text := self._other(predict, k)) is not None and not self.fits(k, text) for k in agreed
                )
                if len(hits) - 2 * wrong > score:
                    best, score = (name, cure, hits, predict), len(hits) - 2 * wrong
        return best

    def _other(self, predict: Predict, k: int) -> str | int | None:
        """What a fault makes of prompt k; None where that is the prompt itself."""
        found = predict(k)
        return None if found == self.entries[k].prompt else found

    def _shown(self, numbers: Sequence[int], predict: Predict | None) -> FirstDifference | None:
        """The first difference of the shortest of these prompts: as seen, else as the cause would write it."""
        for k in sorted(numbers, key=lambda k: len(self.entries[k].prompt)):
            text, seen = self.text(k), True
            if text is None and predict is not None:
                text, seen = predict(k), False  # type: ignore[assignment]
            if isinstance(text, str) and text != self.entries[k].prompt:
                return first_difference(k, self.entries[k].prompt, text, seen=seen)
        return None
