"""A run as its folder tells it, finished or not.

In: run.json, train_log.jsonl, losses.json, samples.json, evaluation.json. Out: a `PastRun`; a file that was cut by a
kill loses its last line alone.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qwen_chat import place
from qwen_chat.conversation import Json
from qwen_chat.errors import OptionError
from qwen_chat.training.checkpoints import RUN_FILE
from qwen_chat.training.run_folder import LOG_FILE, LOSSES_FILE

SAMPLES_FILE = "samples.json"
EVALUATION_FILE = "evaluation.json"  # what evaluate.py writes with -o
# The parts of run.json that a page walks through.
_PARTS: dict[str, type] = {"given": list, "warnings": list, "decisions": list, "options": dict, "data": dict}
_PARTS |= dict.fromkeys(("versions", "plan", "changes", "held_out", "general"), dict)


@dataclass(frozen=True)
class Sample:
    """One question, and its answers by the base and by what was tuned."""

    question: str
    before: str
    after: str


@dataclass(frozen=True)
class PastRun:
    """`facts`: run.json. `steps`, `evaluations`: lines of the log, oldest first; a step that was done again after a
    kill counts once. `changes`: see evaluation.scores.loss_change. `evaluation`: evaluate.py's report, or empty."""

    folder: Path
    facts: Json
    steps: tuple[Json, ...]
    evaluations: tuple[Json, ...]
    samples: tuple[Sample, ...]
    changes: Json
    evaluation: Json

    @classmethod
    def read(cls, folder: Path) -> PastRun:
        """Raises OptionError where the folder holds no run."""
        file = folder / RUN_FILE
        try:
            facts: Json = json.loads(file.read_text(encoding="utf-8-sig"))
            if not all(isinstance(facts.get(key, kind()), kind) for key, kind in _PARTS.items()):
                raise ValueError
            facts["options"].items()
        except OSError as error:
            raise OptionError(f"{file}: {error.strerror}; expected the folder of a run") from None
        except (ValueError, KeyError, AttributeError):
            raise OptionError(
                f"{file}: not the record of a run; it is damaged or another program's"
            ) from None
        lines = [line for line in _lines(folder / LOG_FILE) if isinstance(line.get("step"), int)]
        steps = {line["step"]: line for line in lines if _has_numbers(line, "loss", "learning_rate")}
        evaluations = {line["step"]: line for line in lines if _has_numbers(line, "eval_loss")}
        asked = _lines(folder / SAMPLES_FILE)
        names = [name.name for name in fields(Sample)]
        samples = [Sample(*(str(one.get(name, "")) for name in names)) for one in asked]
        return cls(
            folder,
            facts,
            tuple(steps[number] for number in sorted(steps)),
            tuple(evaluations[number] for number in sorted(evaluations)),
            tuple(samples),
            facts.get("changes") or _begun(folder),
            _object(folder / EVALUATION_FILE),
        )

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def is_finished(self) -> bool:
        return self.facts.get("state") == "finished"

    @property
    def command(self) -> str:
        """The command that repeats it: the flags that were given."""
        words = ["bash finetune/finetune.sh" if place.IS_CHECKOUT else place.LAUNCHER]
        for name in self.facts.get("given", ()):
            value = self.facts["options"].get(name)
            values = value if isinstance(value, list) else [value]
            if isinstance(value, dict):
                values = [json.dumps(value, ensure_ascii=False)]
            words.append(f"--{name} " + shlex.join(str(one) for one in values))
        return " \\\n  ".join(words)


def names_of(runs: Sequence[PastRun]) -> list[str]:
    """What runs beside each other are called: by their folders' names, or by the paths where two have one name."""
    often = Counter(run.name for run in runs)
    return [run.name if often[run.name] == 1 else str(run.folder) for run in runs]


def _has_numbers(line: Json, *keys: str) -> bool:
    return all(isinstance(line.get(key), (int, float)) for key in keys)


def _begun(folder: Path) -> Json:
    """Of a run that has not ended: what was measured before its first step."""
    found = {}
    for name, kind in _object(folder / LOSSES_FILE).items():
        if before := kind.get("before"):
            tokens = sum(count for _, count in before)
            mean = sum(loss for loss, _ in before) / max(1, tokens)
            found[name] = {"conversations": len(before), "tokens": tokens, "before": mean}
    return found


def _object(file: Path) -> Json:
    """A file's JSON object; an empty one where there is none that can be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where there is no file, without one that is cut."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.split("\n"):  # a text may hold what Python takes for other ends of lines
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
