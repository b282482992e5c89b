"""Two checkouts of this project against each other: data, a training step, the service; alternating, in one run.

    git worktree add ../before COMMIT
    python benchmarks/bench_checkouts.py --before ../before --json     # about ten minutes on 2 cores

In: the folder of another checkout. Both run in this environment, with the demo model: bench_data.py's conversations
checked and tokenised by each, bench_train.py's data (b) through each one's own train_worker.py, and each one's own
bench_serve.py in float32 and int8, 1 and 8 at once. Out: medians and their ratio (this checkout's rate by the other's),
in `benchmarks/results/checkouts.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout

from benchmarks import bench_data, bench_train
from benchmarks.machine import merged, where, write
from qwen_chat import demo_model
from qwen_chat.console import rank_zero

PARTS = ("data", "training", "serving")
CONVERSATIONS = 50_000
RESULT = ROOT / "benchmarks" / "results" / "checkouts.json"
ENVIRONMENT = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="the other checkout's folder")
    parser.add_argument("--rounds", type=int, default=3, help="times through both [3]")
    parser.add_argument("--part", choices=PARTS, help="only this; the rest of the record stays")
    parser.add_argument("-o", "--output", type=Path, default=RESULT, help=f"[{RESULT.relative_to(ROOT)}]")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    options = parser.parse_args()
    checkouts = {"before": options.before.absolute(), "now": ROOT}
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in [options.part] if options.part else PARTS:
            measure = measurement(part, folder)
            for _ in range(options.rounds):
                for side, checkout in checkouts.items():
                    for what, value in measure(checkout).items():
                        found.setdefault(what, {}).setdefault(side, []).append(value)
    rows = [row(what, sides) for what, sides in found.items()]
    commits = {side: commit(checkout) for side, checkout in checkouts.items()}
    rows = [{**line, "commits": commits} for line in rows]
    result = {"rows": rows, **where(("torch", "transformers", "peft", "tokenizers"))}
    write(options.output, merged(options.output, result, ["what"]))
    for line in rows:
        rank_zero(f"{line['what']:32} {line['before']:>10} {line['now']:>10}  {line['ratio']}")
    if options.json:
        print(json.dumps(result))
    return 0


def measurement(part: str, folder: Path) -> Callable[[Path], dict[str, float]]:
    """What is measured of a checkout, once all that both sides share is made."""
    if part == "serving":
        return partial(serve, output=folder / "serve.json")
    if part == "training":
        return partial(train, spec=training_spec(folder), path=folder / "train.json")
    data = folder / "conversations.jsonl"
    bench_data.write_conversations(data, CONVERSATIONS)
    return partial(read, data=data, tokenizer=demo_model.qwen_tokenizer_path("qwen2_5"))


def read(checkout: Path, data: Path, tokenizer: Path) -> dict[str, float]:
    """Conversations/s: checked by one core, tokenised by all, and the two together."""
    with tempfile.TemporaryDirectory(dir=data.parent) as cache:
        program = bench_data.OURS.format(
            root=str(checkout),
            tokenizer=str(tokenizer),
            data=str(data),
            cache=cache,
            max_length=bench_data.MAX_LENGTH,
        )
        told = json.loads(run(["-c", program], checkout).splitlines()[-1])
    parts = {"checked": "check", "tokenised": "tokenise", "read": "seconds"}
    return {f"data, {name}/s": CONVERSATIONS / told[key] for name, key in parts.items()}


def training_spec(folder: Path) -> dict[str, Any]:
    """What train_worker.py is to do: one step over all of data (b)."""
    task, model = bench_train.TASKS["b"], bench_train.find_model("demo")
    data, tokenizer, counts = bench_train.write_data(task, model, folder)
    return bench_train.COMMON | {
        "method": "ours",
        "data": str(data),
        "model": model.spec,
        "tokenizer": str(tokenizer),
        "steps": model.steps,
        "max_length": task.max_length,
        "batch_size": task.batch_size,
        "trl_batch_size": 1,
        "output": str(folder / "output"),
        "tokens": counts["tokens"],
    }


def train(checkout: Path, spec: dict[str, Any], path: Path) -> dict[str, float]:
    """One step by a checkout's own engine."""
    path.write_text(json.dumps(spec | {"root": str(checkout)}))
    done = run([str(checkout / "benchmarks" / "train_worker.py"), str(path)], checkout)
    told = json.loads(done.splitlines()[-1])
    rate = spec["tokens"] / statistics.median(told["seconds"])
    peak, loss = told["peak_gib"], told["losses"][-1]
    return {"training, tokens/s": rate, "training, peak GiB": peak, "training, loss": loss}


def serve(checkout: Path, output: Path) -> dict[str, float]:
    """Tokens/s of a checkout's own service, by arithmetic and concurrency."""
    words = ["--servers", "ours,ours-int8", "--concurrency", "1,8", "--rounds", "1", "-o", str(output)]
    run([str(checkout / "benchmarks" / "bench_serve.py"), *words], checkout)
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    return {f"{row['server']}, {row['concurrency']} at once, tokens/s": row["tokens_per_s"] for row in rows}


def run(words: list[str], checkout: Path) -> str:
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=ENVIRONMENT, cwd=checkout
    )
    if done.returncode:
        raise SystemExit(f"{words[0]} failed:\n{done.stderr[-4000:]}")
    rank_zero(f"  {checkout.name}: {Path(words[0]).name if words[0] != '-c' else 'data'}")
    return done.stdout


def row(what: str, sides: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of both sides, each run, and how much higher this checkout's median is."""
    before, now = (statistics.median(sides[side]) for side in ("before", "now"))
    return {
        "what": what,
        "before": round(before, 3),
        "now": round(now, 3),
        "ratio": round(now / before, 3),
        "runs": {side: [round(value, 3) for value in values] for side, values in sides.items()},
    }


def commit(checkout: Path) -> str:
    """The commit that a checkout stands at."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
