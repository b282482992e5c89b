"""Is what a model wrote right? Scores of replies, and the figures made of them. Pure: needs no torch.

In: a case and the text that was written; teacher-forced losses. Out: a `Score` a reply; figures as plain values.

What is counted, over the assistant turns of conversations that offer tools:

    wanted turns (the reference calls)        other turns (the reference answers in words)
      name        the right tools, as a set     false_calls   something was called
      arguments   right calls of the wanted
      exact       all calls right, as a set   over every call that was written
      parallel    exact, where several are      valid         its arguments satisfy the tool's schema
      missing     nothing was called          over every turn
                                                unparsed      a call was begun that cannot be read

Values are compared as JSON: 1 equals 1.0, true is no number, objects have no order, lists have, text is exact.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from qwen_chat.conversation import Json, write_message
from qwen_chat.dialects.known import begins_call, parse
from qwen_chat.dialects.reader import Reply
from qwen_chat.evaluation.cases import Case, Wanted
from qwen_chat.evaluation.statistics import Estimate, estimate, share
from qwen_chat.tools.validate import call_problem

NOTHING = "(no call)"
Same = Callable[[Any, Any], bool]


@dataclass(frozen=True, slots=True)
class Score:
    """What one reply got right. `right` of `wanted` calls are right; `valid` of `written` fit their schema."""

    wanted: int
    written: int
    right: int
    valid: int
    name: bool
    exact: bool
    unparsed: bool
    pairs: tuple[tuple[str, str], ...]  # (wanted name, written name), NOTHING where one side has none
    calls: tuple[tuple[str, str], ...]  # (name, arguments) as written
    problems: tuple[str, ...]  # what is wrong, for a person

    @property
    def false_call(self) -> bool:
        return self.wanted == 0 and self.written > 0

    @property
    def missing(self) -> bool:
        return self.wanted > 0 and self.written == 0


def same_json(left: Any, right: Any) -> bool:
    """Equal as JSON values."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_json(left[k], right[k]) for k in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_json, left, right))
    return bool(left == right)


def is_right(name: str, arguments: Mapping[str, Any], wanted: Wanted, same: Same = same_json) -> bool:
    """Whether a call is the wanted one: nothing missing, nothing else, every value an accepted one."""
    if name != wanted.name or not set(arguments) <= set(wanted.arguments):
        return False
    return all(
        any(same(arguments[key], value) for value in values) if key in arguments else key in wanted.optional
        for key, values in wanted.arguments.items()
    )


def score(case: Case, text: str | Reply, *, in_reasoning: bool = False, same: Same = same_json) -> Score:
    """Judge a reply's calls, read from its text as the service reads it, or read already. same: how values are
    compared."""
    reply = parse(text, list(case.tools), in_reasoning=in_reasoning) if isinstance(text, str) else text
    problems = []
    valid = 0
    written: list[tuple[str, Json]] = []
    for call in reply.tool_calls:
        problem = call_problem(call, case.tools)
        valid += problem is None
        if problem is not None:
            problems.append(problem)
        try:
            arguments = json.loads(call.arguments)
        except (ValueError, RecursionError):
            arguments = call.arguments
        # Arguments that break the schema may still be the wanted ones; what is no object never is.
        written.append((call.name, arguments if isinstance(arguments, dict) else {"": arguments}))
    matched = _match(case.wanted, written, same)
    unparsed = begins_call(reply.content)
    if unparsed:
        problems.append("a call was begun that cannot be read")
    names_wanted, names_written = Counter(w.name for w in case.wanted), Counter(name for name, _ in written)
    problems += [f"not called rightly: {w.name}" for i, w in enumerate(case.wanted) if i not in matched]
    if not case.wanted:
        problems += [f"called without need: {name}" for name, _ in written]
    return Score(
        wanted=len(case.wanted),
        written=len(written),
        right=len(matched),
        valid=valid,
        name=names_wanted == names_written,
        exact=len(matched) == len(case.wanted) == len(written),
        unparsed=unparsed,
        pairs=_pair(names_wanted, names_written),
        calls=tuple((call.name, call.arguments) for call in reply.tool_calls),
        problems=tuple(problems),
    )


def _match(wanted: Sequence[Wanted], written: Sequence[tuple[str, Json]], same: Same) -> set[int]:
    """Which of the wanted calls are among the written in the largest one-to-one matching (augmenting paths; a
    handful of calls each)."""
    fits = [
        [j for j, (name, arguments) in enumerate(written) if is_right(name, arguments, one, same)]
        for one in wanted
    ]
    owner: dict[int, int] = {}

    def place(i: int, tried: set[int]) -> bool:
        for j in fits[i]:
            if j not in tried:
                tried.add(j)
                if j not in owner or place(owner[j], tried):
                    owner[j] = i
                    return True
        return False

    for i in range(len(wanted)):
        place(i, set())
    return set(owner.values())


def _pair(wanted: Counter[str], written: Counter[str]) -> tuple[tuple[str, str], ...]:
    """Equal names first, then what is left in order, then the rest against nothing."""
    both = wanted & written
    left, over = (wanted - both).elements(), (written - both).elements()
    pairs = [(name, name) for name in both.elements()] + [*zip_longest(left, over, fillvalue=NOTHING)]
    return tuple(pairs) or ((NOTHING, NOTHING),)


