"""Checkpoints that are whole or not there, and a run's folder that one run at a time writes into.

In: what the Trainer writes, into a folder aside. Out: `checkpoint-N` with a manifest of sizes and hashes,
renamed into place only when every byte is on the disk; on the way back the newest one that its manifest
confirms. Beside it what keeps a run alone: the lock of OUTPUT_DIR.

    checkpoint-N/   the Trainer's files (safetensors, optimizer, scheduler, RNG states, DeepSpeed's shards)
                    run.json       the options, data and choices that shaped it (run_folder.py)
                    manifest.json  {"files": {name: [bytes, sha256]}}, written last
    .writing/       a checkpoint in the making; a leftover of a killed run, removed by the next one
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_chat import files
from qwen_chat.errors import CheckpointError, OutputError, TrainingError, first_line

MANIFEST, RUN_FILE = "manifest.json", "run.json"
LOCK, ASIDE = ".lock", ".writing"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


# --------------------------------------------------------------------------------------- writing, verifying


def steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, checkpoint) of a folder, oldest first; sound or not."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := CHECKPOINT.fullmatch(p.name))]
    return sorted(found)


@contextlib.contextmanager
def written_aside(
    folder: Path, name: str, *, first: bool, barrier: Callable[[], None], record: Mapping[str, Any]
) -> Iterator[Path]:
    """Yields the folder that all ranks write `name` into; afterwards it is sealed and renamed, or removed.

    first: this is the one rank that prepares and seals. A failed write ends as TrainingError; what was there
    before is untouched.
    """
    aside, final = folder / ASIDE, folder / name
    if first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    barrier()
    try:
        yield aside
        barrier()
        if first:
            text = json.dumps(dict(record), ensure_ascii=False, default=str)
            files.write_whole(aside / name / RUN_FILE, text + "\n")
            seal(aside / name)
            if final.exists():  # a damaged one of the same step
                shutil.rmtree(final)
            os.rename(aside / name, final)
            files.sync(folder)
            shutil.rmtree(aside, ignore_errors=True)
    except Exception as error:
        if not is_write_error(error):
            raise
        free = shutil.disk_usage(folder).free
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        kept = ", ".join(path.name for _, path in steps(folder)) or "none"
        raise TrainingError(
            f"{final}: could not be written ({first_line(error, 160)}; {free / 2**20:.0f} MiB were free). Sound"
            f" checkpoints: {kept}. Free some space, then the same command with -o {folder} goes on"
        ) from None
    barrier()


def is_write_error(error: BaseException) -> bool:
    """A disk that is full or fails: said by Python, by torch's writer or by safetensors, each in its way."""
    if isinstance(error, OSError):
        return not isinstance(error, ConnectionError | TimeoutError)
    text = str(error)
    signs = (
        "PytorchStreamWriter",
        "No space left",
        "StorageFull",
        "unexpected pos",
        "Disk quota",
        "I/O error",
    )
    return any(sign in text for sign in signs)


def seal(folder: Path) -> None:
    """Flush every file to the disk, give it the umask's mode, and write the manifest as the last one."""
    open_to_umask(folder)
    listed = {}
    for file in _files(folder):
        listed[str(file.relative_to(folder))] = [file.stat().st_size, files.sha256(file)]
        files.sync(file)
    files.write_whole(folder / MANIFEST, json.dumps({"files": listed}, indent=1) + "\n")
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        files.sync(path)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: one line, or None where every file is as its manifest says."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"no {MANIFEST} (it was never finished)"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, (size, digest) in sorted(listed.items(), key=lambda item: int(item[1][0])):
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes, expected {size:,}"
        if files.sha256(file) != digest:
            return f"{name} has other content than was written"
    return None


