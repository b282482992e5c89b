"""Tokens become text: their bytes, and what of it may be shown already.

In: token ids, then their bytes one token at a time. Out: text that never ends within a character or a stop string.
"""

from __future__ import annotations

import codecs
from typing import Any

from qwen_chat.errors import ModelError


class TokenText:
    """Token ids to bytes, for byte-level vocabularies (Qwen, Llama 3, SmolLM2): exact, one token at a time.

    Special tokens have no bytes. Added tokens that are not special (`<tool_call>`) have their text's.
    """

    def __init__(self, tokenizer: Any) -> None:
        if "ByteLevel" not in str(tokenizer.backend_tokenizer.decoder):
            raise ModelError(
                f"tokenizer {type(tokenizer).__name__} is not byte-level; "
                "the engine serves vocabularies of the Qwen and Llama 3 kind"
            )
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._bytes: dict[int, bytes] = {
            token: b"" if value.special else str(value.content).encode() for token, value in added.items()
        }
        self._bytes |= dict.fromkeys(tokenizer.all_special_ids, b"")

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none for special tokens and for ids that the vocabulary leaves unused."""
        known = self._bytes.get(token_id)
        if known is None:
            piece = self._tokenizer.convert_ids_to_tokens(token_id)
            known = b"" if piece is None else bytes(_BYTE_OF[char] for char in piece)
            self._bytes[token_id] = known
        return known

    def name_of(self, token_id: int) -> tuple[str, bytes]:
        """What a list of log probabilities shows: the token's text (special ones too) and its bytes."""
        raw = self.bytes_of(token_id)
        if not raw:
            raw = str(self._tokenizer.convert_ids_to_tokens(token_id) or "").encode()
        return raw.decode("utf-8", errors="replace"), raw


# The printable character of each byte in a byte-level vocabulary. Source: GPT-2's byte-to-unicode table.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(256 + place): byte for place, byte in enumerate(_OTHERS)}


class StopText:
    """Text as it may be shown: never half a character, never a stop string or the beginning of one."""

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._stop = tuple(text for text in stop if text)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.shown = 0  # characters

    @property
    def length(self) -> int:
        """Characters so far, shown or held back."""
        return self.shown + len(self._held)

    def feed(self, raw: bytes) -> tuple[str, bool]:
        """Add one token's bytes; returns (text to show now, whether a stop string was completed)."""
        self._held += self._decoder.decode(raw)
        if not self._stop:
            return self._show(len(self._held)), False
        found = [place for place in (self._held.find(text) for text in self._stop) if place >= 0]
        if found:
            shown = self._show(min(found))
            self._held = ""
            return shown, True
        # The longest beginning of a stop string with which the text ends.
        held = self._held
        keep = max(
            k for text in self._stop for k in range(min(len(text), len(held) + 1)) if held.endswith(text[:k])
        )
        return self._show(len(held) - keep), False

    def finish(self) -> str:
        """What was held back and turns out to be text. A character that was cut in the middle stays out."""
        return self._show(len(self._held))

    def _show(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        self.shown += count
        return shown
