"""A script of the checkout as a person starts it: in this process, or many times from one that has imported it."""

import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]

# (exit status, what was said, what was printed)
Ran = tuple[int, str, str]
# finetune.py's words to (exit status, what was said): the fixture `finetune`.
Finetune = Callable[..., tuple[int, str]]


def runner(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """A function of the script's words; script: its path in the checkout."""

    def run(*words: str) -> Ran:
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *words])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.err, said.out

    return run


def run_here(
    script: str, *words: str, typed: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """What subprocess.run gives of a script, which runs in this process: torch is imported once."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", [str(ROOT / script), *words])
        patch.setattr(sys, "stdin", io.StringIO(typed))
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            status = int(stop.code or 0)
    return subprocess.CompletedProcess([script, *words], status, out.getvalue(), err.getvalue())


# Imports what the script's --help does, then is forked for each list of words on standard input.
FORKED = """
import contextlib, io, json, os, runpy, sys, time
script, folder = sys.argv[1:]
sys.argv = [script, "--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    runpy.run_path(script, run_name="__main__")
ends = []
for number, words in enumerate(json.load(sys.stdin)):
    began = time.monotonic()
    child = os.fork()
    if not child:
        for stream, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}/{number}.{kind}", os.O_CREAT | os.O_WRONLY), stream)
        sys.argv = [script, *words]
        try:
            runpy.run_path(script, run_name="__main__")
        finally:
            print("torch" in sys.modules)
        sys.exit()
    ends.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - began))
print(json.dumps(ends))
"""


class Started(NamedTuple):
    """One start of a script: `printed` ends with whether torch was imported."""

    status: int
    said: str
    printed: str
    seconds: float


def starts(script: str, each: Sequence[Sequence[str]], folder: Path) -> list[Started]:
    """The script with each list of words, from the checkout and without a GPU; an interpreter is started once."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(ROOT / script), str(folder)],
        input=json.dumps(each),
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "API_KEY"}
        | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    found = []
    for number, (status, seconds) in enumerate(json.loads(done.stdout)):
        said, printed = ((folder / f"{number}.{kind}").read_text(encoding="utf-8") for kind in ("err", "out"))
        found.append(Started(status, said, printed, seconds))
    return found
