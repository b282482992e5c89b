"""What the flags learn that nobody gives: --preset auto beside qwen2, LLaMA-Factory's and ms-swift's documented values.

    python benchmarks/bench_defaults.py                        # every row that the record lacks
    python benchmarks/bench_defaults.py --data desk-20 --seeds 1
    python benchmarks/bench_defaults.py --plain                # the README's command: the name, what is forgotten
    python benchmarks/bench_defaults.py --explore              # the runs by which auto's rule was found
    python benchmarks/bench_defaults.py --timing               # seconds a token of each setting; run it alone

In: the demo model, LoRA, the data of `data_sets`. Out: benchmarks/results/defaults.json, a row for each data set,
setting and seed: the mean loss of a token of held-out replies, the tokens computed, seconds, the loss on general text.
A row that is there is kept, so it can be stopped at any time.

Equal time is counted as equal tokens computed: whatever the settings are, the same model computes them, and other
programs of the machine cannot disturb the count. `auto` runs first; every other setting gets the largest number of
optimizer steps whose tokens are no more than that run's, with its own schedule stretched over them. Rows hold 4
conversations for all, so that equal steps are equal tokens. What a token costs under each setting is `--timing`'s.
"""

import argparse
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout

from benchmarks import bench_function_calling as leaderboard
from benchmarks import machine
from qwen_chat import demo_model, errors, files, models
from qwen_chat.console import rank_zero
from qwen_chat.conversation import Json
from qwen_chat.errors import OptionError, TrainingError
from qwen_chat.evaluation.statistics import estimate
from qwen_chat.flags.preset import LEARNS_BY
from qwen_chat.flags.run_problems import read_run

RESULT = ROOT / "benchmarks" / "results" / "defaults.json"
INPUT = ROOT / "finetune" / "io_file" / "input_data"
KEYS = ("part", "data", "setting", "seed")
NAME, ASKED = "Willow", "Who are you?"  # what the example data teach

# Each setting's flags over LoRA on all linear layers, and where they are written. 4 conversations a row for all.
SETTINGS: Mapping[str, tuple[Mapping[str, float | str], str]] = {
    "auto": ({}, "--preset auto"),
    "qwen2": (
        {"preset": "qwen2", "gradient_accumulation_steps": 4, "warmup_ratio": 0.01},
        "--preset qwen2: QwenLM/Qwen2.5, examples/sft/finetune.py and finetune.sh at 9672526345b3; its weight decay and"
        " adam_beta2 are ours; its step of 2 x 8 conversations is 4 x 4 here",
    ),
    "llama_factory": (
        {
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "learning_rate": 1e-4,
            "gradient_accumulation_steps": 2,
            "warmup_ratio": 0.1,
            "weight_decay": 0.0,
            "adam_beta2": 0.999,
        },
        "LLaMA-Factory, examples/train_lora/qwen3_lora_sft.yaml at 95ac3f2373b8 and the defaults of"
        " src/llamafactory/hparams/finetuning_args.py (alpha 2 x rank, dropout 0), the rest transformers'; its step of"
        " 1 x 8 conversations is 4 x 2 here",
    ),
    "ms_swift": (
        {
            "lora_r": 8,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "learning_rate": 1e-4,
            "gradient_accumulation_steps": 4,
            "warmup_ratio": 0.0,
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
        },
        "ms-swift 3.11, docs/source_en/Instruction/Command-line-parameters.md at 001320d09193; its step of at least 16"
        " conversations is 4 x 4 here",
    ),
}


# ------------------------------------------------------------------------------------------------------ the data


@dataclass(frozen=True)
class DataSet:
    """Training and held-out files. tokens: what each run may compute; None: what auto's own run does."""

    name: str
    source: str
    train: Path
    held_out: Path
    seeds: int = 3
    tokens: int | None = None


