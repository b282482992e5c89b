"""A training sequence for people: what is supervised and what is not.

In: a tokenizer and one `Encoded`. Out: text, coloured for a terminal or with brackets.
"""

from __future__ import annotations

from typing import Protocol

from qwen_chat.chat.encoded import Encoded


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str: ...


def show(tokenizer: Decoder, encoded: Encoded, colour: bool = True) -> str:
    """The sequence with what is supervised in green (without colour between ⟦ and ⟧), white space visible."""
    parts: list[str] = []
    at = 0
    for start, end in [*encoded.spans, (len(encoded.input_ids),) * 2]:
        for ids, supervised in ((encoded.input_ids[at:start], False), (encoded.input_ids[start:end], True)):
            if not ids:
                continue
            text = tokenizer.decode(ids, skip_special_tokens=False)
            text = _visible(text) if supervised else text.replace("\n", "↵\n")
            if colour:
                parts.append(f"\x1b[{'1;32' if supervised else '2'}m{text}\x1b[0m")
            else:
                parts.append(f"⟦{text}⟧" if supervised else text)
        at = end
    return "".join(parts)


def _visible(text: str) -> str:
    """Newlines, tabs and white space at the edges, which a person would not see."""
    text = text.replace("\n", "↵\n").replace("\t", "→\t")
    inner = text.strip(" ")
    left, right = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    return "·" * len(text) if not inner else "·" * left + inner + "·" * right
