"""Data files: every kind of record, every problem with its exact message, any bytes at all."""

# ruff: noqa: E501 - messages stand whole, on one line

import gzip
import json
import pickle
import random
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_chat.conversation import Conversation, Message, ToolCall
from qwen_chat.data import checks, formats, records, source
from qwen_chat.data.records import open_records
from qwen_chat.errors import DataError

USER = {"role": "user", "content": "你好 👋\n"}
REPLY = {"role": "assistant", "content": " hi\tthere "}
PLAIN = Conversation((Message("user", "你好 👋\n"), Message("assistant", " hi\tthere ")))
SAID = Conversation((Message("system", "s"), *PLAIN.messages))
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}


def call(name: str = "add", arguments: Any = '{"a": 1}', identity: str | None = None) -> dict[str, Any]:
    plain = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return plain if identity is None else {"id": identity, **plain}


def asks(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def result(identity: str | None = None, **more: Any) -> dict[str, Any]:
    linked = {} if identity is None else {"tool_call_id": identity}
    return {"role": "tool", "content": "2", **linked, **more}


def write(path: Path, *lines: Any) -> Path:
    """One line each: bytes as they are, everything else as JSON."""
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def problems_of(path: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        open_records(path, limit=1000)
    assert caught.value.total == len(caught.value.problems)
    return [str(problem) for problem in caught.value.problems]


def problem_of(tmp_path: Path, line: Any) -> str:
    """The one problem of a file whose second line is `line`."""
    (found,) = problems_of(write(tmp_path / "data.jsonl", {"messages": [USER, REPLY]}, line))
    where, _, message = found.partition(": ")
    assert where == "data.jsonl:2"
    return message


# ---------------------------------------------------------------- kinds


@pytest.mark.parametrize(
    ("record", "kind", "expected"),
    [
        ({"type": "chatml", "source": "x", "messages": [USER, REPLY]}, "openai", PLAIN),
        (
            {
                "conversations": [
                    {"from": "human", "value": USER["content"]},
                    {"from": "gpt", "value": " hi\tthere "},
                ]
            },
            "sharegpt",
            PLAIN,
        ),
        ({"conversations": [USER, REPLY], "tools": ""}, "sharegpt", PLAIN),
        # The record's own system text stands in front, whatever the kind; once where the messages have it too.
        ({"messages": [USER, REPLY], "system": "s"}, "openai", SAID),
        ({"messages": [{"role": "system", "content": "s"}, USER, REPLY], "system": "s"}, "openai", SAID),
        ({"conversations": [USER, REPLY], "system": "s"}, "sharegpt", SAID),
        ({"prompt": [USER], "completion": [REPLY], "system": "s"}, "prompt_completion", SAID),
        ({"messages": [USER, REPLY], "system": ""}, "openai", PLAIN),
        ({"instruction": "", "input": USER["content"], "output": " hi\tthere "}, "alpaca", PLAIN),
        ({"instruction": USER["content"], "input": "", "output": " hi\tthere "}, "alpaca", PLAIN),
        (
            {"instruction": "a", "input": "b", "output": "c", "history": [["q", "r"]], "system": "s"},
            "alpaca",
            Conversation(
                (
                    Message("system", "s"),
                    Message("user", "q"),
                    Message("assistant", "r"),
                    Message("user", "a\nb"),
                    Message("assistant", "c"),
                )
            ),
        ),
        ({"prompt": USER["content"], "completion": " hi\tthere "}, "prompt_completion", PLAIN),
        ({"prompt": [USER], "completion": [REPLY]}, "prompt_completion", PLAIN),
        ({"prompt": USER["content"], "response": " hi\tthere "}, "prompt_completion", PLAIN),
        ({"messages": json.dumps([USER, REPLY]), "text": "?"}, "openai", PLAIN),
        ({"text": " 一 <|im_end|>\n"}, "text", Conversation((), document=" 一 <|im_end|>\n")),
        (
            {
                "system": "s",
                "tools": json.dumps([TOOL["function"]]),
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                    {"from": "function_call", "value": '{"name": "add", "arguments": "{\\"a\\": 2}"}'},
                    {"from": "observation", "value": "1"},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "done", "weight": 0},
                ],
            },
            "sharegpt",
            Conversation(
                (
                    Message("system", "s"),
                    Message("user", "q"),
                    Message(
                        "assistant", tool_calls=(ToolCall("add", '{"a": 1}'), ToolCall("add", '{"a": 2}'))
                    ),
                    Message("tool", "1"),
                    Message("tool", "2"),
                    Message("assistant", "done", train=False),
                ),
                (TOOL,),
            ),
        ),
    ],
)
def test_kinds_are_told_apart(tmp_path: Path, record: Any, kind: str, expected: Conversation) -> None:
    data = open_records(write(tmp_path / "data.jsonl", record))
    assert list(data) == [expected]
    assert data.report.kinds == {kind: 1}


def test_the_canonical_form_is_read_back_as_it_is(tmp_path: Path) -> None:
    record = {
        "messages": [USER, asks(call(identity="x"), call(identity="y")), result("x"), result("y"), REPLY],
        "tools": [TOOL],
        "parallel_tool_calls": False,
    }
    first = open_records(write(tmp_path / "a.jsonl", record))[0]
    assert open_records(write(tmp_path / "b.jsonl", first.to_openai()))[0] == first


