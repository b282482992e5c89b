"""The folder of a run: its name, what may lie in it, and `run.json`.

In: a Run. Out: a path that is safe to write to, or an OutputError that says what stands in the way. No torch:
a folder that cannot be used is refused before anything is loaded.
"""

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from qwen_chat import files, place
from qwen_chat.errors import CheckpointError, OutputError
from qwen_chat.flags import deepspeed_file
from qwen_chat.flags.run_options import Run
from qwen_chat.training import checkpoints, memory_plan
from qwen_chat.training.checkpoints import RUN_FILE

LOG_FILE, LOSSES_FILE = "train_log.jsonl", "losses.json"
PAGE_FILE, PICTURE_FILE = "report.html", "loss.png"
# runs: tensorboard's; page and picture of an earlier end
_OWN = frozenset(
    {RUN_FILE, LOG_FILE, LOSSES_FILE, "runs", PAGE_FILE, PICTURE_FILE, checkpoints.LOCK, checkpoints.ASIDE}
)
# What a run that was killed while it saved its result may have left.
_RESULT_FILES = re.compile(
    r"(adapter_|model|tokenizer|config|generation_config|chat_template|added_tokens|special_|vocab|merges|format)\S*"
)

# What may change when a run goes on: it does not touch the weights.
_FREE = frozenset(
    {
        "output_dir",
        "check",
        "config",
        "plan_anyway",
        "resume",
        "resume_anyway",
        "model",
        "data_path",
        "general_data",
        "redact",  # told by the data's fingerprint
        "lazy_preprocess",
    }
    | {"keep_best", "save_strategy", "save_steps", "save_total_limit", "save_on_each_node"}
    | {"gradient_checkpointing", "on_error", "trust_remote_code", "ddp_timeout", "skip_memory_metrics"}
    | {"logging_steps", "logging_strategy", "logging_first_step", "report_to", "run_name", "project"}
    | {"log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "include_num_input_tokens_seen"}
    | {"dataloader_num_workers", "dataloader_prefetch_factor"}
    | {"dataloader_persistent_workers", "dataloader_pin_memory"}
)
_EVALUATION = frozenset(
    {"eval_data_path", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"}
    | {"per_device_eval_batch_size"}
)
_LENGTH = frozenset({"max_steps", "num_train_epochs"})


def free(options: Mapping[str, Any]) -> frozenset[str]:
    """The options (by flag) that may change when a run with these goes on: none of them touches the weights.

    Evaluation does where the rate or the model that is kept follows from it. The run's length does, unless the
    rate is constant: every other schedule is stretched over it.
    """
    schedule = str(options.get("lr_scheduler_type"))
    decided = schedule in ("reduce_lr_on_plateau", "greedy") or options.get("load_best_model_at_end")
    return _FREE | (frozenset() if decided else _EVALUATION) | (_LENGTH if schedule == "constant" else set())


def choose_folder(run: Run, now: datetime | None = None) -> Path:
    """`-o`, or a new folder under place.OUTPUTS, named after data, method and time."""
    if run.train.output_dir is not None:
        return Path(run.train.output_dir).expanduser()
    if run.train.resume not in ("auto", "never"):
        source = Path(run.train.resume)
        return source.parent if checkpoints.CHECKPOINT.fullmatch(source.name) else source
    data = re.sub(r"[^\w.-]+", "_", Path(run.data.data_path[0]).name.partition(".")[0]) or "data"
    return place.OUTPUTS / f"{data}-{run.method}-{(now or datetime.now()):%Y%m%d-%H%M%S}"


def check_usable(folder: Path) -> None:
    """Raise OutputError unless `folder` can be made, or holds only the checkpoints of an unfinished run."""
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise OutputError(f"{parent}: a file; the output needs a folder: give another -o")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent}: no permission to write; give another folder with -o")
    if not folder.exists():
        return
    names = [path.name for path in folder.iterdir()]
    foreign = sorted(
        name for name in names if name not in _OWN and not checkpoints.CHECKPOINT.fullmatch(name)
    )
    record = read_run_json(folder)
    if record.get("state") == "running":
        foreign = [name for name in foreign if not _RESULT_FILES.fullmatch(name)]
    if record.get("state") == "finished":
        raise OutputError(
            f"{folder}: holds a finished run; nothing is overwritten: give a new folder with -o"
        )
    if foreign:
        shown = ", ".join(foreign[:3]) + (" ..." if len(foreign) > 3 else "")
        raise OutputError(f"{folder}: holds something else ({shown}); give a new or empty folder with -o")
    if set(names) - {checkpoints.LOCK, checkpoints.ASIDE, f".{RUN_FILE}.partial"} and not record:
        raise OutputError(f"{folder}: holds checkpoints but no {RUN_FILE}; give a new folder with -o")


def check_disk(folder: Path, needed: int) -> None:
    """Raise OutputError where the disk has less than `needed` bytes, those that the folder takes included."""
    free = memory_plan.disk_free(folder)
    for name, _, names in os.walk(folder):  # what an earlier start of the run left: it makes room for itself
        for file in names:
            with contextlib.suppress(FileNotFoundError):
                free += os.lstat(os.path.join(name, file)).st_size
    if free < needed:
        raise OutputError(
            f"{folder}: its disk can give {free / 2**30:.1f} GiB, the run writes up to {needed / 2**30:.1f};"
            " free some, lower --save_total_limit, or give another disk's folder with -o"
        )


def shaped_by(run: Run, data: str, model: Path) -> dict[str, Any]:
    """Everything that shapes the weights: a resumed run must agree with it. `data`: its fingerprint."""
    options = run.as_dict()
    if run.train.deepspeed is not None:
        options["deepspeed"] = deepspeed_file.read_deepspeed(run.train.deepspeed)[0]
    return {
        "options": options,
        "data": data,
        "model": checkpoints.model_fingerprint(model),
        "world_size": memory_plan.ranks(),
    }


@dataclass(frozen=True)
class Resume:
    """Where a run goes on: `source` holds checkpoints (or is one); `choices` are those it began with."""

    source: Path | None
    choices: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def begun(run: Run, folder: Path) -> dict[str, Any]:
    """run.json of the run that this one goes on from; {} where it begins."""
    source = _source(run, folder)
    return read_run_json(source) if source != folder or checkpoints.steps(folder) else {}


def _source(run: Run, folder: Path) -> Path:
    return folder if run.train.resume in ("auto", "never") else Path(run.train.resume)


def resume(run: Run, folder: Path, shape: Mapping[str, Any]) -> Resume:
    """What `--resume` means for this folder; CheckpointError names every change since then."""
    source = _source(run, folder)
    present = bool(checkpoints.steps(folder)) if source == folder else True
    if run.train.resume == "never" and present:
        raise OutputError(f"{folder}: holds checkpoints, which --resume never would replace; give a new -o")
    record = read_run_json(source)
    if not present:
        return _repeat(run, shape)
    if (
        source != folder
        and checkpoints.CHECKPOINT.fullmatch(source.name) is None
        and not checkpoints.steps(source)
    ):
        raise CheckpointError(
            f"--resume {source}: no checkpoint; expected .../checkpoint-N or a run's folder"
        )
    found = checkpoints.differences(record.get("shaped_by", {}), shape, free(shape["options"]))
    notes = checkpoints.check_unchanged(found, source, anyway=run.train.resume_anyway)
    return Resume(source, record.get("choices", {}), tuple(notes))


def _repeat(run: Run, shape: Mapping[str, Any]) -> Resume:
    """A run from its first step; one that repeats another (--config run.json) makes that one's choices."""
    then = run.repeats.get("shaped_by", {})
    changed = checkpoints.differences(then, shape, free(shape["options"])) if then else []
    notes = [f"repeats {run.train.config}, with a change: {line}" for line in changed]
    return Resume(None, run.repeats.get("choices", {}), tuple(notes))


def checkpoint(found: Resume) -> tuple[Path | None, list[str]]:
    """The checkpoint to load, every byte verified, and what is to be said. For one rank alone."""
    if found.source is None:
        return None, []
    if checkpoints.CHECKPOINT.fullmatch(found.source.name):
        problem = checkpoints.damage(found.source)
        if problem is not None:
            raise CheckpointError(f"{found.source}: {problem}; give another checkpoint, or --resume auto")
        return _with_its_optimizer(found.source), [f"resumed from {found.source.name} ({found.source})"]
    path, notes = checkpoints.newest_sound(found.source)
    if path is None:
        return None, [*notes, "no sound checkpoint: begins at step 0"]
    return _with_its_optimizer(path), [*notes, f"resumed from {path.name}"]


def _with_its_optimizer(path: Path) -> Path:
    """The checkpoint, unless it holds weights alone: optimizer and schedule would begin anew without a word."""
    sharded = any(path.glob("global_step*"))  # DeepSpeed's folder holds all of it
    if sharded or (any(path.glob("optimizer*")) and (path / "scheduler.pt").is_file()):
        return path
    raise CheckpointError(
        f"{path}: holds no optimizer and scheduler state (--save_only_model?), so nothing can go on from it;"
        " begin a new run over its weights: --lora_weight_path for an adapter, else -m, and a new -o"
    )


def read_run_json(folder: Path) -> dict[str, Any]:
    """run.json, or {} where there is none that can be read."""
    try:
        record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def write_run_json(folder: Path, record: Mapping[str, Any]) -> None:
    """Write run.json whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, ensure_ascii=False, indent=2, default=str)
    files.write_whole(folder / RUN_FILE, text + "\n")


def tell_status(status: int) -> int:
    """Leave a rank's exit status for who started the launcher, which would turn into 1; returns it."""
    folder = os.environ.get("FINETUNE_STATUS_DIR")
    if folder and status:
        (Path(folder) / os.environ.get("RANK", "0")).write_text(f"{status}\n", encoding="utf-8")
    return status
