"""How good a model is on held-out conversations: loss, and whether the calls it writes are the right ones.

In: conversations (with the calls that were right) and what a model wrote. Out: plain figures with confidence
intervals. The first half is pure and needs no torch: cases, scores, summaries, comparisons. The second half
runs a model: `sequence_losses` (teacher-forced, through `loss`), `write_replies` (greedy, batched, `engine`).

What is counted, over the assistant turns of conversations that offer tools:

    wanted turns (the reference calls)        other turns (the reference answers in words)
      name        the right tools, as a set     false_calls   something was called
      arguments   right calls of the wanted
      exact       all calls right, as a set   over every call that was written
      parallel    exact, where several are      valid         its arguments satisfy the tool's schema
      missing     nothing was called          over every turn
                                                unparsed      a call was begun that cannot be read

Values are compared as JSON: 1 equals 1.0, true is no number, objects have no order, lists have, text is
exact. An assistant message may carry `"accepted"`: one entry a call, `{"name": ..., "arguments": {"city":
["Paris", "Paris, France"]}, "optional": ["unit"]}`, every argument with the values that count as right.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from qwen_chat.conversation import Conversation, Json, Message, write_message
from qwen_chat.dialects.known import begins_call, parse
from qwen_chat.errors import FormatError, ServiceError
from qwen_chat.tools.validate import call_problem

NOTHING = "(no call)"
Same = Callable[[Any, Any], bool]


# --------------------------------------------------------------------------- cases


@dataclass(frozen=True, slots=True)
class Wanted:
    """One call that is right: for each argument the values that count; `optional` may be left out."""

    name: str
    arguments: Mapping[str, Sequence[Any]]
    optional: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Case:
    """One assistant turn to be written: what comes before it, and the calls that are right (none: words)."""

    key: str  # "file:line#message"
    before: tuple[Message, ...]
    tools: tuple[Json, ...]
    parallel_tool_calls: bool
    reference: Message
    wanted: tuple[Wanted, ...]

    @property
    def language(self) -> str:
        """zh where the last question has Chinese characters, else en."""
        question = next((m.content for m in reversed(self.before) if m.role == "user"), "")
        return "zh" if any("\u4e00" <= letter <= "\u9fff" for letter in question) else "en"


def cases_of(conversation: Conversation, key: str, accepted: Mapping[int, Any] | None = None) -> list[Case]:
    """The turns of a conversation that offers tools; none where it offers none.

    accepted: message number -> its `"accepted"` list. Raises FormatError where that does not fit the calls.
    """
    if not conversation.tools:
        return []
    return [
        Case(
            key=f"{key}#{k}",
            before=conversation.messages[:k],
            tools=conversation.tools,
            parallel_tool_calls=conversation.parallel_tool_calls,
            reference=message,
            wanted=_wanted(message, (accepted or {}).get(k), f"{key}: message {k}"),
        )
        for k, message in enumerate(conversation.messages)
        if message.role == "assistant" and message.train is not False
    ]


def _wanted(message: Message, accepted: Any, where: str) -> tuple[Wanted, ...]:
    if accepted is None:
        return tuple(
            Wanted(call.name, {name: [value] for name, value in json.loads(call.arguments).items()})
            for call in message.tool_calls
        )
    if not isinstance(accepted, list) or len(accepted) != len(message.tool_calls):
        raise FormatError(f"{where}: accepted; expected a list with one entry for each tool call")
    return tuple(_read_accepted(entry, f"{where}: accepted[{i}]") for i, entry in enumerate(accepted))


def _read_accepted(entry: Any, where: str) -> Wanted:
    shape = '{"name": ..., "arguments": {name: [values]}, "optional": [names]}'
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise FormatError(f"{where}: expected {shape}")
    arguments, optional = entry.get("arguments", {}), entry.get("optional", [])
    if not isinstance(arguments, dict) or not all(isinstance(v, list) and v for v in arguments.values()):
        raise FormatError(f"{where}: arguments; expected a list of accepted values for each, as in {shape}")
    if not isinstance(optional, list) or not set(optional) <= set(arguments):
        raise FormatError(f"{where}: optional; expected names among the arguments, as in {shape}")
    return Wanted(entry["name"], arguments, frozenset(optional))


# --------------------------------------------------------------------------- one reply


@dataclass(frozen=True, slots=True)
class Score:
    """What one reply got right. `right` of `wanted` calls are right; `valid` of `written` fit their
    schema."""

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


def score(case: Case, text: str, *, in_reasoning: bool = False, same: Same = same_json) -> Score:
    """Read a reply as the service does and judge its calls. same: how values are compared."""
    reply = parse(text, list(case.tools), in_reasoning=in_reasoning)
    problems = []
    valid = 0
    written: list[tuple[str, Json]] = []
    for call in reply.tool_calls:
        problem = call_problem(call, case.tools)
        valid += problem is None
        if problem is not None:
            problems.append(problem)
        written.append((call.name, _arguments(call.arguments)))
    matched = _match(case.wanted, written, same)
    unparsed = begins_call(reply.content)
    if unparsed:
        problems.append("a call was begun that cannot be read")
    names_wanted, names_written = [w.name for w in case.wanted], [name for name, _ in written]
    problems += [f"not called rightly: {w.name}" for i, w in enumerate(case.wanted) if i not in matched]
    if not case.wanted:
        problems += [f"called without need: {name}" for name in names_written]
    return Score(
        wanted=len(case.wanted),
        written=len(written),
        right=len(matched),
        valid=valid,
        name=Counter(names_wanted) == Counter(names_written),
        exact=len(matched) == len(case.wanted) == len(written),
        unparsed=unparsed,
        pairs=tuple(_pair(names_wanted, names_written)),
        calls=tuple((call.name, call.arguments) for call in reply.tool_calls),
        problems=tuple(problems),
    )


def _arguments(text: str) -> Json:
    """Arguments that break the schema may still be the wanted ones; text that is no object never is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {"": text}
    return value if isinstance(value, dict) else {"": value}


