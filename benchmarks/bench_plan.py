"""Hold the memory plan against simulated peaks: named runs on GPUs, of models that no machine here could hold.

    python benchmarks/bench_plan.py --json [--only TEXT]

In: nothing but shapes. Out: benchmarks/results/plan.json, a row a case: what was planned, what was counted on the
stand-in (training/simulation.py), their ratio. Both without the `runtime` of CUDA and its libraries.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout

from benchmarks.machine import record_ratios
from qwen_chat.flags.run_options import LoraArguments
from qwen_chat.training import memory_plan
from qwen_chat.training.memory_plan import GIB, Setup, Shape

RESULT = ROOT / "benchmarks" / "results" / "plan.json"


def _qwen2_5(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, words: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": words,
        "tie_word_embeddings": words == 151936,
    }


SHAPES = {
    "0.5B": _qwen2_5(896, 4864, 24, 14, 2, 151936),
    "7B": _qwen2_5(3584, 18944, 28, 28, 4, 152064),
    "14B": _qwen2_5(5120, 13824, 48, 40, 8, 152064),
    "32B": _qwen2_5(5120, 27648, 64, 40, 8, 152064),
    "72B": _qwen2_5(8192, 29568, 80, 64, 8, 152064),
    "30B-A3B": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
    },
}


@dataclass(frozen=True)
class Case:
    """One run; every token of its row is supervised."""

    model: str
    method: Literal["full", "lora"]
    checkpointing: bool
    row: int
    zero: int = 0
    ranks: int = 1

    @property
    def name(self) -> str:
        method = {"full": "full", "lora": "LoRA"}[self.method]
        again = ", checkpointing" if self.checkpointing else ""
        engine = f", ZeRO-{self.zero} on {self.ranks}" if self.zero else ""
        return f"{self.model}, {method}{again}, row {self.row:,}{engine}"

    @property
    def setup(self) -> Setup:
        return Setup(
            method=self.method,
            zero=self.zero,
            ranks=self.ranks,
            checkpointing=self.checkpointing,
            row=self.row,
            supervised=self.row,
            device="cuda",
            half=True,
        )


CASES = [
    Case("0.5B", "lora", False, 2048),
    Case("0.5B", "lora", True, 8192),
    Case("0.5B", "full", False, 2048),
    Case("0.5B", "full", True, 8192),
    Case("0.5B", "full", True, 2048, 1, 8),
    Case("0.5B", "full", False, 8192, 2, 64),
    Case("0.5B", "full", True, 2048, 3, 8),
    Case("7B", "lora", True, 2048),
    Case("7B", "lora", False, 2048),
    Case("7B", "lora", True, 8192, 2, 8),
    Case("7B", "full", True, 2048),
    Case("7B", "full", True, 2048, 1, 8),
    Case("7B", "full", True, 8192, 2, 8),
    Case("7B", "full", False, 2048, 3, 8),
    Case("14B", "lora", True, 8192),
    Case("14B", "full", True, 8192, 3, 8),
    Case("14B", "full", True, 2048, 2, 64),
    Case("32B", "lora", True, 2048, 3, 8),
    Case("32B", "full", True, 8192, 3, 64),
    Case("72B", "lora", True, 8192, 3, 8),
    Case("72B", "full", True, 2048, 3, 64),
    Case("30B-A3B", "lora", True, 2048),
    Case("30B-A3B", "lora", False, 8192, 3, 8),
    Case("30B-A3B", "full", True, 8192, 3, 64),
]


def measure(case: Case) -> dict[str, Any]:
    """The plan of a case and its simulated peak, in GiB."""
    from qwen_chat.training import simulation

    need = memory_plan.need(Shape.of(SHAPES[case.model]), case.setup)
    planned = need.step - need.runtime
    setup = case.setup
    lora = LoraArguments(use_lora=case.method == "lora", lora_r=setup.lora_r, lora_dropout=setup.lora_dropout)
    found = simulation.simulate(SHAPES[case.model], case.setup, lora)
    parts = {k: round(v / GIB, 2) for k, v in found.to_json().items() if k not in ("transfers", "seconds")}
    return {
        "run": case.name,
        "planned_gib": round(planned / GIB, 2),
        "simulated_gib": round(found.peak_bytes / GIB, 2),
        "ratio": round(planned / found.peak_bytes, 3),
        "planned": {
            k: round(v / GIB, 2)
            for k, v in need.to_json().items()
            if v > 2**16 and k not in ("load", "total")
        },
        "simulated": parts,
        "transfers": found.transfers,
        "seconds": found.seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")
    parser.add_argument(
        "--only", default="", help="only cases whose name holds this text; they replace those of the record"
    )
    options = parser.parse_args()
    rows = []
    for case in CASES:
        if options.only in case.name:
            rows.append(measure(case))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    result = record_ratios(RESULT, rows, ("torch", "transformers", "peft"), only=options.only)
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
