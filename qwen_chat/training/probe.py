"""What a model must show before its first step: a row gives what its conversations give one by one.

In: a model as it is loaded, wrapped and fused. Out: one line that says what was found, or a ModelError that
names the model type, what differs and by how much. Two things are shown on short sequences that share a row
as the run's rows will:

    equal   the row's loss and its gradient, through our collator, attention and loss, are those of each
            sequence alone through the model's own forward, its own attention, and cross-entropy
    apart   all that the last sequence does not see is changed: its hidden states do not move

A layer that carries something from token to token past the attention (a convolution, a recurrent state), that
does not hand the row's layout on, or that changes the logits after the head, fails one of the two.

The gradient is that of what the input embedding gives: it runs through every layer and through the head, and
needs no gradient of a weight. Nothing of the run changes: no random number is drawn from its generators, no
weight or buffer is written, no `.grad` is left.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as zero

from qwen_chat.chat.encoded import Encoded
from qwen_chat.errors import ModelError, first_line
from qwen_chat.families import TRAINABLE
from qwen_chat.training import delta_net
from qwen_chat.training.batches import Collator
from qwen_chat.training.loss import ModelLoss
from qwen_chat.training.packing import PackedRow

LENGTH = 11  # of each sequence: a prime, so that no boundary lies where a convolution or a chunk has its own
SHARED = 5  # first tokens that the last two have in common, where the layout stores them once
VOCABULARY, NARROW = 512, 256  # of the small copy: words, and the most inner features of an MLP or expert

# Relative, in float32 or better. Measured on random models of 40 families: loss at most 2e-7, gradient 3e-6; on
# SmolLM2-135M's own weights loss 4e-7, gradient 2.3e-5. The weakest of 13 families that are wrong: loss 9e-4,
# gradient 0.12, and where they leak moves 0.05.
LOSS, GRADIENT = 1e-5, 1e-3
# Nothing moves, but where tokens share experts: what else goes to an expert decides how its sums are rounded. The most
# that was seen is 1e-6 a layer.
MOVED_A_LAYER = 1e-5
ROUGH = 2e-2  # each of the three, where an accelerator's kernels multiply in fewer bits


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a row is from its sequences alone."""

    loss: float  # relative difference of the sums of cross-entropies
    gradient: float  # norm of the difference of the embeddings' gradients, relative
    moved: float  # norm of what hidden states move when others are changed, relative

    def wrong(self, most: Difference) -> str:
        """What is more than rounding, in words; empty where nothing is."""
        parts = []
        if not self.moved <= most.moved:  # so written because it may be no number
            parts.append(
                f"hidden states of one conversation move by {self.moved:.1e} when another is changed"
            )
        if not self.loss <= most.loss:
            parts.append(f"the loss of a row is off by {self.loss:.1e} of each conversation's alone")
        if not self.gradient <= most.gradient:
            parts.append(f"its gradient by {self.gradient:.1e}")
        return ", ".join(parts)


def prove(model: PreTrainedModel, layout: str) -> str:
    """Hold a model to the above; returns the decision's line.

    layout: packing.LAYOUTS. ModelError where the model differs. A model in half precision, in 4 bits, cut up by
    ZeRO-3 or not in main memory is judged by a float32 copy of its kinds of layers with random weights, on the CPU.
    """
    began = time.perf_counter()
    kind = model.config.model_type
    probed, what = model, "the model"
    if not _is_exact(model):
        try:
            probed = _small_copy(model)
        except Exception as error:  # a model's own code may fail in any way
            return f"not probed: no small copy of '{kind}' can be made ({first_line(error)}); rows are taken on trust"
        what = f"a float32 copy of {probed.config.get_text_config().num_hidden_layers} layers"
    most = bounds(probed)
    found = measure(probed, layout)
    if isinstance(found, str):
        return f"not probed: '{kind}' alone gives nothing to compare with ({found}); rows are taken on trust"
    wrong = found.wrong(most)
    if not wrong and probed is not model and delta_net.takes_kernels(model):
        # What they compute is seen on their own device alone.
        what += f" and on '{model.device.type}'"
        most = Difference(ROUGH, ROUGH, ROUGH)
        there = measure(probed.to(model.device), "packed")
        wrong = there if isinstance(there, str) else there.wrong(most)
    if wrong:
        raise ModelError(
            f"model type '{kind}' cannot be trained in rows of several conversations ({layout}): {wrong}"
            f" (at most {most.moved:.0e}, {most.loss:.0e}, {most.gradient:.0e}); model types that work:"
            f" {', '.join(TRAINABLE)}"
        )
    return (
        f"probe: in a row as alone (loss {found.loss:.0e}, gradient {found.gradient:.0e} apart, {found.moved:.0e} moved"
        f" by others; {what}, {time.perf_counter() - began:.1f} s)"
    )


