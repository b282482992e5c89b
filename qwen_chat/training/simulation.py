"""A training step on a GPU that is not there (stand_in.py): our layers, our loss, backward and AdamW, counted.

In: a config.json, a Run's adapter flags, the Setup of its plan. Out: a Simulated: the peak of allocated bytes and what
it is made of. What CUDA takes beside its allocator's blocks (its context, the workspaces of its libraries) is no
tensor and is not counted; the plan's `runtime` is for that. Nor is what an allocator cannot use between its blocks.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch.autograd.function import once_differentiable

from qwen_chat.errors import OptionError, first_line
from qwen_chat.flags.deepspeed_file import read_deepspeed
from qwen_chat.flags.run_options import LoraArguments, Run
from qwen_chat.training import adapters, attention, delta_net
from qwen_chat.training.loss import ModelLoss
from qwen_chat.training.memory_plan import Setup
from qwen_chat.training.router_loss import RouterLoss
from qwen_chat.training.stand_in import DEVICE, HostTensorError, Kernels, StandIn
from qwen_chat.training.zero_shares import Buckets, Gathered, Shares, Sizes

Segments = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Simulated:
    """Bytes of one rank's tensors: at the peak, and the parts of which ZeRO's shares are made."""

    peak_bytes: int
    transfers: int  # how often the host waited for a value in the forward and backward pass of one row
    seconds: float
    weights: int
    gradients: int
    optimizer: int
    forward: int  # peaks of the three parts of a step
    backward: int
    update: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def simulate(
    config: Mapping[str, Any],
    setup: Setup,
    lora: LoraArguments,
    *,
    zero: Mapping[str, Any] | None = None,
    segments: Segments | None = None,
    half: torch.dtype = torch.bfloat16,
    optim: str = "adamw_torch_fused",
) -> Simulated:
    """A step of one rank that has made steps before: the last of several rows, and the update.

    zero: `zero_optimization` of DeepSpeed's file; segments: the row's layout (packing.py), one sequence without it.
    """
    begun = time.perf_counter()
    device, kernels = StandIn(), Kernels(half if setup.half and not setup.zero else None)
    with _as_on_a_gpu(kernels), device, kernels:
        model = _model(config, setup, lora, half, kernels)
        for tensor in (*model.parameters(), *model.buffers()):
            device.count(tensor)
        loss = ModelLoss(model, router=RouterLoss.of(model.config))
        batch = _made_row(device, setup, segments or ((0, setup.row, setup.row),))
        step = _Step(device, kernels, model, loss, batch)
        if setup.zero:
            shares = Shares.of(
                model, setup.zero, setup.ranks, sizes := Sizes.of(model.config.hidden_size, zero or {})
            )
            found = step.shared(setup.zero, shares, sizes)
        else:
            found = step.alone(optim, setup.ranks)
        loss.remove()
    return replace(found, seconds=round(time.perf_counter() - begun, 1))


def of_run(run: Run, config: Mapping[str, Any], setup: Setup) -> Simulated:
    """The Simulated of a Run, as its plan's Setup has it. Raises OptionError for what has no stand-in."""
    optim = str(run.extra.get("optim", "adamw_torch_fused"))
    reasons = {
        "it stands in for a GPU; name one: --gpu_gib 24": setup.device != "cuda",
        "4-bit weights are multiplied by kernels of bitsandbytes, which have none": setup.method == "qlora",
        "what is offloaded moves between a GPU and main memory, which has none": setup.offload_optimizer
        or setup.offload_weights,
        "a model that sees is not built for it": "vision_config" in config,
        f"--optim {optim} has none (adamw_torch, adamw_torch_fused)": not optim.startswith("adamw_torch"),
    }
    for reason, holds in reasons.items():
        if holds:
            raise OptionError(f"--simulate True: {reason}")
    block: Mapping[str, Any] = {}
    if run.train.deepspeed is not None:
        block = read_deepspeed(run.train.deepspeed)[0].get("zero_optimization", {})
    half = torch.float16 if run.train.fp16 else torch.bfloat16
    lora = replace(run.lora, lora_r=setup.lora_r)
    try:
        return simulate(config, setup, lora, zero=block, half=half, optim=optim)
    except (RuntimeError, NotImplementedError, AssertionError, HostTensorError) as error:
        raise OptionError(
            f"--simulate True: a model of type {config.get('model_type')!r}"
            f" cannot be simulated so ({first_line(error, 120)})"
        ) from None


