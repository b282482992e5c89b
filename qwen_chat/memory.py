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
from qwen_chat.arguments import Run, read_deepspeed
from qwen_chat.errors import ModelError

Method = Literal["full", "lora", "qlora"]
NumberType = Literal["float32", "bfloat16", "float16"]
GIB = 2**30
MIB = hardware.MIB

# Measured on a CPU: the interpreter with torch, transformers and peft; DeepSpeed and its process group.
RUNTIME = {"cpu": 640 * MIB, "cuda": 900 * MIB}
DEEPSPEED = 200 * MIB
LIVE = 10**9  # weights that ZeRO-3 keeps gathered (stage3_max_live_parameters of ds_config_zero3.json)
# On a CPU, where weights come and go a layer at a time (4 bits, ZeRO-3): the holes that they leave in the heap, and
# a share of the activations for those between them.
HOLES = (560 * MIB, 0.16)
CHUNK_BYTES = 256 * MIB  # of float32 logits at once (loss.py)
ROOM = 0.92  # share of what is free that a plan may fill: allocators keep some for themselves
# A 4-bit weight: half a byte, one byte a block of 64 (its scale, quantised too), a float32 for 256 of those.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes that an optimizer keeps for a trained parameter, by its name in TrainingArguments.optim.
MOMENTS = {"sgd": 0.0, "adafactor": 0.1, "adagrad": 4.0, "lomo": 0.0}


# ------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class Shape:
    """What config.json says of a Qwen2-, Qwen3- or Llama-like model."""

    kind: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int  # width of one head
    words: int
    tied: bool
    biases: int  # in one layer
    norms: int  # weights of norms in one layer
    stored: int  # bytes of a weight in the file

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Raises ModelError where a field that decides the size is missing."""
        config = config.get("text_config") or config
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            inner, layers = int(config["intermediate_size"]), int(config["num_hidden_layers"])
            words = int(config["vocab_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"config.json: {error} is missing or no number; expected a Qwen2-like model"
            ) from None
        kind = str(config.get("model_type", "?"))
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head = int(config.get("head_dim") or hidden // heads)
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        bias = bool(config.get("attention_bias", kind == "qwen2"))
        o_bias = bias and kind != "qwen2"  # Llama's attention_bias covers the output projection too
        return cls(
            kind=kind,
            hidden=hidden,
            inner=inner,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head=head,
            words=words,
            tied=bool(config.get("tie_word_embeddings", kind in ("qwen2", "qwen3") and hidden < 2048)),
            biases=((heads + 2 * kv_heads) * head if bias else 0) + (hidden if o_bias else 0),
            norms=2 * hidden + (2 * head if kind == "qwen3" else 0),
            stored=2 if dtype in ("bfloat16", "float16") else 4,
        )

    @property
    def query(self) -> int:
        return self.heads * self.head

    @property
    def key(self) -> int:
        return self.kv_heads * self.head

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of a block, by its name in the model."""
        hidden, inner = self.hidden, self.inner
        return {
            "self_attn.q_proj": (hidden, self.query),
            "self_attn.k_proj": (hidden, self.key),
            "self_attn.v_proj": (hidden, self.key),
            "self_attn.o_proj": (self.query, hidden),
            "mlp.gate_proj": (hidden, inner),
            "mlp.up_proj": (hidden, inner),
            "mlp.down_proj": (inner, hidden),
        }

    @property
    def block(self) -> int:
        """Parameters of one layer."""
        return sum(a * b for a, b in self.linears.values()) + self.biases + self.norms

    @property
    def in_linears(self) -> int:
        """Parameters that 4 bits hold in Q-LoRA: the linear layers' weights."""
        return self.layers * sum(a * b for a, b in self.linears.values())

    @property
    def embedding(self) -> int:
        return self.words * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.block + self.hidden + self.embedding * (1 if self.tied else 2)