def bounds(model: PreTrainedModel) -> Difference:
    """The most that is rounding in this model, in float32."""
    experts = any(name.endswith(".experts") for name, _ in model.named_modules())
    layers = model.config.get_text_config().num_hidden_layers
    return Difference(LOSS, GRADIENT, MOVED_A_LAYER * layers if experts else 0.0)


def measure(model: PreTrainedModel, layout: str) -> Difference | str:
    """How far a row of the layout is from its sequences alone; why not, where the model does not run by itself."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    sequences, shared = _sequences(min(rows, model.config.get_text_config().vocab_size), layout)
    with _quiet(model):
        try:
            loss, gradient = _one_by_one(model, sequences, shared)
        except Exception as error:  # a model's own code may fail in any way
            return first_line(error)
        if not math.isfinite(loss) or not float(gradient.norm()) > 0:
            return f"loss {loss}, gradient {float(gradient.norm())}"  # damaged weights: the run's own checks tell
        try:
            row_loss, row_gradient, hidden = _in_a_row(model, sequences, shared, layout, learning=True)
            others = _changed(sequences, shared)
            _, _, after = _in_a_row(model, others, shared, layout, learning=False)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"model type '{model.config.model_type}' cannot be trained in rows: its forward fails on one"
                f" ({first_line(error)}); model types that work: {', '.join(TRAINABLE)}"
            ) from error
    last = slice(
        1 - LENGTH, None
    )  # hidden states come sequence by sequence: of all tokens but each one's last
    moved = (after[last] - hidden[last]).norm() / hidden[last].norm()
    apart = (row_gradient - gradient).norm() / gradient.norm()
    return Difference(abs(row_loss - loss) / abs(loss), float(apart), float(moved))


# ------------------------------------------------------------------------------------------- the sequences


def _sequences(words: int, layout: str) -> tuple[list[Encoded], tuple[int, ...]]:
    """Sequences of a row, and what each shares with the one before it."""
    count = 3 if layout == "shared_prefix" else 2
    rows = [[(17 + 7919 * (LENGTH * n + at)) % words for at in range(LENGTH)] for n in range(count)]
    shared = [0] * count
    if layout == "shared_prefix":
        rows[2][:SHARED] = rows[1][:SHARED]
        shared[2] = SHARED
    return [_all_supervised(ids) for ids in rows], tuple(shared)


def _all_supervised(ids: list[int]) -> Encoded:
    """Every token of it supervised."""
    return Encoded(ids, [(0, len(ids))])


def _changed(sequences: Sequence[Encoded], shared: Sequence[int]) -> list[Encoded]:
    """All other tokens but those that the last sequence sees."""
    *others, near, last = (sequence.input_ids for sequence in sequences)
    near = near[: shared[-1]] + near[shared[-1] :][::-1]
    return [_all_supervised(ids) for ids in (*(ids[::-1] for ids in others), near, last)]


def _stored_at(sequences: Sequence[Encoded], shared: Sequence[int]) -> list[list[int]]:
    """Where each sequence's tokens lie in the row."""
    places: list[list[int]] = []
    at = 0
    for sequence, common in zip(sequences, shared, strict=True):
        own = len(sequence.input_ids) - common
        places.append((places[-1][:common] if common else []) + list(range(at, at + own)))
        at += own
    return places


# ---------------------------------------------------------------------------------------------- both ways


def _one_by_one(
    model: PreTrainedModel, sequences: Sequence[Encoded], shared: Sequence[int]
) -> tuple[float, torch.Tensor]:
    """Sum of losses and the embeddings' gradient, as a row would store it [T, H], by the model's own means.

    The sequences are of one length: a batch without padding, in which nobody has company.
    """
    ids = torch.tensor([s.input_ids for s in sequences], device=model.device)
    labels = torch.tensor([s.labels for s in sequences], device=model.device)
    with _own_attention(model), _embedded(model) as embedded:
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, embedded)
    places = torch.tensor(_stored_at(sequences, shared), device=model.device)
    stored = gradient.new_zeros(int(places.max()) + 1, gradient.shape[-1])
    return loss.item(), stored.index_add_(0, places.flatten(), gradient.flatten(0, 1))


