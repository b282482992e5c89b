"""The folder of a run: its name, what may lie in it, and `run.json`.

In: a Run. Out: a path that is safe to write to, or an OutputError that says what stands in the way. No torch:
a folder that cannot be used is refused before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from qwen_chat.arguments import Run
from qwen_chat.errors import CheckpointError, OutputError

OUTPUTS = Path(__file__).resolve().parents[1] / "finetune" / "io_file" / "output_data"
RUN_FILE, LOG_FILE = "run.json", "train_log.jsonl"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_OWN = frozenset({RUN_FILE, LOG_FILE, "runs"})  # runs: tensorboard's

# What may change when a run goes on: it does not touch the weights.
_FREE = frozenset(
    {"output_dir", "check", "save_strategy", "save_steps", "save_total_limit", "logging_steps", "report_to"}
    | {"eval_data_path", "eval_strategy", "per_device_eval_batch_size", "resume_from_checkpoint", "layout"}
    | {"lazy_preprocess", "gradient_checkpointing", "on_error", "trust_remote_code"}
)


def choose(run: Run, now: datetime | None = None) -> Path:
    """`-o`, or a new folder under finetune/io_file/output_data/ named after data, method and time."""
    if run.train.output_dir is not None:
        return Path(run.train.output_dir).expanduser()
    data = re.sub(r"[^\w.-]+", "_", Path(run.data.data_path[0]).name.partition(".")[0]) or "data"
    return OUTPUTS / f"{data}-{run.method}-{(now or datetime.now()):%Y%m%d-%H%M%S}"


def check(folder: Path) -> None:
    """Raise OutputError unless `folder` can be made, or holds only the checkpoints of an unfinished run."""
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise OutputError(f"{parent}: a file; the output needs a folder: give another -o")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent}: no permission to write; give another folder with -o")
    if not folder.exists():
        return
    names = [path.name for path in folder.iterdir()]
    foreign = sorted(name for name in names if name not in _OWN and not _CHECKPOINT.fullmatch(name))
    record = read_run(folder)
    if record.get("state") == "finished":
        raise OutputError(
            f"{folder}: holds a finished run; nothing is overwritten: give a new folder with -o"
        )
    if foreign:
        shown = ", ".join(foreign[:3]) + (" ..." if len(foreign) > 3 else "")
        raise OutputError(f"{folder}: holds something else ({shown}); give a new or empty folder with -o")
    if names and not record:
        raise OutputError(f"{folder}: holds checkpoints but no {RUN_FILE}; give a new folder with -o")


def check_disk(folder: Path, needed: int) -> None:
    """Raise OutputError where the disk has less than `needed` bytes."""
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"{parent}: {free / 2**30:.1f} GiB free, the run writes up to {needed / 2**30:.1f}; "
            "free some, lower --save_total_limit, or give a folder on another disk with -o"
        )


def disk_needed(run: Run, model: Path) -> int:
    """Bytes that the result and the kept checkpoints take; float32 weights, and two moments of AdamW each."""
    weights = sum(file.stat().st_size for file in [*model.glob("*.safetensors"), *model.glob("*.bin")])
    size = weights if run.method == "full" else weights // 20
    kept = run.train.save_total_limit or 3
    copies = (
        1 if run.train.save_strategy == "no" else 1 + 3 * (kept + 1)
    )  # one is written before one is removed
    return size * copies


def identity(run: Run, data: str) -> str:
    """A hash of everything that shapes the weights: two runs with the same one may share a folder."""
    options = {name: value for name, value in run.as_dict().items() if name not in _FREE}
    return hashlib.sha256(json.dumps([options, data], sort_keys=True, default=str).encode()).hexdigest()


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step, if there is any."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := _CHECKPOINT.fullmatch(p.name))]
    return max(found)[1] if found else None


def check_same_run(folder: Path, key: str) -> None:
    """Raise CheckpointError where the folder's run has another identity than `key`."""
    found = read_run(folder).get("identity")
    if found not in (None, key):
        raise CheckpointError(
            f"{folder}: its checkpoints are of a run with other options or data (see {RUN_FILE} in it); "
            "give the same ones to go on, or a new folder with -o"
        )


def read_run(folder: Path) -> dict[str, Any]:
    """run.json, or {} where there is none that can be read."""
    try:
        record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_run(folder: Path, record: Mapping[str, Any]) -> None:
    """Write run.json whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{RUN_FILE}.partial"
    text = json.dumps(record, ensure_ascii=False, indent=2, default=str)
    aside.write_text(text + "\n", encoding="utf-8")
    aside.replace(folder / RUN_FILE)


def tell_status(status: int) -> int:
    """Leave a rank's exit status for finetune.sh, which a launcher would turn into 1; returns it."""
    folder = os.environ.get("FINETUNE_STATUS_DIR")
    if folder and status:
        (Path(folder) / os.environ.get("RANK", "0")).write_text(f"{status}\n", encoding="utf-8")
    return status
