"""What a run needs, from config.json alone: parameters, memory of each rank, disk, steps.

In: a model's config.json, a Run's flags, the longest row of the data. Out: a Need for each rank (weights,
gradients, optimizer, activations, loss), the flags that fit this machine, and the disk that the run takes.

The bytes a layer keeps for backward are counted from what autograd saves, tensor by tensor (`layer_bytes`);
what libraries take by themselves was measured (`RUNTIME`). benchmarks/bench_memory.py holds the whole against
measured peaks, docs/scale.md shows the table.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qwen_chat import hardware
from qwen_chat.errors import ModelError, OptionError
from qwen_chat.flags.deepspeed_file import read_deepspeed
from qwen_chat.flags.run_options import ALL_LINEAR, EXPERTS, Run, target_words
from qwen_chat.hardware import MIB

Method = Literal["full", "lora", "qlora"]
NumberType = Literal["float32", "bfloat16", "float16"]
GIB = 2**30

# Measured on a CPU: the interpreter with torch, transformers and peft; DeepSpeed and its process group.
RUNTIME = {"cpu": 640 * MIB, "cuda": 900 * MIB}
DEEPSPEED = 200 * MIB
# On a CPU, where weights come and go a layer at a time (4 bits, ZeRO-3): the holes that they leave in the heap, and
# a share of the activations for those between them.
HOLES = (560 * MIB, 0.16)
CHUNK_BYTES = 256 * MIB  # float32 logits that loss.py has at once; larger is hardly faster
REUSE = 10**9  # weights: DeepSpeed's default of stage3_max_reuse_distance, and of sub_group_size
ROOM = 0.92  # share of what is free that a plan may fill: allocators keep some for themselves
UNREAD = 0.75  # share of a vocabulary that a run does not meet
# A 4-bit weight: half a byte, one byte a block of 64 (its scale, quantised too), a float32 for 256 of those.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes that an optimizer keeps for a trained parameter, by its name in TrainingArguments.optim.
MOMENTS = {"sgd": 0.0, "adafactor": 0.1, "adagrad": 4.0, "lomo": 0.0}


# ------------------------------------------------------------------------------------------------ the model


# Model types whose parameters are counted; of any other nothing is guessed.
DENSE = ("qwen2", "qwen3", "llama", "mistral")
MIXTURES = ("qwen2_moe", "qwen3_moe", "mixtral")
DELTA_NETS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
# A folder with a vision part names its text part's type in text_config.
COUNTED = (*DENSE, *MIXTURES, "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
WITH_EXPERTS = (*MIXTURES, "qwen3_next", "qwen3_5_moe_text")
# Types of which peft takes gate_proj, up_proj and down_proj for the experts', wherever they are.
RENAMED = ("qwen3_moe", "mixtral", "qwen3_next")
# What transformers takes where a hybrid's file says nothing.
_HYBRID_DEFAULTS = {
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
DELTA_CHUNK = 64  # tokens that a delta net on a CPU computes at once


@dataclass(frozen=True)
class DeltaNet:
    """The recurrent part of a hybrid's layers of type linear_attention: widths of what a token has there."""

    key: int  # all key heads; queries are as wide
    value: int  # all value heads; the gate is as wide
    heads: int  # of values
    key_head: int  # width of one of keys
    kernel: int  # taps of the convolution
    joined: bool  # Qwen3-Next: two matrices where Qwen3.5 has four

    def linears(self, hidden: int) -> dict[str, tuple[int, int]]:
        """(in, out) of its linear layers."""
        mixed = 2 * self.key + self.value
        widths = {"qkv": mixed, "z": self.value, "b": self.heads, "a": self.heads}
        if self.joined:
            widths = {"qkvz": mixed + self.value, "ba": 2 * self.heads}
        found = {f"linear_attn.in_proj_{name}": (hidden, width) for name, width in widths.items()}
        return found | {"linear_attn.out_proj": (self.value, hidden)}

    @property
    def others(self) -> int:
        """Its parameters outside linear layers: convolution, A_log, dt_bias, the norm of one head."""
        return self.kernel * (2 * self.key + self.value) + 2 * self.heads + self.value // self.heads

    @property
    def walked(self) -> int:
        """Bytes of one token while backward walks through its chunks: seven squares of a chunk for each head and the
        gradients of three; what is convolved; queries and keys; values in six stages; states."""
        squares = 10 * DELTA_CHUNK * self.heads
        spread = 2 * (2 * self.key + self.value) + 2 * self.heads * self.key_head + 6 * self.value
        return 4 * (squares + spread + self.key_head * self.value // DELTA_CHUNK)


@dataclass(frozen=True)
class Shape:
    """What config.json says of a Qwen-, Llama- or Mistral-like model: dense, a mixture of experts, a hybrid."""

    kind: str
    hidden: int = 0
    inner: int = 0  # width of a dense layer's MLP
    layers: int = 0
    heads: int = 1
    kv_heads: int = 1
    head: int = 0  # width of one head
    words: int = 0
    tied: bool = False
    gated: bool = False  # the attention's output has a gate, which makes q_proj twice as wide
    biases: int = 0  # in one layer with attention
    normed: bool = False  # queries and keys have norms
    stored: int = 4  # bytes of a weight in the file
    experts: int = 0  # in each sparse layer
    chosen: int = 0  # of them for a token
    expert: int = 0  # width of one
    shared: int = 0  # width of the one that every token passes
    sparse: frozenset[int] = frozenset()  # the layers that have experts
    balanced: bool = False  # a router's loss is learnt
    delta: DeltaNet | None = None
    recurrent: frozenset[int] = frozenset()  # the layers that have a delta net in place of attention
    vision: int = 0  # parameters of the part that sees, which is loaded and stays as it is
    vision_linears: int = 0  # of them in linear layers

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Raises ModelError where a field that decides the size is missing."""
        text = config.get("text_config") or config
        # Such a folder's model is loaded whole (models.load_model).
        sees = config.get("vision_config") and "ForConditionalGeneration" in str(config.get("architectures"))
        kind = str((not sees and text.get("model_type")) or config.get("model_type", "?"))
        kind = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}.get(kind, kind)
        if kind not in COUNTED:
            return cls(kind)
        hybrid = kind in DELTA_NETS
        fields = (_HYBRID_DEFAULTS if hybrid else {}) | dict(text)
        try:
            hidden, heads = int(fields["hidden_size"]), int(fields["num_attention_heads"])
            layers, words = int(fields["num_hidden_layers"]), int(fields["vocab_size"])
            inner = 0 if kind == "qwen3_5_moe_text" else int(fields["intermediate_size"])
            parts = _mixture(kind, fields, layers) if kind in WITH_EXPERTS else {}
            parts |= _recurrence(kind, fields, layers) if hybrid else {}
            parts |= _vision(config["vision_config"]) if sees else {}
            # What transformers takes where the file says nothing.
            kv_heads = int(
                fields.get("num_key_value_heads")
                or ((4 if kind == "qwen3_5_text" else 2) if hybrid else heads)
            )
            head = int(fields.get("head_dim") or (128 if kind == "qwen3" else hidden // heads))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"config.json: {error} is missing or no number; expected a Qwen2-like model"
            ) from None
        dtype = str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or "float32")
        qkv, out, mlp = _biases(kind, fields)
        return cls(
            kind=kind,
            hidden=hidden,
            inner=inner,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head=head,
            words=words,
            tied=bool((config if sees else fields).get("tie_word_embeddings", False)),
            gated=hybrid,
            biases=qkv * ((1 + hybrid) * heads + 2 * kv_heads) * head
            + out * hidden
            + mlp * (2 * inner + hidden),
            normed=hybrid or kind in ("qwen3", "qwen3_moe"),
            stored=2 if dtype in ("bfloat16", "float16") else 4,
            **parts,
        )

    @property
    def counted(self) -> bool:
        """Whether this type's parameters are counted; else every size here is 0."""
        return self.kind in COUNTED

    @property
    def query(self) -> int:
        return self.heads * self.head

    @property
    def key(self) -> int:
        return self.kv_heads * self.head

    @property
    def widest(self) -> int:
        """Of the MLPs: how many values a token has between their matrices, its experts side by side."""
        sparse = self.chosen * self.expert + self.shared if self.sparse else 0
        return max(sparse, self.inner if len(self.sparse) < self.layers else 0)

    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of a block, by its name in the model; experts are not linear layers."""
        hidden = self.hidden
        found = {
            "self_attn.q_proj": (hidden, (1 + self.gated) * self.query),
            "self_attn.k_proj": (hidden, self.key),
            "self_attn.v_proj": (hidden, self.key),
            "self_attn.o_proj": (self.query, hidden),
        }
        if self.delta is not None and layer in self.recurrent:
            found = self.delta.linears(hidden)
        prefix, inner = "mlp", self.inner
        if layer in self.sparse:
            prefix, inner = "mlp.shared_expert", self.shared
            if not inner:
                return found
            found["mlp.shared_expert_gate"] = (hidden, 1)
        return found | {
            f"{prefix}.gate_proj": (hidden, inner),
            f"{prefix}.up_proj": (hidden, inner),
            f"{prefix}.down_proj": (inner, hidden),
        }

    def block(self, layer: int) -> int:
        """Parameters of one layer."""
        experts = self.experts * (3 * self.hidden * self.expert + self.hidden) if layer in self.sparse else 0
        if self.delta is not None and layer in self.recurrent:
            others = self.delta.others
        else:
            others = self.biases + (2 * self.head if self.normed else 0)
        return experts + sum(a * b for a, b in self.linears(layer).values()) + others + 2 * self.hidden

    @property
    def largest(self) -> int:
        """Parameters of the largest layer."""
        return max(self.block(layer) for layer in range(self.layers))

    @property
    def largest_matrix(self) -> int:
        """Parameters of the largest linear layer but the head."""
        return max(a * b for layer in range(self.layers) for a, b in self.linears(layer).values())

    @property
    def in_linears(self) -> int:
        """Parameters that 4 bits hold in Q-LoRA: the linear layers' weights."""
        text = sum(a * b for layer in range(self.layers) for a, b in self.linears(layer).values())
        return text + self.vision_linears

    @property
    def embedding(self) -> int:
        return self.words * self.hidden

    @property
    def parameters(self) -> int:
        """All that is loaded."""
        return self.text + self.vision

    @property
    def text(self) -> int:
        """Parameters of the language model: all but the part that sees."""
        blocks = sum(self.block(layer) for layer in range(self.layers))
        return blocks + self.hidden + self.embedding * (1 if self.tied else 2)

    @property
    def active(self) -> int:
        """Parameters that one token of text passes: of the experts only those chosen for it."""
        return self.text - len(self.sparse) * (self.experts - self.chosen) * 3 * self.hidden * self.expert


def _mixture(kind: str, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The fields of a mixture of experts, with what transformers takes where the file says nothing."""
    if kind == "mixtral":
        width, experts = int(config["intermediate_size"]), int(config.get("num_local_experts", 8))
        every, dense, chosen = 1, frozenset[int](), int(config.get("num_experts_per_tok", 2))
    else:
        width = int(config["moe_intermediate_size"])
        experts = int(config["num_experts" if "num_experts" in config else "num_local_experts"])
        every, chosen = int(config.get("decoder_sparse_step", 1)), int(config["num_experts_per_tok"])
        dense = frozenset(config.get("mlp_only_layers") or ())
    if kind == "qwen3_5_moe_text":
        every, dense = 1, frozenset()  # every layer has experts, whatever the file says
    shared = 0 if kind in ("mixtral", "qwen3_moe") else int(config["shared_expert_intermediate_size"])
    sparse = frozenset(layer for layer in range(layers) if layer not in dense and (layer + 1) % every == 0)
    balanced = bool(config.get("output_router_logits")) and config.get("router_aux_loss_coef") != 0
    found = {"experts": experts, "chosen": chosen, "expert": width, "shared": shared, "balanced": balanced}
    return {**found, "sparse": sparse if experts else frozenset()}


def _recurrence(kind: str, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The delta net of a hybrid, and which layers have it: three of four where the file says nothing."""
    heads = int(config["linear_num_value_heads"])
    width = int(config["linear_key_head_dim"])
    delta = DeltaNet(
        key=int(config["linear_num_key_heads"]) * width,
        value=heads * int(config["linear_value_head_dim"]),
        heads=heads,
        key_head=width,
        kernel=int(config["linear_conv_kernel_dim"]),
        joined=kind == "qwen3_next",
    )
    every = int(config.get("full_attention_interval") or 4)
    types = config.get("layer_types") or [
        "full_attention" if (layer + 1) % every == 0 else "linear_attention" for layer in range(layers)
    ]
    if len(types) != layers:
        raise ModelError(
            f"config.json: layer_types has {len(types)} entries, num_hidden_layers is {layers}; expected as many"
        )
    recurrent = frozenset(layer for layer, kind in enumerate(types) if kind == "linear_attention")
    return {"delta": delta, "recurrent": recurrent}


def _vision(vision: Mapping[str, Any]) -> dict[str, int]:
    """The size of the part that sees, with what transformers takes where the file says nothing."""
    hidden, inner = int(vision.get("hidden_size", 1152)), int(vision.get("intermediate_size", 4304))
    depth, patch = int(vision.get("depth", 27)), int(vision.get("patch_size", 16))
    channels, frames = int(vision.get("in_channels", 3)), int(vision.get("temporal_patch_size", 2))
    places, out = int(vision.get("num_position_embeddings", 2304)), int(vision.get("out_hidden_size", 3584))
    merged = hidden * int(vision.get("spatial_merge_size", 2)) ** 2
    linears = depth * (4 * hidden * hidden + 2 * hidden * inner) + merged * (merged + out)
    biases = depth * (4 * hidden + inner + hidden) + merged + out
    norms = 2 * hidden * (2 * depth + 1)
    patches = hidden * (channels * frames * patch * patch + 1)
    return {"vision": linears + biases + norms + patches + places * hidden, "vision_linears": linears}


def _biases(kind: str, config: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    """Whether queries, keys and values, the attention's output, and the MLP have biases."""
    if kind in ("qwen2", "qwen2_moe"):
        return kind == "qwen2" or bool(config.get("qkv_bias", True)), False, False
    attention = bool(config.get("attention_bias", False)) and kind not in ("mistral", "mixtral")
    return attention, attention, kind == "llama" and bool(config.get("mlp_bias", False))


# -------------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Setup:
    """What decides the memory of one rank. `row`: tokens; `supervised`: how many of them are."""

    method: Method = "full"
    zero: int = 0
    offload_optimizer: bool = False
    offload_weights: bool = False
    live: int = (
        10**9
    )  # weights that ZeRO-3 may keep gathered: stage3_max_live_parameters, here DeepSpeed's default
    ranks: int = 1
    ranks_here: int = 1
    checkpointing: bool = False
    row: int = 2048
    held: int = 0  # tokens of it whose activations are there at once if it is computed in passes; 0: all
    supervised: int = 2048
    device: Literal["cpu", "cuda"] = "cpu"
    half: bool = False  # matrix products in bfloat16 or float16
    lora_r: int = 64
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] = (ALL_LINEAR,)
    lora_bias: str = "none"
    dora: bool = False
    lean: bool = False  # the layers of fused.py, which keep less
    keeps: bool = (
        False  # whether nothing that is asked of an adapter forbids a base as it is stored (frozen.py)
    )
    moments: float = 8.0  # bytes of optimizer state for a trained parameter

    @property
    def stored(self) -> bool:
        """Whether the base stays in memory as it is stored."""
        return self.keeps and self.device == "cpu" and self.method != "full" and self.zero == 0


def on_accelerator(run: Run) -> bool:
    """Whether the run computes on an accelerator of this machine."""
    return run.train.device != "cpu" and hardware.has_accelerator() and not run.extra.get("use_cpu")


def number_type(run: Run) -> tuple[NumberType, list[str]]:
    """What matrix products are computed in, for the plan and for the run; and the decision where there was one."""
    asked = run.train.bf16
    if run.train.fp16:
        return "float16", ["computes in float16 (as asked)"]
    if on_accelerator(run):
        if hardware.gpu_has_bf16():
            return ("float32" if asked is False else "bfloat16"), []
        if run.method != "full" and asked is not False:
            # Its base is read only, its own weights stay float32, and a loss scale keeps small gradients.
            return "float16", [
                "computes in float16 (this accelerator has no bfloat16); --bf16 False computes in float32"
            ]
        if asked:
            return "float32", ["computes in float32 (bf16 was asked for; this accelerator has none)"]
        return "float32", [
            "computes in float32 (this accelerator has no bfloat16); --fp16 True takes less memory and time"
        ]
    if not asked:
        return "float32", []
    if not hardware.cpu_has_bf16():
        return "float32", ["computes in float32 (bf16 was asked for; this CPU has no bfloat16 instructions)"]
    if run.train.deepspeed is not None:
        return "float32", ["computes in float32 (bf16 was asked for; DeepSpeed on a CPU trains in float32)"]
    return "bfloat16", ["computes in bfloat16, weights stay float32 (as asked)"]


def keeps_stored(run: Run, shape: Shape) -> bool:
    """Whether the base of an adapter stays in memory as it is stored (frozen.py): on a CPU, where nothing writes to it
    (PiSSA), takes the norms of its rows (DoRA) or moves its weights about (DeepSpeed), and the layers are known.
    """
    return shape.counted and run.train.deepspeed is None and setup_of(run, 1, 1).stored


def _adapter_rank(run: Run) -> int:
    """The adapter's: its own where one is continued."""
    if run.lora.lora_weight_path is None:
        return run.lora.lora_r
    try:
        config = json.loads((Path(run.lora.lora_weight_path) / "adapter_config.json").read_text("utf-8"))
        return int(config["r"])
    except (OSError, ValueError, KeyError, TypeError):
        return run.lora.lora_r  # what is wrong with it is said when it is loaded


def setup_of(run: Run, row: int, supervised: int, *, held: int = 0, checkpointing: bool = False) -> Setup:
    """The Setup of a Run on this machine."""
    cuda = on_accelerator(run)
    half = number_type(run)[0] != "float32"
    block: Mapping[str, Any] = {}
    if run.train.deepspeed is not None:
        block = read_deepspeed(run.train.deepspeed)[0].get("zero_optimization", {})
    zero = int(block.get("stage", 0))
    live = block.get("stage3_max_live_parameters")
    optim = str(run.extra.get("optim", "adamw_torch"))
    known = [size for name, size in MOMENTS.items() if name in optim]
    return Setup(
        method=run.method,
        zero=zero,
        offload_optimizer=_offloads(block.get("offload_optimizer")),
        offload_weights=_offloads(block.get("offload_param")),
        live=int(live) if isinstance(live, int | float) else Setup.live,
        ranks=ranks(),
        ranks_here=ranks_here(),
        checkpointing=checkpointing,
        row=row,
        held=held,
        supervised=supervised,
        device="cuda" if cuda else "cpu",
        half=half,
        lora_r=_adapter_rank(run),
        lora_dropout=run.lora.lora_dropout,
        lora_targets=run.lora.lora_target_modules,
        lora_bias=run.lora.lora_bias,
        dora=run.lora.use_dora,
        lean=not cuda and not half and zero != 3 and not run.lora.use_dora,
        keeps=not run.lora.use_dora and run.lora.lora_init == "default",
        moments=known[0] if known else 2.0 if "8bit" in optim else 8.0,
    )


def ranks() -> int:
    """Processes of the run: the launcher's word, or finetune.sh's while it checks before launching."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("FINETUNE_RANKS") or 1)


def ranks_here() -> int:
    """Those of them on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("FINETUNE_RANKS_HERE") or 1)


def _offloads(block: object) -> bool:
    return isinstance(block, Mapping) and block.get("device", "none") != "none"


def trainable(shape: Shape, setup: Setup) -> int:
    """Parameters that learn (single trained token rows are not counted: they are a few kilobytes)."""
    if setup.method == "full":
        return shape.text
    total = 0
    for layer in range(shape.layers):
        where = f"model.layers.{layer}"
        for name, (width_in, width_out) in shape.linears(layer).items():
            if _reached(shape, f"{where}.{name}", setup.lora_targets):
                total += setup.lora_r * (width_in + width_out) + (width_out if setup.dora else 0)
        if layer in shape.sparse:
            total += setup.lora_r * _in_experts(shape, where, setup.lora_targets)
    if setup.lora_bias != "none":
        total += (shape.layers - len(shape.recurrent)) * shape.biases
    return total


def _reached(shape: Shape, name: str, targets: tuple[str, ...]) -> bool:
    """Whether a linear layer gets an adapter: it is targeted, and peft does not take its name for the experts'."""
    taken = shape.kind in RENAMED and ".mlp." in name and name.endswith("_proj")
    return _targeted(name, targets) and not taken


def _in_experts(shape: Shape, where: str, targets: tuple[str, ...]) -> int:
    """Parameters of an adapter over a layer's experts for each of its ranks, as peft 0.21 makes it.

    Gate and up are one tensor: asked for as `experts` it gets one adapter, by the old names of its two halves both
    get one over both.
    """
    hidden, width, experts = shape.hidden, shape.expert, shape.experts
    if EXPERTS in target_words(targets):
        return experts * (hidden + 2 * width + width + hidden)
    if shape.kind not in RENAMED:
        return 0
    total = 0
    gate, up, down = ("w1", "w3", "w2") if shape.kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for name, widths in ((gate, hidden + 2 * width), (up, hidden + 2 * width), (down, width + hidden)):
        if targets != (ALL_LINEAR,) and _targeted(f"{where}.mlp.experts.{name}", targets):
            total += experts * widths
    return total


def _targeted(name: str, targets: tuple[str, ...]) -> bool:
    names = target_words(targets)
    if ALL_LINEAR in names or any(name == target or name.endswith(f".{target}") for target in names):
        return True
    try:
        return len(targets) == 1 and re.fullmatch(targets[0], name) is not None
    except re.error:
        return False


# --------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Need:
    """Bytes on one rank's device at the peak; `host`: what offloading puts into main memory for this rank."""

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    runtime: int
    load: int  # the peak while loading, and while saving: the step's may be lower
    host: int

    @property
    def step(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss + self.runtime

    @property
    def total(self) -> int:
        return max(self.step, self.load)

    def to_json(self) -> dict[str, int]:
        names = ("parameters", "trainable", "weights", "gradients", "optimizer", "activations", "loss")
        return {name: getattr(self, name) for name in (*names, "runtime", "load", "host", "total")}


def need(shape: Shape, setup: Setup) -> Need:
    """What one rank takes."""
    trained = trainable(shape, setup)
    weights, gradients, optimizer, host = _states(shape, setup, trained)
    if setup.held < setup.row and in_passes(shape, setup):
        gradients += 4 * trained
        setup = _held_at_once(setup)
    walked, loss = activations(shape, setup), _loss(shape, setup)
    if setup.device == "cuda":
        on_gpu = GpuStep(shape, setup, trained)
        weights, walked = weights + on_gpu.weights, on_gpu.backward
        # One of these is the peak: the loss, at the end of forward; backward through a layer; the update.
        loss = max(0, on_gpu.forward - walked - on_gpu.weights, on_gpu.update - walked - on_gpu.weights)
    runtime = RUNTIME[setup.device] + (DEEPSPEED if setup.zero else 0)
    load = runtime
    if setup.device == "cpu" and setup.stored:
        # What is mapped stays so; 4 bits are made a matrix at a time, beside which the float32 values of it lie.
        load += _stored_weights(shape, setup) + 8 * shape.largest_matrix
    elif setup.device == "cpu":  # loading maps the file into memory and copies each weight out of it
        file = shape.parameters * shape.stored
        load += file + (_four_bit_weights(shape) if setup.method == "qlora" else 4 * shape.parameters)
    return Need(
        parameters=shape.parameters,
        trainable=trained,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=walked,
        loss=loss,
        runtime=runtime,
        load=load,
        host=host,
    )


def in_passes(shape: Shape, setup: Setup) -> bool:
    """Whether long rows are computed in passes (passes.py): on a CPU, where the layers see other tokens through
    attention alone. In a full fine-tune only where they hold less by more than the row's gradient, which they keep.
    """
    if setup.device != "cpu" or setup.zero or not setup.held or not shape.counted:
        return False
    if shape.delta is not None or shape.balanced:
        return False
    saved = activations(shape, setup) - activations(shape, _held_at_once(setup))
    return setup.method != "full" or saved > 4 * trainable(shape, setup)


def _held_at_once(setup: Setup) -> Setup:
    """With a row as long as what is held at once."""
    return replace(setup, row=setup.held, supervised=min(setup.supervised, setup.held))


def in_main_memory(shape: Shape, setup: Setup) -> int:
    """Bytes of main memory that a rank with a GPU takes: the model is loaded there first, and what is offloaded
    stays. ZeRO-3 shares it out from the mapped file, 4 bits are made on the GPU.
    """
    if setup.device == "cpu":
        return 0
    half = setup.half and (setup.zero > 0 or setup.method != "full")
    whole = 0 if setup.zero == 3 or setup.method == "qlora" else shape.parameters * (2 if half else 4)
    return RUNTIME["cpu"] + max(whole, need(shape, setup).host)


def _four_bit_weights(shape: Shape) -> int:
    rest = shape.parameters - shape.in_linears
    return int(NF4 * shape.in_linears) + 4 * rest


def _stored_weights(shape: Shape, setup: Setup) -> int:
    """A base that is kept as it is stored, or in 4 bits: its linear layers, embedding and head.

    They are mapped from the files: of an embedding that is no head only rows of words in the data are ever read.
    """
    words = shape.embedding * (1 if shape.tied else 2)
    linears = (NF4 if setup.method == "qlora" else shape.stored) * shape.in_linears
    unread = 0 if shape.tied else UNREAD * shape.embedding
    others = 4 * (shape.parameters - shape.in_linears - words)
    return int(linears + shape.stored * (words - unread)) + others


def _states(shape: Shape, setup: Setup, trained: int) -> tuple[int, int, int, int]:
    """(weights, gradients, optimizer, of them on the host where they are offloaded), each a sum of named terms."""
    pure_half = setup.half and setup.device == "cuda" and (setup.zero > 0 or setup.method != "full")
    size = 2 if pure_half else 4  # bytes of a weight
    trained_size = (
        4 if setup.method != "full" and setup.zero == 0 else size
    )  # an adapter's weights stay float32
    sharing = setup.ranks if setup.zero >= 2 else 1
    sharing_optimizer = setup.ranks if setup.zero >= 1 else 1  # ZeRO-1 splits the optimizer alone

    base = size * (shape.vision if setup.method == "full" else shape.parameters)
    if setup.method == "qlora":
        base = _four_bit_weights(shape)
    if setup.stored:
        base = _stored_weights(shape, setup)
    own, gathered = base + trained_size * trained, 0
    if setup.zero == 3 and setup.device == "cuda":
        own //= sharing
    elif setup.zero == 3:  # a share, and whole those in use and as many of the others as may stay
        own //= sharing
        gathered = size * max(shape.embedding + 2 * shape.largest, min(shape.parameters, setup.live))
    # Half-precision copies for the step, unless the weights are it themselves; on a GPU they are GpuStep's.
    narrow = setup.stored and shape.stored == 2
    autocast = 2 * shape.text if setup.half and setup.device == "cpu" and not narrow else 0
    weights = own + gathered + autocast

    share = trained_size * trained // sharing
    buckets = share if setup.zero == 0 and setup.ranks > 1 else 0  # DDP holds them once more
    # Flattened for the step; gloo's copy of what is gathered.
    flattened = 2 * trained_size * trained // sharing if setup.zero == 2 and setup.device == "cpu" else 0
    gradients = share + buckets + flattened

    masters = 4 * trained // sharing_optimizer if setup.zero else 0  # DeepSpeed's own float32 copy
    optimizer = int(setup.moments * trained) // sharing_optimizer + masters

    host = 0
    if setup.device == "cuda" and setup.offload_optimizer:
        host, optimizer = optimizer + gradients, 0
    if setup.device == "cuda" and setup.offload_weights and setup.zero == 3:
        host, weights = host + weights - gathered, gathered
    return weights, gradients, optimizer, host


def layer_bytes(shape: Shape, setup: Setup, layer: int = 0) -> int:
    """What a layer keeps of one token until backward, counted tensor by tensor."""
    a = 2 if setup.half else 4
    hidden, sparse = shape.hidden, layer in shape.sparse
    inner = shape.shared if sparse else shape.inner
    mixer = _mixer_bytes(shape, setup, layer in shape.recurrent)
    experts = _expert_bytes(shape, setup, a) if sparse else 0
    # A norm keeps its float32 input, where it learns the normalised input too. The MLP keeps gate, silu(gate), up and
    # their product; fused it keeps gate and up. What a linear layer reads stays where it, or its adapter, learns.
    norms, mlp = 2 * hidden * 4 + 8, (2 if setup.lean else 4) * a * inner
    if setup.method == "full":
        norms += 2 * hidden * a * (1 if _lean_norms(shape, setup) else 2)
        # Under autocast a float32 norm gives float32: twice that, and a copy for each product that reads it.
        norms += 10 * hidden if _autocast(setup) else 0
        return mixer + norms + mlp + experts
    learnt = {
        name: widths
        for name, widths in shape.linears(layer).items()
        if _reached(shape, f"model.layers.{layer}.{name}", setup.lora_targets)
    }
    read = sum(width_in for width_in, _ in learnt.values())
    if not setup.lean and (_copies(setup) or not any(name.endswith("down_proj") for name in learnt)):
        mlp -= a * inner
    if _copies(setup):  # each adapted layer keeps its own input after dropout, and the noise
        noise = 0 if not setup.lora_dropout else 1 if setup.device == "cuda" else a
        inputs = (a + noise) * read
    else:  # those that read a norm's output share it
        inner_ones = ("o_proj", "out_proj", "down_proj")
        inputs = a * hidden * len({name.split(".")[0] for name in learnt if not name.endswith(inner_ones)})
    return mixer + norms + mlp + experts + inputs + len(learnt) * setup.lora_r * a


def _copies(setup: Setup) -> bool:
    """Whether each adapted layer reads its input through a copy: after dropout, or because peft turns it into the
    adapter's float32 and autocast back into half precision."""
    return bool(setup.lora_dropout) or (setup.method == "lora" and _autocast(setup))


def _autocast(setup: Setup) -> bool:
    """Whether a GPU multiplies float32 weights in half precision: all but DeepSpeed's runs, which hold them in it."""
    return setup.half and setup.device == "cuda" and setup.zero == 0


def _lean_norms(shape: Shape, setup: Setup) -> bool:
    """Whether the norms are those that fused.py knows."""
    return setup.lean and shape.kind in ("qwen2", "qwen3", "llama")


def _mixer_bytes(shape: Shape, setup: Setup, recurrent: bool) -> int:
    """What attention, or the delta net in its place, keeps of one token beside the layer's norms."""
    a, learns = 2 if setup.half else 4, setup.method == "full"
    read = (
        a if learns or not _copies(setup) else 0
    )  # what goes into the last linear layer; dropout makes a copy
    if shape.delta is not None and recurrent:
        # What is projected: the chunks are computed from it again. Then the norm's float32 input, the gate and its
        # silu, what the norm gives and, where it learns, what it normalised, and one number a head.
        key, value, heads = shape.delta.key, shape.delta.value, shape.delta.heads
        projected = a * (2 * key + value + 2 * heads)
        return projected + value * (3 * 4 + (2 if learns else 1) * a + read) + 4 * heads
    query, key = shape.query, shape.key
    kept = a * (2 * query + 2 * key) + 4 * shape.heads  # q, k, v, output, log-sum-exp
    if shape.normed:  # queries and keys have norms too
        kept += 4 * (query + key) + (a * (query + key) if learns and not _lean_norms(shape, setup) else 0)
    if (
        shape.gated
    ):  # the gate's sigmoid, the product; in float32 the norm's input holds the gate beside the queries
        kept += query * ((1 if setup.half else 2) * a + read) + 4 * (shape.heads + shape.kv_heads)
    return kept


def _expert_bytes(shape: Shape, setup: Setup, a: int) -> int:
    """What the experts chosen for one token keep: gate, silu(gate), up, the output; their input and product too
    where they learn; the router's float32 shares, and which token went where.
    """
    learns = setup.method == "full" or _remade(shape, setup) > 0
    each = a * (2 * shape.hidden + 4 * shape.expert if learns else shape.hidden + 3 * shape.expert) + 32
    return shape.chosen * each + 8 * shape.experts + (a * (shape.hidden + 1) if shape.shared else 0)


def _remade(shape: Shape, setup: Setup) -> int:
    """Bytes of one layer's experts with their adapter: peft adds the two up and keeps the sum for backward."""
    if setup.method == "full" or not shape.sparse:
        return 0
    if not _in_experts(shape, f"model.layers.{min(shape.sparse)}", setup.lora_targets):
        return 0
    return (2 if setup.half else 4) * 3 * shape.experts * shape.hidden * shape.expert


def activations(shape: Shape, setup: Setup) -> int:
    """What a row's forward keeps, and what backward adds while it walks through one layer."""
    a = 2 if setup.half else 4
    layers = [layer_bytes(shape, setup, layer) for layer in range(shape.layers)]
    walking = a * (3 * shape.widest + 2 * shape.hidden)
    walking += shape.delta.walked if shape.delta is not None and shape.recurrent else 0
    kept = shape.layers * a * shape.hidden + max(layers) if setup.checkpointing else sum(layers)
    total = setup.row * (kept + walking + a * shape.hidden)
    if shape.balanced:
        # Each layer's router logits and float32 shares, even where layers are computed again; their sums.
        total += setup.row * shape.experts * (len(shape.sparse) * (a + 4) + 16)
    # One layer's sum is there while it runs, and its gradient twice (of the sum, of what was added).
    total += _remade(shape, setup) * (2 + (1 if setup.checkpointing else len(shape.sparse)))
    if setup.device == "cpu" and not setup.stored and (setup.method == "qlora" or setup.zero == 3):
        total += HOLES[0] + int(HOLES[1] * total)
    return total


@dataclass(frozen=True)
class GpuStep:
    """What comes and goes on a GPU in a step, in bytes beside what stays: at the end of forward, in backward, in the
    update. training/simulation.py counts the same, tensor by tensor.
    """

    shape: Shape
    setup: Setup
    trained: int

    @property
    def half(self) -> int:
        """Bytes of what a matrix product gives."""
        return 2 if self.setup.half else 4

    @property
    def width(self) -> int:
        """Bytes of a weight that learns, and of its gradient."""
        return 2 if self.setup.half and self.setup.zero else 4

    @property
    def between(self) -> int:
        """Bytes of a value between layers: float32 weights, multiplied under autocast, keep float32 there."""
        return 4 if self.setup.method == "full" and _autocast(self.setup) else self.half

    def _copies(self, layers: int) -> int:
        """Autocast's copies of what so many layers learn; of all layers, that of the head too."""
        if not _autocast(self.setup):
            return 0
        if self.setup.method != "full":
            return 2 * self.trained * layers // self.shape.layers
        every = self.shape.text - (0 if self.shape.tied else self.shape.embedding)
        return 2 * (every if layers == self.shape.layers else layers * self.shape.largest)

    def _gathered(self, *, head: bool = False) -> int:
        """Whole weights under ZeRO-3. Every module that runs has the next ones fetched, so that in time as many are
        whole as may be (stage3_max_live_parameters); the last of them may be the head, larger than all others.
        """
        if self.setup.zero != 3:
            return 0
        count = self.setup.live + (self.shape.embedding if head else 0)
        return self.half * min(self.shape.parameters, count)

    @property
    def _largest(self) -> int:
        """Of the tensors that one product reads."""
        linear = max(
            a * b for layer in range(self.shape.layers) for a, b in self.shape.linears(layer).values()
        )
        return max(linear, 2 * self.shape.experts * self.shape.hidden * self.shape.expert)

    @property
    def weights(self) -> int:
        """Copies and whole weights in backward."""
        return self._copies(1 if self.setup.checkpointing else self.shape.layers) + self._gathered()

    @property
    def _kept(self) -> int:
        """What forward leaves for backward: each layer's input, or all that it saves; a router's shares."""
        shape, setup, a = self.shape, self.setup, self.half
        layers = shape.layers * self.between * shape.hidden
        if not setup.checkpointing:
            layers = sum(layer_bytes(shape, setup, layer) for layer in range(shape.layers))
        router = shape.experts * (len(shape.sparse) * (a + 4) + 16) if shape.balanced else 0
        remade = 0 if setup.checkpointing else _remade(shape, setup) * len(shape.sparse)
        return setup.row * (layers + router) + remade

    @property
    def forward(self) -> int:
        """At the loss: the last norm's input in float32 and its output, the positions of which the logits are wanted
        and their gradient, one chunk of logits as they came, in float32, as their gradient; the head's gradient twice.
        """
        shape, setup, a = self.shape, self.setup, self.half
        full = setup.method == "full"
        last = setup.row * shape.hidden * (4 + self.between * (2 if full else 1))
        last += 2 * self.between * setup.supervised * shape.hidden
        chunk = min(CHUNK_BYTES, 4 * setup.supervised * shape.words) * (2 if setup.half else 1)
        head = shape.embedding * (2 * self.width + (a if _autocast(setup) else 0)) if full else 0
        loss = last + chunk + head + max(self._gathered(), self.half * shape.embedding * (setup.zero == 3))
        layer = setup.row * self._layer + self._gathered(head=True)
        return self._kept + self._copies(shape.layers) + max(loss, layer if setup.checkpointing else 0)

    @property
    def _layer(self) -> int:
        """What the layer that keeps most saves of one token."""
        return max(layer_bytes(self.shape, self.setup, layer) for layer in range(self.shape.layers))

    @property
    def backward(self) -> int:
        """Through the last layer: what it saved, and the gradients on their way through its MLP."""
        shape, setup, a = self.shape, self.setup, self.half
        walking = a * (3 * shape.widest + 3 * shape.hidden) + (self._layer if setup.checkpointing else 0)
        walking += shape.delta.walked if shape.delta is not None and shape.recurrent else 0
        # An adapter in float32 gives its input's gradient in float32.
        walking += 4 * shape.widest if setup.method == "lora" and _autocast(setup) else 0
        gradients = 0
        if setup.method == "full":
            # ZeRO-2 and 3 keep one until the next is there, and copy it; of experts' two the second is half as large.
            at_once = 1 if setup.zero < 2 else 2 if shape.experts else 3
            gradients = self._largest * (self.width * at_once + (a if _autocast(setup) else 0))
        bucket = (0, 2, 2, 1)[setup.zero] * shape.hidden**2 * self.width
        return self._kept + setup.row * walking + gradients + bucket + _remade(shape, setup) * 3

    @property
    def update(self) -> int:
        """DeepSpeed flattens a rank's gradients and makes float32 ones of them; ZeRO-3 a group at a time."""
        if not self.setup.zero or self.setup.offload_optimizer:
            return 0
        part = self.trained // self.setup.ranks
        return (min(part, REUSE) if self.setup.zero == 3 else part) * (6 if self.width == 2 else 4)


def _loss(shape: Shape, setup: Setup) -> int:
    """Logits of one chunk, the hidden states' gradient, and the head's where it learns."""
    chunk = min(CHUNK_BYTES, 4 * setup.supervised * shape.words)
    logits = chunk * (1.5 if setup.half else 1.0)
    head = 4 * shape.embedding if setup.method == "full" else 0
    return int(logits) + 8 * setup.supervised * shape.hidden + head


# -------------------------------------------------------------------------------------------- what there is


@dataclass(frozen=True)
class Room:
    """What a rank may fill, in bytes, and where that was seen; None, and why it is not known."""

    free: int | None
    where: str

    def __str__(self) -> str:
        if self.free is None:
            return f"what is free is not known ({self.where})"
        return f"{gib(self.free)} can be had of {self.where}"


def room(setup: Setup) -> Room:
    """The memory of one rank's device that is free now."""
    if setup.device == "cuda":
        free, where = hardware.gpu_free(setup.ranks_here)
        return Room(None if free is None else int(ROOM * free), where)
    return main_memory(setup.ranks_here)


def main_memory(processes: int) -> Room:
    """The share of each of so many processes of what main memory has free."""
    free = int(ROOM * hardware.free_memory() / processes)
    return Room(free, f"this machine's memory for {processes} process(es)")


# -------------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True)
class Verdict:
    """Whether activations are computed again, and long rows in passes; the line to print; why the run cannot be."""

    checkpointing: bool
    in_passes: bool
    need: Need
    row: int
    line: str
    refusal: str | None


def check_targets(run: Run, shape: Shape) -> None:
    """OptionError where an adapter over experts is asked for and the model has none."""
    targets = run.lora.lora_target_modules
    if run.method != "full" and shape.counted and not shape.sparse and EXPERTS in target_words(targets):
        raise OptionError(
            f"--lora_target_modules {' '.join(targets)}: a model of type {shape.kind!r} has no experts here;"
            f" leave {EXPERTS} out"
        )


def decide(
    run: Run, shape: Shape, *, row: int, supervised: int, longest: int, held: int | None = None
) -> Verdict:
    """Hold a run against this machine. row, supervised: tokens of its largest row; held: the most that one in passes
    has at once (all where it is not given); longest: conversation.

    Raises OptionError where an adapter's targets are not there.
    """
    check_targets(run, shape)
    asked = run.train.gradient_checkpointing
    if not shape.counted:
        line = (
            f"plan: none for a model of type {shape.kind!r}, whose parameters are not counted"
            f" (counted: {', '.join(COUNTED)}); gradient checkpointing {'on' if asked else 'off'}"
            f" ({'takes less memory' if asked == 'auto' else 'as asked'})"
        )
        return Verdict(bool(asked), False, Need(*[0] * 10), row, line, None)
    setup = setup_of(run, row, supervised, held=held or row)
    cut = run.train.deepspeed is None and in_passes(shape, setup)
    have = room(setup)
    plain, again = need(shape, setup), need(shape, replace(setup, checkpointing=True))
    tight = have.free is None or plain.total > have.free  # not known: the way that takes less
    on = tight and again.total < plain.total if asked == "auto" else asked
    wanted = again if on else plain
    largest = f"a row of {row:,} tokens"
    largest += f", {setup.held:,} of them at once," if cut and setup.held < row else ""
    why = "as asked" if asked != "auto" else f"{largest} keeps {gib(plain.activations)} without"
    line = (
        f"plan: {gib(wanted.total)} a process; {have}"
        f" (weights {gib(wanted.weights)}, gradients {gib(wanted.gradients)}, optimizer"
        f" {gib(wanted.optimizer)}, activations {gib(wanted.activations)}, loss {gib(wanted.loss)});"
        f" gradient checkpointing {'on' if on else 'off'} ({why})"
    )
    refusal = None
    if have.free is not None and wanted.total > have.free:
        refusal = (
            f"the run needs about {gib(wanted.total)} a process, {gib(have.free)} can be had"
            f" ({have.where}); {_cure(run, shape, setup, have.free, longest)}, or --plan_anyway True to try"
        )
    if refusal is None and setup.device == "cuda":
        refusal = _too_much_to_load(shape, setup)
    return Verdict(bool(on), cut, wanted, row, line, refusal)


def _too_much_to_load(shape: Shape, setup: Setup) -> str | None:
    """Why the ranks of this machine do not fit its main memory together, beside their GPUs."""
    needed, have = in_main_memory(shape, setup), main_memory(setup.ranks_here)
    if have.free is None or needed <= have.free:
        return None
    why, cure = "each loads the model there before it goes to the GPU", "load it once: ZeRO-3"
    if need(shape, setup).host:
        why, cure = "what is offloaded lies there", "offload less"
    return (
        f"the run needs about {gib(needed)} of main memory a process ({why}), {gib(have.free)} can be had"
        f" ({have.where}); {cure}, start fewer processes on this machine, or --plan_anyway True to try"
    )


def _cure(run: Run, shape: Shape, setup: Setup, free: int, longest: int) -> str:
    """What would fit: the same step in smaller rows, computing again, an adapter, more processes."""
    batch, accumulation = run.train.per_device_train_batch_size, run.train.gradient_accumulation_steps
    can_checkpoint = run.train.gradient_checkpointing is False
    for again in (setup.checkpointing, True):
        for smaller in (b for b in range(batch - 1, 0, -1) if batch % b == 0):
            rows = max(longest, -(-setup.row * smaller // batch))
            row = replace(
                setup,
                row=rows,
                held=min(setup.held, rows),
                supervised=min(setup.supervised, rows),
                checkpointing=again,
            )
            if need(shape, row).total <= free:
                flags = f"--per_device_train_batch_size {smaller} --gradient_accumulation_steps "
                flags += str(accumulation * batch // smaller)
                flags += " --gradient_checkpointing True" if again and can_checkpoint else ""
                return f"the same step fits with {flags}"
    rows = max(longest, setup.row // batch)
    again_setup = replace(setup, checkpointing=True, row=rows, held=min(setup.held, rows))
    for method, flag in (("lora", "--use_lora True"), ("qlora", "--q_lora True")):
        if method != setup.method and need(shape, replace(again_setup, method=method)).total <= free:  # type: ignore[arg-type]
            return f"an adapter fits: {flag} --per_device_train_batch_size 1"
    if setup.method != "full" and (found := _smaller_adapter(run, shape, again_setup, free)):
        return f"it fits with {found}{' --gradient_checkpointing True' if can_checkpoint else ''}"
    if setup.method == "qlora":  # nothing holds a base in less, and 4-bit weights cannot be shared out
        return "use a smaller model"
    return "use a smaller model, a lower --model_max_length, or more processes with ZeRO-3"


def _smaller_adapter(run: Run, shape: Shape, setup: Setup, free: int) -> str | None:
    """Flags under which an adapter fits, one conversation a row: of a lower rank, then of shorter conversations too."""
    ranks = [setup.lora_r] + [r for r in (32, 16, 8) if r < setup.lora_r and not run.lora.lora_weight_path]
    for length in (setup.row, *(n for n in (2048, 1024, 512, 256) if n < setup.row)):
        for rank in ranks:
            row = replace(setup, row=length, supervised=min(setup.supervised, length), lora_r=rank)
            if need(shape, row).total <= free:
                flags = ["--per_device_train_batch_size 1"]
                flags += [f"--lora_r {rank}"] if rank != setup.lora_r else []
                flags += [f"--model_max_length {length}"] if length != setup.row else []
                return " ".join(flags)
    return None


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def compare(shape: Shape, setup: Setup, free: int) -> list[dict[str, Any]]:
    """Every method x engine x checkpointing on this many ranks: its Need, and whether it fits in `free`."""
    rows = []
    for method in ("full", "lora", "qlora"):
        for engine, stage, offload in _ENGINES:
            if method == "qlora" and stage == 3:  # 4-bit weights cannot be split
                continue
            for again in (False, True):
                one = replace(
                    setup,
                    method=method,  # type: ignore[arg-type]
                    zero=stage,
                    offload_optimizer=offload,
                    offload_weights=offload and stage == 3,
                    checkpointing=again,
                )
                found = need(shape, one)
                rows.append(
                    {"method": method, "engine": engine, "checkpointing": again}
                    | {"fits": found.total <= free, **found.to_json()}
                )
    return rows


_ENGINES = (
    ("none", 0, False),
    ("zero2", 2, False),
    ("zero2+offload", 2, True),
    ("zero3", 3, False),
    ("zero3+offload", 3, True),
)


def recommend(rows: list[dict[str, Any]], method: str) -> dict[str, Any] | None:
    """The first row that fits: of the method asked for, else of one that takes less; offloading last: it is slow."""
    order = ("full", "lora", "qlora")
    for offload in (False, True):
        for wanted in order[order.index(method) :]:
            for row in rows:
                if row["fits"] and row["method"] == wanted and row["engine"].endswith("+offload") is offload:
                    return row
    return None


# -------------------------------------------------------------------------------------- disk, steps, tokens


def checkpoint_bytes(shape: Shape, setup: Setup) -> int:
    """One checkpoint: what is trained and its optimizer; an adapter's does not carry the base."""
    trained = trainable(shape, setup)
    size = 2 if setup.half and setup.zero and setup.device == "cuda" else 4
    states = (4 + size) * trained if setup.zero else 0  # DeepSpeed writes its own copy of the weights too
    frozen = size * shape.vision if setup.method == "full" else 0
    return int((size + setup.moments) * trained) + frozen + states + 20 * MIB  # tokenizer, RNG states


def result_bytes(shape: Shape, setup: Setup) -> int:
    """What stays at the end beside the checkpoints."""
    frozen = shape.vision if setup.method == "full" else 0
    return 4 * (trainable(shape, setup) + frozen) + 20 * MIB


def disk_needed(shape: Shape, run: Run) -> int:
    """Bytes at the worst moment: a checkpoint is written before the oldest one is removed."""
    if not shape.counted:
        return 0  # not known; a full disk is told when it happens
    setup = setup_of(run, 1, 1)
    kept = 0 if run.train.save_strategy == "no" else (run.train.save_total_limit or 3) + 1
    return result_bytes(shape, setup) + kept * checkpoint_bytes(shape, setup)


def disk_free(folder: Path) -> int:
    """Bytes that the disk under `folder` (which need not exist yet) has left."""
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(parent).free


def steps_of(run: Run, conversations: int, ranks: int) -> int:
    """Optimizer steps of the whole run."""
    limit = int(run.extra.get("max_steps", -1))
    if limit > 0:
        return limit
    window = run.train.per_device_train_batch_size * run.train.gradient_accumulation_steps * ranks
    return -int(-run.train.num_train_epochs * -(-conversations // window) // 1)
