"""Control tokens kept apart from text, so that nothing a person types can become one.

In: strings in which each control token that the template wrote is one private character (a "mark");
everything else in them is text, even where it reads `<|im_end|>`. Out: token ids.

A control token is an added token of the vocabulary that is special or looks like a tag (`<tool_call>`,
`<think>`). Other added tokens (runs of spaces in some vocabularies) are ordinary text.
"""

from __future__ import annotations

import copy
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from qwen_chat.chat.word_cache import Words, settings_of
from qwen_chat.errors import FormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LAST_MARK = 0x10FFFD  # the last private-use character; marks are the ones that end here
_BEFORE, _AFTER = "\ufdd0", "\ufdd1"  # noncharacters: "the next token is text", "the token before was text"
_ANCHOR = "\ufdd2"
_COPY_KEPT = "_without_control"  # a Rust tokenizer's attribute: its copy
_REMEMBERED = 500_000  # token ids kept for texts that come again; 18 MB
_SEEN = 50_000  # hashes of texts that came once; 5 MB

_PIECE = 2**15  # characters of a long text that are tokenised at once
_LETTER = "A-Za-z\u4e00-\u9fa5"
_AFTER_LETTERS = " \n，。" + "".join(
    c for c in map(chr, range(33, 127)) if not c.isalpha()
)  # where a text may be cut
_CUTS = " \n，。"  # those that no added token holds

# A byte-level vocabulary writes each byte as one character: GPT-2's table.
_PLAIN_BYTES = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHER_BYTES = tuple(byte for byte in range(256) if byte not in _PLAIN_BYTES)
_BYTE_SIGNS = "".join(
    chr(byte if byte in _PLAIN_BYTES else 256 + _OTHER_BYTES.index(byte)) for byte in range(256)
)

# Tokenised whole and in parts when a format is made. If they differ, the tokenizer treats the start of a text
# specially.
_PROBE = "{end}user\n Hello  there\n\n你好，世界 🙂 12 a_b{end}\n  x{end}Hi{end}\n\n{end} ..."


class TooManyTokens(FormatError):
    """A text has more tokens than it may; `least` of them are certain."""

    def __init__(self, least: int, most: int) -> None:
        self.least = least
        super().__init__(f"the text has at least {least} tokens; expected at most {most}")


