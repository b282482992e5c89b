"""Functions that run in a thread which ends: results, errors, and what becomes of OpenMP's workers."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from qwen_chat.threads import in_own_thread


def threads_of_this_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_result_and_arguments() -> None:
    seen = []

    @in_own_thread
    def add(a: int, *, b: int) -> int:
        seen.append(threading.current_thread())
        return a + b

    assert add(1, b=2) == 3
    assert add.__name__ == "add"
    assert seen[0] is not threading.current_thread()
    assert not seen[0].is_alive()


def test_an_exception_is_the_callers() -> None:
    @in_own_thread
    def fail() -> None:
        raise ValueError("as it was")

    with pytest.raises(ValueError, match="as it was"):
        fail()


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has no workers")
def test_workers_end_with_the_thread() -> None:
    def multiply() -> int:
        torch.set_num_threads(2)
        left = torch.randn(600, 600)
        torch.mm(left, left)
        return threads_of_this_process()

    inside = in_own_thread(multiply)()
    deadline = time.monotonic() + 10  # the workers end a moment after their thread
    while threads_of_this_process() > inside - 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads_of_this_process() <= inside - 2  # the thread, and a worker of its own


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has no workers")
def test_an_import_leaves_no_worker() -> None:
    """One in the main thread made a step of the demo model take 27 ms in place of 17."""
    program = (
        "import os, torch\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = count()\n"
        "import qwen_chat.inference.engine, qwen_chat.service.app\n"
        "print(count() - before)\n"
    )
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout == "0\n"
