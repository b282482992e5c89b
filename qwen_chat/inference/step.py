"""One step: which tokens of which rows it computes, how they lie, and which attention calls they make.

In: `Segment`s, the next tokens of some rows. Out: a `Step`, made once and used by every layer: the tokens one after
the other without padding, the ranges that share an adapter, and `Span`s.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from qwen_chat.inference.kv_cache import TILE, Bank, KVRow
from qwen_chat.inference.lora import Lora

# Queries of a key-value head come to the kernel in multiples of 8. It gives each thread a buffer sized by their
# number, and the last bits of a product depend on where in memory the buffer begins: with 3, a row's depended on
# which thread computed it.
QUERIES = 8


@dataclass(frozen=True, slots=True)
class Segment:
    """The next `ids` of one row, at positions `start`, `start + 1`, ...; `row` has room for them.

    `drafts`: how many of the last ids may be taken back. Where logits are wanted, they are those of the last id that
    stays, then of each draft.
    `keep`: positions after which a snapshot of the row's states is taken, block ends within the segment; those that
    the row has kept so far are forgotten.
    """

    ids: Sequence[int]
    start: int
    row: KVRow
    lora: Lora | None = None
    wants_logits: bool = True
    keep: tuple[int, ...] = ()
    drafts: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens that one attention call serves: a token each of rows that are neighbours in a bank and attend to
    one (rounded) length, or the tokens of one row within one TILE of positions.

    Both give a token the same bits: the kernel works on each row and head apart, over the same keys.
    `is_run` tells the first kind, of two rows and more.
    """

    tokens: slice  # of the step
    bank: Bank
    slots: slice
    keys: slice  # positions attended to; its ends are multiples of TILE
    mask: torch.Tensor  # additive; of a run (rows, 1, 1, keys), else (rows of QUERIES, keys)
    is_run: bool
    slot_ids: torch.Tensor  # a run's: (rows,)
    positions: torch.Tensor  # (tokens,)
    places: slice  # else: the positions as a range


@dataclass(frozen=True, slots=True)
class Step:
    """What every layer reads. cos and sin (tokens, 1, rotary), the sign of "rotate half" folded into sin."""

    segments: Sequence[Segment]  # as they lie
    tokens: Sequence[slice]  # of each
    groups: Sequence[tuple[slice, Lora]]  # ranges of tokens that share an adapter
    spans: Mapping[int | None, Sequence[Span]]  # by sliding window
    cos: torch.Tensor
    sin: torch.Tensor


def lie_order(segments: Sequence[Segment]) -> list[int]:
    """The order in which segments are laid out: an adapter's together; rows that decode as they lie in their
    banks."""

    def key(place: int) -> tuple[int, bool, int, int, int]:
        segment = segments[place]
        bank = segment.row.bank
        assert bank is not None, "no room was reserved for the segment"
        return (
            segment.lora.number if segment.lora else 0,
            len(segment.ids) > 1,
            bank.capacity,
            bank.number,
            segment.row.slot,
        )

    return sorted(range(len(segments)), key=key)


def token_slices(segments: Sequence[Segment]) -> list[slice]:
    """Where each segment's tokens lie."""
    ends = itertools.accumulate((len(segment.ids) for segment in segments), initial=0)
    return [slice(begin, end) for begin, end in itertools.pairwise(ends)]


def adapter_groups(segments: Sequence[Segment], tokens: Sequence[slice]) -> list[tuple[slice, Lora]]:
    """Ranges of tokens that share an adapter; segments come ordered by adapter."""
    groups: list[tuple[slice, Lora]] = []
    for segment, own in zip(segments, tokens, strict=True):
        if segment.lora is not None:
            if groups and groups[-1][1] is segment.lora:
                groups[-1] = (slice(groups[-1][0].start, own.stop), segment.lora)
            else:
                groups.append((own, segment.lora))
    return groups


def attention_spans(
    segments: Sequence[Segment], positions: torch.Tensor, group: int, window: int | None, dtype: torch.dtype
) -> list[Span]:
    """How attention goes through a step. positions (tokens,), where it is computed; group: queries of one key-value
    head; window: how many tokens, itself included, a token attends to (None: all before it)."""
    spans: list[Span] = []
    begin = place = 0
    while place < len(segments):
        segment = segments[place]
        run = 1
        while place + run < len(segments) and _are_neighbours(
            segments[place + run - 1], segments[place + run]
        ):
            run += 1
        if run > 1:
            spans.append(_run_span(segments[place : place + run], positions, begin, window, dtype))
            place, begin = place + run, begin + run
            continue
        spans.extend(_lone_spans(segment, positions, begin, group, window, dtype))
        place, begin = place + 1, begin + len(segment.ids)
    return spans


def _are_neighbours(one: Segment, other: Segment) -> bool:
    return (
        len(one.ids) == len(other.ids) == 1
        and one.row.bank is other.row.bank
        and one.row.slot + 1 == other.row.slot
        and one.start // TILE == other.start // TILE
    )


def _keys(position: int, window: int | None) -> slice:
    """The keys that are read for any token of a position's TILE: a function of that tile alone."""
    tile = position // TILE * TILE
    first = 0 if window is None else max(0, tile - window + 1) // TILE * TILE
    return slice(first, tile + TILE)


def _mask(positions: torch.Tensor, keys: slice, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """0 where a query (one of positions) sees a key, else -inf: (queries, keys)."""
    key = torch.arange(keys.start, keys.stop, device=positions.device)
    hidden = key > positions[:, None]
    if window is not None:
        hidden |= key <= positions[:, None] - window
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _run_span(
    run: Sequence[Segment], positions: torch.Tensor, begin: int, window: int | None, dtype: torch.dtype
) -> Span:
    bank, slot = run[0].row.bank, run[0].row.slot
    assert bank is not None
    tokens, keys = slice(begin, begin + len(run)), _keys(run[0].start, window)
    return Span(
        tokens=tokens,
        bank=bank,
        slots=slice(slot, slot + len(run)),
        keys=keys,
        mask=_mask(positions[tokens], keys, window, dtype)[:, None, None],
        is_run=True,
        slot_ids=torch.arange(slot, slot + len(run), device=positions.device),
        positions=positions[tokens],
        places=slice(0),
    )


def _lone_spans(
    segment: Segment,
    positions: torch.Tensor,
    begin: int,
    group: int,
    window: int | None,
    dtype: torch.dtype,
) -> Iterator[Span]:
    bank, slot = segment.row.bank, segment.row.slot
    assert bank is not None
    first, stop = segment.start, segment.start + len(segment.ids)
    while first < stop:
        keys = _keys(first, window)
        last = min(stop, keys.stop)
        tokens = slice(begin + first - segment.start, begin + last - segment.start)
        mask = _mask(positions[tokens].repeat_interleave(group), keys, window, dtype)
        yield Span(
            tokens=tokens,
            bank=bank,
            slots=slice(slot, slot + 1),
            keys=keys,
            mask=functional.pad(mask, (0, 0, 0, -len(mask) % QUERIES)),
            is_run=False,
            slot_ids=positions[:0],
            positions=positions[tokens],
            places=slice(first, last),
        )
        first = last
