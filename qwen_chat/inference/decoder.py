"""A loaded Qwen2, Qwen2.5, Qwen3 or Llama model, laid out for decoding: many rows of different length in one
step.

In: a transformers model; each step, `Segment`s: the next tokens of some rows, prompts' pieces and single
tokens side by side.
Out: the logits of the rows that asked for them, (rows, vocabulary) float32.

The step's tokens lie one after the other, (tokens, hidden), with no padding. Linear layers see them all at
once; attention goes row by row over that row's own keys and values. What a position computes does not depend
on who else is in the step, nor on how its
prompt was cut into pieces: linear layers as quantize.py tells; attention always covers key-value lengths
rounded up to TILE by the position alone.

It uses the model's own weights, rotary embedding and activation, but not its `forward`: on one core a step of
a 135M model spent half of its time in the modules' Python. A test holds its logits against the model's own
forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from qwen_chat.errors import ModelError
from qwen_chat.inference.kv_cache import TILE, Bank, KVRow, KVShape
from qwen_chat.inference.lora import JOINED, Lora, Places
from qwen_chat.inference.quantize import Linear, make_linear

# Queries of a key-value head come to the kernel in multiples of 8. It gives each thread a buffer sized by their
# number, and the last bits of a product depend on where in memory the buffer begins: with 3, a row's depended on
# which thread computed it.
QUERIES = 8
FAMILIES = ("qwen2", "qwen3", "llama")


@dataclass(frozen=True, slots=True)
class Segment:
    """The next `ids` of one row, at positions `start`, `start + 1`, ...; `row` has room for them."""

    ids: Sequence[int]
    start: int
    row: KVRow
    lora: Lora | None = None
    wants_logits: bool = True


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: torch.Tensor
    qkv: Linear
    query_key_norm: torch.Tensor | None  # (heads + kv heads, head_dim): Qwen3
    o: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """The model's layers with query, key and value in one matrix and gate and up in another."""

    def __init__(self, model: Any, *, quantize: str | None = None) -> None:
        config = model.config
        if config.model_type not in FAMILIES:
            raise ModelError(
                f"model type {config.model_type!r}: the engine serves {', '.join(FAMILIES)}; "
                "for others use --engine vllm"
            )
        if any(parameter.device.type != "cpu" for parameter in model.parameters()):
            raise ModelError("the engine runs on the CPU; on a GPU use --engine vllm")
        body = model.model
        first = body.layers[0].self_attn
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim: int = first.head_dim
        self.vocabulary: int = model.lm_head.weight.shape[0]
        self.dtype: torch.dtype = body.embed_tokens.weight.dtype
        self.context: int = _context(config)
        self.kv_shape = KVShape(len(body.layers), self.kv_heads, self.head_dim, self.dtype)
        self.places = _places(body, bool(config.tie_word_embeddings), self.dtype)
        self._eps = float(config.rms_norm_eps)
        self._activation: Callable[[torch.Tensor], torch.Tensor] = body.layers[0].mlp.act_fn
        self._rotary = body.rotary_emb
        with torch.inference_mode():
            self._embedding = body.embed_tokens.weight.detach()
            self._layers = tuple(self._layer(layer, quantize) for layer in body.layers)
            self._norm = body.norm.weight.detach()
            self._head = make_linear(model.lm_head.weight, model.lm_head.bias, quantize)

    def _layer(self, layer: Any, quantize: str | None) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        norm = None
        if getattr(attention, "q_norm", None) is not None:
            norm = torch.cat(
                (
                    attention.q_norm.weight.expand(self.heads, -1),
                    attention.k_norm.weight.expand(self.kv_heads, -1),
                )
            )
        return _Layer(
            attention_norm=layer.input_layernorm.weight.detach(),
            qkv=_joined((attention.q_proj, attention.k_proj, attention.v_proj), quantize),
            query_key_norm=norm,
            o=_joined((attention.o_proj,), quantize),
            mlp_norm=layer.post_attention_layernorm.weight.detach(),
            gate_up=_joined((mlp.gate_proj, mlp.up_proj), quantize),
            down=_joined((mlp.down_proj,), quantize),
        )

    @torch.inference_mode()
    def step(self, segments: Sequence[Segment]) -> torch.Tensor:
        """Compute the segments' tokens and write their keys and values; logits of those that want them, in
        order."""
        order = sorted(range(len(segments)), key=lambda place: _laid_out(segments[place]))
        laid = [segments[place] for place in order]
        ends = list(itertools.accumulate(len(segment.ids) for segment in laid))
        x = self._hidden(laid, ends)
        last = {
            place: end - 1 for place, end in zip(order, ends, strict=True) if segments[place].wants_logits
        }
        if not last:
            return x.new_empty(0, self.vocabulary)
        places = sorted(last)
        x = functional.rms_norm(x[[last[place] for place in places]], x.shape[-1:], self._norm, self._eps)
        logits = self._head(x).float()
        for row, place in enumerate(places):
            lora = segments[place].lora
            if lora is not None:
                lora.correct(logits[row : row + 1], x[row : row + 1])
        return logits

    def _hidden(self, segments: Sequence[Segment], ends: Sequence[int]) -> torch.Tensor:
        """The hidden states (tokens, hidden) after the last layer."""
        ids = torch.tensor([token for segment in segments for token in segment.ids])
        positions = torch.tensor([place for s in segments for place in range(s.start, s.start + len(s.ids))])
        x = functional.embedding(ids, self._embedding)
        cos, sin = self._rotary(x[None], positions[None])
        cos, sin = cos[0, :, None], sin[0, :, None]
        half = self.head_dim // 2
        sin = torch.cat(
            (-sin[..., :half], sin[..., half:]), -1
        )  # the sign of "rotate half", folded in once a step
        groups = _groups(segments, ends)
        for rows, lora in groups:
            lora.embed(x[rows], ids[rows])
        spans = _spans(segments, positions, self.heads // self.kv_heads, x.dtype)
        hidden, keys = x.shape[-1:], self.heads + self.kv_heads
        for index, layer in enumerate(self._layers):
            h = functional.rms_norm(x, hidden, layer.attention_norm, self._eps)
            qkv = _with_lora(layer.qkv(h), h, groups, index, "qkv").view(len(ids), -1, self.head_dim)
            qk = qkv[:, :keys]
            if layer.query_key_norm is not None:
                qk = functional.rms_norm(qk, qk.shape[-1:], None, self._eps) * layer.query_key_norm
            torch.addcmul(qk * cos, qk.roll(half, -1), sin, out=qkv[:, :keys])
            a = self._attend(qkv, spans, index)
            x = x + _with_lora(layer.o(a), a, groups, index, "o")
            h = functional.rms_norm(x, hidden, layer.mlp_norm, self._eps)
            gate, up = _with_lora(layer.gate_up(h), h, groups, index, "gate_up").chunk(2, -1)
            h = self._activation(gate) * up
            x = x + _with_lora(layer.down(h), h, groups, index, "down")
        return x

    def _attend(self, qkv: torch.Tensor, spans: Sequence[_Span], index: int) -> torch.Tensor:
        """Write keys and values, then attend, a span at a time. qkv (tokens, heads + 2 kv heads, head_dim),
        rotated; returns (tokens, heads x head_dim)."""
        heads, kv_heads, size = self.heads, self.kv_heads, self.head_dim
        group = heads // kv_heads
        found = []
        for span in spans:
            kv, new = span.bank.layers[index], qkv[span.tokens]
            if span.is_run:
                kv[span.slot_ids, :, span.positions] = new[:, heads:]
                queries = new[:, :heads].reshape(-1, kv_heads, group, size)
            else:
                kv[span.slots.start, :, span.places] = new[:, heads:].transpose(0, 1)
                queries = new[:, :heads].reshape(-1, kv_heads, group, size).transpose(0, 1)
                queries = queries.reshape(1, kv_heads, -1, size)
            held, count = kv[span.slots, :, : span.length], queries.shape[2]
            queries = functional.pad(queries, (0, 0, 0, -count % QUERIES))
            attended = functional.scaled_dot_product_attention(
                queries, held[:, :kv_heads], held[:, kv_heads:], attn_mask=span.mask
            )[:, :, :count]
            if not span.is_run:
                attended = attended.reshape(kv_heads, -1, group, size).transpose(0, 1)
            found.append(attended.reshape(-1, heads * size))
        return found[0] if len(found) == 1 else torch.cat(found)


@dataclass(frozen=True, slots=True)
class _Span:
    """Tokens that one attention call serves: a token each of rows that are neighbours in a bank and attend to
    one (rounded) length, or the tokens of one row within one TILE of positions.

    Both give a token the same bits: the kernel works on each row and head apart, over the same length.
    `is_run` tells the first kind, of two rows and more.
    """

    tokens: slice  # of the step
    bank: Bank
    slots: slice
    length: int  # of keys attended to, a multiple of TILE
    mask: torch.Tensor  # additive; of a run (rows, 1, 1, length), else (rows of QUERIES, length)
    is_run: bool
    slot_ids: torch.Tensor  # a run's: (rows,)
    positions: torch.Tensor  # (tokens,)
    places: slice  # else: the positions as a range


def _laid_out(segment: Segment) -> tuple[int, bool, int, int, int]:
    """Sorts segments: an adapter's together; rows that decode in the order in which they lie in their
    banks."""
    bank = segment.row.bank
    assert bank is not None, "no room was reserved for the segment"
    return (
        segment.lora.number if segment.lora else 0,
        len(segment.ids) > 1,
        bank.capacity,
        bank.number,
        segment.row.slot,
    )


def _spans(
    segments: Sequence[Segment], positions: torch.Tensor, group: int, dtype: torch.dtype
) -> list[_Span]:
    """How attention goes through a step; made once, used by every layer."""
    spans: list[_Span] = []
    begin = place = 0
    while place < len(segments):
        segment = segments[place]
        run = 1
        while place + run < len(segments) and _are_neighbours(
            segments[place + run - 1], segments[place + run]
        ):
            run += 1
        if run > 1:
            spans.append(_run_span(segments[place : place + run], positions, begin, dtype))
            place, begin = place + run, begin + run
            continue
        spans.extend(_lone_spans(segment, positions, begin, group, dtype))
        place, begin = place + 1, begin + len(segment.ids)
    return spans


def _are_neighbours(one: Segment, other: Segment) -> bool:
    return (
        len(one.ids) == len(other.ids) == 1
        and one.row.bank is other.row.bank
        and one.row.slot + 1 == other.row.slot
        and one.start // TILE == other.start // TILE
    )


def _run_span(run: Sequence[Segment], positions: torch.Tensor, begin: int, dtype: torch.dtype) -> _Span:
    bank, slot = run[0].row.bank, run[0].row.slot
    assert bank is not None
    tokens, length = slice(begin, begin + len(run)), (run[0].start // TILE + 1) * TILE
    hidden = torch.arange(length) > positions[tokens, None]
    return _Span(
        tokens=tokens,
        bank=bank,
        slots=slice(slot, slot + len(run)),
        length=length,
        mask=_additive(hidden, dtype)[:, None, None],
        is_run=True,
        slot_ids=torch.arange(slot, slot + len(run)),
        positions=positions[tokens],
        places=slice(0),
    )


def _lone_spans(
    segment: Segment, positions: torch.Tensor, begin: int, group: int, dtype: torch.dtype
) -> Iterator[_Span]:
    bank, slot = segment.row.bank, segment.row.slot
    assert bank is not None
    first, stop = segment.start, segment.start + len(segment.ids)
    while first < stop:
        length = (first // TILE + 1) * TILE
        last = min(stop, length)
        tokens = slice(begin + first - segment.start, begin + last - segment.start)
        hidden = torch.arange(length) > positions[tokens].repeat_interleave(group)[:, None]
        hidden = functional.pad(hidden, (0, 0, 0, -len(hidden) % QUERIES))
        yield _Span(
            tokens=tokens,
            bank=bank,
            slots=slice(slot, slot + 1),
            length=length,
            mask=_additive(hidden, dtype),
            is_run=False,
            slot_ids=positions[:0],
            positions=positions[tokens],
            places=slice(first, last),
        )
        first = last


def _additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _groups(segments: Sequence[Segment], ends: Sequence[int]) -> list[tuple[slice, Lora]]:
    """Ranges of tokens that share an adapter; segments come ordered by adapter."""
    groups: list[tuple[slice, Lora]] = []
    begin = 0
    for segment, end in zip(segments, ends, strict=True):
        if segment.lora is not None:
            if groups and groups[-1][1] is segment.lora:
                groups[-1] = (slice(groups[-1][0].start, end), segment.lora)
            else:
                groups.append((slice(begin, end), segment.lora))
        begin = end
    return groups


def _with_lora(
    y: torch.Tensor, x: torch.Tensor, groups: Sequence[tuple[slice, Lora]], index: int, place: str
) -> torch.Tensor:
    """Add each adapter's share to its own tokens, in place."""
    for rows, lora in groups:
        lora.add(y[rows], x[rows], index, place)
    return y


def _joined(modules: Sequence[Any], quantize: str | None) -> Linear:
    """One linear layer for several that read the same input."""
    for module in modules:
        if not isinstance(module, torch.nn.Linear) or not module.weight.is_floating_point():
            raise ModelError(
                f"a layer of kind {type(module).__name__}; the engine needs a plain float model "
                "(merge the adapter first)"
            )
    weight = torch.cat([module.weight for module in modules])
    biases = [module.bias for module in modules]
    bias = (
        None
        if all(b is None for b in biases)
        else torch.cat([m.weight.new_zeros(m.weight.shape[0]) if m.bias is None else m.bias for m in modules])
    )
    return make_linear(weight, bias, quantize)


def _places(body: Any, tied: bool, dtype: torch.dtype) -> Places:
    modules = {
        name: module
        for part in (body.layers[0].self_attn, body.layers[0].mlp)
        for name, module in part.named_children()
        if name.endswith("_proj")
    }
    biases = []
    for layer in body.layers:
        parts = [getattr(layer.self_attn, name).bias for name in JOINED["qkv"]]
        biases.append(None if any(part is None for part in parts) else torch.cat(parts).detach())
    return Places(
        layers=len(body.layers),
        inputs={name: module.in_features for name, module in modules.items()},
        outputs={name: module.out_features for name, module in modules.items()},
        vocabulary=body.embed_tokens.weight.shape[0],
        width=body.embed_tokens.weight.shape[1],
        dtype=dtype,
        biases=tuple(biases),
        tied=tied,
    )


def _context(config: Any) -> int:
    """Tokens of prompt and reply together; a sliding window, where one is on, is the limit (attention here
    is full)."""
    window = config.sliding_window if getattr(config, "use_sliding_window", False) else None
    return min(int(config.max_position_embeddings), int(window or config.max_position_embeddings))
