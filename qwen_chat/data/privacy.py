"""Secrets and personal data in conversations: found by rule, and replaced by a word such as [EMAIL].

In: a Conversation. Out: what was found, each thing shown by its first characters alone; the conversation without it.
The rules know the public forms of keys and numbers; those with a check digit are checked. Names, postal addresses and
whatever has no form are not found, and the definitions of tools are not looked at.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from qwen_chat.conversation import Conversation, Message, ToolCall


@dataclass(frozen=True, slots=True)
class Kind:
    """What is looked for: its name in the plural, and the word that takes its place."""

    name: str
    placeholder: str


API_KEY = Kind("API keys", "[API_KEY]")
PRIVATE_KEY = Kind("private keys", "[PRIVATE_KEY]")
EMAIL = Kind("mail addresses", "[EMAIL]")
ID_NUMBER = Kind("ID numbers", "[ID_NUMBER]")
CARD = Kind("card numbers", "[CARD]")
PHONE = Kind("phone numbers", "[PHONE]")
KINDS_OF_SECRET = {kind.name: kind for kind in (PRIVATE_KEY, API_KEY, EMAIL, ID_NUMBER, CARD, PHONE)}

_CHARACTERS = 3  # of each thing that is found, for a person
# The providers' own beginnings (OpenAI and others, Stripe, AWS, GitHub, GitLab, Slack, Google, Hugging Face, npm,
# Alibaba Cloud, Tencent Cloud), and JSON Web Tokens.
_API_KEY = re.compile(
    r"(?<![\w-])(?:sk-(?=[\w-]*\d)[\w-]{20,}|[prs]k_(?:live|test)_\w{16,}|A[KS]IA[A-Z0-9]{16}\b|gh[oprsu]_\w{36,}|github_pat_\w{50,}"
    r"|glpat-[\w-]{20,}|xox[abeoprs]-[\w-]{10,}|AIza[\w-]{35}|hf_\w{30,}|npm_\w{36}|LTAI[A-Za-z0-9]{12,}"
    r"|AKID[A-Za-z0-9]{32}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})",
    re.ASCII,
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
)
_EMAIL = re.compile(r"[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b", re.ASCII)
_DIGITS = re.compile(r"\d[\d ()-]{5,}\d", re.ASCII)
_NUMBERS = re.compile(
    r"""(?<![\w.+-])(?:
    (?P<id>[1-9]\d{16}[\dXx]|(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4})
    |(?P<card>[2-6]\d{3}(?:[ -]?\d{4}){2,3}(?:[ -]?\d{1,3})?|3[47]\d\d[ -]?\d{6}[ -]?\d{5})
    |(?P<phone>(?:(?:\+|00)?86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}
        |\+[1-9]\d{0,2}(?:[ -]?\(?\d{1,4}\)?){2,5}|\+[1-9]\d{7,14}|\(?0\d{2,3}\)?-\d{7,8}
        |\(?[2-9]\d\d\)?[ -]\d{3}-\d{4})
    )(?![\w-]|\.\d)""",
    re.ASCII | re.VERBOSE,
)
# What stands around a number that is a value of JSON, by itself or in a list; in JSON that is text, \" is a quote.
_AFTER_KEY = re.compile(r"""(\\*")\s*:\s*(?:\[[^\[\]{}"]*)?\Z""")
_AFTER_NUMBER = re.compile(r"\s*[,\]}]")
_COMMA = re.compile(r"\s*,\s*")
_LONGEST_LIST = 300  # characters of a list, and its key, before the first number that is found
# Few texts hold as long a word, or three digits in a row: the others are passed over ten times as fast.
_WORDS = bytes(
    ord("a") if chr(byte) in f"{string.ascii_letters}{string.digits}_-" else 32 for byte in range(256)
)
_ZEROS = bytes(ord("0") if chr(byte) in string.digits else 32 for byte in range(256))
_LONG_WORD = 15 * b"a"
# Of the 17 digits of a Chinese identity number (GB 11643), and the check character by the remainder.
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_ID_CHECKS = "10X98765432"
# Where the numbers of each brand begin, and how many digits they have: Visa, Mastercard, American Express, JCB,
# Discover, UnionPay.
_BRANDS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|35\d{14}|6(?:011|5\d\d)\d{12}|62\d{14,17}"
)


@dataclass(frozen=True, slots=True)
class Secret:
    """One thing that was found. `shown`: its first characters."""

    kind: Kind
    shown: str


def screened(conversation: Conversation) -> tuple[Conversation, list[Secret]]:
    """The conversation with a word in the place of each thing that is found; itself where nothing is."""
    found: list[Secret] = []

    def text(value: str) -> str:
        return _replaced(value, found)

    document = None if conversation.document is None else text(conversation.document)
    messages = tuple([_message_without(message, text) for message in conversation.messages])
    return (replace(conversation, document=document, messages=messages) if found else conversation), found


def _message_without(message: Message, text: Callable[[str], str]) -> Message:
    content = text(message.content)
    if content is message.content and not (message.reasoning or message.tool_calls or message.name):
        return message
    reasoning = None if message.reasoning is None else text(message.reasoning)
    name = None if message.name is None else text(message.name)
    calls = tuple([_call_without(call, text) for call in message.tool_calls])
    without = replace(message, content=content, reasoning=reasoning, name=name, tool_calls=calls)
    return message if without == message else without


def _call_without(call: ToolCall, text: Callable[[str], str]) -> ToolCall:
    """The same where nothing is found; a number becomes text."""
    plain = call.arguments.encode("ascii", "replace")
    if not (b"@" in plain or _may_hold_numbers(plain) or _has_long_word(plain)):
        return call  # nothing that could be found, in JSON's escapes neither: they have digits
    before = json.loads(call.arguments)
    after = _value_without(before, text)
    return call if after == before else replace(call, arguments=json.dumps(after, ensure_ascii=False))


def _value_without(value: Any, text: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return text(value)
    if isinstance(value, dict):
        named: dict[str, Any] = {}
        for key, part in value.items():
            name, number = (without := text(key)), 1
            while name in named:  # two keys are not to become one
                number += 1
                name = f"{without} {number}"
            named[name] = _value_without(part, text)
        return named
    if isinstance(value, list):
        return [_value_without(part, text) for part in value]
    if isinstance(value, int) and (written := text(str(value))) != str(value):
        return written
    return value


def _replaced(text: str, found: list[Secret]) -> str:
    """The text without what is found; that is added to `found`."""
    matches = sorted(_matches(text), key=lambda match: (match[1], -match[2]))
    if not matches:
        return text
    parts, end, quote = [], 0, ""
    for kind, start, stop in matches:
        if start >= end:
            found.append(Secret(kind, text[start : start + _CHARACTERS]))
            if not quote or _COMMA.fullmatch(text, end, start) is None:  # else the list goes on
                quote = _quote_around(text, start, stop)
            parts += [text[end:start], quote + kind.placeholder + quote]
            end = stop
    return "".join([*parts, text[end:]])


def _quote_around(text: str, start: int, stop: int) -> str:
    """What a word needs on both sides in the place of a number of JSON: the quote of the key before it."""
    if not text[start:stop].isdigit() or _AFTER_NUMBER.match(text, stop) is None:
        return ""
    key = _AFTER_KEY.search(text, max(0, start - _LONGEST_LIST), start)
    return "" if key is None else key[1]


def _matches(text: str) -> Iterator[tuple[Kind, int, int]]:
    plain = text.encode("ascii", "replace")
    if b"PRIVATE KEY-----" in plain:
        yield from ((PRIVATE_KEY, *match.span()) for match in _PRIVATE_KEY.finditer(text))
    if _has_long_word(plain):
        yield from ((API_KEY, *match.span()) for match in _API_KEY.finditer(text))
    if b"@" in plain:
        yield from ((EMAIL, *match.span()) for match in _EMAIL.finditer(text))
    if _may_hold_numbers(plain):
        for digits in _DIGITS.finditer(text):
            # With a sign or a bracket before it, and what must not follow after it.
            for match in _NUMBERS.finditer(text, max(digits.start() - 2, 0), digits.end() + 3):
                kind = _kind_of_number(match)
                if kind is not None:
                    yield kind, *match.span()


def _has_long_word(plain: bytes) -> bool:
    return _LONG_WORD in plain.translate(_WORDS)


def _may_hold_numbers(plain: bytes) -> bool:
    return b"+" in plain or b"000" in plain.translate(_ZEROS)


def _kind_of_number(match: re.Match[str]) -> Kind | None:
    written, digits = match[0], re.sub(r"\D", "", match[0])
    if match["id"] and (len(written) == 11 or _is_chinese_id(written.upper())):
        return ID_NUMBER
    if match["phone"]:
        return PHONE if 10 <= len(digits) <= 15 else None
    return CARD if _BRANDS.fullmatch(digits) and _passes_luhn(digits) else None


def _is_chinese_id(written: str) -> bool:
    """Whether the day of birth is one and the check character is right."""
    try:
        date(int(written[6:10]), int(written[10:12]), int(written[12:14]))
    except ValueError:
        return False
    total = sum(weight * int(digit) for weight, digit in zip(_ID_WEIGHTS, written, strict=False))
    return written[17] == _ID_CHECKS[total % 11]


def _passes_luhn(digits: str) -> bool:
    """ISO/IEC 7812: every second digit from the right counts twice, by its digits' sum."""
    twice = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(twice)) % 10 == 0
