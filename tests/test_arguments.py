"""The parser: every flag by its name and type, every combination that cannot work, nothing imported."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwen_chat import arguments, hardware
from qwen_chat.arguments import DataArguments, ModelArguments, Run, option, read, read_run
from qwen_chat.errors import OptionError

ROOT = Path(__file__).resolve().parents[1]
DATA = ["-d", "data.jsonl"]

# The seed document's parameters, each with a value as its users write it, and what it must mean.
SEED = {
    "bf16": ("False", False),
    "fp16": ("False", False),
    "num_train_epochs": ("5", 5.0),
    "per_device_train_batch_size": ("2", 2),
    "per_device_eval_batch_size": ("3", 3),
    "gradient_accumulation_steps": ("16", 16),
    "eval_strategy": ("no", "no"),
    "save_strategy": ("steps", "steps"),
    "save_steps": ("1000", 1000.0),
    "save_total_limit": ("10", 10),
    "learning_rate": ("3e-4", 3e-4),
    "weight_decay": ("0.01", 0.01),
    "adam_beta2": ("0.95", 0.95),
    "warmup_ratio": ("0.01", 0.01),
    "lr_scheduler_type": ("cosine", "cosine"),
    "logging_steps": ("1", 1.0),
    "report_to": ("none", ("none",)),
    "model_max_length": ("512", 512),
    "lazy_preprocess": ("True", True),
    "gradient_checkpointing": ("True", True),
    "use_lora": ("True", True),
    "q_lora": ("False", False),
    "lora_r": ("8", 8),
    "lora_alpha": ("32", 32),
    "lora_dropout": ("0.1", 0.1),
    "lora_target_modules": ("q_proj", ("q_proj",)),
    "lora_bias": ("lora_only", "lora_only"),
    "data_path": ("a.jsonl", ("a.jsonl",)),
    "output_dir": ("out", "out"),
}


def problems_of(*words: str) -> list[str]:
    with pytest.raises(OptionError) as caught:
        read_run(words)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", SEED)
def test_each_seed_flag_is_read_by_its_name(name: str) -> None:
    word, meant = SEED[name]
    base = [] if name == "data_path" else DATA
    lora = ["--use_lora", "True"] if name.startswith("lora_") else []
    run = read_run([*base, *lora, f"--{name}", word])
    assert run.as_dict()[name] == meant
    assert type(run.as_dict()[name]) is type(meant)


def test_the_whole_old_command_line() -> None:
    words = [f"--{name}={value}" for name, (value, _) in SEED.items()]
    run = read_run([*words, "--evaluation_strategy", "no"])
    assert {name: run.as_dict()[name] for name in SEED} == {name: meant for name, (_, meant) in SEED.items()}
    assert run.train.warmup_steps == 0.01  # transformers' word for a share
    assert run.notes == ("--evaluation_strategy is called --eval_strategy today; read as that",)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--use_lora"], True),
        (["--use_lora", "True"], True),
        (["--use_lora", "false"], False),
        (["--use-lora=1"], True),
        (["--use_lora", "True", "--use_lora", "False"], False),
    ],
)
def test_switches_stand_bare_or_with_a_value_and_the_last_wins(words: list[str], value: bool) -> None:
    assert read_run([*DATA, *words]).lora.use_lora is value


def test_several_data_files_in_either_way() -> None:
    assert read_run(["-d", "a", "-d", "b c"]).data.data_path == ("a", "b c")
    assert read_run(["-d", "a", "b c", "--data_weights", "1,0.5"]).data.data_path == ("a", "b c")
    assert read_run(["-d", "a", "b", "--data_weights", "1", ".5"]).data.data_weights == (1.0, 0.5)


def test_fields_of_training_arguments_keep_their_types() -> None:
    words = ["--max_steps", "8", "--neftune_noise_alpha", "5", "--use_liger_kernel", "--seed", "-1"]
    words += [
        "--accelerator_config",
        '{"split_batches": false}',
        "--torch_compile=True",
        "--optim",
        "adafactor",
    ]
    assert read_run([*DATA, *words]).extra == {
        "max_steps": 8,
        "neftune_noise_alpha": 5.0,
        "use_liger_kernel": True,
        "seed": -1,
        "accelerator_config": {"split_batches": False},
        "torch_compile": True,
        "optim": "adafactor",
    }


def test_every_field_of_training_arguments_is_known() -> None:
    from dataclasses import fields

    from transformers import TrainingArguments

    found = {entry.name for entry in arguments.trainer_options()}
    assert found == {f.name for f in fields(TrainingArguments) if f.init}


def test_defaults_fit_the_method() -> None:
    assert read_run(DATA).train.learning_rate == 1e-5
    assert read_run([*DATA, "--use_lora"]).train.learning_rate == 2e-4
    assert read_run([*DATA, "--q_lora"]).train.learning_rate == 2e-4
    assert read_run([*DATA, "--use_lora", "--learning_rate", "1e-3"]).train.learning_rate == 1e-3
    assert read_run(DATA).train.eval_strategy == "no"
    assert read_run([*DATA, "--eval_data_path", "e"]).train.eval_strategy == "epoch"


def test_q_lora_implies_lora() -> None:
    run = read_run([*DATA, "--q_lora", "True"])
    assert (run.lora.use_lora, run.method) == (True, "qlora")
    assert read_run([*DATA, "--use_lora", "False", "--q_lora", "True"]).method == "qlora"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--lora_rank", "8"], "--lora_rank: unknown flag; did you mean --lora_r?"),
        (["--learning_rat", "1"], "--learning_rat: unknown flag; did you mean --learning_rate?"),
        (["--bf16", "maybe"], "--bf16: 'maybe'; expected True or False or None"),
        (["--max_steps", "many"], "--max_steps: 'many'; expected a whole number"),
        (["--max_steps"], "--max_steps: no value; expected a whole number"),
        (["-m", "my", "model"], "-m: 2 values (my model); expected one; quote a value with spaces"),
        (["--too_long", "cut"], "--too_long: 'cut'; expected drop or truncate or error"),
        (["--label_names", "[]"], "--label_names is set by the toolkit itself; leave it out"),
        (
            ["--group_by_length"],
            "--group_by_length is gone: rows are always balanced by length; leave it out",
        ),
    ],
)
def test_a_word_that_cannot_be_read_is_named(words: list[str], line: str) -> None:
    assert problems_of(*DATA, *words) == [line]


def test_words_without_a_flag() -> None:
    assert problems_of("data.jsonl", *DATA) == [
        "'data.jsonl': no flag stands before this value; flags begin with --"
    ]


def test_all_problems_come_at_once() -> None:
    lines = problems_of("--lora_r", "0", "--warmup_ratio", "2", "--lora_bias", "all")
    assert lines == [
        "--lora_r 0: expected a number above 0",
        "--warmup_ratio 2.0: expected a share between 0 and 1",
        "no data: give the conversations with -d FILE",
        "--lora_bias, --lora_r without --use_lora: a full fine-tune has no adapter; add --use_lora True",
    ]


def test_q_lora_with_zero_3() -> None:
    config = str(ROOT / "finetune" / "ds_config_zero3.json")
    assert problems_of(*DATA, "--q_lora", "--deepspeed", config) == [
        f"--q_lora with ZeRO-3 ({config}): 4-bit weights cannot be split over processes; "
        "use --deepspeed finetune/ds_config_zero2.json"
    ]


def test_deepspeed_paths_that_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "blocks.json").write_text(json.dumps({"scheduler": {}, "optimizer": {}}))
    ending = "expected a JSON file such as finetune/ds_config_zero2.json"
    missing = tmp_path / "none.json"
    assert problems_of(*DATA, "--deepspeed", str(missing)) == [
        f"--deepspeed {missing}: no such file; {ending}"
    ]
    for name, words in {"bytes.json": "no JSON (", "list.json": "not DeepSpeed's shape"}.items():
        (line,) = problems_of(*DATA, "--deepspeed", str(tmp_path / name))
        assert line.startswith(f"--deepspeed {tmp_path / name}: {words}") and line.endswith(ending)
    (line,) = problems_of(*DATA, "--deepspeed", str(tmp_path))
    assert "cannot be read (Is a directory)" in line
    assert len(problems_of(*DATA, "--deepspeed", str(tmp_path / "blocks.json"))) == 2


def test_what_a_cpu_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_accelerator", lambda: False)
    assert problems_of(*DATA, "--fsdp", "full_shard", "--fp16") == [
        "--fsdp without an accelerator would silently be plain DDP; leave it out or use --deepspeed",
        "--fp16 needs an accelerator; leave it out here",
    ]
    monkeypatch.setattr(hardware, "has_accelerator", lambda: True)
    assert read_run([*DATA, "--fp16"]).train.fp16


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--q_lora", "--lora_init", "pissa"], "PiSSA changes the base, 4 bits cannot"),
        (["--use_lora", "--lora_init", "pissa_niter_x"], "expected default, pissa or pissa_niter_N"),
        (["--use_lora", "--lora_weight_path", "/nowhere"], "no adapter_config.json there"),
        (["--use_lora", "--loraplus_lr_ratio", "0.5"], "expected 1 or more; 16 is usual"),
        (["--data_weights", "1", "2"], "--data_weights has 2 numbers for 1 data files"),
        (
            ["--warmup_ratio", ".1", "--warmup_steps", "5"],
            "--warmup_ratio and --warmup_steps: give one of them",
        ),
        (["--bf16", "--fp16"], "--bf16 and --fp16: give one of them"),
        (
            ["--label_smoothing_factor", "0.1"],
            "--label_smoothing_factor: the loss here is plain cross-entropy",
        ),
        (["--average_tokens_across_devices", "False"], "what a step's loss is divided by here"),
        (["--bf16_full_eval"], "computed as training computes them"),
        (["--attn_implementation", "sdpa"], "knows nothing of prefixes that conversations share"),
        (["--auto_find_batch_size"], "--auto_find_batch_size: would change what an optimizer step is"),
    ],
)
def test_a_combination_that_cannot_work(words: list[str], part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_accelerator", lambda: True)
    (line,) = problems_of(*DATA, *words)
    assert part in line


@dataclass(frozen=True)
class ShowArguments:
    """Show"""

    show: int = option(3, "how many", "-n")


def test_other_scripts_read_their_own_groups() -> None:
    values = read(["-d", "x", "-n", "5"], [ModelArguments, DataArguments, ShowArguments])
    assert (values[ShowArguments].show, values[DataArguments].data_path, values[ModelArguments].model) == (
        5,
        ("x",),
        None,
    )
    with pytest.raises(OptionError, match="--max_steps: unknown flag"):
        read(["--max_steps", "5"], [ShowArguments])


def test_help_names_every_flag_and_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read_run(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert [name for name in SEED if f"--{name}" not in text] == []
    program = (
        "import sys\nfrom qwen_chat.arguments import read_run\nread_run(['-d', 'x', '--max_steps', '2'])\n"
    )
    program += "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
    assert time.perf_counter() - start < 5


def test_a_run_is_a_value() -> None:
    run = read_run(DATA)
    assert isinstance(run, Run)
    assert json.loads(json.dumps(run.as_dict()))["lora_target_modules"] == ["all-linear"]
