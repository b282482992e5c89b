"""Attention over rows of many conversations with shared prefixes; linear in the conversations of a row.

In: queries, keys and values of a row and `segments` [S, 3] (start, stop, end; see packing.py), an extra
keyword of model.forward. Out: what attention within each conversation alone would give, exactly.

`register()` makes it available to transformers as attention "qwen_chat". Without `segments` (generation,
other people's code) it is transformers' own SDPA attention. Which kernel does the work is the decision of
`kernel_for`. A keyword that would change the result and that no kernel here knows (a cap on the scores, sinks) is
a ModelError: a layer that needs it would be trained wrong without a word.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from torch.utils._triton import has_triton
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qwen_chat.console import rank_zero
from qwen_chat.errors import ModelError, OptionError

NAME = "qwen_chat"
FLASH_HEAD = 256  # the widest head of flash attention
# Keywords of model.forward that reach an attention function and change nothing in it.
HARMLESS = {
    "cache_position",
    "logits_to_keep",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "return_dict",
    "use_cache",
}
_forward_block = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_block = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def register() -> str:
    """Make the attention known to transformers; returns the name for `attn_implementation`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _mask_for_calls_without_segments)
    return NAME


def kernel_for(
    device: str, layout: str, dtype: str = "bfloat16", *, flex: bool = True, flash: bool = True
) -> tuple[str, str]:
    """Which kernel attends over the rows of a layout: ("blocks" | "varlen" | "flex" | "mask", reason).

    device: "cpu", "cuda", ...; layout: packing.LAYOUTS; flex: whether FlexAttention can be compiled here
    (Triton); flash: whether this card and head size have flash attention. `kernel_here` asks the machine.
    """
    if device == "cpu":
        return "blocks", "CPU: SDPA's flash kernel on each block of the row that is attended to"
    half = dtype in ("bfloat16", "float16")
    if device == "cuda" and half and flash and layout != "shared_prefix":
        return "varlen", "nothing is shared: flash attention over sequences of varying length"
    if device == "cuda" and flex:
        why = "prefixes are shared" if layout == "shared_prefix" else "no flash attention"
        why = why if half or layout == "shared_prefix" else f"flash attention has no {dtype}"
        return "flex", f"{why}: FlexAttention skips the blocks that nobody attends to"
    return (
        "mask",
        f"no other kernel for {dtype} on '{device}': SDPA with a mask, memory grows with the row squared",
    )


def kernel_here(device: str, layout: str, dtype: str, head: int) -> tuple[str, str]:
    """`kernel_for` for this machine: whether it has Triton, and flash attention for heads of size `head`.

    Flash attention needs compute capability 8.0 (Ampere) or newer and heads of at most 256.
    """
    if device != "cuda":
        return kernel_for(device, layout, dtype)
    flash = torch.cuda.get_device_capability() >= (8, 0) and head <= FLASH_HEAD
    return kernel_for(device, layout, dtype, flex=has_triton() and not _flex_failed, flash=flash)


