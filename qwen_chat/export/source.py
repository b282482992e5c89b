"""What is exported: a model's folder, or adapters with their base, with what their run wrote down.

In: the names that a person gave. Out: an `Exported`; sequences of the run's own data; a new folder that appears when it
is whole. Every reason not to begin is told before anything is loaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_chat import files, models
from qwen_chat.chat.empty_think import taught
from qwen_chat.chat.encoded import Encoded
from qwen_chat.chat.format import ChatFormat
from qwen_chat.data import records
from qwen_chat.errors import DataError, ModelError, OptionError, OutputError, first_line
from qwen_chat.training import checkpoints, run_folder

# What belongs to a model beside its config.json and its weights.
SPEECH = (
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)
CARRIED = ("generation_config.json", "format.lock")


@dataclass(frozen=True)
class Exported:
    """A base or a whole model, the adapters over it, and run.json's content ({}: there is none)."""

    base: Path
    adapters: tuple[Path, ...]
    run: Mapping[str, Any]

    @property
    def options(self) -> Mapping[str, Any]:
        """The run's options."""
        found = self.run.get("options")
        return found if isinstance(found, dict) else {}

    @property
    def folder(self) -> Path:
        """Where tokenizer and template lie: the first adapter's folder if they are there, else the base's."""
        adapter = self.adapters[0] if self.adapters else self.base
        return adapter if (adapter / "tokenizer_config.json").is_file() else self.base

    def copy_speech(self, folder: Path, names: Sequence[str] = (*SPEECH, *CARRIED)) -> None:
        """Tokenizer, template, generation config and certificate, as they are: the adapter's, where it has its own."""
        for name in names:
            for origin in (self.adapters[0] if self.adapters else self.base, self.folder, self.base):
                if found := [path for path in origin.glob(name) if path.is_file()]:
                    for path in found:
                        shutil.copyfile(path, folder / path.name)
                    break

    def data(self, given: Sequence[str]) -> tuple[str, ...]:
        """Data files: those that are given, else the run's held-out ones, else those that it learnt from."""
        if given:
            return tuple(given)
        options = self.options
        named = options.get("eval_data_path") or options.get("data_path") or ()
        gone = [name for name in named if not Path(name).exists()]
        if not named or gone:
            what = (
                f"{gone[0]} is not there any more"
                if gone
                else "no run.json tells which data it was trained on"
            )
            raise OptionError(f"-d: {what}; give conversations to compare on")
        return tuple(str(name) for name in named)

    def chat_format(self, tokenizer: Any) -> ChatFormat:
        """The format that the run trained in."""
        options = self.options
        return ChatFormat(
            tokenizer,
            tool_style=options.get("tool_style") or "auto",
            language=options.get("tool_language") or "auto",
            template_kwargs=options.get("template_kwargs"),
            system=options.get("system"),
        )

    def sequences(self, fmt: ChatFormat, paths: Sequence[str], tokens: int) -> list[Encoded]:
        """The first conversations of the data as they were trained, while they fit into a batch of so many tokens."""
        data = records.open_records(paths)
        learnt = taught(fmt, self.options.get("empty_think"))
        found: list[Encoded] = []
        longest = 0
        for i in range(len(data)):
            for sequence in learnt.encode_many([data[i]])[0]:
                longest = max(longest, len(sequence.input_ids))
                if found and (len(found) + 1) * longest > tokens:
                    return found
                found.append(sequence.part(0, min(tokens, len(sequence.input_ids))))
        if not found:
            raise DataError(f"{paths[0]}: no conversation to compare on")
        return found


def find_exported(model: str | None, adapters: Sequence[str], *, any_base: bool = False) -> Exported:
    """ModelError where a folder is missing, half-written, or the base is not the one that the run trained over."""
    folders = tuple(Path(name).expanduser() for name in adapters)
    if not folders:
        base = models.resolve(model)
        return Exported(base, (), run_folder.read_run_json(base))
    for folder in folders:
        models.adapter_base(folder)
        if not (folder / "adapter_model.safetensors").is_file():
            raise ModelError(
                f"{folder}: adapter_config.json without adapter_model.safetensors; the adapter is half-written: save or"
                " copy it again"
            )
        if run_folder.read_run_json(folder).get("state") == "running":
            raise ModelError(
                f"{folder}: its run has not finished (run.json); let it finish, or give a finished one"
            )
    base = models.resolve(model or models.adapter_base(folders[0]))
    run = run_folder.read_run_json(folders[0])
    trained = (run.get("shaped_by") or {}).get("model")
    if trained and not any_base and trained != checkpoints.model_fingerprint(base):
        raise ModelError(
            f"{base}: not the weights that {folders[0]} was trained over (run.json has their fingerprint); give that"
            " base with -m, or --any_base True"
        )
    return Exported(base, folders, run)


def check_new(folder: Path) -> None:
    """OutputError where something lies at `folder` already."""
    if folder.exists() or folder.is_symlink():
        raise OutputError(
            f"{folder}: there is something already; nothing is overwritten: give a new name with -o"
        )


def build_new(folder: Path, build: Callable[[Path], None]) -> None:
    """Make a folder that appears when it is whole; OutputError where the disk is full or something is in its place."""
    check_new(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        files.build_aside(folder, build)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written ({first_line(error)}); nothing was left there: free some disk space, or give"
            " another disk's folder with -o"
        ) from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
