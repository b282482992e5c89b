"""CSV files: the same conversations as their lines, at the lines where their rows begin."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from qwen_chat.conversation import Conversation, Message
from qwen_chat.data.records import open_records
from qwen_chat.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "finetune" / "io_file" / "input_data" / "example_data.jsonl"


def saved(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def rows_as_csv(rows: list[dict[str, Any]], **how: Any) -> str:
    out = io.StringIO(newline="")
    table = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), **how)
    table.writeheader()
    table.writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize(("separator", "mark"), [(",", ""), (";", "\ufeff"), ("\t", "")])
def test_rows_are_read_as_lines_are(tmp_path: Path, separator: str, mark: str) -> None:
    lines = [json.loads(line) for line in EXAMPLE.read_text(encoding="utf-8").splitlines()]
    rows = [
        {
            "id": number,
            "messages": json.dumps(line["messages"], ensure_ascii=False),
            "tools": json.dumps(line["tools"]) if line.get("tools") else "",
            "parallel_tool_calls": {True: "TRUE", False: "False", None: ""}[line.get("parallel_tool_calls")],
        }
        for number, line in enumerate(lines)
    ]
    records = open_records(saved(tmp_path / "a.csv", mark + rows_as_csv(rows, delimiter=separator)))
    assert list(records) == list(open_records(EXAMPLE))
    assert records.where(7) == "a.csv:9"


def test_plain_columns_and_cells_of_several_lines(tmp_path: Path) -> None:
    text = (
        "instruction,input,output,system\r\n"
        '"Say ""hi"",\r\ntwice",,"hi\nhi",\r\n'
        "\r\n"
        ",,,\r\n"
        "1+1?,as a word,二,Be brief.\r\n"
    )
    records = open_records(saved(tmp_path / "b.CSV", text))
    assert records[0] == Conversation((Message("user", 'Say "hi",\r\ntwice'), Message("assistant", "hi\nhi")))
    assert [message.content for message in records[1].messages] == ["Be brief.", "1+1?\nas a word", "二"]
    assert [records.where(i) for i in range(2)] == ["b.CSV:2", "b.CSV:7"]


BROKEN = "write a quote within a cell twice, and close each cell that a quote opens; what stands after it is left out"


@pytest.mark.parametrize(
    ("rows", "problems", "left"),
    [
        (
            '1,2\na,"b" c\nd,e\n',
            [f"c.csv:3: the quotes of this row are broken (',' expected after '\"'); {BROKEN}"],
            1,
        ),
        (
            '1,2\na,"b\nd,e\nf,"g"\n',
            [f"c.csv:3: the quotes of this row are broken in line 5 (',' expected after '\"'); {BROKEN}"],
            1,
        ),
        (
            '1,2\na,"b\nd,e\n',
            [f"c.csv:3: the quotes of this row are broken in line 4 (unexpected end of data); {BROKEN}"],
            1,
        ),
        (
            'a,b,c\n1,2\nd\n"x\ny",\n',
            [
                "c.csv:2: 3 of 2 cells; put a cell that holds ',' or a line break in quotes",
                "c.csv:4: 1 of 2 cells; put a cell that holds ',' or a line break in quotes",
                "c.csv:5: no conversation among 'prompt'",
            ],
            1,
        ),
    ],
)
def test_broken_rows_are_told_with_their_lines(
    tmp_path: Path, rows: str, problems: list[str], left: int
) -> None:
    path = saved(tmp_path / "c.csv", f"prompt,response\n{rows}")
    with pytest.raises(DataError) as wrong:
        open_records(path)
    assert len(wrong.value.problems) == len(problems)
    for found, told in zip(wrong.value.problems, problems, strict=True):
        assert str(found).startswith(told)
    assert len(open_records(path, on_error="skip")) == left


def test_other_encodings_and_other_columns_are_one_line(tmp_path: Path) -> None:
    table = "prompt,response\n你好,你好\nHi,Hello\n"
    records = open_records(saved(tmp_path / "d.csv", table, "gbk"), on_error="skip")
    assert [str(problem) for problem in records.report.problems] == [
        "d.csv:2: a byte that is no UTF-8; save the table as UTF-8"
    ]
    for name, text, encoding, told in (
        ("e.csv", table, "utf-16", "the file looks like UTF-16; save it as UTF-8"),
        ("f.csv", "question,answer\n1,2\n", "utf-8", "no conversation among its columns (question, answer)"),
        ("g.csv", "", "utf-8", "no conversation among its columns (none)"),
        ("h.csv", "prompt,response,prompt\n1,2,3\n", "utf-8", "2 columns are called 'prompt'; expected one"),
        ("i.csv", "prompt,response\n", "utf-8", "empty; expected at least one conversation"),
    ):
        with pytest.raises(DataError) as wrong:
            open_records(saved(tmp_path / name, text, encoding))
        assert str(wrong.value).startswith(f"{name}: {told}")


def test_names_of_columns_may_have_white_space_and_strange_ones_are_escaped(tmp_path: Path) -> None:
    records = open_records(saved(tmp_path / "a.csv", "prompt, response ,,\nHi,Hello,1,2\n"))
    assert [message.content for message in records[0].messages] == ["Hi", "Hello"]
    for text, told in (
        ("prompt|response\nHi|Hello\n", "(prompt|response); expected 'messages', "),
        ("PK\x03\x1b[31m\n1\n", "('PK\\x03\\x1b[31m'); expected 'messages', "),
        ("a," * 30 + "b\n", "(" + "a, " * 20 + "...); expected"),
    ):
        with pytest.raises(DataError) as wrong:
            open_records(saved(tmp_path / "b.csv", text))
        assert str(wrong.value).startswith(f"b.csv: no conversation among its columns {told}")
        assert str(wrong.value).endswith("; columns are parted by commas, semicolons or tabs")
