"""What is exported: a model's folder, or adapters with their base, with what their run wrote down.

In: the names that a person gave. Out: an `Exported`; sequences of the run's own data; a new folder that appears when it
is whole. Every reason not to begin is told before anything is loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
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
MERGE_FILE = "merge.json"  # what was merged, and what the comparison found
CARRIED = ("generation_config.json", "format.lock")


@dataclass(frozen=True)
class Exported:
    """A base or a whole model, the adapters over it, and run.json's content ({}: there is none)."""

    base: Path
    adapters: tuple[Path, ...]
    run: Mapping[str, Any]

    def part(self, name: str) -> Mapping[str, Any]:
        """An object in run.json; {}: there is none."""
        return _object_in(self.run, name)

    @property
    def options(self) -> Mapping[str, Any]:
        """The run's options."""
        return self.part("options")

    @property
    def in_four_bits(self) -> bool:
        """Whether an adapter was trained over a base in 4 bits."""
        return any(run_folder.read_run_json(adapter).get("method") == "qlora" for adapter in self.adapters)

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
        told = options.get("eval_data_path") or options.get("data_path")
        named = [str(name) for name in told] if isinstance(told, list) else []
        gone = [name for name in named if not Path(name).exists()]
        if not named or gone:
            what = (
                f"{gone[0]} is not there any more"
                if gone
                else "no run.json tells which data it was trained on"
            )
            raise OptionError(f"-d: {what}; give conversations to compare on")
        return tuple(named)

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
    """ModelError where a folder is missing, half-written, or the base is not the one that a run trained over."""
    folders = tuple(Path(name).expanduser() for name in adapters)
    for folder in folders:
        models.read_adapter_config(folder)
        if not (folder / "adapter_model.safetensors").is_file():
            raise ModelError(
                f"{folder}: adapter_config.json without adapter_model.safetensors; the adapter is half-written: save or"
                " copy it again"
            )
        if run_folder.read_run_json(folder).get("state") == "running":
            raise ModelError(
                f"{folder}: its run has not finished (run.json); let it finish, or give a finished one"
            )
    base = models.resolve(model) if model is not None or not folders else _named_base(folders[0])
    if models.is_gguf(base):
        raise ModelError(
            f"{model or base}: a GGUF file, which is served as it is; give the folder that it was made of with -m"
        )
    for folder in folders if not any_base else ():
        trained = _object_in(run_folder.read_run_json(folder), "shaped_by").get("model")
        if trained and trained != checkpoints.model_fingerprint(base):
            raise ModelError(
                f"{base}: not the weights that {folder} was trained over (run.json has their fingerprint); give that"
                " base with -m, or --any_base True"
            )
    return Exported(base, folders, run_folder.read_run_json(folders[0] if folders else base))


def _named_base(adapter: Path) -> Path:
    """The base that an adapter names, which the person has not typed."""
    name = models.adapter_base(adapter)
    try:
        return models.resolve(name)
    except ModelError as error:
        raise ModelError(f"{adapter}: its base is not at hand; give it with -m ({error})") from None


def _object_in(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def shown_name(folder: Path) -> str:
    """What a model is called elsewhere: its folder's name; in the hub's cache the name that it has on the hub."""
    path = Path(os.path.abspath(folder))  # a name for "." too
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rpartition("--")[2]
    return path.name


def shown_path(path: Path) -> str:
    """A path as a word of a command that takes flags."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def check_new(folder: Path) -> None:
    """OutputError where something lies at `folder` already, or nothing can."""
    try:
        taken = folder.name in ("", "..") or folder.exists() or folder.is_symlink()
    except OSError as error:
        raise _not_written(folder, error) from None
    if taken:
        raise OutputError(
            f"{folder}: there is something already; nothing is overwritten: give a new name with -o"
        )


def build_new(folder: Path, build: Callable[[Path], None]) -> None:
    """Make a folder that appears when it is whole; OutputError where the disk is full, something is in its place, or
    another process makes it."""
    check_new(folder)
    lock = files.Lock(folder.with_name(f".{folder.name}.lock"), signed=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not lock.take():
            raise OutputError(
                f"{folder}: another process is making it ({lock.holder()}); wait, or give a new name with -o"
            )
        try:
            check_new(folder)  # the other process may have just made it
            files.build_aside(folder, build)
        finally:
            lock.release()
    except OSError as error:
        raise _not_written(folder, error) from None


@contextlib.contextmanager
def room_beside(folder: Path) -> Iterator[Path]:
    """A folder on the disk of `folder` for what leads to it; gone at the end. OutputError where there is no place."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        room = tempfile.TemporaryDirectory(prefix=".merged-", dir=folder.parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise _not_written(folder, error) from None
    with room as name:
        yield Path(name)


def _not_written(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{folder}: cannot be written ({first_line(error)}); nothing was left there: free some disk space, or give"
        " another folder with -o"
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Names of files whose bytes are no UTF-8 are written as JSON's escapes of what Python makes of them."""
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
