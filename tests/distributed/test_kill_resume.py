"""Killed at any moment and resumed is never killed: the same weights, bit for bit; and how a run is stopped."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.support.runs import ROOT, Started, curve, finish, last_step, start, weights

ZERO2, ZERO3 = (str(ROOT / "finetune" / f"ds_config_zero{stage}.json") for stage in (2, 3))
STEPS = 15  # 44 conversations in steps of 8: the third epoch begins at step 13
LORA = ["--use_lora", "True", "--lora_r", "4", "--lora_dropout", "0.1", "--learning_rate", "1e-2"]
QLORA = ["--q_lora", *LORA[1:]]
FULL = ["--learning_rate", "1e-3"]


@dataclass(frozen=True)
class Case:
    flags: list[str]
    ranks: int = 1
    batch: int = 4


CASES = {
    "lora": Case(LORA),
    "full": Case(FULL),
    "qlora": Case(QLORA),
    "lora tokens bias": Case([*LORA, "--trainable_tokens", "<|im_end|>", "--lora_bias", "all"]),
    "pissa": Case([*LORA, "--lora_init", "pissa"]),
    "full 2 ranks": Case(FULL, ranks=2, batch=2),
    "lora 2 ranks": Case(LORA, ranks=2, batch=2),
    "full ZeRO-2": Case([*FULL, "--deepspeed", ZERO2], ranks=2, batch=2),
    "lora ZeRO-2": Case([*LORA, "--deepspeed", ZERO2], ranks=2, batch=2),
    "full ZeRO-3": Case([*FULL, "--deepspeed", ZERO3], ranks=2, batch=2),
}
DEFAULT = {"lora": 2, "full": 1, "qlora": 1, "full ZeRO-2": 1, "full 2 ranks": 1}  # kills
PARAMETERS = [
    *(pytest.param(name, kills, id=f"{name} {kills}") for name, kills in DEFAULT.items()),
    *(pytest.param(name, 5, id=f"{name} 5", marks=pytest.mark.slow) for name in CASES),
]


def words(tiny: Path, data: Path, case: Case, *more: str) -> list[str]:
    return [
        *("-m", str(tiny), "-d", str(data), *case.flags, "--model_max_length", "256"),
        *("--per_device_train_batch_size", str(case.batch), "--gradient_accumulation_steps", "2"),
        *("--max_steps", str(STEPS), "--save_strategy", "steps", "--save_steps", "2", *more),
    ]


@pytest.fixture(scope="module")
def uninterrupted(
    tiny: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of a case's run that nobody broke off; made once."""

    @cache
    def of(name: str) -> Path:
        folder = tmp_path_factory.mktemp("uninterrupted") / "run"
        finish(words(tiny, conversations, CASES[name]), folder, ranks=CASES[name].ranks)
        return folder

    return of


@pytest.mark.parametrize(("name", "kills"), PARAMETERS)
@pytest.mark.timeout(600)
def test_killed_and_resumed_is_never_killed(
    name: str,
    kills: int,
    tiny: Path,
    conversations: Path,
    uninterrupted: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    case = CASES[name]
    flags = words(tiny, conversations, case)
    whole = uninterrupted(name)
    lasted = json.loads((whole / "run.json").read_text())["seconds"]
    chance = random.Random(f"{name} {os.environ.get('KILL_SEED', '1')}")
    folders = [tmp_path / "killed"]
    for _ in range(kills):
        while True:
            folder = folders[-1]
            run = start(flags, folder, ranks=case.ranks)
            run.until_said("training into")
            time.sleep(chance.random() * lasted * 0.5)  # into a step, a save, an epoch's end, the last save
            if any(process.is_alive() for process in run.processes):
                run.kill()
                break
            assert run.wait() == [0] * case.ranks, run.said()
            folders.append(tmp_path / f"killed {len(folders)}")  # it was faster: the next one is killed
    for folder in folders:
        if state_of(folder) != "finished":
            finish(flags, folder, ranks=case.ranks)
        assert weights(folder) == weights(whole)
        assert curve(folder) == curve(whole)
        assert not {".writing", ".lock"} & set(os.listdir(folder))


def state_of(folder: Path) -> str:
    file = folder / "run.json"
    return str(json.loads(file.read_text())["state"]) if file.exists() else "nothing"


@pytest.fixture
def stopped(tiny: Path, conversations: Path, tmp_path: Path) -> Started:
    """A LoRA run that was killed in step 5 or later: checkpoints 2 and 4 stand."""
    run = start(words(tiny, conversations, CASES["lora"]), tmp_path / "run")
    assert run.until(5)
    run.kill()
    return run


def test_resume_says_so_passes_over_damage_and_names_changes(
    stopped: Started,
    tiny: Path,
    conversations: Path,
    uninterrupted: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder, flags = stopped.folder, words(tiny, conversations, CASES["lora"])
    kept = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.partition("-")[2]))
    assert kept
    newest = kept[-1]

    # Under other options, data and weights: every change by name, nothing started.
    other = tmp_path / "other.jsonl"
    other.write_text("".join(conversations.read_text().splitlines(keepends=True)[1:]))
    model = shutil.copytree(tiny, tmp_path / "model")
    raw = bytearray((model / "model.safetensors").read_bytes())
    raw[-40_000:] = bytes(40_000)
    (model / "model.safetensors").write_bytes(raw)
    changed = [*words(model, other, CASES["lora"]), "--learning_rate", "5e-3", "--lora_dropout", "0"]
    refused = start(changed, folder)
    assert refused.wait() == [2]
    said = refused.said()
    assert "--learning_rate: 0.01 then, 0.005 now" in said
    assert "--lora_dropout: 0.1 then, 0.0 now" in said
    assert "the data has other content" in said
    assert "the model has other content" in said
    assert "--resume_anyway" in said

    # One flipped bit in the newest: an older one is taken, and this is said.
    file = newest / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run = finish(flags, folder, TEST_MATMUL="onednn")
    assert "matrix products by torch (as this run began)" in run.said()
    assert (
        f"{newest.name} is damaged (optimizer.pt has other content than was written): passed over"
        in run.said()
    )
    before = kept[-2].name if len(kept) > 1 else None
    assert (f"resumed from {before}" if before else "begins at step 0") in run.said()
    assert weights(folder) == weights(uninterrupted("lora"))


