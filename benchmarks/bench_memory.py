"""Hold the memory plan against measured peaks: runs of finetune.py, each rank's VmHWM against its plan.

    python benchmarks/bench_memory.py --json [--only TEXT]

In: nothing (the demo model, and a Qwen2 of 0.2 billion random weights). Out: benchmarks/results/memory.json, a
row a configuration: what was planned, what was measured, the ratio. Memory does not mind a busy machine.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout

from benchmarks.bench_train import QWEN_HALF_B
from benchmarks.machine import record_ratios
from qwen_chat import demo_model
from qwen_chat.training.ranks import free_port

RESULT = ROOT / "benchmarks" / "results" / "memory.json"
LORA = ["--use_lora", "True"]
QLORA = ["--q_lora", "True"]
AGAIN = ["--gradient_checkpointing", "True"]
ONCE = ["--gradient_checkpointing", "False"]


@dataclass(frozen=True)
class Case:
    """One run: which model, tokens of a row, flags, processes; `shared`: conversations of the row, half of each being
    one prompt that all of them begin with.
    """

    model: str
    row: int
    flags: list[str]
    ranks: int = 1
    zero: int = 0
    shared: int = 1

    @property
    def name(self) -> str:
        engine = f", ZeRO-{self.zero}" if self.zero else ""
        ranks = f", {self.ranks} processes" if self.ranks > 1 else ""
        short = {"--use_lora True": "LoRA", "--q_lora True": "Q-LoRA", AGAIN[0] + " True": "checkpointing"}
        pairs = [" ".join(self.flags[i : i + 2]) for i in range(0, len(self.flags), 2)]
        told = [short.get(pair, pair) for pair in pairs if pair != " ".join(ONCE)]
        method = "" if told and "LoRA" in told[0] else "full, "
        row = f"row {self.row}" + (f" of {self.shared} under one prompt" if self.shared > 1 else "")
        return f"{self.model}, {method}{', '.join([*told, row])}{engine}{ranks}"


CASES = [
    Case("demo", 512, [*LORA, *ONCE]),
    Case("demo", 1536, [*LORA, *ONCE]),
    Case("demo", 1536, [*LORA, *ONCE, "--lora_dropout", "0"]),
    Case("demo", 1536, [*LORA, *AGAIN]),
    Case("demo", 512, ONCE),
    Case("demo", 1536, ONCE),
    Case("demo", 1536, AGAIN),
    Case("demo", 4000, [*LORA, *ONCE], shared=8),
    Case("demo", 4000, ONCE, shared=8),
    Case("demo", 1024, [*QLORA, *ONCE]),
    Case("demo", 1024, [*QLORA, *AGAIN]),
    Case("mid", 1024, [*LORA, *ONCE]),
    Case("mid", 1024, [*LORA, *AGAIN]),
    Case("mid", 1024, ONCE),
    Case("mid", 768, [*QLORA, *ONCE]),
    Case("demo", 512, [*LORA, *ONCE], ranks=2, zero=2),
    Case("demo", 512, ONCE, ranks=2),
    Case("demo", 512, ONCE, ranks=2, zero=2),
    Case("demo", 512, ONCE, ranks=2, zero=3),
    Case("demo", 512, [*LORA, *ONCE], ranks=2, zero=3),
]


def mid_model(folder: Path) -> Path:
    """Qwen2.5-0.5B's layers, 12 of them, under the demo model's vocabulary; random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    demo = demo_model.ensure()
    vocabulary = json.loads((demo / "config.json").read_text())["vocab_size"]
    smaller = {"num_hidden_layers": 12, "vocab_size": vocabulary, "eos_token_id": 2}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**(QWEN_HALF_B | smaller))).save_pretrained(folder)
    for file in (*demo.glob("tokenizer*"), *demo.glob("chat_template*")):
        shutil.copy(file, folder)
    return folder


def data(folder: Path, case: Case) -> Path:
    """Conversations that fill four rows (a short word of the demo model is one token)."""
    file = folder / f"{case.row}-{case.shared}.jsonl"
    chance = random.Random(case.row)
    words = ["day", "light", "water", "house", "time"]
    own = 2 * case.row // (case.shared + 1) if case.shared > 1 else case.row
    half = own // 2 - 20
    asked = " ".join(chance.choices(words, k=half))
    with file.open("w", encoding="utf-8") as out:
        for _ in range(4 * case.shared):
            ask, answer = (" ".join(chance.choices(words, k=half)) for _ in range(2))
            messages = [
                {"role": "user", "content": asked if case.shared > 1 else ask},
                {"role": "assistant", "content": answer},
            ]
            out.write(json.dumps({"messages": messages}) + "\n")
    return file


def measure(case: Case, model: Path, folder: Path) -> dict[str, Any]:
    """Run it; rank 0's plan and peak, in GiB."""
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    words = ["-m", str(model), "-d", str(data(folder, case)), "-o", str(output)]
    words += ["--preset", "qwen2", *case.flags]  # rank 64, dropout 0.05
    words += ["--per_device_train_batch_size", str(case.shared), "--gradient_accumulation_steps", "1"]
    words += ["--max_steps", "2"]
    words += ["--save_strategy", "no", "--plan_anyway", "True"]
    if case.zero:
        words += ["--deepspeed", str(ROOT / "finetune" / f"ds_config_zero{case.zero}.json")]
    port = str(free_port())
    processes = []
    for rank in range(case.ranks):
        own = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks)}
        own |= {"LOCAL_WORLD_SIZE": str(case.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(ROOT / "finetune" / "finetune.py"), *words]
        environment = own if case.ranks > 1 else dict(os.environ)
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = [process.communicate()[1] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{case.name}: failed\n{said[0][-3000:]}")
    record = json.loads((output / "run.json").read_text())
    plan = record["plan"]
    planned, measured = plan["total"] / 2**30, record["peak_memory_gib"]
    log = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return {
        "run": case.name,
        "planned_gib": round(planned, 2),
        "measured_gib": round(measured, 2),
        "ratio": round(planned / measured, 3),
        "step_peak_gib": round(log[-1]["memory_gib"], 2),
        "parts_gib": {k: round(v / 2**30, 2) for k, v in plan.items() if k not in ("row", "total")},
        "row": plan["row"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")
    parser.add_argument(
        "--only", default="", help="only runs whose name holds this text; they replace those of the record"
    )
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = [case for case in CASES if options.only in case.name]
        chosen = [case for case in chosen if case.name == options.only] or chosen
        models = {"demo": demo_model.ensure()}
        if any(case.model == "mid" for case in chosen):
            models["mid"] = mid_model(folder / "mid")
        for case in chosen:
            rows.append(measure(case, models[case.model], folder))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    used = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")
    result = record_ratios(RESULT, rows, used, only=options.only)
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