# -------------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Setup:
    """What decides the memory of one rank. `row`: tokens; `supervised`: of them learnt, in one row."""

    method: Method = "full"
    zero: int = 0
    offload_optimizer: bool = False
    offload_weights: bool = False
    ranks: int = 1
    ranks_here: int = 1
    checkpointing: bool = False
    row: int = 2048
    supervised: int = 2048
    device: Literal["cpu", "cuda"] = "cpu"
    half: bool = False  # matrix products in bfloat16 or float16
    lora_r: int = 64
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] = ("all-linear",)
    lora_bias: str = "none"
    dora: bool = False
    lean: bool = False  # the layers of fused.py, which keep less
    moments: float = 8.0  # bytes of optimizer state for a trained parameter


def on_accelerator(run: Run) -> bool:
    """Whether the run computes on an accelerator of this machine."""
    return hardware.has_accelerator() and not run.extra.get("use_cpu")


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


def _rank(run: Run) -> int:
    """The adapter's: its own where one is continued."""
    if run.lora.lora_weight_path is None:
        return run.lora.lora_r
    try:
        config = json.loads((Path(run.lora.lora_weight_path) / "adapter_config.json").read_text("utf-8"))
        return int(config["r"])
    except (OSError, ValueError, KeyError, TypeError):
        return run.lora.lora_r  # what is wrong with it is said when it is loaded


def setup_of(run: Run, row: int, supervised: int, *, checkpointing: bool = False) -> Setup:
    """The Setup of a Run on this machine."""
    cuda = on_accelerator(run)
    half = number_type(run)[0] != "float32"
    zero, offload_optimizer, offload_weights = 0, False, False
    if run.train.deepspeed is not None:
        block = read_deepspeed(run.train.deepspeed)[0].get("zero_optimization", {})
        zero = int(block.get("stage", 0))
        offload_optimizer = _offloads(block.get("offload_optimizer"))
        offload_weights = _offloads(block.get("offload_param"))
    optim = str(run.extra.get("optim", "adamw_torch"))
    known = [size for name, size in MOMENTS.items() if name in optim]
    return Setup(
        method=run.method,
        zero=zero,
        offload_optimizer=offload_optimizer,
        offload_weights=offload_weights,
        ranks=ranks(),
        ranks_here=ranks_here(),
        checkpointing=checkpointing,
        row=row,
        supervised=supervised,
        device="cuda" if cuda else "cpu",
        half=half,
        lora_r=_rank(run),
        lora_dropout=run.lora.lora_dropout,
        lora_targets=run.lora.lora_target_modules,
        lora_bias=run.lora.lora_bias,
        dora=run.lora.use_dora,
        lean=not cuda and not half and zero != 3 and run.method != "qlora" and not run.lora.use_dora,
        moments=known[0] if known else 2.0 if "8bit" in optim else 8.0,
    )


def ranks() -> int:
    """Processes of the run: the launcher's word, or finetune.sh's while it checks before launching."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("FINETUNE_RANKS") or 1)


def ranks_here() -> int:
    """Those of them on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("FINETUNE_RANKS_HERE") or 1)


def _offloads(block: Any) -> bool:
    return isinstance(block, Mapping) and block.get("device", "none") != "none"


def trainable(shape: Shape, setup: Setup) -> int:
    """Parameters that learn (single trained token rows are not counted: they are a few kilobytes)."""
    if setup.method == "full":
        return shape.parameters
    total = 0
    for name, (width_in, width_out) in shape.linears.items():
        for layer in range(shape.layers):
            if _targeted(f"model.layers.{layer}.{name}", setup.lora_targets):
                total += setup.lora_r * (width_in + width_out) + (width_out if setup.dora else 0)
    if setup.lora_bias != "none":
        total += shape.layers * shape.biases
    return total


