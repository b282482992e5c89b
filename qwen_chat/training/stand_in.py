"""A GPU that is not there: torch's `meta` device in its place, with every byte counted and every host tensor caught.

In: work on tensors whose device is "meta": they have shapes and number types, and no contents. Out: the live bytes at
any time and their peak, as CUDA's caching allocator counts them; how often the host waited for a value; an error where
an operator meets a tensor that was left in main memory.

Whole numbers that the host made (ids, positions, the layout of a row) are known here too: what is computed from them
alone is computed beside, in main memory and uncounted, so that a program may read it back. Each reading is a transfer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from qwen_chat.errors import ChatError

DEVICE = "meta"
ROUNDED_TO = 512  # bytes: CUDA's caching allocator rounds every request up to a multiple
KNOWN_AT_MOST = 2**22  # whole numbers in a tensor that are computed beside

# CUDA's autocast, as far as layers of transformers ask for it (torch/amp, "Autocast Op Reference"): in the lower type,
# in float32, and sums, whose results become float32.
LOWER = {
    *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "addbmm", "einsum"),
    *("conv1d", "conv2d", "conv3d", "scaled_dot_product_attention"),
}
FLOAT32_OPERATORS = {
    *(
        "pow",
        "__pow__",
        "rsqrt",
        "exp",
        "expm1",
        "log",
        "log2",
        "log10",
        "log1p",
        "softplus",
        "norm",
        "layer_norm",
    ),
    *("nll_loss", "cosine_similarity", "cdist", "renorm", "logsumexp", "reciprocal"),
}
SUMMED = {"sum", "cumsum", "prod", "cumprod", "softmax", "log_softmax"}


class HostTensorError(ChatError):
    """An operator met a tensor in main memory beside one on the device, or a reading of what nobody knows."""


class StandIn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what lies on the device while it is entered.

    device: "meta"; "cpu" counts the tensors of a real run in main memory by the same rule, and catches nothing.
    """

    def __init__(self, device: str = DEVICE) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.live = 0
        self.peak = 0
        self.transfers = 0
        self._sizes: dict[int, int] = {}
        self._known: dict[int, torch.UntypedStorage] = {}

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the host on the device; its whole numbers stay known."""
        placed = torch.empty(tensor.size(), dtype=tensor.dtype, device=self.device)
        self.count(placed)
        if _counts(placed):
            self._known[_storage(placed)] = tensor.clone(
                memory_format=torch.contiguous_format
            ).untyped_storage()
        return placed

    def count(self, tensor: torch.Tensor) -> None:
        """Take a tensor's storage into account, once, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type != self.device or key in self._sizes:
            return
        size = -(-storage.nbytes() // ROUNDED_TO) * ROUNDED_TO
        self._sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
        self._known.pop(key, None)

    def reset_peak(self) -> int:
        """Begin a new phase; returns the peak of the one that ends."""
        ended, self.peak = self.peak, self.live
        return ended

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What is known of a tensor on the device: the same view of the same numbers in main memory."""
        storage = self._known.get(_storage(tensor))
        if storage is None:
            return None
        twin = torch.empty(0, dtype=tensor.dtype)
        return twin.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())  # type: ignore[call-overload, no-any-return]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if self.device != DEVICE:
            return self._counted(func(*args, **kwargs))
        placed = [tensor for tensor in tensors if tensor.device.type == DEVICE]
        name = func.overloadpacket.__name__
        to = kwargs.get("device")
        if name == "_local_scalar_dense" and placed:
            return self._read(placed[0]).item()
        if name == "_to_copy" and to is not None:
            if placed and torch.device(to).type == "cpu":
                return self._read(placed[0]).to(kwargs.get("dtype") or placed[0].dtype)
            if not placed and torch.device(to).type == DEVICE:
                return self.place(tensors[0].to(kwargs.get("dtype") or tensors[0].dtype))
        if name == "copy_" and len(placed) == 1 and args[0] is placed[0]:
            self._known.pop(_storage(args[0]), None)
            return args[0]
        host = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.dim() > 0]
        if placed and host:
            raise HostTensorError(
                f"{name}: a tensor {list(host[0].shape)} of {host[0].dtype}"
                f" lies in main memory; expected it on the device"
            )
        if not placed and (to is None or torch.device(to).type != DEVICE):
            return func(*args, **kwargs)
        return self._beside(func, args, kwargs, placed)

    def _read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The host waits for a value."""
        self.transfers += 1
        twin = self._twin(tensor)
        if twin is None:
            raise HostTensorError(
                f"a tensor {list(tensor.shape)} of {tensor.dtype} is read back; its values are not known here"
            )
        return twin.clone()

    def _beside(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], placed: list[torch.Tensor]
    ) -> Any:
        """Run an operator on the device; where all that it reads is known, in main memory too."""
        twins = {id(tensor): self._twin(tensor) for tensor in placed}
        known = all(twin is not None for twin in twins.values())
        shapeless = (
            torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags
        )

        def on_host() -> Any:
            swapped = tree_map(
                lambda leaf: twins.get(id(leaf), leaf) if isinstance(leaf, torch.Tensor) else leaf, args
            )
            named = tree_map(
                lambda leaf: twins.get(id(leaf), leaf) if isinstance(leaf, torch.Tensor) else leaf, kwargs
            )
            if "device" in named:
                named["device"] = "cpu"
            return func(*swapped, **named)

        if shapeless and known and placed:
            return tree_map(
                lambda leaf: self.place(leaf) if isinstance(leaf, torch.Tensor) else leaf, on_host()
            )
        result = self._counted(func(*args, **kwargs))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if known and all(_counts(tensor) for tensor in made):
            for tensor, twin in zip(made, tree_leaves(on_host()), strict=False):
                if _storage(tensor) not in self._known:
                    same = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
                    self._known[_storage(tensor)] = same.copy_(twin).untyped_storage()
        elif func._schema.is_mutable:
            for tensor in made:
                self._known.pop(_storage(tensor), None)
        return result

    def _counted(self, result: Any) -> Any:
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return result


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _counts(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() <= KNOWN_AT_MOST


class Kernels(TorchFunctionMode):
    """What a GPU's operators do otherwise than meta's: autocast to `half`, where it is on; dropout's mask of bytes."""

    def __init__(self, half: torch.dtype | None = None) -> None:
        super().__init__()
        self.half = half
        self.casts = False
        self._copies: dict[int, torch.Tensor] = {}  # of weights that learn, as autocast keeps them

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Matrix products in `half`; the copies of weights are kept until the end."""
        self.casts = self.half is not None
        try:
            yield
        finally:
            self.casts = False
            self._copies.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Without autocast."""
        before, self.casts = self.casts, False
        try:
            yield
        finally:
            self.casts = before

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same inside backward, which torch takes out of function modes: for activations computed again."""
        with self, self.autocast():
            yield

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "dropout" and func is torch.nn.functional.dropout:
            x, p, training = (
                *args,
                *(named.get(k, d) for k, d in (("p", 0.5), ("training", True))[len(args) - 1 :]),
            )[:3]
            if x.device.type == DEVICE:
                return torch.native_dropout(x, p, True)[0] if training and p else x
        if not self.casts:
            return func(*args, **named)
        if name in LOWER:
            args, named = tree_map(self._lower, (tuple(args), named))
        elif name in FLOAT32_OPERATORS:
            args, named = tree_map(_single, (tuple(args), named))
        elif name in SUMMED and named.get("dtype") is None and any(_half(leaf) for leaf in args):
            named["dtype"] = torch.float32
        return func(*args, **named)

    def _lower(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dtype != torch.float32 or leaf.device.type != DEVICE:
            return leaf
        if not (leaf.is_leaf and leaf.requires_grad):
            return leaf.to(self.half)
        if id(leaf) not in self._copies:
            self._copies[id(leaf)] = leaf.to(self.half)
        return self._copies[id(leaf)]


def _half(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.bfloat16, torch.float16)


def _single(leaf: Any) -> Any:
    return leaf.float() if _half(leaf) else leaf
