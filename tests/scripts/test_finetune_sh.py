"""finetune.sh: the command it builds, the paths it finds, the check before the launch, the status that it ends with."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHELL = ROOT / "finetune" / "finetune.sh"
EXAMPLE = str(ROOT / "finetune" / "io_file" / "input_data" / "example_data.jsonl")
OWN = {
    "GPUS_PER_NODE",
    "NNODES",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "MODEL",
    "DATA",
    "LAUNCHER",
    "PYTHON",
}


def shell(
    *words: str, cwd: Path = ROOT, program: str = "bash", **environment: str
) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if name not in OWN} | environment
    own.setdefault("CUDA_VISIBLE_DEVICES", "")
    command = [program, str(SHELL), *words]
    return subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, timeout=280)


def dry(*words: str, cwd: Path = ROOT, **environment: str) -> list[str]:
    """The words of the command that would be run."""
    done = shell("--dry_run", *words, cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return shlex.split(line)


def after(command: list[str], flag: str) -> list[str]:
    return [command[i + 1] for i, word in enumerate(command) if word == flag]


def test_nothing_in_it_is_newer_than_the_bash_of_macos() -> None:
    """3.2 knows neither `;;&` nor `${x,,}`, and stops at the first."""
    newer = (
        r";;&|;&|\$\{\w+(\[.\])?(,,|\^\^|@)|declare -[An]|local -n|mapfile|readarray|wait -n|\[\[ -v|&>>|\|&"
    )
    code = [line for line in SHELL.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert [line for line in code if re.search(newer, line)] == []


@pytest.mark.parametrize(("word", "stage"), [("TRUE", 2), ("yes", 2), ("1", 2), ("False", 3), ("truest", 3)])
def test_a_truth_may_be_written_in_any_case(word: str, stage: int) -> None:
    command = dry("--q_lora", word, GPUS_PER_NODE="2")
    assert after(command, "--deepspeed") == [str(ROOT / "finetune" / f"ds_config_zero{stage}.json")]


def test_without_options_it_is_one_process_on_a_cpu() -> None:
    done = shell("--dry_run")
    assert done.stderr == "no GPU here: one process on the CPU\n"
    command = shlex.split(done.stdout)
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert after(command, "--nproc_per_node") == ["1"] and after(command, "--nnodes") == ["1"]
    assert after(command, "-d") == [EXAMPLE]
    assert "--deepspeed" not in command and "-m" not in command[3:] and "-o" not in command
    assert int(after(command, "--master_port")[0]) > 1023
    assert dry(GPUS_PER_NODE="0")[4] == "1"


def test_the_seeds_variables_and_flags() -> None:
    command = dry(
        MODEL="Qwen/Qwen2-7B-Instruct",
        DATA="finetune/io_file/input_data/example_data.jsonl",
        USE_LORA="True",
        OUTPUT_DIR="out dir",
        GPUS_PER_NODE="4",
        NNODES="2",
        NODE_RANK="1",
        MASTER_ADDR="10.0.0.1",
        MASTER_PORT="7000",
        DS_CONFIG_PATH="ds_config_zero2.json",
    )
    script = command.index(str(ROOT / "finetune" / "finetune.py"))
    launch, flags = command[:script], command[script + 1 :]
    for flag, value in {"nproc_per_node": "4", "nnodes": "2", "node_rank": "1"}.items():
        assert after(launch, f"--{flag}") == [value]
    assert after(launch, "--master_addr") + after(launch, "--master_port") == ["10.0.0.1", "7000"]
    assert flags == [
        *("-m", "Qwen/Qwen2-7B-Instruct", "-d", EXAMPLE, "-o", "out dir", "--use_lora", "True"),
        *("--q_lora", "False", "--deepspeed", str(ROOT / "finetune" / "ds_config_zero2.json")),
    ]


def test_a_config_file_stands_in_place_of_what_was_not_given_as_a_flag(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("use_lora: true\n")
    command = dry("--config", str(file), GPUS_PER_NODE="2", Q_LORA="True", DATA="x")
    script = command.index(str(ROOT / "finetune" / "finetune.py"))
    assert command[script + 1 :] == ["--config", str(file)]
    command = dry("--use_lora", "False", "--config", str(file), "-d", str(file), "--deepspeed", "zero2")
    assert command[-8:] == [
        "-d",
        str(file),
        "--config",
        str(file),
        "--use_lora",
        "False",
        "--deepspeed",
        "zero2",
    ]


def test_a_flag_wins_over_the_environment_and_the_last_one_over_all() -> None:
    words = [
        "-m",
        "one",
        "--model=two/three",
        "--use_lora",
        "--q_lora",
        "False",
        "-d",
        "a b",
        "--data_path",
        "c",
    ]
    words += [
        "--use_lora",
        "False",
        "--max_steps",
        "8",
        "--seed",
        "-1",
        "--max_steps=9",
        "--report_to",
        "a",
        "b",
    ]
    command = dry(*words, MODEL="zero", USE_LORA="True", DATA="d")
    flags = command[command.index("-m", 3) :]
    assert flags == [
        *("-m", "two/three", "-d", str(ROOT / "a b"), "-d", str(ROOT / "c"), "--use_lora", "False"),
        *(
            "--q_lora",
            "False",
            "--max_steps",
            "8",
            "--seed",
            "-1",
            "--max_steps",
            "9",
            "--report_to",
            "a",
            "b",
        ),
    ]


@pytest.mark.parametrize(
    "words",
    [
        *(["-d", "a.jsonl"], ["-d=a.jsonl"], ["--data_path=a.jsonl"], ["--data-path", "a.jsonl"]),
        *(["--data_paths", "a.jsonl"], ["--data_paths=a.jsonl"]),
    ],
    ids=" ".join,
)
def test_the_users_data_are_never_joined_by_the_example(words: list[str]) -> None:
    assert after(dry(*words), "-d") == [str(ROOT / "a.jsonl")]
    assert "--data_paths" not in dry(*words)


def test_short_flags_with_an_equals_sign() -> None:
    command = dry("-m=one=two", "-o=out", "-d=a b=c.jsonl")
    assert after(command[3:], "-m") == ["one=two"] and after(command, "-o") == ["out"]
    assert after(command, "-d") == [str(ROOT / "a b=c.jsonl")]


@pytest.mark.parametrize(
    ("words", "environment", "config"),
    [
        ([], {}, None),
        ([], {"GPUS_PER_NODE": "2"}, "ds_config_zero3.json"),
        ([], {"NNODES": "2"}, "ds_config_zero3.json"),
        (["--q_lora"], {"GPUS_PER_NODE": "2"}, "ds_config_zero2.json"),
        (["--q_lora", "True"], {}, None),
        (["--deepspeed", "none"], {"GPUS_PER_NODE": "2"}, None),
        (["--deepspeed", "finetune/ds_config_zero2.json"], {}, "ds_config_zero2.json"),
    ],
)
def test_which_deepspeed_file(words: list[str], environment: dict[str, str], config: str | None) -> None:
    expected = [] if config is None else [str(ROOT / "finetune" / config)]
    assert after(dry(*words, **environment), "--deepspeed") == expected


def test_paths_are_looked_for_here_first_and_then_in_base_path(tmp_path: Path) -> None:
    name = "io_file/input_data/example_data.jsonl"
    assert after(dry("-d", name, cwd=tmp_path), "-d") == [EXAMPLE]
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.touch()
    assert after(dry("-d", name, cwd=tmp_path), "-d") == [str(own)]
    other = tmp_path / "other base"
    (other / "models" / "m").mkdir(parents=True)
    files = ("--eval_data_path", "models", "--general_data", "models")
    command = dry("-m", "models/m", *files, cwd=tmp_path, BASE_PATH=str(other))
    assert after(command[3:], "-m") == [str(other / "models" / "m")]
    assert after(command, "--eval_data_path") == [str(other / "models")]
    assert after(command, "--general_data") == [str(other / "models")]


def test_the_deepspeed_launcher_is_for_one_machine() -> None:
    command = dry(LAUNCHER="deepspeed", GPUS_PER_NODE="2", MASTER_PORT="7001")
    assert command[1:8] == [
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        "2",
        "--master_port",
        "7001",
        "--no_local_rank",
    ]
    done = shell("--dry_run", LAUNCHER="deepspeed", NNODES="2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(
        "error: LAUNCHER=deepspeed is for one machine; for NNODES=2 use LAUNCHER=torchrun\n"
    )


@pytest.mark.parametrize(
    ("words", "environment", "line"),
    [
        ([], {"LAUNCHER": "mpirun"}, "LAUNCHER=mpirun: expected torchrun or deepspeed"),
        ([], {"NNODES": "0"}, "NNODES=0: expected a number above 0"),
        ([], {"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2: expected 0 to 1"),
        ([], {"GPUS_PER_NODE": "two"}, "GPUS_PER_NODE=two: expected a number"),
        (["-m", "my", "model"], {}, "-m: 2 values; expected one (quote a path with spaces)"),
        (["-d"], {}, "-d: no value; expected a file"),
        (["--deepspeed"], {}, "--deepspeed: 0 values; expected one (quote a path with spaces)"),
    ],
)
def test_what_cannot_be_launched(words: list[str], environment: dict[str, str], line: str) -> None:
    done = shell("--dry_run", *words, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"error: {line}"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        # A word that a flag does not take was passed over, and the example's data were trained on.
        (["mine.jsonl"], "mine.jsonl: no flag stands before it; data are given with -d"),
        (["--use_lora=True", "mine.jsonl"], "mine.jsonl: no flag stands before it; data are given with -d"),
        (["--use_lora", "True", "a"], "--use_lora: 2 values; expected one (quote a path with spaces)"),
        (["--dry_run", "mine.jsonl"], "--dry_run mine.jsonl: expected True or False"),
        (["-d", ""], "-d: an empty value; give one, or leave the flag out"),
        (["--config="], "--config: an empty value; give one, or leave the flag out"),
    ],
)
def test_no_word_is_passed_over(words: list[str], line: str) -> None:
    done = shell(*words)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"error: {line}")


def test_started_with_sh_it_says_so(tmp_path: Path) -> None:
    if "bash" in Path("/bin/sh").resolve().name:
        pytest.skip("sh is bash here")
    done = shell("--dry_run", program="/bin/sh")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: finetune.sh needs bash; start it with: bash {SHELL}\n"


def test_help_names_its_own_flags_and_those_of_finetune_py() -> None:
    text = shell("--help").stdout
    assert "[--dry_run]" in text and "--lora_target_modules" in text


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A stand-in for the interpreter: notes how it is called; `$CHECK` and `$LAUNCH` are what it ends with."""
    file = tmp_path / "bin dir" / "python"
    file.parent.mkdir()
    file.write_text(
        '#!/bin/bash\nprintf "%q " "$@" >> "$CALLS"; echo >> "$CALLS"\n'
        'for word in "$@"; do [ "$word" = --check ] && exit "$CHECK"; done\n'
        '[ "$1" = -c ] && echo 5555 && exit 0\n'
        '[ -n "${MEANT:-}" ] && echo "$MEANT" > "$FINETUNE_STATUS_DIR/1"\nexit "$LAUNCH"\n'
    )
    file.chmod(0o755)
    return file


