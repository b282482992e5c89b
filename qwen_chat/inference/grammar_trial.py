"""A grammar is compiled in a process of its own first, where it cannot hurt: a trial with limits.

In: a grammar's source. Out: what is wrong with it, or None. llguidance checks that every value of a schema can
exist, and for `multipleOf` that walks an automaton with a state for each remainder; of several the products.
None of its own limits covers that: a schema of 250 bytes takes minutes and all memory. So a small process,
which has no torch and a vocabulary of bytes, forks for each grammar; the fork has a limit of processor time
and of memory, and the system ends it where it goes beyond.

This file is also what that process runs, so it imports nothing of the package.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any, NoReturn, cast

# Of the parser and its lexer, here and where the grammar is used. The defaults allow 250,000 states, half a
# gigabyte, and an honest schema has a few thousand.
LIMITS = {
    "initial_lexer_fuel": 2_000_000,
    "step_lexer_fuel": 400_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 50_000,
}
# Of the processor. An honest schema of 60,000 characters takes 0.03, and 128 tools of 20 properties 0.2.
CPU_SECONDS, CPU_SECONDS_PER_BYTE, MOST_CPU_SECONDS = 0.25, 3e-6, 1.0
MEMORY_BYTES = 64 * 2**20  # beside what the process has already
WALL_SECONDS = 8.0  # where the machine is busy with other things
TOO_LARGE = "it is too complex to decode under; a large 'multipleOf' or several of them are the usual reason"
LATE = "it could not be tried in time; try again later"  # says nothing of the grammar


class GrammarTrial:
    """The process that tries grammars; started on first use, again where it is gone. For any thread."""

    def __init__(self, *, cpu_seconds: float = CPU_SECONDS, memory_bytes: int = MEMORY_BYTES) -> None:
        """What a small grammar may cost; a long one has more time."""
        self._cpu_seconds, self._memory_bytes = cpu_seconds, memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def problem(self, source: str) -> str | None:
        """What is wrong with a grammar in llguidance's Lark dialect; None where it may be used. LATE where the
        machine was too busy to say."""
        longer = self._cpu_seconds + CPU_SECONDS_PER_BYTE * len(source)
        cpu = max(self._cpu_seconds, min(longer, MOST_CPU_SECONDS))
        task = {"source": source, "cpu": cpu, "memory": self._memory_bytes}
        line = json.dumps(task).encode() + b"\n"
        with self._lock:
            for _ in range(2):  # a process that somebody ended meanwhile is started once more
                if self._process is None or self._process.poll() is not None:
                    self._process = subprocess.Popen(
                        # -P: our folder is no place to import from
                        [sys.executable, "-P", str(Path(__file__).resolve())],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,  # Rust tells there that memory ran out
                        start_new_session=True,  # Ctrl-C is for us
                    )
                    # At the end of this object, or of the program.
                    weakref.finalize(self, _end, self._process)
                try:
                    answer = _ask(self._process, line)
                except OSError:
                    answer = b""
                if answer:
                    return cast(str | None, json.loads(answer)["problem"])
                self.close()
        return LATE

    def close(self) -> None:
        """End the process. A later grammar starts it again."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)


def _ask(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    """One line in, one line out; empty where none comes in time."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(line)
    process.stdin.flush()
    until, answer = time.monotonic() + 2 * WALL_SECONDS, b""  # the first also waits for Python to start
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not answer.endswith(b"\n"):
            came = selector.select(until - time.monotonic())
            piece = os.read(process.stdout.fileno(), 65_536) if came else b""
            if not piece:
                return b""
            answer += piece
    return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.kill()
    process.wait()


# --- in the process ------------------------------------------------------------------------------


class _Bytes:
    """A vocabulary of bytes and an end."""

    eos_token_id, bos_token_id = 256, None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<|end|>")
    special_token_ids = (256,)

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def _answer(problem: str | None) -> None:
    os.write(1, json.dumps({"problem": problem}).encode() + b"\n")


def _try(task: dict[str, Any], tokenizer: Any) -> NoReturn:
    """Compile one grammar under limits, tell what is wrong with it, and end."""
    import resource

    from llguidance import LLMatcher, LLParserLimits

    os.close(0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # a system without /proc has the limit of time alone
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + task["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, task["cpu"])
    limits = LLParserLimits(**LIMITS, verbose_errors=False)
    matcher = LLMatcher(tokenizer, task["source"], log_level=0, limits=limits)
    matcher.compute_bitmask()
    _answer(matcher.get_error() if matcher.is_error() else None)
    os._exit(0)


def main() -> None:
    """Try the grammars on standard input, a JSON object a line: `source`, `cpu` (seconds), `memory` (bytes)."""
    from llguidance import LLTokenizer, TokenizerWrapper

    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()), eos_token=256)  # type: ignore[arg-type]
    for line in sys.stdin.buffer:
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                _try(task, tokenizer)
            finally:
                os._exit(1)  # a MemoryError: the parent tells
        _, status = os.waitpid(child, 0)
        if status != 0:
            _answer(LATE if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else TOO_LARGE)


if __name__ == "__main__":
    main()
