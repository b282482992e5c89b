"""How fast is data checked and tokenised, and in how much memory?

    python benchmarks/bench_data.py                  # 200,000 conversations; about 40 minutes on 2 cores
    python benchmarks/bench_data.py --conversations 5000 --repeats 1 --lines 1000 10000
    python benchmarks/bench_data.py --template qwen3_5_think    # another template of those that TRL carries

In: nothing; the conversations are generated (seeded: chat and tool calls, English and Chinese), the
vocabulary is Qwen's. Out: `benchmarks/results/data.json` (`data_NAME.json` for another template); with `--json` the
same object as the last line on standard output. Compared, alternating, in one run, on the same cores, template and
tokenizer:

    ours   open_records + tokenise: checks, ids and labels, a memory-mapped cache
    trl    TRL's SFTTrainer preparing a data set with assistant_only_loss: ids and labels, an Arrow cache
    map    datasets.map with apply_chat_template on each row: ids alone

trl and map run in an environment of their own, which is built here on first use, with one process a core.
Memory is the sum of the anonymous pages of a method's processes (shared ones counted once), sampled 20 times
a second.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout

from benchmarks import peers
from benchmarks.machine import where, write
from qwen_chat import demo_model, errors
from qwen_chat.console import rank_zero
from qwen_chat.conversation import Json
from qwen_chat.errors import ModelError, OptionError

RESULTS = ROOT / "benchmarks" / "results"
TEMPLATE = "qwen2_5"
# Beside the versions of torch, transformers and tokenizers used here.
PEER = ("trl==1.16.0", "datasets==5.2.0")
MAX_LENGTH = 4096

WORDS = (  # noqa: SIM905 - a list of 120 quoted words is no easier to read
    "the a of to and in is it you that he was for on are with as they be at one have this from or had by hot "
    "but what some we can out other were all there when up use your how said an each she which do their time "
    "will way about many then them write would like so these her long make thing see him two has look more "
    "could go come did number sound no most people over know water than call first who may down side been"
).split()
CHINESE = (
    "我们你好天气今天的是在不了有和人这中大为上个国以要他时来用们生到作地于出就分对成会可主发年动同工也能下过"
)

OURS = """
import json, os, sys, time
sys.path.insert(0, {root!r})
from transformers import AutoTokenizer
from qwen_chat.chat import format
from qwen_chat.data import records, token_cache
tokenizer = AutoTokenizer.from_pretrained({tokenizer!r})
start = time.perf_counter()
data = records.open_records({data!r})
checked = time.perf_counter()
fmt = format.ChatFormat(tokenizer)
tokens = token_cache.tokenise(data, fmt, max_length={max_length}, cache_dir={cache!r})
done = time.perf_counter()
summary = tokens.summary
print(json.dumps(dict(check=checked - start, tokenise=done - checked, seconds=done - start,
    tokens=summary.tokens, supervised=summary.supervised)))
"""

TRL = """
import json, time
from datasets import load_dataset
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer
tokenizer = AutoTokenizer.from_pretrained({tokenizer!r})
model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8,
    num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id))
spent = []
prepare = SFTTrainer._prepare_dataset
def timed(*given, **named):
    start = time.perf_counter()
    made = prepare(*given, **named)
    spent.append(time.perf_counter() - start)
    return made
SFTTrainer._prepare_dataset = timed
start = time.perf_counter()
data = load_dataset("json", data_files={data!r}, split="train", cache_dir={cache!r})
config = SFTConfig(output_dir={cache!r}, max_length={max_length}, packing=False, assistant_only_loss=True,
    dataset_num_proc={cores}, use_cpu=True, bf16=False, report_to=[])
trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
seconds = time.perf_counter() - start
tokens = supervised = 0
for batch in trainer.train_dataset.with_format("numpy").iter(1000):
    tokens += sum(len(ids) for ids in batch["input_ids"])
    supervised += sum(int((labels != -100).sum()) for labels in batch["labels"])
print(json.dumps(dict(tokenise=sum(spent), seconds=seconds, tokens=tokens, supervised=supervised)))
"""

MAP = """
import json, time
from datasets import load_dataset
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({tokenizer!r})
start = time.perf_counter()
data = load_dataset("json", data_files={data!r}, split="train", cache_dir={cache!r})
loaded = time.perf_counter()
def tokenise(row):
    tools = json.loads(row["tools"]) if row["tools"] else None
    ids = tokenizer.apply_chat_template(row["messages"], tools=tools, return_dict=False)
    return {{"input_ids": ids[:{max_length}]}}
