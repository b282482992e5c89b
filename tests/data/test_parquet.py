"""Parquet files: the same conversations as their lines, and what is wrong with one in one line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_chat.data.records import open_records
from qwen_chat.errors import DataError, MissingDependency

parquet: Any = pytest.importorskip("pyarrow.parquet")
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "finetune" / "io_file" / "input_data" / "example_data.jsonl"


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_rows_are_read_as_lines_are(tmp_path: Path) -> None:
    """Tools keep their order of keys as text; a struct would hold every tool's every parameter."""
    lines = [json.loads(line) for line in EXAMPLE.read_text(encoding="utf-8").splitlines()]
    rows = [
        {
            "messages": line["messages"],
            "tools": json.dumps(line.get("tools") or []),
            "parallel_tool_calls": line.get("parallel_tool_calls"),
        }
        for line in lines
    ]
    records = open_records(written(tmp_path / "a.parquet", rows))
    assert list(records) == list(open_records(EXAMPLE))
    assert records.where(7) == "a.parquet:8"
    assert records.report.kinds == {"openai": len(lines)}


def test_a_bad_row_is_told_with_its_number(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1?", "completion": "2"}, {"prompt": "2+2?", "completion": None}]
    with pytest.raises(
        DataError, match=r"(?s)1 problem in 1 of 2 lines.*b\.parquet:2: no conversation among"
    ):
        open_records(written(tmp_path / "b.parquet", rows))


def test_other_columns_damage_and_a_missing_package_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = written(tmp_path / "c.parquet", [{"question": "1+1?", "answer": "2"}])
    with pytest.raises(DataError) as wrong:
        open_records(other)
    assert str(wrong.value) == (
        "c.parquet: no conversation among its columns (question, answer); expected 'messages', 'conversations',"
        " 'instruction', 'prompt' and 'completion', or 'text'"
    )
    (tmp_path / "d.parquet").write_bytes(other.read_bytes()[:100])
    with pytest.raises(DataError, match=r"^d\.parquet: no parquet that can be read \([^\n]*\)$"):
        open_records(tmp_path / "d.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        MissingDependency, match=r"^c\.parquet needs the package 'pyarrow'; run: pip install pyarrow$"
    ):
        open_records(other)


def test_texts_that_come_as_bytes_are_read_and_other_columns_are_not(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "你好".encode(), "picture": b"\xff\xd8", "score": float("nan")},
        {"text": b"Hi \xff", "picture": None, "score": None},
    ]
    data = written(tmp_path / "e.parquet", rows)
    assert open_records(written(tmp_path / "f.parquet", rows[:1]))[0].document == "你好"
    with pytest.raises(DataError) as wrong:
        open_records(data)
    assert [str(problem) for problem in wrong.value.problems] == [
        "e.parquet:2: bytes that are no UTF-8; expected text"
    ]
