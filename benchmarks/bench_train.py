"""The training engine against TRL's SFTTrainer and against the old padded recipe, in one run on this machine.

    python benchmarks/bench_train.py --json                    # everything: an hour or more on two cores
    python benchmarks/bench_train.py --data c --model demo     # a piece of it
    python benchmarks/bench_train.py --scaling                 # tokens/s against the size of the data
    python benchmarks/bench_train.py --profile                 # where a step's time goes
    python benchmarks/bench_train.py --number_types            # --bf16 on this CPU

Every method trains the same weights with the same adapter and optimizer on the same token sequences and
labels, all of them in each optimizer step, so that losses and gradients must agree; each runs in a process of its own
(train_worker.py), so that its peak memory is its own; methods alternate. The peers live in an environment
that this script builds under the cache folder. With --json the last line on standard output is one JSON
object. What ran at its default steps and repeats takes its place in benchmarks/results/train.json as soon as
it is measured, so that the hour may be spent in pieces.

Data: (a) ordinary chat, (b) tool conversations each with its own tools, (c) 64 conversations under one system
prompt with ten tools, (d) ten-turn conversations under Qwen3's template, which TRL is given turn by turn.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout

from benchmarks import peers
from benchmarks.machine import merged, where, write

PEERS = ("torch==2.13.0", "transformers==5.23.0", "trl==1.16.0", "datasets==5.2.0", "peft==0.21.2")
RESULT = ROOT / "benchmarks" / "results" / "train.json"
COMMON: dict[str, Any] = {"checkpointing": False, "threads": os.cpu_count(), "root": str(ROOT)}
# Qwen2.5-0.5B's config.json; the weights are random, which costs the same.
QWEN_HALF_B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": True,
}
ENGLISH = (
    "the a of to and in that it for on with as at by from or an if not we you they can will this which when"
    " where time people way day year work part place case week company system program question number night"
    " point home water room area money story fact month lot right study book eye job word business issue side"
    " kind head house service friend power hour game line end member law car city name team minute idea body"
)
CHINESE = (
    "我们 今天 可以 什么 时候 因为 所以 问题 工作 学习 天气 公司 朋友 城市 时间 手机 电影 音乐 健康 旅行"
)
WORDS = f"{ENGLISH} {CHINESE}".split()


Made = list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]  # messages and tools of each


@dataclass(frozen=True)
class Task:
    """One data set and how it is laid out. batch_size: conversations in a row of ours.

    TRL's plain rows hold one sequence each: more of them only pad, so that is its fastest. All of a data set is
    in one optimizer step whatever the rows are.
    """

    name: str
    make: Callable[[random.Random], Made]
    family: str
    max_length: int
    batch_size: int
    against: tuple[str, ...]


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def tool(rng: random.Random, number: int, properties: int = 2) -> dict[str, Any]:
    names = [f"{rng.choice(WORDS[:80])}_{i}" for i in range(properties)]
    schema = {name: {"type": "string", "description": text(rng, 3)} for name in names}
    return {
        "type": "function",
        "function": {
            "name": f"{rng.choice(WORDS[:80])}_{rng.choice(WORDS[:80])}_{number}",
            "description": text(rng, 6),
            "parameters": {"type": "object", "properties": schema, "required": names[:1]},
        },
    }


def tool_turns(rng: random.Random, tools: list[dict[str, Any]], words: int) -> list[dict[str, Any]]:
    """A question, a call, its result and an answer."""
    function = rng.choice(tools)["function"]
    arguments = {name: text(rng, 2) for name in function["parameters"]["required"]}
    call = {
        "id": "call_0",
        "type": "function",
        "function": {"name": function["name"], "arguments": json.dumps(arguments)},
    }
    return [
        {"role": "user", "content": text(rng, words)},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": json.dumps({"result": text(rng, words // 2)}), "tool_call_id": "call_0"},
        {"role": "assistant", "content": text(rng, words)},
    ]


def chat(rng: random.Random) -> Made:
    """(a) one to four turns of question and answer."""
    conversations: Made = []
    for _ in range(24):
        messages: list[dict[str, Any]] = []
        for _ in range(rng.choice((1, 1, 2, 4))):
            messages += [{"role": "user", "content": text(rng, rng.randint(10, 40))}]
            messages += [{"role": "assistant", "content": text(rng, int(rng.lognormvariate(4.0, 0.6)))}]
        conversations.append((messages, None))
    return conversations


def own_tools(rng: random.Random) -> Made:
    """(b) each with one to three tools of its own; mean length about 0.3 of the maximum."""
    conversations: Made = []
    for _ in range(24):
        tools = [tool(rng, number) for number in range(rng.choice((1, 1, 1, 2)))]
        conversations.append((tool_turns(rng, tools, int(rng.lognormvariate(2.8, 0.7))), tools))
    return conversations


def shared_tools(rng: random.Random) -> Made:
    """(c) one system prompt with ten tools, about 900 tokens, and 64 conversations of about 150."""
    tools = [tool(rng, number, properties=1) for number in range(10)]
    system = {"role": "system", "content": text(rng, 50)}
    return [([system, *tool_turns(rng, tools, rng.randint(20, 28))], tools) for _ in range(64)]


def many_turns(rng: random.Random) -> Made:
    """(d) ten turns of question and answer."""
    conversations: Made = []
    for _ in range(4):
        messages: list[dict[str, Any]] = []
        for _ in range(10):
            messages += [{"role": "user", "content": text(rng, rng.randint(20, 40))}]
            messages += [{"role": "assistant", "content": text(rng, rng.randint(40, 100))}]
        conversations.append((messages, None))
    return conversations


TASKS = {
    task.name: task
    for task in (
        Task("a", chat, "qwen2_5", 1024, 2, ("trl",)),
        Task("b", own_tools, "qwen2_5", 1024, 2, ("trl", "old_recipe")),
        Task("c", shared_tools, "qwen2_5", 1280, 4, ("trl",)),
        Task("d", many_turns, "qwen3", 2048, 1, ("trl",)),
    )
}


@dataclass(frozen=True)
class Model:
    name: str
    spec: Any  # a folder, or {"config": {...}}
    folder: Path | None
    repeats: int
    steps: int

    def tokenizer(self, family: str) -> tuple[Any, Path]:
        """The tokenizer, with the family's template for (d), and the folder that the peers read one from."""
        from qwen_chat import demo_model, models

        if self.folder is None:
            tokenizer = demo_model.qwen_tokenizer(family)  # type: ignore[arg-type]
            folder = demo_model.qwen_tokenizer_path(family)  # type: ignore[arg-type]
        else:
            tokenizer, folder = models.load_tokenizer(self.folder), self.folder
        if self.folder is None or family == "qwen3":
            tokenizer.chat_template = (ROOT / "tests" / "golden" / f"{family}.jinja").read_text("utf-8")
        return tokenizer, folder


