"""Numbers of a few bits by other projects' libraries, each in an environment of its own: they want an older
transformers than the rest of this project.

In: a model's folder, the run's data, that environment's interpreter. Out: a new folder with the library's own files,
our tokenizer and template, and `export.json`: perplexity before and after. `worker.py` is what runs there.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_chat.chat.encoded import Encoded
from qwen_chat.errors import OptionError, OutputError, first_line, printable
from qwen_chat.export.source import Exported, build_new, write_json
from qwen_chat.weights import model_tensors

WORKER = Path(__file__).with_name("worker.py")
# What each way out needs in its environment: modules to look for, and what pip installs.
NEEDS = {
    "openvino": (("optimum.intel", "openvino", "nncf"), "optimum-intel[openvino,nncf]"),
    "gptq": (("optimum.gptq", "gptqmodel"), "optimum gptqmodel"),
    "compressed": (("llmcompressor",), "llmcompressor"),
}
_GROUPS = (128, 64, 32)  # columns that share a scale: the most that every layer can be cut into


@dataclass(frozen=True)
class WorkerJob:
    """What the worker is told. held_out: {"ids": [...], "labels": [...]} each."""

    to: str
    model: str
    folder: str
    settings: Mapping[str, Any]
    calibration: Sequence[Sequence[int]]
    held_out: Sequence[Mapping[str, Sequence[int]]]


def settings(to: str, kind: str | None, group: int = _GROUPS[0]) -> dict[str, Any]:
    """The library's own arguments for a type; the first of a library where none is given. group: columns that share a
    scale. OptionError where it has no type of that name."""
    four_bits = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    known: dict[str, dict[str, dict[str, Any]]] = {
        "openvino": {
            "int8": {"bits": 8, "sym": False},
            "int4": {
                "bits": 4,
                "sym": False,
                "group_size": group,
                "ratio": 1.0,
                "group_size_fallback": "adjust",
            },
        },
        "gptq": {
            "int4": {"bits": 4, "group_size": group, "desc_act": False, "sym": True},
            "int8": {"bits": 8, "group_size": group, "desc_act": False, "sym": True},
        },
        "compressed": {
            "w4a16": {  # its scheme W4A16, but for the group
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": four_bits}},
                "ignore": ["lm_head"],
            },
            "int8": {"targets": "Linear", "scheme": "W8A8", "ignore": ["lm_head"]},
        },
    }
    kind = kind or next(iter(known[to]))
    if kind not in known[to]:
        raise OptionError(f"--type {kind}: expected {' or '.join(known[to])} with --to {to}")
    return known[to][kind]


def group_size(model: Path) -> int:
    """The largest group that divides the columns of all layers. OptionError where none does."""
    stored = model_tensors(model).items()
    widths = {one.shape[1] for name, one in stored if ".layers." in name and len(one.shape) == 2}
    found = [size for size in _GROUPS if not any(width % size for width in widths)]
    if not found:
        raise OptionError(
            f"{model}: a layer of {min(width for width in widths if width % _GROUPS[-1])} columns cannot be cut into"
            f" groups of {_GROUPS[-1]}; export it with --to compressed --type int8, or --to openvino"
        )
    return found[0]


def check_environment(to: str, python: str | None) -> None:
    """OptionError where none is given, or where it cannot import what is needed."""
    modules, packages = NEEDS[to]
    cure = f"make one: python3 -m venv ENV && ENV/bin/pip install '{packages}', then --python ENV/bin/python"
    if python is None:
        raise OptionError(f"--to {to}: runs in an environment of its own; {cure}")
    if shutil.which(python) is None:
        raise OptionError(f"--python {python}: no program there; {cure}")
    program = "import importlib.util as u, sys\nprint(*(n for n in sys.argv[1:] if not u.find_spec(n)))"
    try:
        done = subprocess.run([python, "-c", program, *modules], capture_output=True, text=True)
    except OSError as error:
        raise OptionError(f"--python {python}: cannot be run ({first_line(error)}); {cure}") from None
    missing = done.stdout.split() if done.returncode == 0 else [modules[0]]
    if missing:
        raise OptionError(f"--python {python}: has no {missing[0]}; {cure}")


def write_elsewhere(
    to: str, model: Path, folder: Path, kind: str | None, python: str, data: Sequence[Encoded]
) -> dict[str, Any]:
    """Make the folder; returns what export.json holds. `data`: one half calibrates, the other measures.

    Raises OutputError with the library's last words where it fails; nothing is left then.
    """
    facts: dict[str, Any] = {}
    half = max(1, len(data) // 2)
    in_groups = to == "gptq" or (to == "compressed" and kind != "int8")
    arguments = settings(to, kind, group_size(model)) if in_groups else settings(to, kind)

    def build(aside: Path) -> None:
        job = WorkerJob(
            to=to,
            model=str(model.resolve()),
            folder=str(aside),
            settings=arguments,
            calibration=[one.input_ids for one in data[half:] or data],
            held_out=[{"ids": one.input_ids, "labels": one.labels} for one in data[:half]],
        )
        with tempfile.TemporaryDirectory() as room:
            file = Path(room) / "job.json"
            file.write_text(json.dumps(asdict(job)), encoding="utf-8")
            done = subprocess.run(
                [python, str(WORKER), str(file)], capture_output=True, text=True, errors="replace"
            )
        if done.returncode:
            words = (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise OutputError(
                f"--to {to}: {Path(python).name} ended with status {done.returncode} ({words[:300]})"
            )
        last = (done.stdout.strip().splitlines() or ["no word"])[-1]
        try:
            found = json.loads(last)
            facts.update(
                settings=dict(job.settings),
                held_out_tokens=int(found["tokens"]),
                perplexity_before=_perplexity(float(found["before"])),
                perplexity_after=_perplexity(float(found["after"])),
            )
        except (ValueError, KeyError, TypeError):
            raise OutputError(
                f"--to {to}: {Path(python).name} ended without what it measured ({printable(last, 300)}); make its"
                f" environment anew: pip install '{NEEDS[to][1]}'"
            ) from None
        Exported(model, (), {}).copy_speech(aside)
        write_json(aside / "export.json", facts)

    build_new(folder, build)
    return facts


def _perplexity(loss: float) -> float | None:
    """None where there is no loss, or where no number holds it."""
    found = math.exp(loss) if loss < 700 else math.inf
    return round(found, 4) if math.isfinite(found) else None
