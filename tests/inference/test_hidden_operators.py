"""The engine on a torch without the private operators that it is fast with (tests/support/hidden_operators.py)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

hidden = not hasattr(torch.ops.quantized, "linear_prepack")


def passes(*words: str, seconds: int) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.hidden_operators", "-q", "-x", *words]
    found = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True, timeout=seconds
    )
    assert found.returncode == 0, found.stdout[-3000:]


@pytest.mark.skipif(hidden, reason="this is that torch")
def test_layers_and_engine_pass_their_tests() -> None:
    """All tests of the layers, and those of the engine that multiply quantised weights or meet a number type."""
    passes(
        "tests/inference/test_quantize.py",
        "tests/inference/test_engine.py",
        "-k",
        "test_quantize or int8 or int4 or number_type",
        seconds=280,
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(hidden, reason="this is that torch")
def test_all_that_generates_passes_its_tests() -> None:
    passes("tests/inference", "tests/service", "tests/evaluation", "-m", "not slow", seconds=3500)
