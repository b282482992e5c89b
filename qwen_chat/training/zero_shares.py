"""What one of several ranks holds under DeepSpeed's ZeRO, by the rules of its 0.19: shares, buckets, gathered layers.

In: a model on a stand-in (stand_in.py), how many ranks, the stage, the sizes of its JSON file. Out: the bytes of the
shares that stay, and, while the step runs on the stand-in, the tensors that come and go: under ZeRO-2 and 3 a gradient
is put into a bucket, reduced and shared out as soon as it is there; under ZeRO-3 a module's weights are gathered before
it runs and let go when nothing needs them soon.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ALIGNED = 2  # elements a rank of the flat weights of ZeRO-1 and 2 is a multiple of


@dataclass(frozen=True)
class Sizes:
    """Of DeepSpeed's file, in elements; transformers fills in those that are "auto"."""

    bucket: int  # gradients that are reduced together
    prefetch: int
    kept: int  # smaller weights are never split
    live: int = 10**9  # gathered at once
    reuse: int = 10**9  # weights needed again within so many are not let go
    group: int = 10**9  # that ZeRO-3 updates at once

    @classmethod
    def of(cls, hidden: int, block: Mapping[str, Any]) -> Sizes:
        """From `zero_optimization` of the file."""

        def size(name: str, default: int) -> int:
            value = block.get(name)
            return int(value) if isinstance(value, int | float) else default

        return cls(
            bucket=size("reduce_bucket_size", hidden * hidden),
            prefetch=size("stage3_prefetch_bucket_size", int(0.9 * hidden * hidden)),
            kept=size("stage3_param_persistence_threshold", 10 * hidden),
            live=size("stage3_max_live_parameters", cls.live),
            reuse=size("stage3_max_reuse_distance", cls.reuse),
            group=size("sub_group_size", cls.group),
        )


@dataclass(frozen=True)
class Shares:
    """Bytes of one rank that stay from step to step."""

    weights: int
    gradients: int
    optimizer: int  # a float32 copy of what it updates, and AdamW's two moments
    bucket: int  # while backward runs
    update: (
        int  # beside all these while the optimizer works: its gradients in the type that came, and in float32
    )

    @classmethod
    def of(cls, model: torch.nn.Module, stage: int, ranks: int, sizes: Sizes, moments: float = 8.0) -> Shares:
        every = list(model.parameters())
        learnt = [p for p in every if p.requires_grad]
        width = every[0].element_size()
        count = sum(p.numel() for p in learnt)
        if stage == 3:
            part = sum(math.ceil(p.numel() / ranks) for p in learnt)
            weights = sum(math.ceil(p.numel() / ranks) for p in every) * width
            gradients, bucket, group = part * width, sizes.bucket * width, min(part, sizes.group)
        else:
            part = group = math.ceil(count / (ALIGNED * ranks)) * ALIGNED
            weights = (sum(p.numel() for p in every) - count + part * ranks) * width
            gradients = count * width if stage == 1 else part * width
            bucket = 2 * sizes.bucket * width
        # A gradient in float32 already is flattened and used as it is.
        update = group * (width if width == 4 else width + 4)
        return cls(weights, gradients, int((4 + moments) * part), bucket, update)


