"""Layers that do their work in fewer passes over memory and keep less for backward; the numbers stay the same.

In: a model, wrapped for LoRA or not. Out: the same model, some of whose layers run as one autograd function
each:

    linear (+ LoRA)  base product, then the two thin products added in place: no scaled copy, no sum of copies
    gated MLP        keeps gate and up; silu(gate) * up, as much again, is computed once more in backward
    RMSNorm          keeps its input and one number a token

A frozen weight may be narrow (frozen.py): it is widened a piece at a time. A layer that is anything but plain (dropout
has its own path; DoRA, several adapters, autocast, another device, ZeRO-3) runs its own forward unchanged. Where it
runs: float32 and float64 on a CPU, whose memory is slow against its arithmetic; on GPUs Liger kernels and
torch.compile do this work.
"""

import ctypes
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from qwen_chat.training.frozen import is_narrow, product_back
from qwen_chat.training.frozen import product as product_with
from qwen_chat.training.matmul import Product

Tensor = torch.Tensor
Grads = tuple[Tensor | None, ...]
# Elements worked on at once: 512 KiB of float32, several of which fit a core's second-level cache.
IN_CACHE = 2**17


def install(model: torch.nn.Module, product: Product) -> dict[str, int]:
    """Give every layer that can have it the leaner forward; returns how many of each kind. After LoRA
    wrapping.

    product: how x [N, in] and weight [out, in] are multiplied (matmul.py).
    """
    from peft.tuners.lora import LoraLayer

    counts = {"linear": 0, "mlp": 0, "norm": 0}
    inside = {
        id(part)
        for module in model.modules()
        if isinstance(module, LoraLayer) and _is_linear(module.base_layer)
        for part in module.modules()
    }
    for module in model.modules():
        own = dict(module.named_children())  # its own: a wrapper of peft's answers for what it wraps
        gated = own.keys() >= {"gate_proj", "up_proj", "down_proj", "act_fn"}
        if isinstance(module, LoraLayer) and _is_linear(module.base_layer):
            _replace(module, _lora_forward, product)
            counts["linear"] += 1
        elif _is_linear(module) and id(module) not in inside:
            _replace(module, _linear_forward, product)
            counts["linear"] += 1
        elif _is_linear(module) and is_narrow(cast(Any, module).weight):
            # A wrapper of peft's that is not plain calls it with float32.
            _replace(module, _linear_forward, product)
        elif gated and type(own["act_fn"]).__name__ in ("SiLUActivation", "SiLU"):
            _replace(module, _mlp_forward, product)
            counts["mlp"] += 1
        elif type(module).__name__ in ("Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm"):
            _replace(module, _norm_forward, product)
            counts["norm"] += 1
    return counts


def _is_linear(layer: Any) -> bool:
    """Whether it is a plain linear layer, or one of bitsandbytes over four bits."""
    return type(layer) is torch.nn.Linear or (
        type(layer).__name__ == "Linear4bit" and is_narrow(layer.weight)
    )


def remove(model: torch.nn.Module) -> None:
    """Give every layer its own forward back."""
    for module in model.modules():
        if "_own_forward" in vars(module):  # hasattr would ask through peft's wrappers, which pass names on
            cast(Any, module).forward = module._own_forward
            del module._own_forward


def keep_memory() -> bool:
    """Ask glibc to keep freed memory for the next tensor instead of giving it back; True if it will.

    A step frees and takes gigabytes in blocks of 20 MB, each of which is else mapped, zeroed and unmapped.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    trim_threshold, mmap_threshold, unlimited = -1, -3, 2**31 - 1  # <malloc.h>; the arguments are C ints
    return bool(mallopt(mmap_threshold, unlimited)) and bool(mallopt(trim_threshold, unlimited))


def _replace(module: Any, forward: Callable[..., Tensor], product: Product) -> None:
    module._own_forward = module.forward
    module.forward = MethodType(lambda self, *args, **kwargs: forward(self, product, *args, **kwargs), module)


def _is_plain(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether these tensors are what the fused functions are written for."""
    if (
        x.device.type != "cpu"
        or x.dtype not in (torch.float32, torch.float64)
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    return all(
        p is None
        or (p.dtype == x.dtype and not hasattr(p, "ds_id"))
        or (x.dtype == torch.float32 and is_narrow(p))
        for p in parameters
    )


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """y [N, out] with the leading dimensions of x; no view to autograd, so it may be changed in place."""
    return cast(Tensor, torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]]))


# -------------------------------------------------------------------------------------------- linear and LoRA


