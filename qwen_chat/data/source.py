"""One data file, opened once: the place and the bytes of each record, and JSON read under stricter rules.

In: a `.json` or `.jsonl` file (UTF-8, with or without BOM, blank lines allowed), or a table (tables.py), whose rows are
read as lines; packed by gzip or not. Out: records in order, or one at its byte offset (safe in threads and forks). Any
bytes give a Defect, never a traceback.
"""

import gzip
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import IO, Any, cast

from qwen_chat.conversation import Json
from qwen_chat.data.tables import TABLES, Defects
from qwen_chat.errors import DataError, FormatError, printable

LONGEST_LINE = 256 * 2**20  # bytes; a longer one is a damaged file, and would not fit in memory as objects
DEEPEST = 64  # levels of nesting in tools and arguments: beyond it, templates and schemas run out of stack
TOO_DEEP = f"nested too deeply to be read; expected at most {DEEPEST} levels"
_BOM = b"\xef\xbb\xbf"
_READ_AT_ONCE = 1 << 20  # bytes read at once
_BLANK = re.compile(r"[ \t\n\r]*")  # JSON's white space


class Defect(FormatError):
    """Bytes that are no JSON object of ours; `at` is the first of them where that is known."""

    at = 0


class Source:
    """One data file. `name` is what messages call it. Raises DataError where it cannot be read."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._stream, self._defects = _open(path, name)
        self._state = _size_and_time(self._stream)
        self._document = path.name.lower().removesuffix(".gz").endswith(".json") and not self._is_lines()

    def __reduce__(self) -> tuple[type["Source"], tuple[Path, str]]:
        return Source, (self.path, self.name)

    def records(self) -> Iterator[tuple[int, int, bytes | Defect]]:
        """Byte offset, line number and bytes of every record that is not blank, or what is wrong there."""
        if self._document:
            yield from self._elements()
            return
        self._stream.seek(0)
        offset = len(_BOM) if self._stream.read(len(_BOM)) == _BOM else 0
        self._stream.seek(offset)
        number = 0
        while raw := self._stream.readline(LONGEST_LINE):
            number += 1
            start, offset = offset, offset + len(raw)
            if len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
                while piece := self._stream.readline(_READ_AT_ONCE):
                    offset += len(piece)
                    if piece.endswith(b"\n"):
                        break
                too_long = f"a line of more than {LONGEST_LINE:,} bytes; expected one conversation"
                yield start, number, Defect(too_long)
            elif not raw.isspace():
                told = self._defects.get(number)
                yield start, number, raw.rstrip(b"\r\n") if told is None else Defect(told)

    @property
    def size(self) -> int:
        """Bytes of the content (uncompressed)."""
        return self._state[0]

    def record_at(self, offset: int, size: int) -> str:
        """The text of the record that begins at `offset` and is at most `size` bytes long."""
        if self._document:
            return b"".join(self._blocks(offset, size)).decode("utf-8", "replace")
        pieces = []
        # Up to the end of the line: bad lines that were left out may follow.
        for block in self._blocks(offset, size):
            head, newline, _ = block.partition(b"\n")
            pieces.append(head)
            if newline:
                break
        return self.decode(b"".join(pieces))

    @staticmethod
    def decode(raw: bytes) -> str:
        """UTF-8 text; Defect names the first byte that is none."""
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            found = f"byte 0x{raw[error.start]:02x} at position {error.start} is no UTF-8"
            utf16 = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
            cure = "the file looks like UTF-16; save it as UTF-8" if utf16 else "expected UTF-8"
            defect = Defect(f"{found}; {cure}")
            defect.at = error.start
            raise defect from None

    def parse(self, text: str) -> Any:
        """The one JSON value in `text`; anything else than JSON's own rules allow is a Defect."""
        try:
            value, end = _DECODER.raw_decode(text, _after_space(text, 0))
        except json.JSONDecodeError as error:
            raise Defect(_no_json(text, error)) from None
        except ValueError as error:  # an integer of more than 4,300 digits
            raise Defect(f"no JSON that can be read ({error}); expected ordinary numbers") from None
        if not self._document and (extra := text[_after_space(text, end) :]):
            raise Defect(f"{extra[:20]!r} after the end of the object; expected one JSON object a line")
        return value

    def digest(self) -> bytes:
        """SHA-256 of the content (uncompressed) and of how it is read."""
        digest = hashlib.sha256(b"document" if self._document else b"lines")
        for block in self._blocks(0, self.size):
            digest.update(block)
        return digest.digest()

    def ensure_unchanged(self) -> None:
        """Raise DataError where the file was written to since it was opened."""
        if _size_and_time(self._stream) != self._state:
            raise DataError(f"{self.name}: was written to while it was being read; start again")

    def _blocks(self, offset: int, size: int) -> Iterator[bytes]:
        """`size` bytes from `offset`, without moving the file's own position (threads and forks share that)."""
        while size and (block := os.pread(self._stream.fileno(), min(size, _READ_AT_ONCE), offset)):
            yield block
            offset, size = offset + len(block), size - len(block)

    def _is_lines(self) -> bool:
        """A `.json` file whose first line is a whole object, with more after it, is really JSON lines."""
        self._stream.seek(0)
        first = self._stream.readline(LONGEST_LINE).removeprefix(_BOM).strip()
        if not first.startswith(b"{") or not first.endswith(b"}") or not self._stream.read(1 << 16).strip():
            return False
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            return False
        return True

    def _elements(self) -> Iterator[tuple[int, int, bytes | Defect]]:
        """The objects of a JSON document: one object, a list of them, or several one after another.

        Where the document itself is broken nobody can tell where the next object begins: reading ends there,
        and the defect says that the rest is left out.
        """
        self._stream.seek(0)
        raw = self._stream.read()
        try:
            text = self.decode(raw)
        except Defect as defect:
            line = raw.count(b"\n", 0, defect.at) + 1
            yield 0, line, Defect(f"{defect}; the whole file is left out")
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
                reason = _no_json(text, error) if isinstance(error, json.JSONDecodeError) else TOO_DEEP
                yield offset, line + text.count("\n", at, stop), Defect(reason + _rest(text, stop))
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
            yield offset + len(text[done:at].encode()), where, Defect(reason + _rest(text, at))