class Buckets:
    """Gradients taken away as they come: copied into a bucket, or, where one is larger, kept until the next comes."""

    def __init__(self, model: torch.nn.Module, size: int) -> None:
        self._size, self._filled = size, 0
        self._large: list[torch.Tensor] = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]

    def _take(self, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        if self._filled + gradient.numel() > self._size:
            self.reduce()
        self._filled += gradient.numel()
        if self._filled > self._size:
            self._large.append(gradient)

    def reduce(self) -> None:
        """The ranks' parts are cut and joined in a tensor of their own."""
        if self._filled:
            torch.empty(self._filled, dtype=torch.bfloat16, device="meta")
        self._filled = 0
        self._large.clear()


class _Gather:
    """One all-gather: a single weight comes into a tensor of its own; several come into one, from which each is copied
    when the first of them is used, and which stays until all were."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self.sizes = {id(weight): weight.numel() for weight in weights}
        self._dtype, self._split = weights[0].dtype, False
        self._joined = self._tensor(sum(self.sizes.values()))

    def _tensor(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=self._dtype, device="meta")

    def split(self) -> dict[int, torch.Tensor]:
        """The weights, the first time that it is asked for."""
        first, self._split = not self._split, True
        if not first:
            return {}
        if len(self.sizes) == 1:
            return dict.fromkeys(self.sizes, self._joined)
        return {key: self._tensor(size) for key, size in self.sizes.items()}


class Gathered:
    """Whole weights that ZeRO-3 holds: tensors of their own on the stand-in, made and dropped by its own rule.

    The first pass over a row records the order in which modules are used; `begin` starts a pass that follows it. Every
    module that runs, also one without weights, fetches the next few weights of the order early, so that in time as many
    are whole as may be.
    """

    def __init__(self, model: torch.nn.Module, sizes: Sizes) -> None:
        self._sizes = sizes
        self._order: list[tuple[torch.Tensor, ...]] = []
        self._uses: list[int] = []  # the places in the order of modules that have weights
        self._following = False
        self._step = self._ahead = 0  # the module that runs; the next whose weights are not fetched early yet
        self._coming: dict[int, _Gather] = {}  # gathered, not used yet
        self._held: dict[int, torch.Tensor] = {}
        self._count = 0
        self._wanted: dict[int, int] = {}  # the step for which a weight was fetched last
        for module in model.modules():
            own = tuple(p for p in module.parameters(recurse=False) if p.numel() > sizes.kept)
            fetch, release = self._hooks(own)
            module.register_forward_pre_hook(fetch)
            module.register_forward_hook(release)
            module.register_full_backward_pre_hook(fetch)
            module.register_full_backward_hook(release)

    def _hooks(self, own: tuple[torch.Tensor, ...]) -> tuple[Callable[..., None], Callable[..., None]]:
        return lambda *_: self._fetch(own), lambda *_: self._release(own)

    def begin(self) -> None:
        """A pass of which the order is known."""
        self._following = True
        self._uses = [step for step, own in enumerate(self._order) if own]
        self._step = self._ahead = self._count = 0
        self._coming.clear()
        self._held.clear()
        self._wanted.clear()

    def _absent(self, parameter: torch.Tensor) -> bool:
        return id(parameter) not in self._held and id(parameter) not in self._coming

    def _gather(self, weights: Sequence[torch.Tensor]) -> None:
        if weights:
            self._coming |= dict.fromkeys(map(id, weights), _Gather(weights))
            self._count += sum(weight.numel() for weight in weights)

    def _fetch(self, own: tuple[torch.Tensor, ...]) -> None:
        if not self._following:
            self._order.append(own)
            return
        self._gather([parameter for parameter in own if self._absent(parameter)])
        for parameter in own:
            if (gather := self._coming.pop(id(parameter), None)) is not None:
                self._held |= gather.split()
        self._step += 1
        self._ahead = max(self._ahead, self._step)
        room = min(self._sizes.live - self._count, self._sizes.prefetch)
        early: dict[int, torch.Tensor] = {}
        while self._ahead < len(self._order) and sum(weight.numel() for weight in early.values()) < room:
            for parameter in self._order[self._ahead]:
                self._wanted[id(parameter)] = self._ahead
                if self._absent(parameter):
                    early[id(parameter)] = parameter
            self._ahead += 1
        self._gather(list(early.values()))

    def _release(self, own: tuple[torch.Tensor, ...]) -> None:
        if not self._following or not own:
            return
        going = {id(p) for p in own if self._wanted.get(id(p), -1) < self._step}
        passed = 0
        for place in self._uses[bisect.bisect_left(self._uses, self._step) :]:
            if passed >= self._sizes.reuse or not going:
                break
            going -= {id(p) for p in self._order[place]}
            passed += sum(p.numel() for p in self._order[place])
        for key in going & self._held.keys():
            self._count -= self._held.pop(key).numel()
