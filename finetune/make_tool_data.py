"""Training conversations for your own tools, from a list of tools and a table of questions and calls.

    python finetune/make_tool_data.py --tools finetune/io_file/input_data/example_tools.json \
        --table finetune/io_file/input_data/example_tool_questions.jsonl -o my_tools.jsonl

In: tools, OpenAI schemas (.json, a list) or Python functions with type hints (.py; the file is imported), and
a table (.jsonl or .csv). A row is a question and the calls that answer it:

    {"question": "How warm is it in Paris?",
     "calls": [{"name": "get_weather", "arguments": {"city": "Paris"}}],
     "results": [{"temperature": 21}], "answer": "It is 21 degrees in Paris."}

`results` (one a call) and `answer` may both be left out: the conversation then ends with the call. Without
`calls` there is the answer alone. A .csv has the columns question, call, arguments, result, answer; further
calls of a row follow in rows with an empty question. Out: one conversation a line, seeded, every call checked
against its tool's schema, of these kinds:

    call      the row, its tools shuffled among distractors
    parallel  two rows asked at once, answered by their calls together
    missing   an argument is left out of the question; the reply asks for it, the user tells it, then the call
    refusal   the row's tools are not offered: the reply says so
    no_tool   a row without calls
"""

import csv
import importlib.util
import inspect
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from qwen_chat import errors
from qwen_chat.console import rank_zero
from qwen_chat.conversation import Conversation, Json, ToolCall
from qwen_chat.data import checks, records
from qwen_chat.errors import DataError, FormatError, OptionError, OutputError, Problem, ToolError
from qwen_chat.files import write_whole
from qwen_chat.flags import parser
from qwen_chat.flags.parser import option
from qwen_chat.tools.functions import tool_schema
from qwen_chat.tools.validate import check_call, check_tools

REFUSALS = {
    "en": (
        "I have no tool for that.",
        "None of my tools can do that, so I cannot help with it here.",
        "I am sorry, but that is beyond the tools I have.",
    ),
    "zh": (
        "我没有能做这件事的工具。",
        "抱歉，我现有的工具做不到这件事。",
        "这超出了我现有工具的范围，我帮不上忙。",
    ),
}
ASK = {"en": "Please tell me the {name}.", "zh": "请告诉我{name}。"}
JOIN = {"en": "{first} And: {second}", "zh": "{first}另外，{second}"}
PREPOSITIONS = (
    "in the",
    "in",
    "for the",
    "for",
    "at the",
    "at",
    "of",
    "to",
    "from",
    "on",
    "with",
    "about",
    "near",
)


@dataclass(frozen=True)
class MakeArguments:
    """Tool data"""

    tools: str | None = option(None, "tools: OpenAI schemas (.json) or Python functions (.py)")
    table: str | None = option(None, "questions and calls (.jsonl or .csv)")
    output: str | None = option(None, "the new data file", "-o")
    distractors: int = option(3, "at most so many other tools are offered beside the right ones")
    parallel: float = option(0.2, "parallel conversations for each row with calls")
    missing: float = option(0.2, "the same for conversations in which an argument is missing at first")
    refusals: float = option(0.3, "the same for questions whose tools are not offered")
    repeat: int = option(1, "times that each row is used, with other distractors each time")
    system: str | None = option(None, "a system message for every conversation")
    seed: int = option(0, "the same seed gives the same file")
    json: bool = option(False, "print one JSON object on standard output")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    where: str
    question: str
    calls: tuple[ToolCall, ...]
    results: tuple[str, ...]
    answer: str

    @property
    def language(self) -> str:
        return "zh" if any("\u4e00" <= letter <= "\u9fff" for letter in self.question) else "en"

    @property
    def names(self) -> set[str]:
        return {call.name for call in self.calls}


