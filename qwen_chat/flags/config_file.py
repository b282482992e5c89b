"""A run's flags from a file: YAML with one `flag: value` a line, or the run.json of a run that is to be repeated.

In: the file's path. Out: the flags as words, each with its place, for the parser, which lets those of the command line
win; of a run.json also its record, which says what the run measured and chose by itself. The values are read by the
parser, as text: `1e-4` is a number and `no` a switch because the flag says so, not because of YAML's own rules.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qwen_chat.errors import OptionError, first_line
from qwen_chat.flags.parser import FlagInFile

# What a run that repeats another does not take over: where it writes, and whether it goes on.
OWN = frozenset({"output_dir", "resume", "resume_anyway", "check", "config"})
LONGEST_YAML = 2**20  # characters of YAML: reading so many takes seconds, and no file of flags has them
# The parts of a run.json that a repeated run reads.
_RECORD: Mapping[str, type] = {"options": dict, "shaped_by": dict, "given": list, "choices": dict}
_NO_FLAGS = {
    "config": "a file of flags cannot name another; leave it out",
    "<<": "mappings are not merged; write the flags of the other one here",
}
_BLANKS = re.compile(r"[ \t\n\r]*")

Member = tuple[int, str | None, Any]  # line, key (None: no word), value


@dataclass(frozen=True)
class ConfigFile:
    """record: a run.json's; empty for other files."""

    flags: tuple[FlagInFile, ...]
    record: Mapping[str, Any] = field(default_factory=dict)


def read_config_file(path: str) -> ConfigFile:
    """Raises OptionError: a file that cannot be read, YAML's and JSON's own errors, each key that stands twice, by
    line."""
    file = Path(path).expanduser()
    try:
        if not path:
            raise OptionError("--config '': no file's name; give one, or leave the flag out")
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise OptionError(
            f"--config {path}: cannot be read ({reason}); expected a YAML file, or a run's run.json"
        ) from None
    if text.lstrip().startswith("{"):
        try:
            return _of_json(file.name, text)
        except (ValueError, RecursionError) as error:
            if file.suffix == ".json":
                line = text.count("\n", 0, getattr(error, "pos", 0)) + 1
                reason = getattr(error, "msg", None) or first_line(error)
                raise OptionError(f"{file.name}:{line}: no JSON ({reason}); correct it there") from None
    if len(text) > LONGEST_YAML:
        raise OptionError(
            f"--config {path}: {len(text):,} characters are no file of flags; data are given with -d"
        )
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise OptionError(_broken(file.name, error)) from None
    if not isinstance(root, yaml.MappingNode):
        raise OptionError(f"{file.name}:1: expected one `flag: value` a line, such as `lora_r: 16`")
    members = [
        (key.start_mark.line + 1, key.value if isinstance(key, yaml.ScalarNode) else None, value)
        for key, value in root.value
    ]
    return ConfigFile(_flags_of(file.name, members, _yaml_words))