# ---------------------------------------------------------------- files


def test_blank_lines_bom_and_windows_line_ends(tmp_path: Path) -> None:
    line = json.dumps({"messages": [USER, REPLY]}, ensure_ascii=False).encode()
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n  \t\r\n" + line + b"\r\n\n" + line)
    data = open_records(path)
    assert [data.where(i) for i in range(len(data))] == ["data.jsonl:3", "data.jsonl:5"]
    assert data[0] == data[1] == PLAIN
    path.write_bytes(b"\xef\xbb\xbf" + line)
    assert open_records(path)[0] == PLAIN


def test_gzip_holds_the_same(tmp_path: Path) -> None:
    plain = write(
        tmp_path / "data.jsonl", *({"messages": [{**USER, "content": str(i)}, REPLY]} for i in range(50))
    )
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    one, other = open_records(plain), open_records(packed)
    assert [one[i] for i in range(50)] == [other[i] for i in reversed(range(50))][::-1]
    assert one.fingerprint == other.fingerprint
    assert other.where(49) == "data.jsonl.gz:50"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('{{"messages": {m}}}', [1]),
        ('\n {{"messages":\n {m}\n}}\n\n', [2]),
        ('[\n {{"messages": {m}}},\n\n {{"messages":\n{m}}}\n]\n', [2, 4]),
        ('{{"messages": {m}}}\n{{"messages": {m}}}\n', [1, 2]),
        ('{{\n"messages": {m}}}\n{{"messages": {m}}}\n', [1, 3]),
    ],
)
def test_json_documents(tmp_path: Path, text: str, lines: list[int]) -> None:
    path = tmp_path / "data.json"
    path.write_text(text.format(m=json.dumps([USER, REPLY], ensure_ascii=False)), encoding="utf-8")
    data = open_records(path)
    assert [data.where(i) for i in range(len(data))] == [f"data.json:{n}" for n in lines]
    assert list(data) == [PLAIN] * len(lines)


def test_the_ending_of_a_document_may_be_in_capitals(tmp_path: Path) -> None:
    path = tmp_path / "DATA.JSON"
    path.write_text(json.dumps([{"messages": [USER, REPLY]}], indent=1), encoding="utf-8")
    assert list(open_records(path)) == [PLAIN]


def test_a_broken_list_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[\n {"messages": [\n oops]}]')
    assert problems_of(path) == [
        "data.json:3: no JSON: Expecting value at column 2, found 'oops]}]'; expected one JSON object"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{0},\n{1}", "data.json:2: the end within the list; expected ',' or ']'; the file was cut short, copy it again"),
        ("[{0},\n{1},", "data.json:2: no JSON: Expecting value at column 237, found the end; expected one JSON object"),
        ("[{0},\n{1},]", "data.json:2: no JSON: Expecting value at column 237, found ']'; expected one JSON object"),
        ("[{0}\n{1}]", """data.json:2: '{{"messages": [{{"role' within the list; expected ',' or ']'; what stands after it is left out"""),
        ("[{0},\n{1}]\n[{2}]\n", """data.json:3: '[{{"messages": [{{"rol' after the end of the list; expected one list a file; name each file by its own -d; what stands after it is left out"""),
        ("[{0},\n{1}]\n{2}\n", """data.json:3: '{{"messages": [{{"role' after the end of the list; expected one list a file; name each file by its own -d; what stands after it is left out"""),
        ("[{0},\n{1}]\n\n]", "data.json:4: ']' after the end of the list; expected one list a file; name each file by its own -d"),
        ("[{0},\n{1},,{2}]", "data.json:2: no JSON: Expecting value at column 237, found ',{{\"messages\": [{{\"rol'; expected one JSON object; what stands after it is left out"),
        ("{0}\n{1}\n[{2}]", "data.json:3: [{{'messages': [{{'role': 'user', 'content...; expected one JSON object, a conversation"),
        ("[{0},\n{1},\n[{2}]]", "data.json:3: [{{'messages': [{{'role': 'user', 'content...; expected one JSON object, a conversation"),
        ("[", "data.json:1: the end within the list; expected ',' or ']'; the file was cut short, copy it again"),
    ],
)  # fmt: skip
def test_a_list_that_is_cut_or_goes_on_is_told(tmp_path: Path, text: str, message: str) -> None:
    """What can be read is, under skip; that something cannot is a problem in any case."""
    path = tmp_path / "data.json"
    conversations = [{"messages": [USER, {**REPLY, "content": f"{n}" * 123}]} for n in range(3)]
    path.write_text(text.format(*map(json.dumps, conversations)))
    assert problems_of(path) == [message.format()]
    if text == "[":
        return
    data = open_records(path, on_error="skip")
    read = 1 if text.startswith("[{0}\n") else 2
    assert [found.to_openai() for found in data] == conversations[:read]
    assert data.report.skipped == 1