def _match(wanted: Sequence[Wanted], written: Sequence[tuple[str, Json]], same: Same) -> dict[int, int]:
    """The largest one-to-one matching wanted -> written (augmenting paths; a handful of calls each)."""
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
    return {i: j for j, i in owner.items()}


def _pair(wanted: Sequence[str], written: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Equal names first, then what is left in order, then the rest against nothing."""
    both = Counter(wanted) & Counter(written)
    yield from ((name, name) for name in both.elements())
    left, over = list((Counter(wanted) - both).elements()), list((Counter(written) - both).elements())
    length = max(len(left), len(over), 0 if both else 1)
    for i in range(length):
        yield left[i] if i < len(left) else NOTHING, over[i] if i < len(over) else NOTHING


# --------------------------------------------------------------------------- figures


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval: of a mean by bootstrap, of a share Wilson's. n: what it was counted over."""

    value: float
    low: float
    high: float
    n: int


def estimate(values: Sequence[float], weights: Sequence[float] | None = None) -> Estimate | None:
    """The mean of values, or sum(values) / sum(weights); None where there is nothing to average.

    The interval is a bootstrap's (percentile method, 1,000 resamples, seeded). Resampling is over the entries, so
    a ratio's interval allows for entries of different weight.
    """
    import numpy as np

    top = np.asarray(values, dtype=np.float64)
    bottom = np.ones_like(top) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(top) or not bottom.sum():
        return None
    draws = np.random.default_rng(0)
    means = []
    for _ in range(1000):
        chosen = draws.integers(0, len(top), len(top))
        if bottom[chosen].sum():
            means.append(top[chosen].sum() / bottom[chosen].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high), len(top))


