"""`qwen-chat tune`: one process, or torchrun's ranks, one for each GPU, after everything has been checked.

In: the words of a run; GPUS_PER_NODE, else the GPUs seen here. Out: the exit status that the ranks mean. Several
machines: finetune/finetune.sh of a checkout, or torchrun itself with `-m qwen_chat.cli.tune`.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qwen_chat import hardware
from qwen_chat.cli import tune
from qwen_chat.console import rank_zero
from qwen_chat.errors import OptionError
from qwen_chat.flags import run_problems
from qwen_chat.flags.run_options import Run

SHUTDOWN_SECONDS = 600  # to write a checkpoint after a signal
RANK_MODULE = "qwen_chat.cli.tune"
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def main(argv: Sequence[str]) -> int:
    run = run_problems.read_run(argv, about=str(tune.__doc__))
    ranks = processes(run)
    if ranks < 2:
        return tune.main(argv)
    words = [*argv, *engine(run)]
    environment = dict(os.environ, FINETUNE_RANKS=str(ranks), FINETUNE_RANKS_HERE=str(ranks))
    # A launcher turns a rank's one clear line into a traceback: what can be known is checked before.
    checked = subprocess.run(
        [sys.executable, "-m", RANK_MODULE, *words, "--check"], env=environment
    ).returncode
    if checked or run.train.check:
        return checked
    if not hardware.gpus():
        environment.setdefault("OMP_NUM_THREADS", str(max(1, hardware.cores() // ranks)))
    with tempfile.TemporaryDirectory() as statuses:
        environment["FINETUNE_STATUS_DIR"] = statuses
        status = wait(torchrun(ranks, words), environment)
        meant = [int(file.read_text()) for file in Path(statuses).iterdir()]
    return max(meant) if status and meant else status


def processes(run: Run) -> int:
    """How many processes this machine is to run: as told, else one for each GPU that the run may use."""
    told = os.environ.get("GPUS_PER_NODE")
    if told is None:
        device = hardware.training_device(run.train.device, use_cpu=bool(run.extra.get("use_cpu")))
        return hardware.gpus() if device.kind == "cuda" else 1
    if not told.isdecimal():
        raise OptionError(f"GPUS_PER_NODE={told}: expected a number")
    return int(told)


def engine(run: Run) -> list[str]:
    """The words that cut the model up over several ranks, where nothing was asked for and DeepSpeed is installed."""
    if "deepspeed" in run.given:
        return []
    if importlib.util.find_spec("deepspeed") is None:
        rank_zero("DeepSpeed is not installed: each process holds the whole model")
        return []
    # ZeRO-3 cuts the weights up over the processes, which 4-bit weights do not allow.
    return ["--deepspeed", "zero2" if run.method == "qlora" else "zero3"]


def torchrun(ranks: int, words: Sequence[str]) -> list[str]:
    """The launcher's command line."""
    signals = ",".join(number.name for number in (*PASSED_ON, signal.SIGQUIT))
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)),
        *("--shutdown_timeout", str(SHUTDOWN_SECONDS), "--signals_to_handle", signals),
        *("-m", RANK_MODULE, *words),
    ]


def wait(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a launcher, hand signals on to it, and wait for its end: 128 + the signal where it ended by one."""
    caught: list[int] = []
    launcher = subprocess.Popen(command, env=environment, start_new_session=True)

    def hand_on(number: int, frame: object) -> None:
        caught.append(number)
        launcher.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in PASSED_ON}
    try:
        status = launcher.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + caught[0] if status and caught else status