def _broken(name: str, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or first_line(error)
    place = name if mark is None else f"{name}:{mark.line + 1}"
    if "\\t" in what:
        return f"{place}: a tab; YAML is indented and spaced by blanks: put blanks in its place"
    return f"{place}: no YAML ({what}); expected one `flag: value` a line"


def _flags_of(
    name: str, members: Sequence[Member], words_of: Callable[[Any], list[str] | None]
) -> tuple[FlagInFile, ...]:
    """Each key with its place and words. Raises OptionError with a line for each key that cannot be one."""
    seen: dict[str, int] = {}
    wrong, found = [], []
    for line, key, value in members:
        place = f"{name}:{line}"
        if key is None:
            wrong.append(f"{place}: a key that is no word; expected a flag's name")
            continue
        flag = key.replace("-", "_")
        if flag in _NO_FLAGS:
            wrong.append(f"{place}: {key}: {_NO_FLAGS[flag]}")
            continue
        if flag in seen:
            wrong.append(f"{place}: {key}: stands in line {seen[flag]} too; leave one of them out")
        seen.setdefault(flag, line)
        try:
            found.append(FlagInFile(place, flag, words_of(value)))
        except (yaml.YAMLError, ValueError, TypeError) as error:
            wrong.append(f"{place}: {key}: {first_line(error)}; expected plain text, a list or a mapping")
    if wrong:
        raise OptionError("\n".join(wrong))
    return tuple(found)


# -------------------------------------------------------------------------------------------------------- YAML


def _yaml_words(value: yaml.Node) -> list[str] | None:
    """A value as the words behind its flag: None for null, a mapping as JSON."""
    if isinstance(value, yaml.ScalarNode):
        if value.tag == "tag:yaml.org,2002:null":
            return None
        # A block of lines ends with one that is not part of the text.
        return [value.value.rstrip("\n") if value.style in ("|", ">") else value.value]
    if isinstance(value, yaml.SequenceNode) and all(
        isinstance(part, yaml.ScalarNode) for part in value.value
    ):
        return [part.value for part in value.value]
    written = json.dumps(yaml.constructor.SafeConstructor().construct_document(value), ensure_ascii=False)
    _refuse_repeats(value)
    return [written]


def _refuse_repeats(value: yaml.Node) -> None:
    """ValueError where a mapping has a key twice; YAML's reader takes the last one without a word."""
    if isinstance(value, yaml.MappingNode):
        keys = [key.value for key, _ in value.value if isinstance(key, yaml.ScalarNode)]
        _once([(key, None) for key in keys])
        for _, part in value.value:
            _refuse_repeats(part)
    elif isinstance(value, yaml.SequenceNode):
        for part in value.value:
            _refuse_repeats(part)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dict; ValueError for a key that stands twice."""
    plain = dict(pairs)
    if len(plain) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return plain


# -------------------------------------------------------------------------------------------------------- JSON

_FLAGS_JSON = json.JSONDecoder(object_pairs_hook=_once)


def _of_json(name: str, text: str) -> ConfigFile:
    """A run.json, or an object of flags. ValueError where it is no JSON, OptionError as `_flags_of`."""
    members, begins, end = _members(text, _space(text, 0), json.JSONDecoder())
    if end < len(text):
        raise json.JSONDecodeError("something stands after its end", text, end)
    record = _once([(str(key), value) for _, key, value in members])
    if not {"options", "shaped_by"} <= record.keys():
        return ConfigFile(_flags_of(name, _members(text, _space(text, 0), _FLAGS_JSON)[0], _json_words))
    for key, kind in _RECORD.items():
        if not isinstance(record.get(key, kind()), kind):
            shape = "an object" if kind is dict else "a list"
            raise OptionError(f"{name}: {key!r} is not {shape}; expected run.json as a run has written it")
    if not all(isinstance(flag, str) for flag in record.get("given", ())):
        raise OptionError(
            f"{name}: 'given' holds something else than flags; expected run.json as a run has written it"
        )
    options = _members(text, begins["options"], _FLAGS_JSON)[0]
    # An empty list is what a flag has that nobody gave.
    given = [one for one in options if one[1] not in OWN and one[2] != []]
    return ConfigFile(_flags_of(name, given, _json_words), record)


def _members(text: str, at: int, decoder: json.JSONDecoder) -> tuple[list[Member], dict[str, int], int]:
    """The members of the object that begins at `at`, where the value of each begins, and where the object ends, with
    the white space after it."""
    found: list[Member] = []
    begins: dict[str, int] = {}
    at = _space(text, at + 1)
    more = not text.startswith("}", at)
    while more:
        line = text.count("\n", 0, at) + 1
        if not text.startswith('"', at):
            raise json.JSONDecodeError("expected a key in quotes", text, at)
        key, at = decoder.raw_decode(text, at)
        at = _space(text, at)
        if not text.startswith(":", at):
            raise json.JSONDecodeError("expected ':' after a key", text, at)
        begins[key] = _space(text, at + 1)
        value, at = decoder.raw_decode(text, begins[key])
        found.append((line, key, value))
        at = _space(text, at)
        more = text.startswith(",", at)
        at = _space(text, at + 1) if more else at
    if not text.startswith("}", at):
        raise json.JSONDecodeError("expected ',' or '}'", text, at)
    return found, begins, _space(text, at + 1)


def _space(text: str, at: int) -> int:
    """Where the white space that begins at `at` ends."""
    found = _BLANKS.match(text, at)
    return at if found is None else found.end()


def _json_words(value: Any) -> list[str] | None:
    """A value as the words behind its flag: None for null, an object as JSON."""
    if value is None:
        return None
    if isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(part, list | dict) for part in value)
    ):
        return [json.dumps(value, ensure_ascii=False)]
    return [str(part) for part in (value if isinstance(value, list) else [value])]


def named(argv: Sequence[str]) -> str | None:
    """The last --config of a command line, or None; what is wrong with it, the parser says."""
    found = None
    for word, after in itertools.zip_longest(argv, argv[1:]):
        flag, equals, value = word.partition("=")
        if flag.startswith("-") and flag.lstrip("-") == "config":
            if equals:
                found = value
            elif after is not None and not after.startswith("-"):
                found = after
    return found
