"""The loss where there are labels and nowhere else, in chunks, with the gradient formed on the way forward.

In: hidden states of the supervised positions [1, K, hidden] (model.forward got `logits_to_keep`) and what
each must predict. Out: the sum of their cross-entropies. The logits of one chunk are all that ever exists:
with Qwen's 151,936 words a whole row's would be the peak of memory. Nothing is computed twice: a chunk's
logits become their own gradient in place, and backward only scales what is already there.

`ModelLoss` is what a trainer calls:

    loss = ModelLoss(model)              # after LoRA wrapping, before DeepSpeed / DDP wrapping
    result = loss(wrapped_model, batch)  # batch: what batches.Collator returns
    (result.loss_sum / supervised_tokens_of_the_global_step * ranks).backward()
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from qwen_chat.errors import ModelError
from qwen_chat.training.memory_plan import CHUNK_BYTES
from qwen_chat.training.packing import Pass, passes
from qwen_chat.training.passes import formed
from qwen_chat.training.router_loss import RouterLoss

# What a collated row holds beside the model's inputs.
NOT_INPUTS = ("labels", "shift_labels", "owners", "last_tokens", "step_sequences")


@dataclass(frozen=True, slots=True)
class LossResult:
    """What one row gave."""

    loss_sum: torch.Tensor  # scalar with gradient: sum of -log p over the supervised tokens
    correct: torch.Tensor  # scalar: supervised tokens that were the likeliest word
    tokens: int  # supervised tokens
    losses: torch.Tensor | None = None  # [tokens]: of each; None where the row went in passes
    # Scalar with gradient: the router's losses of its sequences; None where none is learnt.
    router_sum: torch.Tensor | None = None


class _ChunkedLoss(torch.autograd.Function):
    """(hidden [K, H], trainable tensors of the head) -> (sum of cross-entropies, number of hits, each one [K])."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[torch.Tensor], torch.Tensor],
        targets: torch.Tensor,
        chunk: int,
        hidden: torch.Tensor,
        *trainable: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        learning = any(ctx.needs_input_grad)
        wanted = [hidden, *trainable]
        summed_in = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=summed_in, device=hidden.device)
        hits = torch.zeros((), dtype=torch.int64, device=hidden.device)
        losses = torch.zeros(len(targets), dtype=summed_in, device=hidden.device)
        grads = [torch.zeros_like(tensor) for tensor in wanted] if learning else []
        for start in range(0, len(targets), chunk):
            part = hidden[start : start + chunk].detach().requires_grad_(learning)
            target = targets[start : start + chunk, None]
            with torch.set_grad_enabled(learning):
                logits = head(part)
            scores = logits.detach().to(summed_in)
            top = scores.amax(-1, keepdim=True)
            picked = scores.gather(-1, target) - top
            # An argmax would cost 1 % of a step; a tie counts as a hit.
            hits += (picked == 0).sum()
            # The logits are not needed again: their memory becomes the gradient's.
            scores = scores.sub_(top).exp_()
            total = scores.sum(-1, keepdim=True)
            each = total.log() - picked
            loss += each.sum()
            losses[start : start + chunk] = each.squeeze(-1)
            if not learning:
                continue
            scores.div_(total)
            scores.scatter_add_(-1, target, scores.new_full((), -1.0).expand_as(target))
            found = torch.autograd.grad(logits, [part, *trainable], scores.to(logits.dtype))
            grads[0][start : start + chunk] = found[0]
            for number, total_grad in enumerate(grads[1:], 1):
                total_grad += found[number]
            # The next chunk begins without this one's: two of them, and of the head's gradients, would be the peak.
            del logits, scores, found
        ctx.grads = grads
        ctx.mark_non_differentiable(hits, losses)
        return loss, hits, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, []
        return None, None, None, *(grad.mul_(gradient.to(grad.dtype)) for grad in grads)