def head_size(config: dict[str, Any]) -> int:
    """The width of a head, from a model's config.json; 128 where it does not tell."""
    text = config.get("text_config")
    part = text if isinstance(text, dict) else config
    width, heads = part.get("hidden_size"), part.get("num_attention_heads")
    return int(part.get("head_dim") or (width // heads if width and heads else 128))


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: torch.Tensor | None = None,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    trunk: "Trunk | None" = None,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention function. query [1, H, T, D], key and value [1, Hkv, T, D] -> [1, T, H, D].

    trunk: of a pass over a part of a row (passes.py); `segments` then counts from the trunk's first token.
    ModelError for a keyword that asks for what is not computed here.
    """
    _refuse_unknown(module, kwargs)
    if segments is None:
        return cast(
            tuple[torch.Tensor, torch.Tensor | None],
            sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            ),
        )
    if query.shape[0] != 1:
        raise OptionError(f"a row is a batch of 1; found a batch of {query.shape[0]} with `segments`")
    if torch.is_autocast_enabled(query.device.type):
        # As for SDPA: rotary embedding leaves q and k in float32.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if trunk is not None:
        key, value = trunk.join(module, key, value)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    windowed = sliding_window is not None and query.shape[2] > sliding_window
    if (windowed and position_ids is None) or (attention_mask is not None and not windowed):
        raise ModelError(
            f"{type(module).__name__}: its attention is limited to a window or chunk, of which a row's layout"
            " cannot be told; rows no longer than the window (--model_max_length) have none"
        )
    layout = _layout(segments)
    kernel = "mask" if windowed or dropout else _kernel(query, layout)
    if kernel == "blocks":
        return cast(torch.Tensor, _Blocks.apply(query, key, value, layout, scale)), None  # type: ignore[no-untyped-call]
    if kernel == "varlen":
        longest = max(stop - start for start, stop, _ in layout)
        return _varlen(query, key, value, segments, longest, scale), None
    if kernel == "flex" and _flex_works(query, key, value, segments, scale):
        return _flex(query, key, value, segments, scale), None
    mask = visible(segments, key.shape[2])[-query.shape[2] :]
    if windowed and position_ids is not None:
        distance = position_ids[0][:, None] - position_ids[0][None, :]
        mask &= distance < cast(int, sliding_window)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask[None, None], dropout_p=dropout, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2), None


class Trunk:
    """The keys and values of a row's first tokens, layer by layer, for passes over what continues them.

    Made with nothing it takes up those of the layers that run; made with `above` it puts them before a layer's own.
    """

    def __init__(self, above: Mapping[torch.nn.Module, tuple[torch.Tensor, ...]] | None = None) -> None:
        self.above = above
        self.taken: dict[torch.nn.Module, tuple[torch.Tensor, ...]] = {}

    def join(
        self, module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value [1, Hkv, T, D] of a layer, after those of the trunk where there are some."""
        if self.above is None:
            self.taken[module] = key, value
            return key, value
        above_key, above_value = self.above[module]
        return torch.cat([above_key, key], dim=2), torch.cat([above_value, value], dim=2)


def visible(segments: torch.Tensor, tokens: int) -> torch.Tensor:
    """The row's attention as a mask [T, T]: query (first index) sees key if k <= q < end[segment of k]."""
    ends = _branch_ends(segments)
    at = torch.arange(tokens, device=segments.device)
    return (at[None, :] <= at[:, None]) & (at[:, None] < ends[None, :])


def _branch_ends(segments: torch.Tensor) -> torch.Tensor:
    """For each token of the row, where the part of the row ends that descends from it: [T]."""
    return torch.repeat_interleave(segments[:, 2], segments[:, 1] - segments[:, 0])


def _refuse_unknown(module: torch.nn.Module, keywords: dict[str, Any]) -> None:
    for name, value in keywords.items():
        harmless = name in HARMLESS or (name == "is_causal" and value is True)
        if value is not None and not harmless:
            raise ModelError(
                f"{type(module).__name__} asks its attention for '{name}', which attention over rows does not"
                " compute: this model type cannot be trained here"
            )


_row: tuple[torch.Tensor, tuple[tuple[int, int, int], ...]] | None = None


def _layout(segments: torch.Tensor) -> tuple[tuple[int, int, int], ...]:
    """The segments as numbers, read once a row: each reading waits for the device, and all layers see the same."""
    global _row
    if _row is None or _row[0] is not segments:
        _row = segments, tuple((start, stop, end) for start, stop, end in segments.tolist())
    return _row[1]


def _kernel(query: torch.Tensor, layout: tuple[tuple[int, int, int], ...]) -> str:
    if query.device.type == "cpu":
        return "blocks"
    name = "shared_prefix" if any(end > stop for _, stop, end in layout) else "packed"
    dtype = str(query.dtype).removeprefix("torch.")
    return kernel_here(query.device.type, name, dtype, query.shape[-1])[0]


class _Blocks(torch.autograd.Function):
    """CPU: a segment attends causally to itself; all that descends from it attends to it in one call.

    Softmax over several blocks of keys is put together from each block's output and log-sum-exp; with the
    joint output and log-sum-exp each block's backward is exact by itself (as in ring attention,
    arXiv:2310.01889). Nothing quadratic is stored. Grouped queries: the key heads are the batch and the
    queries of a group the heads, so keys and values are broadcast, not repeated. Where there are more keys than
    queries, the queries are those of the last keys: the first segment is a trunk, whose own queries are not there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: tuple[tuple[int, int, int], ...],
        scale: float,
    ) -> torch.Tensor:
        q, k, v = _by_key_head(query, key, value)
        groups, heads, tokens, width = q.shape
        first = k.shape[2] - tokens  # of the keys that have a query
        shared = any(end > stop for _, stop, end in segments)
        exact = torch.float32 if shared and q.dtype in (torch.bfloat16, torch.float16) else q.dtype
        out = q.new_empty((tokens, groups, heads, width), dtype=exact).permute(1, 2, 0, 3)
        lse = torch.empty(
            (groups, heads, tokens), dtype=torch.float64 if exact == torch.float64 else torch.float32
        )
        for start, stop, _ in segments:
            if start >= first:
                own, keys = slice(start - first, stop - first), slice(start, stop)
                out[:, :, own], lse[:, :, own] = _forward_block(
                    q[:, :, own], k[:, :, keys], v[:, :, keys], 0.0, True, scale=scale
                )
        for start, stop, end in segments:
            if end > stop:
                below, above = slice(stop - first, end - first), slice(start, stop)
                part, part_lse = _forward_block(
                    q[:, :, below], k[:, :, above], v[:, :, above], 0.0, False, scale=scale
                )
                joint = torch.logaddexp(lse[:, :, below], part_lse)
                out[:, :, below] *= (lse[:, :, below] - joint).exp_()[..., None]
                out[:, :, below].addcmul_(part.to(exact), (part_lse - joint).exp_()[..., None].to(exact))
                lse[:, :, below] = joint
        out = out.to(q.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out.permute(2, 0, 1, 3).reshape(1, tokens, groups * heads, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        q, k, v = _by_key_head(query, key, value)
        groups, heads, tokens, width = q.shape
        first = k.shape[2] - tokens
        g = gradient.reshape(tokens, groups, heads, width).permute(1, 2, 0, 3)
        exact = torch.float32 if q.dtype in (torch.bfloat16, torch.float16) else q.dtype
        dq = q.new_empty((tokens, groups, heads, width), dtype=exact).permute(1, 2, 0, 3)
        dk = q.new_zeros((k.shape[2], groups, width), dtype=exact).permute(1, 0, 2)
        dv = torch.zeros_like(dk)

        def part(queries: slice, keys: slice, causal: bool) -> torch.Tensor:
            at = (slice(None), slice(None), queries)
            part_q, part_k, part_v = _backward_block(
                g[at], q[at], k[:, :, keys], v[:, :, keys], out[at], lse[at], 0.0, causal, scale=ctx.scale
            )
            dk[:, keys] += part_k.sum(1, dtype=exact)
            dv[:, keys] += part_v.sum(1, dtype=exact)
            return cast(torch.Tensor, part_q)

        for start, stop, _ in ctx.segments:
            if start >= first:
                own = slice(start - first, stop - first)
                dq[:, :, own] = part(own, slice(start, stop), True)
        for start, stop, end in ctx.segments:
            if end > stop:
                below = slice(stop - first, end - first)
                dq[:, :, below] += part(below, slice(start, stop), False)
        dq = dq.reshape(1, groups * heads, tokens, width)
        return dq.to(q.dtype), dk[None].to(k.dtype), dv[None].to(v.dtype), None, None


def _by_key_head(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[1, H, T, D], [1, Hkv, T, D] -> views [Hkv, H / Hkv, T, D] of all three, keys and values broadcast."""
    groups = key.shape[1]
    q = query[0].reshape(groups, query.shape[1] // groups, *query.shape[2:])
    shape = (groups, q.shape[1], *key.shape[2:])
    return q, key[0].unsqueeze(1).expand(shape), value[0].unsqueeze(1).expand(shape)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: torch.Tensor,
    longest: int,
    scale: float,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    offsets = torch.cat([segments[:, 0], segments[-1:, 1]]).to(torch.int32)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = varlen_attn(
        q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=True
    )
    return cast(torch.Tensor, out)[None]


_flex_mask: tuple[torch.Tensor, Any] | None = (
    None  # the last row's mask: all layers of a step ask for the same one
)
_flex_compiled: tuple[Any, Any] | None = (
    None  # attention, and its mask (else the whole square is written down)
)


_flex_tried: set[tuple[torch.dtype, int]] = set()  # (number type, head size) that compiled and ran
_flex_failed = False


def _flex_works(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: torch.Tensor, scale: float
) -> bool:
    """Whether FlexAttention compiles here, forward and backward: tried once for a number type and head size.

    On cards with little shared memory it may not; then all rows take the mask, and a line says so.
    """
    global _flex_failed
    kind = (query.dtype, query.shape[-1])
    if _flex_failed or kind in _flex_tried:
        return not _flex_failed
    q, k, v = (tensor.detach().requires_grad_() for tensor in (query, key, value))
    try:
        with torch.enable_grad():
            torch.autograd.grad(_flex(q, k, v, segments, scale).sum(), (q, k, v))
    except torch.OutOfMemoryError:
        raise  # the mask would need more
    except Exception as error:  # the compiler's own errors are of many types
        _flex_failed = True
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        rank_zero(
            f"attention: FlexAttention cannot be compiled here ({first}); SDPA with a mask instead: memory"
            " grows with the row squared, a smaller --per_device_train_batch_size gives shorter rows"
        )
    else:
        _flex_tried.add(kind)
    return not _flex_failed


def _flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: torch.Tensor, scale: float
) -> torch.Tensor:
    global _flex_mask, _flex_compiled
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if _flex_compiled is None:
        _flex_compiled = torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask)
    attend, build = _flex_compiled
    if _flex_mask is None or _flex_mask[0] is not segments:
        ends = _branch_ends(segments)

        def sees(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return (k <= q) & (q < ends[k])

        tokens = query.shape[2]
        _flex_mask = segments, build(sees, None, None, tokens, tokens, device=str(query.device))
    out = attend(query, key, value, block_mask=_flex_mask[1], scale=scale, enable_gqa=True)
    return cast(torch.Tensor, out).transpose(1, 2)


def _mask_for_calls_without_segments(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: object,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs: object,
) -> torch.Tensor | None:
    """transformers' SDPA mask, but none for a whole row: `segments` says it all, without a square."""
    if attention_mask is None and q_length == kv_length and (local_size is None or kv_length <= local_size):
        return None
    mask = sdpa_mask(
        batch_size, q_length, kv_length, *args, attention_mask=attention_mask, local_size=local_size, **kwargs
    )
    return cast(torch.Tensor | None, mask)