def share(counts: Sequence[int], of: Sequence[int] | None = None) -> Estimate | None:
    """sum(counts) / sum(of), each turn's count of its `of` (1 by default), with Wilson's interval; None of nothing.

    Where nothing or everything hits, resampling would find no doubt at all; 0 of 60 is 0 to 6 %. What one turn
    holds belongs together, so the interval is that of as many trials as turns have any, not calls: cautious.
    E. B. Wilson, Probable inference, JASA 22 (1927), without continuity correction.
    """
    of = [1] * len(counts) if of is None else of
    turns = sum(whole > 0 for whole in of)
    if not turns:
        return None
    p, z2 = sum(counts) / sum(of), 1.959964**2
    middle = p + z2 / (2 * turns)
    reach = math.sqrt(z2 * (p * (1 - p) + z2 / (4 * turns)) / turns)
    low, high = ((middle + side * reach) / (1 + z2 / turns) for side in (-1, 1))
    return Estimate(p, 0.0 if p == 0 else low, 1.0 if p == 1 else high, len(counts))


@dataclass(frozen=True, slots=True)
class Paired:
    """How much b is above a on the same cases, and how likely so large a difference is by chance alone."""

    difference: float
    low: float
    high: float
    p: float
    n: int


def paired(a: Sequence[float], b: Sequence[float]) -> Paired | None:
    """b - a, case by case: bootstrap interval, and a two-sided p.

    Right-or-wrong scores: McNemar's exact test (binomial over the cases that differ). Others: sign flips,
    10,000 seeded.
    """
    import numpy as np

    differences = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    middle = estimate(differences.tolist())
    if middle is None:
        return None
    changed = differences[differences != 0]
    if set(np.unique(changed)) <= {-1.0, 1.0}:
        p = _binomial_p(int((changed > 0).sum()), len(changed))
    else:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(10_000, len(changed)))
        extreme = np.abs(signs @ changed) >= abs(changed.sum()) - 1e-12
        p = float((extreme.sum() + 1) / 10_001)
    return Paired(middle.value, middle.low, middle.high, p, middle.n)


def _binomial_p(successes: int, n: int) -> float:
    """Two-sided p of `successes` of n at one half."""
    tail = sum(math.comb(n, k) for k in range(min(successes, n - successes) + 1))
    return float(min(1.0, 2 * tail / 2**n))


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


@dataclass(frozen=True, slots=True)
class SequenceLoss:
    """Teacher-forced, over one conversation's supervised tokens: summed loss (nats), tokens, right first
    guesses."""

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


# --------------------------------------------------------------------------- running a model


