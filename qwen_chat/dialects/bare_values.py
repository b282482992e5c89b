"""Arguments whose values stand as bare text, not as JSON: what the tool's schema makes of that text.

In: a function's parameters (JSON Schema), and the text of one value. Out: the kinds of value that it may be, its JSON,
and what a grammar must hold the text to. Text stays text wherever the schema allows a string; else it is read as JSON.
Pure text: no tokenizer, no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

from qwen_chat.dialects.grammar import json_rule
from qwen_chat.dialects.loose_json import DONE, ObjectScanner
from qwen_chat.errors import ToolError

_KINDS_OF_TYPE: Mapping[str, frozenset[str]] = {
    "null": frozenset({"null"}),
    "boolean": frozenset({"true", "false"}),
    "integer": frozenset({"number"}),
    "number": frozenset({"number"}),
    "string": frozenset({"string"}),
    "array": frozenset({"array"}),
    "object": frozenset({"object"}),
}
EVERY_KIND = frozenset().union(*_KINDS_OF_TYPE.values())
WORDS: Mapping[str, object] = {"null": None, "true": True, "false": False}
# $ref, anyOf and the like inside one another, and all that are looked at for one parameter; what is beyond allows
# everything.
_DEEPEST, _MOST_STEPS = 32, 500
_ANYTHING = "#/$defs/anything"

# What a format means as text, for the formats that have a plain shape.
_DATE = r"[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])"
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_FORMAT_PATTERNS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "hostname": rf"{_LABEL}(?:\.{_LABEL})*",
    "email": rf"[A-Za-z0-9!#$%&'*+\/=?^_`{{|}}~.-]{{1,64}}@{_LABEL}(?:\.{_LABEL})*",
    "uri": r"[A-Za-z][A-Za-z0-9+.-]*:[A-Za-z0-9._~:\/?#\[\]@!$&'()*+,;=%-]+",
}
# What says nothing of a value; without it one rule serves many parameters.
_SILENT = frozenset({"$id", "$schema", "$comment", "title", "description", "default", "examples"})
# What can be said about a text; else every text is allowed.
_OF_TEXT = frozenset({"minLength", "maxLength", "pattern", "format", "enum", "const"})


class Parameters:
    """A function's parameters, as its tool describes them. `schema`: what that says, anything at all."""

    def __init__(self, schema: Any) -> None:
        self.schema = schema
        self._steps = 0

    def said_of(self, name: str) -> Any:
        """The schema of one parameter; True, which allows everything, where there is none for it."""
        self._steps = 0
        found = self._property(self.schema, name)
        return True if found is None else found

    def kinds(self, schema: Any) -> frozenset[str]:
        """The kinds of value that the schema of a parameter allows: string, number, array, object, null, true, false.

        A type that JSON Schema does not have says nothing.
        """
        self._steps = 0
        return self._kinds(schema)

    def referred(self, reference: Any) -> Any:
        """What a `$ref` points to; True where nothing is there."""
        place = self.schema
        if not isinstance(reference, str) or not reference.startswith("#"):
            return True
        for step in reference[1:].split("/")[1:]:
            key = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(place, list) and key.isdecimal() and int(key) < len(place):
                place = place[int(key)]
            elif isinstance(place, Mapping) and key in place:
                place = place[key]
            else:
                return True
        return place

    def text_pattern(self, schema: Any, where: str) -> str:
        """The texts that a schema allows as a string, as an expression of a Lark terminal; empty where it allows all.

        Raises ToolError, which begins with `where`, for what cannot be held to.
        """
        self._steps = 0
        return self._text_pattern(schema, where)

    def json_value(self, schema: Any, where: str, kinds: frozenset[str], pattern: str) -> str:
        """JSON under a schema, of some `kinds` that it allows, as a part of a rule. `pattern`: what every string and
        every key in it matches. Raises ToolError."""
        held = _guarded(schema, pattern)
        if kinds != self.kinds(schema):
            held = {"allOf": [held, {"type": sorted(kinds)}]}
        definitions = {}
        if '"#/$defs/tool' in json.dumps(held):
            definitions["tool"] = _guarded(self.schema, pattern)
        if f'"{_ANYTHING}"' in json.dumps([held, definitions]):
            definitions["anything"] = _anything(pattern)
        return json_rule({**held, "$defs": definitions} if definitions else held, where)

    def _far(self) -> bool:
        """One step more: is it one too many? References can lead on without end."""
        self._steps += 1
        return self._steps > _MOST_STEPS

    def _property(self, schema: Any, name: str, depth: int = 0) -> Any:
        """What a schema of an object says of one property, or None."""
        if not isinstance(schema, Mapping) or depth > _DEEPEST or self._far():
            return None
        properties, more = schema.get("properties"), schema.get("additionalProperties")
        found: list[Any] = []
        if isinstance(properties, Mapping) and name in properties:
            found.append(properties[name])
        elif isinstance(more, Mapping):
            found.append(more)
        found += [self._property(part, name, depth + 1) for part in self._conditions(schema)]
        for key in ("anyOf", "oneOf"):
            said = [self._property(branch, name, depth + 1) for branch in _parts_of(schema, key)]
            some = [one for one in said if one is not None]
            found.append({"anyOf": some} if some else None)
        found = [one for one in found if one is not None]
        return found[0] if len(found) == 1 else {"allOf": found} if found else None

    def _kinds(self, schema: Any, depth: int = 0) -> frozenset[str]:
        if not isinstance(schema, Mapping) or depth > _DEEPEST or self._far():
            return EVERY_KIND
        found, words = EVERY_KIND, schema.get("type", [])
        if named := words if isinstance(words, list) else [words]:
            found = frozenset().union(*(_KINDS_OF_TYPE.get(str(word), EVERY_KIND) for word in named))
        if isinstance(schema.get("enum"), list):
            found &= frozenset(map(_kind_of, schema["enum"]))
        if "const" in schema:
            found &= {_kind_of(schema["const"])}
        for part in self._conditions(schema):
            found &= self._kinds(part, depth + 1)
        for key in ("anyOf", "oneOf"):
            if branches := _parts_of(schema, key):
                found &= frozenset().union(*(self._kinds(branch, depth + 1) for branch in branches))
        return found

    def _text_pattern(self, schema: Any, where: str, depth: int = 0) -> str:
        if not isinstance(schema, Mapping):
            return ""
        if depth > _DEEPEST or self._far():
            raise ToolError(f"{where}: its references lead on and on; expected a plainer schema")
        parts = [_plain_text(schema, where)] if not _OF_TEXT.isdisjoint(schema) else []
        parts += [self._text_pattern(part, where, depth + 1) for part in self._conditions(schema)]
        for key in ("anyOf", "oneOf"):
            texts = [one for one in _parts_of(schema, key) if "string" in self._kinds(one, depth + 1)]
            if key == "oneOf" and len(texts) > 1:
                raise ToolError(
                    f"{where}: 'oneOf' with several kinds of text; expected 'anyOf', or one kind of text"
                )
            choices = [self._text_pattern(branch, where, depth + 1) for branch in texts]
            if all(choices):
                parts.append(" | ".join(choices))
        return " & ".join(f"({part})" for part in parts if part)

    def _conditions(self, schema: Mapping[str, Any]) -> list[Any]:
        """What else must hold, whatever holds: the schema that is referred to, and each of allOf."""
        return ([self.referred(schema["$ref"])] if "$ref" in schema else []) + _parts_of(schema, "allOf")


