"""finetune.sh with several processes: signals, launchers, a rank that dies, two machines."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runs import ROOT, curve, finish, last_step, weights

SHELL = str(ROOT / "finetune" / "finetune.sh")
ZERO2, ZERO3 = (str(ROOT / "finetune" / f"ds_config_zero{stage}.json") for stage in (2, 3))


def words(tiny: Path, data: Path, *more: str) -> list[str]:
    flags = [
        "-m",
        str(tiny),
        "-d",
        str(data),
        "--learning_rate",
        "1e-3",
        "--per_device_train_batch_size",
        "2",
    ]
    flags += ["--gradient_accumulation_steps", "2", "--save_strategy", "steps", "--save_steps", "1000"]
    return [*flags, "--model_max_length", "256", *more]


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """A test that fails must not leave a run behind that eats the machine."""
    yield
    for folder in (tmp_path / name for name in ("run", "run of mine")):
        for program in ("finetune.sh", "torch.distributed.run", "finetune.py"):
            for pid in processes(folder, program):
                os.kill(pid, signal.SIGKILL)


def launch(flags: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    own = os.environ | {"GPUS_PER_NODE": "2", "OMP_NUM_THREADS": "1"} | environment
    log = (folder.parent / f"{folder.name}.sh.log").open("a")
    command = ["bash", SHELL, *flags, "-o", str(folder)]
    return subprocess.Popen(command, env=own, stdout=log, stderr=log, text=True, start_new_session=True)


def said(folder: Path) -> str:
    return (folder.parent / f"{folder.name}.sh.log").read_text(errors="replace")


def until(run: subprocess.Popen[str], folder: Path, step: int) -> None:
    end = time.monotonic() + 150
    while last_step(folder) < step:
        assert run.poll() is None, said(folder)[-3000:]
        assert time.monotonic() < end, said(folder)[-3000:]
        time.sleep(0.02)


def processes(folder: Path, program: str) -> list[int]:
    """Process ids whose command line names the folder, and `program` as what Python runs."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        runs = [word for word in line[1:4] if not word.startswith("-")][:1]
        if str(folder) in line and runs and runs[0].endswith(program):
            found.append(int(entry.name))
    return found


def ranks_of(folder: Path) -> list[int]:
    return processes(folder, "finetune.py")


@pytest.mark.timeout(400)
def test_stopped_under_torchrun_and_finished_under_deepspeed(
    tiny: Path, conversations: Path, tmp_path: Path
) -> None:
    flags = words(tiny, conversations, "--max_steps", "400", "--lr_scheduler_type", "constant")
    folder = tmp_path / "run of mine"  # a space in the path
    run = launch(flags, folder)
    until(run, folder, 3)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 143, said(folder)[-3000:]
    step = last_step(folder)
    assert (folder / f"checkpoint-{step}" / "manifest.json").exists(), said(folder)[-3000:]
    assert step < 400, "it ended before it was asked to stop"
    assert ranks_of(folder) == []

    # The rest under the other launcher; under a constant rate --max_steps may differ, --weight_decay may not.
    flags[flags.index("400")] = str(step + 3)
    refused = launch([*flags, "--weight_decay", "0.2"], folder, LAUNCHER="deepspeed")
    assert refused.wait(120) == 2
    assert "--weight_decay: 0.01 then, 0.2 now" in said(folder)
    again = launch(flags, folder, LAUNCHER="deepspeed")
    assert again.wait(200) == 0, said(folder)[-3000:]
    assert f"resumed from checkpoint-{step}" in said(folder)
    whole = tmp_path / "whole"
    finish([*flags, "--deepspeed", ZERO3], whole, ranks=2)
    pairs = list(zip(curve(folder), curve(whole), strict=True))
    assert max(abs(a - b) for a, b in pairs) < 2e-4, pairs


@pytest.mark.timeout(300)
def test_a_killed_rank_ends_the_run(tiny: Path, conversations: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = launch(words(tiny, conversations, "--max_steps", "100000", "--deepspeed", ZERO2), folder)
    until(run, folder, 2)
    ranks = ranks_of(folder)
    assert len(ranks) == 2
    os.kill(max(ranks), signal.SIGKILL)
    assert run.wait(60) not in (0, 2)
    assert ranks_of(folder) == []
    assert "SIGKILL" in said(folder) or "exitcode" in said(folder)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_launcher_takes_its_ranks_along(tiny: Path, conversations: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = launch(words(tiny, conversations, "--max_steps", "100000", "--deepspeed", "none"), folder)
    until(run, folder, 2)
    assert len(ranks_of(folder)) == 2
    (launcher,) = processes(folder, "torch.distributed.run")
    os.kill(launcher, signal.SIGKILL)
    run.wait(60)
    end = time.monotonic() + 20
    while ranks_of(folder) and time.monotonic() < end:
        time.sleep(0.1)
    assert ranks_of(folder) == []


# ------------------------------------------------------------------------------------------------ two machines


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces with an address each, joined by a cable."""
    names = [f"qc{os.getpid()}a", f"qc{os.getpid()}b"]
    made = [["netns", "add", name] for name in names]
    made += [["link", "add", names[0], "type", "veth", "peer", "name", names[1]]]
    for number, name in enumerate(names, 1):
        made += [
            ["link", "set", name, "netns", name],
            ["-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", name],
            ["-n", name, "link", "set", name, "up"],
            ["-n", name, "link", "set", "lo", "up"],
        ]
    try:
        for words_ in made:
            done = subprocess.run(["ip", *words_], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: ip {' '.join(words_)}: {done.stderr.strip()}")
        yield names
    except FileNotFoundError:
        pytest.skip("no network namespaces here: the command ip is missing")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_machines(machines: list[str], tiny: Path, conversations: Path, tmp_path: Path) -> None:
    flags = words(tiny, conversations, "--max_steps", "5", "--deepspeed", ZERO2)
    folder = tmp_path / "run"
    own = os.environ | {"GPUS_PER_NODE": "1", "OMP_NUM_THREADS": "1", "NNODES": "2"}
    own |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "6001"}
    runs = []
    for rank, name in enumerate(machines):
        environment = own | {"NODE_RANK": str(rank), "GLOO_SOCKET_IFNAME": name}
        command = ["ip", "netns", "exec", name, "bash", SHELL, *flags, "-o", str(folder)]
        pipe = subprocess.PIPE
        runs.append(subprocess.Popen(command, env=environment, stderr=pipe, stdout=pipe, text=True))
    outputs = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], [output[1][-3000:] for output in outputs]
    assert "waiting for all 2 machines at 10.77.0.1:6001 (this is number 1)" in outputs[1][1]
    assert json.loads((folder / "run.json").read_text())["world_size"] == 2
    finish(flags, tmp_path / "one", ranks=2)
    assert curve(folder) == pytest.approx(curve(tmp_path / "one"), abs=1e-5)
    assert weights(folder).keys() == weights(tmp_path / "one").keys()
