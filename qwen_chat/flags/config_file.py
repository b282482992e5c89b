"""A run's flags from a file: YAML with one `flag: value` a line, or the run.json of a run that is to be repeated.

In: the file's path. Out: the flags as words, each with its place, for the parser, which lets those of the command line
win; of a run.json also its record, which says what the run measured and chose by itself. The values are read by the
parser, as text: `1e-4` is a number and `no` a switch because the flag says so, not because of YAML's own rules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qwen_chat.errors import OptionError, first_line

# What a run that repeats another does not take over: where it writes, and whether it goes on.
OWN = frozenset({"output_dir", "resume", "resume_anyway", "check", "config"})


@dataclass(frozen=True)
class ConfigFile:
    """Flags: (place, name, words). record: a run.json's; empty for YAML."""

    flags: tuple[tuple[str, str, list[str]], ...]
    record: Mapping[str, Any] = field(default_factory=dict)


def read_config_file(path: str) -> ConfigFile:
    """Raises OptionError: a file that cannot be read, YAML's own errors, each key that stands twice, by line."""
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise OptionError(
            f"--config {path}: cannot be read ({reason}); expected a YAML file, or a run's run.json"
        ) from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise OptionError(_broken(file.name, error)) from None
    if not isinstance(root, yaml.MappingNode):
        raise OptionError(f"{file.name}:1: expected one `flag: value` a line, such as `lora_r: 16`")
    blocks = {key.value: value for key, value in root.value if isinstance(key, yaml.ScalarNode)}
    if {"options", "shaped_by"} <= blocks.keys():  # a run.json
        record = json.loads(text)
        given = [flag for flag in _entries(file.name, blocks["options"]) if flag[2] and flag[1] not in OWN]
        return ConfigFile(tuple(given), record)
    return ConfigFile(tuple(_entries(file.name, root)))


def _broken(name: str, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or first_line(error)
    place = name if mark is None else f"{name}:{mark.line + 1}"
    if "\\t" in what:
        return f"{place}: a tab; YAML is indented and spaced by blanks: put blanks in its place"
    return f"{place}: no YAML ({what}); expected one `flag: value` a line"


def _entries(name: str, mapping: yaml.MappingNode) -> list[tuple[str, str, list[str]]]:
    """Each key with its place and words. Raises OptionError with a line for each key that cannot be one."""
    seen: dict[str, int] = {}
    wrong, found = [], []
    for key, value in mapping.value:
        line = key.start_mark.line + 1
        place = f"{name}:{line}"
        if not isinstance(key, yaml.ScalarNode):
            wrong.append(f"{place}: a key that is no word; expected a flag's name")
            continue
        flag = key.value.replace("-", "_")
        if flag in seen:
            wrong.append(f"{place}: {key.value}: stands in line {seen[flag]} too; leave one of them out")
        seen.setdefault(flag, line)
        try:
            found.append((place, flag, _value_words(value)))
        except (yaml.YAMLError, ValueError, TypeError) as error:
            wrong.append(
                f"{place}: {key.value}: {first_line(error)}; expected plain text, a list or a mapping"
            )
    if wrong:
        raise OptionError("\n".join(wrong))
    return found


def _value_words(value: yaml.Node) -> list[str]:
    """A value as the words behind its flag: null is None, a mapping is JSON."""
    if isinstance(value, yaml.ScalarNode):
        return ["none" if value.tag == "tag:yaml.org,2002:null" else value.value]
    if isinstance(value, yaml.SequenceNode) and all(
        isinstance(part, yaml.ScalarNode) for part in value.value
    ):
        return [part.value for part in value.value]
    return [json.dumps(yaml.constructor.SafeConstructor().construct_document(value), ensure_ascii=False)]


def named(argv: Sequence[str]) -> str | None:
    """The last --config of a command line, or None; what is wrong with it, the parser says."""
    found = None
    for word, after in zip(argv, [*argv[1:], ""], strict=False):
        flag, equals, value = word.partition("=")
        if flag == "--config" and (equals or not after.startswith("-")):
            found = value if equals else after
    return found or None
