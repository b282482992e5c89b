"""Flags from dataclasses: each field is one, and every script reads its own groups of them.

In: the words of a command line, and the dataclasses that hold a script's options. Out: frozen values of them, or
one OptionError that names every flag that cannot be read, with its cure. Nothing heavy is imported.

    values = read(argv, [ModelArguments, DataArguments, ShowArguments], about="...")
    values[DataArguments].data_path

Why not argparse: it ends at the first word that it cannot convert, reads `-data` as `-d ata` and `-1e-5` as a flag,
and what it hands back of unknown flags no longer tells their values from stray words.
"""

import difflib
import json
import re
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from qwen_chat.conversation import refuse_constant
from qwen_chat.errors import OptionError

Group = TypeVar("Group")
Default = TypeVar("Default")


def option(
    default: Default,
    help: str,
    *names: str,
    old: str = "",
    elsewhere: str = "",
    hint: str = "",
    appends: bool = False,
    splits: bool = True,
    or_file: bool = False,
    shown_as: str = "",
) -> Default:
    """A dataclass field that is a flag. `names` are further spellings: `-m`, `--model_name_or_path`.

    old: names that it had, read with a note. elsewhere: what other programs call it, answered with "did you mean
    --name hint?". appends: a list that grows where the flag is given again. splits: a list that does not may be
    written a,b,c; paths, keys and regular expressions hold commas of their own. or_file: where a file has the given
    name, its text is the value. shown_as: what --help shows in place of the default.
    """
    told = {"help": help, "names": names, "old": tuple(old.split()), "elsewhere": tuple(elsewhere.split())}
    more = {"hint": hint, "appends": appends, "splits": splits, "or_file": or_file, "shown_as": shown_as}
    return field(default=default, metadata=told | more)


@dataclass(frozen=True)
class Option:
    """One flag: its name (no dashes), its type, what --help says; the rest as in `option`."""

    name: str
    kind: object
    default: object
    help: str
    names: tuple[str, ...] = ()
    old: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    hint: str = ""
    appends: bool = False
    splits: bool = True
    or_file: bool = False
    shown_as: str = ""
    # Why it may not be given: it is known, but neither suggested nor listed among the others.
    refused: str | None = None

    @property
    def many(self) -> bool:
        return get_origin(self.kind) is tuple

    @property
    def spellings(self) -> tuple[str, ...]:
        return (self.name, *(name.lstrip("-") for name in self.names))


@dataclass(frozen=True)
class OtherFlags:
    """Flags of a dataclass that is not ours, read by name into `Values.extra`.

    gone: names that no version has any more, and the cure. unread: names passed over with their values.
    """

    title: str
    options: Callable[[], Sequence[Option]]
    gone: Mapping[str, str]
    unread: frozenset[str]


@dataclass(frozen=True)
class FlagInFile:
    """A flag of a file: its place there, its name, the words behind it; None for null."""

    place: str
    name: str
    words: Sequence[str] | None


@dataclass(frozen=True)
class Values:
    """What was read: one value of each group, and the other flags that were given."""

    groups: Mapping[type, Any]
    extra: Mapping[str, Any]
    given: frozenset[str]
    notes: tuple[str, ...]
    places: Mapping[str, str]  # of those that a file gave: where they stand in it

    def __getitem__(self, group: type[Group]) -> Group:
        return typing.cast(Group, self.groups[group])


def read(
    argv: Sequence[str],
    groups: Sequence[type],
    *,
    about: str = "",
    others: OtherFlags | None = None,
    before: Sequence[FlagInFile] = (),
) -> Values:
    """Read words into one value of each group. `-h` prints the help and ends. The last value given wins.

    before: flags of a file; one of the command line takes the place of its whole value.
    """
    own = {group: options_of(group) for group in groups}
    names = {entry.name for entries in own.values() for entry in entries}
    more = [entry for entry in others.options() if entry.name not in names] if others else []
    if asked := {"-h", "--help", "--help_all", "--help-all"} & set(argv):
        parts = {str(group.__doc__): entries for group, entries in own.items()}
        print(_help(about, parts, others, more if asked - {"-h", "--help"} else []))
        raise SystemExit(0)
    reading = _Reading([*more, *(entry for entries in own.values() for entry in entries)], others)
    places: dict[str, str] = {}
    for flag_of_file in before:
        reading.take_written(flag_of_file, places)
    of_file, reading.given = reading.given, {}
    # Each flag with the words behind it; "" with a word that no flag stands before.
    found: list[tuple[str, list[str]]] = []
    open_for_words = False
    for word in argv:
        if _is_flag(word):
            flag, equals, value = word.partition("=")
            found.append((flag, [value] if equals else []))
            open_for_words = not equals
        elif open_for_words:
            found[-1][1].append(word)
        else:
            found.append(("", [word]))
    for flag, words in found:
        reading.take(flag, words)
    if reading.wrong:
        raise OptionError("\n".join(reading.wrong))
    given = {**of_file, **reading.given}
    places = {name: place for name, place in places.items() if name not in reading.given}
    made = {g: g(**{e.name: given[e.name] for e in entries if e.name in given}) for g, entries in own.items()}
    extra = {name: value for name, value in given.items() if name not in names}
    return Values(made, extra, frozenset(given), tuple(reading.notes), places)


