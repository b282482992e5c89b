"""One way of training, measured in a process of its own: `python train_worker.py SPEC.json` prints one JSON
line.

Runs in our environment (method "ours") and in the peers' ("trl_packed", "trl_plain", "old_recipe"), so it
imports nothing of ours before it knows that it may. Every method trains the same weights on the same token
sequences and labels, all of them in each optimizer step, so that losses and gradients must agree step by step.

SPEC: method, data (.npz of benchmarks/bench_train.py), model (a folder, or {"config": {...}} for random
weights), steps, max_length, batch_size (conversations in a row), checkpointing, root (the checkout); profile:
also the operators that took the time.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config, Trainer, TrainerCallback, TrainingArguments

LORA = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}


def read_data(path: str) -> list[tuple[dict[str, Any], ...]]:
    """Conversations as tuples of sequences {"input_ids", "labels"}."""
    stored = np.load(path)
    sequences = [
        {"input_ids": ids, "labels": labels}
        for ids, labels in zip(
            np.split(stored["ids"], stored["ends"][:-1]),
            np.split(stored["labels"], stored["ends"][:-1]),
            strict=True,
        )
    ]
    found: dict[int, list[dict[str, Any]]] = {}
    for owner, sequence in zip(stored["owners"].tolist(), sequences, strict=True):
        found.setdefault(owner, []).append(sequence)
    return [tuple(members) for members in found.values()]


def supervised_spans(labels: Any) -> list[tuple[int, int]]:
    """The runs of labels that are no -100, as [start, end) pairs."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], labels != -100, [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def load_model(spec: dict[str, Any], attention: str) -> Any:
    """The same float32 weights and the same adapter for every method."""
    torch.manual_seed(0)
    if isinstance(spec["model"], dict):
        config = Qwen2Config(**spec["model"]["config"], attn_implementation=attention)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            spec["model"], dtype=torch.float32, attn_implementation=attention
        )
    model.config.use_cache = False
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**LORA))


def status_gib(name: str) -> float:
    """A line of /proc/self/status, in GiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**20


def matrix_rate() -> float:
    """torch's own float32 rate now, GFLOP/s: a row of 1,024 through an MLP matrix of Qwen2.5-0.5B."""
    x, weight = torch.randn(1024, 896), torch.randn(4864, 896)
    best = float("inf")
    for _ in range(20):
        begin = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - begin)
    return 2e-9 * 1024 * 896 * 4864 / best


