"""What stops a run from outside: a signal that asks for a checkpoint, a launcher that has died."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from qwen_chat.console import rank_zero

STOPPED = 143  # 128 + SIGTERM: what a run ends with that saved because it was asked to stop
SAME_REQUEST = 1.0  # seconds


class StopSignal:
    """SIGTERM and SIGUSR1 (preemption) ask for a checkpoint at the next step; a second one ends at once.

    Within a second of the first it is the same request on another way (scheduler and launcher both pass it on).
    A thread reads them: the main thread may be inside a collective that waits for a rank that is gone. Where
    a rank on this machine has died the first signal already ends this one: there is no next step to wait for.
    """

    def __init__(self, siblings: Iterable[int] = ()) -> None:
        self.requested = False
        self._siblings = [pid for pid in siblings if pid != os.getpid()]
        self._old: dict[int, Any] = {}
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._old[number] = signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        with contextlib.suppress(OSError):
            os.write(self._writer, b"\0")  # ends the thread

    def _listen(self) -> None:
        first = 0.0
        while (number := os.read(self._reader, 1)[0]) != 0:
            if number not in (signal.SIGTERM, signal.SIGUSR1):
                continue
            if not all(map(_alive, self._siblings)):
                os._exit(STOPPED)
            if self.requested:
                if time.monotonic() - first > SAME_REQUEST:
                    os._exit(STOPPED)
                continue
            self.requested, first = True, time.monotonic()
            rank_zero(f"{signal.Signals(number).name}: a checkpoint at the next step, then the end")


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2]
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return state.split()[0] not in ("Z", "X")


def die_with_parent() -> None:
    """A rank whose launcher is gone (even by SIGKILL) ends too, instead of training on unseen. Linux only."""
    if not sys.platform.startswith("linux") or "WORLD_SIZE" not in os.environ:
        return
    pr_set_pdeathsig = 1
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the tie was made
        os._exit(STOPPED)