def _open(path: Path, name: str) -> tuple[IO[bytes], Defects]:
    """The file, or an unnamed temporary copy of what a .gz file or a table holds, and what is wrong with lines of the
    latter; DataError where it cannot be read."""
    try:
        stream: IO[bytes] = path.open("rb")
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise DataError(f"{name}: no regular file; save the data in a file first")
        packed = stream.read(2) == b"\x1f\x8b"
        if path.suffix == ".gz" and not packed and os.fstat(stream.fileno()).st_size:
            raise DataError(f"{name}: no gzip data in it; expected what gzip writes, or a name without .gz")
        stream.seek(0)
        table = TABLES.get(PurePath(path.name.lower().removesuffix(".gz")).suffix)
        if packed:
            # Unpacked once: a record can then be read at its offset without reading all that stands before it.
            with stream, gzip.open(stream) as unpacked:
                stream = _temporary()
                shutil.copyfileobj(unpacked, stream, _READ_AT_ONCE)
            stream.seek(0)
        if table is None:
            return stream, {}
        lines = _temporary()
        with stream:
            defects = table(stream, lines, name)
        lines.flush()
        return lines, defects
    except FileNotFoundError:
        raise DataError(f"{printable(str(path))}: no such data file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name}: damaged gzip data ({error}); copy or pack the file again") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{printable(str(path))}: cannot be read ({reason})") from None


def _temporary() -> IO[bytes]:
    """An unnamed file, which lives as long as the Source that reads it."""
    return cast(IO[bytes], tempfile.TemporaryFile(prefix="qwen_chat-"))


def _size_and_time(stream: IO[bytes]) -> tuple[int, int]:
    found = os.fstat(stream.fileno())
    return found.st_size, found.st_mtime_ns


def _no_repeats(pairs: list[tuple[str, Any]]) -> Json:
    plain = dict(pairs)
    if len(plain) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise Defect(f"key {twice!r} appears twice in one object; expected once")
    return plain


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise Defect(f"{digits[:20]} is no JSON number; expected a number, text or null")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_no_repeats, parse_constant=_finite, parse_float=_finite)
_SHAPE = json.JSONDecoder(parse_int=len, parse_float=len)  # where a value ends; any number will do


def _after_space(text: str, at: int) -> int:
    """Where the white space of JSON that begins at `at` ends."""
    return _BLANK.match(text, at).end()  # type: ignore[union-attr]


def strict_json(text: str) -> Any:
    """JSON that stands as text inside a record, under the rules of the record itself: ValueError says why not."""
    try:
        return _DECODER.decode(text)
    except Defect as defect:
        raise ValueError(str(defect)) from None


def _rest(text: str, at: int) -> str:
    """What a defect of a document adds where a conversation may stand after it."""
    return "; what stands after it is left out" if "{" in text[at:] else ""


def _no_json(text: str, error: json.JSONDecodeError) -> str:
    """Where JSON stops being JSON, and what the file may be instead."""
    head = text.lstrip("\x00")
    if len(head) < len(text):
        count = counted(len(text) - len(head), "NUL byte")
        return f"{count} at the start; the file was damaged when it was written or copied; copy it again"
    found = repr(text[error.pos : error.pos + 20]) if error.pos < len(text.rstrip()) else "the end"
    hint = "; JSON over several lines belongs in a .json file" if text.strip() in ("[", "{") else ""
    return f"no JSON: {error.msg} at column {error.colno}, found {found}; expected one JSON object{hint}"


def counted(number: int, noun: str) -> str:
    """A number with its noun in the right form."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