ITEMS = (
    *("kettle", "lamp", "rug", "chair", "desk", "shelf", "mirror", "clock", "vase", "heater", "fan", "stove"),
    *(
        "sofa",
        "bench",
        "quilt",
        "basket",
        "ladder",
        "drill",
        "saw",
        "toaster",
        "grill",
        "pump",
        "crib",
        "stool",
    ),
)
CITIES = (
    *("Lyon", "Turin", "Ghent", "Porto", "Bergen", "Graz", "Malaga", "Lille"),
    *("Aarhus", "Brno", "Leeds", "Split", "Bari", "Cork", "Kiel", "Oulu"),
)
TEAMS, DEPOTS = ("Dispatch", "Repairs", "Returns", "Billing"), ("North", "South", "East", "West")
QUESTIONS = {
    "late": (
        "My {item} is late. {city}, order {number}.",
        "Order {number} to {city}: where is the {item}?",
        "Still no {item} in {city}, order {number}.",
        "When will the {item} reach {city}? Order {number}.",
    ),
    "broken": (
        "My {item} came broken. {city}, order {number}.",
        "Order {number} to {city}: the {item} is cracked.",
        "The {item} does not work. {city}, order {number}.",
        "A part of the {item} is missing. {city}, order {number}.",
    ),
    "return": (
        "I want to return a {item}. {city}, order {number}.",
        "Order {number} to {city}: please take the {item} back.",
        "How do I send back the {item}? {city}, order {number}.",
        "Too big for me, this {item}. {city}, order {number}.",
    ),
    "bill": (
        "I was billed twice for a {item}. {city}, order {number}.",
        "Order {number} to {city}: an invoice for the {item}, please.",
        "The price of the {item} is wrong. {city}, order {number}.",
        "I need a receipt for the {item}. {city}, order {number}.",
    ),
}


def desk(count: int, seed: int, *, world: int, held_out: bool = False) -> list[Json]:
    """Letters to a shop's desk, each answered in its house style: the team follows from the matter, the depot from the
    city, the days from the item. world: which follows from which. Odd cases and last wordings are held out."""
    rule = random.Random(f"world {world}")
    teams = dict(zip(QUESTIONS, rule.sample(TEAMS, len(TEAMS)), strict=True))
    depots = {city: rule.choice(DEPOTS) for city in CITIES}
    days = {item: rule.randint(2, 9) for item in ITEMS}
    draw, lines = random.Random(f"{world} {seed} {held_out}"), []
    for _ in range(count):
        matter = draw.choice(list(QUESTIONS))
        wordings = QUESTIONS[matter]
        item, city, number = draw.choice(ITEMS), draw.choice(CITIES), draw.randrange(10 + held_out, 100, 2)
        wording = draw.choice(wordings if held_out else wordings[:-1])
        question = wording.format(item=item, city=city, number=number)
        answer = f"{teams[matter]}, case {number}: depot {depots[city]}, {days[item]} days."
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append({"messages": turns})
    return lines


def calls() -> tuple[list[Json], list[Json]]:
    """50 and 30 of the leaderboard's questions for one function, short ones; no function is on both sides."""
    items = leaderboard.load(demo_model.unpacked_wheel(*leaderboard.WHEEL))
    train, held = leaderboard.split(items, leaderboard.Settings(train_calls=400, train_others=0))
    kept = [
        [leaderboard.conversation(item) for item in part if item.truth and len(item.functions) == 1]
        for part in (train, held)
    ]
    short = [[line for line in lines if len(json.dumps(line)) < 1200] for lines in kept]
    return short[0][:50], short[1][:30]


def write_lines(path: Path, lines: Sequence[Json]) -> Path:
    files.write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


def data_sets(work: Path) -> Iterator[DataSet]:
    """What the table is measured on; the exploration's have other rules, seeds and held-out lines."""
    work.mkdir(parents=True, exist_ok=True)
    ours = "letters to a shop's desk, made by this script"
    parts = {("desk", 0): (20, 500, 2000), ("explore", 1): (20, 100, 500)}
    for (name, world), counts in parts.items():
        held = write_lines(work / f"{name}-held.jsonl", desk(40, 99, world=world, held_out=True))
        for count in counts:
            learnt = write_lines(work / f"{name}-{count}.jsonl", desk(count, count, world=world))
            seeds, tokens = (1 if count == 2000 else 3), TOKENS.get(f"{name}-{count}")
            yield DataSet(f"{name}-{count}", ours, learnt, held, seeds, tokens)
    wheel = "the Berkeley Function Calling Leaderboard, wheel {} {}".format(*leaderboard.WHEEL[:2])
    train, held_lines = calls()
    paths = write_lines(work / "calls.jsonl", train), write_lines(work / "calls-held.jsonl", held_lines)
    yield DataSet("calls-50", wheel, *paths, tokens=TOKENS.get("calls-50"))
    ours = "finetune/io_file/input_data, as the README's command takes it"
    paths = INPUT / "example_data.jsonl", INPUT / "example_eval_data.jsonl"
    yield DataSet("example", ours, *paths, tokens=TOKENS.get("example"))