class ControlTokens:
    """The control tokens of one tokenizer, and its tokenisation of text that has none.

    Raises FormatError where the tokenizer has no Rust half or cannot be used on parts of a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise FormatError(
                f"{type(tokenizer).__name__} has no Rust tokenizer; expected one with tokenizer.json"
            )
        added = {
            token: index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special or re.fullmatch(r"<[^\s<>]+>", token.content)
        }
        self.ids = {token.content: index for token, index in added.items()}
        first = _LAST_MARK + 1 - len(added)
        self._mark_of = {content: chr(first + k) for k, content in enumerate(self.ids)}
        self._token_of = {ord(mark): content for content, mark in self._mark_of.items()}
        self._id_of = {mark: self.ids[content] for content, mark in self._mark_of.items()}
        marks = f"[{chr(first)}-{chr(_LAST_MARK)}]" if added else "(?!)"
        self._reserved = re.compile(f"{marks}|[{_BEFORE}{_AFTER}{_ANCHOR}]")
        self._at_marks = re.compile(f"({marks})")
        longest_first = sorted(added, key=lambda token: -len(token.content))
        bare = "|".join(re.escape(token.content) for token in longest_first) or "(?!)"
        self._bare = re.compile(bare)
        # Some vocabularies' tokens swallow the white space beside them.
        self.swallow = any(token.lstrip or token.rstrip for token in added)
        swallowing = "|".join(
            rf"\s*{re.escape(t.content)}" * t.lstrip
            or rf"{re.escape(t.content)}\s*" * t.rstrip
            or re.escape(t.content)
            for t in longest_first
        )
        self._written = re.compile(
            f"{_BEFORE}(?P<after>{bare})|(?P<before>{bare}){_AFTER}|(?P<token>{swallowing or '(?!)'})"
        )
        self._plain = _without_control(backend, self.ids)
        self._words = Words.of(self._plain)
        self._anchor = ""
        self._known: dict[str, list[int]] = {}
        self._seen: set[int] = set()
        self._room = _REMEMBERED
        self._check(tokenizer)

    def mark(self, token: str) -> str:
        """The mark of a control token; the text itself where the vocabulary has no such token."""
        return self._mark_of.get(token, token)

    def typed(self, text: str) -> list[str]:
        """The control tokens that a text spells out."""
        return self._bare.findall(text)

    def refuse_marks(self, text: str) -> None:
        """Raise FormatError where a text holds a character that this module uses as a mark."""
        found = None if text.isascii() else self._reserved.search(text)
        if found:
            raise FormatError(
                f"the text holds the character U+{ord(found[0]):X}, private use, which stands for a control "
                "token here; remove it"
            )

    def shield(self, text: str) -> str:
        """Text whose spelled-out control tokens survive a chat template recognisably. Inverse: `marked`."""
        return self._bare.sub(
            lambda found: found[0] + _AFTER if found.start() == 0 else _BEFORE + found[0], text
        )

    def unshield(self, shielded: str) -> str:
        """The text that was shielded, or a rendered conversation of such texts."""
        return shielded.replace(_BEFORE, "").replace(_AFTER, "")

    def marked(self, rendered: str) -> str:
        """A rendered conversation -> the same with a mark for each control token that was not shielded."""
        return self._written.sub(self._replace, rendered)

    def text(self, marked: str) -> str:
        """The string that a marked string stands for."""
        return marked.translate(self._token_of)

    def around(self, context: str, reply: str) -> tuple[str, str]:
        """The text on both sides of the place where a marked context ends and a marked reply begins, up to
        marks.
        """
        return self._at_marks.split(context)[-1], self._at_marks.split(reply, maxsplit=1)[0]

    def splits(self, before: str, after: str) -> bool:
        """Whether the tokenizer cuts between two texts before it looks for tokens in them."""
        cutter = self._plain.pre_tokenizer
        words = [] if cutter is None else cutter.pre_tokenize_str(before + after)
        return any(begin == len(before) for _, (begin, _) in words)

    def encode(self, marked: Sequence[str]) -> list[list[int]]:
        """Token ids of each marked string. FormatError on text that is not Unicode (a lone surrogate)."""
        split = [self._at_marks.split(string) for string in marked]  # text, mark, text, ..., mark, text
        new: dict[str, int] = {}
        for parts in split:
            for text in parts[::2]:
                if text and text not in self._known:
                    new.setdefault(text, len(new))
        ids = self._encode_text(list(new))
        joined = [self._joined(parts, new, ids) for parts in split]
        self._remember(new, ids)
        return joined

    def encode_within(self, marked: str, most: int | None) -> list[int]:
        """`encode` of one marked string. Raise TooManyTokens where a long one is found to have more than
        `most` tokens, before all of it was tokenised."""
        if len(marked) <= _PIECE:
            return self.encode([marked])[0]
        ids: list[int] = []
        for piece in self._pieces(marked, most, self._border):
            ids += self.encode([piece])[0]
            if most is not None and len(ids) > most:
                raise TooManyTokens(len(ids), most)
        return ids

    def raw_ids(self, tokenizer: Any, text: str, most: int | None) -> list[int]:
        """Token ids of a text in which control tokens count as such. TooManyTokens as in `encode_within`."""
        if len(text) <= _PIECE:
            return list(tokenizer.encode(text, add_special_tokens=False))
        border = None if self.swallow or self._anchor else self._raw_border
        ids: list[int] = []
        for piece in self._pieces(text, most, border):
            ids += tokenizer.encode(piece, add_special_tokens=False)
            if most is not None and len(ids) > most:
                raise TooManyTokens(len(ids), most)
        return ids

    def _pieces(self, text: str, most: int | None, border: re.Pattern[str] | None) -> Iterator[str]:
        """A text cut where the tokenizer cuts it anyway, so that the pieces' ids are the whole's: the ids of
        4 MB take seconds, in which nobody else would get the interpreter's lock."""
        if most is not None and (least := self._least(text)) > most:
            raise TooManyTokens(least, most)
        begin = 0
        while begin < len(text):
            found = border.search(text, begin + _PIECE) if border is not None else None
            end = len(text) if found is None else found.start()
            yield text[begin:end]
            begin = end

    def _least(self, text: str) -> int:
        """Tokens that a text has at least. No token that holds a byte is longer than that byte's longest
        token, so a byte is worth at least one through its length."""
        if not self._longest:
            return 0
        text = self._at_marks.sub("", text)
        if not text.isascii() and self._plain.normalizer is not None:
            text = unicodedata.normalize("NFC", text)
        data = text.encode(errors="replace")
        shares = (
            (len(data) - len(data.translate(None, some))) / most for most, some in self._longest.items()
        )
        return int(sum(shares))

    @cached_property
    def _longest(self) -> dict[int, bytes]:
        """Length in bytes, a power of two -> the bytes whose longest token is no longer. Empty where the
        vocabulary is not one of bytes."""
        vocabulary = self._plain.get_vocab(with_added_tokens=False)
        added_tokens = self._plain.get_added_tokens_decoder().values()
        swallow = any(token.lstrip or token.rstrip for token in added_tokens)
        normal = settings_of(self._plain.normalizer)
        cut = json.dumps(settings_of(self._plain.pre_tokenizer))
        drops = normal not in ({}, {"type": "NFC"}) or "Whitespace" in cut or "Removed" in cut
        if drops or swallow or "ByteLevel" not in cut:
            return {}
        longest = {sign: 1 for sign in _BYTE_SIGNS if sign in vocabulary}  # a byte that is not may vanish
        for token in vocabulary:
            if all(sign in longest for sign in token):
                for sign in set(token):
                    longest[sign] = max(longest[sign], len(token))
        added = max((len(token.content.encode()) for token in added_tokens), default=1)
        groups: dict[int, list[int]] = {}
        for sign, length in longest.items():
            groups.setdefault(1 << (max(length, added) - 1).bit_length(), []).append(_BYTE_SIGNS.index(sign))
        return {most: bytes(some) for most, some in groups.items()}

    @cached_property
    def _border(self) -> re.Pattern[str] | None:
        """Where a marked string may be cut: at a mark, and between a letter and what never is part of its
        word."""
        marks = self._at_marks.pattern.strip("()")
        ends = self._word_ends(_AFTER_LETTERS)
        return re.compile(f"(?={marks})" + (f"|(?<=[{_LETTER}])(?=[{re.escape(ends)}])" if ends else ""))

    @cached_property
    def _raw_border(self) -> re.Pattern[str] | None:
        ends = self._word_ends(_CUTS)
        return re.compile(f"(?<=[{_LETTER}])(?=[{re.escape(ends)}])") if ends else None

    def _word_ends(self, candidates: str) -> str:
        """Those characters at which the tokenizer ends a word of letters, whatever follows."""
        return "".join(
            end
            for end in candidates
            if all(
                self.splits(word, end + more)
                for word in ("ab", "x", "中文", "-a", " Ab")
                for more in ("", "a", "中", "1", " ", "\n", ".", "s x", "ll")
            )
        )

    def _joined(self, parts: list[str], new: dict[str, int], ids: list[list[int]]) -> list[int]:
        joined: list[int] = []
        for text, mark in zip_longest(parts[::2], parts[1::2]):
            if text:
                known = self._known.get(text)
                joined += ids[new[text]] if known is None else known
            if mark:
                joined.append(self._id_of[mark])
        return joined

    def _remember(self, new: dict[str, int], ids: list[list[int]]) -> None:
        """Keep the ids of what comes a second time: system prompts, tools, the words between turns."""
        if len(self._seen) > _SEEN:
            self._seen.clear()
        for text, k in new.items():
            digest = hash(text)
            if digest not in self._seen:
                self._seen.add(digest)
            elif self._room > 0:
                self._known[text] = ids[k]
                self._room -= len(ids[k])

    def _encode_text(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._anchor:
            texts = [self._anchor + text for text in texts]
        try:
            if self._words is not None and not self._anchor:
                return self._words.encode(texts)
            encoded = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            raise FormatError(
                "the text holds a lone surrogate, which is no Unicode text; remove it"
            ) from None
        skip = len(self._anchor)
        return (
            [encoding.ids[skip:] for encoding in encoded] if skip else [encoding.ids for encoding in encoded]
        )

    def _replace(self, found: re.Match[str]) -> str:
        token = found["token"]
        if token is None:
            return found["after"] or found["before"]
        return self._mark_of.get(token) or self._mark_of[token.strip()]

    def _check(self, tokenizer: Any) -> None:
        end = next(iter(self.ids), "")
        whole = _PROBE.format(end=end)
        expected = list(tokenizer(whole, add_special_tokens=False)["input_ids"])
        for anchor in ("", _ANCHOR):
            self._anchor = anchor
            self._known.clear()
            self._seen.clear()
            if anchor:  # a vocabulary that marks the start of a text: let no part be at the start
                from tokenizers import AddedToken

                self._plain.add_tokens([AddedToken(anchor, normalized=False, special=False)])
            if self.encode([self.marked(whole)])[0] == expected:
                return
        raise FormatError(
            f"{type(tokenizer).__name__} tokenises parts of a text otherwise than the whole, so prompts and "
            "replies cannot be tokenised apart; expected a byte-level vocabulary such as Qwen's"
        )


def _without_control(backend: Tokenizer, control: dict[str, int]) -> Tokenizer:
    """A copy of the Rust tokenizer that takes control tokens for text. It is kept with the tokenizer: formats of one
    differ by their templates alone, and a copy of Qwen's takes 0.6 s."""
    from tokenizers import AddedToken

    made_of = (tuple(control.items()), backend.get_vocab_size())
    kept: tuple[object, Tokenizer] | None = getattr(backend, _COPY_KEPT, None)
    if kept is not None and kept[0] == made_of:
        return kept[1]
    plain = copy.deepcopy(backend)
    plain.no_padding()
    plain.no_truncation()
    # Only special tokens can be told to stay text, so the tags become special in the copy.
    plain.add_special_tokens([AddedToken(content, normalized=False, special=True) for content in control])
    plain.encode_special_tokens = True
    setattr(backend, _COPY_KEPT, (made_of, plain))
    return plain