@dataclass(frozen=True, slots=True)
class Judged:
    """A case, what was written, and its score."""

    case: Case
    text: str
    score: Score


def call_figures(judged: Sequence[Judged]) -> Json:
    """The figures of the table above: `{"value", "low", "high", "n"}`, or null where nothing was counted."""
    scores = [one.score for one in judged]
    wanted = [s for s in scores if s.wanted]
    figures = {
        "exact": share([s.exact for s in wanted]),
        "name": share([s.name for s in wanted]),
        "arguments": share([s.right for s in wanted], [s.wanted for s in wanted]),
        "parallel": share([s.exact for s in wanted if s.wanted > 1]),
        "missing": share([s.missing for s in wanted]),
        "false_calls": share([s.false_call for s in scores if not s.wanted]),
        "valid": share([s.valid for s in scores], [s.written for s in scores]),
        "unparsed": share([s.unparsed for s in scores]),
    }
    return {name: None if value is None else asdict(value) for name, value in figures.items()}


def summary(judged: Sequence[Judged]) -> Json:
    """Figures over all, per language and per wanted tool; the confusion table, commonest first."""
    groups: dict[str, list[Judged]] = {}
    tools: dict[str, list[Judged]] = {}
    confusion: Counter[tuple[str, str]] = Counter()
    for one in judged:
        groups.setdefault(one.case.language, []).append(one)
        for name in {wanted.name for wanted in one.case.wanted}:
            tools.setdefault(name, []).append(one)
        confusion.update(one.score.pairs)
    return {
        "turns": len(judged),
        "wanted": sum(bool(one.case.wanted) for one in judged),
        **call_figures(judged),
        "languages": {name: call_figures(some) for name, some in sorted(groups.items())},
        "tools": {
            name: {
                "n": len(some),
                "exact": sum(s.score.exact for s in some),
                "name": sum(s.score.name for s in some),
            }
            for name, some in sorted(tools.items(), key=lambda item: (-len(item[1]), item[0]))
        },
        "confusion": [
            {"wanted": a, "written": b, "count": count}
            for (a, b), count in sorted(confusion.items(), key=lambda item: (-item[1], item[0]))
        ],
    }


def worst(judged: Sequence[Judged], count: int = 10) -> list[Json]:
    """The replies furthest from right, in full: false and missing calls, wrong names, wrong arguments."""

    def badness(one: Judged) -> tuple[int, int]:
        s = one.score
        return (
            2 * s.false_call + 2 * s.missing + s.unparsed + (s.wanted > 0 and not s.name) + (not s.exact),
            s.wanted - s.right,
        )

    failed = [one for one in judged if not one.score.exact or one.score.unparsed]
    failed.sort(key=lambda one: (*(-x for x in badness(one)), one.case.key))
    return [
        {
            "where": one.case.key,
            "messages": [write_message(message) for message in one.case.before],
            "tools": [tool["function"]["name"] for tool in one.case.tools],
            "reference": write_message(one.case.reference),
            "written": one.text,
            "problems": list(one.score.problems),
        }
        for one in failed[:count]
    ]


def loss_changes(losses: Mapping[str, Mapping[str, Any]]) -> Json:
    """Of each kind of conversations `loss_change` of its `before` (it may be missing) and `after` (losses.json)."""
    return {name: loss_change(found.get("before", ()), found["after"]) for name, found in losses.items()}


def loss_change(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Json:
    """Loss a token on the same conversations, each given as (summed loss, tokens), and how far it has moved.

    The interval of the difference is a bootstrap's over conversations, each held against itself; without `before`
    there is no difference.
    """
    tokens = [count for _, count in after]
    earlier, later = (sum(loss for loss, _ in some) / max(1, sum(tokens)) for some in (before, after))
    moved = [b[0] - a[0] for a, b in zip(before, after, strict=True)] if before else []
    difference = estimate(moved, tokens[: len(moved)])
    return {
        "conversations": len(after),
        "tokens": sum(tokens),
        "before": earlier if before else None,
        "after": later,
        "difference": None if difference is None else asdict(difference),
    }


@dataclass(frozen=True, slots=True)
class SequenceLoss:
    """Teacher-forced, over a conversation's supervised tokens: summed loss (nats), tokens, right first guesses."""

    where: str
    loss: float
    tokens: int
    right: int


def loss_figures(losses: Sequence[SequenceLoss]) -> Json:
    """Loss a token, perplexity and token accuracy, weighted by tokens; intervals over conversations."""
    tokens = [one.tokens for one in losses]
    loss = estimate([one.loss for one in losses], tokens)
    accuracy = estimate([one.right for one in losses], tokens)
    perplexity = None
    if loss is not None:
        low, middle, high = (math.exp(min(x, 700.0)) for x in (loss.low, loss.value, loss.high))
        perplexity = Estimate(middle, low, high, loss.n)
    figures = {"loss": loss, "perplexity": perplexity, "token_accuracy": accuracy}
    return {
        "conversations": len(losses),
        "tokens": sum(tokens),
        **{name: None if value is None else asdict(value) for name, value in figures.items()},
    }