def _targeted(name: str, targets: tuple[str, ...]) -> bool:
    if targets == ("all-linear",):
        return True
    names = targets if len(targets) > 1 else tuple(targets[0].split(","))
    if any(name == target or name.endswith(f".{target}") for target in names):
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
    learnt = trainable(shape, setup)
    weights, gradients, optimizer, host = _states(shape, setup, learnt)
    runtime = RUNTIME[setup.device] + (DEEPSPEED if setup.zero else 0)
    file = shape.parameters * shape.stored
    size = 2 if setup.half and setup.device == "cuda" else 4
    load = runtime + (0 if setup.device == "cuda" else _load_peak(shape, setup, file, size))
    return Need(
        parameters=shape.parameters,
        trainable=learnt,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations(shape, setup),
        loss=_loss(shape, setup),
        runtime=runtime,
        load=load,
        host=host,
    )


def _load_peak(shape: Shape, setup: Setup, file: int, size: int) -> int:
    """Loading maps the file into memory and copies each weight out of it."""
    if setup.method == "qlora":
        return file + _four_bit_weights(shape)
    return file + shape.parameters * size


def _four_bit_weights(shape: Shape) -> int:
    rest = shape.parameters - shape.in_linears
    return int(NF4 * shape.in_linears) + 4 * rest


def _states(shape: Shape, setup: Setup, learnt: int) -> tuple[int, int, int, int]:
    """(weights, gradients, optimizer, of them on the host where they are offloaded)."""
    split = setup.ranks if setup.zero >= 2 else 1
    pure_half = setup.half and setup.device == "cuda" and (setup.zero > 0 or setup.method != "full")
    size = 2 if pure_half else 4
    frozen = shape.parameters if setup.method != "full" else 0
    weights = _four_bit_weights(shape) if setup.method == "qlora" else size * frozen
    own = 4 if setup.method != "full" and setup.zero == 0 else size  # an adapter's weights stay float32
    weights += own * learnt
    if setup.zero == 3:
        gathered = size * _gathered(shape)
        weights = weights // split + gathered
    gradients = (own * learnt) // split
    if setup.zero == 0 and setup.ranks > 1:
        gradients *= 2  # DDP's buckets hold them once more
    optimizer = int(setup.moments * learnt) // split
    if setup.zero:
        optimizer += 4 * learnt // split  # DeepSpeed's own float32 copy
        if setup.zero == 2 and setup.device == "cpu":
            gradients += 2 * own * learnt // split  # flattened for the step; gloo's copy of what is gathered
    if not pure_half and setup.half:
        weights += 2 * shape.parameters  # autocast keeps half-precision copies for the step
    host = 0
    if setup.device == "cuda" and setup.offload_optimizer:
        host, optimizer = host + optimizer + gradients, 0
    if setup.device == "cuda" and setup.offload_weights and setup.zero == 3:
        kept = size * _gathered(shape)
        host, weights = host + weights - kept, kept
    return weights, gradients, optimizer, host


def _gathered(shape: Shape) -> int:
    """Weights that a rank holds whole under ZeRO-3: those in use, and as many of the others as may stay."""
    return max(shape.embedding + 2 * shape.block, min(shape.parameters, LIVE))


def layer_bytes(shape: Shape, setup: Setup) -> int:
    """What one layer keeps of one token until backward, counted tensor by tensor."""
    a = 2 if setup.half else 4
    hidden, inner, query, key = shape.hidden, shape.inner, shape.query, shape.key
    attention = a * (2 * query + 2 * key) + 4 * shape.heads  # q, k, v, output, log-sum-exp
    # A norm keeps its float32 input and its output (what the linears read), where it learns the normalised
    # input too. The MLP keeps gate, silu(gate), up and their product; fused it keeps gate and up.
    norms = 2 * hidden * (4 + a)
    mlp = (2 if setup.lean else 4) * a * inner
    if setup.method == "full":
        return attention + norms + (0 if setup.lean else 2 * hidden * a) + mlp + 8
    lora = 7 * setup.lora_r * a
    if setup.lora_dropout == 0:
        return attention + norms + mlp + lora + 8
    # With dropout each adapted layer keeps its own input (after dropout) and the noise instead: of q, k, v,
    # gate, up over `hidden`, of o over `query`, of down over `inner`.
    noise = 1 if setup.device == "cuda" else a
    dropped = (a + noise) * (5 * hidden + query + inner)
    mlp -= 0 if setup.lean else a * inner
    return attention + 2 * hidden * 4 + mlp + dropped + lora + 8


