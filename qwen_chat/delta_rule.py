"""The gated delta rule and the convolution before it, over runs of tokens that continue from one another.

In: what a layer projects from the tokens of many runs, one run after the other, and which run each continues from.
Out: what each run would give with all that lies on its way before it and nothing else, and the states it leaves
behind. Training lays the segments of a row out as runs. The engine has chunks of its own, at fixed positions: the bits
of a row there depend on no company.

A head's state S [K, V] maps keys to values. A token with query q, key k, value v, log of decay g <= 0 and learning
rate b does (arXiv 2412.06464)

    S = exp(g) S;   S = S + k (b (v - S^T k))^T;   out = S^T q

Tokens go through in chunks: within a chunk these updates are one triangular system, between chunks goes the state.
All chunks that are as far from the beginning are one batch, so that runs side by side cost no steps of their own.
Keys and queries are normalised here, and all is computed in float32 (float64 where the layer is).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor

CHUNK = 64  # tokens that are one triangular system
EPSILON = 1e-6  # added to a key's squared length


@dataclass(frozen=True)
class Runs:
    """Runs of tokens, one after the other, each with its length (1 or more) and the earlier run that it continues
    (-1: none, it begins from a given state or from nothing)."""

    lengths: tuple[int, ...]
    parents: tuple[int, ...]

    @cached_property
    def roots(self) -> tuple[int, ...]:
        """The runs that continue none: given states come in this order."""
        return tuple(run for run, parent in enumerate(self.parents) if parent < 0)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each run's first token lies."""
        return tuple(accumulate(self.lengths[:-1], initial=0))

    @cached_property
    def chunks(self) -> Chunks:
        """The runs cut into chunks; made once, whatever layer asks."""
        size = min(CHUNK, max(self.lengths))
        # Of each chunk: its first token, how many it has, the place of the one before it in the level above.
        levels: list[list[tuple[int, int, int]]] = []
        last: list[tuple[int, int]] = []  # of each run: the level of its last chunk, the place in it
        for start, length, parent in zip(self.starts, self.lengths, self.parents, strict=True):
            level, place = last[parent] if parent >= 0 else (-1, -1)
            for at in range(0, length, size):
                level += 1
                if level == len(levels):
                    levels.append([])
                levels[level].append((start + at, min(size, length - at), place))
                place = len(levels[level]) - 1
            last.append((level, place))
        # Places of a level's chunks are counted over all levels from here on.
        before = [sum(map(len, levels[:level])) for level in range(len(levels) + 1)]
        all_chunks = torch.tensor([(first, count) for level in levels for first, count, _ in level])
        offsets = torch.arange(size)
        inside = offsets < all_chunks[:, 1:]
        tokens = all_chunks[:, :1] + torch.minimum(offsets, all_chunks[:, 1:] - 1)
        back = torch.empty(sum(self.lengths), dtype=torch.int64)
        back[tokens[inside]] = torch.arange(tokens.numel()).view_as(tokens)[inside]
        return Chunks(
            tokens=tokens.flatten(),
            inside=inside,
            back=back,
            parents=tuple(torch.tensor([place for _, _, place in level]) for level in levels[1:]),
            levels=[len(level) for level in levels],
            last=torch.tensor([before[level] + place for level, place in last]),
        )

    @lru_cache(maxsize=2)  # noqa: B019  all layers of a row ask for the same
    def history(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """The runs with the `width` tokens before each of them, as places of tokens (T + a: given state a).

        Returns (extended [T + R width], own [T]: the places in `extended` of the tokens themselves,
        tails [R, width]: the last tokens on the way to each run's end).
        """
        tokens = sum(self.lengths)
        given = iter(range(tokens, tokens + width * len(self.roots)))
        tails: list[list[int]] = []
        extended: list[int] = []
        own: list[int] = []
        for start, length, parent in zip(self.starts, self.lengths, self.parents, strict=True):
            past = tails[parent] if parent >= 0 else [next(given) for _ in range(width)]
            own += range(len(extended) + width, len(extended) + width + length)
            extended += [*past, *range(start, start + length)]
            tails.append(extended[len(extended) - width :] if width else [])
        return torch.tensor(extended), torch.tensor(own), torch.tensor(tails, dtype=torch.int64)


@dataclass(frozen=True)
class Chunks:
    """Runs cut into N chunks of C places, those without a chunk before them first, then their followers, and so on."""

    tokens: Tensor  # [N C] the token at each place; a place without one repeats the chunk's last
    inside: Tensor  # [N, C] whether a place holds a token
    back: Tensor  # [T] the place of each token
    parents: tuple[
        Tensor, ...
    ]  # of each level but the first: where in the level above each chunk's predecessor is
    levels: list[int]  # how many chunks each level has
    last: Tensor  # [R] the last chunk of each run


def convolve(
    x: Tensor, weight: Tensor, runs: Runs, states: Tensor | None = None, *, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Each channel's weighted sum over a token and the W - 1 before it on its run's way.

    x [T, D]; weight [D, W], the token's own last; states [roots, W - 1, D]: the inputs before the roots, else zeros.
    Returns the sums [T, D], made in float32 or better, and, with `keep`, the last W - 1 inputs on the way to each
    run's end [R, W - 1, D].
    """
    width = weight.shape[1] - 1
    extended, own, tails = (index.to(x.device) for index in runs.history(width))
    before = x.new_zeros(width * len(runs.roots), x.shape[1]) if states is None else states.flatten(0, 1)
    source = torch.cat([x, before.to(x.dtype)])
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    spread, weight = source.index_select(0, extended).to(exact), weight.to(exact)
    count = len(extended) - width
    total = spread[width:] * weight[:, width]
    for back in range(width):
        total = torch.addcmul(total, spread[back : back + count], weight[:, back])
    kept = source.index_select(0, tails.flatten()).view(*tails.shape, -1) if keep else None
    return total.index_select(0, own - width).to(x.dtype), kept


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    rate: Tensor,
    runs: Runs,
    states: Tensor | None = None,
    *,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The outputs [T, H, V] and, with `keep`, the state that each run leaves [R, H, K, V].

    query, key [T, Hk, K], each of whose heads serves H / Hk heads in a row; value [T, H, V]; decay [T, H]: its
    logarithm; rate [T, H]; states [roots, H, K, V]: what the roots continue from, else zeros.
    """
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    cut = runs.chunks
    tokens, inside = cut.tokens.to(value.device), cut.inside.to(value.device)
    count, size = inside.shape
    heads = value.shape[1]

    def chunked(x: Tensor) -> Tensor:
        """[T, h, ...] -> [N, H, C, ...]"""
        x = x.index_select(0, tokens).view(count, size, *x.shape[1:]).to(exact)
        return x.repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2).contiguous()

    q = chunked(normalised(query.to(exact)) * query.shape[-1] ** -0.5)
    k = chunked(normalised(key.to(exact)))
    v = chunked(value)
    empty = ~inside[:, None]
    b = chunked(rate).masked_fill(empty, 0)[..., None]
    # Of the decay from the chunk's beginning to each token, its own included.
    total = chunked(decay).masked_fill(empty, 0).cumsum(-1)[..., None]
    later = torch.ones(size, size, dtype=torch.bool, device=v.device).triu(1)
    between = (total - total.transpose(-1, -2)).masked_fill(later, -torch.inf).exp()
    system = b * (k @ k.transpose(-1, -2)) * between
    unit = torch.eye(size, dtype=exact, device=v.device).expand_as(system)
    inverse = torch.linalg.solve_triangular(system, unit, upper=False, unitriangular=True)
    scores = (q @ k.transpose(-1, -2)) * between
    from_start, to_end = total.exp(), (total[:, :, -1:] - total).exp()
    # Split once: a slice for each level would, in backward, be a sum over all chunks for each.
    parts = (inverse, scores, q, k, v, b, from_start, to_end)
    outputs: list[Tensor] = []
    left: list[Tensor] = []
    for level, part in enumerate(zip(*(torch.split(x, cut.levels) for x in parts), strict=True)):
        inverse, scores, q, k, v, b, from_start, to_end = part
        if level:
            state = left[-1].index_select(0, cut.parents[level - 1].to(v.device))
        elif states is None:
            state = v.new_zeros(len(v), heads, k.shape[-1], v.shape[-1])
        else:
            state = states.to(exact)
        written = inverse @ (b * (v - from_start * (k @ state)))
        outputs.append(from_start * (q @ state) + scores @ written)
        left.append(from_start[:, :, -1:] * state + k.transpose(-1, -2) @ (to_end * written))
    out = torch.cat(outputs).transpose(1, 2).flatten(0, 1).index_select(0, cut.back.to(v.device))
    kept = torch.cat(left).index_select(0, cut.last.to(v.device)) if keep else None
    return out.to(value.dtype), kept


def normalised(x: Tensor) -> Tensor:
    """Vectors of length one, but for EPSILON."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON)
