"""Byte-pair tokenisation with a memory: the tokenizer's own ids, four times as fast on ordinary text.

In: texts without control tokens. Out: token ids. Qwen's tokenizers cut a text into words with a regular
expression and look at each word alone, so a word has the same ids wherever it stands. Cutting with Python's
`re` and remembering the words saves most of the work, which is the tokenizer's matching of that expression.

Exactness. The cut depends on which characters are letters, numbers and white space, and that on a version of
Unicode. Only characters whose nature has been settled since Unicode 3.2 (and emoji, which are neither) are
cut here; a text with any other goes to the tokenizer itself. `of` refuses a tokenizer that works otherwise.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer

# At most 30 MB.
MOST_WORDS = 1 << 16
# Characters; a longer word hardly comes again, and a Chinese clause without a comma is one word.
LONGEST = 24

# How Qwen2, Qwen2.5 and Qwen3 cut text (`pre_tokenizer` of their tokenizer.json).
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_OFFSETS = {"trim_offsets": True}  # not looked at: ids are wanted, not offsets
_QWEN_STEPS = [
    {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False} | _OFFSETS,
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False} | _OFFSETS,
]
# Unicode's White_Space, its \s.
_WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_EMOJI = range(0x1F300, 0x1FB00)
_LAST = 0x30000  # Unicode 3.2 has no letter beyond


class Words:
    """The words of one tokenizer and their ids.

    `whole` is asked about texts that are not cut here, `alone` about words; `composed`: NFC comes first.
    """

    def __init__(self, whole: Tokenizer, alone: Tokenizer, *, composed: bool) -> None:
        self._whole, self._alone, self._composed = whole, alone, composed
        self._cut, self._settled = _expressions()
        self._ids: dict[str, list[int]] = {}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Words | None:
        """For a `tokenizers.Tokenizer` that cuts as Qwen's do and finds no added token in text; else None."""
        from tokenizers import Tokenizer, models, pre_tokenizers

        special = all(token.special for token in tokenizer.get_added_tokens_decoder().values())
        if not (special and tokenizer.encode_special_tokens and isinstance(tokenizer.model, models.BPE)):
            return None
        normal = settings_of(tokenizer.normalizer)
        steps = settings_of(tokenizer.pre_tokenizer).get("pretokenizers", [])
        if normal not in ({}, {"type": "NFC"}) or [step | _OFFSETS for step in steps] != _QWEN_STEPS:
            return None
        alone = Tokenizer(tokenizer.model)  # shares the vocabulary: a copy of it would take seconds
        alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return cls(tokenizer, alone, composed=bool(normal))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text. Raises what the tokenizer raises on text that is not Unicode."""
        cut = [self._words(text) for text in texts]
        known = self._ids  # only ever grows: another thread may be reading it
        words = set(chain.from_iterable(words for words in cut if words is not None))
        look = {word: known[word] for word in words if word in known}
        new = list(words.difference(look))
        look.update(zip(new, _ids_of(self._alone, new), strict=True))
        known.update((word, look[word]) for word in new if len(word) <= LONGEST)
        ids = [[] if one is None else list(chain.from_iterable(map(look.__getitem__, one))) for one in cut]
        others = [k for k, one in enumerate(cut) if one is None]
        for k, encoded in zip(others, _ids_of(self._whole, [texts[k] for k in others]), strict=True):
            ids[k] = encoded
        if len(known) > MOST_WORDS:
            self._ids = {word: known[word] for word in list(known)[: MOST_WORDS // 2]}
        return ids

    def _words(self, text: str) -> list[str] | None:
        if text.isascii():
            return self._cut(text)
        if self._settled(text) is None:
            return None
        return self._cut(unicodedata.normalize("NFC", text) if self._composed else text)


def settings_of(part: Normalizer | PreTokenizer | None) -> dict[str, Any]:
    """The configuration of a normalizer or pre-tokenizer, as in tokenizer.json; empty where there is none."""
    state: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return state


def _ids_of(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    return [found.ids for found in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


@lru_cache(maxsize=1)
def _expressions() -> tuple[Callable[[str], list[str]], Callable[[str], object]]:
    """`findall` of QWEN_PATTERN, its classes written out, and `fullmatch` of text it may be used on."""
    category = unicodedata.ucd_3_2_0.category
    kinds = [category(chr(code)) for code in range(_LAST)]
    letters = _class(code for code, kind in enumerate(kinds) if kind[0] == "L")
    numbers = _class(code for code, kind in enumerate(kinds) if kind[0] == "N")
    settled = (code for code, kind in enumerate(kinds) if kind not in ("Cn", "Cs", "Co"))
    cut = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n{letters}{numbers}]?[{letters}]+|[{numbers}]"
        rf"| ?[^{_WHITE}{letters}{numbers}]+[\r\n]*|[{_WHITE}]*[\r\n]+|[{_WHITE}]+(?![^{_WHITE}])|[{_WHITE}]+"
    )
    allowed = _class(sorted({*settled, *_EMOJI}))
    return re.compile(cut).findall, re.compile(f"[{allowed}]*").fullmatch


def _class(codes: Iterable[int]) -> str:
    """The inside of a character class."""
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)