def test_a_list_of_numbers_too_long_for_python_is_read_on(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    good = json.dumps({"messages": [USER, REPLY]})
    path.write_text(f'[{good},\n{{"n": {"9" * 5000}, "messages": []}},\n{good}]')
    data = open_records(path, on_error="skip")
    assert [data.where(i) for i in range(len(data))] == ["data.json:1", "data.json:3"]
    assert str(data.report.problems[0]).startswith("data.json:2: no JSON that can be read (Exceeds the limit")


def test_a_byte_that_is_no_utf8_costs_a_whole_document_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    good = json.dumps({"messages": [USER, REPLY]}).encode()
    path.write_bytes(b"[" + good + b",\n" + good.replace(b"hi", b"h\xff") + b"]")
    (message,) = problems_of(path)
    assert message.startswith("data.json:2: byte 0xff at position ")
    assert message.endswith(" is no UTF-8; expected UTF-8; the whole file is left out")


def test_several_files_keep_their_order_and_names(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    record = {"messages": [USER, REPLY]}
    one, two = (
        write(tmp_path / "x" / "data.jsonl", record, record),
        write(tmp_path / "y" / "data.jsonl", record),
    )
    other = write(tmp_path / "other.jsonl", record)
    data = open_records([one, two, other])
    assert [data.where(i) for i in range(4)] == [f"{one}:1", f"{one}:2", f"{two}:1", "other.jsonl:1"]
    assert [data.file_of(i) for i in range(4)] == [0, 0, 1, 2]
    assert data.report.files == (str(one), str(two), "other.jsonl")
    assert data[-1] == data[3] == data[1:3][1]
    with pytest.raises(IndexError):
        data[4]


def test_a_folder_is_its_files_by_name(tmp_path: Path) -> None:
    record = {"messages": [USER, REPLY]}
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "b.json", record)
    write(tmp_path / "folder" / "a.jsonl", record)
    (tmp_path / "folder" / "C.csv.gz").write_bytes(gzip.compress(b"prompt,response\n1+1?,2\n"))
    other = write(tmp_path / "other.jsonl", record, record)
    data = open_records([other, tmp_path / "folder"])
    assert data.report.files == ("other.jsonl", "C.csv.gz", "a.jsonl", "b.json")
    assert [data.where(i) for i in range(2, 5)] == ["C.csv.gz:2", "a.jsonl:1", "b.json:1"]
    assert [data.given_of(i) for i in range(5)] == [0, 0, 1, 1, 1]
    assert [path.name for path in data.paths] == list(data.report.files)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def message(path: Path | list[Path]) -> str:
        with pytest.raises(DataError) as caught:
            open_records(path, on_error="skip")
        return str(caught.value)

    endings = ".jsonl, .json, .csv, .jsonl.gz, .json.gz, .csv.gz, .parquet"
    assert message([]) == f"no data was given; name at least one file ({endings}) or folder"
    assert message(tmp_path / "none.jsonl") == f"{tmp_path}/none.jsonl: no such data file"
    (tmp_path / "sub" / "below").mkdir(parents=True)
    write(tmp_path / "sub" / ".hidden.jsonl", {"messages": [USER, REPLY]})
    write(tmp_path / "sub" / "below" / "data.jsonl", {"messages": [USER, REPLY]})
    write(tmp_path / "sub" / "notes.txt", b"x")
    assert message(tmp_path / "sub") == (
        f"{tmp_path / 'sub'}: no data file in this folder; expected names in {endings}"
    )
    assert (
        message(write(tmp_path / "empty.jsonl")) == "empty.jsonl: empty; expected at least one conversation"
    )
    assert (
        message(write(tmp_path / "list.json", [])) == "list.json: empty; expected at least one conversation"
    )
    full = write(tmp_path / "full.jsonl", {"messages": [USER, REPLY]})
    assert message([full, tmp_path / "empty.jsonl", tmp_path / "list.json"]) == (
        "empty.jsonl, list.json: empty; expected at least one conversation"
    )
    assert message(write(tmp_path / "text.jsonl.gz", b"plain text")) == (
        "text.jsonl.gz: no gzip data in it; expected what gzip writes, or a name without .gz"
    )
    cut = gzip.compress(bytes(random.Random(0).randbytes(5000)))[:-40]
    assert message(write(tmp_path / "cut.jsonl.gz", cut)).startswith("cut.jsonl.gz: damaged gzip data (")
    assert message(tmp_path / "nul\0.jsonl").endswith("nul\\x00.jsonl: cannot be read (embedded null byte)")
    with pytest.raises(DataError, match=r"^data: '' is no name; expected that of a file or folder$"):
        open_records("")  # to Path it is the current folder
    assert message(Path("x" * 5_000)).endswith(": cannot be read (File name too long)")
    assert len(message(Path("x" * 5_000))) < 600
    (tmp_path / "sub" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    assert message(tmp_path / "sub") == f"{tmp_path / 'sub' / 'gone.jsonl'}: no such data file"


def test_a_name_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(write(tmp_path / "mine.jsonl", {"messages": [USER, REPLY]}).parent))
    assert list(open_records("~/mine.jsonl")) == [PLAIN]
    with pytest.raises(DataError, match=r"^~nobody-here/x: no such data file$"):
        open_records("~nobody-here/x")


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(DataError, match=r"^/.*: cannot be read \(Permission denied\)$"):
        open_records(tmp_path)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"messages": [USER, REPLY]})
    data = open_records(path)
    data.ensure_unchanged()
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(
        DataError, match=r"^data.jsonl:1: the file changed after it was checked; start again$"
    ):
        data[0]
    path.write_bytes(b"short")
    with pytest.raises(DataError, match=r"^data.jsonl: was written to while it was being read; start again$"):
        data.ensure_unchanged()


