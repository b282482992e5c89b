"""The package as a wheel: `pip install .` takes qwen_chat with all its wings, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools import build_meta; build_meta.build_wheel('wheel')"


def test_the_wheel_holds_the_package_alone_and_names_what_it_needs(tmp_path: Path) -> None:
    for folder in ("qwen_chat", "finetune", "fast_start"):
        for source in (ROOT / folder).rglob("*.py"):
            target = tmp_path / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    for name in ("pyproject.toml", "README.md", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)

    done = subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    (file,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(file) as wheel:
        code = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        needs = {
            line.split(": ")[1]
            for line in wheel.read(metadata).decode().splitlines()
            if line.startswith("Requires-Dist: ")
        }
    assert code == {str(path.relative_to(ROOT)) for path in (ROOT / "qwen_chat").rglob("*.py")}
    pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert needs == {line.split("#")[0].strip() for line in pinned} - {""}