def _in_a_row(
    model: PreTrainedModel,
    sequences: Sequence[Encoded],
    shared: tuple[int, ...],
    layout: str,
    *,
    learning: bool,
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Sum of losses, the embeddings' gradient [T, H] and the head's inputs [K, H] by the run's means."""
    pad_to = LENGTH if layout == "padded" else 0  # of the longest: nothing lies between it and the next
    names = tuple((number, 0) for number in range(len(sequences)))
    row = PackedRow(names, tuple(len(s.input_ids) for s in sequences), shared, pad_to)
    batch = {name: tensor.to(model.device) for name, tensor in Collator()([(row, sequences)]).items()}
    hidden: list[torch.Tensor] = []
    loss = ModelLoss(model)
    kept = model.get_output_embeddings().register_forward_pre_hook(
        lambda head, inputs: hidden.append(inputs[0].detach().flatten(0, -2))
    )
    try:
        with torch.set_grad_enabled(learning), _embedded(model) as embedded:
            total = loss(model, batch).loss_sum
            gradient = torch.autograd.grad(total, embedded)[0][0] if learning else hidden[0]
    finally:
        kept.remove()
        loss.remove()
    return total.item(), gradient, hidden[0]


# ----------------------------------------------------------------------------------------- leaving no trace


@contextmanager
def _quiet(model: PreTrainedModel) -> Iterator[None]:
    """No dropout, no weight that wants a gradient; layers are still computed again in backward where they are.

    Nor transformers' advice to install kernels, for a forward of its own that the run does not use.
    """
    logger = logging.getLogger("transformers.integrations.hub_kernels")
    level = logger.level
    logger.setLevel(logging.ERROR)
    modes = [(module, module.training) for module in model.modules()]
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for module, _ in modes:
        module.training = bool(getattr(module, "gradient_checkpointing", False))
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        logger.setLevel(level)
        for module, mode in modes:
            module.training = mode
        for parameter in wanting:
            parameter.requires_grad_(True)


@contextmanager
def _embedded(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Holds what the input embedding gives, as a leaf of the graph: no gradient goes on to the embedding."""
    held: list[torch.Tensor] = []

    def hold(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        held.append(output.detach().requires_grad_(torch.is_grad_enabled()))
        return held[-1]

    handle = model.get_input_embeddings().register_forward_hook(hold)
    try:
        yield held
    finally:
        handle.remove()


@contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model's own attention, written out in its file ("eager"), for the time being."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = [(config, getattr(config, "_attn_implementation", None)) for config in configs.values()]
    for config, name in before:
        if name is not None:
            config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, name in before:
            if name is not None:
                config._attn_implementation = name


# ------------------------------------------------------------------------------------------ the small copy


def _is_exact(model: PreTrainedModel) -> bool:
    """Whether the model itself can be judged: whole, in float32 or better, in main memory."""
    return all(
        parameter.dtype in (torch.float32, torch.float64)
        and parameter.device.type == "cpu"
        and not hasattr(parameter, "ds_id")
        for parameter in model.parameters()
    )


@contextmanager
def _whole() -> Iterator[None]:
    """A model that is built of others (text and sight) would have these cut up under ZeRO-3."""
    given = zero._hf_deepspeed_config_weak_ref
    zero.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        zero._hf_deepspeed_config_weak_ref = given


def _small_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class, hidden size and heads, in float32 with random weights and narrow MLPs.

    One layer of each kind, or two alike. What goes from token to token is as wide as it was.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text = config.get_text_config()
    layers = int(text.num_hidden_layers)
    lists = {
        name: value
        for name, value in vars(text).items()
        if isinstance(value, list | tuple) and len(value) == layers
    }
    kinds = [tuple(map(str, kind)) for kind in zip(*lists.values(), strict=True)] or [()] * layers
    chosen = {kind: kinds.index(kind) for kind in kinds}
    kept = sorted(chosen.values()) if len(chosen) > 1 else list(range(min(2, layers)))
    text.num_hidden_layers = len(kept)
    for name, value in lists.items():
        setattr(text, name, [value[index] for index in kept])
    for name, value in list(vars(text).items()):
        if name.endswith("intermediate_size") and isinstance(value, int):
            setattr(text, name, min(value, NARROW))
    text.vocab_size = VOCABULARY
    if vision := getattr(config, "vision_config", None):
        vision.num_hidden_layers = 1  # it is not run
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, None)
    with torch.random.fork_rng(devices=[]), _whole():
        torch.manual_seed(0)
        with torch.device("cpu"):
            small: PreTrainedModel = type(base)(config).float()
    delta_net.keep_apart(small)
    return small