data = data.map(tokenise, num_proc={cores}, remove_columns=data.column_names)
done = time.perf_counter()
tokens = sum(sum(map(len, batch["input_ids"])) for batch in data.iter(1000))
print(json.dumps(dict(tokenise=done - loaded, seconds=done - start, tokens=tokens, supervised=0)))
"""

SAVE_TOKENIZER = """
import pathlib, sys, trl
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
folder = pathlib.Path(trl.__file__).parent / "chat_templates"
tokenizer.chat_template = (folder / f"{sys.argv[3]}.jinja").read_text(encoding="utf-8")
tokenizer.save_pretrained(sys.argv[2])
"""


def main() -> int:
    options = read_options()
    with tempfile.TemporaryDirectory(prefix="bench_data-", dir=options.work) as folder:
        work = Path(folder)
        peer = peers.python_of((*PEER, *peers.ours("torch", "transformers", "tokenizers"), "jinja2"))
        tokenizer = work / "tokenizer"
        vocabulary = demo_model.qwen_tokenizer_path("qwen2_5" if options.template == TEMPLATE else "qwen3")
        run([str(peer), "-c", SAVE_TOKENIZER, str(vocabulary), str(tokenizer), options.template])
        result = {
            "template": options.template,
            "conversations": options.conversations,
            "rows": compare(work, tokenizer, peer, options.conversations, options.repeats),
            "memory": [memory_row(work, tokenizer, lines) for lines in options.lines],
        }
    result |= where(("torch", "transformers", "tokenizers"), PEER)
    rates = {row["method"]: row["conversations_per_s"] for row in result["rows"]}
    result["ratio_trl"] = round(rates["ours"] / rates["trl"], 2)
    result["ratio_map"] = round(rates["ours"] / rates["map"], 2)
    result["memory_ratio_trl"] = memory_ratio(result["rows"])
    if options.output is None:
        name = "data" if options.template == TEMPLATE else f"data_{options.template}"
        options.output = RESULTS / f"{name}.json"
    write(options.output, result)
    print(json.dumps(result) if options.json else describe(result))
    return 0


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--conversations", type=int, default=200_000, help="for the comparison [200000]")
    parser.add_argument(
        "--repeats", type=int, default=3, help="of each method, alternating; medians count [3]"
    )
    parser.add_argument(
        "--lines",
        type=int,
        nargs="*",
        default=[10_000, 100_000, 1_000_000],
        help="of the memory table's files",
    )
    parser.add_argument("--work", type=Path, help="folder for generated files and caches (several GB)")
    parser.add_argument("--template", default=TEMPLATE, help=f"one of TRL's chat_templates [{TEMPLATE}]")
    parser.add_argument("-o", "--output", type=Path, help=f"[{RESULTS.relative_to(ROOT)}/data.json]")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    options = parser.parse_args()
    if min([options.conversations, options.repeats, *options.lines]) < 1:
        raise OptionError("--conversations, --repeats and --lines: expected numbers above 0")
    return options


def compare(work: Path, tokenizer: Path, peer: Path, conversations: int, repeats: int) -> list[Json]:
    """The three methods in turn, `repeats` times; medians of each."""
    data = work / "data.jsonl"
    write_conversations(data, conversations)
    methods = {"ours": (Path(sys.executable), OURS), "trl": (peer, TRL), "map": (peer, MAP)}
    found: dict[str, list[Json]] = {name: [] for name in methods}
    for repeat in range(repeats):
        for name, (python, program) in methods.items():
            rank_zero(f"{name}: {conversations:,} conversations, {repeat + 1} of {repeats}")
            found[name].append(measure(work, tokenizer, python, program, data))
    data.unlink()
    return [summarise(name, conversations, runs) for name, runs in found.items()]


def summarise(name: str, conversations: int, runs: Sequence[Json]) -> Json:
    """Medians: `conversations_per_s` of tokenising alone, `with_reading_per_s` from the file on."""
    median = {key: statistics.median(one[key] for one in runs) for key in ("tokenise", "seconds", "peak_mb")}
    return {
        "method": name,
        "conversations_per_s": round(conversations / median["tokenise"], 1),
        "with_reading_per_s": round(conversations / median["seconds"], 1),
        "peak_mb": round(median["peak_mb"], 1),
        "tokens": runs[0]["tokens"],
        "supervised": runs[0]["supervised"],
        "seconds": [round(one["seconds"], 2) for one in runs],
    }


def memory_row(work: Path, tokenizer: Path, lines: int) -> Json:
    """Our rates and peak for a file of so many ordinary chat lines; one core checks, all tokenise."""
    rank_zero(f"memory: {lines:,} lines")
    data = work / "lines.jsonl"
    write_conversations(data, lines, tools=False)
    found = measure(work, tokenizer, Path(sys.executable), OURS, data)
    data.unlink()
    return {
        "lines": lines,
        "checked_per_s": round(lines / found["check"]),
        "tokenised_per_s": round(lines / found["tokenise"]),
        "peak_mb": round(found["peak_mb"], 1),
        "tokens": found["tokens"],
    }


def measure(work: Path, tokenizer: Path, python: Path, program: str, data: Path) -> Json:
    """Run one program with an empty cache; its JSON line, and the peak of its processes' memory."""
    cache = work / "cache"
    cache.mkdir()
    cores = len(os.sched_getaffinity(0))
    filled = program.format(
        root=str(ROOT),
        tokenizer=str(tokenizer),
        data=str(data),
        cache=str(cache),
        cores=cores,
        max_length=MAX_LENGTH,
    )
    try:
        output, peak = run_measured([str(python), "-c", filled])
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    return {**json.loads(output.splitlines()[-1]), "peak_mb": peak / 2**20}


