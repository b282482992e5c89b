"""Runs of finetune.py as real processes that start in a second: forked from a server that has imported torch.

In: flags, a number of ranks. Out: a Started run whose processes can be killed and whose words can be read.
"""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "finetune" / "finetune.py"
ALONE = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the server starts: two ranks share two cores
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["qwen_chat.training.trainer", "qwen_chat.chat.format", "peft", "deepspeed"])


def _main(words: list[str], environment: dict[str, str], log: str) -> None:
    """In the child: be finetune.py."""
    os.setsid()
    for name in ALONE:
        os.environ.pop(name, None)
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from qwen_chat.training import matmul

    # Two fresh runs may measure different routes; the order of sums, and with it the last bits, is the route's.
    route = environment.get("TEST_MATMUL", "torch")
    matmul.fastest = lambda *_: matmul.Route(route, "fixed by the test")
    sys.argv = [str(SCRIPT), *words]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(stop.code or 0))


@dataclass
class Started:
    """A run's processes, one a rank, and where their words go."""

    processes: list[Any]
    logs: list[Path]
    folder: Path
    begun: float = field(default_factory=time.monotonic)

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit status of each rank; -9 where it was killed."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
            if process.is_alive():
                self.kill()
                raise AssertionError(f"still running after {seconds} s:\n{self.said()}")
        return [int(process.exitcode) for process in self.processes]

    def send(self, number: int, rank: int | None = None) -> None:
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join(20)

    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def until_said(self, text: str, seconds: float = 90) -> None:
        """Wait until rank 0 has said this."""
        end = time.monotonic() + seconds
        while text not in (self.logs[0].read_text(errors="replace") if self.logs[0].exists() else ""):
            assert self.processes[0].is_alive(), self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.01)

    def until(self, step: int, seconds: float = 90) -> bool:
        """Wait until `step` is in the log; False where the run ended before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if last_step(self.folder) >= step:
                return True
            if not any(process.is_alive() for process in self.processes):
                return False
            time.sleep(0.01)
        raise AssertionError(f"no step {step} after {seconds} s:\n{self.said()}")


def start(words: list[str], folder: Path, *, ranks: int = 1, **environment: str) -> Started:
    """Start finetune.py with these flags and `-o folder`."""
    number = len(list(folder.parent.glob(f"{folder.name}.*.log")))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes, logs = [], []
    for rank in range(ranks):
        own = dict(environment)
        if ranks > 1:
            own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            own |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        log = folder.parent / f"{folder.name}.{number}.{rank}.log"
        process = _context.Process(target=_main, args=([*words, "-o", str(folder)], own, str(log)))
        process.start()
        processes.append(process)
        logs.append(log)
    return Started(processes, logs, folder)


def finish(words: list[str], folder: Path, *, ranks: int = 1, **environment: str) -> Started:
    """Start a run and see it end well."""
    run = start(words, folder, ranks=ranks, **environment)
    statuses = run.wait()
    assert statuses == [0] * ranks, run.said()
    return run


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """The step lines of train_log.jsonl, a half-written last one left out."""
    file = folder / "train_log.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [line for line in lines if "loss" in line]


def last_step(folder: Path) -> int:
    lines = log_lines(folder)
    return int(lines[-1]["step"]) if lines else 0


def curve(folder: Path) -> list[float]:
    return [float(line["loss"]) for line in log_lines(folder)]


def weights(folder: Path) -> dict[str, bytes]:
    """What was learnt, byte for byte."""
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                found[name] = tensors.get_tensor(name).contiguous().numpy().tobytes()
    return found