def test_sigterm_saves_and_ends_with_143(
    tiny: Path, conversations: Path, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    case = CASES["full ZeRO-2"]
    flags = words(tiny, conversations, case, "--save_steps", "1000")
    folder = tmp_path / "run"
    run = start(flags, folder, ranks=2)
    assert run.until(2)
    run.send(signal.SIGUSR1, rank=1)  # one rank is asked; all agree on the step
    assert run.wait(60) == [143, 143], run.said()
    step = last_step(folder)
    assert 2 <= step < STEPS
    assert (folder / f"checkpoint-{step}" / "manifest.json").exists()
    resumed = finish(flags, folder, ranks=2)
    assert f"resumed from checkpoint-{step}" in resumed.said()
    assert weights(folder) == weights(uninterrupted("full ZeRO-2"))  # how often it saves changes nothing


def test_a_folder_has_one_run_at_a_time(tiny: Path, conversations: Path, tmp_path: Path) -> None:
    flags = words(tiny, conversations, CASES["full"], "--max_steps", "100000", "--save_steps", "100000")
    folder = tmp_path / "run"
    run = start(flags, folder)
    assert run.until(1)
    second = start(flags, folder)
    assert second.wait() == [2]
    assert f"{folder}: a run is writing into it (process {run.processes[0].pid} on " in second.said()
    assert run.until(last_step(folder) + 1)
    run.send(signal.SIGUSR1)
    assert run.wait(60) == [143]
    step = last_step(folder)
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{step}"]


def test_a_second_signal_ends_at_once() -> None:
    program = (
        "import os, signal, sys, time\n"
        "from qwen_chat.training.stop_signal import StopSignal\n"
        "with StopSignal() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while not stop.requested: time.sleep(0.01)\n"
        "    print('requested', flush=True)\n"
        "    time.sleep(60)\n"  # a step that takes long
    )
    pipe = subprocess.PIPE
    run = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGTERM)
    assert run.stdout.readline() == "requested\n"
    run.send_signal(signal.SIGTERM)  # the same request on another way
    time.sleep(0.3)
    assert run.poll() is None
    time.sleep(1)
    run.send_signal(signal.SIGUSR1)
    assert run.wait(10) == 143
    run.communicate()


def test_a_rank_that_dies_ends_the_others(tiny: Path, conversations: Path, tmp_path: Path) -> None:
    flags = words(
        tiny, conversations, CASES["full 2 ranks"], "--max_steps", "100000", "--save_steps", "100000"
    )
    run = start(flags, tmp_path / "run", ranks=2)
    assert run.until(2)
    run.send(signal.SIGKILL, rank=1)
    begun = time.monotonic()
    run.processes[1].join(10)
    run.send(signal.SIGTERM, rank=0)  # what a launcher sends to those that are left
    statuses = run.wait(60)
    assert statuses[1] == -9
    assert statuses[0] != 0
    assert time.monotonic() - begun < 60