def test_records_go_to_another_process_and_threads(tmp_path: Path) -> None:
    path = write(
        tmp_path / "data.jsonl", *({"messages": [{**USER, "content": str(i)}, REPLY]} for i in range(200))
    )
    data = open_records(path)
    assert list(pickle.loads(pickle.dumps(data))) == list(data)
    wrong: list[int] = []

    def read(seed: int) -> None:
        order = random.Random(seed).sample(range(200), 200)
        wrong.extend(i for i in order if data[i].messages[0].content != str(i))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---------------------------------------------------------------- problems, word for word

DEEP = json.loads('{"a":' * 70 + "1" + "}" * 70)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"messages": [USER, REPLY, USER, REPLY, REPLY]},
            "message 4 is 'assistant' after 'assistant'; expected 'user' or 'tool'",
        ),
        ({"messages": [REPLY]}, "message 0 is 'assistant', the first one; expected 'system' or 'user'"),
        (
            {"messages": [USER, {"role": "system", "content": ""}]},
            "message 1 is 'system' after 'user'; expected 'assistant'",
        ),
        (
            {"messages": [USER, REPLY, USER]},
            "message 2, the last one, is 'user'; expected 'assistant', a reply to learn",
        ),
        ({"messages": [USER, {"role": "bot"}]}, "message 1: role 'bot'; expected one of system, user, assistant, tool"),
        ({"messages": []}, "messages: empty; expected a list with at least one message"),
        ({"messages": [USER, {"role": "assistant", "content": "\n "}]}, "message 1 is an empty reply; expected text or tool_calls"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "message 1: content is a number; expected text"),
        ({"a": 1, "b": 2}, "no conversation among 'a', 'b'; expected 'messages', 'conversations', 'instruction', 'prompt' and 'completion', or 'text'"),
        ([1, 2], "[1, 2]; expected one JSON object, a conversation"),
        (b"{", "no JSON: Expecting property name enclosed in double quotes at column 2, found the end; expected one JSON object; JSON over several lines belongs in a .json file"),
        (b"[", "no JSON: Expecting value at column 2, found the end; expected one JSON object; JSON over several lines belongs in a .json file"),
        (b'{"messages": 1} x', "'x' after the end of the object; expected one JSON object a line"),
        (b'{"messages": NaN}', "NaN is no JSON number; expected a number, text or null"),
        (b'{"messages": -Infinity}', "-Infinity is no JSON number; expected a number, text or null"),
        (b'{"messages": 1e999}', "1e999 is no JSON number; expected a number, text or null"),
        (b'{"messages": [], "messages": []}', "key 'messages' appears twice in one object; expected once"),
        (b"\0\0\0", "3 NUL bytes at the start; the file was damaged when it was written or copied; copy it again"),
        (b'{"a": "\0"}', "no JSON: Invalid control character at at column 8, found '\\x00\"}'; expected one JSON object"),
        (b'{"a": "\xed\xa0\x80"}', "byte 0xed at position 7 is no UTF-8; expected UTF-8"),
        (b"\xff\xfe{\0", "byte 0xff at position 0 is no UTF-8; the file looks like UTF-16; save it as UTF-8"),
        (b"[" * 100_000, "nested too deeply to be read; expected at most 64 levels"),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\ud83d"}]}',
            "half of a surrogate pair (\\ud800 to \\udfff); expected whole characters; remove it",
        ),
        (
            {"messages": [USER, asks(call(arguments='{"a": 1, "b": "\\ud83d"}'))], "tools": [TOOL]},
            "half of a surrogate pair (\\ud800 to \\udfff); expected whole characters; remove it",
        ),
        (
            {"messages": [USER, asks(call()), REPLY], "tools": [TOOL]},
            "message 2 is 'assistant' after 'assistant'; expected 'user' or 'tool'",
        ),
        (
            {"messages": [USER, asks(call(), call()), result(), REPLY], "tools": [TOOL]},
            "message 1 has 2 tool calls and 1 result after it; expected one 'tool' message for each call, in order",
        ),
        (
            {"messages": [USER, REPLY, result(), REPLY]},
            "message 1 has 0 tool calls and 1 result after it; expected one 'tool' message for each call, in order",
        ),
        (
            {"messages": [USER, asks(call(identity="x")), result("z"), REPLY], "tools": [TOOL]},
            "message 2: tool_call_id 'z'; expected 'x'; correct the id",
        ),
        (
            {"messages": [USER, asks(call()), result(name="sub"), REPLY], "tools": [TOOL]},
            "message 2: result of 'sub'; expected that of call 0, 'add'",
        ),
        (
            {"messages": [USER, asks(call("sub"))], "tools": [TOOL]},
            "message 1: tool_calls[0]: call of 'sub', which was not offered; expected one of: add",
        ),
        (
            {"messages": [USER, asks(call())]},
            "message 1: tool_calls[0]: call of 'add', which was not offered; expected one of: none",
        ),
        (
            {"messages": [USER, asks(call(arguments={"a": "1"}))], "tools": [TOOL]},
            "message 1: tool_calls[0]: arguments of 'add': a: '1' is not of type 'integer'",
        ),
        (
            {"messages": [USER, asks(call(arguments="[1]"))], "tools": [TOOL]},
            "message 1: tool_calls[0]: arguments hold a list; expected an object",
        ),
        (
            {"messages": [USER, asks(call(arguments=DEEP))], "tools": [TOOL]},
            "message 1: tool_calls[0]: arguments nested more than 64 levels deep; expected a flatter object",
        ),
        (
            {"messages": [USER, REPLY], "tools": [{"function": {"name": "f", "parameters": DEEP}}]},
            "tools: nested more than 64 levels deep; expected a flatter schema",
        ),
        ({"messages": [USER, REPLY], "tools": [TOOL, TOOL]}, "tools: 2 tools are called 'add'; expected one"),
        ({"messages": [{"role": "user", "contnt": "hi"}, REPLY]}, "message 0: no 'content' among 'role', 'contnt'; expected text"),
        (
            {"messages": [USER, asks(call(arguments='{"a": 1e999}'))], "tools": [TOOL]},
            "message 1: tool_calls[0]: arguments: 1e999 is no JSON number; expected a number, text or null",
        ),
        (
            {"messages": [USER, asks(call(arguments='{"a": 1, "b": {"c": 1, "c": 2}}'))], "tools": [TOOL]},
            "message 1: tool_calls[0]: arguments: key 'c' appears twice in one object; expected once",
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "name": "add"}'}]},
            "conversations[1]: function_call is no JSON (key 'name' appears twice in one object; expected once); expected a call",
        ),
        (
            {"messages": [USER, REPLY], "tools": '[{"name": "f", "parameters": {"maximum": 1e999}}]'},
            "tools: text that is no JSON (1e999 is no JSON number; expected a number, text or null); expected a list of tools",
        ),
        ({"messages": [USER, REPLY], "tools": 3}, "tools: a number; expected a list of tools"),
        (
            {"messages": [USER, REPLY], "tools": "["},
            "tools: text that is no JSON (Expecting value: line 1 column 2 (char 1)); expected a list of tools",
        ),
        ({"conversations": [{"from": "me", "value": ""}]}, "conversations[0]: from 'me'; expected one of " + ", ".join(formats.SHAREGPT_ROLES)),
        ({"conversations": [["human", "hi"]]}, "conversations[0]: ['human', 'hi']; expected an object with 'from' and 'value'"),
        ({"messages": "hello"}, "messages: text that is no JSON (Expecting value: line 1 column 1 (char 0)); expected a list of messages"),
        ({"text": 3}, "text: 3; expected text, a document"),
        ({"messages": [USER, REPLY], "system": 3}, "system: 3; expected text"),
        (
            {"messages": [{"role": "system", "content": "t"}, USER, REPLY], "system": "s"},
            "system: another text than that of the system message that the messages begin with; leave one of them out",
        ),
        ({"text": " \n"}, "text is empty; expected a document"),
        ({"instruction": "a"}, "no 'output' beside 'instruction'; expected the reply"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "history: no list of pairs; expected [[question, answer], ...]"),
    ],
)  # fmt: skip
def test_problem(tmp_path: Path, line: Any, message: str) -> None:
    assert problem_of(tmp_path, line) == message


