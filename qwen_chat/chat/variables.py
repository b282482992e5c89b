"""The variables of a chat template: which it reads, and the values that a tuned model's template begins with.

In: the source of a template, which is a Jinja program. Out: names; a source with defaults in front of it, which any
server renders the same. No tokenizer; nothing is rendered here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from qwen_chat.errors import FormatError

# What the renderer gives a template by itself. Special tokens (`bos_token` ...) are told by their ending.
_SUPPLIED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
    | {"add_vision_id"}
)
_TOKEN = re.compile(r"\w+_tokens?")
_DEFAULT = re.compile(r"\{%- set (\w+) = \1 if \1 is defined else (.*) %\}\n")


def read_by(source: str) -> tuple[frozenset[str], frozenset[str]]:
    """The variables that a template reads and nobody supplies; and those of them that it also sets somewhere, which
    may be names of its own. Raises FormatError where the source is no template."""
    import jinja2
    from jinja2 import ext, meta, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """`{% generation %}`, which marks what is supervised in templates made for training."""

        tags = {"generation"}  # noqa: RUF012 - as the base declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(extensions=[Generation, ext.loopcontrols])
    try:
        tree = environment.parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise FormatError(f"the chat template is no Jinja template: {error}") from None
    found = {
        name
        for name in meta.find_undeclared_variables(tree)
        if name not in _SUPPLIED and not _TOKEN.fullmatch(name)
    }
    set_here = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"}
    return frozenset(found), frozenset(found & set_here)


def words_of(source: str) -> list[str]:
    """The words that stand as texts of their own in a template, in order: what it may compare a variable with."""
    return re.findall(r"(?<=['\"])[a-z]{2,16}(?=['\"])", source)


def with_defaults(source: str, values: Mapping[str, Any]) -> str:
    """The source, with these values where its caller gives none. Those that it began with already are replaced."""
    head, bare = split(source)
    literals = dict(_DEFAULT.findall(head)) | {name: _literal(value) for name, value in values.items()}
    lines = (
        f"{{%- set {n} = {n} if {n} is defined else {text} %}}\n" for n, text in sorted(literals.items())
    )
    return "".join(lines) + bare


def split(source: str) -> tuple[str, str]:
    """What `with_defaults` wrote, and the rest."""
    end = 0
    while found := _DEFAULT.match(source, end):
        end = found.end()
    return source[:end], source[end:]


def _literal(value: object) -> str:
    """A JSON value as Jinja writes it: JSON's escapes are among Python's, which Jinja reads; only null differs."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        pairs = (f"{json.dumps(key, ensure_ascii=False)}: {_literal(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