def run_measured(command: Sequence[str]) -> tuple[str, int]:
    """Standard output, and the largest anonymous memory of the process and its children, in bytes."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        errors="replace",
    )
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, sum(map(anonymous_bytes, family(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, error = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise ModelError(f"a method failed: {error.strip()[-1500:]}")
    return output, peak


def environment() -> dict[str, str]:
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**os.environ, **quiet, "CUDA_VISIBLE_DEVICES": ""}


def family(pid: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield pid
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        for task in tasks:
            for child in (task / "children").read_text().split():
                yield from family(int(child))
    except OSError:  # it ended meanwhile
        return


def anonymous_bytes(pid: int) -> int:
    """Its share of memory that no file backs (Pss_Anon and Pss_Shmem of /proc/PID/smaps_rollup)."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    lines = (line.split() for line in text.splitlines())
    return sum(int(line[1]) * 1024 for line in lines if line and line[0] in ("Pss_Anon:", "Pss_Shmem:"))


def run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise ModelError(f"{' '.join(command[:4])} failed: {done.stderr.strip()[-800:]}")
    return done.stdout


# ---------------------------------------------------------------- the data


def write_conversations(path: Path, count: int, *, tools: bool = True) -> None:
    """Seeded conversations of one to three turns; with `tools`, three in ten have three tools and a call."""
    rng = random.Random(7)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            made = tool_conversation(rng, i) if tools and i % 10 >= 7 else chat(rng, i)
            file.write(json.dumps(made, ensure_ascii=False) + "\n")


def chat(rng: random.Random, i: int) -> Json:
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    for _ in range(rng.choice((1, 1, 2, 3))):
        messages.append({"role": "user", "content": f"{sentence(rng, 5, 30)} {i}?"})
        messages.append({"role": "assistant", "content": sentence(rng, 10, 120)})
    return {"messages": messages, "tools": None}


def tool_conversation(rng: random.Random, i: int) -> Json:
    names = rng.sample(WORDS, 3)
    tools = [
        {
            "type": "function",
            "function": {
                "name": f"{name}_{i % 50}",
                "description": sentence(rng, 5, 15),
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                    "required": ["city", "days"],
                },
            },
        }
        for name in names
    ]
    arguments = {"city": sentence(rng, 1, 2), "days": rng.randrange(9)}
    call = {"type": "function", "function": {"name": f"{names[0]}_{i % 50}", "arguments": arguments}}
    messages = [
        {"role": "user", "content": f"{sentence(rng, 5, 25)} {i}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": sentence(rng, 5, 20)},
        {"role": "assistant", "content": sentence(rng, 10, 60)},
    ]
    return {"messages": messages, "tools": json.dumps(tools, ensure_ascii=False)}


def sentence(rng: random.Random, least: int, most: int) -> str:
    size = rng.randint(least, most)
    if rng.random() < 0.3:
        return "".join(rng.choices(CHINESE, k=2 * size)) + "。"
    return " ".join(rng.choices(WORDS, k=size)).capitalize() + "."


# ---------------------------------------------------------------- told


def memory_ratio(rows: Sequence[Json]) -> float:
    peaks = {row["method"]: row["peak_mb"] for row in rows}
    return round(float(peaks["ours"] / peaks["trl"]), 3)


def describe(result: dict[str, Any]) -> str:
    lines = [f"{'method':8} {'conv/s':>10} {'with reading':>13} {'peak MB':>9} {'tokens':>13} {'learnt':>12}"]
    lines += [
        f"{row['method']:8} {row['conversations_per_s']:>10,} {row['with_reading_per_s']:>13,} "
        f"{row['peak_mb']:>9,} {row['tokens']:>13,} {row['supervised']:>12,}"
        for row in result["rows"]
    ]
    lines.append(
        f"ours / trl: {result['ratio_trl']} times the rate, {result['memory_ratio_trl']} of the memory"
    )
    lines += [
        f"{row['lines']:>9,} lines: checked {row['checked_per_s']:>8,}/s, "
        f"tokenised {row['tokenised_per_s']:>7,}/s, peak {row['peak_mb']:,} MB"
        for row in result["memory"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(errors.run(main))