def options_of(group: type) -> list[Option]:
    kinds = typing.get_type_hints(group)
    entries: Sequence[Field[object]] = fields(group)
    return [Option(f.name, kinds[f.name], f.default, **f.metadata) for f in entries]


def _is_flag(word: str) -> bool:
    """`--name` or `-d`; `-1`, `-1e-5` and `-` are values."""
    if not word.startswith("-") or len(word) < 2:
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


class _Reading:
    """What has been read so far: values by name, notes, and all that is wrong. Of equal names the last holds."""

    def __init__(self, options: Sequence[Option], others: OtherFlags | None) -> None:
        self.given: dict[str, Any] = {}
        self.notes: list[str] = []
        self.wrong: list[str] = []
        self._others = others
        self._known = {name: entry for entry in options for name in entry.spellings}
        self._old = {name: entry for entry in options for name in entry.old}
        self._elsewhere = {name: entry for entry in options for name in entry.elsewhere}

    def take_written(self, flag: FlagInFile, places: dict[str, str]) -> None:
        """Read one flag of a file. places: of the options, where the file has them; it gets this one's."""
        name, words, told = flag.name, flag.words, len(self.wrong)
        entry = self._old.get(name, self._known.get(name))
        if entry is not None and entry.name in places:
            self.wrong.append(
                f"{name}: is --{entry.name}, which {places[entry.name]} gives; leave one of them out"
            )
        elif entry is not None and not entry.many and words is not None and not words:
            self.wrong.append(f"{name}: an empty list; expected {_expected(entry.kind)}")
        else:
            many = entry is not None and entry.many
            self.take(f"--{name}", list(words) if words is not None else [] if many else ["none"])
        if entry is not None:
            places.setdefault(entry.name, flag.place)
        self.wrong[told:] = [f"{flag.place}: {line}" for line in self.wrong[told:]]

    def take(self, flag: str, words: list[str]) -> None:
        """Read one flag with the words behind it."""
        name = flag.lstrip("-").replace("-", "_")
        gone = self._others.gone if self._others else {}
        if not flag:
            self.wrong.append(f"{words[0]!r}: no flag stands before this value; flags begin with --")
        elif self._others and name in self._others.unread:
            return
        elif entry := self._old.get(name, self._known.get(name)):
            if name in self._old:
                self.notes.append(f"--{name} is called --{entry.name} today; read as that")
            try:
                value = _value(entry, words)
            except ValueError as error:
                self.wrong.append(f"{flag}: {error}")
                return
            before = self.given.get(entry.name, ()) if entry.appends else ()
            self.given[entry.name] = (*before, *value) if entry.many else value
        elif name in gone:
            self.wrong.append(f"--{name} is gone: {gone[name]}")
        else:
            offered = [word for word, entry in self._known.items() if entry.refused is None]
            near = difflib.get_close_matches(name, offered, n=1, cutoff=0.5)
            meant = f"--{near[0]}" if near and len(near[0]) > 1 else ""
            if entry := self._elsewhere.get(name):
                meant = f"--{entry.name} {entry.hint}".rstrip()
            cure = f"did you mean {meant}?" if meant else "--help lists them"
            self.wrong.append(f"{flag}: unknown flag; {cure}")


# ------------------------------------------------------------------------------------------- words to values


def _value(entry: Option, words: list[str]) -> Any:
    """The words after a flag as its type; ValueError says what was expected."""
    if entry.many:
        if not words:
            raise ValueError("no value; expected at least one")
        if entry.splits and not entry.appends:
            words = [part for word in words for part in word.split(",") if part]
        return tuple(_converted(get_args(entry.kind)[0], word) for word in words)
    if not words:
        if bool in _alternatives(entry.kind):
            return True
        raise ValueError(f"no value; expected {_expected(entry.kind)}")
    if len(words) > 1:
        raise ValueError(f"{len(words)} values ({' '.join(words)}); expected one; quote a value with spaces")
    value = _converted(entry.kind, words[0])
    return _text_of(value) if entry.or_file and isinstance(value, str) else value


