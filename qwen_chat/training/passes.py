"""A long row in passes: what is held at once is a part of the row, what is computed stays the same.

In: a collated row and its passes (packing.py). Out: its loss with the gradient already formed, as `loss.py` forms that
of the head: a pass goes forward and backward before the next begins. A trunk goes forward once; the passes over its
branches attend to its keys and values, whose gradients then go back through it. So nothing is computed twice, and
activations of the trunk and of one pass are all that there are at once.

A gradient that is formed is kept until the row's backward, beside those of the rows before: as many bytes again as the
weights that learn. The memory plan decides whether that is less than what the passes save (memory_plan.py).
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from qwen_chat.training.attention import Trunk
from qwen_chat.training.packing import Pass

# A part of a row as a batch -> (loss with gradient, hits).
Forward = Callable[[dict[str, Any]], tuple[torch.Tensor, torch.Tensor]]


class _Formed(torch.autograd.Function):
    """A loss whose gradients are known: backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, loss: torch.Tensor, gradients: list[torch.Tensor | None], *learnt: torch.Tensor
    ) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, []
        return None, None, *(None if g is None else g.mul_(gradient.to(g.dtype)) for g in gradients)


class _Sums:
    """Gradients of weights, added up over the passes of a row."""

    def __init__(self, learnt: Sequence[torch.Tensor]) -> None:
        self.learnt = learnt
        self.sums: list[torch.Tensor | None] = [None] * len(learnt)

    def back(
        self,
        outputs: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        above: Sequence[torch.Tensor] = (),
        totals: Sequence[torch.Tensor] = (),
    ) -> None:
        """Backward from `outputs`; the gradients of `above` are added to `totals`."""
        with torch.autocast(outputs[0].device.type, enabled=False):
            found = torch.autograd.grad(outputs, [*self.learnt, *above], gradients, allow_unused=True)
        for number, part in enumerate(found[: len(self.learnt)]):
            before = self.sums[number]
            if before is None:
                self.sums[number] = part
            elif part is not None:
                before += part
        for total, part in zip(totals, found[len(self.learnt) :], strict=True):
            total += part


def formed(
    forward: Forward,
    batch: dict[str, Any],
    parts: Sequence[Pass],
    learnt: Sequence[torch.Tensor],
    on_pass: Callable[[int, int], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of cross-entropies with gradient, hits) of a collated row. learnt: the weights that learn; on_pass: is told
    that pass `number` of `passes` begins, a trunk's way back being one of its own.
    """
    sums = _Sums(learnt)
    count = sum(2 + len(part.branches) if part.branches else 1 for part in parts)
    numbers = iter(range(1, count + 1))

    def begin() -> None:
        if on_pass is not None:
            on_pass(next(numbers), count)

    losses: list[torch.Tensor] = []
    hits: list[torch.Tensor] = []

    def run(start: int, stop: int, **more: object) -> torch.Tensor:
        begin()
        loss, found = forward(_cut(batch, start, stop) | more)
        losses.append(loss.detach())
        hits.append(found)
        return loss

    for part in parts:
        if not part.branches:
            sums.back([run(part.start, part.stop)], [None])
            continue
        trunk = Trunk()
        loss = run(part.start, part.stop, trunk=trunk)
        taken = [tensor for pair in trunk.taken.values() for tensor in pair]
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in taken]
        above = Trunk(dict(zip(trunk.taken, zip(leaves[::2], leaves[1::2], strict=True), strict=True)))
        pairs = [(tensor, leaf) for tensor, leaf in zip(taken, leaves, strict=True) if leaf.requires_grad]
        learning = [leaf for _, leaf in pairs]
        totals: list[torch.Tensor] = [
            torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)) for leaf in learning
        ]
        for start, stop in part.branches:
            segments = _below(batch["segments"], part, start, stop)
            # The loss has no name here: its graph must be gone when the next pass begins.
            sums.back([run(start, stop, trunk=above, segments=segments)], [None], learning, totals)
        begin()
        gradients = [total.to(leaf.dtype) for leaf, total in zip(learning, totals, strict=True)]
        sums.back([loss, *(tensor for tensor, _ in pairs)], [None, *gradients])
    applied = _Formed.apply(torch.stack(losses).sum(), sums.sums, *learnt)  # type: ignore[no-untyped-call]
    return cast(torch.Tensor, applied), torch.stack(hits).sum()


def _cut(batch: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Tokens [start, stop) of a row as a row."""
    segments = batch["segments"]
    inside = segments[(segments[:, 0] >= start) & (segments[:, 0] < stop)]
    keep = batch["logits_to_keep"]
    chosen = (keep >= start) & (keep < stop)
    return {
        "input_ids": batch["input_ids"][:, start:stop],
        "position_ids": batch["position_ids"][:, start:stop],
        "segments": inside.clamp(max=stop) - start,
        "logits_to_keep": keep[chosen] - start,
        "shift_labels": batch["shift_labels"][:, chosen],
    }


def _below(segments: torch.Tensor, trunk: Pass, start: int, stop: int) -> torch.Tensor:
    """The layout of a trunk and the branches [start, stop) after it, counted from the trunk's first token."""
    length = trunk.stop - trunk.start
    first = segments.new_tensor([[0, length, length + stop - start]])
    inside = segments[(segments[:, 0] >= start) & (segments[:, 0] < stop)]
    return torch.cat([first, inside - start + length])