def main() -> int:
    options = parser.read(sys.argv[1:], [MakeArguments], about=str(__doc__))[MakeArguments]
    output = check_options(options)
    tools = read_tools(Path(str(options.tools)))
    rows = read_table(Path(str(options.table)), tools)
    lines = list(make(rows, tools, options))
    write_whole(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    report = records.open_records(output).report
    kinds = dict(Counter(line["type"] for line in lines))
    rank_zero(
        f"{output}: {len(lines)} conversations ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})"
    )
    for note in report.notes:
        rank_zero(f"note: {note}")
    rank_zero(f"next: python finetune/inspect_data.py -d {output}")
    if options.json:
        print(json.dumps({"output": str(output), "conversations": len(lines), "kinds": kinds}))
    return 0


def check_options(options: MakeArguments) -> Path:
    for name in ("tools", "table", "output"):
        if getattr(options, name) is None:
            raise OptionError(f"--{name}: not given; see --help for what it holds")
    for name in ("parallel", "missing", "refusals"):
        if not 0 <= getattr(options, name) <= 10:
            raise OptionError(
                f"--{name}: {getattr(options, name)}; expected 0 to 10, conversations for each row"
            )
    if options.distractors < 0 or options.repeat < 1:
        raise OptionError("--distractors and --repeat: expected at least 0 and 1")
    output = Path(str(options.output))
    if output.exists():
        raise OutputError(f"{output} exists and is not overwritten; give another name with -o")
    if not output.resolve().parent.is_dir():
        raise OutputError(f"{output.parent} is no folder; make it first")
    return output


# --------------------------------------------------------------------------- reading


def read_tools(path: Path) -> list[Json]:
    """Schemas from a .json list, or of the public functions of a .py file, in the file's order."""
    if path.suffix == ".py":
        tools = [tool_schema(function) for function in public_functions(path)]
    else:
        try:
            tools = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise ToolError(f"{path} cannot be read ({error.strerror}); name a file of tools") from None
        except ValueError as error:
            raise ToolError(f"{path} is no JSON ({error}); expected a list of tools") from None
    check_tools(tools)
    if not tools:
        raise ToolError(f"{path}: no tool in it; expected at least one")
    return tools


def public_functions(path: Path) -> list[Callable[..., Any]]:
    spec = importlib.util.spec_from_file_location("user_tools", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ToolError(f"{path} cannot be read; name a Python file with functions")
    module = importlib.util.module_from_spec(spec)
    sys.modules["user_tools"] = module  # dataclasses with postponed annotations look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ToolError(f"{path} cannot be imported ({type(error).__name__}: {error})") from None
    found = [f for name, f in vars(module).items() if inspect.isfunction(f) and not name.startswith("_")]
    return [function for function in found if function.__module__ == "user_tools"]


def read_table(path: Path, tools: Sequence[Json]) -> list[Row]:
    """Every row, each call checked; DataError lists every bad one."""
    try:
        entries = list(csv_rows(path) if path.suffix == ".csv" else json_rows(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name a table of questions") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; save the table as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}: not a readable CSV ({error}); save it again as CSV in UTF-8") from None
    rows, problems = [], []
    for where, entry in entries:
        try:
            rows.append(read_row(where, entry, tools))
        except (FormatError, ToolError) as error:
            problems.append(Problem(where, str(error)))
    if problems:
        raise DataError(
            f"{len(problems)} of {len(entries)} rows cannot be used", problems[:20], len(problems)
        )
    if not rows:
        raise DataError(f"{path}: empty; expected at least one row")
    return rows


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                yield f"{path.name}:{number}", json.loads(line)
            except ValueError as error:
                yield f"{path.name}:{number}", f"no JSON ({error})"


def csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows with an empty question carry on the one above with a further call."""
    entry: Json | None = None
    where = ""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for line in reader:
            if line.get("question") or entry is None:
                if entry is not None:
                    yield where, entry
                where, entry = f"{path.name}:{reader.line_num}", {"question": line.get("question")}
            if line.get("answer"):
                entry["answer"] = line["answer"]
            if line.get("call"):
                call = {"name": line["call"], "arguments": line.get("arguments") or "{}"}
                entry.setdefault("calls", []).append(call)
                if line.get("result"):
                    entry.setdefault("results", []).append(line["result"])
    if entry is not None:
        yield where, entry


def read_row(where: str, entry: Any, tools: Sequence[Json]) -> Row:
    """Raise FormatError with what is wrong, field first."""
    if not isinstance(entry, dict):
        raise FormatError(entry if isinstance(entry, str) else "no object; expected question, calls, answer")
    question, answer = entry.get("question"), entry.get("answer", "")
    if not isinstance(question, str) or not question.strip():
        raise FormatError("question: empty; expected what the user says")
    calls, results = entry.get("calls") or [], entry.get("results") or []
    if not isinstance(calls, list) or not isinstance(results, list) or not isinstance(answer, str):
        raise FormatError("calls and results: expected lists; answer: expected text")
    if results and (len(results) != len(calls) or not answer.strip()):
        raise FormatError(f"results: {len(results)} for {len(calls)} calls; expected one each, and an answer")
    if not results and bool(answer.strip()) == bool(calls):
        raise FormatError("answer: expected without calls, or after calls with results")
    found = tuple(read_call(call, f"calls[{i}]", tools) for i, call in enumerate(calls))
    texts = tuple(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in results)
    return Row(where, question.strip(), found, texts, answer.strip())


def read_call(call: Any, where: str, tools: Sequence[Json]) -> ToolCall:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise FormatError(f"{where}: expected an object with name and arguments")
    given = call.get("arguments", {})
    found = ToolCall(call["name"], given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))
    problem = check_call(found, tools)
    if problem is not None:
        raise FormatError(f"{where}: {problem}")
    return found


# --------------------------------------------------------------------------- making


def make(rows: Sequence[Row], tools: Sequence[Json], options: MakeArguments) -> Iterator[Json]:
    """Every conversation once, in a shuffled order."""
    rng = random.Random(options.seed)
    writer = Writer(tools, options, rng)
    found: list[Json] = []
    calling = [row for row in rows if row.calls]
    for _ in range(options.repeat):
        found += [writer.plain(row) for row in rows]
        found += [
            writer.refusal(row) for row in some(calling, options.refusals, rng) if writer.can_refuse(row)
        ]
        found += [made for row in some(calling, options.missing, rng) for made in writer.missing(row)]
        found += [
            made for row in some(calling, options.parallel, rng) for made in writer.parallel(row, calling)
        ]
    seen: set[str] = set()
    rng.shuffle(found)
    for line in found:
        key = json.dumps(line, ensure_ascii=False)
        if key not in seen:
            seen.add(key)
            yield line


def some(rows: Sequence[Row], share: float, rng: random.Random) -> list[Row]:
    """share x rows of them, each as often as any other."""
    count = round(share * len(rows))
    chosen: list[Row] = []
    while len(chosen) < count:
        chosen += rng.sample(list(rows), min(len(rows), count - len(chosen)))
    return chosen


class Writer:
    """Rows -> conversations."""

    def __init__(self, tools: Sequence[Json], options: MakeArguments, rng: random.Random) -> None:
        self._tools, self._options, self._rng = tools, options, rng

    def plain(self, row: Row) -> Json:
        return self._line("call" if row.calls else "no_tool", self._said(row.question), [row], row.names)

    def can_refuse(self, row: Row) -> bool:
        return len(self._tools) > len(row.names)

    def refusal(self, row: Row) -> Json:
        """The same question where nothing fits it."""
        reply = {"role": "assistant", "content": self._rng.choice(REFUSALS[row.language])}
        messages = [*self._said(row.question), reply]
        return self._finish("refusal", messages, self._offer(set(), without=row.names, least=1))

    def missing(self, row: Row) -> Iterator[Json]:
        """Nothing where no argument's text stands in the question exactly once."""
        if len(row.calls) != 1:
            return
        values = json.loads(row.calls[0].arguments)
        fitting = [k for k, v in values.items() if isinstance(v, str) and stands_alone(v, row.question)]
        required = set(self._schema(row.calls[0].name).get("required", ()))
        fitting = [key for key in fitting if key in required]
        if not fitting:
            return
        key = self._rng.choice(fitting)
        question = ASK[row.language].format(name=self._spoken(row, key))
        messages = [
            *self._said(without(row.question, values[key])),
            {"role": "assistant", "content": question},
            {"role": "user", "content": values[key]},
        ]
        yield self._line("missing", messages, [row], row.names)

    def parallel(self, row: Row, rows: Sequence[Row]) -> Iterator[Json]:
        """Two rows at once: same language, both with results or both without."""
        others = [
            other
            for other in rows
            if differ(other.calls, row.calls)
            and other.language == row.language
            and bool(other.results) == bool(row.results)
        ]
        if others:
            other = self._rng.choice(others)
            asked = JOIN[row.language].format(first=row.question, second=other.question)
            yield self._line("parallel", self._said(asked), [row, other], row.names | other.names)

    def _line(self, kind: str, messages: list[Json], rows: Sequence[Row], names: set[str]) -> Json:
        """Messages, then the rows' calls together, their results, their answers."""
        calls = [call for row in rows for call in row.calls]
        results = [text for row in rows for text in row.results]
        space = "" if rows[0].language == "zh" else " "
        answer = space.join(row.answer for row in rows if row.answer)
        if calls:
            written = [
                {
                    "id": f"call_{i}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": self._in_order(call)},
                }
                for i, call in enumerate(calls)
            ]
            messages = [*messages, {"role": "assistant", "content": "", "tool_calls": written}]
            messages += [
                {"role": "tool", "tool_call_id": f"call_{i}", "content": text}
                for i, text in enumerate(results)
            ]
        if answer:
            messages = [*messages, {"role": "assistant", "content": answer}]
        return self._finish(kind, messages, self._offer(names))

    def _finish(self, kind: str, messages: list[Json], tools: list[Json]) -> Json:
        line = {"type": kind, "source": "make_tool_data", "messages": messages, "tools": tools}
        problems = checks.check(Conversation.from_openai(line))
        if problems:
            raise DataError(
                f"a {kind} conversation is not valid: {problems[0]}; this is a defect of the script"
            )
        return line

    def _said(self, question: str) -> list[Json]:
        system = self._options.system
        return [
            *([{"role": "system", "content": system}] if system else []),
            {"role": "user", "content": question},
        ]

    def _offer(self, names: set[str], without: set[str] | None = None, least: int = 0) -> list[Json]:
        """The named tools and some others, shuffled."""
        right = [tool for tool in self._tools if tool["function"]["name"] in names]
        barred = names | (without or set())
        others = [tool for tool in self._tools if tool["function"]["name"] not in barred]
        least = max(least, 0 if right else 1)
        most = max(least, min(self._options.distractors, len(others)))
        chosen = self._rng.sample(others, min(len(others), self._rng.randint(least, most)))
        offered = [*right, *chosen]
        self._rng.shuffle(offered)
        return offered

    def _schema(self, name: str) -> Json:
        tool = next(tool for tool in self._tools if tool["function"]["name"] == name)
        return tool["function"].get("parameters") or {}

    def _in_order(self, call: ToolCall) -> str:
        """Arguments in the schema's order: constrained decoding writes them so."""
        values = json.loads(call.arguments)
        order = [*self._schema(call.name).get("properties", {}), *values]
        return json.dumps(
            {key: values[key] for key in dict.fromkeys(order) if key in values}, ensure_ascii=False
        )

    def _spoken(self, row: Row, key: str) -> str:
        """An argument as one says it: the description's head in Chinese, the name with spaces in English."""
        described = str(self._schema(row.calls[0].name)["properties"][key].get("description", ""))
        head = described.split("，")[0].split("：")[0].split("。")[0].split(",")[0]
        chinese = any("\u4e00" <= letter <= "\u9fff" for letter in head)
        return head if row.language == "zh" and chinese else key.replace("_", " ")


def stands_alone(value: str, question: str) -> bool:
    """Whether the value is in the question once, and not as a part of a word."""
    word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])")
    return bool(value) and question.count(value) == 1 and word.search(question) is not None


def differ(calls: Sequence[ToolCall], others: Sequence[ToolCall]) -> bool:
    """Whether no call is in both: the same one twice is no lesson."""
    known = [(call.name, json.loads(call.arguments)) for call in calls]
    return not any((call.name, json.loads(call.arguments)) in known for call in others)


def without(question: str, value: str) -> str:
    """The question with an argument's text left out, and the preposition before it."""
    before, after = question.split(value)
    if before and after and (before[-1] + after[0]) in ("''", '""', "“”", "‘’", "「」", "《》"):
        before, after = before[:-1], after[1:]
    stripped = before.rstrip()
    for word in PREPOSITIONS:
        if stripped.lower().endswith(f" {word}"):
            stripped = stripped[: -len(word)].rstrip()
            break
    joined = stripped + (after if after[:1] in "?.!,;？。！，；" or not stripped else f" {after.lstrip()}")
    chinese = any("\u4e00" <= letter <= "\u9fff" for letter in question)
    return (before + after).strip() if chinese else joined.strip()


if __name__ == "__main__":
    sys.exit(errors.run(main))
