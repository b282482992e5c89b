"""What a reader of replies looks for: a dialect's calls as shapes that can be recognised before they are whole.

In: lists of atoms, one regular expression each, such that every beginning of what an atom matches is matched by it
too. Out: from one list the expression for the whole and the one for "may become this, if more text comes". Every
repetition is bounded, so what is held back is short and matching costs constant time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

# Around a thought.
THINK, END_THINK = "<think>", "</think>"
SPACE = r"[ \t\r\n]{0,64}"
BLANKS = r"[ \t]{0,8}"
COLON = "[:：]?"
# A JSON object begins here; something follows, whatever. An opening ends with one of them: its reading begins at once.
OBJECT, MORE = r"(?=\{)", r"(?=[\s\S])"
# Characters; more than any of the shapes can be.
LONGEST_SHAPE = 640
_NEVER = r"(?!)"
# Closing brackets too many.
_STRAY = rf"{SPACE}(?:[}}\]]{{1,4}}{SPACE})?"
_END_TICKS = rf"(?:`{{1,3}}{SPACE})?"
_INDENT = r"[ \t]{0,16}"


def letters(literal: str) -> tuple[str, ...]:
    """The atoms of a literal text."""
    return tuple(re.escape(character) for character in literal)


def beginning(atoms: Sequence[str]) -> str:
    """An expression for every beginning of what the atoms match, the empty one too. Lookaheads are left out."""
    pattern = ""
    for atom in reversed([atom for atom in atoms if not atom.startswith("(?=") and atom != _NEVER]):
        pattern = f"(?:{atom}{pattern})?"
    return pattern


class Scanner(Protocol):
    """Reads the inside of one call, in pieces. `status`: READING, DONE or BROKEN, as loose_json has them."""

    status: int
    read: int  # characters looked at

    @property
    def name(self) -> str: ...
    @property
    def arguments(self) -> str: ...
    @property
    def begun(self) -> bool:
        """Whether the name is known, and the arguments have begun."""

    def scan(self, text: str, at: int = 0) -> int:
        """Read `text` from `at`; return where it stopped."""

    def more(self, *, ended: bool) -> str:
        """The arguments since it was last asked; all that there are where the text has `ended`."""


@dataclass(frozen=True, slots=True)
class Left:
    """What a call leaves open: layout that may follow it without being content."""

    closing: str = ""  # its end tag
    brackets: bool = False  # closing brackets too many
    fence: bool = False
    items: bool = False  # a list, with more calls perhaps
    more: bool = False  # another call without a mark of its own


@dataclass(frozen=True, slots=True)
class Offer:
    """What may be called: the functions of the tools by name, and whether a grammar `forced` what is read."""

    functions: Mapping[str, Mapping[str, Any]]
    forced: bool = False


@dataclass(frozen=True, slots=True)
class Form:
    """One way to write a call.

    `mark` begins it, or nothing does (""); where the rest turns out to be no call, so much of it is content for
    certain. `opening`: the atoms from there up to what `scanner` reads; it is made of the text of the opening and of
    what is offered. `leaves` says what such an opening leaves open. `before`: the layout between text and the call.
    `loose`: nothing but a tool's name tells the call from an example, so it counts only where it stands apart and
    names a tool. `bound`: the form that grammars force: under one its arguments are read as they are written.
    """

    kind: str  # an identifier
    mark: str
    opening: tuple[str, ...]
    scanner: Callable[[str, Offer], Scanner]
    leaves: Callable[[str], Left]
    loose: bool = False
    bound: bool = False
    before: str = r"\n?"


@dataclass(frozen=True, slots=True)
class Marks:
    """All that a reader looks for. `stops` end a reply, and are left out behind a call; under one of `answers`, at
    the beginning, a prompt lets the model answer."""

    forms: tuple[Form, ...] = ()
    stops: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    def __add__(self, other: Marks) -> Marks:
        return Marks(self.forms + other.forms, self.stops + other.stops, self.answers + other.answers)


class Shapes:
    """Alternatives by name: `full` (its group is the name) and `partial` (what is left may become one)."""

    def __init__(self, shapes: Mapping[str, Sequence[str]]) -> None:
        whole = [f"(?P<{name}>{''.join(atoms)})" for name, atoms in shapes.items()]
        self.full = re.compile("|".join(whole) or _NEVER)
        begun = [rf"(?:{beginning(atoms)}\Z)" for atoms in shapes.values()]
        self.partial = re.compile("|".join(begun) or _NEVER)


class Look:
    """The shapes of some marks at each place of a reply."""

    def __init__(self, marks: Marks) -> None:
        self.forms = {form.kind: form for form in marks.forms}
        self._stops = marks.stops
        # In running text (searched), and where the content begins (matched at the spot).
        self.text = Shapes(self._openings(None))
        self.first = Shapes(self._openings(SPACE))
        self._after: dict[Left, tuple[Shapes, Shapes]] = {}

    def after(self, left: Left) -> tuple[Shapes, Shapes]:
        """What may follow a call that left this open, matched at the spot; and what may stand between it and the
        end of the reply without being content (for `partial`)."""
        if left not in self._after:
            self._after[left] = Shapes(self._following(left)), Shapes(self._ending(left))
        return self._after[left]

    def _openings(self, before: str | None) -> dict[str, tuple[str, ...]]:
        """The forms, each after `before`; after text (None) after the layout of its own, or on a line of its own."""
        return {
            kind: (before or (rf"\n{_INDENT}" if form.loose else form.before), *form.opening)
            for kind, form in self.forms.items()
        }

    def _following(self, left: Left) -> dict[str, tuple[str, ...]]:
        before = _STRAY if left.brackets else SPACE
        shapes: dict[str, tuple[str, ...]] = {}
        if left.closing:
            shapes["close"] = (before, *((_END_TICKS,) if left.brackets else ()), *letters(left.closing))
        if left.items:
            shapes["end_list"] = (SPACE, r"\]")
        if left.fence:
            shapes["end_fence"] = (before, *letters("```"))
        if left.more or left.items:
            shapes["more"] = (rf"{SPACE}(?:,{SPACE})?", OBJECT)
        stops = {
            f"stop{i}": (before, *letters(mark), COLON, SPACE, _NEVER) for i, mark in enumerate(self._stops)
        }
        return shapes | self._openings(before) | stops

    def _ending(self, left: Left) -> dict[str, tuple[str, ...]]:
        before = _STRAY if left.brackets else SPACE
        shapes: dict[str, tuple[str, ...]] = {
            f"stop{i}": (before, re.escape(mark), COLON, SPACE) for i, mark in enumerate(self._stops)
        }
        close = left.closing and ("</", *letters(left.closing.removeprefix("</")))
        shapes["close"] = (before, *((_END_TICKS,) if left.fence else ()), *close)
        return shapes
