"""A model's reply read back: what of it is content, what reasoning, what a call.

In: the text of a reply in pieces cut anywhere (`StreamParser`; `fold` adds its deltas up), and the marks that are
looked for. Out: content, reasoning and calls. Pure text: no tokenizer, no torch.

What a call looks like, its dialect says (`shapes.Marks`); this is the machine that finds it. The inside of a call
decides where it ends, not the end tag, so a tag inside a string is only text. docs/tool_calls.md shows what becomes
of every damaged shape.

No text is lost. What is not part of a readable call is content, verbatim and in order. Besides the calls
themselves only this layout is left out, which the template writes again:

    reasoning    <think> at the beginning and white space before it, </think>, newlines around the reasoning
    before       one newline before a call that follows text (with the indentation, where no tag opens the
                 call); white space alone before a call
    between      white space, a comma, closing brackets
    after        closing brackets before an end tag, the end tag, the closing fence; and up to the end of the
                 reply white space, half an end tag, a stop mark
    at the beginning, the mark under which a prompt lets the model answer
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

from qwen_chat.conversation import ToolCall
from qwen_chat.dialects.dialect import Tools, function_of
from qwen_chat.dialects.loose_json import BROKEN, DONE, READING
from qwen_chat.dialects.shapes import (
    END_THINK,
    LONGEST_SHAPE,
    SPACE,
    THINK,
    Form,
    Left,
    Look,
    Marks,
    Offer,
    Scanner,
    Shapes,
    letters,
)


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


_END_OF_THINK = Shapes({"end": letters(END_THINK)})

_Mode = Literal["beginning", "reasoning", "newlines", "first", "text", "call", "after"]


@cache
def _looks(marks: Marks) -> tuple[Look, Shapes, re.Pattern[str]]:
    """What is looked for, at the very beginning too; and text in which none of it begins."""
    answers = {
        f"answer{i}": (SPACE, *letters(mark), "[:：]", " {0,8}", "(?=[^ ])")
        for i, mark in enumerate(marks.answers)
    }
    triggers = {form.mark[0] for form in marks.forms if form.mark and not form.loose}
    plain = re.compile(f"[^\n{''.join(map(re.escape, triggers))}]*\\Z")
    return Look(marks), Shapes({"think": (SPACE, *letters(THINK))} | answers), plain


@dataclass(slots=True)
class _Attempt:
    """A call that is being read: it began at `start` of the text at hand, or in `raw`, kept from earlier pieces."""

    form: Form
    scanner: Scanner
    start: int
    skip: int  # how much of it is content for certain if it fails
    left: Left  # what the call will leave open
    streams: bool  # its arguments come as they are written
    raw: list[str] = field(default_factory=list)
    is_named: bool = False  # its name has come out


class StreamParser:
    """Reads a reply piece by piece. However it is cut, `fold` of the deltas is the same.

    Content and reasoning come out as soon as they cannot be the beginning of a mark any more (a few characters
    are held back in ordinary text). A call comes out in one delta, when it is complete, without waiting
    for the end tag. Not before: a call that turns out to be cut or broken is content, and a name that
    has been shown could not be taken back. A call that is `bound` to a grammar cannot break: its name comes
    when its arguments begin, they come as they are written, and a cut one is a call with cut arguments (`cut`).

    `tools` says which names make a call where nothing marks it, and what type a value has that is written as bare
    text. A marked call of an unknown name is a call too: who runs it answers with an error, from which a model
    recovers.
    """

    def __init__(
        self,
        tools: Tools | None = None,
        *,
        marks: Marks,
        in_reasoning: bool = False,
        bound: bool = False,
    ) -> None:
        """`marks`: what counts as a call; a loose form only where it names one of `tools`. `bound`: what follows the
        mark of a bound form is written under a grammar."""
        self.calls = 0  # how many have come out
        self.cut = False  # the last one's arguments are not whole
        self._bound = bound
        functions = {str(function_of(tool).get("name")): function_of(tool) for tool in tools or ()}
        self._offer = Offer(functions, forced=bound)
        if not functions:
            marks = replace(marks, forms=tuple(form for form in marks.forms if not form.loose))
        self._look, self._beginning, self._plain = _looks(marks)
        self._mode: _Mode = "beginning"
        self._in_reasoning = in_reasoning
        self._out: list[Delta] = []
        self._held = ""  # the beginning of a mark, perhaps; short
        self._fed = 0  # characters fed so far
        self._newlines = 0  # at the end of the reasoning so far: layout if it ends here
        self._reasoned = False  # some reasoning came out
        self._left = Left()  # what the last call left open
        self._attempt: _Attempt | None = None
        self._wasted = 0  # characters read by attempts that failed

    def feed(self, piece: str) -> list[Delta]:
        """Read the next piece of the reply; return what is certain now."""
        self._fed += len(piece)
        if self._mode == "text" and not self._held and self._plain.match(piece):
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
        match = self._beginning.full.match(text, at)
        if not match and not final and self._beginning.partial.match(text, at):
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
        return self._read_spot(self._look.first, text, at, final)

    def _read_after(self, text: str, at: int, final: bool) -> int:
        left = self._left
        following, ending = self._look.after(left)
        match = following.full.match(text, at)
        closes = match.lastgroup if match else None
        if match and closes == "close":
            self._left = Left(fence=left.fence and "`" not in match.group())
        elif closes == "end_list":
            self._left = replace(left, items=False)
        elif closes == "end_fence":
            self._left = replace(left, fence=False, items=False, brackets=False)
        elif final and ending.partial.match(text, at):
            return len(text)
        else:
            return self._read_spot(following, text, at, final)
        return match.end() if match else at

    def _read_spot(self, shapes: Shapes, text: str, at: int, final: bool) -> int:
        """A call begins exactly here, or may begin here, or running text does."""
        match = shapes.full.match(text, at)
        if match:
            return self._open_call(match)
        if not final and shapes.partial.match(text, at):
            return self._hold(text, at)
        self._mode = "text"
        return at

    def _read_text(self, text: str, at: int, final: bool) -> int:
        shapes = self._look.text
        match = shapes.full.search(text, at)
        until = match.start() if match else len(text)
        window = max(at, len(text) - LONGEST_SHAPE)
        if not final and until >= window:
            partial = shapes.partial.search(text, window)
            if partial and partial.start() < until:  # it may become a call that begins earlier
                self._say(text[at : partial.start()])
                return self._hold(text, partial.start())
        self._say(text[at:until])
        return self._open_call(match) if match else until

    def _open_call(self, match: re.Match[str]) -> int:
        """Begin to read a call after its opening shape; return where its inside begins."""
        shape, text = match.group(), match.string
        form = self._look.forms.get(match.lastgroup or "")
        mark = form.mark if form else ""
        skip = shape.index(mark) + len(mark) if mark else len(shape) + 1
        if self._wasted > 8 * (self._fed - len(text) + match.start()) + 65536:
            # Attempts that overlap again and again would cost quadratic time: the next ones are text.
            self._say(text[match.start() : match.start() + skip])
            self._mode = "text"
            return match.start() + skip
        left = form.leaves(shape) if form else self._left
        if form is None:  # one more call of the form before
            assert self._attempt is not None
            form = self._attempt.form
            streams = False
        else:
            streams = self._bound and form.bound
        scanner = form.scanner(shape, self._offer)
        self._attempt = _Attempt(form, scanner, match.start(), skip, left, streams)
        self._mode = "call"
        return match.end()

    def _read_call(self, text: str, at: int, final: bool) -> tuple[str, int]:
        attempt = self._attempt
        assert attempt is not None
        scanner = attempt.scanner
        at = scanner.scan(text, at)
        if attempt.streams and scanner.begun:
            return text, self._read_bound(attempt, at, final)
        if scanner.status == DONE:
            self._out.append(Delta(name=scanner.name, arguments=scanner.arguments, index=self.calls))
            self.calls += 1
            self._left = attempt.left
            self._mode = "after"
        elif scanner.status == BROKEN or final:
            self._wasted += scanner.read
            if attempt.raw:
                text, attempt.start = "".join([*attempt.raw, text]), 0
            at = attempt.start + attempt.skip
            self._say(text[attempt.start : at])
            self._mode = "text"
        else:
            attempt.raw.append(text[attempt.start :])
            attempt.start = 0
        return text, at

    def _read_bound(self, attempt: _Attempt, at: int, final: bool) -> int:
        """Say what the arguments have grown by; the name before the first of them."""
        scanner = attempt.scanner
        if not attempt.is_named:
            self._out.append(Delta(name=scanner.name, index=self.calls))
            self.calls += 1
            attempt.is_named = True
        ended = final or scanner.status != READING
        grown = scanner.more(ended=ended)
        if grown:
            self._out.append(Delta(arguments=grown, index=self.calls - 1))
        if ended:
            self.cut = scanner.status != DONE
            self._left = attempt.left
            self._mode = "after" if scanner.status == DONE else "text"
        return at


_READERS = {
    "beginning": StreamParser._read_beginning,
    "reasoning": StreamParser._read_reasoning,
    "newlines": StreamParser._read_newlines,
    "first": StreamParser._read_first,
    "text": StreamParser._read_text,
    "after": StreamParser._read_after,
}
