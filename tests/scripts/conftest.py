"""finetune.py in this process: torch is imported once."""

import runpy
import sys

import pytest

from qwen_chat import errors
from tests.support.scripts import ROOT, Finetune


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Finetune:
    """Run finetune.py's main; its status and what it said."""

    import torch

    from qwen_chat.training import matmul

    torch.set_num_threads(1)  # the model is tiny: a second thread only waits
    monkeypatch.setattr(matmul, "fastest", lambda *_: matmul.Route("torch", "not measured in a test"))
    main = runpy.run_path(str(ROOT / "finetune" / "finetune.py"))["main"]

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
        capsys.readouterr()
        status = errors.run(main)
        out, err = capsys.readouterr()
        assert out == ""
        return status, err

    return run