@pytest.mark.parametrize(("depth", "beyond"), [(0, False), (64, False), (65, True), (5000, True)])
def test_depth(depth: int, beyond: bool) -> None:
    value: Any = 1
    for k in range(depth):
        value = {"a": 1, "b": value} if k % 2 else [value, "x"]
    assert checks.is_deeper(value, 64) is beyond


def test_results_in_another_order(tmp_path: Path) -> None:
    messages = [USER, asks(call(identity="x"), call(identity="y")), result("y"), result("x"), REPLY]
    assert problems_of(write(tmp_path / "data.jsonl", {"messages": messages, "tools": [TOOL]})) == [
        "data.jsonl:1: message 2: tool_call_id 'y'; expected 'x'; put the results in the calls' order",
        "data.jsonl:1: message 3: tool_call_id 'x'; expected 'y'; put the results in the calls' order",
    ]


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "dict"},
        {"type": "object", "properties": {"a": {"pattern": "(", "type": "string"}}},
        {"properties": {"a": {"multipleOf": 0, "type": "number"}}},
        {"$ref": "#/nowhere"},
        {"$ref": "http://127.0.0.1:9/schema"},
        {"$defs": {"x": {"$ref": "#/$defs/x"}}, "$ref": "#/$defs/x"},
        [],
        7,
    ],
)
def test_a_schema_that_cannot_be_used_is_a_problem(tmp_path: Path, parameters: Any) -> None:
    for value in ("text", 4):
        record = {
            "messages": [USER, asks(call(arguments={"a": value}))],
            "tools": [{"type": "function", "function": {"name": "add", "parameters": parameters}}],
        }
        data = write(tmp_path / "data.jsonl", {"messages": [USER, REPLY]}, record)
        assert open_records(data, on_error="skip").report.problem_total in (0, 1)
        if parameters != [] and value == 4 and "properties" not in str(parameters):
            assert "'add'" in problem_of(tmp_path, record)


