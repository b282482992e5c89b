"""format.lock: what a trained model must be given and must answer, in one small file beside it.

In: a chat format, the hash of the base, the trained model's greedy replies. Out: a `FormatLock`, written into the
model's folder or read from it; a file whose content does not have its hashes is refused. The same run gives the same
bytes.

The file is one JSON object. Its head can be read by a person; `content` is the rest, as JSON that is deflated and
written in base64: 300 conversations with their prompts take about 45 kB.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen_chat.certificate.conversations import QUESTIONS, TOOLS, Example, cases, written_calls
from qwen_chat.chat.format import ChatFormat
from qwen_chat.conversation import Conversation, Json
from qwen_chat.errors import FormatError, first_line
from qwen_chat.files import write_whole

LOCK_FILE = "format.lock"
VERSION = 1
TOKENS = 16  # of a greedy reply
SECONDS = 60.0  # that the greedy replies may take
MOST_BYTES = 4 * 2**20  # of a file, and of what it is inflated to: far more than there is


class LockError(FormatError):
    """A format.lock that cannot be used, or none where one is needed."""


@dataclass(frozen=True, slots=True)
class LockedPrompt:
    """One conversation, its prompt and the prompt's tokens. `as_control`: the tokens that it has where control tokens
    that somebody typed are read as such; empty where nobody typed one."""

    case: Example
    prompt: str
    ids: tuple[int, ...]
    as_control: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LockedReply:
    """A reply's text, and what must come back of it: content, and (name, arguments as JSON text) of each call."""

    text: str
    content: str
    calls: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class GreedyReply:
    """The likeliest tokens after a prompt, the natural logarithms of their probabilities, and of those of the second
    likeliest. A reply that ends has the end's token as its last."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    seconds: tuple[float, ...]
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Replies:
    """Greedy replies to the first conversations, in their order, or none; `note` says what was done and why not."""

    replies: tuple[GreedyReply, ...]
    note: str


# Prompts' tokens and the tokens that end a reply -> what the trained model answers.
Greedy = Callable[[Sequence[Sequence[int]], Sequence[int]], Replies]


@dataclass(frozen=True)
class FormatLock:
    """A certificate. `base`: name and hash of the model that was trained; `template`: the sha256 of the chat template,
    the dialect included."""

    base: Mapping[str, str]
    template: str
    tool_style: str
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    entries: tuple[LockedPrompt, ...]
    answers: tuple[LockedReply, ...]
    greedy: Replies

    @classmethod
    def make(
        cls, fmt: ChatFormat, *, base: Mapping[str, str], longest: int | None, greedy: Greedy
    ) -> FormatLock:
        """The certificate of a format. `longest`: tokens that the model's context holds; longer prompts are left out.
        `greedy` is asked once."""
        entries = []
        for case in cases(fmt):
            prompt = fmt.render(case.messages, list(case.tools) or None, **case.variables)
            if longest is not None and len(prompt.ids) + TOKENS > longest:
                continue
            raw = fmt.text_ids(prompt.text) if case.kind == "typed" else prompt.ids
            as_control = tuple(raw) if raw != prompt.ids else ()
            entries.append(LockedPrompt(case, prompt.text, tuple(prompt.ids), as_control))
        asked = [entry.ids for entry in entries[:QUESTIONS] if entry.case.kind == "question"]
        replies = greedy(asked, fmt.stop_token_ids)
        told = tuple(
            GreedyReply(r.ids, r.logprobs, r.seconds, tuple(fmt.tokenizer.decode([i]) for i in r.ids))
            for r in replies.replies
        )
        answers = []
        for before, calls in written_calls():
            text = before + ("\n" if before else "") + fmt.dialect.write(calls)
            found = fmt.parse(text, list(TOOLS))
            read = tuple((call.name, call.arguments) for call in found.tool_calls)
            answers.append(LockedReply(text, found.content, read))
        return cls(
            base=dict(base),
            template=template_hash(fmt),
            tool_style=fmt.tool_style,
            stop_ids=fmt.stop_token_ids,
            stop_strings=tuple(fmt.stop_strings),
            entries=tuple(entries),
            answers=tuple(answers),
            greedy=Replies(told, replies.note),
        )

    @property
    def content(self) -> Json:
        """What is deflated: conversations with prompts and tokens, replies with calls, greedy replies."""
        return {
            "prompts": [
                [entry.case.to_json(), entry.prompt, list(entry.ids), list(entry.as_control)]
                for entry in self.entries
            ],
            "answers": [[one.text, one.content, [list(call) for call in one.calls]] for one in self.answers],
            "greedy": [
                [list(one.ids), list(one.logprobs), list(one.seconds), list(one.texts)]
                for one in self.greedy.replies
            ],
        }

    @property
    def text(self) -> str:
        """The file."""
        content = self.content
        head: Json = {
            "what": "the format that this model was trained in; fast_start/verify_service.py holds a server to it",
            "version": VERSION,
            "base": dict(self.base),
            "template": self.template,
            "tool_style": self.tool_style,
            "stop_ids": list(self.stop_ids),
            "stop_strings": list(self.stop_strings),
            "conversations": len(self.entries),
            "greedy_replies": self.greedy.note,
            "hashes": {name: _hash(part) for name, part in content.items()},
        }
        head["hashes"]["all"] = _hash(head)
        packed = base64.b64encode(zlib.compress(canonical(content), 9)).decode()
        return json.dumps(head | {"content": packed}, ensure_ascii=False, indent=1) + "\n"

    def write(self, folder: Path) -> None:
        """Into `folder`, whole or not at all."""
        write_whole(folder / LOCK_FILE, self.text)

    @classmethod
    def read(cls, folder: Path) -> FormatLock:
        """From a folder, or the file itself. Raises LockError: there is none, it is damaged, or of another version."""
        file = folder
        try:
            file = folder / LOCK_FILE if folder.is_dir() else folder
            with file.open("rb") as handle:
                raw = handle.read(MOST_BYTES + 1)
        except OSError as error:
            raise LockError(f"{file}: {error.strerror}; expected the format.lock of a finished run") from None
        damaged = f"{file}: damaged; copy it again from the run's folder"
        try:
            head: Json = json.loads(raw if len(raw) <= MOST_BYTES else b"")
            if head["version"] != VERSION:
                told = repr(head["version"])[:20]
                raise LockError(f"{file}: version {told}; this checkout reads version {VERSION}")
            inflater = zlib.decompressobj()
            content = json.loads(inflater.decompress(base64.b64decode(head.pop("content")), MOST_BYTES))
            expected = head["hashes"].pop("all")
            whole = _hash(head) == expected
            if not whole or head["hashes"] != {name: _hash(part) for name, part in content.items()}:
                raise LockError(f"{damaged} (its content does not have its hashes)")
            lock = cls._of(head, content)
        except LockError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error, RecursionError, FormatError):
            raise LockError(damaged) from None
        if not lock.entries:
            raise LockError(
                f"{file}: holds no prompt, as none fits into its model's context; give the lock of another model"
            )
        return lock

    def format_beside(self, folder: Path) -> ChatFormat | None:
        """The chat format of the tokenizer that lies beside the lock; None where none does. Raises LockError where it
        is another one's: then the lock is of another model."""
        folder = folder if folder.is_dir() else folder.parent
        if not (folder / "tokenizer_config.json").is_file():
            return None
        from transformers import AutoTokenizer

        try:
            fmt = ChatFormat(AutoTokenizer.from_pretrained(folder))
        except FormatError:
            raise
        except Exception as error:  # tokenizers raises no more than that
            raise LockError(
                f"{folder}: its tokenizer cannot be loaded ({first_line(error)}); copy it again from the run's folder"
            ) from None
        if template_hash(fmt) != self.template:
            raise LockError(
                f"{folder}: its format.lock is of another model: the chat template beside it is another one; "
                "take the lock from the folder of the run"
            )
        for k, entry in enumerate(self.entries):
            fmt.check_variables(entry.case.variables, f"{folder}: conversation {k} of its format.lock")
        return fmt

    @classmethod
    def _of(cls, head: Json, content: Mapping[str, Any]) -> FormatLock:
        """Raises TypeError, ValueError, KeyError or FormatError where a part is not as `text` writes it: hashes can be
        made by whoever edits the file."""
        entries = tuple(
            LockedPrompt(_case(case), _string(prompt), _token_list(ids), _token_list(as_control))
            for case, prompt, ids, as_control in content["prompts"]
        )
        answers = tuple(
            LockedReply(
                _string(text),
                _string(inner),
                tuple((_string(name), _string(given)) for name, given in calls),
            )
            for text, inner, calls in content["answers"]
        )
        greedy = tuple(
            GreedyReply(_token_list(ids), _number_list(logprobs), _number_list(seconds), _text_list(texts))
            for ids, logprobs, seconds, texts in content["greedy"]
        )
        for one in greedy:
            if not one.ids or len({len(one.ids), len(one.logprobs), len(one.seconds), len(one.texts)}) > 1:
                raise ValueError("a greedy reply whose parts are not of one length")
        base = {_string(key): _string(value) for key, value in dict(head["base"]).items()}
        stop_ids = _token_list(head["stop_ids"])
        if not stop_ids:
            raise ValueError("a lock without the tokens that end a reply")
        return cls(
            base=base,
            template=_string(head["template"]),
            tool_style=_string(head["tool_style"]),
            stop_ids=stop_ids,
            stop_strings=_text_list(head["stop_strings"]),
            entries=entries,
            answers=answers,
            greedy=Replies(greedy, _string(head["greedy_replies"])),
        )


