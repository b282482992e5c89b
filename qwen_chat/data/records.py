"""Data files -> conversations: every line checked at once, then read again one at a time.

In: paths of data files (DATA_FILES), or of folders that hold some; formats.py tells the kinds of record, checks.py the
rules. Out: `Records`, a sequence of Conversation behind a byte-offset index (28 bytes a line, whatever it holds),
and a `DataReport`: what kinds of record were found, every problem as `file:line: message`, and counts of what
is suspicious but usable (duplicates, contradictions, control tokens typed in text).

No tokenizer and no torch. Nothing here writes to a data file; any bytes give problems, never a traceback.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from qwen_chat.conversation import Conversation, Json
from qwen_chat.data.checks import check, is_encodable, plain_turns
from qwen_chat.data.formats import read_record
from qwen_chat.data.privacy import Secret, screened
from qwen_chat.data.source import TOO_DEEP, Defect, Source, counted
from qwen_chat.dialects.shapes import END_THINK
from qwen_chat.errors import DataError, FormatError, Problem, printable

OnError = Literal["stop", "skip"]
# How the names of data files end. A folder's are read in the order of their names.
DATA_FILES = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")
# What a conversation says: its tools and variables as text, its roles, and what each of them says.
Said = tuple[str, tuple[str, ...], tuple[Any, ...]]
_CONTROL = re.compile(r"<\|(?:im_start|im_end|endoftext)\|>")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MASK = 2**64 - 1
_COMPARED = 1 << 12  # hashes that are compared at once


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
    reasoning: int = 0  # conversations with a thought in some reply
    calls: Mapping[str, int] = field(default_factory=dict)  # of each function, commonest first
    notes: tuple[Problem, ...] = ()  # examples of the last three

    @property
    def chats(self) -> int:
        """Conversations that are no documents."""
        return self.conversations - self.kinds.get("text", 0)

    def describe(self) -> str:
        """A few lines for a person."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items())
        lines = [f"{counted(self.conversations, 'conversation')} in {', '.join(self.files)} ({kinds})"]
        if self.skipped:
            problems = counted(self.problem_total, "problem")
            lines.append(f"left out {self.skipped:,} of {counted(self.lines, 'line')} ({problems}):")
            lines.extend(f"  {problem}" for problem in self.problems)
            if self.problem_total > len(self.problems):
                lines.append(f"  ... and {self.problem_total - len(self.problems):,} more")
        share = self.reasoning / max(self.chats, 1)
        lines.append(f"with reasoning: {self.reasoning:,} ({share:.1%})")
        for count, what in (
            (self.duplicates, "saying exactly what an earlier one says"),
            (self.contradictions, "with the prompt of an earlier one and another reply"),
            (self.control_tokens, "with a control token typed in the text; it stays text"),
        ):
            if count:
                lines.append(f"note: {counted(count, 'conversation')} {what}")
        lines.extend(f"  {note}" for note in self.notes)
        return "\n".join(lines)

    def to_json(self) -> Json:
        """Plain values for `--json`."""
        plain: Json = {name: getattr(self, name) for name in self.__slots__}
        plain["files"] = list(self.files)
        plain["problems"] = [str(problem) for problem in self.problems]
        plain["notes"] = [str(note) for note in self.notes]
        return plain


