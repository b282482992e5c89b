"""The quick tokenisation gives the tokenizer's own ids: every character, any text, after forgetting."""

import json
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_chat.chat import word_cache
from qwen_chat.chat.control_tokens import ControlTokens
from qwen_chat.chat.word_cache import Words


@pytest.fixture(scope="module")
def plain(qwen2_5_tokenizer: Any) -> Any:
    """Qwen's tokenizer with control tokens taken for text."""
    return ControlTokens(qwen2_5_tokenizer)._plain


@pytest.fixture(scope="module")
def quick(plain: Any) -> Words:
    found = Words.of(plain)
    assert found is not None
    return found


def own(plain: Any, texts: list[str]) -> list[list[int]]:
    return [encoded.ids for encoded in plain.encode_batch_fast(texts, add_special_tokens=False)]


def characters() -> Iterator[str]:
    return (chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)


def test_every_character(plain: Any, quick: Words) -> None:
    """Each that is cut here, beside a letter, a digit, a space, an apostrophe, a mark and itself."""
    settled = [c for c in characters() if quick._settled(c) is not None]
    assert len(settled) > 97_000
    texts = [
        "".join(f"a{c} 1{c}{c} '{c}b !{c}\n" for c in settled[i : i + 64]) for i in range(0, len(settled), 64)
    ]
    assert quick.encode(texts) == own(plain, texts)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text() | st.text("aA'sLl 1\t\n\r 你好、é\u0301🙂<|im_end|>", max_size=40), max_size=5))
def test_any_text(plain: Any, quick: Words, texts: list[str]) -> None:
    assert quick.encode(texts) == own(plain, texts)


def test_what_is_unsettled_is_left_to_the_tokenizer(plain: Any, quick: Words) -> None:
    texts = ["letter \u088f of Unicode 17", "\U00031350 CJK extension H", "plain"]
    assert [quick._words(text) is None for text in texts] == [True, True, False]
    assert quick.encode(texts) == own(plain, texts)


def test_forgetting_changes_nothing(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "MOST_WORDS", 50)
    quick = Words.of(plain)
    assert quick is not None
    rng = random.Random(0)
    for _ in range(20):
        texts = [" ".join(str(rng.randrange(10**9)) + "x" * rng.randrange(100) for _ in range(20))]
        assert quick.encode(texts) == own(plain, texts)
        assert len(quick._ids) <= 50
    assert max(map(len, quick._ids)) <= word_cache.LONGEST


def test_threads_share_a_memory(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "MOST_WORDS", 30)
    quick = Words.of(plain)
    assert quick is not None
    texts = [
        [f"{rng.randrange(999)} word{rng.randrange(99)}" for _ in range(40)]
        for rng in map(random.Random, range(8))
    ]
    expected = [own(plain, some) for some in texts]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            assert list(pool.map(quick.encode, texts)) == expected


def test_other_tokenizers_are_refused(demo_tokenizer: Any, qwen2_5_tokenizer: Any) -> None:
    assert Words.of(ControlTokens(demo_tokenizer)._plain) is None  # cuts digits apart first
    assert Words.of(qwen2_5_tokenizer.backend_tokenizer) is None  # finds control tokens in text


def test_a_lone_surrogate_raises(quick: Words) -> None:
    with pytest.raises((UnicodeEncodeError, TypeError)):
        quick.encode([json.loads('"a\\ud800"')])