def json_of(text: str) -> str:
    """The JSON of a value that the schema allows no string for: what the text is as JSON, with the usual slips
    repaired (see loose_json); the text itself, as a string, where it is none."""
    inside = text.strip(" \t\r\n")
    scanner = _OneValue()
    # A trailing comma would be repaired away with the brace that is put after it here.
    whole = f'{{"": {inside}}}'
    if not inside.endswith(",") and scanner.scan(whole) == len(whole) and scanner.status == DONE:
        return scanner.value
    return json.dumps(text, ensure_ascii=False)


class _OneValue(ObjectScanner):
    """Reads an object with one key, for the sake of its value; a string is none."""

    value = ""

    def top_key(self, key: str) -> bool:
        return not self.value

    def top_value(self, kind: str, text: str) -> bool:
        self.value = text.strip(" \t\r\n")
        return kind not in "\"'"


# ------------------------------------------------------------------------------------------------- grammar


def _plain_text(schema: Mapping[str, Any], where: str) -> str:
    """The texts that a schema allows by what it says itself, as `text_pattern`."""
    choices = [schema["enum"]] if isinstance(schema.get("enum"), list) else []
    choices += [[schema["const"]]] if "const" in schema else []
    parts = [" | ".join(json.dumps(value) for value in some if isinstance(value, str)) for some in choices]
    if "minLength" in schema or "maxLength" in schema:
        most = int(schema["maxLength"]) if "maxLength" in schema else ""
        parts.append(f"/(?s:.{{{int(schema.get('minLength', 0))},{most}}})/")
    if isinstance(pattern := schema.get("pattern"), str):
        # Anchors at the two ends hold for all alternatives here: no text that the schema forbids gets in.
        ends = re.search(r"(?<!\\)(?:\\\\)*\$$", pattern) is not None
        inner = pattern.removeprefix("^")[: -1 if ends else None]
        start, end = "" if pattern.startswith("^") else "(?s:.*)", "" if ends else "(?s:.*)"
        inner = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\/", inner).replace("\n", r"\n").replace("\r", r"\r")
        parts.append(f"/{start}(?:{inner}){end}/")
    if (name := schema.get("format")) is not None:
        if name not in _FORMAT_PATTERNS:
            known = ", ".join(_FORMAT_PATTERNS)
            raise ToolError(
                f"{where}: format {name!r} cannot be held to in bare text; those that can: {known}"
            )
        parts.append(f"/{_FORMAT_PATTERNS[name]}/")
    return " & ".join(f"({part})" for part in parts)


