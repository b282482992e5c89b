"""`qwen-chat tune`: how many processes, which launcher, and what becomes of their statuses and of signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_chat import hardware
from qwen_chat.cli import launch
from qwen_chat.errors import OptionError
from qwen_chat.flags.run_problems import read_run

ROOT = Path(__file__).resolve().parents[2]
RUN = read_run(["-d", "x", "--use_lora"])
MAIN = "import sys; from qwen_chat.cli.main import main; sys.argv[0] = 'qwen-chat'; sys.exit(main())"


def test_one_process_for_each_gpu_or_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUS_PER_NODE", raising=False)
    assert launch.processes(RUN) == 1  # no GPU is here
    monkeypatch.setattr(hardware, "training_device", lambda *_, **__: hardware.Device("cuda", "faked"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert launch.processes(RUN) == 2
    monkeypatch.setenv("GPUS_PER_NODE", "4")
    assert launch.processes(RUN) == 4
    monkeypatch.setenv("GPUS_PER_NODE", "all")
    with pytest.raises(OptionError, match="GPUS_PER_NODE=all: expected a number"):
        launch.processes(RUN)


@pytest.mark.parametrize(("shown", "count"), [("", 0), ("-1", 0), ("0", 1), ("0, 1,GPU-5", 3)])
def test_the_gpus_that_this_process_may_use(shown: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert hardware.gpus() == count
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(hardware, "_nvidia_smi", lambda fields: [["0"], ["1"]])
    assert hardware.gpus() == 2


def test_several_processes_cut_the_model_up_where_deepspeed_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.engine(RUN) == ["--deepspeed", "zero3"]
    assert launch.engine(read_run(["-d", "x", "--q_lora"])) == ["--deepspeed", "zero2"]
    assert launch.engine(read_run(["-d", "x", "--deepspeed", "zero2"])) == []
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert launch.engine(RUN) == []
    assert capsys.readouterr().err == "DeepSpeed is not installed: each process holds the whole model\n"


@pytest.mark.parametrize(("code", "status"), [("pass", 0), ("import sys; sys.exit(3)", 3)])
def test_the_launcher_s_status(code: str, status: int) -> None:
    assert launch.wait([sys.executable, "-c", code], dict(os.environ)) == status


def test_a_signal_is_handed_on() -> None:
    child = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(5)); print(1, flush=True)"
    code = (
        "import os, sys\nfrom qwen_chat.cli import launch\n"
        f"sys.exit(launch.wait([sys.executable, '-c', {child + '; time.sleep(60)'!r}], dict(os.environ)))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "1\n"
        time.sleep(0.1)
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(20) == 128 + signal.SIGTERM


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_train_one_model(tiny_model_path: Path, tmp_path: Path) -> None:
    """Without DeepSpeed's files: each holds the model. A refusal of the check is the whole answer."""
    data = ROOT / "finetune" / "io_file" / "input_data" / "example_data.jsonl"
    out = tmp_path / "out"
    words = [
        "tune",
        "-m",
        str(tiny_model_path),
        "-d",
        str(data),
        "-o",
        str(out),
        "--use_lora",
        "--max_steps",
        "2",
    ]
    environment = {**os.environ, "GPUS_PER_NODE": "2"}
    command = [sys.executable, "-c", MAIN, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    run = json.loads((out / "run.json").read_text())
    assert (run["state"], run["world_size"], run["options"]["deepspeed"]) == ("finished", 2, "zero3")
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1] == (
        f"error: {out}: holds a finished run; nothing is overwritten: give a new folder with -o"
    )