def chunked_loss(
    head: torch.nn.Module | Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    trainable: Sequence[torch.Tensor] = (),
    vocabulary: int,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of cross-entropies of `targets` [K] under `head(hidden [K, H])`, how many were hit, and each one [K].

    trainable: the head's tensors that want a gradient; vocabulary: width of the logits.
    """
    chunk = max(1, chunk_bytes // (4 * vocabulary))
    applied = _ChunkedLoss.apply(head, targets, chunk, hidden, *trainable)  # type: ignore[no-untyped-call]
    return cast(tuple[torch.Tensor, torch.Tensor, torch.Tensor], applied)


class ModelLoss:
    """Computes a row's loss inside the model's own output head.

    The head is where the weight is owned, so ZeRO-3's hooks have gathered it when the chunks need it, and
    LoRA or trained token rows on the head work as they are. Outside of a call of ours the head does what it
    always did.

    router: the router's loss, formed beside it where a gradient is; the rows must hold `last_tokens` (Collator).
    in_passes: a long row is computed in passes (passes.py), its gradient formed when the call ends; only for models
    whose layers see other tokens through our attention alone. on_pass: is told which of how many begins.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        router: RouterLoss | None = None,
        in_passes: bool = False,
        on_pass: Callable[[int, int], None] | None = None,
    ) -> None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(head, torch.nn.Module):
            raise ModelError(f"{type(model).__name__} has no output head; expected a causal language model")
        self._targets: torch.Tensor | None = None
        self._hits: torch.Tensor | None = None
        self._losses: torch.Tensor | None = None
        self._router = router
        self._chunk_bytes = chunk_bytes
        config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
        self._vocabulary = int(config.vocab_size)
        self._in_passes, self._on_pass = in_passes and router is None, on_pass
        self._window: int = getattr(config, "sliding_window", None) or 0
        self._own_forward: Callable[[torch.Tensor], torch.Tensor] = head.forward
        self._was_replaced = "forward" in vars(head)  # by a fused layer
        self._head = head
        head.forward = self._forward

    def remove(self) -> None:
        """Give the head back its own forward."""
        if self._was_replaced:
            self._head.forward = self._own_forward
        else:
            del self._head.forward

    def _forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """The head's forward. In a call of ours it gives the loss where the model expects logits."""
        if self._targets is None:
            return self._own_forward(hidden, *args, **kwargs)
        learning = torch.is_grad_enabled()  # evaluation under no_grad must not form a gradient
        trainable = [p for p in self._head.parameters() if p.requires_grad and learning]
        loss, self._hits, self._losses = chunked_loss(
            self._own_forward,
            hidden.flatten(0, -2),
            self._targets,
            trainable=trainable,
            vocabulary=self._vocabulary,
            chunk_bytes=self._chunk_bytes,
        )
        return loss

    def __call__(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> LossResult:
        """Run `model` (wrapped as it may be) on a collated row. `batch` is not changed."""
        tokens = batch["shift_labels"].numel()
        if parts := self._parts(batch):
            learnt = [p for p in model.parameters() if p.requires_grad]
            loss, hits = formed(lambda part: self._run(model, part)[:2], batch, parts, learnt, self._on_pass)
            return LossResult(loss, hits, tokens)
        balanced = self._router if torch.is_grad_enabled() else None
        asked = {} if self._router is None else {"output_router_logits": balanced is not None}
        loss, hits, output = self._run(model, batch, **asked)
        router_sum = None
        if balanced is not None:
            output.aux_loss = None  # transformers', of the row as one text: its memory is free again
            # Layers that are computed again in backward give their logits once, on the way forward.
            router_sum = balanced(output.router_logits, batch)
        return LossResult(loss, hits, tokens, losses=self._losses, router_sum=router_sum)

    def _parts(self, batch: dict[str, torch.Tensor]) -> list[Pass]:
        """The row's passes; none where it is computed whole."""
        windowed = 0 < self._window < batch["input_ids"].numel()
        if not self._in_passes or not torch.is_grad_enabled() or windowed:
            return []
        parts = passes([(start, stop, end) for start, stop, end in batch["segments"].tolist()])
        return parts if len(parts) > 1 or parts[0].branches else []

    def _run(
        self, model: torch.nn.Module, batch: dict[str, Any], **asked: bool
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """(loss, hits, the model's output) of a row or a part of one."""
        inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
        self._targets = batch["shift_labels"].flatten()
        try:
            output = model(**inputs, use_cache=False, **asked)
        finally:
            self._targets = None
        if self._hits is None:
            raise ModelError(
                f"{type(model).__name__} does not call its output head as a module, inside which the loss is formed;"
                " this model type cannot be trained here"
            )
        hits, self._hits = self._hits, None
        # The head returned the loss (see `_forward`), and the model passes on what its head returns as `logits`.
        return output.logits, hits, output
