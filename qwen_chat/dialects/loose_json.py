"""One JSON object, read piece by piece as a model writes it, with the usual slips repaired.

In: pieces of text, cut anywhere. Out: where the object ends, and its text as strict JSON, character for
character what was written, except where it had to be repaired:

    trailing comma            removed
    Python's quotes           'a' -> "a"
    True False None           true false null;  NaN and Infinity, which JSON does not have -> null
    raw control characters    a newline inside a string -> \\n
    unknown escapes           \\d -> \\\\d,  \\' -> '
    a doubled first brace     {{"a": 1} -> {"a": 1}

Nothing else is guessed: a missing comma, quote or brace is BROKEN. No recursion, so depth costs no stack, and
every character is looked at a fixed number of times, also when it comes alone.
"""

import json
import re
from collections.abc import Callable

READING, DONE, BROKEN = range(3)
MAX_DEPTH = 200  # what is nested deeper is BROKEN: json.loads of whoever receives it stops near 1,000
MAX_NUMBER = 4000  # characters; Python refuses to read integers of more than 4,300 digits

_BEGIN, _KEY, _COLON, _VALUE, _NEXT, _STRING, _ESCAPE, _HEX, _WORD = range(9)
_SPACE = re.compile(r"[ \t\r\n]*")
_WHOLE_STRING = re.compile(r'"[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*"')
_PLAIN = {'"': re.compile(r'[^"\\\x00-\x1f]*'), "'": re.compile(r"""[^"'\\\x00-\x1f]*""")}
_WORD_CHARACTERS = re.compile(r"[A-Za-z0-9_+.\-]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_LITERALS = {
    "true": "true",
    "false": "false",
    "null": "null",
    "True": "true",
    "False": "false",
    "None": "null",
} | dict.fromkeys(("NaN", "Infinity", "-Infinity"), "null")