def forget_replies(folder: Path, note: str) -> None:
    """The format.lock of a folder, if it has one, without the replies, which another model would write; `note` says
    why."""
    try:
        lock = FormatLock.read(folder)
    except LockError:
        return
    replace(lock, greedy=Replies((), note)).write(folder)


def template_hash(fmt: ChatFormat) -> str:
    """Of the template that the tuned model is saved with, and of how its dialect is worded. 64 hex digits."""
    return _hash([fmt.template, repr(fmt.dialect)])


def _case(value: Json) -> Example:
    messages, tools, variables = value["messages"], value.get("tools", []), value.get("variables", {})
    given = {"messages": messages, "tools": tools, "chat_template_kwargs": variables}
    if Conversation.from_openai(given).to_openai() != {key: part for key, part in given.items() if part}:
        raise ValueError("a conversation in another shape than it is written in")
    return Example(_string(value["kind"]), tuple(messages), tuple(tools), variables)


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _text_list(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError("no list of texts")
    return tuple(map(_string, value))


def _token_list(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one < 2**31 for one in value):
        raise TypeError("no list of tokens")
    return tuple(value)


def _number_list(value: object) -> tuple[float, ...]:
    if not isinstance(value, list) or not all(type(n) in (int, float) and math.isfinite(n) for n in value):
        raise TypeError("no list of finite numbers")
    return tuple(value)


def canonical(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _hash(value: object) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()