def activations(shape: Shape, setup: Setup) -> int:
    """What a row's forward keeps, and what backward adds while it walks through one layer."""
    a = 2 if setup.half else 4
    layer = layer_bytes(shape, setup)
    walking = a * (3 * shape.inner + 2 * shape.hidden)
    kept = shape.layers * a * shape.hidden + layer if setup.checkpointing else shape.layers * layer
    total = setup.row * (kept + walking + a * shape.hidden)
    if setup.device == "cpu" and (setup.method == "qlora" or setup.zero == 3):
        total += HOLES[0] + int(HOLES[1] * total)
    return total


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
    """Whether activations are computed again, the line to print, and why the run cannot be."""

    checkpointing: bool
    need: Need
    row: int
    line: str
    refusal: str | None


def decide(run: Run, shape: Shape, *, row: int, supervised: int, longest: int) -> Verdict:
    """Hold a run against this machine. row, supervised: tokens of its largest row; longest: conversation."""
    asked = run.train.gradient_checkpointing
    setup = setup_of(run, row, supervised)
    have = room(setup)
    plain, again = need(shape, setup), need(shape, replace(setup, checkpointing=True))
    tight = have.free is None or plain.total > have.free  # not known: the way that takes less
    on = tight and again.total < plain.total if asked == "auto" else asked
    wanted = again if on else plain
    why = "as asked" if asked != "auto" else f"a row of {row:,} tokens keeps {gib(plain.activations)} without"
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
    return Verdict(bool(on), wanted, row, line, refusal)


def _cure(run: Run, shape: Shape, setup: Setup, free: int, longest: int) -> str:
    """What would fit: the same step in smaller rows, computing again, an adapter, more processes."""
    batch, accumulation = run.train.per_device_train_batch_size, run.train.gradient_accumulation_steps
    can_checkpoint = run.train.gradient_checkpointing is False
    for again in (setup.checkpointing, True):
        for smaller in (b for b in range(batch - 1, 0, -1) if batch % b == 0):
            rows = max(longest, -(-setup.row * smaller // batch))
            row = replace(setup, row=rows, supervised=min(setup.supervised, rows), checkpointing=again)
            if need(shape, row).total <= free:
                flags = f"--per_device_train_batch_size {smaller} --gradient_accumulation_steps "
                flags += str(accumulation * batch // smaller)
                flags += " --gradient_checkpointing True" if again and can_checkpoint else ""
                return f"the same step fits with {flags}"
    again_setup = replace(setup, checkpointing=True, row=max(longest, setup.row // batch))
    for method, flag in (("lora", "--use_lora True"), ("qlora", "--q_lora True")):
        if method != setup.method and need(shape, replace(again_setup, method=method)).total <= free:  # type: ignore[arg-type]
            return f"an adapter fits: {flag} --per_device_train_batch_size 1"
    return "use a smaller model, a lower --model_max_length, or more processes with ZeRO-3"


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def table(shape: Shape, setup: Setup, free: int) -> list[dict[str, Any]]:
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
    """One checkpoint: what is learnt and its optimizer; an adapter's does not carry the base."""
    learnt = trainable(shape, setup)
    size = 2 if setup.half and setup.zero and setup.device == "cuda" else 4
    states = (4 + size) * learnt if setup.zero else 0  # DeepSpeed writes its own copy of the weights too
    return int((size + setup.moments) * learnt) + states + 20 * MIB  # tokenizer, RNG states


def result_bytes(shape: Shape, setup: Setup) -> int:
    """What stays at the end beside the checkpoints."""
    return 4 * trainable(shape, setup) + 20 * MIB


def disk_needed(shape: Shape, run: Run) -> int:
    """Bytes at the worst moment: a checkpoint is written before the oldest one is removed."""
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