class ObjectScanner:
    """Reads one object. Subclasses may refuse it early through `top_key`, `top_value` and `complete`."""

    def __init__(self) -> None:
        self.status = READING
        self.read = 0  # characters looked at
        self._state = _BEGIN
        self._parts: list[str] = []  # the strict text so far
        self._closers: list[str] = []  # what closes each open bracket
        self._comma = -1  # where in _parts a comma stands that nothing has followed yet
        self._quote = '"'
        self._is_key = False
        self._string_at = 0  # where in _parts the current string began
        self._value_at = 0  # where in _parts the value of a top key began, and its first character
        self._kind = ""
        self._word: list[str] = []
        self._doubled = False

    @property
    def text(self) -> str:
        """The strict JSON text read so far; an object when `status` is DONE."""
        return "".join(self._parts)

    def scan(self, text: str, at: int = 0) -> int:
        """Read `text` from `at`; return where it stopped: after the object, where it broke, or at the end."""
        start, end = at, len(text)
        while at < end and self.status == READING:
            at = _STEPS[self._state](self, text, at)
        self.read += at - start
        return at

    def top_key(self, key: str) -> bool:
        """A key of the object itself was read; False refuses the object."""
        return True

    def top_value(self, kind: str, text: str) -> bool:
        """That key's value was read: its first character and its strict text; False refuses the object."""
        return True

    def complete(self) -> bool:
        """The object has ended; False refuses it."""
        return True

    def _unread(self) -> str:
        """What stands at the end of the text and waits for more: half an escape, a number, a word."""
        begun = {_ESCAPE: "\\", _HEX: "\\u"}.get(self._state, "")
        return begun + "".join(self._word)

    # Each step reads at least one character, or changes the state, and returns where it stopped.

    def _begin(self, text: str, at: int) -> int:
        if text[at] != "{":
            return self._break(at)
        return self._open("{", at)

    def _key(self, text: str, at: int) -> int:
        at = self._skip_space(text, at)
        if at == len(text):
            return at
        character = text[at]
        if character in "\"'":
            self._is_key = True
            return self._open_string(text, at)
        if character == "}":
            return self._close(character, at)
        if character == "{" and len(self._closers) == 1 and self._comma < 0 and not self._doubled:
            self._doubled = True  # the copy of the template with doubled braces taught it so
            return at + 1
        return self._break(at)

    def _colon(self, text: str, at: int) -> int:
        at = self._skip_space(text, at)
        if at == len(text):
            return at
        if text[at] != ":":
            return self._break(at)
        self._parts.append(":")
        self._state = _VALUE
        return at + 1

    def _value(self, text: str, at: int) -> int:
        at = self._skip_space(text, at)
        if at == len(text):
            return at
        character = text[at]
        if character == "]" and self._closers[-1] == "]":
            return self._close(character, at)
        if len(self._closers) == 1:
            self._value_at, self._kind = len(self._parts), character
        if character in "\"'":
            self._is_key = False
            return self._open_string(text, at)
        if character in "{[":
            return self._open(character, at)
        if _WORD_CHARACTERS.fullmatch(character):
            self._comma = -1
            self._state = _WORD
            return at
        return self._break(at)

    def _next(self, text: str, at: int) -> int:
        at = self._skip_space(text, at)
        if at == len(text):
            return at
        character = text[at]
        if character != ",":
            return self._close(character, at)
        self._comma = len(self._parts)
        self._parts.append(",")
        self._state = _KEY if self._closers[-1] == "}" else _VALUE
        return at + 1

    def _string(self, text: str, at: int) -> int:
        end = _PLAIN[self._quote].match(text, at).end()  # type: ignore[union-attr]
        if end > at:
            self._parts.append(text[at:end])
        if end == len(text):
            return end
        character = text[end]
        if character == self._quote:
            self._parts.append('"')
            return self._end_string(end + 1)
        if character == "\\":
            self._state = _ESCAPE
        else:  # a control character, or a double quote between single ones
            self._parts.append(json.dumps(character)[1:-1])
        return end + 1

    def _escape(self, text: str, at: int) -> int:
        character = text[at]
        if character == "u":
            self._word = []
            self._state = _HEX
            return at + 1
        self._state = _STRING
        if character in '"\\/bfnrt':
            self._parts.append("\\" + character)
            return at + 1
        if character == "'":
            self._parts.append("'")
            return at + 1
        self._parts.append("\\\\")
        return at

    def _hex(self, text: str, at: int) -> int:
        digit = text[at] in "0123456789abcdefABCDEF"
        if digit:
            self._word.append(text[at])
            if len(self._word) < 4:
                return at + 1
        self._parts.append(("\\u" if digit else "\\\\u") + "".join(self._word))
        self._word = []
        self._state = _STRING
        return at + digit

    def _bare_word(self, text: str, at: int) -> int:
        end = _WORD_CHARACTERS.match(text, at).end()  # type: ignore[union-attr]
        self._word.append(text[at:end])
        if end == len(text):
            return end
        word = "".join(self._word)
        strict = _LITERALS.get(word)
        if strict is None:
            if len(word) > MAX_NUMBER or not _NUMBER.fullmatch(word):
                return self._break(end)
            strict = word
        self._word = []
        self._parts.append(strict)
        return self._end_value(end)

    def _skip_space(self, text: str, at: int) -> int:
        end = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if end > at:
            self._parts.append(text[at:end])
        return end

    def _open(self, bracket: str, at: int) -> int:
        if len(self._closers) == MAX_DEPTH:
            return self._break(at)
        self._comma = -1
        self._parts.append(bracket)
        self._closers.append("}" if bracket == "{" else "]")
        self._state = _KEY if bracket == "{" else _VALUE
        return at + 1

    def _close(self, bracket: str, at: int) -> int:
        if bracket != self._closers[-1]:
            return self._break(at)
        if self._comma >= 0:
            self._parts[self._comma] = ""
            self._comma = -1
        self._parts.append(bracket)
        self._closers.pop()
        if self._closers:
            return self._end_value(at + 1)
        self.status = DONE if self.complete() else BROKEN
        return at + 1

    def _open_string(self, text: str, at: int) -> int:
        self._comma = -1
        self._string_at = len(self._parts)
        whole = _WHOLE_STRING.match(text, at)
        if whole:
            self._parts.append(whole.group())
            return self._end_string(whole.end())
        self._quote = text[at]
        self._parts.append('"')
        self._state = _STRING
        return at + 1

    def _end_string(self, at: int) -> int:
        if not self._is_key:
            return self._end_value(at)
        self._state = _COLON
        if len(self._closers) == 1 and not self.top_key(json.loads("".join(self._parts[self._string_at :]))):
            return self._break(at)
        return at

    def _end_value(self, at: int) -> int:
        self._state = _NEXT
        if len(self._closers) == 1 and not self.top_value(self._kind, "".join(self._parts[self._value_at :])):
            return self._break(at)
        return at

    def _break(self, at: int) -> int:
        self.status = BROKEN
        return at


_STEPS: tuple[Callable[[ObjectScanner, str, int], int], ...] = (
    ObjectScanner._begin,
    ObjectScanner._key,
    ObjectScanner._colon,
    ObjectScanner._value,
    ObjectScanner._next,
    ObjectScanner._string,
    ObjectScanner._escape,
    ObjectScanner._hex,
    ObjectScanner._bare_word,
)


def object_text(text: str) -> str | None:
    """The strict text of the one object that `text` holds (white space around it apart), or None."""
    scanner = ObjectScanner()
    text = text.strip()
    end = scanner.scan(text)
    return scanner.text if scanner.status == DONE and end == len(text) else None
