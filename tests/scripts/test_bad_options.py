"""Twenty-five ways to ask for what cannot be: each refused in under five seconds, flag and cure named, no torch."""

import json
from pathlib import Path

import pytest

from tests.support.scripts import Started, starts

ROOT = Path(__file__).resolve().parents[2]
ZERO3 = str(ROOT / "finetune" / "ds_config_zero3.json")
LORA = ["--use_lora", "True"]

# words, what is named, the cure
CASES: dict[str, tuple[list[str], str, str]] = {
    "unknown flag": (
        ["--learning_rat", "1"],
        "--learning_rat: unknown flag",
        "did you mean --learning_rate?",
    ),
    "no value": (["--learning_rate"], "--learning_rate: no value", "expected a number"),
    "no number": (["--lora_r", "four"], "--lora_r: 'four'", "expected a whole number"),
    "two values": (["--num_train_epochs", "1", "2"], "--num_train_epochs: 2 values", "expected one"),
    "gone": (["--group_by_length", "True"], "--group_by_length is gone", "leave it out"),
    "ours": (
        ["--remove_unused_columns", "True"],
        "--remove_unused_columns is set by the toolkit",
        "leave it out",
    ),
    "batch of none": (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0", "above 0"),
    "rate of 2": (["--learning_rate", "2"], "--learning_rate 2.0", "such as 2e-4"),
    "adapter flag, no adapter": (["--lora_r", "8"], "--lora_r without --use_lora", "add --use_lora True"),
    "4 bits, ZeRO-3": (
        ["--q_lora", "True", "--deepspeed", ZERO3],
        "--q_lora with ZeRO-3",
        "ds_config_zero2.json",
    ),
    "4 bits, PiSSA": (
        ["--q_lora", "True", "--lora_init", "pissa"],
        "--lora_init pissa",
        "use --use_lora alone",
    ),
    "no DeepSpeed file": (
        ["--deepspeed", "zero9.json"],
        "--deepspeed zero9.json: no such file",
        "expected a JSON file",
    ),
    "DeepSpeed, no JSON": (
        ["--deepspeed", "README.md"],
        "--deepspeed README.md: no JSON",
        "expected a JSON file",
    ),
    "scheduler block": (["--deepspeed", "SCHEDULER"], "has a 'scheduler' block", "remove it"),
    "fsdp": (["--fsdp", "full_shard"], "--fsdp: its shards would not be gathered", "use --deepspeed"),
    "ds contradicts": (["--deepspeed", "CONTRADICTS"], "gradient_clipping is 9", 'write "auto" there'),
    "no resume": (["--save_only_model", "True"], "--save_only_model: a run could not go on", "leave it out"),
    "upload": (["--push_to_hub"], "--push_to_hub: nothing is uploaded", "hf upload NAME OUTPUT_DIR"),
    "secret": (
        ["--hub_token", "SECRET"],
        "--hub_token: every user of the machine",
        "set the environment variable",
    ),
    "fp16 on a CPU": (["--fp16", "True"], "--fp16 needs an accelerator", "leave it out here"),
    "best of nothing": (["--keep_best", "True"], "--keep_best without --eval_data_path", "give some"),
    "evaluation of nothing": (
        ["--eval_strategy", "steps"],
        "without --eval_data_path",
        "give held-out conversations",
    ),
    "no checkpoint": (["--resume", "nowhere"], "--resume nowhere: no such folder", "expected auto, never or"),
    "output is a file": (["-o", "README.md"], "README.md: a file", "give another -o"),
    "output is taken": (["-o", "docs"], "docs: holds something else", "give a new or empty folder with -o"),
}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Started]:
    """What became of each case."""
    folder = tmp_path_factory.mktemp("refused")
    files = {"SCHEDULER": {"scheduler": {}, "zero_optimization": {"stage": 2}}}
    files["CONTRADICTS"] = {"gradient_clipping": 9}
    for name, config in files.items():
        (folder / name).write_text(json.dumps(config))
    data = ["-d", "finetune/io_file/input_data/example_data.jsonl"]
    given = [
        [*data, *(str(folder / word) if word in files else word for word in words)]
        for words, *_ in CASES.values()
    ]
    return dict(zip(CASES, starts("finetune/finetune.py", given, folder), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, started: dict[str, Started]) -> None:
    _, named, cure = CASES[name]
    done = started[name]
    assert done.seconds < 5
    assert done.status == 2, done.said
    assert done.printed == "False\n", "torch was imported"
    lines = done.said.splitlines()  # a combination may break two rules
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2
    assert any(named in line and cure in line for line in lines)
    assert "SECRET" not in done.said