class _Step:
    """One row forward and backward, and the update, counted."""

    def __init__(
        self, device: StandIn, kernels: Kernels, model: Any, loss: ModelLoss, batch: dict[str, torch.Tensor]
    ) -> None:
        self.device, self.kernels, self.model, self.loss, self.batch = device, kernels, model, loss, batch
        self.learnt = [p for p in model.parameters() if p.requires_grad]

    def row(self) -> tuple[int, int]:
        """The peaks of forward and backward."""
        self.device.reset_peak()
        self.device.transfers = 0
        with self.kernels.autocast():
            total = self.loss(self.model, self.batch).loss_sum / 1.0
        forward = self.device.reset_peak()
        total.backward()  # type: ignore[no-untyped-call]
        return forward, self.device.reset_peak()

    def alone(self, optim: str, ranks: int) -> Simulated:
        """Without DeepSpeed: weights, gradients and states are whole; DDP holds gradients in buckets of its own."""
        weights = self.device.live
        optimizer = torch.optim.AdamW(self.learnt, fused="fused" in optim, foreach="fused" not in optim)
        for parameter in self.learnt:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        gradients = sum(p.numel() * p.element_size() for p in self.learnt)
        states = self.device.live - weights - gradients
        buckets = [torch.empty_like(p) for p in self.learnt] if ranks > 1 else []
        forward, backward = self.row()
        torch.nn.utils.clip_grad_norm_(self.learnt, 1.0)
        optimizer.step()
        update = self.device.reset_peak()
        del buckets
        peak = max(forward, backward, update)
        return Simulated(
            peak, self.device.transfers, 0.0, weights, gradients, states, forward, backward, update
        )

    def shared(self, stage: int, shares: Shares, sizes: Sizes) -> Simulated:
        """Under ZeRO: what comes and goes beside the model, over what stays of it on one of the ranks."""
        whole = self.device.live
        if stage == 1:
            for parameter in self.learnt:
                parameter.grad = torch.empty_like(parameter)
        else:
            buckets = Buckets(self.model, sizes.bucket)
        if stage == 3:
            gathered = Gathered(self.model, sizes)
            self.row()
            buckets.reduce()
            gathered.begin()
        stays = shares.weights + shares.optimizer + (0 if stage == 1 else shares.gradients)
        forward, backward = (peak - whole + stays for peak in self.row())
        if stage == 3:
            forward += shares.bucket
        backward += shares.bucket
        update = shares.weights + shares.gradients + shares.optimizer + shares.update
        peak = max(forward, backward, update)
        states, gradients = shares.optimizer, shares.gradients
        return Simulated(
            peak, self.device.transfers, 0.0, shares.weights, gradients, states, forward, backward, update
        )


def _model(
    config: Mapping[str, Any], setup: Setup, lora: LoraArguments, half: torch.dtype, kernels: Kernels
) -> Any:
    """The model as tuned_model.py makes it: its number types, its attention, its adapter, in training."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {k: v for k, v in config.items() if k not in ("model_type", "torch_dtype", "dtype")}
    pure = setup.zero > 0 or setup.method != "full"
    dtype = half if setup.half and pure else torch.float32
    with torch.device(DEVICE):
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **fields),
            attn_implementation=attention.register(),
            dtype=dtype,
        )
        model.config.use_cache = False
        if setup.method != "full":
            plain = replace(lora, trainable_tokens=(), lora_weight_path=None, lora_init="default")
            model = adapters.wrap(model, plain, None, checkpointing=setup.checkpointing).model
    if setup.zero and setup.half:
        model.to(dtype)  # DeepSpeed's engine casts what peft keeps in float32
    delta_net.keep_apart(model)
    if setup.checkpointing:
        # What is computed again runs inside backward, which torch takes out of every function mode.
        again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), kernels.again())}
        model.gradient_checkpointing_enable(again)
    return model.train()


def _made_row(device: StandIn, setup: Setup, segments: Segments) -> dict[str, torch.Tensor]:
    """A row as the collator makes it, its last tokens supervised."""
    positions = torch.zeros(setup.row, dtype=torch.int64)
    for start, stop, _ in segments:
        above = [(a, b) for a, b, end in segments if b <= start < end]
        positions[start:stop] = torch.arange(stop - start) + sum(b - a for a, b in above)
    keep = torch.arange(setup.row - setup.supervised, setup.row)
    labels = device.place(torch.zeros(1, setup.supervised, dtype=torch.int64))
    return {
        "input_ids": device.place(torch.zeros(1, setup.row, dtype=torch.int64)),
        "position_ids": device.place(positions[None]),
        "segments": device.place(torch.tensor(segments)),
        "logits_to_keep": device.place(keep),
        "labels": labels,
        "shift_labels": labels,
    }


@contextmanager
def _as_on_a_gpu(kernels: Kernels) -> Iterator[None]:
    """Decisions that ask for the device answer for meta as for a GPU with flash attention and FlexAttention."""

    def kernel(query: torch.Tensor, layout: Segments) -> str:
        shared = "shared_prefix" if any(end > stop for _, stop, end in layout) else "packed"
        return attention.kernel_for("cuda", shared, str(query.dtype).removeprefix("torch."))[0]

    apply: Any = _Attention.apply
    optimizers = importlib.import_module("torch.optim.optimizer")
    asked, dtype, autocast = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.autocast
    with (
        mock.patch.object(
            torch, "autocast", lambda d, **more: kernels.paused() if d == DEVICE else autocast(d, **more)
        ),
        mock.patch.object(
            torch, "is_autocast_enabled", lambda d="cuda": kernels.casts if d == DEVICE else asked(d)
        ),
        mock.patch.object(torch, "get_autocast_dtype", lambda d: kernels.half if d == DEVICE else dtype(d)),
        mock.patch.object(attention, "_kernel", kernel),
        mock.patch.object(attention, "_flex_works", lambda *_: True),
        mock.patch.object(attention, "_flex", lambda q, k, v, *_: apply(q, k, v, False)),
        mock.patch.object(attention, "_varlen", lambda q, k, v, *_: apply(q, k, v, True)),
        mock.patch.object(optimizers, "_get_fused_kernels_supported_devices", lambda: ["cuda", DEVICE]),
    ):
        yield


class _Attention(torch.autograd.Function):
    """What an attention kernel of a GPU allocates, which meta's does not: `flash`, as PyTorch's flash attention 2 does,
    or FlexAttention's compiled one.

    Both keep the output and a log-sum-exp for each query and head, and give backward the row sums of output times
    gradient. Flash adds the queries' gradient up in float32 and makes keys' and values' for each query head.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, flash: bool
    ) -> torch.Tensor:
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        out = query.new_empty(query.shape if not flash else query.transpose(1, 2).shape)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.flash = flash
        return out if flash else out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, _, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        work = [torch.empty_like(lse)]
        if ctx.flash:
            work.append(torch.empty_like(query, dtype=torch.float32))
            if key.shape != query.shape:
                work += [torch.empty_like(query), torch.empty_like(query)]
        del work
        return dq, dk, dv, None
