"""Tables as data: the rows of a `.csv` or `.parquet` file, as lines of JSON at their own line numbers.

In: an open file. Out: one JSON object a row, by the names of its columns, what is empty left out; and what is wrong
with each row that is none.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import IO, Any

from qwen_chat.errors import DataError, MissingDependency, first_line

Defects = Mapping[int, str]  # line -> what is wrong there

# The keys that tell the kinds of record (formats.py reads them): a table has one set of them among its columns.
_COLUMNS = ("messages", "conversations", "instruction", "prompt completion", "prompt response", "text")
# All that is read: other columns may hold pictures, or what JSON has no form for.
_READ_COLUMNS = frozenset(" ".join(_COLUMNS).split()) | {"input", "output", "history", "system", "tools"}
_READ_COLUMNS |= {"parallel_tool_calls", "chat_template_kwargs"}
EXPECTED = "'messages', 'conversations', 'instruction', 'prompt' and 'completion', or 'text'"
_SEPARATORS = ",;\t"  # a spreadsheet separates by the second where the first is the decimal sign
_NO_UTF8 = re.compile("[\udc80-\udcff]")
_LONGEST_CELL = 256 * 2**20
_SHOWN_COLUMNS = 20


def _csv(stream: IO[bytes], lines: IO[bytes], name: str) -> Defects:
    """A row may take several lines: as many follow it here, blank. Broken quotes end the reading, since nobody can
    tell where the next row begins."""
    if stream.read(2) in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{name}: the file looks like UTF-16; save it as UTF-8")
    stream.seek(0)
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    csv.field_size_limit(_LONGEST_CELL)
    head = text.readline()
    headers = [
        [column.strip() for column in next(csv.reader([head], delimiter=one), [])] for one in _SEPARATORS
    ]
    separator, columns = next(
        (pair for pair in zip(_SEPARATORS, headers, strict=True) if _holds_conversations(pair[1])),
        (",", headers[0]),
    )
    _check_columns(columns, name, "; columns are parted by commas, semicolons or tabs")
    text.seek(0)
    rows = csv.reader(text, delimiter=separator, strict=True)
    defects: dict[int, str] = {}
    end = 1  # the line after the last one that was read
    try:
        for row in rows:
            begin, end = end, rows.line_num + 1
            if begin == 1 or not any(row):
                lines.write(b"\n" * (end - begin))
                continue
            if (wrong := _row_problem(row, columns, separator)) is not None:
                defects[begin] = wrong
            cells = {name: cell for name, cell in zip(columns, row, strict=False) if cell}
            written = (
                b"{}" if wrong else json.dumps(cells, ensure_ascii=False).encode("utf-8", "surrogatepass")
            )
            lines.write(written + b"\n" * (end - begin))
    except csv.Error as error:
        where = "" if rows.line_num == end else f" in line {rows.line_num}"
        defects[end] = (
            f"the quotes of this row are broken{where} ({error}); write a quote within a cell twice, and close each"
            " cell that a quote opens; what stands after it is left out"
        )
        lines.write(b"{}\n")
    text.detach()
    return defects


def _row_problem(row: list[str], columns: list[str], separator: str) -> str | None:
    if len(row) != len(columns):
        return f"{len(row)} of {len(columns)} cells; put a cell that holds {separator!r} or a line break in quotes"
    if any(_NO_UTF8.search(cell) for cell in row if not cell.isascii()):
        return "a byte that is no UTF-8; save the table as UTF-8"
    return None


def _parquet(stream: IO[bytes], lines: IO[bytes], name: str) -> Defects:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise MissingDependency("pyarrow", name, extra="parquet") from None
    defects: dict[int, str] = {}
    number = 0
    try:
        with parquet.ParquetFile(stream) as file:
            _check_columns(file.schema_arrow.names, name)
            read = [column for column in file.schema_arrow.names if column in _READ_COLUMNS]
            for batch in file.iter_batches(batch_size=1024, columns=read):
                for row in batch.to_pylist():
                    number += 1
                    try:
                        written = json.dumps(_without_nulls(row), ensure_ascii=False, default=_cell_text)
                    except UnicodeDecodeError:
                        defects[number], written = "bytes that are no UTF-8; expected text", "{}"
                    lines.write(written.encode("utf-8", "surrogatepass") + b"\n")
    except ArrowException as error:
        raise DataError(f"{name}: no parquet that can be read ({first_line(error)})") from None
    return defects


def _without_nulls(value: Any) -> Any:
    """A row without its nulls: parquet has every field of a struct in each row, whether the row says it or not."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _cell_text(value: object) -> str:
    """What JSON has no form for; texts that their program has not marked as such come as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _check_columns(columns: Collection[str], name: str, more: str = "") -> None:
    if not _holds_conversations(columns):
        shown = [column if column.isprintable() else repr(column) for column in columns][:_SHOWN_COLUMNS]
        told = ", ".join([*shown, "..."] if len(columns) > len(shown) else shown) or "none"
        raise DataError(f"{name}: no conversation among its columns ({told}); expected {EXPECTED}{more}")
    for column, count in Counter(columns).items():
        if column and count > 1:
            raise DataError(f"{name}: {count} columns are called {column!r}; expected one")


def _holds_conversations(columns: Collection[str]) -> bool:
    return any(set(kind.split()) <= set(columns) for kind in _COLUMNS)


# By the ending of a file's name: what writes its rows into the second file.
TABLES: Mapping[str, Callable[[IO[bytes], IO[bytes], str], Defects]] = {".csv": _csv, ".parquet": _parquet}
