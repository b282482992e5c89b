"""The model as it is trained: loaded with our attention, adapted, its layers fused, shown to be right in rows.

In: a Session. Out: a Tuned: the model, and what was decided on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import set_seed

from qwen_chat import hardware, models
from qwen_chat.console import rank_zero
from qwen_chat.flags.run_options import Run
from qwen_chat.training import adapters, attention, delta_net, frozen, fused, matmul, memory_plan, probe
from qwen_chat.training.ranks import from_rank_zero
from qwen_chat.training.session import Session


@dataclass(frozen=True)
class Tuned:
    """The model to train, what was decided, the session's choices with those made here."""

    model: PreTrainedModel
    initial: Mapping[str, torch.Tensor]  # the adapter's first values (PiSSA); else empty
    decisions: tuple[str, ...]
    choices: Mapping[str, Any]


def build(session: Session) -> Tuned:
    """Load, wrap, fuse and probe. Raises ModelError where this model type cannot be trained in rows."""
    run, args = session.run, session.args
    loaded = load(run, session.model_path, args)
    wrapped = adapt(run, loaded.model, session.fmt.tokenizer, args)
    fusing, chosen = fuse(wrapped.model, args, session.choices)
    if layers := delta_net.keep_apart(wrapped.model):
        fusing = (*fusing, delta_net.decision(layers, args.device.type, run.train.layout))
    proven = probe.prove(wrapped.model, run.train.layout)
    decisions = (*loaded.decisions, *wrapped.decisions, *fusing, proven)
    return Tuned(wrapped.model, wrapped.initial, decisions, {**session.choices, **chosen})


def load(run: Run, path: Path, args: TrainingArguments) -> models.Loaded:
    """The model to train, with our attention over rows."""
    dtype = _weight_dtype(run, args)
    name, why = run.model.attn_implementation, "as asked"
    if name in (None, attention.NAME):
        name = attention.register()
        kind = "float32" if dtype == "auto" else str(dtype).removeprefix("torch.")
        head = attention.head_size(models.read_config(path))
        kernel, reason = attention.kernel_here(args.device.type, run.train.layout, kind, head)
        why = f"{kernel}; {reason}"
    stored = memory_plan.keeps_stored(run, memory_plan.Shape.of(models.read_config(path)))
    loaded = models.load_model(
        path,
        dtype=frozen.stored_type(path) if stored else dtype,
        attention=name,
        quantize="nf4" if run.lora.q_lora and not stored else None,
        for_training=True,
        device=hardware.Device(args.device.type, "the run's"),
        trust_remote_code=run.model.trust_remote_code,
    )
    if stored:
        compute = torch.bfloat16 if args.bf16 else torch.float32
        frozen.keep(loaded.model, four_bits=run.lora.q_lora, compute=compute)
        told = frozen.how_kept(loaded.model, four_bits=run.lora.q_lora)
        loaded = models.Loaded(loaded.model, loaded.tokenizer, (told, *loaded.decisions[1:]))
    loaded.model.config.use_cache = False
    if run.model.trust_remote_code:
        rank_zero(f"runs Python code that lies in {path} (--trust_remote_code)")
    return models.Loaded(loaded.model, loaded.tokenizer, (*loaded.decisions, f"attention {name} ({why})"))


def _weight_dtype(run: Run, args: TrainingArguments) -> torch.dtype | str:
    """A full fine-tune keeps float32 weights (bfloat16 loses small updates), unless DeepSpeed keeps them."""
    if args.device.type == "cpu":
        return "auto"
    if run.method == "full" and run.train.deepspeed is None:
        return torch.float32
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def adapt(
    run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments
) -> adapters.Wrapped:
    """Put the adapter over the model; a full fine-tune leaves it as it is."""
    if not run.lora.use_lora:
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
        which = "all " if all(p.requires_grad for p in model.parameters()) else ""
        return adapters.Wrapped(model, (f"full fine-tune: {which}{trained:,} parameters are trained",), {})
    set_seed(args.seed)
    return adapters.wrap(model, run.lora, tokenizer, checkpointing=args.gradient_checkpointing)


def fuse(
    model: PreTrainedModel, args: TrainingArguments, choices: Mapping[str, Any]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """On a CPU: leaner layers, over the matrix product that is the faster one here, or that `choices` name.

    Returns the decision, and what is to be chosen again by a resumed run.
    """
    if args.device.type != "cpu" or args.bf16 or args.fp16:
        return (), {}
    stored = choices.get("matmul")
    choice = matmul.Route.from_json(stored) if stored else from_rank_zero(matmul.fastest)
    fused.keep_memory()
    counts = fused.install(model, choice.product)
    layers = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    line = f"matrix products by {choice.route} ({choice.reason}); fused layers: {layers or 'none'}"
    return (line,), {"matmul": choice.to_json()}
