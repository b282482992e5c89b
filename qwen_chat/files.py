"""Files and folders that are whole or not there: made aside, flushed, renamed into place.

In: what makes a folder. Out: the folder, built once however many processes ask for it at the same time.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_chat.console import rank_zero
from qwen_chat.errors import ModelError

SILENT_WAIT = 1.0  # seconds that a process waits for another's build without a word


def cache_dir() -> Path:
    """Where everything downloaded goes: `$QWEN_CHAT_CACHE`, else `~/.cache/qwen_chat`. Not created here."""
    return Path(os.environ.get("QWEN_CHAT_CACHE") or Path.home() / ".cache" / "qwen_chat").expanduser()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Make `folder` by calling `build(aside)`, then rename: whole or absent, whatever interrupts it.

    A lock file keeps two processes from building the same folder; what a killed process left aside is
    removed. Raises ModelError when the cache cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f".{folder.name}.lock"), folder):
            if not folder.is_dir():  # another process may have built it while this one waited
                _build_aside(folder, build)
    except OSError as error:
        raise ModelError(
            f"{folder}: cannot be written ({error}); free some disk space there, or set QWEN_CHAT_CACHE"
        ) from None
    return folder


def _build_aside(folder: Path, build: Callable[[Path], None]) -> None:
    prefix = f".{folder.name}.partial-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # we hold the lock, so nobody is writing these
        shutil.rmtree(leftover, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        build(aside)
        for path in [*aside.rglob("*"), aside]:  # some writers make private files; a cache may be shared
            if not path.is_symlink():  # what a link points to is not ours to change
                path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o644))
                _fsync(path)
        aside.rename(folder)
        _fsync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def _lock(path: Path, made: Path) -> Iterator[None]:
    with path.open("w") as handle:  # the kernel releases it with the process, however that ends
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = threading.Timer(SILENT_WAIT, rank_zero, [f"waiting for another process that makes {made}"])
            said.daemon = True
            said.start()
            fcntl.flock(handle, fcntl.LOCK_EX)
            said.cancel()
        yield


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