_LIKE_A_PATH = re.compile(r"\S+\.\w{1,8}|(?:~|\.{0,2})/\S+|[\w.-]+(?:/[\w.-]+)+", re.ASCII)


def _text_of(word: str) -> str:
    """The text of the file of this name, without white space around it; the word itself where there is none."""
    path = Path(word).expanduser()
    try:
        is_file, is_there = path.is_file(), bool(word) and path.exists()
    except (OSError, ValueError):  # too long for a name
        is_file = is_there = False
    try:
        text = path.read_text(encoding="utf-8-sig").strip() if is_file else word
        text.encode()  # words of a command line may hold bytes that are no UTF-8
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{word!r}: cannot be read as UTF-8 text ({error})") from None
    if is_there and not is_file:
        raise ValueError(f"{word}: no file; expected a text, or a file that holds one")
    if not is_file and _LIKE_A_PATH.fullmatch(word):
        raise ValueError(f"{word}: no such file; a text of one word must not look like a file's name")
    if not text.strip():
        raise ValueError(f"{word!r}: no text")
    return text


def _json_of(kind: type) -> Callable[[str], object]:
    def read(word: str) -> object:
        value = json.loads(word, parse_constant=refuse_constant)
        if not isinstance(value, kind):
            raise ValueError
        return value

    return read


def _integer(word: str) -> int:
    """A whole number that a machine's word holds."""
    if not -(2**63) <= (value := int(word)) < 2**63:
        raise ValueError("too large")
    return value


SWITCH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
# What --help calls each type, and what reads a word as it (ValueError or KeyError); the strictest first.
KINDS: Mapping[object, tuple[str, Callable[[str], object]]] = {
    bool: ("True or False", lambda word: SWITCH[word.lower()]),
    int: ("a whole number", _integer),
    float: ("a number", float),
    dict: ("a JSON object", _json_of(dict)),
    list: ("a JSON list", _json_of(list)),
    str: ("text", str),
}


def _alternatives(kind: object) -> tuple[object, ...]:
    """`int | None` -> (int, NoneType), a Mapping -> (dict,); Literal's values stay one entry."""
    if get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(part for alternative in get_args(kind) for part in _alternatives(alternative))
    return (dict,) if get_origin(kind) is Mapping else (kind,)


def _converted(kind: object, word: str) -> object:
    """One word as a type; `bool | str` reads True as a bool."""
    alternatives = _alternatives(kind)
    if type(None) in alternatives and word.lower() in ("none", "null"):
        return None
    if any(get_origin(part) is Literal and word in get_args(part) for part in alternatives):
        return word
    for plain, (_, reader) in KINDS.items():
        if plain in alternatives:
            try:
                return reader(word)
            except (ValueError, KeyError):
                continue
    raise ValueError(f"{word!r}; expected {_expected(kind)}")


def _expected(kind: object) -> str:
    parts: list[str] = []
    for alternative in _alternatives(kind):
        literal = get_origin(alternative) is Literal
        parts += (
            get_args(alternative) if literal else [KINDS[alternative][0] if alternative in KINDS else "None"]
        )
    return " or ".join(parts)


# ---------------------------------------------------------------------------------------------------- --help


def _help(
    about: str, groups: Mapping[str, list[Option]], others: OtherFlags | None, more: Sequence[Option]
) -> str:
    if others and more:
        groups = {**groups, others.title: [entry for entry in more if entry.refused is None]}
    lines = [about.strip(), ""]
    indent = " " * 6
    for title, entries in groups.items():
        lines += [f"{title}:"]
        for entry in entries:
            names = ", ".join(sorted([f"--{entry.name}", *entry.names], key=len))
            kind = get_args(entry.kind)[0] if entry.many else entry.kind
            kinds = "|".join(dict.fromkeys(_expected(kind).split(" or ")))
            lines += [f"  {names} {kinds}" + (" ..." if entry.many else "")]
            default = entry.shown_as or ("" if entry.default in (None, ()) else shown(entry.default))
            default = f" [{default}]" if default else ""
            lines += textwrap.wrap(entry.help + default, 104, initial_indent=indent, subsequent_indent=indent)
        lines += [""]
    if others:
        if refused := [f"  --{entry.name}: {entry.refused}" for entry in more if entry.refused is not None]:
            lines += [f"{others.title} that are refused:", *refused, ""]
        lines += [f"{others.title} are flags too: --help_all lists them."]
    lines += ["A flag that is on or off takes True or False, or nothing (True). The last value given wins."]
    return "\n".join(lines)


def shown(value: object) -> str:
    """A value as it is written after its flag."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
