"""A script of the checkout run in this process, as a person starts it."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# (exit status, what was said, what was printed)
Ran = tuple[int, str, str]


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
