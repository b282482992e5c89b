"""A certificate of Qwen3's format with invented replies, and the same with a third of its prompts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from qwen_chat.certificate.lock import FormatLock, GreedyReply, Replies
from qwen_chat.chat.format import ChatFormat

BASE = {"name": "tiny", "hash": "0" * 32}


@pytest.fixture(scope="session")
def qwen3_format(qwen3_tokenizer: Any) -> ChatFormat:
    """Qwen3's template with a default system prompt, so that another one can be seen."""
    tokenizer = copy.copy(qwen3_tokenizer)
    begun = "[{'role': 'system', 'content': 'You are Qwen.'}] + messages"
    system = f"{{%- if messages[0].role != 'system' %}}{{% set messages = {begun} %}}{{% endif %}}\n"
    tokenizer.chat_template = system + tokenizer.chat_template
    return ChatFormat(tokenizer)


@pytest.fixture(scope="session")
def whole_lock(qwen3_format: ChatFormat) -> FormatLock:
    def greedy(prompts: Sequence[Sequence[int]], ends: Sequence[int]) -> Replies:
        made = []
        for k in range(len(prompts)):
            ids = (*qwen3_format.text_ids(f"Reply number {k}, 你好."), ends[0])
            made.append(GreedyReply(ids, (-0.25,) * len(ids), (-3.0,) * len(ids)))
        return Replies(tuple(made), f"{len(made)} of at most 16 tokens")

    return FormatLock.make(qwen3_format, base=BASE, longest=None, greedy=greedy)


@pytest.fixture(scope="session")
def lock(whole_lock: FormatLock) -> FormatLock:
    """The questions, the long ones, and of the rest every third."""
    kept = [
        entry
        for k, entry in enumerate(whole_lock.entries)
        if k < 12 or k % 3 == 0 or entry.case.kind == "long"
    ]
    return replace(whole_lock, entries=tuple(kept))
