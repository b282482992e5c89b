"""Damaged replies: fragments of calls in any order, cut and strewn with characters that occur nowhere else.

However they are damaged, reading one raises nothing, loses no text, and does not depend on the pieces that it comes in.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from qwen_chat.dialects.known import parse, stream_parser
from qwen_chat.dialects.reader import Delta, Reply, fold

MARKERS = [chr(code) for code in range(0x4E00, 0x4E40)]


def damaged(rng: random.Random, fragments: Sequence[str]) -> str:
    """Fragments in any order, with characters that occur nowhere else strewn in, and some taken out."""
    pieces = rng.choices(fragments, k=rng.randint(1, 14))
    for marker in rng.sample(MARKERS, rng.randint(0, 6)):
        pieces.insert(rng.randint(0, len(pieces)), marker)
    characters = list("".join(pieces))
    for _ in range(rng.randint(0, 3)):
        where = rng.randrange(len(characters))
        characters[where : where + 1] = rng.choice(["", rng.choice(MARKERS), rng.choice("{}[]\"'<>,:\\\n ")])
        characters = characters or ["x"]
    return "".join(characters)


def everything(reply: Reply) -> str:
    return reply.content + reply.reasoning + "".join(call.name + call.arguments for call in reply.tool_calls)


def in_pieces(text: str, at: Sequence[int], **options: Any) -> Reply:
    """The reply, fed in pieces that end at `at`."""
    parser = stream_parser(options.pop("tools", None), **options)
    deltas: list[Delta] = []
    for start, end in zip([0, *at], [*at, len(text)], strict=True):
        deltas += parser.feed(text[start:end])
    return fold([*deltas, *parser.finish()])


def check_damaged(
    fragments: Sequence[str], seed: int, count: int, offered: list[dict[str, Any]]
) -> Counter[str]:
    """Read `count` damaged texts; how many calls came of them, and how many of the texts had any."""
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    for _ in range(count):
        text = damaged(rng, fragments)
        tools, inside = rng.choice([None, offered]), rng.random() < 0.2
        reply = parse(text, tools, in_reasoning=inside)
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 5)))
        assert in_pieces(text, cuts, tools=tools, in_reasoning=inside) == reply, (text, cuts)
        assert in_pieces(text, list(range(1, len(text))), tools=tools, in_reasoning=inside) == reply, text
        kept = everything(reply)
        assert Counter(c for c in text if c in MARKERS) == Counter(c for c in kept if c in MARKERS), text
        for call in reply.tool_calls:
            assert isinstance(json.loads(call.arguments), dict), text
        found["calls"] += len(reply.tool_calls)
        found["texts with calls"] += bool(reply.tool_calls)
    return found
