"""Conversations that a run does not learn, held-out and general ones: the loss of each, before the first step and after
the last.

In: a session, and its trainer when the model can compute and when it has learnt. Out: losses.json in the run's folder.
A run that goes on keeps what its first start measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen_chat import files
from qwen_chat.console import is_rank_zero, rank_zero
from qwen_chat.training import checkpoints
from qwen_chat.training.batches import Conversations, held_out_windows
from qwen_chat.training.run_folder import LOSSES_FILE
from qwen_chat.training.session import Session
from qwen_chat.training.trainer import ChatTrainer

HELD_OUT, GENERAL = "held_out", "general"


class BeforeAfter:
    """`losses`: of each kind `fingerprint`, `before` and `after`, the last two as trainer.Losses where they are known;
    on rank 0 alone."""

    def __init__(self, session: Session) -> None:
        data = {HELD_OUT: session.data.held_out, GENERAL: session.data.general}
        self.windows = {
            name: held_out_windows(session.run, found, session.args.world_size)
            for name, found in data.items()
            if found is not None
        }
        self.path = session.folder / LOSSES_FILE
        source = session.before.source
        if source is not None and checkpoints.CHECKPOINT.fullmatch(source.name):
            source = source.parent
        self.earlier = {} if source is None else _read(source / LOSSES_FILE)
        self.losses: dict[str, dict[str, Any]] = {}

    def ready(self, trainer: ChatTrainer) -> None:
        """Measure before the first step; later, take what was measured then, of the same conversations."""
        first = trainer.state.global_step == 0
        if first and self.windows:
            count = sum(len(windows.data) for windows in self.windows.values())
            rank_zero(f"before the first step: the loss of {count:,} conversations that are not learnt")
        for name, windows in self.windows.items():
            measured = trainer.losses(windows) if first else None
            if is_rank_zero():
                found: dict[str, Any] = {"fingerprint": _fingerprint(windows.data)}
                earlier = self.earlier.get(name, {})
                if measured is None and earlier.get("fingerprint") == found["fingerprint"]:
                    measured = earlier.get("before")
                self.losses[name] = found if measured is None else found | {"before": measured}
        self._write()

    def end(self, trainer: ChatTrainer) -> dict[str, float]:
        """Measure after the last step. Returns the held-out data's evaluation; empty where there are none."""
        evaluation: dict[str, float] = trainer.evaluate() if HELD_OUT in self.windows else {}
        for name, windows in self.windows.items():
            after = trainer.evaluated if name == HELD_OUT else trainer.losses(windows)
            if is_rank_zero():
                self.losses[name]["after"] = after
        self._write()
        return evaluation

    def _write(self) -> None:
        if self.losses:
            files.write_whole(self.path, json.dumps(self.losses) + "\n")


def _read(path: Path) -> Mapping[str, Any]:
    """What an earlier start measured; nothing where its file is not there or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _fingerprint(data: Conversations) -> str:
    """Of the conversations' tokens, learnt ones marked."""
    found = hashlib.sha256()
    for i in range(len(data)):
        for sequence in data[i]:
            found.update(np.asarray(sequence.input_ids, np.int32).tobytes())
            found.update(np.asarray(sequence.spans, np.int32).tobytes() + b".")
    return found.hexdigest()