def newest_sound(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and a line for each newer one that is damaged and passed over."""
    notes: list[str] = []
    for _, path in reversed(steps(folder)):
        found = damage(path)
        if found is None:
            return path, notes
        notes.append(f"{path.name} is damaged ({found}): passed over")
    return None, notes


def prune(folder: Path, step: int, limit: int | None, keep: Path | None = None) -> None:
    """After checkpoint `step` is whole: remove the oldest above `limit`, but not `keep` (the best one).

    None, or a limit below 1, removes none of them (as transformers reads it).
    What lies after `step` is of an attempt that was given up, and goes first.
    """
    found = steps(folder)
    for path in [path for number, path in found if number > step]:
        _remove(path)
    old = [path for number, path in found if number < step and path != keep]
    spared = 1 + (keep is not None and keep.name != f"checkpoint-{step}")
    for path in old[: max(0, len(old) + spared - limit)] if limit and limit > 0 else ():
        _remove(path)


def _remove(path: Path) -> None:
    """The manifest goes first: a checkpoint that is half removed is a damaged one."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def move_into(aside: Path, folder: Path) -> None:
    """Everything in `aside` to `folder`, flushed, in the umask's modes: whole files only."""
    open_to_umask(aside)
    for file in _files(aside):
        files.sync(file)
        target = folder / file.relative_to(aside)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    files.sync(folder)
    shutil.rmtree(aside, ignore_errors=True)


def open_to_umask(folder: Path) -> None:
    """Files as the umask wants them: safetensors writes 0600, which nobody else could read."""
    try:  # os.umask would set it for a moment, for every thread, to read it
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        mask = int(next(line.split()[1] for line in status.splitlines() if line.startswith("Umask:")), 8)
    except (OSError, StopIteration, ValueError):
        mask = os.umask(0o022)
        os.umask(mask)
    for file in _files(folder):
        if not file.is_symlink():
            file.chmod(0o666 & ~mask)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


# ------------------------------------------------------------------------------------------- same run again


def model_fingerprint(model: Path) -> str:
    """A hash of a model's config and weights; of a large file 64 samples: other weights differ everywhere."""
    digest = hashlib.sha256()
    with contextlib.suppress(OSError):
        digest.update((model / "config.json").read_bytes())
    for file in sorted([*model.glob("*.safetensors"), *model.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        if size < 64 * 2**20:
            digest.update(file.read_bytes())
            continue
        with file.open("rb") as handle:
            for part in range(64):
                handle.seek(size * part // 64)
                digest.update(handle.read(65536))
    return digest.hexdigest()[:32]


def differences(then: Mapping[str, Any], now: Mapping[str, Any], free: frozenset[str]) -> list[str]:
    """What of a stored run's `shaped_by` is another now: a line each. `free`: options that may change."""
    found = []
    old, new = then.get("options", {}), now.get("options", {})
    for name in sorted({*old, *new} - free):
        before, after = _as_json(old.get(name)), _as_json(new.get(name))
        if before != after:
            found.append(f"--{name}: {_as_text(before)} then, {_as_text(after)} now")
    for name, told in (
        ("data", "the data"),
        ("model", "the model"),
        ("world_size", "the number of processes"),
    ):
        before, after = then.get(name), now.get(name)
        if before != after:
            values = f": {before} then, {after} now" if name == "world_size" else " has other content"
            found.append(told + values)
    return found


def check_unchanged(found: list[str], folder: Path, *, anyway: bool) -> list[str]:
    """Raise CheckpointError naming each change; with --resume_anyway return the lines to print."""
    if not found:
        return []
    if anyway:
        return [f"resumed anyway with a change: {line}" for line in found]
    changes = "\n".join(f"  {line}" for line in found)
    raise CheckpointError(
        f"{folder}: its checkpoints belong to a run with other settings:\n{changes}\n"
        "give the same ones to go on, a new folder with -o to begin anew, or --resume_anyway True"
    )


def _as_json(value: object) -> Any:
    """As JSON gives it back: tuples are lists there."""
    return json.loads(json.dumps(value, default=str))


def _as_text(value: object) -> str:
    return (
        " ".join(map(str, value)) if isinstance(value, list) else "not given" if value is None else str(value)
    )


# ------------------------------------------------------------------------------------------------- the lock


def lock(folder: Path) -> files.Lock:
    """OUTPUT_DIR belongs to one run at a time. Raises OutputError where another holds it, naming that run."""
    found = files.Lock(folder / LOCK, signed=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = found.take()
    except OSError as error:
        raise OutputError(
            f"{found.path}: cannot be written ({error.strerror}); give another folder with -o"
        ) from None
    if not taken:
        raise OutputError(
            f"{folder}: a run is writing into it ({found.holder()}); wait, or give another folder with -o"
        )
    return found