def find_model(name: str) -> Model:
    from qwen_chat import demo_model

    if name == "0.5b":
        return Model(name, {"config": QWEN_HALF_B}, None, repeats=1, steps=1)
    if name == "demo":
        folder = demo_model.ensure()
        return Model(name, str(folder), folder, repeats=3, steps=1)
    return Model(name, str(Path(name).resolve()), Path(name).resolve(), repeats=1, steps=1)


def write_data(task: Task, model: Model, folder: Path) -> tuple[Path, Path, dict[str, int]]:
    """Tokenise a task once for all methods: (.npz, tokenizer folder, counts)."""
    import numpy as np

    from qwen_chat.chat.format import ChatFormat

    tokenizer, tokenizer_folder = model.tokenizer(task.family)
    fmt = ChatFormat(tokenizer)
    ids: list[int] = []
    labels: list[int] = []
    ends: list[int] = []
    owners: list[int] = []
    for owner, (messages, tools) in enumerate(task.make(random.Random(f"bench_train {task.name}"))):
        for encoded in fmt.encode(messages, tools):
            if len(encoded.input_ids) > task.max_length:
                raise SystemExit(
                    f"data {task.name}: a sequence of {len(encoded.input_ids)} > {task.max_length}"
                )
            ids += encoded.input_ids
            labels += encoded.labels
            ends.append(len(ids))
            owners.append(owner)
    lengths = sorted(np.diff(ends, prepend=0).tolist())
    path = folder / f"{task.name}-{model.name.replace('/', '_')}.npz"
    np.savez(path, ids=ids, labels=labels, ends=ends, owners=owners)
    counts = {
        "conversations": owners[-1] + 1,
        "sequences": len(owners),
        "tokens": len(ids),
        "supervised": sum(label != -100 for label in labels),
        "shortest_pair": sum(lengths[:2]),
    }
    return path, tokenizer_folder, counts


