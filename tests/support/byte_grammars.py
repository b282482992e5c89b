"""Grammars tried on a vocabulary of bytes: no tokenizer is needed, and every cut of a text is tried."""

from __future__ import annotations

from functools import lru_cache

from llguidance import LLMatcher, LLTokenizer

from qwen_chat.dialects.grammar import Grammar


class Bytes:
    """A vocabulary of bytes and an end, as llguidance's TokenizerWrapper takes it."""

    eos_token_id, bos_token_id = 256, None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<|end|>")
    special_token_ids = (256,)

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


@lru_cache(64)
def _compiled(vocabulary: LLTokenizer, grammar: Grammar) -> LLMatcher:
    matcher = LLMatcher(vocabulary, grammar.complete({}), log_level=0)
    assert not matcher.is_error(), matcher.get_error()[:500]
    return matcher


def matcher_of(vocabulary: LLTokenizer, grammar: Grammar) -> LLMatcher:
    return _compiled(vocabulary, grammar).deep_copy()


def accepts(vocabulary: LLTokenizer, grammar: Grammar, text: str) -> bool:
    """Whether the grammar lets the text be written, and end there."""
    matcher = matcher_of(vocabulary, grammar)
    encoded = list(text.encode())
    return matcher.try_consume_tokens(encoded) == len(encoded) and bool(matcher.is_accepting())
