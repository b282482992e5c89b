"""The engine on the newest torch that the index serves, in an environment of its own beside this one's packages."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from filelock import FileLock

from qwen_chat.files import cache_dir

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("native", ["1", "0"], ids=["native step", "torch"])
def test_the_engine_passes_its_tests_on_the_newest_torch(native: str) -> None:
    """Newest is what pip finds where no constraint caps it; every other package is the one that runs this test."""
    folder = cache_dir() / "newest-torch"
    folder.mkdir(parents=True, exist_ok=True)
    python = folder / "env" / "bin" / "python"
    with FileLock(folder / "lock"):
        subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
        words = ["-m", "pip", "install", "--quiet", "--only-binary", ":all:", "--upgrade", "torch"]
        uncapped = {**os.environ, "PIP_CONSTRAINT": os.devnull}
        subprocess.run([python, *words], check=True, timeout=1500, env=uncapped)
        ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        own = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
        (folder / "ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        (folder / "ours.pth").replace(f"{own}/ours.pth")
        ask = "import torch; print(torch.__version__, torch.__file__)"
        version = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout
        assert own in version  # its own torch, not the one beside it
        files = ["tests/inference/test_quantize.py", "tests/inference/test_engine.py"]
        words = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
        found = subprocess.run(
            [python, *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=800,
            env={**os.environ, "QWEN_CHAT_NATIVE": native},
        )
    assert found.returncode == 0, version + found.stdout[-3000:]
