"""Files and folders that are whole or not there: made aside, flushed, renamed into place; and one lock.

In: what makes a file or a folder. Out: the file or the folder; a folder is built once however many processes ask
for it at the same time.
"""

import contextlib
import glob
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from qwen_chat.console import rank_zero
from qwen_chat.errors import ModelError

SILENT_WAIT = 1.0  # seconds that a process waits for another's build without a word


def cache_dir() -> Path:
    """Where everything downloaded goes: `$QWEN_CHAT_CACHE`, else `~/.cache/qwen_chat`. Not created here."""
    return Path(os.environ.get("QWEN_CHAT_CACHE") or Path.home() / ".cache" / "qwen_chat").expanduser()


def sha256(path: Path) -> str:
    """Hash of a file's content (hex)."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file to the disk; of a folder, the names in it: renames then last through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def written_whole(path: Path, *, replace: bool = True) -> Iterator[TextIO]:
    """A text file to write into, which appears at `path` when all of it is on the disk.

    On any error nothing appears. replace=False: FileExistsError where a file is at `path` by then.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            aside.replace(path)
        else:
            os.link(aside, path)  # unlike a rename, never over a file that appeared meanwhile
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all, over what was there."""
    with written_whole(path) as file:
        file.write(text)


class Lock:
    """A file that one process at a time holds. The kernel lets go when the process ends, however it ends.

    signed: the file names its holder, and is removed when it is released.
    """

    def __init__(self, path: Path, *, signed: bool = False) -> None:
        # Imported late: it takes longer than everything else here, and most of who imports files takes no lock.
        from filelock import FileLock

        self.path, self._signed = path, signed
        self._lock = FileLock(path, fallback_to_soft=False)

    def take(self, seconds: float = 0) -> bool:
        """Whether it is held now, having waited at most so long; a negative number waits for as long as it takes.

        Raises OSError where the file cannot be made.
        """
        from filelock import Timeout

        try:
            self._lock.acquire(timeout=seconds)
        except Timeout:
            return False
        if self._signed:
            self.path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        return True

    def holder(self) -> str:
        """Who holds it, as far as that is told."""
        with contextlib.suppress(OSError):
            return self.path.read_text(encoding="utf-8", errors="replace")[:200].strip() or "another process"
        return "another process"

    def release(self) -> None:
        if self._signed:
            # While it is still held: who waits sees that, and makes a new one.
            self.path.unlink(missing_ok=True)
        self._lock.release()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Make `folder` by calling `build(aside)`, then rename: whole or absent, whatever interrupts it.

    A lock file keeps two processes from building the same folder; what a killed process left aside is
    removed. Raises ModelError when the cache cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder.with_name(f".{folder.name}.lock"))
        if not lock.take(SILENT_WAIT):
            rank_zero(f"waiting for another process that makes {folder}")
            lock.take(-1)
        try:
            if not folder.is_dir():  # another process may have built it while this one waited
                build_aside(folder, build)
        finally:
            lock.release()
    except OSError as error:
        raise ModelError(
            f"{folder}: cannot be written ({error}); free some disk space there, or set QWEN_CHAT_CACHE"
        ) from None
    return folder


def build_aside(folder: Path, build: Callable[[Path], None]) -> None:
    """Make `folder` by calling `build(aside)`, then rename. The caller sees to it that nobody else builds it."""
    prefix = f".{folder.name}.partial-"
    # We hold the lock, so nobody is writing these.
    for leftover in folder.parent.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        build(aside)
        for path in [*aside.rglob("*"), aside]:  # some writers make private files; a cache may be shared
            if not path.is_symlink():  # what a link points to is not ours to change
                path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o644))
                sync(path)
        aside.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