@pytest.mark.parametrize(
    ("check", "launch", "meant", "status", "calls"),
    [
        ("2", "0", "", 2, 2),  # the check refuses: nothing is launched
        ("0", "0", "", 0, 3),
        ("0", "1", "", 1, 3),
        ("0", "1", "2", 2, 3),  # the launcher says 1, the rank meant 2
        ("0", "1", "143", 143, 3),
    ],
)
def test_check_then_launch_and_the_status_that_was_meant(
    check: str, launch: str, meant: str, status: int, calls: int, python: Path, tmp_path: Path
) -> None:
    log = tmp_path / "calls"
    own = {"PYTHON": str(python), "CALLS": str(log), "CHECK": check, "LAUNCH": launch, "MEANT": meant}
    done = shell("-o", "my out", "--max_steps", "1", **own)
    assert done.returncode == status, done.stderr
    made = [shlex.split(line) for line in log.read_text().splitlines()]
    assert len(made) == calls
    assert made[1][0] == str(ROOT / "finetune" / "finetune.py") and made[1][-1] == "--check"
    assert made[1][made[1].index("-o") + 1] == "my out"
    if calls == 3:
        assert made[2][:2] == ["-m", "torch.distributed.run"]
        assert made[2][-len(made[1]) + 1 :] == made[1][:-1]  # the very options that were checked


def test_waiting_for_other_machines_is_said(python: Path, tmp_path: Path) -> None:
    own = {"PYTHON": str(python), "CALLS": str(tmp_path / "calls"), "CHECK": "0", "LAUNCH": "0"}
    done = shell(NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1", **own)
    assert "waiting for all 2 machines at 10.0.0.1:6001 (this is number 1)\n" in done.stderr


def test_a_real_run_from_another_folder_with_spaces(tiny_model_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my folder"
    folder.mkdir()
    (folder / "my model").symlink_to(tiny_model_path)
    words = [
        "-m",
        "my model",
        "-o",
        "my out",
        "--use_lora",
        "True",
        "--max_steps",
        "2",
        "--save_strategy",
        "no",
    ]
    done = shell(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "my out" / "adapter_model.safetensors").is_file()
    assert done.stderr.count("chosen by --preset auto:") == 1, "by the check, and not again by the run"
    assert done.stderr.rstrip().endswith("python fast_start/simple_try_0.py --adapter 'my out'")
    again = shell(*words, cwd=folder)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith(
        "error: my out: holds a finished run; nothing is overwritten"
    )
