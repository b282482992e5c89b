"""The Python environments of the projects that ours is measured against, and the programs inside them.

In: pinned packages. Out: the interpreter of an environment that holds them, built once under the cache folder
and named after what is in it: another version is another environment, and no measurement meets an old one.
"""

import hashlib
import importlib.metadata
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from qwen_chat import files
from qwen_chat.console import rank_zero
from qwen_chat.errors import ChatError


class PeerMissing(ChatError):
    """A peer that pip cannot install here; the message holds pip's own last words."""


def python_of(packages: Sequence[str], *, remove: Sequence[str] = (), beside_ours: bool = False) -> Path:
    """The interpreter of an environment with `packages` ("trl==1.16.0"), less those in `remove`.

    `beside_ours`: the packages of this environment are seen there too, so that torch is the same to the file.
    Raises PeerMissing where pip fails; then nothing is left behind.
    """

    def build(folder: Path) -> None:
        rank_zero(f"building an environment with {', '.join(packages)} (once)")
        python = str(folder / "bin" / "python")
        _run([sys.executable, "-m", "venv", str(folder)])
        if beside_ours:
            place = _run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).strip()
            (Path(place) / "ours.pth").write_text(packages_here + "\n", encoding="utf-8")
        _run([python, "-m", "pip", "install", "--quiet", *packages])
        if remove:
            _run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *remove])

    packages_here = sysconfig.get_paths()["purelib"]  # another checkout's environment may be gone tomorrow
    key = "\n".join(
        [sys.version, packages_here if beside_ours else "", *packages, *(f"-{name}" for name in remove)]
    )
    name = f"{packages[0].partition('=')[0]}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    return files.build_once(files.cache_dir() / "peers" / name, build) / "bin" / "python"


def ours(*names: str) -> tuple[str, ...]:
    """Pins of packages at the versions of this environment: ("torch==2.13.0", ...)."""
    return tuple(f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in names)


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = " ".join(done.stderr.split())[-300:]
        raise PeerMissing(f"{' '.join(command[:6])} ... failed: {words}; check the network and the disk")
    return done.stdout
