"""A bad value of a flag ends in one line that names it, before the data are read: with --check and without."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qwen_chat import errors, hardware
from qwen_chat.errors import OptionError
from qwen_chat.flags.run_problems import read_run
from qwen_chat.training import rehearsal, session

ROOT = Path(__file__).resolve().parents[2]
DATA = ["-d", "data.jsonl", "--eval_data_path", "held_out.jsonl"]

BAD = {
    "tf32": (["--tf32", "True"], "--tf32 True: refused (--tf32 requires Ampere"),
    "no such reporter": (["--report_to", "foo"], "--report_to foo: refused (foo is not supported"),
    "reporter not installed": (
        ["--report_to", "wandb"],
        "--report_to wandb: refused (WandbCallback requires wandb",
    ),
    "one of two reporters": (
        ["--report_to", "tensorboard", "swanlab"],
        "--report_to tensorboard swanlab: refused (",
    ),
    "schedule without its kwargs": (
        ["--lr_scheduler_type", "warmup_stable_decay"],
        "--lr_scheduler_type warmup_stable_decay: refused (",
    ),
    "minimum of nothing": (
        ["--lr_scheduler_type", "cosine_with_min_lr"],
        "--lr_scheduler_type cosine_with_min_lr: refused (One of min_lr or min_lr_rate should be set",
    ),
    "unknown kwargs": (
        ["--lr_scheduler_kwargs", '{"foo": 1}'],
        "--lr_scheduler_type cosine --lr_scheduler_kwargs {'foo': 1}: refused (",
    ),
    "kwargs that are text": (["--lr_scheduler_kwargs", "foo"], "--lr_scheduler_kwargs foo: refused ("),
    "optimizer's arguments": (
        ["--optim", "sgd", "--optim_args", "momentum=x"],
        "--optim sgd --optim_args momentum=x: refused (could not convert string to float: 'x')",
    ),
    "optimizer's arguments, no pairs": (
        ["--optim", "sgd", "--optim_args", "fast"],
        "--optim sgd --optim_args fast: refused (not enough values to unpack",
    ),
    "log level": (["--log_level", "loud"], "--log_level loud"),
    "steps": (["--save_steps", "2.5"], "--save_steps 2.5: refused (--save_steps must be an integer"),
    "best between checkpoints": (
        ["--load_best_model_at_end", "--eval_steps", "3", "--save_steps", "5"],
        "refused (--load_best_model_at_end requires the saving steps to be a round multiple",
    ),
    "debug": (
        ["--debug", "everything"],
        "--debug everything: refused (everything is not a valid DebugOption",
    ),
    "attention": (
        ["--attn_implementation", "fast", "--layout", "packed"],
        "--attn_implementation fast: no such attention; expected one of eager, ",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_one_line_that_names_its_flag(name: str) -> None:
    words, line = BAD[name]
    run = read_run([*DATA, *words])
    with pytest.raises(OptionError) as caught:
        rehearsal.rehearse(run)
    said = str(caught.value)
    assert line in said and said.startswith("--") and "\n" not in said


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--use_lora", "--optim", "adamw_8bit", "--report_to", "tensorboard", "--tf32", "False"],
        ["--lr_scheduler_type", "reduce_lr_on_plateau", "--lr_scheduler_kwargs", '{"factor": 0.3}'],
        ["--optim", "sgd", "--optim_args", "momentum=0.9,nesterov=true", "--keep_best"],
        ["--attn_implementation", "qwen_chat"],
        ["--attn_implementation", "sdpa", "--layout", "packed", "--log_level", "error"],
        ["--deepspeed", str(ROOT / "finetune" / "ds_config_zero3.json")],
    ],
    ids=str,
)
def test_good_values_pass_and_join_nothing(words: list[str]) -> None:
    rehearsal.rehearse(read_run([*DATA, *words]))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"zero_optimization": {"stage": 7}}, "refused (1 validation error for DeepSpeedZeroConfig stage"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "overlap_com"),
        (
            {"train_batch_size": 3},
            "train_batch_size is 3, batch size x accumulation x processes is 16; write",
        ),
    ],
)
def test_a_deepspeed_file_is_read_as_deepspeed_reads_it(
    content: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_RANKS", "2")
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    with pytest.raises(OptionError) as caught:
        rehearsal.rehearse(read_run([*DATA, "--deepspeed", str(file)]))
    assert line in str(caught.value) and str(caught.value).startswith(f"--deepspeed {file}: ")


def test_where_the_accelerator_decides_the_file_is_held_against_its_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"bf16": {"enabled": True}}))
    monkeypatch.setattr(hardware, "has_accelerator", lambda: True)
    monkeypatch.setattr(hardware, "gpu_has_bf16", lambda: False)
    run = read_run([*DATA, "--deepspeed", str(file)])  # without torch nobody knows
    with pytest.raises(OptionError, match=r'bf16\.enabled is true, --bf16 is False; write "auto" there'):
        rehearsal.rehearse(run)


@pytest.mark.parametrize("check", [["--check"], []])
def test_finetune_refuses_before_it_reads_the_data(
    check: list[str],
    script: ModuleType,
    tiny_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(session, "read_data", None)  # calling it would be a TypeError
    out = tmp_path / "out"
    words = ["-m", str(tiny_model_path), "-d", "data.jsonl", "-o", str(out), "--report_to", "wandb", *check]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
    assert errors.run(script.main) == 2
    assert capsys.readouterr().err.startswith("error: --report_to wandb: refused (")
    assert not out.exists()


@pytest.fixture
def script() -> ModuleType:
    import importlib.util

    spec = importlib.util.spec_from_file_location("finetune_script", ROOT / "finetune" / "finetune.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
