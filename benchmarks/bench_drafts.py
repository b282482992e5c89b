"""Tokens that cost no step: forced tool calls and answers that repeat their prompt, with drafts and without.

    python benchmarks/bench_drafts.py --quantize int8    # the demo model; minutes on two cores
    python benchmarks/bench_drafts.py --only chat        # ordinary chat alone, and eight at once

In: the 40 requests of benchmarks/drafts.jsonl (tools: the example ones), half greedy, half sampled; and ordinary
questions. Out: benchmarks/results/drafts.json, a row for each kind of request and number at once: tokens in a second
with and without (medians of rounds that take turns), their ratio, steps, and whether all tokens were the same.
Both engines share the model; each has its own prefix cache, warm: prompts are nearly free, replies are measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout

from benchmarks.machine import merged, where, write
from qwen_chat.inference.engine import Engine
from qwen_chat.inference.loading import load_engine
from qwen_chat.inference.sampling import GenerationRequest

RESULT = ROOT / "benchmarks" / "results" / "drafts.json"
STORED = ROOT / "benchmarks" / "drafts.jsonl"
TOOLS = ROOT / "finetune" / "io_file" / "input_data" / "example_tools.json"
QUESTIONS = [
    "What is the capital of France, and what is it known for?",
    "Explain why the sky is blue.",
    "Write a short story about a dog who finds a key.",
    "How do I make a good cup of tea?",
    "Give me three tips for learning a language.",
    "What is the difference between a virus and a bacterium?",
    "Describe a walk through a forest in autumn.",
    "Why do we have leap years?",
    "Write a Python function that counts the words of a text.",
    "What should I pack for a weekend at the sea?",
    "Who was Marie Curie?",
    "How does a bicycle stay upright?",
    "Suggest a name for a small bakery and explain it.",
    "What are the rules of chess in short?",
    "Tell me a joke about computers.",
    "How can I sleep better?",
]
LOADS = [("call", 1), ("repeat", 1), ("call", 8), ("repeat", 8), ("chat", 1), ("chat", 8)]


def requests(engine: Engine, kind: str) -> list[GenerationRequest]:
    """The stored requests of a kind, or ordinary chat; every second one is sampled."""
    if kind == "chat":
        lines: list[dict[str, Any]] = [{"text": text} for text in QUESTIONS]
    else:
        stored = map(json.loads, STORED.read_text(encoding="utf-8").splitlines())
        lines = [line for line in stored if line["kind"] == kind]
    tools = json.loads(TOOLS.read_text(encoding="utf-8"))
    asked = []
    for number, line in enumerate(lines):
        grammar = None
        if kind == "call":
            own = [tool for tool in tools if line["tool"] in (None, tool["function"]["name"])]
            grammar = engine.fmt.call_grammar(own)
        ids = engine.fmt.prompt_ids(
            [{"role": "user", "content": line["text"]}], tools if kind == "call" else None
        )
        asked.append(
            GenerationRequest(
                ids,
                max_tokens=128,
                temperature=0.7 * (number % 2),
                top_p=0.9,
                seed=number,
                grammar=grammar,
                stop_token_ids=engine.fmt.stop_token_ids,
            )
        )
    return asked


def one_round(engine: Engine, asked: Sequence[GenerationRequest], at_once: int) -> tuple[float, Any]:
    """Seconds, and what was said."""
    begin, said = time.perf_counter(), []
    for first in range(0, len(asked), at_once):
        said += [done.token_ids for done in engine.generate(asked[first : first + at_once])]
    return time.perf_counter() - begin, said


def compare(plain: Engine, drafting: Engine, kind: str, at_once: int, rounds: int) -> dict[str, Any]:
    """A row of the record."""
    asked = requests(plain, kind)
    reference, found = (one_round(engine, asked, at_once)[1] for engine in (plain, drafting))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    before = plain.stats().steps, drafting.stats().steps
    for turn in range(rounds):
        for drafts in (False, True) if turn % 2 else (True, False):
            spent, again = one_round(drafting if drafts else plain, asked, at_once)
            seconds[drafts].append(spent)
            found, reference = (again, reference) if drafts else (found, again)
    tokens = sum(map(len, reference))
    without, with_drafts = (statistics.median(seconds[drafts]) for drafts in (False, True))
    return {
        "load": kind,
        "at_once": at_once,
        "requests": len(asked),
        "tokens": tokens,
        "steps": [
            (plain.stats().steps - before[0]) // rounds,
            (drafting.stats().steps - before[1]) // rounds,
        ],
        "tokens_per_s": [round(tokens / without, 1), round(tokens / with_drafts, 1)],
        "ratio": round(without / with_drafts, 3),
        "ratios": [round(one / other, 3) for one, other in zip(seconds[False], seconds[True], strict=True)],
        "same_tokens": found == reference,
    }


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("-m", "--model")
    options.add_argument("--quantize", choices=["int8", "int4"])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--only", help="loads of one kind: call, repeat or chat")
    options.add_argument("--out", type=Path, default=RESULT)
    chosen = options.parse_args()
    loaded = load_engine(chosen.model, quantize=chosen.quantize, device="cpu")
    plain, drafting = (
        Engine(
            loaded.decoder,
            loaded.tokenizer,
            fmt=loaded.fmt,
            stop_token_ids=sorted(loaded.stop_token_ids),
            drafts=drafts,
        )
        for drafts in (False, True)
    )
    rows = []
    with plain, drafting:
        for kind, at_once in LOADS:
            if chosen.only in (None, kind):
                row = compare(plain, drafting, kind, at_once, chosen.rounds)
                rows.append({"type": chosen.quantize or "float32", **row})
                print(rows[-1], file=sys.stderr, flush=True)
    record = {
        **where(["torch", "transformers", "llguidance"]),
        "model": chosen.model or "demo",
        "path": loaded.decisions[-1],
        "rows": rows,
    }
    write(chosen.out, merged(chosen.out, record, ("type", "load", "at_once")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