def test_all_problems_at_once_up_to_a_limit(tmp_path: Path) -> None:
    bad = [
        {"messages": [USER, {"role": "assistant", "content": ""}, USER, {"role": "assistant", "content": ""}]}
    ]
    path = write(tmp_path / "data.jsonl", *bad * 30, {"messages": [USER, REPLY]})
    with pytest.raises(DataError) as caught:
        open_records(path, limit=3)
    assert str(caught.value).splitlines() == [
        "60 problems in 30 of 31 lines; correct them, or leave these lines out with --on_error skip",
        "  data.jsonl:1: message 1 is an empty reply; expected text or tool_calls",
        "  data.jsonl:1: message 3 is an empty reply; expected text or tool_calls",
        "  data.jsonl:2: message 1 is an empty reply; expected text or tool_calls",
        "  ... and 57 more",
    ]
    data = open_records(path, on_error="skip", limit=3)
    assert (len(data), data.where(0), data.report.skipped, data.report.problem_total) == (
        1,
        "data.jsonl:31",
        30,
        60,
    )
    assert data.report.describe().splitlines()[:2] == [
        "1 conversation in data.jsonl (1 openai)",
        "left out 30 of 31 lines (60 problems):",
    ]
    with pytest.raises(DataError, match="2 problems in 1 of 1 line;"):
        open_records(write(tmp_path / "bad.jsonl", *bad), on_error="skip")


def test_a_message_is_one_line_and_not_endless(tmp_path: Path) -> None:
    message = problem_of(tmp_path, {"messages": [{"role": "\x1b[31m\n\ud800" + "x" * 10_000}]})
    assert len(message) < 600
    assert message.isprintable()


# ---------------------------------------------------------------- suspicious but usable


def test_calls_are_counted_by_function(tmp_path: Path) -> None:
    other = {"type": "function", "function": {"name": "half", "parameters": {"type": "object"}}}
    twice = {
        "messages": [USER, asks(call(), call(), call("half", "{}")), result(), result(), result(), REPLY]
    }
    data = open_records(
        write(
            tmp_path / "data.jsonl",
            {"messages": [USER, REPLY]},
            {**twice, "tools": [TOOL, other]},
            {"messages": [USER, asks(call("unknown"))], "tools": [TOOL]},
        ),
        on_error="skip",
    )
    assert list(data.report.calls.items()) == [("add", 2), ("half", 1)]  # of good lines, commonest first
    assert data.report.to_json()["calls"] == {"add": 2, "half": 1}


def test_duplicates_contradictions_and_control_tokens(tmp_path: Path) -> None:
    def said(question: str, reply: str, **more: Any) -> dict[str, Any]:
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": reply, **more},
            ]
        }

    lines = [
        said("a", "1"),
        said("a", "1", train=True),  # the same, in other words
        {"instruction": "a", "output": "1"},
        said("a", "2"),
        said("b", "1"),
        said("<|im_end|>", "\u003c|endoftext|>"),
        {**said("a", "1"), "tools": [TOOL]},
    ]
    data = open_records(write(tmp_path / "data.jsonl", *lines))
    report = data.report
    assert (report.duplicates, report.contradictions, report.control_tokens) == (2, 1, 1)
    assert report.kinds == {"openai": 6, "alpaca": 1}
    notes = [str(note) for note in report.notes]
    assert notes[-1] == "data.jsonl:6: control token typed in the text"
    assert {note.split(" ", 1)[1] for note in notes[:2]} <= {
        f"says exactly what data.jsonl:{n} says" for n in (1, 2)
    }
    assert [note for note in notes if "another reply" in note]


def test_reasoning_is_counted_by_conversation_and_under_both_names(tmp_path: Path) -> None:
    replies = [
        {"content": "a"},
        {"content": "a", "reasoning_content": "why"},
        {"content": "b", "reasoning": "why"},
        {"content": "<think>\nwhy\n</think>\n\nc"},
        {"content": "d", "reasoning_content": ""},
        {"content": "e", "tool_calls": [call()], "reasoning": None},
        {"content": "<think>why</think>", "tool_calls": [call()]},
    ]
    lines = [{"messages": [USER, REPLY | reply], "tools": [TOOL]} for reply in replies]
    lines.append(
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "f", "reasoning": "w"}]}
    )
    lines.append({"messages": [{"role": "user", "content": "what is </think>?"}, REPLY]})
    data = open_records(write(tmp_path / "data.jsonl", *lines))
    assert data.report.reasoning == 5
    assert "with reasoning: 5 (55.6%)" in data.report.describe().splitlines()
    assert [data[k].messages[1].reasoning for k in (1, 2, 7)] == ["why", "why", "w"]
    both = {"messages": [USER, REPLY | {"reasoning": "a", "reasoning_content": "b"}]}
    assert (
        problem_of(tmp_path, both)
        == "message 1: 'reasoning' and 'reasoning_content' differ; give one of them"
    )


def test_variables_of_the_chat_template(tmp_path: Path) -> None:
    plain = {"messages": [USER, REPLY]}
    given = {**plain, "chat_template_kwargs": {"enable_thinking": False}}
    data = open_records(
        write(tmp_path / "data.jsonl", plain, given, {**plain, "chat_template_kwargs": {}}, given)
    )
    assert [data[k].template_kwargs for k in range(4)] == [
        {},
        {"enable_thinking": False},
        {},
        {"enable_thinking": False},
    ]
    assert (data.report.duplicates, data.report.contradictions) == (2, 0)
    assert data[1].to_openai() == given
    for value, found in (
        ([], "empty"),
        ("x", "text that is no JSON (Expecting value: line 1 column 1 (char 0))"),
        (False, "true or false"),
    ):
        assert problem_of(tmp_path, {**plain, "chat_template_kwargs": value}) == (
            f"chat_template_kwargs: {found}; expected an object: the template's variables and values"
        )