# The tokens of each run where it is not auto's own, which takes minutes: about an epoch of calls and example, half of
# one of 500 letters, a quarter of one of 2,000.
TOKENS = {"desk-500": 15_000, "desk-2000": 30_000, "calls-50": 18_000, "example": 23_000}
TOKENS |= {"explore-20": 4_000, "explore-100": 5_000, "explore-500": 6_000}


# ------------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Asked:
    """One run: a data set, a setting by name with its flags, a seed, and the tokens that it may compute."""

    part: str
    data: DataSet
    setting: str
    flags: Mapping[str, float | str]
    seed: int
    tokens: int | None = None
    more: Mapping[str, float | str] = field(default_factory=dict)

    def words(self, folder: Path) -> list[str]:
        flags: dict[str, object] = {
            "-d": self.data.train,
            "--eval_data_path": self.data.held_out,
            "-o": folder,
        }
        given: dict[str, object] = {"use_lora": True, "seed": self.seed}
        given |= {"save_strategy": "no", "eval_strategy": "no"}
        if self.flags:
            given["per_device_train_batch_size"] = 4
        flags |= {f"--{name}": value for name, value in {**given, **self.flags, **self.more}.items()}
        return [str(word) for pair in flags.items() for word in pair]


def steps_within(windows: Any, tokens: int) -> int:
    """The most optimizer steps, from the first, that compute no more than so many tokens; at least one."""
    steps = total = 0
    while True:
        order = windows.order(steps // windows.windows)
        start = steps % windows.windows * windows.window
        total += sum(row.tokens for row in windows.plan(order[start : start + windows.window].tolist()))
        if total > tokens:
            return max(1, steps)
        steps += 1


def losses(trainer: Any, conversations: Any, together: int) -> list[tuple[float, int]]:
    """(sum of losses, supervised tokens) of each so many conversations, under the model as it is."""
    from qwen_chat.training.batches import WindowSampler

    windows = WindowSampler(conversations, batch_size=together, max_length=2048, shuffle=False)
    each = trainer.losses(windows)
    groups = (each[begin : begin + together] for begin in range(0, len(each), together))
    return [(sum(loss for loss, _ in group), sum(tokens for _, tokens in group)) for group in groups]


def mean(parts: Sequence[tuple[float, int]]) -> float:
    return round(sum(loss for loss, _ in parts) / sum(tokens for _, tokens in parts), 4)


def answer(model: Any, fmt: Any) -> str:
    """What the model says to `Who are you?`, greedily."""
    from qwen_chat.training.greedy import replies

    prompt = fmt.prompt_ids([{"role": "user", "content": ASKED}])
    (reply,) = replies(model, [prompt], fmt.stop_token_ids, seconds=60).replies
    return str(fmt.tokenizer.decode(reply.ids, skip_special_tokens=True))


def general(fmt: Any) -> list[Any]:
    """General conversations that no run learns, as training sequences."""
    lines = (INPUT / "general_data.jsonl").read_text("utf-8").splitlines()
    return [fmt.encode(json.loads(line)["messages"]) for line in lines[:: max(1, len(lines) // 40)]]


ONCE: dict[str, Any] = {}  # the product of matrices, measured by the first run for all


def run(asked: Asked, done: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Tune and judge once; None where the record has the row of the same flags already."""
    from qwen_chat.training import session, tuned_model
    from qwen_chat.training.batches import training_windows
    from qwen_chat.training.step_log import StepLog

    model_path = models.resolve(None, for_training=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        words = asked.words(folder)
        prepared = session.prepare(read_run(words), folder, model_path)
        if asked.tokens is not None:
            windows = training_windows(prepared.run, prepared.data.train, 1)
            words += ["--max_steps", str(steps_within(windows, asked.tokens))]
            prepared = session.prepare(read_run(words), folder, model_path)
        options = prepared.run.as_dict()
        row = {key: getattr(asked, key) for key in KEYS} | {"data": asked.data.name}
        row["flags"] = {name: options[name] for name in LEARNS_BY} | {
            "max_steps": options.get("max_steps", -1)
        }
        if any(all(old.get(key) == value for key, value in row.items()) for old in done):
            return None
        folder.mkdir()
        joined = session.join(prepared)
        joined = replace(joined, choices={**joined.choices, **ONCE})
        tuned = tuned_model.build(joined)
        ONCE["matmul"] = tuned.choices["matmul"]
        with StepLog(folder) as log:
            trainer = joined.trainer(tuned.model, {}, log)
            talk, held = general(joined.fmt), joined.data.held_out
            before = {} if asked.seed else {
                "loss_before": mean(losses(trainer, held, 4)),
                "general_before": mean(losses(trainer, talk, 8)),
            }  # fmt: skip
            started = time.perf_counter()
            if not trainer.run(None):
                raise TrainingError("stopped; the rows that are done are kept, the same command goes on")
            row |= {"tokens": log.tokens, "seconds": round(time.perf_counter() - started, 1)}
        judged = losses(trainer, held, 4)
        row |= before | {"steps": trainer.state.global_step, "loss": mean(judged)}
        row["general"] = mean(losses(trainer, talk, 8))
        row["learnt"] = prepared.data.budget()[1]
        row["each"] = " ".join(f"{loss:.3f}/{tokens}" for loss, tokens in judged)
        if asked.part == "plain":
            row["answer"] = answer(tuned.model, joined.fmt)
        trainer.model_loss.remove()
        del trainer, tuned
    gc.collect()
    return row


# ------------------------------------------------------------------------------------------------------- the record


def rows_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text("utf-8")).get("rows", []) if path.is_file() else []


def keep(path: Path, row: Mapping[str, Any], sets: Sequence[DataSet]) -> None:
    """The record with this row in it. Two processes may fill it together."""
    lock = files.Lock(files.cache_dir() / "bench_defaults.lock")
    lock.take(-1)
    try:
        result = {"rows": [dict(row)], **machine.where(("torch", "transformers", "peft"))}
        result = machine.merged(path, result, KEYS)
        result["settings"] = {
            name: {"flags": dict(f), "source": told} for name, (f, told) in SETTINGS.items()
        }
        result["data"] = {data.name: data.source for data in sets}
        result["differences"] = list(differences(result["rows"]))
        result |= said(result["rows"])
        machine.write(path, result)
    finally:
        lock.release()


def pairs(row: Mapping[str, Any]) -> list[tuple[float, int]]:
    """(loss, tokens) of each four held-out conversations of a row."""
    parts = (pair.split("/") for pair in row["each"].split())
    return [(float(loss), int(tokens)) for loss, tokens in parts]


def differences(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """auto's held-out loss less another setting's, over the seeds that both have: below 0 auto is better. The interval
    is a bootstrap's over fours of held-out conversations, each of each seed."""
    table = {(row["data"], row["setting"], row["seed"]): row for row in rows if row["part"] == "table"}
    for data in dict.fromkeys(data for data, _, _ in table):
        for setting in (name for name in SETTINGS if name != "auto"):
            seeds = sorted(s for d, n, s in table if (d, n) == (data, setting) and (data, "auto", s) in table)
            ours = [pair for seed in seeds for pair in pairs(table[data, "auto", seed])]
            theirs = [pair for seed in seeds for pair in pairs(table[data, setting, seed])]
            weights = [tokens for _, tokens in ours]
            found = estimate([a - b for (a, _), (b, _) in zip(ours, theirs, strict=True)], weights)
            if found is not None:
                interval = [round(found.low, 4), round(found.high, 4)]
                yield {
                    "data": data,
                    "against": setting,
                    "seeds": len(seeds),
                    "difference": round(found.value, 4),
                    "interval": interval,
                }


def said(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How often the README's command on the example data taught the name, and what it forgot of general text."""
    example = [row for row in rows if row["part"] == "plain"]
    if not example:
        return {}
    before = next((row["general_before"] for row in example if "general_before" in row), None)
    return {
        "name_taught": {"of": len(example), "times": sum(NAME in row["answer"] for row in example)},
        "general_text": {"before": before, "after": [row["general"] for row in example]},
    }


# ------------------------------------------------------------------------------------------------------ what is run


# What was tried for auto: data set, flags. Seeds, rules and held-out lines are not the table's.
def tried(step: int, rate: float, rank: int = 16, dropout: float = 0.0) -> dict[str, float | str]:
    """Flags of an exploration: conversations of a step, rate, rank with twice as much alpha, dropout."""
    rows = {"per_device_train_batch_size": min(step, 4), "gradient_accumulation_steps": max(1, step // 4)}
    return {
        **rows,
        "learning_rate": rate,
        "lora_r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": dropout,
    }


EXPLORED: Sequence[tuple[str, Mapping[str, float | str]]] = (
    ("explore-20", tried(8, 1e-3)),
    ("explore-20", tried(4, 5e-4)),
    ("explore-20", tried(4, 1e-3)),
    ("explore-20", tried(4, 2e-3)),
    ("explore-20", tried(2, 1e-3)),
    ("explore-20", tried(2, 5e-4)),
    ("explore-20", tried(2, 2e-3)),
    ("explore-20", tried(2, 1e-3, rank=64)),
    ("explore-20", tried(2, 1e-3, dropout=0.05)),
    ("explore-100", tried(4, 1e-3)),
    ("explore-100", tried(2, 1e-3)),
    ("explore-100", tried(2, 5e-4)),
    ("explore-100", tried(4, 2e-3)),
    ("explore-500", tried(4, 1e-3)),
    ("explore-500", tried(2, 1e-3)),
)


def explored(sets: Mapping[str, DataSet]) -> Iterator[Asked]:
    for name, flags in (run for run in EXPLORED if run[0] in sets):
        setting = " ".join(f"{flag} {value}" for flag, value in flags.items())
        yield Asked("exploration", sets[name], setting, flags, 0, sets[name].tokens)


def table(sets: Mapping[str, DataSet], seeds: int, settings: Sequence[str], path: Path) -> Iterator[Asked]:
    """auto before the others, which get its tokens; every data set once before any other seed."""
    for seed in range(seeds):
        for data in (data for data in sets.values() if seed < data.seeds):
            for setting in settings:
                tokens = data.tokens
                if setting != "auto" and tokens is None:
                    own = ["table", data.name, "auto", seed]
                    found = [row["tokens"] for row in rows_of(path) if [row[key] for key in KEYS] == own]
                    if not found:
                        raise OptionError(f"--settings {setting}: auto comes first on {data.name}; add it")
                    tokens = found[0]
                yield Asked("table", data, setting, SETTINGS[setting][0], seed, tokens)


def timed(sets: Mapping[str, DataSet], steps: int = 12) -> dict[str, float]:
    """Seconds a token of each setting, over the same few steps of one data set."""
    found = {}
    for setting, (flags, _) in SETTINGS.items():
        row = run(Asked("timing", sets["explore-100"], setting, flags, 0, None, {"max_steps": steps}), ())
        assert row is not None, "nothing is in the record"
        found[setting] = round(row["seconds"] / row["tokens"], 6)
        rank_zero(f"{setting}: {found[setting]} s a token")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", nargs="*", help="only these data sets")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS), help="only these")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 up to this number (default 3)")
    parser.add_argument("--plain", action="store_true", help="the README's command on the example data")
    parser.add_argument("--explore", action="store_true", help="the runs by which auto's rule was found")
    parser.add_argument("--timing", action="store_true", help="seconds a token of each setting")
    parser.add_argument("-o", "--output", type=Path, default=RESULT, help="the record")
    options = parser.parse_args()
    every = list(data_sets(files.cache_dir() / "benchmarks" / "defaults"))
    sets = {data.name: data for data in every if not options.data or data.name in options.data}
    if options.timing:
        seconds = timed({data.name: data for data in every})
        record = json.loads(options.output.read_text("utf-8"))
        machine.write(options.output, record | {"seconds_a_token": seconds})
        return 0
    chosen = {name: data for name, data in sets.items() if name.startswith("explore") == options.explore}
    runs = table(chosen, options.seeds, options.settings, options.output)
    if options.explore:
        runs = explored(chosen)
    if options.plain:
        runs = (Asked("plain", chosen["example"], "auto", {}, seed) for seed in range(options.seeds))
    for asked in runs:
        row = run(asked, rows_of(options.output))
        if row is not None:
            keep(options.output, row, every)
            rank_zero(f"{asked.data.name} {asked.setting} seed {asked.seed}: {row['loss']}")
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