def _guarded(schema: Any, unwritten: str, *, alone: bool = True) -> Any:
    """A schema whose strings and keys match `unwritten`, to stand in a document under `$defs/tool`. `alone`: no other
    schema says more of the same value."""
    if schema is True or schema == {}:
        return {"$ref": _ANYTHING}
    if not isinstance(schema, Mapping):
        return schema
    held = {key: value for key, value in schema.items() if key not in _SILENT}
    if isinstance(reference := held.get("$ref"), str):
        held["$ref"] = f"#/$defs/tool{reference[1:]}"
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(held.get(key), Mapping):
            held[key] = {name: _guarded(child, unwritten) for name, child in held[key].items()}
    for key in ("items", "additionalProperties", "prefixItems", "anyOf", "allOf", "oneOf"):
        child, apart = held.get(key), not key.endswith("Of")
        if isinstance(child, list):
            held[key] = [_guarded(one, unwritten, alone=apart) for one in child]
        elif key in held:
            held[key] = _guarded(child, unwritten)
    if held.keys() & {"$ref", "anyOf", "oneOf", "allOf", "enum", "const"}:
        return held
    allowed = Parameters(schema).kinds(schema)
    if "string" in allowed:
        held |= {"allOf": [{"pattern": held["pattern"]}]} if "pattern" in held else {}
        held["pattern"] = unwritten
    if "array" in allowed:
        held.setdefault("items", {"$ref": _ANYTHING})
    if "object" in allowed and "patternProperties" not in held:
        more, named = held.get("additionalProperties"), held.get("properties") or {}
        # As at the top: what an object does not name helps nobody.
        is_closed = more is None and alone and named and set(held.get("required", ())) <= named.keys()
        if more is not False and not is_closed:
            held["patternProperties"] = {
                unwritten: more if isinstance(more, Mapping) else {"$ref": _ANYTHING}
            }
        held["additionalProperties"] = False
    return held


def _anything(unwritten: str) -> Any:
    again = {"$ref": _ANYTHING}
    return {
        "anyOf": [
            {"type": ["null", "boolean", "number"]},
            {"type": "string", "pattern": unwritten},
            {"type": "array", "items": again},
            {"type": "object", "patternProperties": {unwritten: again}, "additionalProperties": False},
        ]
    }


def without(tags: Iterable[str]) -> str:
    """A regular expression for every text that holds none of `tags`: each begins with its only "<", and none is the
    beginning of another."""
    tree: dict[str, Any] = {}
    for tag in tags:
        node = tree
        for character in tag[1:]:
            node = node.setdefault(character, {})

    def begun(node: dict[str, Any]) -> str:
        """A tag's beginning, from here on."""
        some = [re.escape(c) + begun(child) for c, child in node.items() if child]
        return f"(?:{'|'.join(some)})?" if some else ""

    def left(node: dict[str, Any]) -> str:
        """A tag's beginning, from here on, and then what makes it none."""
        some = [re.escape(c) + left(child) for c, child in node.items() if child]
        return f"(?:{'|'.join([*some, '[^<' + ''.join(map(re.escape, node)) + ']'])})"

    return f"(?:[^<]|(?:<{begun(tree)})*<{left(tree)})*(?:<{begun(tree)})*"


def _parts_of(schema: Mapping[str, Any], key: str) -> list[Any]:
    found = schema.get(key)
    return found if isinstance(found, list) else []


def _kind_of(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return "string"
    return (
        "number" if isinstance(value, (int, float)) else "object" if isinstance(value, Mapping) else "array"
    )