def run_worker(method: str, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train in a process of its own; returns what train_worker.py printed."""
    path = folder / f"{method}.json"
    path.write_text(json.dumps(spec | {"method": method}))
    python = sys.executable if method == "ours" else str(peers.python_of(PEERS))
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, str(ROOT / "benchmarks" / "train_worker.py"), str(path)],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    told = f"{sum(result['seconds']):.1f} s, peak {result['peak_gib']:.2f} GiB, losses {result['losses']}"
    print(f"  {method}: {told}", file=sys.stderr)
    return result


def work(result: dict[str, Any], supervised: int) -> tuple[float, float]:
    """(FLOP of a step as 4 x parameters x tokens + attention, FLOP really done: the head only where there is
    a label).

    LoRA: the frozen weights cost 2 forward and 2 backward a token, the adapter 6; attention 12 a pair and
    channel.
    """
    parameters, tokens = result["parameters"], sum(result["rows"])
    attention = 12 * result["pairs"] * result["width"] * result["layers"]
    body = (4 * parameters["body"] + 6 * parameters["trainable"]) * tokens + attention
    return body + 4 * parameters["head"] * tokens, body + 4 * parameters["head"] * supervised


def compare(
    task: Task, model: Model, steps: int | None, repeats: int | None, folder: Path
) -> list[dict[str, Any]]:
    """One task on one model: every method in turn, again and again; a row for each opponent."""
    data, tokenizer, counts = write_data(task, model, folder)
    print(f"data {task.name}, model {model.name}: {counts}", file=sys.stderr)
    spec = COMMON | {
        "data": str(data),
        "model": model.spec,
        "tokenizer": str(tokenizer),
        "steps": steps or model.steps,
        "max_length": task.max_length,
        "batch_size": task.batch_size,
        "trl_batch_size": 1,
        "output": str(folder / "output"),
    }
    # Where no two sequences fit in one row, packing leaves each alone: the same run as plain, and not done twice.
    trls = ["trl_packed", "trl_plain"] if counts["shortest_pair"] <= task.max_length else ["trl_plain"]
    methods = ["ours", *trls, *(["old_recipe"] if "old_recipe" in task.against else [])]
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for _ in range(repeats or model.repeats):
        for method in methods:
            runs[method].append(run_worker(method, spec, folder))
    seconds = {m: statistics.median(s for run in found for s in run["seconds"]) for m, found in runs.items()}
    trl = min(trls, key=lambda method: seconds[method])
    ours = runs["ours"][0]
    peak = {m: statistics.median(run["peak_gib"] for run in found) for m, found in runs.items()}
    rate = 1e9 * max(run["matrix_gflops"] for run in runs["ours"])
    whole, done = work(ours, counts["supervised"])
    rows = []
    for against in task.against:
        other = trl if against == "trl" else against
        rows.append(
            {
                "data": task.name,
                "model": model.name,
                "method": "lora",
                "against": against,
                "tokens_per_s": round(counts["tokens"] / seconds["ours"], 1),
                "tokens_per_s_theirs": round(counts["tokens"] / seconds[other], 1),
                "tokens_per_s_ratio": round(seconds[other] / seconds["ours"], 3),
                "memory_ratio": round(peak["ours"] / peak[other], 3),
                "peak_gib": peak["ours"],
                "peak_gib_theirs": peak[other],
                "matmul_share": round(whole / seconds["ours"] / rate, 3),
                "matmul_share_done": round(done / seconds["ours"] / rate, 3),
                "loss": ours["losses"][-1],
                "loss_theirs": runs[other][0]["losses"][-1],
                "gradient_norm": ours["gradients"][-1],
                "gradient_norm_theirs": runs[other][0]["gradients"][-1],
                "setting": other,
                "seconds": {method: round(value, 2) for method, value in seconds.items()},
                "rows": ours["rows"],
                "route": ours["route"],
                **counts,
            }
        )
        print("  " + json.dumps({k: rows[-1][k] for k in list(rows[-1])[3:15]}), file=sys.stderr)
    return rows


def write_chats(file: Path, rng: random.Random, conversations: int) -> None:
    """A jsonl of one question and answer each."""
    with file.open("w", encoding="utf-8") as out:
        for _ in range(conversations):
            said = [text(rng, rng.randint(10, 40)), text(rng, rng.randint(30, 90))]
            turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant"), said, strict=True)]
            out.write(json.dumps({"messages": turns}) + "\n")


def finetuned(flags: dict[str, Any]) -> list[dict[str, Any]]:
    """finetune.py itself: the lines of its train_log.jsonl."""
    words = [str(word) for pair in flags.items() for word in pair]
    command = [sys.executable, str(ROOT / "finetune" / "finetune.py"), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return [json.loads(line) for line in (flags["-o"] / "train_log.jsonl").read_text("utf-8").splitlines()]


def number_types(folder: Path, repeats: int = 3) -> dict[str, Any]:
    """--bf16 on this CPU against float32: the seconds of a step, its peak memory, and the curve over 12 steps.

    The demo model, a row of about 1,000 tokens a step, all in one epoch; the first two steps are not timed.
    """
    data = folder / "chats.jsonl"
    write_chats(data, random.Random(0), 12 * 12)
    found: dict[str, list[list[dict[str, Any]]]] = {"float32": [], "bfloat16": []}
    for repeat in range(repeats):
        for kind, runs in found.items():
            flags = {
                "-m": find_model("demo").spec,
                "-d": data,
                "-o": folder / f"{kind}-{repeat}",
                "--bf16": kind == "bfloat16",
                "--use_lora": True,
                "--lora_r": 64,
                "--lora_alpha": 16,
                "--lora_dropout": 0,
                "--learning_rate": 2e-4,
                "--max_steps": 12,
                "--per_device_train_batch_size": 12,
                "--gradient_accumulation_steps": 1,
                "--model_max_length": 256,
                "--save_strategy": "no",
            }
            runs.append([line for line in finetuned(flags) if "loss" in line])
            print(f"  {kind}: {[line['seconds'] for line in runs[-1]]}", file=sys.stderr)
    return {
        kind: {
            "tokens_a_step": round(statistics.mean(line["tokens"] for line in runs[0])),
            "seconds_a_step": round(
                statistics.median(line["seconds"] for run in runs for line in run[2:]), 3
            ),
            "peak_gib": runs[0][-1]["memory_gib"],
            "losses": [round(line["loss"], 5) for line in runs[0]],
        }
        for kind, runs in found.items()
    }


def scaling(folder: Path) -> list[dict[str, Any]]:
    """tokens/s of the same number of steps over 1,000, 10,000 and 100,000 conversations: finetune.py itself, so
    that reading, the token cache and the order of the data are in it; the first two steps are not counted."""
    model = find_model("demo")
    rows = []
    for conversations in (1_000, 10_000, 100_000):
        rng = random.Random(conversations)
        data, out = folder / f"{conversations}.jsonl", folder / f"scaling-{conversations}"
        write_chats(data, rng, conversations)
        flags = {
            "-m": model.spec,
            "-d": data,
            "-o": out,
            "--use_lora": True,
            "--preset": "qwen2",
            "--max_steps": 14,
            "--per_device_train_batch_size": 4,
            "--gradient_accumulation_steps": 1,
            "--model_max_length": 256,
            "--save_strategy": "no",
        }
        begin = time.perf_counter()
        log = finetuned(flags)
        whole = time.perf_counter() - begin
        counted = [line for line in log if "tokens_per_s" in line][2:]
        seconds = sum(line["tokens"] / line["tokens_per_s"] for line in counted)
        rows.append(
            {
                "conversations": conversations,
                "tokens_per_s": round(sum(line["tokens"] for line in counted) / seconds, 1),
                "steps": len(counted),
                "seconds_of_the_whole_run": round(whole, 1),
            }
        )
        print("  " + json.dumps(rows[-1]), file=sys.stderr)
    return rows


def step_profile(folder: Path) -> dict[str, Any]:
    """A step at the 0.5B shape over rows of 1,024 tokens: its share of torch's matrix rate, and its operators.

    `share` counts the head for every token (4 x parameters x tokens), `share_done` only where it is computed.
    """
    import numpy as np

    model = find_model("0.5b")
    rng = np.random.default_rng(0)
    rows, length, steps = 2, 1024, 3
    ids = rng.integers(0, 150_000, rows * length)
    labels = np.where(rng.random(len(ids)) < 0.3, ids, -100)
    path = folder / "rows.npz"
    np.savez(path, ids=ids, labels=labels, ends=[length, 2 * length], owners=[0, 1])
    spec = COMMON | {
        "data": str(path),
        "model": model.spec,
        "output": str(folder / "output"),
        "steps": steps,
        "max_length": length,
        "batch_size": 1,
    }
    run = run_worker("ours", spec, folder)
    seconds = min(run["seconds"][1:])  # the first step also meets new shapes
    rate = 1e9 * run["matrix_gflops"]
    whole, done = work(run, int((labels != -100).sum()))
    return {
        "rows": run["rows"],
        "seconds": round(seconds, 2),
        "torch_gflops": run["matrix_gflops"],
        "route": run["route"],
        "share": round(whole / seconds / rate, 3),
        "share_done": round(done / seconds / rate, 3),
        "operators": run_worker("ours", spec | {"steps": 1, "profile": True}, folder)["operators"],
    }


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=sorted(TASKS), help="only this data set")
    parser.add_argument("--model", help="demo, 0.5b or a folder (default: demo and 0.5b)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default 1)")
    parser.add_argument("--repeats", type=int, help="alternating repeats (default: 3 for demo, 1 else)")
    parser.add_argument("--scaling", action="store_true", help="only: tokens/s against the size of the data")
    parser.add_argument("--profile", action="store_true", help="only: where the time of a step goes")
    parser.add_argument(
        "--number_types", action="store_true", help="only: --bf16 on this CPU against float32"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> Iterator[tuple[Model, Task]]:
    for name in [options.model] if options.model else ["demo", "0.5b"]:
        model = find_model(name)
        for task in [TASKS[options.data]] if options.data else TASKS.values():
            yield model, task


def record(result: dict[str, Any]) -> None:
    write(RESULT, merged(RESULT, result, ("data", "model", "against")))


def main() -> int:
    options = read_options()
    about = where((), PEERS)
    result: dict[str, Any] = {"rows": [], **about}
    at_defaults = options.steps is None and options.repeats is None
    compared = not (options.scaling or options.profile or options.number_types)
    everything = compared and at_defaults and options.data is None and options.model is None
    with tempfile.TemporaryDirectory(prefix="bench_train-") as name:
        folder = Path(name)
        for model, task in chosen(options) if compared else ():
            rows = compare(task, model, options.steps, options.repeats, folder)
            result["rows"] += rows
            if at_defaults:
                record({"rows": rows, **about})
        for block, wanted, measure in (
            ("scaling", options.scaling, scaling),
            ("step", options.profile, step_profile),
            ("number_types", options.number_types, number_types),
        ):
            if wanted or everything:
                result[block] = measure(folder)
                record({"rows": [], block: result[block], **about})
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