class Kept:
    """Results that are kept on disk as they come, one JSON line each; a run that was killed goes on behind
    them.

    path None: in memory only. A last line that was cut off is left out (and computed again).
    """

    def __init__(self, path: Path | None) -> None:
        self._found: dict[str, Any] = {}
        self._file: IO[str] | None = None
        if path is None:
            return
        whole = path.read_bytes() if path.is_file() else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        for line in whole.splitlines():
            entry = json.loads(line)
            self._found[entry["key"]] = entry["value"]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._file.truncate(len(whole))

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Any:
        return self._found[key]

    def add(self, key: str, value: Any) -> None:
        self._found[key] = value
        if self._file is not None:
            self._file.write(json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n")
            self._file.flush()


def sequence_losses(
    model: Any,
    data: Any,
    chosen: Sequence[int],
    kept: Kept,
    tick: Callable[[int], None] = lambda done: None,
) -> list[SequenceLoss]:
    """Teacher-forced loss of the chosen conversations of `data` (token_cache.TokenisedData), as in training.
    it.

    The model is left as it was found. tick: called with the number of conversations done.
    """
    import torch

    from qwen_chat.training import attention, batches, loss

    before = model.config._attn_implementation
    model.set_attn_implementation(attention.register())
    rows = batches.WindowSampler(data, batch_size=1, max_length=_longest(data, chosen), shuffle=False)
    items, collate = batches.RowDataset(data), batches.Collator()
    model_loss = loss.ModelLoss(model)
    device = next(model.parameters()).device
    losses = []
    try:
        for done, i in enumerate(chosen, 1):
            key = f"loss {data.where(i)}"
            if key not in kept:
                (row,) = rows.plan([i])
                batch = {name: value.to(device) for name, value in collate([items[row]]).items()}
                with torch.inference_mode():
                    found = model_loss(model, batch)
                kept.add(key, [float(found.loss_sum), int(found.tokens), int(found.correct)])
            total, tokens, right = kept[key]
            losses.append(SequenceLoss(data.where(i), total, tokens, right))
            tick(done)
    finally:
        model_loss.remove()
        model.set_attn_implementation(before)
    return losses


def _longest(data: Any, chosen: Sequence[int]) -> int:
    return max((len(encoded.input_ids) for i in chosen for encoded in data[i]), default=1)


def write_replies(
    engine: Any,
    fmt: Any,
    cases: Sequence[Case],
    kept: Kept,
    *,
    calls: Literal["free", "strict", "required"] = "free",
    max_tokens: int = 256,
    adapter: str | None = None,
    batch: int = 8,
    tick: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The greedy reply of every case, through the engine in batches.

    calls: free, as the model likes; strict, a call that it opens is decoded under its tool's schema;
    required, every reply is such a call (several where the case allows them), whatever the reference does.
    """
    waiting = [case for case in cases if f"reply {case.key}" not in kept]
    done = len(cases) - len(waiting)
    for start in range(0, len(waiting), 4 * batch):
        some = waiting[start : start + 4 * batch]
        requests = [_request(fmt, case, calls, max_tokens, adapter) for case in some]
        for case, completion in zip(some, engine.generate(requests), strict=True):
            if completion.finish_reason not in ("stop", "length") and completion.fault != "request":
                raise ServiceError(
                    f"{case.key}: no reply ({completion.error or completion.finish_reason}); "
                    "what was written before is kept: run the same command again"
                )
            kept.add(f"reply {case.key}", completion.text)
        done += len(some)
        tick(done)
    return [kept[f"reply {case.key}"] for case in cases]


def fitting(cases: Sequence[Case], fmt: Any, room: int) -> list[Case]:
    """The cases whose prompt leaves a place for a reply in `room` tokens."""
    return [case for case in cases if len(_prompt_ids(fmt, case)) < room]


def _prompt_ids(fmt: Any, case: Case) -> Sequence[int]:
    ids: Sequence[int] = fmt.prompt_ids([write_message(message) for message in case.before], list(case.tools))
    return ids


def _request(fmt: Any, case: Case, calls: str, max_tokens: int, adapter: str | None) -> Any:
    from qwen_chat.inference.sampling import GenerationRequest

    tools = list(case.tools)
    grammar = None
    if calls == "required":
        grammar = fmt.call_grammar(tools, parallel=case.parallel_tool_calls)
    elif calls == "strict":
        grammar = fmt.text_grammar([_strict(tool) for tool in tools])
    return GenerationRequest(
        prompt_ids=_prompt_ids(fmt, case),
        max_tokens=max_tokens,
        temperature=0.0,
        stop=tuple(fmt.stop_strings),
        stop_token_ids=tuple(fmt.stop_token_ids),
        grammar=grammar,
        adapter=adapter,
    )


def _strict(tool: Json) -> Json:
    """The tool as if its owner had asked for valid arguments: for the grammar, not for the prompt."""
    return {**tool, "function": {**tool["function"], "strict": True}}


def judge(
    cases: Sequence[Case], texts: Sequence[str], fmt: Any = None, *, same: Same = same_json
) -> list[Judged]:
    """Score replies. fmt (a ChatFormat): to know where a prompt ended inside a thinking block."""
    judged = []
    for case, text in zip(cases, texts, strict=True):
        inside = False
        if fmt is not None:
            inside = fmt.render([write_message(m) for m in case.before], list(case.tools)).in_reasoning
        judged.append(Judged(case, text, score(case, text, in_reasoning=inside, same=same)))
    return judged