class Records(Sequence[Conversation]):
    """The good conversations of the files, in order; each is read from disk when it is asked for."""

    def __init__(
        self,
        sources: Sequence[Source],
        index: _Index,
        report: DataReport,
        on_error: OnError,
        givers: Sequence[int],
        redact: bool,
    ) -> None:
        self._sources = tuple(sources)
        self._index = index
        self._givers = tuple(givers)  # of each file: which of the names given stands for it
        self.report = report
        self.on_error = on_error
        self.redact = redact

    def __len__(self) -> int:
        return len(self._index.offsets)

    @overload
    def __getitem__(self, i: int) -> Conversation: ...
    @overload
    def __getitem__(self, i: slice) -> list[Conversation]: ...
    def __getitem__(self, i: int | slice) -> Conversation | list[Conversation]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return self.screened(i)[0] if self.redact else self._read(i)

    def screened(self, i: int) -> tuple[Conversation, list[Secret]]:
        """Conversation `i`, and the secrets and personal data that stand in it, or stood there where `redact`."""
        conversation = self._read(i)
        without, found = screened(conversation)
        return (without if self.redact else conversation), found

    def _read(self, i: int) -> Conversation:
        i = range(len(self))[i]
        source = self._sources[self.file_of(i)]
        try:
            text = source.record_at(self._index.offsets[i], self.size_of(i))
            return read_record(source.parse(text))[1]
        except (FormatError, ValueError, RecursionError):
            raise DataError(f"{self.where(i)}: the file changed after it was checked; start again") from None

    def file_of(self, i: int) -> int:
        """Which of `paths` conversation `i` comes from."""
        return bisect_right(self._index.starts, i) - 1

    def given_of(self, i: int) -> int:
        """Which of the files and folders, in the order they were given, conversation `i` comes from."""
        return self._givers[self.file_of(i)]

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files, those of folders too, in the order of reading."""
        return tuple(source.path for source in self._sources)

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
        """Hash of the files' content, whatever their names, and of `redact` (hex)."""
        together = hashlib.sha256(b"redact" if self.redact else b"")
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
    redact: bool = False,
) -> Records:
    """Check every line of the files; raise DataError with all problems (`limit` are listed), or skip them.

    A file that is missing, unreadable or holds nothing is a DataError under either `on_error`, and so is a folder
    without data files. redact: conversations are given with a word in the place of each secret (privacy.py).
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not given:
        raise DataError(f"no data was given; name at least one file ({', '.join(DATA_FILES)}) or folder")
    files = [_files_of(name) for name in given]
    every = [file for some in files for file in some]
    givers = [number for number, some in enumerate(files) for _ in some]
    sources = [Source(file, name) for file, name in zip(every, _names(every), strict=True)]
    scan = _Scan(limit=limit)
    empty = [source.name for source in sources if not scan.file(source)]
    report = scan.report([source.name for source in sources])
    if report.problem_total and (on_error == "stop" or not report.conversations):
        found = counted(report.problem_total, "problem")
        raise DataError(
            f"{found} in {report.skipped:,} of {counted(report.lines, 'line')}; "
            "correct them, or leave these lines out with --on_error skip",
            report.problems,
            report.problem_total,
        )
    if empty:
        raise DataError(f"{', '.join(empty)}: empty; expected at least one conversation")
    return Records(sources, scan.index, report, on_error, givers, redact)


def _files_of(name: str | os.PathLike[str]) -> list[Path]:
    """The file itself, or the data files of a folder by name; folders in it are not looked into."""
    if not os.fspath(name):  # to Path it is the current folder
        raise DataError(f"data: {name!r} is no name; expected that of a file or folder")
    given = Path(os.path.expanduser(name))  # a shell does not see the names in a file of flags
    try:
        if not given.is_dir():
            return [given]
        # A link that leads nowhere stays: that it cannot be read is told.
        found = sorted(
            path
            for path in given.iterdir()
            if path.name.lower().endswith(DATA_FILES) and not path.name.startswith(".") and not path.is_dir()
        )
    except OSError as error:
        raise DataError(f"{printable(str(given))}: cannot be read ({error.strerror})") from None
    if not found:
        raise DataError(f"{given}: no data file in this folder; expected names in {', '.join(DATA_FILES)}")
    return found


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
        self._calls: Counter[str] = Counter()
        self._problems: list[Problem] = []
        self._notes: list[Problem] = []
        self._names: list[str] = []
        self._problem_total = self._lines = self._skipped = self._control = self._reasoning = 0

    def file(self, source: Source) -> int:
        """Read one file; how many records it has, good or bad."""
        before = self._lines
        self._names.append(source.name)
        for offset, line, raw in source.records():
            self._lines += 1
            self._record(source, offset, line, raw)
        self.index.starts.append(len(self.index.offsets))
        return self._lines - before

    def _record(self, source: Source, offset: int, line: int, raw: bytes | Defect) -> None:
        try:
            if isinstance(raw, Defect):
                raise raw
            text = source.decode(raw)
            record = source.parse(text)
            kind, said, found = _judge(record, text)
        except FormatError as error:
            found = [str(error)]
        except RecursionError:
            found = [TOO_DEEP]
        if found:
            self._skipped += 1
            self._problem_total += len(found)
            room = max(self._limit - len(self._problems), 0)
            where = f"{source.name}:{line}"
            self._problems.extend(Problem(where, printable(message)) for message in found[:room])
            return
        self._kinds[kind] += 1
        self.index.offsets.append(offset)
        self.index.lines.append(line)
        tools, roles, texts = said
        prompt = hash((tools, roles, texts[:-1]))
        self._prompts.append(prompt & _MASK)
        self._wholes.append(hash((prompt, texts[-1])) & _MASK)
        self._calls.update(name for text in texts if isinstance(text, tuple) for name, _ in text[2])
        if END_THINK in text or "reasoning" in text or "\\u00" in text:
            replies = [text for role, text in zip(roles, texts, strict=True) if role == "assistant"]
            self._reasoning += any(
                bool(text[1]) or END_THINK in text[0] if isinstance(text, tuple) else END_THINK in text
                for text in replies
            )
        if ("<|" in text or "\\u00" in text) and any(_CONTROL.search(str(part)) for part in (tools, *texts)):
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
            reasoning=self._reasoning,
            calls=dict(self._calls.most_common()),
            notes=(*notes, *self._notes),
        )

    def _pair(self, pair: tuple[int, int], what: str) -> Problem:
        first, later = (
            f"{self._names[bisect_right(self.index.starts, i) - 1]}:{self.index.lines[i]}" for i in pair
        )
        return Problem(later, what.format(first))


def _judge(record: object, text: str) -> tuple[str, Said, list[str]]:
    """Kind, content and problems of one parsed line."""
    surrogates = "\\u" in text and _ESCAPED_SURROGATE.search(text) is not None
    turns = None if surrogates else plain_turns(record)
    if turns is not None:
        return "openai", ("", *turns), []
    kind, conversation = read_record(record)
    found = check(conversation)
    if surrogates and not is_encodable(conversation):
        found.append("half of a surrogate pair (\\ud800 to \\udfff); expected whole characters; remove it")
    return kind, _said(conversation), found


def _said(conversation: Conversation) -> Said:
    """Ids of calls and `train` marks are left out: they are not rendered."""
    if conversation.document is not None:
        return "", ("document", ""), (conversation.document, "")  # no two have the same prompt and differ
    messages = conversation.messages
    offered = [conversation.tools, conversation.template_kwargs]
    return (
        json.dumps(offered, ensure_ascii=False) if any(offered) else "",
        tuple(message.role for message in messages),
        tuple(
            (
                message.content,
                message.reasoning,
                tuple((call.name, call.arguments) for call in message.tool_calls),
            )
            if message.tool_calls or message.reasoning
            else message.content
            for message in messages
        ),
    )


def _repeats(
    hashes: array[int], different: array[int] | None = None, examples: int = 3
) -> tuple[int, list[tuple[int, int]]]:
    """How many hashes repeat an earlier one, and some pairs (where `different` differs, if it is given)."""
    values = np.frombuffer(hashes, dtype=np.uint64)
    others = None if different is None else np.frombuffer(different, dtype=np.uint64)
    order = np.argsort(values)
    count = 0
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(order) - 1, _COMPARED):
        window = order[start : start + _COMPARED + 1]
        same = values[window[1:]] == values[window[:-1]]
        count += int(same.sum())
        if others is not None:
            same &= others[window[1:]] != others[window[:-1]]
        found = np.flatnonzero(same)[: examples - len(pairs)]
        pairs += [(int(min(window[k : k + 2])), int(max(window[k : k + 2]))) for k in found]
    return count, sorted(pairs)


def _names(paths: Sequence[Path]) -> list[str]:
    """What the messages call each file: its name, or its path where two have the same name."""
    often = Counter(path.name for path in paths)
    return [printable(str(path) if often[path.name] > 1 else path.name) for path in paths]