def test_many_repeats_are_counted_exactly(tmp_path: Path) -> None:
    rng = random.Random(1)
    pairs = [(rng.randrange(500), rng.randrange(3)) for _ in range(3000)]
    data = open_records(
        write(tmp_path / "data.jsonl", *({"instruction": f"q{q}", "output": f"r{r}"} for q, r in pairs))
    )
    assert data.report.duplicates == 3000 - len(set(pairs))
    assert data.report.contradictions == len(set(pairs)) - len({q for q, _ in pairs})


# ---------------------------------------------------------------- any bytes

_TEXT = st.text(max_size=8)
_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=10,
)
_KEYS = st.sampled_from(
    [
        *("messages", "conversations", "instruction", "input", "output", "history", "prompt", "completion"),
        *(
            "system",
            "tools",
            "role",
            "content",
            "from",
            "value",
            "tool_calls",
            "function",
            "name",
            "arguments",
        ),
        *("id", "tool_call_id", "parameters", "type", "train", "weight", "reasoning_content"),
    ]
)
_WORDS = st.sampled_from(
    ["user", "assistant", "tool", "system", "human", "gpt", "function_call", "observation", "add"]
)
_ALMOST = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | _WORDS | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=6),
    max_leaves=30,
)
_RECORD = st.dictionaries(_KEYS, _ALMOST | _VALUE, max_size=6)
_LINE = st.one_of(
    st.binary(max_size=60),
    st.builds(lambda v: json.dumps(v).encode(), _VALUE | _RECORD),
    st.builds(lambda v: json.dumps({"messages": v}).encode(), st.lists(_RECORD, max_size=4)),
    st.just(json.dumps({"messages": [USER, REPLY]}).encode()),
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(lines=st.lists(_LINE, max_size=6), name=st.sampled_from(["d.jsonl", "d.json", "d.jsonl.gz"]))
def test_any_bytes_give_problems_or_a_good_result(
    tmp_path_factory: Any, lines: list[bytes], name: str
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(b"\n".join(lines))
    before = path.read_bytes()
    try:
        data = open_records(path, on_error="skip")
    except DataError as error:
        assert str(error)
    else:
        for conversation in data:
            assert records.check(conversation) == []
            assert Conversation.from_openai(json.loads(json.dumps(conversation.to_openai()))) == conversation
            json.dumps(conversation.to_openai(), ensure_ascii=False).encode()
    assert path.read_bytes() == before


def lines_of(numbers: range) -> list[str]:
    """Conversations of three kinds, each with a mark of its own in the question."""
    records = []
    for n in numbers:
        mark = f"«{n:02}» 你好\u2028👋 \\ ] }} [ {{ ,"
        turns = [{"from": "human", "value": mark}, {"from": "gpt", "value": "\u2029ok"}]
        kinds: list[dict[str, Any]] = [
            {"messages": [{"role": "user", "content": mark}, REPLY], "source": "x"},
            {"conversations": turns},
            {"instruction": mark, "output": "ok"},
        ]
        records.append(json.dumps(kinds[n % 3], ensure_ascii=False, indent=None if n % 4 else 1))
    return records


def file_of(form: str, numbers: range) -> bytes:
    texts = lines_of(numbers)
    match form:
        case "lines":
            return "".join(text.replace("\n", " ") + "\n" for text in texts).encode()
        case "windows":
            return ("\ufeff" + "".join(text.replace("\n", " ") + "\r\n" for text in texts)).encode()
        case "list":
            return ("[" + ",".join(texts) + "]").encode()
        case "lines of a list":
            return ("[\n" + ",\r\n".join(texts) + "\n]\n").encode()
        case _:
            return "\n".join(texts).encode()


FORMS = {
    "lines": ("jsonl", "json", "jsonl.gz"),
    "windows": ("jsonl", "json", "jsonl.gz"),
    "list": ("json", "jsonl", "json.gz"),
    "lines of a list": ("json", "jsonl", "json.gz"),
    "objects": ("json", "json.gz"),
}
STUFF = [
    *(b"\xff", b"\xe4\xbd", b"\xef\xbb\xbf", "\u2028".encode(), b"\0", b"\r", b"\n", b"\r\n", b"\x1f\x8b"),
    *(b"]", b"[", b"}", b"{", b",", b'"', b"\\", b"}{", b"][", b"{}", b"null", b"x"),
]
DAMAGE = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(b"")),
    st.tuples(st.just("insert"), st.floats(0, 1), st.sampled_from(STUFF)),
    st.tuples(st.just("overwrite"), st.floats(0, 1), st.sampled_from(STUFF)),
    st.tuples(st.just("delete"), st.floats(0, 1), st.sampled_from([b"1", b"22", b"333"])),
)


def damaged(content: bytes, how: str, share: float, stuff: bytes) -> bytes:
    at = round(share * len(content))
    rest = {"cut": len(content), "insert": at, "overwrite": at + len(stuff), "delete": at + len(stuff)}[how]
    return content[:at] + (stuff if how in ("insert", "overwrite") else b"") + content[rest:]


@settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_conversation_of_a_damaged_file_is_lost_in_silence(tmp_path_factory: Any, data: Any) -> None:
    """Each one whose mark is still in the bytes is read, or a problem stands where it would have been."""
    form = data.draw(st.sampled_from(list(FORMS)))
    name = f"d.{data.draw(st.sampled_from(FORMS[form]))}"
    first = data.draw(st.integers(1, 4))
    parts = [file_of(form, range(first))]
    if data.draw(st.booleans()):  # two files, one after the other
        parts.append(file_of(data.draw(st.sampled_from(list(FORMS))), range(first, first + 2)))
    damages = data.draw(st.lists(st.tuples(st.integers(0, len(parts) - 1), DAMAGE), max_size=3))
    packed = name.endswith("gz")
    if packed and data.draw(st.booleans()):  # damaged after it was packed
        raw = [gzip.compress(part, mtime=0) for part in parts]
        for part, damage in damages:
            raw[part] = damaged(raw[part], *damage)
        content = b"".join(part for part, left in zip(parts, raw, strict=True) if left)
    else:
        for part, damage in damages:
            parts[part] = damaged(parts[part], *damage)
        content = b"".join(parts)
        raw = [gzip.compress(part, mtime=0) if packed else part for part in parts]
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(b"".join(raw))
    try:
        found = open_records(path, on_error="skip", limit=1000)
    except DataError as error:
        assert str(error)
        return
    read = {
        int(found.where(i).rpartition(":")[2]): json.dumps(found[i].to_openai()) for i in range(len(found))
    }
    told = [int(problem.where.rpartition(":")[2]) for problem in found.report.problems]
    texts = " ".join(json.dumps(one.to_openai(), ensure_ascii=False) for one in found)
    by_lines = b"\n" in content and path.suffixes[0] == ".jsonl"
    for number in range(first + 2):
        mark = f"«{number:02}»"
        if mark.encode() not in content or mark in texts:
            continue
        line = content[: content.index(mark.encode())].count(b"\n") + 1
        between = [{*range(min(line, at) + 1, max(line, at) + 1)} & read.keys() for at in told]
        assert line in told if by_lines else any(not reads for reads in between), (line, told, [*read])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": _TEXT}
        ),
        max_size=6,
    )
)
def test_the_quick_check_agrees_with_the_thorough_one(messages: list[dict[str, str]]) -> None:
    turns = checks.plain_turns({"messages": messages})
    if not messages:
        assert turns is None
        return
    conversation = Conversation.from_openai({"messages": messages})
    if turns is not None:
        assert checks.check(conversation) == []
        assert turns == tuple(zip(*((m.role, m.content) for m in conversation.messages), strict=True))
    elif all(message["role"] != "tool" and message["content"].strip() for message in messages):
        assert checks.check(conversation) != []


@pytest.mark.parametrize(
    "record",
    [
        [],
        {},
        {"messages": None},
        {"messages": ""},
        {"messages": "hi"},
        {"messages": {"role": "user"}},
        {"messages": [USER, "hi"]},
        {"messages": [USER, ["role", "content"]]},
        {"messages": [USER, {"role": ["assistant"], "content": "hi"}]},
        {"messages": [USER, {"role": "assistant", "content": ["hi"]}]},
        {"messages": [USER, {"role": "assistant", "content": None}]},
        {"messages": [USER, REPLY | {"train": False}]},
        {"messages": [USER, REPLY], "tools": [TOOL]},
    ],
)
def test_what_is_no_list_of_roles_and_texts_is_read_thoroughly(record: Any) -> None:
    assert checks.plain_turns(record) is None


def test_a_ten_megabyte_line(tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "字" * 3_500_000}, REPLY]}
    data = open_records(
        write(tmp_path / "data.jsonl", {"messages": [USER, REPLY]}, long, {"messages": [USER, REPLY]})
    )
    assert len(data[1].messages[0].content) == 3_500_000
    assert data[1].messages[1].content == " hi\tthere "
    assert data[2] == PLAIN


def test_an_endless_line_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "LONGEST_LINE", 1000)
    good = {"messages": [USER, REPLY]}
    data = open_records(write(tmp_path / "data.jsonl", good, b"x" * 5000, good), on_error="skip")
    assert [data.where(i) for i in range(len(data))] == ["data.jsonl:1", "data.jsonl:3"]
    assert data[1] == PLAIN
    assert (
        str(data.report.problems[0])
        == "data.jsonl:2: a line of more than 1,000 bytes; expected one conversation"
    )


def test_memory_stays_flat(tmp_path: Path) -> None:
    """At most 40 bytes a line while checking, whatever the lines hold."""

    def peak(lines: int) -> int:
        path = tmp_path / f"{lines}.jsonl"
        with path.open("w") as file:
            for i in range(lines):
                file.write(f'{{"messages": [{{"role": "user", "content": "question {i} {"x" * 200}"}}, ')
                file.write('{"role": "assistant", "content": "yes"}]}\n')
        tracemalloc.start()
        open_records(path)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    small, large = peak(1_000), peak(21_000)
    assert (large - small) / 20_000 <= 40
