"""One request's choices: which token comes next.

In: a `GenerationRequest` and, step by step, one row of logits. Out: a token and its log probability.
A request's random numbers, penalties and grammar are its own: `choose` takes the rows of many requests at once, and
gives each what it would get alone.

Order of what is done to the logits: repetition penalty, presence and frequency penalty, logit_bias, grammar,
temperature, then top_k, top_p and min_p over what is left. Reported log probabilities are the model's own,
before all of that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from qwen_chat.dialects.grammar import Grammar
from qwen_chat.inference import transfer
from qwen_chat.inference.grammar import Matcher

# Temperatures below it are greedy: divided by them, logits overflow.
_COLDEST = 1e-5
# Sorting 151,936 logits costs 10 ms; the nucleus is nearly always among the first few.
_FIRST_CANDIDATES = 64
# Logits that are summed, or searched for their largest, in one go.
_STRETCH = 256

# One row, float32. numpy and not torch: a row is too small for several threads, and those would wait for each other.
Logits = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """What to generate. The defaults are OpenAI's; `temperature=0` is greedy.

    Attributes:
        max_tokens: None = as many as fit the context.
        top_k: 0 = off. min_p: 0 = off; relative to the most likely token's probability.
        seed: None = a fresh one; the same seed and prompt give the same tokens whoever else is being served.
        stop: strings; the earliest ends the reply and is not part of it.
        stop_token_ids: ids that end the reply, beside the model's own end tokens; never shown.
        presence_penalty, frequency_penalty: over generated tokens. repetition_penalty: prompt too; 1 = off.
        logprobs: None = off; n = the chosen token's and the n most likely ones'.
        grammar: what the reply must match (see grammar.py).
        adapter: the name of a loaded adapter; None = the base model.
        deadline: on time.monotonic()'s clock; the reply ends there with finish reason "deadline".
        ignore_eos: go on past the model's end tokens (benchmarks).
    """

    prompt_ids: Sequence[int]
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    grammar: Grammar | None = None
    adapter: str | None = None
    deadline: float | None = None
    ignore_eos: bool = False

    @property
    def is_plain_greedy(self) -> bool:
        """True where the next token is the largest logit and nothing else is asked for."""
        return self.temperature == 0 and self.is_plain

    @property
    def is_plain(self) -> bool:
        """True where the logits alone say what a random number means: a grammar, penalties, a bias and log
        probabilities are nobody's wish."""
        return (
            self.logprobs is None
            and self.grammar is None
            and not self.logit_bias
            and not (self.presence_penalty or self.frequency_penalty)
            and self.repetition_penalty == 1
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """The token taken; where asked for, its log probability and the most likely (id, log probability) pairs."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The state of one request's sampling: random numbers, tokens seen, grammar."""

    def __init__(self, request: GenerationRequest, matcher: Matcher | None = None) -> None:
        self.request = request
        self.matcher = matcher
        self._random = torch.Generator().manual_seed(
            time.time_ns() if request.seed is None else request.seed % (1 << 63)
        )
        self._prompt = np.array(sorted(set(request.prompt_ids)), dtype=np.int64)
        self._counts: dict[int, int] = {}

    def pick(self, logits: Logits) -> Choice:
        """The next token for one row of logits (vocabulary,), float32. The row is left as it was."""
        request = self.request
        scores = self._biased(logits)
        if self.matcher is not None:
            scores = self.matcher.mask(scores)
        token = int(scores.argmax()) if request.temperature < _COLDEST else self._draw(scores)
        self.note(token)
        if request.logprobs is None:
            return Choice(token)
        most = logits.max()
        logprobs = logits - (most + np.log(np.exp(logits - most).sum()))
        ids = _largest(logits, min(request.logprobs, len(logits)))
        return Choice(
            token, float(logprobs[token]), tuple(zip(ids.tolist(), logprobs[ids].tolist(), strict=True))
        )

    def forced(self) -> Iterator[Choice]:
        """The choices that no logits can change, as the grammar allows one token alone; none where log probabilities
        are asked for. Each is noted, and takes its random number, when it is asked for."""
        if self.matcher is None or self.request.logprobs is not None:
            return
        for token in self.matcher.forced():
            if not self.matcher.allows_only(token):
                return
            if self.request.temperature >= _COLDEST:
                self.uniform()
            self.note(token)
            yield Choice(token)

    def uniform(self) -> float:
        """The next random number, from 0 up to 1. A draw takes one."""
        return float(torch.rand((), generator=self._random, dtype=torch.float64))

    def note(self, token: int) -> None:
        """Count a token that was taken, and move the grammar on."""
        self._counts[token] = self._counts.get(token, 0) + 1
        if self.matcher is not None:
            self.matcher.consume(token)

    def _biased(self, logits: Logits) -> Logits:
        """Penalties and logit_bias. Sources: Keskar et al. 2019 (CTRL) for repetition; else OpenAI's API reference."""
        request, counts = self.request, self._counts
        if request.repetition_penalty != 1:
            seen = np.union1d(self._prompt, np.fromiter(counts, np.int64))
            penalty, taken, logits = request.repetition_penalty, logits[seen], logits.copy()
            logits[seen] = np.where(taken > 0, taken / penalty, taken * penalty)
        if counts and (request.presence_penalty or request.frequency_penalty):
            ids, times = np.fromiter(counts, np.int64), np.fromiter(counts.values(), np.float32)
            logits = logits.copy()
            logits[ids] -= request.presence_penalty + request.frequency_penalty * times
        if request.logit_bias:
            logits = logits.copy()
            logits[list(request.logit_bias)] += np.fromiter(request.logit_bias.values(), np.float32)
        return logits

    def _draw(self, scores: Logits) -> int:
        """One token at random. Candidates are laid out by token id, not by probability: two that change
        places by a rounding then do not change what a given random number means."""
        request, size, most = self.request, len(scores), scores.max()
        if not np.isfinite(most):  # a penalty so near 0 that scores overflowed: its limit is the largest
            return int(np.nan_to_num(scores, nan=-np.inf).argmax())
        # Of the likeliest token's probability.
        shares = np.exp((scores - most) / np.float32(request.temperature))
        top_k = min(request.top_k or size, size)
        if top_k == size and request.top_p >= 1:
            if request.min_p > 0:
                shares[shares < request.min_p] = 0
            return _place(shares, self.uniform())
        # Under a top_k of its own the sum is over its candidates: all of them are needed at once.
        wanted = top_k if top_k < size else min(size, _FIRST_CANDIDATES)
        total = _block_sums(shares)[-1] if top_k == size else None
        while True:
            ids = _largest(shares, wanted)
            found = shares[ids].astype(np.float64)
            upto = found.cumsum()
            enough = request.top_p * (upto[-1] if total is None else total)
            if wanted >= top_k or upto[-1] >= enough:
                break
            wanted = min(top_k, 8 * wanted)
        keep = (upto - found < enough) & (found >= request.min_p)
        keep[0] = True
        ids = np.sort(ids[keep])
        return int(ids[_place(shares[ids], self.uniform())])


def _largest(values: Logits, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The places of the `count` largest, the largest first; of equal ones the first places."""
    starts = np.arange(0, len(values), _STRETCH)
    ids = np.arange(len(values))
    if 0 < count < len(starts):
        # So many blocks have one that is as large as this: not more need to be looked at.
        ids = np.flatnonzero(
            values >= -np.partition(-np.maximum.reduceat(values, starts), count - 1)[count - 1]
        )
    return ids[np.argsort(-values[ids], kind="stable")[:count]]


def _block_sums(shares: Logits) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Sums up to the end of each block, in double precision."""
    return np.add.reduceat(shares, np.arange(0, len(shares), _STRETCH)).cumsum(dtype=np.float64)


def _place(shares: Logits, uniform: float) -> int:
    """The place where the sum of the shares (not negative, not all 0) passes that part of their whole."""
    blocks = _block_sums(shares)
    block, rest = _passes(blocks, uniform * blocks[-1])
    inside = shares[block * _STRETCH : (block + 1) * _STRETCH].cumsum(dtype=np.float64)
    return block * _STRETCH + _passes(inside, rest)[0]


def _passes(sums: np.ndarray[Any, np.dtype[np.float64]], wanted: float) -> tuple[int, float]:
    """The first place whose sum is above `wanted`, the last that adds to it where rounding leads past the end; and
    what of `wanted` lies within."""
    place = min(int(np.searchsorted(sums, wanted, side="right")), int(np.searchsorted(sums, sums[-1])))
    return place, wanted - float(sums[place - 1] if place else 0)


def choose(samplers: Sequence[Sampler], logits: torch.Tensor) -> list[Choice | Exception]:
    """The next token of each row of logits (rows, vocabulary), float32; the exception of a row that has none.

    On an accelerator a row is chosen where its logits lie, if nothing but they counts; the others' logits go to the
    host in the same transfer.
    """
    if logits.device.type == "cpu":
        left = list(logits.numpy())
        settled = [sampler.request.is_plain_greedy for sampler in samplers]
        best = [int(row.argmax()) if done else -1 for row, done in zip(left, settled, strict=True)]
    else:
        settled = [sampler.request.is_plain for sampler in samplers]
        wanted = [row for row, done in zip(logits, settled, strict=True) if not done]
        # Bits as whole numbers: a tensor has one type, and no copy changes those.
        packed = torch.cat((_drawn(samplers, logits), *(row.view(torch.int32) for row in wanted)))
        here, count = transfer.to_host(packed), len(samplers)
        best = here[:count].tolist()
        rest = iter(here[count:].view(torch.float32).view(-1, logits.shape[1]).numpy())
        left = [np.empty(0, np.float32) if done else next(rest) for done in settled]
    choices: list[Choice | Exception] = []
    for sampler, token, done, row in zip(samplers, best, settled, left, strict=True):
        try:
            choices.append(Choice(token) if done else sampler.pick(row))
        except Exception as error:  # one row's grammar or sampler must not take its neighbours along
            choices.append(error)
    return choices


def _drawn(samplers: Sequence[Sampler], logits: torch.Tensor) -> torch.Tensor:
    """The token (int32) of each row to which nothing but its logits counts, by the rule of `Sampler`, all rows at
    once, in shapes that depend on no value. The others get their likeliest."""
    best, size = logits.argmax(-1), logits.shape[1]
    asked = []
    for sampler in samplers:
        request = sampler.request
        if request.is_plain and request.temperature >= _COLDEST:
            top_k = min(request.top_k or size, size)
            asked.append((request.temperature, request.top_p, top_k, request.min_p, sampler.uniform()))
        else:
            asked.append((1.0, 1.0, size, 0.0, -1.0))
    if all(uniform < 0 for *_, uniform in asked):
        return best.int()
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # which MPS does not have
    numbers = torch.tensor(asked, dtype=wide, device=logits.device)
    temperature, top_p, top_k, min_p, uniform = numbers.t()[..., None]
    values, ids = (logits.to(wide) / temperature).sort(-1, descending=True)
    place = torch.arange(size, device=logits.device)
    p = values.masked_fill_(place >= top_k, float("-inf")).softmax(-1)
    kept = ((p.cumsum(-1) - p < top_p) | (top_p >= 1) | (place == 0)) & (p >= min_p * p[:, :1])
    # By token id, as Sampler lays candidates out.
    total = torch.zeros_like(p).scatter_(1, ids, p * kept).cumsum_(-1)
    whole = total[:, -1:].contiguous()
    last = torch.searchsorted(total, whole)  # where rounding leads past the end
    drawn = torch.minimum(torch.searchsorted(total, uniform * whole, right=True), last)
    return torch.where(uniform < 0, best[:, None], drawn)[:, 0].int()