def _linear_forward(self: Any, product: Product, x: Tensor) -> Tensor:
    if not _is_plain(x, self.weight, self.bias):
        return cast(Tensor, self._own_forward(x))
    return _linear(x, None, self.weight, self.bias, None, None, 1.0, product)


def _adapter(self: Any) -> tuple[Tensor, Tensor, float, torch.nn.Module] | None:
    """(A, B, scaling, dropout) of a LoRA layer with exactly one plain adapter at work."""
    names = [name for name in self.active_adapters if name in self.lora_A]
    if self.disable_adapters or self.merged or len(names) != 1 or names[0] in self.lora_variant:
        return None
    a, b = self.lora_A[names[0]], self.lora_B[names[0]]
    if type(a) is not torch.nn.Linear or b.bias is not None:
        return None
    return a.weight, b.weight, float(self.scaling[names[0]]), self.lora_dropout[names[0]]


def _lora_forward(self: Any, product: Product, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    adapter = None if args or kwargs else _adapter(self)
    base = self.base_layer
    if adapter is None or not _is_plain(x, base.weight, base.bias, adapter[0], adapter[1]):
        return cast(Tensor, self._own_forward(x, *args, **kwargs))
    a, b, scaling, dropout = adapter
    dropped = x if isinstance(dropout, torch.nn.Identity) or not self.training else dropout(x)
    return _linear(x, None if dropped is x else dropped, base.weight, base.bias, a, b, scaling, product)


def _linear(x: Tensor, *rest: object) -> Tensor:
    return cast(Tensor, _Linear.apply(x, *rest))  # type: ignore[no-untyped-call]


class _Linear(torch.autograd.Function):
    """y = x W^T + bias + s (x' A^T) B^T with x' = x, or x after dropout. x [..., in], W [out, in], A [r, in],
    B [out, r].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scaling: float,
        product: Product,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        lora_in = flat if dropped is None else dropped.reshape(flat.shape)
        y, low = _adapted(product, flat, lora_in, weight, bias, a, b, scaling)
        needs_x = ctx.needs_input_grad[2] or (ctx.needs_input_grad[4] and dropped is None)
        ctx.narrow = weight if is_narrow(weight) else None
        ctx.save_for_backward(
            x if needs_x else None, dropped, None if ctx.narrow is not None else weight, a, b, low
        )
        ctx.scaling, ctx.product = scaling, product
        return _shaped(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Grads:
        x, dropped, weight, a, b, low = ctx.saved_tensors
        weight = weight if ctx.narrow is None else ctx.narrow
        need = ctx.needs_input_grad
        g = gradient.reshape(-1, gradient.shape[-1])
        flat = None if x is None else x.reshape(-1, x.shape[-1])
        g_low = None if b is None else (g @ b).mul_(ctx.scaling)
        dx = product_back(ctx.product, g, weight) if need[0] else None
        d_dropped = None
        if g_low is not None:
            if dropped is not None:
                d_dropped = (g_low @ a).view(dropped.shape) if need[1] else None
            elif dx is not None:
                dx.addmm_(g_low, a)
        lora_in = flat if dropped is None else dropped.reshape(-1, dropped.shape[-1])
        return (
            None if dx is None else dx.view(*gradient.shape[:-1], dx.shape[-1]),
            d_dropped,
            *_weight_gradients(ctx.product, g, flat, lora_in, g_low, low, need[2:6]),
            None,
            None,
        )


def _adapted(
    product: Product,
    x: Tensor,
    lora_in: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor | None]:
    """The product with what the adapter adds, and s x A^T [N, r], which backward needs."""
    y = product_with(product, x, weight, bias)
    if a is None or b is None:
        return y, None
    low = (lora_in @ a.t()).mul_(scaling)
    return y.addmm_(low, b.t()), low


def _weight_gradients(
    product: Product,
    g: Tensor,
    x: Tensor | None,
    lora_in: Tensor | None,
    g_low: Tensor | None,
    low: Tensor | None,
    need: tuple[bool, ...],
) -> Grads:
    """Gradients of weight, bias, A and B from the output's gradient g [N, out]; `low` is s x A^T [N, r]."""
    return (
        product(g.t(), cast(Tensor, x).t(), None) if need[0] else None,
        g.sum(0) if need[1] else None,
        cast(Tensor, g_low).t() @ cast(Tensor, lora_in) if need[2] else None,
        (cast(Tensor, low).t() @ g).t() if need[3] else None,  # this way round is a quarter faster
    )


# -------------------------------------------------------------------------------------------------------- MLP


def _mlp_forward(self: Any, product: Product, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    down = self.down_proj
    if not _is_plain(gate):
        return cast(Tensor, down(self.act_fn(gate) * up))
    adapter, base, known = None, down, True
    if hasattr(down, "base_layer"):
        base = down.base_layer
        adapter = _adapter(down) if hasattr(down, "lora_A") else None
        known = adapter is not None and (not self.training or isinstance(adapter[3], torch.nn.Identity))
    a, b, scaling = (None, None, 1.0) if adapter is None else adapter[:3]
    known = known and _is_linear(base)
    if not known or not _is_plain(gate, base.weight, base.bias, a, b):
        return cast(Tensor, down(_Gated.apply(gate, up)))  # type: ignore[no-untyped-call]
    out = _GatedDown.apply(gate, up, base.weight, base.bias, a, b, scaling, product)  # type: ignore[no-untyped-call]
    return cast(Tensor, out)


class _Gated(torch.autograd.Function):
    """silu(gate) * up, keeping only gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gate(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Grads:
        gate, up = ctx.saved_tensors
        d_gate, d_up, _ = _gate_backward(
            gate, up, gradient.clone(memory_format=torch.contiguous_format), False
        )
        return d_gate, d_up


class _GatedDown(torch.autograd.Function):
    """The down projection of silu(gate) * up, which is not kept but computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scaling: float,
        product: Product,
    ) -> Tensor:
        hidden = _gate(gate, up).view(-1, gate.shape[-1])
        y, low = _adapted(product, hidden, hidden, weight, bias, a, b, scaling)
        ctx.narrow = weight if is_narrow(weight) else None
        ctx.save_for_backward(gate, up, None if ctx.narrow is not None else weight, a, b, low)
        ctx.scaling, ctx.product = scaling, product
        return _shaped(y, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Grads:
        gate, up, weight, a, b, low = ctx.saved_tensors
        weight = weight if ctx.narrow is None else ctx.narrow
        need = ctx.needs_input_grad
        g = gradient.reshape(-1, gradient.shape[-1])
        d_hidden = product_back(ctx.product, g, weight)
        g_low = None
        if b is not None:
            g_low = (g @ b).mul_(ctx.scaling)
            d_hidden.addmm_(g_low, a)
        d_gate, d_up, hidden = _gate_backward(gate, up, d_hidden.view(gate.shape), need[2] or need[4])
        flat = None if hidden is None else hidden.view(-1, gate.shape[-1])
        return d_gate, d_up, *_weight_gradients(ctx.product, g, flat, flat, g_low, low, need[2:6]), None, None


def _pieces(tensors: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """The same few rows of each [N, width], small enough for the cache."""
    rows = max(1, IN_CACHE // tensors[0].shape[-1])
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, a piece at a time so that the passes over it stay in the cache."""
    out = torch.empty(gate.shape, dtype=gate.dtype)
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (gate, up, out)]
    for g, u, o in _pieces(flat):
        torch.ops.aten.silu.out(g, out=o)
        o.mul_(u)
    return out


def _gate_backward(
    gate: Tensor, up: Tensor, gradient: Tensor, again: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(d_gate in the memory of `gradient`, d_up, silu(gate) * up if `again`)."""
    d_up = torch.empty(gate.shape, dtype=gate.dtype)
    hidden = torch.empty(gate.shape, dtype=gate.dtype) if again else d_up
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (gate, up, gradient, d_up, hidden)]
    for g, u, d, du, h in _pieces(flat):
        silu = torch.nn.functional.silu(g)
        torch.mul(d, silu, out=du)
        if again:
            torch.mul(silu, u, out=h)
        d.mul_(u)
        torch.ops.aten.silu_backward.grad_input(d, g, grad_input=d)
    return gradient, d_up, hidden if again else None


# ------------------------------------------------------------------------------------------------------- norm


def _norm_forward(self: Any, product: Product, x: Tensor) -> Tensor:
    if not _is_plain(x, self.weight):
        return cast(Tensor, self._own_forward(x))
    return cast(Tensor, _Norm.apply(x, self.weight, self.variance_epsilon))  # type: ignore[no-untyped-call]


class _Norm(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return cast(Tensor, (x * scale).mul_(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Grads:
        x, weight, scale = ctx.saved_tensors
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (gradient * x).mul_(scale).flatten(0, -2).sum(0)
        dx = gradient * weight
        share = (dx * x).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-x.shape[-1])
        dx = dx.mul_(scale).addcmul_(x, share)
        return dx, d_weight, None