class Watch(TrainerCallback):  # type: ignore[misc]
    """Wall time, loss and gradient norm of each optimizer step, fetching the data included."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.losses: list[float] = []
        self.gradients: list[float] = []  # their norms, before clipping

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.marks.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.marks.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.gradients.append(float(logs["grad_norm"]))


def options(spec: dict[str, Any], batch_size: int, rows: int) -> dict[str, Any]:
    """What every method's TrainingArguments say."""
    return {
        "output_dir": spec["output"],
        "use_cpu": True,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": rows,
        "num_train_epochs": spec["steps"],
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "gradient_checkpointing": spec["checkpointing"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "bf16": False,
    }


def ours(spec: dict[str, Any], data: list[Any], watch: Watch) -> tuple[Any, dict[str, Any]]:
    """The engine as finetune.py runs it."""
    sys.path.insert(0, spec["root"])
    from qwen_chat.chat.encoded import Encoded
    from qwen_chat.training import attention, fused, matmul
    from qwen_chat.training.batches import WindowSampler
    from qwen_chat.training.trainer import ChatTrainer

    conversations = [
        tuple(Encoded(one["input_ids"], supervised_spans(one["labels"])) for one in members)
        for members in data
    ]
    accumulation = -(-len(data) // spec["batch_size"])
    windows = WindowSampler(
        conversations,
        batch_size=spec["batch_size"],
        accumulation=accumulation,
        max_length=spec["max_length"],
        layout=spec.get("layout", "shared_prefix"),
    )
    model = load_model(spec, attention.register())
    choice = matmul.fastest()
    fused.keep_memory()
    fused.install(model, choice.product)
    args = TrainingArguments(
        **options(spec, spec["batch_size"], accumulation), remove_unused_columns=False, label_names=["labels"]
    )
    trainer = ChatTrainer(windows=windows, model=model, args=args, in_passes=True, callbacks=[watch])
    rows = windows.plan([int(i) for i in windows.order(0)])
    facts = {
        "rows": [row.tokens for row in rows],
        "pairs": sum(
            (stop - start) * (stop - start + 1) // 2 + (end - stop) * (stop - start)
            for row in rows
            for start, stop, end in row.segments()
        ),
        "route": f"{choice.route} ({choice.reason})",
    }
    return trainer, facts


def trl(spec: dict[str, Any], data: list[Any], watch: Watch) -> tuple[Any, dict[str, Any]]:
    """TRL's SFTTrainer on the same sequences: packed best-fit, or plain with padding inside a micro-batch."""
    import trl.data_utils
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    packing = spec["method"] == "trl_packed"
    dataset = Dataset.from_list(
        [{name: ids.tolist() for name, ids in sequence.items()} for members in data for sequence in members]
    )
    batch_size = 1 if packing else spec["trl_batch_size"]
    rows = len(dataset)
    if packing:
        rows = len(trl.data_utils.pack_dataset(dataset, spec["max_length"], "bfd"))
    config = SFTConfig(
        **options(spec, batch_size, -(-rows // batch_size)), packing=packing, max_length=spec["max_length"]
    )
    trainer = SFTTrainer(
        model=load_model(spec, "sdpa"),
        args=config,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(spec["tokenizer"]),
        callbacks=[watch],
    )
    return trainer, {"rows": [rows]}


def old_recipe(spec: dict[str, Any], data: list[Any], watch: Watch) -> tuple[Any, dict[str, Any]]:
    """Every sequence padded to the maximum, logits of every position."""

    def padded(sequence: dict[str, Any]) -> dict[str, list[int]]:
        length = len(sequence["input_ids"])
        left = spec["max_length"] - length
        return {
            "input_ids": sequence["input_ids"].tolist() + [0] * left,
            "labels": sequence["labels"].tolist() + [-100] * left,
            "attention_mask": [1] * length + [0] * left,
        }

    rows = [padded(sequence) for members in data for sequence in members]
    args = TrainingArguments(**options(spec, 1, len(rows)))
    model = load_model(spec, "sdpa")
    return Trainer(model=model, args=args, train_dataset=rows, callbacks=[watch]), {
        "rows": [spec["max_length"]]
    }


def warm_up(model: Any) -> None:
    """Start the libraries' threads and kernels; no gradient and no memory peak stays behind."""
    ids = torch.arange(64)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()


def train(trainer: Any, *, profiled: bool) -> dict[str, Any]:
    """Train; with `profiled`, the operators by their own time (ms and share of all), children not counted."""
    if not profiled:
        trainer.train()
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer.train()
    found = sorted(profile.key_averages(), key=lambda op: -op.self_cpu_time_total)
    total = sum(op.self_cpu_time_total for op in found)
    shown = [
        {
            "operator": op.key,
            "calls": op.count,
            "ms": round(op.self_cpu_time_total / 1000, 1),
            "share": round(op.self_cpu_time_total / total, 3),
        }
        for op in found[:20]
    ]
    return {"operators": shown}


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    data = read_data(spec["data"])
    watch = Watch()
    build = {"ours": ours, "trl_packed": trl, "trl_plain": trl, "old_recipe": old_recipe}[spec["method"]]
    trainer, facts = build(spec, data, watch)
    model = trainer.model
    warm_up(model)
    rate = matrix_rate()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = status_gib("VmRSS")
    faults = resource.getrusage(resource.RUSAGE_SELF)
    facts |= train(trainer, profiled=spec.get("profile", False))
    after = resource.getrusage(resource.RUSAGE_SELF)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = model.get_output_embeddings().weight.numel()
    embedded = model.get_input_embeddings().weight
    body = sum(p.numel() for p in model.parameters()) - trainable - embedded.numel()
    if model.get_output_embeddings().weight is not embedded:
        body -= head
    seconds = np.diff(watch.marks).tolist()
    result = {
        "method": spec["method"],
        "seconds": seconds,
        "losses": watch.losses,
        "gradients": watch.gradients,
        "peak_gib": round(status_gib("VmHWM") - before - 2 * 4 * trainable / 2**30, 3),
        "before_gib": round(before, 3),
        "matrix_gflops": round(max(rate, matrix_rate()), 1),
        "system_share": round((after.ru_stime - faults.ru_stime) / max(1e-9, sum(seconds)), 3),
        "parameters": {"body": body, "head": head, "trainable": trainable},
        "layers": model.config.num_hidden_layers,
        "width": model.config.num_attention_heads
        * getattr(model.config, "head_dim", model.config.hidden_size // model.config.num_attention_heads),
        **facts,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
